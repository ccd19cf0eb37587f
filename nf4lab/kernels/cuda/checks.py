"""What the kernels refuse, in sentences that name the numbers. What is right passes at the first condition."""

import torch

BLOCK_SIZES = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
FLOAT32, BYTE, TABLE = (torch.float32,), (torch.uint8,), (torch.int64,)


def expect(name, tensor, dtypes, count, device):
    """ValueError or TypeError unless `tensor` is contiguous, on `device`, of one of `dtypes`, with `count` elements.

    device: the number that get_device() gives, -1 for the CPU.
    """
    if tensor.numel() == count and tensor.dtype in dtypes and tensor.get_device() == device and tensor.is_contiguous():
        return
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} must be {' or '.join(map(str, dtypes))}; got {tensor.dtype}")
    if tensor.numel() != count:
        raise ValueError(f"{name} must have {count} elements; got {tensor.numel()}")
    if tensor.get_device() != device:
        there = "the CPU" if device < 0 else f"cuda:{device}"
        raise ValueError(f"{name} must be on {there} like the rest; got {tensor.device}")
    raise ValueError(f"{name} must be contiguous; got strides {tuple(tensor.stride())}")


def expect_block_size(name, block_size):
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"{name} must be one of {', '.join(map(str, BLOCK_SIZES))}; got {block_size}")


def expect_version(version, versions):
    if version not in versions:
        raise ValueError(f"version must be one of {', '.join(versions)}; got {version!r}")


def expect_nested(nested, n_blocks, device):
    """The same for a double-quantized absmax: (codes, group_absmax, offset, code_map, group_size)."""
    codes, group_absmax, offset, code_map, group_size = nested
    if group_size < 1 or group_size & (group_size - 1):
        raise ValueError(f"group_size must be a power of two; got {group_size}")
    expect("codes", codes, BYTE, n_blocks, device)
    expect("group_absmax", group_absmax, FLOAT32, -(-n_blocks // group_size), device)
    expect("offset", offset, FLOAT32, 1, device)
    expect("code_map", code_map, FLOAT32, 256, device)
