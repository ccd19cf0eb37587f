"""A whole model in 4 bits: its layers quantized one at a time, then put in place all at once."""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nf4lab.blockwise import QuantizedTensor, quantize
from nf4lab.checkpoints.architecture import layers_elsewhere, save_to_be_found_, skip_modules
from nf4lab.checkpoints.folder import not_for_bitsandbytes, quantization_config, warn_of_widths
from nf4lab.choice import (
    EXCLUDED,
    NOT_INCLUDED,
    Candidate,
    Choice,
    barred,
    candidates,
    choose,
    is_plain_linear,
    taken_apart,
    transformers_models,
    warn_of_the_rest,
)
from nf4lab.formats import Format, as_format
from nf4lab.formats.double_quant import DoubleQuant
from nf4lab.layers.embedding import Embedding4bit
from nf4lab.layers.experts import Experts4bit
from nf4lab.layers.linear import Linear4bit
from nf4lab.layers.stored import Stored4bit, whose_4_bits
from nf4lab.metrics import mse
from nf4lab.progress import progress_bar

__all__ = ["QuantizedLayer", "QuantizedLayers", "choose_layers", "is_plain_linear", "quantize_model_", "replace_layer"]
CHUNK = 2**18  # weights whose error is summed at once


class QuantizedLayer(NamedTuple):
    """One row of what `quantize_model_` returns. error: mean squared error over the mean square of the weights."""

    name: str
    shape: tuple[int, ...]
    format: str
    bits_per_weight: float
    error: float


class QuantizedLayers(list[QuantizedLayer]):
    """A list of rows that prints as a table, with the number of all weights and their bits in the last line.

    kept: which matrices stay as they are, by name, and why; the table names them below. kept_share: the share that all
    weights left as they are have in the model's.
    """

    kept: dict[str, str]
    kept_share: float

    def __init__(self, rows=(), kept: dict[str, str] | None = None, kept_share: float = 0.0):
        super().__init__(rows)
        self.kept, self.kept_share = kept or {}, kept_share

    def __str__(self) -> str:
        width = max([len("all layers"), *(len(row.name) for row in self)])
        lines = [f"{'layer':{width}} {'shape':>13} {'format':>14} {'bits':>7} {'error':>8}"]
        for row in self:
            shape = " x ".join(map(str, row.shape))
            lines.append(f"{row.name:{width}} {shape:>13} {row.format:>14} {row.bits_per_weight:7.4f} {row.error:8.5f}")
        weights = sum(math.prod(row.shape) for row in self)
        bits = sum(math.prod(row.shape) * row.bits_per_weight for row in self) / weights if weights else math.nan
        lines.append(f"{'all layers':{width}} {weights:13,} {'':>14} {bits:7.4f}")
        if self.kept:
            lines.append(f"left as they are, {self.kept_share:.1%} of the weights:")
            lines += [f"  {name}: {reason}" for name, reason in self.kept.items()]
        return "\n".join(lines)


def quantize_model_(
    model: nn.Module,
    format: str | Format = "nf4",
    block_size: int | None = None,
    double_quant: bool | str | DoubleQuant = False,
    compute_dtype: torch.dtype | None = None,
    *,
    include: Choice = "*",
    exclude: Choice = (),
    hessians: Mapping[str, Tensor] | None = None,
    progress: bool = True,
) -> QuantizedLayers:
    """Quantize the matrices that `model` multiplies by, in place; return a row for each, and what stays and why.

    Linear layers become Linear4bit, and so does the Conv1D of GPT-2; the three-dimensional parameters of fused experts
    become Experts4bit, and an embedding that a pattern names Embedding4bit. What stays: embeddings and what shares
    their weight, output heads, routers, layers that transformers keeps in float32, or whose weight its code looks at
    past the layer (`nf4lab.peeks`), or that `llm_int8_skip_modules` in the model's configuration lists, adapters, and
    subclasses of torch.nn.Linear that compute something else. See
    `nf4lab.choice`.

    include, exclude: patterns of dotted names ("*.attention.*"), or functions of (name, layer). A pattern of `include`
    that names what would stay ("*lm_head*", but not "*") has it quantized all the same. A layer used in two places is
    quantized once and stays shared.
    hessians: the second moments of layers' inputs by dotted name, from `nf4lab.calibrate`, for error feedback; a layer
    that has none is rounded to nearest, and a name that the model doesn't have is refused.
    progress: a bar, where the work takes more than two seconds.

    All or nothing: each layer is quantized before the first is replaced. Beside the model, memory is needed for its
    4-bit copy. accelerate's hooks move to the new layers.

    Warns where over half of the weights stay, those that `include` or `exclude` leaves out not counted.
    Raises ValueError where nothing is chosen, where a pattern matches nothing or names what can't be quantized, where a
    chosen layer has hooks on its passes, which would be lost, and where `model` is itself a linear layer, which can
    only be replaced from outside; otherwise as `nf4lab.quantize`, with the layer's name. The model is then as it was.
    """
    format = as_format(format)
    check_is_model(model)
    if is_plain_linear(model):
        raise ValueError(f"model is itself a {type(model).__name__}, which cannot be replaced in place")
    everything = candidates(model)
    hessians = {} if hessians is None else hessians
    _check_names(hessians, everything)
    chosen, others = choose(everything, include, exclude, beside=_in_4_bits_already(model))
    for candidate in chosen:
        _check_replaceable(candidate)
    made = []
    with progress_bar("quantize", len(chosen), "layer", progress, delay=2) as bar:
        for candidate in chosen:
            made.append(_quantized(candidate, format, block_size, double_quant, compute_dtype, hessians))
            bar.update()
    for candidate, (layer, _) in zip(chosen, made, strict=True):
        _put(model, candidate, layer)
    for _, part in transformers_models(model):
        write_quantization_config(part)
    return _reported(model, [row for _, row in made], others)


