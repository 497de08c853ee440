"""EAGLE's drafting (arXiv 2401.15077, 2406.16858): from the target's hidden states, by one layer.

A pair is a token with the state of the token before it: the target's where the target has read it,
else the layer's own prediction. Its keys and values take the slot of that state, so slot i holds
the pair of token i + 1. Drafts are a chain, or a tree in which chance has no part.
"""
import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from common import refuse
from drafters.drafter import Drafter
from drafters.eagle_head import EagleHead
from drafters.tree import Tree
from engine import Settings, choose
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


# ---------------------------------------------------------------- chains

def chain_steps(head: EagleHead, cache: Cache, target: Transformer, token: Tensor, hidden: Tensor,
                slot: Tensor, k: int, s: Settings, noise: Tensor | None,
                step=step) -> tuple[Tensor, Tensor | None]:
    """`Drafter.propose` of a chain: k tokens after the pair of token [1] and hidden [1, D], which
    takes the slot [1].
    """
    drafted, rows = [], []
    for i in range(k):
        hidden, logits = step(head, cache, target, token, hidden, slot + i)
        token = choose(logits, s, None if noise is None else noise[i:i + 1])
        drafted.append(token)
        rows.append(logits)
    return torch.cat(drafted), torch.cat(rows) if s.needs_draft_logits else None


