"""What the checks of lab 5 (fine-tuning) compare and measure, the mistakes that they name, and the lab's text."""

import contextlib
import gc
import random
from collections.abc import Callable, Iterator

import torch
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
    """grad @ W_hat, exactly: each row of grad has one entry, so that no sum is rounded; then a dense one."""
    for shape, rows, dtype in (
        ((64, 64), (5,), torch.float32),
        ((24, 83), (2, 3), torch.float32),
        ((24, 83), (4,), torch.bfloat16),
    ):
        packed, absmax, w_hat = _weight(shape, seed, dtype)
        x = _normal((*rows, shape[1]), seed, dtype).requires_grad_()
        what = f"the gradient of x, for a weight of {shape[0]} x {shape[1]} and x in {_dtype(dtype)},"
        for grad, tolerance in ((_one_hot(rows, shape[0], seed, dtype), 0), (_normal((*rows, shape[0]), 3, dtype), None)):
            y = feedback.call(function.apply, x, packed, absmax, shape, package=True)
            got = _gradient(y, x, grad)
            causes = {
                "grad was multiplied by W_hat^T; y = x W_hat^T, so the gradient of x is grad W_hat": (
                    lambda got, g=grad, w=w_hat: torch.equal(got, g @ w.T)
                ),
                "that is grad itself": lambda got, g=grad: torch.equal(got, g),
            }
            if tolerance == 0:
                feedback.same(got, grad @ w_hat, what, causes)
            else:
                limit = FLOAT32 if dtype == torch.float32 else 2**-7  # bfloat16: a rounding of each result, half a step
                feedback.close(got, grad @ w_hat, what, limit, causes)


def check_memory(function: type, seed: int) -> None:
    """Between the passes nothing is kept but packed and absmax: not W_hat, and not x."""
    shape = (37, 2 * (seed % 40) + 101)  # an element count that nothing else has
    packed, absmax = _weight(shape, seed, torch.float32)[:2]
    x = _normal((3, shape[1]), seed, torch.float32).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = feedback.call(function.apply, x, packed, absmax, shape, package=True)
    own = {t.untyped_storage().data_ptr() for t in (packed, absmax)}
    others = [t for t in kept if t.untyped_storage().data_ptr() not in own]
    if any(t.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for t in others):
        text = f"x is kept for the backward pass, {x.nbytes} bytes"
        raise feedback.Mistake(f"{text}\nLikely cause: only a weight's gradient needs x, and this weight is frozen.")
    n = shape[0] * shape[1]
    big = [t for t in (*others, *_alive(n)) if t.numel() == n and t.is_floating_point()]
    if big:
        few = packed.nbytes + absmax.nbytes
        text = f"W_hat is kept between the passes: {big[0].nbytes:,} bytes, where packed and absmax take {few:,}"
        raise feedback.Mistake(
            f"{text}\nLikely cause: decode once for the forward and once more for the backward, and keep neither result "
            "(not in ctx, not in save_for_backward, not in a variable that lives on)."
        )
    feedback.that(not others, f"something else is kept for the backward pass: {[feedback.describe(t) for t in others]}")
    _gradient(y, x, torch.ones_like(y))  # and that is enough for a backward pass


def _alive(n: int) -> list[Tensor]:
    """The float tensors of n elements that Python still holds."""
    gc.collect()
    return [t for t in gc.get_objects() if type(t) is Tensor and t.numel() == n and t.is_floating_point()]


def _gradient(y: Tensor, x: Tensor, grad: Tensor) -> Tensor:
    """What y's backward pass gives for x; errors in words."""
    x.grad = None
    feedback.that(y.requires_grad, "y has no backward pass: call the function with .apply, and detach nothing")
    try:
        y.backward(grad)
    except Exception as error:
        hint = ""
        if "number of gradients" in str(error) or "returned an invalid gradient" in str(error):
            hint = "\nLikely cause: backward returns one value for each argument of forward after ctx, None where there is none."
        elif "shapes cannot be multiplied" in str(error) or "size" in str(error):
            hint = "\nLikely cause: y = x W_hat^T, so the gradient of x is grad W_hat: no transpose."
        raise feedback.Mistake(f"the backward pass ended in {type(error).__name__}: {error}{hint}") from None
    if x.grad is None:
        raise feedback.Mistake("x got no gradient: backward must return it first, then None for each other argument")
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
        q = nf4lab.QuantizedTensor(
            packed, absmax, None, nf4lab.FORMATS["nf4"], torch.Size(shape), x.dtype, BLOCK_SIZE
        )
        return x @ q.dequantize().T


