"""convert_hf_checkpoint.py: the same logits and the same ids after conversion, in little memory, or
one clear line.
"""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer as Reference, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

import cli
import convert_hf_checkpoint
from cli import UserError
from convert_hf_checkpoint import convert_tokenizer_json, plan, write_weights
from model import ModelConfig, load
from tokenizer import LLAMA3_PATTERN, LLAMA3_SPECIAL, Tokenizer

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "tokenizers"
QWEN_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
SMALL = dict(vocab_size=400, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=128)
LLAMA3 = dict(rope_type="llama3", rope_theta=5e4, factor=8.0, low_freq_factor=1.0,
              high_freq_factor=4.0, original_max_position_embeddings=32)
CASES = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SMALL, rope_parameters=LLAMA3)),
    "tied": (LlamaForCausalLM, LlamaConfig(**SMALL, tie_word_embeddings=True)),
    "mistral": (MistralForCausalLM, MistralConfig(**SMALL, sliding_window=None, head_dim=16)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SMALL)),
}


def strings(count, seed=0):
    """Words, digits, spaces, signs, several scripts, emoji, code and any character of Unicode:
    mixed at random.
    """
    rng = random.Random(seed)
    parts = ["the", " cat", " Hello", "12345", " 7", "\n", "\n\n", "   ", "\t", " don't", "I'LL",
             "été", "e\u0301", "日本語", " привет", "مرحبا", "👩‍👩‍👧", "🎉",
             "def f(x):", " ==", "!!!", "<|eot_id|>", "#", "_", "x" * 9, "\u00a0", "ﬁ", " a", "Z",
             "."]
    parts += [chr(rng.choice([rng.randrange(0x20, 0x500), rng.randrange(0x2000, 0x2100),
                              rng.randrange(0x4E00, 0x9FA5)])) for _ in range(300)]
    return ["".join(rng.choice(parts[:29] if rng.random() < 0.8 else parts)
                    for _ in range(rng.randrange(1, 12))) for _ in range(count)]


def byte_level(pattern, normalizer=None, alphabet=True):
    """A small byte-level BPE, as Llama 3's and Qwen2's tokenizer.json have it; without a pattern,
    as GPT-2's.
    """
    t = Reference(models.BPE())
    t.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"),
                                               pre_tokenizers.ByteLevel(add_prefix_space=False,
                                                                        use_regex=False)]) \
        if pattern else pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = decoders.ByteLevel()
    t.normalizer = normalizer
    t.train_from_iterator(strings(400, seed=7),
                          trainers.BpeTrainer(vocab_size=390,
                                              initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
                                              if alphabet else [], show_progress=False))
    t.add_special_tokens(["<|begin|>", "<|end|>"])
    return t


def hf_directory(path, name, **save):
    model_class, config = CASES[name]
    torch.manual_seed(0)
    model = model_class(config).eval().requires_grad_(False)
    for key, p in model.named_parameters():
        p.data.uniform_(0.5, 1.5) if "norm" in key else p.data.normal_(0, 0.2)
    model.save_pretrained(path, **save)
    byte_level(LLAMA3_PATTERN).save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<|begin|>", "add_bos_token": True}))
    return model


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(directory, change):
    """Rewrite model.safetensors after `change(weights)`, which changes the dict in place."""
    weights = load_file(directory / "model.safetensors")
    weights = {name: w.clone() for name, w in weights.items()}
    change(weights)
    save_file(weights, directory / "model.safetensors")


def convert(*args):
    return subprocess.run([sys.executable, ROOT / "convert_hf_checkpoint.py", *map(str, args)],
                          capture_output=True, text=True)


@pytest.mark.parametrize("name", CASES)
def test_logits_after_conversion(tmp_path, name):
    theirs = hf_directory(tmp_path / "hf", name, max_shard_size="30KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 5  # q, k and v lie apart
    done = convert("--checkpoint_dir", tmp_path / "hf", "--out", tmp_path / "ours", "--dtype",
                   "float32")
    assert done.returncode == 0, done.stderr
    ids = torch.randint(0, 400, (1, 100), generator=torch.Generator().manual_seed(1))
    ours = load(tmp_path / "ours", dtype=torch.float32)
    logits, _ = ours(ids, torch.arange(100), ours.new_cache(100))
    torch.testing.assert_close(logits, theirs(ids).logits, atol=1e-4, rtol=1e-4)
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["torch_dtype"] == "float32"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "ours"]
    t = Tokenizer.from_dir(tmp_path / "ours")
    assert t.encode("the cat")[0] == t.special["<|begin|>"]


