"""Linear4bit: forward and backward through packed bytes, and everything that a module has to put up with."""

import copy
import dataclasses
import gc
import io
import subprocess
import sys
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import nf4lab
from nf4lab.layers import layout, prepared

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_cuda)]
OWN = nf4lab.Format("own", [-1.0, -0.3, 0.0, 0.2, 1.0], lambda blocks: (blocks.abs().amax(dim=1), None))
FORMATS = [*nf4lab.FORMATS.values(), OWN]
SCHEMES = [False, True, "linear4"]
STORED = [  # constants of one byte are not quantized again
    pytest.param(format, scheme, id=f"{format.name}-{scheme}")
    for format in FORMATS
    for scheme in SCHEMES
    if not scheme or format.constants_dtype.itemsize > 1
]


def normal(*shape, seed=0, **kwargs):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(**kwargs)


def plain(n=37, k=100, bias=True, dtype=torch.float32, device="cpu"):
    """A torch.nn.Linear; by default 3,700 weights, whose last block is short and whose rows no block divides."""
    layer = nn.Linear(k, n, bias, device, dtype)
    layer.weight.data = normal(n, k, seed=1, dtype=dtype, device=device) / k**0.5
    if bias:
        layer.bias.data = normal(n, seed=3, dtype=dtype, device=device)
    return layer


def quantized(*args, bias=True, dtype=torch.float32, device="cpu", **kwargs):
    return nf4lab.Linear4bit.from_linear(plain(bias=bias, dtype=dtype, device=device), *args, **kwargs)


# --- forward and backward


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("format", "double_quant"), STORED)
def test_the_output_is_that_of_a_plain_layer_with_the_dequantized_weight(format, double_quant, device):
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        layer = quantized(format, 32, double_quant, dtype=dtype, device=device)
        w_hat = nf4lab.quantize(plain(dtype=dtype, device=device).weight, format, 32, double_quant).dequantize()
        x = normal(3, 7, 100, dtype=dtype, device=device)  # 21 rows: more than the fused kernel takes
        assert torch.equal(layer.weight, w_hat)
        assert torch.equal(layer(x), F.linear(x, w_hat, layer.bias))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [(5,), (2, 3), (), (40,)])
@pytest.mark.parametrize(("format", "double_quant"), STORED)
def test_the_gradient_of_the_input_is_grad_times_the_dequantized_weight_exactly(format, double_quant, rows, device):
    for dtype in (torch.float32, torch.bfloat16):
        layer = quantized(format, 64, double_quant, dtype=dtype, device=device)
        x = normal(*rows, 100, dtype=dtype, device=device).requires_grad_()
        grad = normal(*rows, 37, seed=2, dtype=dtype, device=device)
        layer(x).backward(grad)
        assert torch.equal(x.grad, grad @ layer.weight)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("format", ["nf4", "uniform"])
def test_the_derivatives_agree_with_finite_differences_in_float64(format, bias):
    layer = nf4lab.Linear4bit.from_linear(plain(5, 7, bias, torch.float64), format, 16, True)
    x = normal(3, 7, dtype=torch.float64).requires_grad_()
    parameters = tuple(layer.parameters())

    def f(x, *parameters):
        return torch.func.functional_call(layer, {"bias": parameters[0]} if bias else {}, x)

    assert torch.autograd.gradcheck(f, (x, *parameters))
    assert torch.autograd.gradgradcheck(f, (x, *parameters))


@pytest.mark.parametrize("device", DEVICES)
def test_only_the_bias_trains_and_its_gradient_is_a_plain_layers(device):
    layer, reference = quantized(device=device), plain(device=device)
    x, grad = normal(20, 100, device=device), normal(20, 37, seed=2, device=device)
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    layer(x).backward(grad)
    reference(x).backward(grad)
    assert torch.equal(layer.bias.grad, reference.bias.grad)
    assert not layer.weight.requires_grad


def test_the_graph_puts_nothing_aside_and_holds_the_layers_own_tensors():
    layer, kept = quantized("nf4", 64, True), []
    x = normal(1000, 100).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(x * 1)
        assert kept == []
        torch.ops.nf4lab.linear(x * 1, layer.stored(), layer.bias, layer.layout)  # as torch.compile sees it
    assert [t.data_ptr() for t in kept] == [t.data_ptr() for t in layer.stored()]
    assert sum(t.nbytes for t in kept) == layer.nbytes == layer.quantized.nbytes
    y.sum().backward()
    assert x.grad is not None


def test_a_weight_changed_between_the_passes_is_refused_and_one_put_in_its_place_is_not():
    layer, x = quantized("nf4", 64, True), normal(5, 100).requires_grad_()
    w_hat, y = layer.weight, layer(x)
    layer.load_state_dict(quantized("nf4", 64, True).state_dict(), assign=True)  # other tensors; y's are as they were
    layer.packed.zero_()
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones(5, 37) @ w_hat)
    y = layer(x)
    layer.packed.fill_(17)
    with pytest.raises(RuntimeError, match="modified in place between the forward and the backward pass"):
        y.sum().backward()


