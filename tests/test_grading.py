"""Grading: right, wrong and hostile submissions, each in a process of its own; nothing lost, nothing hung."""

import csv
import json
import re
import socket
import subprocess
import sys

import lab_submissions
import pytest
from lab_submissions import ROOT, as_bytes, solved, with_answer

sys.path.insert(0, str(ROOT / "labs"))
import grade
import grading
import make_labs
import tables

STAND_IN = """#!{python}
import json, os, sys
from pathlib import Path
arguments = sys.argv[1:]
Path("{called}").write_text("\\n".join(arguments))
places = dict(reversed(a.removeprefix("--volume=").split(":")[:2]) for a in arguments if a.startswith("--volume="))
task = json.loads(arguments[-1])
os.symlink("{package}", places["/programs"] + "/nf4lab")
task |= {{"folder": places["/work"], "readable": [places["/programs"], "{package}", sys.prefix, sys.base_prefix]}}
program = [sys.executable, "-B", "-s", places["/programs"] + "/run_submission.py", "alone", json.dumps(task)]
given = [a.removeprefix("--env=").split("=", 1) for a in arguments if a.startswith("--env=")]
os.execve(sys.executable, program, {{name: value.replace("/work", places["/work"]) for name, value in given}})
"""
LIMITS = grading.Limits(seconds=20, cell_seconds=3, memory_gb=2)
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="submissions are shut in by Linux's own means")


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """The job of grading lab 1, with a grader made for it."""
    target = tmp_path_factory.mktemp("graders") / "lab1.zip"
    make_labs.make("lab1", seed=2026, check=True, grader=target)
    return grading.job_of("lab1", LIMITS, grader=target)


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


def test_the_table_is_one_that_a_gradebook_takes(batch, tmp_path):
    rows = sorted(batch[1].values(), key=lambda row: row["student"])
    tables.write_all(rows, tmp_path / "grades.csv", "lab1")
    table = list(csv.DictReader((tmp_path / "grades.csv").read_text().splitlines()))
    assert [line["student"] for line in table] == [row["student"].replace("=f", "'=f") for row in rows]
    for line, row in zip(table, rows, strict=True):
        assert float(line["score"]) == row["score"] == sum(float(line[f"q{i}"]) for i in range(1, 7))
        assert line["possible"] == "20"


def test_a_students_page_shows_no_hidden_check(batch, job, tmp_path):
    tables.write_all(list(batch[1].values()), tmp_path / "grades.csv", "lab1")
    pages = {path.stem: path.read_text() for path in (tmp_path / "grades-feedback").glob("*.html")}
    assert pages.keys() == batch[1].keys()
    hidden = {c["name"] for row in batch[1].values() for c in row["checks"] if c["hidden"]} - {""}
    assert {"on ties", "at other tails", "of other numbers"} <= hidden
    for text in pages.values():
        assert not any(name in text for name in hidden)
        assert "SEED" not in text and "<script>" not in text
    assert "was it renamed?" in pages["renamed"]
    report = [json.loads(line) for line in (tmp_path / "grades-report.jsonl").read_text().splitlines()]
    assert len(report) == len(pages)


@pytest.mark.parametrize(
    "line",
    [{"cell": 1, "error": "SECRET"}, {"unreadable": "SECRET"}, {"broken": "SECRET"}, {"refused": "SECRET"},
     {"question": "q1", "check": 0, "hidden": False, "passed": False, "message": "SECRET"},
     {"question": "q1", "check": 1, "hidden": True, "passed": False, "message": "SECRET"}],
)  # fmt: skip
def test_what_a_process_tells_once_it_has_the_hidden_checks_is_on_no_students_page(job, line):
    told = [{"layers": ["limits"]}, {"loaded": True}, {"ran": True}, {"public": True}, line]
    row = grading.evaluate(told, "", job) | {"student": "ada"}
    assert "SECRET" not in tables.page(row, "lab1")


