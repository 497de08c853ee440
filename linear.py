"""Linear layers, plain and quantized, and what config.json says about quantization.

A quantized layer's tensors on disk are plain: row i of each belongs to output i, and columns can be
split too (int4: at multiples of the group size). Weights are quantized, activations are not, except
for fp8 in passes of more than FEW rows: row by row, on the fly. Each layer takes bfloat16 and
float32 rows, few (a verification) or many (a prompt), compiled or eager. quantize.py writes the
tensors.
"""
import functools
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from common import UserError

FEW = 64  # bfloat16 rows up to which the kernels in gpu_kernels/ widen no weight
quantized_matmul = None
if torch.cuda.is_available():  # Triton is slow to import, and of no use without a GPU
    try:
        from gpu_kernels import quantized_matmul
    except ImportError:
        pass  # a PyTorch without Triton: weights are widened before each product, right but slow

GROUP_SIZES = (32, 64, 128, 256)
FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max
TINY = 1e-8  # least scale, so that a row of zeros does not divide by zero

# PyTorch's int8 kernel for the CPU wins in bfloat16 up to about this many rows. Its float32 kernel,
# like int4's, is a plain loop: 35 times slower at 26 rows than widening the weight and multiplying.
INT8_ROWS = 8
# Weights that the CPU widens at a time: they stay in its cache, not so the whole matrix.
BLOCK = 2**20
# On a CPU, a compiled pass of few float32 rows is dot products in a loop that Inductor writes: it
# reads each weight once and has no start-up cost. For the demo's target one row takes 1.9 ms
# (oneDNN 3.4 ms) and 17 rows 6.9 ms (oneDNN 4.4 ms).
DOT_ROWS = 8
# With int8 the loop competes with widening first: 12 times as fast at one row, 2.6 times at 26.
DOT_ROWS_INT8 = 64
# Below this many weights neither pays: a packed product takes 15 microseconds to start, unrolled
# loops minutes to compile.
SMALL = 2**17
# From this many weights on, a float32 layer keeps no second copy for the loops (20% faster there).
LARGE = 2**22
PACK_ROWS = 17  # what oneDNN packs for; the product takes any number of rows


def few_rows_on_gpu(x: Tensor) -> bool:
    return quantized_matmul is not None and kernel_runs(x.shape[0], x.dtype, x.device.type)


def kernel_runs(rows: int, dtype: torch.dtype, device: str) -> bool:
    """Whether a Triton kernel takes such rows, where there is Triton."""
    return device != "cpu" and rows <= FEW and dtype != torch.float32


def kernel_workspace(rows: int, n_out: int, item: int) -> int:
    """Bytes of a kernel's parts, their sum and the result; see gpu_kernels' `settings`."""
    return rows * (4 * max(n_out, min(4 * n_out, 2**15)) + (4 + item) * n_out)


def widened_matmul(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x [M, in] times int8 or fp8 [out, in] with scales [out] -> [M, out], the weight copied in x's
    dtype.
    """
    return (F.linear(x, weight.to(x.dtype)) * scale).to(x.dtype)


def widened_workspace(rows: int, n_out: int, wide: int, item: int) -> int:
    """Bytes of `widened_matmul` that widens `wide` weights at a time.

    Their products, and all in one where there are blocks; or the product, a copy of it and the
    scaled one, the latter two in float32.
    """
    out = rows * n_out
    return max((wide + out) * item, out * (8 if item == 4 else item + 8))


def dots_pay(x: Tensor, weight: Tensor, rows: int) -> bool:
    """Whether `dot_products` is the fastest way, where it wins up to `rows` rows."""
    few = x.dtype == torch.float32 and len(x) <= rows and weight.numel() >= SMALL
    return few and x.device.type == "cpu" and torch.compiler.is_compiling()


def stored(x: Tensor) -> Tensor:
    """x [M, N], stored by Inductor row by row.

    Asking for strides forces it to: it would recompute x at every use, or store columns.
    """
    return x.contiguous().as_strided(x.shape, (x.shape[1], 1))


def dot_products(x: Tensor, weight: Tensor) -> Tensor:
    """x [M, in] times weight [out, in] of any dtype -> float32 [M, out].

    For compiled code only: eager it would allocate [out, M, in].
    """
    x = stored(x).float()
    return stored((x * weight.float()[:, None]).sum(-1).T)


# Not a custom_op, whose checks take 4 microseconds a call.
ops = torch.library.Library("judge", "FRAGMENT")
ops.define("packed_linear(Tensor x, Tensor weight) -> Tensor")


def packed_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., in] times a weight packed by oneDNN -> [..., out].

    An op of our own, because Inductor takes packed weights only as constants.
    """
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, None, "none", [], "")


