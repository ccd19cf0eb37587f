"""The labs: masters earn all points, handouts none, each likely mistake what it should, and nothing leaks."""

import re
import subprocess
import sys
from functools import cache

import jupytext
import make_course
import make_labs
import masters
import nbformat
import pytest
from lab_submissions import ROOT, changed, mistakes, solved, with_answer

import nf4lab

LABS = make_labs.labs()
MISTAKES = [(lab, name) for lab in LABS for name in mistakes(lab)]


@cache
def solution(lab):
    return masters.run(solved(lab))


@pytest.mark.parametrize("seed", [2026, 2027, 1])
@pytest.mark.parametrize("lab", LABS)
def test_the_master_earns_all_points_with_any_seed(lab, seed):
    """What is in sight is checked once: it does not depend on the seed, and that its files do not has a test."""
    which = lambda check: check.hidden or seed == 2026  # noqa: E731
    assert masters.outcome(lab, solution(lab), seed=seed, which=which) == (masters.possible(lab, which=which), {})


@pytest.mark.parametrize("lab", LABS)
def test_the_handout_earns_nothing_and_its_cells_run(lab):
    ours = lambda cell: "setup" in cell.metadata.get("tags", []) or cell.source.startswith("grader.check")  # noqa: E731
    handout = nbformat.v4.new_notebook(cells=[cell for cell in masters.made(lab)[0].cells if not ours(cell)])
    points, told = masters.outcome(lab, masters.run(handout, every_cell=True))
    assert points == 0
    assert all("returned None" in text or "not written yet" in text for text in told.values()), told


@pytest.mark.parametrize(("lab", "name"), MISTAKES)
def test_a_likely_mistake_loses_its_points_and_is_named(lab, name):
    answer, lost, message = mistakes(lab)[name]
    notebook = with_answer(lab, answer) if isinstance(answer, str) else changed(lab, *answer)
    questions = None if isinstance(answer, str) else [answer[0]]
    points, told = masters.outcome(lab, masters.run(notebook), questions)
    assert masters.possible(lab, questions) - points == lost, told
    named = [re.search(message, text) or check.endswith("all_parts_together") for check, text in told.items()]
    # The pattern of a whole function has the numbers of one of its checks, that of a changed text holds for all.
    assert any(named) and (all(named) or isinstance(answer, str)), told


def test_lab_1_says_how_many_points_its_checks_in_sight_carry():
    text = (ROOT / "labs" / "lab1" / "master.md").read_text()
    seen = sum(int(points) for points in re.findall(r"public, (\d+)-point", text))
    assert f"The checks you see carry {seen} of the {masters.possible('lab1')} points." in text


@pytest.mark.parametrize("lab", LABS)
def test_there_are_at_least_six_mistakes(lab):
    assert len(mistakes(lab)) >= 6


@pytest.mark.parametrize("lab", LABS)
def test_a_student_meets_the_mistakes_message_before_handing_in(lab):
    """Each question has a public check, and at most half of the points are public."""
    public = sum(check.points for cases in masters.checks(lab).values() for check in cases if not check.hidden)
    assert 0 < public <= masters.possible(lab) / 2


def test_what_students_get_is_up_to_date():
    assert [stale for lab in LABS for stale in make_labs.make(lab, 2026, check=True)] == []


@pytest.mark.parametrize("lab", LABS)
def test_nothing_of_a_solution_or_a_hidden_check_is_in_a_students_file(lab):
    master = jupytext.read(ROOT / "labs" / lab / "master.md")
    given = "\n".join(cell.source for cell in nbformat.read(ROOT / "labs" / lab / f"{lab}.ipynb", 4).cells)
    shipped = "\n".join(path.read_text() for path in (make_labs.PUBLIC / lab).glob("*.py"))
    assert "SOLUTION" not in given and "SEED" not in given + shipped and "hidden=True" not in shipped
    open_cells = "\n".join(cell.source for cell in master.cells if not make_labs.question(cell))
    secret = []
    for cell in master.cells:
        if make_labs.question(cell) and make_labs.hidden(cell):
            secret += re.findall(r"def (\w+)\(env\)", cell.source)
            assert not re.search(rf"\b{secret[-1]}\b", given)
        elif make_labs.question(cell) and make_labs.hidden(cell) is None:
            blocks = re.findall(r"# BEGIN SOLUTION\n(.*?)# END SOLUTION", cell.source, re.DOTALL)
            lines = [line.strip() for block in blocks for line in block.splitlines()]
            secret_lines = [line for line in lines if len(line) > 12 and line not in open_cells]
            assert secret_lines and not [line for line in secret_lines if line in given], lab
    assert secret
    own = [case.body.test_func.__name__ for cases in masters.checks(lab).values() for case in cases if not case.hidden]
    assert not [name for name in set(secret) - set(own) if re.search(rf"\bdef {name}\b", shipped)]


