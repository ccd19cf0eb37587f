"""Levels and words learned from weights, and adapters that start where the error is."""

import warnings

import numpy as np
import pytest
import torch

import nf4lab
from nf4lab import models
from nf4lab.beyond.learning import k_means, learn_format, learn_rows, nearest_words, vector_codebook
from nf4lab.formats import FORMATS
from nf4lab.layers.starts import loftq, low_rank, pissa

sklearn_cluster = pytest.importorskip("sklearn.cluster")


@pytest.fixture(scope="module")
def w():
    return torch.randn(16, 256, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def importance():
    return torch.rand(256, generator=torch.Generator().manual_seed(1)) ** 4 + 0.01


def sklearn_levels(points: torch.Tensor, weight: torch.Tensor) -> np.ndarray:
    start = FORMATS["nf4"].levels.double().numpy()[:, None]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a level that nothing is rounded to
        found = sklearn_cluster.KMeans(16, init=start, n_init=1, max_iter=2000, tol=0, algorithm="lloyd").fit(
            points.reshape(-1, 1).double().numpy(), sample_weight=weight.reshape(-1).double().numpy()
        )
    return np.sort(found.cluster_centers_[:, 0])


@pytest.mark.parametrize("weighted", [False, True])
def test_learned_levels_equal_scikit_learns(w, importance, weighted):
    absmax = w.reshape(-1, 64).abs().amax(1, keepdim=True)
    counts = (importance if weighted else torch.ones(256)).expand_as(w).reshape(-1, 64) * absmax**2
    expected = sklearn_levels(w.reshape(-1, 64) / absmax, counts)
    format = learn_format(w, 64, importance if weighted else None)
    assert np.abs(format.levels.double().numpy() - expected).max() < 1e-6  # float32 levels


def test_the_levels_are_those_that_no_further_step_moves():
    w = models.minilm_matrices()["encoder.layer.5.output.dense"]  # not there after 100 steps
    absmax = w.reshape(-1, 64).abs().amax(1, keepdim=True)
    levels = learn_format(w, 64).levels
    again = k_means(
        (w.reshape(-1, 64) / absmax).reshape(1, -1), (absmax**2).expand(-1, 64).reshape(1, -1), levels[None]
    )
    assert (again - levels).abs().max() < 1e-6  # float32 levels


def test_a_table_a_row_is_each_rows_own(w, importance):
    found = learn_rows(w, 64, importance)
    for row in (0, 7):
        alone = learn_rows(w[row : row + 1], 64, importance)
        assert torch.equal(found.tables[row], alone.tables[0])
        assert torch.equal(found.dequantize()[row], alone.dequantize()[0])


def test_learning_lowers_the_error_that_it_is_given(w, importance):
    def error(w_hat, weight):
        return ((w_hat - w).square() * weight).mean().item()

    plain = nf4lab.quantize(w).dequantize()
    for weight in (None, importance):
        counts = 1 if weight is None else weight
        layer = nf4lab.quantize(w, learn_format(w, 64, weight), 64).dequantize()
        rows = learn_rows(w, 64, weight).dequantize()
        assert error(rows, counts) < error(layer, counts) < error(plain, counts)


def test_bits_of_row_tables_count_tables_and_absmax(w):
    assert learn_rows(w, 64).bits_per_weight == 4 + 16 * 16 / 256 + 32 / 64


def test_a_level_that_nothing_is_rounded_to_stays_and_zeros_are_kept():
    levels = k_means(torch.tensor([[0.9, 1.0]]), torch.ones(1, 2), torch.tensor([[-1.0, 1.0]]))
    assert torch.allclose(levels, torch.tensor([[-1.0, 0.95]]))
    assert not learn_rows(torch.zeros(2, 64), 64).dequantize().any()


@pytest.mark.parametrize(
    ("weights", "counts", "message"),
    [
        (torch.full((2, 64), torch.nan), None, "must be finite"),
        (torch.ones(2, 64), -torch.ones(64), "not negative"),
        (torch.ones(2, 64), torch.ones(2), r"weights \(2, 64\) take importance of that shape .*; got \(2,\)"),
        (torch.ones(2, 65), None, "block_size"),
        (torch.ones(128), None, "matrix"),
    ],
)
def test_what_cannot_be_learned_from_is_refused(weights, counts, message):
    with pytest.raises(ValueError, match=message):
        learn_rows(weights, 64, counts)


@pytest.mark.parametrize("learn", [learn_format, learn_rows])
@pytest.mark.parametrize("block_size", [0, -64, 48])
def test_a_block_size_that_does_not_divide_is_refused(learn, block_size):
    with pytest.raises(ValueError, match=f"block_size.* got .*{block_size}"):
        learn(torch.ones(2, 64), block_size)


@pytest.mark.parametrize("learn", [learn_format, learn_rows])
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"w": [1.0]}, TypeError, r"w must be a torch\.Tensor; got list"),
        ({"importance": [1.0] * 64}, TypeError, r"importance must be a torch\.Tensor; got list"),
        ({"block_size": "64"}, TypeError, "block_size must be an int; got '64'"),
        ({"block_size": 64.0}, TypeError, r"block_size must be an int; got 64\.0"),
        ({"n_levels": "16"}, TypeError, "n_levels must be an int; got '16'"),
        ({"n_levels": 1}, ValueError, "n_levels must be from 2 to 256, which a byte can number; got 1"),
        ({"n_levels": 300}, ValueError, "got 300"),
        ({"w": torch.full((2, 64), 3e38)}, ValueError, "more than float32 has: scale it down"),
    ],
)
def test_learning_refuses_what_it_cannot_learn_from_or_number(learn, changes, error, message):
    with pytest.raises(error, match=message):
        learn(**{"w": torch.ones(2, 64), "block_size": 64} | changes)


