"""Train the judge: a weighted logistic regression on the target's last hidden states, from answers
with their errors marked.

Data is JSON Lines, {"prompt": str, "answer": str, "error": null | [start, end]}, the offsets being
characters of the answer. A token before the error is correct, a token that holds any character of
it is not, what follows is not used. The target reads each answer once, every token is judged by the
hidden state at its own position; the states can be kept in a file. Class weight, regularisation and
number of epochs are those that do best on held-out prompts, and so is the threshold found there;
only more held-out data would tell what all this choosing flatters. All features are held in memory,
float32 [tokens, dim], twice while the heads train. On one machine the same input gives the same
bytes.
"""
import argparse
import hashlib
import json
import math
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

import judge as rules
import judge_report
from cli import UserError, check_writable, replacing, run
from judge import Judge
from judge_report import Judged, auc, percent, probability, rates
from model import DTYPES, ModelConfig, Transformer, fingerprint, load, open_weights
from report import table
from tokenizer import Tokenizer

BATCH = 4096  # tokens that the target reads at once, padding included
PATIENCE = 10  # epochs without a better one
# shares of the errors accepted, for each of which the curve has a threshold
CURVE = (0, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1)
MAX_FALSE_ACCEPT = 0.05


# ---------------------------------------------------------------- data

def read_data(path) -> list[dict]:
    """The lines of a judge data file; a line that is not as it should be is named by its number."""
    try:
        # not splitlines: a JSON string may hold U+2028
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"cannot read {path}: "
                        f"{getattr(e, 'strerror', None) or 'it is not UTF-8 text'}") from None
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
            if not isinstance(example, dict) or not isinstance(example.get(key),
                                                               str) or not example[key]:
                raise UserError(f"{where}: {key!r} must be a text that is not empty")
            if any("\ud800" <= c <= "\udfff" for c in example[key]):
                raise UserError(f"{where}: {key!r} holds half a character (a lone surrogate); "
                                "write the whole character")
        if "error" not in example:
            raise UserError(f"{where}: 'error' is missing; it is null for a correct answer, else "
                            "[start, end]")
        error = example["error"]
        if error is not None and not (isinstance(error, list) and len(error) == 2
                                      and all(type(x) is int for x in error)
                                      and 0 <= error[0] < error[1] <= len(example["answer"])):
            raise UserError(f"{where}: 'error' is {error}; it must be null or [start, end] with 0 "
                            f"<= start < end <= {len(example['answer'])}, "
                            "the answer's characters")
        examples.append(example | {"where": where, "line": number})
    if not examples:
        raise UserError(f"{path} holds no examples")
    return examples


def label_tokens(offsets: list[tuple[int, int]], error) -> list[int]:
    """1 (correct) for each token before the error, 0 for each that holds a character of it; the
    tokens after it are left out.
    """
    if error is None:
        return [1] * len(offsets)
    start, end = error
    return [int(b <= start) for a, b in offsets if a < end]


class Encoded(NamedTuple):
    ids: list[int]  # of the prompt and of the labelled tokens after it
    start: int  # where these begin
    spans: list[tuple[int, int]]  # each labelled token's characters of the answer
    labels: list[int]


def encode(tokenizer: Tokenizer, examples: list[dict], limit: int, chat=False) -> list[Encoded]:
    """Ids and labels of each example; one that does not fit a context of `limit` tokens is refused.
    """
    encoded = []
    for e in examples:
        prompt = tokenizer.chat(
            [{"role": "user", "content": e["prompt"]}]) if chat else tokenizer.encode(e["prompt"])
        answer, spans = tokenizer.encode_with_offsets(e["answer"], continuation=True)
        if len(prompt) + len(answer) > limit:
            raise UserError(f"{e['where']}: prompt and answer have {len(prompt) + len(answer)} "
                            f"tokens, the context is {limit}; shorten or drop the line")
        labels = label_tokens(spans, e["error"])
        encoded.append(Encoded(prompt + answer[:len(labels)], len(prompt), spans[:len(labels)],
                               labels))
    return encoded


def split(examples: list[dict], share: float, seed: int) -> Tensor:
    """Which examples are for validation, bool [examples]: a share of the prompts, so that no prompt
    is on both sides.
    """
    prompts = sorted({e["prompt"] for e in examples})
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed)).tolist()
    held = {prompts[i] for i in order[:max(1, round(share * len(prompts)))]}
    return torch.tensor([e["prompt"] in held for e in examples])


