"""The book's figure style, and the few figures that more than one page needs."""

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from torch import Tensor

# Okabe and Ito's palette: eight colours that people with a colour vision deficiency can tell apart.
BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, VERMILION, PURPLE = (
    "#000000", "#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7",
)  # fmt: skip

# One look for each format on every page: never colour alone.
LOOK = {
    "nf4": {"color": BLUE, "marker": "o", "linestyle": "-"},
    "uniform": {"color": VERMILION, "marker": "s", "linestyle": "--"},
    "int4": {"color": ORANGE, "marker": "^", "linestyle": "-."},
    "fp4": {"color": GREEN, "marker": "D", "linestyle": ":"},
    "naive-quantile": {"color": PURPLE, "marker": "v", "linestyle": (0, (5, 1, 1, 1, 1, 1))},
}


def use_style() -> None:
    """Set matplotlib to the book's figures: 6 x 3 inches, constrained layout, open axes, sharp on a dense screen."""
    plt.rcParams.update(
        {
            "figure.figsize": (6, 3),
            "figure.dpi": 120,
            "figure.constrained_layout.use": True,
            "figure.facecolor": "white",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.prop_cycle": plt.cycler(color=[BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, BLACK]),
            "font.size": 10,
            "legend.frameon": False,
            "lines.markersize": 5,
        }
    )
    try:
        from matplotlib_inline.backend_inline import set_matplotlib_formats
    except ModuleNotFoundError:  # not in a notebook
        return
    set_matplotlib_formats("retina")


def level_ticks(ax: Axes, levels: Tensor, height: float, name: str, **look) -> None:
    """Draw levels as a row of marks at `height`, with their name to the left: one row a codebook."""
    look = {key: value for key, value in (LOOK.get(name, {}) | look).items() if key != "linestyle"}
    ax.plot(levels, [height] * len(levels), linestyle="none", **look)
    ax.annotate(name, (0, height), xycoords=("axes fraction", "data"), xytext=(-6, 0), textcoords="offset points",
                ha="right", va="center")  # fmt: skip


def standings(ax: Axes, table: dict[str, dict[float, float]]) -> None:
    """Draw a league: name -> bits -> decibels, a row for each name from the bottom up, a marker for each budget."""
    budgets = sorted({bits for row in table.values() for bits in row})
    ax.hlines(range(len(table)), *zip(*((min(row.values()), max(row.values())) for row in table.values()), strict=True),
              color="#bbbbbb", linewidth=0.8, zorder=0)  # fmt: skip
    colors = (VERMILION, PURPLE, BLUE, GREEN, BLACK)
    for bits, color, marker, size in zip(budgets, colors, "v<o^s", (5, 3.5, 5, 7, 5), strict=False):
        at = [(row[bits], height) for height, row in enumerate(table.values()) if bits in row]
        look = {"marker": marker, "color": color, "markersize": size, "zorder": 9 - size}  # none hides another
        ax.plot(*zip(*at, strict=True), linestyle="none", label=f"{bits:g} bits", **look)
    ax.set(yticks=range(len(table)), yticklabels=list(table), xlabel="signal-to-quantization-noise ratio (dB)",
           ylim=(-0.6, len(table) - 0.4))  # fmt: skip
    ax.tick_params(axis="y", length=0)
    ax.legend(ncols=len(budgets), loc="lower center", bbox_to_anchor=(0.5, 1), handletextpad=0, columnspacing=0.8)
