"""From a kernel and its tensors to the GPU: compile once, then launch on torch's current stream.

numba's own launch looks at every argument anew; these get plain addresses.
In numba's simulator (NUMBA_ENABLE_CUDASIM=1) the same call runs the kernel on CPU tensors.
"""

import ctypes
import functools
import os
import struct
import threading

import torch

os.environ.setdefault("NUMBA_CUDA_LOW_OCCUPANCY_WARNINGS", "0")

from numba import config, cuda, types

SIMULATOR = bool(config.ENABLE_CUDASIM)
# A torch built without CUDA has neither.
current_device = getattr(torch._C, "_cuda_getDevice", None)
current_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)
TYPES = {
    torch.uint8: types.uint8,
    torch.int32: types.int32,
    torch.int64: types.uint64,  # a table whose entries are bit fields
    torch.float32: types.float32,
    torch.float16: types.float16,
    torch.bfloat16: types.uint16,  # its bits: numba has no bfloat16 that works everywhere
}


@functools.cache
def available():
    """None where the kernels can run, else one sentence: what is missing and what to do about it."""
    if SIMULATOR:
        return None
    if not torch.cuda.is_available():
        build = "" if torch.version.cuda else " (this torch was built without CUDA: install a CUDA build)"
        return f"torch finds no CUDA GPU{build}: use the CPU kernels, or NUMBA_ENABLE_CUDASIM=1 to simulate one"
    try:
        from cuda.bindings import driver  # noqa: F401
    except ImportError:
        return "the module cuda.bindings is missing: pip install 'numba-cuda[cu13]' (cu12 for a CUDA 12 driver)"
    if not cuda.is_available():
        return "numba.cuda finds no usable driver or NVVM: pip install 'numba-cuda[cu13]' (cu12 for a CUDA 12 driver)"
    return None


def refuse(*args):
    """What the ops do with CPU tensors: RuntimeError, in one sentence."""
    reason = available() or "the tensors are on the CPU: move them to the GPU, or call the CPU kernels"
    raise RuntimeError(f"CUDA kernels cannot run: {reason}")


def signature(args):
    """numba types of a kernel's arguments: a pointer for each tensor, int64 for each number.

    None stands for an int32 flag that the kernel is told not to touch: a null pointer.
    """
    kinds = [torch.int32 if a is None else getattr(a, "dtype", None) for a in args]
    return tuple(types.int64 if kind is None else types.CPointer(TYPES[kind]) for kind in kinds)


class Slots(threading.local):
    """8 bytes for each argument of a kernel, an address or an int64, as the driver reads them: each thread's own.

    So are the configurations, by (grid, threads, shared_bytes), of kernels that are launched early.
    """

    def __init__(self, count):
        self.values = (ctypes.c_int64 * count)()
        start = ctypes.addressof(self.values)
        self.pointers = (ctypes.c_void_p * count)(*range(start, start + 8 * count, 8))
        self.address = ctypes.addressof(self.pointers)
        self.configurations = {}


def early_launch(driver, grid, threads, shared_bytes):
    """The configuration of a launch that need not wait for the kernel before it: programmatic dependent launch."""
    early = driver.CUlaunchAttribute()
    early.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    early.value.programmaticStreamSerializationAllowed = 1
    configuration = driver.CUlaunchConfig()
    configuration.gridDimX, configuration.gridDimY, configuration.gridDimZ = grid, 1, 1
    configuration.blockDimX, configuration.blockDimY, configuration.blockDimZ = threads, 1, 1
    configuration.sharedMemBytes = shared_bytes
    configuration.attrs, configuration.numAttrs = [early], 1
    return configuration


