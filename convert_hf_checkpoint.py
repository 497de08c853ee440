"""Convert a Hugging Face checkpoint directory to ours: joined projections, plain names, and a
tokenizer.model.

    python convert_hf_checkpoint.py --checkpoint_dir HF_DIR --out DIR

Weights stream from file to file one tensor at a time, so memory does not grow with the model. The
directory is written under a temporary name and renamed when it is whole. A byte-level BPE
tokenizer.json becomes a tiktoken file with the same ids; every added token in it counts as special.
RoPE keeps Hugging Face's layout.
"""
import argparse
import base64
import ctypes
import json
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import tiktoken
import torch
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from cli import UserError, check_writable, replacing, run
from model import DTYPES, ModelConfig, Transformer, open_weights, read_json, weight_files

SHARD_BYTES = 5 * 1024**3
FORMATS = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.int8: "I8",
           torch.uint8: "U8", torch.float8_e4m3fn: "F8_E4M3"}
COPIED = ("generation_config.json", "tokenizer_config.json", "chat_template.jinja")
GPT2_PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
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


def plan(checkpoint_dir, config: ModelConfig,
         dtype: torch.dtype) -> dict[str, tuple[torch.Size, torch.dtype, Iterator[Tensor]]]:
    """Our tensors: name -> (shape, dtype, its parts, read when asked for), checked to the last one
    before anything is written.
    """
    files = {name: f for path in weight_files(checkpoint_dir) for f in [open_weights(path)]
             for name in f.keys()}
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Transformer(config).named_parameters()}
    rows = {"q": config.n_head * config.head_dim, "k": config.n_kv_head * config.head_dim,
            "v": config.n_kv_head * config.head_dim,
            "gate": config.ffn_dim, "up": config.ffn_dim}  # of each part of a joined tensor
    wanted, used = {}, set()
    for ours, shape in shapes.items():
        names = sources(ours)
        for name in names:
            if name not in files:
                raise UserError(f"{checkpoint_dir}: weight {name} is missing; fetch the "
                                "checkpoint again")
            info = files[name].get_slice(name)
            part = [*shape] if len(names) == 1 else [
                rows[name.split(".")[-2].removesuffix("_proj")], *shape[1:]]
            if info.get_shape() != part:
                raise UserError(f"{checkpoint_dir}: weight {name} has shape {info.get_shape()}, "
                                f"config.json says {part}")
            # an integer or 8-bit weight means nothing without its scales
            if info.get_dtype() not in ("BF16", "F16", "F32"):
                raise UserError(f"{checkpoint_dir}: weight {name} is {info.get_dtype()}; get the "
                                "checkpoint that is not quantized")
        wanted[ours] = shape, dtype, read_parts([(files[name], name) for name in names], dtype)
        used.update(names)
    if config.tied:
        used.add("lm_head.weight")  # a copy of the embedding, if there at all
    if extra := sorted(name for name in files.keys() - used
                       if not name.endswith("rotary_emb.inv_freq")):
        raise UserError(f"{checkpoint_dir}: weight {extra[0]} has no place in this architecture")
    return wanted


def read_parts(parts: list, dtype: torch.dtype) -> Iterator[Tensor]:
    """Each (open file, its tensor's name) as a tensor of `dtype`."""
    for file, name in parts:
        yield file.get_tensor(name).to(dtype)


def write_safetensors(path, tensors: dict, progress):
    """Write planned tensors one by one: header length, JSON header, then the bytes of each part as
    it is read.

    Parts are joined along the rows, so their bytes just follow each other and a joined tensor is
    never in memory.
    """
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, (shape, dtype, _) in tensors.items():
        end = at + shape.numel() * dtype.itemsize
        header[name] = {"dtype": FORMATS[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for _, _, parts in tensors.values():
            for data in parts:
                data = data.contiguous()
                # the tensor's own memory, no copy
                f.write((ctypes.c_ubyte * data.nbytes).from_address(data.data_ptr()))
                del data  # or it would live on while the next is made
            progress.update()


def write_weights(wanted: dict, out: Path, shard_bytes=SHARD_BYTES):
    """Write the planned tensors into `out`: one file, or numbered shards of at most `shard_bytes`
    (or one tensor) and their index.
    """
    shards, size, total = [{}], 0, 0
    for name, (shape, dtype, parts) in wanted.items():
        n = shape.numel() * dtype.itemsize
        if shards[-1] and size + n > shard_bytes:
            shards, size = shards + [{}], 0
        shards[-1][name] = shape, dtype, parts
        size, total = size + n, total + n
    files = ["model.safetensors"] if len(shards) == 1 else [
        f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    # None: no bar in a log file
    with tqdm(total=len(wanted), unit="tensor", desc="writing", disable=None) as progress:
        for file, tensors in zip(files, shards):
            write_safetensors(out / file, tensors, progress)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total},
                 "weight_map": {name: file for file, tensors in zip(files, shards)
                                for name in tensors}}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


# ---------------------------------------------------------------- tokenizer

def byte_alphabet() -> dict[str, int]:
    """The printable characters that byte-level BPE writes for the 256 bytes: printable Latin-1 as
    itself, the rest from U+0100 on.
    """
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(rest)}


