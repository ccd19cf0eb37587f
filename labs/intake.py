"""Submissions as learning systems export them: folders and zips of Canvas and Moodle, or one file a student.

    Canvas   smithjohn_23456_9011_lab1.ipynb, smithjohn_LATE_23456_9012_lab1-1.ipynb
    Moodle   Ada Lovelace_123456_assignsubmission_file/lab1.ipynb, or that as one name without folders
    others   ada.ipynb, ada/anything.ipynb, ada.zip

A student's newest notebook counts. What systems leave behind (Thumbs.db, __MACOSX, …) is passed over.
"""

import csv
import io
import os
import re
import unicodedata
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

CANVAS = re.compile(r"(?P<name>[^_/]+)_(?P<late>LATE_)?(?P<id>\d+)_(?P<attempt>\d+)_(?P<file>.+)", re.IGNORECASE)
MOODLE = re.compile(r"(?P<name>.+)_(?P<id>\d+)_assignsubmission_(?P<kind>[a-z]+)_?/?(?P<file>.*)")
LITTER = re.compile(r"(^|/)(\..*|Thumbs\.db|desktop\.ini|__MACOSX|Icon\r|.*~)(/|$)", re.IGNORECASE)
COPY = re.compile(r"[ _-]?(\(\d+\)|- ?copy|copy)$", re.IGNORECASE)  # what browsers and systems add to a second download
MOST_ZIP_BYTES = 2**29
NAMES = ("student", "full name", "name", "sortable name", "display name")
IDS = (
    "id", "identifier", "sis user id", "sis login id", "email address", "email", "e-mail", "username", "id number",
    "login id", "login",
)  # fmt: skip


@dataclass
class Submission:
    """What one student handed in. data: the newest notebook, or None where there is no notebook; attempt: its order."""

    student: str
    number: str = ""  # Canvas' user, or Moodle's participant
    data: bytes | None = None
    attempt: tuple = ()
    late: bool = False
    notes: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)


@dataclass
class Roster:
    """The students of a course, as a CSV of the learning system has them; `rows` keep all of its columns."""

    header: list[str]
    rows: list[dict[str, str]]

    def column(self, *names: str) -> str | None:
        """The column whose heading is one of these, whatever the case."""
        return next((head for name in names for head in self.header if head.strip().lower() == name), None)

    def find(self, submission: Submission) -> dict[str, str] | None:
        """The student's row: by number where the files carry one, else by name, e-mail or login."""
        keys = {submission.number, f"Participant {submission.number}"} if submission.number else set()
        for column in ("id", "identifier"):
            head = self.column(column)
            found = [row for row in self.rows if head and row[head] in keys]
            if found:
                return found[0]
        wanted = spelled(submission.student)
        for column in (*IDS, *NAMES):
            head = self.column(column)
            found = [row for row in self.rows if head and wanted in spellings(row[head])]
            if len(found) == 1:
                return found[0]
        return None

    def name(self, row: dict[str, str]) -> str:
        """What a row's student is called."""
        head = self.column(*NAMES)
        first, last = self.column("first name", "firstname"), self.column("last name", "lastname", "surname")
        if head is None and first and last:
            return f"{row[first]} {row[last]}"
        return row[head or self.header[0]]


def read_roster(path: Path) -> Roster:
    """The roster in a CSV, in UTF-8 or as Windows writes it. Raises ValueError where it has no heading that we know."""
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("cp1252", errors="replace")
    delimiter = max(",;\t", key=text.partition("\n")[0].count)
    lines = list(csv.reader(io.StringIO(text), delimiter=delimiter))
    header = [head.strip() for head in lines[0]] if lines else []
    if not {head.lower() for head in header} & {*NAMES, *IDS}:
        raise ValueError(f"{path.name} is no roster: its first line has none of {', '.join((*NAMES, *IDS))}")
    rows = [dict(zip(header, (*line, *[""] * len(header)), strict=False)) for line in lines[1:] if any(line)]
    roster = Roster(header, rows)
    roster.rows = [row for row in rows if not re.match(r"\s*(Points Possible|Student, Test)", roster.name(row))]
    return roster


