"""Low-rank adapters on a frozen layer: y = base(x) + alpha / rank * B A x. All that trains is A and B.

Source: LoRA (arXiv:2106.09685); on a 4-bit base, QLoRA (arXiv:2305.14314), section 3.
"""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nf4lab.blockwise import QuantizedTensor, quantize
from nf4lab.choice import adapters_in, tied_weights, transformers_models
from nf4lab.formats.double_quant import QuantizedConstants
from nf4lab.layers.linear import Linear4bit
from nf4lab.layers.ops import autocast_dtype
from nf4lab.layers.starts import STARTS, check_start
from nf4lab.layers.stored import Stored4bit, whose_4_bits
from nf4lab.layers.swap import (
    Choice,
    check_hooks,
    check_in_memory,
    check_is_model,
    check_not_offloaded,
    choose_layers,
    is_plain_linear,
    move_hook,
    replace_layer,
    write_quantization_config,
)


class LoRALinear(nn.Module):
    """A frozen linear layer and its adapter: y = base(x) + scaling * B A dropout(x), with scaling = alpha / rank.

    base: a Linear4bit or a torch.nn.Linear; its parameters are frozen. lora_A: (rank, in_features), uniform in
    +-1/sqrt(in_features); lora_B: (out_features, rank), zeros, so that training starts at the base. Both as in PEFT.
    dtype: that of the adapter, and of its arithmetic; the result has the dtype of the base's.

    Raises TypeError for another base and a rank that is no int, ValueError unless rank and alpha are positive, alpha is
    finite, and 0 <= dropout < 1.
    """

    def __init__(self, base: Linear4bit | nn.Linear, rank: int = 8, alpha: float = 16.0, dropout: float = 0.0,
                 dtype: torch.dtype = torch.float32):  # fmt: skip
        super().__init__()
        if not _can_adapt(base):
            raise TypeError(f"base must be a Linear4bit or a torch.nn.Linear; got {type(base).__name__}")
        _check_sizes(rank, alpha, dropout)
        self.base = base.requires_grad_(False)
        self.in_features, self.out_features, self.rank = base.in_features, base.out_features, rank
        self.scaling, self.dropout = alpha / rank, nn.Dropout(dropout)
        where = {"dtype": dtype, "device": base.packed.device if isinstance(base, Linear4bit) else base.weight.device}
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, **where))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, **where))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.train(base.training)  # in evaluation nothing is dropped, from the start

    def forward(self, x: Tensor) -> Tensor:
        """x (…, in_features) to (…, out_features).

        The adapter goes first. On a 4-bit base it alone keeps something for the backward pass, and activation
        checkpointing runs a layer again only as far as the last of that: in the last layer of a block, not the frozen
        product.
        """
        rows, dtype = x.reshape(-1, self.in_features), autocast_dtype(x) or self.lora_A.dtype
        inputs = self.dropout(rows) if self.training and self.dropout.p else rows
        inputs, a, b = (t if t.dtype is dtype else t.to(dtype) for t in (inputs, self.lora_A, self.lora_B))
        change = F.linear(F.linear(inputs, a) * self.scaling, b)  # scaled where a row has only rank numbers
        y = self.base(rows)
        return (y + change.to(y.dtype)).reshape(*x.shape[:-1], self.out_features)

    def merge(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """One plain layer that does the same: weight W_hat + scaling * B A, in `dtype` (default: the base's).

        The sum is made in float32, or in float64 where that is the adapter's or the result's dtype, and rounded once.
        """
        quantized = isinstance(self.base, Linear4bit)
        weight = self._sum(dtype or (self.base.dtype if quantized else self.base.weight.dtype)).detach()
        merged = self.base.with_weight(weight) if quantized else copy.deepcopy(self.base).to(weight.dtype)
        merged.weight = nn.Parameter(weight)
        return merged.requires_grad_().train(self.training)

    def _sum(self, dtype: torch.dtype) -> Tensor:
        """W_hat + scaling * B A, rounded to dtype."""
        wide = torch.promote_types(torch.promote_types(dtype, self.lora_A.dtype), torch.float32)
        base = self.base
        if isinstance(base, Linear4bit):
            weight = torch.ops.nf4lab.dequantize_stored(base.stored(), base.layout, wide)
        else:
            weight = base.weight.to(wide)
        return (weight + self.scaling * (self.lora_B.to(wide) @ self.lora_A.to(wide))).to(dtype)

    @property
    def weight(self) -> Tensor:
        """The weight that base and adapter make together, (out_features, in_features), made at every access.

        For code that reads a layer's weight and does not call the layer, as torch's MultiheadAttention does, and T5:
        gradients reach the adapter through it; dropout does not act on it.
        """
        return self._sum(self.base.dtype if isinstance(self.base, Linear4bit) else self.base.weight.dtype)

    @property
    def bias(self) -> Tensor | None:
        """The base's."""
        return self.base.bias

    def extra_repr(self) -> str:
        """What repr shows between the brackets."""
        return f"rank={self.rank}, scaling={self.scaling:g}"


def _check_sizes(rank: int, alpha: float, dropout: float) -> None:
    if not isinstance(rank, int):
        raise TypeError(f"rank must be an int; got {rank!r}")
    if rank < 1 or not 0 <= dropout < 1:
        raise ValueError(f"rank must be at least 1 and dropout in [0, 1); got {rank} and {dropout}")
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha must be positive and finite: an adapter counts alpha / rank; got {alpha}")


def add_lora_(
    model: nn.Module, rank: int = 8, alpha: float = 16.0, dropout: float = 0.0,
    *, include: Choice = "*", exclude: Choice = (), dtype: torch.dtype = torch.float32,
    init: str = "zero", originals: Mapping[str, Tensor] | None = None,
) -> list[nn.Parameter]:  # fmt: skip
    """Freeze `model` and put an adapter on its linear layers, in place; return the adapters' parameters, to train.

    Linear4bit and plain torch.nn.Linear alike, but for layers whose weight something else uses too, as a tied head's:
    it could not be merged. include, exclude: as for `nf4lab.quantize_model_`.
    init: "zero", at which the model computes what it did, or "loftq" or "pissa" (`nf4lab.layers.starts`), which start
    from adapters that hold part of the weight, and quantize the base anew, stored as it was. For these, originals has
    the unquantized weight of every chosen layer under "name.weight", as the state_dict of the model before does: that
    of a Conv1D of transformers transposed.

    Hooks on a layer's passes stay on the base. Raises as `nf4lab.quantize_model_` and `LoRALinear`; TypeError for
    originals that are no mapping, ValueError where the model has adapters already or a layer is offloaded by
    accelerate, cut by fully_shard or still bitsandbytes' (`adopt_` comes first), for an unknown init, and, under
    "loftq" and "pissa", where a layer is not in 4 bits, is smaller than rank, or has no finite original of its shape.
    The model is then as it was.
    """
    check_is_model(model)
    if any(isinstance(layer, LoRALinear) for layer in model.modules()):
        raise ValueError("model has adapters already: merge them first")
    if next(adapters_in(model), None) is not None:
        raise ValueError("model has PEFT's adapters already, which would be frozen: unload or merge them first")
    if init != "zero" and init not in STARTS:
        raise ValueError(f"init must be 'zero', {', '.join(map(repr, STARTS))}; got {init!r}")
    if originals is not None and not isinstance(originals, Mapping):
        raise TypeError(f"originals must map names to weights, as a state_dict does; got {type(originals).__name__}")
    _check_sizes(rank, alpha, dropout)
    chosen = choose_layers(model, _could_adapt, include, exclude, _tied(model), "adapted")
    for names in chosen:
        layer = model.get_submodule(names[0])
        if not _can_adapt(layer):
            raise ValueError(f"layer {names[0]!r} is in {whose_4_bits(layer)} 4 bits: call nf4lab.adopt_(model) first")
        check_not_offloaded(layer, names[0], (layer.out_features, layer.in_features))
        if hasattr(_data(layer), "to_local"):
            raise ValueError(f"layer {names[0]!r} lies on several processes: add adapters before fully_shard")
    if init != "zero":
        _check_originals(model, [names[0] for names in chosen], originals or {}, init, rank)
    model.requires_grad_(False)
    for names in chosen:
        layer = LoRALinear(model.get_submodule(names[0]), rank, alpha, dropout, dtype)
        if init != "zero":
            _start(layer, originals[f"{names[0]}.weight"], init)
        replace_layer(model, names, layer)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _check_originals(model: nn.Module, names: list[str], originals: Mapping[str, Tensor], init: str, rank: int) -> None:
    for name in names:
        layer, original = model.get_submodule(name), originals.get(f"{name}.weight")
        wanted = (layer.out_features, layer.in_features)
        wanted = wanted[::-1] if getattr(layer, "was_conv1d", False) else wanted
        if not isinstance(layer, Linear4bit):
            raise ValueError(f"init {init!r} starts from a 4-bit base; layer {name!r} is a {type(layer).__name__}")
        if getattr(original, "shape", None) != wanted:
            got = "none" if original is None else tuple(getattr(original, "shape", [type(original).__name__]))
            raise ValueError(f"init {init!r} needs an original {name + '.weight'!r} of shape {wanted}; got {got}")
        try:
            check_start(original, rank)
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from None


@torch.no_grad()
def _start(layer: LoRALinear, original: Tensor, init: str) -> None:
    """Base and adapter from `STARTS`, the base stored as it was."""
    base, before = layer.base, layer.base.quantized
    scheme = before.stored_scale.double_quant if isinstance(before.stored_scale, QuantizedConstants) else False

    def stored_as_before(w: Tensor) -> QuantizedTensor:
        return quantize(w, before.format, before.block_size, scheme)

    original = (original.T if base.was_conv1d else original).to(base.packed.device)
    weight, a, b = STARTS[init](original, layer.rank, stored_as_before)
    layer.base = Linear4bit(replace(weight, dtype=base.dtype), base.bias, base.compute_dtype).train(base.training)
    layer.base.was_conv1d = base.was_conv1d
    layer.lora_A.copy_(a / layer.scaling**0.5)
    layer.lora_B.copy_(b / layer.scaling**0.5)


def merge_lora_(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Replace every adapted layer of `model` by the plain layer that it merges into, in place.

    What was a Conv1D of transformers is one again. The configuration of a model of transformers then says what is left
    in 4 bits.
    Raises ValueError where there is none, and, naming the layer, where its weight is not in memory, or where it or its
    base has hooks on its passes, which would be lost. The model is then as it was.
    """
    ours = "has adapters of nf4lab"
    chosen = choose_layers(model, lambda layer: isinstance(layer, LoRALinear), "*", (), of_kind=ours)
    for names in chosen:
        layer = model.get_submodule(names[0])
        check_hooks(layer, names[0])
        check_hooks(layer.base, f"{names[0]}.base")
        check_in_memory(layer.base, names[0], _data(layer.base), (layer.out_features, layer.in_features))
    for names in chosen:
        layer = model.get_submodule(names[0])
        merged = layer.merge(dtype)
        merged = _conv1d(merged) if getattr(layer.base, "was_conv1d", False) else merged
        move_hook(layer.base, merged)
        replace_layer(model, names, merged)
    for _, part in transformers_models(model):
        if any(isinstance(layer, Stored4bit) for layer in part.modules()):
            write_quantization_config(part)
        elif getattr(part.config, "quantization_config", None) is not None:  # nothing in it is in 4 bits any longer
            del part.config.quantization_config


def _conv1d(linear: nn.Linear) -> nn.Module:
    """transformers' Conv1D, which stores its weight transposed, with the parameters of a linear layer."""
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        layer = Conv1D(linear.out_features, linear.in_features)
    layer.weight, layer.bias = nn.Parameter(linear.weight.detach().T.contiguous()), linear.bias
    return layer.train(linear.training)


def _tied(model: nn.Module) -> Callable[[nn.Module], str]:
    """A function from a layer to why its weight can't have an adapter; empty where it can."""
    tied = tied_weights(dict(model.named_modules(remove_duplicate=False)))

    def reason(layer: nn.Module) -> str:
        others = (n for n in tied.get(id(layer._parameters.get("weight")), ()) if model.get_submodule(n) is not layer)
        return next((f"its weight is also that of {name}" for name in others), "")

    return reason


def _data(base: nn.Module) -> Tensor:
    """A tensor that a base's weight is stored in."""
    return base.packed if isinstance(base, Linear4bit) else base.weight


def _can_adapt(layer: nn.Module) -> bool:
    return isinstance(layer, Linear4bit) or is_plain_linear(layer)


def _could_adapt(layer: nn.Module) -> bool:
    """Whether a layer can be adapted, or could once `adopt_` has put nf4lab's in its place."""
    return _can_adapt(layer) or (isinstance(layer, nn.Linear) and bool(whose_4_bits(layer)))
