"""tokenizer.py: transformers' ids, offsets, text, streamed pieces and chats for every family."""
import base64
import json
import shutil
import time
import unicodedata
from pathlib import Path

import pytest
import sentencepiece
import tiktoken
import transformers
from tokenizers.decoders import DecodeStream

from common import UserError, visible
from families import FAMILIES, sentencepiece_model
from formats.model_file import LLAMA3_PATTERN, LLAMA3_SPECIAL, is_ranks
from helpers import WRONG, strings
from tokenizer import EOS, SETTINGS, Stream, Tokenizer, cut_at_stop, stop_check

SHARED = Path(__file__).parents[2] / "shared" / "tokenizers"
real = pytest.mark.skipif(not SHARED.is_dir(), reason="the real Llama tokenizers are not here")
EDGES = ["", " ", "  x", "\n", " \n\n  y", "é", "e\u0301", "日本語", "👩‍👩‍👧", "a👩b", "\u200b",
         "\u00a0x", "x\u2581y", "12345.678", "def f(x):\n\treturn x**2  # y\n", "don't WE'LL",
         "\ufeffa", "\0", "qxz qxz", "<s>", "</s> <unk>", "x<|im_start|>user\ny<|im_end|>",
         "<|eot_id|>", "<think>a</think>b", "<tool_call>{}</tool_call>", "[INST] hi [/INST]",
         "<0x0A>", "<\uff5cUser\uff5c>a"]
TEXTS = EDGES + strings(600, seed=5, rare=0.2)
PLAIN = sorted(set(FAMILIES) - {"sp", "tt"})  # those for which transformers reads the directory
TALK = [{"role": "user", "content": "the cat 日本? "},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\na cat"},
        {"role": "user", "content": "12 cats\nthe"}]


@pytest.fixture(scope="module")
def homes(tmp_path_factory):
    """A directory of each family, made when it is first asked for."""
    made = {}

    def home(name) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("tokenizer")
            FAMILIES[name](made[name])
        return made[name]

    return home


def hf(directory, **more):
    return transformers.AutoTokenizer.from_pretrained(directory, **more)


def spaced(text):
    return text.replace("\u2581", " ")


def every(homes, but=()):
    found = [Tokenizer.from_dir(homes(name)) for name in FAMILIES if name not in but]
    return found + [Tokenizer.from_dir(SHARED / n) for n in ("llama-2", "llama-3")
                    if (SHARED / n).is_dir()]


def changed(homes, name, tmp_path, file="tokenizer_config.json", **keys) -> Path:
    """A copy of a family's directory with other keys in one of its files."""
    shutil.copytree(homes(name), tmp_path / name)
    path = tmp_path / name / file
    value = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(value | keys))
    return tmp_path / name


# ---------------------------------------------------------------- ids and text

