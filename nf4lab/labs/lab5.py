"""What the checks of lab 5 (fine-tuning) compare and measure, the mistakes that they name, and the lab's text."""

import gc
import random
from collections.abc import Callable

import torch
import torch._dynamo  # the first optimizer loads it, which replaces functions of torch: better before grading watches
import torch.nn.functional as F
from torch import Tensor, nn

import nf4lab
from nf4lab.labs import feedback
from nf4lab.models import language_model

BLOCK_SIZE = 64
FLOAT32 = 1e-5  # of the largest: sums of some hundred float32 products, in any order
STEPS = 1e-3  # of a loss, after a few steps of Adam, whose first steps carry every rounding of a gradient on
WINDS = ["north", "north-east", "east", "south-east", "south", "south-west", "west", "north-west"]
CREW = ["captain", "mate", "cook", "boy", "surgeon", "carpenter", "gunner", "pilot"]
DEEDS = ["slept", "fell ill", "saw a sail", "was silent", "sang", "mended a sail", "found no water", "wrote home"]


def ships_log(seed: int, n: int) -> str:
    """n entries of a ship's log, one a line; the seed draws half of the winds, the crew and their deeds."""
    rng = random.Random(seed)
    winds, crew, deeds = (rng.sample(words, len(words) // 2) for words in (WINDS, CREW, DEEDS))
    entries = (
        f"Day {day}. Wind {rng.choice(winds)}, {rng.randint(10, 90)} miles. The {rng.choice(crew)} {rng.choice(deeds)}."
        for day in range(1, n + 1)
    )
    return "\n".join(entries)


def batches(tokenizer, text: str, rows: int = 8, length: int = 32) -> Tensor:
    """The text's tokens in order: int64 (n_batches, rows, length + 1). What does not fill a batch is left out."""
    ids = torch.tensor(tokenizer.encode(text))
    size = rows * (length + 1)
    return ids[: len(ids) // size * size].reshape(-1, rows, length + 1)


# What autograd keeps (questions 1 and 2)


def check_saved_bytes(saved_bytes: Callable, seed: int) -> None:
    """The bytes that autograd keeps for the backward pass of f(x), memory that is shared counted once."""
    generator = torch.Generator().manual_seed(seed)
    n, k = (int(v) for v in torch.randint(20, 60, (2,), generator=generator))
    w = torch.randn(k, n, generator=generator)
    cases = {  # name: (f, bytes, what a count of every tensor gives)
        "torch.exp(x)": (torch.exp, 4 * n * n, 4 * n * n),
        "x + 1": (lambda x: x + 1, 0, 0),
        "x @ w.T with a frozen w": (lambda x: x @ w.T, w.nbytes, w.nbytes),
        "x * x": (lambda x: x * x, 4 * n * n, 8 * n * n),
        "x * x.T": (lambda x: x * x.T, 4 * n * n, 8 * n * n),
        "torch.exp(x).square()": (lambda x: torch.exp(x).square(), 4 * n * n, 8 * n * n),
    }
    for name, (f, expected, every) in cases.items():
        x = torch.randn(n, n, generator=generator, requires_grad=True)
        causes = {
            "the same memory was counted twice: tell storages apart by untyped_storage().data_ptr()": every,
            "elements were counted, not bytes: nbytes": expected // 4,
            "that counts the result too, which the caller holds": expected + 4 * n * n,
            "nothing was seen: f must run inside `with torch.autograd.graph.saved_tensors_hooks(...)`": 0,
        }
        got = feedback.call(saved_bytes, f, x)
        feedback.same(got, expected, f"saved_bytes of {name}, x of {n} x {n}", causes)


def check_forward(function: type, seed: int) -> None:
    """x W_hat^T for a square weight, for one whose rows no block divides, for three dimensions and bfloat16."""
    for shape, rows, dtype in (
        ((64, 64), (5,), torch.float32),
        ((24, 83), (2, 3), torch.float32),
        ((24, 83), (4,), torch.bfloat16),
    ):
        packed, absmax, w_hat = _weight(shape, seed, dtype)
        x = _one_hot(rows, shape[1], seed, dtype)
        causes = {"multiplied by W_hat; y = x W_hat^T": lambda got, x=x, w=w_hat: torch.equal(got, x @ w)}
        got = feedback.call(function.apply, x, packed, absmax, shape, package=True)
        feedback.same(got, x @ w_hat.T, f"y, for a weight of {shape[0]} x {shape[1]} and x in {_dtype(dtype)},", causes)


def check_backward(function: type, seed: int) -> None:
    """grad @ W_hat, exactly: each row of grad has one entry, so that no sum is rounded; then dense ones."""
    for shape, rows, dtype in (
        ((64, 64), (5,), torch.float32),
        ((24, 83), (2, 3), torch.float32),
        ((24, 83), (4,), torch.bfloat16),
    ):
        packed, absmax, w_hat = _weight(shape, seed, dtype)
        x = _normal((*rows, shape[1]), seed, dtype).requires_grad_()
        what = f"the gradient of x, for a weight of {shape[0]} x {shape[1]} and x in {_dtype(dtype)},"
        for grad, compare in (
            (_one_hot(rows, shape[0], seed, dtype), feedback.same),
            (_normal((*rows, shape[0]), seed + 2, dtype), _close_in(dtype)),
        ):
            y = feedback.call(function.apply, x, packed, absmax, shape, package=True)
            got = _gradient(y, x, grad)
            causes = {
                "grad was multiplied by W_hat^T; y = x W_hat^T, so the gradient of x is grad W_hat": (
                    lambda got, g=grad, w=w_hat: torch.equal(got, g @ w.T)
                ),
                "that is grad itself": lambda got, g=grad: torch.equal(got, g),
            }
            compare(got, grad @ w_hat, what, causes)


def _close_in(dtype: torch.dtype) -> Callable:
    """feedback.close with the rounding of the results: bfloat16 has 8 bits, so half a step is 2**-9 of a result."""
    tolerance = FLOAT32 if dtype == torch.float32 else 2**-7
    return lambda got, expected, what, causes: feedback.close(got, expected, what, tolerance, causes)


def check_memory(function: type, seed: int) -> None:
    """Between the passes nothing is kept but packed and absmax: not W_hat, and not x."""
    shape = (37, 2 * (seed % 40) + 101)  # an element count that nothing else has
    packed, absmax = _weight(shape, seed, torch.float32)[:2]
    x = _normal((3, shape[1]), seed, torch.float32).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = feedback.call(function.apply, x, packed, absmax, shape, package=True)
    own = {_memory(packed), _memory(absmax)}
    others = [t for t in kept if _memory(t) not in own]
    _unless(
        all(_memory(t) != _memory(x) for t in others),
        f"x is kept for the backward pass, {x.nbytes} bytes",
        "only a weight's gradient needs x, and this weight is frozen",
    )
    big = [t for t in (*others, *_alive(shape[0] * shape[1])) if t.numel() == shape[0] * shape[1]]
    _unless(
        not big,
        f"W_hat is kept between the passes: {4 * shape[0] * shape[1]:,} bytes, where packed and absmax take "
        f"{packed.nbytes + absmax.nbytes:,}",
        "decode once for the forward and once more for the backward, and keep neither: not by save_for_backward, not "
        "in ctx, not in a variable that lives on",
    )
    feedback.that(
        not others, f"something else is kept for the backward pass: {', '.join(map(feedback.describe, others))}"
    )
    _gradient(y, x, torch.ones_like(y))  # and that is enough for a backward pass


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _alive(n: int) -> list[Tensor]:
    """The float tensors of n elements that Python still holds."""
    gc.collect()
    return [t for t in gc.get_objects() if type(t) is Tensor and t.numel() == n and t.is_floating_point()]


def _unless(condition: bool, message: str, cause: str) -> None:
    """Raise Mistake with the message and its likely cause, unless the condition holds."""
    feedback.that(condition, f"{message}\nLikely cause: {cause}.")


def _gradient(y: Tensor, x: Tensor, grad: Tensor) -> Tensor:
    """What y's backward pass gives for x; errors in words."""
    x.grad = None
    feedback.that(y.requires_grad, "y has no backward pass: detach nothing")
    try:
        y.backward(grad)
    except Exception as error:
        text = f"the backward pass ended in {type(error).__name__}: {error}"
        if "number of gradients" in str(error):
            text += "\nLikely cause: backward returns a value for each argument of forward after ctx, if only None."
        elif "shape" in str(error) or "size" in str(error):
            text += "\nLikely cause: y = x W_hat^T, so the gradient of x is grad W_hat: no transpose."
        raise feedback.Mistake(text) from None
    feedback.that(x.grad is not None, "x got no gradient: backward returns it first, then None for each other argument")
    return x.grad


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


class _Plain:
    """Stands in for the student's function where another answer is checked: the same values, by autograd itself."""

    @staticmethod
    def apply(x: Tensor, packed: Tensor, absmax: Tensor, shape: tuple) -> Tensor:
        q = nf4lab.QuantizedTensor(packed, absmax, None, nf4lab.FORMATS["nf4"], torch.Size(shape), x.dtype, BLOCK_SIZE)
        return x @ q.dequantize().T


def check_layer(env: dict, seed: int) -> None:
    """Linear4bit: the values of a dequantized layer; buffers, no parameters; no float weight left."""
    make = feedback.given(env, "Linear4bit")
    for n, k in ((64, 64), (24, 83)):
        layer = nn.Linear(k, n, bias=False)
        layer.weight.data = _normal((n, k), seed, torch.float32)
        q = nf4lab.quantize(layer.weight.detach(), "nf4", BLOCK_SIZE)
        x = _one_hot((2, 3), k, seed, torch.float32)
        with feedback.standing_in(env, FourBitMatmul=_Plain):
            made = feedback.call(make, layer, package=True)
            got = feedback.call(made.forward, x, package=True)
        before = {
            "that is the layer before it was quantized": lambda got, x=x, w=layer.weight: torch.equal(got, x @ w.T)
        }
        feedback.same(got, x @ q.dequantize().T, f"y of a layer of {k} to {n} features", before)
        _check_storage(made, q)
        sizes = getattr(made, "in_features", None), getattr(made, "out_features", None)
        feedback.same(sizes, (k, n), "(in_features, out_features)")


def _check_storage(made: nn.Module, q: nf4lab.QuantizedTensor) -> None:
    names = ", ".join(name for name, _ in made.named_parameters())
    cause = "the weight is frozen: packed and absmax are buffers, and nothing of the nn.Linear is kept"
    _unless(not names, f"the layer has parameters: {names}", cause)
    n_bytes = sum(t.nbytes for t in made.buffers())
    text = f"the layer's buffers have {n_bytes} bytes; packed and absmax have {q.nbytes}"
    cause = "plain attributes don't move with .to(device) and aren't in the state_dict: use register_buffer"
    _unless(n_bytes >= q.nbytes, text, cause)
    _unless(n_bytes == q.nbytes, text, "a float copy of the weight is kept beside the packed one")
    missing = q.nbytes - sum(t.nbytes for t in made.state_dict().values())
    _unless(missing <= 0, f"{missing} bytes of them are not in the state_dict", "persistent=False")
    held = ", ".join(name for name, t in vars(made).items() if isinstance(t, Tensor) and t.numel() >= q.numel)
    _unless(not held, f"the layer still holds {q.numel} weights: {held}", "only packed and absmax are needed")


def check_lora(make: type, seed: int) -> None:
    """LoRA: base(x) + alpha / r * x A^T B^T; zero at the start; A and B train, and nothing else."""
    n, k, r, alpha = 24, 40, 4 + seed % 3, 8
    base = nn.Linear(k, n, bias=False)
    base.weight.data = _normal((n, k), seed, torch.float32)
    made = feedback.call(make, base, r, alpha, package=True)
    feedback.call(made.forward, torch.zeros(1, k), package=True)
    trained = {name: p for name, p in made.named_parameters() if p.requires_grad}
    names = ", ".join(trained) or "none"
    _unless(
        not base.weight.requires_grad, "base.weight still requires a gradient", "base.requires_grad_(False) is missing"
    )
    feedback.that(set(trained) == {"A", "B"}, f"the parameters to be trained should be A and B; got {names}")
    for name, shape in (("A", (r, k)), ("B", (n, r))):
        text = f"{name} should have shape {shape}; got {tuple(trained[name].shape)}"
        cause = f"A brings {k} features down to r = {r}, B brings them up to {n}; both are stored (out, in)"
        _unless(trained[name].shape == shape, text, cause)
    x = _normal((2, 3, k), seed, torch.float32)
    _check_lora_start(made, base, x)
    _check_lora_values(made, base, x, alpha / r, seed)


def _check_lora_start(made: nn.Module, base: nn.Module, x: Tensor) -> None:
    zero_a, zero_b = (not bool(p.detach().any()) for p in (made.A, made.B))
    cause = "B starts at zero, A at random. With both at zero, each one's gradient is zero, and they stay there"
    _unless(not (zero_a and zero_b), "A and B are both zero", cause)
    wrong = {"B must start at zero, so that the layer begins as the one it replaces": lambda _: not zero_b}
    feedback.same(
        feedback.call(made.forward, x, package=True).detach(), base(x).detach(), "y before any training", wrong
    )
    spread = made.A.std().item() * made.A.shape[1] ** 0.5
    text = f"A should have a standard deviation near {made.A.shape[1] ** -0.5:.3f}; got {made.A.std().item():.3f}"
    feedback.that(0.6 < spread < 1.5, text)  # of 160 values and more: seven standard errors either way


def _check_lora_values(made: nn.Module, base: nn.Module, x: Tensor, scale: float, seed: int) -> None:
    with torch.no_grad():
        made.A.copy_(_normal(tuple(made.A.shape), seed + 1, torch.float32))
        made.B.copy_(_normal(tuple(made.B.shape), seed + 2, torch.float32))
        y, low = base(x), x @ made.A.T @ made.B.T
        causes = {
            "the product of A and B is multiplied by alpha / r; that factor is missing": y + low,
            "alpha / r is the factor; r / alpha is its inverse": y + low / scale,
            "the factor is alpha / r, not alpha": y + low * scale * made.A.shape[0],
            "base(x) is missing": scale * low,
            "only base(x) came: A and B are not used": y,
            "base(x) was scaled too": scale * (y + low),
        }
        feedback.close(
            feedback.call(made.forward, x, package=True), y + scale * low, "y with other A and B", FLOAT32, causes
        )


class Doubled(nn.Module):
    """A stand-in for an adapter: what adapt makes of a layer is not its business."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base, self.factor = base.requires_grad_(False), nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * self.base(x)


def check_adapt(adapt: Callable, seed: int) -> None:
    """Every nn.Linear of a nested model is replaced once; of the rest nothing trains."""
    model, made = _nested(seed), []
    wanted = {name for name, module in model.named_modules() if type(module) is nn.Linear}

    def make(layer: nn.Module) -> nn.Module:
        feedback.that(type(layer) is nn.Linear, f"make was called with a {type(layer).__name__}; it takes an nn.Linear")
        twice = any(layer is one.base for one in made)
        _unless(not twice, "make was called twice for one layer", "list the layers before any is replaced")
        made.append(Doubled(layer))
        return made[-1]

    feedback.call(lambda: adapt(model, make) or True)
    left = sorted(wanted - {name for name, module in model.named_modules() if isinstance(module, Doubled)})
    deep = "layers inside layers: named_modules goes all the way down, named_children only one level"
    cause = deep if len(left) < len(wanted) else "it is not written yet, or the new layers are not put in place"
    _unless(not left, f"{len(left)} of {len(wanted)} nn.Linear layers are still there: {', '.join(left)}", cause)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    extra = ", ".join(name for name in trained if not name.endswith(".factor"))
    _unless(not extra, f"these still train: {extra}", "freeze the whole model before the layers are replaced")
    text = f"the parameters of {len(made) - len(trained)} new layers don't train"
    cause = "the model was frozen after the layers were replaced; freeze it first"
    _unless(len(trained) == len(made), text, cause)


def _nested(seed: int) -> nn.Module:
    """A model with linear layers at two depths or, if the seed is odd, at four."""
    inner = nn.ModuleDict({"up": nn.Linear(8, 12, bias=False), "norm": nn.LayerNorm(12), "down": nn.Linear(12, 8)})
    model = nn.ModuleDict({"embed": nn.Embedding(10, 8), "first": nn.Linear(8, 8), "blocks": nn.ModuleList([inner])})
    if seed % 2:
        model["blocks"].append(nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.ReLU(), nn.Linear(8, 8))))
    return model


def check_training_bytes(training_bytes: Callable, seed: int) -> None:
    """(frozen, trained): bytes at rest, and bytes of what trains with its gradient and Adam's two moments."""
    r = 2 + seed % 5
    half = nn.Sequential(nn.Linear(12, 8).requires_grad_(False), nn.Linear(8, r))
    packed = nn.Linear(r, 16, bias=False)
    packed.register_buffer("packed", torch.zeros(100 + r, dtype=torch.uint8))
    frozen = nn.Embedding(30, r).requires_grad_(False)
    models = {"all of it trains": nn.Linear(20, 10), "half trains": half, "with a buffer": packed, "frozen": frozen}
    for name, model in models.items():
        trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
        buffers = sum(b.nbytes for b in model.buffers())
        rest = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
        causes = {
            "buffers are frozen too: packed weights are buffers": (rest, 4 * trained) if buffers else None,
            "what trains has a gradient and Adam's two moments too: four times its bytes (elements are not bytes)": (
                (rest + buffers, trained)
            ),
            "Adam keeps two moments of each parameter": (rest + buffers, 3 * trained),
            "Adam's two moments are missing": (rest + buffers, 2 * trained),
            "what is frozen has neither gradient nor moments": lambda got, f=4 * (rest + buffers): got[0] == f,
            "what trains was counted as frozen too": lambda got, f=rest + buffers + trained: got[0] == f,
        }
        got = feedback.call(training_bytes, model)
        feedback.same(got, (rest + buffers, 4 * trained), f"training_bytes of a model ({name})", causes)


# Training (question 7)


def check_finetune(finetune: Callable, seed: int, lr: float = 5e-3) -> None:
    """The losses of a few steps of Adam on the language model with its query projections trained."""
    tokenizer = language_model()[1]
    data = batches(tokenizer, ships_log(seed, 60), rows=4, length=24)[:4]
    expected = _losses(data, lr)
    model = _partly_frozen()
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    got = feedback.call(finetune, model, data, lr, package=True)
    feedback.that(
        isinstance(got, list) and len(got) == len(data) and all(type(v) is float for v in got),
        f"finetune must return a list of {len(data)} floats, the loss of each batch; got {feedback.describe(got)}",
    )
    for name, before in frozen.items():
        after = model.get_parameter(name)
        feedback.that(torch.equal(before, after), f"{name} was frozen, and has changed")
        feedback.that(after.grad is None, f"{name} was frozen, and has a gradient")
    still = "the model did not learn: does the optimizer have its parameters, and is step() called?"
    mistakes = {
        "the targets are not shifted: the logits at position t predict the token at t + 1": {"shift": 0},
        "gradients add up from step to step: zero_grad is missing": {"add_up": True},
        "plain gradient steps; asked for is Adam": {"adam": False},
        "that is the loss after each step": {"after": True},
        "the loss is the mean over all tokens, not their sum": {"total": True},
    }
    causes = {still: lambda got: torch.allclose(got, torch.tensor(_losses(data, lr=0.0)), rtol=FLOAT32)}
    causes |= {text: lambda got, how=how: _near(got, _losses(data, lr, **how)) for text, how in mistakes.items()}
    feedback.close(torch.tensor(got), torch.tensor(expected), "losses", STEPS, causes)


def _near(got: Tensor, expected: list[float]) -> bool:
    return torch.allclose(got, torch.tensor(expected), rtol=STEPS)


def _partly_frozen() -> nn.Module:
    """The language model, with only the query projections to be trained."""
    model = language_model()[0].requires_grad_(False)
    for block in model.blocks:
        block.attention.q_proj.requires_grad_(True)
    return model


def _losses(data: Tensor, lr: float, shift: int = 1, add_up=False, adam=True, after=False, total=False) -> list[float]:
    """The losses that a submission reports: Adam by its formulas (Kingma and Ba, algorithm 1), or a mistake instead."""
    model, losses = _partly_frozen(), []
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


def check_run(env: dict, seed: int, steps: int = 12) -> None:
    """All of the student's parts together: the loss on entries that were not trained on falls, packed bytes stay."""
    make, lora, adapt, finetune = (feedback.given(env, name) for name in ("Linear4bit", "LoRA", "adapt", "finetune"))
    model, tokenizer = language_model()
    every = batches(tokenizer, ships_log(seed, 10 * (steps + 4)), rows=4)
    data, held_out = every[:steps], every[steps : steps + 4]
    feedback.call(lambda: adapt(model, lambda layer: lora(make(layer), 8, 16)) or True, package=True)
    before, bytes_before = held_out_loss(model, held_out), _packed_of(model)
    cause = "adapt or Linear4bit is not written yet"
    _unless(bool(bytes_before), "after adapt the model has no packed weights (uint8 buffers)", cause)
    feedback.call(finetune, model, data, 1e-2, package=True)
    after = held_out_loss(model, held_out)
    unchanged = all(torch.equal(a, b) for a, b in zip(bytes_before, _packed_of(model), strict=True))
    feedback.that(unchanged, "packed bytes have changed: they are frozen")
    _unless(
        after < 0.6 * before,
        f"on entries that were not trained on, the loss went from {before:.3f} to {after:.3f} in {steps} steps; it "
        f"should fall below {0.6 * before:.3f}",
        "A and B don't train, or the gradient does not reach them",
    )


def _packed_of(model: nn.Module) -> list[Tensor]:
    return [b.clone() for b in model.buffers() if b.dtype == torch.uint8]


@torch.no_grad()
def held_out_loss(model: nn.Module, data: Tensor) -> float:
    """Mean cross-entropy of the next token over data (n, rows, length + 1), in nats."""
    losses = [F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()) for ids in data]
    return torch.stack(losses).mean().item()


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
