"""Text to token ids and back, SentencePiece or tiktoken; chat templates; stop strings.

The content of tokenizer.model says which of the two it is. Plain text never yields a special token:
a user who types "<|eot_id|>" gets its characters, only the chat template's own text gives the
token. Decoding works on bytes, so a stream never shows half a character.
"""
import base64
import codecs
import json
import re
import unicodedata
from datetime import datetime
from pathlib import Path

import sentencepiece
import tiktoken

from common import UserError, read_bytes, read_json

# How Llama 3 splits text before merging: contractions, words with one leading sign, up to three
# digits, signs, line ends, spaces.
LLAMA3_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
LLAMA3_SPECIAL = [
    "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>", "<|finetune_right_pad_id|>", "<|reserved_special_token_2|>",
    "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(3, 248))]
# tiktoken's time grows with the square of a run without a break, so longer runs are cut.
RUN = 20_000


class Tokenizer:
    """What both kinds share.

    A subclass has `vocab_size`, `special` {text: id}, `bos_id` (or None), `adds_space`,
    `token_bytes(id)`, `_pieces(text, continuation)` and `_is_control(id)`. eos_ids: every EOS token
    that the checkpoint's files name.
    """

    def __init__(self, directory: Path):
        optional = lambda name: read_json(directory / name) if (directory / name).exists() else {}
        self.directory, self.settings = directory, optional("tokenizer_config.json")
        ids = []
        for settings in (optional("config.json"), optional("generation_config.json")):
            eos = settings.get("eos_token_id")
            ids += eos if isinstance(eos, list) else [] if eos is None else [eos]
        self.eos_ids = tuple(dict.fromkeys(ids))

    @staticmethod
    def from_dir(checkpoint_dir) -> "Tokenizer":
        """The tokenizer of a checkpoint directory; raises UserError if it has none of ours."""
        path = Path(checkpoint_dir) / "tokenizer.model"
        if not Path(checkpoint_dir).is_dir():
            raise UserError(f"checkpoint directory {checkpoint_dir} does not exist")
        if not path.is_file():
            raise UserError(f"{path} does not exist; fetch it, or convert the checkpoint with "
                            "convert_hf_checkpoint.py")
        data = read_bytes(path)
        if _is_ranks(data):
            return TiktokenTokenizer(path.parent, data)
        try:
            if not data:
                raise ValueError
            model = sentencepiece.SentencePieceProcessor(model_proto=data)
        except (RuntimeError, ValueError):
            raise UserError(f"{path} is neither a SentencePiece model nor tiktoken ranks, or is "
                            "damaged; fetch it again") from None
        return SentencePieceTokenizer(path.parent, model)

    def encode(self, text: str, bos=True, continuation=False) -> list[int]:
        """Ids of plain text, after the BOS token if the model has one and `bos`.

        `continuation`: the text follows other text, so it gets neither BOS nor the space that
        SentencePiece adds at the start of a text.
        """
        bos = bos and not continuation and self.bos_id is not None
        return [self.bos_id] * bos + [i for i, _, _ in self._pieces(text, continuation)]

    def encode_with_offsets(self, text: str,
                            continuation=False) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of plain text, and for each the characters [start, end) whose bytes it holds.

        Several tokens can share one character.
        """
        pieces = list(self._pieces(text, continuation))
        return [i for i, _, _ in pieces], [(a, b) for _, a, b in pieces]

    def prompt(self, text: str, chat=False) -> list[int]:
        """Ids of a prompt: plain text, or with `chat` a user's message in the chat template."""
        return self.chat([{"role": "user", "content": text}]) if chat else self.encode(text)

    def decode(self, ids) -> str:
        """The text of ids that start a text; control tokens have none."""
        return self._decode(ids, start=True)

    def decode_new(self, before, ids) -> str:
        """The text of `ids` as it stands after the tokens `before`."""
        return self._decode(ids, start=all(self._is_control(i) for i in before))

    def _decode(self, ids, start):
        data = b"".join(self.token_bytes(i) for i in ids)
        if start and self.adds_space and data.startswith(b" "):
            data = data[1:]
        return data.decode("utf-8", errors="replace")

    def same_as(self, other: "Tokenizer") -> bool:
        """Whether every id means the same bytes or the same control token."""
        about = lambda t: (type(t), t.vocab_size, t.special)
        return about(self) == about(other) and all(
            self.token_bytes(i) == other.token_bytes(i) for i in range(self.vocab_size))

    # ------------------------------------------------------------ chat

    def chat(self, messages: list[dict], add_generation_prompt=True) -> list[int]:
        """Ids of a conversation [{"role", "content"}, ...] in the checkpoint's own chat template.

        The template is Jinja2, run in a sandbox. Raises UserError if there is none or if it refuses
        the messages.
        """
        template = self._template()
        # A message must not smuggle in a special token, yet the template may test and trim it. So
        # while the template renders, a noncharacter breaks up every special string in a message; it
        # is removed before the text is encoded.
        mark = "\ufdd0"
        specials = sorted(self.special, key=len, reverse=True)

        def guard(text):
            text = text.replace(mark, "")
            for s in specials:
                text = text.replace(s, s[0] + mark + s[1:])
            return text

        guarded = [{k: guard(v) if isinstance(v, str) and k != "role" else v for k, v in m.items()}
                   for m in messages]
        names = {f"{k}_token": v.get("content") if isinstance(v, dict) else v
                 for k in ("bos", "eos", "pad", "unk")
                 if (v := self.settings.get(f"{k}_token"))}
        text = _render(template, self.directory, messages=guarded,
                       add_generation_prompt=add_generation_prompt, **names)
        pattern = "|".join(map(re.escape, specials)) or "(?!)"  # which matches nothing
        ids = []
        for i, part in enumerate(re.split(f"({pattern})", text)):  # plain text, special, plain, ...
            plain = part.replace(mark, "")
            ids += [self.special[part]] if i % 2 else self.encode(plain, bos=False)
        return ids

    def _template(self):
        path = self.directory / "chat_template.jinja"
        template = self.settings.get("chat_template")
        if path.exists():
            template = path.read_text(encoding="utf-8")
        if isinstance(template, list):  # several by name
            template = next((t["template"] for t in template if t.get("name") == "default"), None)
        if not template:
            raise UserError(f"{self.directory}/tokenizer_config.json has no chat_template; leave "
                            "out --chat, or use an instruction-tuned checkpoint")
        return template


def _render(template, directory, **values):
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message):
        raise TemplateError(message)

    def tojson(value, indent=None):
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = tojson
    environment.globals.update(raise_exception=raise_exception,
                               strftime_now=lambda form: datetime.now().strftime(form))
    try:
        return environment.from_string(template).render(**values)
    except TemplateError as e:
        raise UserError(f"the chat template of {directory} refuses this conversation: {e}"
                        ) from None


