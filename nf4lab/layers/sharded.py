"""4-bit layers for FSDP2: packed bytes as parameters, which `torch.distributed.fsdp.fully_shard` cuts and gathers."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from nf4lab.blockwise import QuantizedTensor
from nf4lab.layers.embedding import Embedding4bit
from nf4lab.layers.experts import Experts4bit
from nf4lab.layers.layout import rebuilt
from nf4lab.layers.linear import Linear4bit
from nf4lab.layers.stored import Stored4bit
from nf4lab.layers.swap import check_not_offloaded

STORAGES = (torch.uint8, torch.float32)  # of which torch.distributed copies every byte as it is


def shardable_(model: nn.Module, quant_storage: torch.dtype = torch.uint8) -> int:
    """Make the packed bytes of every 4-bit layer of `model` a frozen parameter; returns how many layers.

    `fully_shard` cuts parameters and leaves buffers whole on each process: after this it cuts the packed bytes. The
    constants, half a bit per weight or an eighth, stay whole. Call it once, before `fully_shard`; a state_dict has the
    same keys and the same uint8 as before, and can be loaded: each process takes its part of what is whole.

    quant_storage: the dtype that the parameter's bytes pass under, as bitsandbytes calls it: uint8, or float32 for
    torch before 2.12, which cuts floating dtypes only (its issue 177844). There mixed precision would cast float32,
    and a layer then refuses to run; before 2.8, every other parameter must be float32 too (its issue 154082). Narrower
    floating dtypes are refused: torch's copies between GPUs make all their NaNs one, and bytes that look like NaNs are
    lost (its issue 159333).

    Raises ValueError where there is no 4-bit layer, none left to change, or one that accelerate has offloaded or whose
    bytes are no whole number of quant_storage; where the model is cut already, where this torch could not cut it, or
    where quant_storage is another dtype.
    """
    if quant_storage not in STORAGES:
        raise ValueError(
            f"quant_storage must be uint8 or float32: bytes under {quant_storage} do not survive the copies"
        )
    if quant_storage == torch.uint8 and torch.__version__ < "2.12":
        raise ValueError(f"fully_shard of torch {torch.__version__} cuts no uint8: quant_storage must be float32")
    layers = {name: layer for name, layer in model.named_modules() if type(layer) in SHARDABLE}
    if not layers:
        done = any(isinstance(layer, _PackedParameter) for layer in model.modules())
        raise ValueError("model's layers can be sharded already" if done else
                         "model has no 4-bit layers: quantize it first")  # fmt: skip
    if any(hasattr(parameter, "to_local") for parameter in model.parameters()):
        raise ValueError("fully_shard has cut this model already: it cuts what is a parameter when it is called")
    for name, layer in layers.items():
        check_not_offloaded(layer, name, layer.quantized.shape)
        if layer.packed.nbytes % quant_storage.itemsize:
            raise ValueError(f"{name}: {layer.packed.nbytes} bytes are no whole number of {quant_storage}")
    for layer in layers.values():
        packed = layer._buffers.pop("packed")
        layer._non_persistent_buffers_set.discard("packed")
        layer.__class__, layer.quant_storage = SHARDABLE[type(layer)], quant_storage
        layer.register_parameter("packed", nn.Parameter(packed.view(quant_storage), requires_grad=False))
    return len(layers)


class _PackedParameter(Stored4bit):
    """What a layer does whose packed bytes are a parameter."""

    def stored(self) -> list[Tensor]:
        """As for every 4-bit layer: packed bytes first. Raises RuntimeError where they lie on several processes."""
        parts = self._parts()
        if hasattr(parts[0], "to_local"):
            raise RuntimeError("the weight of a 4-bit layer lies on several processes: fully_shard gathers it for the "
                               "forward pass of a module that it was called on, and nowhere else")  # fmt: skip
        return parts

    @property
    def quantized(self) -> QuantizedTensor:
        """The weight as it is stored, on several processes too."""
        return replace(rebuilt(self._parts(), self.layout, self.dtype), format=self.format)

    def _parts(self) -> list[Tensor]:
        """What is stored, wherever. Raises RuntimeError where somebody has cast the packed bytes."""
        packed = self._parameters["packed"]
        if packed.dtype != self.quant_storage:
            raise RuntimeError(f"packed bytes kept as {self.quant_storage} were cast to {packed.dtype}, and are lost: "
                               "a mixed-precision policy wants uint8")  # fmt: skip
        return [_viewed(packed, torch.uint8), *(self._buffers[name] for name in self.stored_names[1:])]

    def _apply(self, fn, recurse=True):
        """As for every 4-bit layer: packed bytes are moved as bytes, whatever they pass under."""
        packed = self._parameters["packed"]

        def moved(tensor: Tensor) -> Tensor:
            return _viewed(fn(_viewed(tensor, torch.uint8)), self.quant_storage) if tensor is packed else fn(tensor)

        return super()._apply(moved, recurse)

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

        packed, tensor = self._parameters["packed"], _viewed(tensor, self.quant_storage)
        if isinstance(packed, DTensor) and not isinstance(tensor, DTensor):
            tensor = distribute_tensor(tensor, packed.device_mesh, packed.placements, src_data_rank=None)
        if assign:
            self._parameters["packed"] = nn.Parameter(tensor, requires_grad=False)
        else:
            packed.copy_(tensor)


def _viewed(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The same bytes (n,) under another dtype, of a whole tensor or of one that processes have parts of."""
    if tensor.dtype == dtype or not hasattr(tensor, "to_local"):
        return tensor.view(dtype)
    from torch.distributed.tensor import DTensor, distribute_tensor

    n_bytes, where = tensor.numel() * tensor.dtype.itemsize, (tensor.device_mesh, tensor.placements)
    if n_bytes % (tensor.device_mesh.size() * max(tensor.dtype.itemsize, dtype.itemsize)):  # they are cut elsewhere
        return distribute_tensor(tensor.full_tensor().view(dtype), *where, src_data_rank=None)
    local, shape = tensor.to_local().view(dtype), (n_bytes // dtype.itemsize,)
    return DTensor.from_local(local, *where, run_check=False, shape=shape, stride=(1,))


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
