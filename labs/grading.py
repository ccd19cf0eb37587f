"""Grade one submission: run it shut in, hear what its process tells, and make a row of it.

Nothing here knows of a folder or a table, so that it runs alike on this machine and on a cluster's.
"""

import atexit
import contextlib
import json
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import psutil

ROOT = Path(__file__).resolve().parents[1]
MOST_BYTES = 20 * 2**20  # of a notebook
PARTS = {"unreadable": 0, "cell": 0, "ran": 0, "question": 1, "public": 1, "done": 2}  # of what is told, and its phase
MOST_LINES_BYTES = 2**20  # of what a submission's process may tell


@dataclass(frozen=True)
class Limits:
    """What one submission may take. Each of its processes meets the memory limit itself; all together are watched."""

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
    every: dict[str, str]
    points: dict[str, list[tuple[bool, float]]]  # of each check of each question: hidden or not, points
    limits: Limits
    container: str | None = None


def job_of(lab: str, limits: Limits, container: str | None = None, grader: Path | None = None) -> Job:
    """The job of grading a lab, read from what `make labs` made. Raises FileNotFoundError where that is missing."""
    grader = grader or ROOT / "_build" / "labs" / f"{lab}.zip"
    if not grader.exists():
        raise FileNotFoundError(f"there is no grader {grader}: run `make labs SEED=...` first")
    public = {p.stem: p.read_text() for p in sorted((ROOT / "nf4lab" / "labs" / "public" / lab).glob("q*.py"))}
    with zipfile.ZipFile(grader) as archive:
        names = [name for name in archive.namelist() if name.startswith("tests/")]
        every = {Path(name).stem: archive.read(name).decode() for name in sorted(names)}
    programs = {name: (ROOT / "labs" / name).read_text() for name in ("run_submission.py", "confine.py")}
    return Job(lab, programs, public, every, points_of(every), limits, container)


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
    try:
        row = evaluate(told, ended, job)
    except (TypeError, KeyError, AttributeError, ValueError):  # lines that run_submission.py does not write
        row = evaluate([], "told the grader what cannot be read", job)
    row |= {"student": name, "seconds": round(time.monotonic() - start, 1), "peak_mb": round(peak_bytes / 2**20)}
    return row


def converse(notebook: bytes, job: Job) -> tuple[list[dict], str, int]:
    """Run a submission: what its process told, how it ended ("" as it should), and its peak memory in bytes."""
    if len(notebook) > MOST_BYTES:
        return [], f"unreadable: {len(notebook):,} bytes, more than a notebook may have", 0
    with tempfile.TemporaryDirectory(prefix="nf4lab-", ignore_cleanup_errors=True) as top:
        work = Path(top).resolve() / "work"
        (work / "tmp").mkdir(parents=True)
        (work / "submission.ipynb").write_bytes(notebook)
        running = start_in_container(job, work) if job.container else server_of(job).start(job, work)
        try:
            return listen(running, job)
        finally:
            end(running)


@dataclass
class Running:
    """A submission that runs: its process, and the two ends of the line to it."""

    pid: int
    to: BinaryIO
    back: BinaryIO


class Server:
    """A process with everything loaded, a fork of which runs each submission: run_submission.py, `serve`."""

    def __init__(self, job: Job):
        import nf4lab

        self.programs, self.lock = Path(tempfile.mkdtemp(prefix="nf4lab-")).resolve(), threading.Lock()
        self.text = job.programs
        atexit.register(shutil.rmtree, self.programs, ignore_errors=True)
        for name, text in job.programs.items():
            (self.programs / name).write_text(text)
        package = Path(nf4lab.__file__).resolve().parent
        (self.programs / "nf4lab").symlink_to(package)
        weights = os.environ.get("HF_HOME", os.path.expanduser("~/.cache/huggingface"))
        self.readable = [str(path) for path in (self.programs, package, sys.prefix, sys.base_prefix, weights)]
        self.environment = environment_of(self.programs) | {"PATH": os.defpath, "HF_HOME": weights}
        self.line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        task = json.dumps({"lab": job.lab, "readable": self.readable})
        command = [sys.executable, "-B", "-s", str(self.programs / "run_submission.py"), "serve", task]
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env=self.environment, cwd=self.programs, start_new_session=True,
        )  # fmt: skip
        theirs.close()

    def start(self, job: Job, work: Path) -> Running:
        """Have the submission in `work` run."""
        task = task_of(job, work, self.readable) | {"environment": self.environment | environment_of(work)}
        (their_in, to), (back, their_out) = os.pipe(), os.pipe()
        try:
            with self.lock:
                socket.send_fds(self.line, [json.dumps(task).encode()], [their_in, their_out])
                pid = int(self.line.recv(64) or 0)
        finally:
            os.close(their_in)
            os.close(their_out)
        if not pid:
            raise ChildProcessError("the process that runs submissions has ended")
        return Running(pid, os.fdopen(to, "wb"), os.fdopen(back, "rb"))