def test_a_copy_of_the_tied_embedding_is_dropped(tmp_path, monkeypatch):
    hf_directory(tmp_path / "hf", "tied")
    edit_weights(tmp_path / "hf",
                 lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))
    run_main(monkeypatch, tmp_path)
    assert "output.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    load(tmp_path / "out")


@pytest.mark.parametrize("kind", ["float32", "float16"])
def test_shards_and_dtypes(tmp_path, kind):
    hf_directory(tmp_path / "hf", "llama")
    weights = {name: w.clone().to(getattr(torch, kind)) for name,
               w in load_file(tmp_path / "hf" / "model.safetensors").items()}
    save_file(weights | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)},
              tmp_path / "hf" / "model.safetensors")
    for dtype in (torch.bfloat16, torch.float32):
        out = tmp_path / str(dtype)
        out.mkdir()
        shutil.copy(tmp_path / "hf" / "config.json", out)
        write_weights(plan(tmp_path / "hf", ModelConfig.from_dir(tmp_path / "hf"), dtype), out,
                      shard_bytes=100_000)
        files = sorted(out.glob("*.safetensors"))
        assert len(files) > 2 and files[
            -1].name == f"model-{len(files):05}-of-{len(files):05}.safetensors"
        index = json.loads((out / "model.safetensors.index.json").read_text())
        # the official reader takes what we wrote
        held = {name: w for f in files for name, w in load_file(f).items()}
        assert index["weight_map"] == {name: f.name for f in files for name in load_file(f)}
        assert index["metadata"]["total_size"] == sum(w.nbytes for w in held.values())
        assert all(sum(w.nbytes for w in load_file(f).values()) <= 100_000 or len(load_file(f)) == 1
                   for f in files)
        want = torch.cat([weights[f"model.layers.1.self_attn.{x}_proj.weight"] for x in "qkv"]).to(
            dtype)
        assert torch.equal(load(out, dtype=dtype).layers[1].attn.wqkv.weight, want)


# ---------------------------------------------------------------- tokenizer

def convert_tokenizer_file(directory, settings={}):
    for name, data in convert_tokenizer_json(directory / "tokenizer.json", settings).items():
        (directory / name).write_bytes(data)
    return Tokenizer.from_dir(directory)


@pytest.mark.parametrize("pattern,normalizer",
                         [(LLAMA3_PATTERN, None), (QWEN_PATTERN, normalizers.NFC()), (None, None)],
                         ids=["llama3", "qwen2", "gpt2"])
def test_tokenizer_json_keeps_its_ids(tmp_path, pattern, normalizer):
    reference = byte_level(pattern, normalizer)
    reference.save(str(tmp_path / "tokenizer.json"))
    ours = convert_tokenizer_file(tmp_path)
    assert ours.vocab_size == reference.get_vocab_size() and ours.bos_id is None
    for text in strings(2500):
        assert ours.encode(text) == reference.encode(text).ids, text
    assert ours.special == {"<|begin|>": ours.vocab_size - 2, "<|end|>": ours.vocab_size - 1}
    if normalizer:
        assert ours.encode("e\u0301") == ours.encode("\u00e9")


BEGINS = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 390)])


@pytest.mark.parametrize("post,settings,bos", [
    (None, {}, False), (BEGINS, {}, True), (processors.Sequence([processors.ByteLevel(), BEGINS]),
                                            {}, True), (processors.ByteLevel(), {}, False),
    (None, {"bos_token": "<|begin|>"}, False),
    (None, {"bos_token": "<|begin|>", "add_bos_token": True}, True),
    (None, {"bos_token": {"content": "<|begin|>"}, "add_bos_token": True}, True),
    (BEGINS, {"bos_token": "<|begin|>", "add_bos_token": False}, False),
])
def test_begin_token(tmp_path, post, settings, bos):
    reference = byte_level(LLAMA3_PATTERN)
    if post:
        reference.post_processor = post
    reference.save(str(tmp_path / "tokenizer.json"))
    ours = convert_tokenizer_file(tmp_path, settings)
    assert ours.bos_id == (ours.special["<|begin|>"] if bos else None)
    assert settings or ours.encode("the cat") == reference.encode("the cat").ids


