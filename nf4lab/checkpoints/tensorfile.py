"""Safetensors files, one tensor at a time: a header checked before it is believed, a file that appears whole.

The library `safetensors` writes a file from tensors that are all in memory, and reads by mapping the whole file. Here a
tensor is read into memory of its own and can be dropped before the next, and data is written before the header is
known. Layout: 8 bytes with the header's length, the header in JSON, then the tensors' bytes without gaps.
Source: https://github.com/huggingface/safetensors#format
"""

import json
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from nf4lab.checkpoints.beginnings import kind_of
from nf4lab.checkpoints.checked_json import is_shape, without_duplicates
from nf4lab.checkpoints.partial import appearing_whole

LARGEST_HEADER = 100_000_000  # bytes; the library's own limit
as_json = json.JSONEncoder(ensure_ascii=False).encode
FRAME = ':{"dtype":"F8_E4M3","shape":,"data_offsets":[,]},'  # what stands around a header's names and numbers
NAMES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
    "U64": "uint64", "I64": "int64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "C64": "complex64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
}  # fmt: skip
DTYPES = {name: getattr(torch, torch_name) for name, torch_name in NAMES.items() if hasattr(torch, torch_name)}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by itemsize; NumPy lacks some of the dtypes


class Entry(NamedTuple):
    """Where one tensor lies in a file: its dtype and shape, and its first and last byte (exclusive) in the data."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        return self.stop - self.start


class TensorFile:
    """A safetensors file open for reading: `entries` by name in the order of their data, `metadata`, and `read`.

    Raises ValueError, with the numbers that disagree, unless the header describes exactly the bytes that follow it.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        if self.path.exists() and not (self.path.is_file() or self.path.is_dir()):  # to open a pipe could wait for ever
            raise ValueError(f"{path} is a pipe or a device; a checkpoint is read from a file, here and there")
        self._file = open(self.path, "rb")  # noqa: SIM115 (closed by close)
        try:
            self.entries, self.metadata, self._data_start = _read_header(self._file, self.path.name)
        except BaseException:
            self._file.close()
            raise

    def read(self, name: str) -> Tensor:
        """The tensor of that name, in memory of its own."""
        entry = self.entries[name]
        data = torch.empty(entry.nbytes, dtype=torch.uint8, device="cpu")
        self._file.seek(self._data_start + entry.start)
        if self._file.readinto(data.numpy()) != entry.nbytes:
            raise ValueError(f"{self.path.name} ends inside tensor {name!r}: it became shorter after it was opened")
        return data.view(entry.dtype).reshape(entry.shape)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def _read_header(file, name: str) -> tuple[dict[str, Entry], dict[str, str], int]:
    """(entries, metadata, where the data starts) of an open file."""
    size = os.fstat(file.fileno()).st_size
    if size < 8:
        raise ValueError(f"{name} has {size} bytes; a safetensors file starts with the 8 bytes of its header's length")
    length = int.from_bytes(file.read(8), "little")
    if length > min(LARGEST_HEADER, size - 8):
        _check_beginning(file, name)
    if length > LARGEST_HEADER:
        raise ValueError(
            f"{name} announces a header of {length} bytes; at most {LARGEST_HEADER} are read: it is damaged, or no "
            f"safetensors file; it begins with {length.to_bytes(8, 'little')!r}"
        )
    if length > size - 8:
        raise ValueError(f"{name} announces a header of {length} bytes; {size - 8} follow: it is truncated")
    header = _parse_header(file.read(length), name)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{name}: __metadata__ must map strings to strings; got {metadata!r:.80}")
    entries = {key: _entry(value, f"{name}: tensor {key!r}") for key, value in header.items()}
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)))
    _check_cover(entries, size - 8 - length, name)
    return entries, metadata, 8 + length


def _check_beginning(file, name: str) -> None:
    """Raise with what an open file is, where its first bytes tell."""
    file.seek(0)
    beginning = file.read(64)
    if what := kind_of(beginning):
        raise ValueError(f"{name} is not a safetensors file but {what}")
    if beginning[:8].isascii() and beginning[8:9] not in (b"{", b""):
        raise ValueError(f"{name} is not a safetensors file: it begins with {beginning[:16]!r}")


def _parse_header(raw: bytes, name: str) -> dict:
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=without_duplicates)
        if b"\\u" in raw:  # an escape can stand for half a character, which is no text and can't be written
            as_json(header).encode()
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: the header is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise ValueError(f"{name}: the header must be a JSON object; got a {type(header).__name__}")
    return header


