"""convert_hf_checkpoint.py: the same logits and ids as before, little memory, clear errors."""
import functools
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Reference

import checkpoint
import common
import convert_hf_checkpoint
from checkpoint import load, read_config, write_weights
from common import UserError
from convert_hf_checkpoint import convert_tokenizer_json, plan
from helpers import (
    LINUX,
    edit_json,
    edit_weights,
    peak_memory,
    put,
    randomize,
    run_command,
    strings,
)
from tokenizer import LLAMA3_PATTERN, LLAMA3_SPECIAL, Tokenizer

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "tokenizers"
QWEN_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
SMALL = dict(vocab_size=400, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128)
LLAMA3 = dict(rope_type="llama3", rope_theta=5e4, factor=8.0, low_freq_factor=1.0,
              high_freq_factor=4.0, original_max_position_embeddings=32)
CASES = {
    "llama": transformers.LlamaConfig(**SMALL, rope_parameters=LLAMA3),
    "tied": transformers.LlamaConfig(**SMALL, tie_word_embeddings=True),
    "mistral": transformers.MistralConfig(**SMALL, sliding_window=None, head_dim=16),
    "qwen2": transformers.Qwen2Config(**SMALL),
}


@functools.cache
def byte_level(pattern, nfc=False) -> str:
    """A small tokenizer.json of byte-level BPE: Llama 3's or Qwen2's, without a pattern GPT-2's."""
    t = Reference(models.BPE())
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pattern:
        t.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    t.decoder = decoders.ByteLevel()
    t.normalizer = normalizers.NFC() if nfc else None
    t.train_from_iterator(strings(400, seed=7, rare=0.2), trainers.BpeTrainer(
        vocab_size=390, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    t.add_special_tokens(["<|begin|>", "<|end|>"])
    return t.to_str(pretty=True)


def hf_directory(path, name, **save):
    torch.manual_seed(0)
    model = randomize(transformers.AutoModelForCausalLM.from_config(CASES[name]))
    model.save_pretrained(path, **save)
    (path / "tokenizer.json").write_text(byte_level(LLAMA3_PATTERN))
    (path / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<|begin|>", "add_bos_token": True}))
    return model


def run_main(monkeypatch, directory, *more):
    run_command(monkeypatch, convert_hf_checkpoint, "--checkpoint_dir", directory / "hf", "--out",
                directory / "out", *more)


@pytest.mark.parametrize("name", CASES)
def test_logits_after_conversion(tmp_path, monkeypatch, name):
    theirs = hf_directory(tmp_path / "hf", name, max_shard_size="30KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 5  # q, k and v lie apart
    run_main(monkeypatch, tmp_path, "--dtype", "float32")
    ids = torch.randint(0, 400, (1, 100), generator=torch.Generator().manual_seed(1))
    ours = load(tmp_path / "out", dtype=torch.float32)
    logits, _ = ours(ids, torch.arange(100), ours.new_cache(100))
    torch.testing.assert_close(logits, theirs(ids).logits, atol=1e-4, rtol=1e-4)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "float32"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "out"]
    t = Tokenizer.from_dir(tmp_path / "out")
    assert t.encode("the cat")[0] == t.special["<|begin|>"]


def test_a_copy_of_the_tied_embedding_is_dropped(tmp_path, monkeypatch):
    hf_directory(tmp_path / "hf", "tied")
    edit_weights(tmp_path / "hf",
                 lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))
    run_main(monkeypatch, tmp_path)
    assert "output.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    load(tmp_path / "out")


@pytest.mark.parametrize("chunk", [1000, checkpoint.CHUNK])
@pytest.mark.parametrize("kind", [torch.float32, torch.float16])
def test_shards_and_dtypes(tmp_path, monkeypatch, kind, chunk):
    monkeypatch.setattr(checkpoint, "CHUNK", chunk)  # a few rows at a time, or a whole tensor
    hf_directory(tmp_path / "hf", "llama")

    def change(weights):
        weights.update({name: w.to(kind) for name, w in weights.items()})
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)

    edit_weights(tmp_path / "hf", change)
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    for dtype in (torch.bfloat16, torch.float32):
        out = tmp_path / str(dtype)
        out.mkdir()
        shutil.copy(tmp_path / "hf" / "config.json", out)
        write_weights(plan(tmp_path / "hf", read_config(tmp_path / "hf"), dtype), out,
                      shard_bytes=100_000)
        files = sorted(out.glob("*.safetensors"))
        shards = {f.name: load_file(f) for f in files}  # the official reader takes what we wrote
        assert len(files) > 2
        assert files[-1].name == f"model-{len(files):05}-of-{len(files):05}.safetensors"
        assert all(len(part) == 1 or sum(w.nbytes for w in part.values()) <= 100_000
                   for part in shards.values())
        held = {name: w for part in shards.values() for name, w in part.items()}
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index == {"metadata": {"total_size": sum(w.nbytes for w in held.values())},
                         "weight_map": {name: f for f, part in shards.items() for name in part}}
        qkv = [weights[f"model.layers.1.self_attn.{x}_proj.weight"] for x in "qkv"]
        assert torch.equal(load(out, dtype=dtype).layers[1].attn.wqkv.weight,
                           torch.cat(qkv).to(dtype))


# ---------------------------------------------------------------- tokenizer

def convert_tokenizer_file(directory, settings=None):
    for name, data in convert_tokenizer_json(directory / "tokenizer.json", settings or {}).items():
        (directory / name).write_bytes(data)
    return Tokenizer.from_dir(directory)


@pytest.mark.parametrize("pattern,nfc", [(LLAMA3_PATTERN, False), (QWEN_PATTERN, True),
                                         (None, False)], ids=["llama3", "qwen2", "gpt2"])
def test_tokenizer_json_keeps_its_ids(tmp_path, pattern, nfc):
    (tmp_path / "tokenizer.json").write_text(byte_level(pattern, nfc))
    reference = Reference.from_str(byte_level(pattern, nfc))
    ours = convert_tokenizer_file(tmp_path)
    assert ours.vocab_size == reference.get_vocab_size() and ours.bos_id is None
    for text in strings(2500, rare=0.2):
        assert ours.encode(text) == reference.encode(text).ids, text
    assert ours.special == {"<|begin|>": ours.vocab_size - 2, "<|end|>": ours.vocab_size - 1}
    if nfc:
        assert ours.encode("e\u0301") == ours.encode("\u00e9")


BEGINS = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 390)])


