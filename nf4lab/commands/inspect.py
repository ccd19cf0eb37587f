"""`nf4lab inspect FILE`: what a checkpoint holds, tensor by tensor, without reading the tensors."""

import argparse
import json
import math

from nf4lab.checkpoints.files import opened, stored_tensors
from nf4lab.checkpoints.keys import STATES, describe
from nf4lab.checkpoints.tensorfile import TensorFile
from nf4lab.commands.shown import console_for_tables, shown

COLUMNS = ("tensor", "stored as", "shape", "bits", "bytes")


def add_to(subparsers) -> None:
    """Declare the command and its arguments."""
    parser = subparsers.add_parser("inspect", help="list what a checkpoint holds", description=__doc__)
    parser.add_argument("source", metavar="FILE", help="a safetensors file; or an index of shards or its folder")
    parser.add_argument("--json", action="store_true", help="print a JSON object instead of a table")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the table, and the totals; or all of it as JSON."""
    with opened(options.source) as files:
        rows = list(rows_of(files))
    elements, nbytes = sum(math.prod(shape) for *_, shape, _ in rows), sum(row[3] for row in rows)
    if options.json:
        tensors = [
            {"name": name, "stored_as": kind, "shape": list(shape), "bits": _bits(n, shape), "bytes": n}
            for name, kind, shape, n in rows
        ]
        totals = {"elements": elements, "bits": _bits(nbytes, [elements]), "bytes": nbytes}
        print(json.dumps({"tensors": tensors} | totals, indent=1))
    else:
        _print(rows, elements, nbytes)
    return 0


def _print(rows: list, elements: int, nbytes: int) -> None:
    from rich.table import Table

    table = Table(*COLUMNS, header_style="bold", box=None, pad_edge=False)
    table.columns[0].overflow = "fold"  # a long name goes on in the next line: its end is what tells layers apart
    for column in table.columns[2:]:
        column.no_wrap = True
    for column in table.columns[3:]:
        column.justify = "right"
    for name, kind, shape, n in rows:
        table.add_row(shown(name), kind, " x ".join(map(str, shape)), _written(_bits(n, shape)), f"{n:,}")
    table.add_section()
    table.add_row(f"{len(rows)} tensors", "", f"{elements:,}", _written(_bits(nbytes, [elements])), f"{nbytes:,}")
    console_for_tables(markup=False).print(table)


def rows_of(files: list[TensorFile]):
    """(name, how it is stored, shape, bytes in the file) of each tensor of a checkpoint."""
    place = {key: file for file in files for key in file.entries}
    for name, keys in stored_tensors(list(place)).items():
        nbytes = sum(place[key].entries[key].nbytes for key in keys)
        state = next((key for key in keys if key.startswith(name) and key.removeprefix(name) in STATES), None)
        if state is None:
            entry = place[name].entries[name]
            yield name, str(entry.dtype).removeprefix("torch."), entry.shape, nbytes
        else:
            kind, shape = describe(place[state].read(state))
            yield name, kind, shape, nbytes


def _bits(nbytes: int, shape) -> float | None:
    """Bits of each element; None where there is none."""
    return 8 * nbytes / elements if (elements := math.prod(shape)) else None


def _written(bits: float | None) -> str:
    return "–" if bits is None else f"{bits:.3f}"
