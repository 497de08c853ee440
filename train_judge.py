"""Train the judge: a weighted logistic regression on the target's last hidden states, from answers
with their errors marked.

The data is JSON Lines, {"prompt": str, "answer": str, "error": null | [start, end]}, the offsets in
characters of the answer. A token before the error is correct, a token that holds any character of
it is not, what follows is not used. The target reads each answer once, and every token is judged by
the hidden state at its own position; --features keeps these states in a file.

Class weight, regularisation and number of epochs are those that do best on held-out prompts, where
the threshold is found as well; only more held-out data would show how much all this choosing
flatters. All features are held in memory, float32 [tokens, D], twice while the heads train; under
torchrun that is rank 0's. On one machine the same input gives the same bytes.
"""
import math
from pathlib import Path

import torch
from torch import Tensor

import tp
from checkpoint import fingerprint, read_config
from common import (
    Parser,
    UserError,
    check_apart,
    check_writable,
    is_finite,
    refuse,
    say,
    write_text,
)
from evaluation.report import table
from judge import JudgeHead, above_threshold
from judge_data import report
from judge_data.data import Encoded, encode, read_data, split
from judge_data.features import BATCH, hidden_states, made_of, read_features, save_features
from judge_data.fitting import PATIENCE, Fit, calibrate, fit, grid
from load import (
    add_device_flags,
    dtype_name,
    load_model,
    read_vocabulary,
    resolve_device,
)
from model import DTYPES
from ranks import job
from ranks.memory import check_memory

# Shares of the errors accepted; the curve has a threshold for each.
CURVE = (0, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1)
MAX_FALSE_ACCEPT = 0.05
MOST = 1e6  # of a weight or a rate: beyond it nothing is learnt, and float32 overflows


# ---------------------------------------------------------------- data

def parts(examples: list[dict], args) -> tuple[Tensor, Tensor]:
    """Which examples are for training and which for validation, both bool [examples].

    Those of --exclude_domain are for neither, nor with --swaps_only whole answers.
    """
    kept = torch.tensor([args.exclude_domain is None or e.get("domain") != args.exclude_domain
                         for e in examples])
    if args.exclude_domain is not None and (kept.all() or not kept.any()):
        domains = sorted({str(e.get("domain")) for e in examples})
        raise UserError(f"--exclude_domain {args.exclude_domain}: {args.data} has the domains "
                        f"{', '.join(domains)}; choose one of several")
    if args.swaps_only:
        kept &= torch.tensor(["labelled_from" in e for e in examples])
        refuse((not kept.any(), f"--swaps_only: {args.data} has no swapped tokens; they come from "
                "make_judge_data.py mine --method selfjudge"))
    val = torch.zeros_like(kept)
    val[kept] = torch.tensor(split([e for e, k in zip(examples, kept) if k], args.val_share,
                                   args.seed))
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
                        "nothing to learn to reject; add wrong answers with their first error "
                        'marked, "error": [start, end]')
    for name, labels in (("training", y), ("validation", y_val)):
        if not (labels == 0).any() or not (labels == 1).any():
            kind = "error" if (labels == 1).any() else "correct"
            raise UserError(f"the {name} part of {data} has no {kind} tokens; a judge needs both "
                            "there: add answers with a marked error and answers without, on more "
                            "prompts, or try another --val_share or --seed")


def get_features(args, encoded: list[Encoded]) -> Tensor:
    """float32 [N, D]: from the --features file if it exists, else from the target.

    A --features file that does not exist is written.
    """
    made = None
    if args.features:
        made = made_of(encoded, args.target, dtype_name(args.dtype))
        if args.features.exists():
            job.broadcast()  # nothing for the others to do
            shape = sum(len(e.labels) for e in encoded), read_config(args.target).dim
            return read_features(args.features, made, args.target, args.data, args.features_dtype,
                                 shape).float()
    hidden = read_answers(args, job.broadcast(encoded))
    if args.features:
        save_features(args.features, hidden, made)
    # Rounded as the file is, so that a run that reads it gives the same judge.
    return hidden.float()


