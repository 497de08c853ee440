"""config.json as Hugging Face writes it: the fields of model.ModelConfig, RoPE's frequencies too.

Llama, Mistral, Qwen2 and Qwen3, dense; whatever else it asks for is refused by name.
"""
import math

import torch
from torch import Tensor

from common import (
    FLAG,
    OBJECT,
    TEXT,
    UserError,
    check_kinds,
    list_of,
    number,
    refuse,
    whole,
)
from linear import Quantization

# What transformers' config classes (5.24) take where config.json lacks a key, by model_type. A key
# that a family does not have, such as Mistral attention_bias, means nothing to it.
ANY = dict(vocab_size=None, hidden_size=None, num_hidden_layers=None, num_attention_heads=None,
           intermediate_size=None, head_dim=None, hidden_act="silu", rms_norm_eps=1e-6,
           tie_word_embeddings=False)
QWEN = ANY | dict(max_position_embeddings=32768, num_key_value_heads=32, sliding_window=4096,
                  use_sliding_window=False, max_window_layers=28, layer_types=None)
FAMILIES = {
    "llama": ANY | dict(max_position_embeddings=2048, num_key_value_heads=None,
                        attention_bias=False, mlp_bias=False),
    "mistral": ANY | dict(max_position_embeddings=131072, num_key_value_heads=8,
                          sliding_window=4096),
    "qwen2": QWEN,
    "qwen3": QWEN | dict(head_dim=128, attention_bias=False),
}
ARCHITECTURES = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral",
                 "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}
# What values must be: so that no product of sizes overflows, and no RoPE divides by zero.
SIZE, CONTEXT, TEXTS = whole(1, 1 << 24), whole(1, 1 << 31), list_of(TEXT, "texts")
KINDS = dict(
    vocab_size=SIZE, hidden_size=SIZE, intermediate_size=SIZE, num_hidden_layers=whole(1, 1000),
    num_attention_heads=whole(1, 1 << 16), num_key_value_heads=whole(1, 1 << 16),
    head_dim=whole(2, 1 << 16), hidden_act=TEXT, rms_norm_eps=number(0, 1, above=True),
    tie_word_embeddings=FLAG, attention_bias=FLAG, mlp_bias=FLAG, max_position_embeddings=CONTEXT,
    sliding_window=CONTEXT, use_sliding_window=FLAG, max_window_layers=whole(0), layer_types=TEXTS)
ROPE_KINDS = dict(
    rope_type=TEXT, type=TEXT, rope_theta=number(1, 1e30, above=True), truncate=FLAG,
    original_max_position_embeddings=number(1, 1 << 31), partial_rotary_factor=number(),
    **dict.fromkeys(("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow",
                     "attention_factor", "mscale", "mscale_all_dim"), number(0, 1e6)))
OTHER_KINDS = dict(architectures=TEXT | TEXTS, model_type=TEXT, rope_scaling=OBJECT,
                   rope_parameters=OBJECT, quantization=OBJECT)
QUANTIZATION_KINDS = dict(mode=TEXT, group_size=whole(1), parent=TEXT)
MULTIMODAL = "it is a multimodal model, and only text models are supported"
MIXTURE = "it is a mixture of experts, and only dense models are supported"


# ---------------------------------------------------------------- config.json

