"""Wrong answers to lab 6: the function as a student might write it, the points it loses, what the check says."""

ERROR = "def output_error(w, w_hat, H):\n    d = w_hat - w\n    return {}"
COLUMN = """\
def round_column(column, absmax):
    codes = torch.bucketize({}, boundaries)
    return {}"""
INVERSE = "def damped_inverse(H):\n    eye = torch.eye(len(H), dtype=H.dtype)\n    return {}"
STEP = """\
def pass_on(w, P, j, error):
    new = w.clone()
    {}
    return new, {}"""
RIGHT_W = "new[:, j + 1 :] -= error[:, None] / P[j, j] * P[j, j + 1 :]"
RIGHT_P = "P - P[:, j : j + 1] * P[j] / P[j, j]"
LOOP = """\
def correct(w, H, block_size):
    P, original = damped_inverse(H), w
    codes, absmax = torch.empty(w.shape, dtype=torch.uint8), []
    for j in range(w.shape[1]):
        if j % block_size == 0:
            absmax.append({}[:, j : j + block_size].abs().amax(dim=1))
        codes[:, j], values = round_column(w[:, j], absmax[-1])
        {}
    return codes, {}"""
NEXT = "w, P = pass_on(w, P, j, w[:, j] - values)"
STACKED = "torch.stack(absmax, dim=1)"

MISTAKES = {
    "a sum": ("def second_moments(x):\n    return x.T @ x", 2, "Likely cause: that is the sum over the inputs"),
    "over features": (
        "def second_moments(x):\n    return x.T @ x / x.shape[1]", 2, "Likely cause: divided by the number of features"
    ),
    "pairs of inputs": (
        "def second_moments(x):\n    return x @ x.T / len(x)", 2, r"shape .*\nLikely cause: that is x x\^T"
    ),
    "covariance": ("def second_moments(x):\n    return torch.cov(x.T)", 2, "Likely cause: that is a covariance"),
    "error of weights": (
        ERROR.format("(d.square().sum() / w.square().sum()).item()"), 3, "that is the error of the weights"
    ),
    "absolute error": (ERROR.format("(d @ H * d).sum().item()"), 3, "Likely cause: not set in relation"),
    "diagonal only": (
        ERROR.format("((d.square() @ H.diagonal()).sum() / (w.square() @ H.diagonal()).sum()).item()"),
        3,
        "Likely cause: only the diagonal of H",
    ),
    "root": (ERROR.format("((d @ H * d).sum() / (w @ H * w).sum()).sqrt().item()"), 3, "Likely cause: a square root"),
    "other denominator": (
        ERROR.format("((d @ H * d).sum() / (w_hat @ H * w_hat).sum()).item()"), 3, "Likely cause: the outputs of w_hat"
    ),
    "not normalised": (
        COLUMN.format("column", "codes.to(torch.uint8), levels[codes] * absmax"),
        3,
        "Likely cause: the column is not divided by absmax",
    ),
    "one absmax": (
        COLUMN.format("column / column.abs().max()", "codes.to(torch.uint8), levels[codes] * absmax"),
        3,
        "Likely cause: divided by the column's own largest",
    ),
    "not scaled back": (
        COLUMN.format("column / absmax", "codes.to(torch.uint8), levels[codes]"),
        3,
        "Likely cause: not multiplied by absmax",
    ),
    "what was lost": (
        COLUMN.format("column / absmax", "codes.to(torch.uint8), column - levels[codes] * absmax"),
        3,
        "Likely cause: that is what rounding took away",
    ),
    "changed places": (
        COLUMN.format("column / absmax", "levels[codes] * absmax, codes.to(torch.uint8)"),
        3,
        "Likely cause: codes and values have changed places",
    ),
    "a fixed share": (
        INVERSE.format("torch.linalg.inv(H + 0.01 * eye)"), 2, "Likely cause: 0.01 itself was added"
    ),
    "not inverted": (
        INVERSE.format("H + 0.01 * H.diagonal().mean() * eye"), 2, "Likely cause: that is the damped H, not its inverse"
    ),
    "damped one by one": (
        INVERSE.format("torch.linalg.inv(H + 0.01 * H.diagonal().diag())"), 2, "Likely cause: each diagonal element"
    ),
    "wrong sign": (STEP.format(RIGHT_W.replace("-=", "+="), RIGHT_P), 4, "Likely cause: the sign is the other one"),
    "not divided": (
        STEP.format(RIGHT_W.replace(" / P[j, j]", ""), RIGHT_P), 4, r"Likely cause: not divided by P\[j, j\]"
    ),
    "the column too": (
        STEP.format("new[:, j:] -= error[:, None] / P[j, j] * P[j, j:]", RIGHT_P), 4, "Likely cause: column j itself"
    ),
    "P as it was": (STEP.format(RIGHT_W, "P"), 4, "Likely cause: P is as it was"),
    "P not divided": (
        STEP.format(RIGHT_W, "P - P[:, j : j + 1] * P[j]"), 4, r"P after .*\nLikely cause: not divided by P\[j, j\]"
    ),
    "P set to zero": (
        STEP.format(RIGHT_W + "\n    P = P.clone()\n    P[j], P[:, j] = 0, 0", "P"), 4, "Likely cause: row and column j"
    ),
    "nothing passed on": (LOOP.format("w", "pass", STACKED), 6, "Likely cause: these are the codes of rounding"),
    "absmax too early": (LOOP.format("original", NEXT, STACKED), 6, "Likely cause: every absmax was taken before"),
    "P not kept": (
        LOOP.format("w", NEXT.replace("w, P =", "w, _ ="), STACKED), 6, "Likely cause: P stays the same"
    ),
    "errors turned round": (
        LOOP.format("w", NEXT.replace("w[:, j] - values", "values - w[:, j]"), STACKED),
        6,
        "Likely cause: errors have the wrong sign",
    ),
    "absmax by block": (
        LOOP.format("w", NEXT, "torch.stack(absmax)"), 6, r"absmax should have shape \(12, 2\).* got .*"
    ),
}  # fmt: skip
