"""Gradescope's autograder, run as its specification says: unpacked to source, started beside it, for one submission.

https://gradescope-autograders.readthedocs.io/en/latest/specs/
"""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile

import lab_submissions
import nbformat
import pytest
from lab_submissions import ROOT, as_bytes, solved, with_answer

sys.path.insert(0, str(ROOT / "labs"))
import make_gradescope
import make_labs

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="submissions are shut in by Linux's own means")
EVERY = {"score", "execution_time", "output", "visibility", "stdout_visibility", "extra_data", "tests", "leaderboard"}
OF_A_TEST = {"score", "max_score", "name", "number", "output", "tags", "visibility", "extra_data"}
TIES = """def nearest(w, levels):
    return torch.bucketize(w, (levels[:-1] + levels[1:]) / 2, right=True).to(torch.uint8)"""


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gradescope")
    make_labs.make("lab1", seed=2026, check=True, grader=folder / "lab1.zip")
    make_gradescope.make("lab1", folder / "lab1.zip", folder / "autograder.zip")
    return folder / "autograder.zip"


def unpacked(archive, folder):
    """What Gradescope makes of the archive, before setup.sh runs."""
    subprocess.run(["unzip", "-q", archive, "-d", folder / "source"], check=True)
    shutil.copy(folder / "source" / "run_autograder", folder)
    return folder


def graded(folder, files, **environment):
    """results.json for a submission of these files, after it has been checked against the specification."""
    shutil.rmtree(folder / "submission", ignore_errors=True)
    (folder / "submission").mkdir()
    for number, (name, data) in enumerate(files.items()):
        (folder / "submission" / name).write_bytes(data)
        os.utime(folder / "submission" / name, (1e9 + 60 * number,) * 2)
    own = {"PATH": os.environ["PATH"], "AUTOGRADER": str(folder)} | environment
    done = subprocess.run([folder / "run_autograder"], cwd=folder, env=own, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((folder / "results" / "results.json").read_text())
    assert set(found) <= EVERY and all(set(test) <= OF_A_TEST for test in found["tests"])
    counted = [test for test in found["tests"] if test["visibility"] == "visible"]
    assert sum(test["score"] for test in counted) == found["score"]
    assert sum(test["max_score"] for test in counted) == 20
    assert all(0 <= test["score"] <= test["max_score"] for test in counted)
    return found


@pytest.fixture(scope="module")
def here(archive, tmp_path_factory):
    """The autograder with this environment in place of the one that setup.sh makes; the package is the archive's."""
    folder = unpacked(archive, tmp_path_factory.mktemp("autograder"))
    (folder / "source" / ".venv").symlink_to(sys.prefix)
    return lambda files: graded(folder, files, PYTHONPATH=str(folder / "source"))


def told(found, name):
    return next(test["output"] for test in found["tests"] if test["name"] == name)


def test_a_right_answer_earns_all_and_the_newest_notebook_counts(here):
    files = {"zz.ipynb": as_bytes(lab_submissions.without("lab1", "nf4")), "aa.ipynb": as_bytes(solved("lab1"))}
    found = here(files)
    assert (found["score"], found["output"]) == (20, "graded")
    assert not any(test["output"] for test in found["tests"] if test["visibility"] == "visible")


def test_a_student_sees_messages_and_causes_and_no_hidden_data_and_an_instructor_the_notes(here):
    notebook = with_answer("lab1", TIES)
    notebook.cells.insert(0, nbformat.v4.new_code_cell("import ctypes\nraise ValueError('mine')"))
    found = here({"lab1.ipynb": as_bytes(notebook)})
    assert found["score"] < 20 and "1 cell failed" in found["output"] and "mine" in found["output"]
    (lost,) = [test for test in found["tests"] if test["visibility"] == "visible" and test["score"] < test["max_score"]]
    assert "Likely cause: a tie went the wrong way" in lost["output"] and "Cause: a tie went" in lost["output"]
    assert [test["visibility"] for test in found["tests"]].count("hidden") == 1
    assert "uses ctypes" in told(found, "For instructors") and "shut in by: " in told(found, "For instructors")


@pytest.mark.parametrize("files", [{}, {"notes.txt": b"not today"}, {"lab1.ipynb": b"{"}], ids=["none", "text", "cut"])
def test_what_is_no_notebook_earns_nothing_and_is_told_so(here, files):
    found = here(files)
    assert found["score"] == 0 and found["output"].startswith("unreadable: ")


def test_where_the_grader_itself_fails_there_is_an_error_and_no_result(archive, tmp_path):
    """Gradescope tells the instructor of it; a result would be the student's 0."""
    folder = unpacked(archive, tmp_path)
    (folder / "source" / ".venv").symlink_to(sys.prefix)
    (folder / "source" / "labs" / "inside" / "supervise.py").write_text("raise SystemExit('broken')")
    (folder / "submission").mkdir()
    (folder / "submission" / "lab1.ipynb").write_bytes(as_bytes(solved("lab1")))
    own = {"PATH": os.environ["PATH"], "AUTOGRADER": str(folder), "PYTHONPATH": str(folder / "source")}
    done = subprocess.run([folder / "run_autograder"], cwd=folder, env=own, capture_output=True, text=True)
    assert done.returncode != 0 and "not graded: ChildProcessError" in done.stderr
    assert not (folder / "results" / "results.json").exists()


def test_the_archive_has_all_that_grading_imports_at_the_projects_pins(archive):
    with zipfile.ZipFile(archive) as packed:
        names = packed.namelist()
        setup = packed.read("setup.sh").decode()
        assert all(packed.getinfo(name).external_attr >> 16 & 0o111 for name in ("setup.sh", "run_autograder"))
    assert {"setup.sh", "run_autograder", "grader.zip", "requirements.txt", "nf4lab/labs/lab1.py"} <= set(names)
    assert not [name for name in names if re.search(r"master|labs/seed|tests/|__pycache__", name)]
    pinned = re.findall(r"^([\w-]+)==", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    (line,) = re.findall(r"-c requirements.txt (.*)", setup)
    assert set(line.split()) == set(make_gradescope.NEEDED) <= set(pinned)
    assert subprocess.run(["bash", "-n"], input=setup, text=True).returncode == 0


@pytest.mark.skipif(not shutil.which("uv"), reason="needs uv, which setup.sh would install for all of this machine")
def test_setup_makes_an_environment_that_grades(archive, tmp_path):
    folder = unpacked(archive, tmp_path)
    subprocess.run([folder / "source" / "setup.sh"], env=os.environ | {"AUTOGRADER": str(folder)}, check=True)
    right = graded(folder, {"lab1.ipynb": as_bytes(solved("lab1"))})
    assert (right["score"], right["output"]) == (20, "graded")
    python = folder / "source" / ".venv" / "bin" / "python"
    command = [python, "-I", "-c", "import nf4lab; print(nf4lab.__file__)"]  # without what a developer's PYTHONPATH has
    found = subprocess.check_output(command, cwd="/", text=True)
    assert found.startswith(str(folder))
