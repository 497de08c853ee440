"""Quantize the linear layers of a checkpoint: int8, int4 or fp8 weights.

    python quantize.py --checkpoint_dir DIR --mode int8|int4|fp8 --out DIR

The result is an ordinary checkpoint directory whose config.json names the mode, so no other command
needs a flag. Embedding and norms stay as they are, and so does an LM head that is tied to the
embedding; linear.py says what each mode does. Weights stream from file to file some rows at a time,
so memory does not grow with the model. Weights are rounded to the nearest value, without
calibration data.
"""
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from checkpoint import (
    PLAIN,
    Planned,
    config_from,
    copied,
    fingerprint,
    open_tensors,
    read_rows,
    shapes,
    weight_files,
    write_checkpoint,
)
from common import (
    Parser,
    UserError,
    check_writable,
    read_bytes,
    read_json,
    refuse,
    run,
    say,
    tell,
)
from linear import GROUP_SIZES, MODES, Quantization, QuantizedLinear
from load import read_vocabulary
from model import ModelConfig, Transformer


def quantized(layer: QuantizedLinear, tensor) -> dict[str, Iterator[Tensor]]:
    """The parts of each of the layer's tensors, to be read in this order.

    Quantizing the weight gives the scales too; they are small and wait for their turn.
    """
    kept = {name: [] for name, _ in layer.named_buffers() if name != "weight"}

    def weight():
        for rows in read_rows([tensor], torch.float32):
            tensors = layer.quantize(rows)
            for name in kept:
                kept[name].append(tensors[name])
            yield tensors["weight"]

    return {"weight": weight(), **{name: iter(parts) for name, parts in kept.items()}}


def plan(checkpoint_dir, config: ModelConfig, child: ModelConfig) -> dict[str, Planned]:
    """The tensors of the quantized model `child`, checked before anything is written."""
    with torch.device("meta"):
        model = Transformer(child)
    plain = shapes(config)
    tensors, planned = open_tensors(checkpoint_dir, plain), {}
    for prefix, layer in model.named_modules():
        if isinstance(layer, QuantizedLinear):
            parts = quantized(layer, tensors.pop(f"{prefix}.weight"))
            planned |= {f"{prefix}.{name}": Planned(buffer.shape, buffer.dtype, parts[name])
                        for name, buffer in layer.named_buffers()}
    for name, tensor in tensors.items():
        dtype = PLAIN[tensor.get_dtype()]
        planned[name] = Planned(plain[name], dtype, read_rows([tensor], dtype))
    return planned


def parse_args(argv=None):
    p = Parser(description="Quantize a checkpoint's linear layers.")
    p.add_argument("--checkpoint_dir", type=Path, required=True,
                   help="checkpoint directory, from convert_hf_checkpoint.py")
    p.add_argument("--mode", choices=MODES, required=True,
                   help="int8: half the bytes, safe; int4: a quarter, less exact; fp8: half, on "
                   "GPUs from 8.9")
    p.add_argument("--group_size", type=int, choices=GROUP_SIZES,
                   help="int4: inputs that share a scale (default 128; smaller is more exact)")
    p.add_argument("--out", type=Path, required=True, help="directory to make")
    args = p.parse_args(argv)
    refuse((args.mode != "int4" and args.group_size is not None,
            f"--group_size has no meaning for --mode {args.mode}, which has one scale per output"),
           (args.out.exists(), f"--out {args.out} exists; remove it or choose another"))
    if args.mode == "int4" and args.group_size is None:
        args.group_size = 128
    check_writable(args.out)
    return args


def main():
    args = parse_args()
    source, out = args.checkpoint_dir, args.out
    refuse((not source.is_dir(), f"--checkpoint_dir {source} is not a directory"))
    weight_files(source)  # says what the directory holds if not a checkpoint
    hf = read_json(source / "config.json")
    config = config_from(hf, source / "config.json")
    if q := config.quantization:
        raise UserError(f"{source} is quantized to {q.mode} already; quantize the checkpoint that "
                        "it was made from")
    hf["quantization"] = asdict(Quantization(args.mode, args.group_size, fingerprint(source)))
    planned = plan(source, config, config_from(hf, source / "config.json"))
    files = copied(source) | {name: read_bytes(source / name)
                              for name in ("tokenizer.json", "tokenizer.model")
                              if (source / name).exists()}
    if any(name.startswith("tokenizer.") for name in files):
        read_vocabulary(source)  # refuses one that cannot be read
    write_checkpoint(out, source, planned, hf, files)
    before, after = (sum(f.stat().st_size for f in weight_files(d)) for d in (source, out))
    say(f"{source} -> {out}: {args.mode}, {before / 1e6:,.1f} MB -> {after / 1e6:,.1f} MB")
    if args.mode == "fp8":
        tell("fp8 runs on a GPU of compute capability 8.9 or better only (Ada, Hopper and later)")


if __name__ == "__main__":
    run(main)