@pytest.mark.parametrize("post,settings,bos", [
    (None, {}, False),
    (BEGINS, {}, True),
    (processors.Sequence([processors.ByteLevel(), BEGINS]), {}, True),
    (processors.ByteLevel(), {}, False),
    (None, {"bos_token": "<|begin|>"}, False),
    (None, {"bos_token": "<|begin|>", "add_bos_token": True}, True),
    (None, {"bos_token": {"content": "<|begin|>"}, "add_bos_token": True}, True),
    (BEGINS, {"bos_token": "<|begin|>", "add_bos_token": False}, False),
])
def test_bos_token(tmp_path, post, settings, bos):
    reference = Reference.from_str(byte_level(LLAMA3_PATTERN))
    if post:
        reference.post_processor = post
    reference.save(str(tmp_path / "tokenizer.json"))
    ours = convert_tokenizer_file(tmp_path, settings)
    assert ours.bos_id == (ours.special["<|begin|>"] if bos else None)
    assert settings or ours.encode("the cat") == reference.encode("the cat").ids


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "llama-3").is_dir(),
                    reason="the real Llama 3 tokenizer is not here")
def test_real_llama3_vocabulary_through_tokenizer_json(tmp_path):
    from transformers.convert_slow_tokenizer import TikTokenConverter
    reference = TikTokenConverter(vocab_file=str(SHARED / "llama-3" / "tokenizer.model"),
                                  pattern=LLAMA3_PATTERN,
                                  extra_special_tokens=LLAMA3_SPECIAL).converted()
    reference.save(str(tmp_path / "tokenizer.json"))
    ours, real = convert_tokenizer_file(tmp_path), Tokenizer.from_dir(SHARED / "llama-3")
    written, published = (d / "tokenizer.model" for d in (tmp_path, SHARED / "llama-3"))
    assert written.read_bytes() == published.read_bytes()
    assert ours.special == real.special
    # Without special tokens, which Hugging Face's reads in plain text too.
    for text in strings(1500, rare=0.2):
        text = text.replace("<|eot_id|>", "<|eot|>")
        ids = reference.encode(text, add_special_tokens=False).ids
        assert ours.encode(text) == real.encode(text, bos=False) == ids, text
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    # No merge reaches 678 of its tokens; tiktoken finds them as whole words.
    spec["model"]["ignore_merges"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(UserError, match="by other merges"):
        convert_tokenizer_file(tmp_path)


def spec_with(**changes):
    """An edit of a tokenizer.json's keys, its model's among them."""
    def change(spec):
        for key, value in changes.items():
            (spec["model"] if key in spec["model"] else spec)[key] = value
        return spec
    return change


def in_model(change):
    def edit(spec):
        change(spec["model"])
        return spec
    return edit


def swap_two_ids(model):
    vocab = model["vocab"]
    a, b = sorted(vocab, key=vocab.get)[300:302]
    vocab[a], vocab[b] = vocab[b], vocab[a]


def another_cut(model):
    """"xyz" as x + yz, though x + y is joined first: Hugging Face never gets there, tiktoken would.
    """
    n = len(model["vocab"])
    model["vocab"] |= {"\u00dbK": 1000, "KQ": 1001, "\u00dbKQ": 1002}
    model["merges"] += [["\u00db", "K"], ["K", "Q"], ["\u00db", "KQ"]]
    assert len(model["vocab"]) == n + 3


def split_with(**changes):
    split = {"type": "Split", "pattern": {"Regex": LLAMA3_PATTERN}, "behavior": "Isolated",
             "invert": False} | changes
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    return spec_with(pre_tokenizer={"type": "Sequence", "pretokenizers": [split, bytes_]})


@pytest.mark.parametrize("change,message", [
    (spec_with(type="Unigram"), "not byte-level BPE"),
    (spec_with(byte_fallback=True), "not byte-level BPE"),
    (spec_with(dropout=0.1), "dropout = 0.1"),
    (in_model(lambda m: m["vocab"].update({"\u2581": 1000})), "not byte-level BPE"),
    (spec_with(end_of_word_suffix="</w>"), "end_of_word_suffix"),
    (spec_with(pre_tokenizer={"type": "Whitespace"}), "pre-tokenizer Whitespace"),
    (spec_with(pre_tokenizer=None), "pre-tokenizer none"),
    (spec_with(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True}),
     "pre-tokenizer ByteLevel"),
    (split_with(behavior="Removed"), "pre-tokenizer Split"),
    (split_with(invert=True), "pre-tokenizer Split"),
    (split_with(pattern={"String": " "}), "pre-tokenizer Split"),
    (split_with(pattern={"Regex": r"\p{L}+|(?<=a"}), "not one that tiktoken knows"),
    (split_with(pattern={"Regex": r"\p{L}+|\s+"}), "does not match every character"),
    (spec_with(normalizer={"type": "Lowercase"}), "normalizer Lowercase"),
    (spec_with(normalizer={"type": "NFKC"}), "normalizer NFKC"),
    (in_model(swap_two_ids), "do not follow the order of the merges"),
    (in_model(another_cut), "by other merges"),
    (in_model(lambda m: m["merges"].pop()), "by other merges"),
    (in_model(lambda m: m["vocab"].pop("".join(m["merges"][9]))),
     "not of tokens in the vocabulary"),
    (in_model(lambda m: m["vocab"].pop("\u00ff")), "no token for the byte 0xff"),
    (in_model(lambda m: m["vocab"].pop("\u0100")), "no token for the byte 0x00"),
    (in_model(lambda m: m["vocab"].update({"\u0430": 1000})), "is not made of bytes"),
    (in_model(lambda m: m["vocab"].update({"\u00ff": 0})), "two tokens have one id"),
    (lambda spec: [], "not an object|not a tokenizer.json"),
    (lambda spec: {"model": {}}, "not byte-level BPE"),
])
def test_tokenizers_that_would_differ_are_refused(tmp_path, change, message):
    spec = change(json.loads(byte_level(LLAMA3_PATTERN)))
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(UserError, match=message) as e:
        convert_tokenizer_json(tmp_path / "tokenizer.json", {})
    assert "tokenizer.json" in str(e.value) and "\n" not in str(e.value)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("hf") / "hf"
    hf_directory(path, "llama")
    return path