def read_answers(args, encoded: list[Encoded]) -> Tensor:
    """The target's hidden states at the labelled tokens, [N, D], on rank 0."""
    config, longest = read_config(args.target), max(len(e.ids) for e in encoded)
    tp.check(config, args.target)
    check_memory({"target": (config, args.dtype, False)}, longest, 0, args.device, at_once=longest,
                 batch=min(len(encoded), math.ceil(BATCH / longest)))
    target = load_model(args.target, config, args.device, args.dtype)
    return hidden_states(target, encoded, DTYPES[args.features_dtype or "float32"])


# ---------------------------------------------------------------- the head

def curve_of(scores: Tensor, labels: Tensor,
             threshold: float) -> tuple[tuple[float, float, float], ...]:
    """(threshold, false accepts, false rejects) by rising threshold.

    These are the lowest thresholds for the shares of CURVE, and the one that is used.
    """
    thresholds = sorted({threshold, *(calibrate(scores, labels, share) for share in CURVE)})
    return tuple((t, *(round(r, 6) for r in report.rates(above_threshold(scores, t), labels)))
                 for t in thresholds)


# ---------------------------------------------------------------- command line

def parse_args(argv=None):
    p = Parser(description="Train a judge head for a target model.")
    p.add_argument("--target", type=Path, required=True, help="checkpoint directory")
    p.add_argument("--data", type=Path, required=True,
                   help='JSON Lines of {"prompt", "answer", "error"}')
    p.add_argument("--out", type=Path, required=True, help="judge file to write")
    p.add_argument("--report", type=Path, metavar="FILE.html",
                   help="write the report as one page too, with the validation answers shaded by "
                   "verdict")
    p.add_argument("--features", type=Path, metavar="FILE",
                   help="keep the hidden states in this file; if it exists, read them from it "
                   "instead of running the target")
    p.add_argument("--features_dtype", choices=DTYPES,
                   help="of a new --features file (default float32)")
    p.add_argument("--exclude_domain", metavar="NAME",
                   help='leave out the answers whose "domain" is this, to see how the judge does '
                   "where it was not trained")
    p.add_argument("--chat", action="store_true",
                   help="put the prompts into the checkpoint's chat template")
    p.add_argument("--swaps_only", action="store_true", help="learn from selfjudge's swapped "
                   "tokens alone, not from the answers: these pass the standard test anyway")
    p.add_argument("--max_false_accept", type=float,
                   help="store the lowest threshold that accepts at most this share of the "
                   f"validation prompts' error tokens (default {MAX_FALSE_ACCEPT})")
    p.add_argument("--threshold", type=float, help="store this threshold instead")
    p.add_argument("--negative_weight", type=float,
                   help="weight of an error token in the loss (default: the best of three on the "
                   "validation prompts)")
    p.add_argument("--weight_decay", type=float,
                   help="AdamW's (default: the best of three on the validation prompts)")
    p.add_argument("--val_share", type=float, default=0.15,
                   help="share of the prompts held out to choose and to report on (default 0.15)")
    p.add_argument("--lr", type=float, default=1e-2)
    p.add_argument("--epochs", type=int, default=100,
                   help=f"at most; training stops {PATIENCE} after the best")
    p.add_argument("--seed", type=int, default=0)
    add_device_flags(p)
    args = p.parse_args(argv)
    check_args(args)
    resolve_device(args)
    if args.max_false_accept is None:
        args.max_false_accept = MAX_FALSE_ACCEPT
    return args


def check_args(args):
    """Everything about the flags that can be refused before a file is read."""
    outside = lambda x: x is not None and not 0 <= x <= 1
    refuse(
        (args.threshold is not None and args.max_false_accept is not None,
         "--threshold sets the threshold, --max_false_accept finds one; give one of them"),
        (outside(args.threshold), f"--threshold is {args.threshold}; it must be from 0 to 1"),
        (outside(args.max_false_accept),
         f"--max_false_accept is {args.max_false_accept}; it must be from 0 to 1"),
        (args.features_dtype and not args.features,
         "--features_dtype requires --features FILE"),
        (not 0 < args.val_share < 1,
         f"--val_share is {args.val_share}; it must be between 0 and 1"),
        (args.negative_weight is not None and not 0 < args.negative_weight <= MOST,
         f"--negative_weight is {args.negative_weight}; it must be above 0, up to {MOST:g}"),
        (args.weight_decay is not None and not 0 <= args.weight_decay <= MOST,
         f"--weight_decay is {args.weight_decay}; it must be from 0 to {MOST:g}"),
        (not 0 < args.lr <= MOST, f"--lr is {args.lr}; it must be above 0, up to {MOST:g}"),
        (args.epochs < 1, f"--epochs is {args.epochs}; it must be at least 1"))
    writes = {"--out": args.out, "--report": args.report, "--features": args.features}
    for path in filter(None, writes.values()):
        check_writable(path)
    check_apart(writes, {"--data": args.data, "--target": args.target})


