"""Measure the CPU kernels beside bitsandbytes and the torch reference; write results/cpu-NAME.json with every sample.

    python benchmarks/cpu.py NAME              all of it: about two minutes on two quiet cores
    python benchmarks/cpu.py NAME --quick      sizes up to 2**20 only

Each round runs every contender once. A call starts when other programs leave the cores alone, and is repeated if they
took more than a tenth of them meanwhile; when --patience runs out, what comes is taken. How much of the cores others
had stands beside every sample. A call is timed from outside, as a caller would see it.
"given": the output exists and has been written before; "allocated": the call makes it.
"""

import argparse
import itertools
import json
import os
import pathlib
import platform
import re
import statistics
import time

import bitsandbytes.functional as bnb
import numpy as np
import torch
from provenance import output, provenance

import nf4lab
from nf4lab import backends
from nf4lab.kernels import cpu

BLOCK, ROW = 64, 4096
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ROOT = pathlib.Path(__file__).parent.parent


def contenders(x):
    """(operation, who, output) -> call, for every operation on x, a matrix."""
    q = nf4lab.quantize(x, block_size=BLOCK, backend="torch")
    theirs = bnb.quantize_4bit(x, blocksize=BLOCK, quant_type="nf4")
    assert torch.equal(theirs[0].view(-1), q.packed)
    out, target = torch.zeros_like(x), torch.zeros_like(x)
    assert torch.equal(nf4lab.dequantize(q, out=out, backend="cpu"), bnb.dequantize_4bit(*theirs))
    given = prepared_quantize(x)
    return {
        ("copy", "torch", "given"): lambda: target.copy_(x),
        ("quantize", "bitsandbytes", "allocated"): lambda: bnb.quantize_4bit(x, blocksize=BLOCK, quant_type="nf4"),
        ("quantize", "reference", "allocated"): lambda: nf4lab.quantize(x, block_size=BLOCK, backend="torch"),
        ("quantize", "kernel", "allocated"): lambda: nf4lab.quantize(x, block_size=BLOCK, backend="cpu"),
        ("quantize", "kernel", "given"): given,
        ("dequantize", "bitsandbytes", "allocated"): lambda: bnb.dequantize_4bit(*theirs),
        ("dequantize", "reference", "allocated"): lambda: nf4lab.dequantize(q, backend="torch"),
        ("dequantize", "kernel", "allocated"): lambda: nf4lab.dequantize(q, backend="cpu"),
        ("dequantize", "kernel", "given"): lambda: nf4lab.dequantize(q, out=out, backend="cpu"),
    }


