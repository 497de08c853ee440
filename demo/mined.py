"""Judges of the demo's target from exact labels, from mined ones, and from AutoJudge's: one table.

    PAIR="--target checkpoints/demo/target --draft checkpoints/demo/draft"
    python demo/make_problems.py --split judge --per_task 150 --out prompts.jsonl
    python make_judge_data.py generate --prompts prompts.jsonl \\
        --models checkpoints/demo/target checkpoints/demo/draft --out answers.jsonl
    python make_judge_data.py mine --data answers.jsonl $PAIR --method first_error \\
        --out mined.jsonl
    python make_judge_data.py mine --data answers.jsonl $PAIR --method autojudge \\
        --out autojudge.jsonl
    python demo/make_judge_data.py $PAIR --out exact.jsonl --per_task 200
    python demo/mined.py --answers answers.jsonl --mined mined.jsonl --autojudge autojudge.jsonl \\
        --exact exact.jsonl --out judges

The first judge learns from the same answers as `mined`, labelled by the exact checker, so that only
the labels differ. Every judge gets the threshold that lets through 5% of its own validation errors.
AUC is on the answers of --exact to prompts that none of them was trained on; accepted tokens and
accuracy are eval.py's.
"""
import argparse
import json
import subprocess
import sys
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from common import UserError, json_lines, run, write_text
from demo.corpus import TASKS, first_error, problems
from demo.pair import HOME
from evaluation.report import table
from judge_data.data import encode, read_data
from judge_data.features import hidden_states
from judge_data.report import judged, measure
from load import load_judge, load_models

ROOT = Path(__file__).parents[1]
SEARCHED = 5000  # problems of a task among which the prompts are found again
TARGET = HOME / "target"


def exactly(lines: list[dict]) -> list[dict]:
    """The same answers with the exact checker's labels, without those that were cut off."""
    known = {p.prompt: p for task in TASKS for p in islice(problems(task, "judge"), SEARCHED)}
    if unknown := [line["prompt"] for line in lines if line["prompt"] not in known]:
        raise UserError(f"{len(unknown)} prompts are not of the judge split, such as "
                        f"{unknown[0]!r}; make them with demo/make_problems.py --split judge")
    return [{k: line[k] for k in ("prompt", "answer", "domain")}
            | {"error": first_error(known[line["prompt"]], line["answer"])}
            for line in lines if line["ended"] and line["answer"]]


def train(data: Path, out: Path) -> str:
    """Train a judge as a user would; returns what train_judge.py prints."""
    done = subprocess.run([sys.executable, ROOT / "train_judge.py", "--target", TARGET, "--data",
                           data, "--out", out, "--device", "cpu"],
                          capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"train_judge.py on {data}: {done.stderr.strip()}")
    return done.stdout


def evaluate(head: Path, out: Path, args) -> dict:
    """eval.py's numbers of the judge on the held-out problems."""
    subprocess.run([sys.executable, ROOT / "eval.py", "--task", "demo", "--data",
                    HOME / "problems.jsonl", "--target", TARGET, "--draft", HOME / "draft",
                    "--judge", head, "--rules", "target,judge", "--limit", str(args.limit),
                    "--speculate_k", "16",
                    "--processes", str(args.processes), "--device", "cpu", "--out", out],
                   check=True, stdout=subprocess.DEVNULL)
    return json.loads((out / "results.json").read_text())["rules"]


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("answers", "mined", "autojudge", "exact", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=100,
                        help="held-out problems of each task (default 100)")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    args.out.mkdir(exist_ok=True)
    answers = [line.value for line in json_lines(args.answers)]
    files = {"exact labels": args.out / "exact.jsonl", "mined, first_error": args.mined,
             "mined, autojudge": args.autojudge}
    write_text(files["exact labels"],
               "".join(json.dumps(line) + "\n" for line in exactly(answers)))
    used = {line["prompt"] for line in answers}
    unseen = [e for e in read_data(args.exact) if e["prompt"] not in used]
    target, _, _, tokenizer, _ = load_models(TARGET)
    encoded = encode(tokenizer, unseen, target.config.max_seq_len)
    hidden = hidden_states(target, encoded)
    rows = [["judge", "answers", "with an error", "AUC", "95% interval", "threshold", "right",
             "accepted per round"]]
    for name, data in files.items():
        path = args.out / f"{data.stem}.safetensors"
        write_text(args.out / f"{data.stem}.txt", train(data, path))
        head = load_judge(path, TARGET)
        scored = judged(unseen, encoded, torch.ones(len(unseen), dtype=torch.bool), head(hidden))
        auc, low, high = measure(scored, head.threshold, 0)["auc"]
        found = evaluate(path, args.out / data.stem, args)
        lines = read_data(data)
        rows.append([name, f"{len(lines):,}", f"{sum(e['error'] is not None for e in lines):,}",
                     f"{auc:.4f}", f"{low:.4f} to {high:.4f}", f"{head.threshold:.3f}",
                     f"{found['judge']['accuracy']:.1%}", f"{found['judge']['mean_accepted']:.2f}"])
    print(f"target alone: {found['target']['accuracy']:.1%} right; AUC on {len(unseen):,} answers "
          f"to {len({e['prompt'] for e in unseen}):,} other prompts\n")
    print(table(rows))


if __name__ == "__main__":
    run(main)