def test_the_input_can_be_freed_before_the_backward_pass():
    layer, x = quantized(), normal(5, 100).requires_grad_()
    inside = x + 1
    seen = weakref.ref(inside)
    y = layer(inside)
    del inside
    assert seen() is None
    y.sum().backward()


@pytest.mark.parametrize("n_k", [(37, 100), (3, 5), (16, 64), (1, 1)])
def test_block_size_needs_to_divide_nothing(n_k):
    layer, x = nf4lab.Linear4bit.from_linear(plain(*n_k), "nf4", 64), normal(4, n_k[1])
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("device", DEVICES)
def test_an_empty_batch_goes_through_and_back(device):
    layer = quantized(device=device)
    x = torch.zeros(0, 3, 100, device=device, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == (0, 3, 37) and x.grad.shape == x.shape
    assert not layer.bias.grad.any()


@needs_cuda
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 4, 16])
def test_a_few_rows_on_a_gpu_take_the_fused_kernel_which_never_writes_the_matrix(rows, dtype, double_quant):
    reference = plain(1024, 2048, dtype=dtype, device="cuda")
    layer = nf4lab.Linear4bit.from_linear(reference, "nf4", 64, double_quant)
    x, w_hat = normal(rows, 2048, dtype=dtype, device="cuda"), layer.weight.double()
    exact = F.linear(x.double(), w_hat, layer.bias.double())
    # a level rounded to float16, a sum of 2048 in float32, and the weight and result rounded to dtype
    size = F.linear(x.double().abs(), w_hat.abs(), layer.bias.double().abs())
    bound = size * (2.0**-11 + 2048 * 2.0**-24 + 2 * torch.finfo(dtype).eps)
    with torch.no_grad():
        assert ((layer(x).double() - exact).abs() <= bound).all()
        for many in (1, 100):
            batch = x[:1].repeat(rows if many == 1 else 1000, 1)
            layer(batch)
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            y = layer(batch)
            extra = torch.cuda.max_memory_allocated() - before - y.nbytes
            assert extra < 2**16 if many == 1 else extra >= w_hat.numel() * dtype.itemsize


# --- dtypes


@pytest.mark.parametrize("device", DEVICES)
def test_compute_dtype_is_what_is_multiplied_in_and_the_result_has_the_dtype_of_x(device):
    layer = quantized("nf4", compute_dtype=torch.bfloat16, device=device)
    x = normal(20, 100, device=device)
    w_hat, bias = (t.to(torch.bfloat16) for t in (layer.weight, layer.bias))
    assert torch.equal(layer(x), F.linear(x.to(torch.bfloat16), w_hat, bias).float())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64])
def test_a_dtype_that_no_weight_decodes_to_leaves_the_layers_own(dtype):
    layer, w_hat = quantized("nf4", 64, True), quantized("nf4", 64, True).weight
    assert torch.equal(layer.to(dtype).weight, w_hat)
    quantized("nf4", 64, True).load_state_dict(layer.float().state_dict())


@pytest.mark.parametrize("format", ["nf4", "uniform", "nvfp4"])
def test_constants_that_somebody_casts_are_refused_in_words(format):
    layer = quantized(format)
    layer(normal(3, 100))
    for buffer in layer.buffers():  # as mixed precision of FSDP1 and DDP does with buffers
        if buffer.is_floating_point():
            buffer.data = buffer.data.to(torch.bfloat16)
    for use in (lambda: layer(normal(3, 100)), lambda: layer.weight, layer.state_dict):
        with pytest.raises(RuntimeError, match=r"is kept in torch\.float32, and was cast to torch\.bfloat16"):
            use()


def test_moving_to_another_dtype_keeps_the_constants():
    layer = quantized("nf4", 64, True)
    before, w_hat = layer.quantized, layer.weight
    assert layer.to(torch.bfloat16) is layer
    assert layer.bias.dtype == layer.weight.dtype == layer.quantized.dtype == torch.bfloat16
    assert torch.equal(layer.quantized.absmax, before.absmax)
    assert torch.equal(layer.weight, w_hat.to(torch.bfloat16))
    assert torch.equal(layer.float().weight, w_hat)


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_chooses_the_dtype_as_for_a_plain_layer(device):
    layer = quantized(device=device)
    reference, x = layer.to_linear(), normal(20, 100, device=device).requires_grad_()
    with torch.autocast(device, torch.bfloat16):
        y, expected = layer(x), reference(x)
    assert y.dtype == expected.dtype == torch.bfloat16
    assert torch.equal(y, expected)
    assert torch.equal(*(torch.autograd.grad(out.float().sum(), x)[0] for out in (y, expected)))


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_leaves_float64_alone_as_for_a_plain_layer(device):
    layer, x = quantized(dtype=torch.float64, device=device), normal(20, 100, dtype=torch.float64, device=device)
    reference = layer.to_linear()
    adapted = nf4lab.LoRALinear(layer, dtype=torch.float64)
    with torch.autocast(device, torch.bfloat16):
        assert torch.equal(layer(x), reference(x)) and torch.equal(adapted(x), reference(x))


