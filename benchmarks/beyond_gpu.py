"""What rotating and correcting cost on a GPU: the parts of `python benchmarks/beyond.py --device cuda`.

    hadamard   nf4lab.beyond.rotation.rotate beside a copy of the same bytes and the product with the dense matrix
    layer      RotatedLinear of 4096 x 4096 in bfloat16 beside Linear4bit and torch.nn.Linear
    feedback   nf4lab.quantize(..., hessian=...) of 4096 x 4096, on the GPU and on the CPU of the same machine

Two times of each: "graph", the GPU's for one call, by events around a CUDA graph of many; "call", what a user waits,
from an idle GPU to an idle GPU. Those who are compared take turns, sample by sample. Weights and inputs are read from
copies in turn, 300 MB of them, which no cache holds, or 24 where they are small.
"""

import itertools
import statistics
import time

import numpy as np

if not hasattr(np, "row_stack"):
    np.row_stack = np.vstack  # noqa: NPY201 - numba-cuda 0.30 asks for it, NumPy 2.5 has it no more

import torch
from torch import nn

import nf4lab
from nf4lab.backends.feedback import feedback_factor
from nf4lab.beyond.rotation import RotatedLinear, factor, hadamard, random_signs, rotate
from nf4lab.kernels.cuda import hadamard_kernels

SHAPES = ((1, 4096), (2048, 4096), (8192, 14336))
WIDTH, ROWS = 4096, (1, 16, 2048)
COLD_BYTES = 300_000_000
LEAST_CALLS = 24  # in a graph, where calls are short: what starting it costs is shared


def summary(samples: list[float], **what) -> dict:
    """The record of one measurement, printed as it is made."""
    entry = what | {"median": statistics.median(samples), "least": min(samples), "greatest": max(samples)}
    print(*(f"{value:.4g}" if isinstance(value, float) else value for value in entry.values()), flush=True)
    return entry | {"samples": samples}


def in_turn(calls: dict[str, list], samples: int) -> dict[str, dict[str, list[float]]]:
    """who -> {"graph", "call"} -> microseconds; calls: who -> calls that do the same, each on a copy of its own."""
    graphs = {who: graph_of(of) for who, of in calls.items()}
    found = {who: {"graph": [], "call": []} for who in calls}
    for sample in range(samples):
        for who, (graph, count) in graphs.items():
            found[who]["graph"].append(event_us(graph.replay) / count)
            found[who]["call"].append(clock_us(calls[who][sample % len(calls[who])]))
    return found


