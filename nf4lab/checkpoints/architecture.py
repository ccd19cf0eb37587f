"""What transformers makes of a folder: its model, without weights, and the module that each tensor of the file goes to.

Where transformers is installed and knows the architecture, the model itself says what is a linear layer, what is stored
transposed, what is tied and what is kept in float32. Where it does not, names must do, and what names can't tell is
refused.
"""

import bisect
import copy
import logging
import math
import re
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from nf4lab.blockwise import DTYPES
from nf4lab.checkpoints.tensorfile import TensorFile
from nf4lab.choice import (
    FUSED_EXPERTS,
    Candidate,
    candidates,
    candidates_by_name,
    is_conv1d,
    is_plain_linear,
    taken_apart,
)

# Models whose linear layers are Conv1D, which stores its weight transposed; no name tells them.
CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")
# Heads that a class of transformers may add to what a folder holds: new layers, which no file can have in 4 bits.
NEW_HEADS = ("lm_head", "classifier", "score", "qa_outputs")
CONVERTED = "transformers makes another tensor of it when it loads"
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
WEIGHT = re.compile(r"weight(?!\w)")  # what transformers (5.23) casts no longer in a file with bitsandbytes' layers
NO_PLACE = "transformers has no place for it"
RENAMED = "transformers looks for it by this name, and for its constants by another"
# Keys of a config.json that say how many layers there are: each has a tensor at least, unless layers share theirs.
N_LAYERS = re.compile(r"(num|n|encoder|decoder)_(\w+_)?layers?|depths?")
N_POSITIONS = re.compile(r"(max|n)_(\w+_)?position(s|_embeddings)")
SHARED = 1000  # layers that may share the tensors of one
Rows = dict[str, tuple[int, int]]


class Architecture(NamedTuple):
    """candidates: the matrices of a file, named by its keys. modules: those of transformers' model by key.

    parts: of each matrix that is split when a model is loaded, the rows, from and to, by the name of what they become.
    linear: the names of all layers that transformers would quantize or skip, in whichever of its classes opens the
    folder, and prefix: what their names may begin with. known: whether transformers told.
    dtype_of: the dtype that transformers gives a tensor of the file, by its key and whether it goes into 4 bits.
    closed: why it opens no file of this model in 4 bits, whatever is quantized; empty where it does.
    """

    candidates: list[Candidate]
    modules: dict[str, tuple[str, ...]]
    linear: list[str]
    known: bool
    dtype_of: Callable[[str, bool], torch.dtype | None]
    closed: str = ""
    prefix: str = ""
    parts: Mapping[str, Rows] = MappingProxyType({})


def architecture_of(folder: Path, config: dict | None, shapes: dict[str, tuple[int, ...]]) -> Architecture:
    """The judgement of a folder's tensors, by names and shapes: those of floating point with two dimensions or more.

    A folder with code of its own may be of a type that transformers knows. It opens it by its own class then, unless it
    is told to trust the code; names of the file's count as well, and what only one of the two would find stays. Where
    a quarter of the weights has no place in its class, or another shape, the code alone is meant.

    Raises ValueError where the configuration can't be that of these tensors, where transformers knows its type and
    makes no model of it, and where the type is known to store matrices transposed and transformers can't be asked.
    """
    has_code = config is not None and "auto_map" in config
    try:
        judged = _by_transformers(folder, config, shapes, has_code)
        lost = [c.numel for c in judged.candidates if c.stays == NO_PLACE] if has_code and judged else []
        judged = None if 4 * sum(lost) > sum(map(math.prod, shapes.values())) else judged
    except ValueError:
        if not has_code:
            raise
        judged = None
    if judged is not None:
        return judged
    if config is not None and config.get("model_type") in CONV1D:
        raise ValueError(
            f"{folder.name}: a {config['model_type']} stores its matrices transposed, and transformers, "
            "which knows which of them, is not installed or does not know this model"
        )
    found = candidates_by_name(shapes, sizes_of_tables(config or {}))
    modules = {c.names[0]: (c.names[0].removesuffix(".weight"),) for c in found}
    linear, dtype = [name for (name,) in modules.values()], named_dtype(config)
    return Architecture(found, modules, linear, False, lambda key, _: dtype if WEIGHT.search(key) else None)


