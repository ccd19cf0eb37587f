"""Every CUDA kernel, compiled and linked without a GPU: the machine code keeps what the speed rests on.

Needs the wheels nvidia-nvvm, nvidia-cuda-nvrtc and nvidia-nvjitlink; no driver.
"""

import io
import re
import struct

import pytest

numba = pytest.importorskip("numba")
if numba.config.ENABLE_CUDASIM:
    pytest.skip("the simulator compiles nothing: run without NUMBA_ENABLE_CUDASIM", allow_module_level=True)
pytest.importorskip("numba_cuda", reason="needs numba-cuda")
pytest.importorskip("cuda.bindings.nvjitlink", reason="needs cuda-bindings")

from elftools.elf.elffile import ELFFile
from numba import types

from nf4lab.kernels.cuda import (
    dequantize_kernels,
    feedback_kernels,
    few_rows,
    gemm_kernels,
    gemv_kernels,
    hadamard_kernels,
    quantize_kernels,
    warpgroup_kernels,
)
from nf4lab.kernels.cuda.assemble import assemble

CAPABILITIES = [(7, 5), (8, 0), (9, 0)]
HOPPERS_SHARED_MEMORY = 232448  # bytes that a thread block may have
HALF, BFLOAT, FLOAT, BYTE = (types.CPointer(t) for t in (types.float16, types.uint16, types.float32, types.uint8))
FLAG, CELLS, NUMBER = types.CPointer(types.int32), types.CPointer(types.uint64), types.int64


def dequantize_types(out):
    return BYTE, FLOAT, FLOAT, out, *[NUMBER] * 3


def nested_types(out):
    return BYTE, BYTE, FLOAT, FLOAT, FLOAT, FLOAT, out, *[NUMBER] * 4


def quantize_types(x):
    return x, FLOAT, CELLS, BYTE, FLOAT, FLAG, *[NUMBER] * 5


def gemv_types(x, numbers=7):
    return x, BYTE, FLOAT, BYTE, FLOAT, FLOAT, FLOAT, FLOAT, x, x, *[NUMBER] * numbers


def hadamard_types(x):
    return x, FLOAT, x, *[NUMBER] * 5


def ptx_and_local_bytes(kernel, signature, capability, **options):
    """The linked PTX, and the bytes of local memory a thread needs: spills and arrays that left the registers."""
    ptx, cubin = assemble(kernel, signature, capability, **options)
    return ptx.decode() if isinstance(ptx, bytes) else ptx, frame_bytes(cubin)


def frame_bytes(cubin):
    """Largest stack frame of the functions in a cubin: attribute EIATTR_FRAME_SIZE (0x11) of the section .nv.info."""
    info = ELFFile(io.BytesIO(bytes(cubin))).get_section_by_name(".nv.info").data()
    sizes = [struct.unpack_from("<I", info, m.end() + 4)[0] for m in re.finditer(rb"\x04\x11\x08\x00", info)]
    assert sizes, "no frame size found in the cubin"
    return max(sizes)


def assert_lean(ptx, local_bytes):
    assert ".f64" not in ptx, "a float64 instruction: 1/64 of the speed on a T4"
    assert local_bytes == 0, f"{local_bytes} bytes of local memory a thread"


IN_USE = [
    ("dequantize float16", dequantize_kernels.v4, dequantize_types(HALF), r"st\.global\.v4"),
    ("dequantize bfloat16", dequantize_kernels.v4, dequantize_types(BFLOAT), r"st\.global\.v4"),
    ("dequantize float32", dequantize_kernels.v4, dequantize_types(FLOAT), r"st\.global\.v4"),
    ("nested float16", dequantize_kernels.nested, nested_types(HALF), r"st\.global\.v4"),
    ("quantize float16", quantize_kernels.v5, quantize_types(HALF), r"ld\.global(\.nc)?\.v4"),
    ("quantize float32", quantize_kernels.v5, quantize_types(FLOAT), r"ld\.global(\.nc)?\.v4"),
    ("quantize blocks of 16", quantize_kernels.v4, quantize_types(HALF), r"ld\.global(\.nc)?\.v4"),
    ("gemv float16", gemv_kernels.v2, gemv_types(HALF), r"ld\.global(\.nc)?\.v4"),
]


@pytest.mark.parametrize("capability", CAPABILITIES, ids=lambda c: f"sm_{c[0]}{c[1]}")
@pytest.mark.parametrize(("name", "kernel", "signature", "wide"), IN_USE, ids=[case[0] for case in IN_USE])
def test_kernels_in_use_access_16_bytes_without_float64_or_spills(name, kernel, signature, wide, capability):
    ptx, local_bytes = ptx_and_local_bytes(kernel, signature, capability)
    assert_lean(ptx, local_bytes)
    assert re.search(wide, ptx)


@pytest.mark.parametrize("capability", CAPABILITIES, ids=lambda c: f"sm_{c[0]}{c[1]}")
@pytest.mark.parametrize("x", [HALF, BFLOAT, FLOAT], ids=["float16", "bfloat16", "float32"])
def test_the_hadamard_transform_keeps_eight_values_in_registers(x, capability):
    ptx, local_bytes = ptx_and_local_bytes(hadamard_kernels.v2, hadamard_types(x), capability, max_registers=64)
    assert_lean(ptx, local_bytes)
    assert re.search(r"ld\.global(\.nc)?\.v4", ptx)


