"""The checks of the chapters bite: a number or a rule of a page is broken a little, and the page must fail.

The unbroken pages run when the book is built. A page stops at its first failing check, so most of these take seconds.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import jupytext
import pytest

ROOT = Path(__file__).resolve().parents[1]
# chapter, what stands there, what stands there instead
BROKEN = [
    ("01", "k = torch.round(w / step)", "k = torch.floor(w / step)"),  # not the nearest level
    ("01", "step_uniform = (high - low) / 15", "step_uniform = (high - low) / 14"),  # one gap too few
    ("01", "0.5) + 0.5) * 0.5  # cells", "0.5) + 0.6) * 0.5  # cells"),  # levels off the middle of their cells
    ("02", "return (runs - mean) / std  #", "return (runs - mean) / (1.03 * std)  #"),
    ("02", "(np.arange(n) + 0.5) / n", "(np.arange(n) + 0.9) / n"),  # the Q-Q plot's probabilities
    ("03", "tail = (31 / 32 + 29 / 30) / 2", "tail = (31 / 32 + 28 / 30) / 2"),
    ("03", "norm.ppf((i + 1) / 17)", "norm.ppf((i + 1) / 16.5)"),  # the formula that the paper prints
    ("03", "levels = [-quantile(8)", "levels = [-quantile(9)[1:]"),
    ("04", "s = blocks * (1 / absmax)[:, None]", "s = blocks * (1.01 / absmax)[:, None]"),
    ("04", "return pairs[:, 0] << 4 | pairs[:, 1]", "return pairs[:, 1] << 4 | pairs[:, 0]"),
    ("05", "10.0 ** (i - 6) * middles", "10.0 ** (i - 7) * middles"),  # the dynamic map, a decade lower
    ("05", "offset = absmax.mean()  # m", "offset = absmax.median()  # m"),
    ("05", "prices(x), prices(-x)", "prices(x), prices(x)"),  # nothing turned, so no luck is seen
    ("06", "nearest((blocks - m) / a, levels)", "nearest((blocks - m) / a, 1.01 * levels)"),
    ("06", "(gap**2 / 12).mean().item(), error", "(gap**2 / 13).mean().item(), error"),
    ("07", "read, written = 1 / 2 + 4 / 64, 2", "read, written = 1 / 2 + 4 / 32, 2"),
    ("07", "ISSUED = 132 * 4 * 1.98e9", "ISSUED = 132 * 3 * 1.98e9"),  # schedulers of a multiprocessor
    ("07", "values[2 * k + 1] = levels[byte & 15] * scale", "values[2 * k + 1] = levels[byte >> 4] * scale"),
    ("08", "return grad @ w_hat, None, None, None", "return 1.0001 * grad @ w_hat, None, None, None"),
    ("08", "weight = packed.data_ptr(), absmax.data_ptr()", "weight = absmax.data_ptr(), packed.data_ptr()"),
    ("09", "(now * original).sum(dim=1).mean()", "(now * original).sum(dim=1).square().mean()"),
    ("09", "(log_p - log_q)).sum(dim=-1)\n    found[", "(log_q - log_p)).sum(dim=-1)\n    found["),  # reversed
    ("10", "return self.base(x) + thin * self.scaling", "return self.base(x) + thin"),
    ("10", "2 * n_rest / 1e6, 16 * n_train / 1e6", "2 * n_rest / 1e6, 32 * n_train / 1e6"),
    ("10", "u[:, :8] * s[:8]", "u[:, :8] * s[1:9]"),  # other singular values than the largest
    ("11", "unit = s.max() / 448", "unit = s.max() / 300"),  # the largest scale is not 448
    ("11", "at = blocks.abs().argmax", "at = blocks.argmax"),  # the largest weight, not the largest magnitude
    ("12", "f_M = B * 2 * phi(m) * G(m) ** (B - 1)", "f_M = B * 2 * phi(m) * G(m) ** B"),
    ("12", "signed = lloyd(nf4, block_means, kept=(7, 15))", "signed = lloyd(nf4, block_means, kept=(0, 7, 15))"),
    ("13", "torch.stack([a + b, a - b], dim=2)", "torch.stack([a - b, a + b], dim=2)"),  # the halves changed places
    ("14", "w -= error[:, None] / P[j, j] * P[j]", "w += error[:, None] / P[j, j] * P[j]"),  # errors are added
    ("15", "counts = (absmax**2).expand", "counts = absmax.expand"),  # what a normalised weight's error counts
    ("16", "a[g + 8, high] = of_a", "a[g + 8, low] = of_a"),  # a part of a fragment in the wrong place
    ("16", "pairs = np.array([(levels[b >> 4], levels[b & 15])", "pairs = np.array([(levels[b & 15], levels[b >> 4])"),
    ("16", "y += part * absmax[:, block]\nassert", "y += part * absmax[:, 0]\nassert"),
]  # fmt: skip


ON_GPU = {"07", "16"}  # these choose numba's simulator, which must happen before anything imports numba.cuda


def run(sources):
    """The cells of a page, one after the other, in one namespace."""
    page = {"__name__": "page"}
    for source in sources:
        exec(compile(source, "cell", "exec"), page)


def run_apart(sources):
    """The same in an interpreter of its own, as one file (a kernel's source is read from it); its error is raised."""
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "page.py"
        page.write_text("\n\n".join(sources))
        done = subprocess.run([sys.executable, page], cwd=ROOT, env=os.environ | {"MPLBACKEND": "agg"},
                              capture_output=True, text=True)  # fmt: skip
    if done.returncode:
        raise AssertionError(done.stderr) if "\nAssertionError" in done.stderr else RuntimeError(done.stderr)


@pytest.mark.parametrize(("number", "there", "instead"), BROKEN, ids=[f"{n}: {new}" for n, _, new in BROKEN])
def test_a_page_with_something_broken_fails_in_a_check(number, there, instead, monkeypatch):
    plt = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.setattr(plt, "show", lambda: plt.close("all"))
    (chapter,) = (ROOT / "book").glob(f"{number}-*.md")
    sources = [cell.source for cell in jupytext.read(chapter).cells if cell.cell_type == "code"]
    assert sum(source.count(there) for source in sources) == 1
    torch = pytest.importorskip("torch")  # chapter 9 turns gradients off, for this process
    with plt.rc_context({"backend": "agg"}), torch.enable_grad(), pytest.raises(AssertionError):
        (run_apart if number in ON_GPU else run)([source.replace(there, instead) for source in sources])
