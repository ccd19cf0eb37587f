"""The Hadamard transform, random rotations, and folding them into a model."""

import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nf4lab
from nf4lab.beyond.folding import fold_rotation_
from nf4lab.beyond.rotation import RotatedLinear, factor, hadamard, hadamard_matrix, random_signs, rotate, unrotate
from nf4lab.kernels import hadamard as kernels

# Widths of models: MiniLM, Llama 1 to 3, Qwen2 and 3, Mistral, Gemma, TinyLlama
WIDTHS = (384, 1536, 2048, 4096, 5120, 5632, 8192, 11008, 13824, 14336, 28672, 896, 4864, 3584, 18944, 2304, 9216)


@pytest.mark.parametrize("order", [1, 2, 4, 12, 20, 24, 28, 36, 44, 52, 60, 76, 84, 108, 344])
def test_rows_of_a_hadamard_matrix_are_at_right_angles(order):
    matrix = hadamard_matrix(order)
    assert set(matrix.unique().tolist()) <= {-1.0, 1.0}
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order))


@pytest.mark.parametrize("n", [1, 2, 8, 64, 1024])
def test_powers_of_two_give_scipys_matrix(n):
    x = torch.randn(5, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = x @ torch.from_numpy(scipy.linalg.hadamard(n)).double() / n**0.5
    assert torch.allclose(hadamard(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", [12, 24, 40, 96, 112, 384])
def test_other_widths_give_the_kronecker_product(n):
    m = factor(n)
    matrix = torch.kron(hadamard_matrix(m).double(), torch.from_numpy(scipy.linalg.hadamard(n // m)).double())
    x = torch.randn(3, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(hadamard(x), x @ matrix / n**0.5, rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", WIDTHS)
def test_the_widths_of_common_models_are_served_and_undone(n):
    x = torch.randn(2, n, generator=torch.Generator().manual_seed(n))
    # Each of log2(n) stages rounds once, relative to values of about the size of x.
    assert torch.allclose(hadamard(hadamard(x), inverse=True), x, rtol=0, atol=2e-5)


@settings(max_examples=30, deadline=None)
@given(k=st.integers(0, 9), m=st.sampled_from([1, 12, 20, 28]), rows=st.integers(0, 5), seed=st.integers(0, 99))
def test_lengths_and_angles_are_kept(k, m, rows, seed):
    x = torch.randn(rows, m << k, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    assert torch.allclose(hadamard(x) @ hadamard(x).T, x @ x.T, rtol=1e-12, atol=1e-10)


def test_every_way_to_make_the_butterflies_gives_the_same_bits():
    x = torch.randn(37, 256, generator=torch.Generator().manual_seed(0))
    in_torch, in_numba = x.clone(), x.clone()
    kernels.by_halves(in_torch)
    kernels.on_the_cpu(in_numba.numpy(), threads=2)
    assert torch.equal(in_torch, in_numba)


def test_sixteen_bit_inputs_are_rounded_once():
    x = torch.randn(4, 96, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(hadamard(x), hadamard(x.float()).bfloat16())


def test_the_gradient_is_the_inverse_transform():
    x = torch.randn(2, 24, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(hadamard, x)
    assert torch.autograd.gradgradcheck(hadamard, x)


@pytest.mark.parametrize("turn", [rotate, unrotate])
@pytest.mark.parametrize("n", [8, 24])
def test_the_gradient_of_a_rotation_is_the_rotation_back(n, turn):
    x, signs = torch.randn(2, n, dtype=torch.float64, requires_grad=True), random_signs(n)
    assert torch.autograd.gradcheck(lambda x: turn(x, signs), x)
    assert torch.autograd.gradgradcheck(lambda x: turn(x, signs), x)


def test_the_input_is_left_as_it_was():
    x = torch.randn(4, 64)
    before = x.clone()
    hadamard(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("n", [3, 6, 92, 172])
def test_a_width_without_a_hadamard_matrix_is_refused(n):
    with pytest.raises(ValueError, match=f"no Hadamard matrix of order {n} is known here; the nearest orders are"):
        hadamard(torch.zeros(2, n))


def test_a_width_whose_least_factor_is_too_large_says_so():
    hadamard_matrix(1040)  # there is one, but multiplied as one it would be no fast transform
    with pytest.raises(
        ValueError, match="order 1040 is known here, of factors up to 1024; the nearest orders are 1032"
    ):
        hadamard(torch.zeros(2, 1040))


def test_a_width_of_nothing_is_refused():
    with pytest.raises(ValueError, match="order 0"):
        hadamard(torch.zeros(2, 0))


def test_integers_lists_and_single_numbers_are_refused():
    with pytest.raises(TypeError, match=r"floating-point torch\.Tensor; got torch\.int64"):
        hadamard(torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"floating-point torch\.Tensor; got list"):
        hadamard([1.0, 2.0])
    with pytest.raises(ValueError, match="got a single number"):
        hadamard(torch.tensor(1.0))


def test_sparse_and_8_bit_inputs_signs_in_a_list_and_what_is_no_layer_are_refused():
    for x in (torch.eye(8).to_sparse(), torch.ones(8).to(torch.float8_e4m3fn)):
        with pytest.raises(TypeError, match="x must be a dense tensor of at least 16 bits; got torch"):
            hadamard(x)
    with pytest.raises(TypeError, match=r"signs must be a torch\.Tensor; got list"):
        rotate(torch.ones(2, 4), [1.0] * 4)
    with pytest.raises(TypeError, match=r"layer must be a torch\.nn\.Linear; got Conv1d"):
        RotatedLinear.from_linear(torch.nn.Conv1d(2, 2, 1))
    with pytest.raises(TypeError, match=r"layer must be a torch\.nn\.Linear; got Other"):
        RotatedLinear.from_linear(type("Other", (torch.nn.Linear,), {"forward": lambda self, x: x})(4, 4))


@pytest.mark.parametrize("order", [0, -4, 3, 92, 2 * (5**4 + 1)])
def test_a_matrix_that_is_not_known_is_refused(order):
    with pytest.raises(ValueError, match=f"no construction of a Hadamard matrix of order {order} is known here"):
        hadamard_matrix(order)


@pytest.mark.parametrize("turn", [rotate, unrotate])
@pytest.mark.parametrize("n", [1, 48])
def test_another_number_of_signs_is_refused(turn, n):
    with pytest.raises(ValueError, match=rf"x of shape \(2, 96\) takes as many signs as its last side; got \({n},\)"):
        turn(torch.zeros(2, 96), torch.ones(n))


def test_a_rotated_layer_refuses_a_width_and_signs_that_do_not_fit():
    with pytest.raises(ValueError, match="no Hadamard matrix of order 92"):
        RotatedLinear.from_linear(torch.nn.Linear(92, 4))
    with pytest.raises(ValueError, match=r"signs must have shape \(96,\); got \(48,\)"):
        RotatedLinear(RotatedLinear.from_linear(torch.nn.Linear(96, 4), "nf4", 32).base, torch.ones(48))


def test_a_rotated_product_is_the_product():
    generator = torch.Generator().manual_seed(0)
    w, x = torch.randn(7, 96, generator=generator).double(), torch.randn(5, 96, generator=generator).double()
    signs = random_signs(96, seed=3)
    assert torch.allclose(rotate(x, signs) @ rotate(w, signs).T, x @ w.T, rtol=0, atol=1e-12)
    assert torch.allclose(unrotate(rotate(w, signs), signs), w, rtol=0, atol=1e-12)


def test_a_giant_is_spread_over_its_row():
    w = torch.zeros(1, 1024)
    w[0, 17] = 32.0
    assert torch.equal(rotate(w, random_signs(1024)).abs(), torch.ones(1, 1024))


def test_a_rotated_layer_computes_with_the_weight_that_it_shows():
    layer = torch.nn.Linear(96, 40)
    rotated = RotatedLinear.from_linear(layer, "nf4", 32)
    x = torch.randn(5, 96)
    # float32 sums of 96 products in another basis
    assert torch.allclose(rotated(x), x @ rotated.weight.T + layer.bias, rtol=0, atol=1e-5)


def test_rotation_helps_a_layer_with_a_giant_in_every_block():
    generator = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(256, 64, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(64, 256, generator=generator))
        layer.weight[:, 5::64] *= 30
    plain = nf4lab.Linear4bit.from_linear(layer)
    rotated = RotatedLinear.from_linear(layer)
    assert nf4lab.mse(layer.weight, rotated.weight) < nf4lab.mse(layer.weight, plain.weight) / 2


def _tiny(kind: str, **changes):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(**{
        "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 6,
        "num_key_value_heads": 3, "vocab_size": 200, **changes,
    })  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and biases as trained ones are: not 1, not 0
                parameter.normal_(1.0, 0.5)
    return model


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("Llama", {}), ("Llama", {"tie_word_embeddings": True}), ("Llama", {"attention_bias": True, "mlp_bias": True}),
     ("Mistral", {}), ("Qwen2", {}), ("Qwen3", {"head_dim": 32})],
)  # fmt: skip
@torch.no_grad()
def test_a_folded_model_gives_the_same_logits(kind, changes):
    model, ids = _tiny(kind, **changes), torch.randint(200, (2, 11))
    before, old = model(ids).logits, model.model.layers[0].mlp.up_proj.weight.clone()
    fold_rotation_(model)
    # float32 through two blocks: a few hundred roundings of 2**-24 relative to logits of about 1
    assert torch.allclose(model(ids).logits, before, rtol=0, atol=1e-5)
    assert not torch.allclose(model.model.layers[0].mlp.up_proj.weight, old)


def test_folding_twice_gives_the_same_logits_too():
    model, ids = _tiny("Llama"), torch.randint(200, (2, 11))
    before = model(ids).logits
    for seed in (0, 5):
        fold_rotation_(model, seed)
    assert torch.allclose(model(ids).logits, before, rtol=0, atol=2e-5)  # twice the roundings of one folding


@pytest.mark.parametrize("kind", ["4 bits", "4 bits, the last block", "adapters"])
def test_a_model_with_layers_of_another_kind_is_refused_and_left(kind):
    model = _tiny("Llama", hidden_size=128, num_attention_heads=8)
    if kind == "adapters":
        nf4lab.add_lora_(model, include="*.up_proj")
    else:
        nf4lab.quantize_model_(model, include="*.1.*_proj" if "last" in kind else "*_proj", progress=False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"mlp\.up_proj as a plain torch\.nn\.Linear"):
        fold_rotation_(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("part", ["lm_head", "embed_tokens"])
@pytest.mark.parametrize("kind", ["4 bits", "adapters"])
def test_a_head_or_an_embedding_of_another_kind_is_refused_and_the_model_left(part, kind):
    model = _tiny("Llama")
    if kind == "4 bits":
        nf4lab.quantize_model_(model, include=f"*{part}", progress=False)
    elif part == "lm_head":
        nf4lab.add_lora_(model, include=part)
    else:
        model.model.embed_tokens = torch.nn.Sequential(model.model.embed_tokens)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"{part} as a plain torch\.nn\."):
        fold_rotation_(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_untied_head_is_said_in_the_config_and_saved():
    model = _tiny("Llama", tie_word_embeddings=True)
    fold_rotation_(model)
    assert not model.config.tie_word_embeddings
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()


@pytest.mark.parametrize(
    ("kind", "changes", "why"),
    [("Gemma", {"head_dim": 16}, "an RMSNorm as GemmaRMSNorm"), ("Mixtral", {}, r"mlp\.gate_proj")],
)
def test_a_model_of_another_kind_is_refused_and_left(kind, changes, why):
    model = _tiny(kind, **changes)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=why):
        fold_rotation_(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_width_that_cannot_be_rotated_leaves_the_model_as_it_was():
    model = _tiny("Llama", num_attention_heads=2, num_key_value_heads=2, head_dim=92)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="no Hadamard matrix of order 92"):
        fold_rotation_(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
