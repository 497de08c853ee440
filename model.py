"""Llama in plain PyTorch: config, transformer, static KV cache, and loading from a checkpoint
directory.

Covers Llama 2/3/3.1/3.2/3.3, Code Llama, TinyLlama, Mistral 7B and Qwen2/2.5, all built from
`config.json`. A setting that changes the computation and is not implemented is refused by name.
Nothing here knows of drafts or judges, and nothing is ever unpickled: weights are safetensors,
memory-mapped and moved to the device one tensor at a time.
"""
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cli import UserError
from linear import Quantization, head, linear, prepare

# Hugging Face's class: whether q, k and v have a bias when config.json does not say
ARCHITECTURES = {
    "LlamaForCausalLM": False,
    "MistralForCausalLM": False,
    "Qwen2ForCausalLM": True,
}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass
class ModelConfig:
    vocab_size: int
    dim: int
    n_layer: int
    n_head: int
    n_kv_head: int
    head_dim: int
    ffn_dim: int
    norm_eps: float
    rope_theta: float
    rope_scaling: dict | None  # Llama 3.1's four numbers, or None
    max_seq_len: int
    # not implemented, never needed: max_seq_len ends where the window would begin to matter
    sliding_window: int | None
    tied: bool
    qkv_bias: bool
    eos_ids: tuple[int, ...]
    quantization: Quantization | None = None  # of the linear layers, see linear.py

    @classmethod
    def from_dict(cls, hf: dict, where="config.json"):
        """Build from Hugging Face's keys; raises UserError naming a missing key or a setting that
        is not implemented.
        """
        def need(key):
            if hf.get(key) is None:
                raise UserError(f"{where}: key {key!r} is missing")
            return hf[key]

        arch = (hf.get("architectures") or [None])[0]
        if arch not in ARCHITECTURES:
            raise UserError(f"{where}: architecture {arch!r} is not supported (supported: "
                            f"{', '.join(ARCHITECTURES)})")
        for key, allowed in {"hidden_act": ("silu",), "mlp_bias": (False, None),
                             "pretraining_tp": (1, None),
                             "quantization_config": (None,),
                             "partial_rotary_factor": (1.0, None)}.items():
            if hf.get(key, allowed[-1]) not in allowed:
                raise UserError(f"{where}: {key} = {hf[key]!r} is not implemented (only "
                                f"{allowed[0]!r} is)")
        if arch != "Qwen2ForCausalLM" and hf.get("attention_bias"):
            raise UserError(f"{where}: attention_bias with {arch} puts a bias on o_proj too, "
                            "which is not implemented")

        n_head, dim, max_seq_len = need("num_attention_heads"), need("hidden_size"), need(
            "max_position_embeddings")
        # Mistral has a window whenever the key is there; Qwen2 only if it says so.
        window = hf.get("sliding_window") if hf.get("use_sliding_window",
                                                    arch == "MistralForCausalLM") else None
        theta, scaling = _rope_settings(hf, where)
        eos = hf.get("eos_token_id")
        config = cls(
            vocab_size=need("vocab_size"), dim=dim, n_layer=need("num_hidden_layers"),
            n_head=n_head,
            n_kv_head=hf.get("num_key_value_heads") or n_head, head_dim=hf.get("head_dim")
            or dim // n_head,
            ffn_dim=need("intermediate_size"), norm_eps=need("rms_norm_eps"), rope_theta=theta,
            rope_scaling=scaling,
            max_seq_len=min(max_seq_len, window or max_seq_len), sliding_window=window,
            tied=bool(hf.get("tie_word_embeddings", False)), qkv_bias=ARCHITECTURES[arch],
            eos_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
            quantization=Quantization.from_dict(hf.get("quantization"), where))
        if config.n_head % config.n_kv_head:
            raise UserError(f"{where}: num_attention_heads {n_head} is not a multiple of "
                            f"num_key_value_heads {config.n_kv_head}")
        return config

    @classmethod
    def from_dir(cls, checkpoint_dir):
        return cls.from_dict(read_json(Path(checkpoint_dir) / "config.json"),
                             Path(checkpoint_dir) / "config.json")


def _rope_settings(hf: dict, where):
    """(theta, Llama 3.1's scaling or None) from either spelling: rope_theta + rope_scaling, or
    transformers 5's rope_parameters.
    """
    rope = hf.get("rope_parameters") or {}
    scaling = {**(hf.get("rope_scaling") or {}), **rope}
    theta = rope.get("rope_theta", hf.get("rope_theta", 10000.0))
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return float(theta), None
    if kind != "llama3":
        raise UserError(f"{where}: rope type {kind!r} is not implemented (only 'default' and "
                        "'llama3' are)")
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    if missing := [k for k in keys if k not in scaling]:
        raise UserError(f"{where}: rope type 'llama3' needs {', '.join(map(repr, missing))}")
    return float(theta), {k: scaling[k] for k in keys}


