"""What the pages say of the long measurement of chapters 13 to 15 is what the record has."""

import itertools
import json
import math
import re
import statistics
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import beyond
import outputs
from provenance import keep, provenance

import nf4lab
from nf4lab import league, models
from nf4lab.beyond.learning import learn_rows

ROOT = Path(__file__).resolve().parents[1]
RECORD = models.record("beyond")
PAGE = (ROOT / "book" / "which-one-today.md").read_text()


FOUND = {model: league.methods(model) for model in league.JUDGED}


@pytest.mark.parametrize("model", league.JUDGED)
def test_the_pages_table_is_that_of_the_league(model):
    assert "\n".join(beyond.table(RECORD, model)) in PAGE


WEIGHTS = {"encoder": models.minilm_matrices, "language model": lambda: models.manuals_model()[0].state_dict()}


@pytest.mark.parametrize("model", league.JUDGED)
def test_the_league_has_every_method_and_counts_all_that_it_stores(model):
    assert list(FOUND[model]) == list(beyond.METHODS)
    weights = {name.removesuffix(".weight"): weight for name, weight in WEIGHTS[model]().items()}
    shapes = [tuple(weights[name].shape) for name in RECORD[model]["shapes"]]
    assert [list(shape) for shape in shapes] == list(RECORD[model]["shapes"].values())

    def bits(of):
        """Per weight, of what `of` stores of a matrix of each shape."""
        stored = {shape: of(torch.ones(shape)) * math.prod(shape) for shape in set(shapes)}
        return sum(stored[shape] for shape in shapes) / sum(map(math.prod, shapes))

    plain = bits(lambda w: nf4lab.quantize(w, block_size=beyond.BLOCK).bits_per_weight)
    expected = {
        "nearest": plain, "searched": plain, "corrected": plain,
        "rotated": plain + bits(lambda w: 1 / len(w)), "scaled": plain + bits(lambda w: 32 / len(w)),
        "learned, a table a layer": plain + bits(lambda w: 32 * 16 / w.numel()),
        "learned, a table a row": bits(lambda w: learn_rows(w, beyond.BLOCK).bits_per_weight),
    }  # fmt: skip
    for name, method in FOUND[model].items():
        key = name if name in expected else name.split(",")[0]
        assert method.bits == pytest.approx(expected[key], rel=1e-12)


def test_the_league_knows_the_sets_of_sentences_and_no_third_model():
    assert tuple(outputs.WORLDS) == league.WORLDS
    with pytest.raises(ValueError, match=r"model must be one of \['encoder', 'language model'\]; got 'decoder'"):
        league.methods("decoder")


def damage(model, column, method):
    return FOUND[model][method].judged[column]


def noise(*damages):
    return max(max(ways) - min(ways) for ways in damages)


def ahead(one, other):
    """Whether by more than noise, as the page counts it: the least distance against what two ways differ by."""
    return min(other) - max(one) > noise(one, other)


def pairs():
    """Methods with NF4's levels and the same with BOF4-S's."""
    return [(name.removesuffix(", bof4-s"), name) for name in beyond.METHODS if name.endswith("bof4-s")]


TURNED = {"nearest": "rotated", "nearest, bof4-s": "rotated, bof4-s", "searched": "rotated, searched"}


def test_every_part_of_a_record_keeps_the_commit_that_it_was_measured_at(tmp_path, monkeypatch):
    path = tmp_path / "record.json"
    for part, commit in (("one", "first"), ("two", "second")):
        monkeypatch.setenv("NF4LAB_COMMIT", commit)
        keep(path, part, {"found": part}, provenance("benchmarks/beyond.py", ["torch"]))
    record = json.loads(path.read_text())
    assert {part: (of["found"], of["provenance"]["commit"]) for part, of in record.items()} == {
        "one": ("one", "first"), "two": ("two", "second")}  # fmt: skip


def test_correcting_helps_the_encoder_on_manuals_only():
    near, fixed = (damage("encoder", "manuals", method) for method in ("nearest", "corrected"))
    assert 0.6 * min(near) < min(fixed) and max(fixed) < 0.7 * min(near)
    near, fixed = (damage("encoder", "everyday", method) for method in ("nearest", "corrected"))
    assert max(near) > min(fixed) and max(fixed) > min(near)  # the pairs overlap


@pytest.mark.parametrize("column", ["manuals", "everyday"])
def test_rotating_harms_the_encoder_and_rotating_and_correcting_is_ahead_of_correcting(column):
    of = {name: damage("encoder", column, name) for name in ("nearest", "rotated", "corrected", "rotated, corrected")}
    assert min(of["rotated"]) > max(of["nearest"])
    assert ahead(of["rotated, corrected"], of["corrected"])
    fixed = damage("encoder", column, "corrected, bof4-s")
    assert ahead(damage("encoder", column, "rotated, corrected, bof4-s"), fixed)


