"""Convert a Hugging Face checkpoint directory to ours: joined projections and plain names.

    python convert_hf_checkpoint.py --checkpoint_dir HF_DIR --out DIR

Weights stream from file to file some rows at a time, so memory does not grow with the model. The
directory is written under a temporary name and renamed when it is whole. The tokenizer's files are
kept as they are. RoPE keeps Hugging Face's layout.
"""
from dataclasses import replace
from pathlib import Path

import torch

from checkpoint import (
    PLAIN,
    TOP,
    Planned,
    config_from,
    copied,
    open_tensors,
    read_rows,
    shapes,
    source_shapes,
    weight_files,
    write_checkpoint,
)
from common import (
    Parser,
    check_writable,
    open_weights,
    read_bytes,
    read_json,
    refuse,
    run,
    say,
    tell,
)
from load import dtype_name, read_vocabulary
from model import DTYPES, ModelConfig

EMBED, HEAD = TOP["embed.weight"], TOP["output.weight"]


def embedding_and_head(checkpoint_dir) -> dict:
    """{name: slice} of the two, as far as the files have them; nothing is read yet."""
    return {name: file.get_slice(name) for path in weight_files(checkpoint_dir)
            for file in [open_weights(path)] for name in file.keys() if name in (EMBED, HEAD)}


def kept_better(checkpoint_dir) -> str:
    """The dtypes of the files' embedding and head that bfloat16 rounds, in words, or ""."""
    kinds = {tensor.get_dtype() for tensor in embedding_and_head(checkpoint_dir).values()}
    return " and ".join(sorted(dtype_name(PLAIN[kind]) for kind in kinds - {"BF16"}))


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


# ---------------------------------------------------------------- command line

def main():
    p = Parser(description="Convert a Hugging Face checkpoint (safetensors) of "
                                "the Llama, Mistral, Qwen2 or Qwen3 family.")
    p.add_argument("--checkpoint_dir", type=Path, required=True,
                   help="Hugging Face directory: config.json, safetensors, tokenizer")
    p.add_argument("--out", type=Path, required=True, help="directory to make")
    p.add_argument("--dtype", choices=DTYPES, default="bfloat16",
                   help="of the weights written (default bfloat16, whatever the source has)")
    args = p.parse_args()
    source, out = args.checkpoint_dir, args.out
    refuse((not source.is_dir(), f"--checkpoint_dir {source} is not a directory"),
           (source.is_dir() and not any(source.iterdir()),
            f"--checkpoint_dir {source} is empty; fetch the checkpoint into it"),
           (out.exists(), f"--out {out} exists; remove it or choose another"))
    check_writable(out)
    weight_files(source)  # says what the directory holds if not a checkpoint
    hf = read_json(source / "config.json")
    config = config_from(hf, source / "config.json")
    refuse((config.quantization, f"{source} is converted and quantized already; give it to "
            "--target or --draft"))
    if untied := config.tied and not is_tied(source, config):
        config, hf["tie_word_embeddings"] = replace(config, tied=False), False
    planned = plan(source, config, DTYPES[args.dtype])
    path, files = read_vocabulary(source)[1].path, copied(source)
    if args.dtype == "bfloat16" and (kinds := kept_better(source)):
        tell(f"{source}: weights of {kinds} are rounded to bfloat16; --dtype float32 keeps them")
    if untied:
        tell(f"{source}: lm_head.weight differs from the embedding, so both are kept as "
             "transformers does, although config.json says tie_word_embeddings: true")
    # transformers 5 writes the key "dtype" instead.
    hf |= {key: args.dtype for key in {"torch_dtype"} | (hf.keys() & {"dtype"})}
    write_checkpoint(out, source, planned, hf, files | {path.name: read_bytes(path)})
    say(f"{source} -> {out}: {sum(t.shape.numel() for t in planned.values()):,} parameters in "
        f"{args.dtype}")


if __name__ == "__main__":
    run(main)
