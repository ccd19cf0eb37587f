"""A QuantizedTensor as arguments of an op: the list of its tensors, and in one string all that they do not say.

An op takes tensors, numbers and strings. The string is JSON that any process can read, so a program exported with
torch.export runs where nothing has been quantized yet.
"""

import functools
import json
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nf4lab.blockwise import QuantizedTensor
from nf4lab.formats import FORMATS, NORMALIZATIONS, Format
from nf4lab.formats.double_quant import DoubleQuant, QuantizedConstants

KINDS = ("stored_scale", "stored_location")


class Layout(NamedTuple):
    """What a string from `layout_of` says. names: of the tensors, in order. schemes: how constants are quantized."""

    names: tuple[str, ...]
    format: Format
    shape: torch.Size
    block_size: int
    schemes: tuple[DoubleQuant | None, ...]


def tensors_of(part: QuantizedTensor | QuantizedConstants) -> dict[str, Tensor]:
    """The tensors that `part` is made of, by field name; those of nested constants as "field_inner"."""
    found = {}
    for field in fields(part):
        value = getattr(part, field.name)
        if isinstance(value, Tensor):
            found[field.name] = value
        elif isinstance(value, QuantizedConstants):
            found |= {f"{field.name}_{inner}": tensor for inner, tensor in tensors_of(value).items()}
    return found


def layout_of(q: QuantizedTensor) -> str:
    """All of q but its tensors and its dtype, as a string: equal for two that are stored alike."""
    schemes = [getattr(getattr(q, kind), "double_quant", None) for kind in KINDS]
    known = FORMATS.get(q.format.name)
    words = {
        "tensors": list(tensors_of(q)),
        "format": q.format.name if known is q.format or known == q.format else _words(q.format),
        "shape": list(q.shape),
        "block_size": q.block_size,
        "double_quant": [None if scheme is None else _words(scheme) for scheme in schemes],
    }
    return json.dumps(words)


@functools.lru_cache(maxsize=1024)
def read_layout(layout: str) -> Layout:
    """The inverse of `layout_of`. A normalisation of somebody's own becomes one that refuses to encode."""
    words = json.loads(layout)
    schemes = tuple(None if scheme is None else DoubleQuant(**scheme) for scheme in words["double_quant"])
    names, format = tuple(words["tensors"]), _format(words["format"])
    return Layout(names, format, shape_of(layout), words["block_size"], schemes)


@functools.lru_cache(maxsize=1024)
def shape_of(layout: str) -> torch.Size:
    """The weight's shape alone: no tensor is made, so that it may be asked for where all tensors are fake."""
    return torch.Size(json.loads(layout)["shape"])


def rebuilt(stored: list[Tensor], layout: str, dtype: torch.dtype = torch.float32) -> QuantizedTensor:
    """The QuantizedTensor whose tensors are `stored`; nothing is copied. Raises RuntimeError where one was cast."""
    _check_dtypes(stored, layout)
    *parts, tensor_scale = parts_of(stored, layout)
    _, format, shape, block_size, _ = read_layout(layout)
    return QuantizedTensor(*parts, format, shape, dtype, block_size, tensor_scale)


def _check_dtypes(stored: list[Tensor], layout: str) -> None:
    for name, tensor in zip(read_layout(layout).names, stored, strict=True):
        kept = torch.uint8 if name == "packed" or name.endswith("_codes") else torch.float32
        if tensor.dtype != kept:
            raise RuntimeError(
                f"{name} of a 4-bit weight is kept in {kept}, and was cast to {tensor.dtype}, which changes the "
                "weight: `.to` of the layer leaves it alone"
            )


def parts_of(stored: list[Tensor], layout: str) -> tuple:
    """(packed, scale, location, tensor_scale) as a QuantizedTensor has them, made of its tensors."""
    names, _, shape, block_size, schemes = read_layout(layout)
    found = dict(zip(names, stored, strict=True))
    n_blocks = -(-shape.numel() // block_size)
    scale, location = (
        found.get(kind) if scheme is None else _constants(found, kind, n_blocks, scheme)
        for kind, scheme in zip(KINDS, schemes, strict=True)
    )
    return found["packed"], scale, location, found.get("tensor_scale")


def _constants(found: dict[str, Tensor], kind: str, n: int, scheme: DoubleQuant) -> QuantizedConstants:
    codes, group_absmax, offset = (found.get(f"{kind}_{part}") for part in ("codes", "group_absmax", "offset"))
    return QuantizedConstants(codes, group_absmax, offset, n, scheme)


def _words(part: Format | DoubleQuant) -> dict[str, Any]:
    """A dataclass as JSON can hold it: dtypes and functions by name, levels as numbers, which float64 holds exactly."""
    return {field.name: _word(getattr(part, field.name)) for field in fields(part)}


def _word(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if callable(value):
        return next((name for name, row in NORMALIZATIONS.items() if row.rule is value), None)
    return value


def _format(words: str | dict[str, Any]) -> Format:
    if isinstance(words, str):
        return FORMATS[words]
    name = words["normalize"]
    normalize = NORMALIZATIONS[name].rule if name else _unknown
    levels = torch.tensor(words["levels"], dtype=torch.float32, device="cpu")
    made = {"levels": levels, "normalize": normalize, "constants_dtype": getattr(torch, words["constants_dtype"])}
    return Format(**words | made | {"search": tuple(words["search"])})


def _unknown(blocks: Tensor) -> tuple[Tensor, None]:
    raise ValueError("this format normalises by a function that was not sent along: it decodes, and cannot encode")
