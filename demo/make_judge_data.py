"""Make the judge's training data: the models' own answers, errors marked by the exact checker.

    python demo/make_judge_data.py --target checkpoints/demo/target \\
        --draft checkpoints/demo/draft --out judge_data.jsonl

Prompts come from the judge split. The draft answers greedily and sampled, the target greedily, and
both together under topk:3 and topk:8: such mixtures, and errors that the target finds probable, are
what the judge will meet. A draft sampled at temperature 1 makes errors that it would not meet: with
those in the data it does worse (demo/README.md).
"""
import argparse
import json
import sys
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from tqdm import tqdm

from common import run, write_text
from demo.corpus import TASKS, first_error, problems
from demo.pair import MAX_NEW_TOKENS, make_engine
from engine import generate
from load import load_models

# (rule, temperature) of a prompt's answers
PLAN = (("target", 0.0), ("draft", 0.0), ("draft", 0.7), ("topk:3", 0.0), ("topk:8", 0.0))


def answers(job):
    """All planned answers to a share of the prompts; runs in its own process, on one thread."""
    target_dir, draft_dir, per_task, share, of = job
    torch.set_num_threads(1)
    target, draft, _, tokenizer, _ = load_models(target_dir, draft_dir)
    engines = [(rule, t, make_engine(rule, target, draft, temperature=t, seed=share))
               for rule, t in PLAN]
    lines = []
    for task in TASKS:
        ours = list(islice(problems(task, "judge"), share, per_task, of))
        for problem in tqdm(ours, desc=task, disable=True if share else None):
            prompt = tokenizer.encode(problem.prompt)
            for rule, temperature, engine in engines:
                r = generate(engine, prompt, MAX_NEW_TOKENS, tokenizer.eos_ids)
                if r.tokens[-1] not in tokenizer.eos_ids:
                    continue
                answer = tokenizer.decode_new(prompt, r.tokens)
                error = first_error(problem, answer)
                lines.append({"prompt": problem.prompt, "answer": answer, "error": error,
                              "domain": task, "source_model": rule, "temperature": temperature})
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True)
    parser.add_argument("--draft", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--per_task", type=int, default=400, help="prompts of each task")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    jobs = [(args.target, args.draft, args.per_task, i, args.processes)
            for i in range(args.processes)]
    with get_context("spawn").Pool(args.processes) as pool:
        lines = sum(pool.map(answers, jobs), [])
    write_text(args.out, "".join(json.dumps(line) + "\n" for line in lines))
    print(f"{len(lines)} answers, {sum(line['error'] is not None for line in lines)} with an "
          f"error -> {args.out}")


if __name__ == "__main__":
    run(main)
