"""Up to how many rows of x the fused kernel is the faster way, and from where on dequantizing and cuBLAS are.

    python -m nf4lab.kernels.cuda.crossover        measure it on this GPU (a minute) and keep it for this user

A table of shapes and rows: the one that was measured on this model of GPU, or the one below, measured on an H200. A
shape that is not in it goes by its nearest neighbour, by the logarithms of n and k.
"""

import functools
import json
import math
import os
import pathlib
import statistics

import torch

# (n, k): the most rows at which the fused kernel took at most 3 % longer than dequantizing and torch's product
H200 = {
    (1024, 4096): 48,
    (4096, 4096): 96,
    (14336, 4096): 128,
    (4096, 14336): 128,
    (8192, 8192): 128,
    (28672, 8192): 128,
    (8192, 28672): 128,
}
MARGIN = 1.03
ROWS = (8, 16, 24, 32, 48, 64, 96, 128)
FOLDER = pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache")) / "nf4lab"


def rows_worth_it(n, k, dtype, device):
    """The most rows, at most 128, that the fused kernel should take of x (rows, k) times W (n, k); 16 for float32 x."""
    if dtype == torch.float32:
        return 16
    table = table_for(device)
    nearest = min(table, key=lambda shape: math.dist(map(math.log, shape), map(math.log, (n, k))))
    return table[nearest]


@functools.cache
def table_for(device):
    """{(n, k): rows} for CUDA device number `device`: measured on this machine, or the one that ships."""
    path = path_for(torch.cuda.get_device_name(device)) if torch.cuda.is_available() else None
    try:
        stored = json.loads(path.read_text())["rows"] if path else []
        return {(n, k): rows for n, k, rows in stored} or H200
    except (OSError, ValueError, KeyError, TypeError):
        return H200


def path_for(device_name):
    return FOLDER / f"crossover-{device_name.replace(' ', '-').lower()}.json"


def measure(shapes=tuple(H200), rows_tried=ROWS, samples=7, cold_bytes=300_000_000):
    """[{n, k, rows, fused_us, dequantized_us}] on the current GPU: medians under a CUDA graph, weights cold."""
    from . import dequantize, gemv

    levels = torch.linspace(-1, 1, 16, device="cuda")
    found = []
    for n, k in shapes:
        copies = max(2, -(-cold_bytes // (n * k // 2)))
        packed = [torch.randint(0, 256, (n * k // 2,), dtype=torch.uint8, device="cuda") for _ in range(copies)]
        absmax = torch.rand(n * k // 64, device="cuda")
        dense = torch.empty(n, k, device="cuda", dtype=torch.bfloat16)

        def fused(x, weight, absmax=absmax, shape=(n, k)):
            gemv(x, weight, absmax, levels, shape=shape, block_size=64)

        def dequantized(x, weight, absmax=absmax, dense=dense):
            dequantize(weight, absmax, levels, n=dense.numel(), block_size=64, out=dense)
            torch.nn.functional.linear(x, dense)

        for rows in rows_tried:
            x = torch.randn(rows, k, device="cuda", dtype=torch.bfloat16)
            ways = [[lambda x=x, w=w, way=way: way(x, w) for w in packed] for way in (fused, dequantized)]
            times = [graph_us(calls, samples) for calls in ways]
            found.append({"n": n, "k": k, "rows": rows, "fused_us": times[0], "dequantized_us": times[1]})
    return found


def graph_us(calls, samples):
    """Median GPU microseconds of a call, in a CUDA graph that makes each of `calls` in turn."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph, times = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(samples):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times)


def most_rows(measured):
    """{(n, k): the most rows up to which the fused kernel is never over 3 % slower} of what `measure` gives."""
    table = {}
    for entry in measured:
        shape, good = (entry["n"], entry["k"]), entry["fused_us"] <= MARGIN * entry["dequantized_us"]
        best, still = table.get(shape, (0, True))
        table[shape] = (entry["rows"] if good and still else best, good and still)
    return {shape: max(rows, 8) for shape, (rows, _) in table.items()}


def main():
    name = torch.cuda.get_device_name()
    measured = measure()
    table = most_rows(measured)
    for entry in measured:
        print(
            "{n:6d} x {k:6d}, {rows:3d} rows: fused {fused_us:7.2f} us, dequantized {dequantized_us:7.2f} us".format(
                **entry
            )
        )
    path = path_for(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"device": name, "rows": [[*shape, rows] for shape, rows in table.items()]}) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
