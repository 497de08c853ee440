"""Quantize the linear layers of a checkpoint: int8 or int4 weights, or fp8 weights and activations.

    python quantize.py --checkpoint_dir DIR --mode int8|int4|fp8 --out DIR

The result is an ordinary checkpoint directory whose config.json names the mode, so no other script
needs a flag. Embedding and norms stay as they are, and so does an LM head that is tied to the
embedding; what each mode does is in linear.py. Weights stream from file to file some rows at a
time, so memory does not grow with the model. Rounding is to the nearest: nothing is calibrated on
data.
"""
import argparse
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from cli import UserError, check_writable, run
from convert_hf_checkpoint import FORMATS, write_checkpoint
from linear import GROUP_SIZES, MODES, Quantization, QuantizedLinear
from model import ModelConfig, Transformer, fingerprint, open_weights, read_json, weight_files

# what can be quantized
DTYPES = {FORMATS[dtype]: dtype for dtype in (torch.bfloat16, torch.float16, torch.float32)}
CHUNK = 4 * 1024**2  # weights that are quantized at a time, 16 MB of them as float32


def read_rows(rows) -> Iterator[Tensor]:
    """A tensor's open slice, some rows at a time."""
    shape = rows.get_shape()
    step = max(1, CHUNK // shape[-1]) if len(shape) > 1 else shape[0]
    for i in range(0, shape[0], step):
        yield rows[i:i + step]


def quantized(layer: QuantizedLinear, rows) -> dict[str, Iterator[Tensor]]:
    """The layer's tensors, to be read in this order: reading the weight leaves the scales, which
    are small, for after it.
    """
    kept = {name: [] for name, _ in layer.named_buffers() if name != "weight"}

    def weight():
        for part in read_rows(rows):
            tensors = layer.quantize(part)
            for name in kept:
                kept[name].append(tensors[name])
            yield tensors["weight"]

    return {"weight": weight(), **{name: iter(parts) for name, parts in kept.items()}}


def plan(checkpoint_dir, config: ModelConfig,
         child: ModelConfig) -> dict[str, tuple[torch.Size, torch.dtype, Iterator[Tensor]]]:
    """The tensors to write for convert_hf_checkpoint.write_weights, checked to the last one before
    anything is written.
    """
    files = {name: f for path in weight_files(checkpoint_dir) for f in [open_weights(path)]
             for name in f.keys()}
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Transformer(config).named_parameters()}
        model = Transformer(child)
    slices = {}
    for name, shape in shapes.items():
        if name not in files:
            raise UserError(f"{checkpoint_dir}: weight {name} is missing"
                            + ("; convert the checkpoint first: python convert_hf_checkpoint.py "
                            f"--checkpoint_dir {checkpoint_dir} --out DIR"
                            if any(n.startswith("model.") for n in files) else ""))
        slices[name] = files[name].get_slice(name)
        if slices[name].get_shape() != list(shape):
            raise UserError(f"{checkpoint_dir}: weight {name} has shape "
                            f"{slices[name].get_shape()}, config.json says {list(shape)}")
        if slices[name].get_dtype() not in DTYPES:
            raise UserError(f"{checkpoint_dir}: weight {name} is {slices[name].get_dtype()}; "
                            "quantize a checkpoint that is not quantized yet")
    if extra := sorted(files.keys() - shapes.keys()):
        raise UserError(f"{checkpoint_dir}: weight {extra[0]} has no place in this architecture")
    wanted = {}
    for prefix, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            streams = quantized(module, slices.pop(f"{prefix}.weight"))
            wanted |= {f"{prefix}.{name}": (b.shape, b.dtype, streams[name]) for name,
                       b in module.named_buffers()}
    return wanted | {name: (shapes[name], DTYPES[rows.get_dtype()], read_rows(rows)) for name,
                     rows in slices.items()}


def parse_args(argv=None):
    p = argparse.ArgumentParser(description="Quantize a checkpoint's linear layers.")
    p.add_argument("--checkpoint_dir", type=Path, required=True, help="checkpoint directory, from "
                   "convert_hf_checkpoint.py")
    p.add_argument("--mode", choices=MODES, required=True, help="int8: half the bytes, safe; "
                   "int4: a quarter, less exact; fp8: half, on GPUs from 8.9")
    p.add_argument("--group_size", type=int, choices=GROUP_SIZES, help="int4: inputs that share a "
                   "scale (default 128; smaller is more exact)")
    p.add_argument("--out", type=Path, required=True, help="directory to make")
    args = p.parse_args(argv)
    if args.mode != "int4" and args.group_size is not None:
        raise UserError(f"--group_size has no meaning for --mode {args.mode}, whose scales are an "
                        "output's")
    if args.mode == "int4" and args.group_size is None:
        args.group_size = 128
    if args.out.exists():
        raise UserError(f"--out {args.out} exists; remove it or choose another")
    check_writable(args.out)
    return args


def main():
    args = parse_args()
    source, out = args.checkpoint_dir, args.out
    if not source.is_dir():
        raise UserError(f"--checkpoint_dir {source} is not a directory")
    hf = read_json(source / "config.json")
    config = ModelConfig.from_dict(hf, source / "config.json")
    if config.quantization:
        raise UserError(f"{source} is quantized to {config.quantization.mode} already; quantize "
                        "the checkpoint that it was made from")
    hf["quantization"] = asdict(Quantization(args.mode, args.group_size, fingerprint(source)))
    wanted = plan(source, config, ModelConfig.from_dict(hf, source / "config.json"))
    tokenizer = {name: (source / name).read_bytes()
                 for name in ("tokenizer.model", "tokenizer_special.json")
                 if (source / name).exists()}
    write_checkpoint(source, out, wanted, hf, tokenizer)
    before, after = (sum(f.stat().st_size for f in weight_files(d)) for d in (source, out))
    print(f"{source} -> {out}: {args.mode}, {before / 1e6:,.1f} MB -> {after / 1e6:,.1f} MB")
    if args.mode == "fp8":
        print("fp8 runs on a GPU of compute capability 8.9 or better only (Ada, Hopper and later)",
              file=sys.stderr)


if __name__ == "__main__":
    run(main)
