"""Who does the work: the torch reference, the numba kernels on the CPU, or those on a GPU. All give the same bytes.

reference   plain torch, on any device, and when a kernel takes its place
cpu         what the kernels for the CPU take, made of tensors and formats
cuda        the same for those of a GPU
feedback    the reference with error feedback along each row of a matrix

A backend is two functions, with the signatures of `reference.quantize` and `reference.dequantize`, and an entry in the
two tables here. They take and give the parts of a QuantizedTensor and know no such thing.
"""

from nf4lab.backends import cpu, cuda, reference
from nf4lab.backends.cpu import empty
from nf4lab.backends.reference import CPU_FROM, choose

QUANTIZE = {"torch": reference.quantize, "cpu": cpu.quantize, "cuda": cuda.quantize}
DEQUANTIZE = {"torch": reference.dequantize, "cpu": cpu.dequantize, "cuda": cuda.dequantize}
ENCODE_CONSTANTS = {"cpu": cpu.encode_constants}  # for double quantization, what is faster than torch

__all__ = ["CPU_FROM", "DEQUANTIZE", "ENCODE_CONSTANTS", "QUANTIZE", "choose", "empty", "prepare"]


def prepare(packed, stored_scale, stored_location, tensor_scale, format, shape, block_size, dtype):
    """(gemv, fill): what multiplies by this matrix (n, k) and what writes it out, both ready to be called often.

    gemv(x, bias, out, rows) serves 1 to gemv.rows rows of contiguous x; fill(out) takes a contiguous out. Both are of
    dtype, on packed's device, and hold addresses: the tensors must stay alive, and where they are. None where the
    backend has nothing that it can make ready: the CPU has no gemv.
    """
    chosen = choose(None, packed.device, dtype, shape[0] * shape[1], format)
    if chosen == "cuda":
        return cuda.prepare(packed, stored_scale, format, shape, block_size, dtype)
    if chosen == "cpu" and tensor_scale is None:
        return None, cpu.prepare(packed, stored_scale, stored_location, format, block_size, dtype)
    return None, None