@pytest.mark.parametrize("device", DEVICES)
def test_a_compute_dtype_holds_under_autocast_and_only_the_result_is_rounded(device):
    layer, x = quantized(compute_dtype=torch.float32, device=device), normal(20, 100, device=device)
    with torch.autocast(device, torch.bfloat16):
        y = layer(x)
    assert torch.equal(y, F.linear(x, layer.weight, layer.bias).to(torch.bfloat16))


# --- state


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(
    ("format", "double_quant"),
    [row for row in STORED if row.values[0] is not OWN],  # no file can hold a function of one's own
)
def test_a_state_dict_carries_the_layer_over(format, double_quant, assign):
    layer, x = quantized(format, 64, double_quant), normal(4, 100)
    other = nf4lab.Linear4bit.from_linear(nn.Linear(100, 37), format, 64, double_quant)
    saved = io.BytesIO()
    torch.save(nn.Sequential(layer).state_dict(), saved)
    saved.seek(0)
    loaded = torch.load(saved, weights_only=True)  # tensors alone: nothing is unpickled
    assert not torch.equal(other(x), layer(x))
    result = nn.Sequential(other).load_state_dict(loaded, assign=assign)
    assert result.missing_keys == result.unexpected_keys == []
    assert torch.equal(other(x), layer(x)) and torch.equal(other.packed, layer.packed)
    assert not {b.data_ptr() for b in other.buffers()} & {b.data_ptr() for b in layer.buffers()}


@pytest.mark.parametrize(("format", "double_quant"), [row for row in STORED if row.values[0] is not OWN])
def test_every_tensor_of_a_state_dict_is_whole_and_its_own(format, double_quant, tmp_path):
    from safetensors.torch import load_file, save_file

    model = nn.Sequential(quantized(format, 64, double_quant), nn.ReLU(), nn.Linear(37, 100), nn.ReLU())
    model.append(quantized(format, 64, double_quant))
    state, x = model.state_dict(), normal(4, 100)
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in state.values())
    assert len({t.untyped_storage().data_ptr() for t in state.values()}) == len(state)
    save_file(state, tmp_path / "model.safetensors")
    other = copy.deepcopy(model)
    for layer in (other[0], other[4]):
        layer.packed.zero_()
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(other(x), model(x))
    before = nf4lab.quantize(torch.ones(64), format).dequantize()
    for tensor in state.values():
        tensor.untyped_storage().fill_(0)
    assert torch.equal(nf4lab.quantize(torch.ones(64), format).dequantize(), before)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_the_keys_and_bytes_are_those_that_a_layer_of_bitsandbytes_writes(bitsandbytes, format, double_quant):
    import bitsandbytes.nn

    reference, x = plain(36), normal(20, 100)
    theirs = bitsandbytes.nn.Linear4bit(100, 36, True, torch.float32, double_quant, format)
    theirs.load_state_dict(reference.state_dict())
    theirs = theirs.to("cpu")  # quantizes
    ours = nf4lab.Linear4bit.from_linear(reference, format, 64, double_quant)
    written, expected = ours.state_dict(), theirs.state_dict()
    nested = ["weight.nested_absmax", "weight.nested_quant_map"] * double_quant
    keys = ["bias", "weight", "weight.absmax", "weight.quant_map", f"weight.quant_state.bitsandbytes__{format}"]
    assert sorted(written) == sorted(expected) == sorted(keys + nested)
    for key in set(expected) - {keys[-1]}:  # that one is JSON, with spaces of one's own
        assert (written[key].shape, written[key].dtype) == (expected[key].shape, expected[key].dtype)
    layer = nf4lab.Linear4bit.from_linear(nn.Linear(100, 36), format, 64, double_quant)
    layer.load_state_dict(expected)
    assert torch.equal(layer(x), theirs(x))
    stats = {key: value for key, value in written.items() if key.startswith("weight.")}
    theirs.weight = bitsandbytes.nn.Params4bit.from_prequantized(written["weight"], stats, device="cpu", module=theirs)
    assert torch.equal(theirs(x), ours(x))


