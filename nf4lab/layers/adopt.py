"""bitsandbytes' layers and nf4lab's, one for the other, with the same bytes: nothing is quantized anew."""

import json
import warnings

import torch
from torch import Tensor, nn

from nf4lab.blockwise import QuantizedTensor
from nf4lab.checkpoints.architecture import save_to_be_found_
from nf4lab.checkpoints.keys import BITSANDBYTES_STATES, from_parts, parts_of
from nf4lab.choice import transformers_models
from nf4lab.layers.linear import Linear4bit
from nf4lab.layers.swap import check_hooks, check_in_memory, choose_layers, move_hook, replace_layer
from nf4lab.peeks import CAST, peeked_at

MARKS, ASIDE = ("hf_quantizer", "quantization_method", "is_quantized"), "_marks_of_bitsandbytes"


def adopt_(model: nn.Module) -> list[str]:
    """Put nf4lab's Linear4bit in the place of every one of bitsandbytes in `model`; returns the layers' names.

    Then a model of transformers can be cast, and trained with adapters of nf4lab's too. Packed bytes, constants, bias,
    compute dtype and accelerate's hook are taken over; where bitsandbytes stores its
    bytes as another dtype, or repacked for the CPU, they are brought back to its file's order. All or nothing.

    Warns where bitsandbytes has rounded the constants, as it does at the first pass on some CPUs, and where
    transformers casts a layer's input to its weight's dtype (see `nf4lab.peeks`): bitsandbytes' layer was given bytes,
    and nf4lab's is given the numbers. What a model casts while it is loaded, as Swin v2 does, stays bytes.
    Raises ValueError, naming the layer, where one has no quantized weight yet or none in memory, is the base of PEFT's
    adapters (adopt first, then add them), or has hooks on its passes, which would be lost, and where there is none.
    """
    names = choose_layers(model, is_bitsandbytes, "*", (), of_kind="is a Linear4bit of bitsandbytes")
    _warn_of_rounding(model, names)
    made = [(places, _adopted(model, places)) for places in names]
    for places, layer in made:
        move_hook(model.get_submodule(places[0]), layer)
        replace_layer(model, places, layer)
    _warn_of_casts(model, names, "answers otherwise from now on, rightly but for what it cast while it was loaded")
    for _, part in transformers_models(model):
        _can_be_saved(part)
        _set_aside(part)
    return [places[0] for places in names]


def release_(model: nn.Module) -> list[str]:
    """Put bitsandbytes' Linear4bit in the place of every one of nf4lab in `model`; returns the layers' names.

    Warns as `adopt_`: such a layer is given bytes again, and the model answers wrongly.
    Raises ValueError, naming the layer, where bitsandbytes has no word for its format, where its weight is not in
    memory or it has hooks on its passes, which would be lost, and where there is none; ModuleNotFoundError without
    bitsandbytes. All or nothing.
    """
    ours = "is a Linear4bit of nf4lab"
    names = choose_layers(model, lambda layer: isinstance(layer, Linear4bit), "*", (), of_kind=ours)
    made = [(places, _released(places[0], model.get_submodule(places[0]))) for places in names]
    for places, layer in made:
        move_hook(model.get_submodule(places[0]), layer)
        replace_layer(model, places, layer)
    for _, part in transformers_models(model):
        vars(part).update(vars(part).pop(ASIDE, {}))
    _warn_of_casts(model, names, "answers wrongly")
    return [places[0] for places in names]


def _conv1d() -> type:
    from transformers.pytorch_utils import Conv1D

    return Conv1D


def is_bitsandbytes(layer: nn.Module) -> bool:
    """Whether a layer is bitsandbytes' Linear4bit, told without importing it."""
    return any(c.__name__ == "Linear4bit" and c.__module__.startswith("bitsandbytes") for c in type(layer).__mro__)


def _warn_of_casts(model: nn.Module, names: list[list[str]], what: str) -> None:
    """Warn of layers, among those replaced, that give other results for being bitsandbytes' or nf4lab's."""
    asked = {name for name, why in peeked_at(model).items() if why == CAST}
    cast = [places[0] for places in names if asked.intersection(places)]
    if cast:
        more = f" and of {len(cast) - 1} more" if len(cast) > 1 else ""
        warnings.warn(f"transformers casts the input of {cast[0]!r}{more} to the weight's dtype, which in "
                      f"bitsandbytes' layers is uint8: the model {what}", stacklevel=3)  # fmt: skip


