"""A model filled from a checkpoint by nf4lab or bitsandbytes: where a weight is stored in 4 bits, a 4-bit layer."""

import os
import re
from dataclasses import replace

import torch
from torch import Tensor, nn

from nf4lab.blockwise import QuantizedTensor, quantize
from nf4lab.checkpoints.architecture import by_the_models_names, join
from nf4lab.checkpoints.files import iterate_quantized
from nf4lab.choice import is_conv1d, is_plain_linear, matches, transformers_models
from nf4lab.layers.embedding import Embedding4bit
from nf4lab.layers.experts import Experts4bit
from nf4lab.layers.linear import Linear4bit
from nf4lab.layers.stored import Stored4bit, whose_4_bits
from nf4lab.layers.swap import check_hooks, check_is_model, replace_layer


def load_model_(model: nn.Module, path: str | os.PathLike) -> None:
    """Fill `model` from a checkpoint, in place, with a 4-bit layer for each weight that is stored in 4 bits.

    model: of the checkpoint's architecture, in full precision; its weights do not matter, so one that
    `AutoModelForCausalLM.from_config(config)` makes will do. path: as for `nf4lab.load_quantized`. Any format of
    nf4lab's. For a model of transformers names are translated as it does, and experts that the file has one by one are
    joined: their values are the file's, their constants stored in full. Weights that the file lacks because they are
    tied are tied again.

    Raises ValueError, naming the tensor, where the model has no place for it, another shape, a parameter that the
    file lacks, a buffer on the meta device that no file has, a layer in 4 bits already, or hooks on a layer that would
    be lost with it; the model is then as it was.
    """
    check_is_model(model)
    stored = dict(iterate_quantized(path))
    if next(transformers_models(model), ("no", None))[0] == "":
        stored, parts = by_the_models_names(model, stored)
        for place, tensors in parts.items():
            stored |= _joined(model, place, tensors)
    quantized = {name: q for name, q in stored.items() if isinstance(q, QuantizedTensor)}
    plain = {name: tensor for name, tensor in stored.items() if name not in quantized}
    layers = {name: _layer_for(model, name, q) for name, q in quantized.items()}
    _check(model, plain, set(layers))
    for name, layer in layers.items():
        if isinstance(layer, Experts4bit):
            parent, _, last = name.rpartition(".")
            Experts4bit.put(model.get_submodule(parent), last, layer)
        else:
            replace_layer(model, _places(model, name.removesuffix(".weight")), layer)
    model.load_state_dict(plain, strict=False, assign=True)
    if hasattr(model, "tie_weights"):
        model.tie_weights()


def _joined(model: nn.Module, place: str, parts: dict[str, QuantizedTensor | Tensor]) -> dict:
    """What transformers makes of tensors that it joins, in 4 bits where they were, with the same values."""
    whole = [part.dequantize(torch.float32) if isinstance(part, QuantizedTensor) else part for part in parts.values()]
    made = join(model, place, dict(zip(parts, whole, strict=True)))
    first = next(iter(parts.values()))
    if not isinstance(first, QuantizedTensor):
        return made
    for name, tensor in made.items():
        q = quantize(tensor, first.format, first.block_size)
        if not torch.equal(q.dequantize(), tensor):
            raise ValueError(
                f"{name!r} is joined from {len(parts)} tensors, and {first.format.name} does not hold the whole: "
                "quantize the original's loaded model"
            )
        made[name] = replace(q, dtype=first.dtype)
    return made


def _layer_for(model: nn.Module, name: str, q: QuantizedTensor) -> Stored4bit:
    """The 4-bit layer for a stored tensor. Raises ValueError where the model has no place for it."""
    parent, _, last = name.rpartition(".")
    try:
        module = model.get_submodule(parent)
    except AttributeError:
        raise ValueError(f"tensor {name!r} is stored in 4 bits, and the model has no layer {parent!r}") from None
    if last == "weight":
        check_hooks(module, parent)
    if last == "weight" and is_plain_linear(module):
        kind, shape, more = Linear4bit, module.weight.shape, (module.bias,)
    elif last == "weight" and is_conv1d(module):
        kind, shape, more = Linear4bit, module.weight.T.shape, (module.bias,)
    elif last == "weight" and type(module) is nn.Embedding:
        kind, shape, more = Embedding4bit, module.weight.shape, (module.padding_idx,)
    elif isinstance(module._parameters.get(last), Tensor) and len(q.shape) == 3:
        kind, shape, more = Experts4bit, module._parameters[last].shape, ()
    elif whose_4_bits(module):
        raise ValueError(f"layer {parent!r} is in 4 bits already: load into the model as its configuration makes it")
    else:
        raise ValueError(f"tensor {name!r} is stored in 4 bits; {type(module).__name__} {parent!r} takes none")
    if shape != q.shape:
        raise ValueError(f"tensor {name!r} has shape {tuple(q.shape)}; the model's is {tuple(shape)}")
    layer = kind(q, *more).train(module.training)
    if is_conv1d(module):
        layer.was_conv1d = True
    return layer


def _places(model: nn.Module, name: str) -> list[str]:
    """All the names of the layer of that name."""
    layer = model.get_submodule(name)
    return [other for other, module in model.named_modules(remove_duplicate=False) if module is layer]


def _check(model: nn.Module, plain: dict[str, Tensor], in_4_bits: set[str]) -> None:
    """Raise where the tensors in full precision are not those that the model still needs."""
    state = model.state_dict()
    for name, tensor in plain.items():
        if name not in state:
            raise ValueError(f"the model has no tensor {name!r}")
        if state[name].shape != tensor.shape:
            shapes = f"{tuple(tensor.shape)}; the model's is {tuple(state[name].shape)}"
            raise ValueError(f"tensor {name!r} has shape {shapes}")
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    may_lack = [*tied, *(getattr(model, "_tied_weights_keys", None) or [])]
    computed = getattr(model, "_keys_to_ignore_on_save", None) or []  # Marian's positions, say
    for name, buffer in model.named_buffers():
        if buffer.is_meta and name not in state:
            raise ValueError(
                f"the model's buffer {name!r} is on the meta device, and no file has it: make the model off it"
            )
    for name in state.keys() - plain.keys() - in_4_bits:
        if not matches(name, may_lack) and not any(re.search(key, name) for key in computed):
            raise ValueError(f"the checkpoint has no tensor {name!r}, which the model needs")