def test_a_layer_keeps_its_dtype_when_it_loads_unless_the_tensors_are_assigned():
    state, x = quantized("nf4", 64, True).state_dict(), normal(4, 100)
    layer = quantized("nf4", 64, True, dtype=torch.bfloat16)
    layer.load_state_dict(state)
    assert layer.weight.dtype == torch.bfloat16
    layer = quantized("nf4", 64, True).to("meta")
    layer.load_state_dict(state, assign=True)
    assert torch.equal(layer(x), quantized("nf4", 64, True)(x))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: plain().state_dict(), r"it is not quantized, but torch.float32 of shape \(37, 100\)"),
        (lambda: quantized("fp4").state_dict(), r"QuantizedTensor\(fp4, .*does not fit in a layer with .*\(nf4, "),
        (lambda: quantized("nf4", 32).state_dict(), "block_size=32.*does not fit.*block_size=64"),
        (lambda: quantized("nf4", 64, True).state_dict(), "bits_per_weight=4.1.*does not fit.*bits_per_weight=4.5"),
        (lambda: {"bias": torch.zeros(37)}, 'Missing key.*"weight"'),
        (lambda: without(quantized().state_dict(), "weight.absmax"), 'Missing key.*"weight.absmax"'),
        (lambda: without(quantized().state_dict(), "bias"), 'Missing key.*"bias"'),
        (lambda: quantized().state_dict() | {"scale": torch.zeros(1)}, 'Unexpected key.*"scale"'),
        (lambda: quantized().state_dict() | {"weight.zero": torch.zeros(1)}, r"unknown are \['.zero'\]"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_with_both_sides_named(make, match):
    with pytest.raises(RuntimeError, match=match):
        quantized().load_state_dict(make())


def test_a_layer_on_the_meta_device_loads_by_assignment_only():
    with pytest.raises(RuntimeError, match="load with assign=True"):
        quantized(bias=False).to("meta").load_state_dict(quantized(bias=False).state_dict())


def test_a_whole_weight_of_another_kind_is_no_part_of_this_one_even_where_nothing_is_required():
    layer = quantized("nf4", 64, True)
    with pytest.raises(RuntimeError, match=r"bits_per_weight=4\.5.*does not fit in a layer with.*bits_per_weight=4\.1"):
        layer.load_state_dict(quantized("nf4", 64).state_dict(), strict=False)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("format", ["nf4", "uniform"])
def test_a_weight_whose_parts_lie_in_two_files_is_loaded_when_the_second_has_come(format, order):
    layer, x = quantized(format, 64, True), normal(4, 100)
    other = nf4lab.Linear4bit.from_linear(nn.Linear(100, 37), format, 64, True)
    before, keys = other.weight.clone(), sorted(layer.state_dict())
    files = [{key: layer.state_dict()[key] for key in part} for part in (keys[:3], keys[3:])]
    first = other.load_state_dict(files[order[0]], strict=False)
    assert sorted(first.missing_keys) == sorted(files[order[1]]) and torch.equal(other.weight, before)
    other.load_state_dict(files[order[1]], strict=False)
    assert torch.equal(other(x), layer(x)) and torch.equal(other.weight, layer.weight)


@pytest.mark.parametrize(("format", "double_quant"), [row for row in STORED if row.values[0] is not OWN])
def test_a_layer_in_two_places_is_saved_once_by_safetensors_and_loaded_into_both(format, double_quant, tmp_path):
    from safetensors.torch import load_model, save_model

    def shared():
        layer = quantized(format, 64, double_quant)
        return nn.ModuleDict({"a": layer, "b": nn.Sequential(layer)})

    model, other = shared(), shared()
    other["a"].packed.zero_()
    save_model(model, str(tmp_path / "model.safetensors"))
    assert load_model(other, tmp_path / "model.safetensors") == (set(), [])
    assert torch.equal(other["b"][0].weight, model["a"].weight)


def test_shapes_in_a_state_dict_are_those_of_every_weight_that_is_stored_alike():
    states = []
    for weight in (torch.ones(37, 100), normal(37, 100), 1e-30 * normal(37, 100), torch.zeros(37, 100)):
        layer = nn.Linear(100, 37)
        layer.weight.data = weight
        states.append(nf4lab.Linear4bit.from_linear(layer, "nf4", 64, True).state_dict())
    states.append(quantized("nf4", 64, True).to("meta").state_dict())  # as a model made before its weights has it
    assert len({tuple((key, part.shape) for key, part in state.items()) for state in states}) == 1
    for state in states[:-1]:
        quantized("nf4", 64, True).load_state_dict(state)


def without(state, key):
    return {name: value for name, value in state.items() if name != key}


# --- what happens to modules


@pytest.mark.parametrize("format", ["nf4", "uniform"])
def test_a_deep_copy_is_equal_and_independent(format):
    layer = quantized(format, 64, True)
    twin, x = copy.deepcopy(layer), normal(4, 100)
    assert torch.equal(twin(x), layer(x))
    assert not {b.data_ptr() for b in twin.buffers()} & {b.data_ptr() for b in layer.buffers()}
    assert twin.layout == layer.layout
    twin.packed.zero_()
    assert not torch.equal(twin(x), layer(x))


IN_ANOTHER_PROCESS = """
import sys, pickle, torch, nf4lab
layer, x, y, name = torch.load(sys.argv[1] + "/layer.pt", weights_only=False)
assert torch.equal(layer(x), y), "unpickled"
assert torch.equal(torch.export.load(sys.argv[1] + "/program.pt2").module()(x), y), "exported"
assert layer.format.name == name
"""


@pytest.mark.parametrize("format", ["nf4", "nvfp4", "one of my own"])
def test_a_layer_and_a_program_made_of_it_run_in_another_process(format, tmp_path):
    mine = nf4lab.Format("one of my own", [-1.0, -0.0, 0.1, 0.7], nf4lab.formats.min_max, ties="up")
    layer, x = quantized(mine if format == mine.name else format, double_quant=format != "nvfp4"), normal(4, 100)
    program = torch.export.export(nn.Sequential(layer), (x,))
    torch.export.save(program, tmp_path / "program.pt2")
    torch.save((layer, x, layer(x), format), tmp_path / "layer.pt")
    subprocess.run([sys.executable, "-c", IN_ANOTHER_PROCESS, str(tmp_path)], check=True, timeout=3600)


def test_a_layout_says_all_that_the_tensors_do_not():
    for row in STORED:
        q = quantized(*row.values[:1], 32, row.values[1]).quantized
        q = dataclasses.replace(q, shape=torch.Size(q.shape))
        again = layout.rebuilt(list(layout.tensors_of(q).values()), layout.layout_of(q), q.dtype)
        assert layout.layout_of(again) == layout.layout_of(q)
        assert torch.equal(again.dequantize(), q.dequantize())
        assert again.format is q.format or q.format is OWN
    with pytest.raises(ValueError, match="a function that was not sent along"):
        nf4lab.quantize(normal(64), layout.rebuilt(quantized(OWN).stored(), quantized(OWN).layout).format)


def test_layers_of_one_layout_share_its_name_and_others_do_not():
    def names():
        return {quantized(row.values[0], size, row.values[1]).layout for row in STORED for size in (32, 64)}

    assert len(names()) == 2 * len(STORED)
    assert names() == names()
    renamed = nf4lab.Format("nf4", nf4lab.codebooks.fp4())
    assert quantized(renamed).layout != quantized("nf4").layout


# --- what is prepared once, and when it is prepared again

CHANGES = {
    "moved": lambda layer, other: layer.to("cpu", torch.bfloat16).float(),
    "loaded": lambda layer, other: layer.load_state_dict(other.state_dict()),
    "assigned": lambda layer, other: layer.load_state_dict(other.state_dict(), assign=True),
    "written to": lambda layer, other: [a.copy_(b) for a, b in zip(layer.stored(), other.stored(), strict=True)],
    "data set": lambda layer, other: [
        setattr(a, "data", b.clone()) for a, b in zip(layer.stored(), other.stored(), strict=True)
    ],
    "buffers set": lambda layer, other: [setattr(layer, name, getattr(other, name)) for name in layer.stored_names],
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_a_call_sees_every_change_of_the_weight(change, double_quant, device):
    other = nf4lab.Linear4bit.from_linear(nn.Linear(100, 37), "nf4", 64, double_quant).to(device)
    layer = quantized("nf4", 64, double_quant, device=device)
    for rows in (3, 100):
        x = normal(rows, 100, device=device)
        layer(x)
        CHANGES[change](layer, other) if change != "moved" or device == "cpu" else layer.cpu().cuda()
        assert torch.equal(layer(x), torch.ops.nf4lab.linear(x, layer.stored(), layer.bias, layer.layout))
        expected = F.linear(x, layer.weight, layer.bias)
        torch.testing.assert_close(layer(x), expected)
        assert change == "moved" or torch.equal(layer.weight, other.weight)


def test_what_is_prepared_goes_with_the_tensors_and_keeps_none_alive():
    gc.collect()
    before = len(prepared._known)
    layer, x = quantized("nf4", 64, True), normal(3, 100)
    layer(x)
    layer(x.double())
    assert len(prepared._known) == before + 2
    packed = weakref.ref(layer.packed)
    layer.to("meta")
    assert packed() is None and len(prepared._known) == before
    assert "prepared" not in str(vars(quantized()))  # so that copies and pickles hold only the weight


def test_calls_from_several_threads_prepare_and_compute_the_same():
    layers = [quantized("nf4", 64, True) for _ in range(8)]
    x, found = normal(3, 100), []
    expected = layers[0](x)
    work = [threading.Thread(target=lambda layer=layer: found.append(layer(x))) for layer in layers for _ in range(4)]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    assert len(found) == 32 and all(torch.equal(y, expected) for y in found)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [3, 100])
def test_whoever_has_to_see_an_op_sees_one_and_gets_the_same_bits(rows, device):
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    layer, x = quantized("nf4", 64, True, device=device), normal(rows, 100, device=device)
    expected = layer(x)
    with torch.no_grad(), Watch():
        assert torch.equal(layer(x), expected)
    assert "linear" in seen
    assert torch.equal(torch.jit.trace(layer, x)(x), expected)
    assert torch.equal(torch.func.functional_call(layer, {}, x), expected)
    assert torch.equal(layer((-x)._neg_view()), expected)
    with_grad, ones = x.clone().requires_grad_(), torch.ones_like(expected)
    (grad,) = torch.autograd.grad(layer(with_grad), with_grad, ones)
    value, pull = torch.func.vjp(layer, x)
    _, push = torch.func.jvp(layer, (x,), (x,))
    close = torch.testing.assert_close  # on a GPU these few rows would go another way
    for mine, theirs in ((value, expected), (pull(ones)[0], grad), (torch.func.vmap(layer)(x), expected)):
        assert torch.equal(mine, theirs) if device == "cpu" and rows > 3 else close(mine, theirs) is None
    close(push, expected - layer.bias)
    batched = torch.autograd.grad(layer(with_grad), with_grad, ones.expand(2, -1, -1), is_grads_batched=True)[0]
    close(batched[1], grad)


@pytest.mark.parametrize(("format", "double_quant"), [("nf4", True), ("uniform", True), ("nvfp4", False)])
def test_torch_func_maps_over_a_stack_of_layers(format, double_quant):
    layers = [nf4lab.Linear4bit.from_linear(plain(), format, 64, double_quant) for _ in range(3)]
    for k, layer in enumerate(layers):
        layer.packed.add_(k)
    state, x = torch.func.stack_module_state(layers), normal(4, 100)
    base = copy.deepcopy(layers[0]).to("meta")
    y = torch.vmap(lambda state, x: torch.func.functional_call(base, state, x), (0, None))(state, x)
    torch.testing.assert_close(y, torch.stack([layer(x) for layer in layers]))


def test_a_weight_is_read_inside_torch_funcs_transforms():
    layers = [quantized("nf4", 64, True), nf4lab.Linear4bit.from_linear(plain(), "nf4", 64, True)]
    layers[1].packed.add_(1)
    x = normal(4, 100)
    mapped = torch.vmap(lambda row: row @ layers[0].weight.T + layers[0].weight[:, 0])(x)
    torch.testing.assert_close(mapped, x @ layers[0].weight.T + layers[0].weight[:, 0])
    state = torch.func.stack_module_state(layers)
    reader = nn.Sequential(layers[0])
    reader.forward = lambda x: x @ reader[0].weight.T
    names = [{f"0.{name}": value for name, value in part.items()} for part in state]
    both = torch.vmap(lambda state: torch.func.functional_call(reader, state, x))(names)
    torch.testing.assert_close(both, torch.stack([x @ layer.weight.T for layer in layers]))
    grad = torch.func.grad(lambda x: (x @ layers[0].weight.T).sum())(x)
    torch.testing.assert_close(grad, layers[0].weight.sum(dim=0).expand(4, -1))


@pytest.mark.parametrize("adapted", [False, True])
def test_forward_mode_and_second_derivatives_are_those_of_the_plain_layer(adapted):
    layer = quantized("nf4", 64, True)
    reference = layer.to_linear()
    if adapted:
        layer = nf4lab.LoRALinear(layer)
    x, direction = normal(3, 100), normal(3, 100, seed=4)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, direction)
        mine, theirs = (torch.autograd.forward_ad.unpack_dual(f(dual)).tangent for f in (layer, reference))
    torch.testing.assert_close(mine, theirs)
    hessians = [torch.func.hessian(lambda x, f=f: f(x).square().sum())(x[0]) for f in (layer, reference)]
    torch.testing.assert_close(*hessians)
    jacobian = torch.autograd.functional.jacobian
    ways = [{"strategy": way, "vectorize": True} for way in ("forward-mode", "reverse-mode")]
    for way in ways:
        torch.testing.assert_close(jacobian(layer, x[0], **way), reference.weight.detach())


