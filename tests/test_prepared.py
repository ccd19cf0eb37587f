"""Calls made ready: the same launches as the checked ones, with the same addresses and numbers, and the same bits."""

import threading

import pytest
import torch

from nf4lab.kernels import cuda
from nf4lab.kernels.cuda import crossover, fused, launch, ops, prepared

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA GPU")
not_simulated = pytest.mark.skipif(launch.SIMULATOR, reason="the simulator launches in its own way")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(48, 512), (16, 1024), (37, 100), (5, 7), (8, 12288)]  # the last: 16 rows of x are more than one launch takes

CODES, BIAS = 3, 8  # arguments of the gemv kernels that may be any address where there are none


def weight(n, k, nested, device, seed=0):
    """(packed, absmax plain or nested, levels) of a random weight in blocks of 64."""
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randint(0, 256, ((n * k + 1) // 2,), generator=generator, dtype=torch.uint8).to(device)
    levels = torch.linspace(-1, 1, 16, device=device)
    blocks = -(-n * k // 64)
    if not nested:
        return packed, torch.rand(blocks, generator=generator).to(device), levels
    codes = torch.randint(0, 256, (blocks,), generator=generator, dtype=torch.uint8).to(device)
    group_absmax = torch.rand(-(-blocks // 256), generator=generator).to(device)
    return packed, (codes, group_absmax, torch.ones(1, device=device), torch.rand(256).to(device), 256), levels


def activations(rows, k, dtype, device, seed=1):
    return torch.randn(rows, k, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


class Recorder:
    """Stands in for a loaded kernel; notes what it is launched with."""

    def __init__(self, kernel, args, seen):
        self.kernel, self.types, self.seen = kernel, launch.signature(args), seen

    def start(self, grid, threads, shared_bytes, numbers):
        self.seen.append((self.kernel, self.types, grid, threads, shared_bytes, [int(number) for number in numbers]))


@pytest.fixture
def launches(monkeypatch):
    """A list of what would be launched on a GPU of 132 processors, by either way; tensors stay on the CPU."""
    seen = []

    def load(kernel, args, device, key, shared_bytes, max_registers):
        prepared.loaded_kernels[key] = Recorder(kernel, args, seen)

    def as_checked(kernel, grid, threads, args, *, dtype, shared_bytes=0, max_registers=None):
        numbers = [int(a) if isinstance(a, int) else a.data_ptr() for a in args]
        seen.append((kernel, launch.signature(args), grid, threads, shared_bytes, numbers))

    monkeypatch.setattr(fused, "processors", lambda device: 132)
    monkeypatch.setattr(fused, "shared_limit", lambda device: 232448)
    monkeypatch.setattr(fused, "capability", lambda device: (9, 0))
    monkeypatch.setattr(crossover, "table_for", lambda device: crossover.H200)
    monkeypatch.setattr(ops, "launch", as_checked)
    monkeypatch.setattr(ops, "_gemv_op", ops._run_gemv)
    monkeypatch.setattr(ops, "_dequantize_op", ops._run_dequantize)
    monkeypatch.setattr(ops, "_nested_op", ops._run_nested)
    monkeypatch.setattr(prepared, "load", load)
    monkeypatch.setattr(prepared, "loaded_kernels", {})
    return seen


@not_simulated
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_prepared_gemv_launches_what_the_checked_one_launches(shape, dtype, nested, bias, launches):
    n, k = shape
    parts = weight(n, k, nested, "cpu")
    call = cuda.prepare_gemv(*parts, shape=shape, block_size=64, dtype=dtype)
    bias = torch.randn(n).to(dtype) if bias else None
    for rows in (1, 4, 5, 8, 9, 16, 17, 33, call.rows):
        x, out = activations(rows, k, dtype, "cpu"), torch.empty(rows, n, dtype=dtype)
        cuda.gemv(x, *parts, shape=shape, block_size=64, bias=bias, out=out)
        expected = launches.copy()
        launches.clear()
        call(x, bias, out, rows)
        for mine, theirs in zip(launches, expected, strict=True):
            assert mine[:5] == theirs[:5]
            differ = {i for i, pair in enumerate(zip(mine[5], theirs[5], strict=True)) if pair[0] != pair[1]}
            assert differ <= (set() if nested else {CODES}) | ({BIAS} if bias is None else set())
        launches.clear()


@not_simulated
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 100, 4096 * 3 + 1])
def test_a_prepared_dequantize_launches_what_the_checked_one_launches(n, dtype, nested, launches):
    parts = weight(n, 1, nested, "cpu")
    call = cuda.prepare_dequantize(*parts, n=n, block_size=64, dtype=dtype)
    for out in (torch.empty(n, dtype=dtype), torch.empty(n + 1, dtype=dtype)[1:]):  # aligned and not
        cuda.dequantize(*parts, n=n, block_size=64, out=out)
        call(out)
        expected, mine = launches
        assert mine == expected
        launches.clear()


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (dict(dtype=torch.float64), TypeError, "dtype must be torch.float32 or .* got torch.float64"),
        (dict(block_size=48), ValueError, "block_size must be one of .* got 48"),
        (dict(shape=(16, 1000)), ValueError, "packed must have 8000 elements; got 8192"),
    ],
)
def test_a_weight_that_does_not_fit_is_refused_when_it_is_prepared(change, error, match):
    arguments = dict(shape=(16, 1024), block_size=64, dtype=torch.bfloat16) | change
    with pytest.raises(error, match=match):
        cuda.prepare_gemv(*weight(16, 1024, True, "cpu"), **arguments)


# --- on a GPU


@needs_cuda
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_prepared_calls_give_the_bits_of_the_checked_ones(shape, dtype, nested):
    n, k = shape
    parts = weight(n, k, nested, "cuda")
    call = cuda.prepare_gemv(*parts, shape=shape, block_size=64, dtype=dtype)
    for rows in range(1, call.rows + 1):
        x, bias = activations(rows, k, dtype, "cuda"), activations(1, n, dtype, "cuda")[0]
        for b in (None, bias):
            out = torch.full((rows, n), torch.nan, dtype=dtype, device="cuda")
            call(x, b, out, rows)
            assert torch.equal(out, cuda.gemv(x, *parts, shape=shape, block_size=64, bias=b))
    decode = cuda.prepare_dequantize(*parts, n=n * k, block_size=64, dtype=dtype)
    out = torch.full((n * k,), torch.nan, dtype=dtype, device="cuda")
    decode(out)
    assert torch.equal(out, cuda.dequantize(*parts, n=n * k, block_size=64, out=torch.empty_like(out)))


@needs_cuda
def test_prepared_calls_may_be_made_from_several_threads_each_on_a_stream_of_its_own():
    n, k = 48, 4096
    kept = [weight(n, k, True, "cuda", seed) for seed in range(4)]
    calls = [cuda.prepare_gemv(*parts, shape=(n, k), block_size=64, dtype=torch.bfloat16) for parts in kept]
    x = activations(3, k, torch.bfloat16, "cuda")
    expected = [cuda.gemv(x, *parts, shape=(n, k), block_size=64) for parts in kept]
    torch.cuda.synchronize()
    wrong = []

    def work(which):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for turn in range(200):
                number = (which + turn) % 4
                out = torch.empty_like(expected[number])
                calls[number](x, None, out, 3)
                stream.synchronize()
                if not torch.equal(out, expected[number]):
                    wrong.append((which, turn))

    threads = [threading.Thread(target=work, args=(which,)) for which in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@needs_cuda
def test_a_prepared_call_is_captured_in_a_graph():
    parts = weight(48, 512, True, "cuda")
    call = cuda.prepare_gemv(*parts, shape=(48, 512), block_size=64, dtype=torch.bfloat16)
    x, out = activations(2, 512, torch.bfloat16, "cuda"), torch.empty(2, 48, dtype=torch.bfloat16, device="cuda")
    call(x, None, out, 2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(x, None, out, 2)
    x.copy_(activations(2, 512, torch.bfloat16, "cuda", seed=5))
    graph.replay()
    assert torch.equal(out, cuda.gemv(x, *parts, shape=(48, 512), block_size=64))
