"""What a file stores of a quantized tensor, key by key: bitsandbytes' keys where it has any, and back again.

NF4 and FP4 with plain constants or QLoRA's double quantization are stored as bitsandbytes stores them, so that it
reads them and they read what it wrote:

    name                                   packed uint8 (n_bytes, 1)
    name.absmax                            float32 (n_blocks,), or uint8 codes after double quantization
    name.quant_map                         float32 (16,): the levels
    name.nested_absmax, .nested_quant_map  float32 (n_groups,) and (256,), after double quantization
    name.quant_state.bitsandbytes__nf4     uint8: a JSON with the block size, the original's dtype and shape, …

bitsandbytes has no word for the rest. It is stored under `name.quant_state.nf4lab`, which bitsandbytes refuses.
Source: bitsandbytes `QuantState.as_dict`.
"""

import dataclasses
import json
import math

import torch
from torch import Tensor

from nf4lab.blockwise import BLOCK_SIZES, QuantizedTensor
from nf4lab.blockwise import DTYPES as ORIGINAL_DTYPES
from nf4lab.checkpoints.checked_json import is_shape, without_duplicates
from nf4lab.formats import FORMATS, NORMALIZATIONS, Format
from nf4lab.formats.double_quant import MAPS, DoubleQuant, QuantizedConstants
from nf4lab.formats.packing import packed_bytes

BITSANDBYTES_STATES = {f".quant_state.bitsandbytes__{name}": name for name in ("nf4", "fp4")}
NF4LAB_STATE = ".quant_state.nf4lab"
STATES = (*BITSANDBYTES_STATES, NF4LAB_STATE)
BITSANDBYTES_PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
CONSTANTS_PARTS = ("", ".group_absmax", ".offset")  # of each of KINDS
KINDS = (".scale", ".location")
NF4LAB_PARTS = (".levels", ".tensor_scale", *(kind + part for kind in KINDS for part in CONSTANTS_PARTS))
# What else makes a format: plain values, with what a file that lacks them means.
FORMAT_FIELDS = {
    field.name: field.default
    for field in dataclasses.fields(Format)
    if field.name not in ("name", "levels", "normalize", "constants_dtype")
} | {"stored_bits": 4}
LONGEST_NUMBER = torch.finfo(torch.float32).tiny  # 22 characters, as long as any that a float32 has and is not negative
DTYPE_BY_NAME = {str(dtype).removeprefix("torch."): dtype for dtype in ORIGINAL_DTYPES}


def parts_of(name: str, tensor: QuantizedTensor | Tensor) -> dict[str, Tensor]:
    """What a file stores of a tensor, by key; of a plain tensor, itself. Raises ValueError for what no file can hold.

    The JSON is padded with spaces: to a length that no number in it changes, so that the parts of two weights that are
    stored alike have equal shapes, and to whole multiples of 8 bytes over all parts.
    """
    if isinstance(tensor, Tensor):
        return {name: tensor}
    bitsandbytes = _is_bitsandbytes(tensor)
    suffix, state, parts = _bitsandbytes_parts(tensor) if bitsandbytes else _nf4lab_parts(tensor)
    parts = {name + key: part for key, part in parts.items()} | {name: tensor.packed.reshape(-1, 1)}
    longest = state | ({"nested_offset": LONGEST_NUMBER} if "nested_offset" in state else {})
    text = json.dumps(state).ljust(len(json.dumps(longest))).encode()
    nbytes = sum(part.nbytes for part in parts.values()) + len(text)
    text += b" " * (-nbytes % 8)
    return parts | {name + suffix: torch.frombuffer(bytearray(text), dtype=torch.uint8)}


def _is_bitsandbytes(q: QuantizedTensor) -> bool:
    """Whether bitsandbytes has words for this tensor."""
    known = q.format.name in BITSANDBYTES_STATES.values() and q.format == FORMATS[q.format.name]
    return known and (isinstance(q.stored_scale, Tensor) or q.stored_scale.double_quant == DoubleQuant())


def _bitsandbytes_parts(q: QuantizedTensor) -> tuple[str, dict, dict[str, Tensor]]:
    """(the state's key, the state, the other parts by key), as bitsandbytes' QuantState.as_dict(packed=True)."""
    state = {"quant_type": q.format.name, "blocksize": q.block_size, **_original(q)}
    levels, constants = q.format.levels, q.stored_scale
    suffix = f".quant_state.bitsandbytes__{q.format.name}"
    if isinstance(constants, Tensor):
        return suffix, state, {".absmax": constants, ".quant_map": levels}
    state |= {"nested_blocksize": constants.double_quant.group_size, "nested_dtype": "float32"}
    has_number = constants.offset is not None and not constants.offset.is_meta
    state["nested_offset"] = constants.offset.item() if has_number else 0.0
    nested = {".nested_absmax": constants.group_absmax, ".nested_quant_map": MAPS["dynamic8"].levels}
    return suffix, state, nested | {".quant_map": levels, ".absmax": constants.codes}


