"""What the checks of lab 2 (blocks) compare, and the mistakes that they name."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

import nf4lab
from nf4lab.formats.packing import pack, unpack
from nf4lab.labs import feedback
from nf4lab.models import minilm_matrices

LEVELS = nf4lab.codebooks.nf4()
BOUNDARIES = (LEVELS[:-1] + LEVELS[1:]) / 2
SIZES = nf4lab.BLOCK_SIZES
LARGEST = "the largest error of a weight was compared: the mean of the squares counts"
MAGNITUDES = "the mean of the magnitudes was compared, not of the squares"


def blocks_of(w: Tensor, block_size: int) -> Tensor:
    """The blocks of w in row-major order, the last one filled with zeros: float32 (n_blocks, block_size)."""
    flat = w.float().reshape(-1)
    return F.pad(flat, (0, -len(flat) % block_size)).reshape(-1, block_size)


def _encode(w: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Codes and absmax, as the package has them (a test says so); faster than its readable reference."""
    blocks = blocks_of(w, block_size)
    absmax = blocks.abs().amax(dim=1)
    reciprocal = torch.where(absmax > 0, 1 / absmax, 0)
    codes = torch.bucketize(blocks * reciprocal[:, None], BOUNDARIES)
    return codes.to(torch.uint8).reshape(-1)[: w.numel()], absmax


def _decode(packed: Tensor, absmax: Tensor, n: int, block_size: int) -> Tensor:
    scale = F.pad(absmax, (0, 1)).repeat_interleave(block_size)[:n]
    return LEVELS[unpack(packed, n).int()] * scale


