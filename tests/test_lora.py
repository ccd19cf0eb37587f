"""LoRA on a frozen layer: where it starts, what trains, what merging gives, and that PEFT on bitsandbytes agrees."""

import contextlib
import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import nf4lab

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_cuda)]


def normal(*shape, seed=0, **kwargs):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(**kwargs)


def adapted(base=None, rank=4, dtype=torch.float32, **kwargs):
    """An adapter that has learned something: neither factor is zero."""
    torch.manual_seed(0)
    base = base or nf4lab.Linear4bit.from_linear(nn.Linear(100, 37, dtype=dtype), "nf4", 64, True)
    layer = nf4lab.LoRALinear(base, rank, 8, dtype=dtype, **kwargs)
    nn.init.normal_(layer.lora_B, std=0.1)
    return layer


# --- the layer


@pytest.mark.parametrize("device", DEVICES)
def test_training_starts_at_the_frozen_layer(device):
    base = nf4lab.Linear4bit.from_linear(nn.Linear(100, 37, device=device))
    x = normal(20, 100, device=device)
    assert torch.equal(nf4lab.LoRALinear(base)(x), base(x))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("make", [nf4lab.Linear4bit.from_linear, lambda layer: layer])
def test_only_the_two_factors_train(make, device):
    layer = nf4lab.LoRALinear(make(nn.Linear(100, 37, device=device)), rank=4)
    assert {name: tuple(p.shape) for name, p in layer.named_parameters() if p.requires_grad} == {
        "lora_A": (4, 100),
        "lora_B": (37, 4),
    }
    x = normal(20, 100, device=device).requires_grad_()
    layer(x).sum().backward()
    assert layer.base.bias.grad is None
    assert not layer.lora_A.grad.any() and layer.lora_B.grad.any()  # while B is zero, nothing reaches A
    assert x.grad.any()


def test_gradients_of_input_and_factors_agree_with_finite_differences():
    layer = adapted(dtype=torch.float64)
    x = normal(3, 100, dtype=torch.float64).requires_grad_()

    def f(x, a, b):
        return torch.func.functional_call(layer, {"lora_A": a, "lora_B": b}, x)

    assert torch.autograd.gradcheck(f, (x, layer.lora_A, layer.lora_B))
    small = nf4lab.LoRALinear(nf4lab.Linear4bit.from_linear(nn.Linear(5, 4, dtype=torch.float64)), 2, 4, 0, x.dtype)
    few = normal(2, 5, dtype=torch.float64).requires_grad_()
    factors = [nn.init.normal_(factor).detach().requires_grad_() for factor in (small.lora_A, small.lora_B)]

    def g(x, a, b):
        return torch.func.functional_call(small, {"lora_A": a, "lora_B": b}, x)

    assert torch.autograd.gradgradcheck(g, (few, *factors))


def test_the_factors_start_as_in_peft():
    layer = nf4lab.LoRALinear(nf4lab.Linear4bit.from_linear(nn.Linear(4096, 64)), rank=16, alpha=32)
    bound = 1 / math.sqrt(4096)
    assert layer.scaling == 2 and not layer.lora_B.any()
    assert layer.lora_A.abs().max() <= bound
    # of 65,536 uniform values the largest is within 1e-3 of the end but for a chance of exp(-65)
    assert layer.lora_A.abs().max() > 0.999 * bound


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_step_at_once_gives_the_bits_of_autograd_step_by_step(dropout, autocast, device):
    layer = adapted(nf4lab.Linear4bit.from_linear(nn.Linear(100, 37, bias=False)), dropout=dropout).to(device)
    x = normal(2, 9, 100, device=device).requires_grad_()
    grad = normal(2, 9, 37, seed=4, device=device)
    found = []
    for mode in (contextlib.nullcontext(), Watch()):
        torch.manual_seed(5)
        with torch.autocast(device, torch.bfloat16, enabled=autocast), mode:
            y = layer(x)
        found.append([y, *torch.autograd.grad(y, (x, layer.lora_A, layer.lora_B), grad.to(y.dtype))])
    for mine, theirs in zip(*found, strict=True):
        assert torch.equal(mine, theirs)
    assert found[0][0].dtype == (torch.bfloat16 if autocast else torch.float32)