def _adopted(model: nn.Module, names: list[str]) -> Linear4bit:
    parent = model.get_submodule(names[0].rpartition(".")[0])
    if hasattr(type(parent), "adapter_layer_names"):
        raise ValueError(f"layer {names[0]!r} carries PEFT's adapters: adopt the model first, then add them")
    layer = model.get_submodule(names[0])
    check_hooks(layer, names[0])
    check_in_memory(layer, names[0], layer.weight, (layer.out_features, layer.in_features))
    q = from_parts("weight", _parts(layer), names[0])
    if not isinstance(q, QuantizedTensor):
        raise ValueError(f"layer {names[0]!r} is not quantized yet: bitsandbytes does it when a layer is moved")
    new = Linear4bit(q, layer.bias, layer.compute_dtype).train(layer.training)
    new.was_conv1d = getattr(getattr(layer, "source_cls", None), "__name__", "") == "Conv1D"  # as transformers marks it
    return new


def _parts(layer: nn.Module) -> dict[str, Tensor]:
    """What bitsandbytes stores of a layer's weight. What a CPU with bfloat16 has made of the constants is put in order.

    At the first pass for inference bitsandbytes rounds them to bfloat16 there, block by block of each row; on saving it
    turns back all but these (0.50.2).
    """
    parts = {key: part for key, part in layer.state_dict().items() if key.startswith("weight")}
    absmax = parts.get("weight.absmax")
    if absmax is not None and absmax.dtype == torch.bfloat16 and absmax.dim() == 2:
        parts["weight.absmax"] = absmax.T.reshape(-1).float()  # (blocks per row, rows) to the file's order
    for key in [key for key in parts if key.removeprefix("weight") in BITSANDBYTES_STATES]:
        state = json.loads(bytes(parts[key].tolist()))
        if state.get("nested_dtype") == "bfloat16":  # what those of a bfloat16 weight were quantized from
            text = json.dumps(state | {"nested_dtype": "float32"})
            parts[key] = torch.tensor(list(text.encode()), dtype=torch.uint8)
    return parts


def _warn_of_rounding(model: nn.Module, names: list[list[str]]) -> None:
    """Warn where bitsandbytes has rounded the constants of layers that are to be adopted."""
    states = {places[0]: getattr(model.get_submodule(places[0]).weight, "quant_state", None) for places in names}
    rounded = [name for name, state in states.items() if hasattr(state, "original_nested")]
    if rounded:
        more = f" and of {len(rounded) - 1} more" if len(rounded) > 1 else ""
        warnings.warn(f"bitsandbytes has rounded the constants of {rounded[0]!r}{more} to bfloat16, as it does at the "
                      "first pass on this CPU: adopt before it to have those of the file", stacklevel=3)  # fmt: skip


def _can_be_saved(model: nn.Module) -> None:
    """Forget how transformers read the 4-bit weights: it would undo that on saving, and (5.23) knows no way to.

    Nor is it to join or split their packed bytes.
    """
    kept = getattr(model, "_weight_conversions", None)
    if kept is not None:
        reads = [any(hasattr(step, "hf_quantizer") for step in getattr(each, "operations", ())) for each in kept]
        model._weight_conversions = [each for each, is_reading in zip(kept, reads, strict=True) if not is_reading]
    save_to_be_found_(model, [f"{name}.weight" for name, m in model.named_modules() if isinstance(m, Linear4bit)])


def _set_aside(model: nn.Module) -> None:
    """Take transformers' marks of a model that bitsandbytes has quantized off, until `release_`.

    By them it refuses to cast such a model, and to train it with any adapters but PEFT's; neither holds any longer.
    `is_loaded_in_4bit` stays: by it PEFT prepares a model for training.
    """
    found = {mark: vars(model).pop(mark) for mark in MARKS if mark in vars(model)}
    if found:
        setattr(model, ASIDE, found)


def _released(name: str, layer: Linear4bit) -> nn.Module:
    import bitsandbytes

    check_hooks(layer, name)
    check_in_memory(layer, name, layer.packed, layer.quantized.shape)
    layer.stored()  # raises where it lies on several processes
    parts = parts_of("weight", layer.quantized)
    if not any(f"weight{suffix}" in parts for suffix in BITSANDBYTES_STATES):
        raise ValueError(f"layer {name!r}: bitsandbytes has no word for {layer.quantized!r}")
    packed, device = parts.pop("weight"), layer.packed.device
    new = bitsandbytes.nn.Linear4bit(
        layer.in_features, layer.out_features, False, layer.compute_dtype, quant_type=layer.format.name, device="meta"
    )
    new.weight = bitsandbytes.nn.Params4bit.from_prequantized(packed, parts, device=device, module=new)
    new.bias = None if layer.bias is None else layer.bias
    new.weight.requires_grad_(False)
    new.source_cls = _conv1d() if layer.was_conv1d else nn.Linear  # as transformers marks it
    return new.train(layer.training)