def spelled(name: str) -> str:
    """A name as it is compared: no case, accents, blanks or marks."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode() or name
    return re.sub(r"\W|_", "", plain).lower()


def spellings(name: str) -> set[str]:
    """The ways in which a roster's name, e-mail or login stands in a file's name."""
    parts = [part.strip() for part in name.split(",")]
    return {spelled(name), spelled(" ".join(reversed(parts))), spelled(name.split("@")[0])}


def submissions(folder: Path) -> dict[str, Submission]:
    """What is in a folder, or in a zip, by student. Raises FileNotFoundError where there is nothing."""
    found: dict[str, Submission] = {}
    for name, date, data in sorted(files(folder), key=lambda item: item[:2]):
        one = identify(name, date)
        if one is None:
            continue
        key = one.number or spelled(one.student) or one.student
        mine = found.setdefault(key, one)
        mine.files.append(PurePosixPath(name).name)
        mine.late |= one.late
        notebook = is_notebook(name, data)
        if notebook and (mine.data is None or one.attempt >= mine.attempt):
            mine.data, mine.attempt, mine.notes = data, one.attempt, [f"counts: {mine.files[-1]}"]
        elif mine.data is None and mine is one:
            mine.attempt = ()
    if not found:
        raise FileNotFoundError(f"no submissions in {folder}")
    for one in found.values():
        n = sum(name.lower().endswith(".ipynb") for name in one.files)
        one.notes = [f"{n} notebooks handed in; the newest counts: {one.notes[0][8:]}"] if n > 1 and one.notes else []
        one.notes += ["handed in late"] * one.late
    return _by_name(found.values())


def _by_name(found) -> dict[str, Submission]:
    """By the student's name, with the number where two have the same."""
    names = [one.student for one in found]
    for one in found:
        if names.count(one.student) > 1 and one.number:
            one.student = f"{one.student} ({one.number})"
    return {one.student: one for one in found}


def is_notebook(name: str, data: bytes) -> bool:
    """Whether a file may be a notebook: by its name, or by what is in it."""
    return name.lower().endswith(".ipynb") or (data.lstrip()[:1] == b"{" and b'"cells"' in data)


def identify(name: str, date: tuple) -> Submission | None:
    """Whose file that is, from its path: None for what no student handed in."""
    if LITTER.search(name):
        return None
    path = PurePosixPath(name)
    if found := MOODLE.fullmatch(name):
        return (
            Submission(found["name"].split("/")[-1], found["id"], attempt=(date, name))
            if found["kind"] == "file"
            else None
        )
    if found := CANVAS.fullmatch(path.name):
        again = re.search(r"-(\d+)\.\w+$", found["file"])
        attempt = (int(found["attempt"]), int(again[1]) if again else 0)
        return Submission(found["name"], found["id"], attempt=attempt, late=bool(found["late"]))
    owner = path.parts[0] if len(path.parts) > 1 else path.stem
    return Submission(COPY.sub("", owner) or owner, attempt=(date, name))


def files(folder: Path) -> Iterator[tuple[str, tuple, bytes]]:
    """(path below the folder, date, content) of each file, those in zips among them."""
    if folder.is_file() and zipfile.is_zipfile(folder):
        yield from _unzipped("", folder.read_bytes())
        return
    for path in sorted(folder.rglob("*")):
        name = readable(os.fsencode(str(path.relative_to(folder))))
        if not path.is_file() or path.is_symlink() or LITTER.search(name):
            continue
        date = tuple(_date(path.stat().st_mtime))
        if name.lower().endswith(".zip") and zipfile.is_zipfile(path):
            yield from _unzipped(name, path.read_bytes())
        else:
            yield name, date, path.read_bytes()


def _date(seconds: float) -> tuple:
    import time

    return time.gmtime(seconds)[:6]


def _unzipped(name: str, data: bytes) -> Iterator[tuple[str, tuple, bytes]]:
    """What is in a zip. In a student's own zip the student is whom the zip's name says."""
    whose = "" if not name or identify(name, ()) is None else name[:-4]
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        if sum(info.file_size for info in archive.infolist()) > MOST_ZIP_BYTES:
            raise ValueError(f"{name or 'the zip'} holds more than {MOST_ZIP_BYTES >> 20} MB")
        for info in archive.infolist():
            if info.is_dir() or LITTER.search(info.filename):
                continue
            inner = archive.read(info) if not info.flag_bits & 1 else b""
            moodle_or_canvas = MOODLE.fullmatch(info.filename) or CANVAS.fullmatch(PurePosixPath(info.filename).name)
            if info.filename.lower().endswith(".zip"):
                yield from _unzipped(info.filename, inner)
            elif whose and not moodle_or_canvas:
                yield _within(whose, info.filename), info.date_time, inner
            else:
                yield info.filename, info.date_time, inner


def _within(whose: str, name: str) -> str:
    """The path of a file in a student's zip, such that it still tells the student."""
    last = PurePosixPath(name).name
    if MOODLE.fullmatch(whose):
        return (
            f"{whose}{'/' if whose.endswith('_') else '_'}{last}"
            if "/" not in whose
            else f"{PurePosixPath(whose).parent}/{last}"
        )
    if CANVAS.fullmatch(PurePosixPath(whose).name):
        return f"{whose}_{last}"
    return f"{whose.split('/')[0]}/{last}"


def readable(name: bytes) -> str:
    """A file's name as text, whatever system wrote it."""
    try:
        return name.decode()
    except UnicodeDecodeError:
        return name.decode("latin-1")
