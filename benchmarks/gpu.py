"""Measure the CUDA kernels beside bitsandbytes and torch, and write results/<device>.json with every sample.

    python benchmarks/gpu.py                   all of it, about two minutes on an H100
    python benchmarks/gpu.py --log2-weights 24 --samples 5 --only gemv

Times are the GPU's, by CUDA events. "queued": the call waits behind a spinning kernel, so that what the host needs to
launch it is hidden; "alone": the GPU is idle when the call is made, as bitsandbytes is usually timed. Bytes are counted
from the shapes: each input read once, each output written once. Fractions are of a device-to-device copy in this run.
"""

import argparse
import json
import pathlib
import statistics
import sys
import time

import numpy as np

if not hasattr(np, "row_stack"):
    np.row_stack = np.vstack  # noqa: NPY201 - numba-cuda 0.30 asks for it, NumPy 2.5 has it no more

import bitsandbytes
import bitsandbytes.functional as bnb
import torch
from provenance import provenance

try:
    from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4
except ImportError:  # measured where it is installed
    to_nf4 = None

from nf4lab.kernels import cuda
from nf4lab.kernels.cuda import dequantize_kernels, quantize_kernels

PACKAGES = ["torch", "numpy", "numba", "numba-cuda", "bitsandbytes", "cuda-bindings"] + ["torchao"] * bool(to_nf4)
BLOCK = 64
COLD_BYTES = 300_000_000  # gemv reads another copy of the weight each time until this much has gone by: six L2 caches
SHAPES = [(28672, 8192), (8192, 28672), (14336, 4096), (4096, 4096)]
HALVES = [torch.float16, torch.bfloat16]
records = []
copy_tbps = None


def event_times_us(call, samples, *, queued=True, warmup=3):
    """GPU microseconds of `samples` calls."""
    for _ in range(warmup):
        call()
    torch.cuda.synchronize()
    times = []
    for _ in range(samples):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if queued:
            torch.cuda._sleep(300_000)  # cycles: about 0.17 ms
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return times