@pytest.mark.skipif(not (SHARED / "llama-3").is_dir(), reason="the real Llama 3 tokenizer is not "
                    "here")
def test_real_llama3_vocabulary_through_tokenizer_json(tmp_path):
    from transformers.convert_slow_tokenizer import TikTokenConverter
    reference = TikTokenConverter(vocab_file=str(SHARED / "llama-3" / "tokenizer.model"),
                                  pattern=LLAMA3_PATTERN,
                                  extra_special_tokens=LLAMA3_SPECIAL).converted()
    reference.save(str(tmp_path / "tokenizer.json"))
    ours, real = convert_tokenizer_file(tmp_path), Tokenizer.from_dir(SHARED / "llama-3")
    assert (tmp_path / "tokenizer.model").read_bytes() == (SHARED / "llama-3"
                                                           / "tokenizer.model").read_bytes()
    assert ours.special == real.special
    # none may read a special token in plain text, as Hugging Face's does
    for text in strings(1500):
        text = text.replace("<|eot_id|>", "<|eot|>")
        assert ours.encode(text) == real.encode(text, bos=False) == reference.encode(
            text, add_special_tokens=False).ids, text
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    # 678 of its tokens no merge reaches; tiktoken finds them as whole words
    spec["model"]["ignore_merges"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(UserError, match="by other merges"):
        convert_tokenizer_file(tmp_path)


def spec_with(**changes):
    def change(spec):
        for key, value in changes.items():
            spec["model" if key in spec["model"]
                 else key] = (spec["model"] | {key: value}) if key in spec["model"] else value
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
    """"xyz" as x + yz, though x + y is joined before: Hugging Face never gets there, tiktoken
    would.
    """
    n = len(model["vocab"])
    model["vocab"] |= {"\u00dbK": 1000, "KQ": 1001, "\u00dbKQ": 1002}
    model["merges"] += [["\u00db", "K"], ["K", "Q"], ["\u00db", "KQ"]]
    assert len(model["vocab"]) == n + 3


def split_with(**changes):
    split = {"type": "Split", "pattern": {"Regex": LLAMA3_PATTERN}, "behavior": "Isolated",
             "invert": False} | changes
    return spec_with(pre_tokenizer={"type": "Sequence",
                                    "pretokenizers": [split,
                                                      {"type": "ByteLevel",
                                                       "add_prefix_space": False,
                                                       "use_regex": False}]})


@pytest.mark.parametrize("change,message", [
    (spec_with(type="Unigram"), "not byte-level BPE"),
    (spec_with(byte_fallback=True), "not byte-level BPE"),
    (spec_with(dropout=0.1), "dropout = 0.1"),
    (in_model(lambda m: m["vocab"].update({"\u2581": 1000})), "not byte-level BPE"),
    (spec_with(end_of_word_suffix="</w>"), "end_of_word_suffix"),
    (spec_with(pre_tokenizer={"type": "Whitespace"}), "pre-tokenizer Whitespace"),
    (spec_with(pre_tokenizer=None), "pre-tokenizer none"),
    (spec_with(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True}), "pre-tokenizer "
     "ByteLevel"),
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
    (in_model(lambda m: m["vocab"].pop("".join(m["merges"][9]))), "not of tokens in the "
     "vocabulary"),
    (in_model(lambda m: m["vocab"].pop("\u00ff")), "no token for the byte 0xff"),
    (in_model(lambda m: m["vocab"].update({"\u0430": 1000})), "is not made of bytes"),
    (in_model(lambda m: m["vocab"].update({"\u00ff": 0})), "two tokens have one id"),
    (lambda spec: [], "not an object|not a tokenizer.json"),
    (lambda spec: {"model": {}}, "not byte-level BPE"),
])
def test_tokenizers_that_would_differ_are_refused(tmp_path, change, message):
    byte_level(LLAMA3_PATTERN).save(str(tmp_path / "tokenizer.json"))
    spec = change(json.loads((tmp_path / "tokenizer.json").read_text()))
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(UserError, match=message) as e:
        convert_tokenizer_json(tmp_path / "tokenizer.json", {})
    assert "tokenizer.json" in str(e.value) and "\n" not in str(e.value)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("hf") / "hf"
    hf_directory(path, "llama")
    return path


