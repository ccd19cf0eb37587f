"""The command line: `nf4lab quantize IN OUT`, `nf4lab inspect FILE`, `nf4lab compare FILE`; or `python -m nf4lab …`.

Exit status: 0 where the work is done; 1 for files, and what is in them, that can't be worked on, with one line on
stderr; 2 for a command line that makes no sense; 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP. Whatever these
but 0, nothing new stands under the name of the output, unless the line says that it is complete: then only the report
was cut short. 141 is for a pipe whose reader left before it was told: then the work is done.
"""

import argparse
import gc
import os
import signal
import sys
import threading
import warnings

from nf4lab import __version__
from nf4lab.commands import compare, inspect, quantize
from nf4lab.commands.shown import outlets, shown

COMMANDS = (quantize, inspect, compare)
NO_READER = 141  # as a shell calls the end by SIGPIPE


class Stopped(BaseException):
    """Raised where a signal asks the process to end, so that what was begun is removed on the way out."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command that the arguments name. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="nf4lab", description="4-bit formats on the command line.",
        epilog="Exit status: 0 done; 1 a file that can't be worked on; 2 wrong usage; 128 + n stopped by signal n.",
    )  # fmt: skip
    parser.set_defaults(done=[])  # what a command has written whole
    parser.add_argument("--version", action="version", version=f"nf4lab {__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_to(subparsers)
    options = parser.parse_args(arguments)
    before = listen()
    if arguments is None:  # a process of its own: what is loaded stays, and is not to be searched for garbage
        gc.freeze()
    try:
        with warnings.catch_warnings(), outlets():
            warnings.showwarning = _show_warning
            return _run(options)
    finally:
        for number, handler in before.items():  # a process of its own ends now, and with the status that it has
            signal.signal(number, signal.SIG_IGN if arguments is None else handler)


def _run(options: argparse.Namespace) -> int:
    """Run the command of the options; what ends it early is said in one line, with what is complete all the same."""
    try:
        status = options.run(options)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader has seen enough, as in `nf4lab inspect --json FILE | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left to print goes nowhere
        return NO_READER
    except (ValueError, OSError) as error:
        return _say(f"{error}; {_left(options)}" if options.done else error, 1)
    except MemoryError:
        return _say("out of memory", 1)
    except KeyboardInterrupt:
        return _say(f"interrupted; {_left(options)}", 128 + signal.SIGINT)
    except Stopped as stopped:
        (number,) = stopped.args
        return _say(f"stopped by {signal.Signals(number).name}; {_left(options)}", 128 + number)


def _left(options: argparse.Namespace) -> str:
    return f"complete: {', '.join(options.done)}" if options.done else "nothing was left behind"


def listen() -> dict:
    """Have the signals that ask for an end raise Stopped, and Ctrl-C KeyboardInterrupt; returns the handlers before.

    Only a main thread can. What is ignored stays so: nohup ignores SIGHUP, a shell's background jobs SIGINT.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}

    def stop(number, frame):
        for other in heard:
            signal.signal(other, lambda number, frame: None)  # a second one would stop the removal of what was begun
        raise KeyboardInterrupt if number == signal.SIGINT else Stopped(number)

    known = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    heard = [number for number in known if signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, stop) for number in heard}


def _show_warning(message, category, filename, line, file=None, text=None) -> None:
    _say(f"warning: {message}", 0)


def _say(message: object, status: int) -> int:
    print(f"nf4lab: {shown(str(message))}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
