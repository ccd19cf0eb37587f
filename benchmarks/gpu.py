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
from nf4lab.kernels.cuda import crossover, dequantize_kernels, fused, quantize_kernels

PACKAGES = ["torch", "numpy", "numba", "numba-cuda", "bitsandbytes", "cuda-bindings"] + ["torchao"] * bool(to_nf4)
BLOCK = 64
COLD_BYTES = 300_000_000  # gemv reads another copy of the weight each time until this much has gone by: five L2 caches
SHAPES = [(28672, 8192), (8192, 28672), (14336, 4096), (4096, 14336), (8192, 4096), (4096, 4096), (1024, 4096)]
ALL_ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 128, 512, 2048)
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

        def call(version="v5", check_finite=False):
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
    """Products of bfloat16 x as a layer makes them, and each version of the fused kernel; weights cold."""
    one = torch.zeros(1, device="cuda")
    record("least launch", "torch", graph_times_us([lambda: one.fill_(1)] * 24, samples), dtype="float32")
    for n, k in SHAPES:
        w = torch.randn(n * k, device="cuda", dtype=torch.bfloat16)
        packed, absmax = (
            torch.empty(n * k // 2, dtype=torch.uint8, device="cuda"),
            torch.empty(n * k // BLOCK, device="cuda"),
        )
        cuda.quantize(w, codebook, block_size=BLOCK, packed=packed, absmax=absmax)
        copies = max(2, -(-COLD_BYTES // packed.numel()))
        dense = [w.view(n, k).clone() for _ in range(max(2, -(-COLD_BYTES // (2 * n * k))))]
        for kind in ("plain", "nested"):
            weights = [(packed.clone(), constants(absmax, kind)) for _ in range(copies)]
            for rows in ALL_ROWS if (n, k) == (14336, 4096) else (1, 16, 64):
                x, out = torch.randn(rows, k, device="cuda").bfloat16(), torch.empty(rows, n, device="cuda").bfloat16()
                n_bytes = packed.numel() + n * k // BLOCK * (4 if kind == "plain" else 1) + x.nbytes + out.nbytes
                details = {"shape": f"{n}x{k}", "rows": rows, "dtype": "bfloat16", "absmax": kind}
                for by, calls in gemv_calls(x, out, weights, levels, (n, k), kind).items():
                    record("gemv", by, graph_times_us(calls, samples), n_bytes=n_bytes, **details)
                if kind == "plain":
                    calls = [lambda w=w, x=x: torch.nn.functional.linear(x, w) for w in dense]
                    details |= {"absmax": "none"}
                    n_bytes = 2 * n * k + x.nbytes + out.nbytes
                    record("gemv", "torch bfloat16", graph_times_us(calls, samples), n_bytes=n_bytes, **details)
                    if calls := int4_calls(x, dense[0], copies):
                        n_bytes = n * k // 2 + n * k // 128 * 4 + x.nbytes + out.nbytes
                        details |= {"absmax": "bfloat16 scale and zero a group of 128"}
                        record("gemv", "torch int4", graph_times_us(calls, samples), n_bytes=n_bytes, **details)
            if (n, k) == (14336, 4096):
                measure_ladder(weights, levels, (n, k), kind, samples, fused.VERSIONS, (1, 8, 16, 32, 64))
            elif kind == "nested":  # the rows at which one version hands over to another
                measure_ladder(weights, levels, (n, k), kind, samples, ("v5", "v6"), (1, 2, 4, 8))
                measure_ladder(weights, levels, (n, k), kind, samples, ("v4", "v6"), (16, 64))


def constants(absmax, kind):
    """An absmax as the kernels take it: itself, or codes, group absmax, offset, code map and group size."""
    if kind == "plain":
        return absmax.clone()
    second, state = bnb.quantize_blockwise(absmax - absmax.mean(), blocksize=256)
    return second.reshape(-1), state.absmax, absmax.mean().reshape(1), state.code.cuda().float(), 256


def measure_ladder(weights, levels, shape, kind, samples, versions, counts):
    for rows in counts:
        x = torch.randn(rows, shape[1], device="cuda").bfloat16()
        for name in versions:
            if rows > 16 and name == "v3":
                continue  # it takes 16 at most: v2 would run
            calls = [
                lambda p=p, a=a, v=name: cuda.gemv(x, p, a, levels, shape=shape, block_size=BLOCK, version=v)
                for p, a in weights
            ]
            details = {"shape": f"{shape[0]}x{shape[1]}", "rows": rows, "dtype": "bfloat16", "absmax": kind}
            few = samples if name > "v2" else 3
            record("gemv ladder", name, graph_times_us(calls, few), **details)


def gemv_calls(x, out, weights, levels, shape, kind):
    """{who: one call for each copy of the weight}, each as its layer makes it."""
    n, k = shape
    rows = len(x)
    written = torch.empty(n, k, device="cuda", dtype=x.dtype)

    def ours(packed, absmax):
        how = {"shape": shape, "block_size": BLOCK, "dtype": x.dtype}
        gemv = cuda.prepare_gemv(packed, absmax, levels, **how)
        fill = cuda.prepare_dequantize(packed, absmax, levels, n=n * k, block_size=BLOCK, dtype=x.dtype)

        def product():
            if rows <= gemv.rows:
                return gemv(x, None, out, rows)
            fill(written)
            return torch.nn.functional.linear(x, written)

        return product

    def theirs(packed, absmax):
        keys = {"shape": torch.Size(shape), "code": levels, "blocksize": BLOCK, "quant_type": "nf4", "dtype": x.dtype}
        if kind == "nested":
            codes, group_absmax, offset, code_map, _ = absmax
            inner = bnb.QuantState(absmax=group_absmax, code=code_map, blocksize=256, dtype=torch.float32)
            keys |= {"absmax": codes, "offset": offset[0], "state2": inner}
        else:
            keys |= {"absmax": absmax}
        state, transposed = bnb.QuantState(**keys), packed.view(-1, 1).t()
        return lambda: bitsandbytes.matmul_4bit(x, transposed, quant_state=state)

    found = {"nf4lab": [ours(*weight) for weight in weights], "bitsandbytes": [theirs(*weight) for weight in weights]}
    mine = found["nf4lab"][0]()  # None where it wrote into out
    wide = (out if mine is None else mine).double()
    other = found["bitsandbytes"][0]().double()
    assert (wide - other).norm() < 0.01 * other.norm(), "the two products differ"
    return found


def int4_calls(x, dense, copies):
    """torch's own 4-bit product (tinygemm, even levels, groups of 128), for comparison; None where it is missing."""
    n, k = dense.shape
    try:
        codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda")
        weights = [torch.ops.aten._convert_weight_to_int4pack(codes, 8) for _ in range(copies)]
        scales = torch.rand(k // 128, n, 2, device="cuda").bfloat16()
        torch.ops.aten._weight_int4pack_mm(x, weights[0], 128, scales)
    except RuntimeError as error:
        print(f"torch's int4 product is not measured: {error}")
        return None
    return [lambda w=w: torch.ops.aten._weight_int4pack_mm(x, w, 128, scales) for w in weights]


def measure_crossover():
    """Where the fused kernel stops being the faster way: the table behind `crossover`."""
    for entry in crossover.measure():
        details = {"shape": f"{entry['n']}x{entry['k']}", "rows": entry["rows"]}
        for by in ("fused", "dequantized"):
            entry_us = entry[f"{by}_us"]
            records.append({"operation": "crossover", "by": by, **details, "median_us": entry_us})
        print(
            f"crossover {details} fused {entry['fused_us']:.2f} us, dequantized {entry['dequantized_us']:.2f} us",
            flush=True,
        )


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
    parser.add_argument("--only", nargs="+", choices=["dequantize", "quantize", "torchao", "gemv", "crossover", "host"])
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
        "crossover": measure_crossover,
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
