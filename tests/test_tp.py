"""Tensor parallelism: two processes say what one says, and each reads only its share."""
import argparse
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open

import generate
import quantize
import tp
from checkpoint import config_from, fingerprint, load
from common import UserError, read_json
from helpers import random_model, run_command, save_checkpoint, tiny_config
from judge import JudgeHead
from load import resolve_device
from ranks import job
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


def script(directory, text: str):
    """A script that imports ours and runs the function `main` it defines as ranks."""
    path = directory / "script.py"
    path.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\nimport os, time, tp\n"
                    f"from ranks import job\n{text}\njob.run(main)\n")
    return path


SHARED = """
import generate
def main():
    tp.WORTH_SHARING = dict.fromkeys(tp.WORTH_SHARING, 0)  # the draft too, where it divides
    generate.main()
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A pair that compiles fast, with the demo's tokenizer and a judge that accepts much."""
    home = tmp_path_factory.mktemp("tiny")
    vocab = read_json(DEMO / "target" / "config.json")["vocab_size"]
    for name, seed in (("target", 1), ("draft", 2)):
        config = tiny_config(vocab_size=vocab, num_hidden_layers=2)
        save_checkpoint(home / name, random_model(config, seed), config)
        shutil.copy(DEMO / "target" / "tokenizer.model", home / name)
    head = JudgeHead(torch.randn(1, 64), torch.ones(1), 0.5, fingerprint(home / "target"))
    head.save(home / "judge.safetensors")
    return home


@pytest.mark.slow
@pytest.mark.parametrize("args", [
    JUDGE, pytest.param("compiled", marks=pytest.mark.long),
    (*STANDARD, "--temperature", "0.8", "--top_p", "0.9", "--seed", "5")],
    ids=["judge", "judge-compiled", "sampled"])