def _nf4lab_parts(q: QuantizedTensor) -> tuple[str, dict, dict[str, Tensor]]:
    """(the state's key, the state, the other parts by key) of a tensor that bitsandbytes has no words for."""
    state = {"format": q.format.name, "block_size": q.block_size, **_original(q)}
    state["constants_dtype"] = str(q.format.constants_dtype).removeprefix("torch.")
    if FORMATS.get(q.format.name) != q.format:
        state["normalize"] = _normalization_name(q.format)
        state["fields"] = {name: getattr(q.format, name) for name in FORMAT_FIELDS if name != "stored_bits"}
        if q.format.code_bits != FORMAT_FIELDS["stored_bits"]:
            state["fields"]["stored_bits"] = q.format.code_bits
    parts = {".levels": q.format.levels}
    if q.tensor_scale is not None:
        parts[".tensor_scale"] = q.tensor_scale
    for key, constants in zip(KINDS, (q.stored_scale, q.stored_location), strict=True):
        if isinstance(constants, QuantizedConstants):
            scheme = constants.double_quant
            state["double_quant"] = {"map": scheme.map, "centred": scheme.centred, "group_size": scheme.group_size}
            parts |= {f"{key}.group_absmax": constants.group_absmax}
            parts |= {} if constants.offset is None else {f"{key}.offset": constants.offset}
            parts[key] = constants.codes
        elif constants is not None:
            parts[key] = constants.to(q.format.constants_dtype)  # exact: it was rounded to that before it was used
    return NF4LAB_STATE, state, dict(sorted(parts.items(), key=lambda item: -item[1].dtype.itemsize))


def _normalization_name(format: Format) -> str:
    if format.normalization in NORMALIZATIONS.values():
        return format.normalization.name
    raise ValueError(
        f"format {format.name!r} normalises by a function of its own, which no file can hold; "
        f"known are {', '.join(NORMALIZATIONS)}"
    )


def _original(q: QuantizedTensor) -> dict:
    return {"dtype": str(q.dtype).removeprefix("torch."), "shape": list(q.shape)}


def describe(state: Tensor) -> tuple[str, tuple[int, ...]]:
    """How a quantized tensor is stored, in words, and the shape of its original, both from its quant_state."""
    values = _parse_state(state)
    dtype, shape, block_size = _checked_original(values, "blocksize" if "blocksize" in values else "block_size")
    name = values.get("quant_type", values.get("format"))
    nested = " + double quantization" if {"nested_blocksize", "double_quant"} & set(values) else ""
    return f"{name}, blocks of {block_size}{nested}, from {str(dtype).removeprefix('torch.')}", tuple(shape)


def from_parts(name: str, parts: dict[str, Tensor], where: str = "") -> QuantizedTensor | Tensor:
    """The tensor that parts by key, as `parts_of` gives them, were made from: the inverse.

    Raises ValueError, naming the tensor and the numbers, where they contradict each other.
    """
    states = [key for key in parts if key.startswith(name) and key.removeprefix(name) in STATES]
    if not states:
        return parts[name]
    by_suffix = {key.removeprefix(name): part for key, part in parts.items()}
    suffix = states[0].removeprefix(name)
    try:
        state = _parse_state(by_suffix.pop(suffix))
        packed = _bytes_of(by_suffix.pop(""))
        if suffix == NF4LAB_STATE:
            return _from_nf4lab(packed, state, by_suffix)
        return _from_bitsandbytes(packed, state, by_suffix, BITSANDBYTES_STATES[suffix])
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where + ': ' if where else ''}tensor {name!r}: {error}") from None


def _parse_state(part: Tensor) -> dict:
    if part.dtype != torch.uint8:
        raise ValueError(f"the quant_state is JSON in uint8; got {part.dtype}")
    try:
        state = json.loads(bytes(part.reshape(-1).tolist()).decode("utf-8"), object_pairs_hook=without_duplicates)
    except (ValueError, RecursionError) as error:
        if str(error).startswith(
            "Extra data"
        ):  # (5.23) a query's, a key's and a value's, of a model in bitsandbytes' 4 bits
            error = "several stand in one: transformers joined the parts of several weights when it saved the model"
        raise ValueError(f"the quant_state is not JSON: {error}") from None
    if not isinstance(state, dict):
        raise ValueError(f"the quant_state must be a JSON object; got {state!r:.80}")
    return state