def test_no_row_has_no_table():
    assert learn_rows(torch.ones(0, 64), 64).dequantize().shape == (0, 64)


def test_the_words_of_points_are_those_of_the_least_distance():
    generator = torch.Generator().manual_seed(0)
    points, words = (torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in (1000, 20))
    assert torch.equal(nearest_words(points, words, at_once=300), torch.cdist(points, words).argmin(dim=1))


@pytest.mark.parametrize(
    ("points", "words", "message"),
    [
        (torch.ones(3, 2), torch.ones(4, 3), r"got \(3, 2\) torch\.float32 and \(4, 3\) torch\.float32"),
        (torch.ones(3, 2), torch.ones(0, 2), r"and \(0, 2\)"),
        (torch.ones(3, 2).half(), torch.ones(4, 2), r"got \(3, 2\) torch\.float16 and"),
        (torch.full((3, 2), torch.nan), torch.ones(4, 2), "points must be finite"),
    ],
)
def test_points_without_a_nearest_word_are_refused(points, words, message):
    with pytest.raises(ValueError, match=message):
        nearest_words(points, words)


def test_words_are_not_made_from_nothing():
    with pytest.raises(TypeError, match=r"points must be a torch\.Tensor; got list"):
        vector_codebook([[1.0, 2.0]])
    with pytest.raises(ValueError, match="finite points, and at least one word; got n_words = 0"):
        vector_codebook(torch.ones(4, 2), 0)
    with pytest.raises(ValueError, match="words take finite points"):
        vector_codebook(torch.full((300, 2), torch.nan))


def test_words_for_pairs_beat_levels_on_normal_weights_and_stay_above_the_limit():
    generator = torch.Generator().manual_seed(0)
    train, fresh = torch.randn(20_000, 2, generator=generator), torch.randn(50_000, 2, generator=generator)
    words = vector_codebook(train)
    error = nf4lab.mse(fresh, words[nearest_words(fresh, words)])
    assert nf4lab.shannon_limit(4) < error < 0.00950100801  # Lloyd-Max, sigma known (published)


