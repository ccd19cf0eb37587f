"""Write, from each lab's solved master, what students get and what grades them: `make labs [SEED=2027]`.

A lab is one file, `labs/labN/master.md`: MyST Markdown with the chapters' header, executable from top to bottom. Its
code cells are of four kinds, told apart by their tags:

    no tag                        given: students get the cell as it stands
    :tags: [q1]                   an answer: the lines from `# BEGIN SOLUTION` to `# END SOLUTION`, or a line that ends
                                  in `# SOLUTION`, become `...`; the rest (signature, docstring) is handed out
    :tags: [q1, public, 1-point]  one check, a single function `def name(env):` that gets the notebook's variables and
                                  raises `feedback.Mistake` through the helpers of `nf4lab.labs.feedback`
    :tags: [q1, hidden, 3-points] the same, never handed out; takes its data from the number SEED

A question's cells follow one another: answers, then at least one public check, then at least one hidden one. Its text
is Markdown before them, and says the points. Checks know `torch`, `nf4lab`, `feedback` and (hidden ones) `SEED`
without importing them, as well as `labN`, the module `nf4lab/labs/labN.py` where there is one: it compares, and knows
the likely mistakes. They import anything else inside the function. An `accelerator: GPU` in the header is kept.

From it come, by otter-grader's `assign`:

    labs/labN/labN.ipynb          the student's notebook: Colab button, setup cell, no outputs, stable ids
    nf4lab/labs/public/labN/      the public checks, which the package brings to wherever the notebook runs
    _build/labs/labN.zip          the grader, with the hidden checks and the course's SEED: not for students

The seed is kept in labs/seed, which git does not know.

With --check nothing is written, and what is out of date is an error (the grader is not looked at).
"""

import argparse
import importlib.util
import re
import secrets
import sys
import tempfile
import zipfile
from pathlib import Path

import jupytext
import nbformat
import otter.assign
from nbformat.v4 import new_code_cell, new_raw_cell

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("make_notebooks", ROOT / "book" / "make_notebooks.py")
make_notebooks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_notebooks)

SETUP = """\
# On Colab this installs the book's package and what checks the answers; anywhere else it only says what is here.
import os, platform
if "COLAB_RELEASE_TAG" in os.environ:
    %pip install -q --no-deps "nf4lab @ git+{url}@v{version}" otter-grader=={otter} fica python-frontmatter ipylab
import torch
{simulator}import numba, otter
from nf4lab.labs import checks
grader = otter.Notebook(tests_dir=checks("{lab}"))
device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
print(f"Python {{platform.python_version()}}, torch {{torch.__version__}}, numba {{numba.__version__}}, {{device}}")"""
SIMULATOR = """\
if not torch.cuda.is_available():
    os.environ["NUMBA_ENABLE_CUDASIM"] = "1"  # numba's simulator, chosen before numba is imported
"""
BUTTON = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({url})"
COLAB = "https://colab.research.google.com/github/{home}/blob/{branch}/labs/{lab}/{lab}.ipynb"
ASSIGNMENT = """\
# ASSIGNMENT CONFIG
init_cell: false
export_cell: false
runs_on: default
tests:
  files: true
  ok_format: false
"""
CHECKS_KNOW = "import torch\n\nimport nf4lab\nfrom nf4lab.labs import {names}\n"
PUBLIC = ROOT / "nf4lab" / "labs" / "public"
GRADERS = ROOT / "_build" / "labs"


def labs() -> list[str]:
    """The labs that there are, `lab1` first."""
    return sorted(path.parent.name for path in ROOT.glob("labs/lab*/master.md"))


def question(cell) -> str | None:
    """The question that a master's cell belongs to, as `q1`, or None."""
    return next((tag for tag in cell.metadata.get("tags", []) if re.fullmatch(r"q\d+", tag)), None)


def points(cell) -> float:
    """The points of a check, from its tag `3-points`."""
    found = [re.fullmatch(r"([\d.]+)-points?", tag) for tag in cell.metadata.get("tags", [])]
    values = [float(match[1]) for match in found if match]
    if len(values) != 1:
        raise ValueError(f"a check has one tag like 3-points; got {cell.metadata.get('tags')}")
    return int(values[0]) if values[0].is_integer() else values[0]