def split_pattern(spec: dict | None) -> str:
    """The regular expression by which a tokenizer.json cuts text before merging; others than
    byte-level BPE's are refused.
    """
    steps = spec["pretokenizers"] if spec and spec["type"] == "Sequence" else [spec] if spec else []
    kinds = [s["type"] for s in steps]
    plain = kinds[-1:] == ["ByteLevel"] and not steps[-1].get("add_prefix_space", True)
    if plain and kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return GPT2_PATTERN
    if not plain or kinds != ["Split",
                              "ByteLevel"] or steps[1].get("use_regex",
                                                           True) or "Regex" not in steps[0][
                                                               "pattern"] \
            or steps[0]["behavior"] != "Isolated" or steps[0].get("invert"):
        raise UserError(f"pre-tokenizer {' + '.join(kinds) or 'none'} is not byte-level BPE's, or "
                        "has settings that cannot be converted")
    pattern = steps[0]["pattern"]["Regex"]
    try:
        cut = tiktoken.Encoding("check", pat_str=pattern,
                                mergeable_ranks={bytes([b]): b for b in range(256)},
                                special_tokens={})
    except ValueError as e:
        raise UserError(f"the pattern {pattern!r} is not one that tiktoken knows ({e})") from None
    # tiktoken drops what its pattern does not match, Hugging Face keeps it. The sample: all of
    # Unicode but surrogates.
    sample = " ".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)]))
    if cut.decode(cut.encode_ordinary(sample)) != sample:
        raise UserError(f"the pattern {pattern!r} does not match every character, which tiktoken "
                        "would drop")
    return pattern


def check_merges(vocabulary: dict[str, int], merges: list, ignore_merges: bool):
    """Refuse a BPE that tiktoken would apply otherwise than Hugging Face.

    Hugging Face joins the pair first in its list. tiktoken joins any two tokens whose result is a
    token, lowest id first, and takes a whole word that is a token as it is. They agree if the ids
    rise along the list and each token, cut by ids below its own, is exactly one listed pair: no
    other pair of that result can then ever come up, in any text. A token that is not (Llama 3 has
    678) needs ignore_merges, which takes whole words too, and all of its pairs in the list.
    """
    listed, last = {}, -1
    for left, right in merges:
        token = left + right
        if not {left, right, token} <= vocabulary.keys():
            raise UserError(f"merge {left!r} + {right!r} is not of tokens in the vocabulary")
        if vocabulary[token] < last:
            raise UserError(f"the ids do not follow the order of the merges (at {token!r}), which "
                            "tiktoken needs")
        last = vocabulary[token]
        listed.setdefault(token, set()).add(left)
    for token, limit in vocabulary.items():
        parts = list(token)
        while len(parts) > 1:
            best, i = min((vocabulary.get(parts[i] + parts[i + 1], limit), i)
                          for i in range(len(parts) - 1))
            if best >= limit:
                break
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        lefts = listed.get(token, set())
        pairs = {token[:i] for i in range(1, len(token)) if token[:i] in vocabulary
                 and token[i:] in vocabulary}
        if len(parts) > 1 and not (len(parts) == 2 and parts[0] in lefts) and not (
                ignore_merges and pairs == lefts):
            raise UserError(f"tiktoken would reach token {token!r} by other merges than the file's")


def begin_token(post: dict | None, settings: dict) -> str | None:
    """The token put in front of a text: tokenizer_config.json's if add_bos_token says so or not,
    else the post-processor's.
    """
    if settings.get("add_bos_token") is not None:
        bos = settings.get("bos_token") if settings["add_bos_token"] else None
        return bos["content"] if isinstance(bos, dict) else bos
    if post and post["type"] == "Sequence":
        return next(filter(None, (begin_token(p, {}) for p in post["processors"])), None)
    if post and post["type"] == "TemplateProcessing":
        return post["single"][0].get("SpecialToken", {}).get("id")
    return None


