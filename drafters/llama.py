"""A small Llama as the draft: K steps of its own text, or of its distribution."""
import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from drafters.drafter import Drafter
from engine import Settings, next_token
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


def draft_loop(model: Transformer, cache: Cache, last: Tensor, length: Tensor, k: int, s: Settings,
               noise: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """`draft_steps`, of which the compiler sees two: the first and, as a loop, all others."""
    drafted, logits = draft_steps(model, cache, last, length, 1, s, noise)
    if k == 1:
        return drafted, logits

    def step(i, token, drafted, *logits):
        hidden = model.features(token[None], length + i - 1, cache)[0]
        token, row = next_token(model, hidden, s,
                                None if noise is None else noise.index_select(0, i))
        return (i + 1, token, drafted.index_copy(0, i, token),
                *(rows.index_copy(0, i, row) for rows in logits))

    from torch._higher_order_ops import while_loop
    more = () if logits is None else (F.pad(logits, (0, 0, 0, k - 1)),)
    start = torch.ones_like(length), drafted, F.pad(drafted, (0, k - 1)), *more
    _, _, drafted, *logits = while_loop(lambda i, *_: (i < k).all(), step, start)
    return drafted, logits[0] if logits else None


class LlamaDrafter(Drafter):
    """A small Llama as the draft. Its own drafting fills its cache, so it reads prompts only."""

    def __init__(self, model: Transformer):
        self.model, self.context = model, model.config.max_seq_len
        self.cache, self.steps = None, draft_steps

    def new_cache(self, length: int):
        self.cache = self.model.new_cache(length, grown_from=self.cache)

    def read(self, tokens, pos, hidden, span):
        tokens = tokens.clamp(max=self.model.config.vocab_size - 1)  # as in draft_steps
        self.model.features(tokens[None], pos, self.cache.first(span))

    def propose(self, state, k, span, s, noise):
        return self.steps(self.model, self.cache.first(span), state.last, state.length, k, s, noise)

    def compile(self, build, by_block, whole):
        self.steps = whole(self.model, draft_loop)
        if not self.steps:
            self.model = by_block(self.model)
            self.steps = functools.partial(draft_steps, next_token=build(next_token))