@pytest.mark.parametrize("name", PLAIN)
def test_ids_offsets_text_and_pieces_equal_transformers(homes, name):
    ours, theirs = Tokenizer.from_dir(homes(name)), hf(homes(name), split_special_tokens=True)
    library, compared = theirs.backend_tokenizer, 0
    for text in TEXTS:
        if "<" in text and name in ("unigram", "yi-pieces", "yi-old-files"):
            # A typed control string is text with us. Theirs finds it in unigram's and yi-pieces'
            # vocabulary, and knows no additional_special_tokens of a special_tokens_map.json.
            continue
        want = theirs(text, return_offsets_mapping=True)
        assert ours.encode(text) == want.input_ids, text
        want = theirs(text, return_offsets_mapping=True, add_special_tokens=False)
        assert ours.encode_with_offsets(text) == (want.input_ids, want.offset_mapping), text
        ids = ours.encode(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text
        stream, reference = Stream(ours), DecodeStream(skip_special_tokens=True)
        for i in ids:
            assert stream.put(i) == (reference.step(library, i) or ""), text
        compared += 1
    assert compared >= 500


@pytest.mark.parametrize("name", FAMILIES)
def test_text_survives_whole_and_in_a_stream(homes, name):
    t = Tokenizer.from_dir(homes(name))
    for text in TEXTS:
        if "\u2581" in text:
            continue  # SentencePiece's own letter for a space
        if name.startswith("qwen"):
            text = unicodedata.normalize("NFC", text)
        ids = t.encode(text)
        stream = Stream(t)
        assert "".join([*map(stream.put, ids), stream.flush()]) == t.decode(ids)
        new, offsets = t.encode_with_offsets(text, continuation=True)
        before = t.encode("x")
        assert t.decode_new(before, new) == t.decode([*before, *new])[1:]
        if name != "unigram":  # which may know a letter by no piece
            assert t.decode_new(before, new) == text
            # A first space is one with the space that transformers adds, and goes with it.
            assert t.decode(ids) in (text, text[text.startswith(" "):]) or "<tool_call>" in text
        assert all(0 <= a <= b <= len(text) for a, b in offsets)


def test_sentencepiece_ids_equal_sentencepiece(homes):
    where = [homes("sp"), *[SHARED / "llama-2"] * SHARED.is_dir()]
    for directory in where:
        t = Tokenizer.from_dir(directory)
        raw = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
        for text in strings(3000) + EDGES:
            assert t.encode(text) == [raw.bos_id(), *raw.encode(text)], text


@pytest.mark.parametrize("rules", [
    dict(model_type="unigram", vocab_size=400),
    dict(model_type="unigram", vocab_size=180, byte_fallback=False),
    dict(byte_fallback=False), dict(normalization_rule_name="nmt_nfkc"),
    dict(add_dummy_prefix=False), dict(symbols=("\u2581\u2581", "12", "<u1>")),
    dict(normalization_rule_name="nfkc_cf", remove_extra_whitespaces=True)], ids=str)
def test_other_sentencepiece_models(tmp_path, rules):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model(**rules))
    t = Tokenizer.from_dir(tmp_path)
    raw = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    texts = strings(800, seed=11)
    same = sum(t.encode(text, bos=False) == raw.encode(text) for text in texts)
    assert same >= 800 - 2 * ("model_type" in rules)  # unigram: two ways may be as likely


def test_tiktoken_ids_equal_tiktoken(homes):
    for directory in [homes("tt"), *[SHARED / "llama-3"] * SHARED.is_dir()]:
        t = Tokenizer.from_dir(directory)
        lines = map(bytes.split, (directory / "tokenizer.model").read_bytes().splitlines())
        reference = tiktoken.Encoding("reference", pat_str=LLAMA3_PATTERN, special_tokens={},
                                      mergeable_ranks={base64.b64decode(b): int(i)
                                                       for b, i in lines})
        for text in strings(3000) + EDGES:
            assert t.encode(text, bos=False) == reference.encode_ordinary(text), text


@real
def test_real_tokenizers_as_published():
    t = Tokenizer.from_dir(SHARED / "llama-3")
    assert t.vocab_size == 128256 and t.bos == [128000] and len(LLAMA3_SPECIAL) == 256
    for text, i in (("<|eot_id|>", 128009), ("<|end_header_id|>", 128007),
                    ("<|finetune_right_pad_id|>", 128004),
                    ("<|reserved_special_token_247|>", 128255)):
        assert t.special[text] == i
    assert t.encode("Hello world") == [128000, 9906, 1917]
    t = Tokenizer.from_dir(SHARED / "llama-2")
    assert t.vocab_size == 32000 and t.encode("Hello world") == [1, 15043, 3186]


def test_typed_control_strings_stay_text(homes):
    for t in every(homes):
        typed = [*t.special, "x<s></s>", "<|eot_id|> <|begin_of_text|>", "<s<s>>"]
        for text in [*typed, *(f"a {s}b" for s in typed), "".join(t.special)]:
            ids = t.encode(text, bos=False)
            assert t.special_ids.isdisjoint(ids), (t.directory, text)
            assert spaced(t.decode(ids)) == spaced(text)


def test_a_token_with_a_name_is_special(homes, tmp_path):
    """As in transformers, whatever its own flag says."""
    where = changed(homes, "qwen3", tmp_path, eos_token="</think>",
                    extra_special_tokens={"tool_token": "<tool_call>"},
                    chat_template="{{ tool_token }}{{ eos_token }}x{{ bos_token }}")
    ours, theirs = Tokenizer.from_dir(where), hf(where)
    for text in ("</think>", "<tool_call>", "<tool_response>"):
        ids = [ours.ids[text]]
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.eos_ids == (ours.ids["</think>"],) == (theirs.eos_token_id,)
    assert ours.chat(TALK[:1]) == theirs.apply_chat_template(TALK[:1], return_dict=False)


def test_a_name_that_is_null_names_no_token(homes, tmp_path):
    t = Tokenizer.from_dir(changed(homes, "yi", tmp_path, bos_token=None, add_bos_token=True))
    assert "bos_token" not in t.names and t.bos == [] and t.encode("a") == t.encode("a", bos=False)


