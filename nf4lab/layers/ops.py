"""The products of every 4-bit layer, as ops of torch: opaque to torch.compile, which runs them and does not trace them.

    y = x W_hat^T + bias        grad_x = grad_y W_hat

Each pass writes W_hat out for itself and drops it. Between them the graph holds neither W_hat nor x, since a frozen
weight has no gradient: only the layer's own tensors, which exist anyway.

A plain call goes past the ops, straight to what is prepared; whoever has to see an op (torch.compile, torch.export, a
mode, a subclass of Tensor, torch.func) sees one. Both compute the same bits.
"""

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from nf4lab.layers.layout import shape_of
from nf4lab.layers.prepared import prepared

PLAIN = (Tensor, nn.Parameter)
is_compiling, dispatch_modes = torch.compiler.is_compiling, torch._C._len_torch_dispatch_stack
transform, tracing = torch._C._functorch.peek_interpreter_stack, torch._C._get_tracing_state


def linear(x: Tensor, stored: list[Tensor], bias: Tensor | None, layout: str) -> Tensor:
    """x W_hat^T + bias, for x (…, k) and bias (n,), all of one dtype."""
    if not is_plain(x, stored[0], bias):
        return _seen(x, stored, bias, layout)
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return FrozenLinear.apply(x, bias, stored, layout)
    return _linear(x, stored, bias, layout)


def linear_onto(x: Tensor, stored: list[Tensor], onto: Tensor, layout: str) -> Tensor:
    """onto + x W_hat^T, for x (…, k) and a result (…, n) of something else, which a plain call overwrites."""
    if not is_plain(x, stored[0], onto):
        if in_transform():
            return _seen(x, stored, None, layout) + onto
        return torch.ops.nf4lab.linear_onto(x, stored, onto, layout)
    if torch.is_grad_enabled() and (x.requires_grad or onto.requires_grad):
        return FrozenOnto.apply(x, onto, stored, layout)
    with no_autocast(x):
        return prepared(stored, layout, x.dtype).product(x, stored, None, onto)


def _seen(x: Tensor, stored: list[Tensor], bias: Tensor | None, layout: str) -> Tensor:
    """`linear` for those who have to see what is done; torch.func looks through a product, and not into an op."""
    if in_transform():
        return F.linear(x, torch.ops.nf4lab.dequantize_stored(stored, layout, x.dtype), bias)
    return torch.ops.nf4lab.linear(x, stored, bias, layout)


def in_transform() -> bool:
    """Whether this runs inside torch.func's grad, vmap and so on."""
    return not is_compiling() and transform() is not None


def is_plain(x: Tensor, packed: Tensor, other: Tensor | None) -> bool:
    """Whether nobody has to see an op: these are plain tensors with memory of their own, and nothing records calls."""
    return (
        not is_compiling()  # first: torch.compile reads no further
        and type(x) in PLAIN
        and type(packed) in PLAIN
        and (other is None or type(other) in PLAIN)
        and (x.is_cuda or x.is_cpu)
        and not dispatch_modes()
        and not in_transform()
        and tracing() is None
        and forward_ad._current_level < 0
        and not x.is_neg()
    )


class FrozenLinear(torch.autograd.Function):
    """What autograd needs of `linear`. The weight's tensors are the layer's own and are watched, not saved."""

    @staticmethod
    def forward(ctx, x, bias, stored, layout):
        ctx.stored, ctx.versions, ctx.layout = stored, versions_of(stored), layout
        return _linear(x, stored, bias, layout)

    @staticmethod
    def backward(ctx, grad):
        grad_x = input_grad(ctx, grad) if ctx.needs_input_grad[0] else None
        grad_bias = grad.sum_to_size(grad.shape[-1:]) if ctx.needs_input_grad[1] else None
        return grad_x, grad_bias, None, None


class FrozenOnto(torch.autograd.Function):
    """What autograd needs of `linear_onto`."""

    @staticmethod
    def forward(ctx, x, onto, stored, layout):
        ctx.stored, ctx.versions, ctx.layout = stored, versions_of(stored), layout
        ctx.mark_dirty(onto)
        with no_autocast(x):
            return prepared(stored, layout, x.dtype).product(x, stored, None, onto)

    @staticmethod
    def backward(ctx, grad):
        return input_grad(ctx, grad) if ctx.needs_input_grad[0] else None, grad, None, None


