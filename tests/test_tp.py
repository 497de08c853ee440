"""Tensor parallelism: two processes say what one says, each reads only its share, and a failure
ends the run.
"""
import json
import os
import re
import shutil
import subprocess
import sys
import time

import pytest
import torch
from safetensors import safe_open

import tp
from checkpoint import config_from, fingerprint, load
from common import UserError, read_json
from helpers import random_model, save_checkpoint, tiny_config
from judge import JudgeHead
from test_generate import ROOT

DEMO = ROOT / "checkpoints" / "demo"
PROMPT = json.loads((DEMO / "problems.jsonl").read_text().splitlines()[0])["prompt"]
ALONE = ("--target", DEMO / "target", "--prompt", PROMPT, "--max_new_tokens", "40", "--device",
         "cpu", "--dtype", "float32")
STANDARD = (*ALONE, "--draft", DEMO / "draft")
JUDGE = (*STANDARD, "--judge", DEMO / "judge.safetensors")


def torchrun(script, *args, n=2):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               f"--nproc_per_node={n}", script, *args]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A pair that compiles fast, with the demo's tokenizer and a judge that accepts much."""
    home = tmp_path_factory.mktemp("tiny")
    vocab = read_json(DEMO / "target" / "config.json")["vocab_size"]
    for name, seed in (("target", 1), ("draft", 2)):
        config = tiny_config(vocab_size=vocab, num_hidden_layers=1)
        save_checkpoint(home / name, random_model(config, seed), config)
        shutil.copy(DEMO / "target" / "tokenizer.model", home / name)
    head = JudgeHead(torch.randn(1, 64), torch.ones(1), 0.5, fingerprint(home / "target"))
    head.save(home / "judge.safetensors")
    return home


@pytest.mark.slow
@pytest.mark.parametrize("args", [
    ALONE, STANDARD, JUDGE, "compiled",
    (*STANDARD, "--temperature", "0.8", "--top_p", "0.9", "--seed", "5")],
    ids=["target", "standard", "judge", "judge-compiled", "sampled"])
