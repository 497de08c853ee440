"""Continuations of one text, read side by side: the text once, each of them after its prefix."""
import torch
from torch import Tensor

from model import Transformer

ROWS = 1024  # tokens of continuations that a pass reads


class Text:
    """A text that a model has read; `hidden` [S, D] are its states."""

    @torch.inference_mode()
    def __init__(self, model: Transformer, ids: list[int]):
        self.model, self.length = model, len(ids)
        self.cache = model.new_cache(len(ids))
        self.hidden = self.read(ids, torch.arange(len(ids)))

    def read(self, ids: list[int], slots: Tensor, *tree: Tensor) -> Tensor:
        device = self.model.norm.weight.device
        ids, slots, *tree = (t.to(device) for t in (torch.tensor([ids]), slots, *tree))
        span = self.length if not tree else tree[1].shape[1]
        return self.model.features(ids, slots, self.cache.first(span), *tree)[0]

    @torch.inference_mode()
    def branches(self, branches: list[tuple[int, list[int]]]) -> list[Tensor]:
        """The hidden states [L, D] at each branch's tokens, as if it were read alone.

        A branch (n, tokens) is the text's first n tokens and those. It takes slots of the cache
        after the text's and, as in a draft tree, attends by a mask to its prefix and to itself.
        """
        parts = packed([len(tokens) for _, tokens in branches])
        most = max((sum(len(branches[i][1]) for i in part) for part in parts), default=0)
        length, found = max(len(self.cache.rope), self.length + most), []
        self.cache = self.model.new_cache(length, grown_from=self.cache)
        for part in parts:
            starts, sizes = torch.tensor([(branches[i][0], len(branches[i][1])) for i in part]).T
            branch = torch.arange(len(part)).repeat_interleave(sizes)
            row = torch.arange(len(branch))
            depth = row - (sizes.cumsum(0) - sizes)[branch]
            before = torch.arange(self.length) < starts[branch, None]
            beside = (branch == branch[:, None]) & (row <= row[:, None])
            read = self.read([t for i in part for t in branches[i][1]], self.length + row,
                             starts[branch] + depth, torch.cat((before, beside), 1))
            found += read.split(sizes.tolist())
        return found


def packed(sizes: list[int]) -> list[list[int]]:
    """Indices of the branches of each pass, in order: up to ROWS tokens, or one longer branch."""
    parts, rows = [], ROWS
    for i, size in enumerate(sizes):
        if rows + size > ROWS:
            parts.append([])
            rows = 0
        parts[-1].append(i)
        rows += size
    return parts
