"""Files and folders that appear whole: they get their name once they are complete, and what a kill leaves is found.

Until then they are hidden beside it, `.name.….partial`. An error removes them, and so does every signal that a process
hears; only a kill leaves one behind. What is being written is locked, so that nobody takes it for a leftover.
"""

import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None


@contextmanager
def appearing_whole(path: str | os.PathLike) -> Iterator:
    """A binary file open for writing that gets its name once it is complete and on the disk."""
    path = Path(path)
    partial = _partial(path)
    try:
        with open(partial, "xb") as file:
            _lock(file.fileno())
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        raise _naming(error, path) from None


@contextmanager
def folder_appearing_whole(path: str | os.PathLike) -> Iterator[Path]:
    """A new folder to fill that gets its name once it is complete. Raises FileExistsError where the name is taken."""
    path = Path(path)
    partial = _partial(path)
    partial.mkdir()
    descriptor = os.open(partial, os.O_RDONLY) if fcntl else None
    try:
        if descriptor is not None:
            _lock(descriptor)
        yield partial
        if path.exists():
            raise FileExistsError(f"{path} appeared while its content was made; it was left as it is")
        partial.rename(path)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and isinstance(error.filename, str):
            error.filename = error.filename.replace(str(partial), str(path))  # the name that was asked for
        raise _naming(error, path) from None
    finally:
        if descriptor is not None:
            os.close(descriptor)


def leftovers(path: str | os.PathLike) -> dict[Path, int]:
    """What killed runs left beside `path` on their way to it, each with its bytes; nothing that is being written."""
    path = Path(path)
    if not path.parent.is_dir():
        return {}
    found, ours = {}, re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}\.partial")
    for entry in sorted(path.parent.iterdir()):
        if ours.fullmatch(entry.name) and not _is_locked(entry):
            files = entry.rglob("*") if entry.is_dir() else [entry]
            found[entry] = sum(file.stat().st_size for file in files if file.is_file())
    return found


def remove(path: Path) -> None:
    """Remove a leftover."""
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def _partial(path: Path) -> Path:
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} is not a folder to write {path.name} to")
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")


def _naming(error: BaseException, path: Path) -> BaseException:
    """The error, with the file that was to be written where the system names none, as for a full disk."""
    if isinstance(error, OSError) and error.errno is not None and error.filename is None:
        error.filename = str(path)
    return error


def _lock(descriptor: int) -> None:
    if fcntl:
        with suppress(OSError):  # a file system without locks: leftovers can't be told there from what is being written
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _is_locked(path: Path) -> bool:
    if not fcntl:
        return False
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False
