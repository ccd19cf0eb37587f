"""What lab 5 finds out about functions and layers where they live: values, gradients, what is kept, as plain data.

Nothing here compares or knows an answer: that is nf4lab.labs.lab5.
"""

import gc
from collections.abc import Callable

import torch
import torch._dynamo  # the first optimizer loads it, which replaces functions of torch: better before grading watches
from torch import Tensor, nn

from nf4lab.labs.calls import Mistake, call, describe, error_text, standing_in, usual_state
from nf4lab.labs.run_kernels import made
from nf4lab.labs.ships_log import held_out_loss
from nf4lab.models import language_model


def _called(function: Callable, *args):
    """What the student's function returns for just these arguments, in torch's usual state; it may call nf4lab."""
    return call(lambda: function(*args), package=True, name=getattr(function, "__name__", "your function"))


# What autograd keeps (questions 1 and 2)

SAVED = {  # name: f of x and of a frozen w
    "torch.exp(x)": lambda x, w: torch.exp(x),
    "x + 1": lambda x, w: x + 1,
    "x @ w.T with a frozen w": lambda x, w: x @ w.T,
    "x * x": lambda x, w: x * x,
    "x * x.T": lambda x, w: x * x.T,
    "torch.exp(x).square()": lambda x, w: torch.exp(x).square(),
}


def saved(saved_bytes: Callable, name: str, x: Tensor, w: Tensor):
    """What saved_bytes says of one of SAVED."""
    return _called(saved_bytes, lambda x: SAVED[name](x, w), x.clone().requires_grad_())


def forward(function: type, x: Tensor, packed: Tensor, absmax: Tensor, shape: tuple) -> Tensor:
    """y of an autograd function."""
    return _called(function.apply, x, packed, absmax, tuple(shape))


def backward(function: type, x: Tensor, packed: Tensor, absmax: Tensor, shape: tuple, grad: Tensor) -> Tensor:
    """The gradient that y's backward pass gives for x. Raises Mistake, in words, where there is none."""
    x = x.clone().requires_grad_()
    y = _called(function.apply, x, packed, absmax, tuple(shape))
    return _gradient(y, x, grad)


def _gradient(y: Tensor, x: Tensor, grad: Tensor) -> Tensor:
    if not (isinstance(y, Tensor) and y.requires_grad):
        raise Mistake("y has no backward pass: detach nothing")
    try:
        y.backward(grad)
    except Exception as error:
        text = f"the backward pass ended in {type(error).__name__}: {error_text(error)}"
        if "number of gradients" in str(error):
            text += "\nRemember: backward returns a value for each argument of forward after ctx, if only None."
        elif "shape" in str(error) or "size" in str(error):
            text += "\nRemember: y = x W_hat^T, and the gradient of x has the shape of x."
        raise Mistake(text) from None
    if x.grad is None:
        raise Mistake("x got no gradient: backward returns it first, then None for each other argument")
    return x.grad


def kept(function: type, x: Tensor, packed: Tensor, absmax: Tensor, shape: tuple) -> dict:
    """What is kept between the passes besides packed and absmax: {"x": whether, "w_hat": whether, "others": in words}.

    Raises Mistake where what is kept is not enough for a backward pass.
    """
    seen, x = [], x.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
        y = _called(function.apply, x, packed, absmax, tuple(shape))
    others = [t for t in seen if _memory(t) not in (_memory(packed), _memory(absmax))]
    n = shape[0] * shape[1]
    found = {
        "x": any(_memory(t) == _memory(x) for t in others),
        "w_hat": any(t.numel() == n for t in (*others, *_alive(n))),
        "others": [describe(t) for t in others],
    }
    if not found["x"] and not found["w_hat"]:
        _gradient(y, x, torch.ones_like(y))
    return found


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _alive(n: int) -> list[Tensor]:
    """The float tensors of n elements that Python still holds."""
    gc.collect()
    return [t for t in gc.get_objects() if type(t) is Tensor and t.numel() == n and t.is_floating_point()]


# Layers (questions 3, 4 and 5)


def layer(make: type, weight: Tensor, x: Tensor, sources: dict[str, str]) -> dict:
    """A layer made from an nn.Linear of this weight: its y of x, its sizes, and what it holds.

    sources: what takes the place of the student's other answers, by name.
    """
    n_out, n_in = weight.shape
    linear = nn.Linear(n_in, n_out, bias=False)
    linear.weight.data = weight
    variables = getattr(make.forward, "__globals__", {})
    with usual_state(), standing_in(variables, **{name: made(name, text) for name, text in sources.items()}):
        one = _called(make, linear)
        y = _called(one.forward, x)
    return {
        "y": y, "parameters": [name for name, _ in one.named_parameters()],
        "buffer_bytes": sum(t.nbytes for t in one.buffers()),
        "state_bytes": sum(t.nbytes for t in one.state_dict().values()),
        "held": [name for name, t in vars(one).items() if isinstance(t, Tensor) and t.numel() >= weight.numel()],
        "sizes": (getattr(one, "in_features", None), getattr(one, "out_features", None)),
    }  # fmt: skip