def test_too_few_points_for_the_words_are_refused():
    with pytest.raises(ValueError, match=r"256 words take at least as many points \(n, dim\); got \(10, 2\)"):
        vector_codebook(torch.zeros(10, 2))


# --- starts of adapters


def test_the_low_rank_part_is_the_best_of_its_rank(w):
    a, b = low_rank(w, 5)
    rest = torch.linalg.svdvals(w)[5:].square().sum()
    assert torch.allclose((w - b @ a).square().sum(), rest, rtol=1e-5)


@pytest.mark.parametrize("start", [loftq, pissa])
def test_a_start_lowers_the_error_of_the_base_more_with_every_rank(w, start):
    errors = [nf4lab.mse(w, nf4lab.quantize(w).dequantize())]
    for rank in (1, 4, 16):
        base, a, b = start(w, rank, nf4lab.quantize)
        errors.append(nf4lab.mse(w, base.dequantize() + b @ a))
        assert a.shape == (rank, 256) and b.shape == (16, rank)
    assert errors[-1] < 1e-6 or start is pissa
    assert errors == sorted(errors, reverse=True)


def test_pissa_equals_pefts(w):
    peft = pytest.importorskip("peft")
    layer = torch.nn.Linear(256, 16, bias=False)
    layer.weight.data.copy_(w)
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["0"], init_lora_weights="pissa")
    theirs = peft.get_peft_model(torch.nn.Sequential(layer), config).base_model.model[0]
    _, a, b = pissa(w, 4, nf4lab.quantize)
    product = theirs.lora_B["default"].weight @ theirs.lora_A["default"].weight
    assert torch.allclose(product, b @ a, rtol=0, atol=1e-5)  # float32 singular vectors
    assert torch.allclose(theirs.base_layer.weight, w - b @ a, rtol=0, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 4])
def test_loftq_equals_pefts(w, steps, monkeypatch):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    theirs = pytest.importorskip("peft.utils.loftq_utils")
    of_tensors, of_4bit = torch.Tensor.to, bitsandbytes.nn.Params4bit.to  # PEFT asks for a GPU by name

    def here(to):
        return lambda x, *args, **kwargs: to(
            x,
            *("cpu" if a == "cuda" else a for a in args),
            **kwargs | {key: "cpu" for key in kwargs if kwargs[key] == "cuda"},
        )

    monkeypatch.setattr(torch.Tensor, "to", here(of_tensors))
    monkeypatch.setattr(bitsandbytes.nn.Params4bit, "to", here(of_4bit))
    base, a, b = theirs.loftq_init(w, num_bits=4, reduced_rank=4, num_iter=steps)
    ours, ours_a, ours_b = every_step(w, 4, steps)
    same = (base == ours).float().mean()
    # A weight within float32's rounding of a boundary may go either way once a singular vector has been taken off.
    assert same > 0.995
    assert torch.linalg.matrix_norm(b @ a - ours_b @ ours_a) < 0.01 * torch.linalg.matrix_norm(ours_b @ ours_a)


def every_step(w, rank, steps):
    """What LoftQ has after its last step: `loftq` returns the best, which may be an earlier one."""
    found = []

    def quantize(x):
        found.append(nf4lab.quantize(x))
        return found[-1]

    loftq(w, rank, quantize, steps)
    base = found[-1].dequantize()
    return base, *low_rank(w - base, rank)


def test_loftq_never_does_worse_with_more_steps(w):
    errors = [nf4lab.mse(w, q.dequantize() + b @ a) for q, a, b in (loftq(w, 4, nf4lab.quantize, n) for n in (1, 3, 8))]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize(("rank", "shape"), [(0, (16, 256)), (17, (16, 256)), (1, (16,))])
def test_a_rank_that_the_matrix_does_not_have_is_refused(rank, shape):
    with pytest.raises(ValueError, match=f"got {rank} for"):
        loftq(torch.ones(shape), rank, nf4lab.quantize)


