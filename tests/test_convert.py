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

import checkpoint
import common
import convert_hf_checkpoint
from checkpoint import load, read_config, write_weights
from convert_hf_checkpoint import plan
from families import FAMILIES, sentencepiece_model
from helpers import (
    LINUX,
    edit_json,
    edit_weights,
    peak_memory,
    put,
    randomize,
    run_command,
)
from tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
SMALL = dict(vocab_size=425, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
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
def hf_directory(path, name, **save):
    torch.manual_seed(0)
    model = randomize(transformers.AutoModelForCausalLM.from_config(CASES[name]))
    model.save_pretrained(path, **save)
    generation = (path / "generation_config.json").read_text()
    FAMILIES["llama3"](path)  # with a config.json for AutoTokenizer
    model.config.save_pretrained(path)
    (path / "generation_config.json").write_text(generation)
    return model


def run_main(monkeypatch, directory, *more):
    run_command(monkeypatch, convert_hf_checkpoint, "--checkpoint_dir", directory / "hf", "--out",
                directory / "out", *more)


@pytest.mark.parametrize("name", CASES)
def test_logits_after_conversion(tmp_path, monkeypatch, name):
    theirs = hf_directory(tmp_path / "hf", name, max_shard_size="30KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 5  # q, k and v lie apart
    run_main(monkeypatch, tmp_path, "--dtype", "float32")
    ids = torch.randint(0, 425, (1, 100), generator=torch.Generator().manual_seed(1))
    ours = load(tmp_path / "out", dtype=torch.float32)
    logits, _ = ours(ids, torch.arange(100), ours.new_cache(100))
    torch.testing.assert_close(logits, theirs(ids).logits, atol=1e-4, rtol=1e-4)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "float32"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "out"]
    hf, out = (Tokenizer.from_dir(tmp_path / name) for name in ("hf", "out"))
    assert out.encode("the cat") == hf.encode("the cat") and not out.difference(hf)


def test_a_copy_of_the_tied_embedding_is_dropped(tmp_path, monkeypatch):
    hf_directory(tmp_path / "hf", "tied")
    edit_weights(tmp_path / "hf",
                 lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))
    run_main(monkeypatch, tmp_path)
    assert "output.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    load(tmp_path / "out")


@pytest.mark.parametrize("chunk", [1000, checkpoint.CHUNK])
@pytest.mark.parametrize("saved", ["another head", "the head only"])
def test_tied_in_config_json_but_not_in_the_file(tmp_path, monkeypatch, capsys, saved, chunk):
    monkeypatch.setattr(checkpoint, "CHUNK", chunk)
    hf_directory(tmp_path / "hf", "tied")

    def change(weights):
        embed = weights["model.embed_tokens.weight"]
        if saved == "the head only":
            weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
        else:
            weights["lm_head.weight"] = embed + (torch.arange(425) == 424)[:, None]  # its last row
    edit_weights(tmp_path / "hf", change)
    run_main(monkeypatch, tmp_path, "--dtype", "float32")
    kept = "lm_head.weight differs from the embedding, so both are kept" in capsys.readouterr().err
    assert kept == (saved == "another head") != read_config(tmp_path / "out").tied
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    ours, ids = load(tmp_path / "out", dtype=torch.float32), torch.arange(20)
    with torch.no_grad():
        want = theirs(ids[None]).logits
    torch.testing.assert_close(ours(ids[None], ids, ours.new_cache(20))[0], want, atol=1e-4,
                               rtol=1e-4)


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


# ---------------------------------------------------------------- what is copied and refused

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:ab12\nsize 499723\n"


def rename(change):
    """A function that gives a checkpoint's tensors other names."""
    def edit(weights):
        renamed = {change(name): w for name, w in weights.items()}
        weights.clear()
        weights.update(renamed)
    return lambda directory: edit_weights(directory, edit)


def index_with(name):
    """A function that makes a checkpoint's index name a file."""
    return lambda directory: ((directory / "model.safetensors").unlink(), (
        directory / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"x": name}})))


