"""Where a record comes from: the device, the versions, the commit, and the command that makes it again."""

import datetime
import json
import os
import pathlib
import platform
import subprocess
import sys
from importlib.metadata import version

import torch


def provenance(program: str, packages: list[str]) -> dict:
    """What every record says of its origin. program: its path in the repository."""
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else processor(),
        **({"driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")} if cuda else {}),
        "versions": {"python": platform.python_version(), **({"cuda": torch.version.cuda} if cuda else {}),
                     **{package: version(package) for package in packages}},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": os.environ.get("NF4LAB_COMMIT") or output("git", "rev-parse", "HEAD"),
        "command": command(program),
    }  # fmt: skip


def keep(path: pathlib.Path, part: str, found: dict, origin: dict) -> None:
    """Put a part into the record at path, with an origin of its own; the other parts stay, with theirs."""
    record = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(record | {part: {"provenance": origin} | found}) + "\n")


def processor() -> str:
    """The processor's name and the number of cores that this process may use."""
    names = [line.split(":")[1].strip() for line in output("cat", "/proc/cpuinfo").splitlines() if "model name" in line]
    return f"{names[0] if names else platform.processor()}, {len(os.sched_getaffinity(0))} cores"


def command(program: str) -> str:
    """How to make the record again; where it was written to is left out."""
    words = sys.argv[1:]
    if "--results" in words:
        at = words.index("--results")
        words = words[:at] + words[at + 2 :]
    return " ".join(["python", program, *words])


def output(*words: str) -> str:
    return subprocess.run(
        words, capture_output=True, text=True, cwd=pathlib.Path(__file__).parent, check=False
    ).stdout.strip()
