"""PEFT's LoRA on nf4lab's layers, by the way that PEFT documents for layers of one's own.

Import it where PEFT is installed; nothing else in the package needs PEFT.
Source: https://huggingface.co/docs/peft/developer_guides/custom_models
"""

import warnings

import peft
import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.tuners_utils import check_adapters_to_merge

from nf4lab.blockwise import QuantizedTensor, quantize
from nf4lab.formats.double_quant import QuantizedConstants
from nf4lab.layers.linear import Linear4bit


def register(config: peft.LoraConfig) -> peft.LoraConfig:
    """The same configuration, which now puts adapters on Linear4bit too; `target_modules` names the layers.

    Raises TypeError for the configuration of any other adapter: PEFT puts these on no layers of one's own.
    """
    if not isinstance(config, peft.LoraConfig):
        raise TypeError(f"register takes a LoraConfig; got {type(config).__name__}")
    config._register_custom_module({Linear4bit: Lora4bit})
    return config


class Lora4bit(PeftLinear):
    """PEFT's adapters on a Linear4bit. Merging quantizes the sum anew; unmerging brings the old bytes back, exactly.

    Raises ValueError for the variants of LoRA that need the weight in full precision, such as DoRA.
    """

    def __init__(self, base_layer: Linear4bit, adapter_name: str, config: peft.LoraConfig, **kwargs):
        with warnings.catch_warnings():  # PEFT warns of every layer that is not in its own list
            warnings.filterwarnings("ignore", "Unsupported layer type", UserWarning)
            super().__init__(base_layer, adapter_name, config, **kwargs)
        self.fan_in_fan_out = False  # true of transformers' Conv1D: a Linear4bit is never stored transposed

    def resolve_lora_variant(self, *, config: peft.LoraConfig, **kwargs):
        """None: plain LoRA. Raises ValueError for anything else."""
        if super().resolve_lora_variant(config=config, **kwargs) is not None:
            raise ValueError("on nf4lab's Linear4bit PEFT's LoRA is the plain one, without use_dora and its like")

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the active adapters to the weight, in float32, and quantize the sum as the weight was.

        Raises ValueError where the sum is not finite, whatever safe_merge says: 4 bits cannot hold it.
        """
        base = self.get_base_layer()
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.lora_A:
                continue
            if self.lora_bias[name]:
                raise ValueError("an adapter with a bias of its own (lora_bias) can't be merged into a Linear4bit")
            warnings.warn("merging an adapter into 4 bits rounds the sum: outputs may differ a little", stacklevel=2)
            before = base.quantized
            total = before.dequantize(torch.float32) + self.get_delta_weight(name).float()
            self._replaced = [*getattr(self, "_replaced", []), before]
            base._load(_as_before(total, before), assign=True)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Bring back the weight as it was before the adapters were merged: the same bytes."""
        while self.merged_adapters:
            self.merged_adapters.pop()
            self.get_base_layer()._load(self._replaced.pop(), assign=True)


def _as_before(weight: torch.Tensor, before: QuantizedTensor) -> QuantizedTensor:
    """A weight quantized as another one was."""
    constants = before.stored_scale
    scheme = constants.double_quant if isinstance(constants, QuantizedConstants) else False
    return quantize(weight.to(before.dtype), before.format, before.block_size, scheme)
