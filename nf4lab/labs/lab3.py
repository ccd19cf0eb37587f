"""What the checks of lab 3 (constants) compare, and the mistakes that they name."""

import functools

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


OTHERS = {  # what later questions may stand on, in the questions' order
    "encode": _encode,
    "decode": _decode,
    "block_absmax": _absmax,
    "quantize_constants": _quantize_constants,
    "dequantize_constants": _dequantize_constants,
    "bits_per_weight": _bits_per_weight,
    "added_error": _added_error,
    "best_scale": _best_scale,
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
    got = feedback.call(f, absmax, bits, group_size, others=feedback.before(OTHERS, "quantize_constants"))
    codes, got_absmax, got_offset = feedback.pair(got, 3, "quantize_constants: expected codes, group absmax and offset")
    centred = absmax - offset
    groups = [absmax[i : i + group_size] for i in range(0, len(absmax), group_size)]
    got_offset = got_offset if isinstance(got_offset, Tensor) else torch.tensor(feedback.number(got_offset, "offset"))
    feedback.close(got_offset, offset, "offset", FLOAT32, {
        "one offset for each group: there is one for all constants": [
            torch.stack([group.mean() for group in groups]), groups_of(absmax, group_size).mean(dim=1)
        ],
        "the middle between the least and the greatest: the offset is the mean": (absmax.min() + absmax.max()) / 2,
        "no offset: take the mean off first": torch.tensor(0.0),
        "the zeros that fill the last group are no constants": groups_of(absmax, group_size).mean(),
        "the median: the offset is the mean": absmax.median(),
    })  # fmt: skip
    feedback.close(got_absmax, group_absmax, "group_absmax", FLOAT32, {
        "the offset is not taken off": groups_of(absmax, group_size).amax(dim=1),
        "the largest value, not the largest magnitude": groups_of(centred, group_size).amax(dim=1),
        "absmax over the wrong axis: one for each group": groups_of(centred, group_size).abs().amax(dim=0),
        "the last group was filled with zeros before the offset was taken off": (
            (groups_of(absmax, group_size) - offset).abs().amax(dim=1)
        ),
        "the last group, shorter than the others, is missing": group_absmax[:-1],
    })  # fmt: skip
    check_constant_codes(codes, scaled, bits)


def check_constant_codes(got, scaled: Tensor, bits: int) -> None:
    """The codes, where a value half-way between two of them, up to float32's rounding, may take either."""
    m = top(bits)
    expected = (scaled.round() + m).to(torch.uint8)
    causes = {
        "the codes are signed: add M, so that they count from 0": _signed(scaled),
        "M is 2**(bits - 1) - 1: here there is one step too many on a side": [
            wide + shift for shift in (m, m + 1) for wide in ((scaled * (m + 1) / m).round(),)
        ],
        "M + 1 was added, not M": expected.int() + 1,
        "rounded down, not to the nearest": scaled.floor() + m,
        "rounded towards zero, not to the nearest": scaled.trunc() + m,
        "the codes are not rounded": scaled + m,
    }
    if isinstance(got, Tensor) and got.shape == expected.shape:
        near = (scaled - scaled.floor() - 0.5).abs() < 1e-3
        either = near & ((got.float() - m - scaled).abs() < 0.51)
        expected = got.to(torch.uint8).where(either, expected)
    feedback.same(got, expected, "codes", causes)


def _signed(scaled: Tensor):
    """A recogniser of the rounded codes before M is added, as a signed or an unsigned dtype keeps them."""
    signed = scaled.round()
    return lambda got: bool(((got.double() - signed.double()).remainder(256) == 0).all()) and got.shape == signed.shape


def check_dequantize_constants(f, absmax: Tensor, bits: int, group_size: int) -> None:
    """The constants that the codes stand for."""
    codes, group_absmax, offset = _quantize_constants(absmax, bits, group_size)
    expected, m = _dequantize_constants(codes, group_absmax, offset, bits, group_size), top(bits)
    scale, signed = group_absmax.repeat_interleave(group_size)[: len(codes)], codes.float() - m
    causes = {
        "the offset is not added": expected - offset,
        "the codes count from 0: take M off first": codes / m * scale + offset,
        "uint8 has no negative numbers: M taken off a smaller code wraps around; convert to float first": (
            (codes - m).float() / m * scale + offset
        ),
        "the groups' absmax are in the wrong order: repeat each for its group": (
            signed / m * group_absmax.repeat(group_size)[: len(codes)] + offset
        ),
        "divided by M + 1, not by M": signed / (m + 1) * scale + offset,
        "not divided by M": signed * scale + offset,
        "not multiplied by the group's absmax": signed / m + offset,
    }
    got = feedback.call(
        f, codes, group_absmax, offset, bits, group_size, others=feedback.before(OTHERS, "dequantize_constants")
    )
    feedback.close(got, expected, "constants", FLOAT32, causes)


def check_bits(f, *cases: tuple[int, int, int, int]) -> None:
    """Bits a weight, exactly. cases: (n, block_size, bits, group_size)."""
    with feedback.Cases() as compared:
        for n, block_size, bits, group_size in cases:
            n_blocks, codes = -(-n // block_size), (n + 1) // 2
            stored, groups = -(-n_blocks * bits // 8), -(-n_blocks // group_size)
            expected = _bits_per_weight(n, block_size, bits, group_size)
            causes = {
                "the last group is shorter, but its absmax takes 4 bytes": (
                    8 * (codes + stored + 4 * (n_blocks // group_size) + 4) / n
                ),
                "the offset takes 4 bytes": 8 * (codes + stored + 4 * groups) / n,
                "the groups' absmax take 4 bytes each": 8 * (codes + stored + 4) / n,
                "a constant of 4 bits takes half a byte: they are packed too": 8
                * (codes + n_blocks + 4 * groups + 4)
                / n,
                "the last block is shorter, but it has a constant like any other": (
                    8 * (codes + n // block_size * bits // 8 + 4 * -(-(n // block_size) // group_size) + 4) / n
                ),
                "the bytes of the constants' codes are rounded up": (
                    8 * (codes + n_blocks * bits // 8 + 4 * groups + 4) / n
                ),
                "the bytes of an odd number of codes are rounded up": 8 * (n // 2 + stored + 4 * groups + 4) / n,
                "the float32 absmax are not stored any more": 8 * (codes + 4 * n_blocks + stored + 4 * groups + 4) / n,
                "the formula is right only where blocks and groups come out even; and the offset counts": (
                    4 + bits / block_size + 32 / (block_size * group_size)
                ),
                "these are bytes: a byte has 8 bits": expected / 8,
            }
            got = feedback.call(f, n, block_size, bits, group_size, others=feedback.before(OTHERS, "bits_per_weight"))
            what = f"bits_per_weight({n}, {block_size}, {bits}, {group_size})"
            # 1e-9: far below what one bit more or less in all of a tensor would change, far above float64's rounding
            compared.close(got, expected, what, 1e-9, causes)


def check_added_error(f, *cases: tuple[Tensor, int]) -> None:
    """By what share coarse constants raise the squared error, when the codes stay. cases: (w, bits)."""
    with feedback.Cases() as compared:
        for w, bits in cases:
            expected, flat, absmax = _added_error(w, bits), w.reshape(-1), _absmax(w, 64)
            coarse = _dequantize_constants(*_quantize_constants(absmax, bits, 256), bits, 256)
            exact = nf4lab.mse(flat, _decode(_encode(w, absmax, 64), absmax, 64))
            again = nf4lab.mse(flat, _decode(_encode(w, coarse, 64), coarse, 64)) / exact - 1
            causes = {
                "this is the ratio: take 1 off to get the share that was added": expected + 1,
                "this is in percent: asked for is a share": 100 * expected,
                "the weights were encoded again with the coarse constants: here their codes stay": again,
                "this is the difference: divide by the error with the exact constants": expected * exact,
                "the other way round: coarse over exact": 1 / (expected + 1) - 1,
                "this is the error of the constants: asked for is that of the weights": nf4lab.mse(absmax, coarse),
            }
            got = feedback.call(f, w, bits, others=feedback.before(OTHERS, "added_error"))
            # 2 %: the rounding of a few constants that lie half-way between two codes, and float32 sums
            compared.close(got, expected, f"added_error with {bits} bits", 0.02, causes)


def check_best_scale(f, w: Tensor, block_size: int, factors: list[float]) -> None:
    """For each block, the multiple of its absmax that has the least squared error."""
    expected, absmax = _best_scale(w, block_size, factors), _absmax(w, block_size)
    got = feedback.call(f, w, block_size, factors, others=feedback.before(OTHERS, "best_scale"))
    scales = torch.stack([absmax * factor for factor in factors])
    errors = torch.stack([block_errors(w, scale, block_size) for scale in scales])
    best, worst = (chosen[None] for chosen in (errors.argmin(dim=0), errors.argmax(dim=0)))
    causes = {
        "these are the factors: multiply each by its block's absmax": torch.tensor(factors)[best[0]],
        "these are positions in the list of factors": best[0],
        "every block kept its absmax: try all factors": absmax,
        "one factor for all blocks: each block has its own best": scales[errors.sum(dim=1).argmin()],
        "these have the largest error": scales.gather(0, worst)[0],
        "this is the least error of each block: asked for is its constant": errors.min(dim=0).values,
    }
    if isinstance(got, Tensor) and got.shape == expected.shape and got.isfinite().all():
        equal = block_errors(w, got.float(), block_size) <= block_errors(w, expected, block_size) * (1 + 1e-4)
        expected = got.to(expected.dtype).where(equal, expected)  # another constant of the same error is as good
    feedback.close(got, expected, "best_scale", FLOAT32, causes)


def default_error(w: Tensor) -> float:
    """The squared error of the default: blocks of 64, constants in 8 bits by the dynamic map."""
    return _default_error(w.numpy().tobytes(), w.shape)


@functools.cache
def _default_error(data: bytes, shape: tuple) -> float:
    w = torch.frombuffer(bytearray(data), dtype=torch.float32).reshape(shape)
    return nf4lab.mse(w, nf4lab.quantize(w, "nf4", 64, double_quant=True).dequantize())


def check_beat(f, share: float, *weights: Tensor) -> None:
    """Below `share` of the default's squared error, with what takes just as many bits."""
    for w in weights:
        scale, codes = _stored(f, w)
        error = block_errors_of(w, codes, scale).sum().item() / w.numel() / default_error(w)
        near_absmax = bool(((scale / _absmax(w, 64) - 1).abs() < 0.02).float().mean() > 0.9)
        nearest = torch.equal(codes, _encode(w, scale, 64))
        causes = ("nearly every block still has its absmax for its constant: choose it by the error",) * near_absmax
        if not nearest and torch.equal(codes, _encode(w, _absmax(w, 64), 64)):
            causes += ("the codes were made with the absmax: encode with the constants that are stored, decoded",)
        message = f"squared error: at most {share:.2f} of the default's, got {error:.4f} of it"
        feedback.that(error <= share, message, *causes)


def check_encoded_as_stored(f, w: Tensor) -> None:
    """The codes are the nearest for the constants that are stored, and not for those before they were quantized."""
    scale, codes = _stored(f, w)
    error, again = (block_errors_of(w, c, scale).sum().item() for c in (codes, _encode(w, scale, 64)))
    # 1 %: far more than ties between two levels are worth; constants that are not stored miss by several percent here
    feedback.that(
        error <= 1.01 * again,
        f"on weights with one giant: encoded anew with the constants that are stored, the squared error would be "
        f"{again / error:.3f} of what it is. Encode with the constants that the decoder has",
    )


def _stored(f, w: Tensor) -> tuple[Tensor, Tensor]:
    """The decoded constants and the codes that beat_the_default stores for w, if they take the default's bits."""
    n_blocks, got = -(-w.numel() // 64), feedback.call(f, w, others=OTHERS)
    got = feedback.pair(got, 4, "beat_the_default: expected codes, constant codes, group absmax and offset")
    parts = (("codes", w.numel()), ("constant codes", n_blocks), ("group absmax", -(-n_blocks // 256)), ("offset", 1))
    stored = []
    for (name, n), part in zip(parts, got, strict=True):
        dtype = torch.uint8 if "codes" in name else torch.float32
        wanted = f"{name}: expected {n} {str(dtype).removeprefix('torch.')}, which is what the default takes"
        part = part if isinstance(part, Tensor) else torch.tensor(feedback.plain(part))
        feedback.that(isinstance(part, Tensor) and part.numel() == n, f"{wanted}; got {feedback.describe(part)}")
        exact = part.to(dtype)
        feedback.that(torch.equal(exact.to(part.dtype), part), f"{wanted}; got {feedback.describe(part)}")
        feedback.same(part, exact, name)
        stored.append(exact.reshape(-1) if n > 1 or name != "offset" else exact.reshape(()))
    feedback.that(int(stored[0].max()) < 16, f"codes: expected 0 to 15, got {stored[0].max()}")
    return _dequantize_constants(*stored[1:], 8, 256), stored[0]


def with_giant(generator: torch.Generator) -> Tensor:
    """Normal weights with one giant among them, so that the other blocks' constants are coarse: float32 (128, 384)."""
    w = torch.randn(128, 384, generator=generator)
    w[torch.randint(128, (1,), generator=generator), 7] = 300.0
    return w


def block_errors_of(w: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """The squared error of each block of 64 with these codes and constants: float64 (n_blocks,)."""
    error = LEVELS[codes.int()] * scale.repeat_interleave(64)[: len(codes)] - w.reshape(-1)
    return groups_of(error.double().square(), 64).sum(dim=1)
