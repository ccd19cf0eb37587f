"""Lab 5: the master earns every point, and each likely mistake loses its own points and is named.

A submission is the master with a text of one question replaced; the checks are called in this process. An answer that
others build on costs no points there: a stand-in takes its place. Only the run of all parts together feels it.
"""

import re

import masters
import pytest
import torch

pytest.importorskip("glassllm")
lab5 = pytest.importorskip("nf4lab.labs.lab5", exc_type=ImportError)

MISTAKES = [  # (what the mistake is called, question, {old: new}, points lost of the question's, message)
    ("memory counted twice", "q1", {"sum(storages.values())": "sum(t.nbytes for t in kept)"}, 3, "counted twice"),
    ("elements counted", "q1", {"sum(storages.values())": "sum(storages.values()) // 4"}, 3, "elements were counted"),
    ("result counted", "q1", {"        f(x)": "        kept.append(f(x).clone())"}, 3, "counts the result too"),
    ("outside the hooks", "q1", {"        f(x)": "        pass\n    f(x)"}, 3, "f must run inside"),
    ("a fixed size", "q1", {"sum(storages.values())": "4 * x.numel() or sum(storages.values())"}, 3, "x \\+ 1"),
    (
        "W for its transpose",
        "q2",
        {"shape, x.dtype).T": "shape, x.dtype)"},
        9,
        "y = x W_hat\\^T|`apply` ended in RuntimeError|backward pass ended",
    ),
    ("transpose in backward", "q2", {"grad.dtype), None": "grad.dtype).T, None"}, 7, "grad W_hat|backward pass ended"),
    (
        "W_hat saved",
        "q2",
        {
            "_backward(packed, absmax)": "_backward(packed, absmax, decode(packed, absmax, shape, x.dtype))",
            "packed, absmax = ctx.saved_tensors": "packed, absmax = ctx.saved_tensors[:2]",
        },
        3,
        "W_hat is kept",
    ),
    (
        "x saved",
        "q2",
        {
            "ctx.save_for_backward(packed, absmax)": "ctx.save_for_backward(packed, absmax, x)",
            "packed, absmax = ctx.saved_tensors": "packed, absmax = ctx.saved_tensors[:2]",
        },
        3,
        "x is kept",
    ),
    (
        "W_hat in ctx",
        "q2",
        {"ctx.shape = shape": "ctx.shape, ctx.w_hat = shape, decode(packed, absmax, shape, x.dtype)"},
        3,
        "W_hat is kept",
    ),
    ("grad alone", "q2", {", None, None, None": ""}, 7, "a value for each argument of forward after ctx"),
    (
        "no gradient",
        "q2",
        {"return grad @ decode(packed, absmax, ctx.shape, grad.dtype)": "return None"},
        7,
        "x got no gradient",
    ),
    ("always float32", "q2", {"ctx.shape, grad.dtype)": "ctx.shape, torch.float32)"}, 4, "BFloat16"),
    ("always float32 forward", "q2", {"shape, x.dtype)": "shape, torch.float32)"}, 6, "dtype|BFloat16"),
    (
        "layer kept",
        "q3",
        {'self.register_buffer("packed"': 'self.layer = layer\n        self.register_buffer("packed"'},
        4,
        "has parameters: layer.weight",
    ),
    (
        "plain attributes",
        "q3",
        {'self.register_buffer("packed", q.packed)': "self.packed = q.packed"},
        4,
        "use register_buffer",
    ),
    (
        "not saved",
        "q3",
        {'self.register_buffer("packed", q.packed)': 'self.register_buffer("packed", q.packed, persistent=False)'},
        4,
        "persistent=False",
    ),
    (
        "float copy in a buffer",
        "q3",
        {"q = nf4lab": 'self.register_buffer("w", layer.weight.detach())\n        q = nf4lab'},
        4,
        "a float copy",
    ),
    (
        "float copy in an attribute",
        "q3",
        {'self.register_buffer("packed"': 'self.w = layer.weight.detach()\n        self.register_buffer("packed"'},
        4,
        "still holds 4096 weights: w",
    ),
    (
        "not quantized",
        "q3",
        {"return FourBitMatmul.apply(x, self.packed, self.absmax, shape)": "return x @ self.w.T"},
        4,
        "no attribute 'w'",
    ),
    (
        "no sizes",
        "q3",
        {"self.out_features, self.in_features = layer.weight.shape": "self.shape = layer.weight.shape"},
        4,
        "out_features",
    ),
    ("B at random", "q4", {"torch.zeros(n_out, r)": "torch.randn(n_out, r)"}, 6, "B must start at zero"),
    (
        "A and B at zero",
        "q4",
        {"torch.randn(r, n_in) / n_in**0.5": "torch.zeros(r, n_in)"},
        6,
        "each one's gradient is zero",
    ),
    ("A too large", "q4", {"torch.randn(r, n_in) / n_in**0.5": "torch.randn(r, n_in)"}, 6, "standard deviation near"),
    ("no factor", "q4", {"self.scale = alpha / r": "self.scale = 1.0"}, 6, "that factor is missing"),
    ("inverse factor", "q4", {"self.scale = alpha / r": "self.scale = r / alpha"}, 6, "r / alpha is its inverse"),
    ("alpha alone", "q4", {"self.scale = alpha / r": "self.scale = alpha"}, 6, "not alpha"),
    ("base left out", "q4", {"self.base(x) + ": ""}, 6, "y before any training"),
    ("base trained", "q4", {"base.requires_grad_(False)": "base"}, 6, "base.requires_grad_\\(False\\) is missing"),
    (
        "A and B the other way round",
        "q4",
        {"torch.zeros(n_out, r)": "torch.zeros(r, n_out)"},
        6,
        "RuntimeError|should have shape",
    ),
    (
        "tensors, no parameters",
        "q4",
        {"nn.Parameter(torch.zeros(n_out, r))": "torch.zeros(n_out, r)"},
        6,
        "should be A and B; got A",
    ),
    (
        "only children",
        "q5",
        {"model.named_modules() if": "model.named_children() if"},
        5,
        "named_children goes only one level",
    ),
    ("frozen afterwards", "q5", {"    model.requires_grad_(False)\n": ""}, 5, "Freeze the whole model before"),
    (
        "embeddings too",
        "q5",
        {"type(module) is nn.Linear": "isinstance(module, (nn.Linear, nn.Embedding))"},
        5,
        "it takes an nn.Linear",
    ),
    (
        "not put in place",
        "q5",
        {"setattr(model.get_submodule(parent), child, make(layer))": "make(layer)"},
        5,
        "4 of 4 nn.Linear layers are still there",
    ),
    ("no buffers", "q6", {" + sum(b.nbytes for b in model.buffers())": ""}, 3, "packed weights are buffers"),
    ("no optimizer", "q6", {"4 * trains": "trains"}, 3, "four times its bytes"),
    ("one moment", "q6", {"4 * trains": "3 * trains"}, 3, "Adam keeps two moments"),
    ("no moments", "q6", {"4 * trains": "2 * trains"}, 3, "two moments are missing"),
    ("all frozen", "q6", {"if not p.requires_grad)": ")"}, 3, "counted as frozen too"),
    ("elements", "q6", {"trains = sum(p.nbytes": "trains = sum(p.numel()"}, 3, "elements are not bytes"),
    ("not shifted", "q7", {"ids[:, 1:].flatten()": "ids[:, :-1].flatten()"}, 10, "targets are not shifted"),
    ("gradients add up", "q7", {"        optimizer.zero_grad()\n": ""}, 7, "zero_grad is missing"),
    ("no step", "q7", {"        optimizer.step()\n": ""}, 10, "did not learn"),
    ("plain gradient descent", "q7", {"torch.optim.Adam(": "torch.optim.SGD("}, 10, "asked for is Adam"),
    (
        "summed loss",
        "q7",
        {"ids[:, 1:].flatten())": 'ids[:, 1:].flatten(), reduction="sum")'},
        7,
        "mean over all tokens",
    ),
    ("last loss only", "q7", {"return losses": "return losses[-1]"}, 7, "list of 4 floats"),
    (
        "all parameters thawed",
        "q7",
        {"    optimizer = ": "    model.requires_grad_(True)\n    optimizer = "},
        7,
        "was frozen, and has changed|uint8",
    ),
]


