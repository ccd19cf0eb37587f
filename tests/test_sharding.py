"""FSDP2 on two processes: a quantized model with adapters, cut in two, does what it does whole."""

import pytest
import torch
from fsdp_two import CASES, both, in_one
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

import nf4lab
from nf4lab.layers import sharded
from nf4lab.layers.stored import Stored4bit


@pytest.fixture(scope="module", params=["cpu", "cuda"])
def device_and_found(request, tmp_path_factory):
    """(a device, what each of two processes on such devices has after training, by case)."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    if request.param == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("torch finds no two CUDA GPUs")
    return request.param, both(request.param, str(tmp_path_factory.mktemp("fsdp")))


@pytest.mark.parametrize("case", CASES)
def test_each_process_holds_half_of_the_packed_bytes(device_and_found, case):
    local = [found[case]["local"] for found in device_and_found[1]]
    assert sum(local) == device_and_found[1][0][case]["packed"]
    assert CASES[case].width == 6 or local[0] == local[1]  # 36 bytes are nine float32


@pytest.mark.parametrize("case", CASES)
def test_forward_backward_and_state_are_those_of_one_process(device_and_found, case):
    device, found = device_and_found
    one = in_one(CASES[case], device)
    for rank, two in enumerate(found):
        assert torch.equal(two[case]["answers"], one["answers"][rank])
        assert two[case]["state"].keys() == one["state"].keys()
        for name, tensor in one["state"].items():  # a sum of two gradients has one order: adapters are equal too
            assert torch.equal(two[case]["state"][name], tensor), name


@pytest.mark.parametrize("case", CASES)
def test_torchs_distributed_checkpoint_has_the_state_and_brings_it_back(device_and_found, case):
    for two in (found[case] for found in device_and_found[1]):
        assert two["failed"] == ""
        for state in (two["full"], two["kept"], two["loaded"]["parts"], two["loaded"]["whole"]):
            assert state.keys() == two["state"].keys()
            assert all(torch.equal(state[name], tensor) for name, tensor in two["state"].items())


@pytest.mark.parametrize("format", ["nf4", "uniform", "nvfp4"])
def test_one_process_alone_saves_and_loads_4_bit_layers_by_torchs_distributed_checkpoint(format):
    models = [nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32)) for _ in range(2)]
    for model in models:
        nf4lab.quantize_model_(model, format)
    set_model_state_dict(models[1], get_model_state_dict(models[0]))
    assert torch.equal(models[1][0].weight, models[0][0].weight)


@pytest.mark.skipif(torch.__version__ < "2.12", reason="this torch cuts no uint8")
def test_a_weight_that_lies_in_parts_is_refused_in_words_where_it_is_read(tmp_path):
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32))
    nf4lab.quantize_model_(model)
    x, before = torch.randn(3, 64), model[0].weight.clone()
    expected = model(x)
    nf4lab.shardable_(model)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        fully_shard(model)
        for read in (lambda: model[0].weight, lambda: model[0](x), model[0].to_linear, lambda: nf4lab.release_(model)):
            with pytest.raises(RuntimeError, match="the weight of a 4-bit layer lies on several processes"):
                read()
        with pytest.raises(ValueError, match="layer '0' lies on several processes: add adapters before fully_shard"):
            nf4lab.add_lora_(model)
        assert torch.equal(model(x), expected)
        assert torch.equal(model[0].weight, before)  # torch leaves a root that it has gathered together
        assert "nf4" in repr(model) and model.state_dict()["0.weight"].full_tensor().dtype == torch.uint8
    finally:
        torch.distributed.destroy_process_group()


def test_a_model_that_is_cut_already_is_not_quantized_and_not_made_shardable(tmp_path):
    from torch.distributed.fsdp import fully_shard

    models = [nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32)) for _ in range(2)]
    nf4lab.quantize_model_(models[1])
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        for model in models:
            fully_shard(model)
        with pytest.raises(ValueError, match="layer '0': x is a DTensor, which lies on several processes"):
            nf4lab.quantize_model_(models[0])
        with pytest.raises(ValueError, match="fully_shard has cut this model already"):
            nf4lab.shardable_(models[1], torch.float32)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.skipif(torch.__version__ < "2.12", reason="this torch cuts no uint8")
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
        nf4lab.shardable_(nn.Sequential(nn.Linear(8, 8)), torch.float32)


@pytest.mark.skipif(torch.__version__ < "2.12", reason="this torch cuts no uint8")
def test_a_model_on_the_meta_device_is_made_shardable_once_and_loaded_by_assignment():
    model, other = (nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32)) for _ in range(2))
    for each in (model, other):
        nf4lab.quantize_model_(each, double_quant=True)
    nf4lab.shardable_(other.to("meta"))
    with pytest.raises(ValueError, match="model's layers can be sharded already"):
        nf4lab.shardable_(other)
    other.load_state_dict(model.state_dict(), assign=True)
    x = torch.randn(3, 64)
    assert torch.equal(other(x), model(x)) and isinstance(other[0].packed, nn.Parameter)


def test_an_older_torch_is_told_what_it_can_cut(monkeypatch):
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.11.0+cu130"))
    with pytest.raises(ValueError, match="cu130 cuts no uint8: quant_storage must be float32"):
        nf4lab.shardable_(nn.Sequential(nn.Linear(8, 8)))


def test_bytes_pass_as_float32_and_no_cast_of_the_model_touches_them():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32))
    nf4lab.quantize_model_(model)
    x, before = torch.randn(3, 64), {key: value.clone() for key, value in model.state_dict().items()}
    y = model(x)
    assert nf4lab.shardable_(model, torch.float32) == 2
    assert [p.dtype for n, p in model.named_parameters() if n.endswith("packed")] == [torch.float32] * 2
    assert torch.equal(model(x), y)
    after = model.half().float().state_dict()
    assert after.keys() == before.keys() and torch.equal(after["0.weight"], before["0.weight"])
    for tensor in model.parameters():
        tensor.detach().zero_()
    model.load_state_dict(before)
    assert torch.equal(model(x), y)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.int8])
def test_dtypes_whose_copies_lose_bytes_are_refused(storage):
    with pytest.raises(ValueError, match="must be uint8 or float32: bytes under"):
        nf4lab.shardable_(nn.Sequential(nn.Linear(8, 8)), storage)


def test_bytes_that_somebody_casts_are_refused_in_words():
    model = nn.Sequential(nn.Linear(64, 64))
    nf4lab.quantize_model_(model, include="0")
    nf4lab.shardable_(model, torch.float32)
    model[0].packed = nn.Parameter(model[0].packed.bfloat16(), requires_grad=False)  # as a mixed-precision policy does
    with pytest.raises(RuntimeError, match="and are lost: a mixed-precision policy"):
        model(torch.randn(3, 64))


def test_a_storage_that_does_not_fit_leaves_the_model_as_it_is():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(5, 2))
    nf4lab.quantize_model_(model, include="*")
    with pytest.raises(ValueError, match="1: 5 bytes are no whole number of"):
        nf4lab.shardable_(model, torch.float32)
    assert "packed" in model[0]._buffers
