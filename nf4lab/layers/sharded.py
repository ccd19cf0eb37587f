"""4-bit layers for FSDP2: packed bytes as parameters, which `torch.distributed.fsdp.fully_shard` cuts and gathers."""

from torch import Tensor, nn

from nf4lab.layers.embedding import Embedding4bit
from nf4lab.layers.experts import Experts4bit
from nf4lab.layers.linear import Linear4bit
from nf4lab.layers.stored import Stored4bit


def shardable_(model: nn.Module) -> int:
    """Make the packed bytes of every 4-bit layer of `model` a frozen parameter of uint8; returns how many layers.

    `fully_shard` cuts parameters and leaves buffers whole on each process: after this it cuts the packed bytes. The
    constants, half a bit per weight or an eighth, stay whole. Call it once, before `fully_shard`; a state_dict has the
    same keys as before, and can be loaded: each process takes its part of what is whole.

    Raises ValueError where there is no 4-bit layer.
    """
    layers = [layer for layer in model.modules() if type(layer) in SHARDABLE]
    if not layers:
        raise ValueError("model has no 4-bit layers: quantize it first")
    for layer in layers:
        packed = layer._buffers.pop("packed")
        layer._non_persistent_buffers_set.discard("packed")
        layer.__class__ = SHARDABLE[type(layer)]
        layer.register_parameter("packed", nn.Parameter(packed, requires_grad=False))
    return len(layers)


class _PackedParameter(Stored4bit):
    """What a layer does whose packed bytes are a parameter."""

    def stored(self) -> list[Tensor]:
        """As for every 4-bit layer: packed bytes first."""
        return [self._parameters["packed"], *(self._buffers[name] for name in self.stored_names[1:])]

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[f"{prefix}packed"]  # it is there as the weight

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, error_msgs):
        own = state_dict.pop(
            f"{prefix}packed", None
        )  # torch.distributed.checkpoint adds the parameters to what it loads
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, error_msgs)
        missing_keys[:] = [key for key in missing_keys if key != f"{prefix}packed"]  # it is there as the weight
        if own is not None:
            state_dict[f"{prefix}packed"] = own

    def _take(self, name: str, tensor: Tensor, assign: bool) -> None:
        """As for every 4-bit layer; of packed bytes the values, and where processes have parts of them, its part."""
        if name != "packed":
            super()._take(name, tensor, assign)
            return
        from torch.distributed.tensor import DTensor, distribute_tensor  # they load sympy, which takes long

        packed = self._parameters["packed"]
        if isinstance(packed, DTensor) and not isinstance(tensor, DTensor):
            tensor = distribute_tensor(tensor, packed.device_mesh, packed.placements, src_data_rank=None)
        packed.copy_(tensor)


class ShardableLinear4bit(_PackedParameter, Linear4bit):
    """A Linear4bit whose packed bytes are a parameter."""


class ShardableExperts4bit(_PackedParameter, Experts4bit):
    """Experts4bit whose packed bytes are a parameter."""


class ShardableEmbedding4bit(_PackedParameter, Embedding4bit):
    """Embedding4bit whose packed bytes are a parameter."""


SHARDABLE = {
    Linear4bit: ShardableLinear4bit,
    Experts4bit: ShardableExperts4bit,
    Embedding4bit: ShardableEmbedding4bit,
}
