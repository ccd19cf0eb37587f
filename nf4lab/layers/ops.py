"""The products of every 4-bit layer, as ops of torch: opaque to torch.compile, which runs them and does not trace them.

    y = x W_hat^T + bias        grad_x = grad_y W_hat

Each pass writes W_hat out for itself and drops it. Between them the graph holds neither W_hat nor x, since a frozen
weight has no gradient: only the layer's own tensors, which exist anyway.

A plain call goes past the ops, straight to what is prepared; whoever has to see an op (torch.compile, torch.export, a
mode, a subclass of Tensor, torch.func) sees one. Both compute the same bits.
"""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import register_flop_formula

from nf4lab.formats.double_quant import decoded
from nf4lab.layers.layout import rebuilt, shape_of
from nf4lab.layers.prepared import prepared

PLAIN = (Tensor, nn.Parameter)
is_compiling, dispatch_modes = torch.compiler.is_compiling, torch._C._len_torch_dispatch_stack
transform, tracing = torch._C._functorch.peek_interpreter_stack, torch._C._get_tracing_state


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast would compute in on x's device; None where it is off, and for float64, which it leaves alone."""
    kind = "cuda" if x.is_cuda else x.device.type
    if x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else None


def stored_in(layer: nn.Module) -> list[Tensor]:
    """The buffers that hold a layer's weight, in the order that the ops take them."""
    buffers = layer._buffers
    return [buffers[name] for name in layer.stored_names]


def linear(x: Tensor, stored: list[Tensor], bias: Tensor | None, layout: str) -> Tensor:
    """x W_hat^T + bias, for x (…, k) and bias (n,), all of one dtype."""
    if not is_plain(x, stored[0], bias):
        return _seen(x, stored, bias, layout)
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return _apply(x, bias, stored, layout)
    return prepared(stored, layout, x.dtype).product(x, stored, bias)


def lookup(ids: Tensor, stored: list[Tensor], layout: str, dtype: torch.dtype) -> Tensor:
    """Rows ids (…) of W_hat (n, k), decoded: (…, k) of dtype."""
    return torch.ops.nf4lab.lookup(ids, stored, layout, dtype)


def _seen(x: Tensor, stored: list[Tensor], bias: Tensor | None, layout: str) -> Tensor:
    """`linear` for those who have to see what is done; some look through a product, and not into an op."""
    if x.is_nested or looks_through():
        return F.linear(x, torch.ops.nf4lab.dequantize_stored(stored, layout, x.dtype), bias)
    return torch.ops.nf4lab.linear(x, stored, bias, layout)


def looks_through() -> bool:
    """Whether this runs inside torch.func's grad, vmap and so on, or inside forward-mode differentiation."""
    return not is_compiling() and (transform() is not None or forward_ad._current_level >= 0)


def is_plain(x: Tensor, packed: Tensor, other: Tensor | None) -> bool:
    """Whether nobody has to see an op: the tensors are plain ones, and nothing watches or records what is done."""
    return not (
        is_compiling()  # first: torch.compile reads no further
        or type(x) not in PLAIN
        or type(packed) not in PLAIN
        or (other is not None and type(other) not in PLAIN)
        or not (x.is_cuda or x.is_cpu)
        or x.is_nested
        or dispatch_modes()
        or transform() is not None
        or tracing() is not None
        or forward_ad._current_level >= 0
    )


class FrozenLinear(torch.autograd.Function):
    """What autograd needs of `linear`. The weight's tensors are the layer's own and are watched, not saved."""

    @staticmethod
    def forward(ctx, x, bias, stored, layout):
        """What `linear` gives."""
        ctx.weight = stored, layout, versions_of(stored)
        return _linear(x, stored, bias, layout)

    @staticmethod
    def backward(ctx, grad):
        """The gradients of x and of the bias; the weight is frozen."""
        grad_x = input_grad(ctx, grad) if ctx.needs_input_grad[0] else None
        grad_bias = grad.sum_to_size(grad.shape[-1:]) if ctx.needs_input_grad[1] else None
        return grad_x, grad_bias, None, None


def input_grad(ctx, grad: Tensor) -> Tensor:
    """grad W_hat. Raises RuntimeError where the weight has been changed in place since the forward pass."""
    stored, layout, versions = ctx.weight
    if versions_of(stored) != versions:
        raise RuntimeError("a 4-bit weight has been modified in place between the forward and the backward pass")
    if looks_through():
        return grad @ torch.ops.nf4lab.dequantize_stored(stored, layout, grad.dtype)
    if torch.is_grad_enabled() or not is_plain(grad, stored[0], None):
        return torch.ops.nf4lab.linear_input_grad(grad, stored, layout)
    return _linear_input_grad(grad, stored, layout)


def versions_of(stored: list[Tensor]) -> list[int]:
    """How often each tensor has been changed in place; for inference tensors, which nobody watches, nothing."""
    try:
        return [tensor._version for tensor in stored]
    except RuntimeError:
        return []


# `Function.apply` looks for transforms of torch.func first; here there are none.
_apply = super(torch.autograd.Function, FrozenLinear).apply


# --- the ops


def _linear(x: Tensor, stored: list[Tensor], bias: Tensor | None, layout: str) -> Tensor:
    return prepared(stored, layout, x.dtype).product(x, stored, bias)


def _linear_input_grad(grad: Tensor, stored: list[Tensor], layout: str) -> Tensor:
    return prepared(stored, layout, grad.dtype).input_grad(grad, stored)


