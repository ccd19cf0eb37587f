"""A table of embeddings that stays in 4 bits: only the blocks around what is looked up are decoded."""

import torch
from torch import Tensor, nn

from nf4lab.blockwise import QuantizedTensor, quantize
from nf4lab.formats import Format
from nf4lab.formats.double_quant import DoubleQuant
from nf4lab.layers.ops import lookup
from nf4lab.layers.stored import Stored4bit


class Embedding4bit(Stored4bit):
    """Row ids[…] of a quantized table, decoded; the counterpart of torch.nn.Embedding with a frozen weight.

    weight: a QuantizedTensor of shape (num_embeddings, embedding_dim), in any format. padding_idx: kept, for code that
    asks; the table is frozen, so that it changes nothing. The rows come in the dtype of the weight.

    Where embedding_dim is a multiple of the block size, the blocks that are decoded hold the row and nothing else;
    elsewhere they are as many as a row of that length can lie in.

    Raises TypeError unless weight is a QuantizedTensor, ValueError where it is not a matrix.
    """

    def __init__(self, weight: QuantizedTensor, padding_idx: int | None = None):
        if not isinstance(weight, QuantizedTensor):
            raise TypeError(f"weight must be a QuantizedTensor; got {type(weight).__name__}")
        if len(weight.shape) != 2:
            raise ValueError(f"weight must have shape (num_embeddings, embedding_dim); got {tuple(weight.shape)}")
        super().__init__(weight)
        self.num_embeddings, self.embedding_dim = weight.shape
        self.padding_idx = padding_idx

    @classmethod
    def from_embedding(
        cls,
        table: nn.Embedding,
        format: str | Format = "nf4",
        block_size: int | None = None,
        double_quant: bool | str | DoubleQuant = False,
    ) -> "Embedding4bit":
        """A table that gives what `table` does with its weight quantized; `table` itself stays as it is.

        Raises TypeError unless table is a torch.nn.Embedding and looks up as one, ValueError where it has no data yet,
        or a max_norm, for which rows would have to change as they are looked up; otherwise as `nf4lab.quantize`.
        """
        if not isinstance(table, nn.Embedding) or type(table).forward is not nn.Embedding.forward:
            raise TypeError(f"table must be a torch.nn.Embedding; got {type(table).__name__}")
        if table.weight.is_meta:
            raise ValueError(f"table is on the meta device: its {tuple(table.weight.shape)} weight has no values")
        if table.max_norm is not None:
            raise ValueError(f"a table in 4 bits is frozen, and cannot keep rows within max_norm={table.max_norm}")
        weight = quantize(table.weight, format, block_size, double_quant)
        return cls(weight, table.padding_idx).train(table.training)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (…), int32 or int64, to rows (…, embedding_dim).

        Raises TypeError for other dtypes; IndexError for an id outside 0..num_embeddings - 1 on a CPU, where a GPU
        reports it later, as torch does.
        """
        if ids.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"ids must be int32 or int64; got {ids.dtype}")
        return lookup(ids, self.stored(), self.layout, self.dtype)

    def to_embedding(self, dtype: torch.dtype | None = None) -> nn.Embedding:
        """A torch.nn.Embedding, frozen, with the decoded table in `dtype` (default: the layer's)."""
        weight = self.quantized.dequantize(dtype or self.dtype)
        return nn.Embedding.from_pretrained(weight, freeze=True, padding_idx=self.padding_idx).train(self.training)

    def extra_repr(self) -> str:
        """What repr shows between the brackets."""
        q = self.quantized
        return (
            f"{self.num_embeddings}, {self.embedding_dim}, {q.format.name}, block_size={q.block_size}, "
            f"bits_per_weight={q.bits_per_weight:.4f}"
        )
