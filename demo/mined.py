"""Judges of the demo's target from four kinds of labels: what the marks are worth, and the judges.

    PAIR="--target checkpoints/demo/target --draft checkpoints/demo/draft"
    python demo/make_problems.py --split judge --per_task 50 --out prompts.jsonl
    python make_judge_data.py generate --prompts prompts.jsonl \\
        --models checkpoints/demo/target checkpoints/demo/draft --out answers.jsonl
    for METHOD in first_error autojudge selfjudge; do
        python make_judge_data.py mine --data answers.jsonl $PAIR --method $METHOD \\
            --out $METHOD.jsonl; done
    python demo/make_judge_data.py $PAIR --out exact.jsonl --per_task 200
    python demo/mined.py --answers answers.jsonl --mined first_error.jsonl autojudge.jsonl \\
        selfjudge.jsonl --exact exact.jsonl --out judges

The first judge learns from the same answers as first_error, labelled by the exact checker, as one
who marks by hand and never errs would: only the labels differ. Every judge gets the threshold that
lets through 5% of its own validation errors. AUC is on the answers of --exact to prompts that none
of them was trained on; accepted tokens and accuracy are eval.py's.

A swap is a drafted token in the target's answer. The first table counts those that a method calls
errors against the exact checker; a token counts as an error there if no right answer has it at that
place. --bounds FILE prints that for selfjudge at other bounds, of a file made with other prompts.
"""
import argparse
import json
import subprocess
import sys
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from common import UserError, make_directory, refuse, run, write_text
from demo.corpus import TASKS, first_error, problems
from demo.pair import HOME
from evaluation.report import table
from judge_data.data import encode, read_data
from judge_data.features import hidden_states
from judge_data.miner import read_answers
from judge_data.report import judged, measure
from load import load_judge, load_models

ROOT = Path(__file__).parents[1]
SEARCHED = 5000  # problems of a task among which the prompts are found again
TARGET = HOME / "target"
BOUNDS = 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1, 2


def known_problems(lines: list[dict]) -> dict:
    """{prompt: problem} of the lines, found again among the first of the judge split."""
    missing, known = {line["prompt"] for line in lines}, {}
    for some in zip(*(islice(problems(task, "judge"), SEARCHED) for task in TASKS)):
        if not missing:
            break
        known |= {p.prompt: p for p in some if p.prompt in missing}
        missing -= known.keys()
    if missing:
        raise UserError(f"{len(missing)} prompts are not of the judge split, such as "
                        f"{min(missing)!r}; make them with demo/make_problems.py --split judge")
    return known


def exactly(lines: list[dict]) -> list[dict]:
    """The same answers with the exact checker's labels, without those that were cut off."""
    known = known_problems(lines)
    return [{k: line[k] for k in ("prompt", "answer", "domain")}
            | {"error": first_error(known[line["prompt"]], line["answer"])}
            for line in lines if line["ended"] and line["answer"]]


# ---------------------------------------------------------------- marks

def swaps(lines: list[dict]):
    """(prompt, text up to and with the swap, its start, whether it is marked, its score or None)
    of each swap in the lines of autojudge or selfjudge.
    """
    for e in lines:
        prompt, answer, score = e["prompt"], e["answer"], e.get("score")
        if "instead_of" in e:
            start, end = e["error"] or (e["labelled_from"], len(answer))
            yield prompt, answer[:end], start, e["error"] is not None, score
        for start, end in e.get("unimportant", ()):
            yield prompt, answer[:end], start, False, score


def mark_rows(files: dict[str, list[tuple]]) -> list[list[str]]:
    """A row for each {name: swaps}: how often a mark is an error, and an error marked."""
    rows = [["marks", "swaps", "errors", "marked", "precision", "recall"]]
    known = known_problems([{"prompt": s[0]} for found in files.values() for s in found])
    for name, found in files.items():
        right = []  # (is it an error, is it marked) of each swap in a text that was right up to it
        for prompt, text, start, marked, _ in found:
            at = first_error(known[prompt], text)
            if at is None or at[1] > start:  # else the text was wrong before the swap
                right.append((at is not None, marked))
        errors, marks = sum(error for error, _ in right), sum(marked for _, marked in right)
        hits = sum(error and marked for error, marked in right)
        rows.append([name, f"{len(right):,}", f"{errors:,}", f"{marks:,}",
                     *(f"{hits / n:.1%}" if n else "–" for n in (marks, errors))])
    return rows


