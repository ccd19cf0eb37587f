"""Calibration, error feedback and scales from activations."""

import pytest
import torch
from torch import nn

import nf4lab
from nf4lab.backends import feedback
from nf4lab.beyond.calibration import calibrate
from nf4lab.beyond.scaling import activation_scales
from nf4lab.formats import FORMATS
from nf4lab.metrics import output_error


@pytest.fixture(scope="module")
def case():
    """Weights (24, 128) and the second moments of correlated inputs."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1000, 128, generator=generator) @ torch.randn(128, 128, generator=generator)
    return torch.randn(24, 128, generator=generator), x.T @ x / 1000


def optimal_brain_quantization(w, hessian, format, block_size, damping=0.01):
    """The same by the book, in float64: after each weight the inverse loses a row and a column by elimination."""
    w, h = w.double().clone(), hessian.double().clone()
    h += damping * h.diagonal().mean() * torch.eye(len(h))
    inverse = torch.linalg.inv(h)
    codes = torch.zeros(w.shape, dtype=torch.uint8)
    for j in range(w.shape[1]):
        if j % block_size == 0:
            _, _, scale, location = format.constants(w[:, j : j + block_size].float())
        column = w[:, j : j + 1].float()
        codes[:, j] = format.codes_of(column, scale, location)[:, 0]
        value = format.decode(codes[:, j : j + 1], scale, location)[:, 0].double()
        w -= ((w[:, j] - value) / inverse[j, j])[:, None] * inverse[j]
        inverse = inverse - inverse[:, j : j + 1] @ inverse[j : j + 1] / inverse[j, j]
    return codes


@pytest.mark.parametrize("name", ["nf4", "fp4", "uniform", "bof4-s", "mxfp4"])
def test_feedback_equals_optimal_brain_quantization(case, name):
    w, h = case
    codes = nf4lab.quantize(w, name, 32, hessian=h).codes.reshape(w.shape)
    differing = (codes != optimal_brain_quantization(w, h, FORMATS[name], 32)).sum().item()
    # A weight that lies within float32's rounding of a boundary may go either way, and takes its row with it.
    assert differing <= w.shape[1]


@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("name", [*FORMATS, "nf4 searched", "uniform searched"])
def test_the_kernel_gives_the_references_bits(name, block_size):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1000, 128, generator=generator) @ torch.randn(128, 128, generator=generator)
    w = torch.randn(41, 128, generator=generator)
    w[3], w[5, :64] = 0, w[5, :64] * 1e-42  # a row of zeros, and one whose scale has no reciprocal
    w[7, ::3] = -0.0
    format = FORMATS[name.removesuffix(" searched")]
    format = format if name in FORMATS else format.searched()
    parts = [
        feedback.quantize(w.reshape(-1), format, block_size, shape=w.shape, hessian=x.T @ x, kernel=kernel)
        for kernel in (None, "cpu")
    ]
    for reference, kernel in zip(*parts, strict=True):
        assert (reference is None and kernel is None) or torch.equal(reference, kernel)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("name", ["nf4", "fp4", "int4", "uniform", "bof4-s", "mxfp4", "nvfp4", "q4_0", "iq4_nl"])
def test_a_hessian_lowers_the_output_error_of_every_format(case, name, double_quant):
    w, h = case
    if double_quant and FORMATS[name].constants_dtype.itemsize == 1:
        pytest.skip(f"{name} has constants of one byte already")
    plain = nf4lab.quantize(w, name, 32, double_quant)
    corrected = nf4lab.quantize(w, name, 32, double_quant, hessian=h)
    assert corrected.bits_per_weight == plain.bits_per_weight
    assert output_error(w, corrected.dequantize(), h) < 0.8 * output_error(w, plain.dequantize(), h)


def test_corrections_past_the_tensors_scale_are_stored_as_its_greatest():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1000, 128, generator=generator) @ torch.randn(128, 128, generator=generator)
    w = torch.randn(41, 128, generator=generator).clamp(-1.5, 1.5)  # many at the greatest
    q = nf4lab.quantize(w, "nvfp4", 64, hessian=x.T @ x)
    assert q.stored_scale.max() == torch.finfo(torch.float8_e4m3fn).max and q.dequantize().isfinite().all()


def test_uncorrelated_inputs_leave_nothing_to_correct():
    w = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(nf4lab.quantize(w, hessian=torch.eye(64)).packed, nf4lab.quantize(w).packed)


def test_an_input_that_never_occurs_is_rounded_to_nearest(case):
    w, h = case[0], case[1].clone()
    h[5], h[:, 5] = 0, 0
    codes = nf4lab.quantize(w, hessian=h).codes.reshape(w.shape)
    assert torch.equal(codes[:, 5], nf4lab.quantize(w).codes.reshape(w.shape)[:, 5])


def test_the_weights_are_left_as_they_were(case):
    w, h = case[0].clone(), case[1].clone()
    nf4lab.quantize(w, hessian=h)
    assert torch.equal(w, case[0]) and torch.equal(h, case[1])


@pytest.mark.parametrize(
    ("hessian", "error", "message"),
    [
        (torch.eye(64), ValueError, r"take a hessian \(128, 128\); got \(64, 64\)"),
        (torch.full((128, 128), torch.nan), ValueError, "must be finite; 16384 of its values are not"),
        (torch.eye(128) + torch.ones(128, 128).triu(1), ValueError, "must be symmetric; it differs .* by up to 1"),
        (-torch.eye(128), ValueError, "negative diagonal: -1 is not a mean square"),
        (torch.eye(128) + 2 * (1 - torch.eye(128)), ValueError, "not positive definite with damping 0.01"),
        (torch.eye(128).long(), TypeError, "must be a floating-point torch.Tensor; got torch.int64"),
        ([[1.0]], TypeError, "must be a floating-point torch.Tensor; got list"),
    ],
)
def test_what_cannot_be_a_hessian_is_refused(case, hessian, error, message):
    with pytest.raises(error, match=message):
        nf4lab.quantize(case[0], hessian=hessian)


@pytest.mark.parametrize(
    ("hessian", "got"),
    [
        (torch.eye(128).to_sparse(), "torch.sparse_coo, torch.float32"),
        (torch.empty(128, 128, device="meta"), "without data"),
        (torch.eye(128).to(torch.float8_e4m3fn), "torch.strided, torch.float8_e4m3fn"),
    ],
)
def test_a_hessian_that_cannot_be_computed_with_is_refused(case, hessian, got):
    with pytest.raises(TypeError, match=f"hessian must be a dense tensor of at least 16 bits; got one {got}"):
        nf4lab.quantize(case[0], hessian=hessian)


def singular(case):
    """The second moments of fewer inputs than columns: two that always meet, and one that never occurs."""
    x = torch.randn(40, 128, generator=torch.Generator().manual_seed(3))
    x[:, 1], x[:, 5] = x[:, 0], 0
    return x.T @ x / 40


@pytest.mark.parametrize(
    "change",
    [lambda h: h.half(), lambda h: h.bfloat16(), lambda h: h.double(), lambda h: h * 1e-30, lambda h: 1e30 * h.double(),
     lambda h: h.requires_grad_(), lambda h: torch.ones(128, 128), singular],
    ids=["float16", "bfloat16", "float64", "tiny", "huge", "with a gradient", "of rank one", "singular"],
)  # fmt: skip
def test_unusual_hessians_are_served(case, change):
    w, h = case[0], change(case[1].clone())
    corrected = nf4lab.quantize(w, hessian=h).dequantize()
    assert corrected.isfinite().all()
    nearest = nf4lab.quantize(w).dequantize()
    assert output_error(w, corrected, h) < output_error(w, nearest, h)


def test_without_any_input_and_without_weights_codes_are_the_nearest(case):
    w = case[0]
    assert torch.equal(nf4lab.quantize(w, hessian=torch.zeros(128, 128)).packed, nf4lab.quantize(w).packed)
    assert nf4lab.quantize(w[:0], hessian=case[1]).packed.numel() == 0
    with pytest.raises(ValueError, match=r"weights of shape \(0, 128\) take a hessian \(128, 128\); got \(3, 3\)"):
        nf4lab.quantize(w[:0], hessian=torch.eye(3))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA GPU")
def test_a_hessian_goes_to_where_the_weights_are(case):
    w, h = case
    here = nf4lab.quantize(w, hessian=h.cuda())
    assert torch.equal(here.packed, nf4lab.quantize(w, hessian=h).packed)
    assert output_error(w, here.dequantize(), h.cuda()) == output_error(w, here.dequantize(), h)
    assert activation_scales(w, h.cuda(), lambda w: nf4lab.quantize(w).dequantize())[0].device == w.device


def test_hessians_go_to_their_layers_and_a_name_that_no_layer_has_is_refused(case):
    w, h = case
    model = nn.Sequential(nn.Linear(128, 24, bias=False), nn.Linear(24, 128))
    model[0].weight.data.copy_(w)
    with pytest.raises(
        ValueError, match=r"hessians has 'model\.0', which names no matrix of the model; it has '0', '1'"
    ):
        nf4lab.quantize_model_(model, hessians={"model.0": h})
    with pytest.raises(TypeError, match="hessians must be a mapping from names of layers; got Tensor"):
        nf4lab.quantize_model_(model, hessians=h)
    with pytest.raises(ValueError, match=r"layer '1': weights of shape \(128, 24\) take a hessian"):
        nf4lab.quantize_model_(model, hessians={"1": h})
    assert isinstance(model[0], nn.Linear)
    nf4lab.quantize_model_(model, hessians={"0": h})
    assert torch.equal(model[0].quantized.packed, nf4lab.quantize(w, hessian=h).packed)


def test_a_shared_layer_takes_the_hessian_of_any_of_its_names(case):
    w, h = case
    model = nn.Sequential(nn.Linear(128, 24, bias=False))
    model.add_module("again", model[0])
    model[0].weight.data.copy_(w)
    nf4lab.quantize_model_(model, hessians={"again": h})
    assert torch.equal(model[0].quantized.packed, nf4lab.quantize(w, hessian=h).packed)


def test_blocks_that_cross_rows_and_tensors_that_are_no_matrix_are_refused(case):
    with pytest.raises(ValueError, match="block_size must divide the 128 columns; got 256"):
        nf4lab.quantize(*case[:1], block_size=256, hessian=case[1])
    with pytest.raises(ValueError, match=r"a hessian belongs to a matrix \(out, in\); got weights of shape \(3072,\)"):
        nf4lab.quantize(case[0].reshape(-1), hessian=case[1])


def test_weights_that_are_not_finite_are_refused(case):
    w = case[0].clone()
    w[3, 4] = torch.inf
    with pytest.raises(ValueError, match=r"x must be finite in float32; .* at index \(3, 4\)"):
        nf4lab.quantize(w, hessian=case[1])


def test_calibration_gives_the_mean_of_x_x_transposed():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    batches = [torch.randn(4, 6), torch.randn(2, 7, 6)]
    found = calibrate(model, batches)
    rows = torch.cat([b.reshape(-1, 6) for b in batches])
    hidden = model[1](model[0](rows))
    assert list(found) == ["0", "2"]
    # float32 sums of 18 products
    assert torch.allclose(found["0"], rows.T @ rows / 18, rtol=1e-5, atol=1e-6)
    assert torch.allclose(found["2"], hidden.T @ hidden / 18, rtol=1e-5, atol=1e-6)
    assert not model[0]._forward_pre_hooks


def test_batches_come_as_mappings_tuples_or_tensors():
    class Doubled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x, twice=False):
            return self.layer(2 * x if twice else x)

    x = torch.randn(4, 3)
    for batch in ({"x": x, "twice": True}, (x, True), 2 * x):
        assert torch.allclose(calibrate(Doubled(), [batch])["layer"], 4 * x.T @ x / 4)


def test_a_shared_layer_counts_every_use_and_an_unused_one_is_left_out():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model.add_module("again", model[0])
    model.unused, model.forward = nn.Linear(3, 3), lambda x: model[0](model[0](x))
    x = torch.randn(4, 3)
    rows = torch.cat([x, model[0](x)])
    found = calibrate(model, [x])
    assert list(found) == ["0"]
    assert torch.allclose(found["0"], rows.T @ rows / 8, rtol=1e-5, atol=1e-6)


def test_a_conv1d_is_calibrated_and_corrected_as_the_linear_layer_that_it_is():
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    torch.manual_seed(0)
    models = [nn.Sequential(pytorch_utils.Conv1D(32, 64)), nn.Sequential(nn.Linear(64, 32, bias=False))]
    models[1][0].weight = nn.Parameter(models[0][0].weight.detach().T.contiguous())
    plain, x = nf4lab.quantize(models[1][0].weight), torch.randn(500, 64) @ torch.randn(64, 64)
    found = [calibrate(model, [x]) for model in models]
    assert torch.equal(found[0]["0"], found[1]["0"])
    for model, hessians in zip(models, found, strict=True):
        nf4lab.quantize_model_(model, hessians=hessians, progress=False)
    assert torch.equal(models[0][0].packed, models[1][0].packed) and not torch.equal(models[0][0].packed, plain.packed)


def test_no_batch_and_inputs_that_are_not_finite_are_refused():
    model = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(ValueError, match="no batch to calibrate with"):
        calibrate(model, [])
    for one in (torch.ones(4, 3), {"input": torch.ones(4, 3)}, "text"):
        with pytest.raises(TypeError, match=f"got one {type(one).__name__}: put it in a list"):
            calibrate(model, one)
    with pytest.raises(ValueError, match="layer '0' was given an input that is not finite"):
        calibrate(model, [torch.full((1, 3), torch.nan)])
    assert not model[0]._forward_pre_hooks


@pytest.mark.parametrize(
    ("batch", "got"),
    [
        (torch.ones(4, 2), r"torch.float32 \(4, 2\)"), (torch.ones(4, 3).long(), r"torch.int64 \(4, 3\)"),
        (None, "NoneType"), ([1.0, 2.0], "list"), (torch.tensor(1.0), r"torch.float32 \(\)"),
    ],
)  # fmt: skip
def test_what_no_linear_layer_takes_is_refused_by_its_name(batch, got):
    with pytest.raises(ValueError, match=rf"layer '0' takes a floating-point \(…, 3\); it was given {got}"):
        calibrate(nn.Sequential(nn.Linear(3, 2)), [batch])


def test_inputs_whose_squares_overflow_and_what_is_no_model_and_no_batches_are_refused():
    model = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(ValueError, match="layer '0' was given an input that is not finite, or above 1e"):
        calibrate(model, [torch.full((1, 3), 1e30)])
    for nothing in (5, None):
        with pytest.raises(
            TypeError, match=f"batches must be an iterable of batches; got one {type(nothing).__name__}"
        ):
            calibrate(model, nothing)
        with pytest.raises(TypeError, match=f"model must be a torch.nn.Module; got {type(nothing).__name__}"):
            calibrate(nothing, [torch.ones(1, 3)])


def test_the_output_error_is_that_of_the_outputs():
    generator = torch.Generator().manual_seed(0)
    w, x = torch.randn(5, 8, generator=generator).double(), torch.randn(100, 8, generator=generator).double()
    w_hat = w + 0.1 * torch.randn(5, 8, generator=generator).double()
    expected = (x @ (w_hat - w).T).square().mean() / (x @ w.T).square().mean()
    assert output_error(w, w_hat, x.T @ x / 100) == pytest.approx(expected.item(), rel=1e-12)


def test_the_output_error_of_another_shape_is_refused(case):
    with pytest.raises(ValueError, match=r"w_hat must have w's shape \(24, 128\); got \(1, 128\)"):
        output_error(case[0], case[0][:1], case[1])


def test_scales_of_weights_that_come_back_as_no_numbers_are_refused(case):
    with pytest.raises(ValueError, match="not finite, whatever the scales"):
        activation_scales(*case, lambda w: w * torch.nan)


def test_scales_of_weights_that_come_back_in_another_shape_are_refused(case):
    with pytest.raises(ValueError, match=r"rounded must keep the shape \(24, 128\); it gave \(2, 128\)"):
        activation_scales(*case, lambda w: w[:2])


def test_scales_of_a_large_matrix_are_chosen_on_rows_from_all_over_it(case):
    seen = []
    w = torch.arange(4000.0)[:, None].expand(-1, 128)
    activation_scales(w, case[1], lambda w: seen.append(w) or w)
    rows = (seen[0][:, 0] / seen[0][0].abs().max().clamp_min(1)).tolist()
    assert len(seen[0]) == 1536 and seen[0][0, 0] == 0 and rows == sorted(rows)
    assert seen[0][-1, 0] == 3999  # alpha = 0: no scaling


def test_scales_of_inputs_that_are_all_zero_are_ones():
    scales, alpha = activation_scales(
        torch.randn(8, 64), torch.zeros(64, 64), lambda w: nf4lab.quantize(w).dequantize()
    )
    assert torch.equal(scales, torch.ones(64)) and alpha == 0


def test_scales_lower_the_output_error_where_some_inputs_are_large():
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(32, 128, generator=generator)
    x = torch.randn(1000, 128, generator=generator)
    x[:, ::16] *= 30
    hessian = x.T @ x / 1000

    def rounded(w):
        return nf4lab.quantize(w).dequantize()

    scales, alpha = activation_scales(w, hessian, rounded)
    assert 0 < alpha <= 1
    assert (scales.max() * scales.min()).item() == pytest.approx(1, rel=1e-5)
    scaled = output_error(w, rounded(w * scales) / scales, hessian)
    assert scaled < 0.6 * output_error(w, rounded(w), hessian)
