"""Convert a Hugging Face checkpoint directory to ours: joined projections, plain names, and a tokenizer.model.

    python convert_hf_checkpoint.py --checkpoint_dir HF_DIR --out DIR

Weights stream from file to file one output tensor at a time, so memory does not grow with the model. The directory is
written under a temporary name and renamed when it is whole. A byte-level BPE tokenizer.json becomes a tiktoken file with
the same ids; every added token in it counts as special. RoPE keeps Hugging Face's layout.
"""
import argparse
import base64
import ctypes
import json
import shutil
import struct
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from cli import UserError, check_writable, replacing, run
from model import DTYPES, ModelConfig, Transformer, open_weights, read_json, weight_files

SHARD_BYTES = 5 * 1024**3
COPIED = ("generation_config.json", "tokenizer_config.json", "chat_template.jinja")
GPT2_PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
TOP = {"embed.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight", "output.weight": "lm_head.weight"}
LAYER = {  # ours: theirs, joined along the rows
    "attn_norm": ["input_layernorm"], "ffn_norm": ["post_attention_layernorm"], "attn.wo": ["self_attn.o_proj"], "ffn.w2": ["mlp.down_proj"],
    "attn.wqkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], "ffn.w13": ["mlp.gate_proj", "mlp.up_proj"],
}


def sources(name: str) -> list[str]:
    """Hugging Face's tensors that make up our tensor `name`, in order."""
    if name in TOP:
        return [TOP[name]]
    _, layer, rest = name.split(".", 2)
    module, kind = rest.rsplit(".", 1)
    return [f"model.layers.{layer}.{theirs}.{kind}" for theirs in LAYER[module]]


def plan(checkpoint_dir, config: ModelConfig, files: dict) -> dict[str, tuple[torch.Size, list[str]]]:
    """Our tensors: shape and sources. Checked against what the files hold before anything is written."""
    with torch.device("meta"):
        wanted = {name: (p.shape, sources(name)) for name, p in Transformer(config).named_parameters()}
    used = {theirs for _, parts in wanted.values() for theirs in parts}
    if missing := sorted(used - files.keys()):
        raise UserError(f"{checkpoint_dir}: weight {missing[0]} is missing; fetch the checkpoint again")
    extra = sorted(n for n in files.keys() - used if not n.endswith("rotary_emb.inv_freq") and not (config.tied and n == "lm_head.weight"))
    if extra:
        raise UserError(f"{checkpoint_dir}: weight {extra[0]} has no place in this architecture")
    for name, (shape, parts) in wanted.items():
        shapes = [files[part].get_slice(part).get_shape() for part in parts]
        if (sum(s[0] for s in shapes), *shapes[0][1:]) != tuple(shape):
            raise UserError(f"{checkpoint_dir}: {' + '.join(parts)} have shapes {shapes}; config.json asks for {list(shape)} rows together")
    return wanted


