"""The files of a checkpoint directory: config, weights, fingerprint, and writing a new directory.

Weights are safetensors, memory-mapped and read one tensor at a time; nothing is ever unpickled. A
directory is written from a plan, {name: Planned}, so memory does not grow with the model.
"""
import ctypes
import hashlib
import json
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from common import UserError, open_weights, read_json, refuse, replacing
from linear import Quantization, prepare
from model import ModelConfig, Transformer

FORMATS = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.int8: "I8",
           torch.uint8: "U8", torch.float8_e4m3fn: "F8_E4M3"}
PLAIN = {FORMATS[dtype]: dtype for dtype in (torch.bfloat16, torch.float16, torch.float32)}
SHARD_BYTES = 5 * 1024**3
CHUNK = 4 * 1024**2  # weights read at a time: 16 MB as float32
COPIED = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json",
          "added_tokens.json", "chat_template.jinja")


# Hugging Face's class: whether q, k and v have a bias when config.json does not say
ARCHITECTURES = {"LlamaForCausalLM": False, "MistralForCausalLM": False, "Qwen2ForCausalLM": True}
IMPLEMENTED = {"hidden_act": ("silu",), "mlp_bias": (False, None), "pretraining_tp": (1, None),
               "quantization_config": (None,), "partial_rotary_factor": (1.0, None)}


# ---------------------------------------------------------------- config.json

def config_from(hf: dict, where="config.json") -> ModelConfig:
    """The config that Hugging Face's keys describe.

    Raises UserError naming a missing key or a setting that is not implemented.
    """
    def need(key):
        if hf.get(key) is None:
            raise UserError(f"{where}: key {key!r} is missing")
        return hf[key]

    arch = (hf.get("architectures") or [None])[0]
    refuse(
        (arch not in ARCHITECTURES, f"{where}: architecture {arch!r} is not supported "
         f"(supported: {', '.join(ARCHITECTURES)})"),
        *((hf.get(key, allowed[-1]) not in allowed, f"{where}: {key} = {hf.get(key)!r} is not "
           f"implemented (only {allowed[0]!r} is)") for key, allowed in IMPLEMENTED.items()),
        (arch != "Qwen2ForCausalLM" and hf.get("attention_bias"), f"{where}: attention_bias "
         f"with {arch} puts a bias on o_proj too, which is not implemented"))
    n_head, dim, context = map(need, ("num_attention_heads", "hidden_size",
                                      "max_position_embeddings"))
    n_kv_head = hf.get("num_key_value_heads") or n_head
    # Mistral has a window whenever the key is there; Qwen2 only if it says so.
    windowed = hf.get("use_sliding_window", arch == "MistralForCausalLM")
    window = hf.get("sliding_window") if windowed else None
    theta, scaling = rope_settings(hf, where)
    refuse((n_head % n_kv_head, f"{where}: num_attention_heads {n_head} is not a multiple of "
            f"num_key_value_heads {n_kv_head}"))
    return ModelConfig(
        vocab_size=need("vocab_size"), dim=dim, n_layer=need("num_hidden_layers"),
        n_head=n_head, n_kv_head=n_kv_head, head_dim=hf.get("head_dim") or dim // n_head,
        ffn_dim=need("intermediate_size"), norm_eps=need("rms_norm_eps"), rope_theta=theta,
        rope_scaling=scaling, max_seq_len=min(context, window or context),
        sliding_window=window, tied=bool(hf.get("tie_word_embeddings", False)),
        qkv_bias=ARCHITECTURES[arch],
        quantization=Quantization.from_dict(hf.get("quantization"), where))


def read_config(checkpoint_dir) -> ModelConfig:
    path = Path(checkpoint_dir) / "config.json"
    return config_from(read_json(path), path)


def rope_settings(hf: dict, where) -> tuple[float, dict | None]:
    """(theta, Llama 3.1's scaling or None) from rope_theta + rope_scaling or rope_parameters."""
    rope = hf.get("rope_parameters") or {}
    scaling = {**(hf.get("rope_scaling") or {}), **rope}
    theta = float(rope.get("rope_theta", hf.get("rope_theta", 10000.0)))
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return theta, None
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    missing = [k for k in keys if k not in scaling]
    refuse((kind != "llama3", f"{where}: rope type {kind!r} is not implemented (only 'default' and "
            "'llama3' are)"),
           (missing, f"{where}: rope type 'llama3' needs {', '.join(map(repr, missing))}"))
    return theta, {k: scaling[k] for k in keys}


# ---------------------------------------------------------------- names and shapes

TOP = {"embed.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight",
       "output.weight": "lm_head.weight"}
LAYER = {  # ours: theirs, joined along the rows
    "attn_norm": ["input_layernorm"], "ffn_norm": ["post_attention_layernorm"],
    "attn.wo": ["self_attn.o_proj"], "ffn.w2": ["mlp.down_proj"],
    "attn.wqkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "ffn.w13": ["mlp.gate_proj", "mlp.up_proj"],
}