class Watch(TorchDispatchMode):
    """Sees every op, so that no step is hidden from it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_the_last_layer_of_a_checkpointed_block_is_not_multiplied_again():
    from torch.utils.checkpoint import checkpoint

    layers = nn.Sequential(*(adapted(nf4lab.Linear4bit.from_linear(nn.Linear(64, 64, bias=False))) for _ in range(3)))
    x, seen = normal(5, 64).requires_grad_(), []
    for number, layer in enumerate(layers):
        layer.base.register_forward_hook(lambda *args, number=number: seen.append(number))
    checkpoint(layers, x, use_reentrant=False).sum().backward()
    assert seen == [0, 1, 2, 0, 1]


@pytest.mark.parametrize("quantized", [True, False])
def test_merging_gives_one_plain_layer_that_does_the_same(quantized):
    torch.manual_seed(1)
    base = nn.Linear(100, 37, dtype=torch.float64)
    layer = adapted(nf4lab.Linear4bit.from_linear(base, "nf4", 64, True) if quantized else base, dtype=torch.float64)
    merged, x = layer.merge(), normal(20, 100, dtype=torch.float64)
    assert type(merged) is nn.Linear and merged.weight.requires_grad
    assert torch.equal(merged.weight, layer.base.weight + 2 * (layer.lora_B @ layer.lora_A))
    # two orders of summation over at most 100 + 4 products: 104 roundings of 2^-53 of the sum of magnitudes
    size = x.abs() @ (layer.base.weight.abs() + 2 * layer.lora_B.abs() @ layer.lora_A.abs()).T + merged.bias.abs()
    assert ((merged(x) - layer(x)).abs() <= 2 * 104 * 2.0**-53 * size).all()


def test_a_merge_into_16_bits_is_rounded_once():
    layer = adapted(nf4lab.Linear4bit.from_linear(nn.Linear(100, 37, dtype=torch.bfloat16)))
    merged = layer.merge()
    exact = layer.base.quantized.dequantize(torch.float32) + 2 * (layer.lora_B @ layer.lora_A)
    assert torch.equal(merged.weight, exact.to(torch.bfloat16))
    assert merged.bias.dtype == torch.bfloat16


def test_dropout_acts_on_the_adapter_alone_and_only_while_training():
    layer, x = adapted(dropout=0.5), normal(4, 100)
    torch.manual_seed(3)
    first = layer(x)
    assert not torch.equal(first, layer(x))
    assert torch.equal(layer.eval()(x), layer(x))
    torch.nn.init.zeros_(layer.train().lora_B)
    assert torch.equal(layer(x), layer.base(x))


def test_a_model_in_evaluation_gets_adapters_in_evaluation_and_merged_layers_too():
    model, x = network().eval(), normal(5, 64)
    nf4lab.quantize_model_(model)
    for parameter in nf4lab.add_lora_(model, dropout=0.5):
        nn.init.normal_(parameter, std=0.1)
    assert torch.equal(model(x), model(x))
    assert not any(module.training for module in model.modules())
    nf4lab.merge_lora_(model)
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: nf4lab.LoRALinear(nn.Embedding(4, 4)), TypeError, "got Embedding"),
        (lambda: nf4lab.LoRALinear(nn.Linear(4, 4), rank=0), ValueError, "rank must be at least 1 .*; got 0"),
        (lambda: nf4lab.LoRALinear(nn.Linear(4, 4), dropout=1.0), ValueError, r"dropout in \[0, 1\); got 8 and 1.0"),
        (
            lambda: nf4lab.merge_lora_(nn.Sequential(nn.Linear(4, 4))),
            ValueError,
            "no layer of the model has adapters of nf4lab$",
        ),
    ],
)
def test_mistakes_are_refused_by_name(make, error, match):
    with pytest.raises(error, match=match):
        make()


class Tied(nn.Module):
    """A head with the embedding's weight, and a layer of its own."""

    def __init__(self):
        super().__init__()
        self.embed, self.inner, self.head = nn.Embedding(50, 32), nn.Linear(32, 32), nn.Linear(32, 50, bias=False)
        self.head.weight = self.embed.weight


