"""The models that benchmark.py measures: checkpoints, or dummy weights of a Llama's real shapes."""
import contextlib
import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import checkpoint
from checkpoint import config_from
from common import read_json, refuse
from linear import prepare
from load import dtype_name
from model import Transformer


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


def find(name: str, quant: str | None, flag: str) -> Source:
    """The model that --target or --draft names: a preset, a config.json or a directory."""
    path = Path(name)
    refuse(
        (path.is_dir() and quant, f"--{flag}_quant is for dummy weights; quantize {name} with "
         "quantize.py and give the directory that it writes"),
        (not path.exists() and name not in PRESETS, f"--{flag} {name} is no preset "
         f"({', '.join(PRESETS)}), no checkpoint directory and no config.json"))
    if path.is_dir():
        return Source(name, read_json(path / "config.json"), path)
    config = dict(PRESETS[name] if name in PRESETS else read_json(path))
    if quant:
        config["quantization"] = {"mode": quant, "group_size": 128 if quant == "int4" else None}
    return Source(name, config, None)


@contextlib.contextmanager
def made_on(device, dtype):
    """Modules made inside are on `device`, in `dtype` where they do not choose one themselves."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def size(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def skeleton(source: Source, dtype, device="meta") -> Transformer:
    """The model with weights not filled; on "meta" without memory for them, to count with."""
    with made_on(device, dtype):
        return Transformer(config_from(source.config, source.name))


def describe(source: Source, dtype) -> dict:
    """What the model is, its bytes, and those a pass reads: an untied embedding is one row each."""
    model = skeleton(source, dtype)
    plain = skeleton(source._replace(config=source.config | {"quantization": None}), dtype)
    weights = size(*model.parameters(), *model.buffers())
    return {"name": source.name, "weights": "real" if source.directory else "dummy",
            "quant": (source.config.get("quantization") or {}).get("mode"),
            "dtype": dtype_name(dtype), "bytes": weights,
            "parameters": sum(p.numel() for p in plain.parameters()),
            "bytes_read": weights - (0 if model.config.tied else size(model.embed.weight))}


def build(source: Source, device, dtype) -> Transformer:
    """The model on `device`: its checkpoint, or random weights made there."""
    if source.directory:
        return checkpoint.load(source.directory, device, dtype)
    model = skeleton(source, dtype, device)
    for name, t in model.named_buffers():  # quantized weights; zeros would let a GPU clock higher
        if t.element_size() == 1:
            t.view(torch.uint8).random_(0, 127)  # as fp8, 127 is not a number
        else:
            t.fill_(0 if name.endswith("zero") else 1e-4)
    prepare(model, dtype)
    return model.requires_grad_(False).eval()


def check_memory(models: dict[str, dict], cache: int, device: str):
    """Refuse what does not fit before anything is allocated; cache: bytes."""
    if device == "cuda":
        free = torch.cuda.mem_get_info()[0]
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        with contextlib.suppress(OSError):  # on Linux what file caches would give back counts too
            lines = Path("/proc/meminfo").read_text().splitlines()
            free = next(int(s.split()[1]) * 1024 for s in lines if s.startswith("MemAvailable:"))
    need = sum(m["bytes"] for m in models.values()) + cache
    parts = ", ".join(f"{flag} {m['bytes'] / 1e9:.1f} GB" for flag, m in models.items())
    refuse((need > free, f"this does not fit: {parts} and caches {cache / 1e9:.1f} GB need at "
            f"least {need / 1e9:.1f} GB, {device} has {free / 1e9:.1f} GB free; take smaller "
            "models, --target_quant, --draft_quant or --dtype bfloat16"))