def _bytes_of(packed: Tensor) -> Tensor:
    """Packed codes as uint8 (n_bytes,): bitsandbytes can store them as another dtype of the same bytes."""
    return packed.reshape(-1).view(torch.uint8)


def _from_bitsandbytes(packed: Tensor, state: dict, parts: dict[str, Tensor], name: str) -> QuantizedTensor:
    nested = [key for key in (*state, *parts) if key.lstrip(".").startswith("nested_")]
    wanted = {"quant_type", "blocksize", "dtype", "shape"}
    wanted |= {"nested_blocksize", "nested_dtype", "nested_offset"} if nested else set()
    _check_keys(state, wanted)
    _check_keys(parts, set(BITSANDBYTES_PARTS if nested else BITSANDBYTES_PARTS[:2]))
    if state["quant_type"] != name:
        raise ValueError(f"its key says {name}, its quant_state says {state['quant_type']!r:.80}")
    format = FORMATS[name]
    _check_levels(parts[".quant_map"], format.levels, f"quant_map of {name}")
    dtype, shape, block_size = _checked_original(state, "blocksize")
    n_blocks = -(-math.prod(shape) // block_size)
    if not nested:
        scale = _checked_constants(parts[".absmax"], torch.float32, n_blocks, "absmax")
        if (scale < 0).any():
            raise ValueError(f"absmax must be at least 0; the least is {scale.min().item()}")
    else:
        if state["nested_dtype"] != "float32":
            raise ValueError(f"nested_dtype must be float32; got {state['nested_dtype']!r:.80}")
        _check_levels(parts[".nested_quant_map"], MAPS["dynamic8"].levels, "nested_quant_map")
        scheme = DoubleQuant(group_size=state["nested_blocksize"])
        number = _checked_number(state["nested_offset"])
        device = parts[".absmax"].device
        offset = torch.tensor(number, dtype=torch.float32, device=device) if n_blocks else None
        scale = _constants(parts[".absmax"], parts[".nested_absmax"], offset, n_blocks, scheme)
    return QuantizedTensor(packed, scale, None, format, shape, dtype, block_size)


def _from_nf4lab(packed: Tensor, state: dict, parts: dict[str, Tensor]) -> QuantizedTensor:
    optional = {"double_quant"} & set(state) | ({"normalize", "fields"} if "normalize" in state else set())
    _check_keys(state, {"format", "block_size", "dtype", "shape", "constants_dtype"} | optional)
    format = _checked_format(state, parts.pop(".levels", None))
    dtype, shape, block_size = _checked_original(state, "block_size")
    scheme = None
    if "double_quant" in state:
        if not isinstance(state["double_quant"], dict):
            raise ValueError(f"double_quant must be a JSON object; got {state['double_quant']!r:.80}")
        _check_keys(state["double_quant"], {"map", "centred", "group_size"})
        if not isinstance(state["double_quant"]["centred"], bool):
            raise ValueError(f"centred must be true or false; got {state['double_quant']['centred']!r:.80}")
        scheme = DoubleQuant(**state["double_quant"])
    n_blocks = -(-math.prod(shape) // block_size)
    kinds = KINDS if format.normalization.has_location else KINDS[:1]
    n_parts = 1 if scheme is None else 3 if scheme.centred and n_blocks else 2
    wanted = {kind + part for kind in kinds for part in CONSTANTS_PARTS[:n_parts]}
    _check_keys(parts, wanted | ({".tensor_scale"} if format.tensor_scale else set()))
    stored = {}
    for kind in kinds:
        if scheme:
            group_absmax, offset = parts[f"{kind}.group_absmax"], parts.get(f"{kind}.offset")
            if offset is not None:
                offset = _checked_constants(offset, torch.float32, 1, f"{kind[1:]}.offset").reshape(())
            stored[kind] = _constants(parts[kind], group_absmax, offset, n_blocks, scheme)
        else:
            stored[kind] = _checked_constants(parts[kind], format.constants_dtype, n_blocks, kind[1:]).float()
    tensor_scale = None
    if format.tensor_scale:
        tensor_scale = _checked_constants(parts[".tensor_scale"], torch.float32, 1, "tensor_scale").reshape(())
    scale, location = stored[".scale"], stored.get(".location")
    return QuantizedTensor(packed, scale, location, format, shape, dtype, block_size, tensor_scale)


def _checked_format(state: dict, levels: Tensor | None) -> Format:
    """The row of the table, or the Format of somebody's own, that a state describes."""
    name, dtype = state["format"], getattr(torch, str(state["constants_dtype"]), None)
    if levels is None or not isinstance(name, str) or not isinstance(dtype, torch.dtype):
        raise ValueError(f"format, constants_dtype or levels are missing: {state!r:.200}")
    if "normalize" not in state:
        if name not in FORMATS or FORMATS[name].constants_dtype != dtype:
            raise ValueError(f"this version has no format {name!r} with constants in {dtype}")
        _check_levels(levels, FORMATS[name].levels, f"levels of {name}")
        return FORMATS[name]
    if state["normalize"] not in NORMALIZATIONS:
        raise ValueError(f"unknown normalisation {state['normalize']!r}; known are {', '.join(NORMALIZATIONS)}")
    if levels.dtype != torch.float32 or levels.dim() != 1:
        raise ValueError(f"levels must be float32 in one dimension; got {tuple(levels.shape)} of {levels.dtype}")
    rule, values = NORMALIZATIONS[state["normalize"]].rule, _checked_fields(state["fields"])
    return Format(name, levels, rule, dtype, **{"stored_bits": FORMAT_FIELDS["stored_bits"]} | values)


def _checked_fields(values: object) -> dict:
    """The other values that make a format, each of the type of its default; one that is missing has its default."""
    if not isinstance(values, dict):
        raise ValueError(f"fields must be a JSON object; got {values!r:.80}")
    _check_keys(values, set(FORMAT_FIELDS) & set(values))
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    for name, value in values.items():
        types = (int, float) if isinstance(FORMAT_FIELDS[name], float) else (type(FORMAT_FIELDS[name]),)
        if type(value) not in types:
            raise ValueError(f"{name} of a format must be a {types[-1].__name__}; got {value!r:.80}")
    return values


def _checked_original(state: dict, key: str) -> tuple[torch.dtype, torch.Size, int]:
    """The original's dtype and shape, and the block size, which stands under `key`."""
    dtype, shape, block_size = state["dtype"], state["shape"], state[key]
    if not isinstance(dtype, str) or dtype not in DTYPE_BY_NAME:
        raise ValueError(f"dtype must be one of {', '.join(DTYPE_BY_NAME)}; got {dtype!r:.80}")
    if not is_shape(shape):
        raise ValueError(f"a shape is a list of integers of at least 0; got {shape!r:.80}")
    if type(block_size) is not int or block_size not in BLOCK_SIZES:
        raise ValueError(f"{key} must be one of 16, 32, 64, …, 4096; got {block_size!r:.80}")
    return DTYPE_BY_NAME[dtype], torch.Size(shape), block_size


def _constants(
    codes: Tensor, group_absmax: Tensor, offset: Tensor | None, n: int, scheme: DoubleQuant
) -> QuantizedConstants:
    """Double-quantized constants whose parts fit each other."""
    n_bytes = packed_bytes(n, MAPS[scheme.map].code_bits)
    codes = _checked_constants(codes, torch.uint8, n_bytes, "codes of the constants")
    n_groups = -(-n // scheme.group_size)
    group_absmax = _checked_constants(group_absmax, torch.float32, n_groups, "absmax of the groups of constants")
    return QuantizedConstants(codes, group_absmax, offset, n, scheme)


def _checked_constants(part: Tensor, dtype: torch.dtype, n: int, what: str) -> Tensor:
    if part.dtype != dtype or part.numel() != n:
        raise ValueError(f"{what} must be {n} {dtype}; got {part.numel()} {part.dtype}")
    if dtype.is_floating_point and not part.float().isfinite().all():
        raise ValueError(f"{what} must be finite; {(~part.float().isfinite()).sum()} of {n} are not")
    return part.reshape(-1)


def _checked_number(value: object) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"nested_offset must be a finite number; got {value!r:.80}")
    return float(value)


def _check_levels(stored: Tensor, expected: Tensor, what: str) -> None:
    if stored.dtype != expected.dtype or not torch.equal(stored.reshape(-1).cpu(), expected):
        raise ValueError(f"the {what} is not the published one; got {stored.numel()} {stored.dtype} beginning with "
                         f"{stored.reshape(-1)[:3].tolist()}")  # fmt: skip


def _check_keys(found: dict, expected: set[str]) -> None:
    if set(found) != expected:
        missing, unknown = sorted(expected - set(found)), sorted(set(found) - expected)
        raise ValueError(f"missing are {missing or 'none'}, unknown are {unknown or 'none'}")
