"""The league: equal bits, scores by the metrics, and the command that plays it on somebody's file."""

import csv
import math
from dataclasses import replace

import pytest
import safetensors.torch
import torch

import nf4lab
from nf4lab import codebooks, league
from nf4lab.__main__ import main


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("budget", league.BUDGETS)
def test_every_entry_spends_its_budget(budget):
    x = normal(2**16)
    for one in league.entries([budget]):
        bits = one.quantize(x).bits_per_weight
        if budget == 4.0:
            assert 4 < bits <= 4 + 2 * 32 / 4096  # two float32 in the largest blocks
        else:
            # one float32 per tensor, and of double quantization the offset and a float32 for 256 constants
            assert bits == pytest.approx(budget, abs=0.0025)


def test_entries_at_their_standards_budget_are_the_standards():
    x = normal(4096)
    for name, storage, budget in (
        ("mxfp4", league.POWER, 4.25), ("nvfp4", league.SHORT, 4.5), ("q4_0", league.FLOAT16, 4.5),
        ("iq4_nl", league.FLOAT16, 4.5), ("nf4", league.FLOAT32, 4.5),
    ):  # fmt: skip
        ours, standard = league.entry(name, storage, budget).quantize(x), nf4lab.quantize(x, name)
        assert torch.equal(ours.packed, standard.packed)
        assert torch.equal(ours.scale, standard.scale)
        assert ours.bits_per_weight == standard.bits_per_weight
    qlora = league.entry("nf4", league.FLOAT32, 4.127).quantize(x)
    assert torch.equal(qlora.dequantize(), nf4lab.quantize(x, double_quant=True).dequantize())


def test_every_four_bit_format_plays():
    playing = {one.name for one in league.entries()}
    assert playing == {name for name, format in nf4lab.FORMATS.items() if format.code_bits == 4}


def test_codebooks_made_for_a_block_size_are_those_of_the_entry():
    assert torch.equal(league.entry("bof4-s", league.SHORT, 4.5).format.levels, codebooks.bof4_s(16))
    assert torch.equal(league.entry("af4", league.FLOAT32, 4.25).format.levels, codebooks.af4(128))


@pytest.mark.parametrize(
    ("name", "storage", "budget"),
    [("nf5", "float32", 4.5), ("nf4", "float64", 4.5), ("nf4", "float32", 4.6), ("nvfp4", "short", 5.0)],
)
def test_an_entry_that_does_not_exist_is_refused(name, storage, budget):
    with pytest.raises(ValueError, match=f"no entry of format '{name}' with constants '{storage}' at {budget} bits"):
        league.entry(name, storage, budget)


def test_scores_are_the_metrics_of_the_package():
    x, one = normal(100, 64), league.entry("nf4", league.FLOAT32, 4.5)
    played = []
    (score,) = league.play([("x", x)], [one], played.append)
    x_hat = nf4lab.quantize(x).dequantize()
    assert (score.mse, score.mae, score.bits) == (nf4lab.mse(x, x_hat), nf4lab.mae(x, x_hat), 4.5)
    assert score.sqnr_db == pytest.approx(nf4lab.sqnr_db(x, x_hat))
    assert played == [6400]


def test_standings_average_decibels_count_wins_and_put_the_nearest_to_the_best_first():
    a, b = league.entry("int4", league.FLOAT32, 4.5), league.entry("nf4", league.FLOAT32, 4.5)

    def score(tensor, entry, mse):
        return league.Score(tensor, entry, 64, 4.5, mse, 0.1, 1.0)

    scores = [score("s", a, 0.01), score("s", b, 0.001), score("t", a, 0.1), score("t", b, 0.1)]
    table = league.standings(scores)
    assert list(table) == [("nf4", "float32"), ("int4", "float32")]
    assert table["nf4", "float32"] == {4.5: (pytest.approx(20), 1)}
    assert table["int4", "float32"] == {4.5: (pytest.approx(15), 1)}  # of equal errors the first listed wins
    assert league.best_at(table) == {4.5: pytest.approx(20)}


def test_tensors_that_cannot_play_are_named():
    lineup = league.entries([4.5])[:1]
    with pytest.raises(ValueError, match="tensor 'w' is all zeros"):
        league.play([("w", torch.zeros(64))], lineup)
    with pytest.raises(ValueError, match="tensor 'w': x must be finite in float32; 1 NaN"):
        league.play([("w", torch.tensor([1.0, math.nan]))], lineup)


def test_a_perfect_score_is_infinite():
    (score,) = league.play([("w", torch.tensor([1.0, -1.0] * 32))], [league.entry("nf4", league.FLOAT32, 4.5)])
    assert score.sqnr_db == math.inf


