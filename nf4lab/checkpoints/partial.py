"""Files and folders that appear whole: they get their name once they are complete, and what a kill leaves is found.

Until then they are hidden beside it, `.name.….partial`. An error removes them, and so does every signal that a process
hears; only a kill leaves one behind. What is being written is locked, so that nobody takes it for a leftover.
"""

import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None


@contextmanager
def appearing_whole(path: str | os.PathLike, new: bool = False) -> Iterator:
    """A binary file open for writing that gets its name once it is complete and on the disk.

    One that has the name is replaced; where the file is to be new, FileExistsError is raised.
    """
    path = Path(path)
    partial = _partial(path)
    try:
        with open(partial, "xb") as file:
            _lock(file.fileno())
            yield file
            file.flush()
            os.fsync(file.fileno())
        if new:
            _check_free(path)
        os.replace(partial, path)
    except BaseException as error:
        with suppress(OSError):  # where it could not even be begun
            partial.unlink(missing_ok=True)
        raise _naming(error, path, partial) from None


@contextmanager
def folder_appearing_whole(path: str | os.PathLike) -> Iterator[Path]:
    """A new folder to fill that gets its name once it is complete. Raises FileExistsError where the name is taken."""
    path = Path(path)
    partial, descriptor = _partial(path), None
    try:
        partial.mkdir()
        if fcntl:
            descriptor = os.open(partial, os.O_RDONLY)
            _lock(descriptor)
        yield partial
        _check_free(path)
        partial.rename(path)
    except BaseException as error:
        _remove_at_last(partial)
        raise _naming(error, path, partial) from None
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
        is_ours = not entry.is_symlink() and (entry.is_file() or entry.is_dir())  # runs write no links and no pipes
        if ours.fullmatch(entry.name) and is_ours and not _is_locked(entry):
            files = entry.rglob("*") if entry.is_dir() else [entry]
            found[entry] = sum(file.stat().st_size for file in files if file.is_file())
    return found


def remove(path: Path) -> None:
    """Remove a leftover."""
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def _remove_at_last(folder: Path) -> None:
    """Remove a folder in which a cluster's workers may still begin files while it is emptied; in none they can't."""
    for _ in range(100):
        shutil.rmtree(folder, ignore_errors=True)
        if not os.path.exists(folder):
            return
        time.sleep(0.01)


def _check_free(path: Path) -> None:
    if os.path.lexists(path):
        raise FileExistsError(f"{path} appeared while its content was made; it was left as it is")


def _partial(path: Path) -> Path:
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} is not a folder to write {path.name} to")
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")


def _naming(error: BaseException, path: Path, partial: Path) -> BaseException:
    """The error with the name that was asked for: not the hidden one, nor none, which a full disk's has."""
    if isinstance(error, OSError) and error.errno is not None:
        name = path if error.filename is None else error.filename
        error.filename = os.fspath(name).replace(str(partial), str(path)) if isinstance(name, str | Path) else name
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
