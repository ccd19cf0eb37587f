"""Fold rotations into a whole language model: the same function, every large matrix rotated, nothing added to run.

The residual stream of a Llama-like model is read through RMSNorms and written by o_proj and down_proj. A rotation
passes an RMSNorm unchanged once the norm's own factors have gone into the matrices that read it. So the stream can live
in a rotated basis: what writes it writes rotated, what reads it undoes that, and both are products of matrices. The
values of a head are rotated likewise, between v_proj and o_proj.

Sources: SliceGPT (arXiv:2401.15024), section 3.2; QuaRot (arXiv:2404.00456), section 4; R1 and R2 of SpinQuant
(arXiv:2405.16406).
"""

import torch
from torch import Tensor, nn

from nf4lab.beyond.rotation import factor, hadamard, random_signs, rotate

READERS = {"input_layernorm": ("q_proj", "k_proj", "v_proj"), "post_attention_layernorm": ("gate_proj", "up_proj")}


@torch.no_grad()
def fold_rotation_(model: nn.Module, seed: int = 0) -> None:
    """Rotate the residual stream and the values of a transformers model of the Llama kind, in place.

    Llama, Mistral, Qwen2 and Qwen3 are of that kind: RMSNorms, and matrices named q_proj, k_proj, v_proj, o_proj,
    gate_proj, up_proj and down_proj. Logits stay as they were, up to rounding. A tied head becomes a matrix of its own,
    since the last norm's factors go into it and not into the embedding; the config says so.

    Raises ValueError for a model that is not of that kind, naming what is missing, or whose width no Hadamard matrix
    serves; the model is then as it was.
    """
    body, head, blocks = _parts(model)
    width, head_width = body.embed_tokens.weight.shape[1], _head_width(model)
    factor(width), factor(head_width)
    signs = random_signs(width, seed).to(body.embed_tokens.weight.device)
    if head.weight is body.embed_tokens.weight:
        head.weight = nn.Parameter(head.weight.clone())
        model.config.tie_word_embeddings = False
    _set(body.embed_tokens.weight, rotate(body.embed_tokens.weight, signs))
    for block in blocks:
        for norm_name, names in READERS.items():
            _read_rotated(getattr(block, norm_name), [_layer(block, name) for name in names], signs)
        for name in ("o_proj", "down_proj"):
            _write_rotated(_layer(block, name), lambda rows: rotate(rows, signs))
        _write_rotated(_layer(block, "v_proj"), lambda rows: _by_head(rows, head_width))
        o_proj = _layer(block, "o_proj")
        _set(o_proj.weight, _by_head(o_proj.weight, head_width))
    _read_rotated(body.norm, [head], signs)


def _read_rotated(norm: nn.Module, layers: list[nn.Linear], signs: Tensor) -> None:
    """Norm's factors into the layers that read it, and these into the rotated basis."""
    for layer in layers:
        _set(layer.weight, rotate(layer.weight.double() * norm.weight.double(), signs))
    _set(norm.weight, torch.ones_like(norm.weight))


def _write_rotated(layer: nn.Linear, rotated) -> None:
    """What the layer gives out, in the rotated basis: weight and bias."""
    _set(layer.weight, rotated(layer.weight.T).T)
    if layer.bias is not None:
        _set(layer.bias, rotated(layer.bias))


def _by_head(rows: Tensor, width: int) -> Tensor:
    """The values of each head, `width` columns a head, times one Hadamard matrix."""
    return hadamard(rows.unflatten(-1, (-1, width))).flatten(-2)


def _set(parameter: nn.Parameter, value: Tensor) -> None:
    parameter.copy_(value)


def _layer(block: nn.Module, name: str) -> nn.Linear:
    return getattr(block.self_attn if hasattr(block.self_attn, name) else block.mlp, name)


def _head_width(model: nn.Module) -> int:
    config = model.config
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _parts(model: nn.Module) -> tuple[nn.Module, nn.Linear, list[nn.Module]]:
    """Body, head and blocks of a model of the Llama kind; ValueError for any other."""
    body, head = getattr(model, "model", None), getattr(model, "lm_head", None)
    blocks = list(getattr(body, "layers", []))
    missing = [name for name, part in (("model", body), ("lm_head", head), ("model.layers", blocks)) if not part]
    for block in blocks[:1]:
        wanted = [*READERS, "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
                  "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]  # fmt: skip
        missing += [name for name in wanted if not _has(block, name)]
        norms = [getattr(block, name) for name in READERS if _has(block, name)]
        missing += [f"an RMSNorm as {type(norm).__name__}" for norm in norms if not _is_rms_norm(norm)]
        extra = [name for name, part in block.named_children() if name not in {*READERS, "self_attn", "mlp"}]
        missing += [f"a block without {name}" for name in extra]
    if missing:
        raise ValueError(
            f"rotations fold into models of the Llama kind; {type(model).__name__} lacks {', '.join(missing)}"
        )
    return body, head, blocks


def _has(block: nn.Module, name: str) -> bool:
    try:
        block.get_submodule(name)
    except AttributeError:
        return False
    return True


def _is_rms_norm(norm: nn.Module) -> bool:
    """Whether the norm gives x * weight / rms(x): no bias, no mean taken off, no 1 added to the weight (as Gemma's)."""
    width = norm.weight.shape[0]
    x = torch.linspace(-1, 2, width, dtype=torch.float32, device=norm.weight.device)
    given = norm(x.to(norm.weight.dtype)).float()
    expected = x * norm.weight.float() / x.square().mean().sqrt()
    return torch.allclose(given, expected, rtol=0.02, atol=0.02 * expected.abs().max().item() + 1e-6)