def hidden(cell) -> bool | None:
    """Whether a cell is a hidden check (True), a public one (False) or none (None)."""
    kinds = {"hidden", "public"} & set(cell.metadata.get("tags", []))
    return kinds == {"hidden"} if kinds else None


def otter_cells(master: nbformat.NotebookNode) -> list:
    """The master's cells, with otter's own marks about questions, solutions and checks."""
    cells = [new_raw_cell(ASSIGNMENT)]
    names, block = [], None
    for cell in [*master.cells, None]:
        name = question(cell) if cell is not None and cell.cell_type == "code" else None
        part = None if name is None else "SOLUTION" if hidden(cell) is None else "TESTS"
        if block and block != (name, part):
            cells.append(new_raw_cell(f"# END {block[1]}"))
            if block[0] != name:
                cells.append(new_raw_cell("# END QUESTION"))
        if name and (block is None or block[0] != name):
            if name in names:
                raise ValueError(f"the cells of {name} do not follow one another")
            names.append(name)
            cells.append(new_raw_cell(f"# BEGIN QUESTION\nname: {name}"))
        if name and block != (name, part):
            cells.append(new_raw_cell(f"# BEGIN {part}"))
        block = (name, part) if name else None
        if cell is not None:
            cells.append(as_test(cell) if part == "TESTS" else cell)
    return cells


def as_test(cell):
    """A check as otter reads it, with its points and whether it is hidden in front."""
    config = (
        f'""" # BEGIN TEST CONFIG\npoints: {points(cell)}\nhidden: {str(hidden(cell)).lower()}\n""" # END TEST CONFIG'
    )
    return new_code_cell(f"{config}\n{cell.source}")


def assign(lab: str, folder: Path) -> tuple[nbformat.NotebookNode, dict[str, str], dict[str, str]]:
    """What otter makes of the lab's master, in `folder`: the student's notebook, public checks and all checks."""
    master = jupytext.read(ROOT / "labs" / lab / "master.md")
    made = nbformat.v4.new_notebook(cells=otter_cells(master), metadata={"kernelspec": master.metadata.kernelspec})
    for cell in made.cells:
        cell.metadata.pop("tags", None)
    nbformat.write(made, folder / f"{lab}.ipynb")
    otter.assign.main(folder / f"{lab}.ipynb", folder / "made", no_pdfs=True, no_run_tests=True)
    tests = [
        {path.name: path.read_text() for path in sorted((folder / "made" / part / "tests").glob("*.py"))}
        for part in ("student", "autograder")
    ]
    for name in tests[1]:
        n_all, n_public = (made.get(name, "").count("@test_case(") for made in (tests[1], tests[0]))
        if not 0 < n_public < n_all:
            raise ValueError(f"{lab} {name}: {n_public} of {n_all} checks are public; it needs public and hidden ones")
    student = nbformat.read(folder / "made" / "student" / f"{lab}.ipynb", as_version=4)
    return finish(student, master, lab), *tests


def finish(student: nbformat.NotebookNode, master: nbformat.NotebookNode, lab: str) -> nbformat.NotebookNode:
    """The student's notebook with Colab button, setup cell, metadata and stable ids."""
    student.cells = make_notebooks.split_title(student.cells)
    url = make_notebooks.repository_url()
    config = make_notebooks.yaml.safe_load((ROOT / "_config.yml").read_text())["repository"]
    colab = COLAB.format(home=url.removeprefix("https://github.com/"), branch=config["branch"], lab=lab)
    student.cells[0].source += "\n\n" + BUTTON.format(url=colab)
    student.cells.insert(
        1, new_code_cell(setup_cell(lab, "accelerator" in master.metadata), metadata={"tags": ["setup"]})
    )
    student.metadata = make_notebooks.metadata_for_colab(master)
    make_notebooks.number(student.cells)
    return student


