"""Submissions as Canvas and Moodle export them go in, and what those import comes out."""

import csv
import io
import random
import zipfile

import gradebooks
import intake
import pytest

NOTEBOOK = b'{"cells": []}'
FIRST = [
    "Ada",
    "Bo",
    "Cem",
    "Dua",
    "Eva",
    "Finn",
    "Gus",
    "Hana",
    "Ida",
    "Jörg",
    "Kai",
    "Léa",
    "Mia",
    "Noé",
    "Ola",
    "Pia",
    "Quy",
    "Rui",
    "Sofía",
    "Tom",
]
PEOPLE = [(f"{first}", f"{last}", 1000 + i) for i, (first, last) in enumerate(
    (first, last) for last in ("Åberg", "O'Neil") for first in FIRST)]  # fmt: skip


def canvas_name(first, last):
    """How Canvas spells a student in a file's name: last and first, lower case, letters only."""
    return "".join(c for c in f"{last}{first}".lower() if c.isalnum())


def canvas_zip():
    """A course of 40: three hand in again, two are late, one is missing, and a Thumbs.db lies among them."""
    files = {}
    for i, (first, last, number) in enumerate(PEOPLE[:-1]):
        late = "LATE_" if i in (4, 5) else ""
        files[f"{canvas_name(first, last)}_{late}{number}_{9000 + i}_lab1.ipynb"] = NOTEBOOK
        if i < 3:
            files[f"{canvas_name(first, last)}_{number}_{9500 + i}_lab1-1.ipynb"] = NOTEBOOK + b" "
    return files | {"Thumbs.db": b"x", "__MACOSX/._lab1.ipynb": b"x"}


def canvas_roster(path):
    """Canvas' gradebook export."""
    head = ["Student", "ID", "SIS User ID", "SIS Login ID", "Section", "Lab 1 (77)", "Current Score"]
    rows = [["    Points Possible", "", "", "", "", "20", "(read only)"]]
    rows += [[f"{last}, {first}", n, f"S{n}", f"{first.lower()}{n}", "Monday", "", ""] for first, last, n in PEOPLE]
    rows.append(["Student, Test", 1, "", "test", "Monday", "", ""])
    write(path, [head, *rows])


def moodle_files():
    """The same course as Moodle's "download all submissions" in folders."""
    files = {}
    for i, (first, last, number) in enumerate(PEOPLE[:-1]):
        folder = f"{first} {last}_{number}_assignsubmission_file"
        files[f"{folder}/lab1.ipynb"] = NOTEBOOK
        if i < 3:
            files[f"{folder}/lab1 (1).ipynb"] = NOTEBOOK + b" "
        files[f"{first} {last}_{number}_assignsubmission_onlinetext/onlinetext.html"] = b"<p>here it is</p>"
    return files | {"Thumbs.db": b"x"}


def moodle_worksheet(path):
    """Moodle's grading worksheet of the assignment."""
    head = ["Identifier", "Full name", "Email address", "Status", "Grade", "Maximum Grade", "Grade can be changed",
            "Last modified (submission)", "Last modified (grade)", "Feedback comments"]  # fmt: skip
    rows = [
        [f"Participant {n}", f"{first} {last}", f"{first}.{n}@example.org".lower(),
         f"Submitted for grading{' - 1 day late' if i in (4, 5) else ''}", "", "20.00", "Yes", "", "-", ""]
        for i, (first, last, n) in enumerate(PEOPLE)
    ]  # fmt: skip
    write(path, [head, *rows])