def prepared_quantize(x):
    """The kernel alone, on arrays that exist."""
    packed, scale = torch.zeros(x.numel() // 2, dtype=torch.uint8), torch.zeros(x.numel() // BLOCK)
    arrays = [backends.cpu._array(t) for t in (x, scale, None, packed)]
    table, kind = backends.cpu._quantize_table(nf4lab.FORMATS["nf4"]), backends.cpu._kind(x.dtype)
    return lambda: cpu.quantize(arrays[0], kind, table, cpu.ABSMAX, BLOCK, *arrays[1:], backends.cpu._threads())


def ladder(n):
    """(operation, version, output) -> call, for every version of the kernels on n float32."""
    format, x = nf4lab.FORMATS["nf4"], torch.randn(n).numpy()
    packed, scale, none = np.zeros(n // 2, np.uint8), np.zeros(n // BLOCK, np.float32), np.zeros(0, np.float32)
    out, levels, threads = np.zeros(n, np.float32), format.levels.numpy(), backends.cpu._threads()
    boundaries, ascending = format.boundaries.numpy(), format.ascending.to(torch.uint8).numpy()
    quantize = (x, cpu.FLOAT32, cpu.codebook_table(boundaries, ascending), cpu.ABSMAX, BLOCK, scale, none, packed)
    dequantize = (packed, cpu.level_pairs(levels), scale, none, BLOCK, cpu.FLOAT32, out)
    return {
        ("quantize", "v1", "given"): lambda: cpu.quantize_v1(x, boundaries, ascending, BLOCK, scale, packed),
        ("quantize", "v2", "given"): lambda: cpu.quantize_v2(*quantize),
        ("quantize", "v3", "given"): lambda: cpu.quantize_v3(*quantize),
        ("quantize", "in threads", "given"): lambda: cpu.quantize(*quantize, threads),
        ("dequantize", "v1", "given"): lambda: cpu.dequantize_v1(packed, levels, scale, BLOCK, out),
        ("dequantize", "v2", "given"): lambda: cpu.dequantize_v2(*dequantize),
        ("dequantize", "in threads", "given"): lambda: cpu.dequantize(*dequantize, threads),
    }


def measure(calls, n, dtype, rounds, deadline):
    """One record for each call: its samples in microseconds, a sample being the mean of enough calls to be timed."""
    samples = {key: [] for key in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for key, call in calls.items():
            samples[key].append(undisturbed(call, max(1, 2**20 // n), deadline))
    return [record(key, n, dtype, *zip(*taken, strict=True)) for key, taken in samples.items()]


def undisturbed(call, repeats, deadline, others_share=0.1):
    """(microseconds a call, share of the cores that others had), measured in quiet if there is any before deadline."""
    while True:
        while time.monotonic() < deadline and watched(lambda: time.sleep(0.1))[1] > others_share:
            pass
        time_us, others = watched(lambda: repeat(call, repeats))
        if others <= others_share or time.monotonic() > deadline:
            return time_us / repeats, others


def repeat(call, times):
    for _ in range(times):
        call()


def watched(call):
    """(microseconds, share of the cores that other programs had) of a call. The clock of the latter ticks at 100 Hz."""
    busy, own, start = busy_seconds(), time.process_time(), time.perf_counter()
    call()
    elapsed = time.perf_counter() - start
    others = busy_seconds() - busy - (time.process_time() - own)
    return elapsed * 1e6, round(max(0.0, others) / (elapsed * os.cpu_count()), 3)


def busy_seconds():
    """How long all cores together have been busy since the machine started."""
    all_cores = pathlib.Path("/proc/stat").read_text().split("\n")[0]
    user, nice, system, _idle, _wait, *rest = map(int, all_cores.split()[1:])
    return (user + nice + system + sum(rest[:3])) / os.sysconf("SC_CLK_TCK")


def record(key, n, dtype, times_us, others):
    operation, who, output = key
    low, median, high = statistics.quantiles(times_us, n=4)
    return {
        "operation": operation, "who": who, "output": output, "dtype": str(dtype).removeprefix("torch."), "n": n,
        "median_us": median, "quartiles_us": [low, high], "samples_us": times_us, "others_share": others,
    }  # fmt: skip


def crossovers(records):
    """For each operation and dtype: the least of the measured sizes from which on the kernel's median is the lower."""
    allocated = [r for r in records if r["output"] == "allocated"]
    medians = {(r["operation"], r["dtype"], r["n"], r["who"]): r["median_us"] for r in allocated}
    least = {}
    for operation, dtype in sorted({key[:2] for key in medians}):
        sizes = sorted({key[2] for key in medians if key[:2] == (operation, dtype)}, reverse=True)
        wins = [medians[operation, dtype, n, "kernel"] < medians[operation, dtype, n, "reference"] for n in sizes]
        winning = list(itertools.takewhile(lambda pair: pair[1], zip(sizes, wins, strict=True)))
        least[f"{operation} {dtype}"] = winning[-1][0] if winning else None
    return least


def about_this_machine():
    """What decides the times beside the processor's name."""
    cpuinfo = pathlib.Path("/proc/cpuinfo").read_text()
    huge_pages = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return {
        "threads": backends.cpu._threads(), "torch_threads": torch.get_num_threads(),
        "vector_extensions": sorted(set(re.findall(r"\b(?:avx2|avx512[a-z]*|f16c|fma)\b", cpuinfo))),
        "kernel": platform.release(), "transparent_huge_pages": huge_pages.read_text().strip(),
        "uncommitted": output("git", "status", "--porcelain"),
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", help="of the machine, for the record's file name")
    parser.add_argument("--quick", action="store_true", help="sizes up to 2**20 only")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--patience", type=float, default=600, help="seconds in which disturbed calls are repeated")
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.patience
    packages = ["torch", "numba", "llvmlite", "numpy", "bitsandbytes"]
    result = provenance("benchmarks/cpu.py", packages) | about_this_machine()
    result |= {"block_size": BLOCK, "load_before": os.getloadavg(), "records": [], "ladder": []}
    for log2_n in (26, 24, 20, 16, 12)[2 * arguments.quick :]:
        for dtype in DTYPES:
            x = torch.randn(2**log2_n // ROW, ROW).to(dtype)
            result["records"] += measure(contenders(x), x.numel(), dtype, arguments.rounds, deadline)
            show(result["records"][-9:])
    result["ladder"] = measure(ladder(2**22), 2**22, torch.float32, arguments.rounds, deadline)
    show(result["ladder"])
    result["kernel_wins_from"] = crossovers(result["records"])
    result["load_after"] = os.getloadavg()
    path = ROOT / "benchmarks" / "results" / f"cpu-{arguments.name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(result["kernel_wins_from"], path)


def show(records):
    for r in records:
        low, high = r["quartiles_us"]
        others = max(r["others_share"])
        print(
            f"{r['n']:>9} {r['dtype']:<9} {r['operation']:<10} {r['who']:<12} {r['output']:<9} "
            f"{r['median_us'] / 1e3:>10.3f} ms  ({low / 1e3:.3f} to {high / 1e3:.3f}), others {others:.0%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
