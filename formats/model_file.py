"""tokenizer.model as the tokenizers library reads it: SentencePiece's, or tiktoken's ranks.

Both keep scores of whole tokens where the library wants the merges that lead to them; these follow,
in the same order. A SentencePiece model's ids are SentencePiece's own for any text; a tiktoken
file says nothing but its ranks, so text is split before merging as Llama 3's is.
"""
import base64
import re

import tokenizers
from google.protobuf.message import DecodeError
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

# Llama 3's words: contractions, letters with one leading sign, up to three digits, signs, line
# ends, spaces.
LLAMA3_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
LLAMA3_SPECIAL = [
    "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>", "<|finetune_right_pad_id|>", "<|reserved_special_token_2|>",
    "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(3, 248))]
SPACE = "\u2581"  # how SentencePiece writes a space


def read(data: bytes, settings: dict,
         model_type: str | None = None) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """The tokenizer in a tokenizer.model, and its tokens' names, {"bos_token": "<s>", ...}.

    settings: tokenizer_config.json. With it SentencePiece's spaces are as transformers puts them
    for this model_type, without as SentencePiece does. Raises an exception for anything else.
    """
    if is_ranks(data):
        return read_ranks(data, settings)
    try:
        return read_sentencepiece(data, settings, model_type)
    except DecodeError:
        raise ValueError("it is neither a SentencePiece model nor tiktoken ranks") from None


def merges(vocab: dict[str, int], rank) -> list[tuple[str, str]]:
    """Every pair of tokens that makes a third, by the rank of what it makes."""
    return [(token[:i], token[i:]) for token in sorted(vocab, key=rank)
            for i in range(1, len(token)) if token[:i] in vocab and token[i:] in vocab]


# ---------------------------------------------------------------- tiktoken

def is_ranks(data: bytes) -> bool:
    """Whether a file's first line is tiktoken's: base64, a space, a number."""
    first = data.split(b"\n", 1)[0].split()
    try:
        return (len(first) == 2 and first[1].isdigit()
                and base64.b64decode(first[0], validate=True) is not None)
    except ValueError:
        return False


def read_ranks(data: bytes, settings: dict):
    spelled = {byte: c for c, byte in byte_alphabet().items()}
    lines = (line.split() for line in data.splitlines() if line)
    vocab = {"".join(map(spelled.get, base64.b64decode(token))): int(rank) for token, rank in lines}
    library = tokenizers.Tokenizer(models.BPE(vocab, merges(vocab, vocab.get), ignore_merges=True))
    library.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    library.decoder = decoders.ByteLevel()
    if not settings.get("added_tokens_decoder"):
        library.add_special_tokens([tokenizers.AddedToken(t, normalized=False)
                                    for t in LLAMA3_SPECIAL])
    return library, dict(zip(("bos_token", "eos_token"), LLAMA3_SPECIAL))


def byte_alphabet() -> dict[str, int]:
    """The printable character that byte-level BPE writes for each byte, {character: byte}.

    Printable Latin-1 stands for itself, the other bytes are characters from U+0100 on.
    """
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(rest)}


# ---------------------------------------------------------------- SentencePiece

def read_sentencepiece(data: bytes, settings: dict, model_type: str | None):
    proto = ModelProto.FromString(data)
    trained, rules, kinds = proto.trainer_spec, proto.normalizer_spec, ModelProto.SentencePiece.Type
    if not proto.pieces or trained.model_type not in (trained.UNIGRAM, trained.BPE):
        raise ValueError("it is no SentencePiece model of type BPE or unigram")
    # The model by itself, or for transformers 5's Mistral: a space before any text.
    own = not settings or model_type == "mistral" and settings.get("legacy") is not False
    of_kind = lambda *kind: {p.piece: i for i, p in enumerate(proto.pieces)
                             if p.type in map(kinds.Value, kind)}
    whole = own and sorted(of_kind("USER_DEFINED"), key=len, reverse=True)  # no merge makes them
    rank = {p.piece: -p.score for p in proto.pieces}
    unknown = next(iter(of_kind("UNKNOWN")))
    if trained.model_type == trained.UNIGRAM:
        model = models.Unigram([(p.piece, p.score) for p in proto.pieces], trained.unk_id,
                               trained.byte_fallback)
    else:
        model = models.BPE({p.piece: i for i, p in enumerate(proto.pieces)},
                           merges(of_kind("NORMAL"), rank.get), fuse_unk=True, unk_token=unknown,
                           byte_fallback=trained.byte_fallback, ignore_merges=bool(whole))
    library = tokenizers.Tokenizer(model)
    prefix = rules.add_dummy_prefix and settings.get("add_prefix_space") is not False
    steps = []
    if rules.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(pattern), by) for pattern, by in (
            (r"\A +| +\z", ""), (" {2,}", " "))]
    if prefix and own:
        steps.append(normalizers.Prepend(SPACE))
    library.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    if whole:
        pattern = Regex("|".join(map(re.escape, whole)))
        library.pre_tokenizer = pre_tokenizers.Split(pattern, "isolated")
    elif prefix and not own:  # none before another; with "legacy" after special tokens too
        scheme = "always" if settings.get("legacy") else "first"
        library.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, scheme, split=False)
    library.decoder = decoders.Sequence([
        decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(),
        *[decoders.Strip(" ", 1, 0)] * prefix])
    library.add_special_tokens([tokenizers.AddedToken(token, normalized=False)
                                for token in of_kind("CONTROL", "UNKNOWN")])
    if not own:  # normalized: they may hold a space
        library.add_tokens([tokenizers.AddedToken(token) for token in of_kind("USER_DEFINED")])
    named = {f"{name}_token": getattr(trained, f"{name}_id") for name in ("bos", "eos", "unk")}
    return library, {k: proto.pieces[i].piece for k, i in named.items() if i >= 0}