@contextlib.contextmanager
def standing_in(env: dict, **objects) -> Iterator[None]:
    """Names of the notebook bound to other objects for a while, so that one wrong answer costs its own points only."""
    before = {name: env[name] for name in objects if name in env}
    env.update(objects)
    try:
        yield
    finally:
        env.update(before)


def check_layer(env: dict, seed: int) -> None:
    """Linear4bit: the values of a dequantized layer; buffers, no parameters; no float weight left."""
    make = feedback.given(env, "Linear4bit")
    for n, k in ((64, 64), (24, 83)):
        layer = nn.Linear(k, n, bias=False)
        layer.weight.data = _normal((n, k), seed, torch.float32)
        q = nf4lab.quantize(layer.weight.detach(), "nf4", BLOCK_SIZE)
        x = _one_hot((2, 3), k, seed, torch.float32)
        with standing_in(env, FourBitMatmul=_Plain):
            made = feedback.call(make, layer, package=True)
            feedback.that(isinstance(made, nn.Module), f"Linear4bit must be a torch.nn.Module; got {feedback.describe(made)}")
            got = feedback.call(made, x, package=True)
        causes = {
            "that is the layer before it was quantized": lambda got, x=x, w=layer.weight: torch.equal(got, x @ w.T),
        }
        feedback.same(got, x @ q.dequantize().T, f"y of a layer of {k} to {n} features", causes)
        _check_storage(made, q)


def _check_storage(made: nn.Module, q: nf4lab.QuantizedTensor) -> None:
    names = [name for name, _ in made.named_parameters()]
    if names:
        raise feedback.Mistake(
            f"the layer has parameters: {', '.join(names)}\nLikely cause: the weight is frozen, so packed and absmax are "
            "buffers (register_buffer), and nothing of the nn.Linear is kept."
        )
    n_bytes = sum(t.nbytes for t in made.buffers())
    if n_bytes < q.nbytes:
        raise feedback.Mistake(
            f"the layer's buffers have {n_bytes} bytes; packed and absmax have {q.nbytes}\nLikely cause: plain attributes "
            "don't move with .to(device) and are not in the state_dict; register_buffer makes them part of the layer."
        )
    feedback.that(
        n_bytes == q.nbytes,
        f"the layer's buffers have {n_bytes} bytes; packed and absmax have {q.nbytes}\nLikely cause: a float copy of the "
        "weight is kept beside the packed one.",
    )
    missing = q.nbytes - sum(t.nbytes for t in made.state_dict().values())
    feedback.that(missing <= 0, f"{missing} bytes are not in the state_dict\nLikely cause: persistent=False.")
    held = [name for name, value in vars(made).items() if isinstance(value, Tensor) and value.numel() >= q.numel]
    feedback.that(not held, f"the layer still holds a weight of {q.numel} elements: {', '.join(held)}")


