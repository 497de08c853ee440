"""model.py against transformers, published config.json files, and loading by checkpoint.py."""
import math
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import quantize
from checkpoint import config_from, fingerprint, load, shapes
from common import UserError, is_finite
from formats.config import KINDS, OTHER_KINDS, QUANTIZATION_KINDS, ROPE_KINDS
from helpers import (
    ROOT,
    WRONG,
    edit_weights,
    hf_to_ours,
    put,
    random_model,
    randomize,
    run_command,
    save_checkpoint,
    shard,
    tiny_config,
)
from linear import dense, packs
from load import load_models
from model import Transformer, rope_table

LLAMA3_ROPE = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=32)
SMALL = dict(vocab_size=101, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
             max_position_embeddings=512, rms_norm_eps=1e-5)
HEADS = dict(num_attention_heads=4, num_key_value_heads=2)
CASES = {
    "grouped": ("Llama", dict(num_attention_heads=8, num_key_value_heads=2)),
    "multi-head": ("Llama", dict(num_attention_heads=4, num_key_value_heads=4)),
    "tied, one KV head": ("Llama", dict(num_attention_heads=4, num_key_value_heads=1,
                                        tie_word_embeddings=True)),
    "head_dim": ("Llama", HEADS | dict(head_dim=24)),
    "llama3 rope": ("Llama", HEADS | dict(rope_parameters=dict(LLAMA3_ROPE, rope_theta=5e4))),
    "mistral": ("Mistral", HEADS | dict(sliding_window=None, head_dim=16)),
    "qwen2": ("Qwen2", HEADS | dict(rope_parameters=dict(rope_type="default", rope_theta=1e6))),
    "qwen3, biases": ("Qwen3", HEADS | dict(head_dim=24, attention_bias=True)),
    "llama, biases": ("Llama", HEADS | dict(attention_bias=True, mlp_bias=True)),
}


@pytest.fixture(scope="module", params=CASES)
def both(request):
    """(ours, theirs): the same random weights, biases and norms included."""
    family, settings = CASES[request.param]
    torch.manual_seed(0)
    hf_config = getattr(transformers, f"{family}Config")(**SMALL, **settings)
    theirs = randomize(getattr(transformers, f"{family}ForCausalLM")(hf_config))
    hf = theirs.config.to_dict() | {"architectures": [f"{family}ForCausalLM"]}
    ours = Transformer(config_from(hf)).eval().requires_grad_(False)
    ours.load_state_dict(hf_to_ours(theirs.state_dict(), ours))
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
    # this cache holds wrong tokens behind the mask
    again, _ = ours(IDS[:, 40:45], torch.arange(40, 45), cache)
    torch.testing.assert_close(again, logits, atol=1e-5, rtol=1e-4)


def test_attention_looks_at_the_span_only():
    model = random_model(tiny_config())
    cache = model.new_cache(64)
    for kv in cache.kv:
        kv[16:] = float("nan")
    assert model(IDS[:1, :8], torch.arange(8), cache.first(16))[0].isfinite().all()


# ---------------------------------------------------------------- config.json

COMMON = dict(hidden_act="silu", torch_dtype="bfloat16", use_cache=True, initializer_range=0.02,
              tie_word_embeddings=False)
LLAMA3 = COMMON | dict(
    architectures=["LlamaForCausalLM"], model_type="llama", attention_bias=False, mlp_bias=False,
    pretraining_tp=1, rms_norm_eps=1e-5, max_position_embeddings=131072, rope_theta=500000.0,
    vocab_size=128256, attention_dropout=0.0, bos_token_id=128000, num_key_value_heads=8,
    rope_scaling=dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                      original_max_position_embeddings=8192, rope_type="llama3"))
LLAMA2 = COMMON | dict(
    architectures=["LlamaForCausalLM"], model_type="llama", bos_token_id=1, eos_token_id=2,
    pretraining_tp=1, rms_norm_eps=1e-5, rope_scaling=None, hidden_size=4096,
    intermediate_size=11008, num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=32)