@pytest.mark.parametrize("lab", LABS)
def test_only_lab_4_asks_for_a_gpu_and_every_lab_has_its_button_and_setup(lab):
    notebook = nbformat.read(ROOT / "labs" / lab / f"{lab}.ipynb", 4)
    nbformat.validate(notebook)
    assert notebook.metadata.get("accelerator") == ("GPU" if lab == "lab4" else None)
    assert f"labs/{lab}/{lab}.ipynb)" in notebook.cells[0].source and "colab-badge" in notebook.cells[0].source
    assert notebook.cells[1].metadata.tags == ["setup"]
    assert f'checks("{lab}")' in notebook.cells[1].source
    points = [
        float(n)
        for cell in notebook.cells
        for n in re.findall(r"^## Question .*\(([\d.]+) points?\)", cell.source, re.M)
    ]
    assert sum(points) == masters.possible(lab)


def test_the_students_files_do_not_depend_on_the_seed():
    lab = LABS[0]
    one, two = (make_labs.check_files(lab, masters.made(lab)[1], seed) for seed in (1, 2))
    assert one != two
    assert make_labs.make(lab, 12345, check=True) == []


def test_the_students_repository_has_its_address_everywhere_and_nothing_of_a_master(tmp_path):
    course, url = tmp_path / "course", "https://github.com/ada/nf4-course"
    done = subprocess.run(
        [sys.executable, "labs/make_course.py", course, url], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    copied = {path.name for path in course.rglob("*") if path.is_file()}
    assert {"lab1.ipynb", "q1.py", "feedback.py", "make_labs.py"} <= copied and "master.md" not in copied
    for path in [*course.glob("labs/*/*.ipynb"), *course.glob("book/*.ipynb")]:
        text = path.read_text()
        assert "YOUR_ORG" not in text, path
        for old, new in (("github/YOUR_ORG/nf4lab/blob", "github/ada/nf4-course/blob"), ("git+https", f"git+{url}@v")):
            assert old not in (ROOT / path.relative_to(course)).read_text() or new in text, path
    assert f"url: {url}" in (course / "_config.yml").read_text()
    tags = subprocess.run(["git", "tag"], cwd=course, capture_output=True, text=True).stdout.split()
    assert tags == [f"v{nf4lab.__version__}"]


def test_a_leak_into_the_students_repository_is_found(tmp_path):
    (tmp_path / "labs" / "lab1").mkdir(parents=True)
    (tmp_path / "labs" / "lab1" / "lab1.ipynb").write_text("    def at_other_tails(env):\n")
    (tmp_path / "labs" / "notes.md").write_text(next(word for word in make_course.secrets() if "reshape" in word))
    found = make_course.leaks(tmp_path, "https://github.com/a/b")
    assert [line.split(":")[0] for line in found] == ["labs/lab1/lab1.ipynb", "labs/notes.md"]


def test_the_courses_seed_is_kept_and_never_replaced_silently(tmp_path, capsys):
    file = tmp_path / "seed"
    assert make_labs.course_seed(4711, file) == 4711 == make_labs.course_seed(None, file)
    assert "4711" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="holds 4711, and you ask for 2027"):
        make_labs.course_seed(2027, file)
    drawn = {make_labs.course_seed(None, tmp_path / str(i)) for i in range(5)}
    assert len(drawn) == 5 and 2026 not in drawn


def test_the_guide_tells_the_labs_minutes_and_points():
    guide = (ROOT / "labs" / "README.md").read_text()
    rows = dict(re.findall(r"^\| \[?(\d) .*?\| (\d+ \| \d+) \|", guide, re.MULTILINE))
    for lab in LABS:
        text = "\n".join(cell.source for cell in nbformat.read(ROOT / "labs" / lab / f"{lab}.ipynb", 4).cells)
        minutes, points = re.search(r"\*\*Time\*\* (\d+) minutes\..*\*\*Points\*\* (\d+)", text).groups()
        assert rows[lab[3:]] == f"{minutes} | {points}" and float(points) == masters.possible(lab)
        assert 60 <= int(minutes) <= 90