def _dequantize(stored: list[Tensor], layout: str, dtype: torch.dtype) -> Tensor:
    return prepared(stored, layout, dtype).weight(stored)


def _lookup(ids: Tensor, stored: list[Tensor], layout: str, dtype: torch.dtype) -> Tensor:
    q = rebuilt(stored, layout, dtype)
    n, k = q.shape
    inside = ((ids >= 0) & (ids < n)).all()
    if ids.is_cuda:
        torch._assert_async(inside)  # without waiting for the GPU
    elif not inside:
        raise IndexError(f"ids must be in 0..{n - 1}; got {ids.min().item()} to {ids.max().item()}")
    size, first = q.block_size, ids.reshape(-1).long() * k  # a row's first element, of all
    per_row = k // size if k % size == 0 else (k + size - 2) // size + 1  # blocks that a row can lie in
    blocks = first[:, None] // size + torch.arange(per_row, device=ids.device)  # (n_ids, per_row)
    decoded = q.of_blocks(blocks.clamp(max=max(q.n_blocks - 1, 0)).reshape(-1)).dequantize()
    rows = decoded.reshape(-1, per_row * size)
    if k % size:
        rows = rows.gather(1, (first % size)[:, None] + torch.arange(k, device=ids.device))
    return rows.reshape(*ids.shape, k)


def _expert(stored: list[Tensor], index: int, layout: str, dtype: torch.dtype) -> Tensor:
    q = rebuilt(stored, layout, dtype)
    n, size = q.shape[0], math.prod(q.shape[1:])
    if size % q.block_size:  # experts share blocks
        return prepared(stored, layout, dtype).weight(stored)[index].clone()
    per_expert = size // q.block_size
    blocks, n_bytes = slice(index * per_expert, (index + 1) * per_expert), q.packed.numel() // n
    scale, location = (None if c is None else decoded(c)[blocks] for c in (q.stored_scale, q.stored_location))
    packed = q.packed[index * n_bytes :][:n_bytes]
    return replace(q, packed=packed, stored_scale=scale, stored_location=location, shape=q.shape[1:]).dequantize()


def _fake_expert(stored, index, layout, dtype):
    return stored[0].new_empty(shape_of(layout)[1:], dtype=dtype)


def _fake_lookup(ids, stored, layout, dtype):
    return ids.new_empty(*ids.shape, shape_of(layout)[1], dtype=dtype)


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


def _linear_input_grad_backward(ctx, grad):
    """The gradient of a gradient: grad_y W_hat is linear in grad_y, with the forward pass as its derivative."""
    stored = list(ctx.saved_tensors)
    return torch.ops.nf4lab.linear(grad, stored, None, ctx.layout), [None] * len(stored), None


def _mapped(op, takes_more):
    """An op's rule for vmap: once where only its first argument is a batch and can have more dimensions, else each."""

    def rule(info, in_dims, *arguments):
        first, *others = tree_leaves(in_dims, is_leaf=lambda dim: dim is None)
        if takes_more and all(dim is None for dim in others):
            return op(arguments[0].movedim(first, 0), *arguments[1:]), 0
        made = []
        for k in range(info.batch_size):
            made.append(op(*(_at(argument, dims, k) for argument, dims in zip(arguments, in_dims, strict=True))))
        return torch.stack(made), 0

    return rule


def _at(argument, dims, k: int):
    """The k-th of a batch of arguments; what is no batch as it is."""
    if isinstance(argument, list):
        return [_at(part, dim, k) for part, dim in zip(argument, dims, strict=True)]
    return argument if dims is None else argument.select(dims, k)


library = torch.library.Library("nf4lab", "FRAGMENT")


def _define(schema, implementation, fake, backward=None):
    """Register an op for every device: its outputs' shapes for torch.compile, its backward for autograd, its vmap."""
    name, takes_more = f"nf4lab::{schema.split('(')[0]}", not schema.split("(")[1].startswith("Tensor[]")
    library.define(schema)
    library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(name, fake, lib=library)
    op = getattr(torch.ops.nf4lab, name.removeprefix("nf4lab::")).default
    torch.library.register_vmap(name, _mapped(op, takes_more), lib=library)
    if backward:
        torch.library.register_autograd(name, backward, setup_context=_keep, lib=library)


_define(
    "linear(Tensor x, Tensor[] stored, Tensor? bias, str layout) -> Tensor",
    _linear, _fake_linear, _linear_backward,
)  # fmt: skip
_define(
    "linear_input_grad(Tensor grad, Tensor[] stored, str layout) -> Tensor",
    _linear_input_grad, _fake_linear_input_grad, _linear_input_grad_backward,
)  # fmt: skip
_define(
    "dequantize_stored(Tensor[] stored, str layout, ScalarType dtype) -> Tensor",
    _dequantize, _fake_dequantize,
)  # fmt: skip
_define(
    "expert(Tensor[] stored, int index, str layout, ScalarType dtype) -> Tensor",
    _expert, _fake_expert,
)  # fmt: skip
_define(
    "lookup(Tensor ids, Tensor[] stored, str layout, ScalarType dtype) -> Tensor",
    _lookup, _fake_lookup,
)  # fmt: skip


@register_flop_formula([torch.ops.nf4lab.linear, torch.ops.nf4lab.linear_input_grad])
def _flops(rows, stored, *others, out_shape=None, **named) -> int:
    """Operations of a product, as torch counts them: an addition for each multiplication, and none for decoding."""
    *many, last = out_shape
    return 2 * math.prod(many) * last * rows[-1]