class SentencePieceTokenizer(Tokenizer):
    """Llama 2's kind.

    Round trips are exact for models with the identity normalizer, as Llama's are.
    """

    def __init__(self, directory, model):
        super().__init__(directory)
        self.model, self.vocab_size = model, model.vocab_size()
        self.special = {model.id_to_piece(i): i for i in range(self.vocab_size)
                        if model.is_control(i)}
        adds_bos = model.bos_id() >= 0 and self.settings.get("add_bos_token", True)
        self.bos_id = model.bos_id() if adds_bos else None
        if model.eos_id() >= 0:
            self.eos_ids = tuple(dict.fromkeys((*self.eos_ids, model.eos_id())))
        self.adds_space = model.decode(model.encode("a b")) == "a b" and b"".join(
            map(self.token_bytes, model.encode("a"))) == b" a"

    def _is_control(self, i):
        return self.model.is_control(i)

    def token_bytes(self, i: int) -> bytes:
        """The bytes a token stands for, with a word's leading space; none for a control token."""
        if self.model.is_control(i):
            return b""
        if self.model.is_byte(i):
            return bytes([int(self.model.id_to_piece(i)[3:5], 16)])
        return self.model.id_to_piece(i).replace("\u2581", " ").encode()

    def _pieces(self, text, continuation):
        """(id, start, end) of each token; start and end are characters of `text`."""
        # After a line end SentencePiece splits a text as it would anywhere inside one. The tokens
        # of " \n" are dropped again.
        lead = "\n" if continuation and self.adds_space else ""
        ids = self.model.encode(lead + text)
        skip = len(self.model.encode(lead)) if lead else 0
        spaces = 1 if self.adds_space and not lead else 0
        yield from _spans(((i, self.token_bytes(i)) for i in ids[skip:]), text, spaces)


