"""Write, beside each chapter of the book, the notebook that Colab opens: `python book/make_notebooks.py`.

The chapter's Markdown is the source; the notebook has the same cells, no outputs, stable cell ids, and one cell more:
the setup for Colab, after the title. With --check nothing is written, and a notebook that differs is an error.
"""

import argparse
import hashlib
import re
import sys
from pathlib import Path

import jupytext
import nbformat
import yaml

import nf4lab

ROOT = Path(__file__).resolve().parents[1]
SETUP = """\
# On Colab this installs the book's package; anywhere else it only says what is here.
import os, platform
if "COLAB_RELEASE_TAG" in os.environ:
    %pip install -q --no-deps "nf4lab @ git+{url}@v{version}"
import torch, numba
device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
print(f"Python {{platform.python_version()}}, torch {{torch.__version__}}, numba {{numba.__version__}}, {{device}}")"""
NO_HOME = """\
# This copy of the book has no address yet: whoever publishes it runs `make home URL=https://…` once.
"""


def repository_url() -> str:
    """The project's address, from the one place where it stands."""
    return yaml.safe_load((ROOT / "_config.yml").read_text())["repository"]["url"]


def chapters() -> list[Path]:
    """The pages that have code to run, in reading order."""
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    files = [toc["root"], *(entry["file"] for part in toc["parts"] for entry in part["chapters"])]
    pages = [page for file in files if (page := ROOT / f"{file}.md").exists()]  # the API page is reStructuredText
    return [page for page in pages if "```{code-cell}" in page.read_text()]


def setup_cell() -> str:
    """The source of the setup cell, with the project's address in it."""
    url = repository_url()
    return (NO_HOME if "YOUR_ORG" in url else "") + SETUP.format(url=url, version=nf4lab.__version__)


def notebook_of(chapter: Path) -> nbformat.NotebookNode:
    """The chapter as a notebook: its cells without outputs, and the setup cell after the title."""
    notebook = jupytext.read(chapter)
    notebook.cells = split_title(notebook.cells)
    for cell in notebook.cells:
        if "checks" in cell.metadata.get("tags", []):
            cell.metadata["cellView"] = "form"  # Colab shows its title and folds its code
    notebook.cells.insert(1, nbformat.v4.new_code_cell(setup_cell(), metadata={"tags": ["setup"]}))
    notebook.metadata = metadata_for_colab(notebook)
    number(notebook.cells)
    return notebook


def handout_of(chapter: Path) -> nbformat.NotebookNode:
    """The chapter's notebook without the solutions of its exercises: neither their prose nor their code."""
    notebook = notebook_of(chapter)
    notebook.cells = [cell for cell in notebook.cells if "hide-cell" not in cell.metadata.get("tags", [])]
    for cell in notebook.cells:
        cell.source = re.sub(r'\n*<details class="solution">.*?</details>', "", cell.source, flags=re.DOTALL)
    return notebook


def metadata_for_colab(notebook: nbformat.NotebookNode) -> dict:
    """What a made notebook says of itself; a GPU is asked for only where its source does."""
    return {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        "colab": {"provenance": [], "toc_visible": True},
        **{key: notebook.metadata[key] for key in ("accelerator",) if key in notebook.metadata},
    }


def number(cells: list) -> None:
    """Give the cells ids that change only where their text does."""
    seen: dict[str, int] = {}
    for cell in cells:
        digest = hashlib.sha256(cell.source.encode()).hexdigest()[:12]
        seen[digest] = seen.get(digest, 0) + 1
        cell.id = f"{digest}-{seen[digest]}"


def split_title(cells: list) -> list:
    """The same cells, with the page's title in a cell of its own."""
    title, _, rest = cells[0].source.partition("\n")
    if not re.match(r"# \S", title):
        raise ValueError(f"a chapter starts with its title; got {title!r}")
    first = [nbformat.v4.new_markdown_cell(title)]
    return first + ([nbformat.v4.new_markdown_cell(rest.strip())] if rest.strip() else []) + cells[1:]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a notebook is out of date")
    parser.add_argument("--handout", type=Path, metavar="CHAPTER", help="print its notebook without solutions; no more")
    arguments = parser.parse_args()
    if arguments.handout:
        print(nbformat.writes(handout_of(arguments.handout)))
        return 0
    check = arguments.check
    stale = []
    for chapter in chapters():
        target, text = chapter.with_suffix(".ipynb"), nbformat.writes(notebook_of(chapter)) + "\n"
        if not target.exists() or target.read_text() != text:
            stale.append(target.name)
            if not check:
                target.write_text(text)
    print(f"{'out of date' if check else 'written'}: {', '.join(stale) or 'none'}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
