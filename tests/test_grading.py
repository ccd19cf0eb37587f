"""Grading: right, wrong and hostile submissions, each in processes of its own; nothing lost, nothing hung."""

import ast
import contextlib
import csv
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import attacks
import grade
import gradebooks
import intake
import judge
import lab_submissions
import make_labs
import masters
import nbformat
import psutil
import pytest
import sandbox
import tables
from inside.wire import STATE, VALUE
from lab_submissions import ROOT, as_bytes, preceded, solved

from nf4lab.labs import plain
from nf4lab.labs.calls import Remote

LIMITS = sandbox.Limits(seconds=60, cell_seconds=3, question_seconds=6, memory_gb=2)
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="submissions are shut in by Linux's own means")


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """The job of grading lab 1, with a grader made for it; a thread that ends starts the server of all tests."""
    target = tmp_path_factory.mktemp("graders") / "lab1.zip"
    make_labs.make("lab1", seed=2026, check=True, grader=target)
    job = judge.job_of("lab1", LIMITS, grader=target)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(sandbox.server, job.lab, job.programs).result()
    return job


@pytest.fixture(scope="module")
def batch(job, tmp_path_factory):
    """What to expect of each submission, the rows that came of them, and a file that must not come to be."""
    outside = tmp_path_factory.mktemp("outside") / "written"
    with socket.create_server(("127.0.0.1", 0)) as server:
        expected = lab_submissions.hostile("lab1", outside, server.getsockname()[1])
        rows = {row["student"]: row for row in grade.grade_here({k: v[0] for k, v in expected.items()}, job, 2)}
        server.settimeout(0)
        with pytest.raises(BlockingIOError):
            server.accept()  # nobody came through
    return expected, rows, outside


def test_every_submission_has_the_points_the_outcome_and_the_notes_that_it_should(batch):
    expected, rows, _ = batch
    assert rows.keys() == expected.keys()
    for name, (_, score, outcome, notes) in expected.items():
        row = rows[name]
        assert row["score"] == score, (name, row["outcome"], row["errors"])
        assert re.search(outcome, row["outcome"]), (name, row["outcome"])
        assert re.search(notes, "; ".join(row["notes"])), (name, row["notes"])


def test_no_submission_writes_outside_its_folder(batch):
    _, rows, outside = batch
    if "landlock" not in rows["writes outside"]["layers"]:
        pytest.skip("this kernel has no Landlock: code that calls C may write where its user may")
    assert not outside.exists()


def test_a_missing_function_is_named_with_the_one_that_may_have_been_renamed(batch):
    message = next(check["message"] for check in batch[1]["renamed"]["checks"] if check["question"] == "q3")
    assert message == "there is no function `equal_shares`. There is `equal_share`: was it renamed?"


IMPORTS = "import numpy as np, torch\nfrom scipy.stats import norm\n"


def write_all(rows, target):
    tables.write_table(rows, target)
    for row in rows:
        tables.write_page(row, target.with_name("pages"), "lab1")


def test_the_table_adds_up_and_no_cell_is_a_formula(batch, tmp_path):
    rows = sorted(batch[1].values(), key=lambda row: row["student"])
    write_all(rows, tmp_path / "grades.csv")
    table = list(csv.DictReader((tmp_path / "grades.csv").read_text().splitlines()))
    assert [line["student"] for line in table] == [row["student"].replace("=f", "'=f") for row in rows]
    for line, row in zip(table, rows, strict=True):
        assert float(line["score"]) == row["score"] == sum(float(line[f"q{i}"]) for i in range(1, 7))
        assert line["possible"] == "20"


def test_a_students_page_shows_no_hidden_check(batch, tmp_path):
    write_all(list(batch[1].values()), tmp_path / "grades.csv")
    pages = {row: (tmp_path / "pages" / f"{tables.page_name(row)}.html").read_text() for row in batch[1]}
    hidden = {c["name"] for row in batch[1].values() for c in row["checks"] if c["hidden"]} - {""}
    assert {"on ties", "at other tails", "of other numbers"} <= hidden
    for text in pages.values():
        assert not any(name in text for name in hidden)
        assert "SEED" not in text and "<script>" not in text
    assert "was it renamed?" in pages["renamed"]


def test_questions_stand_in_order_and_hidden_checks_tell_only_certain_causes():
    check = {"hidden": True, "points": 1, "passed": False, "name": "", "causes": ("codes count from 0",)}
    names = ("q1", "q10", "q2")
    checks = [check | {"question": q, "message": f"SECRET {q}"} for q in names]
    row = {"student": "ada", "outcome": "graded", "score": 0, "possible": 3, "errors": [], "notes": []}
    row |= {"checks": checks, "questions": dict.fromkeys(names, 0), "graded": True}
    text = tables.page(row, "lab4")
    assert text.index("Question 1:") < text.index("Question 2:") < text.index("Question 10:")
    assert "SECRET" not in text and text.count("Cause: codes count from 0.") == 3