for key in ("CPU", "MkldnnCPU"):
    ops.impl("packed_linear", packed_linear, key)


@torch.library.register_fake("judge::packed_linear")
def _(x, weight):
    return x.new_empty(*x.shape[:-1], len(weight))


def packs(weight: Tensor, device="cpu") -> bool:
    """Whether `Linear.prepare` packs such a weight on `device`."""
    if device != "cpu" or weight.numel() < SMALL:
        return False
    mkldnn = torch.ops.mkldnn
    return torch.backends.mkldnn.is_available() and (
        weight.dtype == torch.float32
        or weight.dtype == torch.bfloat16 and mkldnn._is_mkldnn_bf16_supported())


class Linear(nn.Linear):
    """PyTorch's layer, whose weight `prepare` packs for oneDNN on a CPU.

    A packed weight has the same shape but is opaque; `dense` gives its values.
    """
    packed = None

    def prepare(self, dtype: torch.dtype):
        """Called once, when the weight is in place."""
        if not packs(self.weight, self.weight.device.type):
            return
        self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), PACK_ROWS)
        if not self.keeps_dense():
            self.weight = nn.Parameter(self.packed, requires_grad=False)

    def keeps_dense(self) -> bool:
        return self.weight.dtype == torch.float32 and self.weight.numel() < LARGE

    def added(self, dtype: torch.dtype, device: str, tied=False) -> int:
        """As QuantizedLinear.added; tied: the embedding keeps the dense weight in any case."""
        twice = packs(self.weight, device) and (tied or self.keeps_dense())
        return self.weight.numel() * dtype.itemsize if twice else 0

    def workspace(self, rows: int, dtype: torch.dtype, device: str) -> int:
        """As QuantizedLinear.workspace."""
        return rows * len(self.weight) * dtype.itemsize * (1 if self.bias is None else 2)

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
    """A weight that PyTorch's own operations take: itself, or an unpacked copy."""
    return weight.to_dense() if weight.is_mkldnn else weight


