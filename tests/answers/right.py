# ruff: noqa
# Right answers as somebody else would write them. A cell each: lab, question, what is unusual about it.
# %% lab1 q1 linspace
def symmetric(absmax, bits):
    m = 2 ** (bits - 1) - 1
    return torch.tensor([k / m * absmax for k in range(-m, m + 1)], dtype=torch.float64).float()


# %% lab1 q1 a NumPy array is made, and turned into a tensor
def symmetric(absmax, bits):
    m = (1 << bits - 1) - 1
    return torch.from_numpy(np.arange(-m, m + 1) * absmax / m).float()


# %% lab1 q1 other names of parameters
def min_max(lowest, highest, count):
    return torch.stack(
        [torch.tensor(lowest + i * (highest - lowest) / (count - 1), dtype=torch.float32) for i in range(count)]
    )


# %% lab1 q2 argmin of distances
def nearest(w, levels):
    return (w[:, None] - levels).abs().argmin(dim=1).to(torch.uint8)


# %% lab1 q2 searchsorted
def nearest(w, levels):
    return torch.searchsorted((levels[1:] + levels[:-1]) / 2, w.contiguous()).byte()


# %% lab1 q2 a loop with bisect
def nearest(w, levels):
    from bisect import bisect_left

    b = ((levels[1:] + levels[:-1]) / 2).tolist()
    return torch.tensor([bisect_left(b, x) for x in w.tolist()], dtype=torch.uint8)


# %% lab1 q2 digitize
def nearest(w, levels):
    b = ((levels[1:] + levels[:-1]) / 2).numpy()
    return torch.from_numpy(np.digitize(w.numpy(), b, right=True)).to(torch.uint8)


# %% lab1 q3 the standard library's normal distribution
def equal_shares(n):
    from statistics import NormalDist

    return torch.tensor([NormalDist().inv_cdf((2 * i + 1) / (2 * n)) for i in range(n)])


# %% lab1 q3 erfinv in float64
def equal_shares(n):
    p = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    return (2**0.5 * torch.erfinv(2 * p - 1)).float()


# %% lab1 q3 ndtri
def equal_shares(n):
    p = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    return torch.special.ndtri(p).to(torch.float32)


# %% lab1 q4 sorted, and normalised before it is joined
def normal_float(tail):
    up = norm.isf(1 - np.linspace(tail, 0.5, 9))
    down = norm.ppf(1 - np.linspace(tail, 0.5, 8))[:-1]
    return torch.tensor(
        sorted(set((np.concatenate([up, down]) / up[0]).round(15).tolist() + [0.0]) - {-0.0} | {0.0})
    ).float()


# %% lab1 q5 list comprehensions
def nf4(tail=0.9677083):
    def half(n):
        return [torch.tensor(norm.ppf(p.item()), dtype=torch.float32) for p in torch.linspace(tail, 0.5, n)[:-1]]

    a = torch.stack(sorted([-x for x in half(8)] + [torch.tensor(0.0)] + half(9)))
    return a / a.max()


# %% lab1 q5 another name of the parameter
def nf4(offset=0.9677083):
    def v(n):
        return torch.tensor(norm.ppf(torch.linspace(offset, 0.5, n)[:-1].double().numpy().astype(np.float32)).tolist())

    x = torch.cat((v(9), torch.zeros(1), -v(8))).sort().values
    return x.div(x.max())


# %% lab1 q6 a loop that keeps the best
def best_tail(w, tails):
    best, least = None, float("inf")
    m = w.view(-1, 64).abs().max(1, keepdim=True).values
    for tail in tails:
        L = nf4(tail)
        c = nearest((w.view(-1, 64) / m).flatten(), L).long()
        e = float(((L[c].view(-1, 64) * m - w.view(-1, 64)) ** 2).sum())
        if e < least:
            best, least = tail, e
    return best


# %% lab1 q6 returned as a tensor of no dimension
def best_tail(w, tails):
    b = w.reshape(-1, 64)
    a = b.abs().amax(1)[:, None]
    e = torch.stack(
        [((nf4(t)[nearest((b / a).reshape(-1), nf4(t)).int()].reshape(-1, 64) * a - b) ** 2).mean() for t in tails]
    )
    return torch.tensor(tails, dtype=torch.float64)[e.argmin()]


# %% lab2 q1 split into chunks
def block_absmax(w, block_size):
    return torch.stack([c.abs().max() for c in w.flatten().split(block_size)])


# %% lab2 q1 the larger of maximum and minus the minimum
def block_absmax(t, size):
    return torch.tensor([max(c.max(), -c.min()) for c in t.reshape(-1).split(size)])


