"""Quantize a whole checkpoint, one tensor at a time: a model larger than the memory passes through."""

import fnmatch
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from nf4lab.blockwise import DTYPES, quantize
from nf4lab.checkpoints.files import METADATA, checkpoint_path, opened, write_index
from nf4lab.checkpoints.keys import BITSANDBYTES_STATES, parts_of
from nf4lab.checkpoints.tensorfile import Entry, TensorFile, TensorWriter, header_room, writing
from nf4lab.formats import Format, as_format
from nf4lab.formats.double_quant import DoubleQuant, as_double_quant

INCLUDE = ("*.weight",)
# What `transformers` leaves alone too: embeddings, which are looked up and not multiplied, and the output head.
EXCLUDE = ("*embed*", "*lm_head*", "*wte*", "*wpe*")
WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.h5", "*.msgpack", "*.onnx")
NOT_COPIED = (*WEIGHTS, "*.index.json", ".*")
MOST_PARTS = 10  # of one quantized tensor: packed, levels, state, its scale, and three of each of two constants
LONGEST_SUFFIX = len(".quant_state.bitsandbytes__nf4")


def quantize_checkpoint(
    source: str | os.PathLike,
    target: str | os.PathLike,
    format: str | Format = "nf4",
    block_size: int | None = None,
    double_quant: bool | str | DoubleQuant = False,
    *,
    include: Sequence[str] = INCLUDE,
    exclude: Sequence[str] = EXCLUDE,
    progress: bool = False,
) -> dict[str, int]:
    """Quantize a checkpoint into another; returns counts: tensors, quantized, bytes_before, bytes_after.

    source: a safetensors file, which makes target a file; or a folder or the index in it, which makes target a folder
    with the same shards, an index, and copies of the files that are no weights.
    Floating-point matrices whose name matches a pattern of `include` and none of `exclude` are quantized, the rest is
    copied. Patterns are a shell's; * matches dots too. block_size: by default the format's own, 64 for NF4.
    progress: show a bar.

    At any time one tensor of the source is in memory, and beside it less than 2 bytes for each of its weights. target
    takes its name only when it is complete. A config.json gets the `quantization_config` by which transformers reads
    NF4 and FP4.

    Raises FileExistsError where target exists, ValueError as `nf4lab.load_quantized` does for bad files and, naming
    the tensor, for what `nf4lab.quantize` refuses.
    """
    source, target, format = Path(source), Path(target), as_format(format)
    if target.exists():
        raise FileExistsError(f"{target} exists already; nothing was written")
    arguments = {"format": format, "block_size": block_size, "double_quant": as_double_quant(double_quant) or False}
    with opened(source) as files, _progress_bar(files, progress) as bar:
        entries = {name: entry for file in files for name, entry in file.entries.items()}
        chosen = {name for name, entry in entries.items() if _is_chosen(name, entry, include, exclude)}
        if source.is_dir() or source.suffix == ".json":
            after = _quantize_folder(checkpoint_path(source), files, target, chosen, arguments, bar)
        else:
            after = _quantize_file(files[0], target, chosen, arguments, bar)
    before = sum(entry.nbytes for entry in entries.values())
    return {"tensors": len(entries), "quantized": len(chosen), "bytes_before": before, "bytes_after": after}


def _is_chosen(name: str, entry: Entry, include: Sequence[str], exclude: Sequence[str]) -> bool:
    matches = [any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns) for patterns in (include, exclude)]
    return len(entry.shape) == 2 and entry.dtype in DTYPES and matches == [True, False]


def _quantize_file(file: TensorFile, target: Path, chosen: set[str], arguments: dict, bar) -> int:
    """Write one file's tensors to target, those chosen quantized; returns the bytes of their data."""
    # Quantized tensors take whole multiples of 8 bytes; the others follow by falling itemsize. So all are aligned.
    names = sorted(file.entries, key=lambda name: -16 if name in chosen else -file.entries[name].dtype.itemsize)
    metadata = file.metadata | METADATA
    with writing(target, header_room(_longest_keys(file, chosen), metadata), metadata) as out:
        for name in names:
            _quantize_tensor(file, name, out, arguments if name in chosen else None)
            bar.update(file.entries[name].nbytes)
    return sum(entry.nbytes for entry in out.entries.values())


def _quantize_tensor(file: TensorFile, name: str, out: TensorWriter, arguments: dict | None) -> None:
    """Write one tensor, quantized if there are arguments. Its locals are gone before the next one is read."""
    tensor = file.read(name)
    if arguments is not None:
        try:
            tensor = quantize(tensor, **arguments)
        except ValueError as error:
            raise ValueError(f"{file.path.name}: tensor {name!r}: {error}") from None
    for key, part in parts_of(name, tensor).items():
        out.add(key, part)


def _longest_keys(file: TensorFile, chosen: set[str]) -> Iterator[tuple[str, int]]:
    """A name and a number of dimensions for each tensor that the output may have, none of them longer than these."""
    for name, entry in file.entries.items():
        if name in chosen:
            yield from [(name + "x" * LONGEST_SUFFIX, 2)] * MOST_PARTS
        else:
            yield name, len(entry.shape)


def _quantize_folder(
    source: Path, files: list[TensorFile], target: Path, chosen: set[str], arguments: dict, bar
) -> int:
    """Write every shard, the index and the other files into a folder that gets its name when all are there."""
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    partial.mkdir()
    try:
        after = sum(_quantize_file(file, partial / file.path.name, chosen, arguments, bar) for file in files)
        if source.suffix == ".json":
            write_index(partial / source.name, [partial / file.path.name for file in files])
        _copy_other_files(source.parent, partial, format=arguments["format"], double_quant=arguments["double_quant"])
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return after


def _copy_other_files(source: Path, target: Path, format: Format, double_quant: bool | DoubleQuant) -> None:
    """Copy what is no weight: configurations, tokenizers, licences. config.json learns of the quantization."""
    for path in sorted(source.iterdir()):
        if path.is_file() and not any(fnmatch.fnmatchcase(path.name, pattern) for pattern in NOT_COPIED):
            shutil.copyfile(path, target / path.name)
    config = target / "config.json"
    if config.exists() and format.name in BITSANDBYTES_STATES.values() and double_quant in (False, DoubleQuant()):
        values = json.loads(config.read_text(encoding="utf-8"))
        values["quantization_config"] = {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": format.name,
            "bnb_4bit_use_double_quant": bool(double_quant),
        }
        config.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _progress_bar(files: Iterable[TensorFile], show: bool) -> Iterator:
    """A bar over the bytes to be read."""
    from tqdm.auto import tqdm

    total = sum(entry.nbytes for file in files for entry in file.entries.values())
    with tqdm(total=total, unit="B", unit_scale=True, disable=not show, desc="quantize") as bar:
        yield bar
