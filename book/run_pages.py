"""The book's pages with code, run side by side into the cache that _ext/runs.py describes; `book/build.py` calls this.

jupyter-cache has executors of its own; they say nothing until all pages are done, and forget what a failed page showed.
"""

import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import joblib
import nbformat
import psutil
import yaml
from jupyter_cache import get_cache
from jupyter_cache.base import CacheBundleIn
from jupyter_cache.executors.utils import single_nb_execution
from myst_nb.core.read import is_myst_markdown_notebook, read_myst_markdown_notebook
from myst_parser.config.main import MdParserConfig
from nbclient.client import CellTimeoutError

sys.path.insert(0, str(Path(__file__).resolve().parent / "_ext"))
from runs import cache_folder, records

PAGE_BYTES = 2e9  # memory for a page: the largest takes 1.5 GB
STOPPED, NOT_RUN = "the build was stopped", "this page was not run: `make book` runs it"


@dataclass
class Page:
    """A page with code: its name in _toc.yml, its file, its cells, and the place of the last code cell begun."""

    name: str
    path: Path
    notebook: nbformat.NotebookNode
    last_cell: int

    def begin(self, cell: nbformat.NotebookNode, cell_index: int) -> None:
        """Note that a cell is sent to the kernel, which may die of it before it says so."""
        self.last_cell = cell_index

    def where(self) -> str:
        """The last cell that was begun, in words: its number among the code cells, its line in the file, its code."""
        last = self.last_cell
        number = sum(cell.cell_type == "code" for cell in self.notebook.cells[: last + 1])
        line = self.notebook.metadata["source_map"][last] + 1
        first = self.notebook.cells[last].source.strip().partition("\n")[0]
        return f"cell {number} (line {line}: `{first}`)"

    def show(self, name: str, text: str) -> None:
        """Let the page show an error where it stopped."""
        error = nbformat.v4.new_output("error", ename=name, evalue=text, traceback=[f"{name}: {text}"])
        self.notebook.cells[self.last_cell].outputs.append(error)


@dataclass
class Run:
    """How it went: the seconds that a page took, and what went wrong in words, None if nothing did."""

    page: Page
    seconds: float | None
    failure: str | None = None
    traceback: str = ""


def pages(root: Path) -> list[Page]:
    """The book's pages with code, in reading order."""
    toc, config = (yaml.safe_load((root / name).read_text()) for name in ("_toc.yml", "_config.yml"))
    markdown = MdParserConfig(enable_extensions=set(config["parse"]["myst_enable_extensions"]))
    found = []
    for name in [toc["root"], *(entry["file"] for part in toc["parts"] for entry in part["chapters"])]:
        path = root / f"{name}.md"
        text = path.read_text() if path.exists() else ""
        if is_myst_markdown_notebook(text):
            notebook = read_myst_markdown_notebook(text, markdown, add_source_map=True, path=path)
            code = [place for place, cell in enumerate(notebook.cells) if cell.cell_type == "code"]
            if code:
                found.append(Page(name, path, notebook, code[0]))
    return found


class Outputs:
    """The cache: what pages showed when they were run, one record a page."""

    def __init__(self, root: Path):
        self.folder = cache_folder(root)
        self.last = {}
        for old in self.folder.parent.glob("*/"):
            self.last |= records(old)
            if old != self.folder:
                shutil.rmtree(old)
        self.cache = get_cache(self.folder)

    def seconds(self, page: Page) -> float:
        """How long the page took last time; infinity where that is not known."""
        return self.last.get(page.path, {}).get("execution_seconds") or float("inf")

    def found(self, page: Page) -> bool:
        """Whether there is something to show for the page's code as it is."""
        try:
            return self.cache.match_cache_notebook(page.notebook) is not None
        except KeyError:
            return False

    def complete(self, page: Page) -> bool:
        """Whether that comes from a run to the page's end."""
        return self.found(page) and self.cache.match_cache_notebook(page.notebook).data["failure"] is None

    def keep(self, run: Run) -> None:
        """Put this in the place of what the page showed before."""
        uri = str(run.page.path)
        for record in self.cache.list_cache_records():
            if record.uri == uri:
                self.cache.remove_cache(record.pk)
        data = {"execution_seconds": run.seconds, "failure": run.failure, "ended": time.time()}
        bundle = CacheBundleIn(run.page.notebook, uri, data=data)
        self.cache.cache_notebook_bundle(bundle, check_validity=False, overwrite=True)


def at_a_time() -> int:
    """How many pages to run at a time: one for each core that this process may use, and no more than memory holds."""
    return max(1, min(joblib.cpu_count(), int(psutil.virtual_memory().available // PAGE_BYTES)))


def execute(page: Page, timeout: float) -> Run:
    """Run the page's cells in a kernel of its own, in the page's folder; each cell may take timeout seconds."""
    start = time.monotonic()
    options = {"cwd": str(page.path.parent), "timeout": timeout, "allow_errors": False, "on_cell_execute": page.begin}
    try:
        result = single_nb_execution(page.notebook, **options)
    except Exception as error:  # the kernel did not start, or died
        page.show(type(error).__name__, str(error))
        return Run(page, time.monotonic() - start, f"{page.where()}: {type(error).__name__}: {error}", repr(error))
    if result.err is None:
        return Run(page, result.time)
    if isinstance(result.err, CellTimeoutError):
        page.show("Timeout", f"the cell took longer than {timeout} seconds, the limit of _config.yml")
    error = page.notebook.cells[page.last_cell].outputs[-1]
    text = error.evalue or line_of("\n".join(error.traceback))
    return Run(page, result.time, f"{page.where()}: {error.ename}: {text}", result.exc_string)


def line_of(traceback: str) -> str:
    """The line of the cell at which IPython's arrow points: what an assertion without words asserts."""
    plain = re.sub(r"\x1b\[[\d;]*m", "", traceback)
    return next(iter(re.findall(r"^-+> *\d+ +(.*\S)", plain, re.MULTILINE)), "")


def run_all(todo: list[Page], workers: int, timeout: float) -> Iterator[Run]:
    """Each page's run when it is done. Ctrl-C ends those that are under way, and no other is begun."""
    stop = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: stop.set())
    with ThreadPoolExecutor(workers) as pool:
        left = {pool.submit(unless, stop, page, timeout) for page in todo}
        while left:
            done, left = wait(left, timeout=0.5, return_when=FIRST_COMPLETED)
            if stop.is_set():
                end_kernels()
            yield from (future.result() for future in done)
    signal.signal(signal.SIGINT, before)


def unless(stop: threading.Event, page: Page, timeout: float) -> Run:
    """The page's run, unless the build is stopped before its end."""
    run = stopped(page) if stop.is_set() else execute(page, timeout)
    return stopped(page) if stop.is_set() and run.failure else run


def stopped(page: Page) -> Run:
    """The run of a page that did not take place, or not to its end: the page says so, and shows nothing else of it."""
    for place, cell in reversed(list(enumerate(page.notebook.cells))):
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count, page.last_cell = [], None, place
    page.show("NotRun", NOT_RUN)
    return Run(page, None, STOPPED)


def end_kernels() -> None:
    """Kill the processes that this one started, and theirs; the threads that wait for them then end."""
    for process in psutil.Process().children(recursive=True):
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
