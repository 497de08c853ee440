"""convert_hf_checkpoint.py: the same logits and the same ids after conversion, in little memory, or one clear line."""
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer as Reference, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from cli import UserError
from convert_hf_checkpoint import convert_tokenizer_json, convert_weights
from model import ModelConfig, load
from tokenizer import LLAMA3_PATTERN, Tokenizer

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "tokenizers"
QWEN_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
SMALL = dict(vocab_size=400, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=128)
LLAMA3 = dict(rope_type="llama3", rope_theta=5e4, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
CASES = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SMALL, rope_parameters=LLAMA3)),
    "tied": (LlamaForCausalLM, LlamaConfig(**SMALL, tie_word_embeddings=True)),
    "mistral": (MistralForCausalLM, MistralConfig(**SMALL, sliding_window=None, head_dim=16)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SMALL)),
}


def strings(count, seed=0):
    """Words, digits, spaces, signs, several scripts, emoji, code: mixed at random."""
    rng = random.Random(seed)
    parts = ["the", " cat", " Hello", "12345", " 7", "\n", "\n\n", "   ", "\t", " don't", "I'LL", "été", "e\u0301", "日本語", " привет", "مرحبا", "👩‍👩‍👧", "🎉",
             "def f(x):", " ==", "!!!", "<|eot_id|>", "#", "_", "x" * 9, "\u00a0", "ﬁ", " a", "Z", "."]
    return ["".join(rng.choice(parts) for _ in range(rng.randrange(1, 12))) for _ in range(count)]


