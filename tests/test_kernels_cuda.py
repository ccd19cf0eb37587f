"""The CUDA kernels against the rule, written once more in plain torch: bit for bit, on a GPU or in the simulator.

NUMBA_ENABLE_CUDASIM=1 pytest tests/test_kernels_cuda.py     anywhere, on CPU tensors
pytest tests/test_kernels_cuda.py                            on a machine with an NVIDIA GPU
"""

import math
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nf4lab
from nf4lab.backends import feedback
from nf4lab.beyond.rotation import random_signs, rotate, unrotate
from nf4lab.kernels import cuda
from nf4lab.kernels.cuda import dequantize_kernels, hadamard_kernels, quantize_kernels
from nf4lab.kernels.cuda.launch import SIMULATOR
from nf4lab.kernels.hadamard import by_halves

pytestmark = pytest.mark.skipif(cuda.available() is not None, reason=str(cuda.available()))
DEVICE = "cpu" if SIMULATOR else "cuda"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LEVELS = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
        *(0.7229568362236023, 1.0),
    ]
)
FP4_MAGNITUDES = [0, 0.0625 / 12, 8 / 12, 12 / 12, 4 / 12, 6 / 12, 2 / 12, 3 / 12]
FP4 = torch.tensor([*FP4_MAGNITUDES, *(-m for m in FP4_MAGNITUDES)])  # by code: bit 3 is the sign
FP4_ORDER = [
    11,
    10,
    13,
    12,
    15,
    14,
    9,
    8,
    0,
    1,
    6,
    7,
    4,
    5,
    2,
    3,
]  # codes from the lowest level to the highest


def midpoints(levels):
    """The 15 boundaries between 16 ascending levels, in float32."""
    return (levels[1:] + levels[:-1]) / 2


def pad_to_blocks(x, block_size):
    flat = x.reshape(-1).float()
    return torch.nn.functional.pad(flat, (0, -len(flat) % block_size)).reshape(-1, block_size)


def reference_quantize(x, boundaries, block_size, codes=range(16)):
    """(packed uint8, absmax float32) by the rule in words: reciprocal, product, boundaries strictly below."""
    blocks = pad_to_blocks(x.cpu(), block_size)  # (n_blocks, block_size)
    absmax = blocks.abs().amax(1, keepdim=True)
    inverse = 1 / absmax
    s = torch.where(inverse.isinf(), blocks / absmax, blocks * inverse)
    s = torch.where(absmax == 0, torch.zeros(()), s)
    positions = (s[..., None] > boundaries).sum(-1)  # (n_blocks, block_size)
    flat = torch.tensor(list(codes), dtype=torch.uint8)[positions].reshape(-1)[: x.numel()]
    if x.numel() % 2:
        zero = torch.tensor(list(codes), dtype=torch.uint8)[(boundaries < 0).sum()]
        flat = torch.cat([flat, zero[None]])
    return flat[0::2] << 4 | flat[1::2], absmax.reshape(-1)


def reference_dequantize(packed, absmax, levels, n, block_size, dtype):
    """levels[code] * absmax in float32, then one cast."""
    codes = torch.stack([packed >> 4, packed & 15], 1).reshape(-1)[:n].long()
    return (levels[codes] * absmax.repeat_interleave(block_size)[:n]).to(dtype)


def bits(x):
    return x.cpu().view(torch.int32 if x.dtype == torch.float32 else torch.int16)


def same_bits(a, b):
    return a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def at_offset(tensor, offset):
    """The same values on DEVICE, `offset` elements behind the start of an allocation: a sliced tensor."""
    return torch.cat([tensor.new_zeros(offset), tensor]).to(DEVICE)[offset:]


def empty_at(offset, count, dtype):
    """An unwritten output, `offset` elements behind the start of an allocation, filled with a poison value."""
    return torch.full((offset + count,), 77, dtype=dtype, device=DEVICE)[offset:]


