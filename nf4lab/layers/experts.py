"""Fused experts in 4 bits: the three-dimensional parameter of a mixture, decoded as a whole or one expert at a time.

transformers 5 keeps the experts of a mixture (Mixtral, Qwen3-MoE, …) in parameters (n_experts, rows, columns) of a
module whose forward pass either takes experts one by one or hands the whole to a grouped product. So what replaces
such a parameter stands for a tensor: `weight[i]` decodes one expert, anything else decodes all of them.
"""

import torch
from torch import Tensor, nn

from nf4lab.blockwise import QuantizedTensor
from nf4lab.layers.stored import Stored4bit


class Experts4bit(Stored4bit):
    """A parameter of fused experts with its values in 4 bits; to torch's functions, and by its own methods and indices,
    it is the tensor that it decodes to. An operator on its left side, as in `experts * 2`, wants `experts.weight`.

    weight: a QuantizedTensor of shape (n_experts, …), quantized as one long row: where an expert's weights are a
    multiple of the block size, as in Mixtral and Qwen3-MoE, each expert has blocks of its own.
    In a state_dict it has the parameter's own name, and the names of its constants behind it, as bitsandbytes'
    `nn.parametrize` has.

    Raises TypeError unless weight is a QuantizedTensor, ValueError unless it has three dimensions.
    """

    def __init__(self, weight: QuantizedTensor):
        if not isinstance(weight, QuantizedTensor):
            raise TypeError(f"weight must be a QuantizedTensor; got {type(weight).__name__}")
        if len(weight.shape) != 3:
            raise ValueError(f"experts have shape (n_experts, rows, columns); got {tuple(weight.shape)}")
        super().__init__(weight)
        self.shape = torch.Size(weight.shape)  # an attribute, which torch.compile can ask for

    @staticmethod
    def put(module: nn.Module, name: str, experts: "Experts4bit") -> None:
        """Put experts in the place of a parameter of `module`."""
        del module._parameters[name]
        module.add_module(name, experts)
        module.register_load_state_dict_pre_hook(_hand_down)

    def __getitem__(self, index) -> Tensor:
        """One expert decoded where index is an integer; else the same part of all of them, decoded."""
        is_one = (isinstance(index, int) and not isinstance(index, bool)) or (
            isinstance(index, Tensor) and index.dim() == 0 and index.dtype != torch.bool
        )
        if is_one and -len(self) <= (index := int(index)) < len(self):
            return torch.ops.nf4lab.expert(self.stored(), index % len(self), self.layout, self.dtype)
        return self.weight[index]

    def __len__(self) -> int:
        return self.shape[0]

    def __getattr__(self, name: str):
        """What a module lacks and a tensor has, such as `transpose`, is the decoded tensor's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or not hasattr(Tensor, name):
                raise
        if name == "device":
            return self.packed.device
        return getattr(self.weight, name)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        """A function of torch gets the decoded tensor."""
        decoded = [a.weight if isinstance(a, Experts4bit) else a for a in args]
        named = {k: a.weight if isinstance(a, Experts4bit) else a for k, a in (kwargs or {}).items()}
        return function(*decoded, **named)

    def _key(self, prefix: str) -> str:
        """As bitsandbytes: the packed bytes have the parameter's own name."""
        return prefix.removesuffix(".")

    def _load_from_state_dict(self, state_dict, prefix, *others):
        if f"{prefix}weight" in state_dict:
            state_dict[self._key(prefix)] = state_dict.pop(f"{prefix}weight")
        super()._load_from_state_dict(state_dict, prefix, *others)

    def extra_repr(self) -> str:
        """What repr shows between the brackets."""
        q = self.quantized
        return f"{tuple(q.shape)}, {q.format.name}, block_size={q.block_size}, bits_per_weight={q.bits_per_weight:.4f}"


def _hand_down(module: nn.Module, state_dict: dict, prefix: str, *others) -> None:
    """Before a module loads: its experts' packed bytes, whose key is a parameter's, get one that torch hands down."""
    for name, child in module._modules.items():
        if isinstance(child, Experts4bit) and prefix + name in state_dict:
            state_dict[f"{prefix}{name}.weight"] = state_dict.pop(prefix + name)
