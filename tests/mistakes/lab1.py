"""Wrong answers to lab 1: the function as a student might write it, the points it loses, what the check says."""

MISTAKES = {
    "sixteen symmetric levels": (
        "def symmetric(absmax, bits):\n"
        "    m = 2 ** (bits - 1)\n"
        "    return torch.arange(-m, m, dtype=torch.float32) * (absmax / (m - 1))",
        2,
        r"expected shape \(15,\), got \(16,\)\nLikely cause: one level too many",
    ),
    "step absmax over 8": (
        "def symmetric(absmax, bits):\n"
        "    m = 2 ** (bits - 1) - 1\n"
        "    return torch.arange(-m, m + 1, dtype=torch.float32) * (absmax / (m + 1))",
        2,
        r"\[0\]: expected -7, got -6.125 .*\nLikely cause: divided by m . 1; m is",
    ),
    "sixteen gaps": (
        "def min_max(low, high, n):\n    return low + torch.arange(n, dtype=torch.float32) * (high - low) / n",
        2,
        r"min_max\(-1, 14, 16\)\[1\]: expected 0, got -0.0625 .*\nLikely cause: n gaps: n levels have n - 1 gaps",
    ),
    "ties up": (
        "def nearest(w, levels):\n"
        "    boundaries = (levels[:-1] + levels[1:]) / 2\n"
        "    return (w[:, None] >= boundaries).sum(dim=1).to(torch.uint8)",
        2,
        r"codes\[2\]: expected 0, got 1 \(2 of 9 differ\)\nLikely cause: a tie went the wrong way",
    ),
    "levels instead of codes": (
        "def nearest(w, levels):\n    return levels[(w[:, None] - levels).abs().argmin(dim=1)]",
        4,
        r"codes\[0\]: expected 0, got -1 .*; expected dtype uint8, got float32\nLikely cause: these are the levels",
    ),
    "the level below": (
        "def nearest(w, levels):\n    return (w[:, None] >= levels[1:]).sum(dim=1).to(torch.uint8)",
        4,
        r"codes.*\nLikely cause: the level below was taken",
    ),
    "codes as int64": (
        "def nearest(w, levels):\n    return (w[:, None] - levels).abs().argmin(dim=1)",
        1,  # the values are right: only the check that students see insists
        "codes: the values are right; expected dtype uint8, got int64",
    ),
    "infinite quantiles": (
        "def equal_shares(n):\n    return torch.from_numpy(norm.ppf(np.linspace(0, 1, n))).float()",
        2,
        r"equal_shares\(4\)\[0\]: expected -1.15\d+, got -inf .*\nLikely cause: the quantile of 0 or of 1 is infinite",
    ),
    "i + 1 over n + 1": (
        "def equal_shares(n):\n    return torch.from_numpy(norm.ppf((np.arange(n) + 1) / (n + 1))).float()",
        2,
        r"Likely cause: the slices are not equal",
    ),
    "eight below zero": (
        "def normal_float(tail):\n"
        "    positive = norm.ppf(np.linspace(tail, 0.5, 8)[:-1])\n"
        "    negative = -norm.ppf(np.linspace(tail, 0.5, 9)[:-1])\n"
        "    levels = np.concatenate([negative, [0.0], positive[::-1]]) / positive.max()\n"
        "    return torch.from_numpy(levels).float()",
        4,
        r"normal_float\(0.9677083\)\[1\]: expected -0.696\d+, got -0.722\d+ .*\nLikely cause: eight levels below zero",
    ),
    "no zero": (
        "def normal_float(tail):\n"
        "    levels = norm.ppf(np.linspace(1 - tail, tail, 16))\n"
        "    return torch.from_numpy(levels / levels.max()).float()",
        4,
        "Likely cause: there is no zero",
    ),
    "two zeros": (
        "def normal_float(tail):\n"
        "    positive = norm.ppf(np.linspace(tail, 0.5, 9))\n"
        "    negative = -norm.ppf(np.linspace(tail, 0.5, 8))\n"
        "    return torch.from_numpy(np.concatenate([negative, positive[::-1]]) / positive.max()).float()",
        4,
        r"expected shape \(16,\), got \(17,\)\nLikely cause: zero is there twice",
    ),
    "not divided": (
        "def normal_float(tail):\n"
        "    positive = norm.ppf(np.linspace(tail, 0.5, 9)[:-1])\n"
        "    negative = -norm.ppf(np.linspace(tail, 0.5, 8)[:-1])\n"
        "    return torch.from_numpy(np.concatenate([negative, [0.0], positive[::-1]])).float()",
        4,
        "Likely cause: not divided by the largest",
    ),
    "the table pasted": (
        "def nf4(tail=0.9677083):\n    return published",
        3,
        r"`tail` is not used: these are the levels of another tail",
    ),
    "rounded once, at the end": (
        "def nf4(tail=0.9677083):\n    return normal_float(tail)",
        4,
        r"nf4\(0.9677083\)\[\d+\]: expected .*\nLikely cause: all of it is in float64",
    ),
    "NumPy's linspace": (
        "def nf4(tail=0.9677083):\n"
        "    points = lambda n: np.linspace(tail, 0.5, n, dtype=np.float32)[:-1]\n"
        "    quantiles = lambda n: torch.from_numpy(norm.ppf(points(n))).float()\n"
        "    levels = torch.cat([-quantiles(8), torch.zeros(1), quantiles(9).flip(0)])\n"
        "    return levels / levels.max()",
        4,
        "Likely cause: NumPy's float32 `linspace`",
    ),
    "divided before rounding": (
        "def nf4(tail=0.9677083):\n"
        "    quantiles = lambda n: norm.ppf(torch.linspace(tail, 0.5, n)[:-1].double().numpy())\n"
        "    levels = np.concatenate([-quantiles(8), [0.0], quantiles(9)[::-1]])\n"
        "    return torch.from_numpy(levels / levels.max()).float()",
        4,
        "Likely cause: rounded to float32 after the division",
    ),
    "the package's own": (
        "def nf4(tail=0.9677083):\n    import nf4lab\n    return nf4lab.codebooks.nf4(tail)",
        4,
        r"`nf4` calls nf4lab \(`nf4`\)\. Write it yourself",
    ),
    "one absmax for all": (
        "def best_tail(w, tails):\n"
        "    def error(tail):\n"
        "        levels, s = nf4(tail), w / w.abs().max()\n"
        "        return (levels[nearest(s, levels).int()] - s).square().mean().item()\n\n"
        "    return min(tails, key=error)",
        3,
        "Likely cause: one absmax for all of w",
    ),
    "error of the normalised weights": (
        "def best_tail(w, tails):\n"
        "    s = (w.reshape(-1, 64) / w.reshape(-1, 64).abs().amax(dim=1, keepdim=True)).reshape(-1)\n\n"
        "    def error(tail):\n"
        "        levels = nf4(tail)\n"
        "        return (levels[nearest(s, levels).int()] - s).square().mean().item()\n\n"
        "    return min(tails, key=error)",
        3,
        "Likely cause: the error was taken of the normalised weights",
    ),
    "signed maximum": (
        "def best_tail(w, tails):\n"
        "    blocks = w.reshape(-1, 64)\n"
        "    absmax = blocks.amax(dim=1, keepdim=True)\n\n"
        "    def error(tail):\n"
        "        levels, s = nf4(tail), (blocks / absmax).reshape(-1)\n"
        "        w_hat = levels[nearest(s, levels).int()].reshape(-1, 64) * absmax\n"
        "        return (w_hat - blocks).square().mean().item()\n\n"
        "    return min(tails, key=error)",
        3,
        "Likely cause: the largest value of a block was taken",
    ),
    "always the same tail": ("def best_tail(w, tails):\n    return 0.92", 3, "best_tail: expected 0.\\d+, got 0.92$"),
}