def test_two_processes_say_what_one_says(args, tmp_path, tiny):
    if args == "compiled":
        args = ("--target", tiny / "target", "--draft", tiny / "draft", "--judge",
                tiny / "judge.safetensors", "--prompt", "Question:", "--device", "cpu",
                "--compile", "--speculate_k", "2", "--max_new_tokens", "12")
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    done = subprocess.run([sys.executable, ROOT / "generate.py", *args, "--json", one],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    again = torchrun(ROOT / "generate.py", *args, "--json", two)
    assert again.returncode == 0, again.stderr
    one, two = json.loads(one.read_text()), json.loads(two.read_text())
    assert two["tokens"] == one["tokens"] and two.get("sources") == one.get("sources")
    assert again.stdout == done.stdout  # one rank speaks


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_a_quantized_target_is_shared_too(mode, tmp_path):
    subprocess.run([sys.executable, ROOT / "quantize.py", "--checkpoint_dir", DEMO / "target",
                    "--mode", mode, "--out", tmp_path / "q",
                    *(["--group_size", "64"] if mode == "int4" else [])], check=True,
                   capture_output=True)
    args = ("--target", tmp_path / "q", *JUDGE[2:], "--speculate_k", "6")
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    subprocess.run([sys.executable, ROOT / "generate.py", *map(str, args), "--json", one],
                   check=True, capture_output=True)
    done = torchrun(ROOT / "generate.py", *args, "--json", two)
    assert done.returncode == 0, done.stderr
    one, two = json.loads(one.read_text()), json.loads(two.read_text())
    assert (two["tokens"], two["sources"]) == (one["tokens"],
                                               one["sources"]) and one["mean_accepted"] > 1


def in_rank(monkeypatch, r, n=2):
    monkeypatch.setenv("RANK", str(r))
    monkeypatch.setenv("WORLD_SIZE", str(n))


BIASES = dict(attention_bias=True, mlp_bias=True)
VARIANTS = {"qwen2": dict(model_type="qwen2"), "biases": BIASES,
            "tied": dict(model_type="qwen2", tie_word_embeddings=True),
            "qwen3": dict(model_type="qwen3", head_dim=16, attention_bias=True)}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_rank_reads_its_share_only_and_the_shares_are_the_whole(name, tmp_path, monkeypatch):
    config = tiny_config(vocab_size=102, **VARIANTS[name])
    model = random_model(config)
    path = save_checkpoint(tmp_path / "m", model, config) / "model.safetensors"
    shares = []
    for r in range(2):
        in_rank(monkeypatch, r)
        read = tp.read_share(config_from(config))
        with safe_open(path, "pt") as f:
            shares.append({name: read(f, name) for name in f.keys()})
        local = load(tmp_path / "m", "cpu", torch.float32, build=tp.share, read=read)
        assert {n: p.shape for n, p in local.named_parameters()} == {n: t.shape for n,
                                                                     t in shares[r].items()}
    for name, whole in model.named_parameters():
        a, b = shares[0][name], shares[1][name]
        if whole.dim() == 1 and not re.search("wqkv|w13", name):
            once = re.search("(wo|w2).bias", name)  # the sum over the ranks has it once
            assert torch.equal(a, whole) and torch.equal(b, 0 * whole if once else whole)
            continue
        assert a.numel() == b.numel() == whole.numel() // 2
        if "wqkv" in name:
            q, k, v = whole.split([64, 32, 32])
            assert torch.equal(torch.cat([x[len(x) // 2 * r:len(x) // 2 * (r + 1)]
                                          for x in (q, k, v) for r in (0,)]), a)
            assert torch.equal(torch.cat([x[len(x) // 2:] for x in (q, k, v)]), b)
        elif "w13" in name:
            assert torch.equal(torch.cat((a[:48], b[:48], a[48:], b[48:])), whole)
        else:
            assert torch.equal(torch.cat((a, b), dim=1 if re.search("wo|w2", name) else 0), whole)


LOGITS = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import torch, tp
from checkpoint import load, read_config
tp.start("cpu")
for path in sys.argv[1:]:
    read = tp.read_share(read_config(path))
    models = load(path, dtype=torch.float32), load(path, "cpu", torch.float32, tp.share, read)
    ids = torch.arange(40)
    whole, shared = (m(ids[None], ids, m.new_cache(40))[0] for m in models)
    assert whole.std() > 0.5
    torch.testing.assert_close(shared, whole, atol=1e-4, rtol=1e-4, msg=path)
tp.leave()
"""


@pytest.mark.slow
def test_logits_of_every_variant_are_those_of_the_whole_model(tmp_path):
    (tmp_path / "script.py").write_text(LOGITS)
    paths = []
    for i, (name, variant) in enumerate(VARIANTS.items()):
        config = tiny_config(vocab_size=102, **variant)
        paths += [save_checkpoint(tmp_path / name, random_model(config, i), config)]
        paths += [tmp_path / f"{name}-int8"]
        subprocess.run([sys.executable, ROOT / "quantize.py", "--checkpoint_dir", paths[-2],
                        "--mode", "int8", "--out", paths[-1]], check=True, capture_output=True)
    done = torchrun(tmp_path / "script.py", *paths)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_what_does_not_divide_is_refused_before_a_weight_is_read(tmp_path, monkeypatch):
    in_rank(monkeypatch, 0, 4)
    for overrides, what in (({}, "2 key-value heads"),
                            ({"num_key_value_heads": 4, "vocab_size": 101}, "101 vocabulary "
                             "entries"),
                            ({"num_key_value_heads": 4, "vocab_size": 100, "intermediate_size": 98},
                             "98 feed-forward units")):
        with pytest.raises(UserError, match=f"some/dir has {what}, not divisible by 4 processes"):
            tp.check(config_from(tiny_config(**overrides)), "some/dir")
    done = torchrun(ROOT / "generate.py", *ALONE, n=3)
    assert done.returncode != 0 and "error: " in done.stderr
    assert "not divisible by 3 processes" in done.stderr
    assert "warm-up" not in done.stderr


@pytest.mark.slow
def test_a_rank_that_fails_ends_the_run_with_its_error(tmp_path):
    script = tmp_path / "fails.py"
    script.write_text(f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import engine, generate, tp
from common import run
original = engine.Engine.round
def round(self):
    if tp.rank() == 1 and len(self.tokens) > 60:
        raise RuntimeError("this rank has had enough")
    return original(self)
engine.Engine.round = round
run(generate.main)
""")
    start = time.time()
    done = torchrun(script, *ALONE)
    assert done.returncode != 0 and "this rank has had enough" in done.stderr
    assert time.time() - start < 120
