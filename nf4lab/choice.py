"""What of a model to quantize, and why the rest stays: the one judge that models in memory and files on a disk share.

A matrix that multiplies is quantized: the weight of a linear layer, of transformers' Conv1D, and each expert's of a
fused mixture. What stays is what transformers' bitsandbytes integration leaves alone too: embeddings and what shares
their weight, output heads, routers, modules that a model keeps in float32; layers whose weight the model's code looks
at past the layer, which go wrong in bitsandbytes' 4 bits; and adapters, which are there to train.
A pattern can exclude more of it, and can *name* what would stay: "*lm_head*" does, "*" does not.
"""

import math
import re
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial

from torch import nn
from torch.nn.parameter import is_lazy

from nf4lab.peeks import CAST, READ, peeked_at

# Which layers: a pattern or several, as a shell's, of dotted names; or a function of name and layer.
Choice = str | Iterable[str] | Callable[[str, nn.Module], bool]

# What a name alone tells, where there is no model to ask.
LOOKED_UP = re.compile(r"embed|wte|wpe|relative_attention_bias|(^|\.)shared$")  # tables that are not multiplied
HEADS = ("lm_head", "embed_out", "score")
HEAD, EMBEDDING, ROUTER = "output head", "embedding", "router"
# PEFT's parts of an adapter, and those of its kind: lora_A, hada_w1_a, oft_R, …; and copies that are trained whole.
ADAPTERS = re.compile(r"(^|\.)((lora|hada|lokr|oft|boft|vera|randlora|ia3)_\w+|modules_to_save|original_module)(\.|$)")
ADAPTED = "PEFT adapts the parameter itself"
ADAPTER, IN_ROWS = "adapter", "a row for each token or position, by its shape"
KEPT, EMPTY = "kept in float32", "empty"
FUSED_EXPERTS = "fused experts, of which transformers reads no 4-bit file"


@dataclass(frozen=True)
class Candidate:
    """A matrix of a model.

    names: of its layer, more than one where it is used in several places; of fused experts the parameter's.
    kind: "linear", "conv1d" (stored transposed), "experts" (three-dimensional), "embedding", or "other".
    stays: why it is left as it is unless a pattern names it; empty for what is quantized.
    always: whether it stays even then.
    barred: why transformers can't use it in 4 bits by bitsandbytes; empty where it can.
    """

    names: tuple[str, ...]
    kind: str
    numel: int
    stays: str = ""
    always: bool = False
    barred: str = ""
    module: nn.Module | None = field(default=None, repr=False)


# --- a model in memory


def candidates(model: nn.Module) -> list[Candidate]:
    """Every matrix of a model, in the order of its modules, with the reason for what stays."""
    why = list(_kept_by_transformers(model))
    bar = _barring(why)
    adapters, adapted = tuple(f"{name}." for name in adapters_in(model)), set(_adapted_parameters(model))
    places: dict[int, list[str]] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, module in modules.items():
        places.setdefault(id(module), []).append(name)
    tied = tied_weights(modules)
    found = []
    for names in places.values():
        module = modules[names[0]]
        if any(map(is_lazy, module._parameters.values())):
            raise ValueError(f"layer {names[0]!r} has no weights yet: run the model once")
        for kind, weight, numel in _matrices(module):
            by_parameter = kind in ("experts", "other")
            full = tuple(f"{name}.{weight}".lstrip(".") if by_parameter else name for name in names)
            stays, always = _verdict(modules, names, module, kind, why, tied)
            if any(f"{name}.".startswith(adapters) for name in names):
                stays, always = ADAPTER, True
            elif (id(module), weight) in adapted:
                stays, always = ADAPTED, True
            found.append(Candidate(full, kind, numel, stays, always, bar(names), module))
    return found


def is_plain_linear(layer: nn.Module) -> bool:
    """Whether the layer is a torch.nn.Linear, or a subclass that computes the same.

    accelerate wraps the forward method of a layer that it moves data for; such a layer still computes the same.
    """
    as_usual = isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward
    replaced = "forward" in vars(layer) and not hasattr(layer, "_hf_hook")  # some libraries replace it in the one layer
    return as_usual and not replaced and not hasattr(layer, "parametrizations")