def lora(make: type, weight: Tensor, r: int, alpha: float, x: Tensor, others: dict[str, Tensor]) -> dict:
    """A LoRA layer around an nn.Linear of this weight: what trains, its start, and y of x with other A and B."""
    n_out, n_in = weight.shape
    base = nn.Linear(n_in, n_out, bias=False)
    base.weight.data = weight
    with usual_state():
        one = _called(make, base, r, alpha)
        start = _called(one.forward, x)
        trained = {name: p for name, p in one.named_parameters() if p.requires_grad}
        found = {
            "base_trains": base.weight.requires_grad,
            "start": start,
            "trained": {k: p.detach().clone() for k, p in trained.items()},
        }
        if {name: p.shape for name, p in trained.items()} == {name: t.shape for name, t in others.items()}:
            with torch.no_grad():
                for name, value in others.items():
                    trained[name].copy_(value)
            found["y"] = _called(one.forward, x)
    return found


class Doubled(nn.Module):
    """A stand-in for an adapter: what adapt makes of a layer is not its business."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base, self.factor = base.requires_grad_(False), nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * self.base(x)


def adapted(adapt: Callable, deep: bool) -> dict:
    """What adapt does to a model with linear layers at two depths or, if `deep`, at four: names of what is left."""
    model, replaced = _nested(deep), []
    wanted = sorted(name for name, module in model.named_modules() if type(module) is nn.Linear)

    def make(layer: nn.Module) -> nn.Module:
        if type(layer) is not nn.Linear:
            raise Mistake(f"make was called with a {type(layer).__name__}; it takes an nn.Linear")
        if any(layer is one.base for one in replaced):
            raise Mistake("make was called twice for one layer. List the layers before any is replaced")
        replaced.append(Doubled(layer))
        return replaced[-1]

    _called(lambda: adapt(model, make) or True)
    new = {name for name, module in model.named_modules() if isinstance(module, Doubled)}
    return {
        "wanted": wanted, "left": sorted(set(wanted) - new), "made": len(replaced),
        "trained": [name for name, p in model.named_parameters() if p.requires_grad],
    }  # fmt: skip


def _nested(deep: bool) -> nn.Module:
    inner = nn.ModuleDict({"up": nn.Linear(8, 12, bias=False), "norm": nn.LayerNorm(12), "down": nn.Linear(12, 8)})
    blocks = nn.ModuleList([inner])
    outer = {"embed": nn.Embedding(10, 8), "first": nn.Linear(8, 8), "blocks": blocks, "last": nn.Linear(8, 4)}
    model = nn.ModuleDict(outer)
    if deep:
        model["blocks"].append(nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.ReLU(), nn.Linear(8, 8))))
    return model


def models(r: int) -> dict[str, nn.Module]:
    """Small models by name, of which different shares train."""
    half = nn.Sequential(nn.Linear(12, 8).requires_grad_(False), nn.Linear(8, r))
    packed = nn.Linear(r, 16, bias=False)
    packed.register_buffer("packed", torch.zeros(100 + r, dtype=torch.uint8))
    frozen = nn.Embedding(30, r).requires_grad_(False)
    return {"all of it trains": nn.Linear(20, 10), "half trains": half, "with a buffer": packed, "frozen": frozen}


def counted(training_bytes: Callable, r: int, name: str):
    """What training_bytes says of one of `models`."""
    return call(training_bytes, models(r)[name])


# Training (question 7)


def partly_frozen() -> nn.Module:
    """The language model, with only the query projections to be trained."""
    model = language_model()[0].requires_grad_(False)
    for block in model.blocks:
        block.attention.q_proj.requires_grad_(True)
    return model


def finetuned(finetune: Callable, data: Tensor, lr: float) -> dict:
    """What finetune returns for `partly_frozen`, and which frozen weights have changed or got a gradient."""
    model = partly_frozen()
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    losses = _called(finetune, model, data, lr)
    return {
        "losses": losses,
        "changed": [name for name, before in frozen.items() if not torch.equal(before, model.get_parameter(name))],
        "gradients": [name for name in frozen if model.get_parameter(name).grad is not None],
    }


def run(parts: dict[str, Callable], data: Tensor, held_out: Tensor, lr: float) -> dict:
    """All of the student's parts together: the held-out loss before and after, the packed bytes before and after."""
    model = language_model()[0]
    make, lora = parts["Linear4bit"], parts["LoRA"]
    _called(lambda: parts["adapt"](model, lambda layer: lora(make(layer), 8, 16)) or True)
    before, packed = held_out_loss(model, held_out), _packed_of(model)
    found = {"before": before, "packed": packed}
    if packed:
        _called(parts["finetune"], model, data, lr)
        found |= {"after": held_out_loss(model, held_out), "packed_after": _packed_of(model)}
    return found


def _packed_of(model: nn.Module) -> list[Tensor]:
    return [b.clone() for b in model.buffers() if b.dtype == torch.uint8]
