"""A small Llama as the draft: K steps of its own text, or of its distribution."""
import torch
from torch import Tensor

from engine import Drafter, Settings, next_token
from model import Cache, Transformer


def draft_steps(model: Transformer, cache: Cache, last: Tensor, length: Tensor, k: int, s: Settings,
                noise: Tensor | None, next_token=next_token) -> tuple[Tensor, Tensor | None]:
    """`Drafter.propose` of a Llama: the next k tokens of a text of `length` that ends in `last`.

    The first step reads the last two tokens. After a round that accepted all K the draft has not
    read the last but one, after any other it reads it again: the same work whatever the outcome.
    """
    tokens, pos = last, length + torch.arange(-2, 0, device=last.device)
    if s.vocab_size > model.config.vocab_size:  # padding that only the target has
        tokens = tokens.clamp(max=model.config.vocab_size - 1)
    drafted, logits = [], []
    for i in range(k):
        hidden = model.features(tokens[None], pos, cache)[0, -1:]
        tokens, row = next_token(model, hidden, s, None if noise is None else noise[i:i + 1])
        pos = pos[-1:] + 1
        drafted.append(tokens)
        logits.append(row)
    return torch.cat(drafted), torch.cat(logits) if s.needs_draft_logits else None


class LlamaDrafter(Drafter):
    """A small Llama as the draft. Its own drafting fills its cache, so it reads prompts only."""

    def __init__(self, model: Transformer):
        self.model, self.context = model, model.config.max_seq_len
        self.cache, self.steps = None, draft_steps  # graphs.py wraps steps

    def new_cache(self, length: int):
        self.cache = self.model.new_cache(length, grown_from=self.cache)

    def read(self, tokens, pos, hidden, span):
        tokens = tokens.clamp(max=self.model.config.vocab_size - 1)  # as in draft_steps
        self.model.features(tokens[None], pos, self.cache.first(span))

    def propose(self, state, k, span, s, noise):
        return self.steps(self.model, self.cache.first(span), state.last, state.length, k, s, noise)