@pytest.mark.parametrize("start", [loftq, pissa])
def test_weights_that_are_not_finite_start_nothing(w, start):
    with pytest.raises(ValueError, match="w must be finite to start an adapter from"):
        start(torch.where(w > 3, torch.nan, w), 4, nf4lab.quantize)


def test_fewer_steps_than_one_are_refused(w):
    with pytest.raises(ValueError, match="steps must be at least 1; got 0"):
        loftq(w, 4, nf4lab.quantize, steps=0)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("init", ["loftq", "pissa"])
def test_adapters_start_where_the_error_is(w, init, double_quant):
    model = torch.nn.Sequential(torch.nn.Linear(256, 16))
    model[0].weight.data.copy_(w)
    originals = {name: value.clone() for name, value in model.state_dict().items()}
    nf4lab.quantize_model_(model, "fp4", 32, double_quant)
    plain = model[0].quantized
    trained = nf4lab.add_lora_(model, rank=4, alpha=10, init=init, originals=originals)
    layer = model[0]
    assert [p.shape for p in trained] == [(4, 256), (16, 4)] and not layer.base.bias.requires_grad
    assert layer.base.quantized.bits_per_weight == plain.bits_per_weight and layer.base.quantized.format == plain.format
    assert nf4lab.mse(w, layer.merge().weight) < nf4lab.mse(w, plain.dequantize())
    x = torch.randn(3, 256)
    assert torch.allclose(model(x), x @ layer.merge().weight.T + originals["0.bias"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("init", ["zero", "loftq", "pissa"])
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"alpha": 0}, ValueError, "alpha must be positive and finite: an adapter counts alpha / rank; got 0"),
        ({"alpha": -4.0}, ValueError, r"got -4\.0"),
        ({"alpha": float("nan")}, ValueError, "got nan"),
        ({"rank": 2.5}, TypeError, r"rank must be an int; got 2\.5"),
        ({"rank": "8"}, TypeError, "rank must be an int; got '8'"),
        ({"originals": "weights.safetensors"}, TypeError, "originals must map names to weights, .*; got str"),
    ],
)
def test_an_adapter_that_counts_nothing_or_no_number_leaves_the_model_as_it_was(init, changes, error, message):
    model = torch.nn.Sequential(torch.nn.Linear(256, 16))
    originals = {name: value.clone() for name, value in model.state_dict().items()}
    nf4lab.quantize_model_(model)
    with pytest.raises(error, match=message):
        nf4lab.add_lora_(model, **{"init": init, "originals": originals} | changes)
    assert isinstance(model[0], nf4lab.Linear4bit) and model[0].bias.requires_grad


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init": "pissa", "originals": {"0.weight": [[1.0]]}}, r"got \('list',\)"),
        ({"init": "gaussian"}, "init must be 'zero', 'loftq', 'pissa'; got 'gaussian'"),
        ({"init": "loftq"}, r"needs an original '0.weight' of shape \(16, 256\); got none"),
        ({"init": "pissa", "originals": {"0.weight": torch.ones(2, 2)}}, r"got \(2, 2\)"),
        ({"init": "pissa", "originals": {"0.weight": torch.full((16, 256), torch.nan)}}, "layer '0': w must be finite"),
        ({"init": "loftq", "originals": {"0.weight": torch.ones(16, 256)}, "rank": 17}, "layer '0': rank must lie"),
    ],
)
def test_starts_that_cannot_be_made_leave_the_model_as_it_was(changes, message):
    model = torch.nn.Sequential(torch.nn.Linear(256, 16))
    nf4lab.quantize_model_(model)
    with pytest.raises(ValueError, match=message):
        nf4lab.add_lora_(model, **changes)
    assert isinstance(model[0], nf4lab.Linear4bit)
    with pytest.raises(ValueError, match="starts from a 4-bit base; layer '0' is a Linear"):
        nf4lab.add_lora_(torch.nn.Sequential(torch.nn.Linear(4, 4)), init="pissa", originals={})
