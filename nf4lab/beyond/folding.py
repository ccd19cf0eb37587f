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
from nf4lab.choice import is_plain_linear

READERS = {"input_layernorm": ("q_proj", "k_proj", "v_proj"), "post_attention_layernorm": ("gate_proj", "up_proj")}
MATRICES = (*(f"self_attn.{name}_proj" for name in "qkvo"), *(f"mlp.{name}_proj" for name in ("gate", "up", "down")))


@torch.no_grad()
def fold_rotation_(model: nn.Module, seed: int = 0) -> None:
    """Rotate the residual stream and the values of a transformers model of the Llama kind, in place.

    Llama, Mistral, Qwen2 and Qwen3 are of that kind: RMSNorms, and matrices named q_proj, k_proj, v_proj, o_proj,
    gate_proj, up_proj and down_proj. Logits stay as they were, up to rounding. A tied head becomes a matrix of its own,
    since the last norm's factors go into it and not into the embedding; the config says so.

    Raises ValueError for a model that is not of that kind, or has matrices in 4 bits or with adapters, naming what is
    missing, and for a width that no Hadamard matrix serves; the model is then as it was.
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
    missing += [f"model.{name}" for name in ("embed_tokens", "norm") if body is not None and not _has(body, name)]
    if body is not None and _has(body, "norm") and not _is_rms_norm(body.norm):
        missing.append(f"an RMSNorm as {type(body.norm).__name__}")
    if isinstance(head, nn.Module) and not is_plain_linear(head):
        missing.append("lm_head as a plain torch.nn.Linear")
    if body is not None and _has(body, "embed_tokens") and type(body.embed_tokens) is not nn.Embedding:
        missing.append("model.embed_tokens as a plain torch.nn.Embedding")
    missing += [lack for block in blocks for lack in _lacking(block)]
    if missing:
        lacks = ", ".join(dict.fromkeys(missing))
        raise ValueError(f"rotations fold into models of the Llama kind; {type(model).__name__} lacks {lacks}")
    return body, head, blocks


def _lacking(block: nn.Module) -> list[str]:
    """What keeps a block from being one of the Llama kind."""
    parts = {name: block.get_submodule(name) for name in (*READERS, *MATRICES) if _has(block, name)}
    missing = [name for name in (*READERS, *MATRICES) if name not in parts]
    for name, part in parts.items():
        if name in READERS and not _is_rms_norm(part):
            missing.append(f"an RMSNorm as {type(part).__name__}")
        if name in MATRICES and not is_plain_linear(part):
            missing.append(f"{name} as a plain torch.nn.Linear")
    extra = [name for name, _ in block.named_children() if name not in {*READERS, "self_attn", "mlp"}]
    return missing + [f"a block without {name}" for name in extra]


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
