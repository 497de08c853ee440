"""The files of a checkpoint directory: config, weights, fingerprint, and writing a new directory.

Weights are safetensors, memory-mapped and read one tensor at a time; nothing is ever unpickled. A
directory is written from a plan, {name: Planned}, so memory does not grow with the model.
"""
import ctypes
import hashlib
import json
import math
import re
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from common import UserError, open_weights, read_json, refuse, replacing
from linear import Quantization, prepare
from model import ModelConfig, Transformer

FORMATS = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.int8: "I8",
           torch.uint8: "U8", torch.float8_e4m3fn: "F8_E4M3"}
PLAIN = {FORMATS[dtype]: dtype for dtype in (torch.bfloat16, torch.float16, torch.float32)}
SHARD_BYTES = 5 * 1024**3
CHUNK = 4 * 1024**2  # weights read at a time: 16 MB as float32
COPIED = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json",
          "added_tokens.json", "chat_template.jinja")


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
MULTIMODAL = "it is a multimodal model, and only text models are supported"
MIXTURE = "it is a mixture of experts, and only dense models are supported"


# ---------------------------------------------------------------- config.json

def config_from(hf: dict, where="config.json") -> ModelConfig:
    """The config that Hugging Face's keys describe.

    Raises UserError naming a missing key or a setting that is not implemented.
    """
    family = family_of(hf, where)
    said = {key: hf.get(key, default) for key, default in FAMILIES[family].items()}

    def need(key, otherwise=None, kind=int):
        value = otherwise if said[key] is None else said[key]
        refuse((value is None, f"{where}: key {key!r} is missing"),
               (not isinstance(value, kind) or value <= 0,
                f"{where}: {key} = {value!r} is no such number"))
        return value

    refuse((other := hf.get("quantization_config"), f"{where}: the weights are quantized by "
            f"{quantizer(other)} (quantization_config); take the checkpoint that is not quantized, "
            "and quantize that with quantize.py"),
           (said["hidden_act"] not in ("silu", "swish"), f"{where}: hidden_act = "
            f"{said['hidden_act']!r} is not implemented (only 'silu' is)"))
    n_head, dim, n_layer = map(need, ("num_attention_heads", "hidden_size", "num_hidden_layers"))
    n_kv_head, head_dim = need("num_key_value_heads", n_head), need("head_dim", dim // n_head)
    refuse((n_head % n_kv_head, f"{where}: num_attention_heads {n_head} is not a multiple of "
            f"num_key_value_heads {n_kv_head}"),
           (head_dim % 2, f"{where}: head_dim {head_dim} is odd, and RoPE rotates pairs"))
    freqs, scale, context = rope(hf, head_dim, need("max_position_embeddings"), where)
    window = window_of(family, said)
    return ModelConfig(
        vocab_size=need("vocab_size"), dim=dim, n_layer=n_layer, n_head=n_head,
        n_kv_head=n_kv_head, head_dim=head_dim, ffn_dim=need("intermediate_size"),
        norm_eps=need("rms_norm_eps", kind=(int, float)), rope_freqs=tuple(freqs.tolist()),
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
            said["num_hidden_layers"] > (said["max_window_layers"] or 0))
    return said["sliding_window"] if some else None


def read_config(checkpoint_dir) -> ModelConfig:
    path = Path(checkpoint_dir) / "config.json"
    if not path.exists():
        weight_files(checkpoint_dir)  # says what the directory holds if not a checkpoint
    return config_from(read_json(path), path)


def family_of(hf: dict, where) -> str:
    """The model_type, a key of FAMILIES. As in transformers it counts more than architectures,
    which only must not name a model of another kind: a classifier, a draft head.
    """
    names = hf.get("architectures")
    arch = names[0] if isinstance(names, list) and names else names or None
    family = hf.get("model_type") or ARCHITECTURES.get(arch)
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
    refuse((not isinstance(s, dict), f"{where}: the settings of RoPE are {s!r}, not an object"))
    original = "original_max_position_embeddings"
    s = s | {"rope_theta": s.get("rope_theta") or hf.get("rope_theta") or 10000.0,
             original: hf.get(original) or s.get(original) or context, "context": context}
    kind = str(s.get("rope_type", s.get("type", "default")))
    part = s.get("partial_rotary_factor", hf.get("partial_rotary_factor"))
    refuse((kind not in ROPE or any(isinstance(value, dict) for value in s.values()),
            f"{where}: rope type {kind!r} is not implemented (only {', '.join(ROPE)} are)"),
           (part not in (None, 1), f"{where}: partial_rotary_factor = {part!r} is not implemented "
            "(only 1.0 is)"))
    scaled, keys = ROPE[kind]
    given = [k for k in ("rope_theta", original, *YARN_NUMBERS) if s.get(k) is not None]
    bad = next((k for k in (*keys, *given) if not isinstance(s.get(k), (int, float)) or s[k] < 0
                or k in keys and not s[k]), None)
    refuse((bad, f"{where}: rope type {kind!r} needs {bad!r} as a positive number"))
    # The CPU and float32, whatever the defaults are: a model is also built on "meta".
    pairs = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu")
    return scaled(s["rope_theta"] ** (pairs / head_dim), s)


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


YARN_NUMBERS = ("factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim")
ROPE = {  # and what each needs
    "default": (default_rope, ()),
    "linear": (linear_rope, ("factor",)),
    "llama3": (llama3_rope, ("factor", "low_freq_factor", "high_freq_factor")),
    "yarn": (yarn_rope, ()),
}


# ---------------------------------------------------------------- names and shapes

TOP = {"embed.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight",
       "output.weight": "lm_head.weight"}
LAYER = {  # ours: theirs, joined along the rows
    "attn_norm": ["input_layernorm"], "ffn_norm": ["post_attention_layernorm"],
    "attn.wo": ["self_attn.o_proj"], "ffn.w2": ["mlp.down_proj"],
    "attn.wqkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attn.q_norm": ["self_attn.q_norm"], "attn.k_norm": ["self_attn.k_norm"],
    "ffn.w13": ["mlp.gate_proj", "mlp.up_proj"],
}


def sources(name: str) -> list[str]:
    """Hugging Face's tensors that make up our tensor `name`, in order."""
    if name in TOP:
        return [TOP[name]]
    _, layer, rest = name.split(".", 2)
    module, kind = rest.rsplit(".", 1)
    return [f"model.layers.{layer}.{theirs}.{kind}" for theirs in LAYER[module]]


def shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """Every parameter of a model, {name: shape}; tied weights have one name."""
    with torch.device("meta"):
        return {name: p.shape for name, p in Transformer(config).named_parameters()}


def source_shapes(config: ModelConfig) -> dict[str, dict[str, list[int]]]:
    """For every parameter the tensors of `sources` with their shapes, {ours: {theirs: shape}}."""
    q, kv = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
    rows = {"q_proj": q, "k_proj": kv, "v_proj": kv, "gate_proj": config.ffn_dim,
            "up_proj": config.ffn_dim}
    return {ours: {theirs: [rows.get(theirs.split(".")[-2], shape[0]), *shape[1:]]
                   for theirs in sources(ours)}
            for ours, shape in shapes(config).items()}


# ---------------------------------------------------------------- reading

def weight_files(checkpoint_dir) -> list[Path]:
    """The safetensors files of a checkpoint directory; raises UserError if any is missing."""
    directory = Path(checkpoint_dir)
    refuse((not directory.is_dir(), f"checkpoint directory {directory} does not exist"),
           ((directory / "adapter_config.json").exists(),
            f"{directory} holds a PEFT adapter (adapter_config.json), not a model; merge it into "
            "its base model first: merge_and_unload() and save_pretrained() of peft"))
    index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
    if single.exists():  # transformers takes this one too if both are there
        return [single]
    refuse((not index.exists(), no_weights(directory)))
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise UserError(f"{index}: no weight_map in it; fetch the file again")
    files = [directory / name for name in sorted(set(names.values()))]
    if missing := [f for f in files if not f.is_file()]:
        raise UserError(f"{missing[0]} is missing; fetch it again")
    return files


OTHER_FILES = (  # weights that are not read
    (r"^model-\d+-of-\d+\.safetensors$", "a shard of a checkpoint; fetch the others and "
     "model.safetensors.index.json"),
    (r"^consolidated.*\.safetensors$", "Mistral's own format; fetch model.safetensors, or "
     "model-*.safetensors and their index"),
    (r"\.safetensors$", "a name that transformers does not look for; fetch model.safetensors"),
    (r"\.gguf$", "llama.cpp's format; get the checkpoint as safetensors"),
    (r"\.(bin|pt|pth|ckpt)$", "pickled weights, which are never loaded; get the checkpoint as "
     "safetensors (on the hub: its safetensors revision, or the convert Space)"),
    (r"\.(h5|msgpack|onnx|tflite|npz)$", "another framework's format; get the checkpoint as "
     "safetensors"),
)


def no_weights(directory: Path) -> str:
    """Why a directory without model.safetensors is not a checkpoint, in words."""
    names = sorted(p.name for p in directory.iterdir())
    for pattern, what in OTHER_FILES:
        if found := [name for name in names if re.search(pattern, name)]:
            return f"{directory} holds no model.safetensors, only {found[0]}: {what}"
    return f"{directory} holds no model.safetensors and no model.safetensors.index.json"


NOT_OURS = (  # how a tensor's name can begin or end, and what it shows of a checkpoint
    (r"language_model\.|^vision_|^visual\.", MULTIMODAL),
    (r"lora_[AB]|^base_model\.model\.", "it is a PEFT adapter or wrapped by one; merge it into its "
     "base model first: merge_and_unload() and save_pretrained() of peft"),
    (r"\.(qweight|qzeros|SCB|absmax|weight_packed|weight_scale|weight_scale_inv)$",
     "its weights are quantized by another tool; take the checkpoint that is not quantized"),
    (r"\.experts\.", MIXTURE),
    (r"\.attn\.wqkv\.", "it is converted already: give it to --target, --draft or quantize.py"),
    (r"^layers\.\d+\.attention\.w", "it has Meta's or Mistral's own names; get the checkpoint in "
     "Hugging Face's format"),
    (r"^layers\.\d+\.self_attn\.", "it was saved from the model inside, without LM head; load it "
     "with AutoModelForCausalLM and save that"),
    (r"^(module|_orig_mod|transformer|model\.model)\.", "it was saved from inside a wrapper "
     "(torch.compile, DistributedDataParallel, ...); save the model itself"),
    (r"^model\.", "it is a Hugging Face checkpoint; convert it first: python "
     "convert_hf_checkpoint.py --checkpoint_dir {} --out DIR"),
)


def check_names(checkpoint_dir, expected: dict, found: set[str]):
    """Refuse a checkpoint that lacks one of the tensors `expected`, or holds another.

    What a strange name shows goes before what is missing.
    """
    strange = sorted(found - expected.keys())
    for pattern, what in NOT_OURS:
        name = next((name for name in strange if re.search(pattern, name)), None)
        if name and not any(re.search(pattern, name) for name in expected):
            raise UserError(f"{checkpoint_dir} holds a weight {name}: "
                            f"{what.format(checkpoint_dir)}")
    missing = next((name for name in expected if name not in found), None)
    refuse(
        (missing == "lm_head.weight", f"{checkpoint_dir}: weight lm_head.weight is missing, and "
         "config.json does not say tie_word_embeddings: true; one of the two files is not whole"),
        (missing, f"{checkpoint_dir}: weight {missing} is missing; fetch the checkpoint again"),
        (strange, f"{checkpoint_dir}: weight {min(strange, default='')} has no place in this "
         "architecture"))


def check_shape(checkpoint_dir, name: str, found, expected):
    refuse((list(found) != list(expected), f"{checkpoint_dir}: weight {name} has shape "
            f"{list(found)}, config.json says {list(expected)}"))


def open_tensors(checkpoint_dir, expected: dict, ignored=lambda name: False) -> dict:
    """Open the tensors `expected`, {name: shape}, of a checkpoint that is not quantized.

    Returns {name: slice} in the order of `expected`; nothing is read yet. Raises UserError if one
    is missing or has another shape, or if there are others that are not `ignored(name)`.
    """
    tensors = {name: file.get_slice(name) for path in weight_files(checkpoint_dir)
               for file in [open_weights(path)] for name in file.keys() if not ignored(name)}
    check_names(checkpoint_dir, expected, set(tensors))
    for name, shape in expected.items():
        kind = tensors[name].get_dtype()  # an integer means nothing without scales
        refuse((kind == "F64", f"{checkpoint_dir}: weight {name} is float64, which is not read; "
                "save the model as float32 or bfloat16"),
               (kind not in PLAIN, f"{checkpoint_dir}: weight {name} is {kind}; take the "
                "checkpoint that is not quantized"))
        check_shape(checkpoint_dir, name, tensors[name].get_shape(), shape)
    return {name: tensors[name] for name in expected}


def read_rows(tensors: list, dtype: torch.dtype) -> Iterator[Tensor]:
    """The rows of open tensors one after another, some at a time, as `dtype`."""
    for tensor in tensors:
        n, *columns = tensor.get_shape()
        step = max(1, CHUNK // columns[0]) if columns else n
        for i in range(0, n, step):
            yield tensor[i:i + step].to(dtype)


def load(checkpoint_dir, device="cpu", dtype=torch.bfloat16, build=Transformer,
         read=lambda file, name: file.get_tensor(name)) -> Transformer:
    """The checkpoint's model, ready to run; raises UserError if it does not fit its config.json.

    Peak memory is the model plus one tensor: each goes straight to `device`. On a CPU, linear
    layers are packed (linear.py), and small float32 ones are held twice. `build(config)` and
    `read(file, name)` can make another model of it, such as one rank's share.
    """
    files = weight_files(checkpoint_dir)
    config = read_config(checkpoint_dir)
    if config.quantization:
        config.quantization.check_device(device, checkpoint_dir)
    with torch.device("meta"):
        model = build(config)
    quantized = dict(model.named_buffers())  # these keep the dtype that they have in the file
    expected = dict(model.named_parameters()) | quantized
    found = {name for path in files for name in open_weights(path).keys()}
    check_names(checkpoint_dir, expected, found)
    weights = {}
    for path in files:
        with open_weights(path, device) as file:
            for name in file.keys():
                tensor = read(file, name)
                weights[name] = tensor if name in quantized else tensor.to(dtype)
    for name, tensor in weights.items():
        check_shape(checkpoint_dir, name, tensor.shape, expected[name].shape)
        if name in quantized and tensor.dtype != quantized[name].dtype:
            raise UserError(f"{checkpoint_dir}: weight {name} is {tensor.dtype}, config.json says "
                            f"{quantized[name].dtype}; quantize again")
    # strict=False: tied weights have one name here; the names were checked above.
    model.load_state_dict(weights, assign=True, strict=False)
    if model.config.tied:
        model.output.weight = model.embed.weight
    weights.clear()  # so that a tensor is freed when `prepare` replaces it
    prepare(model, dtype)
    return model.requires_grad_(False).eval()


def fingerprint(checkpoint_dir) -> str:
    """16 hex digits that tell one model's weights from another's.

    They hash up to 256 numbers of three rows of every tensor, rounded to bfloat16: that takes
    milliseconds at any size, and a float32 copy of a bfloat16 checkpoint has the same fingerprint.
    """
    digest = {}
    for path in weight_files(checkpoint_dir):
        with open_weights(path) as file:
            for name in file.keys():
                tensor = file.get_slice(name)
                n = tensor.get_shape()[0]
                sample = torch.stack([tensor[i:i + 1].flatten()[:256] for i in (0, n // 2, n - 1)])
                data = sample.to(torch.bfloat16).view(torch.uint8).flatten().tolist()
                digest[name] = f"{name} {tensor.get_shape()} ".encode() + bytes(data)
    return hashlib.sha256(b"".join(digest[name] for name in sorted(digest))).hexdigest()[:16]


# ---------------------------------------------------------------- writing

class Planned(NamedTuple):
    """A tensor to be written; its parts, joined along the rows, are read when they are needed."""
    shape: torch.Size
    dtype: torch.dtype
    parts: Iterator[Tensor]

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


def write_safetensors(path, tensors: dict[str, Planned], progress):
    """Write a safetensors file: header length, JSON header, the bytes of each part as it is read.

    A joined tensor is never in memory, for the rows of its parts just follow each other.
    """
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": FORMATS[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [at, at + tensor.nbytes]}
        at += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            for data in tensor.parts:
                data = data.contiguous()
                # The tensor's own memory, no copy. NumPy has no bfloat16 to lend it.
                f.write((ctypes.c_ubyte * data.nbytes).from_address(data.data_ptr()))
                del data  # before the next part is made
            progress.update()


def write_weights(planned: dict[str, Planned], out: Path, shard_bytes=SHARD_BYTES):
    """Write planned tensors into the directory `out`: one file, or numbered shards and an index.

    A shard has at most `shard_bytes`, or a single tensor.
    """
    shards, size = [{}], 0
    for name, tensor in planned.items():
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards, size = [*shards, {}], 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    many = len(shards)
    files = ["model.safetensors"] if many == 1 else [
        f"model-{i:05}-of-{many:05}.safetensors" for i in range(1, many + 1)]
    # disable=None: no progress bar in a log file
    with tqdm(total=len(planned), unit="tensor", desc="writing", disable=None) as progress:
        for file, tensors in zip(files, shards):
            write_safetensors(out / file, tensors, progress)
    if many > 1:
        index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in planned.values())},
                 "weight_map": {name: file for file, part in zip(files, shards) for name in part}}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def write_checkpoint(source: Path, out: Path, planned: dict[str, Planned], config: dict,
                     tokenizer: dict[str, bytes]):
    """Make the checkpoint directory `out`, whole or not at all.

    It gets the planned weights, config.json, the tokenizer's files {name: content}, and the files
    of COPIED that `source` has.
    """
    with replacing(out) as tmp:
        tmp.mkdir()
        try:
            write_weights(planned, tmp)
        except SafetensorError as e:
            raise UserError(
                f"the weights of {source} cannot be read ({e}); fetch them again") from None
        for name, data in tokenizer.items():
            (tmp / name).write_bytes(data)
        for name in COPIED:
            if (source / name).exists():
                shutil.copyfile(source / name, tmp / name)
        (tmp / "config.json").write_text(json.dumps(config, indent=2) + "\n")
