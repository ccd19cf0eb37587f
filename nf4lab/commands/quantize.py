"""`python -m nf4lab quantize IN OUT`: a checkpoint in 4 bits, tensor by tensor."""

import argparse

from nf4lab.blockwise import BLOCK_SIZES
from nf4lab.checkpoints.convert import EXCLUDE, INCLUDE, quantize_checkpoint
from nf4lab.formats import FORMATS


def add_to(subparsers) -> None:
    """Declare the command and its arguments."""
    parser = subparsers.add_parser(
        "quantize",
        help="quantize a checkpoint",
        description="Quantize the matrices of a safetensors checkpoint, one at a time, and copy the rest. "
        "NF4 and FP4 get the keys that bitsandbytes writes.",
    )
    parser.add_argument("source", metavar="IN", help="a safetensors file; or an index of shards or its folder")
    parser.add_argument("target", metavar="OUT", help="the file to write; for shards the folder. It must not exist")
    option = parser.add_argument
    option("--format", default="nf4", choices=FORMATS, metavar="NAME", help=f"by default nf4; {', '.join(FORMATS)}")
    option("--block-size", type=int, choices=BLOCK_SIZES, metavar="N", help="weights a block; else the format's own")
    option("--double-quant", action="store_true", help="quantize the constants too")
    option("--include", nargs="*", default=INCLUDE, metavar="PATTERN", help=f"quantize these; {' '.join(INCLUDE)}")
    option("--exclude", nargs="*", default=EXCLUDE, metavar="PATTERN", help=f"but not these; {' '.join(EXCLUDE)}")
    option("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Quantize, and say how many bytes became how many."""
    counts = quantize_checkpoint(
        options.source, options.target, options.format, options.block_size, options.double_quant,
        include=options.include, exclude=options.exclude, progress=not options.quiet,
    )  # fmt: skip
    before, after = counts["bytes_before"], counts["bytes_after"]
    print(
        f"{options.target}: {counts['quantized']} of {counts['tensors']} tensors quantized; "
        f"{before:,} bytes became {after:,} ({after / max(before, 1):.1%})"
    )
    return 0