@pytest.mark.parametrize("legacy", [None, True, False])
def test_for_mistral_sentencepiece_puts_the_spaces(homes, tmp_path, legacy):
    name = {None: "yi-unsaid", True: "yi", False: "yi-not-legacy"}[legacy]
    where = changed(homes, name, tmp_path, "config.json", model_type="mistral")
    ours, theirs = Tokenizer.from_dir(where), hf(where, split_special_tokens=True)
    for text in TEXTS:
        assert ours.encode(text, bos=False) == theirs.encode(text, add_special_tokens=False), text
    assert ours.chat(TALK) == hf(where).apply_chat_template(TALK, add_generation_prompt=True,
                                                            return_dict=False)


def test_only_special_tokens_have_no_text(homes):
    t = Tokenizer.from_dir(homes("qwen3"))
    for text, special in (("</think>", False), ("<tool_call>", False), ("<|im_end|>", True)):
        i = t.ids[text]
        assert (i in t.special_ids) is special
        stream = Stream(t, t.encode("a"))
        assert t.decode([i]) == stream.put(i) == ("" if special else text)


def test_an_id_that_no_token_has_is_empty_text(homes):
    for t in every(homes):
        ids, beyond = t.encode("the cat", bos=False), t.vocab_size + 7
        assert t.decode([*ids, beyond]) == "the cat" and t.decode([beyond]) == ""
        stream = Stream(t, [beyond])
        assert "".join(map(stream.put, [beyond, *ids, beyond])) + stream.flush() == "the cat"
        assert t.decode_new(ids, [beyond]) == ""


