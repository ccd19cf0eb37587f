"""What the README shows is what happens."""

import contextlib
import io
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_the_example_prints_what_the_readme_says():
    code, expected = re.search(r"```python\n(.*?)```\n\n```text\n(.*?)```", README, re.DOTALL).groups()
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    assert printed.getvalue() == expected


def test_every_place_that_the_readme_names_is_there():
    places = re.findall(r"^\| (`.*?) \|", README, re.MULTILINE)
    names = [name for place in places for name in re.findall(r"`([^`]+)`", place)]
    assert len(names) >= 9
    assert all((ROOT / name).exists() for name in names)
    assert all((ROOT / target).exists() for target in re.findall(r"\]\((?!http)([^)]+)\)", README))


def test_the_rooms_that_the_readme_lists_are_those_of_the_package():
    listing = re.search(r"```\nnf4lab/\n(.*?)```", README, re.DOTALL)[1]
    listed = set(re.findall(r"^  ([a-z_]+(?:/|\.py))", listing, re.MULTILINE))
    rooms = {path.name + "/" * path.is_dir() for path in (ROOT / "nf4lab").iterdir()}
    assert listed == {name for name in rooms if not name.startswith("__")}
