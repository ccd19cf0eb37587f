"""What grading writes: the gradebook's table, a page for each student, the instructor's report."""

import csv
import html
import json
from pathlib import Path


def plain(text: str) -> str:
    """Text for a cell of a table, which no spreadsheet takes for a formula."""
    return "'" + text if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text


def number(points: float) -> str:
    """Points without a needless fraction."""
    return f"{points:g}"


def write_table(rows: list[dict], target: Path) -> None:
    """The gradebook's table, one row a submission, by name."""
    questions = sorted({q for row in rows for q in row["questions"]}, key=lambda q: int(q[1:]))
    with open(target, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["student", "score", "possible", "percent", *questions, "outcome", "notes"])
        for row in rows:
            points = [number(row["questions"][q]) for q in questions]
            percent = number(round(100 * row["score"] / row["possible"], 2))
            words = [plain(row["outcome"]), plain("; ".join(row["notes"]))]
            writer.writerow(
                [plain(row["student"]), number(row["score"]), number(row["possible"]), percent, *points, *words]
            )


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{student}: {lab}</title>
<style>:root {{ color-scheme: light dark }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; padding: 0 1rem }}
pre {{ white-space: pre-wrap; background: #f3f3f3; color: #111; padding: .6rem; border-left: 4px solid #d55e00 }}
h2 {{ margin-bottom: 0 }}</style></head>
<body><h1>{lab}: {score} of {possible} points</h1><p>{student}: {outcome}.</p>
{body}
</body></html>
"""


def page(row: dict, lab: str) -> str:
    """What a student may see: nothing of a hidden check but the points it gave."""
    parts = []
    if row["errors"]:
        parts.append("<h2>Cells that failed</h2>" + "".join(f"<pre>{html.escape(e)}</pre>" for e in row["errors"]))
    for question, score in row["questions"].items():
        checks = [check for check in row["checks"] if check["question"] == question]
        possible = sum(check["points"] for check in checks)
        parts.append(f"<h2>Question {question[1:]}: {number(score)} of {number(possible)}</h2>")
        for check in checks:
            if not check["hidden"]:
                message = "" if check["passed"] else f"<pre>{html.escape(check['message'])}</pre>"
                verdict = "passed" if check["passed"] else "did not pass"
                parts.append(f"<p>The check in the notebook {verdict}.</p>{message}")
        unseen = [check for check in checks if check["hidden"]]
        passed = sum(check["passed"] for check in unseen)
        parts.append(f"<p>Checks with other data that passed: {passed} of {len(unseen)}.</p>")
    words = {key: html.escape(str(row[key])) for key in ("student", "outcome")}
    points = {key: number(row[key]) for key in ("score", "possible")}
    return PAGE.format(lab=html.escape(lab.replace("lab", "Lab ")), body="\n".join(parts), **words, **points)


def write_all(rows: list[dict], target: Path, lab: str) -> None:
    """The table, the students' pages and the instructor's report."""
    target.parent.mkdir(parents=True, exist_ok=True)
    write_table(rows, target)
    pages = target.with_name(f"{target.stem}-feedback")
    pages.mkdir(exist_ok=True)
    for row in rows:
        (pages / f"{row['student']}.html").write_text(page(row, lab), encoding="utf-8")
    with open(target.with_name(f"{target.stem}-report.jsonl"), "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
