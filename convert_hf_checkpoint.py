"""Convert a Hugging Face checkpoint directory to ours: joined projections, plain names, and a
tokenizer.model.

    python convert_hf_checkpoint.py --checkpoint_dir HF_DIR --out DIR

Weights stream from file to file some rows at a time, so memory does not grow with the model. The
directory is written under a temporary name and renamed when it is whole. A byte-level BPE
tokenizer.json becomes a tiktoken file with the same ids; every added token in it counts as special.
RoPE keeps Hugging Face's layout.
"""
import argparse
import base64
import json
from pathlib import Path

import tiktoken
import torch

from checkpoint import (
    Planned,
    config_from,
    open_tensors,
    read_rows,
    shapes,
    source_shapes,
    write_checkpoint,
)
from common import UserError, check_writable, read_json, refuse, run
from model import DTYPES, ModelConfig

GPT2_PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


def plan(checkpoint_dir, config: ModelConfig, dtype: torch.dtype) -> dict[str, Planned]:
    """Our tensors, checked to the last one before anything is written."""
    parts = source_shapes(config)
    expected = {name: shape for part in parts.values() for name, shape in part.items()}

    def ignored(name):  # a table that is computed, and a tied head's copy of the embedding
        return name.endswith("rotary_emb.inv_freq") or config.tied and name == "lm_head.weight"

    tensors = open_tensors(checkpoint_dir, expected, ignored)
    return {name: Planned(shape, dtype, read_rows([tensors[part] for part in parts[name]], dtype))
            for name, shape in shapes(config).items()}


# ---------------------------------------------------------------- tokenizer

def byte_alphabet() -> dict[str, int]:
    """The printable character that byte-level BPE writes for each byte, {character: byte}.

    Printable Latin-1 stands for itself, the other bytes are characters from U+0100 on.
    """
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(rest)}


def split_pattern(spec: dict | None) -> str:
    """The regular expression by which a tokenizer.json splits text before merging.

    Raises UserError for pre-tokenizers other than byte-level BPE's.
    """
    steps = spec["pretokenizers"] if spec and spec["type"] == "Sequence" else [spec] if spec else []
    kinds = [s["type"] for s in steps]
    plain = kinds[-1:] == ["ByteLevel"] and not steps[-1].get("add_prefix_space", True)
    if plain and kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return GPT2_PATTERN
    splits = plain and kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True)
    if not (splits and "Regex" in steps[0]["pattern"] and steps[0]["behavior"] == "Isolated"
            and not steps[0].get("invert")):
        raise UserError(f"pre-tokenizer {' + '.join(kinds) or 'none'} is not byte-level BPE's, or "
                        "has settings that cannot be converted")
    pattern = steps[0]["pattern"]["Regex"]
    try:
        bytes_only = tiktoken.Encoding("check", pat_str=pattern, special_tokens={},
                                       mergeable_ranks={bytes([b]): b for b in range(256)})
    except ValueError as e:
        raise UserError(f"the pattern {pattern!r} is not one that tiktoken knows ({e})") from None
    # tiktoken drops what its pattern does not match, Hugging Face keeps it. The sample is all of
    # Unicode but surrogates.
    sample = " ".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)]))
    if bytes_only.decode(bytes_only.encode_ordinary(sample)) != sample:
        raise UserError(f"the pattern {pattern!r} does not match every character, which tiktoken "
                        "would drop")
    return pattern