MISTRAL = COMMON | dict(
    architectures=["MistralForCausalLM"], model_type="mistral", bos_token_id=1, eos_token_id=2,
    hidden_size=4096, intermediate_size=14336, max_position_embeddings=32768,
    num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=8, rms_norm_eps=1e-5)
QWEN3 = COMMON | dict(
    architectures=["Qwen3ForCausalLM"], model_type="qwen3", attention_bias=False, head_dim=128,
    bos_token_id=151643, eos_token_id=151645, max_position_embeddings=40960, rms_norm_eps=1e-6,
    num_key_value_heads=8, rope_theta=1000000, rope_scaling=None, sliding_window=None,
    use_sliding_window=False, vocab_size=151936)


def qwen3(dim, ffn_dim, n_layer, n_head, tied=False):
    return QWEN3 | dict(hidden_size=dim, intermediate_size=ffn_dim, num_hidden_layers=n_layer,
                        max_window_layers=n_layer, num_attention_heads=n_head,
                        tie_word_embeddings=tied)


PUBLISHED = {  # name: (config.json, parameters, context)
    "Llama-3.1-8B": (LLAMA3 | dict(
        eos_token_id=[128001, 128008, 128009], hidden_size=4096, intermediate_size=14336,
        num_attention_heads=32, num_hidden_layers=32), 8_030_261_248, 131072),
    "Llama-3.2-1B": (LLAMA3 | dict(
        eos_token_id=128001, head_dim=64, hidden_size=2048, intermediate_size=8192,
        num_attention_heads=32, num_hidden_layers=16, tie_word_embeddings=True,
        rope_scaling=LLAMA3["rope_scaling"] | {"factor": 32.0}), 1_235_814_400, 131072),
    "Llama-3.3-70B": (LLAMA3 | dict(
        eos_token_id=[128001, 128008, 128009], head_dim=128, hidden_size=8192,
        intermediate_size=28672, num_attention_heads=64, num_hidden_layers=80),
        70_553_706_496, 131072),
    "Llama-2-7B": (LLAMA2 | dict(max_position_embeddings=4096, vocab_size=32000),
                   6_738_415_616, 4096),
    "CodeLlama-7B": (LLAMA2 | dict(max_position_embeddings=16384, rope_theta=1000000,
                                   vocab_size=32016), 6_738_546_688, 16384),
    "TinyLlama-1.1B": (LLAMA2 | dict(
        hidden_size=2048, intermediate_size=5632, max_position_embeddings=2048,
        num_hidden_layers=22, num_key_value_heads=4, vocab_size=32000), 1_100_048_384, 2048),
    "Mistral-7B-v0.1": (MISTRAL | dict(rope_theta=10000.0, sliding_window=4096, vocab_size=32000),
                        7_241_732_096, 4096),
    "Mistral-7B-v0.3": (MISTRAL | dict(rope_theta=1000000.0, sliding_window=None, vocab_size=32768,
                                       attention_dropout=0.0), 7_248_023_552, 32768),
    "Qwen2.5-7B": (COMMON | dict(
        architectures=["Qwen2ForCausalLM"], model_type="qwen2", attention_dropout=0.0,
        bos_token_id=151643, eos_token_id=151643, hidden_size=3584, intermediate_size=18944,
        max_position_embeddings=131072, max_window_layers=28, num_attention_heads=28,
        num_hidden_layers=28, num_key_value_heads=4, rms_norm_eps=1e-6, rope_theta=1000000.0,
        sliding_window=131072, use_mrope=False, use_sliding_window=False, vocab_size=152064),
        7_615_616_512, 131072),
    "Qwen3-0.6B": (qwen3(1024, 3072, 28, 16, tied=True), 596_049_920, 40960),
    "Qwen3-1.7B": (qwen3(2048, 6144, 28, 16, tied=True), 1_720_574_976, 40960),
    "Qwen3-4B": (qwen3(2560, 9728, 36, 32, tied=True), 4_022_468_096, 40960),
    "Qwen3-8B": (qwen3(4096, 12288, 36, 32), 8_190_735_360, 40960),
    "Qwen3-14B": (qwen3(5120, 17408, 40, 40), 14_768_307_200, 40960),
    "Qwen3-32B": (qwen3(5120, 25600, 64, 64), 32_762_123_264, 40960),
    "Qwen3-8B, YaRN as its card says": (qwen3(4096, 12288, 36, 32) | dict(rope_scaling=dict(
        rope_type="yarn", factor=4.0, original_max_position_embeddings=32768)),
        8_190_735_360, 131072),
    "vicuna-7b-v1.5-16k": (LLAMA2 | dict(
        max_position_embeddings=4096, vocab_size=32000,
        rope_scaling=dict(factor=4.0, type="linear")), 6_738_415_616, 16384),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config(name):
    hf, parameters, context = PUBLISHED[name]
    config = config_from(hf)
    sizes = shapes(config)
    assert sum(shape.numel() for shape in sizes.values()) == parameters
    assert config.max_seq_len == context
    head_dim = hf.get("head_dim", hf["hidden_size"] // hf["num_attention_heads"])
    rows = (hf["num_attention_heads"] + 2 * hf["num_key_value_heads"]) * head_dim
    assert sizes["layers.1.attn.wqkv.weight"] == (rows, hf["hidden_size"])
    assert ("layers.0.attn.wqkv.bias" in sizes) == name.startswith("Qwen2")
    assert ("layers.0.attn.q_norm.weight" in sizes) == name.startswith("Qwen3")
    slowest = hf.get("rope_theta", 10000.0) ** (2 / head_dim - 1)
    factor = (hf.get("rope_scaling") or {}).get("factor", 1)
    assert config.rope_freqs[-1] == pytest.approx(slowest / factor)
    assert (config.rope_scale > 1) == ("YaRN" in name)


def test_head_dim_that_is_not_dim_over_heads():
    nemo = PUBLISHED["Mistral-7B-v0.3"][0] | dict(  # as Mistral Nemo
        hidden_size=5120, head_dim=128, num_hidden_layers=40, max_position_embeddings=131072,
        vocab_size=131072)
    sizes = shapes(config_from(nemo))
    assert sum(shape.numel() for shape in sizes.values()) == 12_247_782_400
    assert sizes["layers.0.attn.wo.weight"] == (5120, 4096)


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_what_config_json_leaves_out_is_what_transformers_takes(family):
    """A config.json of the sizes only, and one in which what may be null is null."""
    sizes = dict(vocab_size=101, hidden_size=512, num_hidden_layers=3, num_attention_heads=32,
                 intermediate_size=96)
    theirs = getattr(transformers, f"{family}Config")
    null = {"Llama": ("head_dim", "num_key_value_heads"), "Mistral": ("head_dim",)}
    for more in ({}, dict.fromkeys(null.get(family, ["num_key_value_heads"]))):
        want = theirs(**sizes, **more)
        for name in ({"architectures": [f"{family}ForCausalLM"]},
                     {"model_type": want.model_type}):
            ours = config_from(sizes | more | name)
            assert ours.n_kv_head == want.num_key_value_heads
            assert ours.head_dim == getattr(want, "head_dim", 512 // 32)
            assert ours.norm_eps == want.rms_norm_eps and ours.tied == want.tie_word_embeddings
            assert ours.rope_freqs[1] == pytest.approx(
                want.rope_parameters["rope_theta"] ** (-2 / ours.head_dim))
            assert ours.sliding_window == getattr(want, "sliding_window", None)
            assert ours.max_seq_len == (ours.sliding_window or want.max_position_embeddings)


YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32)


@pytest.mark.parametrize("settings,context", [
    (dict(rope_type="default"), 256), (LLAMA3_ROPE, 256),
    (dict(rope_type="linear", factor=2.5), 640), (YARN, 256), (YARN | dict(factor=20), 640),
    (YARN | dict(attention_factor=0.7), 256), (YARN | dict(beta_fast=16, beta_slow=2), 256),
    (YARN | dict(mscale=1.0, mscale_all_dim=0.5), 256), (YARN | dict(mscale=0.7), 256),
    (YARN | dict(truncate=False), 256), (dict(rope_type="yarn", factor=2.0), 512),
    (YARN | dict(factor=None), 256), (YARN | dict(factor=1.0), 256),
    (YARN | dict(rope_theta=100.0), 256)], ids=str)
def test_rope_is_that_of_transformers(settings, context):
    """Frequencies, cosines and sines, in each spelling; the context as vLLM's."""
    config = transformers.LlamaConfig(**SMALL | HEADS | dict(
        head_dim=32, max_position_embeddings=256, rope_parameters={"rope_theta": 5e4, **settings}))
    theirs = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    theta, kind = config.rope_parameters["rope_theta"], settings["rope_type"]
    rest = {key: value for key, value in settings.items() if key not in ("rope_type", "rope_theta")}
    spellings = [dict(rope_parameters={"rope_theta": theta, **settings}),
                 dict(rope_theta=theta, rope_scaling={"rope_type": kind, **rest}),
                 dict(rope_theta=theta, rope_scaling={"type": kind, **rest})]
    cos, sin = theirs(torch.zeros(1), torch.arange(300)[None])
    for spelling in spellings:
        ours = config_from(tiny_config(head_dim=32, max_position_embeddings=256) | spelling)
        assert ours.max_seq_len == context
        assert torch.equal(torch.tensor(ours.rope_freqs), theirs.inv_freq)  # to the last bit
        table = rope_table(ours, 300)
        torch.testing.assert_close(table[:, 0], cos[0, :, :16], atol=1e-6, rtol=0)
        torch.testing.assert_close(table[:, 1], sin[0, :, :16], atol=1e-6, rtol=0)


@pytest.mark.parametrize("changes,message", [
    ({"architectures": ["GemmaForCausalLM"]}, "GemmaForCausalLM"),
    ({"architectures": None}, "neither architectures nor model_type"),
    ({"architectures": None, "model_type": "phi3"}, "model_type 'phi3' is not supported"),
    ({"model_type": "gemma2"}, "model_type 'gemma2' is not supported"),
    ({"architectures": ["LlamaForSequenceClassification"], "model_type": "llama"},
     "architecture 'LlamaForSequenceClassification' is not supported"),
    ({"architectures": ["LlamaModel"], "model_type": "llama"}, "saved without its LM head"),
    ({"architectures": ["LlavaForConditionalGeneration"], "text_config": {}}, "multimodal"),
    ({"architectures": ["MixtralForCausalLM"], "num_local_experts": 8}, "mixture of experts"),
    ({"architectures": ["Qwen3MoeForCausalLM"]}, "mixture of experts"),
    ({"hidden_act": "gelu"}, "hidden_act"), ({"head_dim": 15}, "head_dim 15 is odd"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantized by gptq"),
    ({"quantization_config": {"load_in_4bit": True}}, "quantized by bitsandbytes"),
    ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
    *(({"rope_scaling": {"rope_type": kind, "factor": 2.0}}, f"rope type '{kind}'")
      for kind in ("dynamic", "longrope")),
    ({"rope_parameters": {"rope_type": "su", "rope_theta": 1e4}}, "rope type 'su'"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "a RoPE of their own"),
    ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"rope_scaling": {"type": "linear"}}, "'linear' needs 'factor'"),
    ({"rope_scaling": {"type": "yarn", "factor": "4"}}, "RoPE: factor is \"4\""),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "'low_freq_factor'"),
    ({"rope_scaling": {"type": "linear", "factor": math.inf}}, "RoPE: factor is Inf"),
    ({"rope_scaling": {"type": "linear", "factor": math.nan}}, "RoPE: factor is NaN"),
    ({"rope_scaling": {"type": "yarn", "factor": math.inf}}, "RoPE: factor is Inf"),
    ({"rope_theta": 10**400}, "rope_theta is 10+\\.\\.\\.; it must be a number above 1"),
    ({"model_type": ["llama"]}, "model_type is .*it must be a text"),
    ({"vocab_size": 10**400}, "vocab_size"),
    ({"tie_word_embeddings": "false"}, "it must be true or false"),
    *((MISTRAL | {"sliding_window": w}, "sliding_window") for w in ("4096", 0, -1, 4096.0, True)),
    ({"rope_scaling": "yarn"}, "must be an object"), ({"hidden_size": "64"}, 'hidden_size is "64"'),
    *(({key: None}, key) for key in ("vocab_size", "hidden_size", "num_hidden_layers",
                                     "num_attention_heads", "intermediate_size", "rms_norm_eps",
                                     "max_position_embeddings")),
])
def test_what_is_not_implemented_is_refused_by_name(changes, message):
    with pytest.raises(UserError, match=message):
        config_from(tiny_config(**changes))