@pytest.mark.parametrize("lab", ["lab1", "lab2", "lab3", "lab4", "lab5", "lab6"])
def test_a_cause_is_a_constant_sentence_so_that_it_carries_no_data(lab):
    source = (ROOT / "nf4lab" / "labs" / f"{lab}.py").read_text()
    assert not re.findall(r'^ {8,}f"[^"]*": ', source, re.MULTILINE)


STRANGE = [
    "\ud800",
    "\x1b[2J\x9b31m\u202e",
    "\uff1d1+1",
    "/x\udcff",
    "Jörg\x00",
    "=1+1;=2",
    "a/b\\c:d",
    "学生",
    "x" * 300,
    ".",
    "con",
    "<b>",
]


def test_the_table_the_report_and_the_pages_hold_any_text(tmp_path):
    report = tables.Report(tmp_path / "report.jsonl", "stamp")
    rows = []
    for i, text in enumerate(STRANGE):
        row = judge.Conversation(judge.Job("lab1", 1, {}, {}, {"q1": [(False, 1.0)]}, LIMITS)).row()
        row |= {
            "student": text,
            "outcome": text,
            "notes": [text],
            "errors": [text],
            "digest": str(i),
            "handed_in": [text],
        }
        report.add(row)
        rows.append(row)
    write_all(rows, tmp_path / "grades.csv")
    assert len(list((tmp_path / "pages").glob("*.html"))) == len(STRANGE)
    lines = list(csv.reader((tmp_path / "grades.csv").read_text(encoding="utf-8").splitlines()))
    assert len(lines) == len(STRANGE) + 1 and len({len(line) for line in lines}) == 1
    assert not [cell for line in lines for cell in line if re.search(r"(^|;)[=+@\uff1d-]", cell)]
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and re.search(b"[\0\x1b]", path.read_bytes())]
    done = report.done()
    assert [done[str(i)]["student"] for i in range(len(STRANGE))] == STRANGE


def test_a_report_that_was_cut_off_keeps_the_rows_before(tmp_path):
    report = tables.Report(tmp_path / "report.jsonl", "stamp")
    for i in range(3):
        report.add({"digest": str(i), "student": str(i), "graded": True})
    text = report.path.read_text()
    report.path.write_text(text[:-20])
    assert set(report.done()) == {"0", "1"}
    report.add({"digest": "3", "student": "3", "graded": True})
    assert set(report.done()) == {"0", "1", "3"}
    assert tables.Report(report.path, "another").done() == {}


# What a student's file can do before anything runs


