"""A whole model in 4 bits: its linear layers swapped in place, one at a time."""

import math
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from nf4lab.formats import Format
from nf4lab.formats.double_quant import DoubleQuant
from nf4lab.layers.linear import Linear4bit
from nf4lab.metrics import mse

# Which layers: a pattern or several, as a shell's, of dotted names; or a function of name and layer.
Choice = str | Iterable[str] | Callable[[str, nn.Module], bool]


class QuantizedLayer(NamedTuple):
    """One row of what `quantize_model_` returns. error: mean squared error over the mean square of the weights."""

    name: str
    shape: tuple[int, int]
    format: str
    bits_per_weight: float
    error: float


class QuantizedLayers(list[QuantizedLayer]):
    """A list of rows that prints as a table, with the number of all weights and their bits in the last line."""

    def __str__(self) -> str:
        width = max([len("all layers"), *(len(row.name) for row in self)])
        lines = [f"{'layer':{width}} {'shape':>13} {'format':>14} {'bits':>7} {'error':>8}"]
        for row in self:
            shape = f"{row.shape[0]} x {row.shape[1]}"
            lines.append(f"{row.name:{width}} {shape:>13} {row.format:>14} {row.bits_per_weight:7.4f} {row.error:8.5f}")
        weights = sum(math.prod(row.shape) for row in self)
        bits = sum(math.prod(row.shape) * row.bits_per_weight for row in self) / weights if weights else math.nan
        return "\n".join([*lines, f"{'all layers':{width}} {weights:13,} {'':>14} {bits:7.4f}"])


def quantize_model_(
    model: nn.Module,
    format: str | Format = "nf4",
    block_size: int | None = None,
    double_quant: bool | str | DoubleQuant = False,
    compute_dtype: torch.dtype | None = None,
    *,
    include: Choice = "*",
    exclude: Choice = (),
    progress: bool = True,
) -> QuantizedLayers:
    """Swap the linear layers of `model` for Linear4bit, in place; return a row for each: name, shape, format, error.

    include, exclude: patterns of dotted names ("*.attention.*"), or functions of (name, layer). A layer used in two
    places is quantized once and stays shared. Subclasses of torch.nn.Linear that compute something else, such as
    bitsandbytes' layers, are left alone, and so is everything that is not a linear layer: embeddings among them, and
    a weight that an embedding shares with a layer is kept by the embedding.
    progress: a bar, where the work takes more than two seconds.

    Layers go one at a time, and each old weight is freed before the next is read: beside the model, memory is needed
    for one layer, dequantized to measure its error, and for its packed bytes.

    Raises ValueError where nothing is chosen, where a pattern matches no linear layer, where a chosen layer has hooks,
    which would be lost, and where `model` is itself a linear layer, which can only be replaced from outside; otherwise
    as `nf4lab.quantize`.
    """
    chosen = choose_layers(model, is_plain_linear, include, exclude)
    _refuse_hooks(model, chosen)
    rows = QuantizedLayers()
    for names in tqdm(chosen, desc="quantize", unit="layer", delay=2, disable=not progress):
        rows.append(_swap(model, names, format, block_size, double_quant, compute_dtype))
    return rows


def is_plain_linear(layer: nn.Module) -> bool:
    """Whether the layer is a torch.nn.Linear, or a subclass that computes the same."""
    as_usual = isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward
    return as_usual and "forward" not in vars(layer)  # some libraries replace it in the one layer


def choose_layers(
    model: nn.Module, kind: Callable[[nn.Module], bool], include: Choice, exclude: Choice
) -> list[list[str]]:
    """The dotted names of the chosen layers of a kind: one list a layer, more than one name where it is shared."""
    if kind(model):
        raise ValueError(f"model is itself a {type(model).__name__}, which cannot be replaced in place")
    shared: dict[int, list[str]] = {}
    for name, layer in model.named_modules(remove_duplicate=False):
        if kind(layer):
            shared.setdefault(id(layer), []).append(name)
    everything = list(shared.values())
    wanted, unwanted = (_matches(model, everything, choice) for choice in (include, exclude))
    chosen = [names for k, names in enumerate(everything) if k in wanted - unwanted]
    if not chosen:
        raise ValueError(f"no layer is chosen: of {len(everything)}, {len(wanted)} included, {len(unwanted)} excluded")
    return chosen


def _refuse_hooks(model: nn.Module, chosen: list[list[str]]) -> None:
    for name, *_ in chosen:
        layer = model.get_submodule(name)
        if any((layer._forward_pre_hooks, layer._forward_hooks, layer._backward_pre_hooks, layer._backward_hooks)):
            raise ValueError(f"layer {name!r} has hooks, which would be lost: remove them, or exclude the layer")


def _matches(model: nn.Module, everything: list[list[str]], choice: Choice) -> set[int]:
    """Which layers a choice names, by number."""
    if callable(choice):
        return {k for k, names in enumerate(everything) if any(choice(n, model.get_submodule(n)) for n in names)}
    found = set()
    for pattern in (choice,) if isinstance(choice, str) else choice:
        matching = {k for k, names in enumerate(everything) if any(fnmatchcase(n, pattern) for n in names)}
        if not matching and pattern != "*":
            some = ", ".join(names[0] for names in everything[:3])
            raise ValueError(f"{pattern!r} matches none of the {len(everything)} layers ({some}, …)")
        found |= matching
    return found


def replace_layer(model: nn.Module, names: list[str], layer: nn.Module) -> None:
    """Put `layer` where the names say."""
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)


def _swap(model: nn.Module, names: list[str], *how) -> QuantizedLayer:
    old = model.get_submodule(names[0])
    format, block_size, double_quant, compute_dtype = how
    new = Linear4bit.from_linear(old, format, block_size, double_quant, compute_dtype)
    replace_layer(model, names, new)
    q = new.quantized
    return QuantizedLayer(names[0], tuple(q.shape), q.format.name, q.bits_per_weight, _error(old.weight, new))


def _error(w: Tensor, layer: Linear4bit) -> float:
    power = sum(part.double().square().sum().item() for part in w.detach().reshape(-1).split(2**18))
    return mse(w, layer.weight) * w.numel() / power if power else 0.0