# %% lab2 q1 reduceat of NumPy
def block_absmax(w, block_size):
    flat = np.abs(w.numpy().ravel())
    return torch.from_numpy(np.maximum.reduceat(flat, np.arange(0, flat.size, block_size)))


# %% lab2 q2 a list for the tuple
def encode(w, block_size):
    m = block_absmax(w, block_size)
    r = torch.where(m == 0, torch.zeros_like(m), m.reciprocal()).repeat_interleave(block_size)[: w.numel()]
    return [torch.searchsorted(boundaries, w.flatten() * r).to(torch.uint8), m]


# %% lab2 q2 boundaries counted
def encode(w, block_size):
    m = block_absmax(w, block_size)
    inverse = torch.nan_to_num(1 / m, posinf=0.0)
    index = torch.arange(w.numel()) // block_size
    return ((w.reshape(-1) * inverse[index])[:, None] > boundaries).sum(1).byte(), m


# %% lab2 q2 block by block
def encode(w, block_size):
    codes, maxima = [], []
    for block in w.reshape(-1).split(block_size):
        m = block.abs().max()
        s = block * (1 / m) if m > 0 else block
        codes.append(torch.bucketize(s, boundaries).to(torch.uint8))
        maxima.append(m)
    return torch.cat(codes), torch.stack(maxima)


# %% lab2 q3 changes its argument
def pack(codes):
    codes[::2] *= 16
    if len(codes) % 2:
        codes = torch.cat([codes, codes.new_tensor([7])])
    return codes[::2] + codes[1::2]


# %% lab2 q3 a loop over pairs
def pack(codes):
    c = codes.tolist() + [7] * (len(codes) % 2)
    return torch.tensor([16 * c[i] + c[i + 1] for i in range(0, len(c), 2)], dtype=torch.uint8)


# %% lab2 q3 slices are filled
def unpack(packed, n):
    codes = torch.empty(2 * len(packed), dtype=torch.uint8)
    codes[0::2], codes[1::2] = packed // 16, packed % 16
    return codes[:n]


# %% lab2 q3 by NumPy
def unpack(packed, n):
    b = packed.numpy()
    return torch.from_numpy(np.column_stack((b >> 4, b & 0xF)).ravel()[:n].copy())


