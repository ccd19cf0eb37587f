"""What a page shows of its code comes from a cache, which knows the package, its data and the records that pages read.

myst-nb looks a page up in jupyter-cache by its code cells. Here the cache lies in a folder named after all that those
cells run on, so that a change in any of it begins an empty cache; and a change in the extensions reads every page anew,
but runs none. `book/run_pages.py` fills the cache before Sphinx starts, several pages at a time.
"""

import hashlib
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from jupyter_cache import get_cache
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

RUN_ON = ("nf4lab/**/*", "benchmarks/results/*", "requirements.txt")
READ_BY = ("book/_ext/*",)
FILLED = "BOOK_OUTPUTS"  # the environment variable for that


def digest(root: Path, patterns: Iterable[str]) -> str:
    """Twelve hexadecimal digits of what the files are called and hold, and of Python's version."""
    found = hashlib.sha256(repr(sys.version_info[:2]).encode())
    for path in sorted({path for pattern in patterns for path in root.glob(pattern)}):
        if path.is_file() and "__pycache__" not in path.parts:
            found.update(f"\0{path.relative_to(root).as_posix()}\0".encode())
            found.update(path.read_bytes())
    return found.hexdigest()[:12]


def cache_folder(root: Path) -> Path:
    """Where the outputs lie that pages have with the package, the data and the records as they are."""
    return root / "_build" / ".jupyter_cache" / digest(root, RUN_ON)


def records(folder: Path) -> dict[Path, dict]:
    """{page's file: how its run went}: "execution_seconds", None where it was not run; "ended", in seconds since 1970;
    "failure", what went wrong in words, None if nothing did."""
    return {Path(record.uri): record.data for record in get_cache(folder).list_cache_records()}


def use_cache(app: Sphinx, config) -> None:
    """Sphinx reads every page anew when one of these two values is not what it was.

    book/build.py names the folder that it filled, so that a package edited meanwhile does not make Sphinx run pages.
    """
    config.nb_execution_cache_path = os.environ.get(FILLED) or str(cache_folder(Path(app.srcdir)))
    config.extensions_digest = digest(Path(app.srcdir), READ_BY)


def outdated(app: Sphinx, env: BuildEnvironment, added: set[str], changed: set[str], removed: set[str]) -> list[str]:
    """The pages that were run after Sphinx read them: env.all_docs has the time of each, in microseconds."""
    ended = {path: run.get("ended", 0) for path, run in records(app.config.nb_execution_cache_path).items()}
    return [page for page, read_us in env.all_docs.items() if read_us / 1e6 < ended.get(Path(env.doc2path(page)), 0)]


def setup(app: Sphinx) -> dict:
    app.add_config_value("extensions_digest", "", "env")
    app.connect("config-inited", use_cache)
    app.connect("env-get-outdated", outdated)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
