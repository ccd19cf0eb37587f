"""A linear layer whose weight stays in 4 bits: dequantized on the fly, in the forward pass and again in the backward.

    y = x W_hat^T + bias        grad_x = grad_y W_hat

Each pass writes W_hat out for itself and drops it. Between them the graph holds the packed bytes and nothing else:
not W_hat, and not x, since a frozen weight has no gradient.
"""

import contextlib
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nf4lab.backends import cuda
from nf4lab.blockwise import DTYPES, QuantizedTensor, quantize
from nf4lab.checkpoints.keys import from_parts, parts_of
from nf4lab.formats import Format
from nf4lab.formats.double_quant import DoubleQuant, QuantizedConstants

# --- a QuantizedTensor as arguments of an op

# An op takes tensors, numbers and strings. So a QuantizedTensor travels as the list of its tensors and the name of its
# layout: what is left of it on the meta device, without the data. Equal layouts share a name.
_layouts: dict[str, QuantizedTensor] = {}


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
    for name, known in _layouts.items():
        if _same(known, skeleton):
            return name
    name = f"{len(_layouts)} {skeleton!r}"
    _layouts[name] = skeleton
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


def _rebuilt(stored: list[Tensor], layout: str) -> QuantizedTensor:
    skeleton = _layouts[layout]
    return with_tensors(skeleton, dict(zip(tensors_of(skeleton), stored, strict=True)))


# --- the ops: opaque to torch.compile, so that it runs the kernels instead of tracing the reference


def _linear(x: Tensor, stored: list[Tensor], bias: Tensor | None, layout: str) -> Tensor:
    q = _rebuilt(stored, layout)
    y = cuda.gemv(x, q, bias)
    if y is None:
        with _no_autocast(x):
            y = F.linear(x, q.dequantize(x.dtype), bias)
    return y


def _linear_input_grad(grad: Tensor, stored: list[Tensor], layout: str) -> Tensor:
    with _no_autocast(grad):
        return grad @ _rebuilt(stored, layout).dequantize(grad.dtype)


def _dequantize(stored: list[Tensor], layout: str, dtype: torch.dtype) -> Tensor:
    return _rebuilt(stored, layout).dequantize(dtype)


def _no_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """The layer has chosen the dtype; autocast, whose state an op inherits, must not choose again."""
    return torch.autocast(x.device.type, enabled=False) if _autocast_dtype(x) else contextlib.nullcontext()


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast would compute in on x's device; None where it is off."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else None


def _fake_linear(x, stored, bias, layout):
    return x.new_empty(*x.shape[:-1], _layouts[layout].shape[0])


def _fake_linear_input_grad(grad, stored, layout):
    return grad.new_empty(*grad.shape[:-1], _layouts[layout].shape[1])


def _fake_dequantize(stored, layout, dtype):
    return stored[0].new_empty(_layouts[layout].shape, dtype=dtype)


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


# --- the layer