def is_conv1d(layer: nn.Module) -> bool:
    """Whether the layer is transformers' Conv1D: a linear layer, of GPT-2 and its time, with its weight transposed."""
    library = sys.modules.get("transformers.pytorch_utils")  # where no one has imported it, nothing is one
    return library is not None and type(layer) is library.Conv1D


def _matrices(module: nn.Module) -> Iterator[tuple[str, str, int]]:
    """(kind, attribute, number of weights) of each parameter of a module itself that is a matrix, or more than one."""
    fused = re.search("expert|moe", type(module).__name__, re.IGNORECASE)
    for name, parameter in module._parameters.items():
        if parameter is None or parameter.dim() < 2 or not parameter.is_floating_point():
            continue
        kind = "other"
        if name == "weight" and is_plain_linear(module):
            kind = "linear"
        elif name == "weight" and is_conv1d(module):
            kind = "conv1d"
        elif name == "weight" and isinstance(module, nn.Embedding):
            kind = "embedding"
        elif fused and parameter.dim() == 3 and min(parameter.shape) > 1:
            kind = "experts"
        yield kind, name, parameter.numel()


def _verdict(modules, names, module, kind, why, tied) -> tuple[str, bool]:
    """(why a matrix stays, whether always) of one module; empty for what is quantized."""
    name, kind_of_module = names[0], type(module)
    if kind == "other":
        return f"in a {kind_of_module.__name__}", True
    if kind in ("linear", "conv1d", "embedding") and not module.weight.numel():
        return EMPTY, True
    if kind in ("linear", "conv1d") and id(module.weight) in tied:
        return f"its weight is also that of {next(n for n in tied[id(module.weight)] if n not in names)}", True
    if kind == "embedding":
        return EMBEDDING, id(module.weight) in tied or kind_of_module is not nn.Embedding
    kept = next((reason for is_kept, reason in why if any(map(is_kept, names))), "")
    if kept:
        return kept, False
    if kind != "linear":
        return "", False
    if why:  # in a model of transformers its rule decides, and it replaces torch.nn.Linear itself only
        return ("", False) if kind_of_module is nn.Linear else (f"a {kind_of_module.__name__}", False)
    return HEAD if is_head(name) else ROUTER if is_router(name, modules.__contains__) else "", False


def tied_weights(modules: dict[str, nn.Module]) -> dict[int, list[str]]:
    """Weights that something other than linear layers uses too, by id: the names of all their users."""
    users: dict[int, dict[int, str]] = {}
    for name, module in modules.items():
        for parameter in module._parameters.values():
            if parameter is not None:
                users.setdefault(id(parameter), {}).setdefault(id(module), name)
    kinds = {id(m): is_plain_linear(m) or is_conv1d(m) for m in modules.values()}
    return {weight: list(by.values()) for weight, by in users.items() if len(by) > 1 and not all(kinds[m] for m in by)}


def adapters_in(model: nn.Module) -> Iterator[str]:
    """The names of modules that PEFT, or something that marks its layers as PEFT does, has put in to be trained."""
    for name, module in model.named_modules():
        marked = getattr(type(module), "adapter_layer_names", ()) + getattr(type(module), "other_param_names", ())
        yield from (f"{name}.{part}".lstrip(".") for part in marked if hasattr(module, part))
        if {"original_module", "modules_to_save"} <= set(dict(module.named_children())):
            yield name
        if hasattr(type(module), "prompt_encoder") or "prompt_encoder" in module._modules:
            yield f"{name}.prompt_encoder".lstrip(".")


def _adapted_parameters(model: nn.Module) -> Iterator[tuple[int, str]]:
    """(id of a module, name) of each parameter that PEFT's `target_parameters` names: it must stay a parameter."""
    for module in model.modules():
        if hasattr(module, "parameter_name") and hasattr(module, "get_base_layer"):
            yield id(module.get_base_layer()), module.parameter_name


