"""Convert a Hugging Face checkpoint directory to ours: joined projections and plain names.

    python convert_hf_checkpoint.py --checkpoint_dir HF_DIR --out DIR

An EAGLE head keeps its published names and becomes safetensors: many are pickled. This is the one
place where a pickle is read, and only as tensors (torch.load's weights_only): it runs no code.

Weights stream from file to file some rows at a time, so memory does not grow with the model. The
directory is written under a temporary name and renamed when it is whole. The tokenizer's files are
kept as they are. RoPE keeps Hugging Face's layout.
"""
import contextlib
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from checkpoint import (
    PLAIN,
    TOP,
    WRITTEN,
    Planned,
    config_from,
    copied,
    no_weights,
    open_tensors,
    read_rows,
    shapes,
    slices,
    source_shapes,
    weight_files,
    write_checkpoint,
)
from common import (
    Parser,
    check_file,
    check_writable,
    open_weights,
    read_bytes,
    read_json,
    refuse,
    run,
    say,
    tell,
)
from drafters.eagle_head import MAPS, is_eagle, is_pickled, names_head, plain_names, skeleton
from load import dtype_name, read_vocabulary
from model import DTYPES, ModelConfig

EMBED, HEAD = TOP["embed.weight"], TOP["output.weight"]


def embedding_and_head(checkpoint_dir) -> dict:
    """{name: slice} of the two, as far as the files have them; nothing is read yet."""
    return {name: file.get_slice(name) for path in weight_files(checkpoint_dir)
            for file in [open_weights(path)] for name in file.keys() if name in (EMBED, HEAD)}


def tell_rounded(source, kinds: set[str], dtype: torch.dtype):
    """Say which of the files' dtypes bfloat16 rounds."""
    if finer := sorted(dtype_name(PLAIN[kind]) for kind in kinds - {"BF16"}):
        if dtype == torch.bfloat16:
            tell(f"{source}: weights of {' and '.join(finer)} are rounded to bfloat16; --dtype "
                 "float32 keeps them")


def write(out: Path, source: Path, planned: dict[str, Planned], hf: dict, files: dict[str, bytes],
          dtype: torch.dtype):
    # transformers 5 writes the key "dtype" instead.
    hf = hf | {key: dtype_name(dtype) for key in {"torch_dtype"} | (hf.keys() & {"dtype"})}
    write_checkpoint(out, source, planned, hf, files)
    say(f"{source} -> {out}: {sum(t.shape.numel() for t in planned.values()):,} parameters in "
        f"{dtype_name(dtype)}")


def is_tied(checkpoint_dir, config: ModelConfig) -> bool:
    """Whether embedding and LM head are one matrix: if config.json says so and the files agree.

    A head in the files that differs from the embedding counts, as in transformers 5 (transformers 4
    took the embedding all the same).
    """
    found = embedding_and_head(checkpoint_dir)
    if not config.tied or len(found) < 2:
        return config.tied
    embed, head = (read_rows([found[name]], torch.float32) for name in (EMBED, HEAD))
    return (found[EMBED].get_shape() == found[HEAD].get_shape()
            and all(map(torch.equal, embed, head)))


def plan(checkpoint_dir, config: ModelConfig, dtype: torch.dtype) -> dict[str, Planned]:
    """Our tensors, checked to the last one before anything is written."""
    parts = source_shapes(config)
    if config.tied and embedding_and_head(checkpoint_dir).keys() == {HEAD}:
        parts["embed.weight"] = {HEAD: parts["embed.weight"][EMBED]}  # saved under its other name
    expected = {name: shape for part in parts.values() for name, shape in part.items()}

    def ignored(name):  # a table that is computed, and a tied head's copy of the embedding
        return name.endswith("rotary_emb.inv_freq") or (
            config.tied and name == HEAD and name not in expected)

    tensors = open_tensors(checkpoint_dir, expected, ignored)
    return {name: Planned(shape, dtype, read_rows([tensors[part] for part in parts[name]], dtype))
            for name, shape in shapes(config).items()}


