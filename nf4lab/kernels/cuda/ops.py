"""What to call: checks, the choice of a kernel, and the torch ops `torch.ops.nf4lab.*` around it.

An op is opaque to torch.compile, and takes its outputs as arguments, so nothing is allocated. A plain call goes past
it, straight to the kernel. In the simulator the same functions run on CPU tensors, without the ops.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from . import dequantize_kernels, fused, quantize_kernels
from .checks import BYTE, FLOAT32, FLOATS, TABLE, expect, expect_block_size, expect_nested, expect_version
from .launch import SIMULATOR, launch, refuse

library = torch.library.Library("nf4lab", "FRAGMENT")


def define(schema, implementation):
    """Register `implementation` as the CUDA op nf4lab::schema whose outputs are arguments; return what to call.

    Where somebody has to see the op (torch.compile, a dispatch mode, a subclass of Tensor), that calls the op; else
    the implementation itself, which costs the host less.
    """
    name = schema.split("(")[0]
    library.define(schema)
    library.impl(name, implementation, "CUDA")
    library.impl(name, refuse, "CPU")
    torch.library.register_fake(f"nf4lab::{name}", lambda *args: None, lib=library)
    op, is_compiling = getattr(torch.ops.nf4lab, name).default, torch.compiler.is_compiling
    dispatch_modes = torch._C._len_torch_dispatch_stack

    def call(*args):
        seen = is_compiling() or dispatch_modes() or type(args[0]) is not Tensor or not args[0].is_cuda
        return op(*args) if seen else implementation(*args)

    return implementation if SIMULATOR else call


def dequantize(packed, absmax, levels, *, n, block_size, out, version="v4"):
    """Fill `out` (n elements; float32, float16 or bfloat16) with levels[code] * absmax[block]; return it.

    packed uint8 ((n + 1) // 2,), the even element of each byte in the high nibble; levels float32 (16,); absmax
    float32 (n_blocks,), or (codes uint8 (n_blocks,), group_absmax float32 (n_groups,), offset float32 (1,),
    code_map float32 (256,), group_size) for a double-quantized one, decoded in the same launch as
    code_map[code] * group_absmax + offset, product and sum each rounded. The result is rounded once, to nearest even.

    Raises TypeError or ValueError for a wrong dtype, count or block_size, RuntimeError where there is no GPU.
    """
    expect_block_size("block_size", block_size)
    device = out.get_device()
    expect("out", out, FLOATS, n, device)
    expect("packed", packed, BYTE, (n + 1) // 2, device)
    expect("levels", levels, FLOAT32, 16, device)
    n_blocks = -(-n // block_size)
    if isinstance(absmax, tuple):
        expect_nested(absmax, n_blocks, device)
        *parts, group_size = absmax
        _nested_op(packed, *parts, levels, n, block_size, group_size, out)
    else:
        expect_version(version, dequantize_kernels.VERSIONS)
        expect("absmax", absmax, FLOAT32, n_blocks, device)
        _dequantize_op(packed, absmax, levels, n, block_size, out, version)
    return out


def wide_groups(packed, out, n):
    """How many groups of 16 output bytes the kernels may read and write at once: none if a tensor is misaligned."""
    group = 16 // out.element_size()
    return n // group if packed.data_ptr() % (group // 2) == 0 and out.data_ptr() % 16 == 0 else 0


def _run_dequantize(packed, absmax, levels, n, block_size, out, version):
    if n:
        args = packed, absmax, levels, out, n, block_size.bit_length() - 1, wide_groups(packed, out, n)
        shape = dequantize_kernels.shape(version, n, out.element_size())
        launch(dequantize_kernels.VERSIONS[version], *shape, args, dtype=out.dtype)


def _run_nested(packed, codes, group_absmax, offset, code_map, levels, n, block_size, group_size, out):
    if n:
        shifts = block_size.bit_length() - 1, group_size.bit_length() - 1
        args = packed, codes, group_absmax, offset, code_map, levels, out, n, *shifts, wide_groups(packed, out, n)
        shape = dequantize_kernels.shape("nested", n, out.element_size())
        launch(dequantize_kernels.nested, *shape, args, dtype=out.dtype)


_dequantize_op = define(
    "dequantize(Tensor packed, Tensor absmax, Tensor levels, int n, int block_size, Tensor(a!) out, str version) -> ()",
    _run_dequantize,
)
_nested_op = define(
    "dequantize_nested(Tensor packed, Tensor codes, Tensor group_absmax, Tensor offset, Tensor code_map,"
    " Tensor levels, int n, int block_size, int group_size, Tensor(a!) out) -> ()",
    _run_nested,
)


class Codebook(NamedTuple):
    """A codebook as `quantize` takes it, on one device: made once, by `codebook`, for any number of tensors.

    boundaries: float32 (15,). cells: int64 (64,), or (0,) where the boundaries lie too close for a table of cells.
    numbering: the 16 codes, in the order of their levels, as the nibbles of one int64.
    """

    boundaries: Tensor
    cells: Tensor
    numbering: int


def codebook(boundaries, codes=range(16), device="cuda") -> Codebook:
    """The Codebook with these boundaries: float32 (15,), ascending, padded with +inf for fewer levels.

    codes: 16 ints, the code of each level in ascending order. Raises ValueError unless they permute 0..15.
    """
    codes = tuple(codes)
    if sorted(codes) != list(range(16)):
        raise ValueError(f"codes must be a permutation of 0..15; got {codes}")
    expect("boundaries", boundaries, FLOAT32, 15, boundaries.get_device())
    cells = quantize_kernels.cell_table(boundaries.cpu().numpy(), codes)
    cells = torch.empty(0, dtype=torch.int64) if cells is None else torch.from_numpy(cells).view(torch.int64)
    number = sum(code << (4 * position) for position, code in enumerate(codes))
    return Codebook(boundaries.to(device), cells.to(device), number - 2**64 if number >= 2**63 else number)


def quantize(x, codebook, *, block_size, packed, absmax, check_finite=True, version="v5"):
    """Fill packed (uint8, (n + 1) // 2) and absmax (float32, n_blocks) from x (n float32, float16 or bfloat16).

    One pass over x. A value's position is the number of boundaries of the Codebook strictly below
    s = x * (1 / absmax), both roundings IEEE; its code is the position's. A block of zeros gets the code of 0.0, as
    does the nibble that pads an odd n; where 1 / absmax overflows, s = x / absmax. A codebook without a table of
    cells takes v2 in place of v3 to v5; a block of less than 64 bytes, or a tensor that does not start on 16 bytes,
    takes v4 in place of v5.

    NaN or infinity raises ValueError with their number and the first position; that waits for the GPU.
    check_finite=False does not wait, and is what a CUDA graph can capture. Other errors as `dequantize`.
    """
    n, device = x.numel(), x.get_device()
    boundaries, cells, numbering = codebook
    expect_block_size("block_size", block_size)
    expect_version(version, quantize_kernels.VERSIONS)
    expect("x", x, FLOATS, n, device)
    expect("boundaries", boundaries, FLOAT32, 15, device)
    expect("cells", cells, TABLE, cells.numel(), device)
    expect("packed", packed, BYTE, (n + 1) // 2, device)
    expect("absmax", absmax, FLOAT32, -(-n // block_size), device)
    if version in ("v3", "v4", "v5") and not cells.numel():
        version = "v2"
    _quantize_op(x, boundaries, cells, numbering, block_size, check_finite, packed, absmax, version)


def _run_quantize(x, boundaries, cells, numbering, block_size, check_finite, packed, absmax, version):
    n = x.numel()
    if not n:
        return
    flag = finite_flag() if check_finite else None
    wide = n // 8 if x.data_ptr() % 16 == 0 and packed.data_ptr() % 4 == 0 else 0
    if version == "v5" and (block_size * x.element_size() < 64 or (x.data_ptr() | packed.data_ptr()) % 16):
        version = "v4"
    numbers = n, block_size.bit_length() - 1, numbering, int(check_finite), wide
    args = x, boundaries, cells, packed, absmax, flag, *numbers
    shape = quantize_kernels.shape(version, n, block_size, x.element_size())
    launch(quantize_kernels.VERSIONS[version], *shape, args, dtype=x.dtype)
    if check_finite:
        refuse_if_set(flag, x)


def finite_flag():
    """One int32 zero in host memory that the GPU can write: reading it back needs no copy."""
    if not SIMULATOR and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("a CUDA graph cannot wait for check_finite: pass check_finite=False")
    return torch.zeros(1, dtype=torch.int32, pin_memory=not SIMULATOR)


def refuse_if_set(flag, x):
    if not SIMULATOR:
        torch.cuda.current_stream(x.device).synchronize()
    if flag.item():
        bad = (~torch.isfinite(x)).reshape(-1).nonzero().reshape(-1)
        raise ValueError(f"x must be finite; got {len(bad)} NaN or infinite values, the first at index {bad[0].item()}")


_quantize_op = define(
    "quantize(Tensor x, Tensor boundaries, Tensor cells, int numbering, int block_size, bool check_finite,"
    " Tensor(a!) packed, Tensor(b!) absmax, str version) -> ()",
    _run_quantize,
)


def gemv(x, packed, absmax, levels, *, shape, block_size, bias=None, out=None, version="fastest"):
    """y = x W^T + bias, of x's dtype and shape (..., n), for 1 to 128 rows of x (..., k) and packed W of shape (n, k).

    packed, absmax (plain or nested) and levels as in `dequantize`. Sums are float32. `fused` says which version takes
    what; the tensor core kernels round the levels: v3 to float16, v4 to v6 to the dtype of x, so that a product may be
    off by 2^-11 of itself, with bfloat16 by 2^-8. v1 and v2 multiply in float32, more slowly.

    Raises TypeError or ValueError for a wrong dtype, count or number of rows, RuntimeError where there is no GPU.
    """
    n, k = shape
    device, rows = x.get_device(), x.numel() // k
    expect_block_size("block_size", block_size)
    expect_version(version, (*fused.VERSIONS, "fastest"))
    if x.shape[-1] != k or not 1 <= rows <= fused.MOST_ROWS:
        raise ValueError(f"x must have 1 to {fused.MOST_ROWS} rows of {k}; got shape {tuple(x.shape)}")
    expect("x", x, FLOATS, rows * k, device)
    expect("packed", packed, BYTE, (n * k + 1) // 2, device)
    expect("levels", levels, FLOAT32, 16, device)
    n_blocks = -(-(n * k) // block_size)
    if isinstance(absmax, tuple):
        expect_nested(absmax, n_blocks, device)
        *parts, group_size = absmax
    else:
        expect("absmax", absmax, FLOAT32, n_blocks, device)
        parts, group_size = (packed, absmax, absmax, absmax), 0  # stand-ins that the kernel does not touch
    out = x.new_empty(*x.shape[:-1], n) if out is None else out
    expect("out", out, (x.dtype,), rows * n, device)
    if bias is not None:
        expect("bias", bias, (x.dtype,), n, device)
    scale = parts[1] if group_size else absmax
    _gemv_op(x, packed, scale, *parts, levels, bias, n, k, block_size, group_size, out, version)
    return out


def _run_gemv(
    x, packed, absmax, codes, group_absmax, offset, code_map, levels, bias, n, k, block_size, group_size, out, version,
):  # fmt: skip
    rows = x.numel() // k
    aligned = x.data_ptr() % 16 == 0 and packed.data_ptr() % 16 == 0
    tensors = packed, absmax, codes, group_absmax, offset, code_map, levels, out if bias is None else bias
    shifts = block_size.bit_length() - 1, max(group_size, 1).bit_length() - 1
    numbers = n, k, *shifts, int(group_size > 0), int(bias is not None)
    for one in fused.launches(version, rows, n, k, block_size, x.dtype, x.get_device(), aligned):
        some = one.rows == rows
        some_x, some_out = (t if some else t.view(rows, -1)[one.first : one.first + one.rows] for t in (x, out))
        launch(
            one.kernel, one.grid, one.threads, (some_x, *tensors, some_out, one.rows, *numbers, *one.numbers),
            dtype=x.dtype, shared_bytes=one.shared_bytes, max_registers=one.registers,
        )  # fmt: skip


_gemv_op = define(
    "gemv(Tensor x, Tensor packed, Tensor absmax, Tensor codes, Tensor group_absmax, Tensor offset, Tensor code_map,"
    " Tensor levels, Tensor? bias, int n, int k, int block_size, int group_size, Tensor(a!) out, str version) -> ()",
    _run_gemv,
)
