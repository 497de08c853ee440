"""Small random models, checkpoints, changes to their files, and texts, for the tests."""
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint import config_from, sources
from common import run
from model import Transformer

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Models this small gain nothing from more threads, which would wait beside other work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---------------------------------------------------------------- models

def tiny_config(**overrides):
    """A small config.json with Hugging Face's keys."""
    return dict(architectures=["LlamaForCausalLM"], vocab_size=101, hidden_size=64,
                num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                intermediate_size=96, max_position_embeddings=128, rms_norm_eps=1e-5,
                rope_theta=10000.0, hidden_act="silu", eos_token_id=2,
                tie_word_embeddings=False) | overrides


WRONG = (None, True, False, "", "x", -1, 0, 1, 1.5, 3, 1e-300, 1e300, 10**30, 10**400, [], {}, [[]],
         {"a": 1}, ["x"], [None])  # what a JSON file can hold in place of the right value


def randomize(model, scale=0.2):
    """Random weights with which the logits differ clearly from token to token."""
    for name, p in model.named_parameters():
        p.data.uniform_(0.5, 1.5) if "norm" in name else p.data.normal_(0, scale)
    return model.requires_grad_(False).eval()


def random_model(config: dict, seed=0, scale=0.2) -> Transformer:
    """A float32 model of random weights."""
    torch.manual_seed(seed)
    return randomize(Transformer(config_from(config)), scale)


def hf_to_ours(state: dict, model: Transformer) -> dict:
    """The state of transformers' model as `model` has it, with q, k, v and gate, up joined."""
    return {name: torch.cat([state[s] for s in sources(name)]) for name in model.state_dict()}


# ---------------------------------------------------------------- checkpoints and commands

def save_checkpoint(directory, model, config: dict):
    """Write config.json and model.safetensors as convert_hf_checkpoint.py would."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file({name: p.detach().contiguous() for name, p in model.named_parameters()},
              directory / "model.safetensors")
    return directory


def shard(directory, count=3):
    """Split a checkpoint's model.safetensors into shards with an index."""
    weights, where = load_file(directory / "model.safetensors"), {}
    (directory / "model.safetensors").unlink()
    for i in range(count):
        name = f"model-{i + 1:05}-of-{count:05}.safetensors"
        part = dict(list(weights.items())[i::count])
        save_file(part, directory / name)
        where |= dict.fromkeys(part, name)
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": where}))


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(directory, change):
    """Rewrite model.safetensors after `change(weights)`, which changes the dict in place."""
    weights = {n: w.clone() for n, w in load_file(directory / "model.safetensors").items()}
    change(weights)
    save_file(weights, directory / "model.safetensors")


def put(tensors: dict):
    """A function that damages a checkpoint: these tensors instead of its own, or beside them."""
    return lambda directory: edit_weights(directory, lambda w: w.update(tensors))


def run_command(monkeypatch, command, *args):
    """Run a command's module in this process, as `python COMMAND.py ARGS` would."""
    monkeypatch.setattr(sys, "argv", [command.__name__, *map(str, args)])
    run(command.main)


# ---------------------------------------------------------------- memory

LINUX = Path("/proc/self/status").exists()
PEAK = """
import threading, torch
from pathlib import Path
from checkpoint import read_config, shapes, write_weights
from checkpoint import config_from

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

def measure(work):
    start, peaks, done = anonymous(), [0], threading.Event()
    watch = lambda: [peaks.append(anonymous()) for _ in iter(lambda: done.wait(0.001), True)]
    thread = threading.Thread(target=watch)
    thread.start()
    work()
    done.set(), thread.join()
    print(max(peaks) - start)
"""


def peak_memory(code: str) -> int:
    """Bytes that `measure(work)` in `code` found the work to need, in a process of its own.

    Mapped input files do not count: the system can take their pages back.
    """
    # glibc otherwise keeps up to 32 MB of freed tensors at hand, more or less by chance.
    glibc = {"MALLOC_MMAP_THRESHOLD_": "1000000", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run([sys.executable, "-c", PEAK + code], cwd=ROOT, env=os.environ | glibc,
                          capture_output=True, text=True, check=True)
    return int(done.stdout)


# ---------------------------------------------------------------- texts

PARTS = ["the", " cat", " Hello", "12345", " 7", "\n", "\n\n", "   ", "\t", " don't", "I'LL",
         "été", "e\u0301", "日本語", " привет", "مرحبا", "👩‍👩‍👧", "🎉", "def f(x):", " ==",
         "!!!", "<|eot_id|>", "#", "_", "x" * 9, "\u00a0", "ﬁ", " a", "Z", "."]


def strings(count, seed=0, rare=0.0):
    """Words, digits, spaces, signs, several scripts, emoji, code: mixed at random.

    rare: the share of parts that are characters from anywhere in Unicode's common ranges.
    """
    rng = random.Random(seed)
    ranges = (0x20, 0x500), (0x2000, 0x2100), (0x4E00, 0x9FA5)
    part = lambda: (chr(rng.randrange(*rng.choice(ranges))) if rare and rng.random() < rare
                    else rng.choice(PARTS))
    return ["".join(part() for _ in range(rng.randrange(1, 12))) for _ in range(count)]
