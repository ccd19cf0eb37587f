"""Wrong answers to lab 2: the function as a student might write it, the points it loses, what the check says."""

BLOCKS = """\
    flat = w.reshape(-1)
    blocks = F.pad(flat, (0, -len(flat) % block_size)).reshape(-1, block_size)
"""
ENCODE = f"""\
def encode(w, block_size):
{BLOCKS}    absmax = block_absmax(w, block_size)
    s = {{s}}
    codes = torch.bucketize(s, boundaries{{right}})
    return codes.reshape(-1)[: len(flat)].to(torch.uint8), absmax"""
GUARDED = "blocks * torch.where(absmax > 0, 1 / absmax, 0)[:, None]"
BEST = """\
def best_block_size(w, budget):
    def error(B):
        codes, absmax = encode(w, B)
        w_hat = decode(pack(codes), absmax, w.numel(), B)
        return (w_hat - w.reshape(-1)).double().square().mean().item()

    sizes = [2**k for k in range(4, 13)]
    return {}"""

MISTAKES = {
    "no magnitude": (
        f"def block_absmax(w, block_size):\n{BLOCKS}    return blocks.amax(dim=1)",
        3,
        r"of \(3, 40\) in blocks of 64\[0\]: expected 100, got -37 .*\nLikely cause: this is the largest v",
    ),
    "wrong axis": (
        f"def block_absmax(w, block_size):\n{BLOCKS}    return blocks.abs().amax(dim=0)",
        3,
        r"expected shape \(2,\), got \(64,\)\nLikely cause: absmax over the wrong axis",
    ),
    "one a row": (
        "def block_absmax(w, block_size):\n    return w.abs().amax(dim=-1)",
        3,
        "Likely cause: one absmax for each row",
    ),
    "last block lost": (
        "def block_absmax(w, block_size):\n"
        "    n = w.numel() // block_size * block_size\n"
        "    return w.reshape(-1)[:n].reshape(-1, block_size).abs().amax(dim=1)",
        3,
        r"expected shape \(2,\), got \(1,\)\nLikely cause: the last block, shorter than the others, is missing",
    ),
    "divided": (
        ENCODE.format(s="(blocks / absmax[:, None]).nan_to_num(nan=0.0)", right=""),
        1,
        r"codes\[\d+\]: expected \d+, got \d+ .*\nLikely cause: divided by the absmax",
    ),
    "ties up": (
        ENCODE.format(s=GUARDED, right=", right=True"),
        1,
        "Likely cause: a tie went the wrong way",
    ),
    "zero block forgotten": (
        "def encode(w, block_size):\n"
        f"{BLOCKS}    absmax = block_absmax(w, block_size)\n"
        "    s = blocks * (1 / absmax)[:, None]\n"
        "    codes = (s[:, :, None] > boundaries).sum(dim=2)\n"
        "    return codes.reshape(-1)[: len(flat)].to(torch.uint8), absmax",
        2,
        r"codes\[0\]: expected 7, got 0 .*\nLikely cause: in a block of zeros, 0 times infinity",
    ),
    "filling not cut": (
        ENCODE.format(s=GUARDED, right="").replace("[: len(flat)]", ""),
        4,  # one of its checks has blocks that come out even
        "Likely cause: the codes of the zeros that fill the last block are still there",
    ),
    "nibbles swapped": (
        "def pack(codes):\n"
        "    pairs = F.pad(codes, (0, len(codes) % 2), value=7).reshape(-1, 2)\n"
        "    return pairs[:, 1] << 4 | pairs[:, 0]",
        3,
        r"packed\[0\]: expected 195, got 60 .*\nLikely cause: the nibbles are swapped",
    ),
    "halves packed": (
        "def pack(codes):\n    a, b = F.pad(codes, (0, len(codes) % 2), value=7).reshape(2, -1)\n    return a << 4 | b",
        3,
        "Likely cause: the first half was packed with the second",
    ),
    "filled with 0": (
        "def pack(codes):\n"
        "    pairs = F.pad(codes, (0, len(codes) % 2)).reshape(-1, 2)\n"
        "    return pairs[:, 0] << 4 | pairs[:, 1]",
        3,
        r"packed\[1\]: expected 167, got 160 .*\nLikely cause: an odd length is filled with 7",
    ),
    "unpacked high, then low": (
        "def unpack(packed, n):\n    return torch.cat([packed >> 4, packed & 15])[:n]",
        2,
        "Likely cause: all high nibbles come before all low ones",
    ),
    "absmax in turn": (
        "def decode(packed, absmax, n, block_size):\n"
        "    return levels[unpack(packed, n).int()] * absmax.repeat(block_size)[:n]",
        3,
        "Likely cause: the absmax are in the wrong order",
    ),
    "bits by the formula": (
        "def bits_per_weight(n, block_size):\n    return 4 + 32 / block_size",
        2,
        r"bits_per_weight\(101, 64\): expected 4.67\d+, got 4.5\nLikely cause: 4 \+ 32/block size",
    ),
    "blocks rounded down": (
        "def bits_per_weight(n, block_size):\n    return 8 * ((n + 1) // 2 + 4 * (n // block_size)) / n",
        2,
        "Likely cause: the last block is shorter, but its absmax takes 4 bytes",
    ),
    "budget not to be reached": (
        BEST.format("min((B for B in sizes if bits_per_weight(w.numel(), B) < budget), key=error)"),
        2,
        r"within 4.250000 bits: expected 128, got 256\nLikely cause: a block size that takes just the budget",
    ),
    "the smallest that fits": (
        BEST.format("min(B for B in sizes if bits_per_weight(w.numel(), B) <= budget)"),
        1,
        "expected 128, got 64\nLikely cause: the smallest that fits need not",
    ),
    "the largest error": (
        BEST.format("max((B for B in sizes if bits_per_weight(w.numel(), B) <= budget), key=error)"),
        3,
        "Likely cause: this is the block size with the largest error",
    ),
    "the largest error of a weight": (
        BEST.replace(".square().mean()", ".abs().max()").format(
            "min((B for B in sizes if bits_per_weight(w.numel(), B) <= budget), key=error)"
        ),
        2,
        "best_block_size within .*: expected 128, got 256",
    ),
}
