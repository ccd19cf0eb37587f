"""Shut a process in before it runs a stranger's code: no network, no host files, bounded memory and writes.

Four layers, each used where the system has it. `confine` says which of them hold:

    limits      setrlimit: memory, processor time, size and number of files (Linux, macOS)
    namespaces  no network, processes, shared memory and IPC of its own, and own small /tmp and /dev/shm (Linux)
    landlock    the kernel refuses files outside the allowed folders, TCP connections and signals to others (Linux)
    seccomp     the kernel refuses calls that no lab needs: memory of no process, keys, other sockets (Linux)

On top, `watch` installs a Python audit hook. It refuses the same in the interpreter, on every system, and tells what
was tried; code that calls C can get around it, which is why it is not called a layer. Standard library only.
"""

import contextlib
import ctypes
import errno
import os
import resource
import signal
import struct
import sys
from collections.abc import Callable
from pathlib import Path

NEWNS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x00020000, 0x08000000, 0x10000000, 0x20000000, 0x40000000  # of unshare(2)
NOSUID, NODEV, BIND, RECURSIVE, PRIVATE = 2, 4, 0x1000, 0x4000, 0x40000  # of mount(2)
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 22, 24, 38
CAPSET, LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 126, 444, 445, 446
EXECUTE, WRITE, READ, LIST, TRUNCATE, IOCTL = (1 << bit for bit in (0, 1, 2, 3, 14, 15))
MACHINES = {  # for seccomp: its name, and the numbers of clone and socket
    "x86_64": (0xC000003E, 56, 41),
    "aarch64": (0xC00000B7, 220, 198),
}
SOCKETS = 1, 2, 10  # families: those that the network's namespace shuts in; a hypervisor's (40) it does not
CLONE3, NEW_SPACES = 435, NEWNS | NEWIPC | NEWUSER | NEWPID | NEWNET | 0x06000000  # hosts' names and cgroups too
REFUSED = {  # numbers on those machines
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "add_key": (248, 217),
    "request_key": (249, 218), "keyctl": (250, 219), "ptrace": (101, 117), "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41),
    "chroot": (161, 51), "unshare": (272, 97), "setns": (308, 268), "open_tree": (428, 428), "move_mount": (429, 429),
    "fsopen": (430, 430), "open_by_handle_at": (304, 265), "bpf": (321, 280), "perf_event_open": (298, 241),
    "userfaultfd": (323, 282), "io_uring_setup": (425, 425), "pidfd_getfd": (438, 438),
}  # fmt: skip
RIGHTS_BY_VERSION = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}  # how many of the file rights a kernel's Landlock knows
SYSTEM = (
    "/usr", "/lib", "/lib64", "/bin", "/proc", "/sys/devices/system", "/System", "/Library", "/etc/ld.so.cache",
    "/etc/localtime", "/etc/nsswitch.conf", "/etc/mime.types", "/etc/fonts", "/etc/ssl", "/etc/alternatives",
)  # fmt: skip
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/shm")
WRITABLE = {
    "/tmp": "size=256m,nr_inodes=16k",
    "/dev/shm": "size=64m,nr_inodes=1k",
}  # what all of a submission's files take
OPENED_FOR_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = {
    "os.remove", "os.rmdir", "os.mkdir", "os.rename", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown",
    "os.utime", "shutil.rmtree", "shutil.move",
}  # fmt: skip
NETWORK = {"socket.connect", "socket.bind", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname"}
PROGRAMS = {
    "subprocess.Popen", "os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.kill",
}  # fmt: skip


def confine(
    folder: Path, readable: list[str], memory_bytes: int, seconds: int, spaces: bool, waits: Callable[[int], None]
) -> list[str]:
    """Shut this process in, and name the layers that hold.

    folder: where it may write; made where it is missing, with a `tmp` in it.
    readable: folders that it may read besides the system's.
    spaces: whether to take namespaces of its own (`namespaces_work`).
    waits: what the parent does, with the child's number, when it comes back in a child (namespaces need that); the
    parent ends after it. Call it before any thread runs.
    """
    in_child(waits, readable, spaces)
    (folder / "tmp").mkdir(parents=True, exist_ok=True)
    limit(memory_bytes, seconds)
    holds = {"limits": True, "namespaces": spaces, "landlock": landlock(folder, readable), "seccomp": refuse_calls()}
    return [layer for layer, it_does in holds.items() if it_does]


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


def namespaces_work() -> bool:
    """Whether a process may have namespaces of its own here, tried in one that ends after it.

    A system may allow them and refuse what makes them useful: user 0 of a container without rights can't be mapped,
    and some distributions let nobody mount in them.
    """
    if sys.platform != "linux":
        return False
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            libc = leave_namespaces()
            os._exit(1 if libc.mount(b"tmpfs", b"/tmp", b"tmpfs", NOSUID | NODEV, b"size=1m") else 0)
        os._exit(1)
    return os.waitpid(child, 0)[1] == 0


def leave_namespaces() -> ctypes.CDLL:
    """Leave the network, the users, the IPC and the mounts; children leave the processes. The C library.

    Raises OSError where that is not allowed.
    """
    uid, gid, libc = os.getuid(), os.getgid(), ctypes.CDLL(None, use_errno=True)
    if libc.unshare(NEWUSER | NEWPID | NEWNET | NEWNS | NEWIPC):
        raise OSError(ctypes.get_errno(), "no namespaces")
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        Path(f"/proc/self/{name}").write_text(text)
    return libc


def in_child(waits: Callable[[int], None], readable: list[str], spaces: bool) -> None:
    """Come back in a child of this process, which `waits` for it; with namespaces it sees nobody else's files."""
    libc = leave_namespaces() if spaces else None
    child = os.fork()
    if child:
        waits(child)
        os._exit(0)
    os.setsid()
    die_with_parent()
    if spaces:
        own_mounts(libc, readable)
        drop_rights(libc)


def own_mounts(libc: ctypes.CDLL, readable: list[str]) -> None:
    """Small file systems of its own where it may write, and a /proc that shows nobody else, where that is allowed.

    What is readable below such a place stays where it is. The process that watches this one keeps its own /proc: in
    this one it would find nobody to end.
    """
    if libc.unshare(NEWNS):
        raise OSError(ctypes.get_errno(), "no mounts of its own")
    libc.mount(b"none", b"/", None, RECURSIVE | PRIVATE, None)
    hidden = [path for path in readable if path.startswith(tuple(f"{place}/" for place in WRITABLE))]
    kept = {path: os.open(path, os.O_PATH) for path in hidden if os.path.isdir(path)}
    for place, size in WRITABLE.items():
        if libc.mount(b"tmpfs", place.encode(), b"tmpfs", NOSUID | NODEV, f"{size},mode=1777".encode()):
            raise OSError(ctypes.get_errno(), f"no file system of its own at {place}")
    for path, number in kept.items():
        os.makedirs(path, exist_ok=True)
        libc.mount(f"/proc/self/fd/{number}".encode(), path.encode(), None, BIND | RECURSIVE, None)
        os.close(number)
    libc.mount(b"proc", b"/proc", b"proc", NOSUID | NODEV, None)


def drop_rights(libc: ctypes.CDLL) -> None:
    """Give up the rights that a new namespace hands out: what was mounted stays so."""
    for right in range(64):
        libc.prctl(PR_CAPBSET_DROP, right, 0, 0, 0)
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    number = CAPSET if os.uname().machine == "x86_64" else 91
    libc.syscall(number, header, none)


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


def refuse_calls() -> bool:
    """Let the kernel refuse the calls in REFUSED, by whatever machine's numbers, new namespaces and other sockets."""
    if sys.platform != "linux" or os.uname().machine not in MACHINES or sys.maxsize < 2**32:
        return False
    place = list(MACHINES).index(os.uname().machine)
    audit, clone, socket = MACHINES[os.uname().machine]
    numbers = [both[place] for both in REFUSED.values()]
    load, equal, at_least, has_bits, give = 0x20, 0x15, 0x35, 0x45, 0x06
    n = len(numbers)
    program = [  # (code, instructions to pass over if true, if false, constant)
        (load, 0, 0, 4), (equal, 0, n + 12, audit), (load, 0, 0, 0), (at_least, n + 10, 0, 0x40000000),
        *((equal, n + 9 - i, 0, number) for i, number in enumerate(numbers)),
        (equal, 10, 0, CLONE3), (equal, 3, 0, socket), (equal, 0, 6, clone),
        (load, 0, 0, 16), (has_bits, 5, 4, NEW_SPACES),  # clone's flags
        (load, 0, 0, 16), *((equal, 2 - i, i // 2, family) for i, family in enumerate(SOCKETS)),  # socket's family
        (give, 0, 0, 0x7FFF0000), (give, 0, 0, 0x50000 | errno.EPERM), (give, 0, 0, 0x50000 | errno.ENOSYS),
    ]  # fmt: skip
    text = b"".join(struct.pack("HBBI", *instruction) for instruction in program)
    libc, filters = ctypes.CDLL(None), ctypes.create_string_buffer(text)
    whole = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(program), ctypes.addressof(filters)))
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    return libc.prctl(PR_SET_SECCOMP, 2, ctypes.c_void_p(ctypes.addressof(whole)), 0, 0) == 0


def watch(folder: Path, readable: list[str], tell: Callable[[str], None]) -> Callable:
    """Refuse, from here on and in this interpreter, what lies outside the confinement, and tell each kind once.

    Returns a context manager in which nothing is refused, for the grader's own steps.
    """
    gpus = [str(path) for path in Path("/dev").glob("nvidia*")]
    inside = _real((str(folder), *DEVICES))
    may_read = _real((*inside, *SYSTEM, *readable, *gpus))
    told, own = set(), []

    @contextlib.contextmanager
    def unwatched():
        own.append(True)
        try:
            yield
        finally:
            own.pop()

    def refuse(what: str) -> None:
        if what not in told:
            told.add(what)
            tell(what)
        raise PermissionError(f"not while grading: {what}")

    def hook(event: str, arguments: tuple) -> None:
        if own:
            return
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
    return unwatched


def _real(folders: tuple[str, ...]) -> tuple[str, ...]:
    """The folders, and where they really are: an environment may be a link."""
    return tuple(dict.fromkeys([*folders, *map(os.path.realpath, folders)]))


def _beneath(path, folders: tuple[str, ...]) -> bool:
    real = os.path.realpath(os.fsdecode(path))
    return any(real == folder or real.startswith(folder + os.sep) for folder in folders)