def _by_transformers(folder: Path, config: dict | None, shapes: dict, has_code: bool) -> Architecture | None:
    """The judgement by transformers' model of a config.json; None where there is none."""
    model = None
    if config is not None:
        _check_sizes(folder, config, len(shapes), sum(map(math.prod, shapes.values())))
        with no_more_parameters_than(100 * (100 + len(shapes))):
            model = model_of(folder, config)
    return None if model is None else _by_model(folder, model, shapes, has_code, named_dtype(config))


def sizes_of_tables(config: dict) -> set[int]:
    """The numbers of tokens and of positions that a config.json, or a part of it, names."""
    named = {key: value for key, value in config.items() if key.endswith("vocab_size") or N_POSITIONS.fullmatch(key)}
    parts = (sizes_of_tables(part) for part in config.values() if isinstance(part, dict))
    return {value for value in named.values() if isinstance(value, int)}.union(*parts)


def matrices_of(files: Iterable[TensorFile]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a checkpoint that may be quantized: floats of two dimensions or more."""
    entries = {name: entry for file in files for name, entry in file.entries.items()}
    return {n: e.shape for n, e in entries.items() if len(e.shape) >= 2 and e.dtype in DTYPES}


def _check_sizes(folder: Path, config: dict, n_matrices: int, n_weights: int) -> None:
    """Raise ValueError for more layers, or more positions with a vector each, than these tensors can be of.

    transformers would build all the layers, and some models compute a vector for each position, one number at a time.
    """
    is_rotary = any("rope" in key or "rotary" in key for key in config)
    for key, value in config.items():
        if isinstance(value, dict):
            _check_sizes(folder, value, n_matrices, n_weights)
        if N_POSITIONS.fullmatch(key) and not is_rotary and isinstance(value, int) and value > n_weights:
            raise ValueError(
                f"{folder / 'config.json'}: {key} is {value}, and there are {n_weights} weights in matrices"
            )
        if not N_LAYERS.fullmatch(key):
            continue
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int) and not 0 <= number <= SHARED + n_matrices:
                raise ValueError(f"{folder / 'config.json'}: {key} is {number}, and there are {n_matrices} matrices")


def model_of(folder: Path, config: dict) -> nn.Module | None:
    """transformers' model for a config.json, on the meta device; None where it is not installed or knows no such type.

    Raises ValueError where a type that it knows makes no model.
    """
    try:
        import transformers
    except ImportError:
        return None
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in transformers.CONFIG_MAPPING:
        return None
    with quiet():
        try:
            values = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
            _give_dtype(values, named_dtype(config))
            model_class = getattr(transformers, (config.get("architectures") or [""])[0], None)
            if model_class is None and type(values) not in transformers.MODEL_MAPPING:
                return None
            with torch.device("meta"):
                if model_class is not None:
                    return model_class._from_config(values)
                return transformers.AutoModel.from_config(values, trust_remote_code=False)
        except ImportError as error:  # a library that this model needs, and that is not here
            logging.getLogger(__name__).debug("transformers makes no model of %s: %s", folder, error)
            return None
        except Exception as error:  # whatever a class does with values that it does not expect
            said = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"{folder / 'config.json'}: transformers makes no model of it: {said:.300}") from error


def _give_dtype(config, dtype: torch.dtype | None) -> None:
    """Have a configuration and its parts name a dtype, as they do once transformers has loaded the model."""
    if dtype is not None:
        config.dtype = dtype
        for name in getattr(config, "sub_configs", ()):
            if getattr(config, name, None) is not None:
                _give_dtype(getattr(config, name), dtype)


@contextmanager
def no_more_parameters_than(most: int):
    """Raise ValueError where more parameters are made in here, by this thread, for models."""
    made, thread = 0, threading.get_ident()

    def count(module, name, parameter):
        nonlocal made
        made += threading.get_ident() == thread
        if made > most:
            raise ValueError(f"it has more than {most} parameters, of which there is no sign in the files")

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def quiet():
    """No remarks of transformers while it makes a model that nobody asked it for."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _by_model(
    folder: Path, model: nn.Module, shapes: dict[str, tuple[int, ...]], has_code: bool, dtype
) -> Architecture:
    judged, state = candidates(model), model.state_dict()
    by_name = {name: c for c in judged for name in c.names}
    found, modules, parts = [], {}, {} if has_code else _parts(model, shapes, by_name)
    place_of, _ = _transforms(model)
    for key, (place, pattern) in {key: place_of(key) for key in shapes}.items():
        known = by_name.get(place) or by_name.get(place.removesuffix(".weight"))
        numel = torch.Size(shapes[key]).numel()
        if pattern is None and place in state and state[place].shape != shapes[key]:
            both = f"{tuple(shapes[key])} in its file, {tuple(state[place].shape)} by its config.json"
            raise ValueError(f"{folder}: tensor {key!r} has shape {both}: transformers does not open it")
        if key in parts:
            modules[key] = tuple(name.removesuffix(".weight") for name in parts[key])
            found.append(_of_all(key, numel, [by_name[name] for name in modules[key]]))
        elif pattern is not None:
            found.append(Candidate((key,), "linear" if len(shapes[key]) == 2 else "experts", numel, CONVERTED))
        elif known is None and place in state:
            found.append(Candidate((key,), "other", numel, "nothing that is learned", always=True))
        elif known is None:
            found.append(Candidate((key,), "other", numel, NO_PLACE, always=True))
        else:
            renamed = "" if place_of(key, False)[0] == place else RENAMED
            stays = FUSED_EXPERTS if known.kind == "experts" else known.stays or renamed
            found.append(replace(known, names=(key,), stays=stays, barred=known.barred or renamed, module=None))
            modules[key] = tuple({name.removesuffix(".weight"): None for name in (place, key)[: 1 + has_code]})
    linear = [name for c in judged if c.kind in ("linear", "conv1d") for name in c.names]
    linear += layers_elsewhere(model, linear)
    linear += [key.removesuffix(".weight") for key, shape in shapes.items() if has_code and len(shape) == 2]
    dtype_of = _dtypes(model, dtype)
    return Architecture(found, modules, linear, True, dtype_of, taken_apart(model), model.base_model_prefix, parts)


