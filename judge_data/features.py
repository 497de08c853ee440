"""What a judge learns from: the target's hidden states at the labelled tokens, and their file."""
import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from checkpoint import fingerprint
from common import (
    OBJECT,
    UserError,
    is_finite,
    json_values,
    open_weights,
    refuse,
    replacing,
)
from judge_data.branches import Text
from judge_data.data import Encoded
from model import DTYPES, Transformer
from ranks.job import rank

BATCH = 4096  # tokens that the target reads at once, padding included


def batches(lengths: list[int]) -> list[list[int]]:
    """Indices of the answers to read together: of similar length, for little padding.

    The longest come first, so that a lack of memory shows at once.
    """
    groups = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= BATCH:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def repeats(encoded: list[Encoded]) -> dict[int, list[int]]:
    """{index of an answer: those that differ from it only from their first labelled token on}."""
    whole, found = {}, {}
    for i, e in enumerate(encoded):
        if e.start == e.prompt:
            whole.setdefault(tuple(e.ids[:e.prompt]), []).append(i)
    for i, e in enumerate(encoded):
        same = (j for j in whole.get(tuple(e.ids[:e.prompt]), ())
                if encoded[j].ids[:e.start] == e.ids[:e.start])
        if e.start > e.prompt and (j := next(same, None)) is not None:
            found.setdefault(j, []).append(i)
    return found


@torch.inference_mode()
def hidden_states(target: Transformer, encoded: list[Encoded], dtype=torch.float32) -> Tensor:
    """The hidden states at all labelled tokens' own positions, answer by answer: [N, D] on the CPU.

    Each answer is read once; of one that repeats another up to its labels, only what follows.
    Shorter ones in a batch are padded at the end, which no token of theirs attends to. Under
    torchrun all ranks read, and rank 0 keeps: the others' N is 0.
    """
    device, begin = target.norm.weight.device, [0]
    for e in encoded:
        begin.append(begin[-1] + len(e.labels))
    out = torch.empty(0 if rank() else begin[-1], target.config.dim, dtype=dtype)

    def keep(i: int, states: Tensor):
        if not rank():
            out[begin[i]:begin[i + 1]] = states
        bar.update()

    branches = repeats(encoded)
    beside = {*branches, *(j for others in branches.values() for j in others)}
    alone = [i for i in range(len(encoded)) if i not in beside]
    with tqdm(total=len(encoded), desc="target reads the answers", unit="answer",
              disable=None) as bar:
        for batch in batches([len(encoded[i].ids) for i in alone]):
            batch = [alone[i] for i in batch]
            span = len(encoded[batch[0]].ids)
            rows = [encoded[i].ids + [0] * (span - len(encoded[i].ids)) for i in batch]
            ids = torch.tensor(rows, device=device)
            states = target.features(ids, torch.arange(span, device=device),
                                     target.new_cache(span, len(batch)))
            for row, i in enumerate(batch):
                keep(i, states[row, encoded[i].start:len(encoded[i].ids)])
        for i, others in branches.items():
            text = Text(target, encoded[i].ids)
            keep(i, text.hidden[encoded[i].start:])
            after = text.branches([(encoded[j].start, encoded[j].ids[encoded[j].start:])
                                   for j in others])
            for j, states in zip(others, after):
                keep(j, states)
    return out


# ---------------------------------------------------------------- the file

def made_of(encoded: list[Encoded], target: Path, dtype: str) -> dict:
    """What hidden states depend on. dtype: the target's, not the file's.

    The ids stand for data, tokenizer and chat template.
    """
    ids = hashlib.sha256(json.dumps([(e.ids, e.start) for e in encoded]).encode()).hexdigest()[:16]
    return {"target": fingerprint(target), "data": ids, "dtype": dtype}


def save_features(path: Path, hidden: Tensor, made: dict):
    with replacing(path) as tmp:
        save_file({"hidden": hidden}, tmp, {"features_of": json.dumps(made)})


def read_features(path: Path, made: dict, target: Path, data: Path, dtype: str | None,
                  shape: tuple[int, int]) -> Tensor:
    """The hidden states in a file that save_features wrote for the same target and data.

    Raises UserError naming what differs; dtype, if given, must be the file's.
    """
    with open_weights(path) as f:
        found = json_values(f.metadata(), {"features_of": OBJECT}, path).get("features_of", {})
        if found.keys() != made.keys() or list(f.keys()) != ["hidden"]:
            raise UserError(f"--features {path} is not a file of hidden states; name another")
        for key, what in (("target", f"target {target}"),
                          ("data", f"data {data} (with this tokenizer and --chat or not)"),
                          ("dtype", "target's --dtype")):
            if found[key] != made[key]:
                raise UserError(f"--features {path} was made with another {key}: the {what} is "
                                f"{made[key]}, it holds {found[key]}; name another file, or "
                                "delete it")
        hidden = f.get_tensor("hidden")
    stored = next((name for name, d in DTYPES.items() if d == hidden.dtype), None)
    refuse((stored is None or hidden.shape != shape or not is_finite(hidden),
            f"--features {path} holds other numbers than hidden states; delete it"))
    if dtype not in (None, stored):
        raise UserError(f"--features {path} holds {stored}, --features_dtype is {dtype}; name "
                        "another file, or delete it")
    return hidden