def parts(examples: list[dict], args) -> tuple[Tensor, Tensor]:
    """Which examples are for training and which for validation, both bool [examples]; those of
    --exclude_domain are for neither.
    """
    kept = torch.tensor([args.exclude_domain is None or e.get("domain") != args.exclude_domain
                         for e in examples])
    if args.exclude_domain is not None and (kept.all() or not kept.any()):
        domains = sorted({str(e.get("domain")) for e in examples})
        raise UserError(f"--exclude_domain {args.exclude_domain}: {args.data} has the domains "
                        f"{', '.join(domains)}; choose one of several")
    val = torch.zeros_like(kept)
    val[kept] = split([e for e, k in zip(examples, kept) if k], args.val_share, args.seed)
    if torch.equal(val, kept):
        raise UserError(f"{args.data} holds one prompt only; a validation split by prompt needs "
                        "at least two")
    return kept & ~val, val


def labels_of(encoded: list[Encoded], part: Tensor) -> Tensor:
    return torch.tensor([label for e, inside in zip(encoded, part) if inside for label in e.labels])


def check_labels(y: Tensor, y_val: Tensor, data: Path):
    """Refuse labels that leave nothing to learn, before the target runs."""
    if not (y == 0).any() and not (y_val == 0).any():
        raise UserError(f"{data} has no error tokens: every answer is marked correct, so there is "
                        "nothing to learn to reject; add wrong answers with their first "
                        'error marked, "error": [start, end]')
    for name, labels in (("training", y), ("validation", y_val)):
        if not (labels == 0).any() or not (labels == 1).any():
            raise UserError(f"the {name} part of {data} has no "
                            f"{'error' if (labels == 1).any() else 'correct'} tokens; a judge "
                            "needs both there: "
                            "add answers with a marked error and answers without, on more "
                            "prompts, or try another --val_share or --seed")


# ---------------------------------------------------------------- features

def batches(lengths: list[int]) -> list[list[int]]:
    """Numbers of the answers that are read together, alike in length and so with little padding;
    the longest first, as memory must suffice for them.
    """
    groups = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= BATCH:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


@torch.inference_mode()
def features(target: Transformer, encoded: list[Encoded], dtype=torch.float32) -> Tensor:
    """The hidden states of all labelled tokens, answer by answer, [N, D] in `dtype` on the CPU:
    each answer is read once.

    Shorter answers of a batch are padded behind, where nothing of theirs looks.
    """
    device, begin = target.norm.weight.device, [0]
    for e in encoded:
        begin.append(begin[-1] + len(e.labels))
    out = torch.empty(begin[-1], target.config.dim, dtype=dtype)
    with tqdm(total=len(encoded), desc="target reads the answers", unit="answer",
              disable=None) as bar:
        for batch in batches([len(e.ids) for e in encoded]):
            span = len(encoded[batch[0]].ids)
            ids = torch.tensor([encoded[i].ids + [0] * (span - len(encoded[i].ids)) for i in batch],
                               device=device)
            states = target.features(ids, torch.arange(span, device=device),
                                     target.new_cache(span, len(batch))).cpu()
            for row, i in enumerate(batch):
                out[begin[i]:begin[i + 1]] = states[row, encoded[i].start:len(encoded[i].ids)]
            bar.update(len(batch))
    return out


def made_of(encoded: list[Encoded], target: Path, dtype: str) -> dict:
    """What the hidden states depend on: the target, its dtype, and the ids that it reads (data,
    tokenizer and chat template in one).
    """
    ids = hashlib.sha256(json.dumps([(e.ids, e.start) for e in encoded]).encode()).hexdigest()[:16]
    return {"target": fingerprint(target), "data": ids, "dtype": dtype}


def save_features(path: Path, hidden: Tensor, made: dict):
    with replacing(path) as tmp:
        save_file({"hidden": hidden}, tmp, {"features_of": json.dumps(made)})


