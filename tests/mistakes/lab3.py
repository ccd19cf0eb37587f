"""Wrong answers to lab 3: the function as a student might write it, the points it loses, what the check says."""

QUANTIZE = """\
def quantize_constants(absmax, bits, group_size):
    M = {m}
    offset = {offset}
    centred = absmax - offset
    groups = F.pad({padded}, (0, -len(absmax) % group_size)).reshape(-1, group_size){after}
    group_absmax = groups{largest}
    scaled = (groups / group_absmax[:, None]).nan_to_num(nan=0.0) * M
    codes = {codes}.reshape(-1)[: len(absmax)]
    return codes, group_absmax, offset"""


def quantize(**changes):
    """The right answer with some of its expressions replaced."""
    right = {
        "m": "2 ** (bits - 1) - 1", "offset": "absmax.mean()", "padded": "centred", "after": "",
        "largest": ".abs().amax(dim=1)", "codes": "(scaled.round() + M).to(torch.uint8)",
    }  # fmt: skip
    return QUANTIZE.format(**right | changes)


DEQUANTIZE = """\
def dequantize_constants(codes, group_absmax, offset, bits, group_size):
    M = 2 ** (bits - 1) - 1
    scale = {scale}[: len(codes)]
    return {value}"""
REPEATED = "group_absmax.repeat_interleave(group_size)"
COUNT = """\
def bits_per_weight(n, block_size, bits, group_size):
    n_blocks = -(-n // block_size)
    return 8 * ((n + 1) // 2 + {}) / n"""
ADDED = """\
def added_error(w, bits):
    absmax = block_absmax(w, 64)
    coarse = dequantize_constants(*quantize_constants(absmax, bits, 256), bits, 256)
    codes, flat = encode(w, absmax, 64), w.reshape(-1).double()
    exact = (decode(codes, absmax, 64) - flat).square().mean()
    more = (decode({codes}, coarse, 64) - flat).square().mean()
    return ({value}).item()"""
BEST = """\
def best_scale(w, block_size, factors):
    flat = w.reshape(-1)
    scales, errors = [], []
    for factor in factors:
        scale = block_absmax(w, block_size) * factor
        error = (decode(encode(w, scale, block_size), scale, block_size) - flat).square()
        scales.append(scale)
        errors.append(F.pad(error, (0, -len(flat) % block_size)).reshape(-1, block_size).sum(dim=1))
    {}"""
BEAT = """\
def beat_the_default(w):
    scale = {scale}
    stored = quantize_constants(scale, 8, 256)
    return encode(w, {encode}, 64), *stored"""

