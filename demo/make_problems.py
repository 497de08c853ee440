"""Write a split's problems: "eval", held out for the demo and its evaluation, or "judge", to make
judge data from.

    python demo/make_problems.py --out checkpoints/demo/problems.jsonl
    python demo/make_problems.py --out solutions.jsonl --per_task 100 --habit draft

The second adds a right solution to each, for eval.py --replay. No prompt is in two splits, and none
of these is in the training split.
"""
import argparse
import json
import random
import sys
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import replacing, run
from demo.corpus import SPLITS, TASKS, problems, render


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--split", choices=[s for s in SPLITS if s != "train"], default="eval")
    parser.add_argument("--per_task", type=int, default=300)
    parser.add_argument("--skip", type=int, default=0,
                        help="leave out the first problems of each task, such as those that a "
                        "judge was trained on")
    parser.add_argument("--habit", choices=("target", "draft"),
                        help='add a right solution as "text", worded by chance in this model\'s '
                        "habits")
    args = parser.parse_args()
    with replacing(args.out) as tmp, open(tmp, "w") as f:
        for task in TASKS:
            seen = set()
            distinct = (p for p in problems(task, args.split)
                        if not (p.prompt in seen or seen.add(p.prompt)))
            for i, p in enumerate(islice(distinct, args.skip, args.skip + args.per_task)):
                line = {"task": task, "prompt": p.prompt, "answer": p.answer}
                if args.habit:
                    line["text"] = render(p.solution, random.Random(i), args.habit)
                f.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    run(main)
