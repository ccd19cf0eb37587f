"""The students' repository: `make students OUT=../course URL=https://github.com/you/course`.

A copy of the last commit without masters, their tests and all else that labs/private.txt names, with URL as its
address in every notebook and button, and its history begun. Before it is done, every file is searched for what
students must not have: solutions, hidden checks, the seed, the address of another repository.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

import jupytext
import make_labs
import nbformat

ROOT = make_labs.ROOT
NAME = r"https://[\w.-]+/[\w.-]+/[\w.-]+"


def copy(out: Path) -> None:
    """The last commit, without what is private. Raises SystemExit where OUT is not empty."""
    if out.exists() and any(out.iterdir()):
        raise SystemExit(f"{out} is not empty: give a new folder, or remove what is there")
    out.mkdir(parents=True, exist_ok=True)
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, capture_output=True, check=True).stdout
    command = ["tar", "-x", "-C", str(out), f"--exclude-from={ROOT / 'labs' / 'private.txt'}"]
    subprocess.run(command, input=archive, check=True)


def readdress(out: Path, url: str) -> None:
    """URL as the repository's address wherever this one's is."""
    old = make_labs.make_notebooks.repository_url()
    short_old, short = (text.removeprefix("https://github.com/") for text in (old, url))
    note = make_labs.make_notebooks.NO_HOME if "YOUR_ORG" in old else ""
    for path in text_files(out):
        text = path.read_text(encoding="utf-8")
        new = text.replace(old, url).replace(f"github/{short_old}/", f"github/{short}/").replace(short_old, short)
        if path.suffix == ".ipynb" and note:
            notebook = nbformat.reads(new, as_version=4)
            for cell in notebook.cells:
                cell.source = cell.source.replace(note, "").replace(note.replace(short_old, short), "")
            new = nbformat.writes(notebook) + "\n"
        if new != text:
            path.write_text(new, encoding="utf-8")


def text_files(folder: Path) -> list[Path]:
    """The files that hold text."""
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and ".git" not in path.relative_to(folder).parts:
            try:
                path.read_text(encoding="utf-8")
                found.append(path)
            except UnicodeDecodeError:
                continue
    return found


def secrets() -> list[str]:
    """What must be in no file of the students': names of hidden checks, lines of solutions that stand nowhere else."""
    words = []
    for lab in make_labs.labs():
        master = jupytext.read(ROOT / "labs" / lab / "master.md")
        given = "\n".join(c.source for c in master.cells if not make_labs.question(c) or make_labs.hidden(c) is False)
        for cell in master.cells:
            if make_labs.question(cell) and make_labs.hidden(cell):
                words += [f"def {name}(env)" for name in re.findall(r"def (\w+)\(env\)", cell.source)]
            elif make_labs.question(cell) and make_labs.hidden(cell) is None:
                blocks = re.findall(r"# BEGIN SOLUTION\n(.*?)# END SOLUTION", cell.source, re.DOTALL)
                lines = [line.strip() for block in blocks for line in block.splitlines()]
                words += [line for line in lines if len(line) > 40 and line not in given]
        words = [word for word in words if word not in given]
    return list(dict.fromkeys(words))


def leaks(out: Path, url: str) -> list[str]:
    """What is in the copy and should not be, with its file. Lines of solutions that the book teaches may be in it."""
    seed = ROOT / "labs" / "seed"
    words = [*secrets(), "YOUR_ORG", *([f"SEED = {seed.read_text().strip()}"] if seed.exists() else [])]
    found = [str(p.relative_to(out)) for p in out.rglob("*") if p.name in ("master.md", "seed") and "labs" in p.parts]
    for path in text_files(out):
        name, text = str(path.relative_to(out)), path.read_text(encoding="utf-8")
        if path.name != "make_course.py":
            for word in words:
                taught = not word.startswith(("def ", "SEED", "YOUR_ORG")) and not name.startswith("labs/")
                if word in text and not taught and not own(path, word):
                    found.append(f"{name}: {word}")
    return found


def own(path: Path, word: str) -> bool:
    """Whether a file speaks of the placeholder itself: the programs that write and check addresses do."""
    return word == "YOUR_ORG" and (path.suffix == ".py" or path.name in ("CONTRIBUTING.md", "README.md", "Makefile"))


def begin(out: Path) -> None:
    """A git repository with one commit and the version's tag."""
    version = f"v{make_labs.make_notebooks.nf4lab.__version__}"
    for command in (
        ["init", "-q", "-b", "main"],
        ["add", "-A"],
        ["commit", "-q", "-m", "The course"],
        ["tag", version],
    ):
        subprocess.run(["git", *command], cwd=out, check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a new folder, outside this repository")
    parser.add_argument("url", help="where students will find it: https://github.com/you/course")
    given = parser.parse_args()
    if not re.fullmatch(NAME, given.url) or "YOUR_ORG" in given.url:
        parser.error(f"the address should look like https://github.com/you/course; got {given.url}")
    copy(given.out)
    readdress(given.out, given.url)
    if found := leaks(given.out, given.url):
        print("not for students, so nothing was committed:", *found, sep="\n  ")
        return 1
    begin(given.out)
    print(f"{given.out}: one commit and a tag, nothing of a solution in it. Push both to {given.url}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
