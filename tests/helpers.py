"""Small random models and checkpoints for the tests."""
import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from model import ModelConfig, Transformer


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Models this small gain nothing from more, and beside other work they would wait for each
    other.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny_config(**overrides):
    """A small config.json with Hugging Face's keys."""
    return dict(architectures=["LlamaForCausalLM"], vocab_size=101, hidden_size=64,
                num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, intermediate_size=96, max_position_embeddings=128,
                rms_norm_eps=1e-5, rope_theta=10000.0,
                hidden_act="silu", eos_token_id=2, tie_word_embeddings=False) | overrides


def random_model(config: dict, seed=0, scale=0.2) -> Transformer:
    """A float32 model whose logits differ clearly from token to token."""
    torch.manual_seed(seed)
    model = Transformer(ModelConfig.from_dict(config))
    for name, p in model.named_parameters():
        if "norm" in name:
            p.data.uniform_(0.5, 1.5)
        else:
            p.data.normal_(0, scale)
    return model.requires_grad_(False).eval()


def save_checkpoint(directory, model, config: dict):
    """Write config.json and model.safetensors as convert_hf_checkpoint.py would."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file({name: p.detach().contiguous() for name, p in model.named_parameters()},
              directory / "model.safetensors")
    return directory


def hf_to_ours(state: dict, n_layer: int) -> dict:
    """Hugging Face's names to ours, with q, k, v and gate, up joined."""
    ours = {"embed.weight": state["model.embed_tokens.weight"],
            "norm.weight": state["model.norm.weight"], "output.weight": state["lm_head.weight"]}
    for i in range(n_layer):
        theirs, mine = f"model.layers.{i}.", f"layers.{i}."
        for kind in ("weight", "bias"):
            if theirs + f"self_attn.q_proj.{kind}" in state:
                ours[mine + f"attn.wqkv.{kind}"] = torch.cat(
                    [state[theirs + f"self_attn.{x}_proj.{kind}"] for x in "qkv"])
        ours[mine + "attn.wo.weight"] = state[theirs + "self_attn.o_proj.weight"]
        ours[mine + "ffn.w13.weight"] = torch.cat([state[theirs + f"mlp.{x}_proj.weight"]
                                                   for x in ("gate", "up")])
        ours[mine + "ffn.w2.weight"] = state[theirs + "mlp.down_proj.weight"]
        ours[mine + "attn_norm.weight"] = state[theirs + "input_layernorm.weight"]
        ours[mine + "ffn_norm.weight"] = state[theirs + "post_attention_layernorm.weight"]
    return ours


def strings(count, seed=0):
    """Words, digits, spaces, signs, several scripts, emoji, code: mixed at random."""
    rng = random.Random(seed)
    parts = ["the", " cat", " Hello", "12345", " 7", "\n", "\n\n", "   ", "\t", " don't", "I'LL",
             "été", "e\u0301", "日本語", " привет", "مرحبا", "👩‍👩‍👧", "🎉",
             "def f(x):", " ==", "!!!", "<|eot_id|>", "#", "_", "x" * 9, "\u00a0", "ﬁ", " a", "Z",
             "."]
    return ["".join(rng.choice(parts) for _ in range(rng.randrange(1, 12))) for _ in range(count)]
