"""What it costs to quantize a folder of a model: `nf4lab quantize`, two Dask workers, bitsandbytes' own way.

Writes results/NAME-folders.json. The model is of Llama 3.2 3B's shape, bfloat16, random, in seven shards; it is made in
a temporary folder and removed. Each way runs in processes of its own: their processor time, wall time and largest
resident memory are the system's count of them (`wait4`). A second part writes 50,000 small tensors, where what is
counted is overhead.

    python benchmarks/folders.py two-cores --scratch /tmp
    python benchmarks/folders.py nvidia-h200 --device cuda --scratch /dev/shm --layers 8

On a GPU the ways are the command without it and with it; what torch's allocator took there at most is counted, too.
"""

import argparse
import json
import multiprocessing
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

import torch
from provenance import processor, provenance
from safetensors.torch import save_file

OTHERS = ["bitsandbytes", "distributed"]  # whose ways are measured, too
LLAMA = {
    "vocab_size": 128256, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
    "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True,
    "max_position_embeddings": 8192, "dtype": "bfloat16",
}  # fmt: skip
SHARD = 10**9  # bytes
COUNTED = """
import pathlib, sys, torch
from nf4lab.__main__ import main
peak, *words = sys.argv[1:]
status = main(words)
pathlib.Path(peak).write_text(str(torch.cuda.max_memory_allocated() / 2**20))
sys.exit(status)
"""
MANY = "50,000 tensors of 64x64"
THEIRS = """
import sys, torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
source, target = sys.argv[1:]
config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, device_map="cpu")
model.save_pretrained(target)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the record: results/NAME-folders.json")
    parser.add_argument("--scratch", default=None, help="a folder with 16 GB of room, for all layers")
    parser.add_argument("--layers", type=int, default=LLAMA["num_hidden_layers"], help="fewer, for less time")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="cuda: what a GPU makes of it")
    options = parser.parse_args()
    on_gpu = options.device == "cuda"
    packages = ["torch", "numpy", "numba", "safetensors", "transformers"]
    record = provenance("benchmarks/folders.py", [*packages, "numba-cuda"] if on_gpu else [*packages, *OTHERS])
    record |= {"load_before": os.getloadavg()[0], "threads": torch.get_num_threads()}
    record |= {"processor": processor()} if on_gpu else {}
    ways = (alone, on_a_gpu) if on_gpu else (alone, with_dask, bitsandbytes)
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        scratch = pathlib.Path(folder)
        source = apart(make_model, scratch / "model", options.layers, options.device)
        record["bytes"] = sum(path.stat().st_size for path in source.glob("*.safetensors"))
        record["shards"] = len(list(source.glob("*.safetensors")))
        record["records"] = [in_turn(way, source, scratch / "out") for way in ways]
        shutil.rmtree(source)
        if not on_gpu:
            source = apart(make_many, scratch / "many")
            record["records"] += [in_turn(way, source, scratch / "out", MANY) for way in (plainly, alone)]
    path = pathlib.Path(__file__).parent / "results" / f"{options.name}-folders.json"
    path.write_text(json.dumps(record, indent=1) + "\n")


def in_turn(way, source: pathlib.Path, target: pathlib.Path, case: str | None = None) -> dict:
    """One way's figures; what it wrote is removed."""
    row = {"way": way.__doc__} | ({"case": case} if case else {}) | way(source, target)
    row["bytes_written"] = sum(path.stat().st_size for path in target.glob("*.safetensors"))
    shutil.rmtree(target, ignore_errors=True)
    print(json.dumps(row), flush=True)
    return row


def alone(source: pathlib.Path, target: pathlib.Path) -> dict:
    """nf4lab quantize IN OUT --double-quant"""
    return measured([start(*nf4lab_quantize(source, target))])


def plainly(source: pathlib.Path, target: pathlib.Path) -> dict:
    """nf4lab quantize IN OUT"""
    return measured([start(*nf4lab_quantize(source, target)[:-1])])


def on_a_gpu(source: pathlib.Path, target: pathlib.Path) -> dict:
    """the same with --device cuda"""
    peak, (_, _, *words) = target.with_name("peak"), nf4lab_quantize(source, target)
    row = measured([start("-c", COUNTED, str(peak), *words, "--device", "cuda")])
    return row | {"gpu_peak_mib": float(peak.read_text())} if peak.exists() else row


