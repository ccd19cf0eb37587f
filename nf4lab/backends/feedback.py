"""Correct: what rounding a weight does to the output, the weights that are not yet rounded take back.

Weights of a row are rounded from left to right. With H = E x x^T and U the upper Cholesky factor of its inverse,
H^-1 = U^T U, the least output error that is left after weight j was rounded is reached by

    w_k <- w_k - (w_j - w_hat_j) / U_jj * U_jk        for all k > j

Here rounding is that of any `Format`: a block's constants are made when its first column comes up, from weights that
have taken up every earlier error. Rows are independent, and all go at once.

Sources: Optimal Brain Surgeon (Hassibi and Stork, 1993); GPTQ (arXiv:2210.17323), section 3.
"""

import torch
from torch import Tensor

from nf4lab.formats.format import Format
from nf4lab.formats.packing import pack_checked

DAMPING = 0.01  # of the mean of H's diagonal, added to it, as in GPTQ


def check_hessian(hessian: Tensor, w: Tensor) -> Tensor:
    """`hessian`, if it can be one for w (out, in): float (in, in), finite, symmetric, nothing negative on the diagonal.

    Raises TypeError or ValueError otherwise, naming what disagrees.
    """
    if not isinstance(hessian, Tensor) or not hessian.is_floating_point():
        got = hessian.dtype if isinstance(hessian, Tensor) else type(hessian).__name__
        raise TypeError(f"hessian must be a floating-point torch.Tensor; got {got}")
    if w.dim() != 2:
        raise ValueError(f"a hessian belongs to a matrix (out, in); got weights of shape {tuple(w.shape)}")
    wanted = (w.shape[1], w.shape[1])
    if hessian.shape != wanted:
        raise ValueError(f"weights of shape {tuple(w.shape)} take a hessian {wanted}; got {tuple(hessian.shape)}")
    if not hessian.isfinite().all():
        raise ValueError(f"hessian must be finite; {(~hessian.isfinite()).sum().item()} of its values are not")
    skew = (hessian - hessian.T).abs().max().item()
    if skew > 1e-3 * hessian.abs().max().item():
        raise ValueError(f"hessian must be symmetric; it differs from its transpose by up to {skew:.3g}")
    if hessian.diagonal().min() < 0:
        raise ValueError(f"hessian has a negative diagonal: {hessian.diagonal().min().item():.3g} is no mean square")
    return hessian


def feedback_factor(hessian: Tensor, damping: float = DAMPING) -> Tensor:
    """U of the damped H, upper triangular with H^-1 = U^T U: float32 (in, in).

    An input that never occurs (a zero on the diagonal) neither gives nor takes corrections.
    Raises ValueError where damping does not make H positive definite.
    """
    h = hessian.double().clone()
    diagonal = h.diagonal()
    diagonal += damping * diagonal.mean()
    diagonal[diagonal == 0] = 1.0
    lower, failed = torch.linalg.cholesky_ex(h)
    if failed.any():
        raise ValueError(f"hessian is not positive definite with damping {damping:g}: use more, or more batches")
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True).float()


def quantize(
    flat: Tensor, format: Format, block_size: int, *, shape: torch.Size, hessian: Tensor
) -> tuple[Tensor, ...] | None:
    """What `reference.quantize` gives for flat (out * in,), with error feedback within each row of w (out, in) = shape.

    Damping is that of GPTQ. Raises ValueError as `check_hessian`, and where block_size does not divide the columns: a
    block that crosses rows has no order in which to correct it.
    """
    left = flat.reshape(shape).float().clone()  # what is still to be rounded, corrected so far
    if not left.isfinite().all():
        return None
    check_hessian(hessian, left)
    rows, columns = shape
    if columns % block_size:
        raise ValueError(f"with a hessian, block_size must divide the {columns} columns; got {block_size}")
    factor, tensor_scale = feedback_factor(hessian.to(left.device)), format.scale_of_tensor(flat)
    codes, constants = torch.empty(rows, columns, dtype=torch.uint8, device=flat.device), []
    for start in range(0, columns, block_size):
        here, rest = slice(start, start + block_size), slice(start + block_size, columns)
        codes[:, here], error, stored = _encode_block(left[:, here], factor[here, here], format, tensor_scale)
        left[:, rest] -= error @ factor[here, rest]
        constants.append(stored)
    scale, location = (
        None if parts[0] is None else torch.stack(parts, dim=1).reshape(-1) for parts in zip(*constants, strict=True)
    )
    return pack_checked(codes.reshape(-1), format.zero_code, format.code_bits), scale, location, tensor_scale


def _encode_block(
    block: Tensor, factor: Tensor, format: Format, tensor_scale: Tensor | None
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor | None]]:
    """Codes (out, block_size), errors over U_jj of the same shape, and the constants of one block a row."""
    block = block.T.contiguous()  # a column of w is a row here
    stored, stored_location, scale, location = format.constants(block.T, tensor_scale)
    decoding = stored if tensor_scale is None else stored * tensor_scale
    codes, errors = torch.empty_like(block, dtype=torch.uint8), torch.empty_like(block)
    for j, column in enumerate(block):
        codes[j] = format.codes_of(column[:, None], scale, location)[:, 0]
        value = format.decode(codes[j][:, None], decoding, stored_location)[:, 0]
        errors[j] = (column - value) / factor[j, j]
        block[j + 1 :] -= factor[j, j + 1 :, None] * errors[j]
    return codes.T, errors.T, (stored, stored_location)