@pytest.mark.parametrize("line", [{"question": [1]}, {"cell": 1}, {"replaced": 5}, {"ran": True, "hidden": {}}])
def test_lines_that_make_no_sense_cost_one_row(job, line, monkeypatch):
    monkeypatch.setattr(grading, "converse", lambda *_: ([{"layers": ["limits"]}, line], "", 0))
    row = grading.grade_one("ada", b"", job)
    assert row["score"] == 0 and "SECRET" not in tables.page(row, "lab1")
    assert set(row) >= {"student", "outcome", "notes", "layers", "peak_mb"}


def test_otter_itself_gives_the_same_points(job, tmp_path):
    otter_api = pytest.importorskip("otter.api")
    grader = tmp_path / "lab1.zip"
    make_labs.make("lab1", seed=2026, check=True, grader=grader)
    notebook = with_answer("lab1", "def nearest(w, levels):\n    return torch.bucketize(w, levels).to(torch.uint8)")
    (tmp_path / "submission.ipynb").write_bytes(as_bytes(notebook))
    results = otter_api.grade_submission(str(tmp_path / "submission.ipynb"), str(grader), quiet=True)
    row = grading.grade_one("same", as_bytes(notebook), job)
    assert {name: results.get_score(name) for name in results.test_files} == row["questions"]
    assert row["score"] == results.total < 20


def test_a_cluster_gives_the_same_table(job, tmp_path):
    distributed = pytest.importorskip("distributed")
    files = {"right": as_bytes(solved("lab1")), "not json": b"{", "leaves": b'{"cells": []}'}
    here = sorted(grade.grade_here(files, job, 2), key=lambda row: row["student"])
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster:
        there = grade.grade_on_cluster(files, job, cluster.scheduler_address)
        there = sorted(there, key=lambda row: row["student"])
    for rows, name in ((here, "here.csv"), (there, "there.csv")):
        tables.write_table(rows, tmp_path / name)
    assert (tmp_path / "here.csv").read_bytes() == (tmp_path / "there.csv").read_bytes()


def test_the_command_writes_table_pages_and_report(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "ada.ipynb").write_bytes(as_bytes(solved("lab1")))
    make_labs.make("lab1", seed=7, check=True, grader=tmp_path / "lab1.zip")
    command = [sys.executable, ROOT / "labs" / "grade.py", "1", tmp_path / "in", tmp_path / "out" / "grades.csv"]
    done = subprocess.run([*command, "--grader", tmp_path / "lab1.zip"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "1 submissions in" in done.stdout
    assert (tmp_path / "out" / "grades.csv").read_text().splitlines()[1].startswith("ada,20,20,100,3,4,2,4,4,3,graded")
    assert "20 of 20" in (tmp_path / "out" / "grades-feedback" / "ada.html").read_text()


def test_a_missing_engine_is_an_outcome_not_a_crash(job, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    contained = grading.Job(**{**vars(job), "container": "image"})
    assert grading.grade_one("ada", b"{}", contained)["outcome"].startswith("grader error: FileNotFoundError")


def test_a_container_gets_no_network_and_a_folder_of_its_own(job, monkeypatch, tmp_path):
    """With a stand-in for the engine, which notes how it was called and runs the program without a container."""
    engine = tmp_path / "podman"
    engine.write_text(STAND_IN.format(python=sys.executable, called=tmp_path / "called", package=ROOT / "nf4lab"))
    engine.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    contained = grading.Job(**{**vars(job), "container": "nf4lab-labs"})
    row = grading.grade_one("ada", as_bytes(solved("lab1")), contained)
    assert (row["score"], row["outcome"]) == (20, "graded")
    called = (tmp_path / "called").read_text().splitlines()
    assert {"--network=none", "--read-only", "--cap-drop=ALL", f"--memory={2 * 2**30}", "nf4lab-labs"} <= set(called)
