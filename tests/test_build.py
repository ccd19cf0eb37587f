"""What `make book` promises, on books of two or three small pages: what runs when, and what a failure costs."""

import importlib
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "book"))
pytest.importorskip("jupyter_book")
build, run_pages = (importlib.import_module(name) for name in ("build", "run_pages"))

HEAD = """---
jupytext:
  text_representation: {extension: .md, format_name: myst, format_version: 0.13}
kernelspec: {display_name: Python 3, language: python, name: python3}
---

# Page
"""
# Every page's first cell leaves its name in a file, so that a test sees what ran.
RAN = "open('ran.txt', 'a').write('{name}\\n')\n"


class Terminal:
    """Takes what the build says."""

    name = "book.log"

    def __init__(self):
        self.lines = []

    def say(self, text):
        self.lines.append(text)


class Book:
    """A book in a folder: {name: its cells}."""

    def __init__(self, root, url="https://github.com/YOUR_ORG/nf4lab"):
        self.root = root
        (root / "book").mkdir()
        (root / "nf4lab").mkdir()
        self.write("nf4lab/__init__.py", "")
        self.write("book/index.md", "# A small book\n")
        self.config = {
            "title": "Small",
            "only_build_toc_files": True,
            "repository": {"url": url, "branch": "main"},
            "launch_buttons": {"colab_url": "https://colab.research.google.com"},
            "html": {"use_repository_button": True, "use_issues_button": True},
            "execute": {"execute_notebooks": "cache", "raise_on_error": True, "timeout": 600},
            "parse": {"myst_enable_extensions": ["dollarmath"]},
            "sphinx": {"local_extensions": dict.fromkeys(("addresses", "runs", "status"), str(ROOT / "book" / "_ext"))},
        }

    def write(self, name, text):
        (self.root / name).write_text(text)

    def pages(self, **cells):
        """Write the pages: the text of each cell after the first, by the page's name."""
        for name, sources in cells.items():
            sources = [RAN.format(name=name), *sources]
            self.write(f"book/{name}.md", HEAD + "".join(f"\n```{{code-cell}}\n{source}\n```\n" for source in sources))
        chapters = [{"file": f"book/{name}"} for name in cells]
        toc = {"format": "jb-book", "root": "book/index", "parts": [{"caption": "All", "chapters": chapters}]}
        self.write("_toc.yml", yaml.safe_dump(toc))
        self.write("_config.yml", yaml.safe_dump(self.config))

    def change(self, name, old, new):
        path = self.root / "book" / f"{name}.md"
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))

    def run(self, *names):
        """Run what is to be run: (the pages that began, what failed, the lines of the terminal)."""
        (self.root / "book" / "ran.txt").unlink(missing_ok=True)
        terminal = Terminal()
        failed = build.run(self.root, names, run_pages.Outputs(self.root), terminal)
        return self.ran(), failed, terminal.lines

    def ran(self):
        path = self.root / "book" / "ran.txt"
        return sorted(path.read_text().split()) if path.exists() else []

    def start(self):
        """`make book` on the book, as a process."""
        command = [sys.executable, ROOT / "book" / "build.py", "--root", self.root, "--no-pdf"]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def make(self):
        """(exit status, what the terminal showed) of `make book` on the book."""
        (self.root / "book" / "ran.txt").unlink(missing_ok=True)
        process = self.start()
        shown, _ = process.communicate()
        return process.returncode, shown

    def page(self, name):
        return (self.root / "_build" / "html" / "book" / f"{name}.html").read_text()


@pytest.fixture
def book(tmp_path):
    return Book(tmp_path)


def meet(name, other):
    """A cell that ends only when the other page's cell has begun too."""
    return (
        f"import pathlib, time\npathlib.Path('{name}.began').touch()\n"
        f"while not pathlib.Path('{other}.began').exists():\n    time.sleep(0.05)"
    )


def test_pages_run_side_by_side(book, monkeypatch):
    monkeypatch.setattr(run_pages, "at_a_time", lambda: 2)
    book.pages(a=[meet("a", "b")], b=[meet("b", "a")])
    ran, failed, lines = book.run()
    assert (ran, failed) == (["a", "b"], [])
    assert lines[0].startswith("2 of 2 pages with code to run, 2 at a time")
    assert [line.split()[-2:] for line in lines[1:]] == [["1", "left"], ["0", "left"]]


def test_no_more_pages_run_at_a_time_than_there_are_cores_for_this_process(monkeypatch):
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "1")
    assert run_pages.at_a_time() == 1


def test_memory_for_one_page_runs_one_page_at_a_time(monkeypatch):
    monkeypatch.setattr(run_pages.joblib, "cpu_count", lambda: 64)
    monkeypatch.setattr(run_pages.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1e8}))
    assert run_pages.at_a_time() == 1


def test_a_page_runs_again_when_its_code_changes_and_not_when_its_text_does(book):
    book.pages(a=["1 + 1"], b=["2 + 2"])
    assert book.run()[0] == ["a", "b"]
    book.change("a", "# Page", "# Another title")
    assert book.run()[0] == []
    book.change("a", "1 + 1", "1 + 3")
    assert book.run()[0] == ["a"]