def grid_rows(fits: list[Fit], chosen: Fit) -> list[list[str]]:
    return [["negative_weight", "weight_decay", "epochs", "validation AUC", ""]] + [
        [f"{f.negative_weight:g}", f"{f.weight_decay:g}", str(f.epochs), f"{f.auc:.4f}",
         "chosen" if f is chosen else ""] for f in fits]


def describe(args, head: JudgeHead, examples: list[dict], part: Tensor, y: Tensor, y_val: Tensor,
             trained: tuple[float, float]) -> str:
    """The report's first paragraph. trained: the rates on the training tokens."""
    used = [e for e, inside in zip(examples, part) if inside]
    how = "set by hand" if args.threshold is not None else (
        f"the lowest that accepts at most {args.max_false_accept:g} of the validation errors")
    return (f"{len(used):,} answers, {len({e['prompt'] for e in used}):,} prompts. Trained on "
            f"{len(y):,} tokens, {int((y == 0).sum()):,} of them errors; validated on "
            f"{len(y_val):,} tokens of other prompts, {int((y_val == 0).sum()):,} of them errors. "
            f"Threshold {head.threshold:.4f}, {how}. At it, on the training tokens: false accepts "
            f"{report.percent(trained[0])}, false rejects {report.percent(trained[1])}.")


def main():
    args = parse_args()
    if job.rank():  # the others have a part in the target's passes only
        return read_answers(args, encoded) if (encoded := job.broadcast()) else None
    examples = read_data(args.data)
    train, val = parts(examples, args)
    config, tokenizer = read_vocabulary(args.target)
    encoded = encode(tokenizer, examples, config.max_seq_len, args.chat)
    y, y_val = labels_of(encoded, train), labels_of(encoded, val)
    check_labels(y, y_val, args.data)

    # Of all lines, so that one --features file serves every --exclude_domain.
    hidden = get_features(args, encoded)
    owner = torch.tensor([i for i, e in enumerate(encoded) for _ in e.labels])
    x, x_val = hidden[train[owner]], hidden[val[owner]]
    del hidden
    fits = fit(x, y, x_val, y_val, grid(y, args.negative_weight, args.weight_decay), args.lr,
               args.epochs, args.seed)
    chosen = max(fits, key=lambda f: f.auc)
    refuse((not is_finite(chosen.weight), "training gave no finite weights; lower --lr, "
            "--weight_decay or --negative_weight"))
    head = JudgeHead(chosen.weight, chosen.bias, 0.5, fingerprint(args.target))
    scores = head(x_val)
    head.threshold = args.threshold
    if args.threshold is None:
        head.threshold = calibrate(scores, y_val, args.max_false_accept)
    head.curve = curve_of(scores, y_val, head.threshold)

    about = describe(args, head, examples, train | val, y, y_val,
                     report.rates(above_threshold(head(x), head.threshold), y))
    answers = report.judged(examples, encoded, val, scores)
    numbers = report.measure(answers, head.threshold, args.seed)
    if args.report:
        title = f"Judge of {args.target.resolve().name} on {args.data.name}"
        write_text(args.report, report.page(title, about, answers, numbers, head.threshold,
                                            head.curve))
    head.save(args.out)
    say("\n\n".join([about, table(grid_rows(fits, chosen)),
                     report.text(answers, numbers, head.threshold, head.curve),
                     *[f"report -> {args.report}"] * bool(args.report),
                     f"judge of {head.weight.shape[1] + 1:,} parameters -> {args.out}"]))


if __name__ == "__main__":
    job.run(main)
