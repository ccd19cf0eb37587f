"""A language model's folder rotated, corrected and quantized: better codes in files that the same tools read."""

import os
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from nf4lab.beyond.calibration import calibrate
from nf4lab.beyond.folding import fold_rotation_
from nf4lab.checkpoints.architecture import architecture_of, matrices_of
from nf4lab.checkpoints.convert import check_target
from nf4lab.checkpoints.files import opened
from nf4lab.checkpoints.folder import check_not_quantized, copy_others, read_config
from nf4lab.checkpoints.partial import folder_appearing_whole
from nf4lab.formats import Format
from nf4lab.formats.double_quant import DoubleQuant
from nf4lab.layers.swap import QuantizedLayers, quantize_model_

WINDOW = 512  # tokens that the model is given at once, at most


def quantize_language_model(
    source: str | os.PathLike,
    target: str | os.PathLike,
    format: str | Format = "nf4",
    block_size: int | None = None,
    double_quant: bool | str | DoubleQuant = False,
    *,
    rotate: int | None = None,
    text: str | None = None,
    include: str | Iterable[str] = "*",
    exclude: str | Iterable[str] = (),
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> QuantizedLayers:
    """Quantize a causal language model of transformers from folder to folder; returns a row for each layer.

    rotate: the seed of a rotation to fold into the model (`nf4lab.beyond.folding`), None for none. text: what to
    calibrate with, for error feedback in every linear layer (`nf4lab.quantize(…, hessian=…)`), not in fused experts;
    None for none. Both leave the format as it is, so transformers and bitsandbytes read NF4 and FP4. The other
    arguments are those of `nf4lab.quantize_checkpoint`.

    The whole model is in memory, and for calibration a float64 matrix as wide as its input for each layer.

    Raises FileExistsError where target exists, ValueError where source is not a folder of a causal language model with
    all its weights, is quantized already, can't be rotated, or where there is nothing in text; otherwise as
    `nf4lab.quantize_model_`. Warns where text has fewer tokens than the widest layer has inputs.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, target = Path(source), Path(os.path.abspath(target))
    check_target(target)
    if text is not None and not text.strip():
        raise ValueError("there is nothing in the text to calibrate with")
    config = read_config(source) if source.is_dir() else None
    if config is None:
        raise ValueError(f"{source} is not a folder with a config.json: a whole model is needed to rotate or calibrate")
    check_not_quantized(source, config, {})
    with opened(source) as files:
        architecture_of(source, config, matrices_of(files))  # raises for what transformers would hang on
    model, found = AutoModelForCausalLM.from_pretrained(source, dtype="auto", output_loading_info=True)
    if found["missing_keys"]:
        first = min(found["missing_keys"])
        raise ValueError(f"{source} is not a whole causal language model: {type(model).__name__} needs {first!r}")
    model = model.to(device).eval()
    if rotate is not None:
        fold_rotation_(model, rotate)
    hessians = None
    if text is not None:
        tokenizer = AutoTokenizer.from_pretrained(source)
        ids = tokenizer(text)["input_ids"]
        hessians = calibrate(model, windows(ids, model.config, device))
        _warn_of_few(len(ids), max(map(len, hessians.values())))
    rows = quantize_model_(
        model, format, block_size, double_quant, include=include, exclude=exclude, hessians=hessians, progress=progress
    )
    with folder_appearing_whole(target) as partial:
        copy_others(source, partial, set())
        model.save_pretrained(partial)
    return rows


def _warn_of_few(n_tokens: int, width: int) -> None:
    if n_tokens < width:
        warnings.warn(
            f"{n_tokens} tokens to calibrate with are fewer than the widest layer's {width} inputs: take more text",
            stacklevel=3,
        )


def windows(ids: list[int], config, device: str | torch.device) -> Iterator[Tensor]:
    """Token ids in pieces that the model takes: int64 (1, up to WINDOW). Raises ValueError where there is none."""
    if not ids:
        raise ValueError("the text to calibrate with has no token")
    width = min(WINDOW, getattr(config, "max_position_embeddings", WINDOW))
    for start in range(0, len(ids), width):
        yield torch.tensor([ids[start : start + width]], device=device)