def zipped(files, method=zipfile.ZIP_DEFLATED):
    """A zip of contents by name."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return data.getvalue()


MINE, OTHER = b'{"cells": [], "mine": 1}', b'{"cells": []}'
# What Ben's zip may hold to be taken for Vera's, and in the name of whom the system has exported it.
DISGUISED = {
    "Canvas": ("ben_104_5004_lab1.zip", "vera_102_5002_lab1.ipynb", "vera_102_99999_lab1.ipynb"),
    "Moodle": ("Ben B_104_assignsubmission_file_/a.zip", "Vera V_102_assignsubmission_file_/lab1.ipynb",
               "Vera V_102_assignsubmission_file_/z.ipynb"),
    "Moodle without folders": ("Ben B_104_assignsubmission_file_a.zip", "Vera V_102_assignsubmission_file_lab1.ipynb",
                               "Vera V_102_assignsubmission_file_z.ipynb"),
}  # fmt: skip


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize(("ben", "vera", "disguise"), DISGUISED.values(), ids=DISGUISED)
def test_nothing_that_a_student_names_counts_as_anothers(tmp_path, ben, vera, disguise, depth):
    data = MINE
    for level in range(depth):
        data = zipped({disguise if level == 0 else disguise.replace("ipynb", "zip"): data})
    names = {vera: OTHER, ben if depth else ben.replace("a.zip", disguise).replace(".zip", f"_{disguise}"): data}
    (tmp_path / "export.zip").write_bytes(zipped(names))
    for name, content in names.items():
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_bytes(content)
    for folder in (tmp_path / "export.zip", tmp_path / "out"):
        by_number = {one.number: one.data for one in intake.submissions(folder).values()}
        assert by_number == {"102": OTHER, "104": MINE}


def broken(at, content):
    """A zip of one notebook with other bytes in its directory, which stands last."""
    data = bytearray(zipped({"lab1.ipynb": MINE}))
    start = data.rfind(b"PK\x01\x02") + at
    data[start : start + len(content)] = content
    return bytes(data)


def many(n, mb):
    """A small zip that holds n times so many MB of zeros."""
    return zipped(dict.fromkeys(map("{}.ipynb".format, range(n)), bytes(mb << 20)))


BAD_ZIPS = {
    "a bomb": lambda: many(3, 50),
    "a bomb in zips": lambda: zipped({f"{k}.zip": many(1, 50) for k in range(3)}),
    "too many files": lambda: zipped(dict.fromkeys(map(str, range(3000)), b"")),
    "encrypted": lambda: broken(8, b"\1"),
    "a method that nobody knows": lambda: broken(10, b"cc"),
    "a wrong sum": lambda: broken(16, b"sums"),
    "a false size": lambda: broken(24, b"\xff" * 4),
    "a place outside the file": lambda: broken(42, b"\xff\xff\xff\x7f"),
    "cut": lambda: zipped({"lab1.ipynb": MINE})[:-30],
    "a zip in it is none": lambda: zipped({"a.zip": b"PK nothing"}),
    "empty": lambda: zipped({}),
}


@pytest.mark.parametrize("make", BAD_ZIPS.values(), ids=BAD_ZIPS)
def test_a_zip_that_cannot_be_read_costs_its_own_row(tmp_path, make):
    names = {"ada_101_1_lab1.ipynb": OTHER, "ben_104_2_lab1.zip": make(), "cem_105_3_lab1-12345.ipynb": OTHER}
    (tmp_path / "export.zip").write_bytes(zipped(names))
    (tmp_path / "out").mkdir()
    for name, content in names.items():
        (tmp_path / "out" / name).write_bytes(content)
    for folder in (tmp_path / "export.zip", tmp_path / "out"):
        found = intake.submissions(folder)
        assert {name: one.data for name, one in found.items()} == {"ada": OTHER, "ben": None, "cem": OTHER}
        assert re.search(r"ben_104_2_lab1.zip \((a zip that can't be read: |an empty zip)", found["ben"].files[0])


def test_a_file_without_end_costs_its_own_row_and_names_that_are_alike_stay_two(tmp_path):
    for name in ("José.ipynb", "Jose.ipynb", "A. Ali.ipynb", "AAli.ipynb", "huge.ipynb"):
        (tmp_path / name).write_bytes(OTHER)
    os.truncate(tmp_path / "huge.ipynb", 2**40)
    os.mkfifo(tmp_path / "pipe.ipynb")
    found = intake.submissions(tmp_path)
    assert sorted(found) == ["A. Ali", "AAli", "Jose", "José", "huge"]
    assert found["huge"].data is None and found["huge"].files == ["huge.ipynb (more than 128 MB)"]


def test_json_without_a_list_of_cells_is_no_notebook(job):
    for text in (b'{"cells": null}', b'{"cells": {"a": 1}}', b"null", b"1e999", b"9" * 10_000, b"[" * 200_000):
        row = judge.grade_one("a", text, job)
        assert row["score"] == 0 and row["outcome"].startswith(("unreadable: not a notebook", "graded"))


# What the process that runs student code can say


def test_what_comes_back_is_plain_data_and_a_forger_gains_nothing(job):
    files = {name: as_bytes(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(IMPORTS + text)]))
             for name, text in attacks.FORGERIES.items()}  # fmt: skip
    rows = list(grade.grade_here(files, job, 2))
    wrong = [(row["student"], row["score"], row["outcome"]) for row in rows if row["score"] > 0]
    assert not wrong


def test_what_is_not_stopped_is_told(job):
    patient = replace(job, limits=replace(LIMITS, seconds=120, question_seconds=20))
    for name, text in attacks.NOT_STOPPED.items():
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text)])
        row = judge.grade_one(name, as_bytes(notebook), patient)
        assert row["score"] > 0, row
        assert any("read the notebook" in note for note in row["notes"]) == (name not in attacks.NOT_TOLD), row


def test_who_plays_for_time_loses_his_own_points_and_keeps_nobody_waiting(job):
    rows = {}
    for ends, seconds in ((True, 20), (False, 90)):  # who is cut off, and who has ended long before, on busy cores too
        limits = replace(LIMITS, seconds=seconds, cell_seconds=1, question_seconds=1)
        names = [name for name, case in attacks.PATIENCE.items() if (case[2] == "time limit") is ends]
        files = {name: as_bytes(attacks.patience(name)) for name in names}
        rows |= {row["student"]: row for row in grade.grade_here(files, replace(job, limits=limits), 4)}
    for name, (_, score, outcome) in attacks.PATIENCE.items():
        row = rows[name]
        assert row["graded"] and re.search(outcome, row["outcome"]), (name, row["outcome"], row["errors"])
        assert row["score"] == score and row["seconds"] < 120, (name, row["outcome"], row["errors"], row["checks"])
        if score == 18:  # a question costs its own points
            assert row["questions"] == {"q1": 3, "q2": 4, "q3": 0, "q4": 4, "q5": 4, "q6": 3}, (name, row["checks"])


@pytest.mark.parametrize("lab", ["lab1", "lab2", "lab3", "lab6"])
def test_a_question_is_lent_no_later_ones_answer(lab):
    asked_in, lent = {}, {}

    def remote(name, question):
        def ask(task, others):
            lent.setdefault(task["name"], (question, set()))[1].update(others)
            raise judge.Late

        return Remote(name, ask)

    for question, found in masters.checks(lab).items():
        for case in found:
            with contextlib.suppress(judge.Late):
                case.body.call_func(Questions(question, remote, asked_in))
    assert lent
    for name, (question, others) in lent.items():
        later = {other for other in others if judge.number(asked_in.get(other, "q0")) >= judge.number(question)}
        assert not later - {name}, (name, later)


class Questions(dict):
    """An environment in which every name is a function, that notes which question has asked for it."""

    def __init__(self, question, make, asked_in):
        super().__init__()
        self.question, self.make, self.asked_in = question, make, asked_in

    def get(self, name, default=None):
        self.asked_in.setdefault(name, self.question)
        return self.make(name, self.question)


def test_the_guide_has_every_kind_of_attack_and_the_tests_have_each_attack_of_a_kind(tmp_path):
    guide = (ROOT / "labs" / "README.md").read_text()
    table = guide.partition("| kind of attack |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| (\w.*?) \|", table, re.MULTILINE) == list(attacks.KINDS)
    named = [name for names in attacks.KINDS.values() for name in names]
    alone = {name for name in named if name in vars(attacks)}
    hostile = set(lab_submissions.hostile("lab1", tmp_path, 1)) - lab_submissions.MISHAPS
    assert sorted(named) == sorted({*attacks.FORGERIES, *attacks.NOT_STOPPED, *attacks.PATIENCE, *alone, *hostile})
    tree = ast.parse(Path(attacks.__file__).read_text()).body
    texts = [node for node in tree if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)]
    own = {node.name for node in tree if isinstance(node, ast.FunctionDef)} | {node.targets[0].id for node in texts}
    assert alone == own - {"NO_ANSWERS", "TAMPERS", "patience"}  # parts of others
    assert not [name for name in alone if f"attacks.{name}" not in Path(__file__).read_text()]


def test_kernels_and_gradients_that_are_told_in_a_forged_way_are_flagged(tmp_path):
    make_labs.make("lab4", seed=2026, check=True, grader=tmp_path / "lab4.zip")
    four = judge.job_of("lab4", replace(LIMITS, seconds=120, question_seconds=40), grader=tmp_path / "lab4.zip")
    row = judge.grade_one("tampered", as_bytes(attacks.tampered_tracer()), four)
    assert any(note.startswith("FORGED?") for note in row["notes"]), row["notes"]
    honest = [check for check in row["checks"] if check["question"] == "q8"]
    assert all(check["passed"] for check in honest)


def test_a_kernel_whose_every_thread_takes_all_bytes_costs_its_own_question_and_is_told_soon(tmp_path):
    make_labs.make("lab4", seed=2026, check=True, grader=tmp_path / "lab4.zip")
    four = judge.job_of("lab4", replace(LIMITS, seconds=300, cell_seconds=60), grader=tmp_path / "lab4.zip")
    notebook = solved("lab4")
    cell = next(cell for cell in notebook.cells if "def v1(" in cell.source)
    cell.source = cell.source.replace("if i < packed.size:", "for i in range(packed.size):")
    row = judge.grade_one("all", as_bytes(notebook), four)
    assert row["outcome"] == "graded" and row["cpu_s"] < 30, row  # without the stop at the first double write: 60 s
    assert row["questions"]["q5"] == 0 and row["score"] == row["possible"] - 5
    told = [check["message"] for check in row["checks"] if check["question"] == "q5"]
    assert all("again by thread 1" in text for text in told), told


def test_what_a_notebook_has_set_for_all_of_torch_costs_nothing(job):
    text = "import torch\ntorch.set_default_dtype(torch.float64)\ntorch.set_grad_enabled(False)"
    row = judge.grade_one("float64", as_bytes(preceded("lab1", text)), job)
    assert (row["score"], row["outcome"]) == (20, "graded"), row["checks"]


def test_a_submission_never_sees_a_check_the_seed_or_the_packages_solutions(job):
    for text in (attacks.LOOKS_AROUND, attacks.LOOKS_IN_MEMORY, attacks.LOOKS_FOR_OTHERS_LINES):
        row = judge.grade_one("looks", as_bytes(preceded("lab1", text)), job)
        assert row["errors"] == [] and row["score"] == 20, (row["errors"], row["notes"])


@pytest.mark.skipif(not shutil.which("bwrap"), reason="needs bubblewrap")
def test_no_host_file_process_or_socket_is_in_sight(job, tmp_path):
    row = judge.grade_one("host", as_bytes(preceded("lab1", attacks.looks_for_host(ROOT))), job)
    assert row["errors"] == [] and {"bubblewrap", "namespaces"} <= set(row["layers"]), row["errors"]


def test_submissions_share_no_memory_files_or_ipc(job):
    leaves, finds = (as_bytes(preceded("lab1", text)) for text in (attacks.LEAVES_BEHIND, attacks.FINDS_WHAT_WAS_LEFT))
    judge.grade_one("leaves", leaves, job)
    assert judge.grade_one("finds", finds, job)["errors"] == []


def test_written_files_are_bounded_in_all(job):
    row = judge.grade_one("fills", as_bytes(preceded("lab1", attacks.FILLS)), job)
    assert row["errors"] == [], row["errors"]


def test_memory_of_no_process_keys_and_new_namespaces_are_refused(job):
    for text in (attacks.HOLDS_MEMORY_THAT_NOBODY_COUNTS, attacks.LEAVES_ITS_WALLS):
        row = judge.grade_one("leaves", as_bytes(preceded("lab1", text)), job)
        if "seccomp" not in row["layers"]:
            pytest.skip("this kernel filters no system calls")
        assert row["errors"] == [], row["errors"]


def test_memory_that_processes_share_counts_too(job):
    small = replace(job, limits=replace(LIMITS, cell_seconds=30, memory_gb=0.5))
    row = judge.grade_one("shares", as_bytes(preceded("lab1", attacks.HOLDS_SHARED_MEMORY)), small)
    assert row["outcome"] == "memory limit (0.5 GB)" and row["peak_mb"] > 640, row


def test_a_students_page_holds_no_data_that_only_the_submission_has_seen(job, tmp_path):
    row = judge.grade_one("carries", as_bytes(lab_submissions.with_answer("lab1", attacks.CARRIES_DATA_OUT)), job)
    assert row["questions"]["q2"] == 0 and row["score"] < 20
    tables.write_page(row, tmp_path, "lab1")
    assert "DATA" not in (tmp_path / "carries.html").read_text()


def test_names_in_the_notes_are_no_formula_and_no_terminals_command(job, tmp_path):
    row = judge.grade_one("odd", as_bytes(preceded("lab1", attacks.ODD_NAMES)), job)
    assert row["score"] == 20 and len(row["notes"]) == 6
    tables.write_table([row], tmp_path / "grades.csv")
    text = (tmp_path / "grades.csv").read_bytes().decode()
    assert not re.search("[\x1b\x07\u202e]", text) and not re.search(r"[\n\t;,][\s]*=", text)


# The grader's own failures, which are no mark of a student's


def test_a_server_outlives_the_thread_that_started_it(job):
    server = sandbox.server(job.lab, job.programs)
    time.sleep(0.2)  # the signal that the thread's end sends would have come by now
    assert server.process.poll() is None and server is sandbox.server(job.lab, job.programs)


def test_what_has_hung_up_closes_no_line_of_another():
    one = sandbox.Running(*os.pipe())
    one.hang_up()
    other = os.pipe()  # has the number that was closed
    one.end()
    assert os.write(other[1], b"x") == 1 and os.read(other[0], 1) == b"x"
    for number in other:
        os.close(number)


WEIGHTS_ARE_CHECKED = """
import sys
sys.path.insert(0, sys.argv[1])
import runner
runner.warm_up = lambda: None
runner.load("lab2", sys.path)
from nf4lab.models import minilm_path
sys.exit(minilm_path.cache_info().currsize != 1)
"""


def test_the_weights_that_lab_2_reads_are_checked_before_anything_forks():
    command = [sys.executable, "-c", WEIGHTS_ARE_CHECKED, ROOT / "labs" / "inside"]
    assert subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}).returncode == 0


class Dying:
    """A server whose submissions say this and end."""

    layers = ()

    def __init__(self, said):
        self.said = said

    def start(self, task):
        (read, write), (down, to) = os.pipe(), os.pipe()
        line = judge.Line(down, write)
        for kind, what in self.said:
            line.send(kind, plain.dumps(what) if kind == VALUE else json.dumps(what).encode())
        os.close(write)
        return sandbox.Running(read, to, lambda: os.close(down))


STARTED, READY = (STATE, {"layers": []}), (VALUE, {"ready": True})
RAN = (VALUE, {"ran": True, "names": {}})
ENDINGS = {
    "nothing": ([], "not graded: what watches the submission ended without its last word"),
    "no last word": ([STARTED, READY, RAN], "not graded: what watches the submission ended without its last word"),
    "no confinement": ([(STATE, {"broken": "OSError: no memory"})], "not graded: OSError: no memory"),
    "no shell": ([STARTED, (VALUE, {"broken": "ImportError: IPython"})], "not graded: ImportError: IPython"),
    "no cell": ([STARTED, (STATE, {"ended": ""})], "not graded: before the first cell: ended itself"),
    "too slow": (
        [STARTED, (STATE, {"ended": "time limit (9 s)"})],
        "not graded: before the first cell: time limit (9 s)",
    ),
    # and the submission's: a process that has run its cells must not choose to have no mark
    "left": ([STARTED, READY, RAN, (STATE, {"ended": ""})], "ended itself"),
    "says that it broke": ([STARTED, READY, (VALUE, {"broken": "me"}), (STATE, {"ended": ""})], "ended itself"),
    "too long": ([STARTED, READY, (STATE, {"ended": "time limit (9 s)"})], "time limit (9 s)"),
    "unreadable": ([STARTED, (VALUE, {"unreadable": "no notebook"})], "unreadable: no notebook"),
}


@pytest.mark.parametrize(("said", "outcome"), ENDINGS.values(), ids=ENDINGS)
def test_what_the_grader_fails_on_has_no_points_and_what_a_submission_does_has_none_but_0(
    job, monkeypatch, said, outcome
):
    monkeypatch.setattr(sandbox, "server", lambda lab, texts: Dying(said))
    row = judge.grade_one("ada", as_bytes(solved("lab1")), job)
    assert row["outcome"] == outcome
    expected = (False, None, {None}) if outcome.startswith("not graded") else (True, 0, {0})
    assert (row["graded"], row["score"], set(row["questions"].values())) == expected


def test_a_server_that_does_not_start_is_the_graders_failure_and_leaves_nothing(job, monkeypatch, tmp_path):
    monkeypatch.setattr(sandbox, "SERVERS", {})
    monkeypatch.setattr(sandbox, "STARTING", 0.2)
    monkeypatch.setattr(sandbox.tempfile, "gettempdir", lambda: str(tmp_path))
    row = judge.grade_one("ada", as_bytes(solved("lab1")), job)
    assert not row["graded"] and row["outcome"].endswith("has not started in 0.2 s")
    assert not list(tmp_path.iterdir()) and not sandbox.SERVERS


def test_what_a_killed_grader_left_is_removed_by_the_next_and_nothing_that_lives(tmp_path, monkeypatch):
    """As where a cluster's worker is killed: its server ends with it, and its folder stays."""
    program = "import sandbox, sys, time; print(sandbox.Folder(sys.argv[1]).make({}), flush=True); time.sleep(600)"
    own = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT / "labs")}
    names = [f"nf4lab-{digit * 12}" for digit in "abcd"]
    graders = [
        subprocess.Popen([sys.executable, "-c", program, name], env=own, stdout=subprocess.PIPE) for name in names[:3]
    ]
    for grader in graders:
        grader.stdout.readline()
    for grader in graders[:2]:
        grader.kill()
        grader.wait()
    (tmp_path / "nf4lab-of-another-kind").mkdir()
    for folder in tmp_path.iterdir():
        if folder.name != names[1]:  # this one is so young that its grader may just be about to lock it
            os.utime(folder, (0, 0))
    monkeypatch.setattr(sandbox.tempfile, "gettempdir", lambda: str(tmp_path))
    mine = sandbox.Folder(names[3])
    mine.make({"a.py": "1"})
    assert sorted(path.name for path in tmp_path.iterdir()) == [*names[1:], "nf4lab-of-another-kind"]
    mine.remove()
    assert not mine.path.exists()
    graders[2].kill()
    for grader in graders:
        grader.communicate()


