"""A whole model in 4 bits: what is swapped, what is left alone, what is refused, and what memory it takes."""

import copy
import pickle
import subprocess
import sys
import textwrap

import numpy as np
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
    with pytest.warns(UserWarning, match="72% of the weights stay as they are: embed "):
        rows = nf4lab.quantize_model_(model)
    assert [row.name for row in rows] == ["first"]
    assert rows.kept == {
        "embed": "embedding",
        "blocks.1.inner.weight": "in a Twice",
        "head": "its weight is also that of embed",
    }
    assert model.head.weight is model.embed.weight
    assert model.first is model.blocks[0]["inner"] and isinstance(model.first, nf4lab.Linear4bit)
    assert type(model.blocks[1]["inner"]) is Twice
    assert type(model.embed) is nn.Embedding and model.embed.weight.dtype == torch.float32
    assert model(ids).shape == (1, 50, 50)


def test_a_second_pass_quantizes_only_what_is_left():
    model = nn.ModuleDict({"first": nn.Linear(32, 32), "second": nn.Linear(32, 32)})
    nf4lab.quantize_model_(model, "nf4", exclude="second")
    assert [row.name for row in nf4lab.quantize_model_(model, "int4", 32)] == ["second"]
    assert model["first"].quantized.format.name == "nf4"


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
    rows = nf4lab.quantize_model_(model, exclude="0.*")
    assert [row.name for row in rows] == ["1"] and rows.kept == {"0.weight": "excluded"}


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
        (
            nn.ModuleDict({"lm_head": nn.Linear(16, 16), "embed": nn.Embedding(4, 16), "more": nn.Embedding(4, 16)}),
            {},
            "of 3, 3 included, 0 excluded; lm_head stays: output head; embed stays: embedding$",
        ),
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


def test_what_is_in_4_bits_already_is_said_where_nothing_is_left_to_do():
    model = nn.ModuleDict({"up": nn.Linear(16, 16), "down": nn.Linear(16, 16), "lm_head": nn.Linear(16, 16)})
    nf4lab.quantize_model_(model)
    stays, already = "lm_head stays: output head", "in nf4lab's 4 bits already: 2"
    with pytest.raises(ValueError, match=f"^no layer is chosen: of 1, 1 included, 0 excluded; {stays}; {already}$"):
        nf4lab.quantize_model_(model)
    with pytest.raises(ValueError, match=f"^no layer of the model is a Linear4bit of bitsandbytes; {already}$"):
        nf4lab.adopt_(model)
    with pytest.raises(ValueError, match=f"^no layer of the model has adapters of nf4lab; {already}$"):
        nf4lab.merge_lora_(model)


@pytest.mark.parametrize(
    "change",
    [
        nf4lab.quantize_model_,
        nf4lab.adopt_,
        nf4lab.release_,
        nf4lab.add_lora_,
        nf4lab.merge_lora_,
        lambda path: nf4lab.load_model_(path, nn.ReLU()),
    ],
)
def test_a_folders_name_is_no_model(change):
    with pytest.raises(TypeError, match=r"^model must be a torch\.nn\.Module; got str$"):
        change("model")


def test_bitsandbytes_layers_are_called_by_their_owner(bitsandbytes):
    from bitsandbytes.nn import Linear4bit

    model = nn.Sequential(Linear4bit(64, 64).to("cpu"))
    already = "in bitsandbytes' 4 bits already: 1"
    with pytest.raises(ValueError, match=f"^no layer is chosen: of 0, 0 included, 0 excluded; {already}$"):
        nf4lab.quantize_model_(model)
    with pytest.raises(ValueError, match=f"^no layer of the model is a Linear4bit of nf4lab; {already}$"):
        nf4lab.release_(model)


def test_a_layer_of_zeros_has_no_error():
    layer = nn.Linear(16, 16)
    layer.weight.data.zero_()
    assert nf4lab.quantize_model_(nn.Sequential(layer))[0].error == 0


def test_long_work_shows_a_bar_and_short_work_does_not(monkeypatch, capsys):
    nf4lab.quantize_model_(nn.Sequential(nn.Linear(16, 16)))
    assert capsys.readouterr().err == ""
    bar = swap.progress_bar
    monkeypatch.setattr(swap, "progress_bar", lambda *args, delay: bar(*args))
    nf4lab.quantize_model_(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)))
    assert "2/2" in capsys.readouterr().err
    nf4lab.quantize_model_(nn.Sequential(nn.Linear(16, 16)), progress=False)
    assert capsys.readouterr().err == ""


