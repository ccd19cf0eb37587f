"""Machine code of a kernel for any GPU, on a machine that has none: for tests and for reading.

Needs the NVVM, NVRTC and nvJitLink wheels of CUDA (`nvidia-nvvm nvidia-cuda-nvrtc nvidia-nvjitlink`), no driver.
"""

import contextlib
from types import SimpleNamespace
from unittest import mock

from numba.cuda import codegen, dispatcher


@contextlib.contextmanager
def pretend_gpu(capability):
    """While it lasts, numba-cuda believes that a GPU of compute capability (major, minor) is there.

    numba-cuda asks the current device even where the target was given: for device functions and overloads.
    """
    device = SimpleNamespace(compute_capability=capability)
    context = SimpleNamespace(device=device)
    with (
        mock.patch.object(dispatcher, "get_current_device", return_value=device),
        mock.patch.object(codegen.devices, "get_context", return_value=context),
    ):
        yield


def assemble(kernel, signature, capability, max_registers=None):
    """(PTX, cubin) of `kernel` for the argument types `signature`, linked with link-time optimisation.

    The linker also checks the inline PTX, which the compiler passes on unread.
    """
    with pretend_gpu(capability):
        compiled = dispatcher._Kernel(kernel.py_func, signature, lto=True, max_registers=max_registers)
        library = compiled._codelibrary
        target = (*capability, "a" if capability >= (9, 0) else "")  # as numba-cuda does on the GPU itself
        cubin = library.get_cubin(cc=target)
        return library.get_lto_ptx(cc=target), getattr(cubin, "code", cubin)
