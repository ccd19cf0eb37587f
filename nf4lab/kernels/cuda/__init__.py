"""4-bit kernels for NVIDIA GPUs, written in Python with numba.cuda. They take tensors and know no formats.

    dequantize   codes and absmax to float32, float16 or bfloat16, double-quantized constants in the same launch
    quantize     values to codes and absmax, in one pass, by a codebook's boundaries
    codebook     those boundaries, made ready once
    gemv         a few rows of activations times a packed weight, which is never written out
    prepare_…    gemv and dequantize for one weight, with all that can be done once done
    available    None, or in one sentence why they cannot run here

Importing works on any machine and compiles nothing.
"""

from .launch import available
from .ops import Codebook, codebook, dequantize, gemv, quantize
from .prepared import prepare_dequantize, prepare_gemv

__all__ = [
    "Codebook",
    "available",
    "codebook",
    "dequantize",
    "gemv",
    "prepare_dequantize",
    "prepare_gemv",
    "quantize",
]