def choose_layers(
    model: nn.Module, kind: Callable[[nn.Module], bool], include: Choice, exclude: Choice,
    stays: Callable[[nn.Module], str] = lambda layer: "", done: str = "changed", of_kind: str = "",
) -> list[list[str]]:  # fmt: skip
    """The dotted names of the chosen layers of a kind: one list a layer, more than one name where it is shared.

    stays: why a layer is left alone whatever is chosen; empty where it isn't. done: what is done to the chosen.
    of_kind: what the layers are, said where the model has none.
    """
    check_is_model(model)
    if kind(model):
        raise ValueError(f"model is itself a {type(model).__name__}, which cannot be replaced in place")
    shared: dict[int, list[str]] = {}
    layers = dict(model.named_modules(remove_duplicate=False))
    for name, layer in layers.items():
        if kind(layer):
            shared.setdefault(id(layer), []).append(name)
    if of_kind and not shared:
        raise ValueError(f"no layer of the model {of_kind}{_in_4_bits_already(model)}")
    found = []
    for names in shared.values():
        why = stays(layers[names[0]])
        found.append(Candidate(tuple(names), "linear", 0, why, always=bool(why), module=layers[names[0]]))
    return [list(candidate.names) for candidate in choose(found, include, exclude, done=done)[0]]


def check_is_model(model: nn.Module) -> None:
    """Raise TypeError for what is no module, such as the name of a model's folder."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")


def _in_4_bits_already(model: nn.Module) -> str:
    """How many layers of a model are in 4 bits and whose they are, as the end of a refusal; empty without any."""
    kinds = Counter(whose_4_bits(layer) for layer in model.modules())
    return "".join(f"; in {whose} 4 bits already: {count}" for whose, count in kinds.items() if whose)


def replace_layer(model: nn.Module, names: list[str], layer: nn.Module) -> None:
    """Put `layer` where the names say."""
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)


def _check_names(hessians: Mapping[str, Tensor], everything: list[Candidate]) -> None:
    """Raise for a hessian that no matrix would take."""
    if not isinstance(hessians, Mapping):
        raise TypeError(f"hessians must be a mapping from names of layers; got {type(hessians).__name__}")
    known = [name for candidate in everything for name in candidate.names]
    for name in hessians:
        if name not in known:
            some = ", ".join(map(repr, known[:3])) or "none"
            raise ValueError(f"hessians has {name!r}, which names no matrix of the model; it has {some}, …")


def check_hooks(layer: nn.Module, name: str) -> None:
    """Raise where a layer has hooks on its passes, which another in its place would lack."""
    hooks = (layer._forward_pre_hooks, layer._forward_hooks, layer._backward_pre_hooks, layer._backward_hooks)
    if any(hooks):
        raise ValueError(f"layer {name!r} has hooks, which would be lost: remove them, or leave the layer out")


def check_in_memory(layer: nn.Module, name: str, stored: Tensor, shape: tuple[int, ...]) -> None:
    """Raise where what a layer's weight is stored in is not in memory, or only while the layer runs."""
    check_not_offloaded(layer, name, shape)
    if stored.is_meta:
        raise ValueError(f"layer {name!r} is on the meta device: its {tuple(shape)} weight is not in memory")


def check_not_offloaded(layer: nn.Module, name: str, shape: tuple[int, ...]) -> None:
    """Raise where accelerate puts a layer's data away between its passes: what takes its place would lack them."""
    hook = getattr(layer, "_hf_hook", None)
    if any(getattr(each, "offload", False) for each in (hook, *getattr(hook, "hooks", ()))):
        raise ValueError(f"layer {name!r} is offloaded by accelerate: its {tuple(shape)} weight is not in memory")


def _check_replaceable(candidate: Candidate) -> None:
    """Raise where a layer cannot be replaced without losing something."""
    layer, name = candidate.module, candidate.names[0]
    if candidate.kind != "experts":  # the module of experts stays, with its hooks
        check_hooks(layer, name)
    weight = _weight(candidate)
    check_in_memory(layer, name, weight, weight.shape)
    if candidate.kind == "embedding" and layer.max_norm is not None:
        raise ValueError(f"layer {name!r} in 4 bits is frozen, and cannot keep rows within max_norm={layer.max_norm}")


