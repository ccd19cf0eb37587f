"""Quantize a whole checkpoint, one tensor at a time: a model larger than the memory passes through."""

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from nf4lab.backends import choose as choose_backend
from nf4lab.blockwise import DTYPES, QuantizedTensor, quantize
from nf4lab.checkpoints.architecture import (
    CONVERTED,
    FLOATS,
    Architecture,
    architecture_of,
    matrices_of,
    skip_modules,
)
from nf4lab.checkpoints.files import INDEX, checkpoint_path, opened, write_index
from nf4lab.checkpoints.folder import (
    check_not_quantized,
    copy_others,
    dtype_of,
    not_for_bitsandbytes,
    quantization_config,
    read_config,
    warn_of_widths,
    write_config,
)
from nf4lab.checkpoints.keys import parts_of
from nf4lab.checkpoints.partial import folder_appearing_whole, leftovers, remove
from nf4lab.checkpoints.plan import How, Shard, bytes_of, plan
from nf4lab.checkpoints.tensorfile import Entry, TensorFile, writing
from nf4lab.choice import EXCLUDED, NOT_INCLUDED, Candidate, choose, warn_of_the_rest
from nf4lab.formats import FORMATS, Format, as_format
from nf4lab.formats.double_quant import DoubleQuant
from nf4lab.progress import progress_bar

CONNECT = 10  # seconds to wait for a Dask scheduler


def quantize_checkpoint(
    source: str | os.PathLike,
    target: str | os.PathLike,
    format: str | Format = "nf4",
    block_size: int | None = None,
    double_quant: bool | str | DoubleQuant = False,
    *,
    include: str | Iterable[str] = "*",
    exclude: str | Iterable[str] = (),
    max_shard_size: int | str | None = None,
    device: str | torch.device = "cpu",
    scheduler: str | None = None,
    progress: bool = False,
) -> dict:
    """Quantize a checkpoint into another; returns counts: tensors, quantized, bytes_before, bytes_after, what stays.

    source: a safetensors file, which makes target a file; or a folder or the index in it, which makes target a folder
    with the same shards, an index, and copies of the files that hold no weights.
    Matrices that multiply are quantized, the rest is copied. In a folder whose config.json transformers knows, its
    model says which those are, and matrices that it keeps transposed are turned, as its integration of bitsandbytes
    does; otherwise names tell. See `nf4lab.choice`. What stays and why is in "kept" by name, the share of all weights
    that it is in "kept_share", and the files of a folder that were not copied are in "left_out".
    include, exclude: a shell's patterns of tensors' names; * matches dots too. `exclude` adds to what stays; a pattern
    of `include` that names what would stay ("*lm_head*", "*experts*", but not "*") has it quantized.
    block_size: by default the format's own, 64 for NF4. max_shard_size: make target a folder with shards of at most so
    many bytes, an integer or as "5GB"; without it a shard is split only where its header would be too long for readers.
    device: where to quantize; all give the same bytes, but for double-quantized constants (see nf4lab.DoubleQuant).
    scheduler: the address of a Dask scheduler, whose workers see the same files and write the shards of a folder; a
    target that is one file is written here. progress: show a bar.

    At any time one tensor of the source is in memory, and beside it less than 2 bytes for each of its weights, or its
    copy where config.json gives the model another dtype: weights get that, as transformers would load them. target
    takes its name only when it is complete. A config.json gets the `quantization_config` by which transformers reads
    NF4 and FP4, with the modules that it is to skip; where transformers can't read the result, nf4lab's own, which says
    why. Warns where over half of the weights stay, those that a pattern leaves out not counted.

    Raises FileExistsError where target exists, ValueError as `nf4lab.load_quantized` does for bad files, where source
    is quantized already, where a pattern matches nothing and, naming the tensor, for what `nf4lab.quantize` refuses.
    """
    source, target = Path(source), Path(os.path.abspath(target))
    how, limit = How.of(format, block_size, double_quant, device), bytes_of(max_shard_size)
    check_target(target)
    is_folder = source.is_dir() or source.suffix == ".json"
    with opened(source) as files, progress_bar("quantize", _bytes_of(files), "B", progress) as bar:
        entries = {name: entry for file in files for name, entry in file.entries.items()}
        folder = checkpoint_path(source).parent if is_folder else source
        config = _with_dtype(read_config(folder), entries) if is_folder else None
        check_not_quantized(folder, config, entries)
        judged = architecture_of(folder, config, matrices_of(files))
        chosen, others = choose(judged.candidates, include, exclude, "tensors")
        dtypes = _other_dtypes(entries, judged, chosen)
        shards = plan(files, chosen, how, limit, is_folder or limit is not None, judged.parts, dtypes)
        if is_folder or limit is not None:
            with folder_appearing_whole(target) as partial:
                weights = {INDEX, *(file.path.name for file in files)}
                left_out = copy_others(folder, partial, weights) if is_folder else []
                if config is not None:
                    words = _words_for_it(judged, chosen, how, dtype_of(config))
                    write_config(partial, config, words)
                    if words["quant_method"] == "bitsandbytes":
                        inputs = {c.names[0]: 0 if c.kind == "conv1d" else 1 for c in chosen}
                        warn_of_widths({n: entries[n].shape[k] for n, k in inputs.items()}, how.block_size)
                written = _write_shards(shards, files, partial, how, scheduler, bar)
        else:
            written, left_out = {target.name: write_shard(shards[0], target, how, files, bar, new=True)}, []
    result = {"tensors": len(entries), "quantized": len(chosen)}
    result["bytes_before"] = sum(entry.nbytes for entry in entries.values())
    result["bytes_after"] = sum(nbytes for tensors in written.values() for nbytes in tensors.values())
    return result | _what_stays(entries, chosen, others) | {"left_out": left_out}


