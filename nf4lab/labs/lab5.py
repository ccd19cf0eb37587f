"""What the checks of lab 5 (fine-tuning) compare, and the mistakes that they name.

What a function or a layer does, it does where the student's code lives (`nf4lab.labs.run_layers`); what was found out
there comes here as plain data.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import nf4lab
from nf4lab.labs import feedback, run_layers
from nf4lab.labs.ships_log import batches, held_out_loss, ships_log
from nf4lab.models import language_model

__all__ = ["batches", "held_out_loss", "ships_log"]  # as notebooks of the first edition import them
BLOCK_SIZE = 64
FLOAT32 = 1e-5  # of the largest: sums of some hundred float32 products, in any order
STEPS = 1e-3  # of a loss, after a few steps of Adam, whose first steps carry every rounding of a gradient on
MATMUL = """
class FourBitMatmul:
    @staticmethod
    def apply(x, packed, absmax, shape):
        nf4 = nf4lab.FORMATS["nf4"]
        q = nf4lab.QuantizedTensor(packed, absmax, None, nf4, torch.Size(shape), x.dtype, 64)
        return x @ q.dequantize().T
"""  # stands in for the student's function where another answer is checked: the same values, by autograd itself


# What autograd keeps (questions 1 and 2)


def check_saved_bytes(saved_bytes: Callable, seed: int) -> None:
    """The bytes that autograd keeps for the backward pass of f(x), memory that is shared counted once."""
    generator = torch.Generator().manual_seed(seed)
    n, k = (int(v) for v in torch.randint(20, 60, (2,), generator=generator))
    w = torch.randn(k, n, generator=generator)
    once, twice = 4 * n * n, 8 * n * n
    cases = {  # name: (bytes, what a count of every tensor gives)
        "torch.exp(x)": (once, once), "x + 1": (0, 0), "x @ w.T with a frozen w": (w.nbytes, w.nbytes),
        "x * x": (once, twice), "x * x.T": (once, twice), "torch.exp(x).square()": (once, twice),
    }  # fmt: skip
    with feedback.Cases() as compared:
        for name, (expected, every) in cases.items():
            x = torch.randn(n, n, generator=generator)
            result = 4 * n * (k if "@" in name else n)
            causes = {
                "the same memory was counted twice: tell storages apart by untyped_storage().data_ptr()": every,
                "elements were counted, not bytes: nbytes": expected // 4,
                "that counts the result too, which the caller holds": [expected + result, every + result],
                "nothing was seen: f must run inside `with torch.autograd.graph.saved_tensors_hooks(...)`": 0,
            }
            got = feedback.beside(run_layers.saved, saved_bytes, name, x, w)
            compared.same(got, expected, f"saved_bytes of {name}, x of {n} x {n}", causes)


SHAPES = (((64, 64), (5,), torch.float32), ((24, 83), (2, 3), torch.float32), ((24, 83), (4,), torch.bfloat16))


def check_forward(function: type, seed: int) -> None:
    """x W_hat^T for a square weight, for one whose rows no block divides, for three dimensions and bfloat16."""
    for shape, rows, dtype in SHAPES:
        packed, absmax, w_hat = _weight(shape, seed, dtype)
        x = _one_hot(rows, shape[1], seed, dtype)
        causes = {"multiplied by W_hat; y = x W_hat^T": x @ w_hat if shape[0] == shape[1] else None}
        got = feedback.beside(run_layers.forward, function, x, packed, absmax, shape)
        feedback.same(got, x @ w_hat.T, f"y, for a weight of {shape[0]} x {shape[1]} and x in {_dtype(dtype)},", causes)


def check_backward(function: type, seed: int) -> None:
    """grad @ W_hat, exactly: each row of grad has one entry, so that no sum is rounded; then dense ones."""
    for shape, rows, dtype in SHAPES:
        packed, absmax, w_hat = _weight(shape, seed, dtype)
        x = _normal((*rows, shape[1]), seed, dtype)
        what = f"the gradient of x, for a weight of {shape[0]} x {shape[1]} and x in {_dtype(dtype)},"
        for grad, compare in (
            (_one_hot(rows, shape[0], seed, dtype), feedback.same),
            (_normal((*rows, shape[0]), seed + 2, dtype), _close_in(dtype)),
        ):
            got = feedback.beside(run_layers.backward, function, x, packed, absmax, shape, grad)
            square = shape[0] == shape[1]
            causes = {
                "grad was multiplied by W_hat^T; y = x W_hat^T, so the gradient of x is grad W_hat": (
                    grad @ w_hat.T if square else None
                ),
                "that is grad itself": grad,
            }
            compare(got, grad @ w_hat, what, causes)


def _close_in(dtype: torch.dtype) -> Callable:
    """feedback.close within what another order of adding may change.

    A number in bfloat16 has 8 bits, so its step is up to 2**-7 of it, and sums that differ little round to neighbours.
    """
    tolerance = FLOAT32 if dtype == torch.float32 else 2**-7
    return lambda got, expected, what, causes: feedback.close(got, expected, what, tolerance, causes)


def check_memory(function: type, seed: int) -> None:
    """Between the passes nothing is kept but packed and absmax: not W_hat, and not x."""
    shape = (37, 2 * (seed % 40) + 101)  # an element count that nothing else has
    packed, absmax = _weight(shape, seed, torch.float32)[:2]
    x = _normal((3, shape[1]), seed, torch.float32)
    kept = feedback.beside(run_layers.kept, function, x, packed, absmax, shape)
    text = f"x is kept for the backward pass, {x.nbytes} bytes"
    feedback.that(not kept["x"], text, "only a weight's gradient needs x, and this weight is frozen")
    feedback.that(
        not kept["w_hat"],
        f"W_hat is kept between the passes: {4 * shape[0] * shape[1]:,} bytes, where packed and absmax take "
        f"{packed.nbytes + absmax.nbytes:,}. Decode once for the forward and once more for the backward, and keep "
        f"neither: not by save_for_backward, not in ctx, not in a variable that lives on",
    )
    feedback.that(not kept["others"], f"something else is kept for the backward pass: {', '.join(kept['others'])}")


def _weight(shape: tuple[int, int], seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(packed, absmax, W_hat in dtype) of a random weight."""
    q = nf4lab.quantize(_normal(shape, seed + 1, torch.float32), "nf4", BLOCK_SIZE)
    return q.packed, q.absmax, q.dequantize(dtype)


