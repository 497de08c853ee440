"""Small tokenizers in the shapes of published ones, each written as a checkpoint directory has it.

`FAMILIES[name](directory)` writes tokenizer.json or tokenizer.model, tokenizer_config.json and a
config.json; the vocabularies are trained on texts of helpers.py.
"""
import base64
import functools
import json
import tempfile
from pathlib import Path

import sentencepiece
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from formats.model_file import LLAMA3_PATTERN, byte_alphabet
from helpers import strings

QWEN_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
CHATML = (
    "{%- if messages[0]['role'] != 'system' -%}"
    "{{- '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{%- endif -%}"
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
THINK = (  # as Qwen3's: the reasoning of earlier turns is left out
    "{%- for message in messages %}{%- set content = message.content %}"
    "{%- if message.role == 'assistant' and '</think>' in content %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}")
LLAMA3_CHAT = (
    "{{- bos_token }}{% for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    "+ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}")
INST = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}")
R1 = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '<\uff5cUser\uff5c>' + message['content'] }}"
    "{% else %}{% set content = message['content'] %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<\uff5cAssistant\uff5c>' + content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<\uff5cAssistant\uff5c><think>\n' }}{% endif %}")
BOS, EOS = "<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>"


def write_json(path, value):
    path.write_text(json.dumps(value, ensure_ascii=False))


def added(content, special=True, **flags):
    return AddedToken(content, special=special, normalized=not special, **flags)


def starts(tokenizer, token, before=()):
    """A post-processor that puts a token before a text."""
    template = processors.TemplateProcessing(
        single=f"{token} $A", special_tokens=[(token, tokenizer.token_to_id(token))])
    return processors.Sequence([*before, template]) if before else template


@functools.cache
def corpus():
    return strings(600, seed=7, rare=0.2)


# ---------------------------------------------------------------- tokenizer.json

def byte_level(split, tokens, normalizer=None, first=False, ignore_merges=False) -> Tokenizer:
    """Byte-level BPE; `split`: steps before ByteLevel; `first`: the tokens have ids from 0 on."""
    steps = [*split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not any(
        isinstance(s, pre_tokenizers.Split) for s in split))]
    t = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    t.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    t.decoder, t.normalizer = decoders.ByteLevel(), normalizer
    t.train_from_iterator(corpus(), trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=tokens if first else []))
    t.add_tokens([] if first else tokens)
    return t


def like_sentencepiece(legacy: bool, tokens=(), unigram=False) -> Tokenizer:
    """BPE with byte fallback as Llama 2's tokenizer.json has it: spaces are \u2581."""
    head = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    train = Tokenizer(models.BPE())
    train.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    train.train_from_iterator(corpus(), trainers.BpeTrainer(vocab_size=700, special_tokens=head,
                                                            show_progress=False))
    model = json.loads(train.to_str())["model"]
    merges = [tuple(m) for m in model["merges"]]
    # The spaces of an indent are one token; a letter that is not in the vocabulary is its bytes.
    vocab = {t: i for i, t in enumerate(t for t in model["vocab"] if t not in "é日語🎉")}
    merges = [m for m in merges if {*m, "".join(m)} <= vocab.keys()]
    space = "\u2581"
    for a, b in ((space, space), (2 * space, space), (2 * space, 2 * space)):
        vocab.setdefault(a + b, len(vocab))
        merges.append((a, b))
    t = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True,
                             unk_token="<unk>"))
    if unigram:
        t = Tokenizer(models.Unigram([(w, -float(len(w) < 2) - i / 100) for w, i in vocab.items()],
                                     unk_id=0, byte_fallback=True))
    if legacy:
        t.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"),
                                             normalizers.Replace(" ", "\u2581")])
    else:
        t.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    t.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(),
                                   decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    t.add_tokens([added("<unk>"), added("<s>"), added("</s>"), *tokens])
    t.post_processor = starts(t, "<s>")
    return t


