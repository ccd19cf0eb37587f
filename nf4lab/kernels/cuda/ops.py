"""What to call: checks, the choice of a kernel, and the torch ops `torch.ops.nf4lab.*` around it.

An op is opaque to torch.compile and costs 3-5 us a call; it takes its outputs as arguments, so nothing is allocated.
In the simulator the same functions run on CPU tensors, without the ops.
"""

import functools

import torch

from . import dequantize_kernels, gemv_kernels, quantize_kernels
from .launch import SIMULATOR, launch, refuse

BLOCK_SIZES = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
COUNTING_UP = 0xFEDCBA9876543210 - 2**64  # nibble p is p; as the int64 that an op can take

library = torch.library.Library("nf4lab", "FRAGMENT")


def define(schema, implementation):
    """Register `implementation` as the CUDA op nf4lab::schema whose outputs are arguments; return the callable."""
    name = schema.split("(")[0]
    library.define(schema)
    library.impl(name, implementation, "CUDA")
    library.impl(name, refuse, "CPU")
    torch.library.register_fake(f"nf4lab::{name}", lambda *args: None, lib=library)
    return implementation if SIMULATOR else getattr(torch.ops.nf4lab, name).default


def expect(name, tensor, dtypes, count, device):
    """ValueError or TypeError unless `tensor` is contiguous, on `device`, of one of `dtypes`, with `count` elements."""
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} must be {' or '.join(map(str, dtypes))}; got {tensor.dtype}")
    if tensor.numel() != count:
        raise ValueError(f"{name} must have {count} elements; got {tensor.numel()}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device} like the rest; got {tensor.device}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous; got strides {tuple(tensor.stride())}")


def expect_block_size(name, block_size, sizes=BLOCK_SIZES):
    if block_size not in sizes:
        raise ValueError(f"{name} must be one of {', '.join(map(str, sizes))}; got {block_size}")


