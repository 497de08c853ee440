"""model.py against transformers, published config.json files, and damaged checkpoints."""
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from cli import UserError
from helpers import hf_to_ours, random_model, save_checkpoint, tiny_config
from linear import dense, packs
from model import ModelConfig, Transformer, fingerprint, load, rope_table

ROOT = Path(__file__).parents[1]
LLAMA3_ROPE = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=32)
SMALL = dict(vocab_size=101, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
             max_position_embeddings=512, rms_norm_eps=1e-5)
CASES = {
    "grouped": (LlamaConfig, LlamaForCausalLM, dict(num_attention_heads=8, num_key_value_heads=2)),
    "multi-head": (LlamaConfig, LlamaForCausalLM,
                   dict(num_attention_heads=4, num_key_value_heads=4)),
    "tied, one key head": (LlamaConfig, LlamaForCausalLM,
                           dict(num_attention_heads=4, num_key_value_heads=1,
                                tie_word_embeddings=True)),
    "head_dim": (LlamaConfig, LlamaForCausalLM, dict(num_attention_heads=4, num_key_value_heads=2,
                                                     head_dim=24)),
    "llama3 rope": (LlamaConfig, LlamaForCausalLM,
                    dict(num_attention_heads=4, num_key_value_heads=2,
                         rope_parameters=dict(LLAMA3_ROPE, rope_theta=5e4))),
    "mistral": (MistralConfig, MistralForCausalLM,
                dict(num_attention_heads=4, num_key_value_heads=2, sliding_window=None,
                     head_dim=16)),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, dict(num_attention_heads=4, num_key_value_heads=2,
                                                  rope_parameters=dict(rope_type="default",
                                                                       rope_theta=1e6))),
}


@pytest.fixture(scope="module", params=CASES)
def both(request):
    """(ours, theirs): the same random weights, biases and norms included."""
    config_class, model_class, settings = CASES[request.param]
    torch.manual_seed(0)
    theirs = model_class(config_class(**SMALL, **settings)).eval().requires_grad_(False)
    for name, p in theirs.named_parameters():
        p.data.uniform_(0.5, 1.5) if "norm" in name else p.data.normal_(0, 0.2)
    hf = theirs.config.to_dict() | {"architectures": [model_class.__name__]}
    ours = Transformer(ModelConfig.from_dict(hf)).eval().requires_grad_(False)
    missing, extra = ours.load_state_dict(hf_to_ours(theirs.state_dict(), 3), strict=False)
    assert not missing and not extra
    return ours, theirs


IDS = torch.randint(0, 101, (2, 120), generator=torch.Generator().manual_seed(1))


def pass_by_pass(model, ids, step):
    """Logits and hidden states of ids read `step` at a time through the cache."""
    cache, parts = model.new_cache(ids.shape[1], ids.shape[0]), []
    for i in range(0, ids.shape[1], step):
        end = min(i + step, ids.shape[1])
        parts.append(model(ids[:, i:end], torch.arange(i, end), cache.first(end)))
    return [torch.cat(x, 1) for x in zip(*parts)]


# prefill, one at a time, K + 1 at a time with a remainder
@pytest.mark.parametrize("step", [120, 1, 2, 5, 17])
def test_logits_equal_transformers(both, step):
    ours, theirs = both
    want = theirs(IDS, output_hidden_states=True)
    logits, hidden = pass_by_pass(ours, IDS, step)
    assert want.logits.std() > 0.5
    torch.testing.assert_close(logits, want.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(hidden, want.hidden_states[-1], atol=1e-4, rtol=1e-4)


def test_rejected_tokens_leave_no_trace(both):
    ours, _ = both
    cache = ours.new_cache(160, 2)
    ours(IDS[:, :40], torch.arange(40), cache.first(40))
    ours(IDS[:, 60:77], torch.arange(40, 57), cache.first(57))  # seventeen wrong tokens
    logits, _ = ours(IDS[:, 40:45], torch.arange(40, 45), cache.first(45))
    fresh = pass_by_pass(ours, IDS[:, :45], 45)[0]
    torch.testing.assert_close(logits, fresh[:, 40:], atol=1e-5, rtol=1e-4)
    # wrong tokens lie in this cache, masked
    again, _ = ours(IDS[:, 40:45], torch.arange(40, 45), cache)
    torch.testing.assert_close(again, logits, atol=1e-5, rtol=1e-4)


def test_attention_looks_at_the_span_only():
    model = random_model(tiny_config())
    cache = model.new_cache(64)
    for kv in cache.kv:
        kv[16:] = float("nan")
    assert model(IDS[:1, :8], torch.arange(8), cache.first(16))[0].isfinite().all()


# ---------------------------------------------------------------- config.json

COMMON = dict(hidden_act="silu", torch_dtype="bfloat16", use_cache=True, initializer_range=0.02)
LLAMA = COMMON | dict(architectures=["LlamaForCausalLM"], model_type="llama", attention_bias=False,
                      mlp_bias=False, pretraining_tp=1, rms_norm_eps=1e-5)
SCALING = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
               original_max_position_embeddings=8192, rope_type="llama3")