def chain_loop(head: EagleHead, cache: Cache, target: Transformer, token: Tensor, hidden: Tensor,
               slot: Tensor, k: int, s: Settings,
               noise: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """`chain_steps`, of which the compiler sees two: the first and, as a loop, all others."""
    def one(i, token, hidden):
        hidden, row = step(head, cache, target, token, hidden, slot + i)
        token = choose(row, s, None if noise is None else noise.index_select(0, i))
        return i + 1, token, hidden, row

    def following(i, token, hidden, drafted, *rows):
        i, token, hidden, row = one(i, token, hidden)
        return (i, token, hidden, drafted.index_copy(0, i - 1, token),
                *(t.index_copy(0, i - 1, row) for t in rows))

    i, token, hidden, row = one(torch.zeros_like(slot), token, hidden)
    rows = [F.pad(row, (0, 0, 0, k - 1))] if s.needs_draft_logits else []
    if k == 1:
        return token, row if rows else None

    from torch._higher_order_ops import while_loop
    start = i, token, hidden, F.pad(token, (0, k - 1)), *rows
    _, _, _, drafted, *rows = while_loop(lambda i, *_: (i < k).all(), following, start)
    return drafted, rows[0] if rows else None


# ---------------------------------------------------------------- trees

def levels(tree: tuple[int, ...] | int, k: int) -> list[tuple[int, int]]:
    """Of each level of a tree of height k: how many nodes have children in it, and how many each.
    """
    if isinstance(tree, int):
        # N tokens have N levels at most.
        return [(1, EXPAND), *[(EXPAND, EXPAND)] * (min(k, tree) - 1)]
    return [(math.prod(tree[:i]), n) for i, n in enumerate(tree)]


def grow(head: EagleHead, cache: Cache, target: Transformer, token: Tensor, hidden: Tensor,
         slot: Tensor, shape: list[tuple[int, int]], size: int, s: Settings,
         step=step) -> tuple[Tensor, Tensor | None, Tree]:
    """`Drafter.propose` of a tree: of all nodes of this shape the `size` most probable, after a
    pair as in `chain_steps`. A node is as probable as the draft thinks the path to it is.
    """
    slots, device = sum(n for n, _ in shape[1:]), slot.device  # slots: of the nodes with children
    column = torch.arange(len(cache.rope), device=device) - slot - 1  # 0: the first of those
    seen = torch.zeros(1, slots, dtype=torch.bool, device=device)  # of them, by each of the level
    hidden, logits = step(head, cache, target, token, hidden, slot)
    above, score, nodes, read = torch.zeros_like(slot), logits.new_zeros(1).float(), 0, 0
    found, rows = [], []  # found: tokens, parents, log-probabilities, and whose logits, by level
    for depth, (n, children) in enumerate(shape, 1):
        best, token = (logits.float().log_softmax(-1) + score[:, None]).topk(children)
        source = sum(map(len, rows)) + torch.arange(n, device=device).repeat_interleave(children)
        rows.append(logits)
        found.append((token.flatten(), above.repeat_interleave(children), best.flatten(), source))
        if depth == len(shape):
            break
        more = shape[depth][0]
        chosen = best.flatten().topk(more).indices  # all of them in a static tree
        above, score = 1 + nodes + chosen, best.flatten().index_select(0, chosen)
        own, parent = read + torch.arange(more, device=device), chosen // children
        seen = seen.index_select(0, parent) | (torch.arange(slots, device=device) == own[:, None])
        mask = seen.index_select(1, column.clamp(0, slots - 1)) & (column < slots) | (column < 0)
        hidden, logits = step(
            head, cache, target, token.flatten().index_select(0, chosen),
            hidden.index_select(0, parent), slot + 1 + own, (slot + depth).expand(more), mask)
        nodes, read = nodes + n * children, read + more
    tokens, parents, scores, sources = map(torch.cat, zip(*found))
    if size < len(scores):
        keep = best_nodes(scores, size)
        tokens, parents, sources = (t.index_select(0, keep) for t in (tokens, parents, sources))
        # From rows of the whole tree to those of what is kept.
        parents = torch.searchsorted(keep + 1, parents, right=True)
    logits = torch.cat(rows).index_select(0, sources) if s.needs_draft_logits else None
    return tokens, logits, Tree.of(target.agree(parents), len(shape))


def best_nodes(scores: Tensor, n: int) -> Tensor:
    """The n best of scores [P], in order: a node comes after its parent, which is no worse."""
    return scores.sort(descending=True, stable=True).indices[:n].sort().values


# ---------------------------------------------------------------- the drafter

class EagleDrafter(Drafter):
    """tree: None drafts a chain; (4, 2, 1) the top 4 tokens, after each its top 2, after each of
    those its top 1; a number N the N most probable nodes of EAGLE-2's dynamic tree of height K.
    """
    wants_hidden = True

    def __init__(self, head: EagleHead, target: Transformer, tree=None):
        self.head, self.target, self.tree, self.certain = head, target, tree, tree is not None
        self.cache, self.hidden, self.rows = None, None, 0  # rows: of the read after a round
        self.chain, self.grow, self.read_round = chain_steps, grow, read_pairs
        target.taps = head.taps or target.taps

    def size(self, k):
        if self.tree is None:
            return k
        shape = levels(self.tree, k)
        static = not isinstance(self.tree, int)
        refuse((static and len(shape) != k, f"tree {self.tree} has {len(shape)} levels, but "
                f"speculate_k is {k}; they must be the same"),
               (not static and len(shape) > HEIGHT, f"tree {self.tree} would have {len(shape)} "
                f"levels, but {HEIGHT} is the most; lower speculate_k"))
        nodes = sum(n * children for n, children in shape)
        return nodes if static else min(self.tree, nodes)

    def new_cache(self, length):
        w, old = self.head.block.ffn_norm.weight, self.hidden
        growing = 0 if self.tree is None else sum(n for n, _ in levels(self.tree, HEIGHT)[1:])
        self.cache = self.head.new_cache(length + growing, grown_from=self.cache)
        self.hidden = w.new_zeros(length, self.head.config.dim)  # as the head reads them
        if old is not None:
            self.hidden[:len(old)] = old

    def read(self, tokens, pos, hidden, span):
        self.hidden.index_copy_(0, pos, self.head.fuse(hidden))
        # The text's first token has no state before it: in its place the next one is read twice.
        slots = (pos - 1).clamp(min=0)
        tokens = tokens.index_select(0, (slots + 1 - pos[0]).clamp(max=len(pos) - 1))
        call = self.read_round if len(pos) == self.rows else read_pairs  # prompts: not compiled
        call(self.head, self.cache.first(span), self.target, tokens,
             self.hidden.index_select(0, slots), slots)

    def propose(self, state, k, span, s, noise):
        last = state.length - 1
        pair = state.last[1:], self.hidden.index_select(0, last - 1), last - 1
        if self.tree is None:
            self.rows = k + 1
            return self.chain(self.head, self.cache.first(span), self.target, *pair, k, s, noise)
        shape = levels(self.tree, k)
        self.rows = len(shape) + 1
        cache = self.cache.first(span + sum(n for n, _ in shape[1:]))
        return self.grow(self.head, cache, self.target, *pair, shape, self.size(k), s)

    def compile(self, build, by_block, whole):
        calls = [whole(self.head, call) for call in (chain_loop, grow, read_pairs)]
        if not all(calls):
            one = build(step)
            calls = [*(functools.partial(call, step=one) for call in (chain_steps, grow)),
                     build(read_pairs)]
        self.chain, self.grow, self.read_round = calls