def read_features(path: Path, made: dict, target: Path, data: Path, dtype: str | None) -> Tensor:
    """The hidden states of a file that save_features wrote for the same target and data; anything
    else is refused by name.
    """
    with open_weights(path) as f:
        found = json.loads((f.metadata() or {}).get("features_of", "{}"))
        if found.keys() != made.keys():
            raise UserError(f"--features {path} is not a file of hidden states; name another")
        for key, what in (("target", f"target {target}"),
                          ("data", f"data {data} (with this tokenizer and --chat or not)"),
                          ("dtype", "target's --dtype")):
            if found[key] != made[key]:
                raise UserError(f"--features {path} was made with another {key}: the {what} is "
                                f"{made[key]}, it holds {found[key]}; name another file, or "
                                "delete it")
        hidden = f.get_tensor("hidden")
    stored = next(name for name, d in DTYPES.items() if d == hidden.dtype)
    if dtype not in (None, stored):
        raise UserError(f"--features {path} holds {stored}, --features_dtype is {dtype}; name "
                        "another file, or delete it")
    return hidden


def get_features(args, encoded: list[Encoded]) -> Tensor:
    """float32 [N, D], from the --features file if it is there, else from the target, and kept in
    that file if one is named.
    """
    dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    made = made_of(encoded, args.target, dtype) if args.features else None
    if args.features and args.features.exists():
        return read_features(args.features, made, args.target, args.data,
                             args.features_dtype).float()
    hidden = features(load(args.target, args.device, DTYPES[dtype]), encoded,
                      DTYPES[args.features_dtype or "float32"])
    if args.features:
        save_features(args.features, hidden, made)
    # rounded as the file is, so that the run that reads it gives the same judge
    return hidden.float()


# ---------------------------------------------------------------- the head

class Fit(NamedTuple):
    """The best epoch of a setting, by the AUC on the validation tokens."""
    negative_weight: float
    weight_decay: float
    epochs: int
    auc: float
    weight: Tensor  # [1, D]
    bias: Tensor  # [1]


def grid(y: Tensor, negative_weight: float | None,
         weight_decay: float | None) -> list[tuple[float, float]]:
    """(negative_weight, weight_decay) to try: an error token weighs as much as a correct one, or
    both kinds weigh the same in all, or between.
    """
    balance = float((y == 1).sum() / (y == 0).sum())
    weights = sorted({1.0, math.sqrt(balance), balance}) if negative_weight is None else [
        negative_weight]
    return [(w, d) for w in weights for d in ([0.01, 0.1, 1.0] if weight_decay is None
                                              else [weight_decay])]


def fit(x: Tensor, y: Tensor, x_val: Tensor, y_val: Tensor, settings: list[tuple[float, float]],
        lr: float, epochs: int, seed: int) -> list[Fit]:
    """Logistic regression with AdamW for every (negative_weight, weight_decay), each stopped at its
    best validation AUC.

    All settings train at once, as columns of one matrix: Adam works number by number, so no column
    knows of the others. The AUC chooses since the loss cannot be compared between weights, and the
    threshold is found afterwards.
    """
    # dimensions differ widely in size; the scaling is folded in below
    mean, std = x.mean(0), x.std(0).clamp(min=1e-6)
    x, x_val = (x - mean) / std, (x_val - mean) / std
    negative_weight, weight_decay = torch.tensor(settings).T
    weight, bias = torch.zeros(x.shape[1], len(settings),
                               requires_grad=True), torch.zeros(len(settings), requires_grad=True)
    optimizer = torch.optim.Adam([weight, bias], lr=lr)
    generator = torch.Generator().manual_seed(seed)
    best = [Fit(*s, 0, -1.0, None, None) for s in settings]
    for epoch in range(1, epochs + 1):
        for batch in torch.randperm(len(x), generator=generator).split(1024):
            optimizer.zero_grad()
            labels = y[batch, None].float()
            cost = torch.where(labels == 0, negative_weight, 1.0)
            loss = F.binary_cross_entropy_with_logits(x[batch] @ weight + bias,
                                                      labels.expand(-1, len(settings)), cost,
                                                      reduction="none").sum(0) / cost.sum(0)
            loss.sum().backward()
            with torch.no_grad():
                weight.mul_(1 - lr * weight_decay)
            optimizer.step()
        with torch.no_grad():
            for i, column in enumerate((x_val @ weight + bias).T):
                area = auc(column, y_val)
                if area > best[i].auc:
                    w = weight[None, :, i] / std
                    best[i] = best[i]._replace(epochs=epoch, auc=area, weight=w,
                                               bias=bias[i:i + 1] - w @ mean)
        if epoch - max(b.epochs for b in best) == PATIENCE:
            break
    return best


