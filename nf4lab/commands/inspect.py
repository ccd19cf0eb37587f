"""`python -m nf4lab inspect FILE`: what a checkpoint holds, tensor by tensor, without reading the tensors."""

import argparse
import math

from nf4lab.checkpoints.files import opened, stored_tensors
from nf4lab.checkpoints.keys import STATES, describe
from nf4lab.checkpoints.tensorfile import TensorFile

COLUMNS = ("tensor", "stored as", "shape", "bits", "bytes")


def add_to(subparsers) -> None:
    """Declare the command and its arguments."""
    parser = subparsers.add_parser("inspect", help="list what a checkpoint holds", description=__doc__)
    parser.add_argument("source", metavar="FILE", help="a safetensors file; or an index of shards or its folder")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the table, and the totals."""
    from rich.console import Console
    from rich.table import Table

    with opened(options.source) as files:
        rows = list(rows_of(files))
    table = Table(*COLUMNS, header_style="bold", box=None, pad_edge=False)
    for column in table.columns[3:]:
        column.justify = "right"
    for name, kind, shape, nbytes in rows:
        table.add_row(name, kind, " x ".join(map(str, shape)), f"{_bits(nbytes, shape):.3f}", f"{nbytes:,}")
    elements, nbytes = (sum(values) for values in zip(*((math.prod(r[2]), r[3]) for r in rows), strict=True))
    table.add_section()
    table.add_row(f"{len(rows)} tensors", "", f"{elements:,}", f"{_bits(nbytes, [elements]):.3f}", f"{nbytes:,}")
    # A terminal's width is kept; a pipe gets lines as long as they are.
    console = Console(markup=False, highlight=False)
    console = console if console.is_terminal else Console(markup=False, highlight=False, width=10_000)
    console.print(table)
    return 0


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


def _bits(nbytes: int, shape) -> float:
    return 8 * nbytes / elements if (elements := math.prod(shape)) else math.nan