def convert_tokenizer_json(path: Path, settings: dict) -> dict[str, bytes]:
    """tokenizer.json to the contents of tokenizer.model (tiktoken: a token's base64 and its id) and
    tokenizer_special.json.

    Only what keeps every id is converted; UserError names the rest.
    """
    try:
        spec = read_json(path)
        model, normalizer = spec["model"], (spec.get("normalizer") or {}).get("type")
        if model.get("type") != "BPE" or model.get("byte_fallback") or "\u2581" in model["vocab"]:
            raise UserError("it is not byte-level BPE")
        for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            if model.get(key):
                raise UserError(f"{key} = {model[key]!r} is not implemented")
        if normalizer not in (None, "NFC"):
            raise UserError(f"normalizer {normalizer} is not implemented")
        pattern = split_pattern(spec.get("pre_tokenizer"))
        special = {t["content"]: t["id"] for t in spec.get("added_tokens") or []}
        alphabet = byte_alphabet()
        vocabulary = {token: i for token, i in model["vocab"].items() if token not in special}
        if strange := next((t for t in vocabulary if not t or not set(t) <= alphabet.keys()), None):
            raise UserError(f"token {strange!r} is not made of bytes")
        if lacking := next((b for c, b in alphabet.items() if c not in vocabulary), None):
            raise UserError(f"there is no token for the byte {lacking:#04x}")
        if len({*vocabulary.values(), *special.values()}) < len(vocabulary) + len(special):
            raise UserError("two tokens have one id")
        check_merges(vocabulary, [m.split(" ") if isinstance(m, str) else m
                                  for m in model["merges"]], model.get("ignore_merges", False))
        begin = begin_token(spec.get("post_processor"), settings)
        if begin is not None and begin not in special:
            raise UserError(f"the begin token {begin!r} is not among the added tokens")
    except UserError as e:
        raise UserError(f"{path} cannot be converted: {e}; put the tokenizer.model that belongs "
                        "to it beside it") from None
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as e:
        raise UserError(f"{path} is not a tokenizer.json as the tokenizers library writes it "
                        f"({type(e).__name__}: {e}); fetch it again") from None
    ranks = sorted(vocabulary.items(), key=lambda item: item[1])
    about = {"pattern": pattern, "special_tokens": special, "bos": special.get(begin),
             "normalizer": normalizer}
    return {"tokenizer.model": b"".join(base64.b64encode(bytes(alphabet[c] for c in token))
                                        + f" {i}\n".encode() for token, i in ranks),
            "tokenizer_special.json": json.dumps(about, ensure_ascii=False, indent=1).encode()}


def convert_tokenizer(source: Path) -> dict[str, bytes]:
    """The tokenizer files to write, {name: content}; a tokenizer.model of either kind is kept as it
    is.
    """
    for path in (source / "tokenizer.model", source / "original" / "tokenizer.model"):
        if path.is_file():
            return {"tokenizer.model": path.read_bytes()}
    if not (source / "tokenizer.json").is_file():
        raise UserError(f"{source} has neither tokenizer.model nor tokenizer.json; fetch one of "
                        "them")
    settings = source / "tokenizer_config.json"
    return convert_tokenizer_json(source / "tokenizer.json", read_json(settings)
                                  if settings.exists() else {})


def write_checkpoint(source: Path, out: Path, wanted: dict, config: dict,
                     tokenizer: dict[str, bytes]):
    """Make the directory `out`: weights as `write_weights` takes them, config.json, tokenizer
    files, and what `source` has of COPIED.
    """
    with replacing(out) as tmp:
        tmp.mkdir()
        try:
            write_weights(wanted, tmp)
        except SafetensorError as e:
            raise UserError(
                f"the weights of {source} cannot be read ({e}); fetch them again") from None
        for name, data in tokenizer.items():
            (tmp / name).write_bytes(data)
        for name in COPIED:
            if (source / name).exists():
                shutil.copyfile(source / name, tmp / name)
        (tmp / "config.json").write_text(json.dumps(config, indent=2) + "\n")


# ---------------------------------------------------------------- command line

def main():
    p = argparse.ArgumentParser(description="Convert a Hugging Face checkpoint (safetensors) of "
                                "the Llama, Mistral or Qwen2 family.")
    p.add_argument("--checkpoint_dir", type=Path, required=True, help="Hugging Face directory: "
                   "config.json, safetensors, tokenizer")
    p.add_argument("--out", type=Path, required=True, help="directory to make")
    p.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the weights written "
                   "(default bfloat16, whatever the source has)")
    args = p.parse_args()
    source, out = args.checkpoint_dir, args.out
    if not source.is_dir():
        raise UserError(f"--checkpoint_dir {source} is not a directory")
    if not any(source.iterdir()):
        raise UserError(f"--checkpoint_dir {source} is empty; fetch the checkpoint into it")
    if out.exists():
        raise UserError(f"--out {out} exists; remove it or choose another")
    check_writable(out)
    hf = read_json(source / "config.json")
    config = ModelConfig.from_dict(hf, source / "config.json")
    wanted, tokenizer = plan(source, config, DTYPES[args.dtype]), convert_tokenizer(source)
    # transformers 5 writes the second
    hf |= {key: args.dtype for key in {"torch_dtype"} | (hf.keys() & {"dtype"})}
    write_checkpoint(source, out, wanted, hf, tokenizer)
    print(f"{source} -> {out}: {sum(shape.numel() for shape, _, _ in wanted.values()):,} "
          f"parameters in {args.dtype}")


if __name__ == "__main__":
    run(main)
