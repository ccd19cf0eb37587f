"""Checkpoints: quantized tensors in safetensors files that bitsandbytes reads too, in one file or in shards.

Files are read one tensor at a time. What is stored in them is in `keys`; what makes one checkpoint of another, without
holding either in memory, in `convert`.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor

from nf4lab.blockwise import QuantizedTensor
from nf4lab.checkpoints.checked_json import read_json, without_duplicates
from nf4lab.checkpoints.keys import BITSANDBYTES_PARTS, NF4LAB_PARTS, STATES, from_parts, parts_of
from nf4lab.checkpoints.partial import appearing_whole
from nf4lab.checkpoints.tensorfile import TensorFile, entry_room, header_room, writing

INDEX = "model.safetensors.index.json"
METADATA = {"format": "pt"}  # transformers opens no file without it


def save_quantized(path: str | os.PathLike, tensors: dict[str, QuantizedTensor | Tensor]) -> None:
    """Write tensors by name to one safetensors file, quantized ones with bitsandbytes' keys where it has any.

    The file takes its name only when it is complete; one that had the name before is replaced. bitsandbytes reads
    NF4 and FP4 in its block sizes, 32 and up, and says that it does not take 16.

    Raises TypeError for anything that is not a tensor, and a name that is no string; ValueError for two tensors with
    one name, for a dtype that safetensors lacks, for a tensor that is sparse or on the meta device, and for a Format of
    one's own with a normalisation of one's own, which no file can hold.
    """
    for name, tensor in tensors.items():
        if not isinstance(name, str):
            raise TypeError(f"a tensor's name must be a string; got {name!r}")
        if not isinstance(tensor, QuantizedTensor | Tensor):
            raise TypeError(f"{name!r} must be a QuantizedTensor or a torch.Tensor; got {type(tensor).__name__}")
        if isinstance(tensor, Tensor) and (tensor.layout != torch.strided or tensor.is_meta):
            raise ValueError(f"{name!r} must be dense and have data; got {tensor.layout} on {tensor.device}")
    parts = [part for name, tensor in in_order(tensors.items()) for part in parts_of(name, tensor).items()]
    nbytes = sum(part.nbytes for _, part in parts)
    room = header_room((entry_room(name, tuple(part.shape), nbytes) for name, part in parts), METADATA)
    with writing(path, room, METADATA) as file:
        for name, part in parts:
            file.add(name, part)


def load_quantized(path: str | os.PathLike) -> dict[str, QuantizedTensor | Tensor]:
    """The tensors of a checkpoint by name, on the CPU: QuantizedTensor where one was stored, else Tensor.

    path: a safetensors file, an index of shards (`….safetensors.index.json`), or a folder that holds either. Files
    of bitsandbytes are read as well as nf4lab's own, whatever dtype their packed bytes are stored as.

    Raises FileNotFoundError where there is none, ValueError, with the names and numbers that disagree, for a file
    that is truncated or contradicts itself. Nothing is repaired.
    """
    return dict(iterate_quantized(path))


def iterate_quantized(path: str | os.PathLike) -> Iterator[tuple[str, QuantizedTensor | Tensor]]:
    """The pairs of `load_quantized`, one at a time: no more than one tensor need be in memory."""
    with opened(path) as files:
        place = {key: file for file in files for key in file.entries}
        for name, keys in stored_tensors(list(place)).items():  # its parts may lie in several shards
            yield name, from_parts(name, {key: place[key].read(key) for key in keys}, place[name].path.name)


@contextmanager
def opened(path: str | os.PathLike) -> Iterator[list[TensorFile]]:
    """The files of a checkpoint, open for reading: one, or the shards of an index, each checked against the index."""
    path = checkpoint_path(path)
    weight_map = None if path.suffix != ".json" else read_index(path)
    names = [path.name] if weight_map is None else dict.fromkeys(weight_map.values())
    with ExitStack() as stack:
        files = [stack.enter_context(TensorFile(path.parent / name)) for name in names]
        if weight_map is not None:
            _check_index(weight_map, files, path.name)
        yield files


def checkpoint_path(path: str | os.PathLike) -> Path:
    """The file or the index that a path names: itself, or what its folder holds; of both the file, as transformers."""
    path = Path(path)
    if not path.is_dir():
        _check_not_of_the_hub(path)
        return path
    for name in ("model.safetensors", INDEX):
        if os.path.lexists(path / name):  # a link that leads nowhere is no absence, and fails when it is opened
            return path / name
    others = sorted(p.name for p in path.iterdir() if p.suffix in (".safetensors", ".bin", ".pt", ".pth", ".gguf"))
    there = f"; there are {', '.join(others[:3])}" if others else ""
    raise FileNotFoundError(f"{path} holds neither {INDEX} nor model.safetensors{there}")


def _check_not_of_the_hub(path: Path) -> None:
    """Raise FileNotFoundError, with the way to the files, for owner/model, where there is no folder of the owner's."""
    if len(path.parts) == 2 and path.suffix != ".safetensors" and not os.path.lexists(path.parent):
        way = f"hf download {path} --local-dir {path.name}"
        raise FileNotFoundError(f"no file or folder here is called {path}; if it is a model of the Hub: {way}")