@pytest.mark.parametrize("seed", [2026, 2027, 8])
def test_the_master_earns_every_point_at_any_seed(seed):
    earned, told = masters.outcome("lab5", masters.run("lab5"), seed=seed)
    assert (earned, told) == (masters.total("lab5"), {}) and earned == 40


def test_the_handout_earns_nothing():
    assert masters.outcome("lab5", masters.run("lab5", changes="handout"))[0] == 0


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda m: f"{m[1]} {m[0]}")
def test_a_likely_mistake_loses_its_points_and_is_named(mistake):
    _, question, changes, lost, message = mistake
    earned, told = masters.outcome("lab5", masters.run("lab5", question, changes), [question])
    assert masters.total("lab5", [question]) - earned == lost, told
    assert told
    for name, text in told.items():
        assert re.search(message, text) or name.endswith("all_parts_together"), text


def test_a_wrong_function_costs_nothing_in_the_layer_that_calls_it():
    env = masters.run("lab5", "q2", {"grad.dtype), None": "grad.dtype).T, None", "x.dtype).T": "x.dtype).T + 1"})
    assert masters.outcome("lab5", env, ["q2", "q3"])[0] == 4


def test_the_log_differs_by_seed_and_batches_keep_the_order():
    assert lab5.ships_log(1, 5) == lab5.ships_log(1, 5) != lab5.ships_log(2, 5)

    class Letters:
        def encode(self, text):
            return [ord(c) for c in text]

    text = lab5.ships_log(1, 50)
    data = lab5.batches(Letters(), text, rows=3, length=9)
    assert data.shape[1:] == (3, 10) and "".join(map(chr, data.flatten().tolist())) == text[: data.numel()]
    assert data.dtype == torch.int64