def graph_of(calls: list) -> tuple[torch.cuda.CUDAGraph, int]:
    """A CUDA graph that makes the calls one after the other, and how many those are."""
    calls = calls * max(1, -(-LEAST_CALLS // len(calls))) if len(calls) > 1 else calls
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    event_us(graph.replay)  # its first run is another
    return graph, len(calls)


def event_us(run) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def clock_us(run) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e6


def copies_of(x: torch.Tensor) -> list[torch.Tensor]:
    """Copies of x to be read in turn."""
    return [x.clone() for _ in range(min(LEAST_CALLS, -(-COLD_BYTES // x.nbytes)))]


def measure_hadamard(samples: int = 11) -> list[dict]:
    """GPU microseconds of a rotation, of a copy and of the product with the same matrix, dense."""
    found = []
    for (rows, n), dtype in itertools.product(SHAPES, (torch.bfloat16, torch.float32)):
        x = copies_of(torch.randn(rows, n, device="cuda").to(dtype))
        out, signs = torch.empty_like(x[0]), random_signs(n).cuda()
        dense = copies_of((hadamard(torch.eye(n, device="cuda")) * signs[:, None]).to(dtype))
        turns = [(x[i % len(x)], dense[i % len(dense)]) for i in range(max(len(x), len(dense)))]
        calls = {
            "copy": [lambda a=a: out.copy_(a) for a in x],
            "nf4lab": [lambda a=a: rotate(a, signs) for a in x],
            "dense": [lambda a=a, h=h: torch.matmul(a, h, out=out) for a, h in turns],
        }
        if factor(n) == 1:
            how = {"signs": signs, "factor": n**-0.5}
            for version in hadamard_kernels.VERSIONS:
                calls[version] = [
                    lambda a=a, v=version, how=how: hadamard_kernels.transform(a, out, n, version=v, **how) for a in x
                ]
        about = {"shape": f"{rows}x{n}", "dtype": str(dtype).removeprefix("torch."), "power of two": n // factor(n)}
        about |= agreement(x[0], signs, dense[0])
        for who, times in in_turn(calls, samples).items():
            for timing, of in times.items():
                found.append(summary(of, operation="hadamard", by=who, timing=timing, unit="us", **about))
        del x, dense, calls, turns
        torch.cuda.empty_cache()
    return found


def agreement(x: torch.Tensor, signs: torch.Tensor, dense: torch.Tensor) -> dict:
    """Of up to 64 rows: whether the CPU gives the same bits, and how far the dense product is, over the largest."""
    some = x[:64]
    ours = rotate(some, signs)
    here = rotate(some.cpu(), signs.cpu())
    theirs = (some.double() @ dense.double()).float()
    return {
        "equal to the cpu": torch.equal(ours.cpu(), here),
        "from dense": ((ours.float() - theirs).abs().max() / theirs.abs().max()).item(),
    }


def measure_layer(samples: int = 21) -> list[dict]:
    """Microseconds of y = W x for a few rows and many: 16 bits, 4 bits, 4 bits of the rotated weight."""
    plain = nn.Linear(WIDTH, WIDTH, bias=False, device="cuda", dtype=torch.bfloat16)
    count = {"torch": 2 * WIDTH**2, "nf4lab": WIDTH**2 // 2, "nf4lab rotated": WIDTH**2 // 2}
    make = {
        "torch": lambda: nn.Linear(WIDTH, WIDTH, bias=False, device="cuda", dtype=torch.bfloat16),
        "nf4lab": lambda: nf4lab.Linear4bit.from_linear(plain),
        "nf4lab rotated": lambda: RotatedLinear.from_linear(plain),
    }
    layers = {who: [make[who]() for _ in range(-(-COLD_BYTES // count[who]))] for who in make}
    found = []
    for rows in ROWS:
        x = torch.randn(rows, WIDTH, device="cuda").bfloat16()
        calls = {who: [lambda layer=layer, x=x: layer(x) for layer in of] for who, of in layers.items()}
        for call in itertools.chain(*calls.values()):
            call()  # each makes itself ready once
        for who, times in in_turn(calls, samples).items():
            about = {"shape": f"{WIDTH}x{WIDTH}", "rows": rows, "dtype": "bfloat16"}
            for timing, of in times.items():
                found.append(summary(of, operation="layer", by=who, timing=timing, unit="us", **about))
    return found


def measure_feedback(samples: int = 5) -> list[dict]:
    """Seconds of one layer's error feedback, and how far what two devices make of it is apart."""
    n = WIDTH
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2 * n, n, generator=generator) * torch.logspace(0, -3, n)
    w, hessian = torch.randn(n, n, generator=generator), x.T @ x / len(x)
    found, made = [], {}
    nf4lab.quantize(w[:256], hessian=hessian)  # numba compiles
    for device in ("cuda", "cpu"):
        there, moments = w.to(device), hessian.to(device)
        what = {
            "nearest": lambda there=there: nf4lab.quantize(there),
            "factor": lambda moments=moments: feedback_factor(moments),
            "layer": lambda there=there, moments=moments: nf4lab.quantize(there, hessian=moments),
        }
        for name, run in what.items():
            if device == "cuda":
                run()
            times = [clock_us(run) / 1e6 for _ in range(samples if device == "cuda" else 2)]
            about = {"shape": f"{n}x{n}", "threads": torch.get_num_threads() if device == "cpu" else None}
            found.append(summary(times, operation="feedback", by=device, what=name, unit="s", **about))
        made[device] = what["layer"]().to("cpu")
    differing = (made["cuda"].codes != made["cpu"].codes).sum().item()
    errors = {device: nf4lab.output_error(w, q.dequantize(), hessian) for device, q in made.items()}
    errors["nearest"] = nf4lab.output_error(w, nf4lab.quantize(w).dequantize(), hessian)
    entry = {"operation": "feedback, both", "codes": n * n, "codes that differ": differing, "output error": errors}
    print(entry, flush=True)
    return [*found, entry]


PARTS = {"hadamard": measure_hadamard, "layer": measure_layer, "feedback": measure_feedback}