def _normal(shape: tuple, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _one_hot(rows: tuple, n: int, seed: int, dtype: torch.dtype) -> Tensor:
    """Rows with a single entry, a power of two, so that a product with a matrix is exact in any order of adding."""
    generator = torch.Generator().manual_seed(seed)
    at = torch.randint(n, (*rows, 1), generator=generator)
    powers = 2.0 ** torch.randint(-2, 3, (*rows, 1), generator=generator)
    return torch.zeros(*rows, n).scatter(-1, at, powers).to(dtype)


# Layers (questions 3, 4 and 5)


def check_layer(make: type, seed: int) -> None:
    """Linear4bit: the values of a dequantized layer; buffers, no parameters; no float weight left."""
    for n, k in ((64, 64), (24, 83)):
        weight, x = _normal((n, k), seed, torch.float32), _one_hot((2, 3), k, seed, torch.float32)
        q = nf4lab.quantize(weight, "nf4", BLOCK_SIZE)
        found = feedback.beside(run_layers.layer, make, weight, x, {"FourBitMatmul": MATMUL})
        before = {"that is the layer before it was quantized": x @ weight.T}
        feedback.same(found["y"], x @ q.dequantize().T, f"y of a layer of {k} to {n} features", before)
        _check_storage(found, q)
        feedback.same(found["sizes"], (k, n), "(in_features, out_features)")


def _check_storage(found: dict, q: nf4lab.QuantizedTensor) -> None:
    names = ", ".join(found["parameters"])
    cause = "The weight is frozen: packed and absmax are buffers, and nothing of the nn.Linear is kept"
    feedback.that(not names, f"the layer has parameters: {names}. {cause}")
    text = f"the layer's buffers have {found['buffer_bytes']} bytes; packed and absmax have {q.nbytes}"
    cause = "Plain attributes don't move with .to(device) and aren't in the state_dict: use register_buffer"
    feedback.that(found["buffer_bytes"] >= q.nbytes, f"{text}. {cause}")
    feedback.that(found["buffer_bytes"] == q.nbytes, f"{text}: more than those two is kept, as a float copy would be")
    missing = q.nbytes - found["state_bytes"]
    feedback.that(missing <= 0, f"{missing} bytes of them are not in the state_dict (persistent=False leaves them out)")
    held = ", ".join(found["held"])
    feedback.that(not held, f"the layer still holds {q.numel} weights: {held}. Only packed and absmax are needed")


def check_lora(make: type, seed: int) -> None:
    """LoRA: base(x) + alpha / r * x A^T B^T; zero at the start; A and B train, and nothing else."""
    n, k, r, alpha = 24, 40, 4 + seed % 3, 8
    weight, x = _normal((n, k), seed, torch.float32), _normal((2, 3, k), seed, torch.float32)
    a, b = _normal((r, k), seed + 1, torch.float32), _normal((n, r), seed + 2, torch.float32)
    found = feedback.beside(run_layers.lora, make, weight, r, alpha, x, {"A": a, "B": b})
    trained, names = found["trained"], ", ".join(found["trained"]) or "none"
    feedback.that(
        not found["base_trains"], "base.weight still requires a gradient", "base.requires_grad_(False) is missing"
    )
    feedback.that(set(trained) == {"A", "B"}, f"the parameters to be trained should be A and B; got {names}")
    for name, shape in (("A", (r, k)), ("B", (n, r))):
        text = f"{name} should have shape {shape}; got {tuple(trained[name].shape)}"
        reminder = f"A brings {k} features down to r = {r}, B brings them up to {n}; both are stored (out, in)"
        feedback.that(trained[name].shape == shape, f"{text}. {reminder}")
    zero_a, zero_b = (not bool(trained[name].any()) for name in "AB")
    reminder = "B starts at zero, A at random. With both at zero, each one's gradient is zero, and they stay there"
    feedback.that(not (zero_a and zero_b), f"A and B are both zero. {reminder}")
    y = x @ weight.T
    start = y + alpha / r * (x @ trained["A"].T @ trained["B"].T)
    wrong = {"B must start at zero, so that the layer begins as the one it replaces": None if zero_b else start}
    feedback.close(found["start"], y, "y before any training", FLOAT32, wrong)
    spread = trained["A"].std().item() * k**0.5
    text = f"A should have a standard deviation near {k**-0.5:.3f}; got {trained['A'].std().item():.3f}"
    feedback.that(0.6 < spread < 1.5, text)  # of 160 values and more: seven standard errors either way
    low, scale = x @ a.T @ b.T, alpha / r
    causes = {
        "the product of A and B is multiplied by alpha / r; that factor is missing": y + low,
        "alpha / r is the factor; r / alpha is its inverse": y + low / scale,
        "the factor is alpha / r, not alpha": y + low * alpha,
        "base(x) is missing": scale * low,
        "only base(x) came: A and B are not used": y,
        "base(x) was scaled too": scale * (y + low),
    }
    feedback.close(found["y"], y + scale * low, "y with other A and B", FLOAT32, causes)


def check_adapt(adapt: Callable, seed: int) -> None:
    """Every nn.Linear of a nested model is replaced once; of the rest nothing trains."""
    found = feedback.beside(run_layers.adapted, adapt, bool(seed % 2))
    left, wanted, trained = found["left"], found["wanted"], found["trained"]
    shallow = sorted(name for name in wanted if "." in name)
    cause = ("named_children goes only one level down; layers are inside layers: named_modules",) * (left == shallow)
    text = f"{len(left)} of {len(wanted)} nn.Linear layers are still there: {', '.join(left)}"
    text += ". It is not written yet, or does not put the new ones in place" if left == wanted else ""
    feedback.that(not left, text, *cause)
    extra = ", ".join(name for name in trained if not name.endswith(".factor"))
    feedback.that(not extra, f"these still train: {extra}. Freeze the whole model before the layers are replaced")
    text = f"the parameters of {found['made'] - len(trained)} new layers don't train. Freeze the model first"
    feedback.that(len(trained) == found["made"], text)


def check_training_bytes(training_bytes: Callable, seed: int) -> None:
    """(frozen, trained): bytes at rest, and bytes of what trains with its gradient and Adam's two moments."""
    r = 2 + seed % 5
    with feedback.Cases() as compared:
        for name, model in run_layers.models(r).items():
            trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
            buffers = sum(b.nbytes for b in model.buffers())
            rest = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
            frozen = rest + buffers
            causes = {
                "buffers are frozen too: packed weights are buffers": (rest, 4 * trained),
                "what trains has a gradient and Adam's two moments too: four times its bytes": (frozen, trained),
                "elements are not bytes": [(frozen, trained // 4), (frozen, trained), (frozen // 4, trained)],
                "Adam keeps two moments of each parameter": (frozen, 3 * trained),
                "Adam's two moments are missing": (frozen, 2 * trained),
                "what is frozen has neither gradient nor moments": (4 * frozen, 4 * trained),
                "what trains was counted as frozen too": (frozen + trained, 4 * trained),
                "frozen comes first, then what trains": (4 * trained, frozen),
            }
            got = feedback.beside(run_layers.counted, training_bytes, r, name)
            compared.same(got, (frozen, 4 * trained), f"training_bytes of a model ({name})", causes)


# Training (question 7)


def check_finetune(finetune: Callable, seed: int, lr: float = 5e-3) -> None:
    """The losses of a few steps of Adam on the language model with its query projections trained."""
    tokenizer = language_model()[1]
    data = batches(tokenizer, ships_log(seed, 60), rows=4, length=24)[:4]
    found = feedback.beside(run_layers.finetuned, finetune, data, lr)
    got, text = found["losses"], f"finetune must return a list of {len(data)} floats, the loss of each batch"
    losses = torch.tensor([feedback.number(v, text) for v in feedback.pair(got, len(data), text)])
    for name in found["changed"]:
        feedback.that(False, f"{name} was frozen, and has changed")
    for name in found["gradients"]:
        feedback.that(False, f"{name} was frozen, and has a gradient")
    mistakes = {
        "the model did not learn: does the optimizer have its parameters, and is step() called?": {"lr": 0.0},
        "the targets are not shifted: the logits at position t predict the token at t + 1": {"shift": 0},
        "gradients add up from step to step: zero_grad is missing": {"add_up": True},
        "plain gradient steps; asked for is Adam": {"adam": False},
        "that is the loss after each step": {"after": True},
        "the loss is the mean over all tokens, not their sum": {"total": True},
    }
    causes = {
        text: lambda got, how=how: torch.allclose(got, torch.tensor(_losses(data, **{"lr": lr, **how})), rtol=STEPS)
        for text, how in mistakes.items()
    }
    feedback.close(losses, torch.tensor(_losses(data, lr)), "losses", STEPS, causes)


def _losses(data: Tensor, lr: float, shift: int = 1, add_up=False, adam=True, after=False, total=False) -> list[float]:
    """The losses that a submission reports: Adam by its formulas (Kingma and Ba, algorithm 1), or a mistake instead."""
    model, losses = run_layers.partly_frozen(), []
    trained = [p for p in model.parameters() if p.requires_grad]
    sums, first, second = ([torch.zeros_like(p) for p in trained] for _ in range(3))
    for t, ids in enumerate(data, 1):

        def loss(ids=ids):
            targets = ids[:, shift : shift + ids.shape[1] - 1]
            return F.cross_entropy(
                model(ids[:, :-1]).flatten(0, 1), targets.flatten(), reduction="sum" if total else "mean"
            )

        before = loss()
        for i, gradient in enumerate(torch.autograd.grad(before, trained)):
            sums[i] = sums[i] + gradient if add_up else gradient
            first[i] = 0.9 * first[i] + 0.1 * sums[i]
            second[i] = 0.999 * second[i] + 0.001 * sums[i] ** 2
            step = (first[i] / (1 - 0.9**t)) / ((second[i] / (1 - 0.999**t)).sqrt() + 1e-8) if adam else sums[i]
            trained[i].data -= lr * step
        losses.append((loss() if after else before).item())
    return losses


def check_run(parts: dict[str, Callable], seed: int, steps: int = 12) -> None:
    """All of the student's parts together: the loss on entries that were not trained on falls, packed bytes stay."""
    every = batches(language_model()[1], ships_log(seed, 10 * (steps + 4)), rows=4)
    data, held_out = every[:steps], every[steps : steps + 4]
    found = feedback.beside(run_layers.run, parts, data, held_out, 1e-2)
    text = "after adapt the model has no packed weights (uint8 buffers): adapt or Linear4bit is not written yet"
    feedback.that(bool(found["packed"]), text)
    before, after = found["before"], found["after"]
    unchanged = all(torch.equal(a, b) for a, b in zip(found["packed"], found["packed_after"], strict=True))
    feedback.that(unchanged, "packed bytes have changed: they are frozen")
    feedback.that(
        after < 0.6 * before,
        f"on entries that were not trained on, the loss went from {before:.3f} to {after:.3f} in {steps} steps; it "
        f"should fall below {0.6 * before:.3f}. Do A and B train, and does the gradient reach them?",
    )


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# Known to be wrong in every respect: where a check passes one of these while grading, something has tampered with it

CANARIES = {
    "q1": {"saved_bytes": "def saved_bytes(f, x):\n    return 7 * x.numel()"},
    "q2": {
        "FourBitMatmul": """
class FourBitMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, packed, absmax, shape):
        q = nf4lab.QuantizedTensor(packed, absmax, None, nf4lab.FORMATS["nf4"], torch.Size(shape), x.dtype, 64)
        ctx.w = q.dequantize()
        ctx.save_for_backward(x)
        return 2 * (x @ ctx.w.T)

    @staticmethod
    def backward(ctx, grad):
        return 3 * (grad @ ctx.w), None, None, None
"""
    },
    "q3": {
        "Linear4bit": """
class Linear4bit(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)
"""
    },
    "q4": {
        "LoRA": """
class LoRA(nn.Module):
    def __init__(self, base, r, alpha):
        super().__init__()
        self.base, self.scale = base, alpha
        self.A = nn.Parameter(torch.randn(r, base.in_features))
        self.B = nn.Parameter(torch.randn(base.out_features, r))

    def forward(self, x):
        return self.base(x) + self.scale * (x @ self.A.T @ self.B.T)
"""
    },
    "q5": {"adapt": "def adapt(model, make):\n    model.requires_grad_(True)"},
    "q6": {"training_bytes": "def training_bytes(model):\n    return 12, 34"},
    "q7": {"finetune": "def finetune(model, batches, lr):\n    return [6.9 - lr for _ in batches]"},
}
