"""The ops under every 4-bit layer: opaque to torch.compile, so that it runs the kernels instead of tracing them.

    y = x W_hat^T + bias        grad_x = grad_y W_hat

Each pass writes W_hat out for itself and drops it. Between them the graph holds the packed bytes and nothing else:
not W_hat, and not x, since a frozen weight has no gradient.
"""

import contextlib
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nf4lab.backends import cuda
from nf4lab.blockwise import QuantizedTensor
from nf4lab.formats.double_quant import QuantizedConstants

# --- a QuantizedTensor as arguments of an op

# An op takes tensors, numbers and strings. So a QuantizedTensor travels as the list of its tensors and the name of its
# layout: what is left of it on the meta device, without the data. Equal layouts share a name.
layouts: dict[str, QuantizedTensor] = {}


def tensors_of(part: QuantizedTensor | QuantizedConstants) -> dict[str, Tensor]:
    """The tensors that `part` is made of, by field name; those of nested constants as "field_inner"."""
    found = {}
    for field in fields(part):
        value = getattr(part, field.name)
        if isinstance(value, Tensor):
            found[field.name] = value
        elif isinstance(value, QuantizedConstants):
            found |= {f"{field.name}_{inner}": tensor for inner, tensor in tensors_of(value).items()}
    return found


def with_tensors(part: Any, tensors: dict[str, Tensor], prefix: str = "") -> Any:
    """`part` with the tensors that `tensors_of` names replaced by those given; nothing is copied."""
    replaced = {}
    for field in fields(part):
        value, name = getattr(part, field.name), prefix + field.name
        if isinstance(value, Tensor):
            replaced[field.name] = tensors[name]
        elif isinstance(value, QuantizedConstants):
            replaced[field.name] = with_tensors(value, tensors, f"{name}_")
    return replace(part, **replaced)


def layout_of(q: QuantizedTensor) -> str:
    """The name of q's layout, under which an op finds format, shape and block size again. The dtype is no part."""
    skeleton = with_tensors(q, {name: tensor.to("meta") for name, tensor in tensors_of(q).items()})
    skeleton = replace(skeleton, dtype=torch.float32)  # each op is told the dtype it is to compute in
    for name, known in layouts.items():
        if _same(known, skeleton):
            return name
    name = f"{len(layouts)} {skeleton!r}"
    layouts[name] = skeleton
    return name


def _same(a: Any, b: Any) -> bool:
    """Whether two layouts, or parts of them, say the same; tensors on the meta device have no values to compare."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        same_kind = (a.shape, a.dtype) == (b.shape, b.dtype)
        return same_kind and (a.is_meta or repr(a.tolist()) == repr(b.tolist()))  # == would take -0.0 for 0.0
    if is_dataclass(a):
        return all(_same(getattr(a, field.name), getattr(b, field.name)) for field in fields(a))
    return a == b


def rebuilt(stored: list[Tensor], layout: str) -> QuantizedTensor:
    skeleton = layouts[layout]
    return with_tensors(skeleton, dict(zip(tensors_of(skeleton), stored, strict=True)))


# --- the ops


def _linear(x: Tensor, stored: list[Tensor], bias: Tensor | None, layout: str) -> Tensor:
    q = rebuilt(stored, layout)
    y = cuda.gemv(x, q, bias)
    if y is None:
        with _no_autocast(x):
            y = F.linear(x, q.dequantize(x.dtype), bias)
    return y


def _linear_input_grad(grad: Tensor, stored: list[Tensor], layout: str) -> Tensor:
    with _no_autocast(grad):
        return grad @ rebuilt(stored, layout).dequantize(grad.dtype)


def _dequantize(stored: list[Tensor], layout: str, dtype: torch.dtype) -> Tensor:
    return rebuilt(stored, layout).dequantize(dtype)


def _no_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """The layer has chosen the dtype; autocast, whose state an op inherits, must not choose again."""
    return torch.autocast(x.device.type, enabled=False) if autocast_dtype(x) else contextlib.nullcontext()


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast would compute in on x's device; None where it is off."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else None


def _fake_linear(x, stored, bias, layout):
    return x.new_empty(*x.shape[:-1], layouts[layout].shape[0])


def _fake_linear_input_grad(grad, stored, layout):
    return grad.new_empty(*grad.shape[:-1], layouts[layout].shape[1])


def _fake_dequantize(stored, layout, dtype):
    return stored[0].new_empty(layouts[layout].shape, dtype=dtype)


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
    "linear_input_grad(Tensor grad, Tensor[] stored, str layout) -> Tensor",
    _linear_input_grad, _fake_linear_input_grad, _linear_input_grad_backward,
)  # fmt: skip
_define(
    "dequantize_stored(Tensor[] stored, str layout, ScalarType dtype) -> Tensor",
    _dequantize, _fake_dequantize,
)  # fmt: skip