def test_what_the_page_says_of_the_language_model():
    def of(method, column="manuals"):
        return damage("language model", column, method)

    moved = {
        (name, column): sign
        for name, turned in TURNED.items()
        for column in ("manuals", "Flask")
        for sign, ways in ((-1, (of(name, column), of(turned, column))), (1, (of(turned, column), of(name, column))))
        if ahead(*ways)
    }
    assert moved == {("nearest, bof4-s", "manuals"): -1, ("searched", "Flask"): 1}
    for signed in ("", ", bof4-s"):
        fixed, both = f"corrected{signed}", f"rotated, corrected{signed}"
        assert ahead(of(both), of(fixed)) and not ahead(of(both, "Flask"), of(fixed, "Flask"))
    assert all(ahead(of("learned, a table a row", on), of("searched", on)) for on in ("manuals", "Flask"))
    assert all(ahead(of("corrected", on), of("learned, a table a row", on)) for on in ("manuals", "Flask"))
    tables, plain = (FOUND["language model"][name].bits for name in ("learned, a table a row", "nearest"))
    assert round(tables - plain, 1) == 0.8 and "for 0.8 of a bit: rows here are short" in PAGE
    for column in ("manuals", "Flask"):
        for nf4, bof4s in pairs():
            assert max(of(bof4s, column)) < min(of(nf4, column))
    gains = [1 - sum(of("searched", column)) / sum(of("nearest", column)) for column in ("manuals", "Flask")]
    assert [round(gain, 2) for gain in gains] == [0.13, 0.15]


def test_perplexity_is_the_bluntest_judge():
    rows = {
        (model, column): [damage(model, column, method) for method in beyond.METHODS]
        for model, columns in league.JUDGED.items()
        for column in columns
    }
    means = {column: [statistics.fmean(ways) for ways in of] for column, of in rows.items()}
    blunt = {column: statistics.fmean(map(noise, of)) / statistics.pstdev(means[column]) for column, of in rows.items()}
    judge = "language model", "perplexity"
    assert len(rows) == 5 and max(blunt, key=blunt.get) == judge
    most = noise(*rows[judge])
    further = [abs(a - b) > most for a, b in itertools.combinations(means[judge], 2)]
    assert 1.0 < most < 1.15 and (sum(further), len(further)) == (8, 78)


def test_how_often_a_rotation_alone_and_the_signed_levels_are_told_from_noise_on_the_encoder():
    worse, better = [], []
    for column in league.JUDGED["encoder"]:
        of = {name: damage("encoder", column, name) for name in beyond.METHODS}
        turned = [(of[name], of[rotated]) for name, rotated in TURNED.items()]
        assert len(turned) == 3 and all(min(b) > max(a) for a, b in turned)
        worse.append(sum(ahead(a, b) for a, b in turned))
        better.append(sum(ahead(of[signed], of[nf4]) for nf4, signed in pairs()))
    assert sum(worse) == 3 and better == [1, 2]


def test_what_keeps_up_with_rotated_and_corrected_on_one_kind_of_text_falls_behind_on_the_other():
    last = "rotated, corrected, bof4-s"
    kept = [
        {
            name
            for name in beyond.METHODS
            if name != last and not ahead(damage("encoder", column, last), damage("encoder", column, name))
        }
        for column in league.JUDGED["encoder"]
    ]
    assert kept[0] and kept[1] and not kept[0] & kept[1]
    everyday = [damage("encoder", "everyday", name) for name in ("searched", "nearest")]
    assert ahead(*everyday)


def test_bof4_s_has_the_smaller_error_of_weights_in_every_pair():
    for model in league.JUDGED:
        for nf4, bof4s in pairs():
            of = [RECORD[model]["methods"][method]["weights"] for method in (nf4, bof4s)]
            assert max(of[1]) < min(of[0])


@pytest.mark.parametrize("model", league.JUDGED)
def test_rotating_alone_lowers_the_error_of_all_weights_together_by_less_than_a_tenth(model):
    for name, turned in TURNED.items():
        of = [RECORD[model]["methods"][method]["weights"] for method in (name, turned)]
        assert all(0.9 < b / a < 1 for a, b in zip(*of, strict=True))


def test_correcting_improves_the_outputs_of_all_layers_but_one():
    for model, spared in (("encoder", 1), ("language model", 0)):
        methods = RECORD[model]["methods"]
        for way, nearest in zip(methods["corrected"]["layers"], methods["nearest"]["layers"], strict=True):
            assert sum(a > b for a, b in zip(way, nearest, strict=True)) == spared


ON_A_GPU = json.loads((ROOT / "benchmarks" / "results" / "nvidia-h200-beyond.json").read_text())


