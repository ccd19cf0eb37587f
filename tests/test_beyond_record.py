"""What the pages say of the long measurement of chapters 13 to 15 is what the record has."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import beyond

from nf4lab import models

ROOT = Path(__file__).resolve().parents[1]
RECORD = models.record("beyond")
PAGE = (ROOT / "book" / "which-one-today.md").read_text()


@pytest.mark.parametrize("model", beyond.JUDGED)
def test_the_pages_table_is_that_of_the_record(model):
    assert "\n".join(beyond.table(RECORD, model)) in PAGE


def damage(model, column, method):
    return [beyond.JUDGED[model][column](way) for way in RECORD[model]["methods"][method]["damage"]]


def pairs():
    """Methods with NF4's levels and the same with BOF4-S's."""
    return [(name.removesuffix(", bof4-s"), name) for name in beyond.METHODS if name.endswith("bof4-s")]


def test_correcting_helps_the_encoder_on_manuals_only():
    near, fixed = (damage("encoder", "manuals", method) for method in ("nearest", "corrected"))
    assert 0.6 * min(near) < min(fixed) and max(fixed) < 0.7 * min(near)
    near, fixed = (damage("encoder", "everyday", method) for method in ("nearest", "corrected"))
    assert max(near) > min(fixed) and max(fixed) > min(near)  # the pairs overlap


@pytest.mark.parametrize("column", ["manuals", "everyday"])
def test_rotating_harms_the_encoder_and_rotating_and_correcting_is_ahead_of_correcting(column):
    of = {name: damage("encoder", column, name) for name in ("nearest", "rotated", "corrected", "rotated, corrected")}
    assert min(of["rotated"]) > max(of["nearest"])
    assert max(of["rotated, corrected"]) < min(of["corrected"])


def test_what_the_page_says_of_the_language_model():
    def of(method, column="divergence, manuals"):
        return damage("language model", column, method)

    assert min(of("rotated")) < max(of("nearest")) and max(of("rotated")) > min(of("nearest"))
    assert max(of("rotated, corrected")) < min(of("corrected"))
    assert max(of("learned, a table a row")) < min(of("searched"))
    for column in ("divergence, manuals", "divergence, Flask"):
        for nf4, bof4s in pairs():
            assert max(of(bof4s, column)) < min(of(nf4, column))
    assert 0.11 < 1 - sum(of("searched")) / sum(of("nearest")) < 0.14
    spread = [max(pair) - min(pair) for pair in (of(m, "perplexity, manuals") for m in beyond.METHODS)]
    assert 0.9 < max(spread) < 1.15


def test_bof4_s_has_the_smaller_error_of_weights_in_every_pair():
    for model in beyond.JUDGED:
        for nf4, bof4s in pairs():
            of = [RECORD[model]["methods"][method]["weights"] for method in (nf4, bof4s)]
            assert max(of[1]) < min(of[0])


def test_correcting_improves_the_outputs_of_all_layers_but_one():
    for model, spared in (("encoder", 1), ("language model", 0)):
        methods = RECORD[model]["methods"]
        for way, nearest in zip(methods["corrected"]["layers"], methods["nearest"]["layers"], strict=True):
            assert sum(a > b for a, b in zip(way, nearest, strict=True)) == spared


def test_the_pages_table_of_starts_is_that_of_its_record():
    record = models.record("starts")
    names = {"nf4": "NF4", "2 bits": "four levels, 2 bits", "zero": "zero", "loftq": "LoftQ", "pissa": "PiSSA"}
    for base, starts in record["runs"].items():
        for start, runs in starts.items():
            before, left = runs[0][0][0], record["error"][f"{base}, {start}"]
            assert f"| {names[base]} | {names[start]} | {left:.4f} | {before:.3f} |" in PAGE
    assert f"the original's loss is {record['original'][0]:.3f}" in PAGE
