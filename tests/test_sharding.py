"""FSDP2 on two processes: a quantized model with adapters, cut in two, does what it does whole."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import nf4lab
from nf4lab.layers import sharded
from nf4lab.layers.stored import Stored4bit

PROGRAM = Path(__file__).with_name("fsdp_two.py")


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What each of two processes has after a step."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    folder = tmp_path_factory.mktemp("fsdp")
    runs = [subprocess.Popen([sys.executable, PROGRAM, str(rank), folder], stderr=subprocess.PIPE) for rank in (0, 1)]
    errors = [run.communicate(timeout=3600)[1].decode() for run in runs]
    assert [run.returncode for run in runs] == [0, 0], errors[0][-3000:]
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def test_each_process_holds_half_of_the_packed_bytes(both):
    for found in both:
        assert found["local"] == found["packed"] / 2


def test_forward_backward_and_state_are_those_of_one_process(both):
    from fsdp_two import model_and_data, step

    model, data = model_and_data()
    whole = step(model, data.flatten(0, 1))  # the mean over both batches is what the mean of both gradients is of
    for rank, found in enumerate(both):
        assert torch.equal(found["y"], whole.reshape(2, 8, 64)[rank])
        assert found["state"].keys() == model.state_dict().keys()
        for name, tensor in model.state_dict().items():
            if "lora" in name:  # gradients of two batches are summed in another order
                torch.testing.assert_close(found["state"][name], tensor)
            else:
                assert torch.equal(found["state"][name], tensor), name


def test_without_processes_a_shardable_model_is_the_same_and_is_saved_alike():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32))
    nf4lab.quantize_model_(model)
    x, before = torch.randn(3, 64), dict(model.state_dict())
    y = model(x)
    assert nf4lab.shardable_(model) == 2
    assert torch.equal(model(x), y) and model.half()[0].packed.dtype == torch.uint8
    after = model.state_dict()
    assert before.keys() == after.keys() and torch.equal(before["0.weight"], after["0.weight"])
    assert [p.dtype for n, p in model.named_parameters() if n.endswith("packed")] == [torch.uint8] * 2


def test_every_4_bit_layer_of_the_package_can_be_sharded():
    layers = {layer for layer in Stored4bit.__subclasses__() if layer.__module__.startswith("nf4lab.")}
    assert layers - {sharded._PackedParameter} == sharded.SHARDABLE.keys()


def test_a_model_without_4_bit_layers_is_refused():
    with pytest.raises(ValueError, match="model has no 4-bit layers: quantize it first"):
        nf4lab.shardable_(nn.Sequential(nn.Linear(8, 8)))
