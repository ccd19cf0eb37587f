"""A page is run again when what it runs has changed: the package, its data, the records it reads, these extensions.

Sphinx by itself looks only at the page's own text.
"""

from pathlib import Path

from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

ROOT = Path(__file__).parents[2]
READ = ("nf4lab/**/*", "benchmarks/results/*", "book/_ext/*")


def last_change(root: Path) -> float:
    """When the newest of the files that pages read was written, in seconds since 1970."""
    paths = (path for pattern in READ for path in root.glob(pattern))
    return max(path.stat().st_mtime for path in paths if path.is_file() and "__pycache__" not in path.parts)


def outdated(app: Sphinx, env: BuildEnvironment, added: set[str], changed: set[str], removed: set[str]) -> list[str]:
    """The pages that were read before that: env.all_docs has the time of each, in microseconds."""
    newest = last_change(ROOT)
    return [page for page, read_us in env.all_docs.items() if read_us / 1e6 < newest]


def setup(app: Sphinx) -> dict:
    app.connect("env-get-outdated", outdated)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