def input_grad(ctx, grad: Tensor) -> Tensor:
    """grad W_hat. Raises RuntimeError where the weight has been changed in place since the forward pass."""
    if versions_of(ctx.stored) != ctx.versions:
        raise RuntimeError("a 4-bit weight has been modified in place between the forward and the backward pass")
    if torch.is_grad_enabled() or not is_plain(grad, ctx.stored[0], None):
        return torch.ops.nf4lab.linear_input_grad(grad, ctx.stored, ctx.layout)
    return _linear_input_grad(grad, ctx.stored, ctx.layout)


def versions_of(stored: list[Tensor]) -> list[int]:
    """How often each tensor has been changed in place. Inference tensors, which autograd does not watch, count none."""
    return [0 if tensor.is_inference() else tensor._version for tensor in stored]


# --- the ops


def _linear(x: Tensor, stored: list[Tensor], bias: Tensor | None, layout: str) -> Tensor:
    with no_autocast(x):
        return prepared(stored, layout, x.dtype).product(x, stored, bias, None)


def _linear_onto(x: Tensor, stored: list[Tensor], onto: Tensor, layout: str) -> Tensor:
    with no_autocast(x):
        return prepared(stored, layout, x.dtype).product(x, stored, None, onto.clone())


def _linear_input_grad(grad: Tensor, stored: list[Tensor], layout: str) -> Tensor:
    with no_autocast(grad):
        return prepared(stored, layout, grad.dtype).input_grad(grad, stored)


def _dequantize(stored: list[Tensor], layout: str, dtype: torch.dtype) -> Tensor:
    return prepared(stored, layout, dtype).weight(stored)


_AS_IT_IS = contextlib.nullcontext()


def no_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """The layer has chosen the dtype; autocast, whose state an op inherits, must not choose again."""
    if autocast_dtype(x) in (None, x.dtype):
        return _AS_IT_IS
    return torch.autocast(x.device.type, enabled=False)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast would compute in on x's device; None where it is off."""
    kind = "cuda" if x.is_cuda else x.device.type
    return torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else None


def _fake_linear(x, stored, bias, layout):
    return x.new_empty(*x.shape[:-1], shape_of(layout)[0])


def _fake_linear_input_grad(grad, stored, layout):
    return grad.new_empty(*grad.shape[:-1], shape_of(layout)[1])


def _fake_dequantize(stored, layout, dtype):
    return stored[0].new_empty(shape_of(layout), dtype=dtype)


def _keep(ctx, inputs, output) -> None:
    _, stored, *_, layout = inputs
    ctx.save_for_backward(*stored)
    ctx.layout = layout


def _linear_backward(ctx, grad):
    stored = list(ctx.saved_tensors)
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.nf4lab.linear_input_grad(grad, stored, ctx.layout)
    if ctx.needs_input_grad[2]:
        grad_bias = grad.sum_to_size(grad.shape[-1:])
    return grad_x, [None] * len(stored), grad_bias, None


def _linear_onto_backward(ctx, grad):
    stored = list(ctx.saved_tensors)
    grad_x = torch.ops.nf4lab.linear_input_grad(grad, stored, ctx.layout) if ctx.needs_input_grad[0] else None
    return grad_x, [None] * len(stored), grad, None


def _linear_input_grad_backward(ctx, grad):
    """The gradient of a gradient: grad_y W_hat is linear in grad_y, with the forward pass as its derivative."""
    stored = list(ctx.saved_tensors)
    return torch.ops.nf4lab.linear(grad, stored, None, ctx.layout), [None] * len(stored), None


library = torch.library.Library("nf4lab", "FRAGMENT")


def _define(schema, implementation, fake, backward=None):
    """Register an op for every device, with its outputs' shapes for torch.compile and its backward for autograd."""
    name = f"nf4lab::{schema.split('(')[0]}"
    library.define(schema)
    library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(name, fake, lib=library)
    if backward:
        torch.library.register_autograd(name, backward, setup_context=_keep, lib=library)


_define(
    "linear(Tensor x, Tensor[] stored, Tensor? bias, str layout) -> Tensor",
    _linear, _fake_linear, _linear_backward,
)  # fmt: skip
_define(
    "linear_onto(Tensor x, Tensor[] stored, Tensor onto, str layout) -> Tensor",
    _linear_onto, _fake_linear, _linear_onto_backward,
)  # fmt: skip
_define(
    "linear_input_grad(Tensor grad, Tensor[] stored, str layout) -> Tensor",
    _linear_input_grad, _fake_linear_input_grad, _linear_input_grad_backward,
)  # fmt: skip
_define(
    "dequantize_stored(Tensor[] stored, str layout, ScalarType dtype) -> Tensor",
    _dequantize, _fake_dequantize,
)  # fmt: skip
