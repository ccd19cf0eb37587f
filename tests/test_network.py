"""A whole model in 4 bits: what is swapped, what is left alone, what the table says, and what memory it takes."""

import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

import nf4lab
from nf4lab.layers import swap


class Twice(nn.Linear):
    """A subclass that computes something else."""

    def forward(self, x):
        return 2 * super().forward(x)


class Tied(nn.Module):
    """One layer in two places, and a head whose weight is the embedding's."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.first = nn.Linear(32, 32)
        self.blocks = nn.ModuleList([nn.ModuleDict({"inner": self.first}), nn.ModuleDict({"inner": Twice(32, 32)})])
        self.head = nn.Linear(32, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.first(self.embed(ids))
        for block in self.blocks:
            x = block["inner"](x)
        return self.head(x)


def test_every_linear_layer_is_swapped_and_the_model_gives_what_the_table_promises():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(100, 48), nn.ReLU(), nn.Sequential(nn.Linear(48, 10, bias=False)))
    weights, x = [model[0].weight.detach(), model[2][0].weight.detach()], torch.randn(5, 100)
    rows = nf4lab.quantize_model_(model, "uniform", 32, double_quant=True)
    assert [type(layer).__name__ for layer in (model[0], model[1], model[2][0])] == ["Linear4bit", "ReLU", "Linear4bit"]
    assert [row[:3] for row in rows] == [("0", (48, 100), "uniform"), ("2.0", (10, 48), "uniform")]
    for row, w in zip(rows, weights, strict=True):
        q = nf4lab.quantize(w, "uniform", 32, double_quant=True)
        assert row.bits_per_weight == q.bits_per_weight
        power = w.double().square().mean().item()
        assert row.error == pytest.approx(nf4lab.mse(w, q.dequantize()) / power, rel=1e-12)  # two sums in float64
    hidden = torch.relu(nn.functional.linear(x, model[0].weight, model[0].bias))
    assert torch.equal(model(x), hidden @ model[2][0].weight.T)


def test_the_table_prints_a_line_for_each_layer_and_one_for_all():
    lines = str(nf4lab.quantize_model_(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32)))).splitlines()
    assert len(lines) == 4
    assert lines[0].split() == ["layer", "shape", "format", "bits", "error"]
    assert lines[2].split()[:6] == ["1", "32", "x", "64", "nf4", "4.5000"]
    assert lines[3].split() == ["all", "layers", "6,144", "4.5000"]


def test_a_shared_layer_stays_shared_and_other_subclasses_are_left_alone():
    model, ids = Tied(), torch.arange(50)[None]
    rows = nf4lab.quantize_model_(model)
    assert [row.name for row in rows] == ["first", "head"]
    assert model.first is model.blocks[0]["inner"] and isinstance(model.first, nf4lab.Linear4bit)
    assert type(model.blocks[1]["inner"]) is Twice
    assert type(model.embed) is nn.Embedding and model.embed.weight.dtype == torch.float32
    assert model(ids).shape == (1, 50, 50)


def test_a_second_pass_quantizes_only_what_is_left():
    model = Tied()
    nf4lab.quantize_model_(model, "nf4", exclude="head")
    assert [row.name for row in nf4lab.quantize_model_(model, "int4", 32)] == ["head"]
    assert model.first.quantized.format.name == "nf4"


def test_a_layer_with_hooks_is_refused_before_anything_changes():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    handle = model[1].register_forward_hook(lambda layer, x, y: 2 * y)
    with pytest.raises(ValueError, match="layer '1' has hooks, which would be lost"):
        nf4lab.quantize_model_(model)
    assert type(model[0]) is nn.Linear
    handle.remove()
    assert len(nf4lab.quantize_model_(model)) == 2


def test_a_layer_whose_forward_was_replaced_is_left_alone():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    model[0].forward = lambda x: x
    assert [row.name for row in nf4lab.quantize_model_(model)] == ["1"]


def test_bitsandbytes_layers_are_left_alone():
    bnb = pytest.importorskip("bitsandbytes")
    model = nn.Sequential(bnb.nn.Linear4bit(64, 64, quant_type="nf4"), nn.Linear(64, 64)).to("cpu")
    assert [row.name for row in nf4lab.quantize_model_(model)] == ["1"]


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        ("*", (), ["a.up", "a.down", "b.up", "b.down"]),
        ("a.*", (), ["a.up", "a.down"]),
        (["a.up", "b.up"], (), ["a.up", "b.up"]),
        ("*", "*.down", ["a.up", "b.up"]),
        ("*", ["a.*", "b.up"], ["b.down"]),
        (lambda name, layer: layer.in_features == 16, (), ["a.up", "b.up"]),
        ("b.*", lambda name, layer: name.endswith("up"), ["b.down"]),
    ],
)
def test_layers_are_chosen_by_pattern_or_by_function(include, exclude, expected):
    def part():
        return nn.ModuleDict({"up": nn.Linear(16, 32), "down": nn.Linear(32, 16)})

    rows = nf4lab.quantize_model_(nn.ModuleDict({"a": part(), "b": part()}), include=include, exclude=exclude)
    assert [row.name for row in rows] == expected


@pytest.mark.parametrize(
    ("model", "how", "match"),
    [
        (nn.Linear(16, 16), {}, "model is itself a Linear, which cannot be replaced in place"),
        (nn.Sequential(nn.ReLU()), {}, "no layer is chosen: of 0, 0 included, 0 excluded"),
        (nn.Sequential(nn.Linear(16, 16)), {"exclude": "0"}, "no layer is chosen: of 1, 1 included, 1 excluded"),
        (nn.Sequential(nn.Linear(16, 16)), {"include": "O"}, r"'O' matches none of the 1 layers \(0, …\)"),
        (nn.Sequential(nn.Linear(16, 16)), {"exclude": ["0", "lm_head"]}, "'lm_head' matches none"),
        (nn.Sequential(nn.Linear(16, 16)), {"format": "nf5"}, "unknown format 'nf5'"),
    ],
)
def test_a_choice_that_cannot_be_meant_is_refused_and_nothing_is_changed(model, how, match):
    before = [type(layer) for layer in model.modules()]
    with pytest.raises(ValueError, match=match):
        nf4lab.quantize_model_(model, **how)
    assert [type(layer) for layer in model.modules()] == before


def test_a_layer_of_zeros_has_no_error():
    layer = nn.Linear(16, 16)
    layer.weight.data.zero_()
    assert nf4lab.quantize_model_(nn.Sequential(layer))[0].error == 0


def test_long_work_shows_a_bar_and_short_work_does_not(monkeypatch, capsys):
    nf4lab.quantize_model_(nn.Sequential(nn.Linear(16, 16)))
    assert capsys.readouterr().err == ""
    tqdm = swap.tqdm
    monkeypatch.setattr(swap, "tqdm", lambda *args, **kwargs: tqdm(*args, **kwargs | {"delay": 0}))
    nf4lab.quantize_model_(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)))
    assert "2/2" in capsys.readouterr().err
    nf4lab.quantize_model_(nn.Sequential(nn.Linear(16, 16)), progress=False)
    assert capsys.readouterr().err == ""


def test_quantizing_a_model_needs_the_memory_of_one_layer_beside_it():
    # Beside the model: one layer dequantized, 128 MiB, its packed bytes, and the chunks of 2 MiB in which the error is
    # summed, with what the allocator keeps of them: a quarter of a layer is ample. A second copy would be a whole one.
    # Later layers find room in what the earlier ones gave back, so the first sets the peak.
    script = """
        import resource, torch, nf4lab
        from torch import nn
        def linear(n):
            layer = nn.utils.skip_init(nn.Linear, 8192, n, bias=False)
            layer.weight.data.uniform_(-1, 1)
            return layer
        nf4lab.quantize_model_(nn.Sequential(linear(64)))  # what the libraries load on first use
        model = nn.Sequential(*(linear(4096) for _ in range(3)))
        layer = model[0].weight.nbytes
        high = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        resident = lambda: int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
        filler = torch.ones(max(high() - resident(), 0) + 2**20, dtype=torch.uint8)  # the peak so far is the present
        before, start = high(), resident()
        nf4lab.quantize_model_(model)
        print((high() - before) / layer, (start - resident()) / (3 * layer))
    """
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc/self/statm")
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    peak, freed = map(float, run.stdout.split())
    assert 1 < peak < 1 + 4.5 / 32 + 1 / 4
    assert freed > 0.75  # of 1 - 4.5 / 32 = 0.86


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA GPU")
def test_quantizing_a_model_on_a_gpu_needs_the_memory_of_one_layer_beside_it():
    model = nn.Sequential(*(nn.Linear(4096, 2304, bias=False, device="cuda") for _ in range(8)))
    layer = model[0].weight.nbytes
    nf4lab.quantize_model_(nn.Sequential(nn.Linear(512, 512, device="cuda")))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    nf4lab.quantize_model_(model)
    assert (torch.cuda.max_memory_allocated() - before) / layer < 1.5  # with chunks of 2**18 float64, several at once
