"""Which tensors go into which file of a quantized checkpoint, decided before the first is read."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import torch

from nf4lab.blockwise import quantize
from nf4lab.checkpoints.files import METADATA
from nf4lab.checkpoints.keys import parts_of
from nf4lab.checkpoints.tensorfile import Entry, TensorFile, entry_room, header_room
from nf4lab.choice import Candidate
from nf4lab.formats import Format, as_format
from nf4lab.formats.double_quant import DoubleQuant, as_double_quant

HEADER = 25_000_000  # bytes of a header at which a folder's shard is split: a quarter of what readers take
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass(frozen=True)
class How:
    """How to quantize: what `nf4lab.quantize` takes, and on which device."""

    format: Format
    block_size: int
    double_quant: bool | DoubleQuant
    device: str

    @classmethod
    def of(cls, format: str | Format, block_size: int | None, double_quant, device) -> "How":
        """Checked arguments. Raises as `nf4lab.quantize`, and ValueError for a device that is not there."""
        format, scheme = as_format(format), as_double_quant(double_quant) or False
        how = cls(format, format.block_size if block_size is None else block_size, scheme, str(device))
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device {str(device)!r}: {str(error).splitlines()[0]}") from None
        if how.device == "meta":
            raise ValueError("device 'meta' holds no values")
        how.sample()
        return how

    def sample(self) -> dict[str, tuple[tuple[int, ...], int]]:
        """Shape and itemsize of each part that a quantized tensor of two blocks is stored in, by the end of its key."""
        q = quantize(
            torch.ones(2 * self.block_size, dtype=torch.float32, device="cpu"),
            self.format,
            self.block_size,
            self.double_quant,
        )
        return {key: (tuple(part.shape), part.itemsize) for key, part in parts_of("", q).items()}


class Shard(NamedTuple):
    """A file to write: tensors by (name, how), in order; how is "copy", "quantize", "transpose" or a dict.

    A dict has the name of each part of a matrix and its rows, from and to: each is quantized by itself.
    room: for its header. nbytes: of what is read for it. source: the checkpoint that holds the tensors.
    dtypes: of tensors that get another, by name.
    """

    name: str
    tensors: list[tuple[str, str | dict[str, tuple[int, int]]]]
    room: int
    metadata: dict[str, str]
    nbytes: int
    source: Path
    dtypes: dict[str, torch.dtype]


class Stored(NamedTuple):
    """What a tensor takes in a file, at most: the bytes of its data and those of its entries in the header."""

    nbytes: int
    room: int


def plan(
    files: list[TensorFile],
    chosen: list[Candidate],
    how: How,
    limit: int | None,
    many: bool,
    rows: Mapping[str, dict[str, tuple[int, int]]],
    dtypes: Mapping[str, torch.dtype],
) -> list[Shard]:
    """The shards to write: one for each file where it fits, more where its bytes or its header exceed a limit.

    rows: of each matrix that is split, those of each part by its name. dtypes: of tensors that get another. limit: of a
    shard's bytes, or None. many: whether there may be several. Raises ValueError where one header is too long for
    readers and there may not.
    """
    actions = {c.names[0]: "transpose" if c.kind == "conv1d" else rows.get(c.names[0], "quantize") for c in chosen}
    parts, groups = how.sample(), []
    for file in files:
        entries = {name: _of_dtype(entry, dtypes.get(name)) for name, entry in file.entries.items()}
        # Quantized tensors take whole multiples of 8 bytes; the others follow by falling itemsize. So all are aligned.
        names = sorted(entries, key=lambda name: -16 if name in actions else -entries[name].dtype.itemsize)
        tensors = [(name, actions.get(name, "copy")) for name in names]
        data_bytes = 2 * sum(entry.nbytes for entry in entries.values()) + 10_000
        stored = {name: _stored(name, action, entries[name], parts, how, data_bytes) for name, action in tensors}
        groups += [(file, group, stored) for group in _split(tensors, stored, limit, HEADER if many else None)]
    return [_shard(name, *group, dtypes) for name, group in zip(_names(files, groups), groups, strict=True)]


def _of_dtype(entry: Entry, dtype: torch.dtype | None) -> Entry:
    """The entry of a tensor that is given a dtype; itself without one."""
    return entry if dtype is None else Entry(dtype, entry.shape, 0, math.prod(entry.shape) * dtype.itemsize)


def _stored(name: str, action: str | dict, entry: Entry, parts: dict, how: How, data_bytes: int) -> Stored:
    """What a tensor takes when the action is done; parts: from `How.sample`. None of it is less than it will be."""
    if isinstance(action, dict):
        shapes = {part: (stop - start, *entry.shape[1:]) for part, (start, stop) in action.items()}
        split = ((part, "quantize", entry._replace(shape=shape)) for part, shape in shapes.items())
        stored = [_stored(*part, parts, how, data_bytes) for part in split]
        return Stored(sum(part.nbytes for part in stored), sum(part.room for part in stored))
    room = entry_room(name, entry.shape, data_bytes)
    if action == "copy":
        return Stored(entry.nbytes, room)
    numel = math.prod(entry.shape)
    blocks, shape = -(-numel // how.block_size) + 256, 2 * len(str(numel)) + 8
    nbytes = numel * how.format.code_bits // 8 + sum(
        math.prod(part) if "state" in end else itemsize * blocks for end, (part, itemsize) in parts.items() if end
    )
    return Stored(nbytes, sum(room + len(end) + shape for end in parts))


def _split(tensors: list, stored: dict[str, Stored], limit: int | None, header: int | None) -> Iterator[list]:
    """Tensors in runs whose bytes and headers stay within the limits; one tensor that exceeds them has its own."""
    run, nbytes, room = [], 0, 0
    for name, action in tensors:
        more = stored[name]
        if run and ((limit and nbytes + more.nbytes > limit) or (header and room + more.room > header)):
            yield run
            run, nbytes, room = [], 0, 0
        run.append((name, action))
        nbytes, room = nbytes + more.nbytes, room + more.room
    yield run


def _names(files: list[TensorFile], groups: list) -> list[str]:
    """The shards' names: those of the source where there are as many, else numbered as transformers does."""
    if len(groups) == len(files):
        return [file.path.name for file in files]
    return [f"model-{k + 1:05d}-of-{len(groups):05d}.safetensors" for k in range(len(groups))]


def _shard(name: str, file: TensorFile, tensors: list, stored: dict[str, Stored], dtypes: Mapping) -> Shard:
    metadata = file.metadata | METADATA
    room = header_room((stored[tensor].room for tensor, _ in tensors), metadata)
    nbytes = sum(file.entries[tensor].nbytes for tensor, _ in tensors)
    dtypes = {tensor: dtypes[tensor] for tensor, _ in tensors if tensor in dtypes}
    return Shard(name, tensors, room, metadata, nbytes, file.path.absolute(), dtypes)


def bytes_of(size: int | str | None) -> int | None:
    """A size in bytes, rounded down: 5000000, "5MB", "1.5 GiB". Raises ValueError for less than 1 and anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?B)?\s*", "" if size is None else str(size).upper())
    nbytes = int(Fraction(match[1]) * UNITS.get(match[2], 1)) if match else 0
    if size is not None and not nbytes:
        raise ValueError(f"a size is a number of bytes, or as 5GB or 500MiB; got {size!r}")
    return None if size is None else nbytes