@pytest.mark.parametrize("damage,message", [
    (lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:-9]),
     "model.safetensors is damaged or truncated"),
    (lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"), "pytorch_model.bin"),
    (lambda d: (d / "model.safetensors").unlink(), "no model.safetensors"),
    (lambda d: (d / "model.safetensors.index.json").write_text(
        '{"weight_map": {"x": "model-00001-of-00002.safetensors"}}'),
     "model-00001-of-00002.safetensors is missing"),
    (lambda d: shutil.rmtree(d), "is not a directory"),
    (lambda d: [p.unlink() for p in d.iterdir()], "is empty"),
    (lambda d: (d / "config.json").unlink(), "config.json does not exist"),
    (lambda d: edit_json(d / "config.json", num_hidden_layers=3),
     "weight model.layers.2.input_layernorm.weight is missing"),
    (lambda d: edit_json(d / "config.json", num_hidden_layers=1),
     "weight model.layers.1.input_layernorm.weight has no place"),
    (lambda d: edit_json(d / "config.json", vocab_size=401),
     "weight model.embed_tokens.weight has shape [400, 64], config.json says [401, 64]"),
    (lambda d: edit_json(d / "config.json", hidden_size=None), "'hidden_size' is missing"),
    (lambda d: edit_json(d / "config.json", architectures=["GemmaForCausalLM"]),
     "'GemmaForCausalLM' is not supported"),
    (lambda d: edit_weights(d, lambda w: w.pop("lm_head.weight")),
     "weight lm_head.weight is missing"),
    (put({"model.layers.0.mlp.gate.weight": torch.zeros(3)}),
     "weight model.layers.0.mlp.gate.weight has no place"),
    # Right together, wrong apart: neither the sum of the rows nor the first part shows it.
    (put({"model.layers.1.mlp.gate_proj.weight": torch.zeros(90, 64),
          "model.layers.1.mlp.up_proj.weight": torch.zeros(102, 64)}),
     "weight model.layers.1.mlp.gate_proj.weight has shape"),
    (put({"model.layers.0.self_attn.v_proj.weight": torch.zeros(32, 60)}),
     "self_attn.v_proj.weight has shape [32, 60]"),
    (put({"model.norm.weight": torch.tensor(1.0)}), "model.norm.weight has shape []"),
    (put({"model.layers.0.mlp.up_proj.weight": torch.zeros(96, 64, dtype=torch.int8)}),
     "not quantized"),
    (lambda d: (d / "tokenizer.json").unlink(), "neither tokenizer.model nor tokenizer.json"),
    (lambda d: edit_json(d / "tokenizer_config.json", bos_token="<s>"), "BOS token '<s>'"),
    (lambda d: (d.parent / "out").mkdir(), "exists; remove it or choose another"),
])
def test_bad_input_is_one_line_and_leaves_nothing(source, tmp_path, damage, message, monkeypatch,
                                                  capsys):
    shutil.copytree(source, tmp_path / "hf")
    damage(tmp_path / "hf")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(checkpoint, "replacing", lambda path: pytest.fail("began to write"))
    with pytest.raises(SystemExit) as stop:
        run_main(monkeypatch, tmp_path)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and message in err and err.count("\n") == 1, err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_failed_write_leaves_nothing(source, tmp_path, monkeypatch, capsys):
    shutil.copytree(source, tmp_path / "hf")

    def full(*args):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(checkpoint, "write_safetensors", full)
    with pytest.raises(SystemExit):
        run_main(monkeypatch, tmp_path)
    assert "No space left" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("place", ["tokenizer.model", "original/tokenizer.model"])