def named_dtype(config: dict | None) -> torch.dtype | None:
    """The dtype that a config.json itself, no part of it, gives a model; None where it names none of `FLOATS`."""
    name = str((config or {}).get("dtype") or (config or {}).get("torch_dtype")).removeprefix("torch.")
    dtype = getattr(torch, name, None)
    return dtype if dtype in FLOATS else None


def _dtypes(model: nn.Module, dtype: torch.dtype | None) -> Callable[[str, bool], torch.dtype | None]:
    """A function from a file's key, and whether it goes into 4 bits, to its dtype in transformers; None for the file's.

    dtype: of the model's configuration. Some modules are kept in float32 whatever it is, some in a model of 16 bits.
    """
    place_of, _ = _transforms(model)
    kept = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    kept |= set((getattr(model, "_keep_in_fp32_modules", None) or ()) if dtype == torch.float16 else ())
    in_float32 = re.compile("|".join(name.replace("*", ".*") for name in sorted(kept)) or "(?!)")
    state = model.state_dict()

    def dtype_of(key: str, in_4_bits: bool) -> torch.dtype | None:
        place = place_of(key)[0]
        if dtype in (torch.float16, torch.bfloat16) and in_float32.search(place):
            return torch.float32
        if dtype is None or in_4_bits or place not in state:
            return dtype if in_4_bits or WEIGHT.search(key) else None
        return state[place].dtype

    return dtype_of


def _of_all(key: str, numel: int, parts: list[Candidate]) -> Candidate:
    """One candidate for all the layers that a matrix of a file becomes: what one of them bars, bars it."""
    stays = next((part for part in parts if part.stays), parts[0])
    return Candidate((key,), "linear", numel, stays.stays, any(part.always for part in parts), stays.barred)