SERVERS: dict[str, Server] = {}
STARTING = threading.Lock()


def server_of(job: Job) -> Server:
    """The server of the job's lab on this machine; started where there is none, or where it has ended."""
    with STARTING:
        server = SERVERS.get(job.lab)
        if server is None or server.process.poll() is not None or server.text != job.programs:
            SERVERS[job.lab] = server = Server(job)
        return server


def task_of(job: Job, work: Path, readable: list[str]) -> dict:
    """What run_submission.py is told about a submission. Of processor time it gets more than of the grader's clock."""
    limits = job.limits
    return {
        "folder": str(work), "lab": job.lab, "readable": readable, "memory_bytes": limits.memory_bytes,
        "seconds": limits.seconds + 10, "cell_seconds": limits.cell_seconds,
    }  # fmt: skip


def environment_of(work: Path) -> dict[str, str]:
    """The variables that a submission's process sees: none of the instructor's."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return threads | {
        "HOME": str(work), "TMPDIR": str(work / "tmp"), "IPYTHONDIR": str(work / "tmp"), "MPLBACKEND": "Agg",
        "HF_HUB_OFFLINE": "1", "LANG": "C.UTF-8",
        **dict.fromkeys(("MPLCONFIGDIR", "NUMBA_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"), str(work / "tmp")),
    }  # fmt: skip


def start_in_container(job: Job, work: Path) -> Running:
    """Run the submission in a container: no network, a root that cannot be written to. The image brings nf4lab."""
    engine = next((found for found in map(shutil.which, ("podman", "docker")) if found), None)
    if engine is None:
        raise FileNotFoundError("--container needs podman or docker; neither is installed")
    programs, task = work.with_name("programs"), task_of(job, Path("/work"), ["/programs", "/usr/local"])
    programs.mkdir()
    for folder in (work, work / "tmp"):  # the container's user is another one; what is above lets nobody else in
        folder.chmod(0o777)
    for name, text in job.programs.items():
        (programs / name).write_text(text)
    command = [
        engine, "run", "--rm", "-i", "--network=none", "--read-only", "--tmpfs=/tmp",
        "--cap-drop=ALL", "--security-opt=no-new-privileges", "--security-opt=label=disable",
        f"--memory={job.limits.memory_bytes}", f"--pids-limit={16 * job.limits.processes}",
        f"--volume={programs}:/programs:ro", f"--volume={work}:/work",
        *(f"--env={name}={value}" for name, value in environment_of(Path("/work")).items()),
        job.container, "python", "-B", "-s", "/programs/run_submission.py", "alone", json.dumps(task),
    ]  # fmt: skip
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
    )
    return Running(process.pid, process.stdin, process.stdout)


def listen(running: Running, job: Job) -> tuple[list[dict], str, int]:
    """Hear the process out, hand it the checks when it is ready for them, and watch its limits."""
    deadline, peak_bytes, heard, told = time.monotonic() + job.limits.seconds, 0, b"", []
    with selectors.DefaultSelector() as selector:
        selector.register(running.back, selectors.EVENT_READ)
        while True:
            n_processes, used_bytes = usage(running.pid, job.limits.processes + 2)
            peak_bytes = max(peak_bytes, used_bytes)
            for over, ended in (
                (n_processes > job.limits.processes + 2, f"more than {job.limits.processes} processes"),
                (time.monotonic() > deadline, f"time limit ({job.limits.seconds} s)"),
                (used_bytes > 1.25 * job.limits.memory_bytes, f"memory limit ({job.limits.memory_gb:g} GB)"),
                (len(heard) > MOST_LINES_BYTES, "told the grader too much"),
            ):
                if over:
                    return told, ended, peak_bytes
            if not selector.select(0.1):
                continue
            piece = running.back.read1(2**16)
            *lines, heard = (heard + piece).split(b"\n")
            try:
                for line in lines:
                    told.append(dict(json.loads(line)))
                    answer(running, told[-1], job)
            except (ValueError, TypeError, RecursionError, BrokenPipeError):
                return told, "told the grader what cannot be read", peak_bytes
            if not piece:
                return told, "" if told and told[-1].get("done") else "ended itself", peak_bytes
            if sum(map(len, told)) > 10_000:
                return told, "told the grader too much", peak_bytes


def answer(running: Running, told: dict, job: Job) -> None:
    """Hand over the public checks after the cells, and the hidden ones after the public messages are here."""
    tests = job.public if told.get("ran") else job.every if told.get("public") else None
    if tests is not None:
        running.to.write(json.dumps(tests).encode() + b"\n")
        running.to.flush()


def family(pid: int) -> list[psutil.Process]:
    """The process and all that came from it."""
    try:
        return [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def usage(pid: int, most: int) -> tuple[int, int]:
    """How many processes belong to this one, itself included, and the memory they hold in bytes.

    What a fork shares with others counts in shares, where the system can tell (Linux). That takes a while for each,
    so the memory of more processes than `most` is not looked at.
    """
    processes, used = family(pid), 0
    for process in processes if len(processes) <= most else ():
        with contextlib.suppress(psutil.NoSuchProcess):
            try:
                used += process.memory_full_info().pss
            except (psutil.AccessDenied, AttributeError):
                used += process.memory_info().rss
    return len(processes), used


def end(running: Running) -> None:
    """End a submission's process and all that came from it."""
    processes = family(running.pid)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(running.pid, signal.SIGKILL)
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    for pipe in (running.to, running.back):
        with contextlib.suppress(BrokenPipeError):
            pipe.close()


