"""Grade a folder of submissions into a table: `make grade LAB=2 IN=folder OUT=grades.csv`.

Each notebook runs in a process of its own, shut in (confine.py), with a time and a memory limit, and gets no hidden
check before its own cells have run (run_submission.py). Whatever it does, it costs one row. Beside OUT come

    OUT-feedback/NAME.html   what a student may see: points, own errors, messages of the public checks
    OUT-report.jsonl         for the instructor: all of it, messages of the hidden checks included

The table is the same whether the work is done here, in containers or on a Dask cluster.
"""

import argparse
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import grading
import tables
from grading import Job, Limits, grade_one, job_of
from tqdm import tqdm


def submissions(folder: Path) -> dict[str, bytes]:
    """The files to grade, by name. Raises FileNotFoundError where there are none."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    if not files:
        raise FileNotFoundError(f"no submissions in {folder}")
    stems = [path.stem for path in files]
    return {path.stem if stems.count(path.stem) == 1 else path.name: path.read_bytes() for path in files}


def grade_here(files: dict[str, bytes], job: Job, jobs: int):
    """Rows as they come, from processes on this machine."""
    with ThreadPoolExecutor(jobs) as pool:
        for future in as_completed([pool.submit(grade_one, name, data, job) for name, data in files.items()]):
            yield future.result()


def grade_on_cluster(files: dict[str, bytes], job: Job, address: str):
    """Rows as they come, from a Dask cluster. Its workers need this environment, not this repository's labs."""
    import cloudpickle
    import distributed

    cloudpickle.register_pickle_by_value(grading)
    with distributed.Client(address) as client:
        shared = client.scatter(job, broadcast=True)
        futures = [client.submit(grade_one, name, data, shared, pure=False) for name, data in files.items()]
        for future in distributed.as_completed(futures):
            yield future.result()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lab", type=lambda text: text if text.startswith("lab") else f"lab{text}", help="2, or lab2")
    parser.add_argument("folder", type=Path, help="where the submissions are, one notebook a student")
    parser.add_argument("table", type=Path, help="the CSV to write")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="submissions at once (default: all cores)")
    for name, kind in (("seconds", int), ("cell_seconds", int), ("memory_gb", float)):
        default = getattr(Limits, name)
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=kind, default=default, help=f"limit (default {default})"
        )
    parser.add_argument("--grader", type=Path, help="the grader (default: what `make labs` wrote to _build/labs)")
    parser.add_argument("--container", metavar="IMAGE", help="run each submission in a container of this image")
    parser.add_argument("--scheduler", metavar="ADDRESS", help="run on the Dask cluster at this address")
    given = parser.parse_args(arguments)
    try:
        job = job_of(
            given.lab, Limits(given.seconds, given.cell_seconds, given.memory_gb), given.container, given.grader
        )
        files = submissions(given.folder)
    except FileNotFoundError as error:
        parser.error(str(error))
    start = time.monotonic()
    work = grade_on_cluster(files, job, given.scheduler) if given.scheduler else grade_here(files, job, given.jobs)
    rows = sorted(tqdm(work, total=len(files), unit="notebook", desc=given.lab), key=lambda row: row["student"])
    tables.write_all(rows, given.table, given.lab)
    summarize(rows, given.table, time.monotonic() - start)
    return 0


def summarize(rows: list[dict], table: Path, seconds: float) -> None:
    """Say what was done, what held, and which rows want a look."""
    layers = sorted({layer for row in rows for layer in row["layers"]})
    peak_mb = max(row["peak_mb"] for row in rows)
    print(f"{len(rows)} submissions in {seconds:.0f} s, at most {peak_mb} MB each; table in {table}")
    print(f"shut in by: {', '.join(layers) or 'nothing'}; see labs/README.md for what that does not stop")
    for row in rows:
        if row["notes"] or not row["outcome"].startswith("graded"):
            print(f"  look at {row['student']}: {'; '.join([row['outcome'], *row['notes']])}")


if __name__ == "__main__":
    sys.exit(main())