@pytest.mark.parametrize("capability", CAPABILITIES[1:], ids=lambda c: f"sm_{c[0]}{c[1]}")
@pytest.mark.parametrize("x", [HALF, BFLOAT], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("fragments", gemv_kernels.TENSOR_CORES)
def test_tensor_core_gemv_fits_its_registers(fragments, x, capability):
    kernel, limit = gemv_kernels.TENSOR_CORES[fragments], gemv_kernels.MAX_REGISTERS
    ptx, local_bytes = ptx_and_local_bytes(kernel, gemv_types(x), capability, max_registers=limit)
    assert_lean(ptx, local_bytes)
    assert ptx.count("mma.sync") == 16 * fragments and re.search(r"ld\.global(\.nc)?\.v4", ptx)


@pytest.mark.parametrize("x", [HALF, BFLOAT], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("stages", [3, 4])
def test_the_few_rows_kernel_copies_in_bulk_and_keeps_x_in_registers(stages, x):
    kernel, limit = few_rows.kernel(stages), 65536 // few_rows.THREADS
    ptx, local_bytes = ptx_and_local_bytes(kernel, gemv_types(x, 8), (9, 0), max_registers=limit)
    assert_lean(ptx, local_bytes)
    assert "cp.async.bulk" in ptx and ptx.count("mma.sync") == 4 * few_rows.BLOCKS
    assert ptx.count("prmt.b32") == 16 * few_rows.BLOCKS  # one instruction finds the table's entry for two codes


@pytest.mark.parametrize("capability", CAPABILITIES[1:], ids=lambda c: f"sm_{c[0]}{c[1]}")
@pytest.mark.parametrize(
    ("eights", "tiles", "block_size"),
    [(1, 7, 64), (2, 7, 64), (3, 7, 64), (4, 2, 64), (4, 7, 64), (8, 2, 64), (8, 7, 64), (8, 7, 32)],
)
def test_the_gemm_fits_its_registers(eights, tiles, block_size, capability):
    layout = gemm_kernels.layouts(eights, tiles, block_size)[0]
    limit, parts = min(255, 65536 // layout.threads), 1 if block_size >= 64 else 2
    kernel = gemm_kernels.kernel(layout)
    ptx, local_bytes = ptx_and_local_bytes(kernel, gemv_types(BFLOAT), capability, max_registers=limit)
    assert_lean(ptx, local_bytes)
    assert "cp.async.cg.shared.global" in ptx and "ldmatrix" in ptx
    of_warp = -(-tiles // layout.warps_down)
    assert ptx.count("mma.sync") == 4 * eights * of_warp and ptx.count("prmt.b32") == 16 * of_warp
    assert ptx.count("shfl.sync") == 2 * parts * of_warp


@pytest.mark.parametrize("x", [HALF, BFLOAT], ids=["float16", "bfloat16"])
@pytest.mark.parametrize(("eights", "tiles"), [(2, 1), (5, 2), (8, 7), (16, 7)])
def test_the_warpgroups_kernel_fits_its_registers(eights, tiles, x):
    layouts = warpgroup_kernels.layouts(eights, tiles)
    layout = next(layout for layout in layouts if layout.shared_bytes(8 * eights) <= HOPPERS_SHARED_MEMORY)
    kernel, limit = warpgroup_kernels.kernel(layout), min(255, 65536 // layout.threads)
    ptx, local_bytes = ptx_and_local_bytes(kernel, gemv_types(x), (9, 0), max_registers=limit)
    assert_lean(ptx, local_bytes)
    assert ptx.count(f"wgmma.mma_async.sync.aligned.m64n{8 * eights}k16") == 4 * layout.blocks
    assert ptx.count("wgmma.wait_group") == layout.blocks
    assert "griddepcontrol.wait" in ptx and "sm_90a" in ptx


TEACHING = {
    **{f"dequantize {v}": (kernel, dequantize_types(BFLOAT)) for v, kernel in dequantize_kernels.VERSIONS.items()},
    **{f"quantize {v}": (kernel, quantize_types(BFLOAT)) for v, kernel in quantize_kernels.VERSIONS.items()},
    "gemv v1": (gemv_kernels.v1, gemv_types(BFLOAT)),
    "hadamard v1": (hadamard_kernels.v1, hadamard_types(BFLOAT)),
    "feedback": (feedback_kernels.encode, (*[FLOAT] * 3, BYTE, *[FLOAT] * 3, BYTE, FLOAT, *[NUMBER] * 4)),
}


@pytest.mark.parametrize("name", TEACHING)
def test_every_version_links_even_for_the_oldest_gpu(name):
    assert_lean(*ptx_and_local_bytes(*TEACHING[name], (7, 5)))


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_dequantize_v1_loads_its_second_level_only_after_its_first_store(capability):
    """As chapter 7 says: the compiler can't know that the output is not the table."""
    ptx, _ = ptx_and_local_bytes(dequantize_kernels.v1, dequantize_types(HALF), capability)
    steps = re.findall(r"\b(ld|st)\.(?:global\.)?(u8|b8|f32|b32|u16|b16)\b", ptx)
    kinds = [move for move, width in steps if (move, width[1:]) in (("ld", "32"), ("st", "16"))]
    assert kinds == ["ld", "ld", "st", "ld", "st"]  # absmax and a level, its value, the other level, its value
