"""Train the judge: a weighted logistic regression on the target's last hidden states, from answers with their errors marked.

Data is JSON Lines, {"prompt": str, "answer": str, "error": null | [start, end]}, the offsets being characters of the
answer. A token before the error is correct, a token that holds any character of it is not, what follows is not used.
The target reads each answer once, every token is judged by the hidden state at its own position, and the head that does
best on held-out prompts is kept. All features are held in memory: float32 [tokens, dim].
"""
import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import judge as rules
from cli import UserError, check_writable, run
from judge import Judge
from model import DTYPES, Transformer, fingerprint, load
from tokenizer import Tokenizer


def read_data(path) -> list[dict]:
    """The lines of a judge data file; a line that is not as it should be is named by its number."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"cannot read --data {path}: {getattr(e, 'strerror', None) or 'it is not UTF-8 text'}") from None
    examples = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            example = json.loads(line)
        except ValueError:
            raise UserError(f"{path} line {number} is not JSON") from None
        where = f"{path} line {number}"
        for key in ("prompt", "answer"):
            if not isinstance(example, dict) or not isinstance(example.get(key), str) or not example[key]:
                raise UserError(f"{where}: {key!r} must be a text that is not empty")
        if "error" not in example:
            raise UserError(f"{where}: 'error' is missing; it is null for a correct answer, else [start, end]")
        error = example["error"]
        if error is not None and not (isinstance(error, list) and len(error) == 2 and all(type(x) is int for x in error)
                                      and 0 <= error[0] < error[1] <= len(example["answer"])):
            raise UserError(f"{where}: 'error' is {error}; it must be null or [start, end] with 0 <= start < end <= {len(example['answer'])}, "
                            "the answer's characters")
        examples.append(example | {"where": where})
    if not examples:
        raise UserError(f"{path} holds no examples")
    return examples


def without(examples: list[dict], domain: str | None, path) -> list[dict]:
    """The examples of the other domains."""
    if domain is None:
        return examples
    kept, domains = [e for e in examples if e.get("domain") != domain], sorted({str(e.get("domain")) for e in examples})
    if not 0 < len(kept) < len(examples):
        raise UserError(f"--exclude_domain {domain}: {path} has the domains {', '.join(domains)}; choose one of several")
    return kept


def label_tokens(offsets: list[tuple[int, int]], error) -> list[int]:
    """1 (correct) for each token before the error, 0 for each that holds a character of it; the tokens after it are left out."""
    if error is None:
        return [1] * len(offsets)
    start, end = error
    return [int(b <= start) for a, b in offsets if a < end]


@torch.inference_mode()
def features(target: Transformer, tokenizer: Tokenizer, examples: list[dict], chat=False) -> tuple[Tensor, Tensor, Tensor]:
    """One target pass an answer: hidden states [N, D] of all labelled tokens, their labels [N], their example's number [N]."""
    hidden, labels, owner = [], [], []
    limit, device = target.config.max_seq_len, target.norm.weight.device
    encoded = []
    for e in examples:
        prompt = tokenizer.chat([{"role": "user", "content": e["prompt"]}]) if chat else tokenizer.encode(e["prompt"])
        answer, offsets = tokenizer.encode_with_offsets(e["answer"], continuation=True)
        if len(prompt) + len(answer) > limit:
            raise UserError(f"{e['where']}: prompt and answer have {len(prompt) + len(answer)} tokens, the context is {limit}; shorten or drop the line")
        encoded.append((prompt, answer, label_tokens(offsets, e["error"])))
    longest = max(len(p) + len(a) for p, a, _ in encoded)
    cache = target.new_cache(longest)
    for number, (prompt, answer, answer_labels) in enumerate(tqdm(encoded, desc="target reads the answers", unit="answer", disable=None)):
        ids = torch.tensor([prompt + answer[:len(answer_labels)]], device=device)
        states = target.features(ids, torch.arange(ids.shape[1], device=device), cache.first(ids.shape[1]))
        hidden.append(states[0, len(prompt):].float().cpu())
        labels += answer_labels
        owner += [number] * len(answer_labels)
    return torch.cat(hidden), torch.tensor(labels), torch.tensor(owner)


def split(examples: list[dict], share: float, seed: int) -> Tensor:
    """Which examples are for validation, bool [examples]: a share of the prompts, so that no prompt is on both sides."""
    prompts = sorted({e["prompt"] for e in examples})
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed)).tolist()
    held = {prompts[i] for i in order[:max(1, round(share * len(prompts)))]}
    return torch.tensor([e["prompt"] in held for e in examples])


def auc(scores: Tensor, labels: Tensor) -> float:
    """Probability that a correct token scores above an error token, ties counting half (the area under the ROC curve)."""
    errors, correct = scores[labels == 0].sort().values, scores[labels == 1]
    below, upto = torch.searchsorted(errors, correct), torch.searchsorted(errors, correct, right=True)
    return float((below + upto).double().mean() / 2 / len(errors))