@pytest.mark.parametrize("arch", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_any_value_of_any_key_is_a_model_or_one_line(arch):
    base = tiny_config(architectures=[f"{arch}ForCausalLM"], model_type=arch.lower())
    yarn = {"rope_type": "yarn", "factor": 2.0, "mscale": 1.0, "mscale_all_dim": 0.5}
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
              "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    keys = [*KINDS, *OTHER_KINDS, "rope_theta", "quantization_config", "num_experts", "new"]
    cases = [{key: value} for key in keys for value in WRONG]
    cases += [{"rope_scaling": rope | {key: value}} for rope in (yarn, llama3)
              for key in ROPE_KINDS for value in WRONG]
    cases += [{"quantization": {"mode": "int4", "group_size": 32, "parent": "x"} | {key: value}}
              for key in QUANTIZATION_KINDS for value in WRONG]
    models = 0
    for changes in cases:
        try:
            config = config_from(base | changes)
        except UserError as e:
            assert "\n" not in str(e) and "config.json" in str(e) and len(str(e)) < 400, changes
            continue
        models += 1
        assert all(map(math.isfinite, config.rope_freqs)) and config.max_seq_len >= 1, changes
        if config.n_layer < 100:
            with torch.device("meta"):
                try:
                    Transformer(config)
                except UserError as e:
                    assert "group size" in str(e), changes
    assert 100 < models < len(cases) / 2  # null is what is not said, and what a family ignores


def test_keys_that_transformers_does_not_read():
    """A bias that Mistral and Qwen2 cannot have; how a matrix was cut when it was trained."""
    plain = config_from(tiny_config())
    assert config_from(tiny_config(pretraining_tp=2, sliding_window=5)) == plain
    mistral = config_from(tiny_config(model_type="mistral", attention_bias=True, mlp_bias=True))
    assert not (mistral.qkv_bias or mistral.wo_bias or mistral.mlp_bias)
    qwen2 = config_from(tiny_config(model_type="qwen2", attention_bias=False, mlp_bias=True))
    assert qwen2.qkv_bias and not qwen2.wo_bias and not qwen2.mlp_bias


def test_sliding_window_ends_the_context_where_it_would_matter():
    uses = {"use_sliding_window": True}
    for window in 0, -1, None:  # said, and not used
        config = tiny_config(model_type="qwen2", sliding_window=window, use_sliding_window=False)
        assert config_from(config).max_seq_len == 128
    for arch, changes, context in (
            ("Mistral", {}, 50), ("Mistral", {"use_sliding_window": False}, 50),
            ("Qwen2", {}, 128),
            ("Qwen2", {"use_sliding_window": False, "max_window_layers": 0}, 128),
            ("Qwen2", uses, 128), ("Qwen3", uses | {"max_window_layers": 1}, 50),  # of 2 layers
            ("Qwen3", uses | {"layer_types": ["full_attention", "sliding_attention"]}, 50),
            ("Qwen3", uses | {"layer_types": ["full_attention"] * 2, "max_window_layers": 0}, 128)):
        config = tiny_config(architectures=[f"{arch}ForCausalLM"], sliding_window=50, **changes)
        assert config_from(config).max_seq_len == context, (arch, changes)


# ---------------------------------------------------------------- loading

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_is_named(tmp_path, monkeypatch, capsys, dtype, value):
    """By what reads weights: loading, and quantizing, which then writes nothing."""
    config = tiny_config()
    model = random_model(config).to(dtype)
    for name in "embed.weight", "layers.1.ffn.w2.weight", "norm.weight":
        weight = model.get_parameter(name).data.view(-1)
        before, weight[-1] = weight[-1].clone(), value
        save_checkpoint(tmp_path / "m", model, config)
        with pytest.raises(UserError, match=f"m: weight {name} holds NaN or an infinity"):
            load(tmp_path / "m", dtype=torch.float32)
        with pytest.raises(SystemExit, match="2"):
            run_command(monkeypatch, quantize, "--checkpoint_dir", tmp_path / "m", "--mode", "int8",
                        "--out", tmp_path / "q")
        assert "holds NaN or an infinity" in (said := capsys.readouterr().err.splitlines()[-1])
        assert said.startswith("error: ")
        assert [p.name for p in tmp_path.iterdir()] == ["m"]
        weight[-1] = before
    save_checkpoint(tmp_path / "m", model, config)
    load(tmp_path / "m", dtype=torch.float32)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "tokenizer.json",
                                  "tokenizer_config.json", "added_tokens.json"])