def calibrate(scores: Tensor, labels: Tensor, max_false_accept: float) -> float:
    """The lowest threshold at which at most this share of the error tokens is accepted."""
    errors = scores[labels == 0].sort(descending=True).values
    allowed = next(k for k in range(len(errors), -1, -1) if k / len(errors) <= max_false_accept)
    if allowed == len(errors):
        return 0.0
    # the rule accepts above it, so this one is rejected, and its equals
    threshold = probability(float(errors[allowed]))
    while int(rules.judge(errors, threshold).sum()) > allowed:  # rounding
        threshold = math.nextafter(threshold, 1.0)
    return threshold


def curve_of(scores: Tensor, labels: Tensor, threshold: float) -> tuple[tuple[float, float, float],
                                                                        ...]:
    """(threshold, false accepts, false rejects) by rising threshold: the lowest thresholds for the
    shares of CURVE, and the one that is used.
    """
    thresholds = sorted({threshold, *(calibrate(scores, labels, share) for share in CURVE)})
    return tuple((t, *(round(r, 6) for r in rates(rules.judge(scores, t), labels)))
                 for t in thresholds)


# ---------------------------------------------------------------- command line

def parse_args(argv=None):
    p = argparse.ArgumentParser(description="Train a judge head for a target model.")
    p.add_argument("--target", type=Path, required=True, help="checkpoint directory")
    p.add_argument("--data", type=Path, required=True, help='JSON Lines of {"prompt", "answer", '
                   '"error"}')
    p.add_argument("--out", type=Path, required=True, help="judge file to write")
    p.add_argument("--report", type=Path, metavar="FILE.html", help="write the report as one page "
                   "too, with the validation answers shaded by verdict")
    p.add_argument("--features", type=Path, metavar="FILE", help="keep the hidden states in this "
                   "file; if it exists, read them from it instead of running the target")
    p.add_argument("--features_dtype", choices=DTYPES, help="of a new --features file (default "
                   "float32)")
    p.add_argument("--exclude_domain", metavar="NAME", help='leave out the answers whose "domain" '
                   'is this, to see how the judge does where it was not trained')
    p.add_argument("--chat", action="store_true", help="put the prompts into the checkpoint's "
                   "chat template")
    p.add_argument("--max_false_accept", type=float, help="store the lowest threshold that "
                   "accepts at most this share of the validation prompts' error tokens (default "
                   f"{MAX_FALSE_ACCEPT})")
    p.add_argument("--threshold", type=float, help="store this threshold instead")
    p.add_argument("--negative_weight", type=float, help="weight of an error token in the loss "
                   "(default: the best of three on the validation prompts)")
    p.add_argument("--weight_decay", type=float, help="AdamW's (default: the best of three on the "
                   "validation prompts)")
    p.add_argument("--val_share", type=float, default=0.15, help="share of the prompts held out "
                   "to choose and to report on (default 0.15)")
    p.add_argument("--lr", type=float, default=1e-2)
    p.add_argument("--epochs", type=int, default=100, help=f"at most; training stops {PATIENCE} "
                   "after the best")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                   choices=("cpu", "cuda"))
    p.add_argument("--dtype", choices=DTYPES, help="of the target: default bfloat16 on cuda, "
                   "float32 on cpu")
    args = p.parse_args(argv)
    outside = lambda x: x is not None and not 0 <= x <= 1
    for bad, message in (
            (args.threshold is not None and args.max_false_accept is not None, "--threshold sets "
             "the threshold, --max_false_accept finds one; give one of them"),
            (outside(args.threshold), f"--threshold is {args.threshold}; it must be from 0 to 1"),
            (outside(args.max_false_accept), f"--max_false_accept is {args.max_false_accept}; it "
             "must be from 0 to 1"),
            (args.features_dtype and not args.features, "--features_dtype is of the --features "
             "file; name one"),
            (not 0 < args.val_share < 1, f"--val_share is {args.val_share}; it must be between 0 "
             "and 1"),
            (args.negative_weight is not None and not 0 < args.negative_weight < math.inf,
             f"--negative_weight is {args.negative_weight}; it must be above 0"),
            (args.weight_decay is not None and not 0 <= args.weight_decay < math.inf,
             f"--weight_decay is {args.weight_decay}; it must be at least 0"),
            (not 0 < args.lr < math.inf, f"--lr is {args.lr}; it must be above 0"),
            (args.epochs < 1, f"--epochs is {args.epochs}; it must be at least 1"),
            (args.device == "cuda" and not torch.cuda.is_available(), "--device cuda: this "
             "PyTorch sees no CUDA device; use --device cpu"),
    ):
        if bad:
            raise UserError(message)
    paths = [path for path in (args.out, args.report, args.features) if path]
    for path in paths:
        check_writable(path)
    if len({path.resolve() for path in paths} | {args.data.resolve()}) <= len(paths):
        raise UserError("--data, --out, --report and --features must be different files")
    if args.max_false_accept is None:
        args.max_false_accept = MAX_FALSE_ACCEPT
    return args