def test_stream_continues_text_and_shows_bad_bytes(homes):
    for t in every(homes):
        before, new = t.encode("the cat"), t.encode_with_offsets(" cat 日", continuation=True)[0]
        stream = Stream(t, before)
        assert "".join([stream.put(i) for i in new] + [stream.flush()]) == " cat 日"
    t = Tokenizer.from_dir(homes("tt"))
    stream = Stream(t)
    e6, x97, a = (t.ids[c] for c in "æĹa")  # bytes E6 and 97 in byte-level BPE's letters
    pieces = [*map(stream.put, (e6, x97)), [*stream.pending], *map(stream.put, (a, e6)),
              stream.flush()]
    assert pieces == ["", "", [e6, x97], "\ufffda", "", "\ufffd"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama2-legacy", "mistral-v0.3", "llama3", "yi", "qwen3"])
def test_messages_of_900_000_characters(homes, name):
    t = Tokenizer.from_dir(homes(name))
    for text in ("a" * 900_000, "x" + " " * 900_000 + "x", "the cat 12\n" * 80_000,
                 "<|im_end|>" * 90_000):
        start = time.perf_counter()
        ids = t.chat([{"role": "user", "content": text}])
        assert text.strip() in t.decode(ids)
        # Some 3 seconds; 28 where the time grew with the square of a run.
        assert time.perf_counter() - start < 15, text[:20]


def test_spaces_before_a_token_that_swallows_them_take_linear_time(homes, tmp_path):
    t = Tokenizer.from_dir(changed(homes, "qwen3", tmp_path, added_tokens_decoder={
        "429": {"content": "<mask>", "lstrip": True, "special": True}}))
    start = time.process_time()
    t.chat([{"role": "user", "content": "<|im_end|>x" + " " * 50_000 + "y"}])
    assert time.process_time() - start < 2  # 7 where each space began a search


@pytest.mark.parametrize("chat", [False, True])
def test_half_a_character_is_refused(homes, chat):
    with pytest.raises(UserError, match="half a character"):
        Tokenizer.from_dir(homes("qwen3")).prompt("a\ud83d", chat)


# ---------------------------------------------------------------- the files

def test_what_cannot_be_a_tokenizer_is_refused(tmp_path, homes):
    with pytest.raises(UserError, match="neither tokenizer.json nor tokenizer.model; fetch it"):
        Tokenizer.from_dir(tmp_path)
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(UserError, match="only vocab.json; write one with transformers"):
        Tokenizer.from_dir(tmp_path)
    with pytest.raises(UserError, match="nowhere does not exist"):
        Tokenizer.from_dir(tmp_path / "nowhere")
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 499723\n"
    page = b"<!DOCTYPE html><html><body>Sign in</body></html>"
    for data, why in ((b"", "it is empty"), (pointer, "Git LFS pointer"), (page, "a web page"),
                      (b"junk", ""), (b"\x00" * 100, ""), (sentencepiece_model()[:1000], "")):
        for name in ("tokenizer.model", "tokenizer.json"):
            (tmp_path / name).write_bytes(data)
            with pytest.raises(UserError, match=f"{name} cannot be read as a tokenizer: .*{why}"):
                Tokenizer.from_dir(tmp_path)
            (tmp_path / name).unlink()
    (tmp_path / "tokenizer_special.json").write_text("{}")
    with pytest.raises(UserError, match="older version.*convert .* again"):
        Tokenizer.from_dir(tmp_path)


def test_files_that_contradict_each_other_are_refused(homes, tmp_path):
    flags = {"content": "<|new|>", "special": True}
    where = changed(homes, "qwen3", tmp_path, added_tokens_decoder={"3": flags})
    with pytest.raises(UserError, match="'<.new.>' is id 3, tokenizer.json makes it [0-9]+:"):
        Tokenizer.from_dir(where)
    for table in ({"x": flags}, ["a"], {"3": 1}):
        where = changed(homes, "qwen3", tmp_path / str(len(str(table))), added_tokens_decoder=table)
        with pytest.raises(UserError, match="an id with a token|must be an object"):
            Tokenizer.from_dir(where)


def test_any_value_in_the_files_beside_is_a_tokenizer_or_one_line(homes, tmp_path):
    """What a tokenizer's settings say, each value missing or of another type."""
    token = {"content": "<|new|>", "special": True, "lstrip": False, "normalized": False}
    cases = [("tokenizer_config.json", {key: x}) for x in WRONG for key in (
        *SETTINGS, "bos_token", "eos_token", "new")]
    cases += [("tokenizer_config.json", {"added_tokens_decoder": {"300": token | {key: x}}})
              for x in WRONG for key in token]
    cases += [("tokenizer_config.json", {"added_tokens_decoder": {i: token}})
              for i in ("", "x", "-1", "1.5", "٣", "9" * 30, "0")]
    cases += [("tokenizer_config.json", {"extra_special_tokens": {"image": x}}) for x in WRONG]
    cases += [("tokenizer_config.json", {"chat_template": [{"name": "default", "template": x}]})
              for x in WRONG]
    cases += [(file, {key: x}) for x in WRONG for file in ("generation_config.json", "config.json")
              for key in EOS]
    cases += [(file, {"a": x}) for x in WRONG for file in ("added_tokens.json",
                                                           "special_tokens_map.json")]
    refused = 0
    for file, keys in cases:
        where = changed(homes, "qwen3", tmp_path, file, **keys)
        if file in ("added_tokens.json", "special_tokens_map.json"):
            (where / "tokenizer_config.json").unlink(missing_ok=True)
        try:
            t = Tokenizer.from_dir(where)
            assert t.decode(t.encode("abc")).strip().endswith("abc"), keys
            t.prompt("abc", chat="chat_template" in keys)
        except UserError as e:
            refused += 1
            assert str(where) in str(e) and (file in str(e) or "template" in str(e)), (keys, e)
            assert "\n" not in str(e) and len(str(e)) < 400, (keys, e)
        shutil.rmtree(where)
    assert 200 < refused < len(cases)


@pytest.mark.parametrize("change", [
    dict(post_processor={"type": "TemplateProcessing", "single": [
        {"SpecialToken": {"id": "<x>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [], "special_tokens": {}}),
    dict(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
    dict(model={"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": None}),
    dict(model={"type": "BPE"}), dict(decoder=None)], ids=lambda change: next(iter(change)))
def test_whatever_the_library_says_of_a_file_is_one_line(homes, tmp_path, change):
    where = changed(homes, "qwen3", tmp_path, "tokenizer.json", **change)
    with pytest.raises(UserError, match="tokenizer.json (cannot be|has no decoder|makes it 1)"):
        Tokenizer.from_dir(where).encode("b")


@pytest.mark.parametrize("template", [5, True, ["x"], {"default": "x"}])
def test_a_chat_template_that_is_none(homes, tmp_path, template):
    where = changed(homes, "qwen3", tmp_path, chat_template=template)
    with pytest.raises(UserError, match="chat_template is .*must be a text or a list of objects"):
        Tokenizer.from_dir(where).chat(TALK)


def test_a_truncated_or_padded_tokenizer_json_cuts_nothing(homes, tmp_path):
    where = changed(homes, "qwen3", tmp_path, "tokenizer.json", truncation={
        "direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}, padding={
        "strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
        "pad_type_id": 0, "pad_token": "<|endoftext|>"})
    text = "the cat " * 10
    assert Tokenizer.from_dir(where).encode(text) == Tokenizer.from_dir(
        homes("qwen3")).encode(text)


def test_eos_ids_are_generations_or_else_the_configs_or_the_tokenizers(homes, tmp_path):
    t = Tokenizer.from_dir(homes("yi"))
    assert t.eos_ids == (t.special["<|im_end|>"],)
    where = changed(homes, "yi", tmp_path, "config.json", eos_token_id=7)
    assert Tokenizer.from_dir(where).eos_ids == (7,)
    for says, ids in (("[8, 9]", (8, 9)), ("null", (7,)), ("8", (8,))):
        (where / "generation_config.json").write_text(f'{{"eos_token_id": {says}}}')
        assert Tokenizer.from_dir(where).eos_ids == ids
    for says in ('"2"', "{}", "[[2]]", "[2.5]", "true"):
        (where / "generation_config.json").write_text(f'{{"eos_token_id": {says}}}')
        with pytest.raises(UserError, match="eos_token_id is .*; it must be a whole number from"):
            Tokenizer.from_dir(where)
    assert Tokenizer.from_dir(homes("sp")).eos_ids == (2,)


def test_the_first_difference_of_two_tokenizers_is_named(homes, tmp_path):
    tt, sp = (Tokenizer.from_dir(homes(name)) for name in ("tt", "sp"))
    assert tt.difference(Tokenizer.from_dir(homes("tt"))) is None
    assert tt.difference(sp) == "'Ā' is id 0 in one and absent in the other"
    shutil.copytree(homes("tt"), tmp_path / "tt")
    data = (homes("tt") / "tokenizer.model").read_bytes()
    (tmp_path / "tt" / "tokenizer.model").write_bytes(
        data.replace(base64.b64encode(b"the"), base64.b64encode(b"tha")))
    other = Tokenizer.from_dir(tmp_path / "tt")
    assert tt.difference(other) == f"'the' is id {tt.ids['the']} in one and absent in the other"


def test_ranks_are_told_from_a_model():
    assert is_ranks(b"AA== 0\nAQ== 1\n") and not is_ranks(sentencepiece_model())


# ---------------------------------------------------------------- chat

@pytest.mark.parametrize("name", sorted({*PLAIN} - {"unigram"}))
def test_chats_equal_transformers(homes, name):
    ours, theirs = Tokenizer.from_dir(homes(name)), hf(homes(name))
    system = [{"role": "system", "content": "Be kind."}]
    for talk in (TALK[:1], TALK[:2], TALK, system + TALK):
        for more in (True, False):
            try:
                want = theirs.apply_chat_template(talk, add_generation_prompt=more,
                                                  return_dict=False)
            except Exception as refused:
                with pytest.raises(UserError, match=str(refused)):
                    ours.chat(talk, more)
            else:
                assert ours.chat(talk, more) == want, talk


def test_a_history_keeps_what_the_model_wrote(homes):
    """</think> in an assistant's answer is the token, and the template takes the thoughts away."""
    t = Tokenizer.from_dir(homes("qwen3"))
    think = t.ids["</think>"]
    assert think not in t.chat(TALK) and "hm" not in t.decode(t.chat(TALK))
    # Typed by a user it is no token, and the template does not take it for one.
    ids = t.chat([{"role": "user", "content": "what is </think>?"}])
    assert think not in ids and "what is </think>?" in t.decode(ids)


def test_a_message_smuggles_in_nothing(homes):
    for t in every(homes):
        if "chat_template" not in t.settings:
            continue
        harmless = [i for i in t.chat([{"role": "user", "content": "x"}]) if i in t.special_ids]
        for s in t.special:
            for evil in (s, f"x{s}y", s[0] + s + s[1:], s[:3] + "\ufdd0" + s[3:],
                         "\ufdd0" + s + "\ufdd1", f"\ufdd1{s}\ufdd0"):
                ids = t.chat([{"role": "user", "content": evil}])
                assert [i for i in ids if i in t.special_ids] == harmless, evil
                text = evil.replace("\ufdd0", "").replace("\ufdd1", "")
                assert spaced(text).strip() in spaced(t.decode(ids))


def test_prompt_is_plain_text_or_a_message(homes):
    t = Tokenizer.from_dir(homes("llama3"))
    assert t.prompt("the cat") == t.encode("the cat") and t.prompt("the cat")[:1] == t.bos
    assert t.prompt("the cat", chat=True) == t.chat([{"role": "user", "content": "the cat"}])
    with pytest.raises(UserError, match="no chat template; leave out --chat"):
        Tokenizer.from_dir(homes("sp")).prompt("the cat", chat=True)


def test_where_the_template_comes_from(homes, tmp_path):
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    where = changed(homes, "qwen3", tmp_path / "a", chat_template=named)
    assert Tokenizer.from_dir(where).template() == "d"
    (where / "chat_template.jinja").write_text("file")
    assert Tokenizer.from_dir(where).template() == "file"
    (where / "chat_template.jinja").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match="chat_template.jinja: it is a Git LFS pointer"):
        Tokenizer.from_dir(where).template()
    where = changed(homes, "qwen3", tmp_path / "b", chat_template=named[:1])
    with pytest.raises(UserError, match="templates 'tool_use' and none of them is 'default'"):
        Tokenizer.from_dir(where).template()


def test_what_goes_wrong_in_a_template_is_one_line(homes, tmp_path):
    where = changed(homes, "qwen3", tmp_path, chat_template=(
        "{{ raise_exception('no\x1b[31m\nsystem \u202erole') }}"))
    with pytest.raises(UserError) as e:
        Tokenizer.from_dir(where).chat(TALK)
    assert visible(str(e.value)) == (f"the chat template of {where} fails for this conversation: "
                            r"no\x1b[31m\nsystem \u202erole")


# ---------------------------------------------------------------- stop strings

def test_cut_at_stop():
    assert cut_at_stop("x = 1\nclass A\ndef f", ("\ndef", "\nclass", "\nif")) == "x = 1"
    assert cut_at_stop("\ndef f", ("\ndef",)) == ""
    assert cut_at_stop("x = 1", ("\ndef",)) == cut_at_stop("x = 1", ()) == "x = 1"


def test_stop_check_tells_the_token_that_completes_a_stop_string(homes):
    for t in every(homes):
        before = t.encode("the cat\n\n")  # holds the stop string, but is not new text
        for text, stops in (("a 日本\n\nthe", ("\n\n", "zz")), ("the 日 cat", ("日",))):
            ids = t.encode(text, continuation=True)
            stop = stop_check(t, before, stops)
            answers = [stop(i) for i in ids]
            first = answers.index(True)
            assert any(s in t.decode_new(before, ids[:first + 1]) for s in stops)
            assert not any(s in t.decode_new(before, ids[:first]) for s in stops)
        stop = stop_check(t, before, ("zz",))
        assert not any(stop(i) for i in ids) and not stop_check(t, before, ())(ids[0])


def test_a_panic_of_the_library_is_no_more_than_its_error(homes, tmp_path, capfd):
    charsmap = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    where = changed(homes, "qwen3", tmp_path, "tokenizer.json", normalizer=charsmap)
    with pytest.raises(UserError, match="tokenizer.json cannot be read as a tokenizer"):
        Tokenizer.from_dir(where)
    assert capfd.readouterr() == ("", "")


def test_an_id_around_a_text_that_no_token_has_is_refused(homes, tmp_path):
    token = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    processor = {"type": "TemplateProcessing", "pair": [token],
                 "single": [token, {"Sequence": {"id": "A", "type_id": 0}}],
                 "special_tokens": {"<s>": {"id": "<s>", "ids": [999_999], "tokens": ["<s>"]}}}
    where = changed(homes, "qwen3", tmp_path, "tokenizer.json", post_processor=processor)
    with pytest.raises(UserError, match="tokenizer.json puts id 999999 around a text"):
        Tokenizer.from_dir(where)


def test_a_chat_template_of_other_bytes_is_named(homes, tmp_path):
    where = changed(homes, "qwen3", tmp_path)
    for data, message in ((b"{{ messages }}\xff", "it is not UTF-8 text"), (b"", "it is empty"),
                          (b"<!DOCTYPE html>", "it is a web page")):
        (where / "chat_template.jinja").write_bytes(data)
        with pytest.raises(UserError, match=f"chat_template.jinja: {message}"):
            Tokenizer.from_dir(where).prompt("x", chat=True)
