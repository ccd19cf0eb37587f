"""Grade one submission: run it shut in, hear what its process tells, and make a row of it.

Nothing here knows of a folder or a table, so that it runs alike on this machine and on a cluster's.
"""

import contextlib
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
MOST_BYTES = 20 * 2**20  # of a notebook
MOST_LINES_BYTES = 2**20  # of what a submission's process may tell


@dataclass(frozen=True)
class Limits:
    """What one submission may take."""

    seconds: int = 300
    cell_seconds: int = 60
    memory_gb: float = 4.0
    processes: int = 8

    @property
    def memory_bytes(self) -> int:
        """The memory limit in bytes."""
        return int(self.memory_gb * 2**30)


@dataclass(frozen=True)
class Job:
    """All that it takes to grade a lab anywhere: the programs and the checks, as text."""

    lab: str
    programs: dict[str, str]
    public: dict[str, str]
    hidden: dict[str, str]
    points: dict[str, list[tuple[bool, float]]]  # of each check of each question: hidden or not, points
    limits: Limits
    container: str | None = None


def job_of(lab: str, limits: Limits, container: str | None = None) -> Job:
    """The job of grading a lab, read from what `make labs` made. Raises FileNotFoundError where that is missing."""
    grader = ROOT / "_build" / "labs" / f"{lab}.zip"
    if not grader.exists():
        raise FileNotFoundError(f"no grader {grader.relative_to(ROOT)}: run `make labs SEED=...` first")
    public = {p.stem: p.read_text() for p in sorted((ROOT / "nf4lab" / "labs" / "public" / lab).glob("q*.py"))}
    with zipfile.ZipFile(grader) as archive:
        names = [name for name in archive.namelist() if name.startswith("tests/")]
        hidden = {Path(name).stem: archive.read(name).decode() for name in sorted(names)}
    programs = {name: (ROOT / "labs" / name).read_text() for name in ("run_submission.py", "confine.py")}
    return Job(lab, programs, public, hidden, points_of(hidden), limits, container)


def points_of(tests: dict[str, str]) -> dict[str, list[tuple[bool, float]]]:
    """Which checks there are, hidden or not, and their points: what no submission has a say in."""
    from otter.test_files.exception_test import ExceptionTestFile

    return {
        question: [(case.hidden, case.points) for case in ExceptionTestFile.from_string(source).test_cases]
        for question, source in tests.items()
    }


def grade_one(name: str, notebook: bytes, job: Job) -> dict:
    """One submission's row and report. Never raises: what goes wrong is the outcome."""
    start = time.monotonic()
    try:
        told, ended, peak_bytes = converse(notebook, job)
    except Exception as error:
        told, ended, peak_bytes = [], f"grader error: {type(error).__name__}: {error}", 0
    row = evaluate(told, ended, job)
    row |= {"student": name, "seconds": round(time.monotonic() - start, 1), "peak_mb": round(peak_bytes / 2**20)}
    return row


def converse(notebook: bytes, job: Job) -> tuple[list[dict], str, int]:
    """Run a submission: what its process told, how it ended ("" as it should), and its peak memory in bytes."""
    if len(notebook) > MOST_BYTES:
        return [], f"unreadable: {len(notebook):,} bytes, more than a notebook may have", 0
    with tempfile.TemporaryDirectory(prefix="nf4lab-", ignore_cleanup_errors=True) as top:
        command, environment = prepare(Path(top).resolve(), notebook, job)
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env=environment, cwd=top, start_new_session=True,
        )  # fmt: skip
        try:
            return listen(process, job)
        finally:
            end(process)


def prepare(top: Path, notebook: bytes, job: Job) -> tuple[list[str], dict[str, str]]:
    """Lay out a submission's folder; the command that runs it, and all that its environment holds."""
    import nf4lab

    package, programs, work = Path(nf4lab.__file__).parent, top / "programs", top / "work"
    for folder in (programs, work / "matplotlib", work / "tmp"):
        folder.mkdir(parents=True)
    for name, text in job.programs.items():
        (programs / name).write_text(text)
    (work / "submission.ipynb").write_bytes(notebook)
    copy_font_list(work / "matplotlib")
    numbers = [str(n) for n in (job.limits.memory_bytes, job.limits.seconds, job.limits.cell_seconds)]
    if job.container:
        return in_container(job, programs, work, package, numbers), dict(os.environ)
    (programs / "nf4lab").symlink_to(package)
    weights = os.environ.get("HF_HOME", os.path.expanduser("~/.cache/huggingface"))
    readable = [str(p) for p in (programs, package, sys.prefix, sys.base_prefix, weights)]
    command = [sys.executable, "-B", "-s", str(programs / "run_submission.py"), str(work), job.lab, *numbers]
    return [*command, *readable], environment_of(work) | {"PATH": os.defpath, "HF_HOME": weights}