def rope_table(config: ModelConfig, length: int, device=None) -> Tensor:
    """Cosines and sines of every position, float32 [length, 2, head_dim / 2], with Llama 3.1's
    frequency scaling.
    """
    freq = config.rope_theta ** -(torch.arange(0, config.head_dim, 2, device=device).float()
                                  / config.head_dim)
    if s := config.rope_scaling:
        # Wavelengths beyond the original context are stretched by `factor`, short ones kept, those
        # between blended.
        rotations = s["original_max_position_embeddings"] * freq / (2 * math.pi)
        keep = ((rotations - s["low_freq_factor"])
                / (s["high_freq_factor"] - s["low_freq_factor"])).clamp(0, 1)
        freq = keep * freq + (1 - keep) * freq / s["factor"]
    angle = torch.outer(torch.arange(length, device=device).float(), freq)
    return torch.stack((angle.cos(), angle.sin()), dim=1)


def apply_rope(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate x [B, S, H, head_dim] by rope [S, 2, head_dim / 2] in Hugging Face's layout: dimension
    i is paired with i + head_dim / 2.
    """
    cos, sin = rope[:, None].unbind(2)
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).type_as(x)


class Attention(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = c.n_head, c.n_kv_head, c.head_dim
        self.wqkv = linear(c.quantization, c.dim, (c.n_head + 2 * c.n_kv_head) * c.head_dim,
                           bias=c.qkv_bias)
        self.wo = linear(c.quantization, c.n_head * c.head_dim, c.dim)

    def forward(self, x: Tensor, pos: Tensor, kv: Tensor, rope: Tensor, mask: Tensor) -> Tensor:
        B, S, _ = x.shape
        q, k, v = self.wqkv(x).view(B, S, -1,
                                    self.head_dim).split([self.n_head, self.n_kv_head,
                                                          self.n_kv_head], dim=2)
        q, k = apply_rope(q, rope), apply_rope(k, rope)
        kv.index_copy_(0, pos, torch.stack((k, v)).permute(2, 0, 1, 3, 4))
        k, v = kv.permute(1, 2, 3, 0, 4)
        # The query heads that share a key head become more rows of one head, so the cache is never
        # repeated.
        q = q.transpose(1, 2).reshape(B, self.n_kv_head, -1, self.head_dim)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.wo(y.view(B, self.n_head, S, self.head_dim).transpose(1, 2).reshape(B, S, -1))


class FeedForward(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.w13 = linear(c.quantization, c.dim, 2 * c.ffn_dim)  # gate and up projection in one
        self.w2 = linear(c.quantization, c.ffn_dim, c.dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w13(x).chunk(2, dim=-1)
        return self.w2(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.attn_norm = nn.RMSNorm(c.dim, eps=c.norm_eps)
        self.attn = Attention(c)
        self.ffn_norm = nn.RMSNorm(c.dim, eps=c.norm_eps)
        self.ffn = FeedForward(c)

    def forward(self, x, pos, kv, rope, mask):
        x = x + self.attn(self.attn_norm(x), pos, kv, rope, mask)
        return x + self.ffn(self.ffn_norm(x))


@dataclass
class Cache:
    """Keys and values of the positions read so far, allocated once; it belongs to who generates, so
    models can be shared.

    Position by position, so that the first positions of a cache look the same to a compiled pass
    whatever its length.
    """
    kv: list[Tensor]  # a layer's: [length, 2, B, n_kv_head, head_dim]
    rope: Tensor  # float32 [length, 2, head_dim / 2]

    def first(self, span: int) -> "Cache":
        """The first `span` positions, as a view: a pass that is given it neither sees nor pays for
        what lies behind.
        """
        return Cache([kv[:span] for kv in self.kv], self.rope[:span])


class Transformer(nn.Module):
    """`features` then `output`; `forward` is both. All state is in the cache that they are given.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.output = head(None if config.tied else config.quantization, config.dim,
                           config.vocab_size)
        if config.tied:
            self.output.weight = self.embed.weight

    def new_cache(self, length: int, batch: int = 1) -> Cache:
        """An empty cache of `length` positions in the weights' dtype, on the weights' device."""
        c, w = self.config, self.norm.weight
        kv = [torch.zeros(length, 2, batch, c.n_kv_head, c.head_dim, dtype=w.dtype, device=w.device)
              for _ in range(c.n_layer)]
        return Cache(kv, rope_table(c, length, w.device))

    def features(self, tokens: Tensor, pos: Tensor, cache: Cache) -> Tensor:
        """Last-layer hidden states after the final norm, [B, S, D]: what the LM head reads, and the
        judge.

        tokens [B, S] stand at positions pos [S] and are written to the cache there. Attention costs
        as much as the cache is long: give it `cache.first(span)`.
        """
        rope = cache.rope[pos]
        mask = torch.arange(len(cache.rope), device=pos.device) <= pos[:, None]
        mask = mask.repeat(self.config.n_head // self.config.n_kv_head, 1)
        x = self.embed(tokens)
        for layer, kv in zip(self.layers, cache.kv):
            x = layer(x, pos, kv, rope, mask)
        return self.norm(x)

    def forward(self, tokens: Tensor, pos: Tensor, cache: Cache) -> tuple[Tensor, Tensor]:
        """(logits [B, S, V], hidden [B, S, D]); the logits of row i are of the token after
        tokens[:, i].
        """
        hidden = self.features(tokens, pos, cache)
        return self.output(hidden), hidden


def read_json(path) -> dict:
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("it is not an object")
        return value
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (OSError, ValueError) as e:
        raise UserError(f"{path} cannot be read as JSON: {e}") from None


def weight_files(checkpoint_dir) -> list[Path]:
    """The safetensors files of a checkpoint directory, single or sharded; raises UserError if one
    is missing.
    """
    directory = Path(checkpoint_dir)
    if not directory.is_dir():
        raise UserError(f"checkpoint directory {directory} does not exist")
    index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
    if index.exists():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise UserError(f"{index}: no weight_map in it; fetch the file again")
        files = [directory / name for name in sorted(set(names.values()))]
    elif single.exists():
        files = [single]
    elif pickled := sorted(p.name for p in directory.iterdir()
                           if p.suffix in (".bin", ".pt", ".pth")):
        raise UserError(f"{directory} holds pickled weights ({pickled[0]}), which are never "
                        "loaded; get the checkpoint as "
                        "safetensors (on the hub: its safetensors revision, or the convert Space)")
    else:
        raise UserError(f"{directory} holds no model.safetensors and no "
                        "model.safetensors.index.json")
    if missing := [f for f in files if not f.is_file()]:
        raise UserError(f"{missing[0]} is missing; fetch it again")
    return files


def open_weights(path, device="cpu"):
    """safe_open, memory-mapped, tensors made on `device`; a damaged file is named in a UserError.
    """
    try:
        return safe_open(path, framework="pt", device=str(device))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path} is damaged or truncated ({e}); fetch it again") from None


def load(checkpoint_dir, device="cpu", dtype=torch.bfloat16, build=Transformer, read=lambda file,
         name: file.get_tensor(name)) -> Transformer:
    """The checkpoint's model, ready to run.

    Peak memory is the model plus one tensor: each goes straight to `device`.

    On a CPU linear layers are packed (linear.py); small float32 ones are then there twice.

    `build(config)` and `read(file, name)` make another model of it, such as a share of it.
    """
    files = weight_files(checkpoint_dir)
    config = ModelConfig.from_dir(checkpoint_dir)
    if config.quantization:
        config.quantization.check_device(device, checkpoint_dir)
    with torch.device("meta"):
        model = build(config)
    # these have a dtype of their own
    quantized = {name: b.dtype for name, b in model.named_buffers()}
    shapes = {name: t.shape for name, t in [*model.named_parameters(), *model.named_buffers()]}
    weights = {}
    for path in files:
        with open_weights(path, device) as f:
            for name in f.keys():
                if name.startswith("model."):
                    raise UserError(f"{checkpoint_dir} is a Hugging Face checkpoint; convert it "
                                    "first: python "
                                    f"convert_hf_checkpoint.py --checkpoint_dir {checkpoint_dir} "
                                    "--out DIR")
                tensor = read(f, name)
                weights[name] = tensor if name in quantized else tensor.to(dtype)
    for name, shape in shapes.items():
        if name not in weights:
            raise UserError(f"{checkpoint_dir}: weight {name} is missing")
        if weights[name].shape != shape:
            raise UserError(f"{checkpoint_dir}: weight {name} has shape "
                            f"{list(weights[name].shape)}, config.json says {list(shape)}")
        if name in quantized and weights[name].dtype != quantized[name]:
            raise UserError(f"{checkpoint_dir}: weight {name} is {weights[name].dtype}, "
                            f"config.json says {quantized[name]}; quantize again")
    if extra := sorted(weights.keys() - shapes.keys()):
        raise UserError(f"{checkpoint_dir}: weight {extra[0]} has no place in this architecture")
    # the names were checked above; tied weights have one name
    model.load_state_dict(weights, assign=True, strict=False)
    if model.config.tied:
        model.output.weight = model.embed.weight
    weights.clear()  # else every tensor that `prepare` exchanges would be there twice
    prepare(model, dtype)
    return model.requires_grad_(False).eval()


def fingerprint(checkpoint_dir) -> str:
    """16 hex digits that tell one target's weights from another's, from 256 numbers of three rows
    of every tensor, rounded to bfloat16.

    So it costs milliseconds for any size, and a float32 copy of a bfloat16 checkpoint has the same
    fingerprint.
    """
    digest = {}
    for path in weight_files(checkpoint_dir):
        with open_weights(path) as f:
            for name in f.keys():
                rows = f.get_slice(name)
                n = rows.get_shape()[0]
                sample = torch.stack([rows[i:i + 1].flatten()[:256]
                                      for i in (0, n // 2, n - 1)]).to(torch.bfloat16)
                digest[name] = f"{name} {rows.get_shape()} ".encode() + bytes(
                    sample.view(torch.uint8).flatten().tolist())
    return hashlib.sha256(b"".join(digest[name] for name in sorted(digest))).hexdigest()[:16]
