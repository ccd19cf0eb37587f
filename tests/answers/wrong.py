# ruff: noqa
# Wrong answers that no check was written for. A cell each: lab, question, what is wrong | the cause that is true of it.
# %% lab1 q1 bits is the number of levels
def symmetric(absmax, bits):
    m = bits // 2
    return torch.arange(-m, m + 1, dtype=torch.float32) * (absmax / m)


# %% lab1 q1 integers
def symmetric(absmax, bits):
    m = 2 ** (bits - 1) - 1
    return (torch.arange(-m, m + 1) * (absmax / m)).round()


# %% lab1 q1 descending | descending
def min_max(low, high, n):
    return torch.linspace(high, low, n)


# %% lab1 q1 without its ends
def min_max(low, high, n):
    return torch.linspace(low, high, n + 2)[1:-1]


# %% lab1 q1 middles of slices | middle of n cells
def min_max(low, high, n):
    return low + (torch.arange(n, dtype=torch.float32) + 0.5) * (high - low) / n


# %% lab1 q2 the farthest
def nearest(w, levels):
    return (w[:, None] - levels).abs().argmax(dim=1).to(torch.uint8)


# %% lab1 q2 from 1 on | count from 0
def nearest(w, levels):
    return ((w[:, None] - levels).abs().argmin(dim=1) + 1).to(torch.uint8)


# %% lab1 q2 levels taken for even ones | even levels
def nearest(w, levels):
    step = (levels[-1] - levels[0]) / (len(levels) - 1)
    return ((w - levels[0]) / step).round().clamp(0, len(levels) - 1).to(torch.uint8)


# %% lab1 q2 compared without a sign
def nearest(w, levels):
    return (w.abs()[:, None] - levels.abs()).abs().argmin(dim=1).to(torch.uint8)


# %% lab1 q3 the ends of slices
def equal_shares(n):
    return torch.from_numpy(norm.ppf((np.arange(n) + 0.999) / n)).float()


# %% lab1 q3 a uniform distribution
def equal_shares(n):
    return torch.linspace(-2, 2, n)


# %% lab1 q3 the density
def equal_shares(n):
    return torch.from_numpy(norm.pdf((np.arange(n) + 0.5) / n)).float()


# %% lab1 q3 scaled to 1 | divided by the largest
def equal_shares(n):
    q = norm.ppf((np.arange(n) + 0.5) / n)
    return torch.from_numpy(q / q.max()).float()


# %% lab1 q4 both halves of eight
def normal_float(tail):
    up = norm.ppf(np.linspace(tail, 0.5, 9)[:-1])
    down = -norm.ppf(np.linspace(tail, 0.5, 9)[:-1])[1:]
    x = np.concatenate([down, [0.0], up[::-1]])
    return torch.from_numpy(x / x.max()).float()


# %% lab1 q4 divided by the largest quantile of each half
def normal_float(tail):
    up = norm.ppf(np.linspace(tail, 0.5, 9)[:-1])
    down = -norm.ppf(np.linspace(tail, 0.5, 8)[:-1])
    up, down = up / up.max() * 0.99, down / -down.min()
    return torch.from_numpy(np.concatenate([down, [0.0], up[::-1]])).float()


# %% lab1 q4 tail squared
def normal_float(tail):
    up = norm.ppf(np.linspace(tail**2, 0.5, 9)[:-1])
    down = -norm.ppf(np.linspace(tail**2, 0.5, 8)[:-1])
    return torch.from_numpy(np.concatenate([down, [0.0], up[::-1]]) / up.max()).float()


# %% lab1 q5 float16 quantiles
def nf4(tail=0.9677083):
    def quantiles(n):
        return torch.from_numpy(norm.ppf(torch.linspace(tail, 0.5, n)[:-1].numpy())).half().float()

    x = torch.cat([-quantiles(8), torch.zeros(1), quantiles(9).flip(0)])
    return x / x.max()