def test_a_layer_whose_weight_something_else_uses_gets_no_adapter_which_could_not_be_merged():
    model = Tied()
    assert len(nf4lab.add_lora_(model)) == 2 and type(model.head) is nn.Linear
    with pytest.raises(ValueError, match="'head': head can't be adapted: its weight is also that of embed"):
        nf4lab.add_lora_(Tied(), include="head")
    nf4lab.merge_lora_(model)
    assert model.head.weight is model.embed.weight


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_code_that_reads_the_weight_of_an_adapted_layer_finds_base_and_adapter(quantized, training):
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(32, 4, 64, dropout=0, batch_first=True).train(training)
    if quantized:
        nf4lab.quantize_model_(block)
    parameters, x = nf4lab.add_lora_(block, rank=4), normal(2, 5, 32)
    for parameter in parameters:
        nn.init.normal_(parameter, std=0.1)
    y = block(x)
    y.square().sum().backward()
    gradient = block.self_attn.out_proj.lora_A.grad
    assert gradient is not None and gradient.any()  # torch multiplies by out_proj's weight and never calls it
    nf4lab.merge_lora_(block)
    torch.testing.assert_close(block(x), y)


@pytest.mark.parametrize("name", ["Llama", "T5"])
def test_a_model_with_adapters_is_quantized_under_them(name):
    pytest.importorskip("transformers")
    from architectures import make, outputs

    model = make(name)
    parameters = nf4lab.add_lora_(model, include="*.[qvo]*")  # of T5 wo too, which transformers keeps in float32
    for parameter in parameters:
        nn.init.normal_(parameter, std=0.1)
    rows, by_hand = nf4lab.quantize_model_(model), copy.deepcopy(model)
    for row in rows:
        by_hand.set_submodule(row.name, by_hand.get_submodule(row.name).to_linear())
    assert sum(row.name.endswith(".base") for row in rows) >= 4
    assert not any(row.name.endswith("wo.base") for row in rows)
    assert [p for p in model.parameters() if p.requires_grad] == parameters
    assert torch.equal(outputs(model), outputs(by_hand))


def test_a_model_with_pefts_adapters_gets_no_others_on_top():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(network(), peft.LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(ValueError, match="model has PEFT's adapters already, which would be frozen"):
        nf4lab.add_lora_(model)
    assert sum(p.requires_grad for p in model.parameters()) == 2


@pytest.mark.parametrize("part", ["0", "0.base"])
def test_a_layer_with_hooks_is_not_merged_which_would_lose_them(part):
    model = network()
    nf4lab.quantize_model_(model)
    nf4lab.add_lora_(model)
    handle = model.get_submodule(part).register_forward_hook(lambda layer, x, y: 2 * y)
    with pytest.raises(ValueError, match=f"layer '{part}' has hooks, which would be lost"):
        nf4lab.merge_lora_(model)
    assert isinstance(model[3], nf4lab.LoRALinear)
    handle.remove()
    nf4lab.merge_lora_(model)


def test_layers_that_accelerate_offloads_are_refused_by_name_and_hooks_that_only_move_inputs_go_along():
    accelerate, model = pytest.importorskip("accelerate"), network()
    nf4lab.quantize_model_(model)
    accelerate.hooks.attach_align_device_hook(model, execution_device="cpu")
    nf4lab.add_lora_(model)
    nf4lab.merge_lora_(model)
    assert model[0]._hf_hook.execution_device == "cpu"
    model = network()
    nf4lab.quantize_model_(model)
    accelerate.cpu_offload(model, execution_device="cpu", offload_buffers=True)
    for act in (nf4lab.add_lora_, nf4lab.shardable_, nf4lab.release_):
        with pytest.raises(ValueError, match=r"layer '0' is offloaded by accelerate: its \(128, 64\) weight is not"):
            act(model)
    assert isinstance(model[0], nf4lab.Linear4bit)


# --- a whole model


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.LayerNorm(128), nn.Linear(128, 64, bias=False))