def write_safetensors(path, tensors: dict[str, torch.Size], dtype: torch.dtype, get):
    """Write a safetensors file tensor by tensor: header length, JSON header, then the bytes of each `get(name)` as it is made."""
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in tensors.items():
        end = at + shape.numel() * dtype.itemsize
        header[name] = {"dtype": {torch.bfloat16: "BF16", torch.float32: "F32"}[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for name in tensors:
            data = get(name)
            f.write((ctypes.c_ubyte * (data.numel() * dtype.itemsize)).from_address(data.data_ptr()))  # the tensor's memory itself


def convert_weights(checkpoint_dir, out: Path, config: ModelConfig, dtype: torch.dtype, shard_bytes=SHARD_BYTES):
    """Stream the weights of `checkpoint_dir` into `out`, in shards of about `shard_bytes`."""
    with ExitStack() as stack:
        files = {}
        for path in weight_files(checkpoint_dir):
            f = stack.enter_context(open_weights(path))
            files |= {name: f for name in f.keys()}
        wanted = plan(checkpoint_dir, config, files)
        shards, size = [{}], 0
        for name, (shape, _) in wanted.items():
            if shards[-1] and size + shape.numel() * dtype.itemsize > shard_bytes:
                shards, size = shards + [{}], 0
            shards[-1][name] = shape
            size += shape.numel() * dtype.itemsize
        progress = stack.enter_context(tqdm(total=len(wanted), unit="tensor", desc="converting"))

        def get(name) -> Tensor:
            progress.update()
            parts = [files[part].get_tensor(part).to(dtype) for part in wanted[name][1]]
            return (torch.cat(parts) if len(parts) > 1 else parts[0]).contiguous().flatten()

        names = ["model.safetensors"] if len(shards) == 1 else [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
        for file, tensors in zip(names, shards):
            write_safetensors(out / file, tensors, dtype, get)
        if len(shards) > 1:
            total = sum(shape.numel() for shape, _ in wanted.values()) * dtype.itemsize
            index = {"metadata": {"total_size": total}, "weight_map": {name: file for file, tensors in zip(names, shards) for name in tensors}}
            (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


# ---------------------------------------------------------------- tokenizer

def byte_alphabet() -> dict[str, int]:
    """The printable characters that byte-level BPE writes for the 256 bytes: printable Latin-1 as itself, the rest from U+0100 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(rest)}


def split_pattern(spec: dict | None, where) -> str:
    """The regular expression by which a tokenizer.json cuts text before merging; others than byte-level BPE's are refused."""
    steps = spec["pretokenizers"] if spec and spec["type"] == "Sequence" else [spec] if spec else []
    kinds = [s["type"] for s in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True) and not steps[0]["add_prefix_space"]:
        return GPT2_PATTERN
    if kinds == ["Split", "ByteLevel"] and steps[0]["behavior"] == "Isolated" and not steps[0].get("invert") and "Regex" in steps[0]["pattern"] \
            and not steps[1].get("use_regex", True) and not steps[1]["add_prefix_space"]:
        return steps[0]["pattern"]["Regex"]
    raise UserError(f"{where}: pre-tokenizer {' + '.join(kinds) or 'none'} is not byte-level BPE as it can be converted; fetch tokenizer.model instead")


def convert_tokenizer_json(path: Path, settings: dict, out: Path):
    """tokenizer.json to tokenizer.model (tiktoken ranks, which are the ids) and tokenizer_special.json.

    tiktoken merges the pair whose result has the lowest id, Hugging Face the one first in its list of merges, so the two
    agree only if ids rise along that list; this is checked.
    """
    spec = read_json(path)
    model, normalizer = spec["model"], spec.get("normalizer")
    if model.get("type") != "BPE" or model.get("byte_fallback") or model.get("dropout"):
        raise UserError(f"{path} is not byte-level BPE; fetch the tokenizer.model that belongs to it")
    pattern = split_pattern(spec.get("pre_tokenizer"), path)
    if normalizer and normalizer["type"] not in ("NFC", "NFKC", "NFD", "NFKD"):
        raise UserError(f"{path}: normalizer {normalizer['type']} is not implemented; fetch tokenizer.model instead")
    special = {t["content"]: t["id"] for t in spec.get("added_tokens", [])}
    alphabet = byte_alphabet()
    vocabulary = {token: i for token, i in model["vocab"].items() if token not in special}
    if strange := next((t for t in vocabulary if not set(t) <= alphabet.keys()), None):
        raise UserError(f"{path}: token {strange!r} is not made of bytes; fetch tokenizer.model instead")
    merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    ids = [vocabulary.get("".join(m), -1) for m in merges]
    if any(a >= b for a, b in zip(ids, ids[1:])) or ids and ids[0] < 0:
        raise UserError(f"{path}: the ids do not follow the order of the merges, so tiktoken would cut text otherwise; fetch tokenizer.model instead")
    if len(vocabulary) != 256 + len(merges):
        raise UserError(f"{path}: {len(vocabulary)} tokens from 256 bytes and {len(merges)} merges; fetch tokenizer.model instead")
    with open(out / "tokenizer.model", "wb") as f:
        for token, i in sorted(vocabulary.items(), key=lambda item: item[1]):
            f.write(base64.b64encode(bytes(alphabet[c] for c in token)) + f" {i}\n".encode())
    bos = settings.get("bos_token")
    bos = bos["content"] if isinstance(bos, dict) else bos
    adds_bos = settings.get("add_bos_token", begins_with_bos(spec.get("post_processor"), bos))
    about = {"pattern": pattern, "special_tokens": special, "bos": special.get(bos) if adds_bos else None,
             "normalizer": normalizer["type"] if normalizer else None}
    (out / "tokenizer_special.json").write_text(json.dumps(about, ensure_ascii=False, indent=1))


def begins_with_bos(post: dict | None, bos) -> bool:
    """Whether a tokenizer.json's post-processor puts the begin token in front of a text."""
    if not post:
        return False
    if post["type"] == "Sequence":
        return any(begins_with_bos(p, bos) for p in post["processors"])
    return post["type"] == "TemplateProcessing" and post["single"][0].get("SpecialToken", {}).get("id") == bos


def convert_tokenizer(source: Path, out: Path):
    for path in (source / "tokenizer.model", source / "original" / "tokenizer.model"):
        if path.is_file():
            shutil.copy(path, out / "tokenizer.model")
            return
    if not (source / "tokenizer.json").is_file():
        raise UserError(f"{source} has neither tokenizer.model nor tokenizer.json; fetch one of them")
    settings = source / "tokenizer_config.json"
    convert_tokenizer_json(source / "tokenizer.json", read_json(settings) if settings.exists() else {}, out)


# ---------------------------------------------------------------- command line

def main():
    p = argparse.ArgumentParser(description="Convert a Hugging Face checkpoint (safetensors) of the Llama, Mistral or Qwen2 family.")
    p.add_argument("--checkpoint_dir", type=Path, required=True, help="Hugging Face directory: config.json, safetensors, tokenizer")
    p.add_argument("--out", type=Path, required=True, help="directory to make")
    p.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the weights written (default bfloat16)")
    args = p.parse_args()
    source, out = args.checkpoint_dir, args.out
    if not source.is_dir():
        raise UserError(f"--checkpoint_dir {source} is not a directory")
    if out.exists():
        raise UserError(f"--out {out} exists; remove it or choose another name")
    check_writable(out)
    hf = read_json(source / "config.json")
    config = ModelConfig.from_dict(hf, source / "config.json")
    hf.pop("dtype", None)
    with replacing(out) as tmp:
        tmp.mkdir()
        convert_tokenizer(source, tmp)
        convert_weights(source, tmp, config, DTYPES[args.dtype])
        (tmp / "config.json").write_text(json.dumps(hf | {"torch_dtype": args.dtype}, indent=2) + "\n")
        for name in COPIED:
            if (source / name).exists():
                shutil.copy(source / name, tmp)
    print(f"{source} -> {out}")


if __name__ == "__main__":
    run(main)
