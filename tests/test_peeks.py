"""Layers whose weight a model's code looks at: left alone, so that transformers answers rightly."""

import json

import pytest
import torch
from torch import nn

import nf4lab
from nf4lab.peeks import CAST, READ, peeked_at

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from architectures import ALL, ARCHITECTURES, CASTING, MORE, make, outputs, plainly  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*of the weights stay")


def distance(model, other):
    return (outputs(model) - outputs(other)).abs().max().item()


def rounded(name, quantized):
    """The model in full precision, the weights of these layers as 4 bits hold them: what 4-bit layers stand for."""
    model = make(name)
    for layer in quantized:
        weight = model.get_submodule(layer).weight
        weight.data = nf4lab.quantize(weight.data).dequantize()
    return model


def in_4_bits(name, folder):
    """The model that transformers and bitsandbytes make of a saved one of that name."""
    make(name).save_pretrained(folder)
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    return plainly(getattr(transformers, ALL[name][0]).from_pretrained(folder, quantization_config=config))


def layers_of(model, kind="Linear4bit"):
    return [n for n, m in model.named_modules() if type(m).__name__ == kind]


@pytest.mark.parametrize("name", CASTING)
def test_where_bitsandbytes_own_answers_wrongly_a_folder_and_a_model_by_nf4lab_do_not(bitsandbytes, tmp_path, name):
    model, theirs = make(name), in_4_bits(name, tmp_path / "in")
    right, cast = rounded(name, layers_of(theirs)), set(peeked_at(model))
    # Sums in another order are some 1e-6 of outputs near 1; what the cast costs is seen at the first digit.
    assert distance(theirs, right) > 0.02 and cast <= set(layers_of(theirs))
    counts = nf4lab.quantize_checkpoint(tmp_path / "in", tmp_path / "out")
    assert {n.removesuffix(".weight") for n, why in counts["kept"].items() if why == CAST} == cast
    ours = plainly(type(model).from_pretrained(tmp_path / "out"))
    assert set(layers_of(ours)) == set(layers_of(theirs)) - cast
    assert distance(ours, rounded(name, layers_of(ours))) < 1e-4
    rows = nf4lab.quantize_model_(model)
    assert distance(model, ours) == 0 and {n for n, why in rows.kept.items() if why == CAST} == cast
    model.save_pretrained(tmp_path / "memory")
    assert distance(plainly(type(model).from_pretrained(tmp_path / "memory")), ours) == 0


@pytest.mark.parametrize("name", [name for name in CASTING if name != "Swin v2"])
def test_adopting_such_layers_makes_them_right_and_says_so_and_releasing_warns(bitsandbytes, tmp_path, name):
    model = in_4_bits(name, tmp_path)
    right, wrong = rounded(name, layers_of(model)), outputs(model)
    with pytest.warns(UserWarning, match="transformers casts the input of .* uint8: the model answers otherwise"):
        nf4lab.adopt_(model)
    assert distance(model, right) < 1e-4
    with pytest.warns(UserWarning, match="uint8: the model answers wrongly"):
        nf4lab.release_(model)
    assert torch.equal(outputs(plainly(model)), wrong)


def test_what_was_cast_while_a_model_was_loaded_stays_wrong_and_the_warning_says_so(bitsandbytes, tmp_path):
    model = in_4_bits("Swin v2", tmp_path)
    right, wrong = rounded("Swin v2", layers_of(model)), outputs(model)
    with pytest.warns(UserWarning, match="rightly but for what it cast while it was loaded"):
        nf4lab.adopt_(model)
    assert torch.equal(outputs(model), wrong) and distance(model, right) > 0.02


def test_switch_transformers_by_numbers(bitsandbytes, tmp_path):
    model, theirs = make("Switch Transformers"), in_4_bits("Switch Transformers", tmp_path / "in")
    nf4lab.quantize_checkpoint(tmp_path / "in", tmp_path / "out")
    ours = plainly(type(model).from_pretrained(tmp_path / "out"))
    with pytest.warns(UserWarning, match="of 'encoder.block.0.layer.1.mlp.wo' and of 9 more"):
        before, adopted = distance(theirs, model), nf4lab.adopt_(theirs)
    assert before > 4 and distance(ours, model) < 3 and distance(theirs, model) < 3 and len(adopted) == 46


@pytest.mark.parametrize("way", ["folder", "memory"])
@pytest.mark.parametrize("name", ["Switch Transformers", "T5"])
def test_such_a_layer_that_is_named_makes_a_folder_of_nf4labs_own(tmp_path, name, way):
    model, include = make(name), ["*", "*wo*"]
    model.save_pretrained(tmp_path / "in")
    if way == "memory":
        nf4lab.quantize_model_(model, include=include)
        model.save_pretrained(tmp_path / "out")
    else:
        nf4lab.quantize_checkpoint(tmp_path / "in", tmp_path / "out", include=include)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "nf4lab" and "wo" in config["reason"]
    again = make(name, seed=1)
    nf4lab.load_model_(again, tmp_path / "out")
    layers = layers_of(again)
    assert any(n.endswith("wo") for n in layers) and distance(again, rounded(name, layers)) < 1e-4