def save(t: Tokenizer, directory: Path, model_type, template, **settings):
    """The files that transformers 4 wrote: added tokens in tokenizer_config.json too."""
    t.save(str(directory / "tokenizer.json"))
    table = {str(i): {"content": a.content, "lstrip": a.lstrip, "normalized": a.normalized,
                      "rstrip": a.rstrip, "single_word": a.single_word, "special": a.special}
             for i, a in sorted(t.get_added_tokens_decoder().items())}
    write_json(directory / "tokenizer_config.json", {
        "added_tokens_decoder": table, "chat_template": template,
        "clean_up_tokenization_spaces": False, "tokenizer_class": "PreTrainedTokenizerFast",
        **settings})
    write_json(directory / "config.json", {"model_type": model_type})


SENTENCEPIECE = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>", add_bos_token=True)


def llama2_legacy(d):
    save(like_sentencepiece(True), d, "llama", INST, legacy=True, **SENTENCEPIECE)


def llama2(d):
    save(like_sentencepiece(False), d, "llama", INST, legacy=False, **SENTENCEPIECE)


def mistral_v3(d):
    tokens = [added(t) for t in ("[INST]", "[/INST]", "[TOOL_CALLS]", "[control_8]")]
    save(like_sentencepiece(False, tokens), d, "mistral", INST, **SENTENCEPIECE)


def unigram(d):
    save(like_sentencepiece(False, unigram=True), d, "llama", INST, **SENTENCEPIECE)


def nemo(d):
    first = [added(t) for t in ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]")]
    t = byte_level([pre_tokenizers.Split(Regex(TEKKEN_PATTERN), "isolated")], first, first=True,
                   ignore_merges=True)
    t.post_processor = starts(t, "<s>")
    save(t, d, "mistral", INST, **SENTENCEPIECE)