def test_torchs_counter_of_operations_counts_a_4_bit_product_as_a_frozen_plain_one():
    from torch.utils.flop_counter import FlopCounterMode

    layer = quantized("nf4", 64, True)
    counts = []
    for each in (layer, layer.to_linear().requires_grad_(False)):
        with FlopCounterMode(display=False) as counter:
            each(normal(2, 3, 100).requires_grad_()).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 2 * (2 * 6 * 100 * 37)  # forward and backward


@pytest.mark.parametrize("kind", [torch.jagged, torch.strided])
@pytest.mark.filterwarnings("ignore:.*nested tensors")
def test_rows_of_a_nested_tensor_are_multiplied_and_differentiated(kind):
    layer = quantized("nf4", 64, True)
    parts = [normal(rows, 100, seed=rows) for rows in (2, 3)]
    x = torch.nested.nested_tensor(parts, layout=kind, requires_grad=True)
    y = layer(x)
    for part, found in zip(parts, y.unbind(), strict=True):
        torch.testing.assert_close(found, layer(part))
    sum(found.sum() for found in y.unbind()).backward()
    torch.testing.assert_close(torch.cat(x.grad.unbind()), torch.ones(5, 37) @ layer.weight)


def test_torchs_pipelining_cuts_a_4_bit_model_into_stages():
    from torch.distributed.pipelining import SplitPoint, pipeline

    model = nn.Sequential(quantized("nf4", 64, True), nn.Linear(37, 100), quantized("uniform", 32, True))
    x = normal(4, 100)
    stages = pipeline(model, (x,), split_spec={"2": SplitPoint.BEGINNING})
    assert torch.equal(stages.get_stage_module(1)(stages.get_stage_module(0)(x)), model(x))