def test_a_weight_that_is_read_past_its_layer_stays(bitsandbytes, tmp_path):
    model = make("Mamba")
    model.save_pretrained(tmp_path / "in")
    with pytest.raises(RuntimeError):
        outputs(in_4_bits("Mamba", tmp_path / "bitsandbytes"))
    counts = nf4lab.quantize_checkpoint(tmp_path / "in", tmp_path / "out")
    assert [n for n, why in counts["kept"].items() if why == READ] == [
        f"backbone.layers.{k}.mixer.dt_proj.weight" for k in (0, 1)
    ]
    ours = plainly(type(model).from_pretrained(tmp_path / "out"))
    assert distance(ours, rounded("Mamba", layers_of(ours))) < 1e-4 and len(layers_of(ours)) == 6


def test_a_model_that_transformers_takes_apart_is_nf4labs_own(tmp_path):
    model = make("Llama 4")
    model.save_pretrained(tmp_path / "in")
    nf4lab.quantize_checkpoint(tmp_path / "in", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "nf4lab" and "takes Llama4TextExperts apart" in config["reason"]
    again = make("Llama 4", seed=1)
    nf4lab.load_model_(again, tmp_path / "out")
    assert distance(again, rounded("Llama 4", layers_of(again))) < 1e-4 and len(layers_of(again)) == 14


def test_a_model_without_a_layer_of_torchs_own_is_refused_in_words(tmp_path):
    make("Falcon").save_pretrained(tmp_path / "in")
    with pytest.raises(ValueError, match=r"no tensor is chosen: .* stays: in a FalconLinear"):
        nf4lab.quantize_checkpoint(tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize("name", [*ARCHITECTURES, *MORE])
def test_of_these_architectures_only_t5s_layers_are_looked_at(name):
    assert set(peeked_at(make(name)).values()) == ({CAST} if name == "T5" else set())


# --- what counts as a look


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        for name in "abcdefghijkl":
            setattr(self, name, nn.Linear(4, 4))
        self.some = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
        nn.init.zeros_(self.l.weight)

    def forward(self, x):
        x = self.a(x.to(self.a.weight.dtype))
        dtype = self.b.weight.dtype
        x = self.b(x.to(dtype)) + self.some[1](x.to(self.some[1].weight.dtype))
        x = x.to(next(self.net.parameters()).dtype)
        if self.c.weight.dtype == torch.float32:
            x = x.to(self.d.weight.device)
        x = x @ self.e.weight.T
        if x.shape[0] > 10**6:
            x = x @ self.f.weight.T
        return x if isinstance(self.g.weight, nn.Parameter) else x.cpu()

    def careful(self, x):
        return x if self.h.weight.dtype == torch.uint8 else x.to(self.h.weight.dtype)

    def careful_too(self, x):
        if (dtype := self.i.weight.dtype).is_floating_point:
            x = x.to(dtype)
        return x

    def of_all(self, x, k):
        return x.to(dtype=self.some[k].weight.dtype) if k else x

    def _init_weights(self):
        nn.init.ones_(self.k.weight)


class Child(Block):
    def other(self, x):
        return x.to(self.j.weight.dtype)


def test_a_cast_or_an_unconditional_reading_counts_and_a_comparison_does_not():
    model = nn.ModuleDict({"block": Block()})
    cast = ["a", "b", "some.0", "some.1", "some.2", "net.0"]
    assert peeked_at(model) == {f"block.{name}": CAST for name in cast} | {"block.e": READ}
    assert peeked_at(Child()) == {n.removeprefix("block."): why for n, why in peeked_at(model).items()} | {"j": CAST}


def test_without_source_nothing_is_looked_at():
    names = {"nn": nn}
    exec("class Typed(nn.Module):\n    def forward(self, x): return x.to(self.fc.weight.dtype)", names)
    model = names["Typed"]()
    model.fc = nn.Linear(2, 2)
    assert peeked_at(model) == {}


def test_names_alone_tell_t5s_kind():
    from nf4lab.choice import candidates_by_name

    shapes = dict.fromkeys(["a.wi.weight", "a.wo.weight", "b.wi_0.weight", "b.wo.weight", "c.wo.weight"], (64, 64))
    stays = {c.names[0]: (c.stays, c.barred) for c in candidates_by_name(shapes) if c.stays}
    assert stays == {"a.wo.weight": (CAST, CAST), "b.wo.weight": (CAST, CAST)}