def barred(model: nn.Module) -> Callable[[Iterable[str]], str]:
    """A function from a layer's names to why transformers can't use it in 4 bits by bitsandbytes; empty where it can.

    Either it does not open such a file, whatever its list of modules to skip says, or it answers wrongly.
    """
    return _barring(list(_kept_by_transformers(model)))


def _barring(why: list[tuple[Callable[[str], bool], str]]) -> Callable[[Iterable[str]], str]:
    bars = [(is_kept, reason) for is_kept, reason in why if reason in (KEPT, CAST, READ)]
    return lambda names: next((reason for is_kept, reason in bars if any(map(is_kept, names))), "")


def _kept_by_transformers(model: nn.Module) -> Iterator[tuple[Callable[[str], bool], str]]:
    """(whether a name is kept, why) for what transformers' quantizers leave alone in each of its models in here.

    The rule is `get_keys_to_not_convert`'s: tied weights, the output embeddings, the last parameter's module; then the
    modules that the model keeps in float32; or, where the configuration has a list of its own, that list instead. To
    these come the layers that they don't leave alone and should: see `nf4lab.peeks`.
    """
    for prefix, module in transformers_models(model):
        dot = f"{prefix}." if prefix else ""
        is_quantized = any(hasattr(type(part), "quantized") for part in module.modules())  # then the list tells of that
        listed = None if is_quantized else skip_list(getattr(module, "config", None))
        if listed is None:
            tied = getattr(module, "all_tied_weights_keys", None) or {}
            yield _under(dot, {*tied, *tied.values()}), "tied weight"
            head = module.get_output_embeddings()
            yield _under(dot, {n for n, m in module.named_modules() if head is not None and m is head}), HEAD
            names = [n for n, _ in module.named_parameters(remove_duplicate=False)]  # it asks before weights are tied
            yield _under(dot, set(names[-1:])), "last layer"
        else:
            yield partial(skips, listed), "skip list"
        yield partial(skips, sorted(getattr(module, "_keep_in_fp32_modules", None) or ())), KEPT
        peeked = peeked_at(module)
        for reason in (CAST, READ):
            yield {f"{dot}{name}" for name, why in peeked.items() if why == reason}.__contains__, reason


def taken_apart(model: nn.Module) -> str:
    """Why transformers can't open a model in 4 bits by bitsandbytes, whatever is quantized; empty where it can.

    Some fused experts (5.23: Llama 4's) become one layer per expert there, whose weights no file has.
    """
    quantizers = sys.modules.get("transformers.quantizers.base")
    patched = getattr(quantizers, "MODULES_TO_PATCH_FOR_QUANTIZATION", {})
    kinds = (type(module).__name__ for module in model.modules())
    methods = ((kind, map(str, patched[kind]["quantization_methods"])) for kind in kinds if kind in patched)
    kind = next((kind for kind, named in methods if any("BITS" in name.upper() for name in named)), "")
    return kind and f"transformers takes {kind} apart in quantized models, and finds no weights for its parts"


def transformers_models(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, model) of each model of transformers in `model`, or itself, that is not part of another."""
    outer: list[str] = []
    for prefix, module in model.named_modules():
        inside = any(prefix.startswith(f"{name}." if name else "") for name in outer)
        if hasattr(type(module), "get_output_embeddings") and not inside:
            outer.append(prefix)
            yield prefix, module


def _under(prefix: str, keys: Collection[str]) -> Callable[[str], bool]:
    """Whether a name is skipped by the keys of a part of a model, as names of the whole."""
    return partial(skips, [prefix + key.removesuffix(".weight") for key in sorted(keys)])


def skip_list(config) -> list[str] | None:
    """`llm_int8_skip_modules` of a model's configuration, an object or the dict of a config.json; None without one."""
    quantization = _get(config, "quantization_config")
    return _get(quantization, "llm_int8_skip_modules")


def _get(values, name: str):
    return values.get(name) if isinstance(values, dict) else getattr(values, name, None)


# --- names alone