def test_at_equal_bits_short_constants_a_sign_and_a_search_each_help_on_normal_weights():
    x = normal(2**18)

    def error(*entry):
        return nf4lab.mse(x, league.entry(*entry, 4.5).quantize(x).dequantize())

    nf4, signed = error("nf4", league.FLOAT32), error("bof4-s", league.FLOAT32)
    short, both = error("nf4", league.SHORT), error("bof4-s", league.SHORT)
    searched = error("bof4-s", league.SEARCHED)
    # by quadrature 0.00846, 0.00735, 0.00672, 0.00534, and sampled 0.0047: each step is many standard errors long
    assert searched < 0.9 * both < 0.8 * short < 0.75 * signed < 0.67 * nf4


# --- the command


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "in.safetensors"
    tensors = {"a.weight": normal(128, 64), "b.weight": normal(64, 128, seed=1).bfloat16(), "a.bias": normal(4096)}
    safetensors.torch.save_file(tensors | {"small.weight": normal(10, 10), "zero.weight": torch.zeros(64, 64)}, path)
    return path


def test_compare_prints_the_league_and_writes_what_is_asked_for(checkpoint, tmp_path, capsys):
    outputs = ["--csv", str(tmp_path / "out.csv"), "--plot", str(tmp_path / "out.png")]
    assert main(["compare", str(checkpoint), "--bits", "4.25", "--bits", "4.5", "--quiet", *outputs]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["format", "constants", "4.25", "bits", "4.5", "bits", "won"]
    rows = {tuple(line.split()[:2]): line.split() for line in lines[1:]}
    lineup = league.entries([4.25, 4.5])

    def mean(name, storage, budget):
        return sum(
            score.sqnr_db
            for score in league.play(
                [(n, t) for n, t in safetensors.torch.load_file(checkpoint).items() if n in ("a.weight", "b.weight")],
                [league.entry(name, storage, budget)],
            )
        ) / 2  # fmt: skip

    assert rows["int4", "float32"][2:4] == [f"{mean('int4', 'float32', bits):.2f}" for bits in (4.25, 4.5)]
    assert rows["mxfp4", "power"][-3:] == [f"{mean('mxfp4', 'power of two', bits):.2f}" for bits in (4.25, 4.5)] + ["0"]
    assert sum(int(line.split()[-1]) for line in lines[1:] if line.split()[-1].isdigit()) == 4  # 2 matrices, 2 budgets
    assert sum("*" in line for line in lines[1:23]) in (1, 2)
    assert "2 matrices with 16,384 weights" in " ".join(lines) and lines[-1] == "left out, all zeros: zero.weight"
    with open(tmp_path / "out.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == 2 * len(lineup)
    first = next(r for r in table if (r["tensor"], r["format"], r["budget"]) == ("a.weight", "nf4", "4.5"))
    expected = nf4lab.mse(normal(128, 64), nf4lab.quantize(normal(128, 64)).dequantize())
    assert float(first["mse"]) == expected and first["block_size"] == "64" and first["constants"] == "float32"
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_most_takes_evenly_spaced_rows(checkpoint, tmp_path, capsys):
    assert main(["compare", str(checkpoint), "--bits", "5", "--include", "a.*", "--most", "4096", "--quiet",
                 "--csv", str(tmp_path / "out.csv")]) == 0  # fmt: skip
    with open(tmp_path / "out.csv", newline="") as file:
        row = next(r for r in csv.DictReader(file) if (r["format"], r["constants"]) == ("int4", "float32"))
    half = normal(128, 64)[::2]
    assert float(row["mse"]) == nf4lab.mse(half, league.entry("int4", "float32", 5.0).quantize(half).dequantize())
    assert row["weights"] == "4096" and "1 matrices with 4,096 weights" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--include", "nothing*"], "has no floating-point matrix of 4,096 weights or more that matches nothing*"),
        (["--include", "zero*"], "every matrix that was compared is all zeros"),
        (["--most", "100"], "--most must be at least 4096; got 100"),
        (["--plot", "out.gif"], "--plot draws .png, .svg or .pdf; got 'out.gif'"),
        (["--csv", "nowhere/out.csv"], "nowhere is not a folder to write out.csv to; nothing was compared"),
        (["--csv", "in.safetensors"], "in.safetensors exists already; nothing was compared"),
    ],
)
def test_what_cannot_be_compared_or_written_is_one_line_on_stderr(checkpoint, tmp_path, capsys, monkeypatch, arguments,
                                                                  message):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(["compare", "in.safetensors", "--bits", "4.5", "--quiet", *arguments]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("nf4lab: ") and message in err and err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["in.safetensors"]


def test_a_tensor_that_is_not_finite_is_named(tmp_path, capsys):
    safetensors.torch.save_file({"w": torch.full((64, 64), math.inf)}, tmp_path / "in.safetensors")
    assert main(["compare", str(tmp_path / "in.safetensors"), "--bits", "4.5", "--quiet"]) == 1
    assert "tensor 'w': x must be finite in float32" in capsys.readouterr().err


def test_a_format_of_ones_own_can_play():
    mine = replace(league.entry("nf4", league.FLOAT32, 4.5), format=nf4lab.Format("mine", codebooks.nf4() * 0.99))
    assert league.play([("w", normal(4096))], [mine])[0].entry.format.name == "mine"