def run_main(monkeypatch, directory, *more):
    monkeypatch.setattr(sys, "argv", ["convert", "--checkpoint_dir", str(directory / "hf"), "--out",
                                      str(directory / "out"), *more])
    cli.run(convert_hf_checkpoint.main)


@pytest.mark.parametrize("damage,message", [
    (lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:-9]),
     "model.safetensors is damaged or truncated"),
    (lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"), "pytorch_model.bin"),
    (lambda d: (d / "model.safetensors").unlink(), "no model.safetensors"),
    (lambda d: (d / "model.safetensors.index.json").write_text('{"weight_map": {"x": '
                                                               '"model-00001-of-00002.safetensors"}}'), "model-00001-of-00002.safetensors is missing"),
    (lambda d: shutil.rmtree(d), "is not a directory"),
    (lambda d: [p.unlink() for p in d.iterdir()], "is empty"),
    (lambda d: (d / "config.json").unlink(), "config.json does not exist"),
    (lambda d: edit_json(d / "config.json", num_hidden_layers=3),
     "weight model.layers.2.input_layernorm.weight is missing"),
    (lambda d: edit_json(d / "config.json", num_hidden_layers=1),
     "weight model.layers.1.input_layernorm.weight has no place"),
    (lambda d: edit_json(d / "config.json", vocab_size=401), "weight model.embed_tokens.weight "
     "has shape [400, 64], config.json says [401, 64]"),
    (lambda d: edit_json(d / "config.json", hidden_size=None), "'hidden_size' is missing"),
    (lambda d: edit_json(d / "config.json", architectures=["GemmaForCausalLM"]),
     "'GemmaForCausalLM' is not supported"),
    (lambda d: edit_weights(d, lambda w: w.pop("lm_head.weight")), "weight lm_head.weight is "
     "missing"),
    (lambda d: edit_weights(d,
                            lambda w: w.update({"model.layers.0.mlp.gate.weight": torch.zeros(3)})),
     "weight model.layers.0.mlp.gate.weight has no place"),
    # Right together, wrong apart: the sum of the rows, and the rows of the first part alone, would
    # not show it.
    (lambda d: edit_weights(d,
                            lambda w: w.update({"model.layers.1.mlp.gate_proj.weight": torch.zeros(
                                90, 64), "model.layers.1.mlp.up_proj.weight": torch.zeros(
                                    102, 64)})),
     "weight model.layers.1.mlp.gate_proj.weight has shape"),
    (lambda d: edit_weights(d,
                            lambda w: w.update(
                                {"model.layers.0.self_attn.v_proj.weight": torch.zeros(32, 60)})),
     "self_attn.v_proj.weight has shape [32, 60]"),
    (lambda d: edit_weights(d, lambda w: w.update({"model.norm.weight": torch.tensor(1.0)})),
     "model.norm.weight has shape []"),
    (lambda d: edit_weights(d,
                            lambda w: w.update({"model.layers.0.mlp.up_proj.weight": torch.zeros(
                                96, 64, dtype=torch.int8)})), "not quantized"),
    (lambda d: (d / "tokenizer.json").unlink(), "neither tokenizer.model nor tokenizer.json"),
    (lambda d: edit_json(d / "tokenizer_config.json", bos_token="<s>"), "begin token '<s>'"),
    (lambda d: (d.parent / "out").mkdir(), "exists; remove it or choose another"),
])
def test_bad_input_is_one_line_and_leaves_nothing(source, tmp_path, damage, message, monkeypatch,
                                                  capsys):
    shutil.copytree(source, tmp_path / "hf")
    damage(tmp_path / "hf")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(convert_hf_checkpoint, "replacing",
                        lambda path: pytest.fail("began to write"))
    with pytest.raises(SystemExit) as stop:
        run_main(monkeypatch, tmp_path)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and message in err and err.count("\n") == 1, err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_failed_write_leaves_nothing(source, tmp_path, monkeypatch, capsys):
    shutil.copytree(source, tmp_path / "hf")

    def full(*args):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(convert_hf_checkpoint, "write_safetensors", full)
    with pytest.raises(SystemExit):
        run_main(monkeypatch, tmp_path)
    assert "No space left" in capsys.readouterr().err and [p.name for p in tmp_path.iterdir()] == [
        "hf"]


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
    assert ours == theirs | {"dtype": "bfloat16",
                             "torch_dtype": "bfloat16"} and ours["some_key"] == 5
    assert {w.dtype for w in load_file(out / "model.safetensors").values()} == {torch.bfloat16}


