"""The CPU kernels against the torch reference, bit for bit. NaN patterns aside, nothing here has a tolerance."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numba
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nf4lab
from nf4lab import backends
from nf4lab.kernels import cpu

ROOT = Path(nf4lab.__file__).parent.parent
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
SHUFFLED = torch.tensor([0.3, -1.0, 0.9, -0.2, 0.55, -0.6, 0.1])
FORMATS = (
    *nf4lab.FORMATS.values(),
    nf4lab.Format("two levels", [-1.0, 1.0]),
    nf4lab.Format("seven levels in no order", SHUFFLED),
    nf4lab.Format("equal levels", [0.5, 0.5, -0.5, -0.5, 0.0]),
    nf4lab.Format("float16 constants", nf4lab.FORMATS["nf4"].levels, constants_dtype=torch.float16),
    *(nf4lab.FORMATS[name].searched() for name in ("nf4", "uniform", "mxfp4", "nvfp4", "iq4_nl")),
)
LENGTHS = (1, 2, 15, 63, 65, 4095, 4097, 3 * 4096 + 77)


def same_bytes(a, b):
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.view(BITS[a.dtype]), b.view(BITS[b.dtype]))


def assert_backends_agree(x, format="nf4", block_size=64, double_quant=False):
    """Quantize x and decode it to each dtype by the reference and by the kernels: the same bytes throughout."""
    expected = nf4lab.quantize(x, format, block_size, double_quant, backend="torch")
    got = nf4lab.quantize(x, format, block_size, double_quant, backend="cpu")
    assert torch.equal(got.packed, expected.packed)
    assert same_bytes(got.scale, expected.scale)
    assert (got.location is None) == (expected.location is None)
    assert got.location is None or same_bytes(got.location, expected.location)
    for dtype in DTYPES:
        assert same_bytes(got.dequantize(dtype, backend="cpu"), expected.dequantize(dtype, backend="torch"))


def gaussian(n, dtype=torch.float32, seed=0):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)).to(dtype)


# ---- backend "cpu" = backend "torch"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
def test_every_format_and_dtype_gives_the_bytes_of_the_reference(format, dtype):
    for n in LENGTHS:
        assert_backends_agree(gaussian(n, dtype, seed=n), format)


SIZED = [nf4lab.FORMATS[name] for name in ("nf4", "fp4", "uniform", "naive-quantile", "nvfp4", "q4_0")]


@pytest.mark.parametrize("format", [*SIZED, SIZED[0].searched(), SIZED[2].searched()], ids=lambda format: format.name)
@pytest.mark.parametrize("block_size", nf4lab.BLOCK_SIZES)
def test_every_block_size_gives_the_bytes_of_the_reference(block_size, format):
    assert_backends_agree(gaussian(2 * 4096 + 2 * block_size + 5), format, block_size)


@pytest.mark.parametrize("block_size", [16, 64, 512])
def test_a_search_among_trials_that_differ_by_roundings_gives_the_bytes_of_the_reference(block_size):
    factors = [1 + k * 2.0**-22 for k in range(12)]  # so close that the order of additions decides
    assert_backends_agree(gaussian(2**16), nf4lab.FORMATS["nf4"].searched(factors), block_size)


@pytest.mark.parametrize("double_quant", [True, "linear8", "linear4"])
def test_double_quantized_tensors_give_the_bytes_of_the_reference(double_quant):
    assert_backends_agree(gaussian(100_001), "nf4", 64, double_quant)
    assert_backends_agree(gaussian(100_001), "uniform", 64, double_quant)


@pytest.mark.parametrize("format", ["nf4", "fp4", "uniform", "e2m1", "mxfp4", "nvfp4", "q4_0", "iq4_nl"])
def test_zero_blocks_and_signed_zeros_give_the_bytes_of_the_reference(format):
    x = gaussian(8 * 64)
    x[64:128], x[128:192] = 0.0, -0.0
    x[192:256] = torch.tensor([0.0, -0.0]).repeat(32)
    x[256:320] = torch.tensor([-0.0, 0.0]).repeat(32)
    x[320:384] = x[320:384].abs()
    x[320] = -0.0
    for signed in (x, -x):
        assert_backends_agree(signed, format)
        assert_backends_agree(signed, nf4lab.FORMATS[format].searched())


@pytest.mark.parametrize("format", ["nf4", "fp4", "int4", "uniform"])
@pytest.mark.parametrize("exponent", [-149, -140, -130, -128, -127, -126, -100, -24, -15, 15, 100, 125])
def test_subnormals_and_extremes_give_the_bytes_of_the_reference(exponent, format):
    x = gaussian(1000).clamp(-1.9, 1.9).double() * 2.0**exponent
    assert_backends_agree(x.float(), format)
    assert_backends_agree(x.bfloat16(), format)
    if -26 < exponent < 15:
        assert_backends_agree(x.half(), format)


def test_values_on_the_boundaries_and_beside_them_give_the_bytes_of_the_reference():
    for format in FORMATS:
        on = format.boundaries.clamp(-abs(format.extreme), abs(format.extreme))
        beside = [torch.nextafter(on, torch.full_like(on, side)) for side in (-torch.inf, torch.inf)]
        x = torch.cat([torch.tensor([format.extreme]), on, *beside]).clamp(-abs(format.extreme), abs(format.extreme))
        assert_backends_agree(x, format, 4096)


@settings(max_examples=60, deadline=None)
@given(
    bits=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=200),
    format=st.sampled_from(["nf4", "fp4", "int4", "uniform", "e2m1", "mxfp4"]),
    searched=st.booleans(),
    block_size=st.sampled_from([16, 32, 64]),
)
def test_any_finite_bit_patterns_give_the_bytes_of_the_reference(bits, format, searched, block_size):
    format = nf4lab.FORMATS[format].searched() if searched else format
    x = torch.from_numpy(np.array(bits, np.uint32).view(np.float32)).nan_to_num(nan=1.0, posinf=2.0, neginf=-3.0)
    assert_backends_agree(x.clamp(-1e38, 1e38), format, block_size)  # a range above float32's is refused


@pytest.mark.parametrize(
    "view", ["x.T", "x[:, ::2]", "x[3:, 5:]", "x.expand(2, 200, 300)", "x.flip(0)", "x.view(-1)[::3]"]
)
def test_views_that_are_not_contiguous_give_the_bytes_of_the_reference(view):
    x = gaussian(200 * 300).reshape(200, 300)
    assert_backends_agree(eval(view, {"x": x}))
    assert_backends_agree(eval(view, {"x": x.half()}))


def test_a_lazily_negated_tensor_is_read_with_its_sign():
    x = torch._neg_view(gaussian(1000))  # what .conj().imag gives for a complex tensor
    assert x.is_neg()
    assert_backends_agree(x)


def test_no_elements_work_on_both_backends():
    for format in nf4lab.FORMATS:
        assert_backends_agree(torch.empty(0, 5), format)


def test_a_parameter_that_needs_a_gradient_is_taken():
    assert_backends_agree(torch.nn.Parameter(gaussian(1000)))


# ---- every version of the ladder


def run_quantize(kernel, x, format, block_size, normalization, *more):
    """What a version of the kernel makes of float32 x: packed, scale and location, as arrays."""
    n, n_blocks = x.size, -(-x.size // block_size)
    packed, scale = np.empty((n + 1) // 2, np.uint8), np.empty(n_blocks, np.float32)
    location = np.empty(n_blocks if normalization == cpu.MIN_MAX else 0, np.float32)
    table = cpu.codebook_table(format.boundaries.numpy(), format.ascending.numpy())
    assert kernel(x, cpu.FLOAT32, table, normalization, block_size, scale, location, packed, *more)
    return packed, scale, location


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("name", ["nf4", "fp4", "uniform"])
@pytest.mark.parametrize("kernel", [cpu.quantize_v2, cpu.quantize_v3, cpu.quantize], ids=lambda k: k.__name__)
def test_every_version_of_quantize_equals_the_reference(kernel, name, n):
    x, format = gaussian(n, seed=n), nf4lab.FORMATS[name]
    expected = nf4lab.quantize(x, format, 64, backend="torch")
    normalization = cpu.MIN_MAX if name == "uniform" else cpu.ABSMAX
    packed, scale, location = run_quantize(kernel, x.numpy(), format, 64, normalization)
    assert np.array_equal(packed, expected.packed.numpy())
    assert np.array_equal(scale, expected.scale.numpy())
    assert name != "uniform" or np.array_equal(location, expected.location.numpy())


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("name", ["nf4", "fp4", "int4"])
def test_the_first_version_of_quantize_equals_the_reference(name, n):
    x, format = gaussian(n, seed=n), nf4lab.FORMATS[name]
    x[: n // 3] = 0
    expected = nf4lab.quantize(x, format, 32, backend="torch")
    packed, scale = torch.empty_like(expected.packed), torch.empty_like(expected.scale)
    ascending = format.ascending.to(torch.uint8).numpy()
    assert cpu.quantize_v1(x.numpy(), format.boundaries.numpy(), ascending, 32, scale.numpy(), packed.numpy())
    assert torch.equal(packed, expected.packed)
    assert torch.equal(scale, expected.scale)


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_every_version_of_dequantize_equals_the_reference(name, n):
    q = nf4lab.quantize(gaussian(n, seed=n), name, 32, backend="torch")
    levels, packed, scale = q.format.levels.numpy(), q.packed.numpy(), q.scale.numpy()
    first = torch.full((n,), torch.nan)
    cpu.dequantize_v1(packed, levels, scale, 32, first.numpy())
    results = [first]
    for kernel in (cpu.dequantize_v2, cpu.dequantize):
        results.append(torch.full((n,), torch.nan))
        kernel(packed, cpu.level_pairs(levels), scale, scale[:0], 32, cpu.FLOAT32, results[-1].numpy())
    assert all(same_bytes(out, q.dequantize(backend="torch")) for out in results)


@pytest.mark.parametrize("kernel", [cpu.quantize_v1, cpu.quantize_v2, cpu.quantize_v3, cpu.quantize])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_every_version_notices_what_is_not_finite(kernel, value):
    format = nf4lab.FORMATS["nf4"]
    table = cpu.codebook_table(format.boundaries.numpy(), format.ascending.numpy())
    for position in (0, 63, 4096, 9999):
        x = gaussian(10_000).numpy().copy()
        x[position] = value
        packed, scale = np.empty(5000, np.uint8), np.empty(157, np.float32)
        if kernel is cpu.quantize_v1:
            finite = kernel(x, table[0], np.arange(16, dtype=np.uint8), 64, scale, packed)
        else:
            finite = kernel(x, cpu.FLOAT32, table, cpu.ABSMAX, 64, scale, scale[:0], packed)
        assert not finite


# ---- 16-bit floats


@pytest.mark.parametrize(("widen", "dtype"), [(cpu.widen_float16, torch.float16), (cpu.widen_bfloat16, torch.bfloat16)])
def test_all_65536_patterns_of_16_bits_widen_as_in_torch(widen, dtype):
    patterns = np.arange(2**16).astype(np.uint16)
    expected = torch.from_numpy(patterns.view(np.int16)).view(dtype).float()
    got = torch.empty(2**16)
    widen(patterns, got.numpy())
    assert torch.equal(got.isnan(), expected.isnan())
    assert same_bytes(got.nan_to_num(), expected.nan_to_num())


def float32_sweep(dtype):
    """Every 16-bit value, every midpoint of neighbours (the ties), their float32 neighbours, and random patterns."""
    patterns = torch.arange(2**15, dtype=torch.int16)
    values = patterns.view(dtype).float()
    values = values[values.isfinite()]
    ties = ((values[:-1].double() + values[1:].double()) / 2).float()
    past_the_last = values[-1:] + (values[-1:] - values[-2:-1]) / 2  # the tie with what overflows
    exact = torch.cat([values, ties, past_the_last])
    beside = [torch.nextafter(exact, torch.full_like(exact, side)) for side in (-torch.inf, torch.inf)]
    random = np.random.default_rng(0).integers(0, 2**32, 2**21, dtype=np.uint32)
    positive = torch.cat(
        [exact, *beside, torch.tensor([torch.inf, torch.nan]), torch.from_numpy(random.view(np.float32))]
    )
    return torch.cat([positive, -positive])


@pytest.mark.parametrize(
    ("narrow", "dtype"), [(cpu.narrow_float16, torch.float16), (cpu.narrow_bfloat16, torch.bfloat16)]
)
def test_float32_narrows_to_16_bits_as_in_torch(narrow, dtype):
    values = float32_sweep(dtype)
    got = np.empty(values.numel(), np.uint16)
    narrow(values.numpy(), got)
    got, expected = torch.from_numpy(got.view(np.int16)).view(dtype), values.to(dtype)
    assert torch.equal(got.isnan(), expected.isnan())
    assert same_bytes(got.nan_to_num(), expected.nan_to_num())


def test_the_sweep_holds_ties_subnormals_and_overflow():
    sweep = float32_sweep(torch.float16)
    for value in (2.0**-25, 1.5 * 2.0**-24, 1 + 2.0**-11, 65520.0, np.nextafter(np.float32(65520), np.float32(0))):
        assert (sweep == float(value)).any()


def test_no_multiplication_is_fused_with_an_addition():
    signature = "(f4[::1], f4[::1], f4[::1], i8, f4[::1])"
    compiled = numba.njit(signature, error_model="numpy")(cpu.denormalize.py_func)  # inspection needs it uncached
    assembly = compiled.inspect_asm(compiled.signatures[0])
    assert "mul" in assembly
    assert not any(name in assembly for name in ("fmadd", "fmsub", "fmla", "fnmadd"))


# ---- refusals


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", ["nf4", "uniform", "naive-quantile"])
def test_what_is_not_finite_is_refused_with_the_message_of_the_reference(format, dtype):
    x = gaussian(70_000, dtype).reshape(100, 700)
    x[3, 5], x[50, 1], x[99, 699] = torch.inf, torch.nan, -torch.inf
    messages = []
    for backend in ("torch", "cpu"):
        with pytest.raises(
            ValueError, match=r"1 NaN and 2 infinite values, the first is inf at index \(3, 5\)"
        ) as error:
            nf4lab.quantize(x, format, backend=backend)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_a_range_above_float32_is_refused_by_both_backends():
    x = torch.tensor([3e38, -3e38])
    for backend in ("torch", "cpu"):
        with pytest.raises(ValueError, match="scale exceeds"):
            nf4lab.quantize(x, "uniform", backend=backend)


def test_a_backend_that_cannot_serve_says_why():
    x, q = gaussian(64), nf4lab.quantize(gaussian(64))
    with pytest.raises(ValueError, match="backend must be None, 'torch', 'cpu' or 'cuda'; got 'gpu'"):
        nf4lab.quantize(x, backend="gpu")
    with pytest.raises(ValueError, match="backend 'cuda' takes tensors on cuda; got one on cpu"):
        nf4lab.quantize(x, backend="cuda")
    with pytest.raises(ValueError, match="backend 'cpu' takes tensors on cpu; got one on meta"):
        backends.choose("cpu", torch.device("meta"), x.dtype, 64, nf4lab.FORMATS["nf4"])
    with pytest.raises(ValueError, match=r"takes float32, float16 and bfloat16; got torch\.float64"):
        nf4lab.quantize(x.double(), backend="cpu")
    with pytest.raises(ValueError, match=r"takes float32, float16 and bfloat16; got torch\.float64"):
        q.dequantize(torch.float64, backend="cpu")


@pytest.mark.parametrize(("bytes_", "scales", "locations"), [(49, 2, 0), (50, 3, 0), (50, 2, 1)])
def test_arrays_that_do_not_fit_are_refused(bytes_, scales, locations):
    packed, out = np.zeros(bytes_, np.uint8), np.zeros(100, np.float32)
    scale, location = np.zeros(scales, np.float32), np.zeros(locations, np.float32)
    got = f"take 50 bytes and 2 constants; got {bytes_}, {scales} of scale, {locations} of location"
    with pytest.raises(ValueError, match=got):
        cpu.dequantize(packed, cpu.level_pairs([0.0, 1.0]), scale, location, 64, cpu.FLOAT32, out)


def test_a_block_size_that_does_not_divide_a_chunk_is_refused():
    with pytest.raises(ValueError, match="block_size must divide 4096; got 48"):
        run_quantize(cpu.quantize, np.zeros(96, np.float32), nf4lab.FORMATS["nf4"], 48, cpu.ABSMAX)
    with pytest.raises(ValueError, match="block_size must divide 4096; got 0"):
        cpu.check_lengths(96, 0, np.zeros(2), np.zeros(0), np.zeros(48))


def test_min_max_without_room_for_its_locations_is_refused():
    table = cpu.codebook_table(np.zeros(1, np.float32), [0, 1])
    scale, location, packed = np.zeros(2, np.float32), np.zeros(0, np.float32), np.zeros(64, np.uint8)
    with pytest.raises(ValueError, match="a location for each of 2 blocks; there is room for 0"):
        cpu.quantize(np.ones(128, np.float32), cpu.FLOAT32, table, cpu.MIN_MAX, 64, scale, location, packed)


def test_arrays_may_be_read_only_where_they_are_only_read():
    format, x = nf4lab.FORMATS["nf4"], gaussian(1000).numpy()
    expected = run_quantize(cpu.quantize, x, format, 64, cpu.ABSMAX)
    x.flags.writeable = False
    packed, scale, _ = run_quantize(cpu.quantize, x, format, 64, cpu.ABSMAX)
    assert np.array_equal(packed, expected[0])
    out = np.zeros(1000, np.float32)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        cpu.dequantize(packed, cpu.level_pairs(format.levels.numpy()), scale, scale[:0], 64, cpu.FLOAT32, out)


# ---- which backend, and out=


@pytest.mark.parametrize(("n", "expected"), [(backends.CPU_FROM - 1, "torch"), (backends.CPU_FROM, "cpu")])
def test_the_kernels_take_over_at_the_size_that_backends_names(n, expected):
    for dtype in DTYPES:
        assert backends.choose(None, torch.device("cpu"), dtype, n, nf4lab.FORMATS["nf4"]) == expected
    assert backends.choose(None, torch.device("cpu"), torch.float64, n, nf4lab.FORMATS["nf4"]) == "torch"
    assert backends.choose(None, torch.device("meta"), torch.float32, n, nf4lab.FORMATS["nf4"]) == "torch"


def test_torch_compile_sees_the_reference():
    q = nf4lab.quantize(gaussian(backends.cpu.HUGE_PAGES_FROM // 4))
    compiled = torch.compile(lambda: q.dequantize(), backend="eager", fullgraph=True)
    assert same_bytes(compiled(), q.dequantize())


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_out_is_written_whole_and_returned(dtype, backend):
    q = nf4lab.quantize(gaussian(77 * 31).reshape(77, 31))
    guarded = torch.full((77 * 31 + 2,), 9.0, dtype=dtype)
    out = guarded[1:-1].view(77, 31)
    assert q.dequantize(out=out, backend=backend) is out
    assert same_bytes(out, q.dequantize(dtype, backend="torch"))
    assert guarded[0] == guarded[-1] == 9


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_autograd_notices_that_out_was_written(backend):
    q = nf4lab.quantize(gaussian(64))
    weight, x = torch.zeros(64), torch.ones(64, requires_grad=True)
    y = (x * weight).sum()
    q.dequantize(out=weight, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_out_may_be_a_tensor_of_inference_mode(backend):
    with torch.inference_mode():
        q, out = nf4lab.quantize(gaussian(64), backend="torch"), torch.empty(64)
        assert same_bytes(q.dequantize(out=out, backend=backend), q.dequantize(backend="torch"))


def test_an_out_that_does_not_fit_is_refused():
    q = nf4lab.quantize(gaussian(64).reshape(8, 8))
    refused = {
        r"shape \(8, 8\), torch.float32 on cpu; got shape \(64,\)": torch.empty(64),
        "torch.float32 on cpu; got .* torch.float16 on cpu": torch.empty(8, 8, dtype=torch.float16),
        "on cpu; got .* on meta": torch.empty(8, 8, device="meta"),
        r"contiguous; got strides \(1, 8\)": torch.empty(8, 8).T,
        "gradient": torch.empty(8, 8, requires_grad=True),
    }
    for message, out in refused.items():
        with pytest.raises(ValueError, match=message):
            q.dequantize(torch.float32, out=out)
    with pytest.raises(TypeError, match=r"out must be a torch.Tensor; got ndarray"):
        q.dequantize(out=np.empty((8, 8), np.float32))


def test_an_out_that_overlaps_the_input_is_refused():
    memory = torch.zeros(64 + 4, dtype=torch.float32)
    packed = memory.view(torch.uint8)[:32]
    q = nf4lab.QuantizedTensor(packed, torch.ones(1), None, nf4lab.FORMATS["nf4"], torch.Size([64]), torch.float32, 64)
    with pytest.raises(ValueError, match="share memory"):
        q.dequantize(out=memory[4:])
    beside = torch.zeros(64 + 8)
    q = nf4lab.QuantizedTensor(beside.view(torch.uint8)[:32], torch.ones(1), None, q.format, q.shape, torch.float32, 64)
    q.dequantize(out=beside[8:])


# ---- processes and threads


def run_python(script, **environment):
    """The output of a Python process of its own; an endless loop ends after ten minutes."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=600, check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    ).stdout.strip()  # fmt: skip


