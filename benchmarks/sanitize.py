"""Run the GPU tests under compute-sanitizer, and write results/<device>-<tool>.json with what each tool found.

    python benchmarks/sanitize.py              memcheck and racecheck, some minutes on an H100

The tests left out are those whose tensors make the checked run take hours, and those of torch's own machinery.
"""

import argparse
import datetime
import json
import pathlib
import re
import subprocess
import sys

import torch
from gpu import PACKAGES
from provenance import provenance

ROOT = pathlib.Path(__file__).parents[1]
TESTS = ["tests/test_kernels_cuda.py", "tests/test_prepared.py"]
LEFT_OUT = "not 2_to_the_31 and not two_to_the_31 and not threads and not compile and not graph and not capture"


def check(tool, expression, limit_s):
    """The tool's summary line, pytest's, and how long both took."""
    command = ["compute-sanitizer", "--tool", tool, "--report-api-errors", "no", sys.executable, "-m", "pytest", "-q"]
    command += ["-p", "no:cacheprovider", *TESTS, "-k", expression]
    start = datetime.datetime.now()
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit_s)
        output, status = done.stdout + done.stderr, done.returncode
    except subprocess.TimeoutExpired as late:
        output, status = (late.stdout or b"").decode(errors="replace"), f"stopped after {limit_s} s"
    return {
        "tool": tool,
        "status": status,
        "summary": re.findall(r"=+ ((?:ERROR|RACECHECK) SUMMARY: .*)", output),
        "first_findings": re.findall(r"=+ ((?:Invalid|Error|Warning|Program hit).*)", output)[:20],
        "tests": re.findall(r"\d+ (?:passed|failed|skipped).*", output)[-1:],
        "seconds": round((datetime.datetime.now() - start).total_seconds(), 1),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-k", dest="expression", default=LEFT_OUT, help="which tests, as pytest's -k takes it")
    parser.add_argument("--tools", nargs="+", default=["memcheck", "racecheck"])
    parser.add_argument("--limit-s", type=float, default=1800)
    parser.add_argument("--results", type=pathlib.Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    version = subprocess.run(["compute-sanitizer", "--version"], capture_output=True, text=True, check=True).stdout
    about = {"sanitizer": version.strip().splitlines()[-1], "expression": args.expression}
    result = provenance("benchmarks/sanitize.py", PACKAGES) | about
    device = torch.cuda.get_device_name().replace(" ", "-").lower()
    for tool in args.tools:
        checks = [check(tool, args.expression, args.limit_s)]
        print(json.dumps(checks, indent=1))
        path = args.results / f"{device}-{tool}.json"
        path.write_text(json.dumps(result | {"checks": checks}, indent=1) + "\n")
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