def test_beside_a_model_memory_is_needed_for_its_4_bit_copy_and_one_layer():
    # Beside the model: the 4-bit copy of its 3 layers, one layer dequantized, 128 MiB, and the chunks of 2 MiB in which
    # the error is summed, with what the allocator keeps of them: a quarter of a layer is ample.
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
    assert 1 < peak < 1 + 3 * 4.5 / 32 + 1 / 4
    assert freed > 0.75  # of 1 - 4.5 / 32 = 0.86


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA GPU")
def test_on_a_gpu_too_memory_is_needed_for_the_4_bit_copy_and_one_layer():
    model = nn.Sequential(*(nn.Linear(4096, 2304, bias=False, device="cuda") for _ in range(8)))
    layer = model[0].weight.nbytes
    nf4lab.quantize_model_(nn.Sequential(nn.Linear(512, 512, device="cuda")))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    nf4lab.quantize_model_(model)
    assert (
        torch.cuda.max_memory_allocated() - before
    ) / layer < 1 + 8 * 4.5 / 32 + 0.4  # chunks of 2**18 float64, several at once


# --- all or nothing


def broken(kind):
    """A model whose last layer can't be quantized, and what the error says."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    if kind == "nan":
        model[2].weight.data[3, 4] = torch.nan
    elif kind == "meta":
        model[2].to("meta")
    elif kind == "lazy":
        model[2] = nn.LazyLinear(64)
    elif kind == "dtype":
        model[2].weight = nn.Parameter(model[2].weight.to(torch.float8_e4m3fn), requires_grad=False)
    elif kind == "overflow":
        model[2].weight.data.mul_(1e9)  # q4_0 stores scales in float16
    return model


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        ("nan", r"layer '2': x must be finite .* at index \(3, 4\)"),
        ("meta", r"layer '2' is on the meta device: its \(64, 64\) weight is not in memory"),
        ("dtype", r"layer '2': x must be float32"),
        ("lazy", r"layer '2' has no weights yet: run the model once"),
        ("overflow", r"layer '2': a block's scale exceeds torch.float16"),
    ],
)
def test_where_a_layer_fails_it_is_named_and_the_model_is_as_it_was(kind, match):
    model = broken(kind)
    before, weights = list(model), [layer.weight for layer in model]
    with pytest.raises((ValueError, TypeError), match=match):
        nf4lab.quantize_model_(model, "q4_0")
    assert list(model) == before and all(layer.weight is w for layer, w in zip(model, weights, strict=True))


def test_an_interruption_leaves_the_model_as_it_was(monkeypatch):
    model, calls = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), []
    quantize = swap.quantize

    def interrupted(*arguments, **named):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return quantize(*arguments, **named)

    monkeypatch.setattr(swap, "quantize", interrupted)
    with pytest.raises(KeyboardInterrupt):
        nf4lab.quantize_model_(model)
    assert [type(layer) for layer in model] == [nn.Linear, nn.Linear]


# --- what users have


def test_a_pattern_that_names_only_a_tied_head_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="'head': head can't be quantized: its weight is also that of embed"):
        nf4lab.quantize_model_(Tied(), include="head")


def test_the_warning_is_silent_where_a_user_has_excluded_the_rest(recwarn):
    nf4lab.quantize_model_(Tied(), exclude=["embed", "blocks.1.*", "head"])
    assert not recwarn.list


def test_the_table_lists_what_stays_and_its_share():
    with pytest.warns(UserWarning, match="of the weights stay"):
        lines = str(nf4lab.quantize_model_(Tied())).splitlines()
    # 50 x 32 embedded, 32 x 32 in Twice, two biases of 32, and as many weights quantized as in Twice
    assert lines[-4] == f"left as they are, {(1600 + 1024 + 64) / (1600 + 1024 + 64 + 1024):.1%} of the weights:"
    assert "  head: its weight is also that of embed" in lines


@pytest.fixture
def peft_model():
    """A tiny Llama with PEFT's adapters on two kinds of layers, one of them a trained copy."""
    peft, _ = pytest.importorskip("peft"), pytest.importorskip("transformers")
    from architectures import make

    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["o_proj"], init_lora_weights=False)
    return peft.get_peft_model(make("Llama"), config)


