"""Real trained models, offline first: all-MiniLM-L6-v2 for sentences, and two causal language models.

manuals      one of ten million parameters that comes with the package, and texts to ask it about
pretrained   where the files come from, checked before they are read
decoder      the smaller language model itself, in plain torch
"""

from nf4lab.models.decoder import Decoder
from nf4lab.models.manuals import manuals_model, record, texts
from nf4lab.models.pretrained import (
    GLASSLLM_SHA256,
    MINILM,
    MINILM_SHA256,
    check_sha256,
    language_model,
    minilm_matrices,
    minilm_path,
    sentence_encoder,
)  # fmt: skip

__all__ = [
    "GLASSLLM_SHA256", "MINILM", "MINILM_SHA256", "Decoder", "check_sha256", "language_model", "manuals_model",
    "minilm_matrices", "minilm_path", "record", "sentence_encoder", "texts",
]  # fmt: skip
