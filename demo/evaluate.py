"""The demo's table: every rule on the held-out problems, greedy, float32.

    python demo/evaluate.py                      # 300 problems a task, all rules: about 25 minutes on 2 cores
    python demo/evaluate.py --limit 20 --rules target,standard,judge
"""
import argparse
import json
import sys
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from cli import UserError, check_writable, replacing, run
from demo.check import is_right
from demo.corpus import TASKS
from generate import Engine, generate
from judge import Judge
from model import fingerprint, load
from tokenizer import Tokenizer

HOME = Path(__file__).parents[1] / "checkpoints" / "demo"
RULES = "target,draft,standard,topk:2,topk:3,topk:5,typical,kl:1,judge,judge:0.9"
NO_VALUE, VALUE = ("target", "draft", "standard", "typical", "judge"), ("topk", "kl", "typical", "judge")
MAX_NEW_TOKENS = 220


def read_problems(limit=None):
    """The held-out problems, the first `limit` of each task."""
    lines = [json.loads(line) for line in (HOME / "problems.jsonl").read_text().splitlines()]
    return [p for task in TASKS for p in [q for q in lines if q["task"] == task][:limit]]


def load_pair(target_dir=HOME / "target", dtype=torch.float32):
    """(target, draft, judge, tokenizer) of the demo; another target is a quantized one."""
    target, draft = load(target_dir, dtype=dtype), load(HOME / "draft", dtype=dtype)
    parent = target.config.quantization and target.config.quantization.parent
    head = Judge.load(HOME / "judge.safetensors", target.config.dim, fingerprint(target_dir), str(target_dir), parent)
    return target, draft, head, Tokenizer.from_dir(target_dir)


def parse_rule(rule: str) -> tuple[str, float | None]:
    """A rule as it is written on the command line: target, draft, standard, judge, judge:0.7, topk:3, kl:0.5, typical, typical:0.1."""
    name, _, value = rule.partition(":")
    try:
        value = float(value) if value else None
    except ValueError:
        name = None
    if name not in (NO_VALUE if value is None else VALUE):
        raise UserError(f"{rule!r} is not a rule; use target, draft, standard, judge, judge:THRESHOLD, topk:K, kl:D, typical or typical:EPSILON")
    return name, value


def make_engine(rule: str, target, draft, head=None, **settings) -> Engine:
    """The engine of a rule; `settings` are Engine's own (speculate_k, temperature, seed, ...)."""
    name, value = parse_rule(rule)
    if name in ("target", "draft"):
        return Engine({"target": target, "draft": draft}[name], **settings)
    return Engine(target, draft, head, name, value, **settings)


def answer_all(job):
    """Answers of every rule to a share of the problems: [(rule, task, right, tokens, seconds, rounds, accepted), ...]."""
    problems, names, speculate_k, *pair = job
    torch.set_num_threads(1)
    target, draft, head, tokenizer = load_pair(*pair)
    engines = {rule: make_engine(rule, target, draft, head, speculate_k=speculate_k) for rule in names}
    rows = []
    for i, p in enumerate(problems):
        prompt = tokenizer.encode(p["prompt"])
        for rule in names:  # interleaved, so that a slow minute of the machine hits all rules
            r = generate(engines[rule], prompt, MAX_NEW_TOKENS, tokenizer.eos_ids)
            text = tokenizer.decode_new(prompt, r.tokens)
            rows.append(dict(rule=rule, task=p["task"], prompt=p["prompt"], right=is_right(p["task"], p["prompt"], text, p["answer"]), text=text,
                             tokens=r.tokens, seconds=r.seconds, rounds=r.rounds, accepted=sum(n * c for n, c in enumerate(r.accept_counts))))
        if i % 20 == 0:
            print(f"{i}/{len(problems)}", file=sys.stderr, flush=True)
    return rows


def answer(problems, names, speculate_k, processes, *pair):
    """`answer_all` shared among processes; `pair` as `load_pair` takes it."""
    jobs = [(problems[i::processes], names, speculate_k, *pair) for i in range(processes)]
    with get_context("spawn").Pool(processes) as pool:
        return sum(pool.map(answer_all, jobs), [])


def table(rows, names) -> str:
    """Markdown; accepted is drafted tokens per round, speed-up is against the target alone where that was run."""
    by = lambda rule, task=None: [r for r in rows if r["rule"] == rule and task in (None, r["task"])]
    share = lambda rs: f"{sum(r['right'] for r in rs) / len(rs):.1%}"
    speed = lambda rs: sum(len(r["tokens"]) - 1 for r in rs) / sum(r["seconds"] for r in rs)
    lines = ["| rule | " + " | ".join(TASKS) + " | all | accepted per round | tokens/s | speed-up |", "|" + "---|" * (len(TASKS) + 5)]
    for rule in names:
        rs = by(rule)
        accepted = "–" if rule in ("target", "draft") else f"{sum(r['accepted'] for r in rs) / sum(r['rounds'] for r in rs):.2f}"
        faster = f"{speed(rs) / speed(by('target')):.2f}x" if "target" in names else "–"
        lines.append(f"| {rule} | " + " | ".join(share(by(rule, t)) for t in TASKS) + f" | {share(rs)} | {accepted} | {speed(rs):.0f} | {faster} |")
    if "target" in names and "standard" in names:
        same = sum(a["tokens"] == b["tokens"] for a, b in zip(by("target"), by("standard")))
        lines.append(f"\nstandard equals the target token for token on {same} of {len(by('target'))} problems")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rules", default=RULES, help=f"default {RULES}")
    parser.add_argument("--limit", type=int, help="problems of each task (default all)")
    parser.add_argument("--speculate_k", type=int, default=16)
    parser.add_argument("--processes", type=int, default=2, help="of one thread each")
    parser.add_argument("--json", type=Path, help="every answer, and the table")
    args = parser.parse_args()
    names, problems = args.rules.split(","), read_problems(args.limit)
    for name in names:
        parse_rule(name)
    if args.json:
        check_writable(args.json)
    rows = answer(problems, names, args.speculate_k, args.processes)
    text = table(rows, names)
    print(text)
    if args.json:
        with replacing(args.json) as tmp:
            tmp.write_text(json.dumps({"table": text, "answers": rows}) + "\n")


if __name__ == "__main__":
    run(main)