class Loaded:
    """A compiled kernel in one device's memory; call it with (grid, threads, shared_bytes, args).

    A kernel that waits for the one before it by itself (`kernel_before_done`) is launched early, where the GPU can.
    """

    def __init__(self, kernel, args, device, max_registers):
        from cuda.bindings import driver

        self.driver, self.device = driver, device
        with torch.cuda.device(device):
            torch.cuda.current_stream().synchronize()  # makes torch's context current in this thread
            self.context = check(driver.cuCtxGetCurrent(), driver)
            # one compilation a device: GPUs may differ in one machine
            fresh = cuda.jit(kernel.py_func, max_registers=max_registers)
            fresh.compile(signature(args))
            self.library = next(iter(fresh.overloads.values()))._codelibrary
            self.function = self.function_of(self.library.get_cufunc().handle)
            waits = "kernel_before_done" in kernel.py_func.__code__.co_names
            self.early = waits and torch.cuda.get_device_capability(device) >= (9, 0)
        self.slots, self.pack = Slots(len(args)), struct.Struct(f"{len(args)}q").pack_into

    def function_of(self, handle):
        """The CUfunction: numba-cuda hands out a CUkernel on some versions, which the driver converts."""
        driver = self.driver
        if isinstance(handle, driver.CUkernel):
            return check(driver.cuKernelGetFunction(handle), driver)
        return driver.CUfunction(int(handle))

    def allow_all_shared_memory(self):
        """A kernel gets more than 48 KB of shared memory only after asking."""
        attribute = self.driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        limit = torch.cuda.get_device_properties(self.device).shared_memory_per_block_optin
        check(self.driver.cuFuncSetAttribute(self.function, attribute, limit), self.driver)

    def __call__(self, grid, threads, shared_bytes, args):
        numbers = [a if type(a) is int else 0 if a is None else a.data_ptr() for a in args]
        self.start(grid, threads, shared_bytes, numbers)

    def start(self, grid, threads, shared_bytes, numbers):
        """The same with an address or an int for each argument: what a call made ready has at hand."""
        if current_device() != self.device:
            with torch.cuda.device(self.device):
                return self.start(grid, threads, shared_bytes, numbers)
        self.pack(self.slots.values, 0, *numbers)
        shape = grid, threads, shared_bytes
        error = self.submit(shape)
        if error == self.driver.CUresult.CUDA_ERROR_INVALID_CONTEXT:  # this thread's first use of CUDA
            check(self.driver.cuCtxSetCurrent(self.context), self.driver)
            error = self.submit(shape)
        if error:
            check((error,), self.driver)
        return None

    def submit(self, shape):
        """Launch with this thread's arguments, on torch's current stream; the driver's answer."""
        driver, slots, stream = self.driver, self.slots, current_stream(self.device)
        if not self.early:
            grid, threads, shared_bytes = shape
            how = grid, 1, 1, threads, 1, 1, shared_bytes, stream
            return driver.cuLaunchKernel(self.function, *how, slots.address, 0)[0]
        configuration = slots.configurations.get(shape)
        if configuration is None:
            configuration = slots.configurations[shape] = early_launch(driver, *shape)
        configuration.hStream = stream
        return driver.cuLaunchKernelEx(configuration, self.function, slots.address, 0)[0]


def check(result, driver):
    """The value of a driver call, or RuntimeError with the driver's own name for what went wrong."""
    error, *values = result
    if error:
        raise RuntimeError(f"CUDA driver: {driver.cuGetErrorString(error)[1].decode()}")
    return values[0] if values else None


loaded_kernels = {}
_compiling = threading.Lock()


def load(kernel, args, device, key, shared_bytes, max_registers):
    """Compile and load a kernel that this device has not seen with these types."""
    with _compiling:
        if key not in loaded_kernels:
            loaded = Loaded(kernel, args, device, max_registers)
            if shared_bytes:
                loaded.allow_all_shared_memory()
            loaded_kernels[key] = loaded
    return loaded_kernels[key]


def launch(kernel, grid, threads, args, *, dtype, shared_bytes=0, max_registers=None):
    """Run `kernel` on args (tensors of one GPU, ints, or None for no flag) on torch's current stream.

    dtype is that of the arguments which may vary from call to call. The first call with a new one compiles (seconds),
    so make it before capturing a CUDA graph. Nothing is checked here.
    """
    if SIMULATOR:
        simulate(kernel, grid, threads, args, shared_bytes)
        return
    device = args[0].get_device()
    key = (kernel, device, dtype)
    loaded = loaded_kernels.get(key) or load(kernel, args, device, key, shared_bytes, max_registers)
    loaded(grid, threads, shared_bytes, args)


def simulate(kernel, grid, threads, args, shared_bytes):
    """The same launch in numba's simulator: arrays that share the tensors' memory."""
    arrays = [a if type(a) is int else as_array(torch.zeros(1) if a is None else a) for a in args]
    kernel[grid, threads, 0, shared_bytes](*arrays)


def as_array(tensor):
    flat = tensor.detach().reshape(-1)
    return (flat.view(torch.uint16) if tensor.dtype == torch.bfloat16 else flat).numpy()
