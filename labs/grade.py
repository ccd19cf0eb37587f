"""Grade a folder or zip of submissions: `make grade LAB=2 IN=folder OUT=grades.csv`.

Each notebook runs in processes of its own, shut in, and only hands over values; they are compared here (judge.py).
Whatever a submission does, it costs one row. Beside OUT come

    OUT-report.jsonl         for the instructor: all of it, row by row as it is known; a batch that was stopped goes on
    OUT-feedback/NAME.html   what a student may see: points, own errors, messages of the checks in the notebook
    OUT-canvas.csv, …        with --format and --roster: what the learning system imports

The table is the same whether the work is done here, in containers or on a Dask cluster.
"""

import argparse
import hashlib
import io
import os
import signal
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import gradebooks
import intake
import sandbox
import selftest
import tables
from intake import Submission
from judge import Job, grade_one, job_of, not_graded
from sandbox import Limits

from nf4lab.__main__ import Stopped, listen
from nf4lab.progress import progress_bar


def grade_here(files: dict[str, bytes], job: Job, jobs: int):
    """Rows as they come, from processes on this machine."""
    pool = ThreadPoolExecutor(jobs)
    try:
        for future in as_completed([pool.submit(grade_one, name, data, job) for name, data in files.items()]):
            yield future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # nobody waits for the rest where a signal ends the batch


def grade_on_cluster(files: dict[str, bytes], job: Job, address: str):
    """Rows as they come, from a Dask cluster. Its workers need this environment; they are sent these programs."""
    import distributed

    with distributed.Client(address) as client, zipped_programs() as programs:
        client.upload_file(programs)
        shared = client.scatter(job, broadcast=True)
        futures = {client.submit(grade_one, name, data, shared, pure=False): name for name, data in files.items()}
        for future in distributed.as_completed(futures):
            error = future.exception()  # the cluster's: grade_one raises none
            yield not_graded(futures[future], job, f"{type(error).__name__}: {error}") if error else future.result()


class zipped_programs:
    """What grades, as a zip that a worker imports from."""

    def __enter__(self) -> str:
        import tempfile

        here, self.folder = Path(__file__).resolve().parent, tempfile.TemporaryDirectory()
        path, data = Path(self.folder.name) / "nf4lab_grading.zip", io.BytesIO()
        with zipfile.ZipFile(data, "w") as archive:
            for file in (here / "judge.py", here / "sandbox.py", *sorted((here / "inside").glob("*.py"))):
                archive.write(file, file.relative_to(here))
        path.write_bytes(data.getvalue())
        return str(path)

    def __exit__(self, *error):
        self.folder.cleanup()


def rows_of(found: dict[str, Submission], job: Job, work, report: tables.Report, pages: Path) -> list[dict]:
    """All rows: those of an earlier run, and new ones, each saved as it comes.

    What the grader has failed on is tried once more at the end, and again by the next run.
    """
    digests = {name: tables.digest(name, one.data) for name, one in found.items()}
    done = report.done()
    rows = [_as_handed_in(done[digests[name]], one) for name, one in found.items() if digests[name] in done]
    files = {name: one.data for name, one in found.items() if digests[name] not in done and one.data is not None}
    for name, one in found.items():
        if one.data is None and digests[name] not in done:
            row = grade_one(name, b"", job) | {"outcome": f"unreadable: no notebook among {', '.join(one.files)[:200]}"}
            rows.append(_saved(row, one, digests[name], report))
    new = {}
    for what in (job.lab, "once more"):
        with progress_bar(what, len(files), "notebook") as bar:
            for row in work(files) if files else ():
                new[row["student"]] = _saved(row, found[row["student"]], digests[row["student"]], report)
                bar.update(1)
        files = {name: data for name, data in files.items() if not new[name]["graded"]}
        if not files:
            break
    rows += new.values()
    for row in rows:
        tables.write_page(row, pages, job.lab)
    return sorted(rows, key=lambda row: row["student"])


def _saved(row: dict, one: Submission, digest: str, report: tables.Report) -> dict:
    row = _as_handed_in(row | {"digest": digest}, one)
    report.add(row)
    return row


def _as_handed_in(row: dict, one: Submission) -> dict:
    """The row with what is known of its files now, a roster's word on who is late included."""
    own = [note for note in row["notes"] if note not in row.get("handed_in", ())]
    return row | {"late": one.late, "handed_in": one.notes, "notes": [*one.notes, *own]}