def random_codes(n, block_size, seed=0):
    """Random packed bytes and absmax over many magnitudes, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randint(0, 256, ((n + 1) // 2,), dtype=torch.uint8, generator=generator)
    absmax = torch.rand(-(-n // block_size), generator=generator) * 10 ** torch.randn(1, generator=generator)
    return packed, absmax


def run_dequantize(packed, absmax, n, block_size, dtype, version="v4", offset=0):
    out = empty_at(offset, n, dtype)
    absmax = tuple(a.to(DEVICE) if torch.is_tensor(a) else a for a in absmax) if isinstance(absmax, tuple) else absmax
    absmax = absmax if isinstance(absmax, tuple) else absmax.to(DEVICE)
    args = at_offset(packed, offset), absmax, LEVELS.to(DEVICE)
    return cuda.dequantize(*args, n=n, block_size=block_size, out=out, version=version)


SIZES = [1, 2, 7, 64, 515, 1000] if SIMULATOR else [1, 2, 7, 64, 515, 1000, 4095, 4096, 4097, 100_003, 2**20 + 5]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("version", dequantize_kernels.VERSIONS)
def test_every_dequantize_version_equals_the_rule_bit_for_bit(version, dtype):
    for n in SIZES:
        packed, absmax = random_codes(n, 64, seed=n)
        expected = reference_dequantize(packed, absmax, LEVELS, n, 64, dtype)
        assert same_bits(run_dequantize(packed, absmax, n, 64, dtype, version), expected), n


@pytest.mark.parametrize("block_size", [16, 32, 64, 128, 256, 512, 1024, 2048, 4096])
def test_dequantize_takes_every_block_size_and_a_partial_last_block(block_size):
    n = 2 * block_size + 9 if SIMULATOR and block_size > 512 else 5 * block_size + 9
    packed, absmax = random_codes(n, block_size)
    expected = reference_dequantize(packed, absmax, LEVELS, n, block_size, torch.float16)
    assert same_bits(run_dequantize(packed, absmax, n, block_size, torch.float16), expected)


@pytest.mark.parametrize("offset", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantize_takes_misaligned_slices(dtype, offset):
    packed, absmax = random_codes(515, 64)
    expected = reference_dequantize(packed, absmax, LEVELS, 515, 64, dtype)
    for version in dequantize_kernels.VERSIONS:
        assert same_bits(run_dequantize(packed, absmax, 515, 64, dtype, version, offset), expected), version


def random_nested(n_blocks, group_size, seed=0):
    """(codes, group_absmax, offset, code_map, group_size) and the absmax that they stand for."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (n_blocks,), dtype=torch.uint8, generator=generator)
    group_absmax = torch.rand(-(-n_blocks // group_size), generator=generator)
    offset, code_map = torch.rand(1, generator=generator), torch.linspace(-1, 1, 256) ** 3
    product = code_map[codes.long()] * group_absmax.repeat_interleave(group_size)[:n_blocks]
    return (codes, group_absmax, offset, code_map, group_size), product + offset


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nested_absmax_is_decoded_with_two_roundings_in_the_same_launch(dtype):
    for n, block_size, group_size in [(1, 64, 256), (515, 16, 4), (2000, 16, 256), (3001, 32, 2)]:
        n_blocks = -(-n // block_size)
        nested, absmax = random_nested(n_blocks, group_size, seed=n)
        packed, _ = random_codes(n, block_size, seed=n)
        expected = reference_dequantize(packed, absmax, LEVELS, n, block_size, dtype)
        for offset in (0, 1):
            out = run_dequantize(packed, nested, n, block_size, dtype, offset=offset)
            assert same_bits(out, expected), (n, offset)


def run_quantize(x, boundaries, block_size, version="v5", offset=0, codes=range(16), check_finite=True):
    n = x.numel()
    packed, absmax = (
        empty_at(offset, (n + 1) // 2, torch.uint8),
        empty_at(0, -(-n // block_size), torch.float32),
    )
    cuda.quantize(
        *(at_offset(x, offset), cuda.codebook(boundaries, codes, DEVICE)),
        **dict(block_size=block_size, packed=packed, absmax=absmax),
        **dict(check_finite=check_finite, version=version),
    )
    return packed.cpu(), absmax.cpu()


def equal_pairs(got, expected):
    return torch.equal(got[0], expected[0]) and same_bits(got[1], expected[1])


def random_values(n, dtype, seed=0):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("version", quantize_kernels.VERSIONS)
def test_every_quantize_version_equals_the_rule_bit_for_bit(version, dtype):
    for n in SIZES:
        x = random_values(n, dtype, seed=n)
        expected = reference_quantize(x, midpoints(LEVELS), 64)
        assert equal_pairs(run_quantize(x, midpoints(LEVELS), 64, version), expected), n


@pytest.mark.parametrize("block_size", [16, 32, 64, 128, 256, 512, 1024, 2048, 4096])
def test_quantize_takes_every_block_size_and_a_partial_last_block(block_size):
    n = block_size + 9 if SIMULATOR and block_size > 512 else 5 * block_size + 9
    x = random_values(n, torch.float16)
    for version in ["v5"] if SIMULATOR else quantize_kernels.VERSIONS:
        got = run_quantize(x, midpoints(LEVELS), block_size, version)
        assert equal_pairs(got, reference_quantize(x, midpoints(LEVELS), block_size)), version


@pytest.mark.parametrize("offset", [1, 2, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantize_takes_misaligned_slices(dtype, offset):
    x = random_values(515, dtype)
    expected = reference_quantize(x, midpoints(LEVELS), 64)
    assert equal_pairs(run_quantize(x, midpoints(LEVELS), 64, offset=offset), expected)


def test_a_value_on_a_boundary_goes_to_the_lower_code():
    on, above = midpoints(LEVELS), torch.nextafter(midpoints(LEVELS), torch.tensor(2.0))
    below = torch.nextafter(midpoints(LEVELS), torch.tensor(-2.0))
    x = torch.cat([torch.ones(1), on, above, below, torch.tensor([0.0, -0.0])])
    for version in quantize_kernels.VERSIONS:
        packed, _ = run_quantize(x, midpoints(LEVELS), 64, version)
        codes = torch.stack([packed >> 4, packed & 15], 1).reshape(-1).tolist()
        assert codes[1:16] == list(range(15)), version
        assert codes[16:31] == list(range(1, 16)), version
        assert codes[31:46] == list(range(15)), version


def test_zero_blocks_get_the_code_of_zero_and_tiny_ones_are_divided():
    tiny = torch.tensor([2.0**-149, -(2.0**-149), 3 * 2.0**-149, 2.0**-130, -(2.0**-129)])
    x = torch.cat([torch.zeros(64), -torch.zeros(64), tiny.repeat(13), random_values(63, torch.float32) * 2.0**-128])
    for version in quantize_kernels.VERSIONS:
        got = run_quantize(x, midpoints(LEVELS), 64, version)
        assert equal_pairs(got, reference_quantize(x, midpoints(LEVELS), 64)), version
        assert got[0][:64].tolist() == [0x77] * 64, version


def codebooks():
    """Boundaries that fill the cells in every way: even, crowded, all on one side, beyond the ends, fewer levels."""
    yield "uniform", midpoints(torch.linspace(-1, 1, 16))
    yield "int4", torch.cat([midpoints(torch.arange(-7, 8) / 7), torch.tensor([math.inf])])
    yield "crowded", midpoints(torch.linspace(-1, 1, 16) ** 3)
    yield "positive", midpoints(torch.linspace(0, 1, 16))
    yield "beyond", torch.linspace(-1.5, 1.5, 15)
    yield "at the ends", torch.cat([torch.tensor([-1.0]), torch.linspace(-0.9, 0.9, 13), torch.tensor([1.0])])
    yield "four levels", torch.tensor([-0.5, 0.0, 0.5] + [math.inf] * 12)


@pytest.mark.parametrize(("name", "boundaries"), list(codebooks()), ids=lambda v: v if isinstance(v, str) else "")
def test_any_ascending_codebook_is_correct(name, boundaries):
    x = torch.cat([random_values(448, torch.float32, seed=3), boundaries.clamp(-1, 1), torch.ones(1)])
    for version in ["v1", "v5"]:
        got = run_quantize(x, boundaries, 64, version)
        assert equal_pairs(got, reference_quantize(x, boundaries, 64)), version


def test_codes_may_be_numbered_by_sign_and_magnitude():
    boundaries = midpoints(FP4[FP4_ORDER])
    x = random_values(515, torch.float16, seed=4)
    for version in quantize_kernels.VERSIONS:
        got = run_quantize(x, boundaries, 64, version, codes=FP4_ORDER)
        assert equal_pairs(got, reference_quantize(x, boundaries, 64, FP4_ORDER)), version


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantize_refuses_what_is_not_finite_and_says_where(dtype, bad):
    x = random_values(300, dtype)
    x[[131, 299]] = bad
    for version in quantize_kernels.VERSIONS:
        with pytest.raises(ValueError, match="got 2 NaN or infinite values, the first at index 131"):
            run_quantize(x, midpoints(LEVELS), 64, version)


def test_check_finite_false_writes_codes_without_looking():
    x = random_values(300, torch.float32)
    x[131] = math.nan
    packed, absmax = run_quantize(x, midpoints(LEVELS), 64, check_finite=False)
    clean = reference_quantize(x.nan_to_num(), midpoints(LEVELS), 64)
    assert torch.equal(packed[:64], clean[0][:64]) and absmax[2].isnan()


def test_quantizing_nothing_writes_nothing():
    packed, absmax = run_quantize(torch.zeros(0), midpoints(LEVELS), 64)
    assert packed.numel() == absmax.numel() == 0
    assert run_dequantize(packed, absmax, 0, 64, torch.float32).numel() == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(block_size=48), "block_size must be one of 16, 32, .*; got 48"),
        (dict(n=99), "out must have 99 elements; got 100"),
        (dict(out=torch.empty(100, dtype=torch.float64)), "out must be .*; got torch.float64"),
        (dict(out=torch.empty(200)[::2]), r"out must be contiguous; got strides \(2,\)"),
    ],
)
def test_wrong_arguments_are_named_with_their_numbers(change, message):
    call = dict(n=100, block_size=64, out=torch.empty(100)) | change
    with pytest.raises((ValueError, TypeError), match=message):
        cuda.dequantize(torch.zeros(50, dtype=torch.uint8), torch.zeros(2), LEVELS, **call)


def assert_gemv_within_rounding(
    rows, n, k, block_size, dtype, *, version="fastest", group_size=0, bias=False, offset=0
):
    """gemv against float64 on the exact dequantized weights.

    Derived bound, with w = |x| |W|^T: 2^-11 w for levels rounded to float16 (v4 to v6, bfloat16 x: 2^-8 w, to that:
    half a step of its 8 bits is up to 2^-8 of a level; 2^-9 bounds only what a level, at most 1, moves by),
    (k + 16) 2^-24 w for float32 products and sums, half an ulp of the output dtype on the result, and
    2^-38 max|x| sum|W| for bfloat16 x that v3 scales to float16.
    """
    n_blocks = -(-n * k // block_size)
    packed, absmax = random_codes(n * k, block_size, seed=n + k)
    absmax = absmax + 0.01
    stored = absmax
    if group_size:
        stored, absmax = random_nested(n_blocks, group_size)
    w = reference_dequantize(packed, absmax, LEVELS, n * k, block_size, torch.float32).double().reshape(n, k)
    x = random_values(rows * k, dtype, seed=rows).reshape(rows, k)
    b = random_values(n, dtype, seed=5) if bias else None
    y = x.double() @ w.T + (b.double() if bias else 0)
    on_device = [part.to(DEVICE) if torch.is_tensor(part) else part for part in (stored if group_size else (stored,))]
    got = cuda.gemv(
        at_offset(x.reshape(-1), offset).view(rows, k),
        *(at_offset(packed, offset), tuple(on_device) if group_size else on_device[0], LEVELS.to(DEVICE)),
        **dict(shape=(n, k), block_size=block_size, bias=b.to(DEVICE) if bias else None, version=version),
    )
    size = x.double().abs() @ w.abs().T + (b.double().abs() if bias else 0)
    of_levels = 2**-8 if dtype == torch.bfloat16 and version not in ("v1", "v2", "v3") else 2**-11
    tolerance = size * (of_levels + (k + 16) * 2**-24) + y.abs() * torch.finfo(dtype).eps / 2 + 2**-24
    tolerance += 2**-38 * x.double().abs().max() * w.abs().sum(1)
    excess = ((got.cpu().double() - y).abs() / tolerance).max().item()
    assert got.dtype == dtype and got.shape == (rows, n) and excess <= 1, (
        rows,
        n,
        k,
        block_size,
        dtype,
        excess,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_simple_gemv_versions_are_within_rounding_of_float64(version, dtype):
    for rows, n, k, block_size in [(1, 9, 96, 32), (2, 5, 33, 16), (3, 3, 64, 64)]:
        assert_gemv_within_rounding(rows, n, k, block_size, dtype, version=version)
    assert_gemv_within_rounding(2, 5, 64, 32, dtype, version=version, group_size=2, bias=True)
    assert_gemv_within_rounding(1, 5, 64, 32, dtype, version=version, offset=1)


def test_gemv_names_the_wrong_number_of_rows():
    args = torch.zeros(129, 32), torch.zeros(16, dtype=torch.uint8), torch.zeros(1), LEVELS
    with pytest.raises(ValueError, match=r"1 to 128 rows of 32; got shape \(129, 32\)"):
        cuda.gemv(*args, shape=(1, 32), block_size=64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("version", ["v4", "v5", "v6"])
def test_tensor_core_versions_are_within_rounding_of_float64_at_the_edges(version, dtype):
    """Rows that don't fill a tile, columns that don't fill a step, several segments, tiles, blocks and groups."""
    assert_gemv_within_rounding(1, 16, 64, 64, dtype, version=version)
    assert_gemv_within_rounding(2, 20, 192, 64, dtype, version=version, group_size=2, bias=True)
    assert_gemv_within_rounding(3, 70, 576, 64, dtype, version=version, group_size=256)
    assert_gemv_within_rounding(8, 33, 256, 256, dtype, version=version)
    assert_gemv_within_rounding(2, 16, 128, 32, dtype, version=version, group_size=4)
    assert_gemv_within_rounding(11, 24, 128, 64, dtype, version=version, bias=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gemv_v3_is_within_rounding_of_float64(dtype):
    """Two tiles of one thread block, chunks that some warps lack, and rows of x that fill no fragment."""
    assert_gemv_within_rounding(3, 80, 512, 64, dtype, version="v3", group_size=256, bias=True)


on_tensor_cores = pytest.mark.skipif(SIMULATOR, reason="the simulator would take hours: needs a GPU")


@on_tensor_cores
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 9, 16, 17, 24, 32, 33, 48, 64, 65, 128])
def test_tensor_core_gemv_is_within_rounding_of_float64(rows, dtype):
    for version in ("v3", "v4", "v5", "v6"):
        for n, k in [(16, 256), (48, 512), (4096, 4096), (160, 14336), (2128, 5376), (16, 28672), (1000, 192)]:
            if rows <= {"v3": 16, "v4": 64}.get(version, 128):
                assert_gemv_within_rounding(rows, n, k, 64, dtype, version=version, group_size=256 if n == 48 else 0)


@on_tensor_cores
@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 128),
    n=st.integers(1, 700),
    k_64=st.integers(1, 40),
    block_size=st.sampled_from([32, 64, 128, 256, 512, 1024, 2048, 4096]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    group_size=st.sampled_from([0, 2, 256]),
    bias=st.booleans(),
    version=st.sampled_from(["v4", "v5", "v6", "fastest"]),
)
def test_any_shape_rows_dtype_and_block_is_within_rounding(rows, n, k_64, block_size, dtype, group_size, bias, version):
    details = dict(version=version, group_size=group_size, bias=bias)
    assert_gemv_within_rounding(rows, n, 64 * k_64, block_size, dtype, **details)


@on_tensor_cores
def test_the_same_call_gives_the_same_bits_every_time():
    packed, absmax = random_codes(4096 * 4096, 64)
    args = packed.cuda(), absmax.cuda(), LEVELS.cuda()
    for rows in (1, 8, 16, 64, 128):
        x = random_values(rows * 4096, torch.bfloat16).reshape(rows, 4096).cuda()
        first = cuda.gemv(x, *args, shape=(4096, 4096), block_size=64)
        for _ in range(20):
            assert same_bits(cuda.gemv(x, *args, shape=(4096, 4096), block_size=64), first)


@on_tensor_cores
@pytest.mark.parametrize("block_size", [16, 32, 64, 128, 256, 4096])
def test_gemv_takes_every_block_size_bias_nested_and_odd_shapes(block_size):
    for n, k in [(64, 1024), (33, 1024), (64, 1000), (7, 77)]:
        for dtype in DTYPES:
            assert_gemv_within_rounding(1, n, k, block_size, dtype, bias=True)
            assert_gemv_within_rounding(5, n, k, block_size, dtype, group_size=256)


@on_tensor_cores
def test_gemv_keeps_huge_and_tiny_bfloat16_activations():
    packed, absmax = random_codes(16 * 256, 64)
    w = reference_dequantize(packed, absmax, LEVELS, 16 * 256, 64, torch.float32).reshape(16, 256)
    for size in (2.0**-126, 2.0**-60, 2.0**100, 2.0**120):
        x = (random_values(256, torch.float32) * size).bfloat16()
        args = x[None].cuda(), packed.cuda(), absmax.cuda(), LEVELS.cuda()
        got = cuda.gemv(*args, shape=(16, 256), block_size=64).cpu().double()[0]
        expected = w.double() @ x.double()
        bound = (w.double().abs() @ x.double().abs()) * (2**-8 + 272 * 2**-24) + expected.abs() * 2**-8
        assert ((got - expected).abs() <= bound).all(), size


on_gpu = pytest.mark.skipif(SIMULATOR, reason="the simulator has no streams, graphs or compiler: needs a GPU")


@on_gpu
def test_a_cuda_graph_replays_dequantize_and_quantize_on_new_data():
    x, y = (random_values(4096, torch.float16, seed).cuda() for seed in (0, 1))
    levels, codebook = LEVELS.cuda(), cuda.codebook(midpoints(LEVELS))
    packed, absmax = empty_at(0, 2048, torch.uint8), empty_at(0, 64, torch.float32)
    out = empty_at(0, 4096, torch.float16)

    def roundtrip():
        cuda.quantize(x, codebook, block_size=64, packed=packed, absmax=absmax, check_finite=False)
        cuda.dequantize(packed, absmax, levels, n=4096, block_size=64, out=out)

    roundtrip()  # compiles: a capture must not
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        roundtrip()
    x.copy_(y)
    graph.replay()
    expected = reference_quantize(y, midpoints(LEVELS), 64)
    assert equal_pairs((packed.cpu(), absmax.cpu()), expected)
    assert same_bits(out, reference_dequantize(*expected, LEVELS, 4096, 64, torch.float16))


@on_gpu
def test_a_capture_that_would_have_to_wait_is_refused():
    x = random_values(4096, torch.float16).cuda()
    codebook = cuda.codebook(midpoints(LEVELS))
    run_quantize(x, midpoints(LEVELS), 64)
    with pytest.raises(RuntimeError, match="check_finite=False"), torch.cuda.graph(torch.cuda.CUDAGraph()):  # noqa: PT012
        packed, absmax = torch.empty(2048, dtype=torch.uint8, device="cuda"), torch.empty(64, device="cuda")
        cuda.quantize(x, codebook, block_size=64, packed=packed, absmax=absmax)


@on_gpu
def test_torch_compile_takes_the_ops_whole():
    packed, absmax = random_codes(4096, 64)
    packed, absmax, levels = packed.cuda(), absmax.cuda(), LEVELS.cuda()

    @torch.compile(fullgraph=True)
    def double(packed, absmax, levels):
        out = torch.empty(4096, dtype=torch.float16, device="cuda")
        return cuda.dequantize(packed, absmax, levels, n=4096, block_size=64, out=out) * 2

    expected = reference_dequantize(packed.cpu(), absmax.cpu(), LEVELS, 4096, 64, torch.float16) * 2
    assert same_bits(double(packed, absmax, levels), expected)


@on_gpu
def test_launches_go_to_the_current_stream_from_any_thread():
    packed, absmax = random_codes(2**24, 64)
    expected = reference_dequantize(packed, absmax, LEVELS, 2**24, 64, torch.float32)
    results = {}

    def work(name):
        with torch.cuda.stream(torch.cuda.Stream()):
            results[name] = run_dequantize(packed, absmax, 2**24, 64, torch.float32)
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=work, args=(k,)) for k in range(3)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert all(same_bits(results[k], expected) for k in range(3))


@on_gpu
@pytest.mark.skipif(not SIMULATOR and torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("current", [0, 1])
def test_kernels_run_on_the_gpu_that_holds_the_tensors(current):
    n, k, rows = 4096, 1024, 2
    packed, absmax = random_codes(n * k, 64)
    w = reference_dequantize(packed, absmax, LEVELS, n * k, 64, torch.float16)
    x = random_values(rows * k, torch.float16).reshape(rows, k)
    with torch.cuda.device(current):
        for device in ("cuda:1", "cuda:0", "cuda:1"):
            parts = [t.to(device) for t in (packed, absmax, LEVELS)]
            out = torch.empty(n * k, dtype=torch.float16, device=device)
            assert same_bits(cuda.dequantize(*parts, n=n * k, block_size=64, out=out), w)
            y = cuda.gemv(x.to(device), *parts, shape=(n, k), block_size=64)
            assert y.get_device() == out.get_device()
            wide_x, wide_w = x.double(), w.double().view(n, k)
            # the levels, w and y are each rounded once to float16: by at most 2^-11 of itself
            bound = 3 * 2**-11 * (wide_x.abs() @ wide_w.abs().T)
            assert ((y.cpu().double() - wide_x @ wide_w.T).abs() <= bound).all()
            again = torch.empty_like(parts[0]), torch.empty_like(parts[1])
            codebook = cuda.codebook(midpoints(LEVELS), device=device)
            cuda.quantize(out, codebook, block_size=64, packed=again[0], absmax=again[1])
            assert equal_pairs([t.cpu() for t in again], reference_quantize(w, midpoints(LEVELS), 64))
        assert torch.cuda.current_device() == current


@on_gpu
def test_more_than_two_to_the_31_elements_are_addressed():
    n = 2**31 + 4101
    if torch.cuda.mem_get_info()[0] < 14 * 2**30:
        pytest.skip("needs 14 GiB of free GPU memory")
    x = torch.zeros(n, dtype=torch.float16, device="cuda")
    tail = random_values(4101, torch.float16)
    x[2**31 :] = tail.cuda()
    packed, absmax = empty_at(0, (n + 1) // 2, torch.uint8), empty_at(0, -(-n // 64), torch.float32)
    cuda.quantize(x, cuda.codebook(midpoints(LEVELS)), block_size=64, packed=packed, absmax=absmax)
    expected = reference_quantize(tail, midpoints(LEVELS), 64)
    assert equal_pairs((packed[2**30 :].cpu(), absmax[2**25 :].cpu()), expected)
    cuda.dequantize(packed, absmax, LEVELS.cuda(), n=n, block_size=64, out=x)
    assert same_bits(x[2**31 :], reference_dequantize(*expected, LEVELS, 4101, 64, torch.float16))
    assert not x[: 2**31].any()


@on_gpu
@pytest.mark.parametrize("double_quant", [False, True, "linear8", "linear4"])
@pytest.mark.parametrize("format", ["nf4", "fp4", "int4"])
def test_the_public_face_gives_the_bytes_of_the_reference_on_a_gpu(format, double_quant):
    for n in (1, 63, 64 * 300 + 5):
        x = random_values(n, torch.float16)
        ours = nf4lab.quantize(x.cuda(), format, double_quant=double_quant, backend="cuda")
        theirs = nf4lab.quantize(x, format, backend="torch")
        assert torch.equal(ours.packed.cpu(), theirs.packed)
        plain = nf4lab.quantize(x.cuda(), format)  # the same choice by default
        assert torch.equal(plain.absmax.cpu(), theirs.absmax)
        values = ours.dequantize(backend="cuda")
        assert torch.equal(values, ours.dequantize(backend="torch"))


@on_gpu
def test_the_public_face_refuses_what_is_not_finite_and_formats_without_absmax():
    x = torch.tensor([1.0, float("nan"), float("inf")], device="cuda")
    with pytest.raises(ValueError, match=r"1 NaN and 1 infinite values, the first is nan at index \(1,\)"):
        nf4lab.quantize(x)
    with pytest.raises(ValueError, match="'cuda' takes formats scaled by a float32 absmax; got 'uniform'"):
        nf4lab.quantize(x, "uniform", backend="cuda")
    assert nf4lab.quantize(x[:1], "uniform").packed.device.type == "cuda"


HADAMARD_WIDTHS = [("v1", 1), ("v1", 2), ("v1", 64), ("v2", 8), ("v2", 16), ("v2", 32), ("v2", 64), ("v2", 512)]
HADAMARD_WIDTHS += [] if SIMULATOR else [("v1", 8192), ("v2", 1024), ("v2", 2048), ("v2", 4096), ("v2", 8192)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("version", "width"), HADAMARD_WIDTHS)
def test_every_version_of_the_hadamard_transform_gives_the_bits_of_whole_stages_in_torch(version, width, dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 2 * width, generator=generator).to(dtype)  # two pieces a row, each with its own signs
    signs = torch.randint(2, (2 * width,), generator=generator).float() * 2 - 1
    for factor, signed, after in ((1.0, False, False), (width**-0.5, True, False), (0.75, True, True)):
        rows = (x.float() * signs if signed and not after else x.float().clone()).view(-1, width)
        by_halves(rows)
        expected = (rows.view(x.shape) * factor).to(dtype)
        expected = expected * signs.to(dtype) if signed and after else expected
        out, there = torch.empty_like(x, device=DEVICE), signs.to(DEVICE) if signed else None
        how = {"signs": there, "after": after, "factor": factor, "version": version}
        hadamard_kernels.transform(x.to(DEVICE), out, width, **how)
        assert torch.equal(out.cpu(), expected)


def test_a_hadamard_transform_in_place_and_one_of_rows_that_lie_anywhere():
    x = torch.randn(3 * 64 + 1, generator=torch.Generator().manual_seed(0)).to(DEVICE)[1:].view(3, 64)
    expected = x.clone()
    by_halves(expected)
    hadamard_kernels.transform(x, x, 64)
    assert torch.equal(x, expected)
    hadamard_kernels.transform(x[:0], x[:0], 64)  # nothing to launch


def test_shared_memory_of_the_hadamard_transform_is_a_permutation_without_conflicts_of_banks():
    bank_free = hadamard_kernels.bank_free if SIMULATOR else hadamard_kernels.bank_free.py_func
    places = [int(bank_free(i)) for i in range(1024)]
    assert sorted(places) == list(range(1024))
    for apart in (1, 8, 64):  # what the 32 threads of a warp ask for at once: value k of the eight that each holds
        for k in range(8):
            asked = [((t & ~(apart - 1)) << 3) + (t & (apart - 1)) + k * apart for t in range(32)]
            assert len({places[i] % 32 for i in asked}) == 32


FEEDBACK_FORMATS = ["nf4", "fp4", "int4", "uniform", "bof4-s", "mxfp4", "nvfp4", "q4_0", "iq4_nl"]


@pytest.mark.parametrize("width", [16, 32, 64])
@pytest.mark.parametrize("name", FEEDBACK_FORMATS)
def test_error_feedback_gives_the_references_bits(name, width):
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(7, width, generator=generator)
    block[3], block[5] = 0, block[5] * 1e-42  # a row of zeros, and one whose scale has no reciprocal
    block[6, ::3] = -0.0
    x = torch.randn(1000, width, generator=generator) @ torch.randn(width, width, generator=generator)
    factor, format = feedback.feedback_factor(x.T @ x), nf4lab.FORMATS[name]
    block, factor = block.to(DEVICE), factor.to(DEVICE).contiguous()
    constants = feedback.Constants.of(block, format, format.scale_of_tensor(block))
    ours, theirs = (
        encode(block, factor, format, constants) for encode in (feedback._encode_on_a_gpu, feedback._encode)
    )
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1].view(torch.int32), theirs[1].view(torch.int32))


@on_gpu
@pytest.mark.parametrize("name", FEEDBACK_FORMATS)
def test_the_public_face_takes_the_feedback_kernel_where_the_reference_gives_the_same_bits(name):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1000, 256, generator=generator) @ torch.randn(256, 256, generator=generator)
    w, hessian = torch.randn(41, 256, generator=generator).cuda(), (x.T @ x).cuda()
    by_kernel = nf4lab.quantize(w, name, 64, hessian=hessian)
    in_torch = nf4lab.quantize(w, name, 64, hessian=hessian, backend="torch")
    assert torch.equal(by_kernel.packed, in_torch.packed) and torch.equal(by_kernel.scale, in_torch.scale)


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [2, 64, 1536, 4096, 16384])
def test_rotations_on_a_gpu_are_those_of_the_cpu(n, dtype):
    x, signs = torch.randn(3, n, generator=torch.Generator().manual_seed(0)).to(dtype), random_signs(n)
    for turn in (rotate, unrotate):
        here, there = turn(x, signs), turn(x.cuda(), signs.cuda()).cpu()
        if n == 1536:  # the twelve pieces are multiplied by a matrix, whose sums each device orders in its own way
            # half a step of the dtype each way, and float32's roundings of sums of 12
            assert torch.allclose(here.float(), there.float(), rtol=2 * torch.finfo(dtype).eps, atol=2e-6)
        else:
            assert torch.equal(here, there)
