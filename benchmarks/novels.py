"""Texts that the package carries beside its language model: writes nf4lab/models/texts/*.jsonl.

    python benchmarks/novels.py FOLDER      FOLDER: where benchmarks/manuals.py has written; needs `pip install rdata`

manuals: pages held out of manuals that the model has learned from; flask: pages of a manual of which it has seen none.
novels-to-learn, novels-held-out: beginnings of four and of two of Jane Austen's novels (public domain), from the
Debian package r-cran-janeaustenr.
"""

import argparse
import json
import struct
import subprocess
import tempfile
import zlib
from pathlib import Path

import rdata

TEXTS = Path(__file__).parents[1] / "nf4lab" / "models" / "texts"
TO_LEARN, HELD_OUT = ("emma", "mansfieldpark", "prideprejudice", "sensesensibility"), ("northangerabbey", "persuasion")
TITLES = dict(zip((*TO_LEARN, *HELD_OUT), (
    "Emma", "Mansfield Park", "Pride and Prejudice", "Sense and Sensibility", "Northanger Abbey", "Persuasion",
), strict=True))  # fmt: skip


def novels() -> dict[str, str]:
    """The six novels by their names in the package, one paragraph per line."""
    with tempfile.TemporaryDirectory() as here:
        subprocess.run(["apt-get", "download", "-q", "r-cran-janeaustenr"], cwd=here, check=True,
                       stdout=subprocess.DEVNULL)  # fmt: skip
        (archive,) = Path(here).glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", archive, here], check=True)
        data = Path(here) / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
        index = rdata.read_rds(data.with_suffix(".rdx"))["variables"]
        stored = data.read_bytes()
    found = {}
    for name, (offset, length) in index.items():  # each a length in four bytes, then a zlib stream
        chunk = stored[int(offset) : int(offset) + int(length)]
        content = zlib.decompress(chunk[4:])
        assert len(content) == struct.unpack(">I", chunk[:4])[0]
        lines = [str(line) for line in rdata.conversion.convert(rdata.parser.parse_data(content))]
        found[str(name)] = paragraphs(lines)
    return found


def paragraphs(lines: list[str]) -> str:
    """Printed lines joined to paragraphs, those of fewer than four words left out: titles, numbers of chapters."""
    joined = (" ".join(part.split()) for part in "\n".join(lines).split("\n\n"))
    return "\n".join(part for part in joined if part.count(" ") > 2)


def beginning(text: str, characters: int) -> str:
    """So much of the text, cut where a paragraph ends."""
    return text[: text.rfind("\n", 0, characters)] if len(text) > characters else text


def write(part: str, documents: list[dict]) -> None:
    """The file of one part, a document per line."""
    path = TEXTS / f"{part}.jsonl"
    path.write_text("".join(json.dumps(document, ensure_ascii=False) + "\n" for document in documents))
    print(f"{path.name}: {len(documents)} documents, {sum(len(d['text']) for d in documents):,} characters")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    TEXTS.mkdir(parents=True, exist_ok=True)
    for part, name in (("pages", "manuals"), ("manual", "flask")):
        with open(folder / f"{part}.jsonl") as file:
            documents = [json.loads(line) for line in file]
        shipped = []
        for document in documents:
            prose = "\n".join(line for line in document["text"].split("\n") if line.count(" ") > 2)
            keep = name != "flask" or document["package"] == "python-flask-doc"
            if keep and len(prose) >= 1200:
                shipped.append({**document, "text": beginning(prose, 2000)})
        write(name, shipped)
    books = novels()
    for part, names, characters in (("novels-to-learn", TO_LEARN, 120_000), ("novels-held-out", HELD_OUT, 60_000)):
        write(part, [{"title": TITLES[name], "text": beginning(books[name], characters)} for name in names])


if __name__ == "__main__":
    main()