PUBLISHED = {  # name: (config.json, parameters, context)
    "Llama-3.1-8B": (LLAMA | dict(attention_dropout=0.0, bos_token_id=128000,
                                  eos_token_id=[128001, 128008, 128009], hidden_size=4096,
                                  intermediate_size=14336,
        max_position_embeddings=131072, num_attention_heads=32, num_hidden_layers=32,
        num_key_value_heads=8, rope_scaling=SCALING, rope_theta=500000.0,
        tie_word_embeddings=False, vocab_size=128256), 8_030_261_248, 131072),
    "Llama-3.2-1B": (LLAMA | dict(attention_dropout=0.0, bos_token_id=128000, eos_token_id=128001,
                                  head_dim=64, hidden_size=2048, intermediate_size=8192,
        max_position_embeddings=131072, num_attention_heads=32, num_hidden_layers=16,
        num_key_value_heads=8, rope_scaling=SCALING | {"factor": 32.0},
        rope_theta=500000.0, tie_word_embeddings=True, vocab_size=128256), 1_235_814_400, 131072),
    "Llama-3.3-70B": (LLAMA | dict(head_dim=128, hidden_size=8192, intermediate_size=28672,
                                   max_position_embeddings=131072, num_attention_heads=64,
        num_hidden_layers=80, num_key_value_heads=8, rope_scaling=SCALING, rope_theta=500000.0,
        tie_word_embeddings=False, vocab_size=128256,
        eos_token_id=[128001, 128008, 128009]), 70_553_706_496, 131072),
    "Llama-2-7B": (COMMON | dict(architectures=["LlamaForCausalLM"], bos_token_id=1, eos_token_id=2,
                                 hidden_size=4096, intermediate_size=11008,
        max_position_embeddings=4096, model_type="llama", num_attention_heads=32,
        num_hidden_layers=32, num_key_value_heads=32, pretraining_tp=1,
        rms_norm_eps=1e-5, rope_scaling=None, tie_word_embeddings=False, vocab_size=32000),
                   6_738_415_616, 4096),
    "CodeLlama-7B": (COMMON | dict(architectures=["LlamaForCausalLM"], bos_token_id=1,
                                   eos_token_id=2, hidden_size=4096, intermediate_size=11008,
        max_position_embeddings=16384, model_type="llama", num_attention_heads=32,
        num_hidden_layers=32, num_key_value_heads=32, pretraining_tp=1,
        rms_norm_eps=1e-5, rope_scaling=None, rope_theta=1000000, tie_word_embeddings=False,
        vocab_size=32016), 6_738_546_688, 16384),
    "TinyLlama-1.1B": (COMMON | dict(architectures=["LlamaForCausalLM"], bos_token_id=1,
                                     eos_token_id=2, hidden_size=2048, intermediate_size=5632,
        max_position_embeddings=2048, model_type="llama", num_attention_heads=32,
        num_hidden_layers=22, num_key_value_heads=4, pretraining_tp=1,
        rms_norm_eps=1e-5, rope_scaling=None, tie_word_embeddings=False, vocab_size=32000),
                       1_100_048_384, 2048),
    "Mistral-7B-v0.1": (COMMON | dict(architectures=["MistralForCausalLM"], bos_token_id=1,
                                      eos_token_id=2, hidden_size=4096, intermediate_size=14336,
        max_position_embeddings=32768, model_type="mistral", num_attention_heads=32,
        num_hidden_layers=32, num_key_value_heads=8, rms_norm_eps=1e-5,
        rope_theta=10000.0, sliding_window=4096, tie_word_embeddings=False, vocab_size=32000),
                        7_241_732_096, 4096),
    "Mistral-7B-v0.3": (COMMON | dict(architectures=["MistralForCausalLM"], attention_dropout=0.0,
                                      bos_token_id=1, eos_token_id=2, hidden_size=4096,
        intermediate_size=14336, max_position_embeddings=32768, model_type="mistral",
        num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=8,
        rms_norm_eps=1e-5, rope_theta=1000000.0, sliding_window=None, tie_word_embeddings=False,
        vocab_size=32768), 7_248_023_552, 32768),
    "Qwen2.5-7B": (COMMON | dict(architectures=["Qwen2ForCausalLM"], attention_dropout=0.0,
                                 bos_token_id=151643, eos_token_id=151643, hidden_size=3584,
        intermediate_size=18944, max_position_embeddings=131072, max_window_layers=28,
        model_type="qwen2", num_attention_heads=28, num_hidden_layers=28,
        num_key_value_heads=4, rms_norm_eps=1e-6, rope_theta=1000000.0, sliding_window=131072,
        tie_word_embeddings=False, use_mrope=False,
        use_sliding_window=False, vocab_size=152064), 7_615_616_512, 131072),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config(name):
    hf, parameters, context = PUBLISHED[name]
    config = ModelConfig.from_dict(hf)
    with torch.device("meta"):
        model = Transformer(config)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert config.max_seq_len == context
    head_dim = hf.get("head_dim", hf["hidden_size"] // hf["num_attention_heads"])
    assert model.layers[-1].attn.wqkv.weight.shape == (
        (hf["num_attention_heads"] + 2 * hf["num_key_value_heads"]) * head_dim, hf["hidden_size"])
    assert (model.layers[0].attn.wqkv.bias is not None) == name.startswith("Qwen")
    assert config.rope_theta == hf.get("rope_theta",
                                       10000.0) and (
                                           config.rope_scaling is not None) == name.startswith(
                                               "Llama-3")


def test_head_dim_that_is_not_dim_over_heads():
    hf = PUBLISHED["Mistral-7B-v0.3"][0] | dict(hidden_size=5120, head_dim=128,
                                                num_hidden_layers=40,
                                                max_position_embeddings=131072, vocab_size=131072)
    with torch.device("meta"):
        model = Transformer(ModelConfig.from_dict(hf))  # as Mistral Nemo
    assert sum(p.numel() for p in model.parameters()) == 12_247_782_400 and model.layers[
        0].attn.wo.weight.shape == (5120, 4096)


def test_both_spellings_of_the_rope_settings():
    old = ModelConfig.from_dict(tiny_config(rope_theta=5e4, rope_scaling=LLAMA3_ROPE))
    older = ModelConfig.from_dict(tiny_config(rope_theta=5e4,
                                              rope_scaling={("type" if k == "rope_type" else k): v
                                                            for k, v in LLAMA3_ROPE.items()}))
    new_hf = tiny_config(rope_parameters=dict(LLAMA3_ROPE, rope_theta=5e4))
    del new_hf["rope_theta"]
    new = ModelConfig.from_dict(new_hf)
    table = rope_table(old, 100)
    assert torch.equal(table, rope_table(older, 100)) and torch.equal(table, rope_table(new, 100))
    plain = ModelConfig.from_dict(tiny_config(rope_theta=5e4, rope_scaling=None))
    assert not torch.allclose(table, rope_table(plain, 100))
    assert torch.equal(rope_table(plain, 9),
                       rope_table(
                           ModelConfig.from_dict(tiny_config(
                               rope_parameters={"rope_type": "default", "rope_theta": 5e4})), 9))


@pytest.mark.parametrize("changes,message", [
    ({"architectures": ["GemmaForCausalLM"]}, "GemmaForCausalLM"),
    ({"architectures": None}, "architecture None"), ({"hidden_act": "gelu"}, "hidden_act"),
    ({"mlp_bias": True}, "mlp_bias"), ({"attention_bias": True}, "attention_bias"),
    ({"pretraining_tp": 2}, "pretraining_tp"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
    *(({"rope_scaling": {"rope_type": kind, "factor": 2.0}}, f"rope type '{kind}'")
      for kind in ("yarn", "linear", "dynamic", "longrope")),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope type 'yarn'"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "'low_freq_factor'"),
    *(({key: None}, key) for key in ("vocab_size", "hidden_size", "num_hidden_layers",
                                     "num_attention_heads", "intermediate_size", "rms_norm_eps",
                                     "max_position_embeddings")),
])
def test_what_is_not_implemented_is_refused_by_name(changes, message):
    with pytest.raises(UserError, match=message):
        ModelConfig.from_dict(tiny_config(**changes))


def test_sliding_window_ends_the_context_where_it_would_matter():
    mistral = tiny_config(architectures=["MistralForCausalLM"], sliding_window=50)
    assert ModelConfig.from_dict(mistral).max_seq_len == 50
    assert ModelConfig.from_dict(tiny_config(architectures=["Qwen2ForCausalLM"], sliding_window=50,
                                             use_sliding_window=False)).max_seq_len == 128
    assert ModelConfig.from_dict(tiny_config(architectures=["Qwen2ForCausalLM"], sliding_window=50,
                                             use_sliding_window=True)).max_seq_len == 50


# ---------------------------------------------------------------- loading

def shard(directory, count=3):
    """Split a checkpoint's model.safetensors into shards with an index."""
    from safetensors.torch import load_file
    weights = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    where = {}
    for i in range(count):
        part = dict(list(weights.items())[i::count])
        save_file(part, directory / f"model-{i + 1:05}-of-{count:05}.safetensors")
        where |= {name: f"model-{i + 1:05}-of-{count:05}.safetensors" for name in part}
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": where}))


@pytest.mark.parametrize("tied", [False, True])
def test_load_single_and_sharded(tmp_path, tied):
    config = tiny_config(tie_word_embeddings=tied)
    model = random_model(config)
    save_checkpoint(tmp_path / "m", model, config)
    want = model(IDS[:1], torch.arange(120), model.new_cache(120))[0]
    mark = fingerprint(tmp_path / "m")
    for prepare in (lambda d: None, shard):
        prepare(tmp_path / "m")
        back = load(tmp_path / "m", dtype=torch.float32)
        assert torch.equal(back(IDS[:1], torch.arange(120), back.new_cache(120))[0], want)
        assert (back.output.weight is back.embed.weight) == tied and not any(
            p.requires_grad for p in back.parameters())
        assert fingerprint(tmp_path / "m") == mark
    assert load(tmp_path / "m").embed.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tied_head_is_packed_apart_from_the_embedding(tmp_path, dtype):
    """Matrices of this size are packed on a CPU (linear.py); the logits are those of the model that
    is not.
    """
    config = tiny_config(tie_word_embeddings=True, hidden_size=256, vocab_size=600)
    model = random_model(config)
    save_checkpoint(tmp_path / "m", model, config)
    back = load(tmp_path / "m", dtype=dtype)
    assert (back.output.packed is not None) == packs(
        model.embed.weight.to(dtype)) and not back.embed.weight.is_mkldnn
    assert torch.equal(dense(back.output.weight), back.embed.weight)
    want, got = (m(IDS[:1], torch.arange(120), m.new_cache(120))[0] for m in (model, back))
    assert (got.float() - want).norm() / want.norm() < (1e-4 if dtype == torch.float32 else 0.1)


def test_fingerprint(tmp_path):
    config = tiny_config()
    model = random_model(config, seed=1).to(torch.bfloat16)
    marks = [fingerprint(save_checkpoint(tmp_path / name, m, config)) for name, m in (
        ("bf16", model), ("f32", model.float()), ("seed", random_model(config, seed=2)))]
    assert marks[0] == marks[1] != marks[2] and len(marks[0]) == 16
    model.norm.weight[0] += 1
    assert fingerprint(save_checkpoint(tmp_path / "one", model, config)) != marks[0]


@pytest.fixture
def checkpoint(tmp_path):
    return save_checkpoint(tmp_path / "m", random_model(tiny_config()), tiny_config())


def rewrite(directory, change):
    from safetensors.torch import load_file
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors")


@pytest.mark.parametrize("damage,message", [
    (lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:-50]),
     "model.safetensors is damaged or truncated"),
    (lambda d: (d / "model.safetensors").write_bytes(b""), "model.safetensors is damaged or "
     "truncated"),
    (lambda d: (d / "model.safetensors").unlink(), "holds no model.safetensors"),
    (lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"), "pytorch_model.bin"),
    (lambda d: (d / "config.json").write_text("{"), "config.json cannot be read as JSON"),
    (lambda d: (shard(d), (d / "model-00002-of-00003.safetensors").unlink()),
     "model-00002-of-00003.safetensors is missing"),
    (lambda d: rewrite(d, lambda w: w.pop("layers.1.attn.wo.weight")), "layers.1.attn.wo.weight "
     "is missing"),
    (lambda d: rewrite(d, lambda w: w.update(strange=torch.zeros(1))), "strange has no place"),
    (lambda d: rewrite(d, lambda w: w.update({"norm.weight": torch.zeros(63)})), "norm.weight has "
     "shape"),
    (lambda d: rewrite(d, lambda w: w.update({"model.norm.weight": torch.zeros(64)})),
     "convert it first"),
    (lambda d: shutil.rmtree(d), "does not exist"),
])
def test_damaged_checkpoints_are_named(checkpoint, damage, message):
    damage(checkpoint)
    with pytest.raises(UserError, match=message):
        load(checkpoint)


def test_loading_needs_the_model_once(tmp_path):
    config = tiny_config(vocab_size=2000, hidden_size=768, num_hidden_layers=6,
                         num_attention_heads=8, intermediate_size=2048)
    directory = save_checkpoint(tmp_path / "big", random_model(config), config)
    size = (directory / "model.safetensors").stat().st_size
    code = """
import resource, sys, torch
from model import load
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
load(sys.argv[1], dtype=torch.float32)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""
    grown = int(subprocess.run([sys.executable, "-c", code, directory], cwd=ROOT,
                               capture_output=True, text=True, check=True).stdout)
    assert size > 1e8 and grown < 1.3 * size, (grown, size)