def check_target(target: Path) -> None:
    """Raise where nothing can be written under the target's name."""
    if os.path.lexists(target):  # a link that leads nowhere too
        raise FileExistsError(f"{target} exists already; nothing was written")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target.parent} is not a folder to write {target.name} to; nothing was written")


def write_shard(
    shard: Shard, path: Path, how: How, files: list[TensorFile] | None = None, bar=None, new: bool = False
) -> dict[str, int]:
    """Write one shard's tensors to `path`, those to quantize quantized; returns the bytes of each tensor written.

    files: the sources where they are open; a Dask worker opens them itself. new: whether the name must be free.
    """
    if files is None:
        with opened(shard.source) as files:
            return write_shard(shard, path, how, files)
    place = {name: file for file in files for name in file.entries}
    with writing(path, shard.room, shard.metadata, new) as out:
        for name, action in shard.tensors:
            _add_tensor(place[name], name, out, how, action, shard.nbytes, shard.dtypes.get(name))
            if bar is not None:
                bar.update(place[name].entries[name].nbytes)
    return out.nbytes


def _add_tensor(file: TensorFile, name: str, out, how: How, action: str | dict, nbytes: int, dtype) -> None:
    """Write one tensor, as the action says. Its locals are gone before the next one is read."""
    tensor = file.read(name)
    if dtype is not None:
        tensor = tensor.to(dtype)
    if action == "copy":
        out.add(name, tensor)
        return
    if isinstance(action, dict):
        matrices = {part: tensor[start:stop] for part, (start, stop) in action.items()}
    else:
        matrices = {name: tensor.T if action == "transpose" else tensor}
    for part, matrix in matrices.items():
        try:
            quantized = _quantized(matrix.to(how.device), how, nbytes)
        except ValueError as error:
            raise ValueError(f"{file.path.name}: tensor {name!r}: {error}") from None
        for key, stored in parts_of(part, quantized).items():
            out.add(key, stored)