def fit(x: Tensor, y: Tensor, x_val: Tensor, y_val: Tensor, negative_weight: float | None, lr: float, weight_decay: float, epochs: int, seed: int):
    """Weighted logistic regression with AdamW, stopped at the best validation loss: (weight [1, D], bias [1], epochs, loss)."""
    mean, std = x.mean(0), x.std(0).clamp(min=1e-6)  # dimensions differ widely in size; the scaling is folded in below
    x, x_val = (x - mean) / std, (x_val - mean) / std
    if negative_weight is None:
        negative_weight = float((y == 1).sum() / (y == 0).sum())  # both kinds weigh the same in all
    weigh = lambda labels: torch.where(labels == 0, negative_weight, 1.0)
    head = torch.nn.Linear(x.shape[1], 1)
    torch.nn.init.zeros_(head.weight), torch.nn.init.zeros_(head.bias)
    optimizer = torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=weight_decay)
    generator = torch.Generator().manual_seed(seed)
    loss_of = lambda a, b: F.binary_cross_entropy_with_logits(head(a)[:, 0], b.float(), weigh(b), reduction="sum") / weigh(b).sum()
    best, kept, since = float("inf"), None, 0
    for epoch in range(1, epochs + 1):
        for batch in torch.randperm(len(x), generator=generator).split(1024):
            optimizer.zero_grad()
            loss_of(x[batch], y[batch]).backward()
            optimizer.step()
        with torch.no_grad():
            loss = float(loss_of(x_val, y_val))
        since += 1
        if loss < best:
            best, since, kept = loss, 0, (head.weight.detach() / std, head.bias.detach() - (head.weight.detach() / std) @ mean, epoch)
        if since == 10:
            break
    return *kept, best


def report(name: str, scores: Tensor, labels: Tensor, threshold: float) -> str:
    yes, negatives = rules.judge(scores, threshold), labels == 0
    return (f"{name:10} {len(labels):8,} tokens {int(negatives.sum()):6,} negatives   AUC {auc(scores, labels):.4f}   "
            f"false accepts {yes[negatives].float().mean():6.2%} of the errors   false rejects {(~yes[~negatives]).float().mean():6.2%} of the correct")


def parse_args(argv=None):
    p = argparse.ArgumentParser(description="Train a judge head for a target model.")
    p.add_argument("--target", type=Path, required=True, help="checkpoint directory")
    p.add_argument("--data", type=Path, required=True, help='JSON Lines of {"prompt", "answer", "error"}')
    p.add_argument("--out", type=Path, required=True, help="judge file to write")
    p.add_argument("--exclude_domain", metavar="NAME", help='leave out the answers whose "domain" is this, to see how the judge does where it was not trained')
    p.add_argument("--chat", action="store_true", help="put the prompts into the checkpoint's chat template")
    p.add_argument("--threshold", type=float, default=0.5, help="stored as the judge's default (default 0.5)")
    p.add_argument("--negative_weight", type=float, help="weight of an error token in the loss (default: both kinds weigh the same in all)")
    p.add_argument("--val_share", type=float, default=0.15, help="share of the prompts held out for early stopping (default 0.15)")
    p.add_argument("--lr", type=float, default=1e-2)
    p.add_argument("--weight_decay", type=float, default=0.1)
    p.add_argument("--epochs", type=int, default=200, help="at most; stops 10 after the best")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    p.add_argument("--dtype", choices=DTYPES, help="of the target: default bfloat16 on cuda, float32 on cpu")
    args = p.parse_args(argv)
    for bad, message in (
            (not 0 <= args.threshold <= 1, f"--threshold is {args.threshold}; it must be from 0 to 1"),
            (not 0 < args.val_share < 1, f"--val_share is {args.val_share}; it must be between 0 and 1"),
            (args.negative_weight is not None and not 0 < args.negative_weight < float("inf"), f"--negative_weight is {args.negative_weight}; it must be above 0"),
            (not args.lr > 0, f"--lr is {args.lr}; it must be above 0"),
            (args.epochs < 1, f"--epochs is {args.epochs}; it must be at least 1"),
            (args.device == "cuda" and not torch.cuda.is_available(), "--device cuda: this PyTorch sees no CUDA device; use --device cpu"),
    ):
        if bad:
            raise UserError(message)
    check_writable(args.out)
    return args


def main():
    args = parse_args()
    torch.manual_seed(args.seed)
    examples = without(read_data(args.data), args.exclude_domain, args.data)
    held = split(examples, args.val_share, args.seed)
    if held.all():
        raise UserError(f"{args.data} holds one prompt only; a validation split by prompt needs at least two")
    dtype = DTYPES[args.dtype or ("bfloat16" if args.device == "cuda" else "float32")]
    tokenizer = Tokenizer.from_dir(args.target)
    x, y, owner = features(load(args.target, args.device, dtype), tokenizer, examples, args.chat)
    val = held[owner]
    for name, labels in (("training", y[~val]), ("validation", y[val])):
        if not (labels == 0).any() or not (labels == 1).any():
            raise UserError(f"the {name} part of {args.data} has no {'error' if (labels == 1).any() else 'correct'} tokens; a judge learns from "
                            "both: add answers with a marked error and answers without, on more prompts")
    weight, bias, epochs, loss = fit(x[~val], y[~val], x[val], y[val], args.negative_weight, args.lr, args.weight_decay, args.epochs, args.seed)
    head = Judge(weight, bias, args.threshold, fingerprint(args.target))
    print(f"{len(examples):,} answers, {len({e['prompt'] for e in examples}):,} prompts; best validation loss {loss:.4f} after {epochs} epochs")
    print(report("training", head.scores(x[~val]), y[~val], args.threshold))
    print(report("validation", head.scores(x[val]), y[val], args.threshold))
    head.save(args.out)
    print(f"judge of {weight.shape[1] + 1:,} parameters -> {args.out}")


if __name__ == "__main__":
    run(main)
