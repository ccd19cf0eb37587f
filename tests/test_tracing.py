"""Tracing kernels: what it counts is what chapter 7 counts by hand, and each mistake is found in a single run."""

import threading

import numpy as np
import pytest
from numba import cuda, float32, int32

from nf4lab.kernels.tracing import KernelMistake, trace, trace_body


def floats(n):
    return np.zeros(n, np.float32)


@cuda.jit
def v1(packed, absmax, levels, out):
    i = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
    if i < packed.size:
        byte = packed[i]
        scale = absmax[2 * i // 64]
        out[2 * i] = levels[byte >> 4] * scale
        out[2 * i + 1] = levels[byte & 15] * scale


def test_bytes_requests_and_sectors_are_those_counted_by_hand():
    packed, absmax, levels, out = np.arange(64, dtype=np.uint8), floats(2), floats(16), np.zeros(128, np.float16)
    record = trace(v1, 2, 32, packed, absmax, levels, out)
    assert record.bytes("packed", "reads") == 64 and record.bytes("out", "writes") == 256
    assert len(record.requests("packed", "reads")) == 2 and record.sectors("packed", "reads") == 2
    assert record.share_used("packed", "reads") == 1.0
    # even and odd elements are stored by two requests, each of which touches four sectors and fills half of them
    assert len(record.requests("out", "writes")) == 4 and record.sectors("out", "writes") == 16
    assert record.share_used("out", "writes") == 0.5
    assert np.isnan(record.share_used("packed", "writes"))  # of nothing
    assert record.sectors("absmax", "reads") == 2 and record.bytes("absmax", "reads") == 256
    assert "writes out               256         4       16    50%" in str(record)


def test_each_turn_of_a_loop_is_a_request_of_its_own():
    @cuda.jit
    def strided(x, out):
        for i in range(cuda.grid(1), x.size, cuda.gridsize(1)):
            out[i] = x[i]

    record = trace(strided, 1, 32, floats(96), floats(96))
    assert [len(request) for request in record.requests("x", "reads")] == [32, 32, 32]
    assert (record.times("x", "reads") == 1).all() and (record.times("out", "writes") == 1).all()


def test_the_record_does_not_depend_on_how_warm_the_interpreter_is():
    records = [str(trace(v1, 4, 32, np.zeros(128, np.uint8), floats(4), floats(16), floats(256))) for _ in range(20)]
    assert len(set(records)) == 1


def reversal(barrier):
    if barrier:

        @cuda.jit
        def reverse(x, out):
            table = cuda.shared.array(32, float32)
            table[cuda.threadIdx.x] = x[cuda.threadIdx.x]
            cuda.syncthreads()
            out[cuda.threadIdx.x] = table[31 - cuda.threadIdx.x]
    else:

        @cuda.jit
        def reverse(x, out):
            table = cuda.shared.array(32, float32)
            table[cuda.threadIdx.x] = x[cuda.threadIdx.x]
            out[cuda.threadIdx.x] = table[31 - cuda.threadIdx.x]

    return reverse


def test_a_kernel_with_a_barrier_gives_what_it_should():
    x, out = np.arange(32, dtype=np.float32), floats(32)
    trace(reversal(barrier=True), 1, 32, x, out)
    assert np.array_equal(out, x[::-1])


def test_a_missing_barrier_is_a_race():
    with pytest.raises(KernelMistake, match=r"race.*thread \d+ writes table\[\d+\] and thread \d+ reads it") as found:
        trace(reversal(barrier=False), 1, 32, np.arange(32, dtype=np.float32), floats(32))
    assert (found.value.kind, found.value.array) == ("race", "table")


def test_a_race_is_found_where_every_number_is_right():
    @cuda.jit
    def downwards(x, out):
        table = cuda.shared.array(32, float32)
        table[cuda.threadIdx.x] = x[cuda.threadIdx.x]
        out[cuda.threadIdx.x] = table[cuda.threadIdx.x // 2]

    x, out = np.arange(32, dtype=np.float32), floats(32)
    with pytest.raises(KernelMistake, match="race"):
        trace(downwards, 1, 32, x, out)
    assert np.array_equal(out, x[np.arange(32) // 2])


def test_threads_of_two_blocks_race_in_global_memory_and_no_barrier_helps():
    @cuda.jit
    def all_into_one(out):
        out[cuda.threadIdx.x] = cuda.blockIdx.x

    with pytest.raises(
        KernelMistake, match=r"thread 0 of block 0 and thread 0 of block 1 both write out\[0\].*no barrier"
    ):
        trace(all_into_one, 2, 32, floats(32))


def test_a_nibble_each_is_a_race_for_the_byte():
    @cuda.jit
    def nibbles(codes, packed):
        i = cuda.threadIdx.x
        packed[i // 2] |= codes[i] << (4 if i % 2 == 0 else 0)

    with pytest.raises(KernelMistake, match=r"race.*packed\[0\]"):
        trace(nibbles, 1, 32, np.full(32, 5, np.uint8), np.zeros(16, np.uint8))


def test_writing_the_same_value_and_atomic_updates_are_no_race():
    @cuda.jit
    def largest(x, out):
        most = cuda.shared.array(1, float32)
        most[0] = 0
        cuda.syncthreads()
        cuda.atomic.max(most, 0, x[cuda.threadIdx.x])
        cuda.syncthreads()
        out[0] = most[0]

    x, out = np.random.default_rng(0).uniform(size=64).astype(np.float32), floats(1)
    trace(largest, 1, 64, x, out)
    assert out[0] == x.max()


def test_a_barrier_that_some_threads_miss_is_named_and_no_thread_is_left_behind():
    @cuda.jit
    def early(x, out):
        if cuda.threadIdx.x >= x.size:
            return
        cuda.syncthreads()
        out[cuda.threadIdx.x] = x[cuda.threadIdx.x]

    before = set(threading.enumerate())
    with pytest.raises(KernelMistake, match=r"thread 0 waits at .* thread 20 has ended without reaching it"):
        trace(early, 1, 32, floats(20), floats(20))
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=60)
        assert not thread.is_alive()


def test_a_launch_starts_as_many_threads_of_the_host_as_a_block_has(monkeypatch):
    @cuda.jit
    def mirrored(x, out):
        table = cuda.shared.array(32, float32)
        table[cuda.threadIdx.x] = x[cuda.grid(1)]
        cuda.syncthreads()
        out[cuda.grid(1)] = table[31 - cuda.threadIdx.x]

    started, start = [], threading.Thread.start
    monkeypatch.setattr(threading.Thread, "start", lambda self: (started.append(self), start(self)))
    x, out = np.arange(256, dtype=np.float32), floats(256)
    trace(mirrored, 8, 32, x, out)
    assert (out == x.reshape(8, 32)[:, ::-1].reshape(-1)).all()
    assert len(started) == 32
    for thread in started:
        thread.join(timeout=60)
        assert not thread.is_alive()


def test_a_barrier_inside_an_if_is_named_rather_than_the_race_behind_it():
    @cuda.jit
    def inside(x, out):
        table = cuda.shared.array(16, float32)
        if cuda.threadIdx.x < 16:
            table[cuda.threadIdx.x] = x[cuda.threadIdx.x]
            cuda.syncthreads()
        out[cuda.threadIdx.x] = table[cuda.threadIdx.x % 16]

    with pytest.raises(KernelMistake, match="every thread of the block"):
        trace(inside, 1, 32, floats(16), floats(32))


def test_out_of_bounds_is_refused_below_and_above():
    for offset, index in ((-1, -1), (2, 32)):

        def shifted(i, x, out, offset=offset):
            out[i] = x[i + offset]

        with pytest.raises(KernelMistake, match=rf"reads x\[{index}\], but x has 32 elements, 0 to 31"):
            trace_body(shifted, 32, floats(32), floats(32), offset)


def test_shared_memory_starts_as_noise():
    @cuda.jit
    def half_filled(out):
        table = cuda.shared.array(4, int32)
        if cuda.threadIdx.x < 2:
            table[cuda.threadIdx.x] = 1
        cuda.syncthreads()
        out[cuda.threadIdx.x] = table[cuda.threadIdx.x]

    with pytest.raises(KernelMistake, match=r"thread 2 reads table\[2\], which no thread has written"):
        trace(half_filled, 1, 4, np.zeros(4, np.int32))


def plain_helper(x):
    return x + 1


@cuda.jit(device=True)
def device_helper(x, i):
    return x[i] + cuda.threadIdx.x


def test_device_functions_are_traced_and_plain_ones_are_refused():
    @cuda.jit
    def good(x, out):
        out[cuda.threadIdx.x] = device_helper(x, cuda.threadIdx.x)

    @cuda.jit
    def bad(x, out):
        out[cuda.threadIdx.x] = plain_helper(x[cuda.threadIdx.x])

    out = floats(4)
    record = trace(good, 1, 4, floats(4), out)
    assert out.tolist() == [0, 1, 2, 3] and record.times("x", "reads").tolist() == [1, 1, 1, 1]
    with pytest.raises(KernelMistake, match="plain_helper is a plain Python function"):
        trace(bad, 1, 4, floats(4), floats(4))


def test_what_a_gpu_would_not_take_is_refused():
    def wide(i, out):
        out[i] = 300

    def fraction(i, out):
        out[i / 1] = 0

    def endless(i, out):
        while True:
            out[i] = 0

    @cuda.jit
    def shape(out):
        cuda.shared.array(cuda.blockDim.x, float32)

    @cuda.jit
    def shuffle(out):
        cuda.shfl_sync(0, 1, 2)

    byte = np.zeros(4, np.uint8)
    for body, message in (
        (wide, r"out\[0\] is uint8 and holds 0 to 255; it is given 300"),
        (fraction, r"one whole number; got 0\.0 \(float\)"),
        (endless, "does its loop ever end"),
    ):
        with pytest.raises(KernelMistake, match=message):
            trace_body(body, 4, byte)
    for kernel, message in ((shape, "constant that the compiler knows"), (shuffle, "cuda.shfl_sync is not among")):
        with pytest.raises(KernelMistake, match=message):
            trace(kernel, 1, 4, byte)


def test_a_launch_that_is_none_is_refused():
    with pytest.raises(TypeError, match=r"plain_helper is not a kernel: @cuda.jit must stand above it"):
        trace(plain_helper, 1, 4, floats(4))
    with pytest.raises(TypeError, match=r"whole number of blocks; got 1\.5 \(float\)"):
        trace(v1, 1.5, 4, floats(4))
    with pytest.raises(ValueError, match="at least 1 of threads; got 0"):
        trace(v1, 1, 0, floats(4))
    with pytest.raises(TypeError, match="must take 1 arguments; it has packed, absmax, levels, out"):
        trace(v1, 1, 4, floats(4))
    with pytest.raises(TypeError, match=r"packed must be 1-D; got shape \(2, 2\)"):
        trace(v1, 1, 4, np.zeros((2, 2), np.uint8), floats(1), floats(16), floats(4))