def bits(n: int, block_size: int) -> float:
    """Bits a weight, counted in whole bytes and whole blocks."""
    return 8 * ((n + 1) // 2 + 4 * -(-n // block_size)) / n


OTHERS = {  # what later questions may stand on, in the questions' order
    "block_absmax": lambda w, block_size: blocks_of(w, block_size).abs().amax(dim=1),
    "encode": _encode,
    "pack": lambda codes: pack(codes, pad=7),
    "unpack": unpack,
    "decode": _decode,
    "bits_per_weight": bits,
}


def check_absmax(f, w: Tensor, block_size: int) -> None:
    """The largest magnitude of each block."""
    blocks = blocks_of(w, block_size)
    expected = blocks.abs().amax(dim=1)
    got = feedback.call(f, w, block_size, others=feedback.before(OTHERS, "block_absmax"))
    flat = w.float().reshape(-1)
    causes = {
        "this is the largest value, not the largest magnitude": [
            blocks.amax(dim=1), torch.stack([block.max() for block in flat.split(block_size)])
        ],
        "absmax over the wrong axis: one for each position in a block, not for each block": blocks.abs().amax(dim=0),
        "one absmax for each row of the matrix: blocks run on from row to row": _when(w, lambda: w.abs().amax(dim=1)),
        "one absmax for each column of the matrix: blocks run along the rows": _when(w, lambda: w.abs().amax(dim=0)),
        "blocks run down the columns here; they run along the rows, as memory does": (
            blocks_of(w.T, block_size).abs().amax(dim=1) if w.dim() == 2 else None
        ),
        "the last block, shorter than the others, is missing": expected[:-1],
        "one absmax for the whole tensor": [
            w.abs().max(), w.abs().max().reshape(1), w.abs().max().expand(len(expected))
        ],
    }  # fmt: skip
    feedback.same(got, expected, f"block_absmax of {tuple(w.shape)} in blocks of {block_size}", causes)


def _when(w: Tensor, make):
    return make() if w.dim() == 2 else None


def beside_boundaries(n_blocks: int, generator: torch.Generator) -> Tensor:
    """Blocks of 16 with the 15 boundaries times the absmax in them, where the last digit decides: float32."""
    absmax = 1 + 8 * torch.rand(n_blocks, 1, generator=generator)
    return torch.cat([absmax, absmax * BOUNDARIES], dim=1).reshape(-1)


def check_encode(f, w: Tensor, block_size: int) -> None:
    """Codes and absmax, as the package and bitsandbytes have them."""
    expected = _encode(w, block_size)
    got = feedback.call(f, w, block_size, others=feedback.before(OTHERS, "encode"))
    codes, absmax = feedback.pair(got, 2, "encode: expected two tensors, codes and absmax")
    feedback.same(absmax, expected[1], "absmax", {"codes and absmax have changed places": expected[0]})
    feedback.same(codes, expected[0], "codes", _encode_causes(w, *expected, block_size))


def _encode_causes(w: Tensor, codes: Tensor, absmax: Tensor, block_size: int) -> dict:
    blocks, n = blocks_of(w, block_size), w.numel()
    padded = F.pad(codes, (0, blocks.numel() - n), value=7)
    reciprocal = torch.where(absmax > 0, 1 / absmax, 0)[:, None]
    normalized, divided = blocks * reciprocal, (blocks / absmax[:, None]).nan_to_num(nan=0.0)
    whole = blocks / blocks.abs().max()
    lost = [torch.bucketize(normalized, BOUNDARIES).where(absmax[:, None] > 0, torch.tensor(code)) for code in (0, 15)]
    return {
        "divided by the absmax: the format multiplies by its reciprocal, which rounds differently": (
            torch.bucketize(divided, BOUNDARIES).reshape(-1)[:n]
        ),
        "a tie went the wrong way: on a boundary the lower code is taken": (
            torch.bucketize(normalized, BOUNDARIES, right=True).reshape(-1)[:n]
        ),
        "in a block of zeros, 0 times infinity is not a number: its codes are 7, the code of 0": (
            [found.reshape(-1)[:n] for found in lost]
        ),
        "one absmax for the whole tensor: each block has its own": torch.bucketize(whole, BOUNDARIES).reshape(-1)[:n],
        "the weights are not divided by their absmax": torch.bucketize(blocks, BOUNDARIES).reshape(-1)[:n],
        "the codes of the zeros that fill the last block are still there: cut them off": padded,
        "the codes are still in blocks: make them one-dimensional": [
            codes.reshape(w.shape), padded.reshape(blocks.shape)
        ],
    }  # fmt: skip


def check_pack(f, codes: Tensor) -> None:
    """Two codes a byte, the even element high, an odd length filled with 7."""
    even = F.pad(codes, (0, len(codes) % 2), value=7)
    half = even.reshape(2, -1)
    causes = {
        "the nibbles are swapped: the element with the even index goes to the high four bits": (
            even[1::2] << 4 | even[0::2]
        ),
        "the first half was packed with the second: neighbours share a byte": half[0] << 4 | half[1],
        "an odd length is filled with 7, the code of zero, not with 0": pack(codes, pad=0),
        "an odd length lost its last code": pack(codes[: len(codes) // 2 * 2]),
        "one code a byte: nothing is packed yet": codes,
        "added without a shift: the high code moves up by four bits": even[0::2] + even[1::2],
    }
    feedback.same(feedback.call(f, codes, others=feedback.before(OTHERS, "pack")), pack(codes, pad=7), "packed", causes)


def check_unpack(f, packed: Tensor, n: int) -> None:
    """The first n codes of packed bytes."""
    high, low = packed >> 4, packed & 15
    causes = {
        "the nibbles are swapped: the high four bits come first": torch.stack([low, high], dim=1).reshape(-1)[:n],
        "all high nibbles come before all low ones: they alternate": torch.cat([high, low])[:n],
        "one code too many: the last byte may hold only one, cut to n": unpack(packed, 2 * packed.numel()),
        "the high nibble is not shifted down": torch.stack([packed & 240, low], dim=1).reshape(-1)[:n],
    }
    feedback.same(
        feedback.call(f, packed, n, others=feedback.before(OTHERS, "pack")), unpack(packed, n), "codes", causes
    )


def check_decode(f, w: Tensor, block_size: int) -> None:
    """The weights that packed codes and absmax stand for."""
    codes, absmax = _encode(w, block_size)
    n, values, packed = w.numel(), LEVELS[codes.int()], pack(codes, pad=7)
    swapped = torch.stack([packed & 15, packed >> 4], dim=1).reshape(-1)[:n]
    scale = absmax.repeat_interleave(block_size)[:n]
    tiled = absmax.repeat(block_size)[:n]
    causes = {
        "the nibbles are swapped": LEVELS[swapped.int()] * scale,
        "the absmax are in the wrong order: repeat each for its block (`repeat_interleave`), not all in turn": (
            values * tiled
        ),
        "not multiplied by the absmax": values,
        "these are the codes: look the levels up": codes,
        "the absmax of the block before or after was taken": [
            values * scale.roll(k) for k in (block_size, -block_size)
        ],
    }
    got = feedback.call(f, packed, absmax, n, block_size, others=feedback.before(OTHERS, "decode"))
    feedback.same(got, values * scale, "weights", causes)


def check_bits(f, *cases: tuple[int, int]) -> None:
    """Bits a weight, exactly. cases: (n, block_size)."""
    with feedback.Cases() as compared:
        for n, block_size in cases:
            n_blocks = -(-n // block_size)
            causes = {
                "the last block is shorter, but its absmax takes 4 bytes like any other: round up": (
                    8 * ((n + 1) // 2 + 4 * (n // block_size)) / n
                ),
                "an odd number of codes takes a whole byte more": 8 * (n // 2 + 4 * n_blocks) / n,
                "bytes are whole: an odd number of codes fills half of its last one": (4 * n + 32 * n_blocks) / n,
                "4 + 32/block size is right only where the blocks come out even": 4 + 32 / block_size,
                "an absmax is a float32: 32 bits, not 16": 8 * ((n + 1) // 2 + 2 * n_blocks) / n,
                "these are bytes: a byte has 8 bits": bits(n, block_size) / 8,
                "this is the total: divide by the number of weights": bits(n, block_size) * n,
                "the constants are not counted": [4.0, 8 * ((n + 1) // 2) / n],
                "two codes share a byte": 8 * (n + 4 * n_blocks) / n,
            }
            got = feedback.call(f, n, block_size, others=feedback.before(OTHERS, "bits_per_weight"))
            # 1e-9: far below what one bit more or less in all of a tensor would change, far above float64's rounding
            compared.close(got, bits(n, block_size), f"bits_per_weight({n}, {block_size})", 1e-9, causes)


def pick(generator: torch.Generator) -> Tensor:
    """A matrix of the encoder of all-MiniLM-L6-v2 (384 by 384), and a piece of it whose blocks don't come out even."""
    names = [name for name, m in minilm_matrices().items() if name.startswith("encoder") and m.numel() == 384 * 384]
    w = minilm_matrices()[names[torch.randint(len(names), (1,), generator=generator).item()]]
    rows = torch.randint(200, 380, (1,), generator=generator).item()
    return w[:rows, : rows - 7].contiguous()


def even_in_blocks_of(block_size: int, generator: torch.Generator) -> Tensor:
    """Weights that this block size stores without error, and smaller ones do not: float32 (64 * block_size,)."""
    codes = torch.randint(1, 15, (64, block_size), generator=generator)
    codes[:, 0] = 15
    absmax = 2.0 ** torch.randint(-3, 4, (64, 1), generator=generator)
    return (LEVELS[codes] * absmax).reshape(-1)


@functools.cache
def three_kinds(seed: int, budget: float = 4.75) -> Tensor:
    """Weights whose block size of least squared error is not that of least largest, or mean, error: float32 (n,).

    Most are small and would have blocks of 64, some are large and would have 128, and a few are larger and would have
    256. Drawn until the squares, the magnitudes and the largest error disagree.
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        kinds = ((64, 1 / 8, 64), (128, 1, 2), (256, 1.6, 1))
        parts = [even_in_blocks_of(B, generator).reshape(-1, B)[:n] * scale for B, scale, n in kinds]
        w = torch.cat([part.reshape(-1) for part in parts])
        best, wrong = _best_sizes(w, budget)
        if best not in (wrong[LARGEST], wrong[MAGNITUDES]):
            return w


def check_best_block_size(f, *cases: tuple[Tensor, float]) -> None:
    """The block size of least error that the budget allows. cases: (w, budget)."""
    with feedback.Cases(of_few=True) as compared:
        for w, budget in cases:
            expected, wrong = _best_sizes(w, budget)
            got = feedback.call(f, w, budget, others=OTHERS)
            compared.same(got, expected, f"best_block_size within {budget:.6f} bits", wrong)


def _off(w: Tensor, block_size: int) -> Tensor:
    """The error of each weight in blocks of this size: float32 (n,)."""
    codes, absmax = _encode(w, block_size)
    return LEVELS[codes.int()] * absmax.repeat_interleave(block_size)[: w.numel()] - w.reshape(-1)


def _best_sizes(w: Tensor, budget: float) -> tuple[int, dict[str, int | float]]:
    """The best block size, and what the likely mistakes take for it; found once for every submission."""
    return _best_sizes_of(w.numpy().tobytes(), budget)


@functools.lru_cache(64)
def _best_sizes_of(w: bytes, budget: float) -> tuple[int, dict[str, int | float]]:
    w = torch.frombuffer(bytearray(w), dtype=torch.float32)
    n = w.numel()
    off = {B: _off(w, B).double() for B in SIZES}
    error = {B: off[B].square().mean().item() for B in SIZES}
    fits = [B for B in SIZES if bits(n, B) <= budget]
    strictly = [B for B in fits if bits(n, B) < budget] or fits
    by_formula = [B for B in SIZES if budget >= 4 + 32 / B]
    best = min(fits, key=error.get)
    return best, {
        "this block size takes more bits than the budget": min(SIZES, key=error.get),
        "a block size that takes just the budget is allowed": min(strictly, key=error.get),
        "count the bits as they are: 4 + 32/block size is right only where the blocks come out even": (
            min(by_formula, key=error.get)
        ),
        "the smallest that fits need not have the least error: measure": min(fits),
        LARGEST: (
            min(fits, key=lambda B: off[B].abs().max().item())
        ),
        MAGNITUDES: min(fits, key=lambda B: off[B].abs().mean().item()),
        "this is the block size with the largest error": max(fits, key=error.get),
        "this is the least error: asked for is the block size": error[best],
    }  # fmt: skip