def test_a_model_gets_adapters_in_place_and_nothing_else_trains():
    model = network()
    nf4lab.quantize_model_(model)
    parameters = nf4lab.add_lora_(model, rank=4, include="0")
    assert isinstance(model[0], nf4lab.LoRALinear) and isinstance(model[3], nf4lab.Linear4bit)
    assert sum(p.numel() for p in parameters) == 4 * (64 + 128)
    assert [id(p) for p in parameters] == [id(p) for p in model.parameters() if p.requires_grad]
    with pytest.raises(ValueError, match="has adapters already"):
        nf4lab.add_lora_(model)


def test_merging_a_model_leaves_plain_layers_where_adapters_were():
    model, x = network().double(), normal(5, 64, dtype=torch.float64)
    nf4lab.quantize_model_(model, exclude="3")
    for parameter in nf4lab.add_lora_(model, dtype=torch.float64):
        nn.init.normal_(parameter, std=0.1)
    before = model(x)
    nf4lab.merge_lora_(model)
    assert [type(layer) for layer in model] == [nn.Linear, nn.GELU, nn.LayerNorm, nn.Linear]
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-12)  # sums of 128 float64 of order 1, two layers


def test_a_model_with_adapters_compiles_to_one_graph_with_the_same_bits():
    model, x = network(), normal(5, 64)
    nf4lab.quantize_model_(model, double_quant=True)
    parameters = nf4lab.add_lora_(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected, y = model(x), compiled(x)
    assert torch.equal(y, expected)
    gradients = [torch.autograd.grad(out.sum(), parameters) for out in (y, expected)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def train(model, parameters, steps=5):
    """Losses and what the parameters came to after some steps of AdamW."""
    optimizer, x, target = torch.optim.AdamW(parameters, lr=1e-2), normal(32, 64), normal(32, 64, seed=1)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, [p.detach().clone() for p in parameters]


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_peft_on_layers_of_bitsandbytes_gives_the_same_losses_and_the_same_adapters(bitsandbytes, quant_type):
    peft = pytest.importorskip("peft")
    from bitsandbytes.nn import Linear4bit

    theirs, ours = network(), network()
    for k in (0, 3):
        plain = theirs[k]
        bias = plain.bias is not None
        layer = Linear4bit(
            plain.in_features, plain.out_features, bias, torch.float32, False, quant_type  # constants not nested
        )  # fmt: skip
        layer.load_state_dict(plain.state_dict())
        theirs[k] = layer.to("cpu")  # quantizes
    assert theirs[0].weight.dtype == torch.uint8
    theirs = peft.get_peft_model(
        theirs, peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=["0", "3"])
    )
    nf4lab.quantize_model_(ours, quant_type)
    parameters = nf4lab.add_lora_(ours, rank=4, alpha=8)
    found = [p for p in theirs.parameters() if p.requires_grad]
    assert [p.shape for p in found] == [p.shape for p in parameters]
    with torch.no_grad():
        for mine, its in zip(parameters, found, strict=True):
            its.copy_(mine)
    (losses, trained), (expected, wanted) = train(ours, parameters), train(theirs, found)
    assert losses == expected and losses[-1] < losses[0]
    assert all(torch.equal(a, b) for a, b in zip(trained, wanted, strict=True))
