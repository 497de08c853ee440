"""Every family and variant: a random model saved by transformers, converted, gives its logits and
its greedy tokens.
"""
import functools

import pytest
import torch

import convert_hf_checkpoint
from checkpoint import load
from engine import Engine, generate
from families import FAMILIES
from helpers import one_thread, randomize, run_command  # noqa: F401

transformers = pytest.importorskip("transformers", reason="transformers, the reference, is absent")

ORIGINAL = dict(original_max_position_embeddings=32)  # prompts and texts go beyond it
LLAMA3 = dict(rope_type="llama3", rope_theta=5e4, factor=8.0, low_freq_factor=1.0,
              high_freq_factor=4.0, **ORIGINAL)
LINEAR = dict(rope_type="linear", rope_theta=1e4, factor=4.0)
YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, **ORIGINAL)
TIED = dict(tie_word_embeddings=True)
CASES = {  # name: (family, what its config says)
    "llama 2": ("Llama", dict(num_key_value_heads=4)),
    "llama 3": ("Llama", dict(rope_parameters=LLAMA3)),
    "llama 3.2, tied": ("Llama", TIED | dict(rope_parameters=LLAMA3)),
    "llama, one KV head": ("Llama", dict(num_key_value_heads=1)),
    "llama, head_dim": ("Llama", dict(head_dim=24)),
    "llama, linear": ("Llama", dict(rope_parameters=LINEAR)),
    "llama, yarn": ("Llama", dict(rope_parameters=YARN)),
    "llama, yarn with mscale": ("Llama", dict(rope_parameters=YARN | dict(
        mscale=1.0, mscale_all_dim=0.5, beta_fast=8, truncate=False))),
    "llama, attention_bias": ("Llama", dict(attention_bias=True)),
    "llama, mlp_bias": ("Llama", dict(mlp_bias=True)),
    "llama, biases, tied": ("Llama", TIED | dict(attention_bias=True, mlp_bias=True)),
    "mistral": ("Mistral", dict(sliding_window=None)),
    "mistral, window": ("Mistral", dict(sliding_window=200)),
    "mistral, window not said": ("Mistral", {}),
    "mistral nemo": ("Mistral", dict(sliding_window=None, head_dim=24)),
    "qwen2": ("Qwen2", {}),
    "qwen2, tied": ("Qwen2", TIED),
    "qwen2, yarn": ("Qwen2", dict(rope_parameters=YARN)),
    "qwen3": ("Qwen3", dict(head_dim=16)),
    "qwen3, tied": ("Qwen3", TIED | dict(head_dim=24)),
    "qwen3, yarn": ("Qwen3", dict(head_dim=16, rope_parameters=YARN)),
    "qwen3, attention_bias": ("Qwen3", dict(head_dim=16, attention_bias=True)),
}


@functools.cache
def theirs(name):
    """The model of transformers with random weights, norms and biases too."""
    family, settings = CASES[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**dict(
        vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        bos_token_id=None, eos_token_id=None) | settings)
    return randomize(getattr(transformers, f"{family}ForCausalLM")(config))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    FAMILIES["qwen2.5"](directory)
    return (directory / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("name", CASES)
def test_logits_and_greedy_tokens_are_those_of_transformers(name, tokenizer, tmp_path, monkeypatch):
    reference, source, out = theirs(name), tmp_path / "hf", tmp_path / "out"
    sharded = dict(max_shard_size="60KB") if "tied" in name else {}
    reference.save_pretrained(source, **sharded)
    assert len(list(source.glob("*.safetensors"))) == 1 or sharded
    (source / "tokenizer.json").write_bytes(tokenizer)
    if name.endswith("not said"):
        text = (source / "config.json").read_text()
        assert '  "sliding_window": 4096,\n' in text
        (source / "config.json").write_text(text.replace('  "sliding_window": 4096,\n', ""))
    run_command(monkeypatch, convert_hf_checkpoint, "--checkpoint_dir", source, "--out", out,
                "--dtype", "float32")
    ours = load(out, dtype=torch.float32)
    for length in (1, 7, 100):
        ids = torch.randint(0, 512, (1, length), generator=torch.Generator().manual_seed(length))
        logits, _ = ours(ids, torch.arange(length), ours.new_cache(length))
        want = reference(ids).logits
        assert want.std() > 0.5
        torch.testing.assert_close(logits, want, atol=1e-4, rtol=0)
        text = reference.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                                  max_new_tokens=50, pad_token_id=0)
        assert generate(Engine(ours), ids[0].tolist(), 50).tokens == text[0, length:].tolist()