def convert(source: Path, out: Path, dtype: torch.dtype):
    hf = read_json(source / "config.json")
    config = config_from(hf, source / "config.json")
    refuse((config.quantization, f"{source} is converted and quantized already; give it to "
            "--target or --draft"))
    if untied := config.tied and not is_tied(source, config):
        config, hf["tie_word_embeddings"] = replace(config, tied=False), False
    planned = plan(source, config, dtype)
    path, files = read_vocabulary(source)[1].path, copied(source)
    tell_rounded(source, {t.get_dtype() for t in embedding_and_head(source).values()}, dtype)
    if untied:
        tell(f"{source}: lm_head.weight differs from the embedding, so both are kept as "
             "transformers does, although config.json says tie_word_embeddings: true")
    write(out, source, planned, hf, files | {path.name: read_bytes(path)}, dtype)


# ---------------------------------------------------------------- EAGLE heads

class Pickled:
    """A tensor from a pickle, to be read as a safetensors slice is."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor

    def get_shape(self) -> list[int]:
        return list(self.tensor.shape)

    def get_dtype(self) -> str:
        return WRITTEN.get(self.tensor.dtype, dtype_name(self.tensor.dtype))

    def __getitem__(self, rows) -> Tensor:
        return self.tensor[rows]


def pickled_tensors(path: Path) -> dict[str, Pickled]:
    """The tensors of a pickled state dict, memory-mapped; raises UserError for anything else.

    weights_only: a pickle that names any function or class but those that tensors are made of is
    not loaded, and nothing of it runs.
    """
    check_file(path)
    state = None
    for mmap in True, False:  # files of before PyTorch 1.6 cannot be mapped
        with contextlib.suppress(Exception):  # of many kinds: what the file holds decides
            state = state or torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    refuse((not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(t, Tensor) and t.layout == torch.strided
        and t.device.type == "cpu" for name, t in state.items()),
        f"{path} is not a pickled dict of tensors alone, or it is damaged; nothing of it was run: "
        "fetch it again, or get the head as safetensors"))
    return {name: Pickled(t) for name, t in state.items()}


def head_tensors(source: Path) -> dict:
    """{published name: slice} of an EAGLE head, pickled or not; refuses other pickles."""
    if not is_pickled(source):
        return plain_names(source, slices(source))
    tensors = pickled_tensors(source / "pytorch_model.bin")
    refuse((not names_head(tensors), no_weights(source)))
    return plain_names(source, tensors)


def convert_head(source: Path, out: Path, dtype: torch.dtype):
    """Write an EAGLE head as safetensors, with its published names."""
    tensors = head_tensors(source)
    skeleton(source, tensors)  # refuses what cannot be loaded
    kinds = {name: MAPS.get(name, dtype) for name in tensors}
    planned = {name: Planned(torch.Size(t.get_shape()), kinds[name], read_rows([t], kinds[name]))
               for name, t in tensors.items()}
    hf, files = read_json(source / "config.json"), copied(source)
    tell_rounded(source, {t.get_dtype() for name, t in tensors.items() if name not in MAPS}, dtype)
    write(out, source, planned, hf, files, dtype)


# ---------------------------------------------------------------- command line

def main():
    p = Parser(description="Convert a Hugging Face checkpoint (safetensors) of "
                                "the Llama, Mistral, Qwen2 or Qwen3 family, or an EAGLE head "
                                "(of which pytorch_model.bin is read too, as tensors only).")
    p.add_argument("--checkpoint_dir", type=Path, required=True,
                   help="Hugging Face directory: config.json, safetensors, tokenizer")
    p.add_argument("--out", type=Path, required=True, help="directory to make")
    p.add_argument("--dtype", choices=DTYPES, default="bfloat16",
                   help="of the weights written (default bfloat16, whatever the source has)")
    args = p.parse_args()
    source, out, dtype = args.checkpoint_dir, args.out, DTYPES[args.dtype]
    refuse((not source.is_dir(), f"--checkpoint_dir {source} is not a directory"),
           (source.is_dir() and not any(source.iterdir()),
            f"--checkpoint_dir {source} is empty; fetch the checkpoint into it"),
           (out.exists(), f"--out {out} exists; remove it or choose another"))
    check_writable(out)
    # Either says what the directory holds if not a checkpoint.
    (convert_head if is_eagle(source) else convert)(source, out, dtype)


if __name__ == "__main__":
    run(main)