class TiktokenTokenizer(Tokenizer):
    """Llama 3's kind, and other byte-level BPE, described in tokenizer_special.json."""
    adds_space = False

    def __init__(self, directory, data):
        super().__init__(directory)
        lines = (line.split() for line in data.splitlines() if line)
        ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
        described = directory / "tokenizer_special.json"
        if described.exists():
            about = read_json(described)
            pattern, self.normalizer = about["pattern"], about.get("normalizer")
            self.special, self.bos_id = about["special_tokens"], about.get("bos")
        else:
            pattern, self.normalizer = LLAMA3_PATTERN, None
            self.special = {s: len(ranks) + i for i, s in enumerate(LLAMA3_SPECIAL)}
            self.bos_id = self.special["<|begin_of_text|>"]
            self.eos_ids = tuple(dict.fromkeys((*self.eos_ids, self.special["<|end_of_text|>"])))
        self.model = tiktoken.Encoding(name=str(directory), pat_str=pattern, mergeable_ranks=ranks,
                                       special_tokens=self.special)
        self.bytes = {i: b for b, i in ranks.items()}
        self.vocab_size = max(*ranks.values(), *self.special.values(), 0) + 1
        self.control = frozenset(self.special.values())

    def _is_control(self, i):
        return i in self.control

    def token_bytes(self, i: int) -> bytes:
        return self.bytes.get(i, b"")

    def _pieces(self, text, continuation):
        if self.normalizer:
            text = unicodedata.normalize(self.normalizer, text)
        ids = (i for part in _cut_runs(text) for i in self.model.encode_ordinary(part))
        yield from _spans(((i, self.bytes[i]) for i in ids), text, 0)


class Stream:
    """Decodes new tokens one by one, after the tokens `before`.

    `put` returns the text that is complete, never half a character, `flush` what is left.
    """

    def __init__(self, tokenizer: Tokenizer, before=()):
        self.tokenizer = tokenizer
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.at_start = tokenizer.adds_space and all(tokenizer._is_control(i) for i in before)

    def put(self, token: int) -> str:
        data = self.tokenizer.token_bytes(token)
        if self.at_start and data:
            data, self.at_start = data.removeprefix(b" "), False
        return self.decoder.decode(data)

    def flush(self) -> str:
        return self.decoder.decode(b"", final=True)


def cut_at_stop(text: str, stops) -> str:
    """The text before the first occurrence of any of the strings `stops`."""
    return text[:min((at for s in stops if (at := text.find(s)) >= 0), default=None)]


def stop_check(tokenizer: Tokenizer, before, stops):
    """A function of each new token after the tokens `before`: does the text hold one of `stops`?

    It is `generate`'s `stop`; True for every token from the one that completes a stop string.
    """
    stream, text = Stream(tokenizer, before), ""

    def stop(token: int) -> bool:
        nonlocal text
        text += stream.put(token)
        return any(s in text for s in stops)

    return stop


def _is_ranks(data: bytes) -> bool:
    """Whether a file's first line is tiktoken's: base64, a space, a number."""
    first = data.split(b"\n", 1)[0].split()
    try:
        return (len(first) == 2 and first[1].isdigit()
                and base64.b64decode(first[0], validate=True) is not None)
    except ValueError:
        return False


def _cut_runs(text):
    """Yield the text in parts, none with a run of spaces or non-spaces longer than RUN."""
    start = run = 0
    for i, c in enumerate(text):
        run = run + 1 if i and c.isspace() == text[i - 1].isspace() else 1
        if run > RUN:
            yield text[start:i]
            start, run = i, 1
    yield text[start:]


def _spans(tokens, text, spaces):
    """Yield (id, start, end) for each (id, bytes): the characters of `text` that it stands for.

    The tokens hold `spaces` bytes more, before the text.
    """
    ends, total = [], 0  # ends[c]: bytes up to the end of character c
    for c in text:
        total += len(c.encode("utf-8", errors="replace"))
        ends.append(total)
    at, first, last = -spaces, 0, 0
    for i, data in tokens:
        at += len(data)
        begin = at - len(data)
        while first < len(ends) and ends[first] <= begin:
            first += 1
        last = max(last, first)
        while last < len(ends) and (ends[last - 1] if last else 0) < at:
            last += 1
        yield i, first, last
