"""What every 4-bit layer shares: a weight in buffers, moved with the module, saved under bitsandbytes' keys."""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from nf4lab.blockwise import DTYPES, QuantizedTensor
from nf4lab.checkpoints.keys import BITSANDBYTES_PARTS, NF4LAB_PARTS, STATES, from_parts, parts_of
from nf4lab.layers import ops  # which registers torch.ops.nf4lab
from nf4lab.layers.layout import layout_of, rebuilt, tensors_of

CANNOT_BE_SET = "a 4-bit layer's weight can't be set: put another layer in its place, made of nf4lab.quantize(weight)"
FIRST_WORDS = {"weight", *(end.split(".")[1] for end in (*STATES, *BITSANDBYTES_PARTS, *NF4LAB_PARTS))}  # of keys


class Stored4bit(nn.Module):
    """A module whose weight is a QuantizedTensor, in any format.

    weight: its tensors become buffers, and move with the module. `.to(dtype)` leaves them as they are, and changes
    what `weight` decodes to.
    """

    stored = ops.stored_in
    _came_before: dict[str, Tensor] = {}  # noqa: RUF012 - replaced, never changed

    def __init__(self, weight: QuantizedTensor):
        super().__init__()
        self.dtype, self.format = weight.dtype, weight.format
        self.layout, self.stored_names = layout_of(weight), tuple(tensors_of(weight))
        for name, tensor in tensors_of(weight).items():
            self.register_buffer(name, _own(tensor), persistent=False)  # state_dict has them under bitsandbytes' keys

    @property
    def quantized(self) -> QuantizedTensor:
        """The weight as it is stored. It shares the layer's memory."""
        return replace(rebuilt(self.stored(), self.layout, self.dtype), format=self.format)

    @property
    def weight(self) -> Tensor:
        """The weight dequantized, (out_features, in_features): made at every access, for code that reads a weight.

        What would be written to it would be lost, and is refused: write to `weight.clone()`.
        """
        weight = torch.ops.nf4lab.dequantize_stored(self.stored(), self.layout, self.dtype)
        return weight if torch.compiler.is_compiling() or _in_transform(weight) else weight.as_subclass(Decoded)

    @weight.setter
    def weight(self, value: Tensor) -> None:
        """Nothing, for the weight that is there, as PEFT hands it back; raises AttributeError for any other."""
        same = isinstance(value, Tensor) and value.shape == self.quantized.shape and torch.equal(value, self.weight)
        if not same:
            raise AttributeError(CANNOT_BE_SET)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As for every module. Raises AttributeError for a weight, which is no parameter here."""
        if name == "weight":
            raise AttributeError(CANNOT_BE_SET)
        super().register_parameter(name, param)

    @property
    def nbytes(self) -> int:
        """Bytes that the weight takes."""
        return self.quantized.nbytes

    def _apply(self, fn, recurse=True):
        """Move the stored tensors with the module, but keep their dtypes: absmax in float16 would be another weight."""
        before = {name: self._buffers[name] for name in self.stored_names if name in self._buffers}
        dtype = fn(torch.empty(0, dtype=self.dtype, device=self.packed.device)).dtype
        self.dtype = dtype if dtype in DTYPES else self.dtype  # no weight decodes to float8 or complex numbers
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            if self._buffers[name].dtype != tensor.dtype:
                self._buffers[name] = tensor.to(self._buffers[name].device)
        return self

    def _key(self, prefix: str) -> str:
        """The weight's name in a state_dict."""
        return f"{prefix}weight"

    def __prepare_scriptable__(self):
        """Raises TypeError: what torch.jit.script asks first."""
        raise TypeError(f"a {type(self).__name__} can't be scripted: use torch.jit.trace or torch.export")

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        """The weight under the keys of bitsandbytes: `weight`, `weight.absmax` and so on."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        q = self.quantized
        shared = {tensor.data_ptr() for tensor in tensors_of(q).values()}  # with the layer, as in any state_dict
        for key, part in parts_of(self._key(prefix), q).items():
            # An alias, not the buffer: who looks for that finds it under its own name only.
            destination[key] = part.detach() if part.data_ptr() in shared else part.clone()

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, error_msgs):
        name = self._key(prefix)
        parts = {key: state_dict.pop(key) for key in list(state_dict) if key == name or key.startswith(f"{name}.")}
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, error_msgs)
        parts, missing = self._with_what_came_before(name, parts)
        if missing:
            missing_keys += missing if strict else []
            return
        try:
            self._load(from_parts(name, parts), metadata.get("assign_to_params_buffers", False))
        except (ValueError, TypeError) as error:
            error_msgs.append(f"{name}: {error}")

    def _with_what_came_before(self, name: str, parts: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """(the parts of a weight by key, the keys that are still to come).

        A checkpoint in several files is loaded file by file, and a weight's parts can lie in two of them: what has come
        is kept until the rest does. What can't be a part of this layer's weight is handed on, to be refused.
        """
        keys = self._keys(name)
        packed = parts.get(name, self.packed)
        is_other = not parts.keys() <= set(keys) or packed.nbytes != self.packed.nbytes
        if is_other or (parts.keys() < set(keys) and _is_whole(name, parts)):
            self._came_before = {}
            return parts, [] if name in parts else [name]
        came = self._came_before | {key.removeprefix(name): part for key, part in parts.items()}
        missing = [key for key in keys if key.removeprefix(name) not in came]
        self._came_before = came if missing else {}
        return {name + end: part for end, part in came.items()}, missing

    def _keys(self, name: str) -> list[str]:
        """The keys of the weight in a state_dict."""
        try:
            return list(parts_of(name, self.quantized))
        except ValueError:  # a normalisation of somebody's own, which no file can hold
            return [name]

    @torch.no_grad()
    def _load(self, found: QuantizedTensor | Tensor, assign: bool) -> None:
        """Take the tensors of `found` over; raise ValueError unless it is stored as this layer's weight is."""
        if not isinstance(found, QuantizedTensor):
            raise ValueError(f"it is not quantized, but {found.dtype} of shape {tuple(found.shape)}")
        if layout_of(found) != self.layout:
            raise ValueError(f"{found!r} does not fit in a layer with {self.quantized!r}")
        if self.packed.is_meta and not assign:
            raise ValueError("the layer is on the meta device: load with assign=True")
        self.dtype = found.dtype if assign else self.dtype
        for name, tensor in tensors_of(found).items():
            self._take(name, tensor.to(found.packed.device), assign)  # what a file has as a number comes on the CPU

    def _take(self, name: str, tensor: Tensor, assign: bool) -> None:
        """Have a tensor as one of those that the weight is stored in, or its values."""
        self._buffers[name] = tensor if assign else self._buffers[name].copy_(tensor)

    def _fqn_modifiers(self) -> dict[str, str]:
        """Where torch.distributed.checkpoint finds what keys like `weight.absmax` name: it asks for attributes."""
        return dict.fromkeys(FIRST_WORDS, "_named")

    @property
    def _named(self) -> "_AnyName":
        return _AnyName()


