"""A model's folder beside its weights: its configuration, what other files go along, and what is quantized already."""

import json
import os
import shutil
import warnings
from collections.abc import Collection, Iterable, Iterator
from itertools import chain
from pathlib import Path

import torch

from nf4lab.checkpoints.checked_json import read_json
from nf4lab.checkpoints.keys import BITSANDBYTES_STATES, NF4LAB_STATE
from nf4lab.checkpoints.tensorfile import Entry
from nf4lab.choice import matches
from nf4lab.formats import Format
from nf4lab.formats.double_quant import DoubleQuant

WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.onnx_data")
NOT_COPIED = (*WEIGHTS, "*.index.json")
ADAPTER = "adapter_config.json"  # PEFT's, beside an adapter's weights
CONFIGS = {"quantize_config.json": "GPTQ", "quant_config.json": "AWQ", "hf_quant_config.json": "ModelOpt"}
# What stands at the end of the keys of quantized tensors, and who writes it so.
MARKS = {
    NF4LAB_STATE: "nf4lab",
    **{suffix: f"bitsandbytes ({name})" for suffix, name in BITSANDBYTES_STATES.items()},
    ".SCB": "bitsandbytes (int8)",
    ".qweight": "GPTQ or AWQ",
    ".weight_packed": "compressed-tensors",
    ".weight_scale_inv": "FP8",
    ".weight_scale": "FP8 or int8",
    ".weight_scales": "EETQ",
    ".q_weight": "EXL2",
    ".W_q": "HQQ",
    ".codebooks": "AQLM",
    ".weight._data": "Quanto",
    "_blocks": "MXFP4",
}


def read_config(folder: Path) -> dict | None:
    """The config.json of a folder, None without one. Raises ValueError, with its name, unless it is a JSON object."""
    path = folder / "config.json"
    if not os.path.lexists(path):  # a link that leads nowhere is no absence, and fails below
        return None
    values = read_json(path, path)
    if not isinstance(values, dict):
        raise ValueError(f"{path} must be a JSON object; got {values!r:.80}")
    return values


def check_not_quantized(source: Path, config: dict | None, entries: dict[str, Entry]) -> None:
    """Raise ValueError, naming the method, where a file or a folder is quantized already."""
    method = _method_of(config or {}) or next((how for file, how in CONFIGS.items() if (source / file).exists()), None)
    at = ""
    if method is None:
        key, method = next(chain(_marked(entries), _of_a_type(entries)), ("", None))
        at = f" (tensor {key!r})"
    if method is not None:
        raise ValueError(f"{source} is quantized already, by {method}{at}: quantize the original instead")


def _marked(keys: Collection[str]) -> Iterator[tuple[str, str]]:
    """(key, method) of each tensor whose name tells that it is a part of a quantized one."""
    for key in keys:
        method = next((how for end, how in MARKS.items() if key.endswith(end)), None)
        if method is not None and (method != "MXFP4" or f"{key.removesuffix('_blocks')}_scales" in keys):
            yield key, method


def _of_a_type(entries: dict[str, Entry]) -> Iterator[tuple[str, str]]:
    """(key, method) of each tensor whose type tells: no one trains weights that are integers or have 8 bits.

    A number or a row in 8 bits, the scale of a cache, say, is no weight.
    """
    for key, entry in entries.items():
        dtype = str(entry.dtype).removeprefix("torch.")
        if dtype.startswith("float8") and (len(entry.shape) > 1 or key.endswith(".weight")):
            yield key, "FP8"
        elif "int" in dtype and key.endswith(".weight"):
            yield key, f"a method that stores weights as {dtype}"


def _method_of(config: dict) -> str | None:
    """The quantization method that a configuration, or a part of it, names."""
    for key in ("quantization_config", "compression_config"):
        values = config.get(key)
        if values and not isinstance(values, dict):
            return str(values)
        if values:
            bits = ", 8 bits" if values.get("load_in_8bit") else ", 4 bits" if values.get("load_in_4bit") else ""
            return f"{values.get('quant_method') or values.get('quant_type') or 'a method that it does not name'}{bits}"
    parts = (_method_of(part) for part in config.values() if isinstance(part, dict))
    return next(filter(None, parts), None)