def evaluate(told: list[dict], ended: str, job: Job) -> dict:
    """The row: points by the grader's own list of checks; the outcome and notes in words."""
    if not in_order(told):
        told, ended = [line for line in told if "suspect" in line], "told the grader what its own process does not"
    checks = {(line["question"], line["check"], line["hidden"]): line for line in told if "question" in line}
    scores, report = dict.fromkeys(job.points, 0.0), []
    for question, cases in job.points.items():
        for number, (hidden, points) in enumerate(cases):
            position = number if hidden else sum(not earlier for earlier, _ in cases[:number])
            line = checks.get((question, position, hidden), {})
            passed = line.get("passed") is True
            scores[question] += points * passed
            report.append({
                "question": question, "hidden": hidden, "points": points, "passed": passed,
                "name": str(line.get("name", "")), "message": str(line.get("message", "not run")),
            })  # fmt: skip
    errors = [f"cell {line['cell']}: {line['error']}" for line in told if "cell" in line]
    return {
        "score": sum(scores.values()), "possible": sum(p for cases in job.points.values() for _, p in cases),
        "questions": scores, "outcome": outcome(told, ended, errors), "errors": errors,
        "notes": notes(told), "checks": report, "layers": next((t["layers"] for t in told if "layers" in t), []),
    }  # fmt: skip


def in_order(told: list[dict]) -> bool:
    """Whether the lines came as run_submission.py writes them: cells, public checks, hidden checks, each line once."""
    phase, seen = 0, set()
    for line in told:
        part = next((name for name in PARTS if name in line), None)
        key = (part, line.get("cell"), line.get("question"), line.get("check"), line.get("hidden"))
        expected = PARTS.get(part) if part != "question" else 2 if line.get("hidden") else 1
        if part and (expected != phase or key in seen or (part == "question" and not _is_check(line))):
            return False
        seen.add(key)
        phase += part in ("ran", "public", "done")
    return True


def _is_check(line: dict) -> bool:
    return isinstance(line.get("question"), str) and type(line.get("check")) is int and type(line.get("hidden")) is bool


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
    found = [f"broke off: {line['broken']}" for line in told if "broken" in line]
    found += [f"tried to {line['refused']}" for line in told if "refused" in line]
    found += [f"replaced {name}" for line in told for name in line.get("replaced", [])]
    found += [f"uses {name}: read the notebook" for line in told for name in line.get("suspect", [])]
    return found + [f"defines {name} twice: the last one counts" for line in told for name in line.get("twice", [])]