def _quantized(tensor: Tensor, how: How, nbytes: int) -> QuantizedTensor:
    """A matrix of a file, quantized. nbytes: of all that is read for the file.

    Many small tensors are worth what loading a kernel takes, as a large one.
    """
    backend = choose_backend(None, tensor.device, tensor.dtype, nbytes // tensor.itemsize, as_format(how.format))
    return quantize(tensor, how.format, how.block_size, how.double_quant, backend=backend)


def _write_shards(
    shards: list[Shard], files: list[TensorFile], folder: Path, how: How, scheduler: str | None, bar
) -> dict[str, dict[str, int]]:
    """Write all shards, here or on a Dask cluster, and the index where there is more than one; their tensors' bytes."""
    if scheduler is None:
        place = {shard.name: write_shard(shard, folder / shard.name, how, files, bar) for shard in shards}
    else:
        place = _write_on_cluster(shards, folder, how, scheduler, bar)
    if len(shards) > 1 or shards[0].name != "model.safetensors":
        write_index(folder / INDEX, place)
    return place


def _write_on_cluster(shards: list[Shard], folder: Path, how: How, scheduler: str, bar) -> dict[str, dict[str, int]]:
    """Write each shard on a worker of the cluster; one that a lost worker had begun is written anew by another."""
    try:
        from distributed import Client, as_completed
    except ImportError:
        raise ValueError("--scheduler needs Dask's cluster: pip install distributed") from None
    with Client(scheduler, timeout=CONNECT, set_as_default=False) as client:
        if not client.scheduler_info()["workers"]:
            raise ValueError(f"the scheduler at {scheduler} has no workers")
        named = how.format.name if FORMATS.get(how.format.name) is how.format else how.format
        how = replace(how, format=named)
        futures = {
            client.submit(write_shard, shard, folder / shard.name, how, pure=False, retries=3): shard
            for shard in shards
        }
        written = {}
        try:
            for future in as_completed(futures, loop=client.loop):
                shard = futures[future]
                written[shard.name] = future.result()
                bar.update(shard.nbytes)
        finally:
            client.cancel(list(futures))
    for shard in shards:
        for leftover in leftovers(folder / shard.name):
            remove(leftover)
    return written


def _with_dtype(config: dict | None, entries: dict[str, Entry]) -> dict | None:
    """A config.json that names a dtype, the first tensor's where it named none: transformers would ask the file.

    In the file that is written the first may be a constant.
    """
    first = next((entry.dtype for entry in entries.values() if entry.dtype in FLOATS), None)
    if config is None or first is None or config.get("dtype") or config.get("torch_dtype"):
        return config
    return config | {"dtype": str(first).removeprefix("torch.")}


def _other_dtypes(entries: dict[str, Entry], judged: Architecture, chosen: list[Candidate]) -> dict[str, torch.dtype]:
    """The dtypes of tensors that transformers would cast when it loads the original, by key.

    To the dtype of config.json, or to float32 where it keeps that. Of a file with bitsandbytes' layers it (5.23) casts
    no weight, and layers of two dtypes don't run.
    """
    in_4_bits = {name for candidate in chosen for name in candidate.names}
    wanted = {key: judged.dtype_of(key, key in in_4_bits) for key, entry in entries.items() if entry.dtype in FLOATS}
    return {key: dtype for key, dtype in wanted.items() if dtype not in (None, entries[key].dtype)}


def _words_for_it(judged: Architecture, chosen: list[Candidate], how: How, dtype: str | None) -> dict:
    """The quantization_config: transformers' where it can read what is written, else nf4lab's with the reason."""
    quantized = {name for c in chosen for key in c.names for name in judged.modules.get(key, ())}
    reasons = ((c.names[0], _not_for_transformers(c)) for c in chosen)
    beyond = next((f"transformers reads no 4-bit {name}: {reason}" for name, reason in reasons if reason), "")
    ours = not_for_bitsandbytes(how.format, how.block_size, how.double_quant) or judged.closed or beyond
    skip = skip_modules(judged.linear, quantized, judged.prefix)
    return quantization_config(how.format, how.double_quant, skip, ours, dtype)


def _not_for_transformers(candidate: Candidate) -> str:
    """Why transformers can't read a candidate in 4 bits; empty where it can."""
    if candidate.kind not in ("linear", "conv1d") or candidate.stays == CONVERTED:
        return candidate.stays or candidate.kind
    return candidate.barred


def _what_stays(entries: dict[str, Entry], chosen: list[Candidate], others: list[tuple[Candidate, str]]) -> dict:
    """What stays by name and its share of all weights; a warning where that is over half and nobody asked for it."""
    total = sum(torch.Size(entry.shape).numel() for entry in entries.values() if entry.dtype in DTYPES)
    kept = {candidate.names[0]: why for candidate, why in others}
    share = 1 - sum(candidate.numel for candidate in chosen) / total
    left_out = sum(candidate.numel for candidate, why in others if why in (EXCLUDED, NOT_INCLUDED))
    if share - left_out / total > 0.5:
        warn_of_the_rest(share, kept, stacklevel=3)
    return {"kept": kept, "kept_share": share}


def _bytes_of(files: Iterable[TensorFile]) -> int:
    return sum(entry.nbytes for file in files for entry in file.entries.values())