def environment_of(work: Path) -> dict[str, str]:
    """The variables that a submission's process sees: none of the instructor's."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return threads | {
        "HOME": str(work), "TMPDIR": str(work / "tmp"), "IPYTHONDIR": str(work / "tmp"), "MPLBACKEND": "Agg",
        "MPLCONFIGDIR": str(work / "matplotlib"), "HF_HUB_OFFLINE": "1", "LANG": "C.UTF-8",
    }  # fmt: skip


def copy_font_list(folder: Path) -> None:
    """Spare each submission the search for fonts."""
    import matplotlib

    for path in Path(matplotlib.get_cachedir()).glob("fontlist-*.json"):
        shutil.copy(path, folder)


def in_container(job: Job, programs: Path, work: Path, package: Path, numbers: list[str]) -> list[str]:
    """The command that runs a submission in a container: no network, a root that cannot be written to."""
    engine = next((found for found in map(shutil.which, ("podman", "docker")) if found), None)
    if engine is None:
        raise FileNotFoundError("--container needs podman or docker; neither is installed")
    here = environment_of(Path("/work"))
    return [
        engine, "run", "--rm", "-i", "--network=none", "--read-only", "--tmpfs=/tmp",
        "--cap-drop=ALL", "--security-opt=no-new-privileges",
        f"--memory={job.limits.memory_bytes}", f"--pids-limit={16 * job.limits.processes}",
        f"--volume={programs}:/programs:ro", f"--volume={package}:/programs/nf4lab:ro", f"--volume={work}:/work",
        *(f"--env={name}={value}" for name, value in here.items()), job.container,
        "python", "-B", "-s", "/programs/run_submission.py", "/work", job.lab, *numbers, "/programs", "/usr/local",
    ]  # fmt: skip


def listen(process: subprocess.Popen, job: Job) -> tuple[list[dict], str, int]:
    """Hear the process out, hand it the checks when it is ready for them, and watch its limits."""
    deadline, peak_bytes, heard, told = time.monotonic() + job.limits.seconds, 0, b"", []
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while True:
            n_processes, used_bytes = usage(process.pid)
            peak_bytes = max(peak_bytes, used_bytes)
            for over, ended in (
                (time.monotonic() > deadline, f"time limit ({job.limits.seconds} s)"),
                (used_bytes > job.limits.memory_bytes, f"memory limit ({job.limits.memory_gb:g} GB)"),
                (n_processes > job.limits.processes + 2, f"more than {job.limits.processes} processes"),
                (len(heard) > MOST_LINES_BYTES, "told the grader too much"),
            ):
                if over:
                    return told, ended, peak_bytes
            if not selector.select(0.1):
                continue
            piece = process.stdout.read1(2**16)
            *lines, heard = (heard + piece).split(b"\n")
            try:
                for line in lines:
                    told.append(dict(json.loads(line)))
                    answer(process, told[-1], job)
            except (ValueError, TypeError, RecursionError, BrokenPipeError):
                return told, "told the grader what cannot be read", peak_bytes
            if not piece:
                return told, "" if told and told[-1].get("done") else "ended itself", peak_bytes
            if sum(map(len, told)) > 10_000:
                return told, "told the grader too much", peak_bytes


def answer(process: subprocess.Popen, told: dict, job: Job) -> None:
    """Hand over the public checks after the cells, and the hidden ones after the public messages are here."""
    tests = job.public if told.get("ran") else job.hidden if told.get("public") else None
    if tests is not None:
        process.stdin.write(json.dumps(tests).encode() + b"\n")
        process.stdin.flush()


def usage(pid: int) -> tuple[int, int]:
    """How many processes belong to this one, itself included, and the memory they hold in bytes."""
    try:
        family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0, 0
    used = 0
    for member in family:
        try:
            used += member.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return len(family), used


def end(process: subprocess.Popen) -> None:
    """End a submission's process and all that came from it."""
    try:
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    for pipe in (process.stdin, process.stdout):
        try:
            pipe.close()
        except BrokenPipeError:
            continue
    process.wait()


def evaluate(told: list[dict], ended: str, job: Job) -> dict:
    """The row: points by the grader's own list of checks, each counted once; the outcome and notes in words."""
    checks = {}
    for line in told:
        key = (line.get("question"), line.get("check"), line.get("hidden"))
        if line.get("question") is not None and key not in checks:
            checks[key] = line
    scores, report = {}, []
    for question, cases in job.points.items():
        scores[question] = 0.0
        public_before = 0
        for number, (hidden, points) in enumerate(cases):
            position = number if hidden else public_before
            public_before += not hidden
            line = checks.get((question, position, hidden), {})
            passed = line.get("passed") is True
            scores[question] += points * passed
            report.append({
                "question": question, "hidden": hidden, "points": points, "passed": passed,
                "name": str(line.get("name", "")), "message": str(line.get("message", "not run")),
            })  # fmt: skip
    errors = [f"cell {line['cell']}: {line['error']}" for line in told if "cell" in line and "error" in line]
    return {
        "score": sum(scores.values()), "possible": sum(p for cases in job.points.values() for _, p in cases),
        "questions": scores, "outcome": outcome(told, ended, errors), "errors": errors,
        "notes": notes(told), "checks": report, "layers": next((t["layers"] for t in told if "layers" in t), []),
    }  # fmt: skip


def outcome(told: list[dict], ended: str, errors: list[str]) -> str:
    """How grading ended, in a few words."""
    unreadable = next((line["unreadable"] for line in told if "unreadable" in line), None)
    if unreadable:
        return f"unreadable: {unreadable}"
    if ended:
        return ended
    return f"graded; {len(errors)} cell{'s' * (len(errors) > 1)} failed" if errors else "graded"


def notes(told: list[dict]) -> list[str]:
    """What an instructor should look at."""
    found = [f"tried to {line['refused']}" for line in told if "refused" in line]
    found += [f"replaced {name}" for line in told for name in line.get("replaced", [])]
    found += [f"uses {name}: read the notebook" for line in told for name in line.get("suspect", [])]
    return found + [f"defines {name} twice: the last one counts" for line in told for name in line.get("twice", [])]
