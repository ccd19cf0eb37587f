"""Count the machine instructions of the teaching kernels for sm_90; writes results/instructions-sm90.json.

Needs the wheels nvidia-nvvm, nvidia-cuda-nvrtc, nvidia-nvjitlink and pyelftools. A count is of the whole kernel, both
sides of every branch: for a kernel without a slow path, what a thread executes.
"""

import argparse
import io
import json
import pathlib

from elftools.elf.elffile import ELFFile
from numba import types
from provenance import provenance

from nf4lab.kernels.cuda import dequantize_kernels, quantize_kernels
from nf4lab.kernels.cuda.assemble import assemble

POINTERS = {"float16": types.float16, "bfloat16": types.uint16, "float32": types.float32}
BYTE, FLOAT, FLAG, CELLS = (types.CPointer(t) for t in (types.uint8, types.float32, types.int32, types.uint64))
NOP, BRANCH = 0x918, 0x947  # the lowest 12 bits of an instruction


def count(cubin):
    """Instructions of a cubin's one kernel, the padding behind it left out."""
    (text,) = [s for s in ELFFile(io.BytesIO(bytes(cubin))).iter_sections() if s.name.startswith(".text.")]
    data = text.data()
    opcodes = [int.from_bytes(data[i : i + 2], "little") & 0xFFF for i in range(0, len(data), 16)]
    while opcodes[-1] in (NOP, BRANCH):  # a branch to itself closes every kernel
        opcodes.pop()
    return len(opcodes)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    args = parser.parse_args()
    found = []
    for dtype, kind in POINTERS.items():
        pointer = types.CPointer(kind)
        signatures = {
            "dequantize": (dequantize_kernels, (BYTE, FLOAT, FLOAT, pointer, *[types.int64] * 3)),
            "quantize": (quantize_kernels, (pointer, FLOAT, CELLS, BYTE, FLOAT, FLAG, *[types.int64] * 5)),
        }
        for operation, (module, signature) in signatures.items():
            for version, kernel in module.VERSIONS.items():
                number = count(assemble(kernel, signature, (9, 0))[1])
                found.append({"operation": operation, "version": version, "dtype": dtype, "instructions": number})
                print(found[-1])
    packages = ["numba", "numba-cuda", "nvidia-nvvm", "nvidia-nvjitlink"]
    about = provenance("benchmarks/instructions.py", packages) | {"capability": [9, 0]}
    (args.results / "instructions-sm90.json").write_text(json.dumps(about | {"records": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
