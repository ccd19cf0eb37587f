"""A stored weight made ready to multiply in one dtype, so that a call does only what a call must.

What cannot change between two calls (the kernel, its constants, most of its arguments, the checks) is found once and
kept for as long as the weight's first tensor lives. It is used only while every tensor is the very one, at the very
address, that it was made for; it holds none of them, so that they can be freed, moved or offloaded.
"""

import functools
import weakref

import torch
import torch.nn.functional as F
from torch import Tensor

from nf4lab import backends
from nf4lab.layers.layout import rebuilt


class Prepared:
    """The products of a weight of shape (n, k) with tensors of one dtype on the weight's device."""

    def __init__(self, stored: list[Tensor], layout: str, dtype: torch.dtype, forget=None):
        q = rebuilt(stored, layout, dtype)
        self.layout, self.dtype, self.shape = layout, dtype, tuple(q.shape)
        self.device, self.where = q.packed.device, q.packed.get_device()
        self.tensors = [(weakref.ref(tensor, forget), tensor.data_ptr()) for tensor in stored]
        parts = q.packed, q.stored_scale, q.format, self.shape, q.block_size, dtype
        self.gemv, self.fill = backends.prepare(*parts) if len(self.shape) == 2 else (None, None)
        self.fused_rows = self.gemv.rows if self.gemv else 0

    def fits(self, stored: list[Tensor]) -> bool:
        """Whether these are the tensors that this was made for, where they were."""
        for (tensor, address), given in zip(self.tensors, stored, strict=True):
            if tensor() is not given or given.data_ptr() != address:
                return False
        return True

    def product(self, x: Tensor, stored: list[Tensor], bias: Tensor | None, onto: Tensor | None) -> Tensor:
        """x W_hat^T + bias for x (…, k), or x W_hat^T added onto a tensor (…, n), which it overwrites."""
        n, k = self.shape
        rows = x.numel() // k if k else 0
        if 0 < rows <= self.fused_rows and x.get_device() == self.where:
            y = x.new_empty((*x.shape[:-1], n))
            self.gemv(x.contiguous(), None if bias is None else self.beside(bias), y, rows)
            return y if onto is None else onto.add_(y)
        weight = self.weight(stored)
        if onto is None:
            return F.linear(x, weight, bias)
        if onto.is_cuda and onto.is_contiguous():  # the sum is made by the product, and rounded once
            onto.view(-1, n).addmm_(x.reshape(-1, k), weight.t())
            return onto
        return onto.add_(F.linear(x, weight))

    def input_grad(self, grad: Tensor, stored: list[Tensor]) -> Tensor:
        """grad W_hat, for grad (…, n)."""
        return grad @ self.weight(stored)

    def weight(self, stored: list[Tensor]) -> Tensor:
        """W_hat (n, k), written out: in memory that torch's allocator has from the last one, and gets back."""
        if self.fill is None:
            return rebuilt(stored, self.layout, self.dtype).dequantize()
        out = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        self.fill(out)
        return out

    def beside(self, bias: Tensor) -> Tensor:
        """A bias as the kernel reads it. Raises ValueError where it lies elsewhere."""
        if bias.get_device() != self.where:
            raise ValueError(f"bias must be on {self.device} like the weight; got {bias.device}")
        return bias.contiguous()


_known: dict[tuple[int, str, torch.dtype], Prepared] = {}


def prepared(stored: list[Tensor], layout: str, dtype: torch.dtype) -> Prepared:
    """The weight whose tensors are `stored`, ready for dtype: made at the first call, found again at the next."""
    key = id(stored[0]), layout, dtype
    known = _known.get(key)
    if known is None or not known.fits(stored):
        known = _known[key] = Prepared(stored, layout, dtype, functools.partial(_forget, key))
    return known


def _forget(key: tuple, gone: weakref.ref) -> None:
    """Drop what was prepared for a tensor that is gone, unless something newer stands in its place."""
    known = _known.get(key)
    if known is not None and any(tensor is gone for tensor, _ in known.tensors):
        _known.pop(key, None)