def only(name):
    """A function that gives a checkpoint's weights another file name."""
    return lambda directory: (directory / "model.safetensors").rename(directory / name)


def convert(directory):
    subprocess.run([sys.executable, ROOT / "convert_hf_checkpoint.py", "--checkpoint_dir",
                    directory, "--out", directory.parent / "ours"], check=True, capture_output=True)
    shutil.rmtree(directory)
    (directory.parent / "ours").rename(directory)


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
    (lambda d: ((d / "model.safetensors").unlink(),
                (d / "model.safetensors.index.json").write_text(
                    '{"weight_map": {"x": "model-00001-of-00002.safetensors"}}')),
     "model-00001-of-00002.safetensors is missing"),
    *((index_with(name), "is no file of this directory; fetch the index again")
      for name in ("../x.safetensors", "/x.safetensors", 5, None, ["x"])),
    (lambda d: ((d / "model.safetensors").unlink(),
                (d / "model.safetensors").symlink_to("blobs/0a1b")),
     "model.safetensors is a link to a file that is not there; fetch the checkpoint again"),
    (lambda d: shutil.rmtree(d), "is not a directory"),
    (lambda d: [p.unlink() for p in d.iterdir()], "is empty"),
    (lambda d: (d / "config.json").unlink(), "config.json does not exist"),
    (lambda d: edit_json(d / "config.json", num_hidden_layers=3),
     "weight model.layers.2.input_layernorm.weight is missing"),
    (lambda d: edit_json(d / "config.json", num_hidden_layers=1),
     "weight model.layers.1.input_layernorm.weight has no place"),
    (lambda d: edit_json(d / "config.json", vocab_size=426),
     "weight model.embed_tokens.weight has shape [425, 64], config.json says [426, 64]"),
    (lambda d: edit_json(d / "config.json", hidden_size=None), "'hidden_size' is missing"),
    (lambda d: edit_json(d / "config.json", architectures=["GemmaForCausalLM"]),
     "'GemmaForCausalLM' is not supported"),
    (lambda d: edit_weights(d, lambda w: w.pop("lm_head.weight")),
     "weight lm_head.weight is missing, and config.json does not say tie_word_embeddings: true"),
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
    (lambda d: (d / "tokenizer.json").unlink(), "neither tokenizer.json nor tokenizer.model"),
    (lambda d: (d / "tokenizer.json").write_text(""), "tokenizer.json cannot be read as a tokeni"
     "zer: it is empty"),
    (lambda d: (d / "tokenizer.json").write_text(POINTER), "it is a Git LFS pointer"),
    (lambda d: (d / "model.safetensors").write_text(POINTER), "it is a Git LFS pointer"),
    (lambda d: (d / "chat_template.jinja").write_text(POINTER), "chat_template.jinja: it is a Git"),
    (lambda d: (d / "config.json").write_text("<!doctype html><html>"), "it is a web page"),
    (lambda d: edit_json(d / "tokenizer_config.json", added_tokens_decoder={
        "425": {"content": "<new>"}}), "hf/config.json says vocab_size 425: they do not belong"),
    # What is a checkpoint of another kind is said to be that, not to be damaged.
    (put({"model.norm.weight": torch.ones(64, dtype=torch.float64)}),
     "weight model.norm.weight is float64"),
    (convert, "is converted already"),
    (rename("language_model.{}".format), "it is a multimodal model"),
    (rename(lambda name: name.replace("model.", "model.language_model.")), "multimodal model"),
    (put({"vision_tower.x.weight": torch.ones(3)}), "multimodal model"),
    (rename(lambda name: name.removeprefix("model.")), "from the model inside, without LM head"),
    (rename("_orig_mod.{}".format), "from inside a wrapper"),
    (rename("base_model.model.{}".format), "PEFT adapter"),
    (rename(lambda name: name.replace("q_proj.weight", "q_proj.qweight")),
     "quantized by another tool"),
    (rename(lambda name: name.replace("mlp.", "mlp.experts.0.")), "mixture of experts"),
    (rename(lambda name: name.replace("model.layers", "layers").replace(
        "self_attn.q_proj", "attention.wq")), "Meta's or Mistral's own names"),
    (lambda d: (d / "adapter_config.json").write_text("{}"), "holds a PEFT adapter"),
    (lambda d: (only("adapter_model.safetensors")(d), (d / "config.json").unlink(),
                (d / "adapter_config.json").write_text("{}")), "holds a PEFT adapter"),
    (lambda d: (only("model-Q4_K_M.gguf")(d), (d / "config.json").unlink()), "llama.cpp"),
    (only("model-00001-of-00002.safetensors"), "fetch the others and model.safetensors.index.json"),
    (only("consolidated.00.safetensors"), "Mistral's own format"),
    (only("model.fp16.safetensors"), "a name that transformers does not look for"),
    (only("flax_model.msgpack"), "another framework's format"),
    *((lambda d, method=method: edit_json(d / "config.json",
                                          quantization_config={"quant_method": method}),
       f"quantized by {method}") for method in ("gptq", "awq", "bitsandbytes", "fp8")),
    (lambda d: (edit_json(d / "config.json", tie_word_embeddings=True),
                put({"lm_head.weight": torch.zeros(426, 64)})(d)),
     "weight lm_head.weight has shape [426, 64], config.json says [425, 64]"),
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


