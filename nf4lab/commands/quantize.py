"""`nf4lab quantize IN OUT`: a checkpoint in 4 bits, tensor by tensor."""

import argparse
import sys
from collections import Counter
from pathlib import Path

from nf4lab.blockwise import BLOCK_SIZES
from nf4lab.checkpoints.convert import quantize_checkpoint
from nf4lab.checkpoints.partial import leftovers, remove
from nf4lab.commands.shown import shown
from nf4lab.formats import FORMATS


def add_to(subparsers) -> None:
    """Declare the command and its arguments."""
    parser = subparsers.add_parser(
        "quantize",
        help="quantize a checkpoint",
        description="Quantize the matrices of a safetensors checkpoint that multiply, one at a time, and copy the "
        "rest: embeddings, output heads, routers, what else transformers' bitsandbytes integration leaves alone. "
        "NF4 and FP4 get the keys that bitsandbytes writes, and a folder's config.json what transformers needs to read "
        "them.",
        epilog="A PATTERN is a shell's, of tensors' names; * matches dots too; give the option again for another.",
    )
    parser.add_argument("source", metavar="IN", help="a safetensors file; or an index of shards or its folder")
    parser.add_argument("target", metavar="OUT", help="the file to write; for shards the folder. It must not exist")
    option = parser.add_argument
    option("--format", default="nf4", choices=FORMATS, metavar="NAME", help=f"by default nf4; {', '.join(FORMATS)}")
    option("--block-size", type=int, choices=BLOCK_SIZES, metavar="N", help="weights a block; else the format's own")
    option("--double-quant", action="store_true", help="quantize the constants too")
    option("--include", action="append", metavar="PATTERN", help="quantize these only; one that names what would stay, "
           "as '*lm_head*' or '*experts*' and not '*', has it quantized")  # fmt: skip
    option("--exclude", action="append", default=[], metavar="PATTERN", help="keep these too")
    option("--rotate", nargs="?", type=int, const=0, metavar="SEED", help="fold a random rotation into a model "
           "of the Llama kind first")  # fmt: skip
    option("--calibrate", type=Path, metavar="TEXT", help="a text file: choose codes for the outputs that a language "
           "model's layers have on it (GPTQ)")  # fmt: skip
    option("--max-shard-size", metavar="SIZE", help="write a folder of shards of at most so many bytes: 5GB, 500MiB")
    option("--device", default="cpu", help="where to quantize: cpu, cuda, cuda:1; by default cpu. The bytes "
           "are the same, but for --double-quant, where the last bit of a mean may differ")  # fmt: skip
    option("--scheduler", metavar="ADDRESS", help="have the workers of a Dask cluster, which see the same files, write "
           "the shards of a folder: tcp://host:8786")  # fmt: skip
    option("--clean", action="store_true", help="first remove what killed runs left on their way to OUT")
    option("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Quantize, and say how many bytes became how many, what stays and what was left out."""
    _leftovers(options)
    if options.rotate is not None or options.calibrate is not None:
        return _quantize_language_model(options)
    one_file = Path(options.source).is_file() and not options.source.endswith(".json") and not options.max_shard_size
    if one_file and options.target.endswith(("/", "\\")):
        raise ValueError(f"OUT {options.target!r} names a folder, and IN is one file: name the file to write")
    counts = quantize_checkpoint(
        options.source, options.target, options.format, options.block_size, options.double_quant,
        include=options.include or "*", exclude=options.exclude, max_shard_size=options.max_shard_size,
        device=options.device, scheduler=options.scheduler, progress=not options.quiet,
    )  # fmt: skip
    options.done.append(options.target)
    before, after = counts["bytes_before"], counts["bytes_after"]
    print(
        f"{shown(options.target)}: {counts['quantized']} of {counts['tensors']} tensors quantized; "
        f"{before:,} bytes became {after:,} ({after / max(before, 1):.1%})"
    )
    if not options.quiet:
        _print_the_rest(counts)
    return 0


def _quantize_language_model(options: argparse.Namespace) -> int:
    """The same for a whole language model in memory, rotated or calibrated first."""
    from nf4lab.beyond.language_models import quantize_language_model

    for name in ("scheduler", "max_shard_size"):
        if getattr(options, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} takes tensors one by one; --rotate and --calibrate a model")
    text = None if options.calibrate is None else _text_of(options.calibrate)
    rows = quantize_language_model(
        options.source, options.target, options.format, options.block_size, options.double_quant,
        rotate=options.rotate, text=text, include=options.include or "*", exclude=options.exclude,
        device=options.device, progress=not options.quiet,
    )  # fmt: skip
    options.done.append(options.target)
    how = [f"rotated with seed {options.rotate}"] if options.rotate is not None else []
    how += [f"calibrated on {options.calibrate}"] if text is not None else []
    print(shown(f"{options.target}: {len(rows)} layers quantized, {' and '.join(how)}; {rows.kept_share:.1%} stays"))
    return 0


def _text_of(path: Path) -> str:
    """What a file to calibrate with says. Raises ValueError where it is not text in UTF-8."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8: byte {error.start} is {error.object[error.start]:#x}") from None
    if "\0" in text:
        raise ValueError(f"{path} is not text: character {text.index(chr(0))} is a zero")
    return text


def _leftovers(options: argparse.Namespace) -> None:
    """Name what killed runs left, or remove it."""
    for path, nbytes in leftovers(options.target).items():
        if options.clean:
            remove(path)
        what = "removed" if options.clean else "left by a run that was killed; --clean removes it"
        print(shown(f"nf4lab: {path} ({nbytes:,} bytes): {what}"), file=sys.stderr)


def _print_the_rest(counts: dict) -> None:
    """What stays, by reason, and what was not copied."""
    if counts["kept"]:
        print(f"left as they are, {counts['kept_share']:.1%} of the weights:", file=sys.stderr)
    for reason, n in Counter(counts["kept"].values()).items():
        names = [name for name, why in counts["kept"].items() if why == reason]
        more = f" and {n - 3} more" if n > 3 else ""
        print(shown(f"  {reason}: {', '.join(names[:3])}{more}"), file=sys.stderr)
    if counts["left_out"]:
        print(shown(f"not copied: {', '.join(counts['left_out'])}"), file=sys.stderr)
