"""A small decoder-only language model in plain torch: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

The parts and their names are those of Llama, so every weight matrix is an `nn.Linear` that a quantizer can swap. The
output head is the embedding itself.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Decoder(nn.Module):
    """Token ids, int64 (batch, positions), to logits, (batch, positions, vocab_size).

    dtype: of parameters and rotary tables; the tables are computed in float64 and rounded once.
    Raises ValueError for more than max_len positions.
    Source: https://github.com/Oseiasdfarias/glassllm (MIT), whose NumPy forward this equals.
    """

    def __init__(self, vocab_size: int, d_model: int, n_layers: int, n_heads: int, n_kv_heads: int, max_len: int,
                 rope_base: float, eps: float, dtype: torch.dtype = torch.float32):  # fmt: skip
        super().__init__()
        self.max_len = max_len
        self.embed = nn.Embedding(vocab_size, d_model, dtype=dtype)
        self.blocks = nn.ModuleList(DecoderBlock(d_model, n_heads, n_kv_heads, eps, dtype) for _ in range(n_layers))
        self.norm = nn.RMSNorm(d_model, eps, dtype=dtype)
        cos, sin = rotary_tables(d_model // n_heads, max_len, rope_base)
        self.register_buffer("cos", cos.to(dtype), persistent=False)
        self.register_buffer("sin", sin.to(dtype), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """The logits of the token that follows each position."""
        n = ids.shape[1]
        if n > self.max_len:
            raise ValueError(f"{n} positions do not fit in max_len={self.max_len}")
        x = self.embed(ids)  # (batch, n, d_model)
        for block in self.blocks:
            x = block(x, self.cos[:n], self.sin[:n])
        return F.linear(self.norm(x), self.embed.weight)


class DecoderBlock(nn.Module):
    """Attention, then the feed-forward part, each behind a norm and beside a residual path."""

    def __init__(self, d_model: int, n_heads: int, n_kv_heads: int, eps: float, dtype: torch.dtype):
        super().__init__()
        self.attention_norm = nn.RMSNorm(d_model, eps, dtype=dtype)
        self.attention = Attention(d_model, n_heads, n_kv_heads, dtype)
        self.mlp_norm = nn.RMSNorm(d_model, eps, dtype=dtype)
        self.mlp = SwiGLU(d_model, 8 * d_model // 3, dtype)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x (batch, n, d_model) to the same shape; cos, sin: the first n rows of `rotary_tables`."""
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.mlp(self.mlp_norm(x))


class Attention(nn.Module):
    """Causal attention in which n_heads / n_kv_heads queries share one key and one value."""

    def __init__(self, d_model: int, n_heads: int, n_kv_heads: int, dtype: torch.dtype):
        super().__init__()
        self.d_head = d_model // n_heads
        kv_width = n_kv_heads * self.d_head
        self.q_proj = nn.Linear(d_model, d_model, bias=False, dtype=dtype)
        self.k_proj = nn.Linear(d_model, kv_width, bias=False, dtype=dtype)
        self.v_proj = nn.Linear(d_model, kv_width, bias=False, dtype=dtype)
        self.o_proj = nn.Linear(d_model, d_model, bias=False, dtype=dtype)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x (batch, n, d_model) to the same shape; cos, sin: as for `DecoderBlock`."""
        q, k, v = (self._heads(projection(x)) for projection in (self.q_proj, self.k_proj, self.v_proj))
        mixed = F.scaled_dot_product_attention(
            rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True, enable_gqa=True
        )
        return self.o_proj(mixed.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.d_head)).transpose(1, 2)  # (batch, heads, n, d_head)


class SwiGLU(nn.Module):
    """A gated feed-forward layer: down(silu(gate(x)) * up(x))."""

    def __init__(self, d_model: int, width: int, dtype: torch.dtype):
        super().__init__()
        self.gate_proj = nn.Linear(d_model, width, bias=False, dtype=dtype)
        self.up_proj = nn.Linear(d_model, width, bias=False, dtype=dtype)
        self.down_proj = nn.Linear(width, d_model, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x (…, d_model) to the same shape."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def rotary_tables(d_head: int, max_len: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and sin of position * base**(-2i / d_head): float64 (max_len, d_head / 2) each."""
    theta = base ** (-2.0 * torch.arange(d_head // 2, dtype=torch.float64) / d_head)
    angles = torch.outer(torch.arange(max_len, dtype=torch.float64), theta)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each adjacent pair of coordinates of x, (…, n, d_head), turned by the angle of its position."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)