def test_two_processes_say_what_one_says(args, tmp_path, tiny):
    if args == "compiled":
        args = ("--target", tiny / "target", "--draft", tiny / "draft", "--judge",
                tiny / "judge.safetensors", "--prompt", "Question:", "--device", "cpu",
                "--compile", "--speculate_k", "2", "--max_new_tokens", "12")
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    done = subprocess.run([sys.executable, ROOT / "generate.py", *args, "--json", one],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    again = torchrun(script(tmp_path, SHARED), *args, "--json", two)
    assert again.returncode == 0, again.stderr
    one, two = json.loads(one.read_text()), json.loads(two.read_text())
    assert two["tokens"] == one["tokens"] and two.get("sources") == one.get("sources")
    assert again.stdout == done.stdout  # one rank speaks


@pytest.mark.slow
def test_an_int4_target_is_shared_too(tmp_path):
    q, one, two = (tmp_path / name for name in ("q", "one.json", "two.json"))
    args = ("--target", q, *JUDGE[2:], "--speculate_k", "6", "--json")
    with pytest.MonkeyPatch.context() as m:
        run_command(m, quantize, "--checkpoint_dir", DEMO / "target", "--mode", "int4",
                    "--group_size", "64", "--out", q)
        run_command(m, generate, *args, one)
    done = torchrun(ROOT / "generate.py", *args, two)
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


def rows_of(name: str, c, r: int, n: int) -> list[int]:
    """The rows of a stacked or vocabulary matrix that rank r of n needs, one by one."""
    part = lambda count: range(r * count // n, (r + 1) * count // n)
    if "w13" in name:
        return [*part(c.ffn_dim), *(c.ffn_dim + i for i in part(c.ffn_dim))]
    if "wqkv" not in name:
        return [*part(c.vocab_size)]
    kv = sorted({h // (c.n_head // c.n_kv_head) for h in part(c.n_head)})  # its query heads read
    k, v = c.n_head, c.n_head + c.n_kv_head  # heads before the first key's and the first value's
    heads = [*part(c.n_head), *(k + h for h in kv), *(v + h for h in kv)]
    return [h * c.head_dim + i for h in heads for i in range(c.head_dim)]


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_rank_reads_its_share_only_and_the_shares_are_the_whole(name, n, tmp_path, monkeypatch):
    """4 ranks of 2 KV heads: each is on two of them."""
    config = tiny_config(vocab_size=104, **VARIANTS[name])
    model, c = random_model(config), config_from(config)
    path = save_checkpoint(tmp_path / "m", model, config) / "model.safetensors"
    for r in range(n):
        in_rank(monkeypatch, r, n)
        read = tp.read_share(c)
        with safe_open(path, "pt") as f:
            share = {name: read(f, name) for name in f.keys()}
        local = load(tmp_path / "m", "cpu", torch.float32, build=tp.share, read=read)
        assert {k: p.shape for k, p in local.named_parameters()} == {k: t.shape
                                                                     for k, t in share.items()}
        for name, whole in model.named_parameters():
            if re.search("wqkv|w13|embed|output", name):
                want = whole[rows_of(name, c, r, n)]
            elif re.search("(wo|w2).weight", name):
                want = whole.chunk(n, dim=1)[r]
            else:  # the sum over the ranks has these biases once
                want = 0 * whole if r and re.search("(wo|w2).bias", name) else whole
            assert torch.equal(share[name], want), (name, r)


LOGITS = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import torch, tp
from checkpoint import load, read_config
from ranks import job
def main():
    job.start("cpu")
    for path in sys.argv[1:]:
        read = tp.read_share(read_config(path))
        models = load(path, dtype=torch.float32), load(path, "cpu", torch.float32, tp.share, read)
        ids = torch.arange(40)
        whole, shared = (m(ids[None], ids, m.new_cache(40))[0] for m in models)
        assert whole.std() > 0.5
        torch.testing.assert_close(shared, whole, atol=1e-4, rtol=1e-4, msg=path)
job.run(main)
"""


@pytest.fixture(scope="module")
def variants(tmp_path_factory) -> list:
    """Checkpoints of all variants, and their int8 copies."""
    home, paths = tmp_path_factory.mktemp("variants"), []
    for i, (name, variant) in enumerate(VARIANTS.items()):
        config = tiny_config(vocab_size=104, **variant)
        paths += [save_checkpoint(home / name, random_model(config, i), config),
                  home / f"{name}-int8"]
        with pytest.MonkeyPatch.context() as m:
            run_command(m, quantize, "--checkpoint_dir", paths[-2], "--mode", "int8", "--out",
                        paths[-1])
    return paths


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 4])
def test_logits_of_every_variant_are_those_of_the_whole_model(n, variants, tmp_path):
    (tmp_path / "script.py").write_text(LOGITS)
    done = torchrun(tmp_path / "script.py", *variants, n=n)
    assert done.returncode == 0, done.stderr


def test_what_does_not_divide_is_refused_before_a_weight_is_read(monkeypatch):
    int4 = {"quantization": {"mode": "int4", "group_size": 32}}
    fp8 = {"quantization": {"mode": "fp8", "group_size": None}}
    for n, overrides, what, fit in (
            (3, {"num_attention_heads": 6}, "2 key-value heads", "1, 2, 6"),
            (8, {}, "4 attention heads", "1, 2, 4"),
            (4, {"vocab_size": 102}, "102 vocabulary entries", "1, 2"),
            (4, {"intermediate_size": 98}, "98 feed-forward units", "1, 2"),
            (4, int4 | {"intermediate_size": 128}, "64 attention outputs in int4 blocks of 32",
             "1, 2"),
            (2, int4, "96 feed-forward units in int4 blocks of 32", "1"),
            (4, fp8 | {"intermediate_size": 128}, "96 vocabulary entries in fp8 blocks of 16",
             "1, 2")):
        in_rank(monkeypatch, 0, n)
        with pytest.raises(UserError, match=f"some/dir has {what}, which {n} processes cannot share"
                           f"; these numbers can: {fit}$"):
            tp.check(config_from(tiny_config(**{"vocab_size": 96} | overrides)), "some/dir")


def test_a_rank_without_a_gpu_or_nccl_is_refused(monkeypatch):
    in_rank(monkeypatch, 1, 3)
    for local, gpus, nccl, message in (
            ("3", 2, True, "torchrun started 3 processes on a machine with 2 GPUs; give "
             "--nproc_per_node 2 at most"),
            ("3", 4, False, "this PyTorch lacks NCCL, which joins GPUs; install")):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
        monkeypatch.setattr(torch.cuda, "device_count", lambda n=gpus: n)
        monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda has=nccl: has)
        with pytest.raises(UserError, match=message):
            job.start("cuda")


def test_the_default_dtype_is_the_gpus_on_every_rank(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(job, "start", lambda device: f"{device}:1")
    args = argparse.Namespace(device="cuda", dtype=None, draft_dtype=None)
    resolve_device(args)
    assert args.device == "cuda:1" and args.dtype == args.draft_dtype == torch.bfloat16