def test_a_link_to_a_file_that_is_not_there_is_named(tmp_path, file):
    """As a download leaves them that was cut off; without the file another would be read."""
    shutil.copytree(ROOT / "checkpoints" / "demo" / "target", tmp_path / "m")
    (tmp_path / "m" / file).unlink(missing_ok=True)
    (tmp_path / "m" / file).symlink_to("../blobs/1234")
    with pytest.raises(UserError, match=f"{file} is a link to a file that is not there"):
        load_models(tmp_path / "m")


def test_weights_that_no_model_has_are_named(tmp_path):
    config, model = tiny_config(), random_model(tiny_config())
    save_checkpoint(tmp_path / "m", model, config)
    weights = load_file(tmp_path / "m" / "model.safetensors")
    norm = weights["norm.weight"]
    for value in (torch.tensor(1.0), torch.zeros(0), norm.to(torch.complex64), norm.double(),
                  norm.long(), norm.bool(), norm.to(torch.float8_e5m2)):
        save_file(weights | {"norm.weight": value}, tmp_path / "m" / "model.safetensors")
        with pytest.raises(UserError, match="m: weight norm.weight (is|has shape) "):
            load(tmp_path / "m", dtype=torch.float32)
        if value.dtype not in (torch.float64, torch.int64) or not value.numel():
            with pytest.raises(UserError, match="m: weight norm.weight is .*, as none of"):
                fingerprint(tmp_path / "m")