def test_what_the_page_says_of_one_large_layer_is_in_the_record_of_a_gpu():
    of = {(r["by"], r["what"]): r for r in ON_A_GPU["feedback"]["records"] if r["operation"] == "feedback"}
    (both,) = [r for r in ON_A_GPU["feedback"]["records"] if r["operation"] == "feedback, both"]
    here, there = of["cpu", "layer"], of["cuda", "layer"]["median"]
    assert both["codes that differ"] == 0
    took = f"correcting takes {there:.3f} s on an H200 and {here['median']:.1f} s on {here['threads']} cores beside it"
    assert took in PAGE and there < 1 and here["median"] < 10
    megabytes = [8 * width**2 / 1e6 for width in (4096, 14336)]  # float64
    assert f"{megabytes[0]:.0f} MB for 4,096 inputs, {megabytes[1] / 1000:.1f} GB for 14,336" in PAGE


def test_every_part_of_the_records_says_where_it_comes_from():
    assert list(ON_A_GPU) == list(beyond.PARTS["cuda"]) and set(beyond.PARTS["cpu"]) < set(RECORD)
    parts = [*ON_A_GPU.values(), *(RECORD[part] for part in beyond.PARTS["cpu"] if part != "seconds")]
    assert all(re.fullmatch("[0-9a-f]{40}", part["provenance"]["commit"]) for part in parts)
    assert {part["provenance"]["device"] for part in ON_A_GPU.values()} == {"NVIDIA H200"}
    assert re.fullmatch("[0-9a-f]{40}", RECORD["commit"])  # of "seconds": of a program that kept one for all parts


def test_every_method_makes_a_large_layer_in_ten_seconds_of_two_cores_and_one_of_a_gpu():
    for record, most in ((RECORD, 10), (ON_A_GPU, 1)):
        cost = record["each method"]
        assert list(cost["methods"]) == list(beyond.METHODS)
        assert all(max(method["seconds"]) < most for method in cost["methods"].values())
    assert RECORD["each method"]["threads"] == 2 and RECORD["each method"]["provenance"]["device"].endswith(" 2 cores")
    rows = [
        f"| {name} | {statistics.median(here['seconds']):.2f} | {1000 * statistics.median(there['seconds']):.3g} | "
        f"{here['bytes'] / 1e6:.0f} | {there['bytes'] / 1e6:.0f} |"
        for (name, here), there in zip(
            RECORD["each method"]["methods"].items(), ON_A_GPU["each method"]["methods"].values(), strict=True)
    ]  # fmt: skip
    assert "\n".join(rows) in PAGE


def test_the_memory_of_a_row_without_a_rotation_has_two_copies_that_only_the_measurement_makes():
    n = 4096**2
    held = 4 * n + n // 2 + 4 * n // 64  # values read back, codes and constants
    assert ON_A_GPU["each method"]["methods"]["nearest"]["bytes"] == held + 2 * 4 * n  # weights and moments moved on
    assert ON_A_GPU["each method"]["methods"]["rotated"]["bytes"] == held + 4 * n  # weights rotated


def test_two_kernels_for_nf4_differ_by_more_than_a_factor_of_four_at_4_rows():
    records = json.loads((ROOT / "benchmarks" / "results" / "nvidia-h200.json").read_text())["records"]
    at_four = [r for r in records if r["operation"] == "gemv" and (r["rows"], r["shape"]) == (4, "14336x4096")]
    ours, theirs = ([r["median_us"] for r in at_four if r["by"] == by] for by in ("nf4lab", "bitsandbytes"))
    assert 4 < min(theirs) / max(ours) < 5 and "differ by more than a factor of four" in PAGE


def test_what_the_page_says_of_starts_is_in_their_record():
    record = models.record("starts")
    left = record["error"]
    taken = [1 - left[f"nf4, {start}"] / left["nf4, zero"] for start in ("loftq", "pissa")]
    assert [f"{share:.0%}" for share in taken] == ["21%", "17%"]
    assert "LoftQ takes 21% of the weights' error off and PiSSA 17%" in PAGE
    path = {(base, start): [[words for _, words in run] for run in runs]
            for base, by_start in record["runs"].items() for start, runs in by_start.items()}  # fmt: skip

    def gaps(base, one, other, point=-1):
        return [a[point] - b[point] for a, b in zip(path[base, one], path[base, other], strict=True)]

    behind, ahead = gaps("nf4", "loftq", "zero"), gaps("nf4", "zero", "pissa")
    early = gaps("nf4", "zero", "pissa", 8 // record["every"])
    assert f"behind zero's by {min(behind):.3f} to {max(behind):.3f} nats" in PAGE
    assert f"PiSSA's ahead by {min(ahead):.3f} to {max(ahead):.3f}, all at one" in PAGE
    assert f"after eight steps it was ahead by {min(early):.3f} to {max(early):.3f}." in PAGE
    assert min(gaps("2 bits", "zero", "loftq")) > 0.55 and "ahead of zero by 0.55 nats or more" in PAGE
    assert min(gaps("2 bits", "pissa", "loftq")) > 0.12 and "of PiSSA by 0.12 or more" in PAGE
    runs = [run for by_start in record["runs"].values() for of in by_start.values() for run in of]
    assert len(runs) == 18 and all(len(run) == 1 + 32 / record["every"] for run in runs)
