"""Text to token ids and back, as transformers does; chat templates; stop strings.

A checkpoint's tokenizer.json, or without one its tokenizer.model, becomes a tokenizer of the
tokenizers library, with what the files beside it add. Text that a user types never becomes a
special token: "<|eot_id|>" is its characters, only the chat template's own text gives the token. An
id that no token has (checkpoints pad their embedding) is empty text.
"""
import contextlib
import functools
import json
import os
import re
import threading
from pathlib import Path

import tokenizers

from common import (
    FLAG,
    OBJECT,
    TEXT,
    UserError,
    check_kinds,
    list_of,
    not_the_file,
    present,
    read_bytes,
    read_json,
    read_text,
    refuse,
    shown,
    whole,
)
from formats import model_file
from formats.template import TemplateError, render

# Noncharacters around a control string that a message holds, while the template renders.
OPEN, CLOSE = "\ufdd0", "\ufdd1"


# ---------------------------------------------------------------- what the files declare

ID, TOKEN = whole(0), TEXT | OBJECT
SETTINGS = dict(
    added_tokens_decoder=OBJECT, chat_template=TEXT | list_of(OBJECT, "objects"),
    add_bos_token=FLAG, add_eos_token=FLAG, legacy=FLAG, add_prefix_space=FLAG,
    extra_special_tokens=OBJECT | list_of(TOKEN, "tokens"),
    additional_special_tokens=list_of(TOKEN, "tokens"))
FLAGS = dict(content=TEXT._replace(needed=True),
             **dict.fromkeys(("special", "lstrip", "rstrip", "single_word", "normalized"), FLAG))
EOS = dict(eos_token_id=ID | list_of(ID, "ids"), model_type=TEXT)


def optional_json(path: Path, kinds=()) -> dict:
    return read_json(path, kinds) if present(path) else {}


def declared(directory: Path) -> tuple[dict, dict[int, dict]]:
    """tokenizer_config.json, and the added tokens that it or added_tokens.json names.

    A token is {"content", "special", "lstrip", "rstrip", "single_word", "normalized"}. As in
    transformers, special_tokens_map.json and added_tokens.json count only where tokenizer_config
    .json has no added_tokens_decoder.
    """
    path = directory / "tokenizer_config.json"
    settings = optional_json(path, SETTINGS)
    table = settings.get("added_tokens_decoder")
    if table is None:
        settings |= optional_json(directory / "special_tokens_map.json", SETTINGS)
        special, path = set(special_texts(settings)), directory / "added_tokens.json"
        table = {str(i): {"content": text, "special": text in special,
                          "normalized": text not in special}
                 for text, i in optional_json(path).items()}
    for i, token in table.items():
        refuse((not (i.isascii() and i.isdigit()) or len(i) > 9 or not isinstance(token, dict),
                f"{path}: {shown(i)} with {shown(token)} is not an id with a token; fetch the file "
                "again"))
        check_kinds(token, FLAGS, f"{path}, added token {i}")
    return settings, {int(i): {k: table[i][k] for k in FLAGS if table[i].get(k) is not None}
                      for i in sorted(table, key=int)}


def named_tokens(settings: dict) -> dict[str, str | None]:
    """{"bos_token": "<s>", ...}: every token with a name, as chat templates see them."""
    named = {k: v for k, v in settings.items() if k.endswith("_token")}
    if isinstance(more := settings.get("extra_special_tokens"), dict):
        named |= more
    text = {k: v.get("content") if isinstance(v, dict) else v for k, v in named.items()}
    return {k: v for k, v in text.items() if v is None or isinstance(v, str)}


def special_texts(settings: dict) -> list[str]:
    """The tokens that are special because they have a name or are listed as such."""
    listed = settings.get("extra_special_tokens") or settings.get("additional_special_tokens")
    texts = [t.get("content") if isinstance(t, dict) else t
             for t in (listed if isinstance(listed, list) else [])]
    return [t for t in (*named_tokens(settings).values(), *texts) if isinstance(t, str)]