def test_what_is_copied_and_the_default_dtype(source, tmp_path, monkeypatch, place):
    shutil.copytree(source, tmp_path / "hf")
    (tmp_path / "hf" / place).parent.mkdir(exist_ok=True)
    (tmp_path / "hf" / place).write_bytes(b"\x00any tokenizer")
    (tmp_path / "hf" / "chat_template.jinja").write_text("{{ messages }}")
    edit_json(tmp_path / "hf" / "config.json", some_key=5)
    run_main(monkeypatch, tmp_path)
    out = tmp_path / "out"
    assert {p.name for p in out.iterdir()} == {"config.json", "model.safetensors",
                                               "tokenizer.model", "tokenizer_config.json",
                                               "chat_template.jinja", "generation_config.json"}
    assert (out / "tokenizer.model").read_bytes() == b"\x00any tokenizer"
    theirs, ours = (json.loads((tmp_path / d / "config.json").read_text()) for d in ("hf", "out"))
    assert ours == theirs | {"dtype": "bfloat16", "torch_dtype": "bfloat16"}
    assert ours["some_key"] == 5
    assert {w.dtype for w in load_file(out / "model.safetensors").values()} == {torch.bfloat16}


# ---------------------------------------------------------------- memory and interruption

@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A checkpoint of 32 layers, 379 MB in bfloat16; k lies apart from q and v, gate from up."""
    path = tmp_path_factory.mktemp("large") / "hf"
    path.mkdir()
    dim, ffn, where = 768, 1536, {}
    hf = dict(architectures=["LlamaForCausalLM"], vocab_size=400, hidden_size=dim,
              num_hidden_layers=32, num_attention_heads=8, num_key_value_heads=8,
              intermediate_size=ffn, max_position_embeddings=128, rms_norm_eps=1e-5)

    def add(file, tensors):
        save_file(tensors, path / file)
        where.update(dict.fromkeys(tensors, file))

    w = lambda *shape: torch.ones(shape, dtype=torch.bfloat16)
    add("top.safetensors", {"model.embed_tokens.weight": w(400, dim), "lm_head.weight": w(400, dim),
                            "model.norm.weight": w(dim)})
    for i in range(32):
        p = f"model.layers.{i}."
        add(f"a{i}.safetensors", {p + f"self_attn.{x}_proj.weight": w(dim, dim) for x in "qvo"}
            | {p + "mlp.gate_proj.weight": w(ffn, dim)})
        add(f"b{i}.safetensors", {p + "self_attn.k_proj.weight": w(dim, dim),
                                  p + "mlp.up_proj.weight": w(ffn, dim),
                                  p + "mlp.down_proj.weight": w(dim, ffn),
                                  p + "input_layernorm.weight": w(dim),
                                  p + "post_attention_layernorm.weight": w(dim)})
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    (path / "config.json").write_text(json.dumps(hf))
    (path / "tokenizer.json").write_text(byte_level(LLAMA3_PATTERN))
    yield path
    shutil.rmtree(path.parent)


@pytest.mark.slow
@pytest.mark.skipif(not LINUX, reason="needs Linux's /proc")
def test_memory_does_not_grow_with_the_model(large, tmp_path):
    peak = peak_memory(f"""