def check_lora(make: type, seed: int) -> None:
    """LoRA: base(x) + alpha / r * x A^T B^T; zero at the start; A and B train, and nothing else."""
    n, k, r, alpha = 24, 40, 4 + seed % 3, 8
    base = nn.Linear(k, n, bias=False)
    base.weight.data = _normal((n, k), seed, torch.float32)
    made = feedback.call(make, base, r, alpha, package=True)
    feedback.that(isinstance(made, nn.Module), f"LoRA must be a torch.nn.Module; got {feedback.describe(made)}")
    trainable = {name: p for name, p in made.named_parameters() if p.requires_grad}
    if "base.weight" in trainable:
        raise feedback.Mistake("base.weight still requires a gradient\nLikely cause: base.requires_grad_(False) is missing.")
    for name, shape in (("A", (r, k)), ("B", (n, r))):
        found = trainable.get(name)
        feedback.that(found is not None, f"the trainable parameters must be A and B; got {', '.join(trainable) or 'none'}")
        feedback.that(
            found.shape == shape,
            f"{name} should have shape {shape}; got {tuple(found.shape)}\nLikely cause: A brings x's {k} features down to r, "
            f"B brings r up to {n}; each is stored as nn.Linear stores a weight, (out, in).",
        )
    feedback.that(len(trainable) == 2, f"only A and B should train; got {', '.join(trainable)}")
    x = _normal((2, 3, k), seed, torch.float32)
    _check_lora_start(made, base, x)
    _check_lora_values(made, base, x, alpha / r, seed)


def _check_lora_start(made: nn.Module, base: nn.Module, x: Tensor) -> None:
    zero_a, zero_b = (not bool(p.detach().any()) for p in (made.A, made.B))
    feedback.that(
        not (zero_a and zero_b),
        "A and B are both zero\nLikely cause: B starts at zero and A at random. With both at zero, each one's gradient is "
        "zero, and they never leave it.",
    )
    feedback.same(
        feedback.call(made, x, package=True).detach(), base(x).detach(), "y before any training",
        {"B must start at zero, so that the layer begins as the one it replaces": lambda _: not zero_b},
    )  # fmt: skip


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
        feedback.close(feedback.call(made, x, package=True), y + scale * low, "y with other A and B", FLOAT32, causes)


