"""Grades as learning systems import them, made from their own export of the students (the roster).

    canvas             Gradebook -> Import: Student, ID, SIS User ID, SIS Login ID, Section, then the assignment
    moodle             Grades -> Import -> CSV: one column that tells the student, one with points
    moodle-worksheet   Assignment -> Upload grading worksheet: the worksheet that was downloaded, with grades filled in

Students who handed in nothing, and those on whom the grader has failed, are left as they are. Rules: Canvas' importer
takes its header's first line, more than three columns, "Section" last of the fixed ones, and matches by ID, SIS user,
login, then name. Moodle's gives up the whole file at an unknown user, takes "-" for no grade, and wants UTF-8.
"""

import csv
from pathlib import Path

from intake import Roster
from tables import plain, points

FORMATS = ("csv", "canvas", "moodle", "moodle-worksheet")
FIXED = ("Student", "ID", "SIS User ID", "SIS Login ID", "Section")


def write(kind: str, rows: list[dict], roster: Roster, target: Path, assignment: str) -> None:
    """The file for one of FORMATS. rows: graded ones, with the roster's row under "listed" where there is one.

    Raises ValueError where the roster lacks what the system needs.
    """
    rows = [row for row in rows if row["graded"]]
    header, lines = {"canvas": canvas, "moodle": moodle, "moodle-worksheet": worksheet}[kind](rows, roster, assignment)
    with open(target, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(lines)


def canvas(rows: list[dict], roster: Roster, assignment: str) -> tuple[list[str], list[list[str]]]:
    """Canvas' columns; the assignment is a column of the export where its name or number is there."""
    heads = [roster.column(name.lower()) for name in FIXED]
    if heads[0] is None or heads[1] is None:
        raise ValueError("canvas: the roster must be a gradebook export, with columns Student and ID")
    column = next(
        (head for head in roster.header if head == assignment or head.startswith(f"{assignment} (")), assignment
    )
    possible = next((row["possible"] for row in rows), 0)
    lines = [["    Points Possible", "", "", "", "", points(possible)]]
    for row in rows:
        if row["listed"]:
            lines.append([*[row["listed"][head] if head else "" for head in heads], points(row["score"])])
    return [*FIXED, column], lines


def moodle(rows: list[dict], roster: Roster, assignment: str) -> tuple[list[str], list[list[str]]]:
    """One column that Moodle maps to a user, one with points; nobody whom the roster does not know."""
    head = roster.column("email address", "email", "e-mail", "username", "id number")
    if head is None:
        raise ValueError("moodle: the roster needs a column Email address, Username or ID number")
    scores = {id(row["listed"]): points(row["score"]) for row in rows if row["listed"]}
    return [head, assignment], [[listed[head], scores.get(id(listed), "-")] for listed in roster.rows if listed[head]]


def worksheet(rows: list[dict], roster: Roster, assignment: str) -> tuple[list[str], list[list[str]]]:
    """The worksheet itself, with grade and feedback comments of those who were graded."""
    identifier, grade = roster.column("identifier"), roster.column("grade")
    if identifier is None or grade is None:
        raise ValueError("moodle-worksheet: the roster must be the assignment's grading worksheet (Identifier, Grade)")
    comments = roster.column("feedback comments")
    lines = []
    for listed in roster.rows:
        row = next((row for row in rows if row["listed"] is listed), None)
        filled = dict(listed)
        if row:
            filled[grade] = points(row["score"])
            if comments:
                per_question = ", ".join(f"question {q[1:]}: {points(p)}" for q, p in row["questions"].items())
                filled[comments] = plain(f"{points(row['score'])} of {points(row['possible'])} points. {per_question}.")
        lines.append([filled[head] for head in roster.header])
    return roster.header, lines
