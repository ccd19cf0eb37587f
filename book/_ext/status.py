"""The page that says what built this book: `{build-status}` becomes tables of the machine, the versions, the runs.

Everything on it is read during the build. It is for readers who get other numbers, and ask what was different.
"""

import datetime
import importlib.metadata
import os
import platform
import posixpath
import subprocess
from pathlib import Path

from docutils import nodes
from runs import records
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.docutils import SphinxDirective

PACKAGES = ("torch", "numpy", "scipy", "matplotlib", "numba", "numba-cuda", "safetensors", "bitsandbytes",
            "jupyter-book", "Sphinx", "sphinx-book-theme")  # fmt: skip

FROM = "built_from"  # among the metadata of a page with these tables: the commit that it names


class RunsNode(nodes.General, nodes.Element):
    """Stands where the table of runs goes, until every page has run."""


class BuildStatus(SphinxDirective):
    """Three tables: where and when, with which versions, and how long each page ran."""

    def run(self) -> list[nodes.Node]:
        self.env.metadata[self.env.docname][FROM] = commit(Path(self.env.srcdir))
        where = list(machine(Path(self.env.srcdir)).items())
        return [table(("what", "found"), where), table(("package", "version"), versions()), RunsNode()]


def machine(root: Path) -> dict[str, str]:
    """What the build ran on."""
    stamp = os.environ.get("SOURCE_DATE_EPOCH")
    now = datetime.datetime.fromtimestamp(int(stamp), datetime.UTC) if stamp else datetime.datetime.now(datetime.UTC)
    return {
        "built": f"{now:%Y-%m-%d %H:%M} UTC",
        "from commit": commit(root),
        "processor": f"{processor()}, {len(os.sched_getaffinity(0))} logical cores to use"
        if hasattr(os, "sched_getaffinity")
        else f"{processor()}, {os.cpu_count()} logical cores",
        "GPU": gpu() or "none: pages that want one say so",
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
    }


def gpu() -> str:
    """The name of the first NVIDIA GPU, as its driver says it (to import torch takes seconds); "" if there is none."""
    try:
        say = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        return subprocess.run(say, capture_output=True, text=True, check=True).stdout.partition("\n")[0].strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def commit(root: Path) -> str:
    """The commit that the folder holds, or that there is none to name."""
    say = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(say, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "not known: built outside git"


def processor() -> str:
    """The processor's own name for itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.machine())


def versions() -> list[tuple[str, str]]:
    """Name and version of the packages that shape the numbers and the pages; one that is not installed says so."""
    found = []
    for name in PACKAGES:
        try:
            found.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            found.append((name, "not installed"))
    return found


def table(head: tuple[str, ...], rows: list[tuple]) -> nodes.table:
    """A table; a cell is text or a node."""
    made = nodes.table("", classes=["colwidths-auto"])
    group = nodes.tgroup(cols=len(head))
    group += [nodes.colspec(colwidth=100 // len(head)) for _ in head]
    group += nodes.thead("", _row(head))
    group += nodes.tbody("", *(_row(row) for row in rows))
    made += group
    return made


def _row(cells: tuple) -> nodes.row:
    return nodes.row("", *(nodes.entry("", c if isinstance(c, nodes.Node) else nodes.paragraph(text=c)) for c in cells))


class ShowRuns(SphinxPostTransform):
    """When all pages have run, the table of their times."""

    default_priority = 8  # before references are resolved

    def run(self, **kwargs) -> None:
        for node in list(self.document.findall(RunsNode)):
            node.replace_self(self.runs())

    def runs(self) -> nodes.Node:
        """A row a page, in reading order, and their sum."""
        known = records(self.config.nb_execution_cache_path)
        paths = {name: Path(self.env.doc2path(name)) for name in self.env.found_docs}
        runs = {name: known[path] for name, path in paths.items() if path in known}
        if not runs:
            return nodes.paragraph(text="In this build no page was run.")
        order = [name for name in reading_order(self.env, self.config.root_doc) if name in runs]
        rows = [(self.link(name), seconds(runs[name]), ended(runs[name])) for name in order]
        total = sum(run["execution_seconds"] or 0 for run in runs.values())
        return table(("page", "seconds", "ran"), [*rows, ("all pages", f"{total:.1f}", "")])

    def link(self, name: str) -> nodes.paragraph:
        here = self.env.docname
        target = posixpath.relpath(name, posixpath.dirname(here))
        return nodes.paragraph(
            "",
            "",
            pending_xref(
                "",
                nodes.inline(text=self.env.titles[name].astext()),
                refdoc=here,
                reftarget=target,
                reftype="doc",
                refdomain="std",
                refexplicit=True,
                refwarn=True,
            ),
        )


def reading_order(env: BuildEnvironment, first: str) -> list[str]:
    """A page and those below it, as the table of contents has them."""
    below = env.toctree_includes.get(first, [])
    return [first, *(name for page in below for name in reading_order(env, page))]


def seconds(run: dict) -> str:
    """How long a page ran."""
    return "–" if run["execution_seconds"] is None else f"{run['execution_seconds']:.1f}"


def ended(run: dict) -> str:
    """How far a page ran."""
    if run["failure"] is None:
        return "to the end"
    return "not" if run["execution_seconds"] is None else "to an error"


def refresh(app: Sphinx, env: BuildEnvironment, names: list[str]) -> None:
    """Read the page again when Sphinx reads any other, or when the commit is another."""
    pages = {name: data[FROM] for name, data in env.metadata.items() if FROM in data and name in env.found_docs}
    now = commit(Path(app.srcdir)) if pages else None
    names += [name for name, then in pages.items() if name not in names and (names or then != now)]


def setup(app: Sphinx) -> dict:
    app.add_node(RunsNode)
    app.add_directive("build-status", BuildStatus)
    app.add_post_transform(ShowRuns)
    app.connect("env-before-read-docs", refresh)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
