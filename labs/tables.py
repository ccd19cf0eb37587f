"""What grading writes: the report as rows come, a page for each student, and the table at the end."""

import csv
import hashlib
import html
import json
import re
from pathlib import Path


def plain(text: str) -> str:
    """Text for a cell of a table, which no spreadsheet takes for a formula, wherever it splits cells."""
    return re.sub(r"(^|[;,\t\r\n]\s*)([=+\-@\uff1d\uff0b\uff0d\uff20])", r"\1'\2", clean(text))


def clean(text: str) -> str:
    """Text that can be written as UTF-8 and shown in a terminal, whatever a submission made of it."""
    return "".join(c if c.isprintable() or c in "\t\r\n" else c.encode("unicode_escape").decode() for c in str(text))


def points(value: float | None) -> str:
    """Points without a needless fraction; nothing where the grader has failed."""
    return "" if value is None else f"{value:g}"


class Report:
    """OUT-report.jsonl: every row is there as soon as it is known, so that a batch that was stopped goes on.

    A row counts again if the same file was graded with the same checks, and the grader did not fail.
    """

    def __init__(self, path: Path, stamp: str):
        self.path, self.stamp = path, stamp

    def done(self) -> dict[str, dict]:
        """The rows of an earlier run with the same checks, by the digest of what was graded."""
        if not self.path.exists():
            return {}
        rows = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:  # cut off while it was written
                continue
        mine = [row for row in rows if isinstance(row, dict) and row.get("stamp") == self.stamp and row.get("graded")]
        return {row["digest"]: row for row in mine if "digest" in row}

    def add(self, row: dict) -> None:
        """Append a row, whatever text is in it, in a line of its own even where the last one was cut off."""
        with open(self.path, "ab+") as file:
            file.seek(max(0, file.seek(0, 2) - 1))
            cut = file.read() not in (b"", b"\n")
            file.write(b"\n" * cut + json.dumps(row | {"stamp": self.stamp}).encode("ascii") + b"\n")


def digest(student: str, data: bytes | None) -> str:
    """What tells a submission from another."""
    return hashlib.sha256(clean(student).encode() + b"\0" + (data or b"")).hexdigest()[:24]


def write_table(rows: list[dict], target: Path) -> None:
    """The table, one row a submission, by name."""
    questions = sorted({q for row in rows for q in row["questions"]}, key=lambda q: int(q[1:]))
    with open(target, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["student", "score", "possible", "percent", *questions, "late", "outcome", "notes"])
        for row in rows:
            counts = row["graded"] and row["possible"]
            percent = points(round(100 * row["score"] / row["possible"], 2)) if counts else ""
            writer.writerow([
                plain(row["student"]), points(row["score"]), points(row["possible"]), percent,
                *[points(row["questions"].get(q, 0)) for q in questions], "late" if row.get("late") else "",
                plain(row["outcome"]), plain("; ".join(row["notes"])),
            ])  # fmt: skip


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{student}: {lab}</title>
<style>:root {{ color-scheme: light dark }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; padding: 0 1rem }}
pre {{ white-space: pre-wrap; background: #f3f3f3; color: #111; padding: .6rem; border-left: 4px solid #d55e00 }}
h2 {{ margin-bottom: 0 }}</style></head>
<body><h1>{lab}: {total}</h1><p>{student}: {outcome}.</p>
{body}
</body></html>
"""


def page(row: dict, lab: str) -> str:
    """What a student may see. Of a hidden check: its points, and the cause if it is certain; none of its data."""
    parts = [f"<p>{html.escape(clean(note))}.</p>" for note in row.get("handed_in", [])]
    if row["errors"]:
        errors = "".join(f"<pre>{html.escape(clean(error))}</pre>" for error in row["errors"])
        parts.append("<h2>Cells that failed</h2>" + errors)
    for question in sorted(row["questions"] if row["graded"] else (), key=lambda q: int(q[1:])):
        checks = [check for check in row["checks"] if check["question"] == question]
        possible = sum(check["points"] for check in checks)
        parts.append(f"<h2>Question {question[1:]}: {points(row['questions'][question])} of {points(possible)}</h2>")
        for check in checks:
            if not check["hidden"]:
                message = "" if check["passed"] else f"<pre>{html.escape(clean(check['message']))}</pre>"
                verdict = "passed" if check["passed"] else "did not pass"
                parts.append(f"<p>The check in the notebook {verdict}.</p>{message}")
        unseen = [check for check in checks if check["hidden"]]
        passed = sum(check["passed"] for check in unseen)
        parts.append(f"<p>Checks with other data that passed: {passed} of {len(unseen)}.</p>")
        causes = dict.fromkeys(clean(cause) for check in unseen if not check["passed"] for cause in check["causes"])
        parts += [f"<p>Cause: {html.escape(cause)}.</p>" for cause in causes]
    words = {key: html.escape(clean(row[key])) for key in ("student", "outcome")}
    total = f"{points(row['score'])} of {points(row['possible'])} points" if row["graded"] else "not graded yet"
    return PAGE.format(lab=html.escape(lab.replace("lab", "Lab ")), body="\n".join(parts), total=total, **words)


def page_name(student: str) -> str:
    """A file name for a student's page that any system takes; two students never share one."""
    name = re.sub(r"[^\w .@+-]", "_", clean(student))[:80].strip(" .") or "student"
    return name if name == student else f"{name}-{hashlib.sha256(clean(student).encode()).hexdigest()[:6]}"


def write_page(row: dict, pages: Path, lab: str) -> None:
    """The student's page in its folder."""
    pages.mkdir(parents=True, exist_ok=True)
    (pages / f"{page_name(row['student'])}.html").write_text(
        page(row, lab), encoding="utf-8", errors="backslashreplace"
    )