# ---------------------------------------------------------------- memory and interruption

@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A checkpoint of 32 layers, 379 MB in bfloat16; k lies apart from q and v, and gate from up.
    """
    path = tmp_path_factory.mktemp("large") / "hf"
    path.mkdir()
    dim, ffn, where = 768, 1536, {}
    hf = dict(architectures=["LlamaForCausalLM"], vocab_size=400, hidden_size=dim,
              num_hidden_layers=32, num_attention_heads=8, num_key_value_heads=8,
                intermediate_size=ffn, max_position_embeddings=128, rms_norm_eps=1e-5)

    def add(file, tensors):
        save_file(tensors, path / file)
        where.update({name: file for name in tensors})

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
    byte_level(LLAMA3_PATTERN).save(str(path / "tokenizer.json"))
    yield path
    shutil.rmtree(path.parent)


PEAK = """
import sys, threading, torch
from pathlib import Path
from convert_hf_checkpoint import plan, write_weights
from model import ModelConfig, Transformer
source, out = map(Path, sys.argv[1:3])
anonymous = lambda: next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith("RssAnon"))
config = ModelConfig.from_dir(source)
with torch.device("meta"):
    Transformer(config)  # the first use of the meta device loads about 70 MB of torch's Python
start, peak, done = anonymous(), 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.001):
        peak = max(peak, anonymous())
thread = threading.Thread(target=watch)
thread.start()
write_weights(plan(source, config, getattr(torch, sys.argv[3])), out, shard_bytes=40_000_000)
done.set(), thread.join()
print(peak - start)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_does_not_grow_with_the_model(large, tmp_path):
    """The pages of mapped input files are the system's to take back; what counts is the memory that
    nothing else holds.
    """
    # glibc otherwise keeps up to 32 MB of freed tensors at hand, more or less by chance, whatever
    # the model's size.
    glibc = {"MALLOC_MMAP_THRESHOLD_": "1000000", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run([sys.executable, "-c", PEAK, large, tmp_path, "float32"], cwd=ROOT,
                          env=os.environ | glibc, capture_output=True, text=True, check=True)
    size = sum(f.stat().st_size for f in large.glob("*.safetensors"))
    peak = int(done.stdout)
    shutil.rmtree(tmp_path)
    # the largest part is 4.7 MB in float32, a shard 40 MB
    assert size > 3e8 and peak < 1.5e7, (size, peak)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_run_leaves_nothing_that_looks_finished(large, tmp_path, how):
    run = subprocess.Popen([sys.executable, ROOT / "convert_hf_checkpoint.py", "--checkpoint_dir",
                            large, "--out", tmp_path / "out", "--dtype", "float32"],
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                           # a background shell ignores it
                           preexec_fn=lambda: signal.signal(signal.SIGINT,
                                                            signal.default_int_handler))
    while not list(tmp_path.glob(".out.*/model.safetensors")) and run.poll() is None:
        time.sleep(0.002)
    run.send_signal(how)
    assert run.wait() == (-how if how == signal.SIGKILL
                          else 130), "the run was over before it could be interrupted"
    left = [p.name for p in tmp_path.rglob("*")]
    assert "out" not in left and "config.json" not in left
    assert how == signal.SIGKILL or not left
    shutil.rmtree(tmp_path)


def test_an_interrupt_that_torch_makes_another_error_of_is_still_an_interrupt():
    """As torch does when Ctrl-C comes while it makes a tensor of a file's bytes: "could not
    determine the shape".
    """
    def main():
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ValueError("could not determine the shape") from None
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit) as stop:
            cli.run(main)
    finally:
        signal.signal(signal.SIGINT, before)
    assert stop.value.code == 130
