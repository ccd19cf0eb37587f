"""Quantize in blocks and back: what is asked for, checked, and handed to a backend.

A tensor is read in row-major order and cut into blocks of `block_size` elements, across rows; the last block may be
shorter. Each block gets its own constants.
"""

import functools
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nf4lab import backends
from nf4lab.backends import feedback
from nf4lab.backends.reference import chunks
from nf4lab.formats import Format, as_format
from nf4lab.formats.double_quant import DoubleQuant, QuantizedConstants, as_double_quant, decoded
from nf4lab.formats.packing import unpack

BLOCK_SIZES = tuple(2**k for k in range(4, 13))  # 16 to 4096
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True, eq=False, repr=False)
class QuantizedTensor:
    """A tensor in 2, 3, 4 or 8 bits per element, with what it takes to get it back.

    packed: uint8 (n_bytes,), codes as `nf4lab.formats.packing` has them: of 4-bit ones two, the even one high.
    stored_scale: float32 (n_blocks,), or QuantizedConstants after double quantization.
    stored_location: the same for formats that shift their blocks, else None.
    tensor_scale: float32 (), which every scale is a multiple of, for formats that have one, else None.
    format, block_size: how it was made. shape, dtype: of the original, to which `dequantize` returns.

    Raises ValueError where packed, constants and shape disagree.
    """

    packed: Tensor
    stored_scale: Tensor | QuantizedConstants
    stored_location: Tensor | QuantizedConstants | None
    format: Format
    shape: torch.Size
    dtype: torch.dtype
    block_size: int
    tensor_scale: Tensor | None = None

    def __post_init__(self):
        _check_block_size(self.block_size)
        shape = tuple(self.shape)
        n_bytes = -(-self.numel * self.format.code_bits // 8)
        if self.packed.dtype != torch.uint8 or self.packed.numel() != n_bytes:
            raise ValueError(
                f"shape {shape} takes {n_bytes} packed uint8; got {self.packed.numel()} {self.packed.dtype}"
            )
        for name, constants in (("absmax or scale", self.stored_scale), ("location", self.stored_location)):
            if constants is not None and constants.numel() != self.n_blocks:
                raise ValueError(
                    f"shape {shape} in blocks of {self.block_size} has {self.n_blocks} blocks; "
                    f"got {constants.numel()} values of {name}"
                )
        if (self.tensor_scale is not None) != self.format.tensor_scale:
            has, got = ("one scale per tensor", "none") if self.format.tensor_scale else ("no scale per tensor", "one")
            raise ValueError(f"format {self.format.name!r} has {has}; got {got}")

    @property
    def numel(self) -> int:
        """How many elements the original has."""
        return math.prod(self.shape)

    @property
    def n_blocks(self) -> int:
        """How many blocks they make, the short last one included."""
        return -(-self.numel // self.block_size)

    @property
    def codes(self) -> Tensor:
        """The codes, one per byte: uint8 (n,)."""
        return unpack(self.packed, self.numel, self.format.code_bits)

    @property
    def scale(self) -> Tensor:
        """One scale per block, decoded: float32 (n_blocks,)."""
        return decoded(self.stored_scale, self.tensor_scale)

    @property
    def location(self) -> Tensor | None:
        """One location per block, decoded: float32 (n_blocks,); None for formats that do not shift."""
        return decoded(self.stored_location)

    @property
    def absmax(self) -> Tensor:
        """The scale of a format normalised by absmax: float32 (n_blocks,). Raises ValueError for other formats."""
        if not self.format.scale_is_absmax:
            raise ValueError(f"format {self.format.name!r} is not normalised by absmax; use .scale and .location")
        return self.scale

    @property
    def nbytes(self) -> int:
        """Bytes actually stored: packed codes and all constants. The levels belong to the format and do not count."""
        constants = [c for c in (self.stored_scale, self.stored_location) if c is not None]
        dtype_bytes = self.format.constants_dtype.itemsize
        of_blocks = sum(c.nbytes if isinstance(c, QuantizedConstants) else c.numel() * dtype_bytes for c in constants)
        return self.packed.nbytes + of_blocks + (0 if self.tensor_scale is None else self.tensor_scale.nbytes)

    @property
    def bits_per_weight(self) -> float:
        """Bits stored for each element; NaN where there is none."""
        return 8 * self.nbytes / self.numel if self.numel else math.nan

    def dequantize(
        self, dtype: torch.dtype | None = None, *, out: Tensor | None = None, backend: str | None = None
    ) -> Tensor:
        """See `nf4lab.dequantize`."""
        return dequantize(self, dtype, out=out, backend=backend)

    def of_blocks(self, blocks: Tensor) -> "QuantizedTensor":
        """These blocks as a tensor of their own: int64 (m,) to shape (m * block_size,), with constants decoded.

        A short last block is filled up with arbitrary codes; of a tensor without elements there are no blocks.
        """
        width = self.block_size * self.format.code_bits // 8  # whole bytes for every width and size there is
        places = blocks[:, None] * width + torch.arange(width, device=blocks.device)
        packed = self.packed[places.clamp(max=max(self.packed.numel() - 1, 0)).reshape(-1)]
        scale, location = (_at(constants, blocks) for constants in (self.stored_scale, self.stored_location))
        shape = torch.Size([blocks.numel() * self.block_size])
        return replace(self, packed=packed, stored_scale=scale, stored_location=location, shape=shape)

    def to(self, device: torch.device | str) -> "QuantizedTensor":
        """The same tensor on another device."""
        moved = {
            name: None if part is None else part.to(device)
            for name in ("packed", "stored_scale", "stored_location", "tensor_scale")
            for part in [getattr(self, name)]
        }
        return replace(self, **moved)

    def __repr__(self) -> str:
        return (
            f"QuantizedTensor({self.format.name}, shape={tuple(self.shape)}, dtype={self.dtype}, "
            f"block_size={self.block_size}, bits_per_weight={self.bits_per_weight:.4f})"
        )


def quantize(
    x: Tensor,
    format: str | Format = "nf4",
    block_size: int | None = None,
    double_quant: bool | str | DoubleQuant = False,
    *,
    hessian: Tensor | None = None,
    backend: str | None = None,
) -> QuantizedTensor:
    """A tensor of any shape as a QuantizedTensor, on the device it is on.

    x: float32, float16, bfloat16 or float64; all are worked on in float32. Non-contiguous tensors are read in
    row-major order of their elements.
    format: a name in nf4lab.FORMATS, or a nf4lab.Format. Codes are stored in 2, 3, 4 or 8 bits, as its levels need.
    block_size: a power of two, 16 to 4096; by default the format's own, 64 for NF4.
    double_quant: True for bitsandbytes' 8-bit constants; "linear8", "linear4" or a nf4lab.DoubleQuant for others.
    The codes are made with the exact constants, before those are quantized. Constants of one byte are refused.
    hessian: for a matrix x (out, in), the second moments of its inputs, float (in, in), from `nf4lab.calibrate`: what
    rounding a weight does to the output is then taken up by those after it in its row, as in GPTQ (arXiv:2210.17323).
    The format of what is stored is the same. block_size must divide the columns.
    backend: "torch" for the reference, "cpu" or "cuda" for kernels; by default the fastest. All give the same bytes,
    but for double quantization on another device, where a mean may differ in its last bit: see nf4lab.DoubleQuant.

    NF4 and FP4 give bitsandbytes' bytes (0.50.2, on the CPU) in full blocks of float32, float16 and bfloat16 wherever
    absmax is at least 1e-38; below that bitsandbytes clamps, and this does not. A zero block has absmax 0 and decodes
    to zeros. In a short last block bitsandbytes divides by the absmax, where this multiplies by its reciprocal as in
    all others: a weight within a rounding of a boundary can have another code there.

    >>> w = torch.tensor([0.5, -1.0, 0.25, 0.0])
    >>> quantize(w).codes
    tensor([12,  0, 10,  7], dtype=torch.uint8)

    Raises TypeError for a tensor or argument of the wrong type, ValueError for a value that is not finite in
    float32 (naming the first), a tensor that is not dense, has no values or lies on several processes, a block size,
    format or backend that does not exist or does not take this tensor, and a hessian that does not fit x.
    Source: QLoRA (arXiv:2305.14314).
    """
    _check_tensor(x)
    if block_size is not None:
        _check_block_size(block_size)
    format = as_format(format)
    block_size = format.block_size if block_size is None else block_size
    scheme = None if double_quant is False else as_double_quant(double_quant)
    if scheme and format.constants_dtype.itemsize == 1:
        raise ValueError(f"format {format.name!r} has constants of one byte already; double_quant must be False")
    flat = x.detach().reshape(-1)
    n = flat.numel()
    chosen = backends.choose(backend, x.device, x.dtype, n, format)
    quantize_flat = backends.QUANTIZE[chosen]
    if hessian is not None:
        hessian = feedback.check_hessian(hessian, x)
    if hessian is not None and n:
        kernel = feedback.kernel_for(backend, chosen, x.device, format)
        quantize_flat = functools.partial(feedback.quantize, shape=x.shape, hessian=hessian, kernel=kernel)
    quantized = quantize_flat(flat if n else flat.new_zeros(2), format, block_size)
    if quantized is None:
        raise ValueError(_describe_non_finite(x))
    *parts, tensor_scale = quantized
    packed, scale, location = parts if n else [None if part is None else part[:0] for part in parts]
    if scheme:
        encode = backends.ENCODE_CONSTANTS.get(chosen)
        scale, location = (None if part is None else scheme.quantize(part, encode) for part in (scale, location))
    return QuantizedTensor(packed, scale, location, format, x.shape, x.dtype, block_size, tensor_scale)


def dequantize(
    q: QuantizedTensor, dtype: torch.dtype | None = None, *, out: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """The tensor that q stands for, in its shape and in `dtype` (default: that of out, or else the original's).

    Each value is computed in float32, location + scale * level, and rounded once to `dtype`.
    out: a contiguous tensor of q's shape, on q's device, to write to and return; it saves the allocation, and
    clearing what is allocated. backend: as for `quantize`.

    Raises TypeError unless q is a QuantizedTensor and dtype one of float32, float16, bfloat16, float64; ValueError
    where out or the backend does not fit.
    """
    if not isinstance(q, QuantizedTensor):
        raise TypeError(f"dequantize takes a QuantizedTensor; got {type(q).__name__}")
    if out is not None and not isinstance(out, Tensor):
        raise TypeError(f"out must be a torch.Tensor; got {type(out).__name__}")
    dtype = dtype or (q.dtype if out is None else out.dtype)
    check_dtype(dtype)
    if out is None:
        target = backends.empty(q.numel, dtype, q.packed.device).reshape(q.shape)
    else:
        _check_out(out, q, dtype)
        target = out
    dequantize_parts = backends.DEQUANTIZE[backends.choose(backend, target.device, dtype, q.numel, q.format)]
    dequantize_parts(q.packed, q.stored_scale, q.stored_location, q.tensor_scale, q.format, q.block_size, target)
    return target


def check_dtype(dtype: torch.dtype) -> None:
    """Raise TypeError unless a QuantizedTensor can be decoded to dtype."""
    if dtype not in DTYPES:
        raise TypeError(f"dtype must be float32, float16, bfloat16 or float64; got {dtype}")


def _at(constants: Tensor | QuantizedConstants | None, blocks: Tensor) -> Tensor | None:
    """The constants of these blocks, decoded."""
    if constants is None:
        return None
    return constants.at(blocks) if isinstance(constants, QuantizedConstants) else constants[blocks]


def _check_tensor(x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch.Tensor; got {type(x).__name__}")
    if x.dtype not in DTYPES:
        raise TypeError(f"x must be float32, float16, bfloat16 or float64; got {x.dtype}")
    if x.layout != torch.strided or x.is_nested:
        raise ValueError(f"x must be dense; got a tensor of layout {x.layout}{', nested' * x.is_nested}")
    if x.is_meta:
        raise ValueError(f"x is on the meta device: its {tuple(x.shape)} elements have no values")
    if hasattr(x, "to_local"):
        raise ValueError("x is a DTensor, which lies on several processes: quantize before fully_shard")


def _check_block_size(block_size: int) -> None:
    if isinstance(block_size, bool) or not isinstance(block_size, int):
        raise TypeError(f"block_size must be an int; got {block_size!r}")
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size must be one of 16, 32, 64, …, 4096; got {block_size}")


def _check_out(out: Tensor, q: QuantizedTensor, dtype: torch.dtype) -> None:
    """Raise unless out can take what q stands for in dtype, in row-major order and without touching q's memory."""
    if (out.shape, out.dtype, out.device) != (q.shape, dtype, q.packed.device):
        wanted, got = (
            f"shape {tuple(t[0])}, {t[1]} on {t[2]}"
            for t in ((q.shape, dtype, q.packed.device), (out.shape, out.dtype, out.device))
        )
        raise ValueError(f"out must have {wanted}; got {got}")
    if not out.is_contiguous():
        raise ValueError(f"out must be contiguous; got strides {out.stride()} for shape {tuple(out.shape)}")
    if out.requires_grad:
        raise ValueError("out must not require a gradient; pass out.detach()")
    for stored in (q.packed, q.stored_scale, q.stored_location):
        if isinstance(stored, Tensor) and _overlap(stored, out):
            raise ValueError("out must not share memory with q")


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors without gaps share a byte."""
    return a.data_ptr() < b.data_ptr() + b.nbytes and b.data_ptr() < a.data_ptr() + a.nbytes


def _describe_non_finite(x: Tensor) -> str:
    """How many values are not finite in float32, and which is the first."""
    flat = x.detach().reshape(-1)
    nan = infinite = 0
    first = None
    for start, stop in chunks(flat.numel()):
        values = flat[start:stop].float()
        nan += values.isnan().sum().item()
        infinite += values.isinf().sum().item()
        if first is None and nan + infinite:
            first = start + (~values.isfinite()).nonzero()[0].item()
    index = tuple(i.item() for i in torch.unravel_index(torch.tensor(first, device="cpu"), x.shape)) if x.dim() else ()
    return (
        f"x must be finite in float32; {nan} NaN and {infinite} infinite values, "
        f"the first is {flat[first].item()} at index {index}"
    )
