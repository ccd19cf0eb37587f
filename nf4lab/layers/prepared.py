"""A stored weight made ready to multiply in one dtype, so that a call does only what a call must.

What cannot change between two calls (the kernel, its constants, most of its arguments, the checks) is found once and
kept for as long as the weight's tensors live. It is used only while every tensor is the very one, at the very address,
that it was made for; it holds none of them, so that they can be freed, moved or offloaded.
"""

import contextlib
import functools
import weakref
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from nf4lab import backends
from nf4lab.blockwise import check_dtype
from nf4lab.layers.layout import parts_of, rebuilt


class Prepared:
    """The products of a weight of shape (n, k) with tensors of one dtype on the weight's device."""

    def __init__(self, stored: Sequence[Tensor], layout: str, dtype: torch.dtype, forget):
        check_dtype(dtype)
        q = rebuilt(stored, layout, dtype)
        self.layout, self.dtype, self.shape = layout, dtype, tuple(q.shape)
        self.device, self.where = q.packed.device, q.packed.get_device()
        self.addresses = [tensor.data_ptr() for tensor in stored]
        self.watched = [weakref.ref(tensor, forget) for tensor in stored]
        self.format, self.block_size = q.format, q.block_size
        parts = q.packed, q.stored_scale, q.stored_location, q.tensor_scale, q.format, self.shape, q.block_size, dtype
        self.gemv, self.fill = backends.prepare(*parts) if len(self.shape) == 2 else (None, None)
        self.dequantize = backends.DEQUANTIZE[backends.choose(None, self.device, dtype, q.numel, q.format)]
        self.fused_rows = self.gemv.rows if self.gemv else 0

    def product(self, x: Tensor, stored: Sequence[Tensor], bias: Tensor | None) -> Tensor:
        """x W_hat^T + bias, for x (…, k) and bias (n,)."""
        n, k = self.shape
        rows = x.numel() // k if k else 0
        if 0 < rows <= self.fused_rows and x.get_device() == self.where:
            y = x.new_empty((rows, n) if x.dim() == 2 else (*x.shape[:-1], n))
            if not x.is_contiguous() or x.is_neg():
                x = x.contiguous().resolve_neg()
            self.gemv(x, None if bias is None else self.beside(bias), y, rows)
            return y
        with no_autocast(x):
            return F.linear(x, self.weight(stored), bias)

    def input_grad(self, grad: Tensor, stored: Sequence[Tensor]) -> Tensor:
        """grad W_hat, for grad (…, n)."""
        with no_autocast(grad):
            return grad @ self.weight(stored)

    def weight(self, stored: Sequence[Tensor]) -> Tensor:
        """W_hat (n, k), written out: in memory that torch's allocator has from the last one, and gets back."""
        out = backends.empty(self.shape, self.dtype, self.device)
        if self.fill is None:
            self.dequantize(*parts_of(stored, self.layout), self.format, self.block_size, out)
        else:
            self.fill(out)
        return out

    def beside(self, bias: Tensor) -> Tensor:
        """A bias as the kernel reads it. Raises ValueError where it lies elsewhere."""
        if bias.get_device() != self.where:
            raise ValueError(f"bias must be on {self.device} like the weight; got {bias.device}")
        return bias.contiguous()


_AS_IT_IS = contextlib.nullcontext()


def no_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """The layer has chosen the dtype; autocast, whose state an op inherits, must not choose again."""
    kind = "cuda" if x.is_cuda else x.device.type
    return torch.autocast(kind, enabled=False) if kind != "meta" and torch.is_autocast_enabled(kind) else _AS_IT_IS


_known: dict[tuple, Prepared] = {}


def prepared(stored: Sequence[Tensor], layout: str, dtype: torch.dtype) -> Prepared:
    """The weight whose tensors are `stored`, ready for dtype: made at the first call, found again at the next.

    It is found by what the tensors are, and dropped with the first of them that goes. So what is found was made for
    these very tensors, and is right as long as each lies where it lay.
    """
    key = layout, dtype, *map(id, stored)
    known = _known.get(key)
    if known is None or list(map(Tensor.data_ptr, stored)) != known.addresses:
        known = _known[key] = Prepared(stored, layout, dtype, functools.partial(_known.pop, key))
    return known
