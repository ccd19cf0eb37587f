"""What beats rounding to nearest: two models, thirteen methods, judged on text that none of them was calibrated on.

    python benchmarks/beyond.py [--only PART]      a quarter of an hour of one core
    python benchmarks/beyond.py --table
    python benchmarks/beyond.py --device cuda      under a minute of one GPU

writes nf4lab/models/records/beyond.json, and prints the tables of book/which-one-today.md from it, as `nf4lab.league`
reads them. On a GPU it measures what beyond_gpu.py lists, and "each method", and writes results/<device>-beyond.json.
A part keeps device, versions, date and commit of its own. What stands above the parts in beyond.json is older: where
"seconds" comes from, and of the parts before it the last.

All at blocks of 64 and 4.5 bits per weight; what a method stores beside is counted. Each method twice, in ways that are
as good as one another: rotations with another seed, everything else with columns moved on by half a block, so that
every block has other neighbours. What the two differ by is noise.

encoder         all-MiniLM-L6-v2, calibrated on pages of the manual of Flask; its sentences are judged as in outputs.py,
                its layers' outputs on pages of other manuals
language model  nf4lab.models.manuals_model, calibrated on held-out pages of manuals; judged on other such pages and on
                Flask's, its layers' outputs on Flask's
folders         nf4lab.models.manuals_model as folders that the command writes and bitsandbytes reads: beyond_folders.py
seconds         what feedback costs a layer of 4096 x 4096, with one and with two threads; nothing else should run
each method     seconds and memory of the thirteen, on such a layer: the same
"""

import argparse
import ctypes
import functools
import itertools
import json
import os
import sys
import time
from pathlib import Path

import beyond_folders
import beyond_gpu
import torch
from provenance import keep, provenance

import nf4lab
from nf4lab import league, models
from nf4lab.backends.feedback import feedback_factor
from nf4lab.beyond.learning import learn_format, learn_rows
from nf4lab.beyond.rotation import random_signs, rotate, unrotate
from nf4lab.beyond.scaling import activation_scales
from nf4lab.kernels import cuda

RECORD = Path(models.__file__).parent / "records" / "beyond.json"  # with the package: pages read it anywhere
BLOCK = 64
N_CALIBRATION = 64  # pages


def rounded(w, format="nf4", hessian=None):
    return nf4lab.quantize(w, format, BLOCK, hessian=hessian).dequantize()


def rotated(w, seed, format="nf4", hessian=None):
    signs = random_signs(w.shape[1], seed)
    if hessian is not None:
        hessian = rotate(rotate(hessian, signs).T, signs)
        hessian = (hessian + hessian.T) / 2
    return unrotate(rounded(rotate(w, signs), format, hessian), signs)


def scaled(w, hessian):
    scales, _ = activation_scales(w, hessian, rounded)
    return rounded(w * scales) / scales


def shifted(method):
    """The method, and the second way: columns moved on by half a block, so that every block has other neighbours."""

    def way_of(w, h, way):
        by = way * BLOCK // 2
        return method(w.roll(by, 1), h.roll((by, by), (0, 1))).roll(-by, 1)

    return way_of


# name -> what is read back of w with the second moments of its inputs, in the first way and in the second
METHODS = {
    "nearest": shifted(lambda w, h: rounded(w)),
    "nearest, bof4-s": shifted(lambda w, h: rounded(w, "bof4-s")),
    "searched": shifted(lambda w, h: rounded(w, nf4lab.FORMATS["nf4"].searched())),
    "scaled": shifted(scaled),
    "learned, a table a layer": shifted(lambda w, h: rounded(w, learn_format(w, BLOCK, h.diagonal()))),
    "learned, a table a row": shifted(lambda w, h: learn_rows(w, BLOCK, h.diagonal()).dequantize()),
    "corrected": shifted(lambda w, h: rounded(w, hessian=h)),
    "corrected, bof4-s": shifted(lambda w, h: rounded(w, "bof4-s", h)),
    "rotated": lambda w, h, way: rotated(w, way),
    "rotated, bof4-s": lambda w, h, way: rotated(w, way, "bof4-s"),
    "rotated, searched": lambda w, h, way: rotated(w, way, nf4lab.FORMATS["nf4"].searched()),
    "rotated, corrected": lambda w, h, way: rotated(w, way, hessian=h),
    "rotated, corrected, bof4-s": lambda w, h, way: rotated(w, way, "bof4-s", h),
}


def pages(flask: bool) -> list[str]:
    """Pages of Flask's manual, or of others: those that `outputs.language_model` does not judge, 0 to 3 of each 25."""
    if flask:
        return models.texts("flask")[:N_CALIBRATION]
    return [page for i, page in enumerate(models.texts("manuals")) if i % 25 > 3][:N_CALIBRATION]


def hessians_of(name: str, flask: bool) -> dict[str, torch.Tensor]:
    """The second moments of every judged layer's inputs on such pages, by the names of outputs.py."""
    if name == "encoder":
        model = models.sentence_encoder()
        batches = (
            dict(model.tokenizer(text, return_tensors="pt", truncation=True, max_length=128)) for text in pages(flask)
        )
        return nf4lab.calibrate(model[0].auto_model, batches, exclude="pooler*")
    model, tokenizer = models.manuals_model()
    batches = (torch.tensor([[0, *tokenizer.encode(text).ids][:256]]) for text in pages(flask))
    return nf4lab.calibrate(model, batches, exclude="lm_head")


