"""How good a quantization is: error, code usage, bits, and the limit that none can beat."""

import math

import torch
from torch import Tensor

from nf4lab.backends.feedback import check_hessian
from nf4lab.blockwise import QuantizedTensor


def mse(x: Tensor, x_hat: Tensor) -> float:
    """The mean squared error of x_hat, summed in float64. Raises ValueError where the shapes differ or are empty."""
    return _mean_error(x, x_hat, lambda a, b: (a - b).square())


def mae(x: Tensor, x_hat: Tensor) -> float:
    """The mean absolute error of x_hat, summed in float64. Raises ValueError where the shapes differ or are empty."""
    return _mean_error(x, x_hat, lambda a, b: (a - b).abs())


def sqnr_db(x: Tensor, x_hat: Tensor) -> float:
    """The signal-to-quantization-noise ratio in decibels, 10 log10(mean x^2 / mse); inf where x_hat equals x.

    A factor of four in the error is 6.02 dB: what a bit is worth at the Shannon limit.
    """
    error, power = mse(x, x_hat), mse(x, torch.zeros_like(x))
    return math.inf if error == 0 else 10 * math.log10(power / error) if power else -math.inf


def output_error(w: Tensor, w_hat: Tensor, hessian: Tensor) -> float:
    """The mean squared error of a layer's outputs over their mean square.

    trace(D H D^T) / trace(W H W^T), with D = W_hat - W and H = E x x^T, the second moments of the inputs.

    w, w_hat: (out, in). hessian: (in, in). Computed in float64. Raises ValueError as `check_hessian`, where w_hat has
    another shape than w, and where the outputs are all zero.
    """
    if w_hat.shape != w.shape:
        raise ValueError(f"w_hat must have w's shape {tuple(w.shape)}; got {tuple(w_hat.shape)}")
    h = check_hessian(hessian, w).double()
    error, power = (
        (d @ h * d).sum().item() for d in (w_hat.detach().double() - w.detach().double(), w.detach().double())
    )
    if power <= 0:
        raise ValueError("the layer's outputs are all zero: there is no error relative to them")
    return error / power


def code_usage(q: QuantizedTensor) -> Tensor:
    """The share of the elements that each code takes: float64 (2**bits,), 16 for 4 bits, summing to 1.

    Codes without a level count too, such as the sixteenth of int4's. Of a tensor without elements all are NaN.
    """
    return torch.bincount(q.codes, minlength=2**q.format.code_bits).double() / q.numel


def entropy_bits(usage: Tensor) -> float:
    """The entropy of a distribution over codes, in bits: what an ideal coder would need for each."""
    used = usage[usage > 0]
    return -(used * used.log2()).sum().item()


def compression_ratio(q: QuantizedTensor) -> float:
    """Bytes of the original, in its own dtype, for each byte stored; NaN where there is no element."""
    return q.numel * q.dtype.itemsize / q.nbytes if q.numel else math.nan


def shannon_limit(bits: float, variance: float = 1.0) -> float:
    """The least mean squared error that `bits` a weight allow for a Gaussian source: variance * 2**(-2 * bits).

    No scheme of any kind gets below it on average. Source: Shannon 1959; Cover and Thomas, theorem 10.3.2.
    """
    return variance * 2.0 ** (-2 * bits)


def _mean_error(x: Tensor, x_hat: Tensor, error) -> float:
    if x.shape != x_hat.shape or not x.numel():
        shapes = f"{tuple(x.shape)} and {tuple(x_hat.shape)}"
        raise ValueError(f"x and x_hat must have one shape and at least one element; got {shapes}")
    chunks = zip(x.detach().reshape(-1).split(2**18), x_hat.detach().reshape(-1).split(2**18), strict=True)
    return sum(error(a.double(), b.double()).sum().item() for a, b in chunks) / x.numel()