# %% lab2 q4 the absmax by index
def decode(packed, absmax, n, block_size):
    return torch.take(levels, unpack(packed, n).long()) * absmax[torch.arange(n) // block_size]


# %% lab2 q4 block by block
def decode(packed, absmax, n, block_size):
    parts = unpack(packed, n).long().split(block_size)
    return torch.cat([levels[p] * a for p, a in zip(parts, absmax)])


# %% lab2 q5 ceil
def bits_per_weight(n, block_size):
    import math

    return (math.ceil(n / 2) * 8 + math.ceil(n / block_size) * 32) / n


# %% lab2 q5 a NumPy number
def bits_per_weight(n, block_size):
    return np.float64(8 * (n // 2 + n % 2) + 32 * ((n + block_size - 1) // block_size)) / n


# %% lab2 q6 returned as a NumPy integer
def best_block_size(w, budget):
    sizes = [s for s in 2 ** np.arange(4, 13) if bits_per_weight(w.numel(), int(s)) <= budget]
    off = []
    for s in sizes:
        c, a = encode(w, int(s))
        off.append(((decode(pack(c), a, w.numel(), int(s)) - w.flatten()).double() ** 2).sum())
    return sizes[int(torch.stack(off).argmin())]


# %% lab3 q1 repeat_interleave
def quantize_constants(absmax, bits, group_size):
    M = 2 ** (bits - 1) - 1
    o = absmax.mean()
    d = absmax - o
    g = torch.stack([p.abs().max() for p in d.split(group_size)])
    s = g.repeat_interleave(group_size)[: len(d)]
    q = torch.where(s > 0, d / s, torch.zeros_like(d))
    return (torch.round(q * M) + M).to(torch.uint8), g, o


# %% lab3 q1 a list is returned
def quantize_constants(absmax, bits, group_size):
    M = (1 << (bits - 1)) - 1
    mean = absmax.mean()
    codes, top = [], []
    for part in (absmax - mean).split(group_size):
        m = part.abs().amax()
        top.append(m)
        codes.append(((part / m if m > 0 else part) * M).round() + M)
    return [torch.cat(codes).byte(), torch.stack(top), mean]


# %% lab3 q2 by index
def dequantize_constants(codes, group_absmax, offset, bits, group_size):
    M = 2 ** (bits - 1) - 1
    g = group_absmax[torch.arange(codes.numel()) // group_size]
    return (codes.to(torch.float32) - M) / M * g + offset


# %% lab3 q2 group by group
def dequantize_constants(c, g, o, bits, size):
    M = 2 ** (bits - 1) - 1
    return torch.cat([(part.float() - M) / M * top + o for part, top in zip(c.split(size), g)])


# %% lab3 q3 divmod
def bits_per_weight(n, block_size, bits, group_size):
    up = lambda a, b: sum(x > 0 for x in [a % b]) + a // b
    blocks = up(n, block_size)
    return (up(n, 2) + up(blocks * bits, 8) + 4 * up(blocks, group_size) + 4) * 8 / n


# %% lab3 q3 fractions
def bits_per_weight(n, block_size, bits, group_size):
    from fractions import Fraction
    from math import ceil

    blocks = ceil(Fraction(n, block_size))
    return float(
        Fraction(
            8 * (ceil(Fraction(n, 2)) + ceil(Fraction(blocks * bits, 8)) + 4 * ceil(Fraction(blocks, group_size)) + 4),
            n,
        )
    )


# %% lab3 q4 NumPy's mean
def added_error(w, bits):
    a = block_absmax(w, 64)
    rough = dequantize_constants(*quantize_constants(a, bits, 256), bits, 256)
    c, flat = encode(w, a, 64), w.reshape(-1).double()
    e = [np.mean((decode(c, s, 64) - flat).numpy() ** 2) for s in (a, rough)]
    return e[1] / e[0] - 1


# %% lab3 q4 sums, and a tensor is returned
def added_error(w, bits):
    a = block_absmax(w, 64)
    c = encode(w, a, 64)
    e = lambda s: (decode(c, s, 64) - w.flatten().double()).pow(2).sum()
    return (e(dequantize_constants(*quantize_constants(a, bits, 256), bits, 256)) - e(a)) / e(a)


# %% lab3 q5 where it is better
def best_scale(w, block_size, factors):
    absmax = block_absmax(w, block_size)
    best, least = None, None
    for f in factors:
        s = absmax * f
        e = (decode(encode(w, s, block_size), s, block_size) - w.reshape(-1)) ** 2
        e = torch.stack([p.sum() for p in e.split(block_size)])
        if best is None:
            best, least = s, e
        better = e < least
        best, least = torch.where(better, s, best), torch.where(better, e, least)
    return best


# %% lab4 q1 integers only
def sectors(first, stride, width):
    touched = set()
    for t in range(32):
        begin = first + t * stride
        touched.update(range(begin // 32, (begin + width - 1) // 32 + 1))
    return len(touched)


# %% lab4 q1 NumPy's unique
def sectors(a, b, c):
    return np.unique((a + b * np.arange(32)[:, None] + np.arange(c)) // 32).size


# %% lab4 q2 a list of two
def least_bytes(n, block_size):
    return [-(-n // 2) + 4 * ((n + block_size - 1) // block_size), n * 2]


# %% lab4 q3 other names, a return
def dequantize_byte(thread, bytes_, constants, table, result, size):
    if thread >= len(bytes_):
        return
    b, s = bytes_[thread], constants[(thread * 2) // size]
    result[thread * 2] = table[b // 16] * s
    if thread * 2 + 1 != len(result):
        if thread * 2 + 1 < len(result):
            result[thread * 2 + 1] = table[b % 16] * s


# %% lab4 q4 divmod
def blocks_for(n_bytes, threads):
    whole, rest = divmod(n_bytes, threads)
    return whole + (rest > 0)


# %% lab4 q4 a tensor of no dimension
def blocks_for(n, t):
    return torch.tensor((n + t - 1) // t)


# %% lab4 q5 cuda.grid and other names
@cuda.jit
def v1(a, b, c, d):
    me = cuda.grid(1)
    if me >= a.shape[0]:
        return
    byte, scale = a[me], b[me // 32]
    d[2 * me] = c[(byte >> 4) & 15] * scale
    if 2 * me + 1 < d.shape[0]:
        d[2 * me + 1] = c[byte & 0x0F] * scale


# %% lab4 q6 the guard is a variable
@cuda.jit
def v2(packed, absmax, levels, out):
    lut = cuda.shared.array(shape=16, dtype=float32)
    lane = cuda.threadIdx.x
    if not lane > 15:
        lut[lane] = levels[lane]
    cuda.syncthreads()
    i = cuda.grid(1)
    has_byte = i < packed.size
    if has_byte:
        byte = packed[i]
        s = absmax[i >> 5]
        out[i + i] = lut[byte >> 4] * s
        if i + i + 1 < out.size:
            out[i + i + 1] = lut[byte & 15] * s


# %% lab4 q7 a while loop
@cuda.jit
def v3(packed, absmax, levels, out):
    table = cuda.shared.array(16, float32)
    if cuda.threadIdx.x < 16:
        table[cuda.threadIdx.x] = levels[cuda.threadIdx.x]
    cuda.syncthreads()
    i = cuda.grid(1)
    while i < packed.size:
        byte = packed[i]
        scale = absmax[i // 32]
        out[2 * i] = table[byte >> 4] * scale
        if 2 * i + 1 < out.size:
            out[2 * i + 1] = table[byte & 15] * scale
        i += cuda.gridsize(1)


# %% lab4 q8 halving
@cuda.jit(device=True)
def code_of(value, edges):
    low, high = 0, 15
    while low < high:
        middle = (low + high) // 2
        if edges[middle] < value:
            low = middle + 1
        else:
            high = middle
    return low


# %% lab4 q8 stops at the first
@cuda.jit(device=True)
def code_of(s, boundaries):
    code = 15
    for k in range(15):
        if s <= boundaries[14 - k]:
            code = 14 - k
    return code


# %% lab4 q9 NumPy
def quantize_block(x, boundaries):
    m = np.abs(x).max()
    r = np.float32(1) / m if m > 0 else np.float32(0)
    codes = ((x * r)[:, None] > boundaries).sum(1).astype(np.uint8)
    codes = np.append(codes, np.uint8(7))[: len(x) + len(x) % 2]
    return codes[0::2] << 4 | codes[1::2], m


# %% lab4 q9 a list, and the absmax as a float
def quantize_block(values, edges):
    top = np.float32(0)
    for v in values:
        top = max(top, abs(v))
    inverse = np.float32(1) / top if top else np.float32(0)
    codes = [int(np.searchsorted(edges, v * inverse)) for v in values]
    codes += [7] if len(codes) % 2 else []
    return [16 * codes[k] + codes[k + 1] for k in range(0, len(codes), 2)], float(top)


# %% lab4 q10 rounds from a range
@cuda.jit
def quantize(x, edges, codes, constants):
    top = cuda.shared.array(32, float32)
    t, b = cuda.threadIdx.x, cuda.blockIdx.x
    i = 64 * b + 2 * t
    u = v = float32(0)
    if i < x.size:
        u = x[i]
    if i + 1 < x.size:
        v = x[i + 1]
    top[t] = max(abs(v), abs(u))
    cuda.syncthreads()
    for k in range(5):
        far = 16 >> k
        if t < far:
            top[t] = max(top[t + far], top[t])
        cuda.syncthreads()
    m = top[0]
    r = float32(0)
    if m > 0:
        r = float32(1) / m
    if i < x.size:
        codes[32 * b + t] = 16 * code_of(u * r, edges) + code_of(v * r, edges)
    if t == 31:
        constants[b] = m


# %% lab4 q11 fours exchanged within their row
def place(row, word, width):
    return row * width + (word ^ 4 * (row % 8))


# %% lab4 q11 each row turned, as a NumPy number
def place(r, w, n):
    return np.int64(r * n + (w + 4 * r) % n)


# %% lab4 q11 one step after the other
def place(row, word, width):
    at = 0
    for _ in range(row):
        at += width + 4
    return at + word


# %% lab5 q1 a dictionary in the hook
def saved_bytes(f, x):
    seen = {}

    def keep(t):
        s = t.untyped_storage()
        seen[s.data_ptr()] = len(s)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = f(x)
    return torch.tensor(sum(seen.values()))


# %% lab5 q2 kept as attributes
class FourBitMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b, c, d):
        ctx.save_for_backward(b, c)
        ctx.d, ctx.dtype = d, a.dtype
        return F.linear(a, decode(b, c, d, a.dtype))

    @staticmethod
    def backward(ctx, g):
        return torch.einsum("...o,oi->...i", g, decode(*ctx.saved_tensors, ctx.d, ctx.dtype)), None, None, None


# %% lab5 q4 F.linear, and another order
class LoRA(nn.Module):
    def __init__(self, base, r, alpha):
        super().__init__()
        for p in base.parameters():
            p.requires_grad = False
        self.base, self.alpha, self.r = base, alpha, r
        self.B = nn.Parameter(torch.zeros(base.out_features, r))
        self.A = nn.Parameter(torch.empty(r, base.in_features).normal_(std=base.in_features**-0.5))

    def forward(self, x):
        return F.linear(F.linear(x, self.A), self.B) * (self.alpha / self.r) + self.base(x)


# %% lab5 q5 recursion
def adapt(model, make):
    for p in model.parameters():
        p.requires_grad_(False)

    def walk(module):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, make(child))
            else:
                walk(child)

    walk(model)


# %% lab5 q6 a list, element sizes
def training_bytes(model):
    size = lambda ts: sum(t.numel() * t.element_size() for t in ts)
    ps = list(model.parameters())
    live = [p for p in ps if p.requires_grad]
    still = [p for p in ps if not p.requires_grad]
    return [size(still) + size(model.buffers()), size(live) * 4]


# %% lab5 q7 sets gradients to None itself
def finetune(model, batches, lr):
    live = [p for p in model.parameters() if p.requires_grad]
    adam = torch.optim.Adam(live, lr)
    out = []
    for ids in batches:
        y = model(ids[:, :-1])
        loss = F.cross_entropy(y.transpose(1, 2), ids[:, 1:])
        for p in live:
            p.grad = None
        loss.backward()
        adam.step()
        out.append(float(loss))
    return out


# %% lab5 q7 batches by index
def finetune(m, data, rate):
    parameters = list(filter(lambda p: p.requires_grad, m.parameters()))
    adam, losses = torch.optim.Adam(parameters, lr=rate), torch.zeros(len(data))
    for i in range(len(data)):
        adam.zero_grad(set_to_none=False)
        y = m(data[i][:, :-1])
        loss = -F.log_softmax(y, -1).gather(2, data[i][:, 1:, None]).mean()
        loss.backward()
        adam.step()
        losses[i] = loss.detach()
    return losses.tolist()


# %% lab6 q1 einsum, and a mean instead of a division
def second_moments(samples):
    return torch.einsum("ni,nj->nij", samples, samples).mean(0)


# %% lab6 q2 the trace as it is written on paper
def output_error(a, b, moments):
    d = b - a
    return (torch.trace(d @ moments @ d.T) / torch.trace(a @ moments @ a.T)).item()


# %% lab6 q3 counted by comparing
def round_column(column, absmax):
    codes = (column[:, None] / absmax[:, None] > boundaries).sum(1)
    return codes.to(torch.uint8), levels[codes] * absmax


# %% lab1 q1 a lambda
symmetric = lambda absmax, bits: torch.linspace(-absmax, absmax, 2**bits - 1)


# %% lab1 q1 places only, hints, a default, and what is left over
def min_max(low: "float", high: "float", n: "int" = 16, /, *others) -> "torch.Tensor":
    return torch.lerp(torch.full((n,), float(low)), torch.full((n,), float(high)), torch.linspace(0, 1, n))


# %% lab1 q2 an object that can be called
class Nearest:
    def __call__(self, w, levels):
        return sum((w > edge).byte() for edge in (levels[1:] + levels[:-1]) / 2)


nearest = Nearest()


# %% lab1 q2 a function with some of its arguments filled in
from functools import partial


def _nearest(right, w, levels):
    return torch.bucketize(w, levels[:-1].add(levels[1:]).div(2), right=right).type(torch.uint8)


nearest = partial(_nearest, False)


# %% lab1 q3 remembered from call to call
from functools import lru_cache


@lru_cache(maxsize=None)
def equal_shares(n):
    return torch.from_numpy(norm.ppf(np.linspace(1, 2 * n - 1, n) / (2 * n)).astype(np.float32))


# %% lab1 q4 decorated, and a view against the grain
@torch.no_grad()
def normal_float(tail):
    up, down = (norm.ppf(tail - np.arange(k) * (tail - 0.5) / k) for k in (8, 7))
    return torch.tensor(np.r_[up, 0, -down[::-1]] / up[0]).float().flip(0).view(-1)


# %% lab1 q5 a class method by another name
class Levels:
    @classmethod
    def of(cls, tail=0.9677083):
        q = lambda n: torch.as_tensor(norm.ppf(torch.linspace(tail, 0.5, n).numpy())[:-1]).float()
        both = torch.hstack([-q(8), torch.zeros(1), q(9).flipud()])
        return both / both[-1]


nf4 = Levels.of


# %% lab1 q6 pairs of error and tail
def best_tail(w, tails):
    rows = w.reshape(-1, 64).double()
    top = rows.abs().max(dim=1, keepdim=True)[0]

    def errors():
        for tail in tails:
            table = nf4(tail)
            codes = nearest((rows / top).float().flatten(), table)
            yield ((table[codes.long()].view_as(rows) * top - rows) ** 2).mean().item(), tail

    return np.float64(sorted(errors())[0][1])


# %% lab2 q1 pooling
def block_absmax(w, block_size):
    return F.max_pool1d(w.abs().reshape(1, 1, -1), block_size, ceil_mode=True).squeeze()


# %% lab2 q2 a named tuple, and codes of another type
from collections import namedtuple

Encoded = namedtuple("Encoded", "codes absmax")


def encode(w, block_size):
    absmax = block_absmax(w, block_size)
    inverse = torch.zeros_like(absmax)
    inverse[absmax != 0] = 1 / absmax[absmax != 0]
    scaled = w.reshape(-1) * torch.repeat_interleave(inverse, block_size)[: w.numel()]
    return Encoded(torch.searchsorted(boundaries, scaled).byte(), absmax)


# %% lab2 q3 hexadecimal digits
def unpack(packed, n):
    return torch.tensor([int(digit, 16) for digit in bytes(packed.tolist()).hex()][:n], dtype=torch.uint8)


# %% lab2 q3 bytes
def pack(codes):
    digits = "".join(f"{code:x}" for code in codes.tolist())
    return torch.frombuffer(bytearray.fromhex(digits + "7" * (len(digits) % 2)), dtype=torch.uint8)


# %% lab2 q4 an embedding
def decode(packed, absmax, n, block_size):
    values = F.embedding(unpack(packed, n).int(), levels[:, None]).squeeze(1)
    return values.mul(absmax.unsqueeze(1).expand(-1, block_size).reshape(-1)[:n])


# %% lab2 q6 a dictionary of errors
def best_block_size(w, budget):
    errors = {}
    for power in range(12, 3, -1):
        size = 1 << power
        if bits_per_weight(w.numel(), size) > budget:
            break
        codes, absmax = encode(w, size)
        back = decode(pack(codes), absmax, w.numel(), size)
        errors[size] = torch.dist(back.double(), w.flatten().double()).item()
    return min(errors, key=errors.get)


# %% lab3 q1 scattered, with a maximum
def quantize_constants(absmax, bits, group_size):
    M = 2 ** (bits - 1) - 1
    rest = absmax - (offset := absmax.mean())
    group = torch.arange(len(rest)).div(group_size, rounding_mode="floor")
    top = torch.zeros(int(group[-1]) + 1).scatter_reduce(0, group, rest.abs(), "amax")
    unit = torch.where(top[group] == 0, 0.0, rest / top[group])
    return torch.round(unit * M).add(M).to(torch.uint8), top, offset


# %% lab3 q2 a sum and a product in one
def dequantize_constants(codes, group_absmax, offset, bits, group_size):
    M = 2 ** (bits - 1) - 1
    group = torch.arange(len(codes)) // group_size
    return torch.addcmul(offset.expand(len(codes)), (codes.float() - M) / M, group_absmax[group])


# %% lab3 q4 the library's error
def added_error(w, bits):
    scales = [block_absmax(w, 64)]
    scales.append(dequantize_constants(*quantize_constants(*scales, bits, 256), bits, 256))
    codes, exact = encode(w, scales[0], 64), w.flatten().double()
    errors = [F.mse_loss(decode(codes, scale, 64).double(), exact) for scale in scales]
    return float((errors[1] - errors[0]) / errors[0])


# %% lab4 q2 an array of two
def least_bytes(n, block_size):
    return np.array([(n + 1) // 2 + 4 * (1 + (n - 1) // block_size), 2 * n])


# %% lab4 q5 a loop of strides over the grid
@cuda.jit
def v1(packed, absmax, levels, out):
    for i in range(cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x, packed.size, cuda.gridsize(1)):
        (byte, scale) = (packed[i], absmax[i // 32])
        out[2 * i] = levels[byte >> 4] * scale
        if 2 * i < out.size - 1:
            out[2 * i + 1] = levels[byte & 15] * scale


# %% lab4 q8 counted, and inlined
@cuda.jit(device=True, inline="always")
def code_of(s, boundaries):
    n = 0
    for k in range(len(boundaries)):
        n += s > boundaries[k]
    return n


# %% lab5 q2 its context set up beside it
class FourBitMatmul(torch.autograd.Function):
    @staticmethod
    def forward(x, packed, absmax, shape):
        return torch.matmul(x, decode(packed, absmax, shape, x.dtype).t())

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, packed, absmax, ctx.shape = inputs
        ctx.save_for_backward(packed, absmax)

    @staticmethod
    def backward(ctx, grad):
        return grad.matmul(decode(*ctx.saved_tensors, ctx.shape, grad.dtype)), None, None, None


# %% lab5 q5 each parent in turn
def adapt(model, make):
    for parameter in model.parameters():
        parameter.requires_grad = False
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child.__class__ is nn.Linear:
                parent._modules[name] = make(child)


# %% lab5 q6 NumPy's numbers
def training_bytes(model):
    live, still = np.int64(0), np.int64(0)
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.requires_grad:
            live += tensor.untyped_storage().nbytes()
        else:
            still += tensor.untyped_storage().nbytes()
    return still, 4 * live


# %% lab5 q7 the optimizer calls for the loss
def finetune(model, batches, lr):
    adam = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=lr)
    losses = []

    def closure():
        adam.zero_grad()
        logits = model(ids[:, :-1])
        loss = F.nll_loss(logits.log_softmax(dim=2).reshape(-1, logits.shape[2]), ids[:, 1:].reshape(-1))
        loss.backward()
        return loss

    for ids in batches:
        losses += [adam.step(closure).item()]
    return tuple(losses)


# %% lab6 q4 by Cholesky
def damped_inverse(H):
    damped = H.clone()
    damped.diagonal().add_(0.01 * H.trace() / len(H))
    return torch.cholesky_inverse(torch.linalg.cholesky(damped))


# %% lab6 q5 outer products, in place
def pass_on(w, P, j, error):
    row, pivot = P[j].clone(), P[j, j].clone()
    w[:, j + 1 :].addr_(error, row[j + 1 :] / pivot, alpha=-1)
    P -= torch.outer(P[:, j].clone(), row) / pivot
    return w, P


# %% lab6 q6 columns in a list, and the rest is never cut
def correct(w, H, block_size):
    w, P, columns, tops = w.clone(), damped_inverse(H), [], []
    for j in range(w.shape[1]):
        if not j % block_size:
            tops += [w[:, j : j + block_size].abs().max(1).values]
        codes, values = round_column(w[:, j].clone(), tops[-1])
        columns.append(codes)
        w, P = pass_on(w, P, j, w[:, j] - values)
    return [torch.stack(columns, 1), torch.stack(tops, 1)]


# %% lab1 q1 cumulative sums of one step
def symmetric(absmax, bits):
    m = (1 << (bits - 1)) - 1
    steps = torch.full((2 * m + 1,), absmax / m, dtype=torch.float64)
    steps[0] = -absmax
    return steps.cumsum(0).float()


def min_max(low, high, n):
    return torch.lerp(torch.full((n,), float(low)), torch.full((n,), float(high)), torch.arange(n) / (n - 1))


# %% lab1 q2 a sort of both together
def nearest(w, levels):
    middles = ((levels[1:] + levels[:-1]) * 0.5).tolist()
    order = sorted(range(len(w)), key=lambda i: float(w[i]))
    codes, code = [0] * len(w), 0
    for i in order:
        while code < len(middles) and float(w[i]) > middles[code]:
            code += 1
        codes[i] = code
    return torch.tensor(codes, dtype=torch.uint8)


# %% lab1 q2 heaviside of NumPy
def nearest(w, levels):
    b = (levels[:-1] + levels[1:]) / 2
    steps = np.heaviside(w.numpy()[None, :] - b.numpy()[:, None], 0)
    return torch.from_numpy(steps.sum(axis=0).astype(np.uint8))


# %% lab1 q3 bisection of the distribution function
def equal_shares(n):
    import math

    def quantile(p):
        low, high = -10.0, 10.0
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if 0.5 * math.erfc(-middle / math.sqrt(2)) < p else (low, middle)
        return middle

    return torch.tensor([quantile((2 * i + 1) / (2 * n)) for i in range(n)])


# %% lab1 q4 a dictionary of both halves
def normal_float(tail):
    from statistics import NormalDist

    z = NormalDist().inv_cdf
    halves = {+1: 8, -1: 7}
    found = {0.0}
    for sign, n in halves.items():
        found |= {sign * z(tail + (0.5 - tail) * i / n) for i in range(n)}
    return torch.tensor(sorted(x / max(found) for x in found))


# %% lab1 q6 walrus and a generator
def best_tail(w, tails):
    best = None
    for tail in tails:
        levels, total = nf4(tail), 0.0
        for block in w.split(64):
            m = block.abs().max()
            total += float(((levels[nearest(block / m, levels).long()] * m - block) ** 2).sum())
        if best is None or total < best[0]:
            best = (total, tail)
    return best[1]


# %% lab2 q1 a norm
def block_absmax(w, block_size):
    return torch.stack([torch.linalg.vector_norm(b, float("inf")) for b in w.flatten().split(block_size)])


# %% lab2 q3 a byte is a sum
def pack(codes):
    even, odd = codes[0::2].int(), codes[1::2].int()
    if len(even) > len(odd):
        odd = torch.cat([odd, torch.tensor([7], dtype=torch.int32)])
    return (even * 16 + odd).byte()


def unpack(packed, n):
    out = torch.zeros(2 * len(packed), dtype=torch.uint8)
    out[::2], out[1::2] = torch.div(packed, 16, rounding_mode="floor"), torch.remainder(packed, 16)
    return out[:n]


# %% lab2 q4 by one-hot rows
def decode(packed, absmax, n, block_size):
    one_hot = F.one_hot(unpack(packed, n).long(), 16).float()
    values = (one_hot * levels).sum(dim=1)
    return values * absmax[torch.arange(n) // block_size]


# %% lab2 q5 by Fraction and a sum over blocks
def bits_per_weight(n, block_size):
    from fractions import Fraction

    total = 0
    for start in range(0, n, block_size):
        total += 32
    total += 8 * ((n >> 1) + (n & 1))
    return float(Fraction(total, n))


# %% lab3 q1 NumPy throughout
def quantize_constants(absmax, bits, group_size):
    a = absmax.numpy()
    m = 2 ** (bits - 1) - 1
    offset = absmax.mean()
    centred = a - offset.numpy()
    n_groups = -(-len(a) // group_size)
    codes, largest = np.zeros(len(a), np.uint8), np.zeros(n_groups, np.float32)
    for g in range(n_groups):
        part = slice(g * group_size, (g + 1) * group_size)
        largest[g] = np.abs(centred[part]).max()
        scaled = centred[part] / largest[g] if largest[g] else np.zeros_like(centred[part])
        codes[part] = np.rint(scaled * np.float32(m)) + m
    return torch.from_numpy(codes), torch.from_numpy(largest), offset


# %% lab3 q3 ceilings by math
def bits_per_weight(n, block_size, bits, group_size):
    from math import ceil

    blocks = ceil(n / block_size)
    return (ceil(n / 2) + ceil(blocks * bits / 8) + 4 * (ceil(blocks / group_size) + 1)) * 8 / n


# %% lab4 q1 a bitmap of the memory
def sectors(first, stride, width):
    last = first + 31 * stride + width
    touched = bytearray(last // 32 + 1)
    for t in range(32):
        for byte in range(first + t * stride, first + t * stride + width):
            touched[byte >> 5] = 1
    return sum(touched)


# %% lab4 q3 a loop over the two nibbles
def dequantize_byte(i, packed, absmax, levels, out, block_size):
    if i >= len(packed):
        return
    byte, j = int(packed[i]), 2 * i
    scale = absmax[j // block_size]
    for shift in (4, 0):
        if j < len(out):
            out[j] = levels[(byte >> shift) & 0xF] * scale
        j += 1


# %% lab4 q7 the table filled by a strided loop, and the rest by thread
@cuda.jit
def v3(codes, scales, table16, result):
    shared = cuda.shared.array(16, float32)
    for k in range(cuda.threadIdx.x, 16, cuda.blockDim.x):
        shared[k] = table16[k]
    cuda.syncthreads()
    step = cuda.gridsize(1)
    i = cuda.grid(1)
    n = result.size
    while i < codes.size:
        both = codes[i]
        s = scales[i // 32]
        result[2 * i] = shared[both // 16] * s
        if 2 * i != n - 1:
            result[2 * i + 1] = shared[both % 16] * s
        i += step


# %% lab4 q11 the gap is before the row
def place(row, word, width):
    start = 4 + row * (4 + width)
    return start + word


# %% lab5 q5 recursion into children with setattr
def adapt(model, make):
    for p in model.parameters():
        p.requires_grad = False

    def walk(parent):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and type(child) is nn.Linear:
                setattr(parent, name, make(child))
            else:
                walk(child)

    walk(model)


# %% lab5 q6 one loop with two sums
def training_bytes(model):
    sums = {False: 0, True: 0}
    for p in model.parameters():
        sums[p.requires_grad] += p.numel() * p.element_size()
    for b in model.buffers():
        sums[False] += b.numel() * b.element_size()
    return sums[False], sums[True] * (1 + 1 + 2)


# %% lab6 q1 a sum of outer products
def second_moments(x):
    total = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    for row in x:
        total += torch.outer(row, row)
    return total / x.shape[0]


# %% lab6 q3 the nearest by distance
def round_column(column, absmax):
    s = column / absmax
    codes = (s[:, None] - levels).abs().argmin(dim=1)
    return codes.byte(), levels[codes] * absmax


# %% lab6 q6 absmax before, by reshaping the block as it is
def correct(w, H, block_size):
    w, P = w.clone(), damped_inverse(H)
    codes = []
    scales = []
    for start in range(0, w.shape[1], block_size):
        scale = w[:, start : start + block_size].abs().max(dim=1).values
        scales.append(scale)
        for j in range(start, start + block_size):
            c, v = round_column(w[:, j], scale)
            codes.append(c)
            w, P = pass_on(w, P, j, w[:, j] - v)
    return torch.stack(codes, 1), torch.stack(scales, 1)