@pytest.mark.parametrize("device", DEVICES)
def test_inputs_of_every_kind_give_the_bits_of_a_plain_one(device):
    layer, x = quantized("nf4", 64, True, device=device), normal(6, 100, device=device)
    expected = layer(x)
    shifted = torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(6, 100)  # starts off a 16-byte boundary
    for same in (x.t().contiguous().t(), shifted, nn.Parameter(x), x.clone().requires_grad_()):
        on_cpu = F.linear(same, layer.weight, layer.bias)  # torch's sums depend on how x lies in memory, there
        assert torch.equal(layer(same), on_cpu if device == "cpu" else expected)
    assert torch.equal(layer(x.reshape(2, 3, 100)), expected.reshape(2, 3, 37))
    assert torch.equal(layer(x[0]), layer(x[:1])[0])
    with torch.inference_mode():
        assert torch.equal(layer(x), expected)


@needs_cuda
def test_one_dequantized_matrix_is_alive_at_a_time():
    layers = nn.Sequential(*(quantized_square(1024) for _ in range(8)))
    x = normal(2048, 1024, dtype=torch.bfloat16, device="cuda").requires_grad_()
    layers(x).sum().backward()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    with torch.no_grad():
        y = layers(x)
    of_activations = 2 * y.nbytes
    assert torch.cuda.max_memory_allocated() - start <= of_activations + 2 * 1024 * 1024 + 2**21


