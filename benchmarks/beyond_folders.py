"""A folder that `nf4lab quantize --rotate --calibrate` writes, judged through transformers and bitsandbytes.

The part "folders" of `python benchmarks/beyond.py`. The model is nf4lab.models.manuals_model, whose weights are
bfloat16; calibrated and judged on the pages of the part "language model". Each folder in two ways that are as good as
one another: rotations with another seed; without one, from the model with every matrix negated, which computes the same
and uses each code for the other sign. "rotated, 16 bits": the rotation alone, rounded to bfloat16 and not quantized.
"""

import tempfile
from pathlib import Path

import torch

from nf4lab.__main__ import main
from nf4lab.beyond.folding import fold_rotation_
from nf4lab.models.manuals import FOLDER

FOLDERS = {"nearest": (False, False), "rotated": (True, False), "corrected": (False, True),
           "rotated, corrected": (True, True)}  # fmt: skip


def measure() -> dict:
    """damage: folder -> what the model says, both ways, as `outputs.language_model` judges; bytes: of its weights."""
    import outputs
    from beyond import pages

    _, judge = outputs.language_model()
    damage, nbytes = {"rotated, 16 bits": [judge(in_16_bits(seed)) for seed in range(2)]}, {}
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        text = scratch / "text.txt"
        text.write_text("\n\n".join(pages(flask=False)), encoding="utf-8")
        sources = [FOLDER, negated(scratch / "negated")]
        for name, (rotate, calibrate) in FOLDERS.items():
            damage[name] = []
            for way in range(2):
                source, target = FOLDER if rotate else sources[way], scratch / f"{name} {way}"
                how = ["--rotate", str(way)] * rotate + ["--calibrate", str(text)] * calibrate
                assert main(["quantize", str(source), str(target), "--quiet", *how]) == 0
                damage[name].append(judge(by_bitsandbytes(target)))
                nbytes[name] = sum(file.stat().st_size for file in target.glob("*.safetensors"))
            print(name, nbytes[name], damage[name], flush=True)
    return {"damage": damage, "bytes": nbytes}


def in_16_bits(seed: int):
    model = opened(FOLDER, torch.bfloat16)
    fold_rotation_(model, seed)
    return model.float()


def negated(target: Path) -> Path:
    """The same function with minus every matrix: the stream of a Llama, and what its layers read, change sign."""
    model = opened(FOLDER, torch.bfloat16)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.neg_()
    model.save_pretrained(target)
    (target / "tokenizer.json").write_bytes((FOLDER / "tokenizer.json").read_bytes())
    return target


def by_bitsandbytes(folder: Path):
    model = opened(folder, torch.float32)
    kinds = {type(layer).__module__.split(".")[0] for block in model.model.layers for layer in projections(block)}
    assert kinds == {"bitsandbytes"}, kinds
    return model


def projections(block) -> list:
    return [layer for name, layer in block.named_modules() if name.endswith("_proj")]


def opened(folder: Path, dtype: torch.dtype):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()
