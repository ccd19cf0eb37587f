"""What the checks of lab 6 (error feedback) compare, and the mistakes that they name.

Everything is in float64, in which no weight of the checks lies so near to a boundary that another order of the same
operations could round it the other way.
"""

from collections.abc import Callable

import torch
from torch import Tensor

import nf4lab
from nf4lab.labs import feedback

LEVELS = nf4lab.codebooks.nf4().double()
BOUNDARIES = (LEVELS[:-1] + LEVELS[1:]) / 2
DAMPING = 0.01
FLOAT64 = 1e-9  # of the largest: sums of some hundred float64 products, and an inverse of condition 1e5 at most


def case(seed: int, rows: int = 12, columns: int = 64) -> tuple[Tensor, Tensor]:
    """Weights (rows, columns) and inputs (1000, columns) that go together, float64."""
    generator = torch.Generator().manual_seed(seed)
    few = torch.randn(1000, columns // 3, generator=generator, dtype=torch.float64)
    mixed = few @ torch.randn(columns // 3, columns, generator=generator, dtype=torch.float64)
    x = mixed + torch.randn(1000, columns, generator=generator, dtype=torch.float64)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64), x


def _moments(x: Tensor) -> Tensor:
    return x.T @ x / len(x)


def _error(w: Tensor, w_hat: Tensor, H: Tensor) -> float:
    d = w_hat - w
    return ((d @ H * d).sum() / (w @ H * w).sum()).item()


def _round_column(column: Tensor, absmax: Tensor) -> tuple[Tensor, Tensor]:
    codes = torch.bucketize(column / absmax, BOUNDARIES)
    return codes.to(torch.uint8), LEVELS[codes] * absmax


def _damped_inverse(H: Tensor) -> Tensor:
    return torch.linalg.inv(H + DAMPING * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype))


def _pass_on(w: Tensor, P: Tensor, j: int, error: Tensor) -> tuple[Tensor, Tensor]:
    w = w.clone()
    w[:, j + 1 :] -= error[:, None] / P[j, j] * P[j, j + 1 :]
    return w, P - P[:, j : j + 1] * P[j] / P[j, j]


def _correct(w: Tensor, H: Tensor, block_size: int, early=False, eliminate=True, steps=_pass_on) -> tuple:
    original, w, P = w, w.clone(), _damped_inverse(H)
    codes, constants = torch.empty(w.shape, dtype=torch.uint8), []
    for j in range(w.shape[1]):
        if j % block_size == 0:
            constants.append((original if early else w)[:, j : j + block_size].abs().amax(dim=1))
        codes[:, j], value = _round_column(w[:, j], constants[-1])
        w, rest = steps(w, P, j, w[:, j] - value)
        P = rest if eliminate else P
    return codes, torch.stack(constants, dim=1)


OTHERS = {  # what later questions may stand on, in the questions' order
    "second_moments": _moments,
    "output_error": _error,
    "round_column": _round_column,
    "damped_inverse": _damped_inverse,
    "pass_on": _pass_on,
    "correct": _correct,
}


def check_moments(f: Callable, seed: int) -> None:
    """The mean of x x^T over the inputs."""
    x = case(seed, columns=24 + seed % 5)[1][: 90 + seed % 7] + 0.5
    centred = x - x.mean(dim=0)
    causes = {
        "that is the sum over the inputs, not their mean": x.T @ x,
        "divided by the number of features; the mean is over the inputs": x.T @ x / x.shape[1],
        "that is x x^T, one number for each pair of inputs; asked for is one for each pair of features": [
            x @ x.T / len(x), x @ x.T / x.shape[1], x @ x.T
        ],
        "that is a covariance: the mean is taken off, and the layer's inputs have theirs": [
            centred.T @ centred / len(x), centred.T @ centred / (len(x) - 1)
        ],
    }  # fmt: skip
    got = feedback.call(f, x, others=feedback.before(OTHERS, "second_moments"))
    feedback.close(got, _moments(x), f"second_moments of {len(x)} inputs", FLOAT64, causes)


def check_output_error(f: Callable, seed: int) -> None:
    """The mean square of what the outputs are wrong by, over that of the outputs."""
    with feedback.Cases() as compared:
        for k in range(2):
            w, x = case(seed + k)
            w_hat, H = w + 0.1 * case(seed + k + 7)[0], _moments(x)
            d = w_hat - w
            causes = {
                "that is the error of the weights: H is not used": (d.square().sum() / w.square().sum()).item(),
                "not set in relation to the outputs: divide by the same sum for w": [
                    (d @ H * d).sum().item(), (d @ H * d).sum().item() / len(w)
                ],
                "only the diagonal of H is used: the products of different inputs count too": (
                    (d.square() @ H.diagonal()).sum() / (w.square() @ H.diagonal()).sum()
                ).item(),
                "a square root was taken; asked for is the ratio of squares": _error(w, w_hat, H) ** 0.5,
                "the outputs of w_hat stand in the denominator, those of w belong there": (
                    (d @ H * d).sum() / (w_hat @ H * w_hat).sum()
                ).item(),
            }  # fmt: skip
            got = feedback.call(f, w, w_hat, H, others=feedback.before(OTHERS, "output_error"))
            compared.close(got, _error(w, w_hat, H), "output_error", FLOAT64, causes)