@pytest.mark.parametrize("name", ["nf4lab/kernel.py", "benchmarks/results/gpu.json", "requirements.txt"])
def test_every_page_runs_again_when_what_it_runs_on_changes(book, name):
    book.pages(a=["1 + 1"])
    book.run()
    (book.root / name).parent.mkdir(parents=True, exist_ok=True)
    book.write(name, "new")
    assert book.run()[0] == ["a"]
    assert book.run()[0] == []
    book.write(name, "newer")
    assert book.run()[0] == ["a"]


def test_what_python_compiles_runs_no_page(book):
    book.pages(a=["1 + 1"])
    book.run()
    (book.root / "nf4lab" / "__pycache__").mkdir()
    book.write("nf4lab/__pycache__/kernel.pyc", "new")
    assert book.run()[0] == []


def test_a_failed_page_is_named_with_cell_line_and_error_and_runs_alone_the_next_time(book):
    book.pages(a=["1 + 1"], b=["x = 1", "# why\nx / 0"], c=["3 + 3"])
    ran, (failure,), lines = book.run()
    assert ran == ["a", "b", "c"]
    line = (book.root / "book" / "b.md").read_text().splitlines().index("# why") + 1
    assert failure.page.name == "book/b"
    assert failure.failure == f"cell 3 (line {line}: `# why`): ZeroDivisionError: division by zero"
    assert sum("failed" in line for line in lines) == 1
    assert book.run()[0] == ["b"]
    book.change("b", "x / 0", "x / 1")
    ran, failed, _ = book.run()
    assert (ran, failed) == (["b"], [])


def test_an_assertion_without_words_is_quoted(book):
    book.pages(a=["x = 1\nif True:\n    assert x == 2\nx = 3"])
    _, (failure,), _ = book.run()
    assert failure.failure.endswith("(line 15: `x = 1`): AssertionError: assert x == 2")


def test_a_kernel_that_dies_costs_its_page_alone(book):
    book.pages(a=["1 + 1"], b=["import os\nos._exit(1)"])
    ran, (failure,), _ = book.run()
    assert ran == ["a", "b"]
    assert "cell 2" in failure.failure
    assert "DeadKernelError" in failure.failure


def test_an_endless_loop_ends_at_the_limit_of_the_configuration(book):
    book.config["execute"]["timeout"] = 3
    book.pages(a=["while True:\n    pass"])
    _, (failure,), _ = book.run()
    assert failure.failure.endswith(
        "`while True:`): Timeout: the cell took longer than 3 seconds, the limit of _config.yml"
    )


def test_a_page_may_show_an_error_on_purpose(book):
    book.pages(a=[":tags: [raises-exception]\n\n1 / 0", "1 + 1"])
    assert book.run()[1] == []


def test_only_the_named_pages_run_and_the_others_later(book):
    book.pages(a=["1 + 1"], b=["2 + 2"])
    ran, failed, _ = book.run("b")
    assert (ran, failed) == (["b"], [])
    assert book.run()[0] == ["a"]


def test_a_failure_leaves_the_other_pages_to_read_and_mends_in_the_pages_that_failed(book):
    threads = "import os\nos.environ['OMP_NUM_THREADS']"
    book.pages(a=["print('A' * 3)"], b=["import missing_package"], c=[threads],
               d=["assert open('there.txt').read()", "print('D' * 3)"])  # fmt: skip
    status, shown = book.make()
    first, second = sorted(shown.splitlines()[-3:-1])
    assert status == 1
    assert first.startswith("failed: book/b.md, cell 2 (line ")
    assert second.startswith("failed: book/d.md, cell 2 (line ")
    assert "ModuleNotFoundError: No module named 'missing_package'" in first
    assert "AAA" in book.page("a")
    assert "missing_package" in re.search(r'class="[^"]*traceback.*?</div>', book.page("b"), re.DOTALL)[0]
    assert re.search(r"'1'", re.sub("<[^>]*>", "", book.page("c")).replace("&#39;", "'"))  # each has one thread
    book.change("b", "import missing_package", "print('B' * 3)")
    book.write("book/there.txt", "yes")  # d is read again, in which nothing has changed
    status, shown = book.make()
    assert (status, book.ran()) == (0, ["b", "d"])
    assert "BBB" in book.page("b") and "DDD" in book.page("d")
    assert shown.splitlines()[-1].endswith("_build/html/index.html")


def test_ctrl_c_keeps_the_pages_that_are_done_and_the_next_build_runs_the_rest(book):
    waits = "import pathlib, time\nwhile not pathlib.Path('go.txt').exists():\n    time.sleep(0.05)\nprint('W' * 3)"
    book.pages(a=["print('A' * 3)"], z=[waits])
    process = book.start()
    kept = book.root / "_build" / "book.log"
    while not (kept.exists() and "book/a  " in kept.read_text() and "z" in book.ran()):
        time.sleep(0.1)
        assert process.poll() is None
    status, second = book.make()
    assert (status, second.strip()) == (1, f"another build is under way in {book.root}")
    process.send_signal(signal.SIGINT)
    shown, _ = process.communicate()
    assert process.returncode == 1
    assert shown.splitlines()[-2] == "stopped before the end of: z"
    assert "AAA" in book.page("a")
    assert "NotRun" in book.page("z")
    book.write("book/go.txt", "")
    status, _ = book.make()
    assert (status, book.ran()) == (0, ["z"])
    assert "WWW" in book.page("z")


