"""The notebooks that Colab opens: made from the chapters, and run as Colab would run them."""

import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import jupytext
import nbformat
import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("make_notebooks", ROOT / "book" / "make_notebooks.py")
make_notebooks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_notebooks)
CHAPTERS = make_notebooks.chapters()
COLAB_FOR_OTTER = ["ipywidgets==7.7.1", "pandas", "nbconvert", "dill", "wrapt", "requests", "sphinx", "click"]
COLAB = ["numba==0.61.2", "numpy==2.1.3", "scipy==1.16.3", "matplotlib==3.10.0"]


def test_every_chapter_in_the_table_of_contents_has_code():
    prefixes = [path.stem.split("-")[0] for path in CHAPTERS if path.stem[0].isdigit()]
    assert sorted(prefixes) == sorted(path.stem.split("-")[0] for path in (ROOT / "book").glob("[0-9]*.md"))
    assert prefixes == [*sorted(prefixes[:7]), "16", *sorted(prefixes[8:])]  # 16 goes on where 7 ends
    assert CHAPTERS[0].stem == "index"


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_the_notebook_has_the_cells_of_its_chapter_after_the_setup(chapter):
    notebook = nbformat.read(chapter.with_suffix(".ipynb"), as_version=4)
    nbformat.validate(notebook)
    setup = [cell for cell in notebook.cells if "setup" in cell.metadata.get("tags", [])]
    assert [cell.source for cell in setup] == [make_notebooks.setup_cell()]
    in_notebook = [cell.source for cell in notebook.cells if cell.cell_type == "code" and cell not in setup]
    assert in_notebook == [cell.source for cell in jupytext.read(chapter).cells if cell.cell_type == "code"]


def test_the_notebooks_are_up_to_date():
    check = subprocess.run([sys.executable, make_notebooks.__file__, "--check"], capture_output=True, text=True)
    assert check.returncode == 0, check.stdout


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_no_directive_of_the_book_shows_in_a_notebook(chapter):
    notebook = nbformat.read(chapter.with_suffix(".ipynb"), as_version=4)
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert not re.search(r"^\s*(```\{|:::|\(\w[\w-]*\)=)|\{[a-z:]+\}`", prose, re.MULTILINE)


@pytest.mark.parametrize("chapter", CHAPTERS[1:], ids=lambda path: path.stem)
def test_a_handout_has_the_exercises_of_its_chapter_and_no_solution(chapter):
    handout, whole = make_notebooks.handout_of(chapter), make_notebooks.notebook_of(chapter)
    nbformat.validate(handout)
    text, of_whole = ("\n".join(cell.source for cell in of.cells) for of in (handout, whole))
    exercises = re.findall(r"^\*\*\d\. .+$", of_whole, re.MULTILINE)
    assert len(exercises) >= 2 and re.findall(r"^\*\*\d\. .+$", text, re.MULTILINE) == exercises
    for prose in re.findall(r'<details class="solution">(.*?)</details>', of_whole, re.DOTALL):
        assert prose.strip() not in text
    assert not [cell for cell in handout.cells if "hide-cell" in cell.metadata.get("tags", [])]
    assert "solution" not in re.findall(r'<details class="(\w+)">', text)


def test_home_rewrites_the_address_everywhere(tmp_path):
    clone = tmp_path / "fork"
    subprocess.run(["git", "clone", "-q", ROOT, clone], check=True)
    (clone / ".venv").symlink_to(Path(sys.prefix))
    subprocess.run(
        ["make", "-s", "home", "URL=https://github.com/me/mine", "-o", ".venv/bin/ready"], cwd=clone, check=True
    )
    assert "url: https://github.com/me/mine\n" in (clone / "_config.yml").read_text()
    for notebook in (clone / "book").glob("*.ipynb"):
        assert "nf4lab @ git+https://github.com/me/mine@v" in notebook.read_text()
    read = [clone / "_config.yml", *(clone / "book").glob("*.md"), *(clone / "book").glob("*.ipynb")]
    assert not [path for path in read if "YOUR_ORG" in path.read_text()]


