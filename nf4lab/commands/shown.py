"""Text from files and of names, as a terminal may be given it, and what it is told through."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress


def shown(text: str) -> str:
    r"""The text in one line, with what a terminal would obey or hide written out, as Python writes it.

    >>> print(shown("a\x1b[2J.weight"))
    a\x1b[2J.weight
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def console_for_tables(markup: bool):
    """A console of rich: a terminal's width is kept, a pipe gets lines as long as they are; BrokenPipeError is raised.

    rich itself would end the process there, with the status of a failure.
    """
    from rich.console import Console

    console = Console(markup=markup, highlight=False)
    console = console if console.is_terminal else Console(markup=markup, highlight=False, width=10_000)
    console.on_broken_pipe = _reader_left
    return console


def _reader_left():
    raise BrokenPipeError


class Remarks:
    """Standard error, while a command works: where it takes nothing, being full, closed or left, the work goes on."""

    def __init__(self, stream):
        self._stream = stream

    def write(self, text: str) -> int:
        """Write what can be written."""
        with suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush what can be flushed."""
        with suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


@contextmanager
def outlets() -> Iterator[None]:
    """Standard output and error that are there, whatever a command is run under, and have a sign for every letter."""
    before = sys.stdout, sys.stderr
    with open(os.devnull, "w") as nowhere:
        sys.stdout, stderr = (nowhere if stream is None else stream for stream in before)
        for stream in (sys.stdout, stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
        sys.stderr = Remarks(stderr)
        try:
            yield
        finally:
            sys.stdout, sys.stderr = before