def stamp(job: Job) -> str:
    """What a row depends on besides the notebook: lab, checks with their seed, programs."""
    text = repr((job.lab, job.checks, job.programs, job.container))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def arguments_of(arguments: list[str] | None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lab", type=lambda text: text if text.startswith("lab") else f"lab{text}", help="2, or lab2")
    parser.add_argument("folder", type=Path, help="where the submissions are: a folder, or a zip as exported")
    parser.add_argument("table", type=Path, help="the CSV to write")
    parser.add_argument(
        "--roster", type=Path, help="the students: Canvas' gradebook export, Moodle's worksheet, any CSV"
    )
    parser.add_argument(
        "--format", choices=gradebooks.FORMATS, default="csv", help="also write what this system imports"
    )
    parser.add_argument("--assignment", help="the assignment's column there (default: Lab N)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="submissions at once (default: all cores)")
    for name, kind in (("seconds", int), ("cell_seconds", int), ("question_seconds", int), ("memory_gb", float)):
        default = getattr(Limits, name)
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=kind, default=default, help=f"limit (default {default})")
    parser.add_argument("--grader", type=Path, help="the grader (default: what `make labs` wrote to _build/labs)")
    parser.add_argument("--container", metavar="IMAGE", help="run each submission in a container of this image")
    parser.add_argument("--scheduler", metavar="ADDRESS", help="run on the Dask cluster at this address")
    parser.add_argument("--no-self-test", action="store_true", help="do not grade the master and the handout first")
    return parser, parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Grade. Returns the exit status: 1 where the grader has failed on some, 2 where it can't grade, 128 + a signal."""
    before = listen()
    try:
        return grade(*arguments_of(arguments))
    except KeyboardInterrupt:
        return _stopped(signal.SIGINT)
    except Stopped as stopped:
        return _stopped(*stopped.args)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stopped(number: int) -> int:
    sandbox.end_all()
    name = signal.Signals(number).name
    print(f"stopped by {name}; rows are saved, so the same command goes on from here", file=sys.stderr)
    return 128 + number


def grade(parser: argparse.ArgumentParser, given: argparse.Namespace) -> int:
    """Grade what the command line names; the exit status."""
    limits = Limits(given.seconds, given.cell_seconds, given.question_seconds, given.memory_gb)
    try:
        job = job_of(given.lab, limits, given.container, given.grader)
        if given.container:
            sandbox.engine()
        roster = intake.read_roster(given.roster) if given.roster else None
        found = intake.submissions(given.folder)
        listed = roster.find_all(found) if roster else {}
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        parser.error(str(error))
    if given.format != "csv" and roster is None:
        parser.error(f"--format {given.format} needs --roster: the students as that system exports them")
    if roster:
        roster.mark_late(found, listed)
    print(f"{given.lab}, seed {job.seed}: {len(found)} students")
    if not given.no_self_test and (wrong := selftest.failures(job)):
        print("self-test failed, so nothing was graded:", *wrong, sep="\n  ")
        return 2
    start = time.monotonic()
    given.table.parent.mkdir(parents=True, exist_ok=True)
    report = tables.Report(given.table.with_name(f"{given.table.stem}-report.jsonl"), stamp(job))
    work = lambda files: (  # noqa: E731
        grade_on_cluster(files, job, given.scheduler) if given.scheduler else grade_here(files, job, given.jobs)
    )
    rows = rows_of(found, job, work, report, given.table.with_name(f"{given.table.stem}-feedback"))
    tables.write_table(rows, given.table)
    for row in rows:
        row["listed"] = listed.get(row["student"])
    summarize(rows, given.table, time.monotonic() - start)
    if roster:
        about_roster(rows, roster)
    if given.format != "csv":
        target = given.table.with_name(f"{given.table.stem}-{given.format}.csv")
        try:
            gradebooks.write(given.format, rows, roster, target, given.assignment or f"Lab {given.lab[3:]}")
        except ValueError as error:
            parser.error(str(error))
        print(f"for {given.format}: {target}")
    left = [row["student"] for row in rows if not row["graded"]]
    if left:
        print(f"NOT graded ({len(left)}): {tables.clean('; '.join(left))}. The same command tries them again")
    return 1 if left else 0


def summarize(rows: list[dict], table: Path, seconds: float) -> None:
    """Say what was done, what held, and which rows want a look."""
    layers = sorted({layer for row in rows for layer in row["layers"]})
    peak_mb = max(row["peak_mb"] for row in rows)
    print(f"{len(rows)} submissions in {seconds:.0f} s, at most {peak_mb} MB each; table in {table}")
    print(f"shut in by: {', '.join(layers) or 'nothing'}; see labs/README.md for what that does not stop")
    for row in rows:
        if row["notes"] or not row["outcome"].startswith("graded"):
            print(
                f"  look at {tables.clean(row['student'])}: {tables.clean('; '.join([row['outcome'], *row['notes']]))}"
            )


def about_roster(rows: list[dict], roster: intake.Roster) -> None:
    """Say who is missing, and who is not listed."""
    listed = [id(row["listed"]) for row in rows if row["listed"]]
    missing = [roster.name(row) for row in roster.rows if id(row) not in listed]
    unknown = [row["student"] for row in rows if not row["listed"]]
    print(f"not handed in ({len(missing)}): {tables.clean('; '.join(missing)) or 'nobody'}")
    if unknown:
        print(f"not in the roster ({len(unknown)}): {tables.clean('; '.join(unknown))}")


if __name__ == "__main__":
    sys.exit(main())
