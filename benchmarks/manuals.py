"""The text of the book's language model: 33 manuals as Debian packages them, each under a permissive licence.

    python benchmarks/manuals.py FOLDER

downloads the packages of SOURCES (`apt-get download`, on Debian 12), reads the prose of their pages, drops what
occurs twice, and writes FOLDER/train.jsonl, pages.jsonl and manual.jsonl, a document per line: the pages to learn
from, pages held out of the same manuals, and the pages of manuals of which none is learned. It needs lxml.

Prose is headings, paragraphs and list items; code, tables and navigation are left out. A paragraph is dropped where
more than three in ten of its runs of six words have occurred before, in any document: so the held-out documents repeat
hardly a run of what is learned, and the last lines printed say how many they do.
"""

import argparse
import hashlib
import json
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from lxml import etree, html

# package -> (licence of its pages, where they lie below usr/share)
SOURCES = {
    "apache2-doc": ("Apache-2.0", "doc/apache2-doc/manual/en/**/*.html"),
    "cinder-doc": ("Apache-2.0", "doc/cinder-doc/html/**/*.html"),
    "cmake-doc": ("BSD-3-Clause", "doc/cmake-data/html/**/*.html"),
    "docutils-doc": ("public domain", "doc/docutils-doc/docs/**/*.html"),
    "erlang-doc": ("Apache-2.0", "doc/erlang-doc/**/*.html"),
    "glance-doc": ("Apache-2.0", "doc/glance-doc/html/**/*.html"),
    "golang-1.19-doc": ("BSD-3-Clause", "doc/golang-1.19-doc/**/*.html"),
    "heat-doc": ("Apache-2.0", "doc/heat-doc/html/**/*.html"),
    "ironic-doc": ("Apache-2.0", "doc/ironic-doc/html/**/*.html"),
    "keystone-doc": ("Apache-2.0", "doc/keystone-doc/html/**/*.html"),
    "libboost1.74-doc": ("BSL-1.0", "doc/libboost1.74-doc/doc/html/**/*.html"),
    "llvm-14-doc": ("Apache-2.0 with LLVM exception", "doc/llvm-14-doc/html/**/*.html"),
    "neutron-doc": ("Apache-2.0", "doc/neutron-doc/html/**/*.html"),
    "nim-doc": ("MIT", "doc/nim/**/*.html"),
    "nodejs-doc": ("MIT", "doc/nodejs/api/*.html"),
    "nova-doc": ("Apache-2.0", "doc/nova-doc/html/**/*.html"),
    "perl-doc": ("Artistic-1.0", "perl/5.36.0/pod/*.pod"),
    "postgresql-doc-15": ("PostgreSQL", "doc/postgresql-doc-15/html/*.html"),
    "python-attr-doc": ("MIT", "doc/python-attr-doc/html/**/*.html"),
    "python-dask-doc": ("BSD-3-Clause", "doc/python-dask-doc/html/**/*.html"),
    "python-django-doc": ("BSD-3-Clause", "doc/python-django-doc/html/**/*.html"),
    "python-flask-doc": ("BSD-3-Clause", "doc/python-flask-doc/html/**/*.html"),
    "python-jinja2-doc": ("BSD-3-Clause", "doc/python-jinja2-doc/html/**/*.html"),
    "python-scipy-doc": ("BSD-3-Clause", "doc/python-scipy-doc/html/**/*.html"),
    "python-sqlalchemy-doc": ("MIT", "doc/python-sqlalchemy-doc/html/**/*.html"),
    "python-werkzeug-doc": ("BSD-3-Clause", "doc/python-werkzeug-doc/html/**/*.html"),
    "python3.11-doc": ("PSF-2.0", "doc/python3.11/html/**/*.html"),
    "rust-doc": ("MIT or Apache-2.0", "doc/rust-doc/html/**/*.html"),
    "sphinx-doc": ("BSD-2-Clause", "doc/sphinx-doc/html/**/*.html"),
    "sqlite3-doc": ("public domain", "doc/sqlite3/**/*.html"),
    "swift-doc": ("Apache-2.0", "doc/swift-doc/html/**/*.html"),
    "twisted-doc": ("MIT", "doc/twisted-doc/html/**/*.html"),
    "zsh-doc": ("MIT-like", "doc/zsh-common/html/*.html"),
}
NEVER_LEARNED = ("python-flask-doc", "swift-doc")  # whole manuals held out
ONE_IN = 50  # of the other manuals, one page in so many is held out
NOT_PROSE = re.compile(r"/(_modules|_sources|src|arch|core_arch|genindex|search|print|perl(cn|jp|ko|tw)\b)")
BLOCKS = {"p", "li", "dd", "h1", "h2", "h3", "h4", "blockquote", "div", "section", "body", "td", "article", "main"}
KEPT = {"p", "li", "dd", "h1", "h2", "h3", "h4"}
LEFT_OUT = {"pre", "table", "nav", "script", "style", "head", "footer", "header", "form", "button", "svg", "dt"}
RUN = 6  # words