def test_what_the_grader_fails_on_is_tried_once_more_and_by_the_next_run(job, tmp_path):
    found = {name: intake.Submission(name, data=OTHER, files=["a"]) for name in ("ada", "bo")}
    calls, well = [], {"ada": 2, "bo": 3}  # in which try the grader does not fail

    def work(files):
        for name in files:
            calls.append(name)
            done = judge.Conversation(job).row() | {"student": name, "seconds": 0.0}
            yield done if calls.count(name) >= well[name] else judge.not_graded(name, job, "tired")

    report = tables.Report(tmp_path / "report.jsonl", "stamp")
    rows = {row["student"]: row for row in grade.rows_of(found, job, work, report, tmp_path / "pages")}
    assert calls == ["ada", "bo", "ada", "bo"] and rows["ada"]["graded"]
    assert rows["bo"]["outcome"] == "not graded: tired" and rows["bo"]["score"] is None
    page = (tmp_path / "pages" / "bo.html").read_text()
    assert "Lab 1: not graded yet" in page and "0 of" not in page
    rows = {row["student"]: row for row in grade.rows_of(found, job, work, report, tmp_path / "pages")}
    assert calls == ["ada", "bo", "ada", "bo", "bo"] and rows["bo"]["graded"]
    assert "not graded yet" not in (tmp_path / "pages" / "bo.html").read_text()