@pytest.mark.parametrize("kind", [torch.float16, torch.float32, torch.bfloat16])
def test_rounding_to_bfloat16_is_said(source, tmp_path, monkeypatch, capsys, kind):
    shutil.copytree(source, tmp_path / "hf")
    edit_weights(tmp_path / "hf", lambda w: w.update({n: t.to(kind) for n, t in w.items()}))
    for dtype in ("float32", "bfloat16"):
        run_main(monkeypatch, tmp_path, "--dtype", dtype)
        said = "are rounded to bfloat16; --dtype float32 keeps them" in capsys.readouterr().err
        assert said == (dtype == "bfloat16" != str(kind).removeprefix("torch."))
        shutil.rmtree(tmp_path / "out")


def test_a_failed_write_leaves_nothing(source, tmp_path, monkeypatch, capsys):
    shutil.copytree(source, tmp_path / "hf")

    def full(*args):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(checkpoint, "write_safetensors", full)
    with pytest.raises(SystemExit):
        run_main(monkeypatch, tmp_path)
    assert "No space left" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("place", ["tokenizer.json", "tokenizer.model",
                                   "original/tokenizer.model"])
def test_what_is_copied_and_the_default_dtype(source, tmp_path, monkeypatch, place):
    shutil.copytree(source, tmp_path / "hf")
    (tmp_path / "hf" / place).parent.mkdir(exist_ok=True)
    if place != "tokenizer.json":
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (tmp_path / "hf" / name).unlink()
        (tmp_path / "hf" / place).write_bytes(sentencepiece_model(vocab_size=400))
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        (tmp_path / "hf" / name).write_text("{}")
    (tmp_path / "hf" / "chat_template.jinja").write_text("{{ messages }}")
    edit_json(tmp_path / "hf" / "config.json", some_key=5)
    run_main(monkeypatch, tmp_path)
    out = tmp_path / "out"
    assert {p.name for p in out.iterdir()} == {
        "config.json", "model.safetensors", Path(place).name, "tokenizer_config.json",
        "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
        "generation_config.json"}
    assert (out / Path(place).name).read_bytes() == (tmp_path / "hf" / place).read_bytes()
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
    (path / "tokenizer.model").write_bytes(sentencepiece_model(vocab_size=400))
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
    while not list(tmp_path.glob(".out.*/*/model.safetensors")) and run.poll() is None:
        time.sleep(0.002)
    run.send_signal(how)
    code = -how if how == signal.SIGKILL else 130
    assert run.wait() == code, "the run was over before it could be interrupted"
    left = [p.name for p in tmp_path.rglob("*")]
    assert not (tmp_path / "out").exists() and "config.json" not in left
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