def write(path, lines):
    with open(path, "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows(lines)


def zipped(files, path=None):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for i, (name, content) in enumerate(files.items()):
            archive.writestr(zipfile.ZipInfo(name, (2026, 11, 2, 8, i // 60, i % 60)), content)
    if path:
        path.write_bytes(data.getvalue())
    return data.getvalue()


def graded(found, roster):
    rng, rows = random.Random(0), []
    for name, one in found.items():
        points = {"q1": rng.randint(0, 10) / 2, "q2": float(rng.randint(0, 15))}
        rows.append({"student": name, "questions": points, "score": sum(points.values()), "possible": 20.0,
                     "graded": True, "listed": roster.find(one)})  # fmt: skip
    return rows


def written(kind, rows, roster, tmp_path):
    gradebooks.write(kind, rows, roster, tmp_path / "out.csv", "Lab 1")
    data = (tmp_path / "out.csv").read_bytes()
    assert data.decode("utf-8") and not data.startswith(b"\xef\xbb\xbf")
    return list(csv.reader(io.StringIO(data.decode("utf-8"))))


@pytest.mark.parametrize("unpacked", [False, True])
def test_a_course_of_forty_from_canvas_and_back(tmp_path, unpacked):
    zipped(canvas_zip(), tmp_path / "submissions.zip")
    if unpacked:
        zipfile.ZipFile(tmp_path / "submissions.zip").extractall(tmp_path / "in")
    canvas_roster(tmp_path / "roster.csv")
    found = intake.submissions(tmp_path / ("in" if unpacked else "submissions.zip"))
    roster = intake.read_roster(tmp_path / "roster.csv")
    assert len(found) == 39 and sum(one.late for one in found.values()) == 2 and len(roster.rows) == 40
    again = [one for one in found.values() if any("2 notebooks handed in" in note for note in one.notes)]
    assert len(again) == 3 and all(one.data == NOTEBOOK + b" " for one in again)
    rows = graded(found, roster)
    assert all(row["listed"] for row in rows)
    assert {row["listed"]["ID"] for row in rows} == {str(n) for *_, n in PEOPLE[:-1]}
    lines = written("canvas", rows, roster, tmp_path)
    # Canvas' importer: the header is the first line, has more than three columns, and Section ends the fixed ones
    assert lines[0] == ["Student", "ID", "SIS User ID", "SIS Login ID", "Section", "Lab 1 (77)"]
    assert lines[1][0].strip() == "Points Possible" and float(lines[1][5]) == 20
    points = {line[1]: float(line[5]) for line in lines[2:]}
    assert points == {row["listed"]["ID"]: row["score"] for row in rows} and len(points) == 39


@pytest.mark.parametrize("layout", ["folders", "flat", "zip"])
def test_a_course_of_forty_from_moodle_and_back(tmp_path, layout):
    files = moodle_files()
    if layout == "flat":
        files = {name.replace("/", "_") if "/lab1" in name else name: data for name, data in files.items()}
    zipped(files, tmp_path / "all.zip")
    if layout != "zip":
        zipfile.ZipFile(tmp_path / "all.zip").extractall(tmp_path / "in")
    moodle_worksheet(tmp_path / "worksheet.csv")
    found = intake.submissions(tmp_path / ("all.zip" if layout == "zip" else "in"))
    roster = intake.read_roster(tmp_path / "worksheet.csv")
    assert len(found) == 39 and len(roster.rows) == 40
    assert sum("2 notebooks" in note for one in found.values() for note in one.notes) == 3
    roster.mark_late(found, roster.find_all(found))
    late = {one.student for one in found.values() if one.late and intake.LATE in one.notes}
    assert late == {f"{first} {last}" for first, last, _ in PEOPLE[4:6]}
    rows = graded(found, roster)
    assert all(row["listed"] for row in rows)
    lines = written("moodle", rows, roster, tmp_path)
    known = {f"{first}.{n}@example.org".lower() for first, _, n in PEOPLE}
    assert lines[0] == ["Email address", "Lab 1"] and {line[0] for line in lines[1:]} <= known
    assert [line[1] for line in lines[1:]].count("-") == 1
    sheet = written("moodle-worksheet", rows, roster, tmp_path)
    assert sheet[0] == roster.header and len(sheet) == 41
    by_name = {f"Participant {one.number}": row["score"] for one, row in zip(found.values(), rows, strict=True)}
    for line in sheet[1:]:
        grade = line[sheet[0].index("Grade")]
        assert (float(grade) == by_name[line[0]]) if line[0] in by_name else grade == ""
        assert line[sheet[0].index("Last modified (grade)")] == "-"


def test_the_newest_of_many_counts_and_is_named(tmp_path):
    names = ("b_7_100_x.ipynb", "b_7_300_x-2.ipynb", "b_7_200_x-1.ipynb")
    for i, name in enumerate(names):
        (tmp_path / name).write_bytes(NOTEBOOK + b" " * i)
    (one,) = intake.submissions(tmp_path).values()
    assert one.data == NOTEBOOK + b" " and one.notes == ["3 notebooks handed in; the newest counts: b_7_300_x-2.ipynb"]


@pytest.mark.parametrize(
    ("name", "student"),
    [("ada.ipynb", "ada"), ("ada (1).ipynb", "ada"), ("ada/lab1.ipynb", "ada"), ("ada/sub/lab1.ipynb", "ada")],
)
def test_plain_names(name, student, tmp_path):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(NOTEBOOK)
    assert list(intake.submissions(tmp_path)) == [student]


def test_a_students_own_zip_and_a_file_that_is_no_notebook(tmp_path):
    (tmp_path / "ada.zip").write_bytes(
        zipped({"lab/lab1.ipynb": NOTEBOOK, "__MACOSX/lab1.ipynb": b"", "lab/p.png": b"x"})
    )
    (tmp_path / "bob.docx").write_bytes(b"PK nothing")
    (tmp_path / "cem_12_34_lab1.zip").write_bytes(zipped({"lab1.ipynb": NOTEBOOK}))
    found = intake.submissions(tmp_path)
    assert {name: one.data for name, one in found.items()} == {"ada": NOTEBOOK, "bob": None, "cem": NOTEBOOK}
    assert found["cem"].number == "12"


def test_names_in_any_encoding(tmp_path):
    with open(bytes(tmp_path) + b"/J\xf6rg.ipynb", "wb") as file:
        file.write(NOTEBOOK)
    (tmp_path / "学生.ipynb").write_bytes(NOTEBOOK)
    assert set(intake.submissions(tmp_path)) == {"Jörg", "学生"}


@pytest.mark.parametrize("litter", ["Thumbs.db", ".DS_Store", "__MACOSX/a.ipynb", "desktop.ini", "x.ipynb~"])
def test_what_systems_leave_behind_is_no_student(litter, tmp_path):
    (tmp_path / litter).parent.mkdir(exist_ok=True)
    (tmp_path / litter).write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match="no submissions in"):
        intake.submissions(tmp_path)


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", "\x00"])
def test_a_file_that_is_no_roster_is_refused(text, tmp_path):
    (tmp_path / "r.csv").write_text(text)
    with pytest.raises(ValueError, match=r"r\.csv is no roster"):
        intake.read_roster(tmp_path / "r.csv")


@pytest.mark.parametrize(
    ("kind", "needs"), [("canvas", "export"), ("moodle", "Email"), ("moodle-worksheet", "Identifier")]
)
def test_a_roster_of_another_system_is_refused_in_words(kind, needs, tmp_path):
    roster = intake.Roster(["Name"], [{"Name": "Ada"}])
    with pytest.raises(ValueError, match=needs):
        gradebooks.write(kind, [], roster, tmp_path / "x.csv", "Lab 1")


def test_a_roster_in_windows_letters_with_semicolons(tmp_path):
    (tmp_path / "r.csv").write_bytes("Name;E-Mail\r\nJörg Åberg;j@x.org\r\n".encode("cp1252"))
    roster = intake.read_roster(tmp_path / "r.csv")
    assert roster.find(intake.Submission("joerg")) is None
    assert roster.find(intake.Submission("Jörg Åberg")) == {"Name": "Jörg Åberg", "E-Mail": "j@x.org"}
    assert roster.find(intake.Submission("j")) is not None


def test_a_number_that_the_roster_does_not_know_is_nobodys_whatever_name_comes_with_it():
    """A student chooses the name of his file; in Moodle and Canvas often his own as well."""
    canvas = intake.Roster(["Student", "ID"], [{"Student": "Vera, V", "ID": "102"}])
    assert canvas.find(intake.identify("vvera_102_1_lab1.ipynb", ())) == canvas.rows[0]
    assert canvas.find(intake.identify("vverav_999_1_lab1.ipynb", ())) is None
    moodle = intake.Roster(["Identifier", "Full name"], [{"Identifier": "Participant 102", "Full name": "Vera V"}])
    assert moodle.find(intake.identify("V V_102_assignsubmission_file/lab1.ipynb", ())) == moodle.rows[0]
    assert moodle.find(intake.identify("Vera V_999_assignsubmission_file/lab1.ipynb", ())) is None


def test_where_the_roster_has_no_such_numbers_the_systems_name_decides_unless_two_have_it():
    roster = intake.Roster(["ID", "Full name"], [{"ID": "S9", "Full name": "Vera V"}])  # a university's numbers
    one, two = (intake.identify(f"Vera V_{n}_assignsubmission_file/lab1.ipynb", ()) for n in (102, 104))
    assert roster.find_all({"Vera V": one}) == {"Vera V": roster.rows[0]}
    two.student = "Vera  V."
    assert roster.find_all({"a": one, "b": two}) == {"a": None, "b": None}