def test_a_row_of_an_earlier_run_is_late_where_a_roster_that_came_later_says_so(job, tmp_path):
    one = intake.Submission("ada", data=OTHER, files=["a"], notes=["2 notebooks handed in"])
    report = tables.Report(tmp_path / "report.jsonl", "stamp")
    work = lambda files: iter([judge.Conversation(job).row() | {"student": name, "seconds": 0.0} for name in files])  # noqa: E731
    for late in (False, True):
        if late:
            roster = intake.Roster(["Full name", "Status"], [{"Full name": "Ada", "Status": "Submitted - 2 days late"}])
            roster.mark_late({"ada": one}, roster.find_all({"ada": one}))
        (row,) = grade.rows_of({"ada": one}, job, work, report, tmp_path / "pages")
        assert row["late"] == late and row["notes"] == ["2 notebooks handed in", intake.LATE][: 1 + late]


def test_no_table_has_a_0_for_what_the_grader_failed_on(job, tmp_path):
    row = judge.not_graded("ada", job, "tired") | {"handed_in": []}
    write_all([row], tmp_path / "grades.csv")
    (line,) = csv.DictReader((tmp_path / "grades.csv").read_text().splitlines())
    assert line["outcome"] == "not graded: tired"
    assert {line[key] for key in ("score", "percent", "q1", "q6")} == {""}
    roster = intake.Roster(
        ["Student", "ID", "Identifier", "Email address", "Grade"],
        [{"Student": "ada", "ID": "1", "Identifier": "1", "Email address": "a@x", "Grade": "7"}],
    )
    for kind, expected in {
        "canvas": [],
        "moodle": [["a@x", "-"]],
        "moodle-worksheet": [["ada", "1", "1", "a@x", "7"]],
    }.items():
        gradebooks.write(kind, [row | {"listed": roster.rows[0]}], roster, tmp_path / "out.csv", "Lab 1")
        lines = list(csv.reader((tmp_path / "out.csv").read_text().splitlines()))[1:]
        assert [line for line in lines if "Points Possible" not in line[0]] == expected


