"""The files of a checkpoint directory: config, weights, fingerprint, and writing a new directory.

Weights are safetensors, memory-mapped and read one tensor at a time; nothing is unpickled here. A
directory is written from a plan, {name: Planned}, so memory does not grow with the model.
"""
import ctypes
import hashlib
import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from common import (
    UserError,
    is_finite,
    open_weights,
    present,
    read_bytes,
    read_json,
    read_text,
    refuse,
    replacing,
)
from formats.config import MIXTURE, MULTIMODAL, config_fields
from linear import prepare
from model import ModelConfig, Transformer

FORMATS = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.int8: "I8",
           torch.uint8: "U8", torch.float8_e4m3fn: "F8_E4M3"}
WRITTEN = FORMATS | {torch.int64: "I64", torch.bool: "BOOL"}  # an EAGLE head's maps of ids too
PLAIN = {FORMATS[dtype]: dtype for dtype in (torch.bfloat16, torch.float16, torch.float32)}
SHARD_BYTES = 5 * 1024**3
CHUNK = 4 * 1024**2  # weights read at a time: 16 MB as float32
COPIED = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json",
          "added_tokens.json", "chat_template.jinja")


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

def config_from(hf: dict, where="config.json") -> ModelConfig:
    """The config that Hugging Face's keys describe; raises UserError for what is not there."""
    return ModelConfig(**config_fields(hf, where))


def read_config(checkpoint_dir) -> ModelConfig:
    path = Path(checkpoint_dir) / "config.json"
    if not path.exists():
        weight_files(checkpoint_dir)  # says what the directory holds if not a checkpoint
    return config_from(read_json(path), path)


def weight_files(checkpoint_dir) -> list[Path]:
    """The safetensors files of a checkpoint directory; raises UserError if any is missing."""
    directory = Path(checkpoint_dir)
    refuse((not directory.is_dir(), f"checkpoint directory {directory} "
            f"{'is a file' if directory.exists() else 'does not exist'}"),
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
    for name in names.values():  # nothing beside the directory is read; a link in it may lead out
        refuse((not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts,
                f"{index}: {name!r} is no file of this directory; fetch the index again"))
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
    lost = next((p for p in sorted(directory.iterdir()) if not p.exists()), None)
    if lost:
        return f"{lost} is a link to a file that is not there; fetch the checkpoint again"
    names = sorted(p.name for p in directory.iterdir())
    for pattern, what in OTHER_FILES:
        if found := [name for name in names if re.search(pattern, name)]:
            return f"{directory} holds no model.safetensors, only {found[0]}: {what}"
    return (f"{directory} holds no model.safetensors and no model.safetensors.index.json; give a "
            "checkpoint's directory")


NOT_OURS = (  # how a tensor's name can begin or end, and what it shows of a checkpoint
    (r"^(model\.)?fc\.weight$", "it is an EAGLE head, not a model; give it "
     "to generate.py as --draft, to eval.py and benchmark.py as --eagle"),
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


def check_finite(checkpoint_dir, name: str, tensor: Tensor):
    refuse((not is_finite(tensor), f"{checkpoint_dir}: weight {name} holds NaN or an infinity; "
            "fetch the checkpoint again"))


def slices(checkpoint_dir) -> dict:
    """{name: slice} of every tensor of a checkpoint; nothing is read yet."""
    found = {}
    for path in weight_files(checkpoint_dir):
        file = open_weights(path)
        for name in file.keys():
            refuse((name in found, f"{path}: weight {name} is in another file too; fetch the "
                    "checkpoint again"))
            found[name] = file.get_slice(name)
    return found


def check_plain(checkpoint_dir, name: str, kind: str):
    """Refuse a dtype that means nothing by itself, such as an integer without scales."""
    refuse((kind == "F64", f"{checkpoint_dir}: weight {name} is float64, which is not read; save "
            "the model as float32 or bfloat16"),
           (kind not in PLAIN, f"{checkpoint_dir}: weight {name} is {kind}; take the checkpoint "
            "that is not quantized"))


def open_tensors(checkpoint_dir, expected: dict, ignored=lambda name: False) -> dict:
    """Open the tensors `expected`, {name: shape}, of a checkpoint that is not quantized.

    Returns {name: slice} in the order of `expected`; nothing is read yet. Raises UserError if one
    is missing or has another shape, or if there are others that are not `ignored(name)`.
    """
    tensors = {k: v for k, v in slices(checkpoint_dir).items() if not ignored(k)}
    check_names(checkpoint_dir, expected, set(tensors))
    for name, shape in expected.items():
        check_plain(checkpoint_dir, name, tensors[name].get_dtype())
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
    check_names(checkpoint_dir, expected, set(slices(checkpoint_dir)))
    weights = {}
    for path in files:
        with open_weights(path, device) as file:
            for name in file.keys():
                kind = file.get_slice(name).get_dtype()
                if name not in quantized:
                    check_plain(checkpoint_dir, name, kind)
                elif kind != (says := FORMATS[quantized[name].dtype]):
                    raise UserError(f"{checkpoint_dir}: weight {name} is {kind}, config.json says "
                                    f"{says}; quantize again")
                tensor = read(file, name)
                tensor = weights[name] = tensor if name in quantized else tensor.to(dtype)
                check_finite(checkpoint_dir, name, tensor)
    for name, tensor in weights.items():
        check_shape(checkpoint_dir, name, tensor.shape, expected[name].shape)
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
    for name, tensor in slices(checkpoint_dir).items():
        shape, kind = tensor.get_shape(), tensor.get_dtype()
        refuse((kind not in FORMATS.values() or 0 in (shape or [0]), f"{checkpoint_dir}: weight "
                f"{name} is {kind} {shape}, as none of a model's weights is"))
        sample = torch.stack([tensor[i:i + 1].flatten()[:256]
                              for i in (0, shape[0] // 2, shape[0] - 1)])
        data = sample.to(torch.bfloat16).view(torch.uint8).flatten().tolist()
        digest[name] = f"{name} {shape} ".encode() + bytes(data)
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
        header[name] = {"dtype": WRITTEN[tensor.dtype], "shape": list(tensor.shape),
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


def finite_parts(checkpoint_dir, name: str, parts: Iterator[Tensor]) -> Iterator[Tensor]:
    """The parts as they are read; raises UserError at one that is not finite."""
    for part in parts:
        check_finite(checkpoint_dir, name, part)
        yield part


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


def copied(source: Path) -> dict[str, bytes]:
    """{name: content} of the files of COPIED that a directory has; raises UserError for a bad one.
    """
    there = [source / name for name in COPIED if present(source / name)]
    for path in there:
        (read_json if path.suffix == ".json" else read_text)(path)
    return {path.name: read_bytes(path) for path in there}


def write_checkpoint(out: Path, source: Path, planned: dict[str, Planned], config: dict,
                     files: dict[str, bytes]):
    """Make the checkpoint directory `out`, whole or not at all.

    It gets the planned weights, read from `source`, config.json, and other files {name: content}.
    """
    with replacing(out) as tmp:
        tmp.mkdir()
        checked = {name: tensor._replace(parts=finite_parts(source, name, tensor.parts))
                   for name, tensor in planned.items()}
        try:
            write_weights(checked, tmp)
        except SafetensorError as e:
            raise UserError(
                f"the weights of {source} cannot be read ({e}); fetch them again") from None
        for name, data in files.items():
            (tmp / name).write_bytes(data)
        (tmp / "config.json").write_text(json.dumps(config, indent=2) + "\n")