def candidates_by_name(shapes: dict[str, tuple[int, ...]], tables: Collection[int] = ()) -> list[Candidate]:
    """The matrices among tensors of these names and shapes, judged by their names: one ending in .weight multiplies.

    tables: numbers of tokens and positions, where they are known. A matrix of so many rows, outside of the numbered
    layers, is an embedding or a head, whatever it is called.
    """
    found, is_adapter = [], adapters_among(shapes)
    for key, shape in shapes.items():
        name, bar = key.removesuffix(".weight"), ""
        if is_adapter(key):
            found.append(Candidate((key,), "other", math.prod(shape), ADAPTER, always=True))
            continue
        if len(shape) == 3 and "expert" in name:
            found.append(Candidate((key,), "experts", math.prod(shape), FUSED_EXPERTS))
        if len(shape) != 2:
            continue
        if not math.prod(shape):
            found.append(Candidate((key,), "other", 0, EMPTY, always=True))
            continue
        if LOOKED_UP.search(name):
            kind, stays = "embedding", EMBEDDING
        elif shape[0] in tables and name != key and not any(map(str.isdigit, name.split("."))):
            kind, stays = "linear", HEAD if is_head(name) else IN_ROWS
        elif name == key:
            kind, stays = "linear", "no weight of a layer, by its name"
        else:
            kind, bar = "linear", CAST if is_wo(name, shapes.__contains__) else ""
            stays = HEAD if is_head(name) else ROUTER if is_router(name, shapes.__contains__) else bar
        found.append(Candidate((key,), kind, math.prod(shape), stays, barred=bar))
    return found


def adapters_among(keys: Collection[str]) -> Callable[[str], bool]:
    """Whether a key of a file is an adapter's: by its name, and each one where the file has adapters and no base."""
    named = {key for key in keys if ADAPTERS.search(key)}
    has_base = any(".base_layer." in key for key in keys)
    return (set(keys) if named and not has_base else named).__contains__


def is_head(name: str) -> bool:
    """Whether a layer of that dotted name is a model's output head."""
    return name.rpartition(".")[2] in HEADS


def is_router(name: str, exists: Callable[[str], bool]) -> bool:
    """Whether a layer of that name chooses among experts: a router by name, or a gate that stands beside experts."""
    parent, dot, last = name.rpartition(".")
    if last != "gate":
        return last == "router"
    first = (f"0.{part}.weight" for part in ("w1", "gate_proj", "up_proj", "down_proj"))
    beside = (f"{parent}{dot}experts{rest}" for rest in ("", *(f".{part}" for part in ("0", "gate_up_proj", *first))))
    return any(map(exists, beside))


def is_wo(name: str, exists: Callable[[str], bool]) -> bool:
    """Whether a layer of that name is the second of T5's kind of feed-forward block, of which `CAST` is true."""
    parent, dot, last = name.rpartition(".")
    return last == "wo" and any(exists(f"{parent}{dot}{first}.weight") for first in ("wi", "wi_0"))


# --- the choice

EXCLUDED, NOT_INCLUDED = "excluded", "not included"


def choose(
    found: list[Candidate], include: Choice, exclude: Choice,
    what: str = "layers", done: str = "quantized", beside: str = "",
) -> tuple[list[Candidate], list[tuple[Candidate, str]]]:  # fmt: skip
    """(the candidates to quantize, the others each with why it stays).

    include, exclude: patterns of names, or functions of (name, layer), which are asked about linear layers only.
    Patterns of `include` name a candidate that would stay where their last part does and is not a bare *; a function
    can't name what stays. beside: what is no candidate, said where nothing is chosen.

    Raises ValueError where a pattern matches no candidate, or none that can be quantized, and where nothing is chosen.
    """
    include, exclude = (choice if callable(choice) else as_tuple(choice) for choice in (include, exclude))
    wanted, unwanted = (_chosen_by(found, choice, what) for choice in (include, exclude))
    _check_possible(found, include, done)
    chosen, others = [], []
    for k, candidate in enumerate(found):
        if k in unwanted or k not in wanted:
            others.append((candidate, EXCLUDED if k in unwanted else candidate.stays or NOT_INCLUDED))
        elif candidate.stays and (candidate.always or not _is_named(candidate, include)):
            others.append((candidate, candidate.stays))
        else:
            chosen.append(candidate)
    if not chosen:
        kept = {why: candidate.names[0] for candidate, why in reversed(others) if candidate.stays}
        some = [f"; {name} stays: {why}" for why, name in reversed(kept.items())][:3]
        numbers = f"of {len(found)}, {len(wanted)} included, {len(unwanted)} excluded"
        raise ValueError(f"no {what.removesuffix('s')} is chosen: {numbers}{''.join(some)}{beside}")
    return chosen, others


