"""A language model's folder rotated and calibrated, then read by transformers and bitsandbytes."""

import architectures
import pytest
import torch

from nf4lab.__main__ import main
from nf4lab.beyond.language_models import quantize_language_model, windows

transformers = pytest.importorskip("transformers")
TEXT = "The quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama with a tokenizer of bytes."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    path = tmp_path_factory.mktemp("llama")
    architectures.make("Llama").save_pretrained(path)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:128]
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, [], unk_token=alphabet[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(path)
    return path


@torch.no_grad()
def logits(model):
    return model(torch.arange(30)[None]).logits


@pytest.mark.parametrize("rotate", [None, 3])
@pytest.mark.parametrize("text", [None, TEXT])
def test_transformers_and_bitsandbytes_read_what_is_written(folder, tmp_path, rotate, text):
    pytest.importorskip("bitsandbytes")
    rows = quantize_language_model(folder, tmp_path / "out", rotate=rotate, text=text, block_size=32)
    assert len(rows) == 14
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(theirs.model.layers[0].mlp.up_proj).__module__.startswith("bitsandbytes")
    original = transformers.AutoModelForCausalLM.from_pretrained(folder)
    share = (logits(theirs) - logits(original)).square().mean() / logits(original).square().mean()
    assert share < 0.05
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("fox")["input_ids"]


def test_calibration_lowers_the_error_on_its_own_text(folder, tmp_path):
    ids = transformers.AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"][:64]
    with torch.no_grad():
        original = transformers.AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([ids])).logits
    error = {}
    for name, text in (("nearest", None), ("corrected", TEXT)):
        quantize_language_model(folder, tmp_path / name, rotate=0, text=text, block_size=32)
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name)
        with torch.no_grad():
            error[name] = (model(torch.tensor([ids])).logits - original).square().mean().item()
    assert error["corrected"] < 0.5 * error["nearest"]


@pytest.mark.parametrize("kind", ["an encoder", "a model without its head"])
def test_a_folder_that_lacks_weights_of_a_language_model_is_refused_and_not_filled_at_random(kind, tmp_path):
    if kind == "an encoder":
        shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        transformers.BertModel(transformers.BertConfig(vocab_size=50, **shape)).save_pretrained(tmp_path / "in")
    else:
        architectures.make("Llama").model.save_pretrained(tmp_path / "in")
    with pytest.raises(ValueError, match=r"is not a whole causal language model: \w+ needs '(cls|lm_head)\."):
        quantize_language_model(tmp_path / "in", tmp_path / "out", rotate=None)
    assert not (tmp_path / "out").exists()


def test_the_command_line_rotates_and_calibrates(folder, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(TEXT)
    arguments = [str(folder), str(tmp_path / "out"), "--block-size", "32", "--quiet"]
    assert main(["quantize", *arguments, "--rotate", "7", "--calibrate", str(tmp_path / "text.txt")]) == 0
    assert "14 layers quantized, rotated with seed 7 and calibrated on" in capsys.readouterr().out
    assert (tmp_path / "out" / "model.safetensors").exists()


@torch.no_grad()
def test_a_trained_model_rotated_in_its_folder_answers_as_well_through_bitsandbytes_as_one_that_is_not(tmp_path):
    pytest.importorskip("bitsandbytes")
    from nf4lab import models
    from nf4lab.models.manuals import FOLDER

    original, tokenizer = models.manuals_model()
    pages = [tokenizer.encode(page).ids for page in models.texts("flask")]
    ids = torch.tensor([page[:200] for page in pages if len(page) >= 200][:4])
    log_p = original(ids).logits.log_softmax(-1)
    divergence = {}
    for name, how in (("plain", []), ("rotated", ["--rotate", "0"])):
        assert main(["quantize", str(FOLDER), str(tmp_path / name), "--quiet", *how]) == 0
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)
        assert type(model.model.layers[0].mlp.up_proj).__module__.startswith("bitsandbytes")
        difference = log_p - model(ids).logits.log_softmax(-1)
        divergence[name] = (log_p.exp() * difference).sum(-1).mean().item()
    # nats per token: the record has 0.035 to 0.038 for both; the bounds are what a wrong rotation is far beyond
    assert all(0.02 < of < 0.06 for of in divergence.values())
    assert 0.8 < divergence["rotated"] / divergence["plain"] < 1.25


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": "nowhere"}, "is not a folder with a config.json"),
        ({"text": ""}, "there is nothing in the text to calibrate with"),
        ({"text": " \n\t\n"}, "there is nothing in the text to calibrate with"),
    ],
)
def test_what_cannot_be_prepared_is_refused_and_leaves_nothing(folder, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        quantize_language_model(**{"source": folder, "target": tmp_path / "out", "rotate": 0} | arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "there is nothing in the text to calibrate with"),
        (b"\n\n", "there is nothing in the text to calibrate with"),
        (b"\x89PNG\r\n\x1a\n", "text.txt is not text in UTF-8: byte 0 is 0x89"),
        (b"GGUF\x03\x00\x00", "text.txt is not text: character 5 is a zero"),
        (None, "No such file or directory"),
    ],
)
def test_a_file_that_is_no_text_is_one_line_on_stderr(folder, tmp_path, capsys, content, message):
    if content is not None:
        (tmp_path / "text.txt").write_bytes(content)
    arguments = ["quantize", str(folder), str(tmp_path / "out"), "--quiet", "--calibrate", str(tmp_path / "text.txt")]
    assert main(arguments) == 1
    err = capsys.readouterr().err
    assert err.startswith("nf4lab: ") and message in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_one_line_calibrates_and_is_warned_of(folder, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("The quick brown fox.\n")
    arguments = ["quantize", str(folder), str(tmp_path / "out"), "--block-size", "32", "--quiet"]
    assert main([*arguments, "--calibrate", str(tmp_path / "text.txt")]) == 0
    out, err = capsys.readouterr()
    assert "14 layers quantized, calibrated on" in out
    assert "warning: 21 tokens to calibrate with are fewer than the widest layer's" in err
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert logits(model).isfinite().all()


def test_a_quantized_folder_and_a_model_of_another_kind_are_refused(folder, tmp_path):
    quantize_language_model(folder, tmp_path / "once", block_size=32)
    with pytest.raises(ValueError, match="is quantized already, by bitsandbytes"):
        quantize_language_model(tmp_path / "once", tmp_path / "twice", rotate=0)
    architectures.make("Gemma").save_pretrained(tmp_path / "gemma")
    with pytest.raises(ValueError, match="rotations fold into models of the Llama kind"):
        quantize_language_model(tmp_path / "gemma", tmp_path / "rotated", rotate=0)
    assert not (tmp_path / "rotated").exists()


def test_windows_hold_every_token_once():
    ids = list(range(1100))
    pieces = list(windows(ids, architectures.make("Llama").config, "cpu"))
    assert torch.cat(pieces, dim=1)[0].tolist() == ids
    assert max(piece.shape[1] for piece in pieces) == 64  # the model's positions