def test_adapters_of_peft_stay_and_can_be_trained(peft_model):
    trainable = [name for name, p in peft_model.named_parameters() if p.requires_grad]
    rows = nf4lab.quantize_model_(peft_model)
    assert [name for name, p in peft_model.named_parameters() if p.requires_grad] == trainable
    assert not any("lora_" in row.name or "o_proj" in row.name for row in rows)
    assert any(row.name.endswith("q_proj.base_layer") for row in rows)
    assert rows.kept["base_model.model.model.layers.0.self_attn.q_proj.lora_A.default"] == "adapter"


@pytest.mark.parametrize(("name", "parameter"), [("Mixtral", "mlp.experts.gate_up_proj"), ("Llama", "q_proj.weight")])
def test_parameters_that_peft_adapts_themselves_stay_and_go_on_being_trained(name, parameter):
    peft, _ = pytest.importorskip("peft"), pytest.importorskip("transformers")
    from architectures import make, outputs

    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=[parameter], init_lora_weights=False)
    model = peft.get_peft_model(make(name), config)
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    rows = nf4lab.quantize_model_(model)
    assert list(rows.kept.values()).count("PEFT adapts the parameter itself") == 2
    assert [n for n, p in model.named_parameters() if p.requires_grad] == trainable
    assert len(rows) >= 10 and outputs(model.base_model.model).isfinite().all()


def test_a_layer_with_a_hook_of_accelerate_is_quantized_and_keeps_it():
    accelerate = pytest.importorskip("accelerate")
    model, x = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), torch.randn(3, 64)
    plain = nn.Sequential(*(nn.Linear(64, 64) for _ in range(2)))
    plain.load_state_dict(model.state_dict())
    accelerate.hooks.attach_align_device_hook(model, execution_device="cpu")
    assert len(nf4lab.quantize_model_(model)) == len(nf4lab.quantize_model_(plain)) == 2
    assert model[0]._hf_hook.execution_device == "cpu"
    assert torch.equal(model(x), plain(x))


def test_a_layer_that_accelerate_has_offloaded_is_refused_by_name():
    accelerate = pytest.importorskip("accelerate")
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    accelerate.cpu_offload(model, execution_device="cpu")
    with pytest.raises(ValueError, match="layer '0' is offloaded by accelerate"):
        nf4lab.quantize_model_(model)


@pytest.mark.parametrize("name", ["tied Llama", "T5", "Llama"])
def test_a_quantized_model_ties_its_weights_and_takes_more_tokens(name):
    pytest.importorskip("transformers")
    from architectures import make, outputs

    model = make(name)
    nf4lab.quantize_model_(model)
    before = outputs(model)
    model.tie_weights()
    assert torch.equal(outputs(model), before)
    model.resize_token_embeddings(140)
    after = outputs(model)
    assert after.shape[-1] == 140 and torch.equal(after[..., :128], before)
    if name != "Llama":
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3-MoE"])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_fused_experts_answer_as_with_their_dequantized_weights(name, implementation):
    pytest.importorskip("transformers")
    from architectures import make, outputs

    model, by_hand = make(name), make(name)
    for each in (model, by_hand):
        each.set_experts_implementation(implementation)
    rows = nf4lab.quantize_model_(model, double_quant=True)
    for row in rows:
        w = by_hand.get_parameter(row.name if "experts" in row.name else row.name + ".weight")
        w.data.copy_(nf4lab.quantize(w, double_quant=True).dequantize())
    assert sum("experts" in row.name for row in rows) == 4 and rows.kept_share < 0.2
    assert torch.equal(outputs(model), outputs(by_hand))


@pytest.mark.parametrize("shape", [(4, 32, 64), (3, 5, 7)])  # experts with blocks of their own, and across blocks
@pytest.mark.parametrize("format", ["nf4", "uniform", "nvfp4"])
def test_experts_compile_to_one_graph_and_are_exported_with_the_same_bits(shape, format):
    class Mixture(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Parameter(torch.randn(shape))
            nf4lab.Experts4bit.put(self, "up", nf4lab.Experts4bit(nf4lab.quantize(self.up, format)))

        def forward(self, x):
            one_by_one = sum(x @ self.up[k] for k in (0, 2, -1))
            return one_by_one + torch.einsum("bi,eio->bo", x, self.up) + x @ self.up.transpose(0, 1)[:, 1]

    torch.manual_seed(0)
    torch.compiler.reset()
    model, x = Mixture(), torch.randn(3, shape[1], requires_grad=True)
    expected = model(x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), expected)
    assert torch.equal(*(torch.autograd.grad(f(x).sum(), x)[0] for f in (model, compiled)))
    assert torch.equal(torch.export.export(model, (x,)).module()(x), expected)
    assert torch.equal(model.up[True], model.up.weight[True])
    for k in range(-shape[0], shape[0]):
        assert torch.equal(model.up[k], model.up.weight[k])
    arguments = model.up.stored(), 1, model.up.layout, torch.bfloat16
    torch.library.opcheck(torch.ops.nf4lab.expert.default, arguments)


