"""Quantized linear layers, and what a checkpoint's config.json says of them. quantize.py makes
their tensors.

A layer's tensors on disk are plain: row i of each belongs to output i, and columns can be cut as
well (int4: at multiples of the group size). Weights are quantized, activations are not (fp8: row by
row, as they come). Each layer takes bfloat16 and float32 rows, few (a verification) or many (a
prompt), compiled or not.
"""
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from cli import UserError

kernels = None
# elsewhere they would not be used, and Triton takes its time to be imported
if torch.cuda.is_available():
    try:
        import linear_triton as kernels
    except ImportError:
        pass  # a PyTorch without Triton: weights are widened before each product, right but slow

GROUP_SIZES = (32, 64, 128, 256)
FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max
# PyTorch's int8 kernel for the CPU wins in bfloat16 up to about this many rows. Its float32 one,
# like int4's, is a plain loop: 35 times slower at 26 rows than widening the weight and multiplying.
INT8_ROWS = 8
# weights that the CPU widens at a time: they stay in its cache, where all at once would go to
# memory and back
BLOCK = 2**20
# On a CPU, a compiled pass of few float32 rows is dot products in a loop that Inductor writes: it
# reads each weight once, with nothing to start. At one row 1.9 ms for the demo's target in place of
# 3.4 for oneDNN; at 17 rows 6.9 in place of 4.4.
DOT_ROWS = 8
# here the loop stands against widening the weight first: 12 times as fast at one row, 2.6 times at
# 26
DOT_ROWS_INT8 = 64
# weights below which neither pays: a packed product takes 15 microseconds to start, unrolled loops
# minutes to compile
SMALL = 2**17
# weights from which a float32 layer has no second copy for the loops, which win 20% there
LARGE = 2**22
PACK_ROWS = 17  # what oneDNN packs for; the product takes any number of rows
TINY = 1e-8  # least scale, so that a row of zeros does not divide by zero


def few_rows_on_gpu(x: Tensor) -> bool:
    return kernels is not None and x.is_cuda and len(x) <= kernels.MAX_ROWS


def dots_pay(x: Tensor, weight: Tensor, rows: int) -> bool:
    few = x.dtype == torch.float32 and len(x) <= rows and weight.numel() >= SMALL
    return few and x.device.type == "cpu" and torch.compiler.is_compiling()


def stored(x: Tensor) -> Tensor:
    """x [M, N], which Inductor is made to store row by row, as strides are asked for: it would
    compute it anew for every use, or in columns.
    """
    return x.contiguous().as_strided(x.shape, (x.shape[1], 1))


def dot_products(x: Tensor, weight: Tensor) -> Tensor:
    """x [M, in] times weight [out, in] of any dtype -> float32 [M, out].

    Only for compiled code: eager it would make [out, M, in].
    """
    x = stored(x).float()
    return stored((x * weight.float()[:, None]).sum(-1).T)


# plainer than custom_op, whose checks take 4 microseconds a call
ops = torch.library.Library("judge", "FRAGMENT")
ops.define("packed_linear(Tensor x, Tensor weight) -> Tensor")


def packed_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., in] times a weight that oneDNN has packed -> [..., out].

    An op of our own, for Inductor takes packed weights as constants only.
    """
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, None, "none", [], "")


for key in ("CPU", "MkldnnCPU"):
    ops.impl("packed_linear", packed_linear, key)


@torch.library.register_fake("judge::packed_linear")
def _(x, weight):
    return x.new_empty(*x.shape[:-1], len(weight))


def packs(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or weight.numel() < SMALL or not torch.backends.mkldnn.is_available():
        return False
    return weight.dtype == torch.float32 or weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()


class Linear(nn.Linear):
    """PyTorch's; once prepared, on a CPU with its weight as oneDNN wants it, of the same shape but
    opaque (`dense` gives it back).
    """
    packed = None

    def prepare(self, dtype: torch.dtype):
        """Called once when the weight is in place."""
        if not packs(self.weight):
            return
        self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), PACK_ROWS)
        if self.weight.dtype != torch.float32 or self.weight.numel() >= LARGE:
            self.weight = nn.Parameter(self.packed, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        if self.packed is None:
            return super().forward(x)
        rows = x.flatten(0, -2)
        if self.weight.numel() < LARGE and dots_pay(rows, self.weight, DOT_ROWS):
            y = dot_products(rows, self.weight).unflatten(0, x.shape[:-1])
        else:
            y = torch.ops.judge.packed_linear.default(x, self.packed)
        return y if self.bias is None else y + self.bias


def dense(weight: Tensor) -> Tensor:
    """A weight as PyTorch's own operations take it: itself, or a copy if it was packed."""
    return weight.to_dense() if weight.is_mkldnn else weight


