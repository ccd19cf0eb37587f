"""Shut a process in before it runs a stranger's code: no network, own folder only, bounded memory.

Three layers, each used where the system has it. `confine` says which of them hold:

    limits      setrlimit: memory, processor time, size and number of files (Linux, macOS)
    namespaces  no network interface, and an own process tree that dies as a whole (Linux)
    landlock    the kernel refuses files outside the allowed folders, TCP connections and signals to others (Linux)

On top, `watch` installs a Python audit hook. It refuses the same in the interpreter, on every system, and tells what
was tried; code that calls C can get around it, which is why it is not called a layer. Standard library only.
"""

import contextlib
import ctypes
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path

NEWUSER, NEWPID, NEWNET = 0x10000000, 0x20000000, 0x40000000  # of unshare(2)
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446
EXECUTE, WRITE, READ, LIST, TRUNCATE, IOCTL = (1 << bit for bit in (0, 1, 2, 3, 14, 15))
RIGHTS_BY_VERSION = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}  # how many of the file rights a kernel's Landlock knows
SYSTEM = ("/usr", "/lib", "/lib64", "/bin", "/etc", "/proc", "/sys", "/opt", "/System", "/Library")
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/shm")
OPENED_FOR_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = {
    "os.remove", "os.rmdir", "os.mkdir", "os.rename", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown",
    "os.utime", "shutil.rmtree", "shutil.move",
}  # fmt: skip
NETWORK = {"socket.connect", "socket.bind", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname"}
PROGRAMS = {
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.fork",
    "os.forkpty",
    "os.posix_spawn",
    "os.spawn",
    "os.kill",
}


def confine(folder: Path, readable: list[str], memory_bytes: int, seconds: int) -> list[str]:
    """Shut this process in, and name the layers that hold. It may come back in a child: the parent then waits for it.

    folder: where it may write. readable: folders that it may read besides the system's. Call it before any thread runs.
    """
    limit(memory_bytes, seconds)
    return [
        "limits",
        *(["namespaces"] if own_namespaces() else []),
        *(["landlock"] if landlock(folder, readable) else []),
    ]


def limit(memory_bytes: int, seconds: int) -> None:
    """Bound what one process may take."""
    for what, most in (
        (resource.RLIMIT_DATA, memory_bytes),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, 64 * 2**20),
        (resource.RLIMIT_NOFILE, 512),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(what)[1]
        resource.setrlimit(what, (min(most, hard) if hard != resource.RLIM_INFINITY else most,) * 2)


def own_namespaces() -> bool:
    """Leave the network and start an own process tree, in a child; the parent stays and ends as the child does."""
    if sys.platform != "linux":
        return False
    libc, uid, gid = ctypes.CDLL(None, use_errno=True), os.getuid(), os.getgid()
    if libc.unshare(NEWUSER | NEWPID | NEWNET):
        return False
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with contextlib.suppress(OSError):  # without it the process sees itself as nobody, and is shut in all the same
            Path(f"/proc/self/{name}").write_text(text)
    child = os.fork()
    if child:
        os.dup2(os.open(os.devnull, os.O_RDWR), 0)
        status = os.waitpid(child, 0)[1]
        os._exit(os.waitstatus_to_exitcode(status) % 256)
    die_with_parent()
    return True


def die_with_parent() -> None:
    """Let this process be killed once the one that started it is gone (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def landlock(folder: Path, readable: list[str]) -> bool:
    """Let the kernel refuse all files but those: writing in the folder, reading there and in the readable places."""
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    version = libc.syscall(LANDLOCK_CREATE, None, 0, 1)
    if version < 1:
        return False
    every = (1 << RIGHTS_BY_VERSION[min(version, 5)]) - 1
    attributes = (ctypes.c_uint64 * 3)(every, 3, 3)  # file rights; TCP bind and connect; abstract sockets and signals
    size = 8 if version < 4 else 16 if version < 6 else 24
    rules = libc.syscall(LANDLOCK_CREATE, attributes, size, 0)
    _allow(libc, rules, str(folder), every)
    for path in (*SYSTEM, *readable):
        _allow(libc, rules, path, EXECUTE | READ | LIST)
    for path in (*DEVICES, *map(str, Path("/dev").glob("nvidia*"))):
        _allow(libc, rules, path, every if os.path.isdir(path) else (WRITE | READ | TRUNCATE | IOCTL) & every)
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    return libc.syscall(LANDLOCK_RESTRICT, rules, 0) == 0


def _allow(libc: ctypes.CDLL, rules: int, path: str, rights: int) -> None:
    if os.path.exists(path):
        beneath = os.open(path, os.O_PATH | os.O_CLOEXEC)
        files_only = rights if os.path.isdir(path) else rights & (EXECUTE | WRITE | READ | TRUNCATE | IOCTL)
        attribute = files_only.to_bytes(8, sys.byteorder) + beneath.to_bytes(4, sys.byteorder)
        libc.syscall(LANDLOCK_ADD, rules, 1, attribute, 0)
        os.close(beneath)


def watch(folder: Path, readable: list[str], tell: Callable[[str], None]) -> None:
    """Refuse, from here on and in this interpreter, what lies outside the confinement, and tell each kind once."""
    inside = (str(folder), *DEVICES)
    may_read = (*inside, *SYSTEM, *readable, *(str(path) for path in Path("/dev").glob("nvidia*")))
    told = set()

    def refuse(what: str) -> None:
        if what not in told:
            told.add(what)
            tell(what)
        raise PermissionError(f"not while grading: {what}")

    def hook(event: str, arguments: tuple) -> None:
        if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            writes = bool((arguments[2] or 0) & OPENED_FOR_WRITING)
            if not _beneath(arguments[0], inside if writes else may_read):
                refuse(f"{'write' if writes else 'read'} {os.fsdecode(arguments[0])}")
        elif event in ("os.listdir", "os.scandir") and isinstance(arguments[0], str | bytes | os.PathLike):
            if not _beneath(arguments[0], may_read):
                refuse(f"list {os.fsdecode(arguments[0])}")
        elif event in CHANGES:
            for path in arguments[:2]:
                if isinstance(path, str | bytes | os.PathLike) and not _beneath(path, inside):
                    refuse(f"change {os.fsdecode(path)}")
        elif event in NETWORK:
            refuse("use the network")
        elif event in PROGRAMS:
            refuse("start or signal another program")

    sys.addaudithook(hook)


def _beneath(path, folders: tuple[str, ...]) -> bool:
    real = os.path.realpath(os.fsdecode(path))
    return any(real == folder or real.startswith(folder + os.sep) for folder in folders)
