"""The book's figures and tables: colours that can be read, columns that line up."""

import matplotlib.pyplot as plt
import pytest

from nf4lab import plots


def contrast_with_white(color):
    """WCAG's contrast ratio of #rrggbb on white: relative luminance, section 1.4.3."""
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 1.05 / (0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] + 0.05)


def test_the_contrast_of_black_and_of_grey_is_what_wcag_says():
    assert contrast_with_white("#000000") == pytest.approx(21)
    assert contrast_with_white("#767676") == pytest.approx(4.54, abs=0.005)


def test_every_colour_of_a_format_has_an_ink_that_reads_on_white():
    assert {look["color"] for look in plots.LOOK.values()} <= set(plots.INK)
    assert min(map(contrast_with_white, plots.INK.values())) >= 4.5


def test_no_two_formats_share_a_look():
    looks = [(look["color"], look["marker"]) for look in plots.LOOK.values()]
    assert len({color for color, _ in looks}) == len({marker for _, marker in looks}) == len(looks)


def test_a_figure_is_528_pixels_wide_and_its_text_10_high_on_a_phone():
    with plt.rc_context():
        plots.use_style()
        width = plt.rcParams["figure.figsize"][0] * plt.rcParams["figure.dpi"]
        text = plt.rcParams["font.size"] / 72 * plt.rcParams["figure.dpi"]
    assert width == pytest.approx(528)
    assert round(text * 328 / width) == 10


def test_a_table_is_html_in_a_notebook_and_columns_in_a_terminal():
    found = plots.table(("format", "MSE"), [("nf4", 0.00846), ("a < b", 12)], ("", ".4f"))
    assert repr(found) == "format      MSE\nnf4      0.0085\na < b   12.0000"
    assert "<th" in plots.table((0, 4), [(1, 2)])._repr_html_()  # a heading may be a number
    html = found._repr_html_()
    assert html.count("<tr>") == 3 and "a &lt; b" in html
    assert '<th scope="col" style="text-align: right">MSE' in html and '<td style="text-align: left">nf4' in html


def test_a_row_of_another_length_is_refused_with_both_numbers():
    with pytest.raises(ValueError, match=r"2 headings, but 3 values in \(1, 2, 3\)"):
        plots.table(("a", "b"), [(1, 2, 3)])
    with pytest.raises(ValueError, match="2 headings, but 1 values"):
        plots.table(("a", "b"), [], ("d",))
