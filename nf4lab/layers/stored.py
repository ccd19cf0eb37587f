"""What every 4-bit layer shares: a weight in buffers, moved with the module, saved under bitsandbytes' keys."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from nf4lab.blockwise import QuantizedTensor
from nf4lab.checkpoints.keys import from_parts, parts_of
from nf4lab.layers.ops import layout_of, layouts, rebuilt, tensors_of


class Stored4bit(nn.Module):
    """A module whose weight is a QuantizedTensor, in any format.

    weight: its tensors become buffers, and move with the module. `.to(dtype)` leaves them as they are, and changes
    what `weight` decodes to.
    """

    def __init__(self, weight: QuantizedTensor):
        super().__init__()
        self.dtype = weight.dtype
        self.layout, self.stored_names = layout_of(weight), tuple(tensors_of(weight))
        for name, tensor in tensors_of(weight).items():
            self.register_buffer(name, tensor, persistent=False)  # state_dict has them under bitsandbytes' keys

    def stored(self) -> list[Tensor]:
        """The buffers that hold the weight, in the order that the ops take them."""
        return [self._buffers[name] for name in self.stored_names]

    @property
    def quantized(self) -> QuantizedTensor:
        """The weight as it is stored. It shares the layer's memory."""
        return replace(rebuilt(self.stored(), self.layout), dtype=self.dtype)

    @property
    def weight(self) -> Tensor:
        """The weight dequantized, (out_features, in_features): made at every access, for code that reads a weight."""
        return torch.ops.nf4lab.dequantize_stored(self.stored(), self.layout, self.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes that the weight takes."""
        return self.quantized.nbytes

    def _apply(self, fn, recurse=True):
        """Move the stored tensors with the module, but keep their dtypes: absmax in float16 would be another weight."""
        before = {name: self._buffers[name] for name in self.stored_names}
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.packed.device)).dtype
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            if self._buffers[name].dtype != tensor.dtype:
                self._buffers[name] = tensor.to(self._buffers[name].device)
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        """The weight under the keys of bitsandbytes: `weight`, `weight.absmax` and so on."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update(parts_of(prefix + "weight", self.quantized))

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, error_msgs):
        name = prefix + "weight"
        parts = {key: state_dict.pop(key) for key in list(state_dict) if key == name or key.startswith(f"{name}.")}
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, error_msgs)
        if name not in parts:
            missing_keys += [name] * strict
            return
        try:
            self._load(from_parts(name, parts), metadata.get("assign_to_params_buffers", False))
        except (ValueError, TypeError) as error:
            error_msgs.append(f"{name}: {error}")

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
            self._buffers[name] = tensor if assign else self._buffers[name].copy_(tensor)

    def __getstate__(self) -> dict:
        """For copies in other processes: the layout itself, since its name holds only here."""
        return self.__dict__ | {"layout": layouts[self.layout]}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state | {"layout": layout_of(state["layout"])})