def quantized_square(n):
    layer = nn.Linear(n, n, bias=False, dtype=torch.bfloat16, device="cuda")
    return nf4lab.Linear4bit.from_linear(layer, "nf4", 64, True)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_gradients(reentrant, double_quant):
    model = nn.Sequential(quantized("nf4", 64, double_quant), nn.GELU(), nn.Linear(37, 3))
    x = normal(6, 100).requires_grad_()
    gradients = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=reentrant)):
        model.zero_grad()
        x.grad = None
        run(x).square().sum().backward()
        gradients.append([x.grad.clone(), *(p.grad.clone() for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_torch_compile_sees_one_graph_and_gives_the_same_bits(device):
    model = nn.Sequential(quantized("nf4", 64, True, device=device), nn.ReLU(), nn.Linear(37, 3, device=device))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (20, 33):
        x = normal(rows, 100, device=device).requires_grad_()
        expected, y = model(x), compiled(x)
        assert torch.equal(y, expected)
        assert torch.equal(*(torch.autograd.grad(out.sum(), x)[0] for out in (y, expected)))


@pytest.mark.parametrize("device", DEVICES)
def test_torch_compile_takes_autocast_and_a_compute_dtype_without_a_break(device):
    x = normal(20, 100, device=device)
    for layer in (quantized(device=device), quantized(compute_dtype=torch.bfloat16, device=device)):
        torch.compiler.reset()
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        with torch.autocast(device, torch.bfloat16):
            assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("format", ["nf4", "uniform"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_the_ops_keep_the_contracts_of_torch_library(format, double_quant, device):
    layer = quantized(format, 64, double_quant, device=device)
    x, grad = normal(6, 100, device=device), normal(6, 37, device=device)
    for rows in (x, x.clone().requires_grad_(), x[0], x.reshape(2, 3, 100).transpose(0, 1), x[:0]):
        for bias in (layer.bias, None):
            torch.library.opcheck(torch.ops.nf4lab.linear.default, (rows, layer.stored(), bias, layer.layout))
    for rows in (grad, grad.clone().requires_grad_()):
        torch.library.opcheck(torch.ops.nf4lab.linear_input_grad.default, (rows, layer.stored(), layer.layout))
    torch.library.opcheck(torch.ops.nf4lab.dequantize_stored.default, (layer.stored(), layer.layout, torch.bfloat16))


def test_code_that_reads_a_weight_finds_the_dequantized_one():
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(32, 4, 64, dropout=0, batch_first=True).eval()
    reference, x = copy.deepcopy(block), normal(2, 5, 32)
    for row in nf4lab.quantize_model_(block):
        reference.get_submodule(row.name).weight.data = block.get_submodule(row.name).weight
    with torch.no_grad():  # torch's fast path is for plain tensors: sums of 32 products are made in another order
        assert torch.allclose(block(x), reference(x), rtol=0, atol=1e-5)
    # here it reads out_proj's only
    assert torch.allclose(block.train()(x), reference.train()(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "put",
    [
        lambda layer: setattr(layer, "weight", torch.zeros(37, 100)),
        lambda layer: setattr(layer, "weight", nn.Parameter(torch.zeros(37, 100))),
        lambda layer: layer.register_parameter("weight", nn.Parameter(torch.zeros(37, 100))),
        lambda layer: torch.func.functional_call(layer, {"weight": torch.zeros(37, 100)}, normal(3, 100)),
    ],
)
def test_another_weight_is_refused_in_words_and_its_own_is_taken_back(put):
    layer, w_hat = quantized(), quantized().weight
    with pytest.raises(AttributeError, match="a 4-bit layer's weight can't be set: put another layer in its place"):
        put(layer)
    layer.weight = layer.weight  # as PEFT does when it takes its adapters away
    assert torch.equal(layer.weight, w_hat)


@pytest.mark.parametrize(
    ("use", "error", "match"),
    [
        (torch.jit.script, TypeError, "a Linear4bit can't be scripted: use torch.jit.trace or torch.export"),
        (torch.fx.symbolic_trace, torch.fx.proxy.TraceError, "control flow"),
        (lambda model: prune.l1_unstructured(model[0], "weight", 0.5), TypeError, "weight_orig"),
        (lambda model: nn.utils.parametrizations.weight_norm(model[0]), ValueError, "does not have a parameter"),
        (lambda model: nn.utils.parametrizations.orthogonal(model[0]), ValueError, "does not have a parameter"),
        (
            lambda model: torch.func.functional_call(model, model.state_dict(), normal(3, 100)),
            TypeError,
            "is not an instance of torch.nn.Module",
        ),
    ],
)
def test_what_torch_wants_a_parameter_for_is_refused_and_the_layer_is_as_it_was(use, error, match):
    model, x = nn.Sequential(quantized()), normal(3, 100)
    before = model(x)
    with pytest.raises(error, match=match):
        use(model)
    assert torch.equal(model(x), before) and not model[0]._forward_pre_hooks
    parts = dict(model.named_parameters()), dict(model.named_buffers())
    assert torch.equal(torch.func.functional_call(model, parts, x), before)


@pytest.mark.parametrize(
    ("how", "storage", "kept"),
    [({}, None, True), ({"use_buffers": True}, None, False), ({}, torch.uint8, False), ({}, torch.float32, False)],
)
def test_averaged_weights_of_a_4_bit_model_keep_its_codes_where_only_what_trains_is_averaged(how, storage, kept):
    from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

    model = nn.Sequential(nf4lab.Linear4bit.from_linear(nn.Linear(64, 64)))
    model[0].packed.copy_(torch.arange(2048).remainder(256))  # every byte there is
    if storage is not None:
        nf4lab.shardable_(model, storage)
    averaged = AveragedModel(model, avg_fn=get_ema_avg_fn(0.9), **how)
    for _ in range(2):
        averaged.update_parameters(model)
    assert torch.equal(averaged.module[0].quantized.packed, model[0].quantized.packed) == kept


def test_back_to_a_plain_layer():
    layer = quantized("nf4", 64, True)
    back, x = layer.to_linear(), normal(4, 100)
    assert type(back) is nn.Linear and back.weight.requires_grad and back.bias is not layer.bias
    assert torch.equal(back(x), layer(x))
    assert layer.to_linear(torch.bfloat16).weight.dtype == torch.bfloat16


def test_the_bias_is_shared_and_the_mode_kept():
    layer = plain().eval()
    q = nf4lab.Linear4bit.from_linear(layer)
    assert q.bias is layer.bias and not q.training
    assert "nf4, block_size=64, bits_per_weight=4.50" in repr(q)


# --- refusals


class Doubled(nn.Linear):
    """A linear layer that computes something else."""

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: nf4lab.Linear4bit(torch.zeros(3, 4)), TypeError, "weight must be a QuantizedTensor; got Tensor"),
        (lambda: nf4lab.Linear4bit(nf4lab.quantize(normal(4))), ValueError, r"in_features\); got \(4,\)"),
        (
            lambda: nf4lab.Linear4bit(nf4lab.quantize(normal(4, 8)), torch.zeros(8)),
            ValueError,
            r"bias must have shape \(4,\); got \(8,\)",
        ),
        (lambda: quantized(compute_dtype=torch.int8), TypeError, "compute_dtype must be float32.*got torch.int8"),
        (lambda: nf4lab.Linear4bit.from_linear(nn.Conv1d(1, 1, 1)), TypeError, "got Conv1d"),
        (lambda: nf4lab.Linear4bit.from_linear(Doubled(3, 4)), TypeError, "got Doubled"),
        (lambda: nf4lab.Linear4bit.from_linear(nn.Linear(3, 4, device="meta")), ValueError, "meta device"),
        (lambda: quantized()(normal(100, 37)), ValueError, r"100 features in its last dimension; got \(100, 37\)"),
        (lambda: quantized()(torch.zeros(3, 100, dtype=torch.int64)), TypeError, "got torch.int64"),
    ],
)  # fmt: skip
def test_mistakes_are_refused_by_name(make, error, match):
    with pytest.raises(error, match=match):
        make()