class QuantizedLinear(nn.Module):
    """A linear layer whose quantized tensors are buffers with dtypes of their own.

    Only the bias has the model's dtype.
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
        """Called once, when the tensors are in place: makes the layout that a kernel wants.

        dtype: of the activations.
        """

    def added(self, dtype: torch.dtype, device: str) -> int:
        """Bytes that `prepare` adds on `device`, known without the weights: for ranks/memory.py."""
        return 0

    def workspace(self, rows: int, dtype: torch.dtype, device: str) -> int:
        """Bytes that a product of `rows` rows needs at its peak, its result included."""
        raise NotImplementedError  # every mode has its own


@torch.library.custom_op("judge::int8_blocks", mutates_args=())
def int8_blocks(x: Tensor, weight: Tensor) -> Tensor:
    """x [M, in] times int8 [out, in], without scales -> [M, out].

    One op, so that a compiled graph does not grow with the number of blocks.
    """
    blocks = weight.split(max(1, BLOCK // weight.shape[1]))
    return torch.cat([F.linear(x, rows.to(x.dtype)) for rows in blocks], dim=1)


@int8_blocks.register_fake
def _(x, weight):
    return x.new_empty(x.shape[0], len(weight))  # not len(x), which fixes a dynamic shape


class Int8Linear(QuantizedLinear):
    """One scale per output: weight int8 [out, in], scale float32 [out], W = weight * scale."""

    def __init__(self, n_in: int, n_out: int, bias=False, group_size=None):
        super().__init__(bias, weight=torch.empty(n_out, n_in, dtype=torch.int8),
                         scale=torch.empty(n_out, dtype=torch.float32))

    def prepare(self, dtype: torch.dtype):
        # PyTorch's kernel wants the scale in the activations' dtype, Inductor wants it ready made.
        self.rounded_scale = self.scale.to(dtype)

    def added(self, dtype, device):
        return 0 if dtype == self.scale.dtype else len(self.scale) * dtype.itemsize

    def workspace(self, rows, dtype, device):
        n_out, count = len(self.weight), self.weight.numel()
        if kernel_runs(rows, dtype, device):
            return kernel_workspace(rows, n_out, dtype.itemsize)
        wide = min(count, BLOCK) if device == "cpu" else count
        return widened_workspace(rows, n_out, wide, dtype.itemsize)

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """The tensors of some rows, [rows, in] of any floating dtype."""
        weight = weight.float()
        scale = (weight.abs().amax(1) / 127).clamp(min=TINY)
        return {"weight": (weight / scale[:, None]).round().to(torch.int8), "scale": scale}

    def matmul(self, x: Tensor) -> Tensor:
        if few_rows_on_gpu(x):
            return quantized_matmul.bytes_matmul(x, self.weight, self.scale)
        if dots_pay(x, self.weight, DOT_ROWS_INT8):
            return (dot_products(x, self.weight) * self.scale).to(x.dtype)
        on_cpu, (rows, n_in) = x.device.type == "cpu", x.shape
        # The kernel reads out of bounds unless the inputs are a multiple of 16.
        if on_cpu and x.dtype == torch.bfloat16 and rows <= INT8_ROWS and n_in % 16 == 0:
            return torch._weight_int8pack_mm(x, self.weight, self.rounded_scale)
        if on_cpu and self.weight.numel() > BLOCK:
            return (int8_blocks(x, self.weight) * self.scale).to(x.dtype)
        return widened_matmul(x, self.weight, self.scale)


class Int4Linear(QuantizedLinear):
    """A scale and a zero for each group of inputs: W = (q - 8) * scale + zero, q from 0 to 15.

    weight uint8 [out, in / 2]: byte j of a group holds the q of its column j (low bits) and of
    column j + group / 2 (high bits), so both halves of x are read in order.
    scale, zero bfloat16 [out, in / group].
    """

    def __init__(self, n_in: int, n_out: int, bias=False, group_size=128):
        if n_in % group_size:
            raise UserError(f"int4: group size {group_size} does not divide the {n_in} inputs of a "
                            "layer; quantize with another --group_size "
                            f"({', '.join(map(str, GROUP_SIZES))}) or mode")
        groups = torch.empty(n_out, n_in // group_size, dtype=torch.bfloat16)
        super().__init__(bias, weight=torch.empty(n_out, n_in // 2, dtype=torch.uint8),
                         scale=groups, zero=torch.empty_like(groups))
        self.group_size = group_size
        self.packed = self.scale_zero = self.by_group = None

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """The tensors of some rows, [rows, in] of any floating dtype.

        q is chosen for the scale and zero as they are stored, in bfloat16.
        """
        groups = weight.float().unflatten(1, (-1, self.group_size))
        low, high = groups.aminmax(dim=2)
        scale = ((high - low) / 15).clamp(min=TINY).bfloat16()
        zero = (low + 8 * scale.float()).bfloat16()
        steps = (groups - zero.float()[..., None]) / scale.float()[..., None]
        first, second = steps.round().add(8).clamp(0, 15).to(torch.uint8).chunk(2, dim=2)
        return {"weight": (first | second << 4).flatten(1), "scale": scale, "zero": zero}

    def unpack(self) -> Tensor:
        """q, uint8 [out, groups, group]."""
        pairs = self.weight.unflatten(1, (-1, self.group_size // 2))
        return torch.cat((pairs & 15, pairs >> 4), dim=2)

    def widen(self) -> Tensor:
        """W, float32 [out, groups, group]."""
        return (self.unpack().float() - 8) * self.scale[..., None] + self.zero[..., None]

    def packs(self, dtype: torch.dtype, device: str) -> bool:
        return device == "cpu" and dtype == torch.bfloat16 and not len(self.weight) % 16

    def prepare(self, dtype: torch.dtype):
        """Replace the weight by the layout of PyTorch's bfloat16 kernel, where that can be used.

        On a GPU, have scales and zeros group by group as well: a kernel for some rows reads those
        of many outputs at a time, which lie a whole row apart on disk.
        """
        if self.weight.device.type != "cpu":
            self.by_group = torch.stack((self.scale.T, self.zero.T))
        if not self.packs(dtype, self.weight.device.type):
            return
        self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(
            self.unpack().flatten(1).int(), 1)
        self.scale_zero = torch.stack((self.scale.T, self.zero.T), dim=2).to(dtype)
        self.weight = self.scale = self.zero = None

    def added(self, dtype, device):
        return 2 * self.scale.numel() * self.scale.itemsize if device != "cpu" else 0

    def workspace(self, rows, dtype, device):
        out, count = rows * len(self.weight), 2 * self.weight.numel()
        if self.packs(dtype, device):
            return out * dtype.itemsize
        if kernel_runs(rows, dtype, device):
            return kernel_workspace(rows, len(self.weight), dtype.itemsize) + 4 * rows * (
                self.scale.shape[1])  # the sums of x's groups
        return max(8 * count, (count + out) * dtype.itemsize)  # `widen` holds float32 twice

    def matmul(self, x: Tensor) -> Tensor:
        if self.packed is not None:
            return torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.packed, self.group_size,
                                                              self.scale_zero)
        if few_rows_on_gpu(x):
            return quantized_matmul.int4_matmul(x, self.weight, self.scale, self.zero,
                                                self.by_group)
        return F.linear(x, self.widen().flatten(1).to(x.dtype))


@functools.cache
def scales_rows(device: str) -> bool:
    """Whether PyTorch multiplies fp8 by fp8 there with a scale for each row and output.

    Tried, since that depends on the card and on PyTorch's build: some cannot on desktop Blackwells.
    """
    try:
        zeros, ones = torch.zeros(16, 16, device=device).to(FP8), torch.ones(16, 1, device=device)
        torch._scaled_mm(zeros, zeros.T, scale_a=ones, scale_b=ones.T, out_dtype=torch.bfloat16)
    except (RuntimeError, ValueError, AssertionError):  # the latter from a PyTorch without CUDA
        return False
    return True


class Fp8Linear(QuantizedLinear):
    """One scale per output; in passes of more than FEW rows, one per row of activations too.

    weight float8_e4m3fn [out, in], scale float32 [out].
    """
    scales_rows = True

    def __init__(self, n_in: int, n_out: int, bias=False, group_size=None):
        if n_in % 16 or n_out % 16:
            raise UserError(f"fp8: a layer of {n_in} inputs and {n_out} outputs does not fit its "
                            "kernel, which needs multiples of 16; use --mode int8")
        super().__init__(bias, weight=torch.empty(n_out, n_in, dtype=FP8),
                         scale=torch.empty(n_out, dtype=torch.float32))

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """The tensors of some rows, [rows, in] of any floating dtype."""
        weight = weight.float()
        scale = (weight.abs().amax(1) / FP8_MAX).clamp(min=TINY)
        return {"weight": (weight / scale[:, None]).clamp(-FP8_MAX, FP8_MAX).to(FP8),
                "scale": scale}

    def prepare(self, dtype: torch.dtype):
        self.scales_rows = scales_rows(self.weight.device.type)

    def workspace(self, rows, dtype, device):
        n_out, n_in = self.weight.shape
        if kernel_runs(rows, dtype, device):
            return kernel_workspace(rows, n_out, dtype.itemsize)
        if not scales_rows(device):
            return widened_workspace(rows, n_out, self.weight.numel(), dtype.itemsize)
        # `quantize` holds x in float32 three times
        return rows * max(12 * n_in, n_in + n_out * (2 + dtype.itemsize))

    def matmul(self, x: Tensor) -> Tensor:
        # Few rows wait for the weights alone: rounding them as well would take two more kernels.
        if few_rows_on_gpu(x):
            return quantized_matmul.bytes_matmul(x, self.weight, self.scale)
        if not self.scales_rows:
            return widened_matmul(x, self.weight, self.scale)
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
    parent: str  # checkpoint.fingerprint of the checkpoint that was quantized

    @classmethod
    def from_dict(cls, value: dict | None, where="config.json"):
        """None if the checkpoint is not quantized; raises UserError for an unknown mode."""
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
        device = torch.device(device)
        need = f"{where} is quantized to fp8, which needs a GPU of compute capability 8.9 or better"
        if device.type != "cuda":
            raise UserError(f"{need}, not {device.type}; quantize with --mode int8 instead")
        if (capability := torch.cuda.get_device_capability(device)) < (8, 9):
            raise UserError(f"{need}, this one has {capability[0]}.{capability[1]} and cannot "
                            "convert float8_e4m3; quantize with --mode int8 instead")


def linear(q: Quantization | None, n_in: int, n_out: int, bias=False) -> nn.Module:
    """A layer of the mode `q`, or a plain one."""
    if q is None:
        return Linear(n_in, n_out, bias)
    return MODES[q.mode](n_in, n_out, bias, q.group_size)


def lm_head(q: Quantization | None, n_in: int, n_out: int) -> nn.Module:
    """The LM head.

    It is int8 in an int4 checkpoint: its rounding goes straight into the logits, and it is a small
    share of the bytes.
    """
    if q and q.mode == "int4":
        q = Quantization("int8", None, q.parent)
    return linear(q, n_in, n_out)


def prepare(model: nn.Module, dtype: torch.dtype):
    """Bring every linear layer of a model with its weights in place into the layout it runs in."""
    for module in model.modules():
        if isinstance(module, (Linear, QuantizedLinear)):
            module.prepare(dtype)


def product_path(model: nn.Module, rows: int, dtype: torch.dtype) -> str:
    """What multiplies `rows` rows by the layers of a prepared model, in words."""
    layer = next((m for m in model.modules() if isinstance(m, QuantizedLinear)), None)
    if layer is None:
        return "PyTorch"
    x = torch.empty(rows, 0, dtype=dtype, device=next(model.parameters()).device)
    if few_rows_on_gpu(x):
        return "Triton, GEMV" if isinstance(layer, Int4Linear) and rows == 1 else "Triton"
    if isinstance(layer, Fp8Linear) and layer.scales_rows:
        return "PyTorch, fp8 by fp8"
    return "weights widened, then PyTorch" if x.is_cuda else "PyTorch"