def pattern_of(tokens, before=lambda token: "") -> re.Pattern:
    """Matches any of the tokens, the longest first, and `before(token)` before it."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(before(t) + re.escape(t) for t in longest_first) or "(?!)")


@contextlib.contextmanager
def said_by_library(path: Path):
    """Turn what the tokenizers library says of a file, a Rust panic too, into a UserError."""
    try:
        yield
    except UserError:
        raise
    except BaseException as e:
        if isinstance(e, Exception) or type(e).__name__ == "PanicException":
            raise UserError(f"{path} cannot be read as a tokenizer: {e}; fetch it again"
                            ) from None
        raise


@contextlib.contextmanager
def silent_panics():
    """What Rust itself writes of a panic, several lines, is left out; the exception says it."""
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


# ---------------------------------------------------------------- the tokenizer

class Tokenizer:
    """A checkpoint's tokens. `library`: the tokenizers library's tokenizer, with all of them.

    added, special: {token: id} of the added tokens and of the special ones among them. names:
    {"bos_token": "<s>", ...}. bos, eos: ids put around a text. eos_ids: the EOS tokens of
    generation_config.json, else of config.json, else the tokenizer's own.
    """

    def __init__(self, directory: Path, path: Path):
        self.directory, self.path, self._lock = directory, path, threading.Lock()
        self.settings, table = declared(directory)
        config, generation = (optional_json(directory / name, EOS) for name in (
            "config.json", "generation_config.json"))
        with said_by_library(path), silent_panics():
            names = self._read(read_bytes(path), config.get("model_type"))
            self._add(table)
        self.names = {name: token for name, token in (names | named_tokens(self.settings)).items()
                      if token is not None}
        added = self.library.get_added_tokens_decoder()
        self.added = {t.content: i for i, t in added.items()}
        self.special = {t.content: i for i, t in added.items() if t.special}
        self.special_ids = frozenset(self.special.values())
        # Where an added token begins that swallows the spaces before it, and any special one.
        self._first_added = pattern_of(self.added, lambda t: (
            r"(?<!\s)\s*" if added[self.added[t]].lstrip else ""))
        self._control = re.compile(f"(?={pattern_of(t for t in self.special if t[1:]).pattern})")
        with said_by_library(path), silent_panics():
            self.bos, self.eos = self._around()
        unknown = [i for i in (*self.bos, *self.eos) if i >= self.vocab_size]
        refuse((unknown, f"{path} puts id {unknown and unknown[0]} around a text, which no token "
                "has; fetch it again"))
        eos = next((c["eos_token_id"] for c in (generation, config)
                    if c.get("eos_token_id") is not None), self._id("eos_token"))
        self.eos_ids = tuple(dict.fromkeys(eos if isinstance(eos, list) else [eos]))

    @classmethod
    def from_dir(cls, checkpoint_dir) -> "Tokenizer":
        """The tokenizer of a checkpoint directory; raises UserError if there is none, or a bad one.
        """
        directory = Path(checkpoint_dir)
        refuse((not directory.is_dir(), f"checkpoint directory {directory} does not exist"),
               ((directory / "tokenizer_special.json").exists(),
                f"{directory} was converted by an older version, which rewrote its tokenizer; "
                "convert the Hugging Face checkpoint again with convert_hf_checkpoint.py"))
        names = "tokenizer.json", "tokenizer.model", "original/tokenizer.model"
        if path := next((p for p in map(directory.joinpath, names) if present(p)), None):
            return cls(directory, path)
        others = [n for n in ("vocab.json", "tekken.json") if (directory / n).exists()]
        raise UserError(
            f"{directory} has neither tokenizer.json nor tokenizer.model"
            + (f", only {others[0]}; write one with transformers: AutoTokenizer.from_pretrained"
               f"({str(directory)!r}).save_pretrained({str(directory)!r})" if others else
               "; fetch it into the directory"))

    def _read(self, data: bytes, model_type) -> dict[str, str]:
        """Set `library` from a file's content; the names that the file itself gives to tokens."""
        names = {}
        if why := not_the_file(data):
            raise ValueError(why)
        if self.path.suffix == ".json":
            self.library = tokenizers.Tokenizer.from_buffer(data)
        else:
            self.library, names = model_file.read(data, self.settings, model_type)
        refuse((self.library.decoder is None, f"{self.path} has no decoder, so its tokens have no "
                "text; fetch the file as it is published"))
        self.library.no_truncation()
        self.library.no_padding()
        return names

    def _add(self, table: dict[int, dict]):
        """Add the tokens of the files beside; as in transformers all that have a name are special.
        """
        library = self.library
        known = library.get_added_tokens_decoder()
        for i, flags in table.items():
            if (token := tokenizers.AddedToken(**flags)) != known.get(i):
                library.add_tokens([token])
            refuse((library.token_to_id(token.content) != i,
                    f"{self.directory}: tokenizer_config.json or added_tokens.json says that "
                    f"{token.content!r} is id {i}, {self.path.name} makes it "
                    f"{library.token_to_id(token.content)}: they do not belong together"))
        known = {t.content: t for t in library.get_added_tokens_decoder().values()}
        for text in special_texts(self.settings):
            token = known.get(text) or tokenizers.AddedToken(text, normalized=False)
            if library.token_to_id(text) is not None and not (text in known and token.special):
                token.special = True
                library.add_special_tokens([token])

    def _id(self, name: str) -> list[int]:
        """[id] of the token with this name, or []."""
        return [self.special[t] for t in [self.names.get(name)] if t in self.special]

    def _around(self) -> tuple[list[int], list[int]]:
        """The ids before and after a text; tokenizer.json says, a tokenizer.model has BOS."""
        if self.path.suffix != ".json":
            return (self._id("bos_token") if self.settings.get("add_bos_token", True) else [],
                    self._id("eos_token") if self.settings.get("add_eos_token", False) else [])
        encoding = self.library.encode("a", add_special_tokens=True)
        own = [i for i, extra in enumerate(encoding.special_tokens_mask) if not extra]
        return (encoding.ids[:own[0]], encoding.ids[own[-1] + 1:]) if own else ([], [])

    @functools.cached_property
    def ids(self) -> dict[str, int]:
        """Every token, {token: id}, spelled as Hugging Face's files do."""
        return self.library.get_vocab(with_added_tokens=True)

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self.ids.values(), default=-1) + 1

    @functools.cached_property
    def _inside(self) -> tokenizers.Tokenizer:
        """The library's tokenizer without what it does only at the start of a text."""
        spec = json.loads(self.library.to_str())
        inside = {k: at_any_place(spec[k]) for k in ("normalizer", "pre_tokenizer")}
        if all(inside[k] == spec[k] for k in inside):
            return self.library
        return tokenizers.Tokenizer.from_str(json.dumps(spec | inside))

    # ------------------------------------------------------------ text to ids

    def encode(self, text: str, bos=True, continuation=False) -> list[int]:
        """Ids of plain text, with `bos` and the like around it as the checkpoint says.

        `continuation`: the text follows other text, so it gets neither BOS nor the space that
        SentencePiece adds at the start of a text.
        """
        ids = self._plain(text, start=not continuation)[0]
        return [*self.bos, *ids, *self.eos] if bos and not continuation else ids

    def encode_with_offsets(self, text: str,
                            continuation=False) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of plain text, and for each the characters [start, end) that it stands for.

        Several tokens can share one character.
        """
        return self._plain(text, start=not continuation)

    def _encode(self, text, start, special=False) -> tokenizers.Encoding:
        try:
            text.encode()
        except UnicodeEncodeError as e:
            raise UserError(f"the text holds half a character ({text[e.start]!r} at {e.start}); "
                            "write it as UTF-8") from None
        library = self.library if start else self._inside
        with self._lock, said_by_library(self.path):  # annotate.py's server has threads
            library.encode_special_tokens = not special
            return library.encode(text, add_special_tokens=False)

    def _plain(self, text, start) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and spans of text in which no special token is one; `start`: nothing comes before."""
        encoding = self._encode(text, start)
        if self.special_ids.isdisjoint(encoding.ids):
            return encoding.ids, encoding.offsets
        # Control strings that are part of the vocabulary itself: each is cut after its first
        # character.
        cuts = [0, *(m.start() + 1 for m in self._control.finditer(text)), len(text)]
        parts = [(a, self._encode(text[a:b], start and a == 0)) for a, b in zip(cuts, cuts[1:])]
        return ([i for _, part in parts for i in part.ids],
                [(i + a, j + a) for a, part in parts for i, j in part.offsets])

    def prompt(self, text: str, chat=False) -> list[int]:
        """Ids of a prompt: plain text, or with `chat` a user's message in the chat template."""
        return self.chat([{"role": "user", "content": text}]) if chat else self.encode(text)

    # ------------------------------------------------------------ ids to text

    def decode(self, ids) -> str:
        """The text of ids that start a text; special tokens have none."""
        with said_by_library(self.path):
            return self.library.decode(list(ids), skip_special_tokens=True)

    def decode_new(self, before, ids) -> str:
        """The text of `ids` as it stands after the tokens `before`."""
        return self.text_after(self.context(before), ids)

    def text_after(self, context: list[int], ids) -> str:
        """The text of `ids` after the few ids of `context`."""
        return self.decode([*context, *ids])[len(self.decode(context)):]

    def context(self, before) -> list[int]:
        """Ids that stand for the tokens `before` when what follows is decoded.

        Only whether there is text matters: at the start of a text SentencePiece drops a space.
        """
        any_text = any(i not in self.special_ids and self.library.id_to_token(i) for i in before)
        return self._letter if any_text else []

    @functools.cached_property
    def _letter(self):
        return self._plain("a", start=False)[0]

    def difference(self, other: "Tokenizer") -> str | None:
        """The first token by which two tokenizers differ, with its two ids; None if none."""
        if self.ids == other.ids:
            return None
        tokens = [*sorted(self.ids, key=self.ids.get), *sorted(other.ids, key=other.ids.get)]
        token = next(t for t in tokens if self.ids.get(t) != other.ids.get(t))
        place = lambda i: "absent" if i is None else f"id {i}"
        return (f"{token!r} is {place(self.ids.get(token))} in one and "
                f"{place(other.ids.get(token))} in the other")

    # ------------------------------------------------------------ chat

    def chat(self, messages: list[dict], add_generation_prompt=True) -> list[int]:
        """Ids of a conversation [{"role", "content"}, ...] in the checkpoint's own chat template.

        Raises UserError if there is none, or for whatever goes wrong in it.
        """
        template = self.template()
        # A message must not smuggle in a control token, yet the template may test and trim it. So
        # while the template renders, noncharacters stand around control strings in messages. An
        # assistant's tags, such as </think>, are the model's own.
        also = [t for t in self.added if t not in self.special and t in template]
        marked = [self._marked(m, () if m["role"] == "assistant" else also) for m in messages]
        try:
            text = render(template, {
                **self.names, "messages": marked, "tools": None, "documents": None,
                "add_generation_prompt": add_generation_prompt})
        except TemplateError as e:
            raise UserError(f"the chat template of {self.directory} fails for this conversation: "
                            f"{e}") from None
        return self._encode_marked(text)

    def _marked(self, message, also):
        pattern = pattern_of({*self.special, *also})

        def mark(text):
            text = re.sub(f"[{OPEN}{CLOSE}]", "", text)
            return pattern.sub(lambda m: OPEN + m[0] + CLOSE, text)

        return {k: mark(v) if isinstance(v, str) and k != "role" else v for k, v in message.items()}

    def _encode_marked(self, text):
        """Ids of a template's text: marked control strings are text, the others are tokens."""
        ids, marks = [], f"{OPEN}([^{OPEN}{CLOSE}]*){CLOSE}|[{OPEN}{CLOSE}]"
        for i, part in enumerate(re.split(marks, text)):  # text, marked, text, marked, ...
            if i % 2 and part in self.special:
                ids += self._plain(part, start=not ids)[0]
            elif i % 2 and part:  # an added token that is not special is one in plain text too
                ids += self._plain(part[0], start=not ids)[0]
                ids += self._plain(part[1:], start=False)[0]
            elif part and not ids:
                ids += self._encode(part, start=True, special=True).ids
            elif part:  # text up to the first token continues what is before it
                head = m.start() if (m := self._first_added.search(part)) else len(part)
                ids += self._plain(part[:head], start=False)[0]
                ids += self._encode(part[head:], start=True, special=True).ids
        return ids

    def template(self) -> str:
        path = self.directory / "chat_template.jinja"
        template = self.settings.get("chat_template")
        if present(path):
            template = read_text(path)
        if isinstance(template, list) and all(isinstance(t, dict) for t in template):
            named = {str(t.get("name")): t.get("template") for t in template}  # several
            template = named.get("default")
            refuse((not template, f"{self.directory}/tokenizer_config.json has chat templates "
                    f"{', '.join(map(repr, named))} and none of them is 'default'"))
        refuse((not template, f"{self.directory} has no chat template; leave out --chat, or use an "
                "instruction-tuned checkpoint"),
               (not isinstance(template, str), f"{self.directory}/tokenizer_config.json: "
                "chat_template is neither text nor a list of templates with names"))
        return template


