"""`nf4lab compare FILE`: the league of 4-bit formats on one's own weights."""

import argparse
import csv
import io
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from nf4lab import league
from nf4lab.blockwise import DTYPES
from nf4lab.checkpoints.files import opened
from nf4lab.checkpoints.partial import appearing_whole
from nf4lab.checkpoints.tensorfile import Entry, TensorFile
from nf4lab.choice import matches
from nf4lab.commands.shown import console_for_tables, shown
from nf4lab.progress import progress_bar

COLUMNS = ("tensor", "weights", "format", "constants", "budget", "block_size", "double_quant",
           "bits_per_weight", "mse", "mae", "relative_mse", "sqnr_db")  # fmt: skip


def add_to(subparsers) -> None:
    """Declare the command and its arguments."""
    parser = subparsers.add_parser(
        "compare",
        help="the league of 4-bit formats on a checkpoint's matrices",
        description="Quantize every matrix of a safetensors checkpoint in every 4-bit format at equal bits, and rank "
        "them by the mean signal-to-quantization-noise ratio. Nothing is written unless --csv or --plot asks for it.",
        epilog="A PATTERN is a shell's, of names; * matches dots too. --bits and --include can be given again.",
    )
    parser.add_argument("source", metavar="FILE", help="a safetensors file; or an index of shards or its folder")
    parser.add_argument("--bits", action="append", type=float, choices=league.BUDGETS, help="bits per weight to "
                        "compare at, constants counted; by default all of these")  # fmt: skip
    parser.add_argument("--include", action="append", metavar="PATTERN", help="names to compare; by default all")
    parser.add_argument("--most", type=int, metavar="N", help="of a matrix with more weights than N, take evenly "
                        "spaced rows with about N; by default all")  # fmt: skip
    parser.add_argument("--csv", type=Path, metavar="OUT", help="write one line for each matrix and entry")
    parser.add_argument("--plot", type=Path, metavar="OUT", help="draw the table: .png, .svg or .pdf")
    parser.add_argument("--json", action="store_true", help="print a JSON object instead of a table")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Play the league, print the table, write what was asked for."""
    _check_outputs(options)
    lineup = league.entries(dict.fromkeys(options.bits or league.BUDGETS))
    with opened(options.source) as files:
        chosen, zeros = _chosen(options.source, files, options.include or ["*"]), []
        work = _work(chosen, options.most, len(lineup))
        with progress_bar("compare", work, "w", not options.quiet) as bar:
            scores = league.play(_matrices(chosen, options.most, zeros, bar), lineup, bar.update)
    if not scores:
        raise ValueError(f"{options.source}: every matrix that was compared is all zeros")
    if options.csv:
        _write_csv(options.csv, scores)
        options.done.append(str(options.csv))
    if options.plot:
        _draw(options.plot, league.standings(scores))
        options.done.append(str(options.plot))
    (_print_json if options.json else _print)(league.standings(scores), scores, zeros)
    return 0


def _check_outputs(options: argparse.Namespace) -> None:
    """Raise before the work, not after it, where an output cannot be written."""
    if options.most is not None and options.most < league.LEAST_WEIGHTS:
        raise ValueError(f"--most must be at least {league.LEAST_WEIGHTS}; got {options.most}")
    if options.plot and options.plot.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--plot draws .png, .svg or .pdf; got {options.plot.name!r}")
    if options.csv and options.csv == options.plot:
        raise ValueError(f"--csv and --plot both name {options.csv}; nothing was compared")
    for path in filter(None, (options.csv, options.plot)):
        if os.path.lexists(path):  # a link that leads nowhere too
            raise FileExistsError(f"{path} exists already; nothing was compared")
        if not path.parent.is_dir():
            raise FileNotFoundError(f"{path.parent} is not a folder to write {path.name} to; nothing was compared")


def _chosen(source: str, files: list[TensorFile], include: list[str]) -> dict[str, TensorFile]:
    """The matrices to compare, each with its file. Raises ValueError for a pattern that matches none."""
    matrices = {name: file for file in files for name, entry in file.entries.items() if _is_matrix(entry)}
    for pattern in include:
        if not any(matches(name, pattern) for name in matrices):
            raise ValueError(
                f"{source} has no floating-point matrix of {league.LEAST_WEIGHTS:,} weights or more "
                f"that matches {pattern}: nothing to compare"
            )
    return {name: file for name, file in matrices.items() if matches(name, include)}


def _is_matrix(entry: Entry) -> bool:
    return len(entry.shape) >= 2 and entry.dtype in DTYPES and math.prod(entry.shape) >= league.LEAST_WEIGHTS


def _matrices(chosen: dict[str, TensorFile], most: int | None, zeros: list[str], bar) -> Iterator[tuple[str, Tensor]]:
    """Each matrix that is not all zeros, thinned to about `most` weights; the names of the others go to `zeros`."""
    for name, file in chosen.items():
        matrix = _thinned(file.read(name), most)
        bar.set_postfix_str(shown(name), refresh=False)
        if matrix.any():
            yield name, matrix
        else:
            zeros.append(name)


def _thinned(matrix: Tensor, most: int | None) -> Tensor:
    """Every k-th row, for the least k that leaves at most `most` weights, or for the largest that leaves enough."""
    step = 1 if most is None else math.ceil(matrix.numel() / most)
    rows = matrix.reshape(-1, matrix.shape[-1])
    return rows[:: min(step, max(1, matrix.numel() // league.LEAST_WEIGHTS))]


def _work(chosen: dict[str, TensorFile], most: int | None, n_entries: int) -> int:
    """Weights to quantize, once for every entry."""
    return n_entries * sum(_thinned_numel(file.entries[name].shape, most) for name, file in chosen.items())


def _thinned_numel(shape: tuple[int, ...], most: int | None) -> int:
    import torch

    return _thinned(torch.empty(shape, device="meta"), most).numel()


def _print(table: dict, scores: list[league.Score], zeros: list[str]) -> None:
    """The standings: a line for each format and way to store constants, a column for each budget."""
    from rich.table import Table

    best = league.best_at(table)
    standings = Table("format", "constants", header_style="bold", box=None, pad_edge=False)
    for column in (*(f"{budget:g} bits" for budget in best), "won"):
        standings.add_column(column, justify="right")
    for (name, storage), row in table.items():
        cells = [_cell(row[budget][0], best[budget]) if budget in row else "–" for budget in best]
        standings.add_row(name, storage, *cells, str(sum(wins for _, wins in row.values())))
    weights = {score.tensor: score.numel for score in scores}
    console = console_for_tables(markup=True)
    console.print(standings)
    console.print(
        f"SQNR in dB, the mean over {len(weights)} matrices with {sum(weights.values()):,} weights. * is the best at "
        "its budget.\nwon: how often the least squared error was this one's, over matrices and budgets. "
        "6.02 dB are a factor of 4 in it.",
        soft_wrap=True,
    )
    if zeros:
        console.print(shown(f"left out, all zeros: {', '.join(zeros)}"), markup=False, soft_wrap=True)


def _print_json(table: dict, scores: list[league.Score], zeros: list[str]) -> None:
    """The standings as JSON: for each format and way to store constants the decibels and wins by budget.

    Infinitely many decibels, of no error at all, are null: JSON has no infinity.
    """
    rows = [
        {
            "format": name,
            "constants": storage,
            "budgets": {
                str(budget): {"sqnr_db": mean if math.isfinite(mean) else None, "won": wins}
                for budget, (mean, wins) in row.items()
            },
        }
        for (name, storage), row in table.items()
    ]
    weights = {score.tensor: score.numel for score in scores}
    print(json.dumps({"standings": rows, "weights": weights, "all_zeros": zeros}, indent=1))


def _cell(decibels: float, best: float) -> str:
    return f"[bold]*{decibels:.2f}[/bold]" if decibels == best else f"{decibels:.2f}"


def _write_csv(path: Path, scores: list[league.Score]) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    for s in scores:
        e = s.entry
        writer.writerow([s.tensor, s.numel, e.name, e.storage, e.budget, e.block_size, e.double_quant,
                         s.bits, s.mse, s.mae, s.mse / s.power, s.sqnr_db])  # fmt: skip
    with appearing_whole(path, new=True) as file:
        file.write(text.getvalue().encode())


def _draw(path: Path, table: dict) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from nf4lab import plots

    plots.use_style()
    rows = {", ".join(key): {b: mean for b, (mean, _) in row.items()} for key, row in reversed(table.items())}
    fig, ax = plt.subplots(figsize=(6.5, 1.2 + 0.22 * len(rows)))
    plots.standings(ax, rows)
    with appearing_whole(path, new=True) as file:
        fig.savefig(file, format=path.suffix[1:], dpi=200)
    plt.close(fig)
