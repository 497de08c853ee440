"""EAGLE's drafting (arXiv 2401.15077, 2406.16858): from the target's hidden states, by one layer.

A pair is a token with the state of the token before it: the target's where the target has read it,
else the layer's own prediction. Its keys and values take the slot of that state, so slot i holds
the pair of token i + 1. Drafts are a chain, or a tree in which chance has no part.
"""
import math

import torch
from torch import Tensor

from drafters.eagle_head import EagleHead
from drafters.tree import Tree
from engine import Drafter, Settings, choose
from model import Cache, Transformer

EXPAND = 10  # of a dynamic tree: nodes expanded in each level, and children of each (EAGLE-2's)
HEIGHT = 32  # levels of a dynamic tree at most: so many nodes have room in the cache


def read_pairs(head: EagleHead, cache: Cache, target: Transformer, tokens: Tensor, hidden: Tensor,
               slots: Tensor, at: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    """The states [S, D] that the head predicts after pairs of tokens [S] and hidden [S, D]."""
    return head.features(head.embed(tokens[None], target), hidden[None], slots, cache, at, mask)[0]


def step(head: EagleHead, cache: Cache, target: Transformer, *pairs) -> tuple[Tensor, Tensor]:
    """Those states, and the logits [S, V] that they give."""
    hidden = read_pairs(head, cache, target, *pairs)
    return hidden, head.logits(hidden, target)


def levels(tree: tuple[int, ...] | int, k: int) -> list[tuple[int, int]]:
    """Of each level of a tree of height k: how many nodes have children in it, and how many each.
    """
    if isinstance(tree, int):
        return [(1, EXPAND), *[(EXPAND, EXPAND)] * (k - 1)]
    return [(math.prod(tree[:i]), n) for i, n in enumerate(tree)]


class EagleDrafter(Drafter):
    """tree: None drafts a chain; (4, 2, 1) the top 4 tokens, after each its top 2, after each of
    those its top 1; a number N the N most probable nodes of EAGLE-2's dynamic tree of height K.
    """
    wants_hidden = True

    def __init__(self, head: EagleHead, target: Transformer, tree=None):
        self.head, self.target, self.tree, self.certain = head, target, tree, tree is not None
        self.cache, self.hidden, self.tokens = None, None, None
        self.read_pairs, self.step = read_pairs, step

    def size(self, k):
        if self.tree is None:
            return k
        nodes = sum(n * children for n, children in levels(self.tree, k))
        return min(self.tree, nodes) if isinstance(self.tree, int) else nodes

    def new_cache(self, length):
        w, c = self.target.norm.weight, self.target.config
        growing = 0 if self.tree is None else sum(n for n, _ in levels(self.tree, HEIGHT))
        self.cache = self.head.new_cache(length + growing, grown_from=self.cache)
        old = self.hidden, self.tokens
        self.hidden = w.new_zeros(length, c.dim * (1 + len(self.target.taps)))
        self.tokens = torch.zeros(length, dtype=torch.long, device=w.device)
        for new, before in zip((self.hidden, self.tokens), old):
            if before is not None:
                new[:len(before)] = before

    def read(self, tokens, pos, hidden, span):
        self.tokens.index_copy_(0, pos, tokens)
        self.hidden.index_copy_(0, pos, hidden)
        # The first token has no state before it: in its place the next one's pair is made twice.
        pos = pos.clamp(min=1)
        self.read_pairs(self.head, self.cache.first(span), self.target,
                        self.tokens.index_select(0, pos), self.before(pos), pos - 1)

    def before(self, pos: Tensor) -> Tensor:
        """The target's states before the tokens at pos [S], as the head reads them: [S, D]."""
        return self.head.fuse(self.hidden.index_select(0, pos - 1))

    def propose(self, state, k, span, s, noise):
        last = state.length - 1
        self.tokens.index_copy_(0, last, state.last[1:])
        hidden, logits = self.step(self.head, self.cache.first(span), self.target, state.last[1:],
                                   self.before(last), last - 1)
        if self.tree is None:
            return self.chain(last, hidden, logits, k, span, s, noise)
        return self.grow(last, hidden, logits, k, span, s)

    def chain(self, last: Tensor, hidden: Tensor, logits: Tensor, k: int, span: int, s: Settings,
              noise: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """`propose` of a chain, from the state [1, D] and logits [1, V] after the text."""
        tokens, rows, cache = [], [logits], self.cache.first(span)
        for i in range(k):
            tokens.append(choose(logits, s, None if noise is None else noise[i:i + 1]))
            if i < k - 1:
                hidden, logits = self.step(self.head, cache, self.target, tokens[-1], hidden,
                                           last + i)
                rows.append(logits)
        return torch.cat(tokens), torch.cat(rows) if s.needs_draft_logits else None

    def grow(self, last: Tensor, hidden: Tensor, logits: Tensor, k: int, span: int,
             s: Settings) -> tuple[Tensor, Tensor | None, Tree]:
        """`propose` of a tree. A node is as probable as the draft thinks the path to it is."""
        shape, device = levels(self.tree, k), last.device
        slots = sum(n for n, _ in shape[1:])  # that the nodes with children take after the text
        cache = self.cache.first(span + slots)
        column = torch.arange(span + slots, device=device) - last  # 0: the first after the text
        seen = torch.zeros(1, slots, dtype=torch.bool, device=device)  # of them by the level's rows
        above, score, first = last.new_zeros(1), logits.new_zeros(1).float(), 0
        tokens, parents, scores, sources, rows = [], [], [], [], []
        for depth, (_, children) in enumerate(shape):
            best, token = (logits.float().log_softmax(-1) + score[:, None]).topk(children)
            nodes = sum(map(len, tokens)) + 1  # the row of this level's first
            tokens.append(token.flatten())
            scores.append(best.flatten())
            parents.append(above.repeat_interleave(children))
            sources.append(sum(map(len, rows)) + torch.arange(len(above), device=device)
                           .repeat_interleave(children))
            rows.append(logits)
            if depth + 1 == len(shape):
                break
            n = shape[depth + 1][0]
            chosen = scores[-1].topk(n).indices  # all of them in a static tree
            above, score = nodes + chosen, scores[-1].index_select(0, chosen)
            own = first + torch.arange(n, device=device)
            seen = seen.index_select(0, chosen // children)
            seen = seen | (torch.arange(slots, device=device) == own[:, None])
            mask = (column < 0) | seen.index_select(1, column.clamp(0, slots - 1)) & (
                column < slots)
            hidden, logits = self.step(
                self.head, cache, self.target, tokens[-1].index_select(0, chosen),
                hidden.index_select(0, chosen // children), last + own,
                (last + depth).expand(n), mask)
            first += n
        tokens, parents, sources = map(torch.cat, (tokens, parents, sources))
        keep = self.keep(torch.cat(scores), self.size(k))
        # Rows of the whole tree to those of what is kept: a node's parent is kept if the node is.
        parent = torch.searchsorted(keep + 1, parents.index_select(0, keep), right=True)
        parent = self.target.agree(parent)
        logits = torch.cat(rows).index_select(0, sources.index_select(0, keep)) if (
            s.needs_draft_logits) else None
        return tokens.index_select(0, keep), logits, Tree.of(parent, k)

    def keep(self, scores: Tensor, n: int) -> Tensor:
        """The n best of scores [P], in order: a node comes after its parent, which is no worse."""
        best = scores.sort(descending=True, stable=True).indices[:n]
        return best.sort().values

    def compile(self, build, by_block, whole):
        self.step = build(step)