def at_any_place(step: dict | None) -> dict | None:
    """A normalizer or pre-tokenizer of a tokenizer.json without what it puts before a text."""
    if step is None or step["type"] == "Prepend":
        return None
    step = dict(step)
    regex = step.get("pattern", {}).get("Regex", "") if step["type"] == "Replace" else ""
    if regex.startswith((r"\A", "^")):
        return None
    for key in ("normalizers", "pretokenizers"):
        if key in step:
            step[key] = [s for s in map(at_any_place, step[key]) if s]
    if step["type"] in ("Metaspace", "ByteLevel") and "add_prefix_space" in step:
        step["add_prefix_space"] = False
    if step["type"] == "Metaspace":
        step["prepend_scheme"] = "never"
    return step


# ---------------------------------------------------------------- streams and stop strings

class Stream:
    """Decodes new tokens one by one, after the tokens `before`.

    `put` returns the text that is complete, never half a character, `flush` what is left. While
    `pending` is not empty, the last tokens end inside a character.
    """

    def __init__(self, tokenizer: Tokenizer, before=()):
        self.tokenizer, self.context, self.pending = tokenizer, tokenizer.context(before), []

    def put(self, token: int) -> str:
        self.pending.append(token)
        text = self.tokenizer.text_after(self.context, self.pending)
        return "" if text.endswith("\ufffd") else self._done(text)

    def flush(self) -> str:
        return self._done(self.tokenizer.text_after(self.context, self.pending))

    def _done(self, text):
        self.context = self.context or self.tokenizer.context(self.pending)
        self.pending = []
        return text


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