def test_a_weight_in_two_files_is_refused(tmp_path):
    save_checkpoint(tmp_path / "m", random_model(tiny_config()), tiny_config())
    shard(tmp_path / "m")
    first, second, _ = sorted((tmp_path / "m").glob("*.safetensors"))
    twice = next(iter(load_file(first).items()))
    save_file(load_file(second) | dict([twice]), second)
    for read in load, fingerprint:
        with pytest.raises(UserError, match=f"weight {twice[0]} is in another file too"):
            read(tmp_path / "m")


def test_fp8_has_one_number_that_is_none():
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    assert [is_finite(x[None]) for x in every] == every.float().isfinite().tolist()
    assert is_finite(torch.zeros(0)) and is_finite(torch.tensor([127], dtype=torch.int8))


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
        assert (back.output.weight is back.embed.weight) == tied
        assert not any(p.requires_grad for p in back.parameters())
        assert fingerprint(tmp_path / "m") == mark
    assert load(tmp_path / "m").embed.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tied_head_is_packed_apart_from_the_embedding(tmp_path, dtype):
    """On a CPU matrices of this size are packed (linear.py): the logits stay the same."""
    config = tiny_config(tie_word_embeddings=True, hidden_size=256, vocab_size=600)
    model = random_model(config)
    save_checkpoint(tmp_path / "m", model, config)
    back = load(tmp_path / "m", dtype=dtype)
    assert (back.output.packed is not None) == packs(model.embed.weight.to(dtype))
    assert not back.embed.weight.is_mkldnn
    assert torch.equal(dense(back.output.weight), back.embed.weight)
    want, got = (m(IDS[:1], torch.arange(120), m.new_cache(120))[0] for m in (model, back))
    assert (got.float() - want).norm() / want.norm() < (1e-4 if dtype == torch.float32 else 0.1)