def copy_others(source: Path, target: Path, weights: set[str]) -> list[str]:
    """Copy what holds no weights: configurations, tokenizers, licences, subfolders. Returns what was left out, by name.

    weights: the files that the model was read from, which are not counted as left out.

    Hidden files stay behind; links become what they point to. In a subfolder that a modules.json lists, a part of a
    sentence-transformers model, and in one of an adapter, weights go along; in any other they are the same model in
    another form. An adapter beside the model stays behind: transformers would open the folder as that adapter's, on
    the model that it names, which is not the one in 4 bits.
    """
    parts = _listed_modules(source)
    left_out = []
    for path in _all_in(source):
        inside = path.relative_to(source)
        if path.is_dir():
            (target / inside).mkdir()
        elif path.is_file() and _goes_along(path, inside, parts):
            shutil.copyfile(path, target / inside)
        elif inside.as_posix() not in weights:
            left_out.append(inside.as_posix())
    return left_out


def _goes_along(path: Path, inside: Path, parts: set[str]) -> bool:
    """Whether a file is copied. inside: its path in the folder. parts: subfolders whose weights are copied too."""
    if inside.parent == Path():
        return not matches(path.name, (*NOT_COPIED, ADAPTER))
    is_part = inside.parent.as_posix() in parts or path.with_name(ADAPTER).exists()
    return is_part or not matches(path.name, NOT_COPIED)


def _all_in(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """What is in a folder and in the folders there, each folder before its content, links followed but not upwards."""
    above = (*above, folder.resolve())
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        yield path
        if path.is_dir() and not any(outer.is_relative_to(path.resolve()) for outer in above):
            yield from _all_in(path, above)


def _listed_modules(source: Path) -> set[str]:
    """The subfolders that a modules.json of sentence-transformers lists."""
    try:
        modules = json.loads((source / "modules.json").read_text(encoding="utf-8"))
        return {module["path"] for module in modules if module["path"]}
    except (OSError, ValueError, TypeError, KeyError):
        return set()


def not_for_bitsandbytes(format: Format, block_size: int, double_quant: bool | DoubleQuant) -> str:
    """Why bitsandbytes can't read a tensor that is quantized so; empty where it can."""
    if format.name not in BITSANDBYTES_STATES.values() or double_quant not in (False, DoubleQuant()):
        return "bitsandbytes has no word for this format or its constants"
    return "" if block_size >= 32 else f"bitsandbytes takes blocks of 32 and more, not {block_size}"


def dtype_of(config: dict) -> str | None:
    """The dtype that a config.json, or a part of it, gives the model, as torch calls it; None where it says nothing.

    "half" is float16 in torch, too.
    """
    own = config.get("dtype") or config.get("torch_dtype")
    if own:
        name = str(own).removeprefix("torch.")
        return str(getattr(torch, name, name)).removeprefix("torch.")
    parts = (dtype_of(part) for part in config.values() if isinstance(part, dict))
    return next(filter(None, parts), None)


def warn_of_widths(widths: dict[str, int], block_size: int, stacklevel: int = 2) -> None:
    """Warn of layers, by name with their number of inputs, that bitsandbytes decodes wrongly on some CPUs.

    Seen in 0.50.2, on a CPU with AVX-512, for every number of inputs that is a multiple of 16 and not of the block.
    """
    wrong = {name: width for name, width in widths.items() if width % block_size and not width % 16}
    if wrong:
        name, width = next(iter(wrong.items()))
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        warnings.warn(
            f"{name}{more}: rows of {width} weights hold no whole number of blocks of {block_size}; on CPUs with "
            "AVX-512 bitsandbytes decodes them wrongly: after nf4lab.adopt_ they are right",
            stacklevel=stacklevel + 1,
        )


def quantization_config(
    format: Format, double_quant: bool | DoubleQuant, skip: Iterable[str], ours: str, dtype: str | None = None
) -> dict:
    """What config.json says of the quantization: in transformers' words, or in nf4lab's where `ours` gives a reason.

    dtype: of the model; in one of 16 bits bitsandbytes is to compute, too, as it would by itself, and as `Linear4bit`
    does. Where nothing is said, transformers has it compute in float32.
    """
    if ours:
        return {"quant_method": "nf4lab", "format": format.name, "reason": ours}
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_compute_dtype": dtype if dtype in ("float16", "bfloat16") else "float32",
        "bnb_4bit_quant_type": format.name,
        "bnb_4bit_use_double_quant": bool(double_quant),
        "llm_int8_skip_modules": list(skip),
    }


def write_config(folder: Path, config: dict, quantization: dict) -> None:
    """Write config.json with what it is to say of the quantization."""
    text = json.dumps(config | {"quantization_config": quantization}, indent=2)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