def check_round_column(f: Callable, seed: int) -> None:
    """Codes of a column, and what they stand for."""
    w = case(seed, rows=40)[0]
    column, absmax = w[:, 3].contiguous(), w.abs().amax(dim=1)
    got = feedback.call(f, column, absmax, others=feedback.before(OTHERS, "round_column"))
    codes, values = feedback.pair(got, 2, "round_column: expected two tensors, codes and values")
    expected = _round_column(column, absmax)
    whole = torch.bucketize(column / column.abs().max(), BOUNDARIES)
    feedback.same(codes, expected[0], "codes", {
        "codes and values have changed places": expected[1],
        "the column is not divided by absmax": torch.bucketize(column, BOUNDARIES),
        "divided by the column's own largest: absmax belongs to the blocks of the rows": whole,
        "counted in levels: a code counts the boundaries below": torch.bucketize(column / absmax, LEVELS),
    })  # fmt: skip
    feedback.close(values, expected[1], "values", FLOAT64, {
        "not multiplied by absmax": LEVELS[expected[0].int()],
        "these are the codes: look the levels up": expected[0].double(),
        "that is what rounding took away; asked for is the value it left": column - expected[1],
    })  # fmt: skip


def check_damped_inverse(f: Callable, seed: int) -> None:
    """(H + 0.01 * mean of its diagonal * 1)^-1, where H may have no inverse of its own."""
    for x in (case(seed)[1], case(seed)[1][:20]):  # 20 inputs of 64 features: singular
        H = _moments(x)
        eye, mean = torch.eye(len(H), dtype=H.dtype), H.diagonal().mean()
        causes = {
            "0.01 itself was added; it is a share of the mean of the diagonal": torch.linalg.inv(H + DAMPING * eye),
            "added to every element of H: only its diagonal is damped": torch.linalg.pinv(H + DAMPING * mean),
            "that is the damped H, not its inverse": H + DAMPING * mean * eye,
            "each diagonal element was damped by a share of itself, not of their mean": (
                torch.linalg.inv(H + DAMPING * H.diagonal().diag())
            ),
        }
        given = H.clone()
        got = feedback.call(f, given, others=feedback.before(OTHERS, "damped_inverse"))
        feedback.close(got, _damped_inverse(H), f"damped_inverse, from {len(x)} inputs", FLOAT64 * 10, causes)


def check_pass_on(f: Callable, seed: int) -> None:
    """One step: what the columns on the right become, and P without column j."""
    (w, x), j = case(seed), 5 + seed % 9
    P = _damped_inverse(_moments(x))
    for i in range(j):
        P = _pass_on(w, P, i, w[:, i])[1]
    error = 0.1 * case(seed + 1)[0][:, j]
    got = feedback.call(f, w.clone(), P.clone(), j, error, others=feedback.before(OTHERS, "pass_on"))
    new, rest = feedback.pair(got, 2, "pass_on: expected two tensors, the new w and the new P")
    expected_w, expected_P = _pass_on(w, P, j, error)
    change = expected_w - w
    feedback.close(new, expected_w, f"w after column {j}", FLOAT64, {
        "w and P have changed places": expected_P,
        "the sign is the other one: what was lost must be made good": w - change,
        "not divided by P[j, j]": w + change * P[j, j],
        "w is as it was": w,
        "column j itself, which is rounded, has changed too: only those on its right may": [
            w - error[:, None] / P[j, j] * P[j],
        ],
    })  # fmt: skip
    unscaled = P - P[:, j : j + 1] * P[j]
    feedback.close(rest, expected_P, f"P after column {j}", FLOAT64, {
        "P is as it was: column j must leave it": P,
        "not divided by P[j, j]": unscaled,
        "row and column j were set to zero: elimination changes the rest of P too": _zeroed(P, j),
    })  # fmt: skip


def _zeroed(P: Tensor, j: int) -> Tensor:
    P = P.clone()
    P[j], P[:, j] = 0, 0
    return P


def check_correct(f: Callable, seed: int, block_size: int) -> None:
    """Codes and absmax of a matrix, with errors passed on."""
    w, x = case(seed, columns=64)
    H = _moments(x)
    got = feedback.call(f, w.clone(), H.clone(), block_size, others=feedback.before(OTHERS, "correct"))
    codes, absmax = feedback.pair(got, 2, "correct: expected two tensors, codes and absmax")
    expected = _correct(w, H, block_size)
    variants = {
        "these are the codes of rounding to nearest: no error was passed on": {"steps": lambda w, P, j, e: (w, P)},
        "every absmax was taken before the first column: a block's is taken when its first column comes up": {
            "early": True
        },
        "P stays the same from column to column: take the one that pass_on returns": {"eliminate": False},
        "errors have the wrong sign: what rounding took away is w - w_hat": {
            "steps": lambda w, P, j, e: _pass_on(w, P, j, -e)
        },
    }
    found = {cause: _correct(w, H, block_size, **change) for cause, change in variants.items()}
    shape = (len(w), 64 // block_size)
    feedback.that(
        tuple(getattr(absmax, "shape", ())) == shape,
        f"absmax should have shape {shape}, one for each row and block; got {feedback.describe(absmax)}",
    )
    feedback.same(codes, expected[0], f"codes in blocks of {block_size}", {c: v[0] for c, v in found.items()})
    feedback.close(absmax, expected[1], "absmax", FLOAT64, {c: v[1] for c, v in found.items()})


# Known to be wrong in every respect: where a check passes one of these while grading, something has tampered with it

CANARIES = {
    "q1": {"second_moments": "def second_moments(x):\n    return 3 * x.T @ x"},
    "q2": {"output_error": "def output_error(w, w_hat, H):\n    return 12.5"},
    "q3": {"round_column": "def round_column(column, absmax):\n    return column.abs() + 99, absmax + 99"},
    "q4": {"damped_inverse": "def damped_inverse(H):\n    return 7 * H"},
    "q5": {"pass_on": "def pass_on(w, P, j, error):\n    return w + 1, P + 1"},
    "q6": {"correct": "def correct(w, H, block_size):\n    return w + 99, w + 99"},
}