def _parts(model: nn.Module, shapes: dict[str, tuple[int, ...]], known: dict[str, Candidate]) -> dict[str, Rows]:
    """The rows of each matrix of a file that transformers splits into the weights of linear layers, in their order.

    A query, a key and a value in one, say. A file may have these weights under the model's own names as well.
    """
    place_of, converters = _transforms(model)
    places = {key: place_of(key) for key in shapes}
    sharing = Counter(place for place, _ in places.values())
    found = {}
    for key, (place, pattern) in places.items():
        if pattern is None or sharing[place] > 1 or len(shapes[key]) != 2:
            continue
        rows = _rows(_converted(model, place, {key: pattern}, converters, {key: _numbered(shapes[key][0])}))
        layers = [known.get(name.removesuffix(".weight")) for name in rows]
        whole = sum(stop - start for start, stop in rows.values()) == shapes[key][0] and len(rows) > 1
        is_linear = all(layer is not None and layer.kind == "linear" for layer in layers)
        if whole and is_linear and all(place_of(name, False) == (name, None) for name in rows):
            found[key] = rows
    return found


def _numbered(n_rows: int) -> Tensor:
    """A narrow matrix of so many rows of which every element tells where it was."""
    return torch.arange(2 * n_rows, device="cpu").view(n_rows, 2)


def _rows(made: dict[str, Tensor]) -> Rows:
    """Which rows of `_numbered` each tensor is, from and to; nothing where one is anything else."""
    rows = {}
    for name, tensor in made.items():
        start = int(tensor.flatten()[0]) // 2 if tensor.numel() else 0
        stop = start + len(tensor) if tensor.dim() == 2 else start
        if not torch.equal(tensor, _numbered(stop)[start:]):
            return {}
        rows[name] = (start, stop)
    return rows


def _transforms(model: nn.Module) -> tuple[Callable[..., tuple[str, str | None]], dict]:
    """(a function from a file's key to its place in the model and its conversion's pattern, converters by pattern).

    A key that is a name of the model is its own place where the transforms would make of it what the model hasn't; not
    so for the constants of a weight in 4 bits, of which the model knows no names: for these the function takes False.
    """
    from transformers import conversion_mapping, core_model_loading

    transforms = conversion_mapping.get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, core_model_loading.WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, core_model_loading.WeightConverter)]
    state, prefix = model.state_dict(), model.base_model_prefix

    def place_of(key: str, or_itself: bool = True) -> tuple[str, str | None]:
        place, pattern = core_model_loading.rename_source_key(key, renamings, converters, prefix, state)
        return (key, None) if or_itself and place not in state and key in state else (place, pattern)

    return place_of, {pattern: c for c in converters for pattern in c.source_patterns}


def save_to_be_found_(model: nn.Module, names: Collection[str]) -> bool:
    """Have a model of transformers saved so that it finds these weights again in 4 bits; False where it can't be.

    On saving it gives a model's tensors the names of its first files, and joins or splits them where those did. Packed
    bytes must not be: then the model's own tensors are saved, renamed if need be.
    """
    loading = sys.modules.get("transformers.core_model_loading")
    if loading is None or not names:  # where no one has imported it, it saves nothing
        return True
    transforms = getattr(model, "_weight_conversions", None)
    if transforms is None:
        from transformers.conversion_mapping import get_model_conversion_mapping

        every = get_model_conversion_mapping(model, add_legacy=False)
        transforms = [t for t in every if not isinstance(t, loading.PrefixChange)]
    place_of, _ = _transforms(model)
    for kept in (transforms, [t for t in transforms if isinstance(t, loading.WeightRenaming)], []):
        back = [t.reverse_transform() for t in kept[::-1]]
        renamings = [t for t in back if isinstance(t, loading.WeightRenaming)]
        converters = [t for t in back if isinstance(t, loading.WeightConverter)]
        is_joined = any(loading.apply_converters(name, converters)[1] is not None for name in names)
        saved = {name: loading.apply_renamings(name, renamings) for name in names}
        if not is_joined and all(place_of(key, False) == (name, None) for name, key in saved.items()):
            if len(kept) < len(transforms):
                model._weight_conversions = kept
            return True
    return False


def by_the_models_names(model: nn.Module, stored: dict) -> tuple[dict, dict[str, dict[str, object]]]:
    """(tensors by the names of a model of transformers, those that it joins by the name of what they become).

    stored: tensors, quantized or not, by the file's names.
    """
    place_of, _ = _transforms(model)
    named, joined = {}, {}
    for key, tensor in stored.items():
        place, pattern = place_of(key)
        if pattern is None:
            named[place] = tensor
        else:
            joined.setdefault(place, {})[key] = tensor
    return named, joined