def _check_index(weight_map: dict[str, str], files: list[TensorFile], index: str) -> None:
    """Raise unless each shard holds exactly the tensors that the index places there."""
    listed: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        listed.setdefault(shard, set()).add(name)
    for file in files:
        shard = file.path.name
        if listed[shard] != set(file.entries):
            name = min(listed[shard] ^ set(file.entries))
            in_index = name in listed[shard]
            one, other = (index, "it does not") if in_index else (shard, f"{index} does not place it there")
            raise ValueError(f"{one} says that tensor {name!r} is in {shard}; {other}")


def read_index(path: Path) -> dict[str, str]:
    """The map from tensors to shards of an index file. Raises ValueError where it has none or leaves its folder."""
    index = read_json(path, path.name, object_pairs_hook=without_duplicates)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path.name} must map tensors to shards under 'weight_map'; got {weight_map!r:.80}")
    for shard in weight_map.values():
        is_name = isinstance(shard, str) and shard.endswith(".safetensors") and "\0" not in shard
        if not is_name or str(Path(shard)) != Path(shard).name:
            raise ValueError(f"{path.name}: a shard is a safetensors file in the same folder; got {shard!r:.80}")
    return {name: str(Path(shard)) for name, shard in weight_map.items()}  # without ./ before it


def write_index(path: Path, shards: dict[str, dict[str, int]]) -> None:
    """Write the index of shards that are complete. shards: by the shard's name the bytes of each tensor by name."""
    weight_map = {name: shard for shard, tensors in shards.items() for name in tensors}
    total = sum(nbytes for tensors in shards.values() for nbytes in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    with appearing_whole(path) as file:
        file.write((json.dumps(index, indent=2) + "\n").encode())


def in_order(tensors: Iterable[tuple[str, QuantizedTensor | Tensor]]) -> list:
    """Quantized tensors first, then by falling itemsize: so every tensor starts at a multiple of its itemsize."""
    return sorted(tensors, key=lambda pair: -16 if isinstance(pair[1], QuantizedTensor) else -pair[1].dtype.itemsize)


def stored_tensors(keys: list[str]) -> dict[str, list[str]]:
    """The names of the tensors that the keys of a checkpoint belong to, each with the keys of its parts.

    Raises ValueError for parts of a quantized tensor that lack the rest.
    """
    states = {key: key.removesuffix(end) for key in keys for end in STATES if key.endswith(end)}
    known, counts = set(keys), Counter(states.values())
    for name, count in counts.items():
        if name not in known:
            raise ValueError(f"there is a quant_state for {name!r}, and no tensor of that name")
        if count > 1:
            raise ValueError(f"tensor {name!r} has {count} quant_states")
    owner = states | {name + end: name for name in counts for end in (*BITSANDBYTES_PARTS, *NF4LAB_PARTS)}
    parts: dict[str, list[str]] = {}
    for key in keys:
        _check_no_orphan(key, known, owner)
        parts.setdefault(owner.get(key, key), []).append(key)
    return parts


def _check_no_orphan(key: str, known: set[str], owner: dict[str, str]) -> None:
    """Raise for constants of packed bytes without a quant_state: the bytes would pass for an ordinary tensor."""
    base = next((key.removesuffix(end) for end in BITSANDBYTES_PARTS if key.endswith(end)), None)
    if base in known and key not in owner:
        raise ValueError(f"there is {key!r}, and no quant_state for {base!r}")
