"""Correct: what rounding a weight does to the output, the weights that are not yet rounded take back.

Weights of a row are rounded from left to right. With H = E x x^T and U the upper Cholesky factor of its inverse,
H^-1 = U^T U, the least output error that is left after weight j was rounded is reached by

    w_k <- w_k - (w_j - w_hat_j) / U_jj * U_jk        for all k > j

Here rounding is that of any `Format`: a block's constants are made when its first column comes up, from weights that
have taken up every earlier error. Rows are independent, and all go at once.

Sources: Optimal Brain Surgeon (Hassibi and Stork, 1992); GPTQ (arXiv:2210.17323), section 3.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from nf4lab.backends import cpu, cuda
from nf4lab.formats.double_quant import UNSHARED
from nf4lab.formats.format import Format
from nf4lab.formats.packing import pack_checked

DAMPING = 0.01  # of the mean of H's diagonal, added to it, as in GPTQ


def check_hessian(hessian: Tensor, w: Tensor) -> Tensor:
    """`hessian`, if it can be one for w (out, in): float (in, in), finite, symmetric, nothing negative on the diagonal.

    It comes back without gradient, on w's device. Raises TypeError or ValueError otherwise, naming what disagrees.
    """
    if not isinstance(hessian, Tensor) or not hessian.is_floating_point():
        got = hessian.dtype if isinstance(hessian, Tensor) else type(hessian).__name__
        raise TypeError(f"hessian must be a floating-point torch.Tensor; got {got}")
    if w.dim() != 2:
        raise ValueError(f"a hessian belongs to a matrix (out, in); got weights of shape {tuple(w.shape)}")
    if hessian.layout != torch.strided or hessian.is_meta or hessian.element_size() < 2:
        what = "without data" if hessian.is_meta else f"{hessian.layout}, {hessian.dtype}"
        raise TypeError(f"hessian must be a dense tensor of at least 16 bits; got one {what}")
    wanted = (w.shape[1], w.shape[1])
    if hessian.shape != wanted:
        raise ValueError(f"weights of shape {tuple(w.shape)} take a hessian {wanted}; got {tuple(hessian.shape)}")
    hessian = hessian.detach().to(w.device)
    if not hessian.isfinite().all():
        raise ValueError(f"hessian must be finite; {(~hessian.isfinite()).sum().item()} of its values are not")
    skew = (hessian - hessian.T).abs().max().item()
    if skew > 1e-3 * hessian.abs().max().item():
        raise ValueError(f"hessian must be symmetric; it differs from its transpose by up to {skew:.3g}")
    if hessian.diagonal().min() < 0:
        raise ValueError(f"hessian has a negative diagonal: {hessian.diagonal().min().item():.3g} is not a mean square")
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


def kernel_for(asked: str | None, chosen: str, device: torch.device, format: Format) -> str | None:
    """Which kernel goes through a block of columns, "cpu", "cuda" or None: that of the chosen backend.

    The one for a GPU serves every format of up to 4 bits, also where those of plain rounding leave it to torch.
    """
    if asked is None and device.type == "cuda" and cpu.takes(format) and not cuda.missing():
        return "cuda"
    return None if chosen == "torch" else chosen


def quantize(
    flat: Tensor, format: Format, block_size: int, *, shape: torch.Size, hessian: Tensor, kernel: str | None = None
) -> tuple[Tensor, ...] | None:
    """What `reference.quantize` gives for flat (out * in,), with error feedback within each row of w (out, in) = shape.

    Damping is that of GPTQ. kernel: "cpu" or "cuda" where numba goes through each block of columns, for a format whose
    codes have up to 4 bits; the bits are the same. hessian: one that `check_hessian` has passed.
    Raises ValueError as `feedback_factor` and `Format.check_scale`, and where block_size does not divide the columns: a
    block that crosses rows has no order in which to correct it.
    """
    left = flat.reshape(shape).float().clone()  # what is still to be rounded, corrected so far
    if not left.isfinite().all():
        return None
    rows, columns = shape
    if columns % block_size:
        raise ValueError(f"with a hessian, block_size must divide the {columns} columns; got {block_size}")
    factor, tensor_scale = feedback_factor(hessian), format.scale_of_tensor(flat)
    codes, kept = [], []
    encode = {None: _encode, "cpu": _encode_on_the_cpu, "cuda": _encode_on_a_gpu}[kernel]
    search = functools.partial(cpu.search, format=format, block_size=block_size) if kernel == "cpu" else None
    at_once = max(1, UNSHARED // block_size) if kernel == "cpu" else max(1, rows)  # rows whose constants are made
    for start in range(0, columns, block_size):
        here, rest = slice(start, start + block_size), slice(start + block_size, columns)
        block = left[:, here] if kernel == "cpu" else left[:, here].contiguous()
        pieces = block.split(at_once)
        constants = Constants.joined([Constants.of(piece, format, tensor_scale, search) for piece in pieces])
        code, error = encode(block, factor[here, here].contiguous(), format, constants)
        left[:, rest] -= error @ factor[here, rest]
        codes.append(code)
        kept.append(constants.stored)
    scale, location = (
        None if parts[0] is None else torch.stack(parts, dim=1).reshape(-1) for parts in zip(*kept, strict=True)
    )
    format.check_scale(scale)
    pack = cpu.pack if kernel == "cpu" else pack_checked
    return pack(torch.cat(codes, dim=1).reshape(-1), format.zero_code, format.code_bits), scale, location, tensor_scale


class Constants(NamedTuple):
    """Scale and location, float32 (rows,) or None, of one block a row: as stored, and as codes are made and read with.

    They differ where a format makes codes with constants that are not rounded yet, or scales by the tensor's, too.
    """

    stored: tuple[Tensor, Tensor | None]
    making: tuple[Tensor, Tensor | None]
    reading: tuple[Tensor, Tensor | None]

    @classmethod
    def of(cls, block: Tensor, format: Format, tensor_scale: Tensor | None, search=None) -> "Constants":
        """Those of block (rows, block_size) in a format; search as for `Format.constants`.

        A weight that corrections took past the greatest that the tensor's scale reaches counts as that one.
        """
        if tensor_scale is not None:
            reach = tensor_scale * torch.finfo(format.constants_dtype).max * abs(format.extreme)
            block = block.clamp(-reach, reach)
        stored, stored_location, scale, location = format.constants(block, tensor_scale, search)
        reading = stored if tensor_scale is None else stored * tensor_scale
        return cls((stored, stored_location), (scale, location), (reading, stored_location))

    @classmethod
    def joined(cls, parts: list["Constants"]) -> "Constants":
        """Those of rows one below the other."""
        if len(parts) == 1:
            return parts[0]
        pairs = (zip(*pairs, strict=True) for pairs in zip(*parts, strict=True))
        return cls(*(tuple(None if c[0] is None else torch.cat(c) for c in columns) for columns in pairs))


def _encode(block: Tensor, factor: Tensor, format: Format, constants: Constants) -> tuple[Tensor, Tensor]:
    """Codes of block (rows, block_size), and the errors over U_jj, of the same shape."""
    block = block.T.contiguous()  # a column of w is a row here
    codes, errors = torch.empty_like(block, dtype=torch.uint8), torch.empty_like(block)
    for j, column in enumerate(block):
        code = format.codes_of(column[:, None], *constants.making)
        value = format.decode(code, *constants.reading)[:, 0]
        codes[j], errors[j] = code[:, 0], (column - value) / factor[j, j]
        block[j + 1 :] -= factor[j, j + 1 :, None] * errors[j]
    return codes.T, errors.T.contiguous()


def _encode_on_the_cpu(block: Tensor, factor: Tensor, format: Format, constants: Constants) -> tuple[Tensor, Tensor]:
    """`_encode` by numba."""
    from nf4lab.kernels import feedback

    codes = torch.empty(block.shape, dtype=torch.uint8)
    pairs = [pair.numpy() for pair in _with_zeros(constants)]
    arrays = block.numpy(), factor.numpy(), _table(format), *pairs, codes.numpy()
    return codes, torch.from_numpy(feedback.encode_block(*arrays, torch.get_num_threads()))


def _encode_on_a_gpu(block: Tensor, factor: Tensor, format: Format, constants: Constants) -> tuple[Tensor, Tensor]:
    """`_encode` by numba.cuda."""
    from nf4lab.kernels.cuda import feedback_kernels

    pairs = _with_zeros(constants)
    return feedback_kernels.encode_block(block, factor, format.tables(block.device), *pairs, format.signed_zero)


def _with_zeros(constants: Constants) -> list[Tensor]:
    """Scale and location of each row as one tensor (2, rows), with which codes are made, and read.

    What is not shifted is shifted by zeros that change no bit, not even that of -0.0: x - 0.0 and x + -0.0.
    """
    return [
        torch.stack([scale, torch.full_like(scale, zero) if location is None else location])
        for (scale, location), zero in ((constants.making, 0.0), (constants.reading, -0.0))
    ]


@functools.lru_cache(maxsize=64)
def _table(format: Format) -> tuple:
    from nf4lab.kernels import feedback

    arrays = (part.numpy() for part in (format.boundaries, format.ascending, format.levels))
    return feedback.level_table(*arrays, format.signed_zero)
