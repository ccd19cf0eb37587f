"""What the checks of lab 3 (constants) compare, and the mistakes that they name."""

import torch
import torch.nn.functional as F
from torch import Tensor

import nf4lab
from nf4lab.labs import feedback
from nf4lab.models import minilm_matrices

LEVELS = nf4lab.codebooks.nf4()
BOUNDARIES = (LEVELS[:-1] + LEVELS[1:]) / 2
FLOAT32 = 1e-5  # of the largest: float32's rounding after a mean was taken off


def top(bits: int) -> int:
    """The largest magnitude of a signed code: 127 for 8 bits, 7 for 4."""
    return 2 ** (bits - 1) - 1


def groups_of(values: Tensor, group_size: int) -> Tensor:
    """The groups of some values, the last one filled with zeros: (n_groups, group_size)."""
    return F.pad(values, (0, -len(values) % group_size)).reshape(-1, group_size)


def _scaled(absmax: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The signed codes before rounding (n,), the groups' absmax and the offset."""
    offset = absmax.mean()
    groups = groups_of(absmax - offset, group_size)
    group_absmax = groups.abs().amax(dim=1)
    scaled = (groups / group_absmax[:, None] * top(bits)).nan_to_num(nan=0.0)
    return scaled.reshape(-1)[: len(absmax)], group_absmax, offset


def _quantize_constants(absmax: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    scaled, group_absmax, offset = _scaled(absmax, bits, group_size)
    return (scaled.round() + top(bits)).to(torch.uint8), group_absmax, offset


def _dequantize_constants(codes: Tensor, group_absmax: Tensor, offset, bits: int, group_size: int) -> Tensor:
    scale = group_absmax.repeat_interleave(group_size)[: len(codes)]
    return (codes.float() - top(bits)) / top(bits) * scale + offset


def _bits_per_weight(n: int, block_size: int, bits: int, group_size: int) -> float:
    n_blocks = -(-n // block_size)
    return 8 * ((n + 1) // 2 + -(-n_blocks * bits // 8) + 4 * -(-n_blocks // group_size) + 4) / n


def _encode(w: Tensor, scale: Tensor, block_size: int) -> Tensor:
    s = (groups_of(w.reshape(-1), block_size) / scale[:, None]).nan_to_num(nan=0.0)
    return torch.bucketize(s, BOUNDARIES).reshape(-1)[: w.numel()].to(torch.uint8)


def _decode(codes: Tensor, scale: Tensor, block_size: int) -> Tensor:
    return LEVELS[codes.int()] * scale.repeat_interleave(block_size)[: len(codes)]


def _absmax(w: Tensor, block_size: int) -> Tensor:
    return groups_of(w.reshape(-1), block_size).abs().amax(dim=1)


def block_errors(w: Tensor, scale: Tensor, block_size: int) -> Tensor:
    """The squared error of each block that is encoded with these constants: float64 (n_blocks,)."""
    error = _decode(_encode(w, scale, block_size), scale, block_size) - w.reshape(-1)
    return groups_of(error.double().square(), block_size).sum(dim=1)


def _best_scale(w: Tensor, block_size: int, factors) -> Tensor:
    scales = torch.stack([_absmax(w, block_size) * factor for factor in factors])
    errors = torch.stack([block_errors(w, scale, block_size) for scale in scales])
    return scales.gather(0, errors.argmin(dim=0, keepdim=True))[0]


def _added_error(w: Tensor, bits: int) -> float:
    absmax = _absmax(w, 64)
    codes, coarse = _encode(w, absmax, 64), _dequantize_constants(*_quantize_constants(absmax, bits, 256), bits, 256)
    return (
        nf4lab.mse(w.reshape(-1), _decode(codes, coarse, 64)) / nf4lab.mse(w.reshape(-1), _decode(codes, absmax, 64))
        - 1
    )


OTHERS = {  # what a question may stand on
    "quantize_constants": _quantize_constants,
    "dequantize_constants": _dequantize_constants,
    "bits_per_weight": _bits_per_weight,
    "best_scale": _best_scale,
    "added_error": _added_error,
    "encode": _encode,
    "decode": _decode,
    "block_absmax": _absmax,
}


def constants(n: int, generator: torch.Generator) -> Tensor:
    """The absmax of n blocks of 64 normal weights: float32 (n,)."""
    return torch.randn(n, 64, generator=generator).abs().amax(dim=1)


def real(generator: torch.Generator) -> Tensor:
    """The first 192 rows of an attention matrix of the encoder of all-MiniLM-L6-v2: float32 (192, 384)."""
    names = [name for name, m in minilm_matrices().items() if name.startswith("encoder") and m.numel() == 384 * 384]
    return minilm_matrices()[names[torch.randint(len(names), (1,), generator=generator).item()]][:192]


def check_quantize_constants(f, absmax: Tensor, bits: int, group_size: int) -> None:
    """Offset, absmax of the groups, codes."""
    scaled, group_absmax, offset = _scaled(absmax, bits, group_size)
    got = feedback.call(f, absmax, bits, group_size, others=OTHERS)
    feedback.that(
        isinstance(got, tuple) and len(got) == 3,
        f"quantize_constants: expected codes, group absmax and offset; got {feedback.describe(got)}",
    )
    centred = absmax - offset
    feedback.close(got[2] if isinstance(got[2], Tensor) else torch.tensor(got[2]), offset, "offset", FLOAT32, {
        "one offset for each group: there is one for all constants": lambda x: x.numel() > 1,
        "the middle between the least and the greatest: the offset is the mean": (absmax.min() + absmax.max()) / 2,
        "no offset: take the mean off first": torch.tensor(0.0),
        "the zeros that fill the last group are no constants": groups_of(absmax, group_size).mean(),
        "the median: the offset is the mean": absmax.median(),
    })  # fmt: skip
    feedback.close(got[1], group_absmax, "group_absmax", FLOAT32, {
        "the offset is not taken off": groups_of(absmax, group_size).amax(dim=1),
        "the largest value, not the largest magnitude": groups_of(centred, group_size).amax(dim=1),
        "absmax over the wrong axis: one for each group": groups_of(centred, group_size).abs().amax(dim=0),
        "the last group was filled with zeros before the offset was taken off": (
            (groups_of(absmax, group_size) - offset).abs().amax(dim=1)
        ),
        "the last group, shorter than the others, is missing": group_absmax[:-1],
    })  # fmt: skip
    check_constant_codes(got[0], scaled, bits)


def check_constant_codes(got, scaled: Tensor, bits: int) -> None:
    """The codes, where a value half-way between two of them, up to float32's rounding, may take either."""
    m = top(bits)
    expected = (scaled.round() + m).to(torch.uint8)
    causes = {
        f"the codes are signed: add {m}, so that they count from 0": lambda x: (x.double() < 0).any(),
        f"{m + 1} steps on a side: {2 * m + 1} codes have {m} on either side of zero": (
            (scaled * (m + 1) / m).round() + m + 1
        ),
        f"{m + 1} was added, not {m}": expected.int() + 1,
        "rounded down, not to the nearest": scaled.floor() + m,
        "rounded towards zero, not to the nearest": scaled.trunc() + m,
        "the codes of the zeros that fill the last group are still there": lambda x: x.numel() > len(scaled),
    }
    if isinstance(got, Tensor) and got.shape == expected.shape and got.dtype == torch.uint8:
        near = (scaled - scaled.floor() - 0.5).abs() < 1e-3
        either = near & ((got.float() - m - scaled).abs() < 0.51)
        expected = got.where(either, expected)
    feedback.same(got, expected, "codes", causes)


def check_dequantize_constants(f, absmax: Tensor, bits: int, group_size: int) -> None:
    """The constants that the codes stand for."""
    codes, group_absmax, offset = _quantize_constants(absmax, bits, group_size)
    expected, m = _dequantize_constants(codes, group_absmax, offset, bits, group_size), top(bits)
    scale, signed = group_absmax.repeat_interleave(group_size)[: len(codes)], codes.float() - m
    causes = {
        "the offset is not added": expected - offset,
        f"the codes count from 0: take {m} off first": codes / m * scale + offset,
        f"uint8 has no negative numbers: {m} taken off a code below it wraps around; convert to float first": (
            (codes - m).float() / m * scale + offset
        ),
        "the groups' absmax are in the wrong order: repeat each for its group": (
            signed / m * group_absmax.repeat(group_size)[: len(codes)] + offset
        ),
        f"divided by {m + 1}, not by {m}": signed / (m + 1) * scale + offset,
        f"not divided by {m}": signed * scale + offset,
        "not multiplied by the group's absmax": signed / m + offset,
    }
    got = feedback.call(f, codes, group_absmax, offset, bits, group_size, others=OTHERS)
    feedback.close(got, expected, "constants", FLOAT32, causes)


def check_bits(f, n: int, block_size: int, bits: int, group_size: int) -> None:
    """Bits a weight, exactly."""
    n_blocks, codes = -(-n // block_size), (n + 1) // 2
    stored, groups = -(-n_blocks * bits // 8), -(-n_blocks // group_size)
    causes = {
        "the last group is shorter, but its absmax takes 4 bytes": (
            8 * (codes + stored + 4 * (n_blocks // group_size) + 4) / n
        ),
        "the offset takes 4 bytes": 8 * (codes + stored + 4 * groups) / n,
        "the groups' absmax take 4 bytes each": 8 * (codes + stored + 4) / n,
        "a constant of 4 bits takes half a byte: they are packed too": 8 * (codes + n_blocks + 4 * groups + 4) / n,
        "the last block is shorter, but it has a constant like any other": (
            8 * (codes + n // block_size * bits // 8 + 4 * -(-(n // block_size) // group_size) + 4) / n
        ),
        "the float32 absmax are not stored any more": 8 * (codes + 4 * n_blocks + stored + 4 * groups + 4) / n,
        "the formula is right only where blocks and groups come out even; and the offset counts": (
            4 + bits / block_size + 32 / (block_size * group_size)
        ),
        "these are bytes: a byte has 8 bits": _bits_per_weight(n, block_size, bits, group_size) / 8,
    }
    got = feedback.call(f, n, block_size, bits, group_size, others=OTHERS)
    what = f"bits_per_weight({n}, {block_size}, {bits}, {group_size})"
    # 1e-9: far below what one bit more or less in all of a tensor would change, far above float64's rounding
    feedback.close(got, _bits_per_weight(n, block_size, bits, group_size), what, 1e-9, causes)


def check_added_error(f, w: Tensor, bits: int) -> None:
    """By what share coarse constants raise the squared error, when the codes stay."""
    expected, flat, absmax = _added_error(w, bits), w.reshape(-1), _absmax(w, 64)
    coarse = _dequantize_constants(*_quantize_constants(absmax, bits, 256), bits, 256)
    exact = nf4lab.mse(flat, _decode(_encode(w, absmax, 64), absmax, 64))
    again = nf4lab.mse(flat, _decode(_encode(w, coarse, 64), coarse, 64)) / exact - 1
    near = lambda value: lambda x: abs(float(x) - value) < 0.02 * abs(value)  # noqa: E731
    causes = {
        "this is the ratio: take 1 off to get the share that was added": near(expected + 1),
        "this is in percent: asked for is a share": near(100 * expected),
        "the weights were encoded again with the coarse constants: here their codes stay": near(again),
        "this is the difference: divide by the error with the exact constants": near(expected * exact),
        "the other way round: coarse over exact": near(1 / (expected + 1) - 1),
        "this is the error of the constants: asked for is that of the weights": near(nf4lab.mse(absmax, coarse)),
    }
    got = feedback.call(f, w, bits, others=OTHERS)
    # 2 %: the rounding of a few constants that lie half-way between two codes, and float32 sums
    feedback.close(got, expected, f"added_error with {bits} bits", 0.02, causes)


def check_best_scale(f, w: Tensor, block_size: int, factors: list[float]) -> None:
    """For each block, the multiple of its absmax that has the least squared error."""
    expected, absmax = _best_scale(w, block_size, factors), _absmax(w, block_size)
    got = feedback.call(f, w, block_size, factors, others=OTHERS)
    scales = torch.stack([absmax * factor for factor in factors])
    errors = torch.stack([block_errors(w, scale, block_size) for scale in scales])
    one = scales[errors.sum(dim=1).argmin()]
    causes = {
        "these are the factors: multiply each by its block's absmax": lambda x: (
            (x <= max(factors) + 1e-6).all() and len(x.unique()) <= len(factors)
        ),
        "every block kept its absmax: try all factors": absmax,
        "one factor for all blocks: each block has its own best": one,
        "these have the largest error": scales.gather(0, errors.argmax(dim=0, keepdim=True))[0],
    }
    feedback.close(torch.zeros_like(got) if not isinstance(got, Tensor) else got.isfinite().float(),
                   torch.ones_like(expected), "finite constants", 0, causes)  # fmt: skip
    worse = block_errors(w, got, block_size) > block_errors(w, expected, block_size) * (1 + 1e-4)
    if worse.any():
        feedback.same(got, got.where(~worse, expected), "best_scale", causes)


def default_error(w: Tensor) -> float:
    """The squared error of the default: blocks of 64, constants in 8 bits by the dynamic map."""
    return nf4lab.mse(w, nf4lab.quantize(w, "nf4", 64, double_quant=True).dequantize())


def check_beat(f, w: Tensor, share: float) -> None:
    """Below `share` of the default's squared error, with what takes just as many bits."""
    n_blocks, got = -(-w.numel() // 64), feedback.call(f, w, others=OTHERS)
    feedback.that(
        isinstance(got, tuple) and len(got) == 4,
        f"beat_the_default: expected codes, constant codes, group absmax and offset; got {feedback.describe(got)}",
    )
    parts = (("codes", w.numel()), ("constant codes", n_blocks), ("group absmax", -(-n_blocks // 256)), ("offset", 1))
    for (name, n), part in zip(parts, got, strict=True):
        dtype = torch.uint8 if "codes" in name else torch.float32
        feedback.that(
            isinstance(part, Tensor) and part.numel() == n and part.dtype == dtype,
            f"{name}: expected {n} {str(dtype).removeprefix('torch.')}, which is what the default takes; "
            f"got {feedback.describe(part)}",
        )
    feedback.that(int(got[0].max()) < 16, f"codes: expected 0 to 15, got {got[0].max()}")
    scale = _dequantize_constants(*got[1:], 8, 256)
    error = nf4lab.mse(w.reshape(-1), _decode(got[0], scale, 64)) / default_error(w)
    again = block_errors(w, scale, 64).sum().item() / w.numel() / default_error(w)
    near_absmax = ((scale / _absmax(w, 64) - 1).abs() < 0.02).float().mean() > 0.9
    causes = {
        "the codes were not made with the constants that are stored: encode with the decoded ones": (
            lambda _: again <= share < error
        ),
        "nearly every block still has its absmax for its constant: choose it by the error": lambda _: near_absmax,
    }
    message = f"squared error: at most {share:.2f} of the default's, got {error:.4f} of it"
    feedback.that(error <= share, message, got, causes)