def sources(name: str) -> list[str]:
    """Hugging Face's tensors that make up our tensor `name`, in order."""
    if name in TOP:
        return [TOP[name]]
    _, layer, rest = name.split(".", 2)
    module, kind = rest.rsplit(".", 1)
    return [f"model.layers.{layer}.{theirs}.{kind}" for theirs in LAYER[module]]


def shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """Every parameter of a model, {name: shape}; tied weights have one name."""
    with torch.device("meta"):
        return {name: p.shape for name, p in Transformer(config).named_parameters()}


def source_shapes(config: ModelConfig) -> dict[str, dict[str, list[int]]]:
    """For every parameter the tensors of `sources` with their shapes, {ours: {theirs: shape}}."""
    q, kv = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
    rows = {"q_proj": q, "k_proj": kv, "v_proj": kv, "gate_proj": config.ffn_dim,
            "up_proj": config.ffn_dim}
    return {ours: {theirs: [rows.get(theirs.split(".")[-2], shape[0]), *shape[1:]]
                   for theirs in sources(ours)}
            for ours, shape in shapes(config).items()}


# ---------------------------------------------------------------- reading

def weight_files(checkpoint_dir) -> list[Path]:
    """The safetensors files of a checkpoint directory; raises UserError if any is missing."""
    directory = Path(checkpoint_dir)
    refuse((not directory.is_dir(), f"checkpoint directory {directory} does not exist"))
    index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
    if index.exists():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise UserError(f"{index}: no weight_map in it; fetch the file again")
        files = [directory / name for name in sorted(set(names.values()))]
    elif single.exists():
        files = [single]
    else:
        pickled = sorted(p.name for p in directory.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
        raise UserError(
            f"{directory} holds pickled weights ({pickled[0]}), which are never loaded; get the "
            "checkpoint as safetensors (on the hub: its safetensors revision, or the convert Space)"
            if pickled else
            f"{directory} holds no model.safetensors and no model.safetensors.index.json")
    if missing := [f for f in files if not f.is_file()]:
        raise UserError(f"{missing[0]} is missing; fetch it again")
    return files


def check_names(checkpoint_dir, expected: dict, found: set[str]):
    """Refuse a checkpoint that lacks one of the tensors `expected`, or holds another."""
    theirs = lambda names: any(name.startswith("model.") for name in names)
    missing = next((name for name in expected if name not in found), None)
    extra = min(found - expected.keys(), default=None)
    refuse(
        (theirs(found) and not theirs(expected),
         f"{checkpoint_dir} is a Hugging Face checkpoint; convert it first: python "
         f"convert_hf_checkpoint.py --checkpoint_dir {checkpoint_dir} --out DIR"),
        (missing, f"{checkpoint_dir}: weight {missing} is missing; fetch the checkpoint again"),
        (extra, f"{checkpoint_dir}: weight {extra} has no place in this architecture"))


def check_shape(checkpoint_dir, name: str, found, expected):
    refuse((list(found) != list(expected), f"{checkpoint_dir}: weight {name} has shape "
            f"{list(found)}, config.json says {list(expected)}"))


def open_tensors(checkpoint_dir, expected: dict, ignored=lambda name: False) -> dict:
    """Open the tensors `expected`, {name: shape}, of a checkpoint that is not quantized.

    Returns {name: slice} in the order of `expected`; nothing is read yet. Raises UserError if one
    is missing or has another shape, or if there are others that are not `ignored(name)`.
    """
    tensors = {name: file.get_slice(name) for path in weight_files(checkpoint_dir)
               for file in [open_weights(path)] for name in file.keys() if not ignored(name)}
    for name, tensor in tensors.items():  # an integer or 8-bit weight means nothing without scales
        refuse((name in expected and tensor.get_dtype() not in PLAIN, f"{checkpoint_dir}: weight "
                f"{name} is {tensor.get_dtype()}; take the checkpoint that is not quantized"))
    check_names(checkpoint_dir, expected, set(tensors))
    for name, shape in expected.items():
        check_shape(checkpoint_dir, name, tensors[name].get_shape(), shape)
    return {name: tensors[name] for name in expected}


def read_rows(tensors: list, dtype: torch.dtype) -> Iterator[Tensor]:
    """The rows of open tensors one after another, some at a time, as `dtype`."""
    for tensor in tensors:
        n, *columns = tensor.get_shape()
        step = max(1, CHUNK // columns[0]) if columns else n
        for i in range(0, n, step):
            yield tensor[i:i + step].to(dtype)


def load(checkpoint_dir, device="cpu", dtype=torch.bfloat16, build=Transformer,
         read=lambda file, name: file.get_tensor(name)) -> Transformer:
    """The checkpoint's model, ready to run; raises UserError if it does not fit its config.json.

    Peak memory is the model plus one tensor: each goes straight to `device`. On a CPU, linear
    layers are packed (linear.py), and small float32 ones are held twice. `build(config)` and
    `read(file, name)` can make another model of it, such as one rank's share.
    """
    files = weight_files(checkpoint_dir)
    config = read_config(checkpoint_dir)
    if config.quantization:
        config.quantization.check_device(device, checkpoint_dir)
    with torch.device("meta"):
        model = build(config)
    quantized = dict(model.named_buffers())  # these keep the dtype that they have in the file
    expected = dict(model.named_parameters()) | quantized
    found = {name for path in files for name in open_weights(path).keys()}
    check_names(checkpoint_dir, expected, found)
    weights = {}
    for path in files:
        with open_weights(path, device) as file:
            for name in file.keys():
                tensor = read(file, name)
                weights[name] = tensor if name in quantized else tensor.to(dtype)
    for name, tensor in weights.items():
        check_shape(checkpoint_dir, name, tensor.shape, expected[name].shape)
        if name in quantized and tensor.dtype != quantized[name].dtype:
            raise UserError(f"{checkpoint_dir}: weight {name} is {tensor.dtype}, config.json says "
                            f"{quantized[name].dtype}; quantize again")
    # strict=False: tied weights have one name here; the names were checked above.
    model.load_state_dict(weights, assign=True, strict=False)
    if model.config.tied:
        model.output.weight = model.embed.weight
    weights.clear()  # so that a tensor is freed when `prepare` replaces it
    prepare(model, dtype)
    return model.requires_grad_(False).eval()


def fingerprint(checkpoint_dir) -> str:
    """16 hex digits that tell one model's weights from another's.

    They hash up to 256 numbers of three rows of every tensor, rounded to bfloat16: that takes
    milliseconds at any size, and a float32 copy of a bfloat16 checkpoint has the same fingerprint.
    """
    digest = {}
    for path in weight_files(checkpoint_dir):
        with open_weights(path) as file:
            for name in file.keys():
                tensor = file.get_slice(name)
                n = tensor.get_shape()[0]
                sample = torch.stack([tensor[i:i + 1].flatten()[:256] for i in (0, n // 2, n - 1)])
                data = sample.to(torch.bfloat16).view(torch.uint8).flatten().tolist()
                digest[name] = f"{name} {tensor.get_shape()} ".encode() + bytes(data)
    return hashlib.sha256(b"".join(digest[name] for name in sorted(digest))).hexdigest()[:16]


# ---------------------------------------------------------------- writing

class Planned(NamedTuple):
    """A tensor to be written; its parts, joined along the rows, are read when they are needed."""
    shape: torch.Size
    dtype: torch.dtype
    parts: Iterator[Tensor]

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


def write_safetensors(path, tensors: dict[str, Planned], progress):
    """Write a safetensors file: header length, JSON header, the bytes of each part as it is read.

    A joined tensor is never in memory, for the rows of its parts just follow each other.
    """
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": FORMATS[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [at, at + tensor.nbytes]}
        at += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            for data in tensor.parts:
                data = data.contiguous()
                # The tensor's own memory, no copy. NumPy has no bfloat16 to lend it.
                f.write((ctypes.c_ubyte * data.nbytes).from_address(data.data_ptr()))
                del data  # before the next part is made
            progress.update()


def write_weights(planned: dict[str, Planned], out: Path, shard_bytes=SHARD_BYTES):
    """Write planned tensors into the directory `out`: one file, or numbered shards and an index.

    A shard has at most `shard_bytes`, or a single tensor.
    """
    shards, size = [{}], 0
    for name, tensor in planned.items():
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards, size = [*shards, {}], 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    many = len(shards)
    files = ["model.safetensors"] if many == 1 else [
        f"model-{i:05}-of-{many:05}.safetensors" for i in range(1, many + 1)]
    # disable=None: no progress bar in a log file
    with tqdm(total=len(planned), unit="tensor", desc="writing", disable=None) as progress:
        for file, tensors in zip(files, shards):
            write_safetensors(out / file, tensors, progress)
    if many > 1:
        index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in planned.values())},
                 "weight_map": {name: file for file, part in zip(files, shards) for name in part}}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def write_checkpoint(source: Path, out: Path, planned: dict[str, Planned], config: dict,
                     tokenizer: dict[str, bytes]):
    """Make the checkpoint directory `out`, whole or not at all.

    It gets the planned weights, config.json, the tokenizer's files {name: content}, and the files
    of COPIED that `source` has.
    """
    with replacing(out) as tmp:
        tmp.mkdir()
        try:
            write_weights(planned, tmp)
        except SafetensorError as e:
            raise UserError(
                f"the weights of {source} cannot be read ({e}); fetch them again") from None
        for name, data in tokenizer.items():
            (tmp / name).write_bytes(data)
        for name in COPIED:
            if (source / name).exists():
                shutil.copyfile(source / name, tmp / name)
        (tmp / "config.json").write_text(json.dumps(config, indent=2) + "\n")