def _entry(value: object, where: str) -> Entry:
    """A header's entry, checked by itself: known dtype, a shape, and as many bytes as both take."""
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{where} must have dtype, shape and data_offsets; got {value!r:.80}")
    name, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(name, str) or name not in DTYPES:
        raise ValueError(f"{where} has the unknown dtype {name!r:.80}; known are {', '.join(DTYPES)}")
    if not is_shape(shape):
        raise ValueError(f"{where}: a shape is a list of integers of at least 0; got {shape!r:.80}")
    if not is_shape(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{where}: data_offsets are a start and a stop after it; got {offsets!r:.80}")
    start, stop = offsets
    expected = math.prod(shape) * DTYPES[name].itemsize
    if stop - start != expected:
        raise ValueError(f"{where}: {name} of shape {shape} takes {expected} bytes; its offsets span {stop - start}")
    return Entry(DTYPES[name], tuple(shape), start, stop)


def _check_cover(entries: dict[str, Entry], data_bytes: int, name: str) -> None:
    """Raise unless the entries, in order of their start, cover the data without overlap, gap or rest."""
    reached, before = 0, "the data's start"
    for key, entry in entries.items():
        if entry.start != reached:
            what = "overlaps" if entry.start < reached else "leaves a gap behind"
            raise ValueError(
                f"{name}: tensor {key!r} starts at byte {entry.start} and {what} {before}, which ends at {reached}"
            )
        reached, before = entry.stop, f"tensor {key!r}"
    if reached > data_bytes:
        raise ValueError(f"{name}: the header describes {reached} bytes of data; {data_bytes} follow: it is truncated")
    if reached < data_bytes:
        raise ValueError(f"{name}: the header describes {reached} bytes of data; {data_bytes} follow it")


class TensorWriter:
    """What `writing` hands out: `add` appends a tensor's bytes; the header comes last, into the room before them.

    nbytes: of each tensor written, by name. Of very many tensors what is kept are texts and numbers, no objects: those
    Python would visit again and again, looking for garbage.
    """

    def __init__(self, file, header_bytes: int):
        self._file = file
        self._header_bytes = header_bytes
        self.nbytes: dict[str, int] = {}
        self._entries: list[str] = []  # of the header, each as it will stand there
        self._at = 0
        file.seek(8 + header_bytes)

    def add(self, name: str, tensor: Tensor) -> None:
        """Append a tensor. Raises ValueError for a name that stands in the file already or a dtype it cannot hold."""
        if name in self.nbytes or name == "__metadata__":
            raise ValueError(
                f"two tensors want the name {name!r}" if name in self.nbytes else f"{name!r} is no tensor's"
            )
        if tensor.dtype not in DTYPE_NAMES:
            raise ValueError(f"tensor {name!r}: a safetensors file cannot hold {tensor.dtype}")
        bits = tensor.resolve_conj().resolve_neg().contiguous().view(BITS[tensor.itemsize])
        start, nbytes = self._at, self._file.write(bits.numpy(force=True))
        self._at, self.nbytes[name] = start + nbytes, nbytes
        self._entries.append(
            f'{as_json(name)}:{{"dtype":"{DTYPE_NAMES[tensor.dtype]}","shape":{list(tensor.shape)},'
            f'"data_offsets":[{start},{self._at}]}}'
        )

    def finish(self, metadata: dict[str, str]) -> None:
        """Write the header into the room that was left for it."""
        first = f'"__metadata__":{as_json(metadata)}'
        text = f"{{{','.join((first, *self._entries))}}}".encode()
        if len(text) > self._header_bytes:
            raise RuntimeError(f"the header takes {len(text)} bytes; room was left for {self._header_bytes}")
        self._file.seek(0)
        self._file.write(self._header_bytes.to_bytes(8, "little") + text.ljust(self._header_bytes))


def header_room(entries: Iterable[int], metadata: dict[str, str]) -> int:
    """A multiple of 8 that is enough bytes for a header, given those of its entries, from `entry_room`.

    Raises ValueError for more than a reader takes.
    """
    room = len(as_json(metadata).encode()) + 32 + sum(entries)
    if room > LARGEST_HEADER:
        raise ValueError(f"a header of {room:,} bytes is more than readers of safetensors take, {LARGEST_HEADER:,}: "
                         "write several files")  # fmt: skip
    return -(-room // 8) * 8


def entry_room(name: str, shape: tuple[int, ...], data_bytes: int) -> int:
    """Bytes that suffice for the entry of a tensor, or of one no larger, in a file with so many bytes of data."""
    name_bytes = len(as_json(name).encode())
    return name_bytes + len(FRAME) + len(str(shape)) + 2 * len(str(data_bytes))


@contextmanager
def writing(
    path: str | os.PathLike, header_bytes: int, metadata: dict[str, str], new: bool = False
) -> Iterator[TensorWriter]:
    """A TensorWriter for a file that takes its name only when it is complete and on the disk.

    header_bytes: the room to leave for the header, from `header_room`. new: whether nothing may have the name by then.
    """
    with appearing_whole(path, new) as file:
        writer = TensorWriter(file, header_bytes)
        yield writer
        writer.finish(metadata)
