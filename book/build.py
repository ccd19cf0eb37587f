"""Build the book: `python book/build.py`, as `make book` does; `python book/build.py 04 11` runs those two pages only.

1. Pages whose code, or what it runs on, has changed are run: one at a time for each core, each with one thread, those
   that took longest first. What they show goes into a cache.
2. Jupyter Book writes all pages from the cache. A page that failed shows its error, one that was not run says so.
3. Chromium, where there is one, prints the PDF.

The terminal gets a line for each page, everything else goes to _build/book.log. A page that fails costs itself only,
and so does Ctrl-C: the exit status is then 1, and the next build runs what is missing.
"""

import argparse
import fcntl
import os
import re
import shutil
import subprocess
import sys
import time
import traceback
from pathlib import Path

import run_pages
import yaml
from run_pages import Outputs, Run
from runs import FILLED

ROOT = Path(__file__).resolve().parents[1]
# What the libraries of a page ask for the number of their threads; none waits for one that spins.
POOLS = ("OMP_NUM", "MKL_NUM", "OPENBLAS_NUM", "VECLIB_MAXIMUM", "NUMBA_NUM", "RAYON_NUM")


class Log:
    """_build/book.log, where all that this process and its children print goes; `say` writes to the terminal too.

    Raises BlockingIOError where another build has it.
    """

    def __init__(self, root: Path):
        self.path, self.root = root / "_build" / "book.log", root
        self.path.parent.mkdir(exist_ok=True)
        self.lock = (self.path.parent / "book.lock").open("w")
        fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # given back when this process ends
        self.terminal = os.fdopen(os.dup(1), "w")
        with self.path.open("w") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)

    @property
    def name(self) -> Path:
        return self.path.relative_to(self.root)

    def say(self, text: str) -> None:
        """A line for the terminal, and for the log."""
        print(text, flush=True)
        print(text, file=self.terminal, flush=True)


def run(root: Path, names: list[str], outputs: Outputs, log: Log) -> list[Run]:
    """Run the pages that need it, or those of them that are named; what went wrong with any."""
    book = run_pages.pages(root)
    wanted = [page for page in book if not names or any(Path(page.name).name.startswith(name) for name in names)]
    todo = [page for page in reversed(wanted) if not outputs.complete(page)]  # later chapters take longer
    todo.sort(key=outputs.seconds, reverse=True)
    workers = run_pages.at_a_time()
    log.say(f"{len(todo)} of {len(book)} pages with code to run, {workers} at a time; the log: {log.name}")
    timeout = yaml.safe_load((root / "_config.yml").read_text())["execute"]["timeout"]
    failed, left = [], len(todo)
    for done in run_pages.run_all(todo, workers, timeout):
        outputs.keep(done)
        left -= 1
        print(done.traceback, flush=True)
        if done.failure != run_pages.STOPPED:
            log.say(f"  {done.page.name:36}{done.seconds:6.0f} s{'  failed' * bool(done.failure):8}  {left} left")
        if done.failure:
            failed.append(done)
    for page in book:
        if not outputs.found(page):
            outputs.keep(run_pages.stopped(page))
    return failed


def write(root: Path, outputs: Outputs, log: Log) -> bool:
    """Let Jupyter Book write the pages; whether it had nothing to complain of.

    After a complaint it reads every page anew the next time: Sphinx complains of a page only when it reads it.
    """
    log.say("writing the pages")
    begin = log.path.stat().st_size
    book = Path(sys.executable).with_name("jupyter-book")
    environment = os.environ | {FILLED: str(outputs.folder)}
    written = subprocess.run([book, "build", root, "-W", "--keep-going"], env=environment).returncode == 0
    if not written:
        shutil.rmtree(root / "_build" / ".doctrees", ignore_errors=True)
        text = re.sub(r"\x1b\[[\d;]*m", "", log.path.read_bytes()[begin:].decode(errors="replace"))  # without colours
        for line in re.findall(r"^.*(?:WARNING|ERROR|[Ee]rror:).*$", text, re.M) or text.splitlines()[-10:]:
            log.say(f"  {line}")
    return written


def print_pdf(log: Log) -> bool:
    """Print the PDF; whether that went well, or there is nothing to print with."""
    log.say("printing the PDF")
    printed = subprocess.run([sys.executable, ROOT / "book" / "make_pdf.py"]).returncode == 0
    log.say(f"  {log.path.read_text().splitlines()[-1]}")
    return printed


def build(root: Path, names: list[str], pdf: bool, log: Log) -> int:
    """The three steps, and the last lines of the terminal; 1 if anything went wrong."""
    start = time.monotonic()
    outputs = Outputs(root)
    failed = run(root, names, outputs, log)
    right = write(root, outputs, log) and not failed
    if pdf and right and not names:
        right = print_pdf(log)
    log.say(f"{time.monotonic() - start:.0f} s; open {root}/_build/html/index.html")
    broken = [one for one in failed if one.failure != run_pages.STOPPED]
    for one in broken:
        log.say(f"failed: {one.page.path.relative_to(root)}, {one.failure}")
    if stopped := [Path(one.page.name).name for one in failed if one not in broken]:
        log.say(f"stopped before the end of: {', '.join(sorted(stopped))}")
    if failed:
        log.say(f"`make book` runs {'this page' if len(failed) == 1 else f'these {len(failed)} pages'} again")
    return int(not right)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="run only pages whose file begins so: 04")
    parser.add_argument("--root", type=Path, default=ROOT, help="the folder of _config.yml and _toc.yml")
    parser.add_argument("--no-pdf", action="store_true", help="print no PDF")
    arguments = parser.parse_args()
    root = arguments.root.resolve()
    try:
        log = Log(root)
    except BlockingIOError:
        print(f"another build is under way in {root}")
        return 1
    os.environ.update({f"{pool}_THREADS": "1" for pool in POOLS}, TOKENIZERS_PARALLELISM="false")
    try:
        return build(root, arguments.names, not arguments.no_pdf, log)
    except KeyboardInterrupt:
        log.say(f"stopped; the next build goes on from here; the log: {log.name}")
        return 130
    except Exception as error:
        traceback.print_exc()
        log.say(f"{type(error).__name__}: {error}; the log: {log.name}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