def llama3(d):
    tokens = [added(t) for t in ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>",
                                 "<|end_header_id|>", "<|eot_id|>")]
    t = byte_level([pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated")], tokens,
                   ignore_merges=True)
    t.post_processor = starts(t, "<|begin_of_text|>",
                              [processors.ByteLevel(trim_offsets=False, use_regex=True)])
    save(t, d, "llama", LLAMA3_CHAT, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>",
         clean_up_tokenization_spaces=True)


def qwen(d, template=CHATML, more=()):
    tokens = [added(t) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]
    tokens += [added(t, special=False) for t in ("<tool_call>", "</tool_call>", *more)]
    t = byte_level([pre_tokenizers.Split(Regex(QWEN_PATTERN), "isolated")], tokens,
                   normalizers.NFC())
    t.post_processor = processors.ByteLevel(trim_offsets=False, use_regex=False)
    save(t, d, "qwen2", template, add_bos_token=False, bos_token=None, eos_token="<|im_end|>",
         pad_token="<|endoftext|>", additional_special_tokens=["<|im_start|>", "<|im_end|>"])


def qwen3(d):
    qwen(d, THINK, ("<tool_response>", "</tool_response>", "<think>", "</think>"))


def smollm2(d):
    first = [added(t) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>")]
    t = byte_level([pre_tokenizers.Digits(individual_digits=True)], first, first=True)
    save(t, d, "llama", CHATML, bos_token="<|im_start|>", eos_token="<|im_end|>",
         unk_token="<|endoftext|>")


def r1(d):
    tokens = [added(t, special=t in (BOS, EOS)) for t in (
        BOS, EOS, "<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>", "<think>", "</think>")]
    t = byte_level([pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated")], tokens)
    t.post_processor = starts(t, BOS, [processors.ByteLevel(trim_offsets=False)])
    save(t, d, "llama", R1, bos_token=BOS, eos_token=EOS, add_bos_token=True,
         tokenizer_class="LlamaTokenizerFast")


# ---------------------------------------------------------------- tokenizer.model

@functools.cache
def sentencepiece_model(symbols=(), **rules) -> bytes:
    rules = dict(model_type="bpe", vocab_size=500, byte_fallback=True,
                 normalization_rule_name="identity", remove_extra_whitespaces=False) | rules
    lines = [line for s in strings(600, seed=3) for line in s.split("\n") if line]
    with tempfile.TemporaryDirectory() as home:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_prefix=f"{home}/t",
            split_digits=True, character_coverage=0.98, allow_whitespace_only_pieces=True,
            user_defined_symbols=list(symbols), minloglevel=2, **rules)
        return Path(f"{home}/t.model").read_bytes()


def sentencepiece_llama2(d):
    (d / "tokenizer.model").write_bytes(sentencepiece_model())


CHAT_TOKENS = {"<|im_start|>": True, "<|im_end|>": True, "<tool_call>": False}


def yi(d, legacy=True, inside=False):
    """ChatML on SentencePiece: the chat's tokens beside the model, or as pieces inside it."""
    data = sentencepiece_model(tuple(CHAT_TOKENS) if inside else ())
    (d / "tokenizer.model").write_bytes(data)
    model = sentencepiece.SentencePieceProcessor(model_proto=data)
    table = {model.piece_to_id(t) if inside else len(model) + i: t
             for i, t in enumerate(CHAT_TOKENS)}
    flags = dict(lstrip=False, rstrip=False, single_word=False, normalized=False)
    write_json(d / "tokenizer_config.json", {
        "added_tokens_decoder": {
            **{str(i): dict(content=t, special=True, **flags)
               for i, t in enumerate(("<unk>", "<s>", "</s>"))},
            **{str(i): dict(content=t, special=CHAT_TOKENS[t], **flags) for i, t in table.items()}},
        **SENTENCEPIECE, "add_bos_token": False, "eos_token": "<|im_end|>",
        "chat_template": CHATML, "tokenizer_class": "LlamaTokenizer",
        **({} if legacy is None else {"legacy": legacy})})
    write_json(d / "config.json", {"model_type": "llama"})


def yi_json_files(d):
    """As before transformers 4.34: added_tokens.json and special_tokens_map.json."""
    yi(d)
    size = len(sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model()))
    settings = json.loads((d / "tokenizer_config.json").read_text())
    for key in ("added_tokens_decoder", "eos_token"):
        del settings[key]
    write_json(d / "tokenizer_config.json", settings)
    write_json(d / "added_tokens.json", {t: size + i for i, t in enumerate(CHAT_TOKENS)})
    write_json(d / "special_tokens_map.json", {
        "additional_special_tokens": ["<|im_start|>"], "eos_token": {"content": "<|im_end|>"}})


def tiktoken_llama3(d):
    ranks = [bytes([i]) for i in range(256)]
    ranks += [b"th", b"the", b" c", b"at", b" cat", b"\n\n", b"  ", b"12", b"123", b"\xe6\x97",
              b"\xe6\x97\xa5", b" a", b"qxz"]  # no merge leads to the last: it is a word
    (d / "tokenizer.model").write_bytes(
        b"".join(base64.b64encode(t) + f" {i}\n".encode() for i, t in enumerate(ranks)))


FAMILIES = {
    "llama2-legacy": llama2_legacy, "llama2": llama2, "mistral-v0.1": llama2_legacy,
    "mistral-v0.3": mistral_v3, "nemo": nemo, "llama3": llama3, "qwen2.5": qwen, "qwen3": qwen3,
    "smollm2": smollm2, "r1": r1, "unigram": unigram,
    "sp": sentencepiece_llama2, "yi": yi, "yi-not-legacy": functools.partial(yi, legacy=False),
    "yi-unsaid": functools.partial(yi, legacy=None),
    "yi-pieces": functools.partial(yi, inside=True), "yi-old-files": yi_json_files,
    "tt": tiktoken_llama3}


def token_bytes(t, i: int) -> bytes:
    """The bytes that an id of any of these stands for."""
    token = t.library.id_to_token(i)
    if token in t.added:
        return b"" if i in t.special_ids else token.encode()
    if "ByteLevel" in type(t.library.decoder).__name__:
        alphabet = byte_alphabet()
        return bytes(alphabet[c] for c in token)
    if len(token) == 6 and token.startswith("<0x"):
        return bytes([int(token[3:5], 16)])
    return token.replace("\u2581", " ").encode()