class Doubled(nn.Module):
    """A stand-in for an adapter: what adapt makes of a layer is not its business."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base, self.factor = base.requires_grad_(False), nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * self.base(x)


def check_adapt(adapt: Callable, seed: int) -> None:
    """Every nn.Linear of a nested model is replaced once; of the rest nothing trains."""
    torch.manual_seed(seed)
    inner = nn.ModuleDict({"up": nn.Linear(8, 12, bias=False), "norm": nn.LayerNorm(12), "down": nn.Linear(12, 8)})
    model = nn.ModuleDict({"embed": nn.Embedding(10, 8), "first": nn.Linear(8, 8), "blocks": nn.ModuleList([inner])})
    if seed % 2:
        model["blocks"].append(nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.ReLU(), nn.Linear(8, 8))))
    wanted = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    made = []

    def make(layer: nn.Module) -> nn.Module:
        if type(layer) is not nn.Linear:
            raise feedback.Mistake(f"make was called with a {type(layer).__name__}; it takes nn.Linear layers only")
        if any(layer is one.base for one in made):
            raise feedback.Mistake("make was called twice for one layer\nLikely cause: list the layers before replacing any.")
        made.append(Doubled(layer))
        return made[-1]

    try:
        adapt(model, make)
    except feedback.Mistake:
        raise
    except Exception as error:
        raise feedback.Mistake(f"`adapt` ended in {type(error).__name__}: {error}") from None
    replaced = {name for name, module in model.named_modules() if isinstance(module, Doubled)}
    left = sorted(wanted - replaced)
    feedback.that(
        not left,
        f"{len(left)} of {len(wanted)} nn.Linear layers are still there: {', '.join(left)}\nLikely cause: "
        + ("nothing is replaced yet." if len(left) == len(wanted) else "layers inside layers: named_modules goes all the "
           "way down, named_children one level."),
    )  # fmt: skip
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    extra, missing = sorted(n for n in trains if not n.endswith(".factor")), len(made) - len(trains)
    feedback.that(
        not extra, f"these still train: {', '.join(extra)}\nLikely cause: freeze the model before the layers are replaced."
    )
    feedback.that(
        not missing,
        f"the parameters of {missing} new layers don't train\nLikely cause: the model was frozen after the layers were "
        "replaced; freeze it first.",
    )


def check_training_bytes(training_bytes: Callable, seed: int) -> None:
    """(frozen, trained): bytes at rest, and bytes of what trains with its gradient and Adam's two moments."""
    torch.manual_seed(seed)
    r = 2 + seed % 5
    small = nn.Linear(20, 10)
    half = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, r))
    half[0].requires_grad_(False)
    packed = nn.Module()
    packed.register_buffer("packed", torch.zeros(100 + r, dtype=torch.uint8))
    packed.A = nn.Parameter(torch.zeros(r, 16))
    frozen = nn.Embedding(30, r).requires_grad_(False)
    for name, model in (("everything trains", small), ("half is frozen", half), ("buffers", packed), ("frozen", frozen)):
        trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
        buffers = sum(b.nbytes for b in model.buffers())
        rest = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
        causes = {
            "buffers count among what is frozen: packed weights are buffers": (rest, 4 * trained) if buffers else None,
            "a trained parameter has a gradient and Adam's two moments too: four times its bytes": (rest + buffers, trained),
            "Adam keeps two moments of each parameter": (rest + buffers, 3 * trained),
            "the moments are missing": (rest + buffers, 2 * trained),
            "what is frozen has neither gradient nor moments": lambda got, f=4 * (rest + buffers): got[0] == f,
            "all of it was counted as frozen, what trains too": lambda got, f=rest + buffers + trained: got[0] == f,
            "elements were counted, not bytes": lambda got, t=trained: got[1] == t,
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
    causes = {
        "the targets are not shifted: the logits at position t predict the token at t + 1": {"shift": 0},
        "gradients add up from step to step: zero_grad is missing": {"add_up": True},
        "plain gradient steps; asked for is Adam": {"adam": False},
        "the model did not learn: is optimizer.step() there, and does the optimizer have the parameters?": {"lr": 0.0},
        "that is the loss after each step": {"after": True},
        "the loss is the mean over all tokens, not their sum": {"total": True},
    }
    causes = {text: (lambda got, how=how: _near(got, _losses(data, **({"lr": lr} | how)))) for text, how in causes.items()}
    feedback.close(torch.tensor(got), torch.tensor(expected), "losses", STEPS, causes)


def _near(got: Tensor, expected: list[float]) -> bool:
    return torch.allclose(got, torch.tensor(expected), rtol=STEPS)


def _partly_frozen() -> nn.Module:
    """The language model, with only the query projections to be trained."""
    model = language_model()[0].requires_grad_(False)
    for block in model.blocks:
        block.attention.q_proj.requires_grad_(True)
    return model


def _losses(
    data: Tensor, lr: float, shift: int = 1, add_up=False, adam=True, after=False, total=False
) -> list[float]:
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


def check_run(env: dict, seed: int, steps: int = 40) -> None:
    """All of the student's parts together: the loss on entries that were not trained on falls, packed bytes stay."""
    names = "Linear4bit", "LoRA", "adapt", "finetune"
    make, lora, adapt, finetune = (feedback.given(env, name) for name in names)
    model, tokenizer = language_model()
    every = batches(tokenizer, ships_log(seed, 1 + 10 * (steps + 8)))
    data, held_out = every[:steps], every[steps : steps + 4]
    feedback.call(lambda: adapt(model, lambda layer: lora(make(layer), 8, 16)) or True, package=True)
    before, bytes_before = held_out_loss(model, held_out), _packed_of(model)
    feedback.that(bool(bytes_before), "after adapt the model has no packed weights (uint8 buffers)")
    feedback.call(finetune, model, data, 1e-2, package=True)
    after = held_out_loss(model, held_out)
    unchanged = all(torch.equal(a, b) for a, b in zip(bytes_before, _packed_of(model), strict=True))
    feedback.that(unchanged, "packed bytes have changed: they are frozen")
    feedback.that(
        after < 0.6 * before,
        f"the loss on entries that were not trained on went from {before:.3f} to {after:.3f} in {steps} steps; it should "
        f"fall below {0.6 * before:.3f}\nLikely cause: A and B don't train, or the gradient does not reach them.",
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