def graph_times_us(calls, samples):
    """GPU microseconds a call, of a CUDA graph that makes each of `calls` in turn, at least 24 in all."""
    repeats = -(-24 // len(calls))
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls * repeats:
            call()
    return [t / (repeats * len(calls)) for t in event_times_us(graph.replay, samples, queued=False)]


def host_times_us(call, samples):
    """Host microseconds of a call, which returns before the GPU is done; means over 200 calls."""
    for _ in range(200):
        call()
    times = []
    for _ in range(samples):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(200):
            call()
        times.append((time.perf_counter() - start) / 200 * 1e6)
    return times


def record(operation, by, times, *, n_bytes=None, **details):
    """Append one measurement and print it."""
    median = statistics.median(times)
    low, *_, high = statistics.quantiles(times, n=20)
    entry = {"operation": operation, "by": by, **details, "median_us": median, "p5_us": low, "p95_us": high}
    text = f"{operation:22s} {by:12s} {' '.join(str(v) for v in details.values()):34s} {median:9.2f} us"
    if n_bytes:
        entry |= {"bytes": n_bytes, "tbps": n_bytes / median * 1e-6}
        entry |= {"of_copy": entry["tbps"] / copy_tbps} if copy_tbps else {}
        text += f" {entry['tbps']:6.3f} TB/s" + (f" {entry['of_copy']:6.1%} of copy" if copy_tbps else "")
    records.append(entry | {"samples_us": times})
    print(text, flush=True)
    return entry


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


def measure_copy(n, samples):
    source = torch.randn(n, device="cuda")
    target = torch.empty_like(source)
    return record("copy", "torch", event_times_us(lambda: target.copy_(source), samples), n_bytes=8 * n)["tbps"]


def torch_dequantize(packed, absmax, levels, out):
    codes = torch.stack((packed >> 4, packed & 15), -1).view(-1, BLOCK).int()
    return torch.mul(levels[codes], absmax[:, None]).to(out.dtype)


def measure_dequantize(n, samples, levels):
    x = torch.randn(n, device="cuda", dtype=torch.float16)
    packed, state = bnb.quantize_4bit(x, blocksize=BLOCK, quant_type="nf4")
    _, nested_state = bnb.quantize_4bit(x, blocksize=BLOCK, quant_type="nf4", compress_statistics=True)
    second = nested_state.state2
    parts = (nested_state.absmax, second.absmax, nested_state.offset.reshape(1), second.code.cuda().float())
    packed, nested = packed.reshape(-1), (*parts, 256)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        out = torch.empty(n, device="cuda", dtype=dtype)
        state.dtype = nested_state.dtype = dtype
        sizes = {
            "dequantize": n // 2 + n // BLOCK * 4 + out.nbytes,
            "dequantize nested": n // 2 + n // BLOCK + out.nbytes,
        }
        for operation, constants, theirs in (
            ("dequantize", state.absmax, state),
            ("dequantize nested", nested, nested_state),
        ):
            for queued in (True, False):
                details = {"dtype": name_of(dtype), "timing": "queued" if queued else "alone"}
                calls = {
                    "bitsandbytes": lambda theirs=theirs: bnb.dequantize_4bit(packed, theirs, out=out),
                    "nf4lab": lambda constants=constants: cuda.dequantize(
                        packed, constants, levels, n=n, block_size=BLOCK, out=out
                    ),
                }
                for by, call in calls.items():
                    times = event_times_us(call, samples, queued=queued)
                    record(operation, by, times, n_bytes=sizes[operation], **details)
        times = event_times_us(lambda: torch_dequantize(packed, state.absmax, levels, out), 5)
        record("dequantize", "torch", times, n_bytes=sizes["dequantize"], dtype=name_of(dtype), timing="queued")
        for ladder in dequantize_kernels.VERSIONS:
            times = event_times_us(
                lambda ladder=ladder: cuda.dequantize(
                    packed, state.absmax, levels, n=n, block_size=BLOCK, out=out, version=ladder
                ),
                samples,
            )
            record("dequantize ladder", ladder, times, n_bytes=sizes["dequantize"], dtype=name_of(dtype))


def measure_torchao(n, samples):
    """torchao writes its NF4 in plain torch, always double-quantized, and leaves the rest to torch.compile."""
    if to_nf4 is None:
        print("torchao is not installed: not measured")
        return
    x = torch.randn(n, device="cuda", dtype=torch.bfloat16)
    weight = to_nf4(x, block_size=BLOCK)
    out = torch.empty_like(x)
    details = {"n_bytes": n // 2 + n // BLOCK + out.nbytes, "dtype": "bfloat16", "timing": "queued"}
    for by, call in (
        ("torchao", weight.get_original_weight),
        ("torchao compiled", torch.compile(weight.get_original_weight)),
    ):
        record("dequantize nested", by, event_times_us(call, 5), **details)
    times = event_times_us(lambda: to_nf4(x, block_size=BLOCK), 3)
    record("quantize nested", "torchao", times, n_bytes=n // 2 + n // BLOCK + x.nbytes, dtype="bfloat16")


def measure_quantize(n, samples, codebook):
    packed = torch.empty(n // 2, dtype=torch.uint8, device="cuda")
    absmax = torch.empty(n // BLOCK, device="cuda")
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        x = torch.randn(n, device="cuda").to(dtype)
        n_bytes = x.nbytes + packed.nbytes + absmax.nbytes
        theirs = packed.view(-1, 1)
        times = event_times_us(lambda: bnb.quantize_4bit(x, blocksize=BLOCK, quant_type="nf4", out=theirs), 5)
        record("quantize", "bitsandbytes", times, n_bytes=n_bytes, dtype=name_of(dtype), timing="queued")

        def call(version="v4", check_finite=False):
            args = {"block_size": BLOCK, "packed": packed, "absmax": absmax}
            cuda.quantize(x, codebook, **args, check_finite=check_finite, version=version)

        times = event_times_us(call, samples)
        record("quantize", "nf4lab", times, n_bytes=n_bytes, dtype=name_of(dtype), timing="queued")
        for ladder in quantize_kernels.VERSIONS:
            times = event_times_us(lambda ladder=ladder: call(ladder), 5 if ladder == "v1" else samples)
            record("quantize ladder", ladder, times, n_bytes=n_bytes, dtype=name_of(dtype))
        for check in (False, True):
            times = event_times_us(lambda check=check: call(check_finite=check), samples, queued=False)
            details = {"dtype": name_of(dtype), "timing": "alone", "check_finite": check}
            record("quantize", "nf4lab", times, n_bytes=n_bytes, **details)


def measure_gemv(samples, levels, codebook):
    for n, k in SHAPES:
        copies = max(2, -(-COLD_BYTES // (n * k // 2)))
        w = torch.randn(n * k, device="cuda", dtype=torch.bfloat16)
        packed, absmax = (
            torch.empty(n * k // 2, dtype=torch.uint8, device="cuda"),
            torch.empty(n * k // BLOCK, device="cuda"),
        )
        cuda.quantize(w, codebook, block_size=BLOCK, packed=packed, absmax=absmax)
        weights = [(packed.clone(), absmax.clone()) for _ in range(copies)]
        dense = [w.view(n, k).clone() for _ in range(max(2, -(-COLD_BYTES // (2 * n * k))))]
        for dtype in HALVES:
            for rows in (1, 2, 4, 8, 16) if (n, k) == (14336, 4096) else (1,):
                x, out = (
                    torch.randn(rows, k, device="cuda", dtype=dtype),
                    torch.empty(rows, n, device="cuda", dtype=dtype),
                )
                n_bytes = packed.nbytes + absmax.nbytes + x.nbytes + out.nbytes
                details = {"shape": f"{n}x{k}", "rows": rows, "dtype": name_of(dtype)}
                for by, calls in gemv_calls(x, out, weights, dense, levels, (n, k)).items():
                    record("gemv", by, graph_times_us(calls, samples), n_bytes=n_bytes, **details)


def gemv_calls(x, out, weights, dense, levels, shape):
    """{who: one call for each copy of the weight}; the dense product moves more bytes than are counted for it."""
    keys = {
        "shape": torch.Size(shape),
        "code": levels,
        "blocksize": BLOCK,
        "quant_type": "nf4",
        "dtype": x.dtype,
    }
    states = [bnb.QuantState(absmax=absmax, **keys) for _, absmax in weights]

    def ours(packed, absmax):
        cuda.gemv(x, packed, absmax, levels, shape=shape, block_size=BLOCK, out=out)

    def theirs(packed, state):
        transposed = packed.view(-1, 1).t()
        if len(x) == 1:
            return bnb.gemv_4bit(x.view(1, 1, -1), transposed, state=state)
        return bitsandbytes.matmul_4bit(x, transposed, quant_state=state)

    x_bfloat16 = x.bfloat16()
    return {
        "bitsandbytes": [lambda p=p, s=s: theirs(p, s) for (p, _), s in zip(weights, states, strict=True)],
        "nf4lab": [lambda p=p, a=a: ours(p, a) for p, a in weights],
        "torch bfloat16": [lambda w=w: torch.nn.functional.linear(x_bfloat16, w) for w in dense],
    }


def measure_host(samples, levels, codebook):
    n = 2**14
    x, out = (
        torch.randn(n, device="cuda", dtype=torch.float16),
        torch.empty(n, device="cuda", dtype=torch.float16),
    )
    packed, state = bnb.quantize_4bit(x, blocksize=BLOCK, quant_type="nf4")
    flat, absmax = packed.reshape(-1), state.absmax
    row = torch.randn(1, 256, device="cuda", dtype=torch.float16)
    y = torch.empty(1, 64, device="cuda", dtype=torch.float16)

    def quantize(check):
        cuda.quantize(x, codebook, block_size=BLOCK, packed=flat, absmax=absmax, check_finite=check)

    calls = {
        ("fill with zeros", "torch"): lambda: out.zero_(),
        ("dequantize", "bitsandbytes"): lambda: bnb.dequantize_4bit(packed, state, out=out),
        ("dequantize", "nf4lab"): lambda: cuda.dequantize(flat, absmax, levels, n=n, block_size=BLOCK, out=out),
        ("dequantize", "nf4lab op"): lambda: torch.ops.nf4lab.dequantize(flat, absmax, levels, n, BLOCK, out, "v4"),
        ("gemv", "nf4lab"): lambda: cuda.gemv(row, flat, absmax, levels, shape=(64, 256), block_size=BLOCK, out=y),
        ("quantize", "bitsandbytes"): lambda: bnb.quantize_4bit(x, blocksize=BLOCK, quant_type="nf4", out=packed),
        ("quantize", "nf4lab"): lambda: quantize(False),
        ("quantize and check", "nf4lab"): lambda: quantize(True),
    }
    for (operation, by), call in calls.items():
        record("host cost of a call", by, host_times_us(call, samples), call=operation)


def main():
    global copy_tbps
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--log2-weights", type=int, default=28)
    parser.add_argument("--samples", type=int, default=21)
    parser.add_argument("--results", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    parser.add_argument("--only", nargs="+", choices=["dequantize", "quantize", "torchao", "gemv", "host"])
    args = parser.parse_args()
    if reason := cuda.available():
        sys.exit(f"nothing measured: {reason}")
    n, samples = 2**args.log2_weights, args.samples
    _, state = bnb.quantize_4bit(torch.randn(4096, device="cuda"), blocksize=BLOCK, quant_type="nf4")
    levels = state.code.float().cuda()
    codebook = cuda.codebook((levels[1:] + levels[:-1]) / 2)
    copy_tbps = measure_copy(n, samples)
    parts = {
        "dequantize": lambda: measure_dequantize(n, samples, levels),
        "quantize": lambda: measure_quantize(n, samples, codebook),
        "torchao": lambda: measure_torchao(n, samples),
        "gemv": lambda: measure_gemv(samples, levels, codebook),
        "host": lambda: measure_host(samples, levels, codebook),
    }
    for part in args.only or parts:
        parts[part]()
        torch.cuda.empty_cache()
    result = provenance("benchmarks/gpu.py", PACKAGES) | {"block_size": BLOCK, "weights": n, "copy_tbps": copy_tbps}
    result["records"] = records
    path = args.results / f"{result['device'].replace(' ', '-').lower()}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