def byte_level(pattern, normalizer=None):
    """A small byte-level BPE, as Llama 3's and Qwen2's tokenizer.json have it."""
    t = Reference(models.BPE())
    t.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    t.decoder = decoders.ByteLevel()
    t.normalizer = normalizer
    t.train_from_iterator(strings(400, seed=7), trainers.BpeTrainer(vocab_size=390, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
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
    (path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<|begin|>", "add_bos_token": True}))
    return model


def convert(*args):
    return subprocess.run([sys.executable, ROOT / "convert_hf_checkpoint.py", *map(str, args)], capture_output=True, text=True)


@pytest.mark.parametrize("name", CASES)
def test_logits_after_conversion(tmp_path, name):
    theirs = hf_directory(tmp_path / "hf", name, max_shard_size="30KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 5  # q, k and v lie apart
    done = convert("--checkpoint_dir", tmp_path / "hf", "--out", tmp_path / "ours", "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    ids = torch.randint(0, 400, (1, 100), generator=torch.Generator().manual_seed(1))
    ours = load(tmp_path / "ours", dtype=torch.float32)
    logits, _ = ours(ids, torch.arange(100), 100, ours.new_cache(100))
    torch.testing.assert_close(logits, theirs(ids).logits, atol=1e-4, rtol=1e-4)
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["torch_dtype"] == "float32"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "ours"]
    t = Tokenizer.from_dir(tmp_path / "ours")
    assert t.encode("the cat")[0] == t.special["<|begin|>"]


def test_shards_and_dtypes(tmp_path):
    model_class, config = CASES["llama"]
    hf_directory(tmp_path / "hf", "llama")
    (tmp_path / "half").mkdir()
    from safetensors.torch import load_file
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    save_file({k: v.half() for k, v in weights.items()} | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}, tmp_path / "half" / "model.safetensors")
    config = ModelConfig.from_dir(tmp_path / "hf")
    for source, dtype in (("hf", torch.bfloat16), ("half", torch.float32), ("half", torch.bfloat16)):
        out = tmp_path / f"{source} {dtype}"
        out.mkdir()
        convert_weights(tmp_path / source, out, config, dtype, shard_bytes=50_000)
        assert len(list(out.glob("model-*-of-*.safetensors"))) > 2
        (out / "config.json").write_text((tmp_path / "hf" / "config.json").read_text())
        want = weights["lm_head.weight"].half().to(dtype) if source == "half" else weights["lm_head.weight"].to(dtype)
        assert torch.equal(load(out, dtype=dtype).output.weight, want)


@pytest.mark.parametrize("pattern,normalizer", [(LLAMA3_PATTERN, None), (QWEN_PATTERN, normalizers.NFC())])
def test_tokenizer_json_keeps_its_ids(tmp_path, pattern, normalizer):
    reference = byte_level(pattern, normalizer)
    reference.save(str(tmp_path / "tokenizer.json"))
    convert_tokenizer_json(tmp_path / "tokenizer.json", {}, tmp_path)
    ours = Tokenizer.from_dir(tmp_path)
    assert ours.vocab_size == reference.get_vocab_size() and ours.bos_id is None
    for text in strings(3000):
        assert ours.encode(text) == reference.encode(text).ids, text
    assert ours.special == {"<|begin|>": ours.vocab_size - 2, "<|end|>": ours.vocab_size - 1}


@pytest.mark.skipif(not (SHARED / "llama-3").is_dir(), reason="the real Llama 3 tokenizer is not here")
def test_real_llama3_vocabulary_through_tokenizer_json(tmp_path):
    from transformers.convert_slow_tokenizer import TikTokenConverter
    reference = TikTokenConverter(vocab_file=str(SHARED / "llama-3" / "tokenizer.model"), pattern=LLAMA3_PATTERN).converted()
    reference.save(str(tmp_path / "tokenizer.json"))
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    if spec["pre_tokenizer"]["pretokenizers"][1].get("use_regex"):  # the converter leaves out what the published file says
        spec["pre_tokenizer"]["pretokenizers"][1]["use_regex"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    convert_tokenizer_json(tmp_path / "tokenizer.json", {}, tmp_path)
    ours, real = Tokenizer.from_dir(tmp_path), Tokenizer.from_dir(SHARED / "llama-3")
    assert all(ours.encode(s, bos=False) == real.encode(s, bos=False) for s in strings(1000))
    assert (tmp_path / "tokenizer.model").read_bytes() == (SHARED / "llama-3" / "tokenizer.model").read_bytes()


def spec_with(**changes):
    def change(spec):
        for key, value in changes.items():
            spec["model" if key in spec["model"] else key] = (spec["model"] | {key: value}) if key in spec["model"] else value
        return spec
    return change


def swap_two_ids(spec):
    vocab = spec["model"]["vocab"]
    a, b = sorted(vocab, key=vocab.get)[300:302]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    return spec


@pytest.mark.parametrize("change,message", [
    (spec_with(type="Unigram"), "not byte-level BPE"), (spec_with(byte_fallback=True), "not byte-level BPE"), (spec_with(dropout=0.1), "not byte-level BPE"),
    (spec_with(pre_tokenizer={"type": "Whitespace"}), "pre-tokenizer Whitespace"), (spec_with(pre_tokenizer=None), "pre-tokenizer none"),
    (spec_with(normalizer={"type": "Lowercase"}), "normalizer Lowercase"), (swap_two_ids, "do not follow the order of the merges"),
])
def test_tokenizers_that_would_differ_are_refused(tmp_path, change, message):
    byte_level(LLAMA3_PATTERN).save(str(tmp_path / "tokenizer.json"))
    spec = change(json.loads((tmp_path / "tokenizer.json").read_text()))
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(UserError, match=message):
        convert_tokenizer_json(tmp_path / "tokenizer.json", {}, tmp_path)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("hf") / "hf"
    hf_directory(path, "llama")
    return path


@pytest.mark.parametrize("damage,message", [
    (lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:-9]), "model.safetensors is damaged or truncated"),
    (lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"), "pytorch_model.bin"),
    (lambda d: (d / "config.json").unlink(), "config.json does not exist"),
    (lambda d: (d / "config.json").write_text(json.dumps(json.loads((d / "config.json").read_text()) | {"num_hidden_layers": 3})), "layers.2"),
    (lambda d: (d / "config.json").write_text(json.dumps(json.loads((d / "config.json").read_text()) | {"num_hidden_layers": 1})), "layers.1"),
    (lambda d: (d / "config.json").write_text(json.dumps(json.loads((d / "config.json").read_text()) | {"vocab_size": 401})), "config.json asks for"),
    (lambda d: (d / "tokenizer.json").unlink(), "neither tokenizer.model nor tokenizer.json"),
    (lambda d: (d.parent / "out").mkdir(), "exists"),
])
def test_bad_input_is_one_line_and_leaves_nothing(source, tmp_path, damage, message, monkeypatch, capsys):
    import shutil
    import cli
    import convert_hf_checkpoint
    shutil.copytree(source, tmp_path / "hf")
    damage(tmp_path / "hf")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(sys, "argv", ["convert", "--checkpoint_dir", str(tmp_path / "hf"), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stop:
        cli.run(convert_hf_checkpoint.main)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and message in err and err.count("\n") == 1, err
    assert sorted(tmp_path.rglob("*")) == before


def synthetic(path, layers):
    """A checkpoint of one shard a layer, 8.4 MB each, written without holding it."""
    path.mkdir()
    dim, ffn = 512, 1024
    hf = dict(architectures=["LlamaForCausalLM"], vocab_size=256, hidden_size=dim, num_hidden_layers=layers, num_attention_heads=8, num_key_value_heads=8,
              intermediate_size=ffn, max_position_embeddings=128, rms_norm_eps=1e-5)
    where = {}

    def add(file, tensors):
        save_file(tensors, path / file)
        where.update({name: file for name in tensors})

    b = lambda *shape: torch.randn(shape).to(torch.bfloat16)
    add("top.safetensors", {"model.embed_tokens.weight": b(256, dim), "lm_head.weight": b(256, dim), "model.norm.weight": b(dim)})
    for i in range(layers):
        p = f"model.layers.{i}."
        add(f"layer{i}.safetensors", {p + f"self_attn.{x}_proj.weight": b(dim, dim) for x in "qkvo"} | {
            p + "mlp.gate_proj.weight": b(ffn, dim), p + "mlp.up_proj.weight": b(ffn, dim), p + "mlp.down_proj.weight": b(dim, ffn),
            p + "input_layernorm.weight": b(dim), p + "post_attention_layernorm.weight": b(dim)})
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    (path / "config.json").write_text(json.dumps(hf))
    byte_level(LLAMA3_PATTERN).save(str(path / "tokenizer.json"))
    return sum(f.stat().st_size for f in path.glob("*.safetensors"))


PEAK = """
import sys, threading, torch
from pathlib import Path
from convert_hf_checkpoint import convert_weights
from model import ModelConfig
source, out = map(Path, sys.argv[1:])
anonymous = lambda: next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith("RssAnon"))
start, peak, done = anonymous(), 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.001):
        peak = max(peak, anonymous())
thread = threading.Thread(target=watch)
thread.start()
convert_weights(source, out, ModelConfig.from_dir(source), torch.bfloat16, shard_bytes=20_000_000)
done.set(), thread.join()
print(peak - start)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_does_not_grow_with_the_model(tmp_path):
    size = synthetic(tmp_path / "hf", 24)
    (tmp_path / "out").mkdir()
    peak = int(subprocess.run([sys.executable, "-c", PEAK, tmp_path / "hf", tmp_path / "out"], cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    assert size > 1.2e8 and peak < 4e7, (size, peak)


def test_a_killed_run_leaves_nothing_that_looks_finished(tmp_path):
    synthetic(tmp_path / "hf", 24)
    run = subprocess.Popen([sys.executable, ROOT / "convert_hf_checkpoint.py", "--checkpoint_dir", tmp_path / "hf", "--out", tmp_path / "out"],
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(tmp_path.glob(".out.*/model.safetensors")) and run.poll() is None:
        time.sleep(0.002)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL, "the run was over before it could be killed"
    assert not (tmp_path / "out").exists()
