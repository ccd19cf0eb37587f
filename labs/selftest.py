"""Before a batch: the master must earn all points here, the handout none. Else it is the set-up that is wrong."""

import re
from pathlib import Path

import jupytext
import nbformat
from judge import Job, grade_one
from nbformat.v4 import new_notebook

LABS = Path(__file__).resolve().parent


def solved(lab: str) -> bytes:
    """The master as a student who knows everything would hand it in: without its checks."""
    master = jupytext.read(LABS / lab / "master.md")
    cells = [cell for cell in master.cells if not {"public", "hidden"} & set(cell.metadata.get("tags", []))]
    for cell in cells:
        cell.source = re.sub(r" *# (BEGIN |END )?SOLUTION\n?", "\n", cell.source)
    return nbformat.writes(new_notebook(cells=cells)).encode()


def failures(job: Job) -> list[str]:
    """What is wrong with grading here, in words; nothing where it works."""
    found = []
    if (LABS / job.lab / "master.md").exists():
        row = grade_one("the master", solved(job.lab), job)
        if row["score"] != row["possible"]:
            lost = [f"{c['question']}: {c['message']}" for c in row["checks"] if not c["passed"]]
            words = "; ".join([row["outcome"], *row["notes"][:3], *row["errors"][:1], *lost[:2]])
            found.append(f"the master earns {row['score'] or 0:g} of {row['possible']:g}: {words}")
    handout = LABS / job.lab / f"{job.lab}.ipynb"
    if handout.exists():
        row = grade_one("the handout", handout.read_bytes(), job)
        if row["score"] or not row["outcome"].startswith("graded"):
            found.append(f"the handout earns {row['score'] or 0:g}: {'; '.join([row['outcome'], *row['notes'][:3]])}")
    return found