def _weight(candidate: Candidate) -> Tensor:
    """A candidate's weight, (out, in) where it is a linear layer's."""
    name = candidate.names[0].rpartition(".")[2] if candidate.kind == "experts" else "weight"
    weight = getattr(candidate.module, name).detach()
    return weight.T if candidate.kind == "conv1d" else weight


def _quantized(
    candidate: Candidate, format, block_size, double_quant, compute_dtype, hessians
) -> tuple[nn.Module, QuantizedLayer]:
    """The 4-bit layer for a candidate, which stays as it is, and the layer's row. An error names the layer."""
    layer, name, weight = candidate.module, candidate.names[0], _weight(candidate)
    try:
        hessian = next((hessians[own] for own in candidate.names if own in hessians), None)
        q = quantize(weight, format, block_size, double_quant, hessian=hessian)
        if candidate.kind == "experts":
            new = Experts4bit(q)
        elif candidate.kind == "embedding":
            new = Embedding4bit(q, layer.padding_idx)
        else:
            new = Linear4bit(q, layer.bias, compute_dtype)
            new.was_conv1d = candidate.kind == "conv1d"
    except (ValueError, TypeError) as error:
        raise type(error)(f"layer {name!r}: {error}") from None
    row = QuantizedLayer(name, tuple(q.shape), q.format.name, q.bits_per_weight, _error(weight, q))
    return new.train(layer.training), row


def _put(model: nn.Module, candidate: Candidate, layer: nn.Module) -> None:
    """Put a layer in a candidate's place, or in that of a parameter of fused experts, with accelerate's hook."""
    if candidate.kind == "experts":
        Experts4bit.put(candidate.module, candidate.names[0].rpartition(".")[2], layer)
        return
    move_hook(candidate.module, layer)
    replace_layer(model, list(candidate.names), layer)


def move_hook(old: nn.Module, new: nn.Module) -> None:
    """Give a new layer the hook by which accelerate moves the old one's data."""
    hook = getattr(old, "_hf_hook", None)
    if hook is not None:
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(new, hook)


def write_quantization_config(model: nn.Module) -> None:
    """Have a model of transformers say in its configuration how it is quantized, so that what it saves can be opened.

    Where transformers reads what `save_pretrained` writes, the words are bitsandbytes'; where it does not, nf4lab's.
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, Stored4bit)}
    if not layers or not hasattr(model, "config"):
        return
    bar = barred(model)
    reasons = (_not_for_transformers(name, layer, bar([name])) for name, layer in layers.items())
    first = next(iter(layers.values())).quantized
    linear = [name for c in candidates(model) if c.kind in ("linear", "conv1d") for name in c.names]
    elsewhere = layers_elsewhere(model, [*linear, *layers])
    skip = skip_modules([*linear, *layers, *elsewhere], set(layers), getattr(model, "base_model_prefix", ""))
    is_double = not isinstance(first.stored_scale, Tensor)
    ours = next(filter(None, [taken_apart(model), *reasons]), "")
    if any(isinstance(layer, Experts4bit) for layer in layers.values()):
        model._weight_conversions = []  # nf4lab finds every name of the model's own
    elif not save_to_be_found_(model, [f"{name}.weight" for name in layers]):
        model._weight_conversions, ours = [], ours or f"transformers would not find {next(iter(layers))} again"
    computed = next((layer.compute_dtype for layer in layers.values() if isinstance(layer, Linear4bit)), None)
    dtype = str(computed or first.dtype).removeprefix("torch.")
    model.config.quantization_config = quantization_config(first.format, is_double, skip, ours, dtype)
    if not ours:
        warn_of_widths({name: layer.quantized.shape[1] for name, layer in layers.items()}, first.block_size, 3)


def _not_for_transformers(name: str, layer: Stored4bit, bar: str) -> str:
    """Why transformers can't read a layer from a file; empty where it can. bar: what `nf4lab.choice.barred` says."""
    q = layer.quantized
    if bar or not isinstance(layer, Linear4bit):
        return f"transformers reads no 4-bit {name}: {bar or type(layer).__name__}"
    return not_for_bitsandbytes(q.format, q.block_size, getattr(q.stored_scale, "double_quant", False))


def _reported(model: nn.Module, rows: list[QuantizedLayer], others: list[tuple[Candidate, str]]) -> QuantizedLayers:
    """The rows with what stays and its share; a warning where that is over half, not counting what a user left out."""
    quantized = sum(m.quantized.numel for m in model.modules() if isinstance(m, Stored4bit))
    plain = sum(p.numel() for p in model.parameters() if p.is_floating_point())
    left_out = sum(candidate.numel for candidate, why in others if why in (EXCLUDED, NOT_INCLUDED))
    kept = {candidate.names[0]: why for candidate, why in others}
    if 2 * (plain - left_out) > plain + quantized:
        warn_of_the_rest(plain / (plain + quantized), kept, stacklevel=3)
    return QuantizedLayers(rows, kept, plain / (plain + quantized))


def _error(w: Tensor, q: QuantizedTensor) -> float:
    power = sum(part.double().square().sum().item() for part in w.reshape(-1).split(CHUNK))
    return mse(w, q.dequantize()) * w.numel() / power if power else 0.0
