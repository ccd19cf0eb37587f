"""Which backend does the work: the torch reference, the numba kernels on the CPU, or those on a GPU.

All give the same bytes. Kernels are imported when first used: importing nf4lab compiles nothing and does not load
numba.
"""

import torch

from nf4lab.backends import cpu, cuda
from nf4lab.formats.format import Format

BACKENDS = ("torch", "cpu", "cuda")
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# The kernels win at every size once they are loaded (benchmarks/cpu.py). Below this many elements the reference takes
# about a millisecond, and is not worth the second that importing numba takes, or a first compilation.
CPU_FROM = 2**16


def choose(backend: str | None, device: torch.device, dtype: torch.dtype, n: int, format: Format) -> str:
    """The backend asked for, or for None the fastest that serves n elements of that dtype and format on that device.

    Raises ValueError for an unknown backend or one that does not take this device, dtype or format, RuntimeError for
    one that cannot run here.
    """
    if backend is None:
        return _fastest(device, dtype, n, format)
    if backend not in BACKENDS:
        raise ValueError(f"backend must be None, 'torch', 'cpu' or 'cuda'; got {backend!r}")
    if backend == "torch":
        return backend
    if device.type != backend:
        raise ValueError(f"backend {backend!r} takes tensors on {backend}; got one on {device}")
    if dtype not in KERNEL_DTYPES:
        raise ValueError(f"backend {backend!r} takes float32, float16 and bfloat16; got {dtype}")
    if backend == "cpu" and not cpu.takes(format):
        raise ValueError(f"backend 'cpu' takes codes of up to 4 bits; those of {format.name!r} have {format.code_bits}")
    if backend == "cuda" and format.code_bits != 4:
        raise ValueError(f"backend 'cuda' takes codes of 4 bits; those of {format.name!r} have {format.code_bits}")
    if backend == "cuda" and not cuda.takes(format):
        raise ValueError(f"backend 'cuda' takes formats scaled by a float32 absmax; got {format.name!r}")
    if backend == "cuda" and (missing := cuda.missing()):
        raise RuntimeError(f"backend 'cuda' cannot run: {missing}")
    return backend


def _fastest(device: torch.device, dtype: torch.dtype, n: int, format: Format) -> str:
    if dtype not in KERNEL_DTYPES or torch.compiler.is_compiling():  # torch.compile sees into the reference only
        return "torch"
    if device.type == "cpu" and n >= CPU_FROM and cpu.takes(format):
        return "cpu"
    return "cuda" if device.type == "cuda" and cuda.takes(format) and not cuda.missing() else "torch"