def warn_of_the_rest(share: float, kept: dict[str, str], stacklevel: int = 2) -> None:
    """Warn that most of a model's weights stay as they are, and name the first."""
    some = ", ".join(f"{name} ({why})" for name, why in list(kept.items())[:3])
    warnings.warn(f"{share:.0%} of the weights stay as they are: {some}{', …' if len(kept) > 3 else ''}; "
                  "`include` can name them, `exclude` says that you know", stacklevel=stacklevel + 1)  # fmt: skip


def as_tuple(choice: str | Iterable[str]) -> tuple[str, ...]:
    """One word or several, as a tuple."""
    return (choice,) if isinstance(choice, str) else tuple(choice)


def matches(names: str | Iterable[str], patterns: str | Iterable[str]) -> bool:
    """Whether one of the names fits one of the patterns, a shell's: * stands for dots too, and case counts.

    >>> matches("model.layers.0.q_proj", ["*.k_proj", "*.q_proj"])
    True
    """
    names, patterns = as_tuple(names), as_tuple(patterns)
    return any(fnmatchcase(name, pattern) for pattern in patterns for name in names)


def _chosen_by(found: list[Candidate], choice: Choice, what: str) -> set[int]:
    """Which candidates a choice means, by number."""
    if callable(choice):
        asked = ((k, c) for k, c in enumerate(found) if c.kind in ("linear", "conv1d"))
        return {k for k, c in asked if any(choice(name, c.module) for name in c.names)}
    matched: set[int] = set()
    for pattern in choice:
        here = {k for k, c in enumerate(found) if matches(c.names, pattern)}
        if not here and pattern.strip("*"):
            some = ", ".join(c.names[0] for c in found[:3])
            raise ValueError(f"{pattern!r} matches none of the {len(found)} {what} ({some}, …)")
        matched |= here
    return matched


def _check_possible(found: list[Candidate], include: Choice, done: str) -> None:
    """Raise for a pattern that matches nothing but what can't be done what is done."""
    for pattern in () if callable(include) else include:
        here = [c for c in found if matches(c.names, pattern)]
        if pattern.strip("*") and here and all(c.always for c in here):
            raise ValueError(f"{pattern!r}: {here[0].names[0]} can't be {done}: {here[0].stays}")


def _is_named(candidate: Candidate, include: Choice) -> bool:
    """Whether a pattern says that it means this candidate: "*lm_head*" or "model.head", not "model.*"."""
    if callable(include):
        return False
    patterns = [pattern for pattern in include if matches(candidate.names, pattern)]
    if any("experts" in name for name in candidate.names) and any("experts" in pattern for pattern in patterns):
        return True  # "*experts*" means all of their parts
    ends = [name.removesuffix(".weight").rpartition(".")[2] for name in candidate.names]
    lasts = [pattern.removesuffix(".weight").rpartition(".")[2] for pattern in patterns]
    return any(last.strip("*?") and matches(ends, last) for last in lasts)


def skips(patterns: Iterable[str], name: str) -> bool:
    """Whether transformers leaves a module of that name alone, given its list of what to skip.

    A pattern is a regular expression that matches from the start up to the end of a part, or a suffix.
    Source: transformers 5, quantizers_utils.should_convert_module.
    """
    boundary = r"(?:(?<=\.)|(?=\.|$))"
    return any(re.match(f"(?:{key}){boundary}", name) or name.endswith(key) for key in patterns)