def dequantize(packed, absmax, levels, *, n, block_size, out, version="v4"):
    """Fill `out` (n elements; float32, float16 or bfloat16) with levels[code] * absmax[block]; return it.

    packed uint8 ((n + 1) // 2,), the even element of each byte in the high nibble; levels float32 (16,); absmax
    float32 (n_blocks,), or (codes uint8 (n_blocks,), group_absmax float32 (n_groups,), offset float32 (1,),
    code_map float32 (256,), group_size) for a double-quantized one, decoded in the same launch as
    code_map[code] * group_absmax + offset, product and sum each rounded. The result is rounded once, to nearest even.

    Raises TypeError or ValueError for a wrong dtype, count or block_size, RuntimeError where there is no GPU.
    """
    expect_block_size("block_size", block_size)
    n_blocks = -(-n // block_size)
    expect("out", out, FLOATS, n, out.device)
    expect("packed", packed, (torch.uint8,), (n + 1) // 2, out.device)
    expect("levels", levels, (torch.float32,), 16, out.device)
    if isinstance(absmax, tuple):
        codes, group_absmax, offset, code_map, group_size = absmax
        expect_nested(codes, group_absmax, offset, code_map, group_size, n_blocks, out.device)
        _nested_op(packed, codes, group_absmax, offset, code_map, levels, n, block_size, group_size, out)
    else:
        expect("absmax", absmax, (torch.float32,), n_blocks, out.device)
        _dequantize_op(packed, absmax, levels, n, block_size, out, version)
    return out


def expect_nested(codes, group_absmax, offset, code_map, group_size, n_blocks, device):
    if group_size < 1 or group_size & (group_size - 1):
        raise ValueError(f"group_size must be a power of two; got {group_size}")
    expect("codes", codes, (torch.uint8,), n_blocks, device)
    expect("group_absmax", group_absmax, (torch.float32,), -(-n_blocks // group_size), device)
    expect("offset", offset, (torch.float32,), 1, device)
    expect("code_map", code_map, (torch.float32,), 256, device)


def wide_groups(packed, out, n):
    """How many groups of 16 output bytes the kernels may read and write at once: none if a tensor is misaligned."""
    group = 16 // out.element_size()
    return n // group if packed.data_ptr() % (group // 2) == 0 and out.data_ptr() % 16 == 0 else 0


def _run_dequantize(packed, absmax, levels, n, block_size, out, version):
    if n:
        args = (packed, absmax, levels, out, n, block_size.bit_length() - 1, wide_groups(packed, out, n))
        shape = dequantize_kernels.shape(version, n, out.element_size())
        launch(dequantize_kernels.VERSIONS[version], *shape, args, dtype=out.dtype)


def _run_nested(packed, codes, group_absmax, offset, code_map, levels, n, block_size, group_size, out):
    if n:
        shifts = block_size.bit_length() - 1, group_size.bit_length() - 1
        numbers = n, *shifts, wide_groups(packed, out, n)
        shape = dequantize_kernels.shape("nested", n, out.element_size())
        args = (packed, codes, group_absmax, offset, code_map, levels, out, *numbers)
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


@functools.lru_cache
def numbering_of(codes):
    """16 codes, in the order of their levels, as the nibbles of one int64."""
    if sorted(codes) != list(range(16)):
        raise ValueError(f"codes must be a permutation of 0..15; got {codes}")
    number = sum(code << (4 * position) for position, code in enumerate(codes))
    return number - 2**64 if number >= 2**63 else number


def quantize(x, boundaries, *, block_size, packed, absmax, codes=None, check_finite=True, version="v4"):
    """Fill packed (uint8, (n + 1) // 2) and absmax (float32, n_blocks) from x (n float32, float16 or bfloat16).

    One pass over x. A value's position is the number of boundaries (float32 (15,), ascending, padded with +inf for
    fewer levels) strictly below s = x * (1 / absmax), both roundings IEEE; its code is codes[position] (a sequence of
    16 ints, or 0..15 in order). A block of zeros gets the code of 0.0, as does the nibble that pads an odd n; where
    1 / absmax overflows, s = x / absmax.

    NaN or infinity raises ValueError with their number and the first position; that waits for the GPU.
    check_finite=False does not wait, and is what a CUDA graph can capture. Other errors as `dequantize`.
    """
    n = x.numel()
    expect_block_size("block_size", block_size)
    expect("x", x, FLOATS, n, x.device)
    expect("boundaries", boundaries, (torch.float32,), 15, x.device)
    expect("packed", packed, (torch.uint8,), (n + 1) // 2, x.device)
    expect("absmax", absmax, (torch.float32,), -(-n // block_size), x.device)
    numbering = COUNTING_UP if codes is None else numbering_of(tuple(codes))
    _quantize_op(x, boundaries, numbering, block_size, check_finite, packed, absmax, version)


def _run_quantize(x, boundaries, numbering, block_size, check_finite, packed, absmax, version):
    n = x.numel()
    if not n:
        return
    flag = finite_flag() if check_finite else None
    wide = n // 8 if x.data_ptr() % 16 == 0 and packed.data_ptr() % 4 == 0 else 0
    args = (x, boundaries, packed, absmax, flag)
    numbers = (n, block_size.bit_length() - 1, numbering, int(check_finite), wide)
    shape = quantize_kernels.shape(version, n, block_size)
    launch(quantize_kernels.VERSIONS[version], *shape, (*args, *numbers), dtype=x.dtype)
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
    "quantize(Tensor x, Tensor boundaries, int numbering, int block_size, bool check_finite, Tensor(a!) packed,"
    " Tensor(b!) absmax, str version) -> ()",
    _run_quantize,
)


def gemv(x, packed, absmax, levels, *, shape, block_size, bias=None, out=None, version="v3"):
    """y = x W^T + bias, of x's dtype and shape (..., n), for 1 to 16 rows of x (..., k) and packed W of shape (n, k).

    packed, absmax (plain or nested) and levels as in `dequantize`. Sums are float32. The tensor core kernel (sm_80 on;
    16-bit x; n a multiple of 16, k of 256; block_size at least 64) rounds the levels to float16, so a product may be
    off by 2^-11 of itself; every other case multiplies in float32, more slowly.

    Raises TypeError or ValueError for a wrong dtype, count or number of rows, RuntimeError where there is no GPU.
    """
    n, k = shape
    expect_block_size("block_size", block_size)
    rows = x.numel() // k
    if x.shape[-1] != k or not 1 <= rows <= 16:
        raise ValueError(f"x must have 1 to 16 rows of {k}; got shape {tuple(x.shape)}")
    n_blocks = -(-(n * k) // block_size)
    expect("x", x, FLOATS, rows * k, x.device)
    expect("packed", packed, (torch.uint8,), (n * k + 1) // 2, x.device)
    expect("levels", levels, (torch.float32,), 16, x.device)
    if isinstance(absmax, tuple):
        expect_nested(*absmax, n_blocks, x.device)
        *parts, group_size = absmax
    else:
        expect("absmax", absmax, (torch.float32,), n_blocks, x.device)
        parts, group_size = (packed, absmax, absmax, absmax), 0  # stand-ins that the kernel does not touch
    out = x.new_empty(*x.shape[:-1], n) if out is None else out
    expect("out", out, (x.dtype,), rows * n, x.device)
    if bias is not None:
        expect("bias", bias, (x.dtype,), n, x.device)
    scale = parts[1] if group_size else absmax
    _gemv_op(x, packed, scale, *parts, levels, bias, n, k, block_size, group_size, out, version)
    return out


def _run_gemv(
    x,
    packed,
    absmax,
    codes,
    group_absmax,
    offset,
    code_map,
    levels,
    bias,
    n,
    k,
    block_size,
    group_size,
    out,
    version,
):
    rows = x.numel() // k
    tensors = packed, absmax, codes, group_absmax, offset, code_map, levels, out if bias is None else bias
    shifts = block_size.bit_length() - 1, max(group_size, 1).bit_length() - 1
    flags = int(group_size > 0), int(bias is not None)
    wide = x.data_ptr() % 16 == 0 and packed.data_ptr() % 16 == 0
    if version == "v3" and wide and tensor_cores_fit(x, n, k, block_size):
        most = rows_that_fit(k)
        parts = (
            [(x, out)] if rows <= most else zip(x.view(rows, k).split(most), out.view(rows, n).split(most), strict=True)
        )
        for some_x, some_out in parts:
            count = some_x.numel() // k
            args = (some_x, *tensors, some_out, count, n, k, *shifts, *flags)
            kernel = gemv_kernels.TENSOR_CORES[1 if count <= 4 else 2 if count <= 8 else 4]
            blocks = min(n // 16, processors(x.get_device()))
            room = {
                "shared_bytes": 4 * gemv_kernels.shared_words(count, k),
                "max_registers": gemv_kernels.MAX_REGISTERS,
            }
            launch(kernel, blocks, 32 * gemv_kernels.WARPS, args, dtype=x.dtype, **room)
    else:
        simple = version == "v1" or not wide or k % 32 or block_size < 32
        kernel = gemv_kernels.v1 if simple else gemv_kernels.v2
        args = (x, *tensors, out, rows, n, k, *shifts, *flags)
        blocks = -(-rows * n // gemv_kernels.ROWS_OF_W)
        launch(kernel, blocks, 32 * gemv_kernels.ROWS_OF_W, args, dtype=x.dtype)


def tensor_cores_fit(x, n, k, block_size):
    shape_fits = n % 16 == 0 and k % gemv_kernels.STEP == 0 and block_size >= 64 and x.dtype != torch.float32
    return shape_fits and not SIMULATOR and capability(x.get_device()) >= (8, 0) and rows_that_fit(k) > 0


@functools.cache
def rows_that_fit(k):
    """How many rows of x, at most 16, leave room for the table in a thread block's shared memory."""
    limit = torch.cuda.get_device_properties(torch.cuda.current_device()).shared_memory_per_block_optin
    return max((rows for rows in range(1, 17) if 4 * gemv_kernels.shared_words(rows, k) <= limit), default=0)


@functools.cache
def capability(device):
    return torch.cuda.get_device_capability(device)


@functools.cache
def processors(device):
    return torch.cuda.get_device_properties(device).multi_processor_count


_gemv_op = define(
    "gemv(Tensor x, Tensor packed, Tensor absmax, Tensor codes, Tensor group_absmax, Tensor offset, Tensor code_map,"
    " Tensor levels, Tensor? bias, int n, int k, int block_size, int group_size, Tensor(a!) out, str version) -> ()",
    _run_gemv,
)
