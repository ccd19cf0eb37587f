"""What a layer is given: the second moments of its inputs, which say what an error of its weights does to its outputs.

    E |(W_hat - W) x|^2 = trace((W_hat - W) H (W_hat - W)^T)        H = E x x^T

H is what GPTQ calls the Hessian: that of the squared output error, up to a factor of 2. Everything here that corrects,
scales or learns takes it from here.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from nf4lab.choice import Choice, is_conv1d, is_plain_linear
from nf4lab.layers.swap import choose_layers

LARGEST = 1e18  # float32 has its square


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable, *, include: Choice = "*", exclude: Choice = ()) -> dict[str, Tensor]:
    """H = mean of x x^T over all inputs x that each linear layer saw, by dotted name: float32 (in, in), on its device.

    batches: what `model` is called with, one after the other: a mapping as keyword arguments, a tuple as positional
    ones, anything else as the one argument. The model runs as it is: in eval mode where it should. The products of a
    batch are summed in float32, the batches in float64. include, exclude: patterns of names, or functions of (name,
    layer), among the torch.nn.Linear, heads too, and GPT-2's Conv1D. Fused experts, and what saw nothing, are left out.

    Raises TypeError for a model that is none and for one batch in place of an iterable of them, ValueError where no
    layer is chosen, where there is no batch, and, naming the layer, for an input that is not a floating-point tensor as
    wide as it, is not finite, or above 1e18, whose square float32 has.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    if isinstance(batches, (Tensor, Mapping, str)) or not isinstance(batches, Iterable):
        raise TypeError(f"batches must be an iterable of batches; got one {type(batches).__name__}: put it in a list")
    names = {id(model.get_submodule(n[0])): n[0] for n in choose_layers(model, _is_linear, include, exclude)}
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def see(layer: nn.Module, inputs: tuple) -> None:
        name, x, width = names[id(layer)], inputs[0], layer.weight.shape[0 if is_conv1d(layer) else 1]
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.shape[-1:] != (width,):
            got = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"layer {name!r} takes a floating-point (…, {width}); it was given {got}")
        x = x.detach().reshape(-1, width).float()
        if not x.isfinite().all() or (x.numel() and x.abs().max() > LARGEST):
            raise ValueError(f"layer {name!r} was given an input that is not finite, or above {LARGEST:.2g}")
        if name not in sums:
            sums[name], counts[name] = x.new_zeros(x.shape[1], x.shape[1], dtype=torch.float64), 0
        sums[name] += x.T @ x  # in place: a matrix as wide as the layer is costlier to make than to add to
        counts[name] += len(x)

    hooks = [layer.register_forward_pre_hook(see) for layer in model.modules() if id(layer) in names]
    n_batches = 0
    try:
        for batch in batches:
            _call(model, batch)
            n_batches += 1
    finally:
        for hook in hooks:
            hook.remove()
    if not n_batches:
        raise ValueError("there is no batch to calibrate with")
    return {name: (total / counts[name]).float() for name, total in sums.items() if counts[name]}


def _is_linear(layer: nn.Module) -> bool:
    return is_plain_linear(layer) or is_conv1d(layer)


def _call(model: nn.Module, batch) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, tuple):
        model(*batch)
    else:
        model(batch)
