"""The language model that comes with the package, its texts, and what its page says of both."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from nf4lab import models
from nf4lab.models import manuals

pytest.importorskip("transformers")
ROOT = Path(__file__).resolve().parents[1]
CARD = (ROOT / "book" / "language-model.md").read_text()
TRAINING = json.loads((manuals.FOLDER / "training.json").read_text())


@pytest.fixture(scope="module")
def model_and_tokenizer():
    return models.manuals_model()


def windows(tokenizer, name, n):
    """The first 256 tokens, an end of text before them, of n documents that are so long: int64 (n, 256)."""
    rows = [[0, *tokenizer.encode(text).ids][:256] for text in models.texts(name)]
    return torch.tensor([row for row in rows if len(row) == 256][:n])


@torch.no_grad()
def loss(model, ids):
    logits = model(ids).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item()


def test_it_has_the_parameters_layers_and_tokens_that_its_page_names(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    linear = [m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"]
    assert f"{sum(p.numel() for p in model.parameters()):,}, of which {sum(m.weight.numel() for m in linear):,}" in CARD
    assert len(linear) == 56 and model.lm_head.weight is model.model.embed_tokens.weight
    assert tokenizer.get_vocab_size() == model.config.vocab_size == 6144
    files = list(manuals.FOLDER.glob("*.safetensors"))
    assert f"{sum(file.stat().st_size for file in files) / 1e6:.1f} MB" in CARD


def test_the_page_has_the_numbers_of_the_training(model_and_tokenizer):
    steps, seen = TRAINING["steps"], TRAINING["tokens_seen"]
    assert f"{steps:,} steps of {seen // steps:,} tokens in {TRAINING['seconds']:.0f} seconds" in CARD
    assert f"{seen / 1e6:.0f} million tokens" in CARD and f"{TRAINING['tokens_of_text'] / 1e6:.1f} million" in CARD
    assert round(seen / TRAINING["tokens_of_text"]) == 8 and "eight times" in CARD
    losses = (TRAINING["loss_on_training_text"], *TRAINING["held_out_loss"].values())
    for row, of_row in zip(("training text", "pages held out", "manuals of which"), losses, strict=True):
        perplexity = f"{torch.tensor(of_row).exp():.0f}"
        assert re.search(rf"\| {row}[^|]*\| {of_row:.2f} \| {perplexity} \|", CARD), row


def test_it_predicts_pages_it_has_not_read_and_novels_badly(model_and_tokenizer):
    # Samples of some thousand tokens: their loss is within 0.1 nats of the whole part's, and was 3.11, 3.47 and 5.3.
    model, tokenizer = model_and_tokenizer
    assert loss(model, windows(tokenizer, "manuals", 24)) == pytest.approx(TRAINING["held_out_loss"]["pages"], abs=0.1)
    assert loss(model, windows(tokenizer, "flask", 16)) == pytest.approx(TRAINING["held_out_loss"]["manual"], abs=0.1)
    novel = torch.tensor(tokenizer.encode(models.texts("novels-held-out")[0]).ids[: 8 * 256]).reshape(8, 256)
    assert loss(model, novel) > 5  # as the page says


def test_it_looks_at_nothing_that_comes_later(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    ids = windows(tokenizer, "manuals", 1)
    changed = ids.clone()
    changed[:, 100:] = 7
    with torch.no_grad():
        assert torch.allclose(model(ids).logits[:, :100], model(changed).logits[:, :100], rtol=0, atol=1e-4)


def test_every_text_has_tokens_and_comes_back(model_and_tokenizer):
    _, tokenizer = model_and_tokenizer
    for text in ("The server is started.", "naïve — 日本語 \x00\t", "", " two  spaces"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_transformers_loads_its_folder(model_and_tokenizer):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(manuals.FOLDER, local_files_only=True)
    assert model.dtype == torch.bfloat16
    weight = model_and_tokenizer[0].model.layers[3].mlp.down_proj.weight
    assert torch.equal(model.model.layers[3].mlp.down_proj.weight.float(), weight)


def test_a_text_that_does_not_exist_is_refused_by_name():
    with pytest.raises(ValueError, match=r"name must be one of \['flask', 'manuals', .*\]; got 'novel'"):
        models.texts("novel")


def test_every_text_has_its_source_and_licence_beside_it():
    readme = (manuals.TEXTS / "README.md").read_text()
    for path in manuals.TEXTS.glob("*.jsonl"):
        assert f"| `{path.name}` |" in readme
        assert models.texts(path.stem)


def runs_of_words(texts, length=8):
    words = [re.findall(r"\w+", text.lower()) for text in texts]
    return {tuple(of[i : i + length]) for of in words for i in range(len(of) - length + 1)}


def test_what_is_held_out_of_the_novels_repeats_next_to_nothing_of_what_is_learned():
    learned, held_out = (runs_of_words(models.texts(f"novels-{part}")) for part in ("to-learn", "held-out"))
    assert len(held_out & learned) < 0.001 * len(held_out)


def test_no_page_comes_twice():
    pages = models.texts("manuals") + models.texts("flask")
    seen = set()
    for page in pages:
        of_page = runs_of_words([page])
        assert len(of_page & seen) < 0.2 * len(of_page)
        seen |= of_page


def test_every_package_of_the_source_list_stands_on_the_page_with_a_licence_that_allows_it():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    lxml = pytest.importorskip("lxml")
    assert lxml
    from manuals import NEVER_LEARNED, SOURCES

    allowed = ("Apache-2.0", "Artistic", "BSD", "BSL", "MIT", "PostgreSQL", "PSF", "public domain")
    assert all(licence.startswith(allowed) for licence, _ in SOURCES.values())
    assert f"pages of {len(SOURCES) - len(NEVER_LEARNED)} manuals" in CARD
    for package in {page["package"] for page in map(json.loads, (manuals.TEXTS / "manuals.jsonl").open())}:
        assert package in SOURCES and package not in NEVER_LEARNED
