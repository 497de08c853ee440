"""The demo pair as it ships: its models, its held-out problems, and an engine for each rule."""
from pathlib import Path

import torch

from common import json_lines
from demo.corpus import TASKS
from engine import Engine, LlamaDrafter
from load import Loaded, load_models, parse_rule

HOME = Path(__file__).parents[1] / "checkpoints" / "demo"
MAX_NEW_TOKENS = 220


def read_problems(limit=None) -> list[dict]:
    """The held-out problems, the first `limit` of each task."""
    lines = [line.value for line in json_lines(HOME / "problems.jsonl")]
    return [p for task in TASKS for p in [q for q in lines if q["task"] == task][:limit]]


def load_pair(target_dir=HOME / "target", dtype=torch.float32) -> Loaded:
    """Target, draft, judge and tokenizer of the demo; another target is a quantized one."""
    return load_models(target_dir, HOME / "draft", HOME / "judge.safetensors", dtype=dtype)


def make_engine(rule: str, target, draft, head=None, **settings) -> Engine:
    """The engine of a rule; `settings` are Engine's own (speculate_k, temperature, seed, ...)."""
    name, value = parse_rule(rule, ("target", "draft"))
    if name in ("target", "draft"):
        return Engine({"target": target, "draft": draft}[name], **settings)
    return Engine(target, LlamaDrafter(draft), head, name, value, **settings)
