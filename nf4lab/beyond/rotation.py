"""Rotate: the Walsh-Hadamard transform with random signs, which makes nearly all rows of weights look normal.

    y = W x = (W R)(R^T x)        R = D H / sqrt(n), orthogonal

D is a diagonal of random signs, H a Hadamard matrix: entries +-1, columns at right angles. Each rotated weight is a
sum of n old ones with random signs, over sqrt(n), so a giant is spread over its whole row and the central limit
theorem does the rest. The product stays the same, and R is never stored: signs, and a fast transform.

Sources: QuIP# (arXiv:2402.04396), section 3, and QuaRot (arXiv:2404.00456).
"""

import functools
import itertools

import torch
from torch import Tensor, nn

from nf4lab.layers.linear import Linear4bit

LARGEST_FACTOR = 1024  # of a width, beside its power of two; its matrix is multiplied as one


def hadamard(x: Tensor, inverse: bool = False) -> Tensor:
    """x (…, n) times the Hadamard matrix H of order n over sqrt(n): the same shape and dtype, lengths kept.

    H is the Kronecker product of `hadamard_matrix(m)` and Sylvester's matrix of order n / m, m the smallest factor
    that works; for a power of two it is scipy.linalg.hadamard(n). inverse: times H^T, which undoes it.
    Computed in float32 (float64 for a float64 x) and rounded once. Differentiable.

    >>> hadamard(torch.tensor([1.0, 0.0, 0.0, 0.0]))
    tensor([0.5000, 0.5000, 0.5000, 0.5000])

    Raises TypeError for anything but a floating-point tensor of 16 bits or more, ValueError for a width that no known
    Hadamard matrix has, or only one with a factor above 1,024.
    """
    _check(x)
    return _turned(x, None, inverse)


def _check(x: Tensor) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x must be a floating-point torch.Tensor; got {getattr(x, 'dtype', type(x).__name__)}")
    if x.layout != torch.strided or x.element_size() < 2:
        raise TypeError(f"x must be a dense tensor of at least 16 bits; got {x.layout}, {x.dtype}")
    if not x.dim():
        raise ValueError("x must have a last dimension to rotate; got a single number")
    factor(x.shape[-1])


def _turned(x: Tensor, signs: Tensor | None, inverse: bool) -> Tensor:
    """x D H, or its inverse, over sqrt(n)."""
    return _Turned.apply(x, signs, inverse) if x.requires_grad else _transformed(x.detach(), signs, inverse)


class _Turned(torch.autograd.Function):
    """The derivative of a rotation is the rotation back."""

    @staticmethod
    def forward(ctx, x, signs, inverse):
        ctx.signs, ctx.inverse = signs, inverse
        return _transformed(x, signs, inverse)

    @staticmethod
    def backward(ctx, grad):
        return _turned(grad, ctx.signs, not ctx.inverse), None, None