# %% lab1 q5 rounded to four digits
def nf4(tail=0.9677083):
    def quantiles(n):
        return torch.from_numpy(norm.ppf(torch.linspace(tail, 0.5, n)[:-1].numpy())).float()

    x = torch.cat([-quantiles(8), torch.zeros(1), quantiles(9).flip(0)])
    return (x / x.max() * 1e4).round() / 1e4


# %% lab1 q6 the one in the middle
def best_tail(w, tails):
    return sorted(tails)[len(tails) // 2]


# %% lab1 q6 the index | a position
def best_tail(w, tails):
    b = w.reshape(-1, 64)
    a = b.abs().amax(1)[:, None]
    e = [((nf4(t)[nearest((b / a).reshape(-1), nf4(t)).int()].reshape(-1, 64) * a - b) ** 2).mean() for t in tails]
    return int(torch.stack(e).argmin())


# %% lab2 q1 the mean magnitude
def block_absmax(w, block_size):
    return torch.stack([c.abs().mean() for c in w.flatten().split(block_size)])


# %% lab2 q1 the smallest magnitude
def block_absmax(w, block_size):
    return torch.stack([c.abs().min() for c in w.flatten().split(block_size)])


# %% lab2 q1 block_size blocks
def block_absmax(w, block_size):
    return torch.stack([c.abs().max() for c in w.flatten().chunk(block_size)])


# %% lab2 q2 signed maximum divides | divided by the absmax
def encode(w, block_size):
    parts = w.reshape(-1).split(block_size)
    codes = [torch.bucketize(p / p.max(), boundaries).to(torch.uint8) for p in parts]
    return torch.cat(codes), block_absmax(w, block_size)


# %% lab2 q2 codes clamped below 15
def encode(w, block_size):
    a = block_absmax(w, block_size)
    r = torch.where(a > 0, 1 / a, 0).repeat_interleave(block_size)[: w.numel()]
    return torch.bucketize(w.reshape(-1) * r, boundaries).clamp(0, 14).to(torch.uint8), a


# %% lab2 q2 half precision
def encode(w, block_size):
    a = block_absmax(w, block_size)
    r = torch.where(a > 0, 1 / a, 0).repeat_interleave(block_size)[: w.numel()]
    return torch.bucketize((w.reshape(-1) * r).half().float(), boundaries).to(torch.uint8), a


# %% lab2 q2 the reciprocal is returned
def encode(w, block_size):
    a = block_absmax(w, block_size)
    r = torch.where(a > 0, 1 / a, 0)
    return torch.bucketize(w.reshape(-1) * r.repeat_interleave(block_size)[: w.numel()], boundaries).to(torch.uint8), r


# %% lab2 q3 shifted by three
def pack(codes):
    c = torch.cat([codes, codes.new_tensor([7])])[: len(codes) + len(codes) % 2]
    return c[0::2] << 3 | c[1::2]


# %% lab2 q3 in reverse order
def pack(codes):
    c = torch.cat([codes, codes.new_tensor([7])])[: len(codes) + len(codes) % 2]
    return (c[0::2] << 4 | c[1::2]).flip(0)


# %% lab2 q3 only high nibbles
def unpack(packed, n):
    return (packed >> 4).repeat_interleave(2)[:n]


# %% lab2 q3 modulo 8
def unpack(packed, n):
    return torch.stack([packed >> 4, packed % 8], dim=1).reshape(-1)[:n]


# %% lab2 q4 divided
def decode(packed, absmax, n, block_size):
    return levels[unpack(packed, n).long()] / absmax.repeat_interleave(block_size)[:n]


# %% lab2 q4 added
def decode(packed, absmax, n, block_size):
    return levels[unpack(packed, n).long()] + absmax.repeat_interleave(block_size)[:n]


# %% lab2 q4 even levels
def decode(packed, absmax, n, block_size):
    return torch.linspace(-1, 1, 16)[unpack(packed, n).long()] * absmax.repeat_interleave(block_size)[:n]


# %% lab2 q5 an absmax in float64
def bits_per_weight(n, block_size):
    return (8 * ((n + 1) // 2) + 64 * -(-n // block_size)) / n


# %% lab2 q5 bits of a block
def bits_per_weight(n, block_size):
    return 4 * block_size + 32


# %% lab2 q6 the largest that fits
def best_block_size(w, budget):
    return max(2**k for k in range(4, 13) if bits_per_weight(w.numel(), 2**k) <= budget) * 2


# %% lab2 q6 64 always
def best_block_size(w, budget):
    return 64


# %% lab3 q1 the median | the median
def quantize_constants(absmax, bits, group_size):
    M = 2 ** (bits - 1) - 1
    o = absmax.median()
    d = absmax - o
    g = torch.stack([p.abs().max() for p in d.split(group_size)])
    q = (d / g.repeat_interleave(group_size)[: len(d)]).nan_to_num(nan=0.0)
    return ((q * M).round() + M).to(torch.uint8), g, o


# %% lab3 q1 floor
def quantize_constants(absmax, bits, group_size):
    M = 2 ** (bits - 1) - 1
    o = absmax.mean()
    d = absmax - o
    g = torch.stack([p.abs().max() for p in d.split(group_size)])
    q = (d / g.repeat_interleave(group_size)[: len(d)]).nan_to_num(nan=0.0)
    return ((q * M - 0.25).round() + M).clamp(min=0).to(torch.uint8), g, o


# %% lab3 q1 the minimum for the offset
def quantize_constants(absmax, bits, group_size):
    M = 2 ** (bits - 1) - 1
    o = absmax.min()
    d = absmax - o
    g = torch.stack([p.abs().max() for p in d.split(group_size)])
    q = (d / g.repeat_interleave(group_size)[: len(d)]).nan_to_num(nan=0.0)
    return ((q * M).round() + M).to(torch.uint8), g, o


# %% lab3 q2 the offset taken away
def dequantize_constants(codes, group_absmax, offset, bits, group_size):
    M = 2 ** (bits - 1) - 1
    return (codes.float() - M) / M * group_absmax.repeat_interleave(group_size)[: len(codes)] - offset


# %% lab3 q2 over twice M
def dequantize_constants(codes, group_absmax, offset, bits, group_size):
    M = 2 ** (bits - 1) - 1
    return (codes.float() - M) / (2 * M) * group_absmax.repeat_interleave(group_size)[: len(codes)] + offset


# %% lab3 q3 groups in 16 bits
def bits_per_weight(n, block_size, bits, group_size):
    b = -(-n // block_size)
    return 8 * ((n + 1) // 2 + (b * bits + 7) // 8 + 2 * -(-b // group_size) + 4) / n


# %% lab3 q3 an offset for each group
def bits_per_weight(n, block_size, bits, group_size):
    b = -(-n // block_size)
    return 8 * ((n + 1) // 2 + (b * bits + 7) // 8 + 8 * -(-b // group_size)) / n + 1


# %% lab3 q4 the ratio doubled
def added_error(w, bits):
    a = block_absmax(w, 64)
    c, flat = encode(w, a, 64), w.reshape(-1).double()
    e = [
        (decode(c, s, 64) - flat).square().mean()
        for s in (a, dequantize_constants(*quantize_constants(a, bits, 256), bits, 256))
    ]
    return 2 * (e[1] / e[0] - 1).item()


# %% lab3 q5 one factor for all | one factor for all
def best_scale(w, block_size, factors):
    a = block_absmax(w, block_size)
    e = [(decode(encode(w, a * f, block_size), a * f, block_size) - w.flatten()).square().sum() for f in factors]
    return a * factors[int(torch.stack(e).argmin())]


# %% lab3 q5 the worst | largest error
def best_scale(w, block_size, factors):
    a, flat = block_absmax(w, block_size), w.flatten()
    e = [(decode(encode(w, a * f, block_size), a * f, block_size) - flat) ** 2 for f in factors]
    e = torch.stack([torch.stack([p.sum() for p in one.split(block_size)]) for one in e])
    return a * torch.tensor(factors)[e.argmax(0)]


# %% lab4 q1 a warp of 16
def sectors(first, stride, width):
    return len({(first + stride * t + b) // 32 for t in range(16) for b in range(width)})


# %% lab4 q1 sectors of 64 bytes
def sectors(first, stride, width):
    return len({(first + stride * t + b) // 64 for t in range(32) for b in range(width)})


# %% lab4 q2 bits
def least_bytes(n, block_size):
    return 4 * n + 32 * -(-n // block_size), 16 * n


# %% lab4 q4 warps
def blocks_for(n_bytes, threads):
    return -(-n_bytes // 32)


# %% lab4 q3 levels from behind
def dequantize_byte(i, packed, absmax, levels, out, block_size):
    if i < packed.size:
        byte, scale = packed[i], absmax[2 * i // block_size]
        out[2 * i] = levels[15 - (byte >> 4)] * scale
        if 2 * i + 1 < out.size:
            out[2 * i + 1] = levels[15 - (byte & 15)] * scale


# %% lab4 q5 even elements twice
@cuda.jit
def v1(packed, absmax, levels, out):
    i = cuda.grid(1)
    if i < packed.size:
        byte, scale = packed[i], absmax[2 * i // 64]
        out[2 * i] = levels[byte >> 4] * scale
        if 2 * i + 1 < out.size:
            out[2 * i + 1] = levels[byte >> 4] * (scale + scale)


# %% lab4 q6 levels copied the wrong way round
@cuda.jit
def v2(packed, absmax, levels, out):
    table = cuda.shared.array(16, float32)
    if cuda.threadIdx.x < 16:
        table[15 - cuda.threadIdx.x] = levels[cuda.threadIdx.x]
    cuda.syncthreads()
    i = cuda.grid(1)
    if i < packed.size:
        byte, scale = packed[i], absmax[2 * i // 64]
        out[2 * i] = table[byte >> 4] * scale
        if 2 * i + 1 < out.size:
            out[2 * i + 1] = table[byte & 15] * scale


# %% lab4 q8 the code halved
@cuda.jit(device=True)
def code_of(s, boundaries):
    code = 0
    for b in range(15):
        if s > boundaries[b]:
            code += 1
    return code // 2


# %% lab4 q9 absmax squared
def quantize_block(x, boundaries):
    m = max(abs(v) for v in x)
    r = float32(1) / m if m > 0 else float32(0)
    c = [code_of.py_func(v * r, boundaries) for v in x] + [7] * (len(x) % 2)
    return [a << 4 | b for a, b in zip(c[0::2], c[1::2])], m * m + 1


# %% lab4 q11 pairs exchanged within their row
def place(row, word, width):
    return row * width + (word ^ 2 * (row % 8))


# %% lab4 q11 three words free
def place(row, word, width):
    return row * (width + 3) + word


# %% lab4 q11 within one row only
def place(row, word, width):
    return (word + 4 * row) % width


# %% lab5 q1 the first only
def saved_bytes(f, x):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        f(x)
    return kept[0].nbytes + 1 if kept else 1


# %% lab5 q2 the gradient halved
class FourBitMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, packed, absmax, shape):
        ctx.save_for_backward(packed, absmax)
        ctx.shape = shape
        return x @ decode(packed, absmax, shape, x.dtype).T

    @staticmethod
    def backward(ctx, grad):
        packed, absmax = ctx.saved_tensors
        return grad @ decode(packed, absmax, ctx.shape, grad.dtype) / 2, None, None, None


# %% lab5 q4 dropout in between
class LoRA(nn.Module):
    def __init__(self, base, r, alpha):
        super().__init__()
        self.base, self.scale = base.requires_grad_(False), alpha / r
        self.A = nn.Parameter(torch.randn(r, base.in_features) / base.in_features**0.5)
        self.B = nn.Parameter(torch.zeros(base.out_features, r))

    def forward(self, x):
        return self.base(x) + self.scale * F.dropout(x @ self.A.T, 0.5) @ self.B.T


# %% lab5 q5 the first layer only
def adapt(model, make):
    model.requires_grad_(False)
    for name, module in model.named_modules():
        if type(module) is nn.Linear:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, make(module))
            return


# %% lab5 q6 turned around | frozen comes first
def training_bytes(model):
    trains = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    frozen = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    return 4 * trains, frozen + sum(b.nbytes for b in model.buffers())


# %% lab5 q7 a rate ten times too high
def finetune(model, batches, lr):
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=10 * lr)
    losses = []
    for ids in batches:
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# %% lab6 q1 each feature of the inputs has length 1
def second_moments(x):
    x = x / x.norm(dim=0)
    return x.T @ x


# %% lab6 q2 every row of the layer counts alike
def output_error(w, w_hat, H):
    d = w_hat - w
    return ((d @ H * d).sum(1) / (w @ H * w).sum(1)).mean().item()


# %% lab6 q3 values with the sign lost
def round_column(column, absmax):
    codes = torch.bucketize(column / absmax, boundaries)
    return codes.to(torch.uint8), levels[codes].abs() * absmax


# %% lab1 q1 one bit too few
def symmetric(absmax, bits):
    m = 2 ** (bits - 2) - 1
    return torch.linspace(-absmax, absmax, 2 * m + 1)


def min_max(low, high, n):
    return torch.linspace(low, high, n)


# %% lab1 q2 searchsorted among the levels themselves | level above
def nearest(w, levels):
    return torch.searchsorted(levels, w).clamp(max=len(levels) - 1).to(torch.uint8)


# %% lab1 q3 n quantiles with the ends cut at a thousandth
def equal_shares(n):
    return torch.from_numpy(norm.ppf(np.linspace(0.001, 0.999, n))).float()


# %% lab1 q4 the zero put in after dividing by its own half
def normal_float(tail):
    positive = norm.ppf(np.linspace(0.5, tail, 9)[1:])
    negative = -norm.ppf(np.linspace(0.5, tail, 8)[1:])
    negative = negative / -negative.min() * 0.99
    return torch.from_numpy(np.sort(np.r_[negative, 0.0, positive / positive.max()])).float()


# %% lab1 q5 the logistic distribution
def nf4(tail=0.9677083):
    from scipy.stats import logistic

    def quantiles(n):
        return torch.from_numpy(logistic.ppf(torch.linspace(tail, 0.5, n)[:-1].numpy())).float()

    levels = torch.cat([-quantiles(8), torch.zeros(1), quantiles(9).flip(0)])
    return levels / levels.max()


# %% lab1 q6 the greatest error | largest error
def best_tail(w, tails):
    blocks = w.reshape(-1, 64)
    absmax = blocks.abs().amax(dim=1, keepdim=True)

    def error(tail):
        levels = nf4(tail)
        codes = nearest((blocks / absmax).reshape(-1), levels)
        return ((levels[codes.int()].reshape(-1, 64) * absmax) - blocks).square().mean().item()

    return max(tails, key=error)


# %% lab2 q1 the largest sum of neighbours
def block_absmax(w, block_size):
    flat = w.reshape(-1)
    blocks = F.pad(flat, (0, -len(flat) % block_size)).reshape(-1, block_size)
    return (blocks.amax(1) - blocks.amin(1)) / 2


# %% lab2 q2 absmax of the whole tensor
def encode(w, block_size):
    flat = w.reshape(-1)
    absmax = flat.abs().max().repeat(-(-len(flat) // block_size))
    return torch.bucketize(flat / absmax[0], boundaries).to(torch.uint8), absmax


# %% lab2 q3 the odd code repeats the last
def pack(codes):
    if len(codes) % 2:
        codes = torch.cat([codes, codes[-1:]])
    return codes[0::2] << 4 | codes[1::2]


def unpack(packed, n):
    return torch.stack([packed >> 4, packed & 15], dim=1).reshape(-1)[:n]


# %% lab2 q4 the short block scaled by the one before
def decode(packed, absmax, n, block_size):
    index = (torch.arange(n) // block_size).clamp(max=max(n // block_size - 1, 0))
    return levels[unpack(packed, n).int()] * absmax[index]


# %% lab2 q5 absmax in float16 | 32 bits, not 16
def bits_per_weight(n, block_size):
    return 8 * ((n + 1) // 2 + 2 * -(-n // block_size)) / n


# %% lab3 q1 codes from one | M \+ 1 was added
def quantize_constants(absmax, bits, group_size):
    m = 2 ** (bits - 1) - 1
    offset = absmax.mean()
    groups = F.pad(absmax - offset, (0, -len(absmax) % group_size)).reshape(-1, group_size)
    largest = groups.abs().amax(dim=1)
    codes = ((groups / largest[:, None]).nan_to_num() * m).round() + m + 1
    return codes.clamp(max=255).to(torch.uint8).reshape(-1)[: len(absmax)], largest, offset


# %% lab3 q2 the offset scaled too
def dequantize_constants(codes, group_absmax, offset, bits, group_size):
    m = 2 ** (bits - 1) - 1
    scale = group_absmax.repeat_interleave(group_size)[: len(codes)]
    return ((codes.float() - m) / m + offset) * scale


# %% lab3 q4 of absolute errors
def added_error(w, bits):
    absmax = block_absmax(w, 64)
    coarse = dequantize_constants(*quantize_constants(absmax, bits, 256), bits, 256)
    codes, flat = encode(w, absmax, 64), w.reshape(-1).double()
    exact, more = ((decode(codes, scale, 64) - flat).abs().mean() for scale in (absmax, coarse))
    return (more / exact - 1).item()


# %% lab4 q2 an absmax for every byte
def least_bytes(n, block_size):
    return (n + 1) // 2 + 4 * ((n + 1) // 2), 2 * n


# %% lab4 q3 scaled by the sign of the absmax
def dequantize_byte(i, packed, absmax, levels, out, block_size):
    if i < packed.size:
        scale = absmax[2 * i // block_size] / 2
        out[2 * i] = levels[packed[i] >> 4] * scale
        if 2 * i + 1 < out.size:
            out[2 * i + 1] = levels[packed[i] & 15] * scale


# %% lab4 q8 the nearest boundary
@cuda.jit(device=True)
def code_of(s, boundaries):
    best = 0
    for b in range(15):
        if abs(s - boundaries[b]) < abs(s - boundaries[best]):
            best = b
    return best


# %% lab5 q6 moments forgotten | two moments
def training_bytes(model):
    trains = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    frozen = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    return frozen + sum(b.nbytes for b in model.buffers()), 2 * trains


# %% lab6 q2 root mean square | square root
def output_error(w, w_hat, H):
    d = w_hat - w
    return ((d @ H * d).sum() / (w @ H * w).sum()).sqrt().item()


# %% lab6 q4 the largest of the diagonal
def damped_inverse(H):
    return torch.linalg.inv(H + 0.01 * H.diagonal().max() * torch.eye(len(H), dtype=H.dtype))


# %% lab6 q5 the rounded column changed, and half of the inverse | column j itself
def pass_on(w, P, j, error):
    new = w.clone()
    new[:, j:] -= error[:, None] / P[j, j] * P[j, j:]
    return new, P - P[:, j : j + 1] * P[j] / P[j, j] * 0.5
