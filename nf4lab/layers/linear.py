"""A linear layer whose weight stays in 4 bits: dequantized on the fly, forward and again backward."""

import torch
from torch import Tensor, nn

from nf4lab.blockwise import DTYPES, QuantizedTensor, quantize
from nf4lab.formats import Format
from nf4lab.formats.double_quant import DoubleQuant
from nf4lab.layers.ops import autocast_dtype, linear
from nf4lab.layers.stored import Stored4bit


class Linear4bit(Stored4bit):
    """y = x W_hat^T + bias with W_hat in 4 bits; the counterpart of torch.nn.Linear and of bitsandbytes' Linear4bit.

    weight: a QuantizedTensor of shape (out_features, in_features), in any format; its tensors become buffers, and
    move with the module. `.to(dtype)` leaves them as they are, and changes what `weight` decodes to.
    bias: (out_features,), or None. compute_dtype: the dtype that W_hat, x and bias are multiplied in; by default x's.
    The result has x's dtype. Under autocast, autocast's dtype stands for x's in both.

    On an NVIDIA GPU a few rows of x (`nf4lab.kernels.cuda.crossover` says how many, at most 128) take the fused kernel
    `nf4lab.kernels.cuda.gemv` where it serves format and dtype; everything else dequantizes, multiplies and forgets.
    The gradient of x is grad @ W_hat, exactly; the weight is frozen and has none.

    was_conv1d: whether it stands for a Conv1D of transformers, which stores its weight transposed.

    Raises TypeError unless weight is a QuantizedTensor, ValueError where it is not a matrix or bias does not fit.
    """

    was_conv1d = False

    def __init__(self, weight: QuantizedTensor, bias: Tensor | None = None, compute_dtype: torch.dtype | None = None):
        _check_parts(weight, bias, compute_dtype)
        super().__init__(weight)
        self.out_features, self.in_features = weight.shape
        self.compute_dtype = compute_dtype
        bias = nn.Parameter(bias) if bias is not None and not isinstance(bias, nn.Parameter) else bias
        self.register_parameter("bias", bias)

    @classmethod
    def from_linear(
        cls,
        layer: nn.Linear,
        format: str | Format = "nf4",
        block_size: int | None = None,
        double_quant: bool | str | DoubleQuant = False,
        compute_dtype: torch.dtype | None = None,
    ) -> "Linear4bit":
        """A layer that does what `layer` does with its weight quantized; `layer` itself stays as it is.

        The bias is shared, not copied. format, block_size, double_quant: as for `nf4lab.quantize`, with its errors and
        its default block size.

        Raises TypeError unless layer is a torch.nn.Linear and computes as one, ValueError where it has no data yet.
        """
        if not isinstance(layer, nn.Linear) or type(layer).forward is not nn.Linear.forward:
            raise TypeError(f"layer must be a torch.nn.Linear; got {type(layer).__name__}")
        if layer.weight.is_meta:
            raise ValueError(f"layer is on the meta device: its {tuple(layer.weight.shape)} weight has no values")
        weight = quantize(layer.weight, format, block_size, double_quant)
        return cls(weight, layer.bias, compute_dtype).train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        """x (…, in_features) to (…, out_features). Raises ValueError where the last dimension is another."""
        if not x.dim() or x.size(-1) != self.in_features:
            raise ValueError(f"x must have {self.in_features} features in its last dimension; got {tuple(x.shape)}")
        outside = autocast_dtype(x) or x.dtype
        dtype, parameters = self.compute_dtype or outside, self._parameters
        bias = parameters["bias"] if "bias" in parameters else self.bias  # noqa: SIM401 - the attribute is slow
        x = x if x.dtype is dtype else x.to(dtype)
        bias = bias if bias is None or bias.dtype is dtype else bias.to(dtype)
        y = linear(x, self.stored(), bias, self.layout)
        return y if dtype is outside else y.to(outside)

    def to_linear(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """A torch.nn.Linear with W_hat and a copy of the bias in `dtype` (default: the layer's)."""
        dtype = dtype or self.dtype
        return self.with_weight(torch.ops.nf4lab.dequantize_stored(self.stored(), self.layout, dtype))

    def with_weight(self, weight: Tensor) -> nn.Linear:
        """A torch.nn.Linear with this weight, and a copy of the bias in its dtype."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, "meta", weight.dtype)
        linear.weight = nn.Parameter(weight)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().to(weight.dtype, copy=True))
        return linear.train(self.training)

    def extra_repr(self) -> str:
        """What repr shows between the brackets."""
        q = self.quantized
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{q.format.name}, block_size={q.block_size}, bits_per_weight={q.bits_per_weight:.4f}"
        )


def _check_parts(weight: QuantizedTensor, bias: Tensor | None, compute_dtype: torch.dtype | None) -> None:
    if not isinstance(weight, QuantizedTensor):
        raise TypeError(f"weight must be a QuantizedTensor; got {type(weight).__name__}")
    if len(weight.shape) != 2:
        raise ValueError(f"weight must have shape (out_features, in_features); got {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape ({weight.shape[0]},); got {tuple(bias.shape)}")
    if compute_dtype not in (None, *DTYPES):
        raise TypeError(f"compute_dtype must be float32, float16, bfloat16 or float64; got {compute_dtype}")
