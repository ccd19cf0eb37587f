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
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

LATE = "handed in late"
CANVAS = re.compile(r"(?P<name>[^_/]+)_(?P<late>LATE_)?(?P<id>\d+)_(?P<attempt>\d+)_(?P<file>.+)", re.IGNORECASE)
# A folder's name ends in what Moodle adds; a file's goes on with what the student called it, so there the first counts.
MOODLE_FOLDER = re.compile(r"(?P<name>.+)_(?P<id>\d+)_assignsubmission_(?P<kind>[a-z]+)_?")
MOODLE_FILE = re.compile(r"(?P<name>.+?)_(?P<id>\d+)_assignsubmission_(?P<kind>[a-z]+)_?(?P<file>.*)")
LITTER = re.compile(r"(^|/)(\..*|Thumbs\.db|desktop\.ini|__MACOSX|Icon\r|.*~)(/|$)", re.IGNORECASE)
COPY = re.compile(r"[ _-]?(\(\d+\)|- ?copy|copy)$", re.IGNORECASE)  # what browsers and systems add to a second download
MOST_BYTES = 2**27  # of one file, and of all that a student's own zip holds
MOST_FILES = 2000  # in a student's own zip
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
    column: str = ""  # the roster's, which has that number
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

    def find_all(self, submissions: dict[str, Submission]) -> dict[str, dict[str, str] | None]:
        """The roster's row of each; nobody's where two would have the same, since one of them bears a foreign name."""
        found = {name: self.find(one) for name, one in submissions.items()}
        claimed = Counter(id(row) for row in found.values())
        return {name: row if claimed[id(row)] == 1 else None for name, row in found.items()}

    def find(self, submission: Submission) -> dict[str, str] | None:
        """The student's row: by number where files and roster have one, else by name, e-mail or login.

        A number that the roster does not know is nobody's, whatever name comes with it: names are the students' own.
        """
        head = self.column(submission.column) if submission.number else None
        if head:
            keys = {submission.number, f"Participant {submission.number}"}
            return next((row for row in self.rows if row[head].strip() in keys), None)
        wanted = spelled(submission.student)
        for column in (*IDS, *NAMES):
            head = self.column(column)
            found = [row for row in self.rows if head and wanted in spellings(row[head])]
            if len(found) == 1:
                return found[0]
        return None

    def mark_late(self, submissions: dict[str, Submission], listed: dict[str, dict[str, str] | None]) -> None:
        """Flag those that Moodle's worksheet calls late: "Submitted for grading - 1 day late"."""
        status = self.column("status")
        for name, row in listed.items():
            one = submissions[name]
            if status and row and re.search(r"\blate$", row[status].strip(), re.IGNORECASE) and not one.late:
                one.late = True
                one.notes.append(LATE)

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
    found: dict[tuple[str, str], Submission] = {}
    for name, date, data in sorted(files(folder), key=lambda item: item[:2]):
        one = identify(name, date)
        if one is None:
            continue
        key = ("number", one.number) if one.number else ("name", unicodedata.normalize("NFC", one.student))
        mine = found.setdefault(key, one)
        unread = f" ({data})" if isinstance(data, str) else ""
        mine.files.append(f"{PurePosixPath(name).name}{unread}")
        mine.late |= one.late
        notebook = not unread and is_notebook(name, data)
        if notebook and (mine.data is None or one.attempt >= mine.attempt):
            mine.data, mine.attempt, mine.notes = data, one.attempt, [f"counts: {mine.files[-1]}"]
        elif mine.data is None and mine is one:
            mine.attempt = ()
    if not found:
        raise FileNotFoundError(f"no submissions in {folder}")
    for one in found.values():
        n = sum(name.lower().endswith(".ipynb") for name in one.files)
        one.notes = [f"{n} notebooks handed in; the newest counts: {one.notes[0][8:]}"] if n > 1 and one.notes else []
        one.notes += [LATE] * one.late
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
    if found := _moodle(path):
        is_file = found["kind"] == "file"
        return Submission(found["name"], found["id"], "identifier", attempt=(date, name)) if is_file else None
    if found := CANVAS.fullmatch(path.name):
        again = re.search(r"-(\d{1,9})\.\w+$", found["file"])
        attempt = (int(found["attempt"]), int(again[1]) if again else 0)
        return Submission(found["name"], found["id"], "id", attempt=attempt, late=bool(found["late"]))
    owner = path.parts[0] if len(path.parts) > 1 else path.stem
    return Submission(COPY.sub("", owner) or owner, attempt=(date, name))


