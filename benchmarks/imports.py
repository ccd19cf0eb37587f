"""What importing nf4lab costs on top of torch, and the first tensor on top of that; writes results/imports.json.

Each case runs in processes of its own, the cases in turn, so that all meet the same machine. "cpu_s" is processor
time, which other programs disturb least; "wall_s" is what one waits for.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys

from provenance import provenance

CASES = {
    "torch": "import torch",
    "torch, nf4lab": "import torch, nf4lab",
    "torch, nf4lab, one tensor": "import torch, nf4lab; nf4lab.quantize(torch.ones(64))",
}
SCRIPT = """
import time
wall, cpu = time.perf_counter(), time.process_time()
{case}
print(time.perf_counter() - wall, time.process_time() - cpu)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="of all cases; the first is not counted")
    rounds = parser.parse_args().rounds
    samples, load = {case: [] for case in CASES}, os.getloadavg()[0]
    for _ in range(rounds + 1):
        for case, statement in CASES.items():
            run = subprocess.run(
                [sys.executable, "-c", SCRIPT.format(case=statement)], capture_output=True, text=True, check=True
            )
            samples[case].append([float(number) for number in run.stdout.split()])
    record = provenance("benchmarks/imports.py", ["torch", "numpy", "scipy"]) | {"load_before": load, "records": []}
    for case, pairs in samples.items():
        wall, cpu = (list(column) for column in zip(*pairs[1:], strict=True))
        row = {
            "case": case,
            "wall_s": statistics.median(wall),
            "cpu_s": statistics.median(cpu),
            "walls_s": wall,
            "cpus_s": cpu,
        }
        record["records"].append(row)
        print(f"{case:26} {row['wall_s']:6.2f} s, {row['cpu_s']:6.2f} s of processor time")
    path = pathlib.Path(__file__).parent / "results" / "imports.json"
    path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