def test_gpt_2s_transposed_layers_answer_as_with_their_dequantized_weights():
    pytest.importorskip("transformers")
    from architectures import make, outputs

    model, by_hand = make("GPT-2"), make("GPT-2")
    rows = nf4lab.quantize_model_(model)
    for row in rows:
        w = by_hand.get_parameter(row.name + ".weight")
        w.data.copy_(nf4lab.quantize(w.T).dequantize().T)
    assert len(rows) == 8
    assert torch.allclose(outputs(model), outputs(by_hand), atol=1e-5)  # sums of 64 to 256 products in another order


@pytest.mark.parametrize(
    "write",
    [
        lambda layer: layer.weight.data.zero_(),
        lambda layer: layer.weight.zero_(),
        lambda layer: layer.weight.data.copy_(torch.ones(32, 16)),
        lambda layer: layer.weight.__setitem__(0, 1.0),
        lambda layer: layer.weight.data.__iadd__(1),
        lambda layer: torch.add(layer.weight, 1, out=layer.weight),
        lambda layer: setattr(layer.weight, "data", torch.ones(32, 16)),
        lambda layer: layer.weight[0].zero_(),
        lambda layer: layer.weight.data[0].zero_(),
        lambda layer: layer.weight[0].__setitem__(0, 1.0),
        lambda layer: layer.weight.T[1:].mul_(2),
        lambda layer: layer.weight.detach().zero_(),
        lambda layer: layer.weight.chunk(2)[1].fill_(1),
        lambda layer: next(iter(layer.weight)).zero_(),
        lambda layer: torch.transpose(layer.weight, 0, 1).zero_(),
        lambda layer: torch.add(layer.weight[0], 1, out=layer.weight[0]),
        lambda layer: nn.init.normal_(layer.weight),
        lambda layer: nn.init.normal_(tensor=layer.weight[:2]),
        lambda layer: torch._foreach_zero_([layer.weight[0]]),
        lambda layer: nn.functional.relu(layer.weight, inplace=True),
        lambda layer: torch.ops.aten.zero_.default(layer.weight),
        lambda layer: torch.ops.aten.mul_.Tensor(layer.weight[0], layer.weight[0]),
    ],
)
def test_what_is_written_to_a_decoded_weight_is_refused_and_not_lost(write):
    model = nn.Sequential(nn.Linear(16, 32))
    nf4lab.quantize_model_(model)
    before = model[0].weight.clone()
    with pytest.raises(RuntimeError, match="what is written to it would be lost"):
        write(model[0])
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("array_of", [lambda w: w.numpy(), np.asarray, lambda w: w[0].numpy()])
def test_an_array_of_a_decoded_weight_is_not_writeable(array_of):
    model = nn.Sequential(nn.Linear(16, 32))
    nf4lab.quantize_model_(model)
    with pytest.raises(ValueError, match="read-only"):
        array_of(model[0].weight).fill(0)


def test_what_is_made_of_a_decoded_weight_is_plain():
    model = nn.Sequential(nn.Linear(16, 32))
    nf4lab.quantize_model_(model)
    w, x = model[0].weight, torch.randn(3, 16, requires_grad=True)
    for made in (
        w.clone(),
        w + 1,
        w.T @ w,
        nn.functional.linear(x, w),
        copy.deepcopy(w),
        pickle.loads(pickle.dumps(w)),
        w[0].clone(),
        w[:2].half(),
    ):
        assert type(made) is torch.Tensor
    nn.functional.linear(x, w).sum().backward()
    assert torch.allclose(x.grad, w.sum(dim=0).expand(3, -1), atol=1e-6)  # sums of 32 in another order
    w.clone().mul_(2)