def _moodle(path: PurePosixPath) -> re.Match | None:
    """What Moodle's names tell: the outermost of them, since what is inside a student has named."""
    folders = map(MOODLE_FOLDER.fullmatch, path.parts[:-1])
    return next(filter(None, folders), None) or MOODLE_FILE.fullmatch(path.name)


def _is_told_by_system(name: str) -> bool:
    """Whether a learning system has given a file its name, or its folder."""
    path = PurePosixPath(name)
    return bool(_moodle(path) or CANVAS.fullmatch(path.name))


def files(folder: Path) -> Iterator[tuple[str, tuple, bytes | str]]:
    """(path below the folder, date, content) of each file, those in zips among them; why not, where one can't be read.

    Raises ValueError where all is one zip that can't be read.
    """
    if folder.is_file() and zipfile.is_zipfile(folder):
        yield from _exported(folder)
        return
    for path in sorted(folder.rglob("*")):
        name = readable(os.fsencode(str(path.relative_to(folder))))
        if not path.is_file() or path.is_symlink() or LITTER.search(name):
            continue
        date = tuple(_date(path.stat().st_mtime))
        if name.lower().endswith(".zip") and not _is_told_by_system(name) and _is_export(path):
            yield from _exported(path)
        elif path.stat().st_size > MOST_BYTES:
            yield name, date, f"more than {MOST_BYTES >> 20} MB"
        else:
            yield from _handed_in(name, date, path.read_bytes())


def _date(seconds: float) -> tuple:
    import time

    return time.gmtime(seconds)[:6]


def _is_export(path: Path) -> bool:
    """Whether a zip is what a learning system has exported, with several students in it."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(map(_is_told_by_system, archive.namelist()))
    except Exception:  # whatever a broken zip makes of the library
        return False


def _exported(path: Path) -> Iterator[tuple[str, tuple, bytes | str]]:
    """What is in a zip that a learning system has written: each file under the name of its student."""
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if info.is_dir() or LITTER.search(info.filename):
                    continue
                if info.file_size > MOST_BYTES:
                    yield info.filename, info.date_time, f"more than {MOST_BYTES >> 20} MB"
                else:
                    yield from _handed_in(info.filename, info.date_time, archive.read(info))
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"{path.name} can't be read: {error}") from None


def _handed_in(name: str, date: tuple, data: bytes) -> Iterator[tuple[str, tuple, bytes | str]]:
    """A file of a student, or what is in his zip: all of that is his, whatever it is called."""
    if not name.lower().endswith(".zip") or identify(name, ()) is None:
        yield name, date, data
        return
    try:
        inside = [(_within(name[:-4], inner), *rest) for inner, *rest in _unzipped(data)]
    except Exception as error:  # whatever a broken zip makes of the library: it costs one student, and not the batch
        inside = [(name, date, f"a zip that can't be read: {type(error).__name__}: {error}"[:200])]
    yield from inside or [(name, date, "an empty zip")]


def _unzipped(data: bytes) -> Iterator[tuple[str, tuple, bytes]]:
    """(name, date, content) of what is in a zip, and in the zips in it. Raises ValueError beyond the limits."""
    zips, n_files, n_bytes = [data], 0, 0
    while zips:
        with zipfile.ZipFile(io.BytesIO(zips.pop())) as archive:
            for info in archive.infolist():
                if info.is_dir() or LITTER.search(info.filename):
                    continue
                n_files, n_bytes = n_files + 1, n_bytes + info.file_size
                if n_files > MOST_FILES or n_bytes > MOST_BYTES:
                    raise ValueError(f"it holds more than {MOST_FILES:,} files or {MOST_BYTES >> 20} MB")
                content = archive.read(info)
                if info.filename.lower().endswith(".zip"):
                    zips.append(content)
                else:
                    yield info.filename, info.date_time, content


def _within(whose: str, name: str) -> str:
    """The path of a file in a student's zip, such that it still tells the student."""
    last, path = PurePosixPath(name).name, PurePosixPath(whose)
    if any(map(MOODLE_FOLDER.fullmatch, path.parts[:-1])):
        return f"{path.parent}/{last}"
    if _is_told_by_system(whose):
        return f"{whose}_{last}"
    return f"{path.parts[0]}/{last}"


def readable(name: bytes) -> str:
    """A file's name as text, whatever system wrote it."""
    try:
        return name.decode()
    except UnicodeDecodeError:
        return name.decode("latin-1")