def test_any_number_of_threads_gives_the_same_bytes():
    x = gaussian(20 * cpu.CHUNK * cpu.CHUNKS_A_THREAD // 4 + 777)
    format = nf4lab.FORMATS["nf4"]
    one = run_quantize(cpu.quantize, x.numpy(), format, 64, cpu.ABSMAX, 1)
    pairs, outs = cpu.level_pairs(format.levels.numpy()), []
    for threads in (1, 2, 3, 7):
        several = run_quantize(cpu.quantize, x.numpy(), format, 64, cpu.ABSMAX, threads)
        assert all(np.array_equal(a, b) for a, b in zip(one, several, strict=True))
        outs.append(np.empty(x.numel(), np.float32))
        cpu.dequantize(*one[:1], pairs, *one[1:], 64, cpu.FLOAT32, outs[-1], threads)
    assert all(np.array_equal(outs[0], out) for out in outs)


def test_chunks_are_split_among_threads_without_gap_or_overlap():
    for chunks in (0, 1, 63, 64, 128, 129, 1000):
        for threads in (1, 2, 5):
            runs = cpu.in_threads(lambda first, last: (first, last), chunks, threads)
            assert [first for first, _ in runs] == [0, *(last for _, last in runs[:-1])]
            assert runs[-1][1] == chunks
            assert len(runs) == max(1, min(threads, chunks // 64))


HASH = """
    import hashlib, torch, nf4lab
    x = torch.randn(2**20 + 13, generator=torch.Generator().manual_seed(0))
    def work():
        q = nf4lab.quantize(x)
        digest = hashlib.sha256(q.packed.numpy().tobytes() + q.dequantize().numpy().tobytes())
        return digest.hexdigest()
"""


def test_one_numba_thread_gives_the_same_bytes():
    script = HASH + "    print(work(), nf4lab.backends.cpu._threads())"
    alone, threads = run_python(script, NUMBA_NUM_THREADS="1").split()
    assert threads == "1"
    assert alone == run_python(script).split()[0]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_child_forked_after_use_computes_the_same_bytes():
    script = """
    import os
    torch.set_num_threads(2)
    before = work()
    child = os.fork()
    if child == 0:
        os._exit(0 if work() == before else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert work() == before
    print("same")
    """
    assert run_python(HASH + script) == "same"


def test_several_python_threads_may_call_at_once():
    from concurrent.futures import ThreadPoolExecutor

    tensors = [gaussian(2**20, seed=seed) for seed in range(6)]
    expected = [nf4lab.quantize(x, backend="torch").packed for x in tensors]
    with ThreadPoolExecutor(4) as callers:
        results = list(callers.map(lambda x: nf4lab.quantize(x, backend="cpu").packed, tensors))
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_importing_and_small_tensors_load_no_numba():
    script = """
    import sys, torch, nf4lab
    nf4lab.quantize(torch.randn(1000)).dequantize()
    print("numba" in sys.modules)
    """
    assert run_python(script) == "False"


def test_where_no_cache_can_be_written_the_kernels_compile_without_one():
    script = """
    import numpy as np
    from nf4lab.kernels import cpu
    values = np.empty(1, np.float32)
    cpu.widen_bfloat16(np.array([0x3F80], np.uint16), values)
    print(values[0], type(cpu.widen_bfloat16._cache).__name__)
    """
    # Of numba's places for a cache only NUMBA_CACHE_DIR is left, and that is not set.
    environment = {"NUMBA_CACHE_LOCATOR_CLASSES": "UserProvidedCacheLocator", "NUMBA_CACHE_DIR": ""}
    assert run_python(script, **environment) == "1.0 NullCache"


def test_where_the_disk_of_the_cache_is_full_a_kernel_works_all_the_same(monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("numba.core.caching.IndexDataCacheFile.save", full)
    assert cpu.jit(next_number)(1) == 2


def next_number(n):
    return n + 1