def measure(name: str, layers: dict, judge) -> dict:
    """method -> seconds of processor time, then for both ways what the model says, the error of all weights, and each
    layer's error of outputs on text that the method has not seen.
    """
    given, unseen = (hessians_of(name, flask) for flask in ((True, False) if name == "encoder" else (False, True)))
    weights = {layer: part.weight.detach().clone() for layer, part in layers.items()}
    power = sum(w.square().sum().item() for w in weights.values())
    table = {}
    for method, make in METHODS.items():
        row = {"seconds": [], "damage": [], "weights": [], "layers": []}
        for way in range(2):
            start = time.process_time()
            made = {layer: make(w, given[layer], way) for layer, w in weights.items()}
            row["seconds"].append(round(time.process_time() - start, 2))
            row["weights"].append(sum((made[k] - w).square().sum().item() for k, w in weights.items()) / power)
            row["layers"].append(
                [float(f"{nf4lab.output_error(w, made[k], unseen[k]):.5g}") for k, w in weights.items()]
            )
            for layer, part in layers.items():
                part.weight.copy_(made[layer])
            row["damage"].append(judge())
        table[method] = row
        print(name, method, row["seconds"], row["weights"], row["damage"], flush=True)
    return {"methods": table, "shapes": {layer: tuple(w.shape) for layer, w in weights.items()}}


def large_layer(n: int = 4096) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (n, n), and the second moments of inputs of very different sizes."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2 * n, n, generator=generator) * torch.logspace(0, -3, n)
    return torch.randn(n, n, generator=generator), x.T @ x / len(x)


def seconds_of_a_layer() -> dict:
    """threads -> what -> wall seconds, three times each: the factor of the Hessian alone, and all of `quantize`.

    load_before: what else ran on the machine, on the average of the minute before.
    """
    load = round(os.getloadavg()[0], 2)
    w, hessian = large_layer()
    what = {"factor": lambda: feedback_factor(hessian), "layer": lambda: nf4lab.quantize(w, hessian=hessian)}
    nf4lab.quantize(w[:256], hessian=hessian)  # numba compiles
    found = {"load_before": load}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found[str(threads)] = {name: [wall_seconds(run) for _ in range(3)] for name, run in what.items()}
        print(threads, found[str(threads)], flush=True)
    torch.set_num_threads(1)
    return found


def cost_of_each_method(device: str = "cpu", threads: int = 2) -> dict:
    """method -> wall seconds for a large layer, three times, and bytes: the most at once, beyond w and its moments."""
    load = round(os.getloadavg()[0], 2)
    w, hessian = (x.to(device) for x in large_layer())
    torch.set_num_threads(threads)
    found = {}
    for method, make in METHODS.items():
        make(w[:256], hessian, 0)  # what numba compiles
        run = functools.partial(make, w, hessian, 0)
        nbytes = most_bytes(device, run)
        found[method] = {"seconds": [wall_seconds(run, device) for _ in range(3)], "bytes": nbytes}
        print(method, found[method], flush=True)
    torch.set_num_threads(1)
    return {"load_before": load, "threads": threads, "methods": found}


def most_bytes(device: str, run) -> int:
    """The most memory that a run has in use at once, beyond what was in use before; on the CPU, Linux's count."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # what was freed is given back
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew, at what is resident
    before = high_water()
    run()
    return high_water() - before


def high_water() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def wall_seconds(run, device: str = "cpu") -> float:
    if device == "cuda":
        return round(beyond_gpu.clock_us(run) / 1e6, 5)
    start = time.perf_counter()
    run()
    return round(time.perf_counter() - start, 2)


def table(record: dict, name: str) -> list[str]:
    """The rows of a model's table on the page, in Markdown."""
    return [f"| {' | '.join(method.row)} |" for method in league.methods(name, record).values()]


def measure_model(name: str) -> dict:
    import outputs  # which needs transformers and sentence-transformers, as nothing else here does

    return measure(name, *{"encoder": outputs.encoder, "language model": outputs.language_model}[name]())


PARTS = {
    "cpu": {
        "encoder": lambda: measure_model("encoder"),
        "language model": lambda: measure_model("language model"),
        "folders": beyond_folders.measure,
        "seconds": seconds_of_a_layer,
        "each method": cost_of_each_method,
    },
    "cuda": {
        **{name: lambda part=part: {"records": part()} for name, part in beyond_gpu.PARTS.items()},
        "each method": lambda: cost_of_each_method("cuda"),
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, help="of the CPU a file, of a GPU a folder")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parts = list(dict.fromkeys(itertools.chain(*PARTS.values())))
    parser.add_argument("--only", choices=parts, help="the others stay as they are in the record")
    parser.add_argument("--table", action="store_true", help="measure nothing: print the tables of the file")
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    path = arguments.results or RECORD
    if arguments.table:
        record = json.loads(path.read_text())
        print(*(line for name in league.JUDGED for line in [name, *table(record, name)]), sep="\n")
        return
    if arguments.device == "cuda" and (reason := cuda.available()):
        sys.exit(f"nothing measured: {reason}")
    packages = ["torch", "numpy", "numba", *{"cpu": ["transformers"], "cuda": ["numba-cuda"]}[arguments.device]]
    if arguments.device == "cuda":
        path = (arguments.results or Path(__file__).parent / "results") / f"{device_name()}-beyond.json"
    torch.set_num_threads(1 if arguments.device == "cpu" else torch.get_num_threads())
    for name, part in PARTS[arguments.device].items():
        if arguments.only in (None, name):
            found = part()
            keep(path, name, found, provenance("benchmarks/beyond.py", packages))


def device_name() -> str:
    return torch.cuda.get_device_name().replace(" ", "-").lower()


if __name__ == "__main__":
    main()
