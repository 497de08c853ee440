"""The demo pair as it ships: its models, its held-out problems, an engine for each rule; and what
`python generate.py` shows of it without arguments.
"""
import sys
from pathlib import Path

import torch

from common import json_lines
from demo.check import is_right
from demo.corpus import TASKS
from drafters.llama import LlamaDrafter
from engine import Engine, generate
from load import Loaded, load_models, parse_rule

HOME = Path(__file__).parents[1] / "checkpoints" / "demo"
MAX_NEW_TOKENS = 220
RULES = ("target", "standard", "judge")
PER_TASK = 4  # problems; the first of each task is shown in full


def read_problems(limit=None) -> list[dict]:
    """The held-out problems, the first `limit` of each task."""
    lines = [line.value for line in json_lines(HOME / "problems.jsonl")]
    return [p for task in TASKS for p in [q for q in lines if q["task"] == task][:limit]]


def load_pair(target_dir=HOME / "target", dtype=torch.float32) -> Loaded:
    """Target, draft, judge and tokenizer of the demo; another target is a quantized one."""
    return load_models(target_dir, HOME / "draft", HOME / "judge.safetensors", dtype=dtype)


def make_engine(rule: str, target, draft, head=None, **settings) -> Engine:
    """The engine of a rule; `settings` are Engine's own (speculate_k, temperature, seed, ...)."""
    name, value, _ = parse_rule(rule, ("target", "draft"))  # its tokenizer has no tokens of a span
    if name in ("target", "draft"):
        return Engine({"target": target, "draft": draft}[name], **settings)
    return Engine(target, LlamaDrafter(draft), head, name, value, **settings)


def show(printer, summary, legend: str):
    """Run the demo; printer and summary are generate.py's, legend explains its colours."""
    target, draft, head, tokenizer, _ = load_pair()
    count = lambda m: sum(p.numel() for p in m.parameters()) / 1e6
    print(f"Judge decoding on the demo pair: target {count(target):.1f}M, draft "
          f"{count(draft):.2f}M parameters, K = 16, greedy.{legend}")
    engines = {rule: make_engine(rule, target, draft, head) for rule in RULES}
    for engine in engines.values():  # the first calls of a process are slow
        generate(engine, tokenizer.encode("Question:"), 8)
    problems = read_problems(PER_TASK)
    results = {rule: [] for rule in RULES}
    for i, p in enumerate(problems):
        prompt = tokenizer.encode(p["prompt"])
        if first := i % PER_TASK == 0:
            print(f"\n{'-' * 30} {p['task']}\n{p['prompt'].rstrip()}")
        for rule in RULES:
            on_tokens, finish = lambda tokens, sources: None, lambda: None
            if first and rule != "standard":  # its text is the target's
                print(f"\n[{rule}]")
                on_tokens, finish = printer(tokenizer, prompt, tokenizer.eos_ids, sys.stdout)
            r = generate(engines[rule], prompt, MAX_NEW_TOKENS, tokenizer.eos_ids, on_tokens)
            finish()
            if first:
                print(f"  ({summary(r)})")
            text = tokenizer.decode_new(prompt, r.tokens)
            results[rule].append((r, is_right(p["task"], p["prompt"], text, p["answer"])))
    print(f"\n{len(problems)} held-out problems ({', '.join(TASKS)})\n\n{table(results)}")


def table(results: dict[str, list]) -> str:
    """One row a rule, from its (Result, right) pairs."""
    lines = [f"{'rule':10} {'tokens/s':>9} {'speed-up':>9} {'accepted per round':>19} {'right':>7}"]
    speed = lambda rs: sum(len(r.tokens) - 1 for r, _ in rs) / sum(r.seconds for r, _ in rs)
    for rule, rs in results.items():
        rounds = sum(r.rounds for r, _ in rs)
        accepted = sum(r.mean_accepted * r.rounds for r, _ in rs) / rounds
        shown = "–" if rule == "target" else f"{accepted:.2f}"
        up = speed(rs) / speed(results["target"])
        lines.append(f"{rule:10} {speed(rs):9.0f} {up:8.2f}x {shown:>19} "
                     f"{sum(ok for _, ok in rs):4}/{len(rs)}")
    return "\n".join(lines)