@pytest.mark.parametrize(("error", "graded"), [(OverflowError, True), (ZeroDivisionError, True), (MemoryError, False),
                                               (OSError, False), (ImportError, False)])  # fmt: skip
def test_an_error_that_an_answer_makes_of_a_check_costs_that_check_and_one_of_the_machine_nothing(
    job, monkeypatch, error, graded
):
    from nf4lab.labs import lab1

    def fails(*arguments):
        raise error("here")

    monkeypatch.setattr(lab1, "check_equal_shares", fails)
    row = judge.grade_one("ada", as_bytes(solved("lab1")), job)
    assert row["graded"] == graded
    assert row["score"] == (18 if graded else None), row["outcome"]


@pytest.mark.parametrize(
    ("number", "processes"), [(signal.SIGTERM, 5), (signal.SIGHUP, 1), (signal.SIGINT, 2)], ids=["TERM", "HUP", "INT"]
)
def test_a_signal_ends_a_batch_with_all_that_it_has_started_and_a_second_one_changes_nothing(
    job, tmp_path, number, processes
):
    """processes: how many of them there are when it comes; the server is loading, or submissions run already."""
    for folder in ("in", "tmp"):
        (tmp_path / folder).mkdir()
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("import time\ntime.sleep(50)")])
    for name in ("ada", "bo", "cem"):
        (tmp_path / "in" / f"{name}.ipynb").write_bytes(as_bytes(notebook))
    make_labs.make("lab1", seed=7, check=True, grader=tmp_path / "lab1.zip")
    program = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"  # the background ignores both
        "signal.signal(signal.SIGHUP, signal.SIG_DFL);"
        f"sys.path.insert(0, {str(ROOT / 'labs')!r}); import grade; sys.exit(grade.main(sys.argv[1:]))"
    )
    files = [tmp_path / "in", tmp_path / "out.csv", "--grader", tmp_path / "lab1.zip"]
    command = [sys.executable, "-c", program, "1", *files, "--no-self-test", "--jobs", "2"]
    own = os.environ | {"TMPDIR": str(tmp_path / "tmp")}
    run = subprocess.Popen(command, env=own, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    started = psutil.Process(run.pid)
    end = time.monotonic() + 120
    while time.monotonic() < end:
        found = started.children(recursive=True)
        if len(found) >= processes and list((tmp_path / "tmp").iterdir()):
            break
        time.sleep(0.02)
    run.send_signal(number)
    run.send_signal(number)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 128 + number, err
    assert f"stopped by {number.name}; rows are saved" in err and "Traceback" not in err
    assert not list((tmp_path / "tmp").iterdir())
    assert not psutil.wait_procs(found, timeout=10)[1]


# Notebooks as they come


def test_outputs_do_not_count_and_a_cell_without_a_source_costs_nothing(job):
    notebook = solved("lab1")
    notebook.cells[0:0] = [nbformat.v4.new_code_cell("from google.colab import drive, files\ndrive.mount('/content')")]
    found = json.loads(nbformat.writes(notebook))
    found["cells"][1]["outputs"] = [{"output_type": "stream", "name": "stdout", "text": "x" * 21 * 2**20}]
    found["cells"].insert(2, {"cell_type": "code", "source": None, "metadata": {}, "outputs": []})
    row = judge.grade_one("big", json.dumps(found).encode(), job)
    assert (row["score"], row["outcome"]) == (20, "graded"), row["errors"]


def test_a_cluster_gives_the_same_table(job, tmp_path):
    distributed = pytest.importorskip("distributed")
    files = {"right": as_bytes(solved("lab1")), "not json": b"{", "leaves": b'{"cells": []}'}
    here = sorted(grade.grade_here(files, job, 2), key=lambda row: row["student"])
    with distributed.LocalCluster(n_workers=1, threads_per_worker=2, processes=True, dashboard_address=None) as cluster:
        there = grade.grade_on_cluster(files, job, cluster.scheduler_address)
        there = sorted(there, key=lambda row: row["student"])
    for rows, name in ((here, "here.csv"), (there, "there.csv")):
        tables.write_table(rows, tmp_path / name)
    assert (tmp_path / "here.csv").read_bytes() == (tmp_path / "there.csv").read_bytes()


def test_the_command_tests_itself_grades_prints_the_seed_and_goes_on_where_it_was(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "ada.ipynb").write_bytes(as_bytes(solved("lab1")))
    make_labs.make("lab1", seed=7, check=True, grader=tmp_path / "lab1.zip")
    table = tmp_path / "out" / "grades.csv"
    command = [
        sys.executable,
        ROOT / "labs" / "grade.py",
        "1",
        tmp_path / "in",
        table,
        "--grader",
        tmp_path / "lab1.zip",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "seed 7: 1 students" in done.stdout and "1 submissions in" in done.stdout
    assert table.read_text().splitlines()[1].startswith("ada,20,20,100,3,4,2,4,4,3,,graded")
    assert "20 of 20" in (tmp_path / "out" / "grades-feedback" / "ada.html").read_text()
    (tmp_path / "in" / "bob.ipynb").write_bytes(b"{")
    again = subprocess.run([*command, "--no-self-test"], capture_output=True, text=True)
    assert "0/1" in again.stderr or "1/1" in again.stderr  # one notebook is new
    assert [line.split(",")[0] for line in table.read_text().splitlines()] == ["student", "ada", "bob"]


def test_a_set_up_that_cannot_grade_is_found_before_the_batch(job, monkeypatch):
    import selftest

    assert selftest.failures(job) == []
    monkeypatch.setattr(sandbox, "environment", lambda work: {"HOME": "/nowhere"})
    wrong = selftest.failures(replace(job, programs=job.programs | {"runner.py": "raise SystemExit"}))
    assert wrong and "earns 0 of 20: not graded: ChildProcessError" in wrong[0]


def test_a_symlinked_environment_grades(job, tmp_path, monkeypatch):
    (tmp_path / "venv").symlink_to(sys.prefix)
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "venv"))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "venv" / "bin" / "python"))
    monkeypatch.setattr(sandbox, "SERVERS", {})
    assert judge.grade_one("ada", as_bytes(solved("lab1")), job)["score"] == 20