from convert_hf_checkpoint import plan
config = read_config({str(large)!r})
shapes(config)  # the first use of the meta device loads about 70 MB of torch's Python
measure(lambda: write_weights(plan({str(large)!r}, config, torch.float32),
                              Path({str(tmp_path)!r}), shard_bytes=40_000_000))
""")
    size = sum(f.stat().st_size for f in large.glob("*.safetensors"))
    shutil.rmtree(tmp_path)
    # the largest part is 4.7 MB in float32, a shard 40 MB
    assert size > 3e8 and peak < 1.5e7, (size, peak)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_run_leaves_nothing_that_looks_finished(large, tmp_path, how):
    run = subprocess.Popen([sys.executable, ROOT / "convert_hf_checkpoint.py", "--checkpoint_dir",
                            large, "--out", tmp_path / "out", "--dtype", "float32"],
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                           # a background shell's children ignore SIGINT
                           preexec_fn=lambda: signal.signal(signal.SIGINT,
                                                            signal.default_int_handler))
    while not list(tmp_path.glob(".out.*/model.safetensors")) and run.poll() is None:
        time.sleep(0.002)
    run.send_signal(how)
    code = -how if how == signal.SIGKILL else 130
    assert run.wait() == code, "the run was over before it could be interrupted"
    left = [p.name for p in tmp_path.rglob("*")]
    assert "out" not in left and "config.json" not in left
    assert how == signal.SIGKILL or not left
    shutil.rmtree(tmp_path)


def test_an_interrupt_that_torch_turns_into_another_error():
    """As when Ctrl-C comes while torch makes a tensor: "could not determine the shape"."""
    def main():
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ValueError("could not determine the shape") from None
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit) as stop:
            common.run(main)
    finally:
        signal.signal(signal.SIGINT, before)
    assert stop.value.code == 130
