"""The target's answers to many prompts side by side, for training data: no draft, no judge."""
import torch

from judge import COLDEST, probabilities, sample, top1
from model import Transformer


@torch.inference_mode()
def answer(target: Transformer, prompts: list[list[int]], room: int, eos_ids, temperature: float,
           seed: int) -> list[list[int]]:
    """The target's own answers, up to `room` tokens or EOS (kept), to prompts side by side.

    All texts stand at the same positions: longer prompts are still read while others are answered.
    """
    device, lengths = target.norm.weight.device, torch.tensor([len(p) for p in prompts])
    start, end = min(map(len, prompts)), min(max(map(len, prompts)) + room,
                                             target.config.max_seq_len)
    rng = torch.Generator(device).manual_seed(seed)
    text = torch.zeros(len(prompts), end, dtype=torch.long)
    for row, ids in zip(text, prompts):
        row[:len(ids)] = torch.tensor(ids)
    text, lengths, eos = text.to(device), lengths.to(device), torch.tensor(eos_ids, device=device)
    ends, pos = (lengths + room).clamp(max=end), torch.arange(end, device=device)
    cache, rows = target.new_cache(end, len(prompts)), torch.arange(len(prompts), device=device)
    tokens, at = text[:, :start], pos[:start]
    for i in range(start, end):
        logits = target.output(target.features(tokens, at, cache.first(i))[:, -1])
        if temperature > COLDEST:
            noise = torch.empty_like(logits, dtype=torch.float32).exponential_(generator=rng)
            new = sample(probabilities(logits, temperature), noise)
        else:
            new = top1(logits)
        text[rows, i] = new = torch.where(i < lengths[rows], text[rows, i], new)
        stopped = rows[(i >= lengths[rows]) & torch.isin(new, eos)]
        ends[stopped] = ends[stopped].clamp(max=i + 1)
        going = ends[rows] > i + 1
        if not going.any():
            break
        if 2 * going.sum() <= len(rows):  # not for every answer that ends: the cache is copied
            rows, cache.kv = rows[going], [kv[:, :, going] for kv in cache.kv]
        tokens, at = text[rows, i:i + 1], pos[i:i + 1]
    return [row[a:b] for row, a, b in zip(text.tolist(), lengths.tolist(), ends.tolist())]