def test_without_bubblewrap_namespaces_and_landlock_still_hold(job, monkeypatch):
    which = shutil.which
    monkeypatch.setattr(sandbox.shutil, "which", lambda name: None if name == "bwrap" else which(name))
    monkeypatch.setattr(sandbox, "SERVERS", {})
    row = judge.grade_one("ada", as_bytes(preceded("lab1", attacks.FINDS_WHAT_WAS_LEFT)), job)
    assert (row["outcome"], row["score"], row["errors"]) == ("graded", 20, [])
    assert "bubblewrap" not in row["layers"] and row["peak_mb"] > 50 and row["cpu_s"] > 0
    short = replace(job, limits=replace(LIMITS, seconds=5))
    row = judge.grade_one("stubborn", as_bytes(preceded("lab1", lab_submissions.STUBBORN)), short)
    assert row["outcome"] == "time limit (5 s)" and row["cpu_s"] > 0  # its last word comes when all has ended


def test_a_missing_engine_is_an_outcome_not_a_crash(job, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    row = judge.grade_one("ada", b'{"cells": []}', replace(job, container="image"))
    assert row["outcome"].startswith("not graded: FileNotFoundError") and not row["graded"]


def container_job(job):
    """The job in a container of the image that the guide names; a skip where it is not there."""
    try:
        found = sandbox.engine()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    if subprocess.run([found, "image", "inspect", "nf4lab-labs"], capture_output=True).returncode:
        pytest.skip(f"{found} has no image nf4lab-labs: build it as labs/README.md says")
    return found, replace(job, container="nf4lab-labs")


def test_in_a_container_a_right_answer_earns_all_and_nothing_of_the_host_is_in_sight(job):
    _, inside = container_job(job)
    row = judge.grade_one("host", as_bytes(preceded("lab1", attacks.looks_for_host(ROOT))), inside)
    assert (row["score"], row["errors"]) == (20, []), row
    assert row["peak_mb"] > 100  # what the submission takes, not the engine's client


def test_a_container_is_ended_with_what_it_runs(job):
    found, inside = container_job(job)
    short = replace(inside, limits=replace(LIMITS, seconds=15))
    row = judge.grade_one("stubborn", as_bytes(preceded("lab1", lab_submissions.STUBBORN)), short)
    assert row["outcome"] == "time limit (15 s)", row
    left = subprocess.run([found, "ps", "--format={{.Names}}"], capture_output=True, text=True).stdout
    assert "nf4lab-" not in left