def grid_rows(fits: list[Fit], chosen: Fit) -> list[list[str]]:
    return [["negative_weight", "weight_decay", "epochs", "validation AUC", ""]] + [
        [f"{f.negative_weight:g}", f"{f.weight_decay:g}", str(f.epochs), f"{f.auc:.4f}",
         "chosen" if f is chosen else ""] for f in fits]


def judged(examples: list[dict], encoded: list[Encoded], part: Tensor,
           scores: Tensor) -> list[Judged]:
    """The answers of a part with the scores of their tokens, [tokens of the part] in order."""
    rest = iter(scores.tolist())
    return [Judged(e, u.spans, u.labels, [next(rest) for _ in u.labels]) for e, u,
            inside in zip(examples, encoded, part) if inside]


def describe(args, head: Judge, examples: list[dict], part: Tensor, y: Tensor, y_val: Tensor,
             trained: tuple[float, float]) -> str:
    """The report's first paragraph. trained: the rates on the training tokens."""
    used = [e for e, inside in zip(examples, part) if inside]
    how = "set by hand" if args.threshold is not None else f"the lowest that accepts at most {args.max_false_accept:g} of the validation errors"
    return (f"{len(used):,} answers, {len({e['prompt'] for e in used}):,} prompts. Trained on "
            f"{len(y):,} tokens, {int((y == 0).sum()):,} of them errors; validated on "
            f"{len(y_val):,} tokens of other prompts, {int((y_val == 0).sum()):,} of them errors. "
            f"Threshold {head.threshold:.4f}, {how}. "
            f"At it, on the training tokens: false accepts {percent(trained[0])}, false rejects "
            f"{percent(trained[1])}.")


def main():
    args = parse_args()
    examples = read_data(args.data)
    train, val = parts(examples, args)
    encoded = encode(Tokenizer.from_dir(args.target), examples,
                     ModelConfig.from_dir(args.target).max_seq_len, args.chat)
    y, y_val = labels_of(encoded, train), labels_of(encoded, val)
    check_labels(y, y_val, args.data)

    # of all lines, so that one --features file serves every --exclude_domain
    hidden = get_features(args, encoded)
    owner = torch.tensor([i for i, e in enumerate(encoded) for _ in e.labels])
    x, x_val = hidden[train[owner]], hidden[val[owner]]
    del hidden
    fits = fit(x, y, x_val, y_val, grid(y, args.negative_weight, args.weight_decay), args.lr,
               args.epochs, args.seed)
    chosen = max(fits, key=lambda f: f.auc)
    head = Judge(chosen.weight, chosen.bias, 0.5, fingerprint(args.target))
    scores = head.scores(x_val)
    head.threshold = calibrate(scores, y_val,
                               args.max_false_accept) if args.threshold is None else args.threshold
    head.curve = curve_of(scores, y_val, head.threshold)

    about = describe(args, head, examples, train | val, y, y_val,
                     rates(rules.judge(head.scores(x), head.threshold), y))
    answers = judged(examples, encoded, val, scores)
    numbers = judge_report.measure(answers, head.threshold, args.seed)
    print(about, table(grid_rows(fits, chosen)),
          judge_report.text(answers, numbers, head.threshold, head.curve), sep="\n\n")
    if args.report:
        title = f"Judge of {args.target.resolve().name} on {args.data.name}"
        with replacing(args.report) as tmp:
            tmp.write_text(judge_report.page(title, about, answers, numbers, head.threshold,
                                             head.curve), encoding="utf-8")
        print(f"\nreport -> {args.report}")
    head.save(args.out)
    print(f"\njudge of {head.weight.shape[1] + 1:,} parameters -> {args.out}")


if __name__ == "__main__":
    run(main)