def test_fingerprint(tmp_path):
    config = tiny_config()
    model = random_model(config, seed=1).to(torch.bfloat16)
    models = {"bf16": model, "f32": model.float(), "seed": random_model(config, seed=2)}
    marks = [fingerprint(save_checkpoint(tmp_path / name, m, config)) for name, m in models.items()]
    assert marks[0] == marks[1] != marks[2] and len(marks[0]) == 16
    model.norm.weight[0] += 1
    assert fingerprint(save_checkpoint(tmp_path / "one", model, config)) != marks[0]


@pytest.fixture
def checkpoint(tmp_path):
    return save_checkpoint(tmp_path / "m", random_model(tiny_config()), tiny_config())


@pytest.mark.parametrize("damage,message", [
    (lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:-50]),
     "model.safetensors is damaged or truncated"),
    (lambda d: (d / "model.safetensors").write_bytes(b""), "damaged or truncated .it is empty"),
    (lambda d: (d / "model.safetensors").unlink(), "holds no model.safetensors"),
    (lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"), "pytorch_model.bin"),
    (lambda d: (d / "config.json").write_text("{"), "config.json cannot be read as JSON"),
    (lambda d: (shard(d), (d / "model-00002-of-00003.safetensors").unlink()),
     "model-00002-of-00003.safetensors is missing"),
    (lambda d: edit_weights(d, lambda w: w.pop("layers.1.attn.wo.weight")),
     "layers.1.attn.wo.weight is missing"),
    (put({"strange": torch.zeros(1)}), "strange has no place"),
    (put({"norm.weight": torch.zeros(63)}), "norm.weight has shape"),
    (put({"model.norm.weight": torch.zeros(64)}), "convert it first"),
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
from checkpoint import load
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
load(sys.argv[1], dtype=torch.float32)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""
    grown = int(subprocess.run([sys.executable, "-c", code, directory], cwd=ROOT,
                               capture_output=True, text=True, check=True).stdout)
    assert size > 1e8 and grown < 1.3 * size, (grown, size)


# ---------------------------------------------------------------- attention

def test_attention_may_come_in_any_layout(monkeypatch):
    """PyTorch's memory-efficient kernel gives rows before heads: a view of it would fail."""
    model, ids = random_model(tiny_config()), IDS[:, :9]
    attend, seen = torch.nn.functional.scaled_dot_product_attention, []

    def other_layout(*args, **more):
        y = attend(*args, **more)
        seen.append(y.transpose(1, 2).contiguous().transpose(1, 2))
        return seen[-1]

    run = lambda: model(ids, torch.arange(9), model.new_cache(16, batch=2))[0]
    want = run()
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", other_layout)
    assert torch.equal(run(), want) and not seen[0].is_contiguous()


@pytest.mark.parametrize("rows", [1, 5, 64, 65])
def test_few_rows_may_have_a_kernel_without_mask(rows, monkeypatch):
    """gpu_kernels/attention.py is given queries, the whole cache and the positions."""
    calls = []

    def attention(q, kv, pos):
        calls.append(q.shape[1])
        B, S, n_head, D = q.shape
        k, v = (t.repeat_interleave(n_head // kv.shape[3], 2) for t in kv.permute(1, 2, 0, 3, 4))
        score = torch.einsum("bshd,bnhd->bhsn", q, k) / D ** 0.5
        mask = torch.arange(len(kv)) <= pos[:, None]
        p = score.masked_fill(~mask, -math.inf).softmax(-1)
        return torch.einsum("bhsn,bnhd->bshd", p, v).flatten(2)

    monkeypatch.setattr(torch.ops.judge, "attention", attention, raising=False)
    model = random_model(tiny_config())
    hidden = []
    for model.kernel_rows in (0, 64):
        cache = model.new_cache(120, batch=2)
        model.features(IDS[:, :30], torch.arange(30), cache)
        calls.clear()
        hidden.append(model.features(IDS[:, 30:30 + rows], 30 + torch.arange(rows), cache))
    torch.testing.assert_close(*hidden, rtol=0, atol=1e-5)
    assert calls == [rows] * model.config.n_layer * (rows <= 64)
