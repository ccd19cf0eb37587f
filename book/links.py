"""The addresses outside the book that its pages link to, and when each last answered: `python book/links.py`.

Run after `make book`, it brings book/links.tsv up to date with the pages: new addresses are added as never seen, those
that no page names any more are dropped, known dates stay. With --visit it asks each one, and writes today's date beside
those that answer; what does not answer is printed. With --check it writes nothing, and a list that differs is an error.
"""

import argparse
import datetime
import functools
import sys
import urllib.request
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urldefrag

import yaml
from lxml import html

ROOT = Path(__file__).resolve().parents[1]
SITE, LIST = ROOT / "_build" / "html", ROOT / "book" / "links.tsv"
NEVER = "never"
HEAD = "# address\tlast seen (python book/links.py --visit)\n"
AGENT = {"User-Agent": "Mozilla/5.0 (link check of a book)"}


class Parsed(NamedTuple):
    """What the elements of a page point to, and the places on it that can be pointed to."""

    targets: list[str]
    places: set[str]


@functools.cache
def parse(page: Path) -> Parsed:
    """What a page has, read once."""
    tree = html.document_fromstring(page.read_text())
    return Parsed([target for name in ("href", "src") for target in tree.xpath(f"//@{name}")], set(tree.xpath("//@id")))


def pages(site: Path) -> list[Path]:
    """The pages of the built book; the theme leaves templates of its own among its assets."""
    return sorted(path for path in site.rglob("*.html") if "_static" not in path.parts)


def inside(page: Path) -> list[tuple[str, str]]:
    """(path, fragment) of every link of a page that stays in the book."""
    near = [link for link in parse(page).targets if not link.startswith(("http:", "https:", "data:", "mailto:"))]
    return [(unquote(path.partition("?")[0]), unquote(part)) for path, part in map(urldefrag, near)]


def outside(site: Path) -> set[str]:
    """Every address elsewhere that a page names, but for the project's own: it is not known before there is a home."""
    own = yaml.safe_load((ROOT / "_config.yml").read_text())["repository"]["url"].removeprefix("https://")
    path = own.partition("/")[2]
    far = {link for page in pages(site) for link in parse(page).targets if link.startswith(("http:", "https:"))}
    return {urldefrag(link)[0] for link in far if f"/{path}" not in link}


def read(path: Path) -> dict[str, str]:
    """{address: date} of the list."""
    lines = path.read_text().splitlines() if path.exists() else []
    return dict(line.split("\t") for line in lines if line and not line.startswith("#"))


def visit(seen: dict[str, str], today: str) -> dict[str, str]:
    """The same list, with today's date beside each address that answers."""
    return {address: today if answers(address) else date for address, date in seen.items()}


def answers(address: str) -> bool:
    """Whether a GET of the address succeeds, redirections followed."""
    try:
        with urllib.request.urlopen(urllib.request.Request(address, headers=AGENT), timeout=20) as answer:
            return answer.status < 400
    except (OSError, ValueError) as error:
        print(f"{address}: {error}")
        return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--visit", action="store_true", help="ask every address, and date those that answer")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where the list is out of date")
    arguments = parser.parse_args()
    known = read(LIST)
    seen = {address: known.get(address, NEVER) for address in sorted(outside(SITE))}
    if arguments.visit:
        seen = visit(seen, datetime.date.today().isoformat())
    if arguments.check:
        changed = sorted(set(seen) ^ set(known))
        print(f"out of date: {', '.join(changed) or 'none'}")
        return 1 if changed else 0
    LIST.write_text(HEAD + "".join(f"{address}\t{date}\n" for address, date in seen.items()))
    print(f"{len(seen)} addresses, {sum(date == NEVER for date in seen.values())} never seen")
    return 0


if __name__ == "__main__":
    sys.exit(main())