def installed(name, extras=()):
    """The top of all that is installed of a distribution and of what it requires: {name: path}."""
    distribution, found = importlib.metadata.distribution(name), {}
    for file in distribution.files:
        if file.parts[0] not in ("..", "__pycache__"):
            found[file.parts[0]] = distribution.locate_file(file.parts[0])
    for requirement in map(Requirement, distribution.requires or []):
        wanted = requirement.marker is None or any(requirement.marker.evaluate({"extra": e}) for e in ("", *extras))
        if wanted:
            found |= installed(requirement.name, requirement.extras)
    return found


@pytest.fixture(scope="module")
def colab(tmp_path_factory):
    """A new environment with what Colab has and without this package: the path of its Python.

    torch and pip are those that are here, lent from a folder beside the environment, in which pip changes nothing.
    """
    folder, lent = tmp_path_factory.mktemp("colab"), tmp_path_factory.mktemp("lent")
    venv.create(folder)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "lent.pth").write_text(f"{lent}\n")
    for name, path in (installed("torch") | installed("pip")).items():
        (lent / name).symlink_to(path)
    python = folder / "bin" / "python"
    pip = [python, "-m", "pip", "install", "-q", "--no-compile", "--disable-pip-version-check"]
    subprocess.run([*pip, *COLAB, "safetensors", "tqdm", "nbclient", "ipykernel"], check=True)
    return python


def run_on_colab(colab, folder, notebook):
    """Run the notebook as Colab does, with this repository in place of its address: the outputs' data, cell by cell."""
    setup = next(cell for cell in notebook.cells if "setup" in cell.metadata.get("tags", []))
    address = f"git+{make_notebooks.repository_url()}@v{make_notebooks.nf4lab.__version__}"
    assert address in setup.source
    setup.source = setup.source.replace(address, f"git+file://localhost{ROOT}")
    nbformat.write(notebook, folder / "notebook.ipynb")
    run = (
        "import nbformat, nbclient; notebook = nbformat.read('notebook.ipynb', 4);"
        "nbclient.NotebookClient(notebook, timeout=7200, kernel_name='python3').execute();"
        "nbformat.write(notebook, 'executed.ipynb')"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"COLAB_RELEASE_TAG": "rehearsal"}
    environment["PATH"] = f"{colab.parent}:{environment['PATH']}"
    done = subprocess.run([colab, "-c", run], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    executed = json.loads((folder / "executed.ipynb").read_text())
    return ["".join("".join(o.get("text", "")) for o in c.get("outputs", [])) for c in executed["cells"]], executed


def test_a_notebook_runs_from_an_empty_folder_on_colab(colab, tmp_path):
    notebook = nbformat.read(ROOT / "book" / "03-levels-from-quantiles.ipynb", as_version=4)
    printed = "".join(run_on_colab(colab, tmp_path, notebook)[0])
    assert "numba 0.61.2, no GPU" in printed
    assert "with tail = 0.9677083 all 16 are equal" in printed


def test_a_lab_runs_on_colab_with_its_checks(colab, tmp_path):
    """Lab 1 with the master's answers, but for one in which ties go up."""
    lab_submissions = pytest.importorskip("lab_submissions", reason="a copy for students has no masters")
    pip = [colab, "-m", "pip", "install", "-q", "--no-compile", "--disable-pip-version-check"]
    subprocess.run([*pip, *COLAB, *COLAB_FOR_OTTER], check=True)
    notebook = nbformat.read(ROOT / "labs" / "lab1" / "lab1.ipynb", as_version=4)
    answers = {cell.source.split("(")[0]: cell.source for cell in lab_submissions.solved("lab1").cells}
    for cell in notebook.cells:
        if "otter_answer_cell" in cell.metadata.get("tags", []):
            cell.source = answers[cell.source.split("(")[0]].replace("> boundaries", ">= boundaries")
    _, executed = run_on_colab(colab, tmp_path, notebook)
    checks = {
        re.search(r"q\d", "".join(cell["source"]))[0]: "".join(cell["outputs"][-1]["data"]["text/plain"])
        for cell in executed["cells"]
        if "".join(cell["source"]).startswith("grader.check")
    }
    assert {name for name, text in checks.items() if "All test cases passed!" in text} == {"q1", "q3", "q4", "q5", "q6"}
    assert "codes[2]: expected 0, got 1 (2 of 9 differ)" in checks["q2"]
    assert "Likely cause: a tie went the wrong way" in checks["q2"]