def _transformed(x: Tensor, signs: Tensor | None, inverse: bool) -> Tensor:
    from nf4lab.kernels import hadamard as kernels  # it loads numba, which importing nf4lab does not

    n = x.shape[-1]
    m = factor(n)
    if m == 1:
        return kernels.pieces(x, n, x.dtype, signs=signs, after=inverse, factor=n**-0.5)
    # H_m (x) H_2^k: the power of two within a piece, then the pieces among themselves
    wide = torch.promote_types(x.dtype, torch.float32)
    within = kernels.pieces(x, n // m, wide, signs=None if inverse else signs).view(-1, m, n // m)
    matrix = _matrix_on(m, within.device, wide)
    among = ((matrix if inverse else matrix.T) @ within).reshape(x.shape)
    turned = (among * n**-0.5).to(x.dtype)
    return turned * signs.to(turned) if inverse and signs is not None else turned


@functools.lru_cache(maxsize=32)
def _matrix_on(m: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return hadamard_matrix(m).to(device, dtype)


@functools.cache
def factor(n: int) -> int:
    """The least m up to 1,024 for which n / m is a power of two and `hadamard_matrix(m)` is known.

    Raises ValueError, with the nearest widths that work, where there is none.
    """
    if found := _factor(n):
        return found
    lower = next((k for k in range(n, 0, -1) if _factor(k)), "none")
    upper = next(k for k in itertools.count(max(n, 1)) if _factor(k))
    raise ValueError(
        f"no Hadamard matrix of order {n} is known here{', of factors up to 1024' if n > LARGEST_FACTOR else ''}; "
        f"the nearest orders are {lower} and {upper}"
    )


def _factor(n: int) -> int | None:
    odd = n // (n & -n) if n > 0 else 0
    candidates = (odd << k for k in range(n.bit_length()) if n > 0 and n % (odd << k) == 0)
    return next((m for m in candidates if m <= LARGEST_FACTOR and _construction(m)), None)


def hadamard_matrix(m: int) -> Tensor:
    """A Hadamard matrix of order m, entries +-1: float32 (m, m), H H^T = m I.

    m = 1 or 2, q + 1 for q = 3 mod 4 (Paley's first construction), or 2 (q + 1) for q = 1 mod 4 (his second), q a
    prime, its square or cube: the factors that `hadamard` needs beside a power of two. Raises ValueError for any other.
    Source: R. E. A. C. Paley, On orthogonal matrices, 1933.
    """
    construction = _construction(m)
    if construction is None:
        raise ValueError(f"no construction of a Hadamard matrix of order {m} is known here")
    return construction(m)


def _construction(m: int):
    if m < 1:
        return None
    if m == 1:
        return lambda m: torch.ones(1, 1)
    if m == 2:
        return lambda m: torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    if m % 4 == 0 and (m - 1) % 4 == 3 and _prime_power(m - 1):
        return _paley_1
    if m % 4 == 0 and (m // 2 - 1) % 4 == 1 and _prime_power(m // 2 - 1):
        return _paley_2
    return None


def _paley_1(m: int) -> Tensor:
    """I + S, S = [[0, 1], [-1, Q]]: rows of S are at right angles, and S is antisymmetric."""
    return torch.eye(m) + _bordered(_jacobsthal(m - 1), -1.0)


def _paley_2(m: int) -> Tensor:
    """From symmetric C of order m / 2: each 0 becomes [[1, -1], [-1, -1]], each c = +-1 c times [[1, 1], [1, -1]]."""
    conference = _bordered(_jacobsthal(m // 2 - 1), 1.0)
    of_zero, of_one = torch.tensor([[1.0, -1.0], [-1.0, -1.0]]), torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    return torch.kron(torch.eye(m // 2), of_zero) + torch.kron(conference, of_one)


def _bordered(q: Tensor, sign: float) -> Tensor:
    edge = torch.ones(len(q), 1)
    return torch.cat([torch.cat([torch.zeros(1, 1), edge.T], 1), torch.cat([sign * edge, q], 1)])


def _jacobsthal(q: int) -> Tensor:
    """Q[a, b] = 1 where a - b is a square of the field of q elements, -1 where it is not, 0 for a = b."""
    p, degree = _prime_power(q)
    elements = list(itertools.product(range(p), repeat=degree))  # coefficients of polynomials, the highest first
    modulus = _irreducible(p, degree)
    squares = {_times(a, a, modulus, p) for a in elements if any(a)}
    character = {a: (1.0 if a in squares else -1.0) if any(a) else 0.0 for a in elements}
    return torch.tensor(
        [[character[tuple((x - y) % p for x, y in zip(a, b, strict=True))] for b in elements] for a in elements]
    )


def _prime_power(q: int) -> tuple[int, int] | None:
    """(p, k) with q = p**k and p a prime; None where q is not a prime power, or k is above 3."""
    p = next((d for d in range(2, int(q**0.5) + 1) if q % d == 0), q)
    return next(((p, k) for k in (1, 2, 3) if q == p**k > 1), None)


def _irreducible(p: int, degree: int) -> tuple[int, ...]:
    """The lower coefficients of a monic polynomial of degree 1 to 3 without a root, which is what irreducible means."""
    if degree == 1:
        return (0,)
    lowers = itertools.product(range(p), repeat=degree)
    return next(lower for lower in lowers if all(_value((1, *lower), x) % p for x in range(p)))


def _value(coefficients: tuple[int, ...], x: int) -> int:
    """A polynomial at x, by Horner's rule."""
    return functools.reduce(lambda value, c: value * x + c, coefficients)


def _times(a: tuple[int, ...], b: tuple[int, ...], modulus: tuple[int, ...], p: int) -> tuple[int, ...]:
    """The product of two elements of the field: that of the polynomials, reduced."""
    degree = len(a)
    product = [0] * (2 * degree - 1)
    for i, j in itertools.product(range(degree), repeat=2):
        product[i + j] += a[i] * b[j]
    for i in range(degree - 1):  # x**degree = -modulus
        for j, c in enumerate(modulus):
            product[i + 1 + j] -= product[i] * c
    return tuple(c % p for c in product[degree - 1 :])


def random_signs(n: int, seed: int = 0) -> Tensor:
    """+-1 at random: float32 (n,), the same for the same seed on every machine."""
    return torch.randint(2, (n,), generator=torch.Generator().manual_seed(seed)).float() * 2 - 1


def rotate(x: Tensor, signs: Tensor) -> Tensor:
    """x R for x (…, n), R = D H: each row of weights, or of activations, in the rotated basis.

    signs: ±1, float (n,), on any device; they take no gradient. On an NVIDIA GPU one kernel goes from x to the result,
    for n a power of two up to 8192. Raises as `hadamard`, and ValueError for another number of signs.
    """
    return _turned(x, _signs_of(x, signs), inverse=False)


def unrotate(x: Tensor, signs: Tensor) -> Tensor:
    """x R^T: what `rotate` did undone. Raises as that."""
    return _turned(x, _signs_of(x, signs), inverse=True)


def _signs_of(x: Tensor, signs: Tensor) -> Tensor:
    _check(x)
    if not isinstance(signs, Tensor):
        raise TypeError(f"signs must be a torch.Tensor; got {type(signs).__name__}")
    if signs.shape != x.shape[-1:]:
        raise ValueError(f"x of shape {tuple(x.shape)} takes as many signs as its last side; got {tuple(signs.shape)}")
    return signs.detach().to(x.device)


class RotatedLinear(nn.Module):
    """y = W x + bias with W R in 4 bits: x is rotated on the way in, so what `quantized` stands for is W R.

    base: a Linear4bit made from rotated weights. signs: float32 (in_features,), as `random_signs` makes them.
    What it costs: for n a power of two n log2 n additions for each row of x, beside 2 n m operations of the product.
    """

    def __init__(self, base: Linear4bit, signs: Tensor):
        super().__init__()
        if signs.shape != (base.in_features,):
            raise ValueError(f"signs must have shape ({base.in_features},); got {tuple(signs.shape)}")
        self.base = base
        self.register_buffer("signs", signs)

    @classmethod
    def from_linear(cls, layer: nn.Linear, *args, seed: int = 0, **kwargs) -> "RotatedLinear":
        """The layer with its weight rotated, then quantized: arguments and errors as for `Linear4bit.from_linear`."""
        if not isinstance(layer, nn.Linear) or type(layer).forward is not nn.Linear.forward:
            raise TypeError(f"layer must be a torch.nn.Linear; got {type(layer).__name__}")
        signs = random_signs(layer.in_features, seed).to(layer.weight.device)
        rotated = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, "meta")
        rotated.weight = nn.Parameter(rotate(layer.weight.detach(), signs), requires_grad=False)
        rotated.bias = layer.bias
        return cls(Linear4bit.from_linear(rotated, *args, **kwargs), signs).train(layer.training)

    @property
    def weight(self) -> Tensor:
        """W_hat in the basis of x, (out_features, in_features): made at every access."""
        return unrotate(self.base.weight, self.signs)

    def forward(self, x: Tensor) -> Tensor:
        """x (…, in_features) to (…, out_features)."""
        return self.base(rotate(x, self.signs))