def test_a_warning_is_an_error_each_time_until_it_is_mended(book):
    book.pages(a=["1 + 1"])
    book.change("a", "# Page", "# Page\n\n[nowhere](missing.md)")
    for _ in range(2):
        status, shown = book.make()
        assert status == 1
        assert "WARNING" in shown
        assert "missing.md" in shown
    book.change("a", "[nowhere](missing.md)", "")
    assert book.make()[0] == 0


@pytest.mark.parametrize(("owner", "home"), [("you", True), ("YOUR_ORG", False)])
def test_buttons_and_links_lead_to_the_projects_address_once_there_is_one(tmp_path, owner, home):
    book = Book(tmp_path, f"https://github.com/{owner}/nf4lab")
    book.pages(a=["1 + 1"])
    book.change("a", "# Page", "# Page\n\n[a file](repo:README.md) and [a lab](colab:lab.ipynb)")
    assert book.make()[0] == 0
    links = re.findall(r'href="([^"]*)"', book.page("a"))
    places = ("blob/main/README.md", "research.google.com/github", "/issues")
    assert [any(place in link and owner in link for link in links) for place in places] == [home] * 3
    assert any(owner in link for link in links) is home
    assert ("make home URL=" in book.page("a")) is not home


def install(folder, pip):
    """`make` of the environment, in a folder with this Makefile and a Python whose pip is that script."""
    for name in ("Makefile", "requirements.txt", "pyproject.toml"):
        (folder / name).write_text((ROOT / name).read_text())
    python = folder / "python"
    write = f"mkdir -p .venv/bin; printf '#!/bin/sh\\n{pip}\\n' > .venv/bin/pip; chmod +x .venv/bin/pip"
    python.write_text(f'#!/bin/sh\n[ "$1" = -m ] || exit 0\n{write}\n')
    python.chmod(0o755)
    command = ["make", ".venv/bin/ready", f"PYTHON={python}"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_the_installation_says_before_what_it_takes_and_its_noise_goes_to_a_log(tmp_path):
    done = install(tmp_path, "echo Collecting $5; echo a note >&2")
    assert done.returncode == 0
    assert re.search(r"a download of [\d.]+ GB, [\d.]+ GB of disk and some minutes", done.stdout)
    assert ("CUDA" in done.stdout) == (sys.platform == "linux")
    assert "Collecting" not in done.stdout
    assert "a note" not in done.stderr
    assert (tmp_path / "_build" / "install.log").read_text().count("Collecting") == 2
    assert (tmp_path / ".venv" / "bin" / "ready").exists()


def test_an_installation_that_fails_shows_why_and_is_begun_again(tmp_path):
    for _ in range(2):
        done = install(tmp_path, "echo ERROR: nothing of this name; exit 1")
        assert done.returncode != 0
        assert "ERROR: nothing of this name" in done.stdout
        assert not (tmp_path / ".venv" / "bin" / "ready").exists()


def test_a_second_build_leaves_the_slimmed_assets_and_a_change_of_page_or_extension_has_them_slimmed_again(book):
    book.config["sphinx"]["local_extensions"] |= {"weight": str(ROOT / "book" / "_ext"), "shout": "book/_ext"}
    book.config["sphinx"]["config"] = {
        "extensions": [
            "myst_nb",
            "jupyter_book",
            "sphinx_book_theme",
            "sphinx_comments",
            "sphinx_external_toc",
            "sphinx-mathjax-offline",
            "addresses",
            "runs",
            "shout",
            "status",
            "weight",
        ]
    }
    (book.root / "book" / "_ext").mkdir()
    add = "lambda app, name, source: source.append(source.pop() + {!r})"
    shout = f"def setup(app):\n    app.connect('source-read', {add})\n"
    book.write("book/_ext/shout.py", shout.format("\n\nLOUD\n"))
    book.pages(a=["1 + 1"], b=["2 + 2"])
    script = book.root / "_build" / "html" / "_static" / "scripts" / "fontawesome.js"
    weights = []
    for change in ("# Page", "# Page", "# Another title"):
        book.change("a", "# Page", change)
        assert book.make()[0] == 0
        weights.append(script.stat().st_size)
        assert "LOUD<" in book.page("a") and "LOUD<" in book.page("b")
    book.write("book/_ext/shout.py", shout.format("\n\nLOUDER\n"))
    assert (book.make()[0], book.ran()) == (0, [])  # every page is read again, and none is run
    assert "LOUDER" in book.page("a") and "LOUDER" in book.page("b")
    weights.append(script.stat().st_size)
    assert weights[0] == weights[1] == weights[2] == weights[3] < 1000
