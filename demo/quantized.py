"""What quantization costs the demo's target: perplexity on held-out solutions, and right answers
alone and with the parent's judge.

    python demo/quantized.py

Takes 12 minutes for 40 problems a task on 2 busy cores. Perplexity is per token of right solutions
of held-out problems in the target's wordings, prompts not counted. Activations are bfloat16.
"""
import argparse
import json
import math
import random
import subprocess
import sys
import tempfile
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.nn.functional as F

from common import run
from demo.corpus import TASKS, problems, render
from demo.pair import HOME
from load import load_models

ROOT = Path(__file__).parents[1]
MODES = {"bfloat16": None, "int8": ["int8"], "int4 (groups of 128)": ["int4"],
         "int4 (groups of 32)": ["int4", "--group_size", "32"]}


@torch.inference_mode()
def perplexity(target, tokenizer, count: int) -> float:
    """Per token, of `count` solutions of each task."""
    loss = tokens = 0
    for task in TASKS:
        for i, p in enumerate(islice(problems(task, "eval"), count)):
            prompt = tokenizer.encode(p.prompt)
            solution = render(p.solution, random.Random(i), "target")
            answer = tokenizer.encode(solution, continuation=True) + list(tokenizer.eos_ids[:1])
            ids = torch.tensor([prompt + answer])
            logits, _ = target(ids, torch.arange(ids.shape[1]), target.new_cache(ids.shape[1]))
            loss += F.cross_entropy(logits[0, len(prompt) - 1:-1].float(), ids[0, len(prompt):],
                                    reduction="sum").item()
            tokens += len(answer)
    return math.exp(loss / tokens)


def run_script(name, *args):
    subprocess.run([sys.executable, ROOT / name, *map(str, args)], check=True,
                   stdout=subprocess.DEVNULL)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=100,
                        help="problems of each task (default 100)")
    args = parser.parse_args()
    print("| target | perplexity | right, alone | right, with the judge | accepted per round |\n"
          "|---|---|---|---|---|")
    for name, mode in MODES.items():
        with tempfile.TemporaryDirectory() as tmp:
            where = HOME / "target"
            if mode:
                where = Path(tmp) / "target"
                run_script("quantize.py", "--checkpoint_dir", HOME / "target", "--out", where,
                           "--mode", *mode)
            target, _, _, tokenizer, _ = load_models(where, dtype=torch.bfloat16)
            value = perplexity(target, tokenizer, args.limit)
            run_script("eval.py", "--task", "demo", "--data", HOME / "problems.jsonl", "--target",
                       where, "--draft", HOME / "draft", "--judge", HOME / "judge.safetensors",
                       "--rules", "target,judge", "--limit", args.limit, "--processes", 2,
                       "--speculate_k", 16,
                       "--device", "cpu", "--dtype", "bfloat16", "--out", Path(tmp) / "out")
            rules = json.loads((Path(tmp) / "out" / "results.json").read_text())["rules"]
        alone, judged = rules["target"], rules["judge"]
        print(f"| {name} | {value:.4f} | {alone['accuracy']:.1%} | {judged['accuracy']:.1%} | "
              f"{judged['mean_accepted']:.2f} |", flush=True)


if __name__ == "__main__":
    run(main)