def with_dask(source: pathlib.Path, target: pathlib.Path) -> dict:
    """the same with --scheduler, a scheduler and two workers of one thread"""
    with tempfile.TemporaryDirectory() as folder:
        address_file = pathlib.Path(folder) / "scheduler.json"
        where = ["--scheduler-file", str(address_file)]
        scheduler = start("-m", "distributed.cli.dask_scheduler", "--port", "0", "--no-dashboard", *where)
        while not address_file.exists():
            time.sleep(0.1)
        worker = ["-m", "distributed.cli.dask_worker", *where, "--nthreads", "1", "--no-dashboard", "--no-nanny"]
        workers = [start(*worker, "--local-directory", folder) for _ in range(2)]
        time.sleep(10)  # both are there, and wait
        address = json.loads(address_file.read_text())["address"]
        return measured([start(*nf4lab_quantize(source, target), "--scheduler", address)], [*workers, scheduler])


def bitsandbytes(source: pathlib.Path, target: pathlib.Path) -> dict:
    """from_pretrained(IN, quantization_config=BitsAndBytesConfig(...), device_map="cpu"), save_pretrained(OUT)"""
    return measured([start("-c", THEIRS, str(source), str(target))])


def nf4lab_quantize(source: pathlib.Path, target: pathlib.Path) -> list[str]:
    return ["-m", "nf4lab", "quantize", str(source), str(target), "--quiet", "--double-quant"]


def start(*words: str) -> tuple[subprocess.Popen, float]:
    """A Python process begun now, and when that was."""
    process = subprocess.Popen([sys.executable, *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    return process, time.perf_counter()


def measured(waited_for: list, ended: list = ()) -> dict:
    """What processes took until those that are waited for were done; the others are ended then."""
    rows, began = [], waited_for[0][1]
    for process, _ in waited_for:
        rows.append(usage(process))
    wall = time.perf_counter() - began
    for process, _ in ended:
        process.terminate()
        rows.append(usage(process))
    if rows[0]["status"]:
        return {"status": rows[0]["status"], "error": rows[0]["error"]}
    return {
        "wall_s": wall,
        "cpu_s": sum(row["cpu_s"] for row in rows),
        "peak_mib": [row["peak_mib"] for row in rows],  # by process
    }


def usage(process: subprocess.Popen) -> dict:
    """Wait for a process; its status, processor time, largest resident memory and last line on stderr."""
    lines = process.stderr.read().decode().strip().splitlines()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    row = {"status": process.returncode, "cpu_s": used.ru_utime + used.ru_stime, "peak_mib": used.ru_maxrss / 1024}
    return row | {"error": lines[-1] if lines else ""}


def apart(make, folder: pathlib.Path, *arguments) -> pathlib.Path:
    """The folder that is made in a process of its own: what starts others must be small, since its memory counts."""
    process = multiprocessing.get_context("spawn").Process(target=make, args=(folder, *arguments))
    process.start()
    process.join()
    return folder


def make_model(folder: pathlib.Path, layers: int, device: str) -> None:
    """A folder of a causal language model of random weights, shard by shard; they are drawn on the device."""
    import transformers

    config = transformers.LlamaConfig(**LLAMA | {"num_hidden_layers": layers}, architectures=["LlamaForCausalLM"])
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}  # a tied head has no name
    generator, groups, nbytes = torch.Generator(device).manual_seed(0), [[]], 0
    for name, shape in shapes.items():
        if groups[-1] and nbytes + 2 * shape.numel() > SHARD:
            groups.append([])
            nbytes = 0
        groups[-1].append(name)
        nbytes += 2 * shape.numel()
    folder.mkdir()
    config.save_pretrained(folder)
    index = {}
    for k, names in enumerate(groups):
        shard = f"model-{k + 1:05d}-of-{len(groups):05d}.safetensors"
        made = {name: torch.empty(shapes[name], dtype=torch.bfloat16, device=device) for name in names}
        for tensor in made.values():
            tensor.normal_(std=0.02, generator=generator)
        save_file({name: tensor.cpu() for name, tensor in made.items()}, folder / shard, {"format": "pt"})
        index |= dict.fromkeys(names, shard)
    text = {"metadata": {"total_size": 2 * sum(s.numel() for s in shapes.values())}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(text))


def make_many(folder: pathlib.Path) -> None:
    """A folder with 50,000 matrices of 64x64 in one file."""
    folder.mkdir()
    drawn = torch.randn(50_000, 64, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    tensors = {f"model.layers.{k // 10}.block.part_{k % 10}.weight": w.clone() for k, w in enumerate(drawn)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


if __name__ == "__main__":
    main()