def check_merges(vocabulary: dict[str, int], merges: list, ignore_merges: bool):
    """Refuse a BPE that tiktoken would apply differently from Hugging Face.

    Hugging Face joins the pair that comes first in its list. tiktoken joins any two tokens whose
    result is a token, lowest id first, and takes a whole word that is a token as it is. They agree
    if the ids rise along the list and each token, split by ids below its own, is exactly one listed
    pair: no other pair of that result can then ever come up, in any text. A token that is not
    (Llama 3 has 678) needs ignore_merges, which takes whole words too, and all of its pairs in the
    list.
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
        pairs = {token[:i] for i in range(1, len(token))
                 if token[:i] in vocabulary and token[i:] in vocabulary}
        one_listed_pair = len(parts) == 2 and parts[0] in lefts
        if len(parts) > 1 and not one_listed_pair and not (ignore_merges and pairs == lefts):
            raise UserError(f"tiktoken would reach token {token!r} by other merges than the file's")


def bos_token(post: dict | None, settings: dict) -> str | None:
    """The BOS token put before a text: as add_bos_token in tokenizer_config.json says, else as the
    post-processor does.
    """
    if settings.get("add_bos_token") is not None:
        bos = settings.get("bos_token") if settings["add_bos_token"] else None
        return bos["content"] if isinstance(bos, dict) else bos
    if post and post["type"] == "Sequence":
        return next(filter(None, (bos_token(p, {}) for p in post["processors"])), None)
    if post and post["type"] == "TemplateProcessing":
        return post["single"][0].get("SpecialToken", {}).get("id")
    return None


def convert_tokenizer_json(path: Path, settings: dict) -> dict[str, bytes]:
    """tokenizer.json as tokenizer.model and tokenizer_special.json, {name: content}.

    tokenizer.model is tiktoken's: a line for each token, its base64 and its id. Raises UserError
    naming whatever would not keep every id.
    """
    try:
        spec = read_json(path)
        model, normalizer = spec["model"], (spec.get("normalizer") or {}).get("type")
        refuse((model.get("type") != "BPE" or model.get("byte_fallback")
                or "\u2581" in model["vocab"], "it is not byte-level BPE"),
               *((model.get(key), f"{key} = {model.get(key)!r} is not implemented")
                 for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")),
               (normalizer not in (None, "NFC"), f"normalizer {normalizer} is not implemented"))
        pattern = split_pattern(spec.get("pre_tokenizer"))
        special = {t["content"]: t["id"] for t in spec.get("added_tokens") or []}
        alphabet = byte_alphabet()
        vocabulary = {token: i for token, i in model["vocab"].items() if token not in special}
        if strange := next((t for t in vocabulary if not t or not set(t) <= alphabet.keys()), None):
            raise UserError(f"token {strange!r} is not made of bytes")
        if lacking := [b for c, b in alphabet.items() if c not in vocabulary]:
            raise UserError(f"there is no token for the byte {lacking[0]:#04x}")
        if len({*vocabulary.values(), *special.values()}) < len(vocabulary) + len(special):
            raise UserError("two tokens have one id")
        check_merges(vocabulary, [m.split(" ") if isinstance(m, str) else m
                                  for m in model["merges"]], model.get("ignore_merges", False))
        bos = bos_token(spec.get("post_processor"), settings)
        if bos is not None and bos not in special:
            raise UserError(f"the BOS token {bos!r} is not among the added tokens")
    except UserError as e:
        raise UserError(f"{path} cannot be converted: {e}; put the tokenizer.model that belongs "
                        "to it beside it") from None
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as e:
        raise UserError(f"{path} is not a tokenizer.json as the tokenizers library writes it "
                        f"({type(e).__name__}: {e}); fetch it again") from None
    about = {"pattern": pattern, "special_tokens": special, "bos": special.get(bos),
             "normalizer": normalizer}
    ranks = sorted(vocabulary.items(), key=lambda item: item[1])
    lines = (base64.b64encode(bytes(alphabet[c] for c in token)) + f" {i}\n".encode()
             for token, i in ranks)
    return {"tokenizer.model": b"".join(lines),
            "tokenizer_special.json": json.dumps(about, ensure_ascii=False, indent=1).encode()}


def convert_tokenizer(source: Path) -> dict[str, bytes]:
    """The tokenizer files to write, {name: content}; a tokenizer.model is kept as it is."""
    for path in (source / "tokenizer.model", source / "original" / "tokenizer.model"):
        if path.is_file():
            return {"tokenizer.model": path.read_bytes()}
    path, settings = source / "tokenizer.json", source / "tokenizer_config.json"
    if not path.is_file():
        raise UserError(f"{source} has neither tokenizer.model nor tokenizer.json; fetch one of "
                        "them")
    return convert_tokenizer_json(path, read_json(settings) if settings.exists() else {})


# ---------------------------------------------------------------- command line

def main():
    p = argparse.ArgumentParser(description="Convert a Hugging Face checkpoint (safetensors) of "
                                "the Llama, Mistral or Qwen2 family.")
    p.add_argument("--checkpoint_dir", type=Path, required=True,
                   help="Hugging Face directory: config.json, safetensors, tokenizer")
    p.add_argument("--out", type=Path, required=True, help="directory to make")
    p.add_argument("--dtype", choices=DTYPES, default="bfloat16",
                   help="of the weights written (default bfloat16, whatever the source has)")
    args = p.parse_args()
    source, out = args.checkpoint_dir, args.out
    refuse((not source.is_dir(), f"--checkpoint_dir {source} is not a directory"),
           (source.is_dir() and not any(source.iterdir()),
            f"--checkpoint_dir {source} is empty; fetch the checkpoint into it"),
           (out.exists(), f"--out {out} exists; remove it or choose another"))
    check_writable(out)
    hf = read_json(source / "config.json")
    config = config_from(hf, source / "config.json")
    planned, tokenizer = plan(source, config, DTYPES[args.dtype]), convert_tokenizer(source)
    # transformers 5 writes the key "dtype" instead.
    hf |= {key: args.dtype for key in {"torch_dtype"} | (hf.keys() & {"dtype"})}
    write_checkpoint(source, out, planned, hf, tokenizer)
    print(f"{source} -> {out}: {sum(t.shape.numel() for t in planned.values()):,} parameters in "
          f"{args.dtype}")


if __name__ == "__main__":
    run(main)