class QuantizedLinear(nn.Module):
    """A linear layer whose quantized tensors are buffers with a dtype of their own; only the bias
    has the model's dtype.
    """

    def __init__(self, bias: bool, **buffers: Tensor):
        super().__init__()
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)
        self.bias = nn.Parameter(torch.empty(len(self.weight))) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        y = self.matmul(x.flatten(0, -2)).unflatten(0, x.shape[:-1])
        return y if self.bias is None else y + self.bias

    def prepare(self, dtype: torch.dtype):
        """Called once when the tensors are in place, with the activations' dtype: a layout that a
        kernel wants is made here.
        """


@torch.library.custom_op("judge::int8_blocks", mutates_args=())
def int8_blocks(x: Tensor, weight: Tensor) -> Tensor:
    """x [M, in] times int8 [out, in], without scales -> [M, out].

    One op, so that a compiled graph does not grow with the blocks.
    """
    return torch.cat([F.linear(x, rows.to(x.dtype))
                      for rows in weight.split(max(1, BLOCK // weight.shape[1]))], dim=1)


@int8_blocks.register_fake
def _(x, weight):
    return x.new_empty(len(x), len(weight))


class Int8Linear(QuantizedLinear):
    """One scale an output: weight int8 [out, in], scale float32 [out], W = weight * scale."""

    def __init__(self, n_in: int, n_out: int, bias=False, group_size=None):
        super().__init__(bias, weight=torch.empty(n_out, n_in, dtype=torch.int8),
                         scale=torch.empty(n_out, dtype=torch.float32))

    def prepare(self, dtype: torch.dtype):
        """PyTorch's kernel wants its scale in the activations' dtype, and Inductor wants it ready
        made.
        """
        self.rounded_scale = self.scale.to(dtype)

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """The tensors of some rows, [rows, in] of any floating dtype."""
        weight = weight.float()
        scale = (weight.abs().amax(1) / 127).clamp(min=TINY)
        return {"weight": (weight / scale[:, None]).round().to(torch.int8), "scale": scale}

    def matmul(self, x: Tensor) -> Tensor:
        if few_rows_on_gpu(x):
            return kernels.int8_matmul(x, self.weight, self.scale)
        if dots_pay(x, self.weight, DOT_ROWS_INT8):
            return (dot_products(x, self.weight) * self.scale).to(x.dtype)
        # else it reads out of bounds
        if x.device.type == "cpu" and x.dtype == torch.bfloat16 and len(x) <= INT8_ROWS and x.shape[
                1] % 16 == 0:
            return torch._weight_int8pack_mm(x, self.weight, self.rounded_scale)
        in_blocks = x.device.type == "cpu" and self.weight.numel() > BLOCK
        y = int8_blocks(x, self.weight) if in_blocks else F.linear(x, self.weight.to(x.dtype))
        return (y * self.scale).to(x.dtype)


class Int4Linear(QuantizedLinear):
    """A scale and a zero for each group of an output's inputs: W = (q - 8) * scale + zero, q from 0
    to 15.

    weight uint8 [out, in / 2]: byte j of a group holds its q of column j (low bits) and of column j
    + group / 2 (high bits), so that both halves of x are read in order. scale, zero bfloat16 [out,
    in / group].
    """

    def __init__(self, n_in: int, n_out: int, bias=False, group_size=128):
        if n_in % group_size:
            raise UserError(f"int4: group size {group_size} does not divide the {n_in} inputs of "
                            "a layer; "
                            "quantize with another --group_size "
                            f"({', '.join(map(str, GROUP_SIZES))}) or mode")
        groups = torch.empty(n_out, n_in // group_size, dtype=torch.bfloat16)
        super().__init__(bias, weight=torch.empty(n_out, n_in // 2, dtype=torch.uint8),
                         scale=groups, zero=torch.empty_like(groups))
        self.group_size = group_size
        self.packed = self.scale_zero = None

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """The tensors of some rows, [rows, in] of any floating dtype; q is chosen for the scale and
        zero as they are stored.
        """
        groups = weight.float().unflatten(1, (-1, self.group_size))
        low, high = groups.aminmax(dim=2)
        scale = ((high - low) / 15).clamp(min=TINY).bfloat16()
        zero = (low + 8 * scale.float()).bfloat16()
        q = ((groups - zero.float()[..., None]) / scale.float()[..., None]).round().add(8).clamp(
            0, 15).to(torch.uint8)
        first, second = q.chunk(2, dim=2)
        return {"weight": (first | second << 4).flatten(1), "scale": scale, "zero": zero}

    def unpack(self) -> Tensor:
        """q, uint8 [out, groups, group]."""
        pairs = self.weight.unflatten(1, (-1, self.group_size // 2))
        return torch.cat((pairs & 15, pairs >> 4), dim=2)

    def widen(self) -> Tensor:
        """W, float32 [out, groups, group]."""
        return (self.unpack().float() - 8) * self.scale[..., None] + self.zero[..., None]

    def prepare(self, dtype: torch.dtype):
        """On the CPU the weight is exchanged for the layout of PyTorch's bfloat16 kernel, if that
        takes the number of outputs.
        """
        if self.weight.device.type != "cpu" or dtype != torch.bfloat16 or len(self.weight) % 16:
            return
        self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(
            self.unpack().flatten(1).int(), 1)
        self.scale_zero = torch.stack((self.scale.T, self.zero.T), dim=2).to(dtype)
        self.weight = self.scale = self.zero = None

    def matmul(self, x: Tensor) -> Tensor:
        if self.packed is not None:
            return torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.packed, self.group_size,
                                                              self.scale_zero)
        if few_rows_on_gpu(x):
            return kernels.int4_matmul(x, self.weight, self.scale, self.zero)
        return F.linear(x, self.widen().flatten(1).to(x.dtype))


class Fp8Linear(QuantizedLinear):
    """One scale an output: weight float8_e4m3fn [out, in], scale float32 [out]; activations get one
    scale a row as they come.
    """

    def __init__(self, n_in: int, n_out: int, bias=False, group_size=None):
        if n_in % 16 or n_out % 16:
            raise UserError(f"fp8: a layer of {n_in} inputs and {n_out} outputs is not of "
                            "multiples of 16, which its kernel needs; use --mode int8")
        super().__init__(bias, weight=torch.empty(n_out, n_in, dtype=FP8),
                         scale=torch.empty(n_out, dtype=torch.float32))

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """The tensors of some rows, [rows, in] of any floating dtype."""
        weight = weight.float()
        scale = (weight.abs().amax(1) / FP8_MAX).clamp(min=TINY)
        return {"weight": (weight / scale[:, None]).clamp(-FP8_MAX, FP8_MAX).to(FP8),
                "scale": scale}

    def matmul(self, x: Tensor) -> Tensor:
        rows = self.quantize(x)
        y = torch._scaled_mm(rows["weight"], self.weight.T, scale_a=rows["scale"][:, None],
                             scale_b=self.scale[None], out_dtype=torch.bfloat16)
        return y.to(x.dtype)  # the kernel with row-wise scales gives bfloat16 only


MODES = {"int8": Int8Linear, "int4": Int4Linear, "fp8": Fp8Linear}


@dataclass(frozen=True)
class Quantization:
    """The key "quantization" of a config.json."""
    mode: str
    group_size: int | None  # int4 only
    parent: str  # model.fingerprint of the checkpoint that was quantized

    @classmethod
    def from_dict(cls, value: dict | None, where="config.json"):
        """None for a checkpoint that is not quantized; raises UserError for what this version does
        not know.
        """
        if value is None:
            return None
        value = value if isinstance(value, dict) else {}
        mode, group_size = value.get("mode"), value.get("group_size")
        if mode not in tuple(MODES):
            raise UserError(f"{where}: quantization mode {mode!r} is not known (known: "
                            f"{', '.join(MODES)}); quantize again with quantize.py")
        if group_size not in (GROUP_SIZES if mode == "int4" else (None,)):
            raise UserError(f"{where}: group size {group_size!r} with {mode} is not implemented; "
                            "quantize again with quantize.py")
        return cls(mode, group_size, str(value.get("parent")))

    def check_device(self, device, where):
        """Refuse a device that cannot run the mode."""
        if self.mode != "fp8":
            return
        device, need = torch.device(
            device), f"{where} is quantized to fp8, which needs a GPU of compute capability 8.9 or better"
        if device.type != "cuda":
            raise UserError(f"{need}, not {device.type}; quantize with --mode int8 instead")
        if (capability := torch.cuda.get_device_capability(device)) < (8, 9):
            raise UserError(f"{need}, this one has {capability[0]}.{capability[1]}; quantize with "
                            "--mode int8 instead")


def linear(q: Quantization | None, n_in: int, n_out: int, bias=False) -> nn.Module:
    """A layer as `q` says, or a plain one."""
    return Linear(n_in, n_out, bias) if q is None else MODES[q.mode](n_in, n_out, bias,
                                                                     q.group_size)


def head(q: Quantization | None, n_in: int, n_out: int) -> nn.Module:
    """The LM head.

    It is int8 in an int4 checkpoint: its rounding lands in the logits undamped, and it is a small
    share of the bytes.
    """
    return linear(Quantization("int8", None, q.parent) if q and q.mode == "int4" else q, n_in,
                  n_out)


def prepare(model: nn.Module, dtype: torch.dtype):
    """Bring every linear layer of a model whose weights are in place into the layout in which it
    runs.
    """
    for module in model.modules():
        if isinstance(module, (Linear, QuantizedLinear)):
            module.prepare(dtype)