def join(model: nn.Module, place: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What transformers makes of tensors of a file that it joins, by the model's names: one parameter, or a few."""
    place_of, converters = _transforms(model)
    return _converted(model, place, {key: place_of(key)[1] for key in tensors}, converters, tensors)


def _converted(model: nn.Module, place: str, patterns: dict, converters: dict, tensors: dict[str, Tensor]) -> dict:
    """What the converter of some keys' patterns makes of their tensors."""
    from transformers.core_model_loading import dot_natural_key

    keys = sorted(tensors, key=dot_natural_key)
    converter = copy.deepcopy(converters[patterns[keys[0]]])
    for key in keys:
        converter.add_tensor(place, key, patterns[key], tensors[key])
    made = converter.convert(place, model=model, config=model.config)
    return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def layers_elsewhere(model: nn.Module, linear: Iterable[str]) -> list[str]:
    """The linear layers that transformers' other classes have for a model's configuration, beside those named.

    A pooler, heads: what a folder has of these, it has in full precision, and what it lacks is made anew. A class of
    which most layers are others is another model.
    """
    place, config = type(model).__module__, getattr(model, "config", None)
    kinds = vars(sys.modules[place]).values() if place.startswith("transformers.models.") else ()
    known, found = {_bare(name, getattr(model, "base_model_prefix", "")) for name in linear}, {}
    for kind in kinds:
        if isinstance(kind, type) and getattr(kind, "config_class", None) is type(config):
            names = [_bare(name, kind.base_model_prefix) for name in _linear_in(kind, config)]
            others = [name for name in names if name not in known]
            found |= dict.fromkeys(others if 2 * len(others) <= len(names) else ())
    return list(found)


def _linear_in(kind: type, config) -> list[str]:
    """The linear layers of a class of transformers; none of one that nobody makes, or that wants more than `config`."""
    with quiet(), warnings.catch_warnings(action="ignore"), torch.random.fork_rng([]), torch.device("meta"):
        try:
            model = kind._from_config(copy.deepcopy(config))
        except Exception:  # whatever a class does with values that it does not expect
            return []
    return [name for name, module in model.named_modules() if is_plain_linear(module) or is_conv1d(module)]


def _bare(name: str, prefix: str) -> str:
    """A layer's name without what some of transformers' classes have before it."""
    return name.removeprefix(f"{prefix}.") if prefix else name


def skip_modules(linear: Iterable[str], quantized: set[str], prefix: str = "") -> list[str]:
    """transformers' list of modules to skip, such that it replaces the quantized ones among `linear` and no other.

    prefix: what stands before names in some of its classes, and in others not: a name without skips both.
    A name skips every module that ends in it too; where that would be a quantized one, the name stands anchored. The
    last part stands for several names that end in it, where it may: transformers tries the whole list on every module.
    """
    in_4_bits = {_bare(name, prefix) for name in quantized}
    names = list(dict.fromkeys(name for name in (_bare(n, prefix) for n in linear) if name not in in_4_bits))
    in_4_bits |= {f"{prefix}.{name}" for name in in_4_bits if prefix}
    forward, backward = sorted(in_4_bits), sorted(name[::-1] for name in in_4_bits)
    optional = rf"(?:{re.escape(prefix)}\.)?" if prefix else ""

    def would_skip(name: str) -> bool:
        starts, ends = _first_from(forward, name), _first_from(backward, name[::-1])
        return starts == name or _first_from(forward, f"{name}.").startswith(f"{name}.") or ends.startswith(name[::-1])

    ends = Counter(name.rpartition(".")[2] for name in names)
    short = {end for end, n in ends.items() if n > 1 and not would_skip(end)}
    names = [end if (end := name.rpartition(".")[2]) in short else name for name in names]
    listed = [f"^{optional}{re.escape(name)}$" if would_skip(name) else name for name in names]
    return sorted({*listed, *(head for head in NEW_HEADS if not would_skip(head))})


def _first_from(ordered: list[str], start: str) -> str:
    """The first of ordered strings that is not before `start`; empty where there is none."""
    at = bisect.bisect_left(ordered, start)
    return ordered[at] if at < len(ordered) else ""
