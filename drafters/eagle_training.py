"""How an EAGLE head learns: chains of drafts from all tokens of a text at once, their loss, and how
many drafts of such a chain the target would accept.

Pair i is the target's last hidden state of token i and the embedding of token i + 1. What the head
predicts there is the state of token i + 1, and by the target's LM head token i + 2.
"""
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from drafters.eagle_head import EagleHead
from formats.answer_log import seed_of
from judge import top1
from model import Transformer, apply_rope, rope_table

CROSS_ENTROPY = 0.1  # its weight beside smooth L1's 1, as in EAGLE-1
DEPTH = 16  # drafts in a row that `runs` follows
REPORT_BATCH = 1024  # tokens that it reads at once


# ---------------------------------------------------------------- texts

class Text(NamedTuple):
    """A prompt with its answer, as the target reads them."""
    ids: list[int]
    start: int  # index of the answer's first token


def read_texts(target: Transformer, texts: list[Text]) -> tuple[Tensor, Tensor, Tensor]:
    """The target's last hidden states [B, S, D], the ids [B, S], and pairs to learn from [B, S].

    Those predict a token of the answer, from its second on: the first draft after a prompt comes
    from the prompt's last state and the target's first token.
    """
    device, length = target.norm.weight.device, max(len(t.ids) for t in texts)
    ids = torch.tensor([t.ids + [0] * (length - len(t.ids)) for t in texts], device=device)
    pos = torch.arange(length, device=device)
    with torch.no_grad():
        hidden = target.features(ids, pos, target.new_cache(length, len(texts)))
    first, last = (torch.tensor(x, device=device)[:, None] for x in (
        [t.start - 1 for t in texts], [len(t.ids) - 2 for t in texts]))
    return hidden, ids, (pos >= first) & (pos < last)