def documents(folder: Path) -> Iterator[tuple[str, str, list[str]]]:
    """(package, page, its paragraphs) of every page of SOURCES, its packages unpacked below the folder."""
    for package, (_, pattern) in SOURCES.items():
        root = folder / package / "usr" / "share"
        for page in sorted(root.glob(pattern)):
            name = page.relative_to(root).as_posix()
            if page.is_file() and not NOT_PROSE.search(name):
                text = page.read_text(errors="replace")
                yield package, name, list(of_pod(text) if page.suffix == ".pod" else of_html(text))


def of_html(text: str) -> Iterator[str]:
    """The paragraphs of a page: headings, paragraphs and list items, in order, each on one line."""
    tree = html.fromstring(text.encode(), parser=html.HTMLParser(encoding="utf-8")) if text.strip() else None
    if tree is None:
        return
    etree.strip_elements(tree, etree.Comment, *LEFT_OUT, with_tail=False)
    for element in tree.iter(*KEPT):
        yield from one_line("".join(own_text(element)))


def own_text(element: html.HtmlElement) -> Iterator[str]:
    """The text of an element without that of blocks inside it, which come as paragraphs of their own."""
    yield element.text or ""
    for child in element:
        if child.tag not in BLOCKS | {"ul", "ol", "dl"}:
            yield from own_text(child)
        yield child.tail or ""


def of_pod(text: str) -> Iterator[str]:
    """The paragraphs of Perl's documentation format: no commands, no code; L<text|page> becomes text."""
    for paragraph in re.split(r"\n\s*\n", text):
        if not paragraph.startswith(("=", " ", "\t")):
            for _ in range(3):  # codes stand in one another
                paragraph = re.sub(r"[A-Z]<(?:<+ )?(?:[^<>|]*\|)?([^<>]*?)(?: >+)?>", r"\1", paragraph)
            yield from one_line(paragraph)


def one_line(text: str) -> Iterator[str]:
    """The text with single spaces, if it is a paragraph: some letters, most of them plain."""
    text = " ".join(text.replace("¶", " ").split())
    plain = sum(c.isascii() for c in text)
    if len(text) > 2 and plain > 0.97 * len(text) and sum(c.isalpha() or c == " " for c in text) > 0.8 * len(text):
        yield text


def runs(paragraph: str) -> list[int]:
    """A hash for each run of six words; of a shorter paragraph, one for the whole."""
    words = re.findall(r"\w+", paragraph.lower())
    return [hash(tuple(words[i : i + RUN])) for i in range(max(1, len(words) - RUN + 1))]


def unseen(paragraphs: Iterable[str], seen: set[int]) -> list[str]:
    """The paragraphs of whose runs at most three in ten have occurred before; all runs are added to those seen."""
    kept = []
    for paragraph in paragraphs:
        found = runs(paragraph)
        if sum(run in seen for run in found) <= 0.3 * len(found):
            kept.append(paragraph)
        seen.update(found)
    return kept


def part_of(package: str, page: str) -> str:
    """train, pages or manual: by the name alone, so that another page changes nothing."""
    if package in NEVER_LEARNED:
        return "manual"
    digest = hashlib.sha256(f"{package}/{page}".encode()).digest()
    return "pages" if int.from_bytes(digest[:4], "big") % ONE_IN == 0 else "train"


def download(folder: Path) -> None:
    """Unpack every package of SOURCES below the folder, and install none."""
    for package, (licence, _) in SOURCES.items():
        with tempfile.TemporaryDirectory() as here:
            subprocess.run(["apt-get", "download", "-q", package], cwd=here, check=True, stdout=subprocess.DEVNULL)
            (archive,) = Path(here).glob("*.deb")
            subprocess.run(["dpkg-deb", "-x", archive, folder / package], check=True)
        print(f"{archive.name}: {licence}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the three files go")
    parser.add_argument("--unpacked", type=Path, help="packages unpacked before, in place of a download")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    unpacked = arguments.unpacked or arguments.folder / "packages"
    if not arguments.unpacked:
        download(unpacked)
    parts: dict[str, list[dict]] = {"manual": [], "pages": [], "train": []}
    for package, page, paragraphs in documents(unpacked):
        parts[part_of(package, page)].append({"package": package, "page": page, "text": paragraphs})
    seen: set[int] = set()
    for part, of_part in parts.items():  # what is held out first: training text gives way to it
        for document in of_part:
            document["text"] = "\n".join(unseen(document["text"], seen))
        of_part[:] = [document for document in of_part if len(document["text"]) >= 500]
        with open(arguments.folder / f"{part}.jsonl", "w") as file:
            file.writelines(json.dumps(document) + "\n" for document in of_part)
        print(f"{part}: {len(of_part):,} documents, {sum(len(d['text']) for d in of_part):,} characters")
    learned = {run for document in parts["train"] for line in document["text"].split("\n") for run in runs(line)}
    for part in ("pages", "manual"):
        shares = []
        for document in parts[part]:
            found = [run for line in document["text"].split("\n") for run in runs(line)]
            shares.append(sum(run in learned for run in found) / len(found))
        print(f"{part}: {sum(shares) / len(shares):.1%} of the runs of {RUN} words occur in the training text, "
              f"{max(shares):.0%} at most in a document")  # fmt: skip


if __name__ == "__main__":
    main()