def config_fields(hf: dict, where) -> dict:
    """ModelConfig's fields for what Hugging Face's keys describe.

    Raises UserError naming a missing key, a value that cannot be, or a setting that is not
    implemented.
    """
    check_kinds(hf, OTHER_KINDS, where)
    family = family_of(hf, where)
    said = {key: hf.get(key, default) for key, default in FAMILIES[family].items()}
    if not said.get("use_sliding_window", True):
        said["sliding_window"] = None
    check_kinds(said, {key: KINDS[key] for key in said}, where)
    check_kinds(hf.get("quantization") or {}, QUANTIZATION_KINDS, f"{where}, quantization")

    def need(key, otherwise=None):
        value = otherwise if said[key] is None else said[key]
        refuse((value is None, f"{where}: key {key!r} is missing"))
        return value

    window = window_of(family, said)
    refuse((other := hf.get("quantization_config"), f"{where}: the weights are quantized by "
            f"{quantizer(other)} (quantization_config); take the checkpoint that is not quantized, "
            "and quantize that with quantize.py"),
           (said["hidden_act"] not in ("silu", "swish"), f"{where}: hidden_act = "
            f"{said['hidden_act']!r} is not implemented (only 'silu' is)"))
    n_head, dim, n_layer = map(need, ("num_attention_heads", "hidden_size", "num_hidden_layers"))
    n_kv_head, head_dim = need("num_key_value_heads", n_head), need("head_dim", dim // n_head)
    refuse((head_dim < 1, f"{where}: hidden_size {dim} is less than num_attention_heads {n_head}"),
           (n_head % n_kv_head, f"{where}: num_attention_heads {n_head} is not a multiple of "
            f"num_key_value_heads {n_kv_head}"),
           (head_dim % 2, f"{where}: head_dim {head_dim} is odd, and RoPE rotates pairs"))
    freqs, scale, context = rope(hf, head_dim, need("max_position_embeddings"), where)
    return dict(
        vocab_size=need("vocab_size"), dim=dim, n_layer=n_layer, n_head=n_head,
        n_kv_head=n_kv_head, head_dim=head_dim, ffn_dim=need("intermediate_size"),
        norm_eps=need("rms_norm_eps"), rope_freqs=tuple(freqs.tolist()),
        rope_scale=scale, max_seq_len=min(context, window or context), sliding_window=window,
        tied=bool(said["tie_word_embeddings"]),
        qkv_bias=family == "qwen2" or bool(said.get("attention_bias")),
        wo_bias=bool(said.get("attention_bias")), mlp_bias=bool(said.get("mlp_bias")),
        qk_norm=family == "qwen3",
        quantization=Quantization.from_dict(hf.get("quantization"), where))


def window_of(family: str, said: dict) -> int | None:
    """The sliding window of a model's layers. Qwen has one in some layers, if it says so."""
    if family == "mistral":
        return said["sliding_window"]
    if not said.get("use_sliding_window"):
        return None
    some = ("sliding_attention" in said["layer_types"] if said["layer_types"] else
            (said["num_hidden_layers"] or 0) > (said["max_window_layers"] or 0))
    return said["sliding_window"] if some else None


def family_of(hf: dict, where) -> str:
    """The model_type, a key of FAMILIES. As in transformers it counts more than architectures,
    which only must not name a model of another kind: a classifier, a draft head.
    """
    names = hf.get("architectures")
    arch = names[0] if isinstance(names, list) and names else names or None
    family = str(hf.get("model_type") or ARCHITECTURES.get(str(arch), ""))
    # LLaMAForCausalLM is how the first conversions spelled it.
    known = arch is None or str(arch).lower() in map(str.lower, ARCHITECTURES)
    if known and family in FAMILIES:
        return family
    refuse((not arch and not family, f"{where}: it has neither architectures nor model_type, so "
            "which model it describes is unknown"))
    what = f"model_type {family!r}" if known else f"architecture {arch!r}"
    experts = any(hf.get(f"{k}_experts") for k in ("num", "num_local", "n_routed"))
    why = (MULTIMODAL if hf.keys() & {"text_config", "vision_config", "audio_config"} else
           MIXTURE if experts or "moe" in f"{arch} {family}".lower() else
           "it was saved without its LM head" if str(arch).endswith("Model") else None)
    raise UserError(f"{where}: {what} is not supported{': ' * bool(why)}{why or ''} (supported: "
                    f"{', '.join(ARCHITECTURES)})")


def quantizer(settings) -> str:
    """Who made the weights that `quantization_config` describes: gptq, awq, fp8, ..."""
    settings = settings if isinstance(settings, dict) else {}
    bits = any(settings.get(f"load_in_{n}bit") for n in (4, 8))  # before it named itself
    return settings.get("quant_method") or ("bitsandbytes" if bits else "another tool")


# ---------------------------------------------------------------- RoPE
# As transformers' modeling_rope_utils, to the last bit: at position 8,000 another rounding of the
# frequencies moves logits by 1e-3. Each function takes the positions per radian without scaling,
# float32 [head_dim / 2], and the settings; it returns (radians per position, scale of cosines and
# sines, context).

def rope(hf: dict, head_dim: int, context: int, where) -> tuple[Tensor, float, int]:
    """The frequencies that config.json asks for, by rope_parameters or rope_theta + rope_scaling.

    context: max_position_embeddings. Raises UserError naming a kind that is not implemented, or a
    setting that is missing.
    """
    s = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    refuse((any(isinstance(value, dict) for value in s.values()), f"{where}: layers with a RoPE of "
            "their own are not implemented"))
    check_kinds(s, ROPE_KINDS, f"{where}, RoPE")
    original = "original_max_position_embeddings"
    check_kinds(hf, {key: ROPE_KINDS[key] for key in (
        "rope_theta", original, "partial_rotary_factor")}, where)
    s = s | {"rope_theta": s.get("rope_theta") or hf.get("rope_theta") or 10000.0,
             original: hf.get(original) or s.get(original) or context, "context": context}
    kind = str(s.get("rope_type", s.get("type", "default")))
    part = s.get("partial_rotary_factor", hf.get("partial_rotary_factor"))
    refuse((kind not in ROPE, f"{where}: rope type {kind!r} is not implemented (only "
            f"{', '.join(ROPE)} are)"),
           (part not in (None, 1), f"{where}: partial_rotary_factor = {part!r} is not implemented "
            "(only 1.0 is)"))
    scaled, keys = ROPE[kind]
    bad = next((k for k in keys if not s.get(k)), None)
    refuse((bad, f"{where}: rope type {kind!r} needs {bad!r} as a positive number"))
    # The CPU and float32, whatever the defaults are: a model is also built on "meta".
    pairs = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu")
    freqs, scale, context = scaled(float(s["rope_theta"]) ** (pairs / head_dim), s)
    refuse((not freqs.isfinite().all() or not 0 < scale < math.inf or context < 1,
            f"{where}: rope type {kind!r} with these settings gives no finite frequencies"))
    return freqs, scale, context


def default_rope(periods, s):
    return 1 / periods, 1.0, s["context"]


def linear_rope(periods, s):
    """Chen et al., arXiv 2306.15595; max_position_embeddings is the context before, as in vLLM."""
    return 1 / periods / s["factor"], 1.0, int(s["context"] * s["factor"])


def llama3_rope(periods, s):
    """Llama 3.1: wavelengths beyond the original context are stretched, short ones kept."""
    low, high, freqs = s["low_freq_factor"], s["high_freq_factor"], 1 / periods
    rotations = s["original_max_position_embeddings"] / (2 * math.pi / freqs)
    keep = ((rotations - low) / (high - low)).clamp(0, 1)
    return keep * freqs + (1 - keep) * freqs / s["factor"], 1.0, s["context"]


def yarn_rope(periods, s):
    """Peng et al., arXiv 2309.00071: as Llama 3.1's, with a ramp over the pairs' indices, and
    sharper attention.
    """
    dim, original = 2 * len(periods), s["original_max_position_embeddings"]
    factor = s.get("factor") or s["context"] / original

    def pair(rotations):  # twice the index of the pair that turns so often in the original context
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(
            s["rope_theta"]))

    def mscale(weight):
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    low, high = pair(s.get("beta_fast") or 32), pair(s.get("beta_slow") or 1)
    if s.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    index = torch.arange(len(periods), dtype=torch.float32, device="cpu")
    keep = 1 - ((index - low) / ((high - low) or 0.001)).clamp(0, 1)
    scale, weights = s.get("attention_factor"), (s.get("mscale"), s.get("mscale_all_dim"))
    if scale is None:
        scale = mscale(weights[0]) / mscale(weights[1]) if all(weights) else mscale(1)
    # vLLM takes the product as the context, transformers' users max_position_embeddings.
    context = max(s["context"], int(original * factor))
    return 1 / (factor * periods) * (1 - keep) + 1 / periods * keep, float(scale), context


ROPE = {  # and what each needs
    "default": (default_rope, ()),
    "linear": (linear_rope, ("factor",)),
    "llama3": (llama3_rope, ("factor", "low_freq_factor", "high_freq_factor")),
    "yarn": (yarn_rope, ()),
}