class Linear4bit(nn.Module):
    """y = x W_hat^T + bias with W_hat in 4 bits; the counterpart of torch.nn.Linear and of bitsandbytes' Linear4bit.

    weight: a QuantizedTensor of shape (out_features, in_features), in any format; its tensors become buffers, and
    move with the module. `.to(dtype)` leaves them as they are, and changes what `weight` decodes to.
    bias: (out_features,), or None. compute_dtype: the dtype that W_hat, x and bias are multiplied in; by default x's.
    The result has x's dtype. Under autocast both defaults are autocast's dtype.

    On an NVIDIA GPU 1 to 16 rows of x take the fused kernel `nf4lab.kernels.cuda.gemv` where it serves format and
    dtype; everything else dequantizes, multiplies and forgets. The gradient of x is grad @ W_hat, exactly; the weight
    is frozen and has none.

    Raises TypeError unless weight is a QuantizedTensor, ValueError where it is not a matrix or bias does not fit.
    """

    def __init__(self, weight: QuantizedTensor, bias: Tensor | None = None, compute_dtype: torch.dtype | None = None):
        super().__init__()
        _check_parts(weight, bias, compute_dtype)
        self.out_features, self.in_features = weight.shape
        self.dtype, self.compute_dtype = weight.dtype, compute_dtype
        self.layout, self.stored_names = layout_of(weight), tuple(tensors_of(weight))
        for name, tensor in tensors_of(weight).items():
            self.register_buffer(name, tensor, persistent=False)  # state_dict has them under bitsandbytes' keys
        bias = nn.Parameter(bias) if bias is not None and not isinstance(bias, nn.Parameter) else bias
        self.register_parameter("bias", bias)

    @classmethod
    def from_linear(
        cls,
        layer: nn.Linear,
        format: str | Format = "nf4",
        block_size: int | None = None,
        double_quant: bool | str | DoubleQuant = False,
        compute_dtype: torch.dtype | None = None,
    ) -> "Linear4bit":
        """A layer that does what `layer` does with its weight quantized; `layer` itself stays as it is.

        The bias is shared, not copied. format, block_size, double_quant: as for `nf4lab.quantize`, with its errors and
        its default block size.

        Raises TypeError unless layer is a torch.nn.Linear, ValueError where it has no data yet.
        """
        if not isinstance(layer, nn.Linear):
            raise TypeError(f"layer must be a torch.nn.Linear; got {type(layer).__name__}")
        if layer.weight.is_meta:
            raise ValueError(f"layer is on the meta device: its {tuple(layer.weight.shape)} weight has no values")
        weight = quantize(layer.weight, format, block_size, double_quant)
        return cls(weight, layer.bias, compute_dtype).train(layer.training)

    def stored(self) -> list[Tensor]:
        """The buffers that hold the weight, in the order that the ops take them."""
        return [self._buffers[name] for name in self.stored_names]

    @property
    def quantized(self) -> QuantizedTensor:
        """The weight as it is stored. It shares the layer's memory."""
        return replace(_rebuilt(self.stored(), self.layout), dtype=self.dtype)

    @property
    def weight(self) -> Tensor:
        """The weight dequantized, (out_features, in_features): made at every access, for code that reads a weight."""
        return torch.ops.nf4lab.dequantize_stored(self.stored(), self.layout, self.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes that the weight takes."""
        return self.quantized.nbytes

    def forward(self, x: Tensor) -> Tensor:
        """x (…, in_features) to (…, out_features). Raises ValueError where the last dimension is another."""
        if x.shape[-1:] != (self.in_features,):
            raise ValueError(f"x must have {self.in_features} features in its last dimension; got {tuple(x.shape)}")
        outside = _autocast_dtype(x) or x.dtype
        dtype = self.compute_dtype or outside
        bias = None if self.bias is None else self.bias.to(dtype)
        return torch.ops.nf4lab.linear(x.to(dtype), self.stored(), bias, self.layout).to(outside)

    def to_linear(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """A torch.nn.Linear with W_hat and a copy of the bias in `dtype` (default: the layer's)."""
        dtype = dtype or self.dtype
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, "meta", dtype)
        linear.weight = nn.Parameter(self.quantized.dequantize(dtype))
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().to(dtype, copy=True))
        return linear.train(self.training)

    def extra_repr(self) -> str:
        """What repr shows between the brackets."""
        q = self.quantized
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{q.format.name}, block_size={q.block_size}, bits_per_weight={q.bits_per_weight:.4f}"
        )

    def _apply(self, fn, recurse=True):
        """Move the stored tensors with the module, but keep their dtypes: absmax in float16 would be another weight."""
        before = {name: self._buffers[name] for name in self.stored_names}
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.packed.device)).dtype
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            if self._buffers[name].dtype != tensor.dtype:
                self._buffers[name] = tensor.to(self._buffers[name].device)
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        """The weight under the keys of bitsandbytes: `weight`, `weight.absmax` and so on."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update(parts_of(prefix + "weight", self.quantized))

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, error_msgs):
        name = prefix + "weight"
        parts = {key: state_dict.pop(key) for key in list(state_dict) if key == name or key.startswith(f"{name}.")}
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, error_msgs)
        if name not in parts:
            missing_keys += [name] * strict
            return
        try:
            self._load(from_parts(name, parts), metadata.get("assign_to_params_buffers", False))
        except (ValueError, TypeError) as error:
            error_msgs.append(f"{name}: {error}")

    @torch.no_grad()
    def _load(self, found: QuantizedTensor | Tensor, assign: bool) -> None:
        """Take the tensors of `found` over; raise ValueError unless it is stored as this layer's weight is."""
        if not isinstance(found, QuantizedTensor):
            raise ValueError(f"it is not quantized, but {found.dtype} of shape {tuple(found.shape)}")
        if layout_of(found) != self.layout:
            raise ValueError(f"{found!r} does not fit in a layer with {self.quantized!r}")
        if self.packed.is_meta and not assign:
            raise ValueError("the layer is on the meta device: load with assign=True")
        self.dtype = found.dtype if assign else self.dtype
        for name, tensor in tensors_of(found).items():
            self._buffers[name] = tensor if assign else self._buffers[name].copy_(tensor)

    def __getstate__(self) -> dict:
        """For copies in other processes: the layout itself, since its name holds only here."""
        return self.__dict__ | {"layout": _layouts[self.layout]}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state | {"layout": layout_of(state["layout"])})


def _check_parts(weight: QuantizedTensor, bias: Tensor | None, compute_dtype: torch.dtype | None) -> None:
    if not isinstance(weight, QuantizedTensor):
        raise TypeError(f"weight must be a QuantizedTensor; got {type(weight).__name__}")
    if len(weight.shape) != 2:
        raise ValueError(f"weight must have shape (out_features, in_features); got {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape ({weight.shape[0]},); got {tuple(bias.shape)}")
    if compute_dtype not in (None, *DTYPES):
        raise TypeError(f"compute_dtype must be float32, float16, bfloat16 or float64; got {compute_dtype}")
