"""A hundred submissions to lab 1, right, wrong and hostile, graded in one go; then again on a Dask cluster.

    python tests/grade_a_hundred.py             every row must be as expected; prints wall time and peak memory
    python tests/grade_a_hundred.py --cluster   the same on a local cluster of two workers; both tables must be equal
    python tests/grade_a_hundred.py --correct lab4   a hundred right ones: they must fit four minutes of two cores

Too long for every test run; tests/test_grading.py does the same with fewer.
"""

import argparse
import re
import resource
import socket
import sys
import tempfile
import time
from pathlib import Path

import lab_submissions
from lab_submissions import ROOT, as_bytes, solved, stripped, with_answer
from tqdm import tqdm

sys.path.insert(0, str(ROOT / "labs"))
import grade
import judge
import make_labs
import sandbox
import tables

MOST_SECONDS = 2 * 240  # of processor time: four minutes of two cores
LIMITS = sandbox.Limits(seconds=120, cell_seconds=5, question_seconds=20, memory_gb=2)


def hundred(outside: Path, port: int) -> dict[str, tuple[bytes, float, str, str]]:
    """Every hostile kind, every mistake of lab 1, and right ones to make a hundred, with what to expect of each."""
    batch = lab_submissions.hostile("lab1", outside, port)
    for name, (answer, lost, _) in lab_submissions.mistakes("lab1").items():
        batch[name.replace("/", " over ")] = (as_bytes(with_answer("lab1", answer)), 20 - lost, "^graded", "^$")
    for i in range(100 - len(batch)):
        notebook = stripped(solved("lab1")) if i % 3 else as_bytes(solved("lab1"))
        batch[f"right {i:02d}"] = (notebook, 20, "^graded$", "^$")
    return batch


def wrong(rows: list[dict], batch: dict) -> list[str]:
    """The rows that are not as expected."""
    return [
        f"{row['student']}: {row['score']} {row['outcome']} {row['notes']}"
        for row in rows
        for _, score, outcome, notes in [batch[row["student"]]]
        if not (row["score"] == score and re.search(outcome, row["outcome"]))
        or not re.search(notes, "; ".join(row["notes"]))
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cluster", action="store_true", help="grade on a local Dask cluster as well")
    parser.add_argument("--correct", metavar="LAB", help="grade a hundred right submissions of this lab instead")
    given = parser.parse_args()
    if given.correct:
        return correct(given.correct)
    cluster = given.cluster
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as server:
        folder = Path(folder)
        make_labs.make("lab1", seed=2026, check=True, grader=folder / "lab1.zip")
        job = judge.job_of("lab1", LIMITS, grader=folder / "lab1.zip")
        batch = hundred(folder / "outside", server.getsockname()[1])
        files = {name: submission[0] for name, submission in batch.items()}
        failures = run("here", grade.grade_here(files, job, 2), batch, folder)
        if cluster:
            import distributed

            workers = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
            with distributed.LocalCluster(**workers) as there:
                work = grade.grade_on_cluster(files, job, there.scheduler_address)
                failures += run("cluster", work, batch, folder)
            lines = [(folder / name).read_text().splitlines() for name in ("here.csv", "cluster.csv")]
            different = [f"here {one}, cluster {two}" for one, two in zip(*lines, strict=True) if one != two]
            print("the tables are", "NOT equal" if different else "equal")
            failures += different
        if (folder / "outside").exists():
            failures.append("a submission wrote outside its folder")
    print("\n".join(failures) or "every row is as expected")
    return 1 if failures else 0


def correct(lab: str) -> int:
    """A hundred right submissions: what they take, and whether all have full marks."""
    with tempfile.TemporaryDirectory() as folder:
        make_labs.make(lab, seed=2026, check=True, grader=Path(folder) / "grader.zip")
        job = judge.job_of(lab, sandbox.Limits(), grader=Path(folder) / "grader.zip")
        files = {f"right {i:02d}": as_bytes(solved(lab)) for i in range(100)}
        start, before = time.monotonic(), time.process_time()
        rows = list(tqdm(grade.grade_here(files, job, 2), total=len(files), unit="notebook", desc=lab))
    grader, inside = time.process_time() - before, sum(row["cpu_s"] for row in rows)
    print(
        f"{lab}: {len(rows)} right submissions in {time.monotonic() - start:.0f} s; processor time {inside:.0f} s for"
    )
    print(f"  theirs and {grader:.0f} s for the grader's comparing: {(inside + grader) / 2:.0f} s of two cores")
    failures = [f"{row['student']}: {row['score']} {row['outcome']}" for row in rows if row["score"] != row["possible"]]
    if inside + grader > MOST_SECONDS:
        failures.append(f"more than {MOST_SECONDS} s of processor time")
    print("\n".join(failures) or "all have full marks, in time")
    return 1 if failures else 0


def run(where: str, work, batch: dict, folder: Path) -> list[str]:
    """Grade the batch, write its table, say what it took; the rows that are not as expected."""
    start = time.monotonic()
    rows = sorted(tqdm(work, total=len(batch), unit="notebook", desc=where), key=lambda row: row["student"])
    seconds, own = time.monotonic() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    tables.write_table(rows, folder / f"{where}.csv")
    peaks = sorted(row["peak_mb"] for row in rows)
    print(f"{where}: {len(rows)} submissions in {seconds:.0f} s; the grader itself took {own:.0f} MB")
    print(f"  peak memory of a submission: median {peaks[len(peaks) // 2]} MB, largest {peaks[-1]} MB")
    return wrong(rows, batch)


if __name__ == "__main__":
    sys.exit(main())
