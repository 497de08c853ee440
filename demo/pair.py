"""The demo pair as it ships: its models, its held-out problems, and an engine for each rule."""
import json
from pathlib import Path

import torch

from demo.corpus import TASKS
from generate import Engine
from judge import Judge, parse_rule
from model import fingerprint, load
from tokenizer import Tokenizer

HOME = Path(__file__).parents[1] / "checkpoints" / "demo"
MAX_NEW_TOKENS = 220


def read_problems(limit=None):
    """The held-out problems, the first `limit` of each task."""
    lines = [json.loads(line) for line in (HOME / "problems.jsonl").read_text().splitlines()]
    return [p for task in TASKS for p in [q for q in lines if q["task"] == task][:limit]]


def load_pair(target_dir=HOME / "target", dtype=torch.float32):
    """(target, draft, judge, tokenizer) of the demo; another target is a quantized one."""
    target, draft = load(target_dir, dtype=dtype), load(HOME / "draft", dtype=dtype)
    parent = target.config.quantization and target.config.quantization.parent
    head = Judge.load(HOME / "judge.safetensors", target.config.dim, fingerprint(target_dir),
                      str(target_dir), parent)
    return target, draft, head, Tokenizer.from_dir(target_dir)


def make_engine(rule: str, target, draft, head=None, **settings) -> Engine:
    """The engine of a rule; `settings` are Engine's own (speculate_k, temperature, seed, ...)."""
    name, value = parse_rule(rule, ("target", "draft"))
    if name in ("target", "draft"):
        return Engine({"target": target, "draft": draft}[name], **settings)
    return Engine(target, draft, head, name, value, **settings)