def whose_4_bits(layer: nn.Module) -> str:
    """Whose 4 bits a layer is in, "nf4lab's" or "bitsandbytes'", told without importing that; empty for any other."""
    if isinstance(layer, Stored4bit):
        return "nf4lab's"
    return "bitsandbytes'" if hasattr(layer._parameters.get("weight"), "quant_state") else ""


class _AnyName:
    """Something that has an attribute of any name that is no one's own: itself."""

    def __getattr__(self, name: str) -> "_AnyName":
        if name.startswith("_"):
            raise AttributeError(name)
        return self


def _is_whole(name: str, parts: dict[str, Tensor]) -> bool:
    """Whether these parts make a quantized tensor by themselves."""
    try:
        return isinstance(from_parts(name, parts), QuantizedTensor)
    except (ValueError, KeyError):
        return False


def _own(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where it is part of something larger, which would stay alive and which no file can hold."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


class Decoded(Tensor):
    """A weight as it decodes, to be read: writing to it, or to a view of it, is a RuntimeError.

    What shares its memory is marked like it, arrays of NumPy as not writeable; all else that is made of it is plain.
    """

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        """Do what the function does, unless it would write to a decoded weight."""
        kwargs = kwargs or {}
        first = args[0] if args else next(iter(kwargs.values()), None)
        written = [kwargs.get("out"), first if _writes(function) or kwargs.get("inplace") else None]
        if any(isinstance(leaf, cls) for leaf in tree_leaves(written)):
            raise RuntimeError("a 4-bit layer's weight is decoded when read: what is written to it would be lost; "
                            "write to weight.clone(), and quantize that")  # fmt: skip
        with torch._C.DisableTorchFunctionSubclass():
            made = function(*args, **kwargs)
            if function == Tensor.as_subclass:
                return made
            memory = {_memory(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, cls)}
            return tree_map(lambda leaf: _marked(leaf, memory, cls), made)

    def __iter__(self):
        """Its rows, marked as it is."""
        return iter(self.unbind(0))

    def __deepcopy__(self, memo):
        """Copied it is a plain tensor."""
        return self.clone()

    def __reduce_ex__(self, protocol):
        """Pickled it is a plain tensor."""
        return self.as_subclass(Tensor).__reduce_ex__(protocol)


_in_transform = torch._C._functorch.is_functorch_wrapped_tensor  # by vmap, grad and so on: it has no memory to ask for


def _memory(tensor: Tensor) -> int:
    """What two tensors have in common that share memory, on any device."""
    return tensor.untyped_storage()._cdata


def _marked(made, memory: set[int], cls: type):
    """What was made of a decoded weight, marked where it shares its memory."""
    if (
        isinstance(made, Tensor)
        and made.layout == torch.strided
        and not _in_transform(made)
        and _memory(made) in memory
    ):
        return made.as_subclass(cls)
    if isinstance(made, np.ndarray):
        made.flags.writeable = False
    return made


def _writes(function) -> bool:
    """Whether a function of torch changes its first argument: by its name, as torch has it, or by assigning data."""
    name = function.__name__.split(".")[0]  # of an op of aten without its overload
    in_place = name.startswith("__i") and name.removeprefix("__i").removesuffix("__") in OPERATORS
    ends = name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
    return ends or in_place or name == "__setitem__" or function == Tensor.data.__set__


OPERATORS = ("add", "sub", "mul", "div", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift")
