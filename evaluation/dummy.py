"""The models that benchmark.py measures: checkpoints, or dummy weights of a Llama's real shapes.

Under torchrun n ranks share a model, n = 1 being one that each rank runs whole.
"""
import os
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

import load
import tp
from checkpoint import config_from
from common import read_json, refuse
from linear import prepare
from load import dtype_name
from model import ModelConfig, Transformer
from ranks import job
from tp import size, skeleton


def llama3(dim, n_layer, n_head, ffn_dim, factor=8.0, tied=False):
    """config.json of a Llama 3.1 or 3.2, Hugging Face's keys."""
    rope = dict(rope_type="llama3", factor=factor, low_freq_factor=1.0, high_freq_factor=4.0,
                original_max_position_embeddings=8192)
    return dict(architectures=["LlamaForCausalLM"], vocab_size=128256, hidden_size=dim,
                num_hidden_layers=n_layer, num_attention_heads=n_head, num_key_value_heads=8,
                intermediate_size=ffn_dim, max_position_embeddings=131072, rms_norm_eps=1e-5,
                rope_theta=500000.0, rope_scaling=rope, tie_word_embeddings=tied)


PRESETS = {
    "llama-3.2-1b": llama3(2048, 16, 32, 8192, factor=32.0, tied=True),
    "llama-3.1-8b": llama3(4096, 32, 32, 14336),
    "llama-3.1-70b": llama3(8192, 80, 64, 28672),
    "llama-3.1-405b": llama3(16384, 126, 128, 53248),
}


class Source(NamedTuple):
    """A model to build: from its checkpoint directory or, without one, dummy weights."""
    name: str
    config: dict
    directory: Path | None

    @property
    def model_config(self) -> ModelConfig:
        return config_from(self.config, self.name)


def find(name: str, quant: str | None, flag: str) -> Source:
    """The model that --target or --draft names: a preset, a config.json or a directory."""
    path = Path(name)
    refuse(
        (path.is_dir() and quant, f"--{flag}_quant is for dummy weights; quantize {name} with "
         "quantize.py and give the directory that it writes"),
        (not os.path.exists(name) and name not in PRESETS, f"--{flag} {name} is no preset "
         f"({', '.join(PRESETS)}), no checkpoint directory and no config.json"))
    if path.is_dir():
        return Source(name, read_json(path / "config.json"), path)
    config = dict(PRESETS[name] if name in PRESETS else read_json(path))
    if quant:
        config["quantization"] = {"mode": quant, "group_size": 128 if quant == "int4" else None}
    return Source(name, config, None)


def shared_by(device, target: tuple, draft: tuple) -> tuple[int, int]:
    """The ranks that share target and draft, each (source, dtype); raises UserError if they cannot.
    """
    if job.world() == 1:
        return 1, 1
    tp.check(target[0].model_config, target[0].name)
    whole = load.run_whole(draft[0].name, draft[0].model_config, device, draft[1])
    return job.world(), 1 if whole else job.world()


def describe(source: Source, dtype, n=1) -> dict:
    """What the model is, its bytes on all ranks, and those a pass reads there: of an untied
    embedding only a few rows.
    """
    config, ranks = source.model_config, job.world()
    model = skeleton(config, dtype, n=n)
    plain = skeleton(replace(config, quantization=None), dtype)
    weights = size(*model.parameters(), *model.buffers())
    return {"name": source.name, "weights": "real" if source.directory else "dummy",
            "quant": (source.config.get("quantization") or {}).get("mode"),
            "dtype": dtype_name(dtype), "shared_by": n,
            "bytes": ranks * weights, "bytes_a_rank": weights,
            "parameters": sum(p.numel() for p in plain.parameters()),
            "bytes_read": ranks * (
                weights - (0 if model.config.tied else size(model.embed.weight)))}


def build(source: Source, device, dtype, n=1) -> Transformer:
    """The model on `device`: its checkpoint, or random weights made there."""
    if source.directory:
        return load.load_model(source.directory, source.model_config, device, dtype, whole=n == 1)
    model = skeleton(source.model_config, dtype, device, n)
    if job.world() > 1:
        model.agree = job.same_everywhere
    for name, t in model.named_buffers():  # quantized weights; zeros would let a GPU clock higher
        if t.element_size() == 1:
            t.view(torch.uint8).random_(0, 127)  # as fp8, 127 is not a number
        else:
            t.fill_(0 if name.endswith("zero") else 1e-4)
    prepare(model, dtype)
    return model.requires_grad_(False).eval()