MISTAKES = {
    "no offset": (
        quantize(offset="torch.tensor(0.0)"),
        5,
        r"offset: expected 2.5, got 0\nLikely cause: no offset",
    ),
    "an offset for each group": (
        "def quantize_constants(absmax, bits, group_size):\n"
        "    M = 2 ** (bits - 1) - 1\n"
        "    groups = F.pad(absmax, (0, -len(absmax) % group_size)).reshape(-1, group_size)\n"
        "    offset = groups.mean(dim=1)\n"
        "    group_absmax = (groups - offset[:, None]).abs().amax(dim=1)\n"
        "    scaled = (groups - offset[:, None]) / group_absmax[:, None] * M\n"
        "    return (scaled.round() + M).to(torch.uint8).reshape(-1)[: len(absmax)], group_absmax, offset",
        5,
        r"offset: expected shape \(\), got \(3,\)\nLikely cause: one offset for each group",
    ),
    "no magnitude": (
        quantize(largest=".amax(dim=1)"),
        4,  # the groups of equal constants are symmetric
        "group_absmax.*\nLikely cause: the largest value, not the largest magnitude",
    ),
    "filled before centring": (
        quantize(padded="absmax", after=" - offset"),
        4,  # the groups of equal constants are full
        r"group_absmax\[2\]: expected 0.6\d*, got 2.5 .*\nLikely cause: the last group was filled with zeros before",
    ),
    "128 steps on a side": (
        quantize(m="2 ** (bits - 1)"),
        5,
        r"codes.*\nLikely cause: M is 2\*\*\(bits - 1\) - 1",
    ),
    "signed codes": (
        quantize(codes="scaled.round().to(torch.int8)"),
        5,
        r"codes.*; expected dtype uint8, got int8\nLikely cause: the codes are signed: add M",
    ),
    "rounded down": (
        quantize(codes="(scaled.floor() + M).to(torch.uint8)"),
        5,
        "Likely cause: rounded down",
    ),
    "offset forgotten": (
        DEQUANTIZE.format(scale=REPEATED, value="(codes.float() - M) / M * scale"),
        3,
        r"constants\[0\]: expected 2\.\d+, got -0\.\d+ .*\nLikely cause: the offset is not added",
    ),
    "uint8 wraps around": (
        DEQUANTIZE.format(scale=REPEATED, value="(codes - M) / M * scale + offset"),
        3,
        "Likely cause: uint8 has no negative numbers",
    ),
    "groups in turn": (
        DEQUANTIZE.format(scale="group_absmax.repeat(group_size)", value="(codes.float() - M) / M * scale + offset"),
        3,
        "Likely cause: the groups' absmax are in the wrong order",
    ),
    "offset not counted": (
        COUNT.format("(n_blocks * bits + 7) // 8 + 4 * -(-n_blocks // group_size)"),
        3,
        r"bits_per_weight\(147456, 64, 8, 256\): expected 4.127\d+, got 4.126\d+\nLikely cause: the offset",
    ),
    "constants not packed": (
        COUNT.format("n_blocks + 4 * -(-n_blocks // group_size) + 4"),
        3,
        "Likely cause: a constant of 4 bits takes half a byte",
    ),
    "groups rounded down": (
        COUNT.format("(n_blocks * bits + 7) // 8 + 4 * (n_blocks // group_size) + 4"),
        3,
        r"bits_per_weight\(10001.*\nLikely cause: the last group is shorter",
    ),
    "encoded again": (
        ADDED.format(codes="encode(w, coarse, 64)", value="more / exact - 1"),
        2,
        "Likely cause: the weights were encoded again",
    ),
    "the ratio": (
        ADDED.format(codes="codes", value="more / exact"),
        2,
        "added_error with 4 bits: .*\nLikely cause: this is the ratio",
    ),
    "absmax kept": (
        "def best_scale(w, block_size, factors):\n    return block_absmax(w, block_size)",
        3,
        r"best_scale\[\d+\]: expected .*\nLikely cause: every block kept its absmax",
    ),
    "one factor for all": (
        BEST.format("return scales[torch.stack(errors).sum(dim=1).argmin()]"),
        3,
        "Likely cause: one factor for all blocks",
    ),
    "factors returned": (
        BEST.format("return torch.tensor(factors)[torch.stack(errors).argmin(dim=0)]"),
        3,
        "Likely cause: these are the factors",
    ),
    "encoded with what is not stored": (
        BEAT.format(scale="best_scale(w, 64, [0.8, 0.9, 1.0])", encode="block_absmax(w, 64)"),
        4,
        r"squared error: at most 1.00 of the default's, got \d\.\d+ of it\nLikely cause: the codes were made with",
    ),
    "the default once more": (
        BEAT.format(scale="block_absmax(w, 64)", encode="scale"),
        4,
        "Likely cause: nearly every block still has its absmax",
    ),
    "float32 constants": (
        "def beat_the_default(w):\n"
        "    scale = best_scale(w, 64, [0.8, 0.9, 1.0])\n"
        "    return encode(w, scale, 64), scale, scale[:1], scale.mean()",
        4,
        r"constant codes: expected 2304 uint8, .*; got a tensor of shape \(2304,\), float32",
    ),
    "encoded with constants that are not quantized": (
        BEAT.format(scale="best_scale(w, 64, [0.75, 0.8, 0.85, 0.9, 0.95, 1.0])", encode="scale"),
        1,
        "on weights with one giant: encoded anew with the constants that are stored",
    ),
}