def at_bounds(found: list[tuple]) -> dict[str, list[tuple]]:
    """The swaps of selfjudge as other bounds would mark them."""
    return {f"bound {b:g}": [(*s[:3], s[4] <= -b, s[4]) for s in found] for b in BOUNDS}


# ---------------------------------------------------------------- judges

def train(data: Path, out: Path) -> str:
    """Train a judge as a user would; returns what train_judge.py prints."""
    done = subprocess.run([sys.executable, ROOT / "train_judge.py", "--target", TARGET, "--data",
                           data, "--out", out, "--device", "cpu"],
                          capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"train_judge.py on {data}: {done.stderr.strip()}")
    return done.stdout


def evaluate(head: Path, out: Path, rules: str, args) -> dict:
    """eval.py's numbers of the rules on the held-out problems."""
    subprocess.run([sys.executable, ROOT / "eval.py", "--task", "demo", "--data",
                    HOME / "problems.jsonl", "--target", TARGET, "--draft", HOME / "draft",
                    "--judge", head, "--rules", rules, "--limit", str(args.limit),
                    "--speculate_k", "16",
                    "--processes", str(args.processes), "--device", "cpu", "--out", out],
                   check=True, stdout=subprocess.DEVNULL)
    return json.loads((out / "results.json").read_text())["rules"]


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bounds", type=Path, metavar="FILE")
    for name in ("answers", "exact", "out"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--mined", type=Path, nargs="+", default=[])
    parser.add_argument("--limit", type=int, default=40,
                        help="held-out problems of each task (default 40)")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    one, three = bool(args.bounds), [bool(x) for x in (args.answers, args.exact, args.out)]
    refuse((one == any(three) or one != (not all(three)) or one and args.mined,
            "give --answers, --exact and --out, with --mined the files to compare, or --bounds "
            "alone"),
           *((value < 1, f"--{flag} is {value}; it must be at least 1") for flag, value in (
               ("limit", args.limit), ("processes", args.processes))))
    if args.bounds:
        found = list(swaps(read_data(args.bounds)))
        refuse((not found, f"{args.bounds} holds no swap of a drafted token; give what "
                "make_judge_data.py mine --method selfjudge wrote"),
               (any(s[4] is None for s in found), f"{args.bounds} has swaps without a score, which "
                "--method selfjudge alone writes"))
        print(table(mark_rows(at_bounds(found))))
    else:
        compare(args)


def compare(args):
    """Print both tables."""
    make_directory(args.out)
    answers = read_answers(args.answers)
    exact = args.out / "by_hand.jsonl"
    write_text(exact, "".join(json.dumps(line) + "\n" for line in exactly(answers)))
    found = {path.stem: list(swaps(read_data(path))) for path in args.mined}
    print(table(mark_rows({name: rows for name, rows in found.items() if rows})), "\n", flush=True)
    used = {line["prompt"] for line in answers}
    unseen = [e for e in read_data(args.exact) if e["prompt"] not in used]
    target, _, _, tokenizer, _ = load_models(TARGET)
    encoded = encode(tokenizer, unseen, target.config.max_seq_len)
    hidden, standard = hidden_states(target, encoded), None
    rows = [["judge", "lines", "with an error", "AUC", "95% interval", "threshold", "right",
             "accepted per round"]]
    for data in (exact, *args.mined):
        path = args.out / f"{data.stem}.safetensors"
        write_text(args.out / f"{data.stem}.txt", train(data, path))
        head = load_judge(path, TARGET)
        scored = judged(unseen, encoded, torch.ones(len(unseen), dtype=torch.bool), head(hidden))
        auc, low, high = measure(scored, head.threshold, 0)["auc"]
        rules = "standard,judge" if data == exact else "judge"
        result = evaluate(path, args.out / data.stem, rules, args)
        standard, lines = result.get("standard") or standard, read_data(data)
        rows.append([data.stem, f"{len(lines):,}",
                     f"{sum(e['error'] is not None for e in lines):,}", f"{auc:.4f}",
                     f"{low:.4f} to {high:.4f}", f"{head.threshold:.3f}",
                     f"{result['judge']['accuracy']:.1%}",
                     f"{result['judge']['mean_accepted']:.2f}"])
    print(f"standard, whose text is the target's: {standard['accuracy']:.1%} right, "
          f"{standard['mean_accepted']:.2f} accepted per round; AUC on {len(unseen):,} answers to "
          f"{len({e['prompt'] for e in unseen}):,} other prompts\n")
    print(table(rows))


if __name__ == "__main__":
    run(main)