def order(texts: list[Text], tokens: int, seed: int, epoch: int) -> list[list[int]]:
    """An epoch's batches of up to `tokens` tokens, padding included: texts of similar length,
    grouped and ordered anew in every epoch.
    """
    rng = torch.Generator().manual_seed(seed_of(seed, "epoch", epoch))
    chance, batches = torch.randperm(len(texts), generator=rng).tolist(), [[]]
    for i in sorted(range(len(texts)), key=lambda i: (-(len(texts[i].ids) // 16), chance[i])):
        longest = max(len(texts[k].ids) for k in [*batches[-1], i])
        if batches[-1] and (len(batches[-1]) + 1) * longest > tokens:
            batches.append([])
        batches[-1].append(i)
    return [batches[k] for k in torch.randperm(len(batches), generator=rng).tolist()]


# ---------------------------------------------------------------- the chain and its loss

def columns(target: Transformer) -> Tensor:
    """The target's LM head as a float32 matrix [V, D]: a gradient flows through no packed or
    quantized layer.
    """
    w = target.norm.weight
    with torch.no_grad():
        return target.output(torch.eye(len(w), dtype=w.dtype, device=w.device)).T.float()


def frequent(texts: list[Text], n: int, vocab_size: int) -> Tensor:
    """The n most frequent tokens of the answers, int64 [n], ascending; of a tie the smaller ids:
    a BPE's earlier merges.
    """
    counts = torch.zeros(vocab_size, dtype=torch.long)
    for t in texts:
        counts += torch.bincount(torch.tensor(t.ids[t.start:]), minlength=vocab_size)
    return counts.sort(descending=True, stable=True).indices[:n].sort().values


def embeds_of(head: EagleHead, target: Transformer, ids: Tensor) -> Tensor:
    """The next token's embedding at every token, [B, S, D]; the last has none."""
    return F.pad(head.embed(ids[:, 1:], target), (0, 0, 0, 1))


def unroll(head: EagleHead, embeds: Tensor, hidden: Tensor, steps: int) -> list[Tensor]:
    """The head's predictions [B, S, D] of `steps` drafts in a row from every pair at once.

    embeds, hidden [B, S, D]: pair i is hidden[i], of token i, and embeds[i], of token i + 1. In
    step j pair i stands for the j-th draft of the chain that began at pair i - j + 1: it reads what
    step j - 1 predicted at pair i - 1, and attends to what its chain has in the cache: the target's
    states up to where it began, and its own predictions, one from each step, after that.
    """
    layer, (B, S, _) = head.block, embeds.shape
    a, n, group = layer.attn, layer.attn.n_head, layer.attn.n_head // layer.attn.n_kv_head
    rope = rope_table(head.config, S, embeds.device)
    before = torch.ones(S, S, dtype=torch.bool, device=embeds.device).tril()
    keys, values, predicted = [], [], []
    for j in range(steps):
        if j:  # the first pair has no draft before it; `moved` leaves it out
            hidden = torch.cat((hidden[:, :1], predicted[-1][:, :-1]), 1)
        x = head.fc(torch.cat((embeds, hidden), -1)).type_as(embeds)  # under autocast too
        q, k, v = a.wqkv(layer.attn_norm(x)).view(B, S, -1, a.head_dim).split(
            [n, a.n_kv_head, a.n_kv_head], dim=2)
        q, k = apply_rope(a.q_norm(q), rope), apply_rope(a.k_norm(k), rope)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        keys.append(k.repeat_interleave(group, 1))
        values.append(v.repeat_interleave(group, 1))
        scores = (q @ keys[0].transpose(2, 3)).masked_fill(~before.tril(-j), -math.inf)
        own = [(q * back(k, j - m)).sum(-1, keepdim=True) for m, k in enumerate(keys) if m]
        weights = (torch.cat((scores, *own), -1) / math.sqrt(a.head_dim)).float()
        weights = weights.softmax(-1).type_as(v)
        y = weights[..., :S] @ values[0]
        for m in range(1, j + 1):
            y = y + weights[..., S + m - 1, None] * back(values[m], j - m)
        x = x + a.wo(y.transpose(1, 2).reshape(B, S, -1))
        predicted.append(x + layer.ffn(layer.ffn_norm(x)))
    return predicted


def back(x: Tensor, n: int) -> Tensor:
    """x [B, H, S, hd] moved n positions on, so that each sees the one n before."""
    return F.pad(x, (0, 0, n, 0))[:, :, :x.shape[2]]


def moved(mask: Tensor, n: int) -> Tensor:
    """mask [B, S] moved n positions on: the pairs whose chain of n + 1 drafts began in `mask`."""
    return F.pad(mask, (n, 0))[:, :mask.shape[1]]


def loss_of(head: EagleHead, target_head: Tensor, embeds: Tensor, hidden: Tensor, learn: Tensor,
            noise: Tensor, steps: int) -> Tensor:
    """EAGLE-1's loss, the mean over the pairs in `learn` for each draft of a chain of `steps`.

    Smooth L1 of predicted and true state, plus CROSS_ENTROPY times that of the draft's and the
    target's distribution (less the target's entropy, which has no gradient).
    target_head [V, D]: the target's LM head, or its rows for the tokens that are drafted; then both
    distributions are over these. hidden [B, S, D] without noise, noise [B, S, D].
    """
    true, total = hidden[:, 1:].float(), 0.0
    logp = (hidden[:, 1:] @ target_head.T).float().log_softmax(-1)
    for j, predicted in enumerate(unroll(head, embeds, hidden + noise, steps)):
        on = (learn & moved(learn, j))[:, :-1]
        states = predicted[:, :-1][on]
        logq = (states @ target_head.T).float().log_softmax(-1)
        near = F.smooth_l1_loss(states.float(), true[on], reduction="sum") / true.shape[-1]
        cross = F.kl_div(logq, logp[on], reduction="sum", log_target=True)
        total = total + (near + CROSS_ENTROPY * cross) / on.sum().clamp(min=1)
    return total / steps


# ---------------------------------------------------------------- what would be accepted

@torch.no_grad()
def runs(head: EagleHead, target: Transformer, texts: list[Text]) -> list[Tensor]:
    """For each text, how many drafts in a row, up to DEPTH, are its tokens: int64 [pairs].

    Of the chains of top-1 drafts from each of its pairs.
    """
    found = []
    for batch in order(texts, REPORT_BATCH, 0, 0):
        hidden, ids, learn = read_texts(target, [texts[i] for i in batch])
        run, alive = torch.zeros_like(ids), learn
        steps = unroll(head, embeds_of(head, target, ids), hidden.float(), DEPTH)
        for j, predicted in enumerate(steps):
            logits = head.logits(predicted[:, :-2], target)
            right = F.pad(top1(logits) == ids[:, 2:], (0, 2)) & learn
            alive = alive & F.pad(right, (0, j))[:, j:]  # to where the chain began
            run += alive
        found += [(i, row[pairs].cpu()) for i, row, pairs in zip(batch, run, learn)]
    return [run for _, run in sorted(found, key=lambda pair: pair[0])]


def played(run: list[int], k: int) -> tuple[int, int]:
    """(drafts accepted, rounds) of a text generated with chains of k: after each round's accepted
    drafts comes one token of the target's own.
    """
    at = accepted = rounds = 0
    while at < len(run):
        n = min(run[at], k)
        at, accepted, rounds = at + n + 1, accepted + n, rounds + 1
    return accepted, rounds
