"""The book's figure style, its tables, and the few figures that more than one page needs."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from torch import Tensor

# Okabe and Ito's palette: eight colours that people with a colour vision deficiency can tell apart.
BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, VERMILION, PURPLE = (
    "#000000", "#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7",
)  # fmt: skip

# The same colours for text, darker: at least 4.5 to 1 against white, as WCAG 2.2 asks (1.4.3).
INK = {
    BLACK: BLACK, ORANGE: "#8a5f00", SKY: "#1c6d9e", GREEN: "#00714f", YELLOW: "#6f6800", BLUE: "#00649c",
    VERMILION: "#a84a00", PURPLE: "#9c4a7c",
}  # fmt: skip

# One look for each format on every page: never colour alone.
LOOK = {
    "nf4": {"color": BLUE, "marker": "o", "linestyle": "-"},
    "uniform": {"color": VERMILION, "marker": "s", "linestyle": "--"},
    "int4": {"color": ORANGE, "marker": "^", "linestyle": "-."},
    "fp4": {"color": GREEN, "marker": "D", "linestyle": ":"},
    "lloyd-max": {"color": BLACK, "marker": "*", "linestyle": (0, (1, 1))},
    "naive-quantile": {"color": PURPLE, "marker": "v", "linestyle": (0, (5, 1, 1, 1, 1, 1))},
}


def use_style() -> None:
    """Set matplotlib to the book's figures: constrained layout, open axes, sharp on a dense screen.

    4.8 x 2.8 inches, 528 pixels wide: in the 328 of a phone's column, text of 10.5 points is 10 pixels high.
    """
    plt.rcParams.update(
        {
            "figure.figsize": (4.8, 2.8),
            "figure.dpi": 110,
            "figure.constrained_layout.use": True,
            "figure.facecolor": "white",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.prop_cycle": plt.cycler(color=[BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, BLACK]),
            "font.size": 10.5,
            "legend.frameon": False,
            "lines.markersize": 5,
        }
    )
    try:
        from matplotlib_inline.backend_inline import set_matplotlib_formats
    except ModuleNotFoundError:  # not in a notebook
        return
    set_matplotlib_formats("retina")


@dataclass(frozen=True)
class Table:
    """Rows of text under headings: HTML in a notebook, aligned columns in a terminal."""

    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    right: tuple[bool, ...]  # which columns hold numbers

    def _repr_html_(self) -> str:
        head = self._cells('th scope="col"', self.heads)
        body = "".join(f"<tr>{self._cells('td', row)}</tr>" for row in self.rows)
        return f'<table class="table"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'

    def _cells(self, tag: str, row: tuple[str, ...]) -> str:
        sides = ("right" if right else "left" for right in self.right)
        cells = zip(sides, map(escape, row), strict=True)
        tags = ((tag if text else "td", side, text) for side, text in cells)  # a heading without words is none
        return "".join(f'<{tag} style="text-align: {side}">{text}</{tag[:2]}>' for tag, side, text in tags)

    def __repr__(self) -> str:
        lines = (self.heads, *self.rows)
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        cells = (
            [text.rjust(w) if right else text.ljust(w) for text, w, right in zip(line, widths, self.right, strict=True)]
            for line in lines
        )
        return "\n".join("  ".join(row).rstrip() for row in cells)


def table(heads: Sequence[str], rows: Iterable[Sequence], formats: Sequence[str] | None = None) -> Table:
    """A table for a page, the last expression of its cell: a heading for each column, then rows of values.

    formats: one format specification a column, such as ".2f" or ",d"; "" shows a value as `str` does. A column of
    numbers is set to the right. Raises ValueError where a row, or the formats, are not as long as the headings.

    >>> table(("bits", "dB"), [(3, 14.789), (4, 20.1)], ("d", ".2f"))
    bits     dB
       3  14.79
       4  20.10
    """
    rows, formats = [tuple(row) for row in rows], formats or [""] * len(heads)
    for row in (formats, *rows):
        if len(row) != len(heads):
            raise ValueError(f"{len(heads)} headings, but {len(row)} values in {row!r}")
    right = (all(not isinstance(row[i], str) for row in rows) for i in range(len(heads)))
    text = (tuple(f"{value:{spec}}" for value, spec in zip(row, formats, strict=True)) for row in rows)
    return Table(tuple(map(str, heads)), tuple(text), tuple(right))


def level_ticks(ax: Axes, levels: Tensor, height: float, name: str, **look) -> None:
    """Draw levels as a row of marks at `height`, with their name to the left: one row a codebook."""
    look = {key: value for key, value in (LOOK.get(name, {}) | look).items() if key != "linestyle"}
    ax.plot(levels, [height] * len(levels), linestyle="none", **look)
    ax.annotate(name, (0, height), xycoords=("axes fraction", "data"), xytext=(-6, 0), textcoords="offset points",
                ha="right", va="center")  # fmt: skip


def standings(ax: Axes, table: dict[str, dict[float, float]]) -> None:
    """Draw a league: name -> bits -> decibels, a row for each name from the bottom up, a marker for up to 5 budgets."""
    budgets = sorted({bits for row in table.values() for bits in row})
    ax.hlines(range(len(table)), *zip(*((min(row.values()), max(row.values())) for row in table.values()), strict=True),
              color="#bbbbbb", linewidth=0.8, zorder=0)  # fmt: skip
    colors = (VERMILION, BLACK, BLUE, GREEN, PURPLE)
    fills = ("full", "full", "full", "none", "full")
    for bits, color, marker, fill in zip(budgets, colors, "v|oDs", fills, strict=False):
        at = [(row[bits], height) for height, row in enumerate(table.values()) if bits in row]
        look = {"marker": marker, "color": color, "fillstyle": fill, "markersize": 8 if marker == "|" else 5}
        look["zorder"] = 3 if marker in "|D" else 2  # what one can see through lies on top
        ax.plot(*zip(*at, strict=True), linestyle="none", label=f"{bits:g}", **look)
    ax.set(yticks=range(len(table)), yticklabels=list(table), xlabel="signal-to-quantization-noise ratio (dB)",
           ylim=(-0.6, len(table) - 0.4))  # fmt: skip
    ax.tick_params(axis="y", length=0, labelsize=9)
    ax.legend(title="bits per weight", ncols=len(budgets), loc="lower center", bbox_to_anchor=(0.5, 1),
              handlelength=1, handletextpad=0.3, columnspacing=0.9)  # fmt: skip
