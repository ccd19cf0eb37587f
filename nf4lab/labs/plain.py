"""Values as plain data, to hand them from one process to another: JSON, and tensors as safetensors.

Reading runs no code, whoever wrote it. What has no plain form (a module, a generator) goes as a description.
"""

import contextlib
import json
from dataclasses import dataclass

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

SIMPLE = (bool, int, float, str)


@dataclass(frozen=True)
class Described:
    """What stands for a value without a plain form: its type's name and a short text."""

    kind: str
    text: str

    def __repr__(self) -> str:
        return self.text


def dumps(value) -> bytes:
    """The value as bytes: length of the JSON (4 bytes), JSON, tensors. Subclasses go as what they are made from."""
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_down(value, tensors)).encode()
    return len(text).to_bytes(4, "big") + text + (safetensors.torch.save(tensors) if tensors else b"")


def loads(data: bytes):
    """The value that `dumps` was given. Raises ValueError for other bytes."""
    n = 4 + int.from_bytes(data[:4], "big")
    try:
        tensors = safetensors.torch.load(data[n:]) if len(data) > n else {}
        return _up(json.loads(data[4:n]), tensors)
    except Exception as error:
        raise ValueError(f"not plain data: {type(error).__name__}") from None


def _down(value, tensors: dict[str, Tensor]):
    if value is None or type(value) in SIMPLE:
        return _checked(value)
    with contextlib.suppress(Exception):
        if value is Ellipsis:
            return {"is": "ellipsis"}
        if isinstance(value, torch.dtype):
            return {"is": "dtype", "name": str(value).removeprefix("torch.")}
        if isinstance(value, Tensor):
            return {"is": "tensor", "name": _kept(value.detach().as_subclass(Tensor), tensors)}
        if isinstance(value, np.generic):
            return {"is": "scalar", "name": _kept(torch.from_numpy(np.array([value])), tensors)}
        if isinstance(value, np.ndarray):
            return {"is": "array", "name": _kept(torch.from_numpy(np.array(value)), tensors)}
        if isinstance(value, list | tuple):
            kind = "list" if isinstance(value, list) else "tuple"
            return {"is": kind, "parts": [_down(part, tensors) for part in value]}
        if isinstance(value, dict):
            return {"is": "dict", "parts": [[_down(k, tensors), _down(v, tensors)] for k, v in value.items()]}
        for kind in SIMPLE:
            if isinstance(value, kind):
                return _checked(kind(value))
    return {"is": "other", "kind": type(value).__name__, "text": _short(value)}


def _checked(value):
    """The value, or a description of a whole number too long to be written."""
    if type(value) is int and value.bit_length() > 4000:
        return {"is": "other", "kind": "int", "text": "a number of more than 1,200 digits"}
    return value


def _kept(tensor: Tensor, tensors: dict[str, Tensor]) -> str:
    name, plain = f"t{len(tensors)}", tensor.cpu().resolve_conj().resolve_neg().contiguous().clone()
    safetensors.torch.save({name: plain.reshape(-1)[:0]})  # a dtype that safetensors has not ends here
    tensors[name] = plain
    return name


def _short(value) -> str:
    try:
        text = repr(value)
    except Exception:
        text = f"a {type(value).__name__} that cannot be shown"
    return text if len(text) <= 80 else text[:77] + "..."


def _up(value, tensors: dict[str, Tensor]):
    if not isinstance(value, dict):
        if value is not None and type(value) not in SIMPLE:
            raise TypeError("not a value")
        return value
    kind = value["is"]
    if kind in ("tensor", "array", "scalar"):
        tensor = tensors[value["name"]]
        return tensor if kind == "tensor" else tensor.numpy() if kind == "array" else tensor.numpy()[0]
    if kind in ("list", "tuple"):
        parts = [_up(part, tensors) for part in value["parts"]]
        return parts if kind == "list" else tuple(parts)
    if kind == "dict":
        return {_up(k, tensors): _up(v, tensors) for k, v in value["parts"]}
    if kind == "dtype":
        return {str(found): found for found in vars(torch).values() if isinstance(found, torch.dtype)}[
            f"torch.{value['name']}"
        ]
    return Ellipsis if kind == "ellipsis" else Described(str(value["kind"]), str(value["text"]))