def setup_cell(lab: str, gpu: bool) -> str:
    """The source of the lab's setup cell, with the project's address in it."""
    url = make_notebooks.repository_url()
    note = make_notebooks.NO_HOME if "YOUR_ORG" in url else ""
    return note + SETUP.format(
        url=url, version=make_notebooks.nf4lab.__version__, otter=otter.__version__, lab=lab,
        simulator=SIMULATOR if gpu else "",
    )  # fmt: skip


def with_imports(lab: str, text: str) -> str:
    """A check file with what its checks know in front, and otter's decorator as `feedback` has it."""
    own = (ROOT / "nf4lab" / "labs" / f"{lab}.py").exists()
    imports = CHECKS_KNOW.format(names=f"feedback, {lab}" if own else "feedback")
    return imports + text.replace(
        "from otter.test_files import test_case", "from nf4lab.labs.feedback import test_case"
    )


def public_file(lab: str, text: str) -> str:
    """A public check file as the package ships it."""
    return f'"""Made from labs/{lab}/master.md by `make labs`."""\n\n{with_imports(lab, text.rstrip())}\n'


def check_files(lab: str, tests: dict[str, str], seed: int) -> dict[str, str]:
    """All checks, as the grader runs them: with what they know and the course's SEED in front."""
    return {name: with_imports(lab, f"\nSEED = {seed}\n{text}") for name, text in tests.items()}


def write_grader(made: Path, target: Path, checks: dict[str, str]) -> None:
    """The autograder that otter made, with these check files; other programs that read otter's take it too."""
    (made_zip,) = made.glob("autograder/*-autograder_*.zip")
    target.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(made_zip) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            check = name.startswith("tests/") and checks.get(Path(name).name)
            new.writestr(name, check or old.read(name))


def write_if_different(path: Path, text: str, check: bool) -> bool:
    """Whether the file was out of date; it is written unless `check`."""
    if path.exists() and path.read_text() == text:
        return False
    if not check:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return True


def make(lab: str, seed: int, check: bool = False, grader: Path | None = None) -> list[str]:
    """Make all of one lab; the names of the students' files that were out of date.

    check: leave those as they are. grader: where the grader goes, instead of _build/labs.
    """
    with tempfile.TemporaryDirectory() as folder:
        student, public, every = assign(lab, Path(folder))
        files = {ROOT / "labs" / lab / f"{lab}.ipynb": nbformat.writes(student) + "\n"}
        files |= {PUBLIC / lab / name: public_file(lab, text) for name, text in public.items()}
        stale = [str(path.relative_to(ROOT)) for path, text in files.items() if write_if_different(path, text, check)]
        for extra in set((PUBLIC / lab).glob("*.py")) - set(files):
            stale.append(str(extra.relative_to(ROOT)))
            if not check:
                extra.unlink()
        if grader or not check:
            write_grader(Path(folder) / "made", grader or GRADERS / f"{lab}.zip", check_files(lab, every, seed))
    return stale


def course_seed(wanted: int | None, file: Path = ROOT / "labs" / "seed") -> int:
    """The course's seed: the one in labs/seed, which git does not know; kept there when it is first given or drawn.

    Raises SystemExit where another one is there already: last week's grades came from it.
    """
    kept = int(file.read_text()) if file.exists() else None
    if kept is not None and wanted not in (None, kept):
        raise SystemExit(f"labs/seed holds {kept}, and you ask for {wanted}: remove labs/seed to begin a new course")
    if kept is None:
        kept = wanted if wanted is not None else secrets.randbelow(10**6)
        file.write_text(f"{kept}\n")
        print(f"the course's seed is {kept}, from now on in labs/seed: do not publish it, and do not lose it")
    return kept


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("labs", nargs="*", help="which labs (default: all)")
    parser.add_argument("--seed", type=int, help="the number that the hidden checks' data come from, kept in labs/seed")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail where a student's file is out of date"
    )
    arguments = parser.parse_args()
    seed = 0 if arguments.check else course_seed(arguments.seed)
    stale = [name for lab in arguments.labs or labs() for name in make(lab, seed, arguments.check)]
    print(f"{'out of date' if arguments.check else 'written'}: {', '.join(stale) or 'nothing new'}")
    if not arguments.check:
        print(f"graders with seed {seed} (labs/seed) in _build/labs: keep them from students")
    return 1 if arguments.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
