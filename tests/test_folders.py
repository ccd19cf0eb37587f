"""Folders that users have, through the conversion: what transformers makes of the result, and what is refused."""

import copy
import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import nf4lab
from nf4lab.checkpoints import architecture, convert, plan
from nf4lab.checkpoints.folder import dtype_of
from nf4lab.checkpoints.keys import parts_of
from nf4lab.choice import skips

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from architectures import ARCHITECTURES, make, outputs, plainly  # noqa: E402


@pytest.fixture
def folder_of(tmp_path):
    """A function from an architecture's name to (the folder it is saved in, the model)."""

    def save(name):
        model = make(name)
        model.save_pretrained(tmp_path / "in")
        return tmp_path / "in", model

    return save


def by_bitsandbytes(model, folder):
    """The model that transformers makes of a full-precision folder with bitsandbytes."""
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    return type(model).from_pretrained(folder, quantization_config=config)


# Where most of a model is fused experts, of which transformers reads no 4-bit file, a warning says so.
@pytest.mark.filterwarnings("ignore:.*of the weights stay")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_converted_folder_answers_as_bitsandbytes_own(bitsandbytes, folder_of, tmp_path, name):
    folder, model = folder_of(name)
    counts = nf4lab.quantize_checkpoint(folder, tmp_path / "out")
    ours, theirs = type(model).from_pretrained(tmp_path / "out"), by_bitsandbytes(model, folder)
    assert torch.equal(outputs(ours), outputs(theirs))
    assert not torch.equal(outputs(ours), outputs(model))
    four_bit = {n for n, m in theirs.named_modules() if type(m).__name__ == "Linear4bit"}
    assert counts["quantized"] == len(four_bit)
    skip = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["llm_int8_skip_modules"]
    for linear in four_bit:
        assert not skips(skip, linear)


@pytest.mark.parametrize(
    ("name", "include", "exclude"),
    [
        ("Llama", "*", ["*down_proj*"]),
        ("Llama", "*", ["model.layers.1.*"]),
        ("Llama", ["*q_proj*", "*lm_head*"], []),
        ("GPT-2", "*", ["*c_proj*"]),
        ("T5", ["*SelfAttention*"], []),
        ("Llama classifier", ["*", "*score*"], []),
    ],
)
@pytest.mark.filterwarnings("ignore:.*of the weights stay")
def test_what_patterns_leave_out_is_skipped_by_transformers(bitsandbytes, folder_of, tmp_path, name, include, exclude):
    folder, model = folder_of(name)
    counts = nf4lab.quantize_checkpoint(folder, tmp_path / "out", include=include, exclude=exclude)
    loaded = type(model).from_pretrained(tmp_path / "out")
    four_bit = {n for n, m in loaded.named_modules() if type(m).__name__ == "Linear4bit"}
    assert 0 < counts["quantized"] == len(four_bit)
    for n, w in nf4lab.load_quantized(tmp_path / "out").items():
        assert isinstance(w, nf4lab.QuantizedTensor) == (n.removesuffix(".weight") in four_bit)
    if name != "Llama classifier":  # bitsandbytes' kernel for the CPU does not take a head of 3
        assert torch.isfinite(outputs(loaded)).all()


@pytest.mark.parametrize("extra", ["BertForSequenceClassification", "BertForQuestionAnswering"])
def test_a_class_with_a_head_of_its_own_opens_a_folder_that_lacks_it(folder_of, tmp_path, extra):
    folder, _ = folder_of("MiniLM")
    nf4lab.quantize_checkpoint(folder, tmp_path / "out")
    model = getattr(transformers, extra).from_pretrained(tmp_path / "out")
    head = model.classifier if hasattr(model, "classifier") else model.qa_outputs
    assert type(head) is torch.nn.Linear and torch.isfinite(head.weight).all()


@pytest.mark.parametrize("kind", ["", "ForPreTraining", "ForNextSentencePrediction", "ForMultipleChoice"])
@pytest.mark.parametrize("way", ["folder", "memory"])
@pytest.mark.parametrize("has_pooler", [True, False])  # BERT's files have one, and say MaskedLM; RoBERTa's lack it
def test_what_another_class_has_beside_the_saved_one_is_opened_in_full_precision(tmp_path, kind, way, has_pooler):
    config = transformers.BertConfig(**ARCHITECTURES["MiniLM"][2])
    torch.manual_seed(0)
    source = transformers.BertForPreTraining(config) if has_pooler else transformers.BertForMaskedLM(config)
    source.save_pretrained(tmp_path / "in")
    path = tmp_path / "in" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": ["BertForMaskedLM"]}))
    if way == "folder":
        nf4lab.quantize_checkpoint(tmp_path / "in", tmp_path / "out")
    else:
        nf4lab.quantize_model_(source, exclude=["*pooler*", "*seq_relationship"] if has_pooler else ())
        source.save_pretrained(tmp_path / "out")
    model_class = getattr(transformers, f"Bert{kind or 'Model'}")
    opened, plain = (model_class.from_pretrained(tmp_path / name) for name in ("out", "in"))
    base = getattr(opened, "bert", opened)
    assert type(base.pooler.dense) is nn.Linear
    assert type(base.encoder.layer[0].output.dense).__name__ == "Linear4bit"
    if has_pooler:
        assert torch.equal(base.pooler.dense.weight, getattr(plain, "bert", plain).pooler.dense.weight)


def test_a_layer_that_is_left_out_is_so_in_the_model_without_a_head_too(bitsandbytes, folder_of, tmp_path):
    folder, model = folder_of("Llama")
    nf4lab.quantize_checkpoint(folder, tmp_path / "out", exclude="*layers.1.mlp*")
    opened = transformers.AutoModel.from_pretrained(tmp_path / "out")
    nf4lab.quantize_model_(model, exclude="*layers.1.mlp*")
    assert type(opened.layers[1].mlp.up_proj) is nn.Linear
    ids = torch.arange(1, 8)[None]
    assert torch.equal(plainly(opened)(ids).last_hidden_state, model.model(ids).last_hidden_state)


def test_a_name_that_would_skip_a_quantized_layer_stands_anchored():
    linear = ["score", "layer.1.score", "layer.1", "layer.1.mlp", "a.fc"]
    skip = architecture.skip_modules(linear, {"layer.1.score", "layer.1.mlp"})
    assert {name for name in linear if skips(skip, name)} == {"score", "layer.1", "a.fc"}
    assert "a.fc" in skip and "^score$" in skip and "lm_head" in skip


def test_a_name_is_skipped_with_and_without_what_some_classes_have_before_it():
    linear = ["bert.pooler.dense", "bert.layer.0.dense", "bert.layer.1.dense", "dense"]
    skip = architecture.skip_modules(linear, {"bert.layer.0.dense"}, "bert")
    expected = {"pooler.dense", "layer.1.dense", "dense"}
    for name in (*expected, "layer.0.dense"):
        assert skips(skip, name) == skips(skip, f"bert.{name}") == (name in expected)


def test_a_part_that_ends_several_names_stands_for_them_where_it_skips_no_quantized_layer():
    linear = [f"block.{k}.{part}" for k in range(3) for part in ("wi", "wo", "q", "two")]
    quantized = {name for name in linear if name.endswith((".wi", ".two"))} | {"block.1.q"}
    skip = architecture.skip_modules(linear, quantized)
    assert {name for name in linear if skips(skip, name)} == set(linear) - quantized
    assert {"block.0.q", "block.2.q"} <= set(skip) and sum("wo" in name for name in skip) == 3  # "two" ends in it
    short = architecture.skip_modules(linear, quantized - {f"block.{k}.two" for k in range(3)})
    assert {"wo", "two"} <= set(short) and len(short) == 4 + len(architecture.NEW_HEADS)


# Numbers of inputs that bitsandbytes decodes wrongly in blocks of that size, and others that it decodes rightly.
WIDTHS = [(96, 64, True), (160, 64, True), (96, 32, False), (48, 32, True), (128, 64, False), (98, 64, False)]


@pytest.mark.parametrize(("width", "block_size", "is_wrong"), WIDTHS)
def test_rows_of_no_whole_number_of_blocks_are_warned_of_where_bitsandbytes_errs(
    bitsandbytes, tmp_path, width, block_size, is_wrong
):
    config = ARCHITECTURES["Llama"][2] | dict(intermediate_size=width)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    model.save_pretrained(tmp_path / "in")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        nf4lab.quantize_checkpoint(tmp_path / "in", tmp_path / "out", block_size=block_size)
        nf4lab.quantize_model_(model, block_size=block_size)
    said = [str(w.message) for w in caught if "whole number of blocks" in str(w.message)]
    where = [f"model.layers.0.mlp.down_proj{end} and 1 more: rows of {width} weights" for end in (".weight", "")]
    assert [message.partition(" hold")[0] for message in said] == (where if is_wrong else [])
    if "avx512f" in Path("/proc/cpuinfo").read_text():  # what the warning says of bitsandbytes, on such a CPU
        w = torch.randn(64, width)
        packed, state = bitsandbytes.quantize_4bit(w, quant_type="nf4", blocksize=block_size)
        right = nf4lab.quantize(w, block_size=block_size).dequantize()
        assert torch.equal(bitsandbytes.dequantize_4bit(packed, state), right) != is_wrong


def test_a_transposed_matrix_is_warned_of_by_its_inputs(tmp_path):
    config = ARCHITECTURES["GPT-2"][2] | dict(n_inner=96)
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**config)).save_pretrained(tmp_path / "in")
    with pytest.warns(UserWarning, match="h.0.mlp.c_proj.weight and 1 more: rows of 96 weights"):
        nf4lab.quantize_checkpoint(tmp_path / "in", tmp_path / "out")


def test_what_is_no_parameter_has_a_reason_of_its_own(folder_of, tmp_path):
    folder, _ = folder_of("BART")
    counts = nf4lab.quantize_checkpoint(folder, tmp_path / "out")
    assert counts["kept"]["final_logits_bias"] == "nothing that is learned"


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": "float16"}, "float16"),
        ({"text_config": {"dtype": "bfloat16"}}, "bfloat16"),
        ({"dtype": "float32", "text_config": {"dtype": "bfloat16"}}, "float32"),
        ({"dtype": "torch.bfloat16"}, "bfloat16"),
        ({}, None),
    ],
)
def test_the_dtype_of_a_model_is_read_from_its_configuration_or_a_part_of_it(config, dtype):
    assert dtype_of(config) == dtype


def test_experts_named_are_quantized_and_the_folder_says_that_it_is_nf4labs_own(folder_of, tmp_path):
    folder, _ = folder_of("Mixtral")
    with pytest.warns(UserWarning, match="90% of the weights stay as they are: .*experts"):
        default = nf4lab.quantize_checkpoint(folder, tmp_path / "default")
    counts = nf4lab.quantize_checkpoint(folder, tmp_path / "out", include=["*", "*experts*"])
    assert default["quantized"] == 8 and counts["quantized"] == 8 + 2 * 4 * 3 and counts["kept_share"] < 0.1
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "nf4lab" and "reads no 4-bit" in config["reason"]


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ({"format": "int4"}, "bitsandbytes has no word for this format"),
        ({"block_size": 16}, "bitsandbytes takes blocks of 32 and more, not 16"),
        ({"double_quant": "linear8"}, "bitsandbytes has no word for this format or its constants"),
        ({"include": ["*", "*embed_tokens*"]}, "transformers reads no 4-bit model.embed_tokens.weight: embedding"),
    ],
)
def test_what_transformers_cannot_read_is_not_announced_as_bitsandbytes(folder_of, tmp_path, how, reason):
    folder, _ = folder_of("Llama")
    nf4lab.quantize_checkpoint(folder, tmp_path / "out", **how)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "nf4lab" and config["reason"].startswith(reason)


def test_without_transformers_names_tell_and_transposed_models_are_refused(folder_of, tmp_path, monkeypatch):
    monkeypatch.setattr(architecture, "model_of", lambda folder, config: None)
    folder, model = folder_of("Llama")
    counts = nf4lab.quantize_checkpoint(folder, tmp_path / "out")
    assert counts["quantized"] == 14
    assert counts["kept"] == {"lm_head.weight": "output head", "model.embed_tokens.weight": "embedding"}
    assert outputs(type(model).from_pretrained(tmp_path / "out")).isfinite().all()
    make("GPT-2").save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ValueError, match="gpt2: a gpt2 stores its matrices transposed"):
        nf4lab.quantize_checkpoint(tmp_path / "gpt2", tmp_path / "gpt2-out")


# --- what is quantized already


def quantized_folders(folder, out):
    """Folders that are quantized already, by a word of the message that refuses them."""
    nf4lab.quantize_checkpoint(folder, out / "nf4")
    nf4lab.quantize_checkpoint(folder, out / "int4", "int4")
    for name, method in {"fp8": {"quant_method": "fp8"}, "int8": {"load_in_8bit": True, "quant_method": "bitsandbytes"},
                         "gptq": {"quant_method": "gptq", "bits": 4}}.items():  # fmt: skip
        shutil.copytree(folder, out / name)
        config = json.loads((folder / "config.json").read_text()) | {"quantization_config": method}
        (out / name / "config.json").write_text(json.dumps(config))
    shutil.copytree(folder, out / "awq")
    (out / "awq" / "quant_config.json").write_text("{}")
    shutil.copytree(folder, out / "text")
    for name, part in {
        "named": {"quantization_config": "word"},
        "part": {"llm": {"quantization_config": {"bits": 4}}},
    }.items():
        shutil.copytree(folder, out / name)
        (out / name / "config.json").write_text(json.dumps(part))
    (out / "text" / "config.json").write_text(
        json.dumps({"text_config": {"quantization_config": {"quant_method": "x"}}})
    )
    return {"nf4": "bitsandbytes, 4 bits", "int4": "nf4lab", "fp8": "fp8", "int8": "bitsandbytes, 8 bits",
            "gptq": "gptq", "awq": "AWQ", "text": "x", "named": "word",
            "part": "a method that it does not name"}  # fmt: skip


def test_a_folder_that_is_quantized_already_is_refused_with_its_method(folder_of, tmp_path):
    folder, _ = folder_of("Llama")
    for name, method in quantized_folders(folder, tmp_path).items():
        with pytest.raises(ValueError, match=f"{name} is quantized already, by {method}"):
            nf4lab.quantize_checkpoint(tmp_path / name, tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    ("tensors", "method"),
    [
        (lambda w: parts_of("a.weight", nf4lab.quantize(w)), r"bitsandbytes \(nf4\)"),
        (lambda w: parts_of("a.weight", nf4lab.quantize(w, "int4")), "nf4lab"),
        (lambda w: {"a.weight": w.char(), "a.SCB": torch.ones(64)}, r"bitsandbytes \(int8\)"),
        (lambda w: {"a.qweight": w.int(), "a.scales": torch.ones(4, 64)}, "GPTQ or AWQ"),
        (lambda w: {"a.weight": w.to(torch.float8_e4m3fn)}, "FP8"),
        (lambda w: {"a.weight": w.bfloat16(), "a.weight_scale_inv": torch.ones(1, 1)}, "FP8"),
        (lambda w: {"a.gate_blocks": w.byte(), "a.gate_scales": torch.ones(1, 1)}, "MXFP4"),
        (lambda w: {"a.experts.gate_up_proj": w[None].to(torch.float8_e5m2)}, "FP8"),
        (lambda w: {"a.weight": w.char(), "a.weight_scale": torch.ones(64)}, "FP8 or int8"),
        (lambda w: {"a.weight": w.char(), "a.weight_scales": torch.ones(64)}, "EETQ"),
        (lambda w: {"a.weight": w.byte(), "a.scales": torch.ones(64)}, "a method that stores weights as uint8"),
        (lambda w: {"a.codes": w.char(), "a.codebooks": w[None]}, "AQLM"),
        (lambda w: {"a.q_weight": w.int(), "a.q_scale": w.int()}, "EXL2"),
        (lambda w: {"a.W_q": w.byte(), "a.scale": torch.ones(64)}, "HQQ"),
        (lambda w: {"a.weight._data": w.char(), "a.weight._scale": torch.ones(64)}, "Quanto"),
    ],
)
def test_a_file_that_is_quantized_already_is_refused_with_its_method(tmp_path, tensors, method):
    others = {"b.weight": torch.randn(64, 64)}
    safetensors.torch.save_file(tensors(torch.randn(64, 64)) | others, tmp_path / "in.safetensors")
    with pytest.raises(ValueError, match=rf"is quantized already, by {method} \(tensor 'a"):
        nf4lab.quantize_checkpoint(tmp_path / "in.safetensors", tmp_path / "out.safetensors")


def test_a_pattern_that_matches_nothing_is_an_error(folder_of, tmp_path):
    folder, _ = folder_of("Llama")
    for how in ({"include": ["*q_porj*"]}, {"exclude": ["*", "*q_porj*"]}):
        with pytest.raises(ValueError, match=r"'\*q_porj\*' matches none of the 16 tensors \(lm_head.weight"):
            nf4lab.quantize_checkpoint(folder, tmp_path / "out", **how)
    assert not (tmp_path / "out").exists()


# --- the rest of a folder


def test_subfolders_go_along_and_a_sentence_encoder_opens(tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from nf4lab import models

    source = models.minilm_path().parent
    if not (source / "1_Pooling").exists():
        pytest.skip("all-MiniLM-L6-v2 is here as a file alone")
    shutil.copytree(source, tmp_path / "in")
    (tmp_path / "in" / "onnx").mkdir()
    (tmp_path / "in" / "onnx" / "model.onnx").write_bytes(b"x")
    (tmp_path / "in" / "onnx" / "readme.txt").write_text("how it was made")
    counts = nf4lab.quantize_checkpoint(tmp_path / "in", tmp_path / "out", exclude="*embeddings*")
    assert counts["left_out"] == ["onnx/model.onnx"]
    assert (tmp_path / "out" / "onnx" / "readme.txt").exists()
    encoder, original = (
        sentence_transformers.SentenceTransformer(str(tmp_path / f), device="cpu") for f in ("out", "in")
    )
    a, b = (model.encode(["a sentence about four bits"])[0] for model in (encoder, original))
    assert 0.97 < a @ b < 1


def test_weights_of_a_part_that_modules_json_lists_go_along(folder_of, tmp_path):
    folder, _ = folder_of("MiniLM")
    (folder / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "2_Dense"}]))
    for name in ("2_Dense", "openvino", ".cache"):
        (folder / name).mkdir()
        (folder / name / "model.safetensors").write_bytes(b"weights")
    counts = nf4lab.quantize_checkpoint(folder, tmp_path / "out")
    assert (tmp_path / "out" / "2_Dense" / "model.safetensors").read_bytes() == b"weights"
    assert counts["left_out"] == ["openvino/model.safetensors"]
    assert not (tmp_path / "out" / ".cache").exists()


def test_links_and_empty_folders_go_along_and_what_is_no_file_is_named(folder_of, tmp_path):
    folder, _ = folder_of("MiniLM")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "config.json").write_text("{}")
    (folder / "2_Normalize").mkdir()
    links = {"1_Pooling": "../elsewhere", "vocab.txt": "../elsewhere/config.json", "up": "..", "lost.txt": "nowhere"}
    for name, to in links.items():
        (folder / name).symlink_to(to)
    os.mkfifo(folder / "pipe")
    before = sorted((path, path.lstat().st_mtime_ns) for path in tmp_path.rglob("*"))
    counts = nf4lab.quantize_checkpoint(folder, tmp_path / "out")
    assert (tmp_path / "out" / "2_Normalize").is_dir()
    for name in ("1_Pooling/config.json", "vocab.txt"):
        assert (tmp_path / "out" / name).read_text() == "{}" and not (tmp_path / "out" / name).is_symlink()
    assert counts["left_out"] == ["lost.txt", "pipe"]
    shutil.rmtree(tmp_path / "out")
    assert sorted((path, path.lstat().st_mtime_ns) for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("text", ["{", "[1]", '{"a": "\\ud800'])
def test_a_bad_configuration_is_found_before_anything_is_written(folder_of, tmp_path, monkeypatch, text):
    folder, _ = folder_of("Llama")
    (folder / "config.json").write_text(text)
    monkeypatch.setattr(convert, "write_shard", lambda *a, **k: pytest.fail("a shard was written"))
    with pytest.raises(ValueError, match=r"in/config\.json (is not JSON|must be a JSON object)"):
        nf4lab.quantize_checkpoint(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize(
    ("name", "weights"),
    [("config.json", "model.safetensors"), ("model.safetensors.index.json", "model-00001-of-00001.safetensors")],
)
@pytest.mark.parametrize(
    ("text", "what"),
    [("version https://git-lfs.github.com/spec/v1", "a Git LFS pointer"), ("<html>", "a web page")],
)
def test_a_pointer_or_a_page_in_the_place_of_json_is_called_by_name(tmp_path, name, weights, text, what):
    safetensors.torch.save_file({"w": torch.randn(64, 64)}, tmp_path / weights)
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=rf"{name} is not JSON but {what}"):
        nf4lab.quantize_checkpoint(tmp_path, tmp_path.parent / "out")


# --- scale


def test_shards_of_a_size_on_request_hold_the_same_bytes(folder_of, tmp_path):
    folder, _ = folder_of("Llama")
    nf4lab.quantize_checkpoint(folder, tmp_path / "one", double_quant=True)
    counts = nf4lab.quantize_checkpoint(folder, tmp_path / "many", double_quant=True, max_shard_size="40KB")
    shards = sorted((tmp_path / "many").glob("*.safetensors"))
    sizes = [sum(t.nbytes for t in safetensors.torch.load_file(path).values()) for path in shards]
    assert len(shards) > 2 and max(sizes) <= 40_000 and sum(sizes) == counts["bytes_after"]
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    one = safetensors.torch.load_file(tmp_path / "one" / "model.safetensors")
    many = {name: t for path in shards for name, t in safetensors.torch.load_file(path).items()}
    assert sorted(one) == sorted(many) and all(torch.equal(one[name], many[name]) for name in one)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "many")
    assert outputs(loaded).isfinite().all()


def test_one_file_becomes_a_folder_of_shards_on_request(tmp_path):
    tensors = {f"{k}.weight": torch.randn(64, 64) for k in range(8)}
    safetensors.torch.save_file(tensors, tmp_path / "in.safetensors")
    nf4lab.quantize_checkpoint(tmp_path / "in.safetensors", tmp_path / "out", max_shard_size=10_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert sorted(nf4lab.load_quantized(tmp_path / "out")) == sorted(tensors)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (5, 5),
        ("5", 5),
        ("5GB", 5 * 10**9),
        ("1.5 MiB", 3 * 2**19),
        (None, None),
        ("0.3KB", 300),
        ("9007199254740993", 2**53 + 1),
        ("9" * 400 + "TB", int("9" * 400) * 10**12),
    ],
)
def test_sizes_are_read_as_people_write_them(size, expected):
    assert plan.bytes_of(size) == expected


@pytest.mark.parametrize("size", ["", "GB", "-1GB", "0", "0.5", "5 XB", "1e9"])
def test_a_size_that_is_none_is_refused(size):
    with pytest.raises(ValueError, match="a size is a number of bytes, or as 5GB or 500MiB; got"):
        plan.bytes_of(size)


def many_tensors(path, n):
    tensors = {f"model.layers.{k}.mlp.experts.{k % 128}.gate_proj.weight": torch.ones(2, 32) for k in range(n)}
    safetensors.torch.save_file(tensors, path)


def test_a_header_is_barely_larger_than_what_it_says(tmp_path):
    many_tensors(tmp_path / "in.safetensors", 500)
    nf4lab.quantize_checkpoint(tmp_path / "in.safetensors", tmp_path / "out.safetensors", double_quant=True)
    raw = (tmp_path / "out.safetensors").read_bytes()
    room = int.from_bytes(raw[:8], "little")
    written = len(raw[8 : 8 + room].rstrip())
    assert written > 0.8 * room


def test_where_a_header_gets_too_long_a_folder_is_split_and_a_file_is_refused(folder_of, tmp_path, monkeypatch):
    folder, _ = folder_of("Llama")
    monkeypatch.setattr(plan, "HEADER", 4_000)
    nf4lab.quantize_checkpoint(folder, tmp_path / "out")
    shards = list((tmp_path / "out").glob("*.safetensors"))
    assert (
        len(shards) > 1
        and outputs(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")).isfinite().all()
    )
    for path in shards:
        assert int.from_bytes(path.read_bytes()[:8], "little") < 6_000
    monkeypatch.setattr("nf4lab.checkpoints.tensorfile.LARGEST_HEADER", 20_000)
    many_tensors(tmp_path / "in.safetensors", 100)
    with pytest.raises(ValueError, match="more than readers of safetensors take, 20,000: write several files"):
        nf4lab.quantize_checkpoint(tmp_path / "in.safetensors", tmp_path / "out.safetensors")


def test_names_are_sorted_out_in_linear_time():
    from nf4lab.checkpoints.files import stored_tensors

    def seconds(n):
        keys = [f"{k}.weight{end}" for k in range(n) for end in ("", ".absmax", ".quant_map", ".quant_state.nf4lab")]
        start = time.process_time()
        assert len(stored_tensors(keys)) == n
        return time.process_time() - start

    few, many = min(seconds(1_000) for _ in range(3)), min(seconds(16_000) for _ in range(3))
    assert many < 16 * few * 4  # quadratic time would make it 16 times more


# --- Dask


def test_a_cluster_writes_the_same_bytes_and_survives_a_worker(tmp_path):
    distributed = pytest.importorskip("distributed")
    torch.manual_seed(0)
    tensors = {f"{k}.weight": torch.randn(128, 128) for k in range(12)}
    safetensors.torch.save_file(tensors, tmp_path / "in.safetensors")
    how = {"double_quant": True, "max_shard_size": 30_000}
    nf4lab.quantize_checkpoint(tmp_path / "in.safetensors", tmp_path / "here", **how)
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster:
        with distributed.Client(cluster) as client:
            client.submit(os._exit, 1, pure=False)  # a worker dies; the other goes on, and a nanny starts a third
        nf4lab.quantize_checkpoint(
            tmp_path / "in.safetensors", tmp_path / "there", scheduler=cluster.scheduler_address, **how
        )
    here, there = (sorted((tmp_path / name).iterdir()) for name in ("here", "there"))
    assert [path.name for path in here] == [path.name for path in there] and len(here) > 3
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(here, there, strict=True))


def file_of(pid):
    """The shard that a process is writing, or None."""
    with suppress(OSError):  # the process, or its file, is gone
        for link in map(os.readlink, Path(f"/proc/{pid}/fd").iterdir()):
            if link.endswith(".partial"):
                return link
    return None


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="no /proc here to tell which file a process has open")
def test_a_shard_whose_worker_is_killed_while_it_writes_is_written_by_another(tmp_path):
    distributed = pytest.importorskip("distributed")
    torch.manual_seed(0)
    tensors = {f"{k}.weight": torch.randn(64, 64) for k in range(6000)}
    safetensors.torch.save_file(tensors, tmp_path / "in.safetensors")
    nf4lab.quantize_checkpoint(tmp_path / "in.safetensors", tmp_path / "here", max_shard_size="5MB")
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
        ThreadPoolExecutor() as pool,
    ):
        pids = client.run(os.getpid).values()
        how = {"max_shard_size": "5MB", "scheduler": cluster.scheduler_address}
        run = pool.submit(nf4lab.quantize_checkpoint, tmp_path / "in.safetensors", tmp_path / "there", **how)
        killed = None
        while killed is None and not run.done():
            killed = next((pid for pid in pids if file_of(pid)), None)
        os.kill(killed, signal.SIGKILL)
        run.result()
    here, there = (sorted((tmp_path / name).iterdir()) for name in ("here", "there"))
    assert [path.name for path in here] == [path.name for path in there] and len(here) > 2
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(here, there, strict=True))


def test_a_scheduler_that_is_not_there_is_one_line(tmp_path, monkeypatch):
    pytest.importorskip("distributed")
    monkeypatch.setattr(convert, "CONNECT", 1)
    safetensors.torch.save_file({"a.weight": torch.randn(64, 64)}, tmp_path / "in.safetensors")
    with pytest.raises(OSError, match=r"127\.0\.0\.1:9"):
        nf4lab.quantize_checkpoint(
            tmp_path / "in.safetensors", tmp_path / "out", max_shard_size="1GB", scheduler="tcp://127.0.0.1:9"
        )
    assert [path.name for path in tmp_path.iterdir()] == ["in.safetensors"]


def test_a_device_that_is_not_there_is_refused(tmp_path):
    safetensors.torch.save_file({"a.weight": torch.randn(64, 64)}, tmp_path / "in.safetensors")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(ValueError, match="device 'cuda': "):
        nf4lab.quantize_checkpoint(tmp_path / "in.safetensors", tmp_path / "out.safetensors", device="cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA GPU")
@pytest.mark.parametrize("double_quant", [False, True])
def test_on_a_gpu_the_file_has_the_same_bytes_but_for_quantized_constants(tmp_path, double_quant):
    torch.manual_seed(0)
    tensors = {"a.weight": torch.randn(2048, 4096), "b.weight": torch.randn(64, 64).bfloat16(), "c": torch.randn(3)}
    safetensors.torch.save_file(tensors, tmp_path / "in.safetensors")
    how = {"double_quant": double_quant}
    for device in ("cpu", "cuda"):
        nf4lab.quantize_checkpoint(tmp_path / "in.safetensors", tmp_path / device, **how, device=device)
    if not double_quant:
        assert (tmp_path / "cpu").read_bytes() == (tmp_path / "cuda").read_bytes()
    here, there = (nf4lab.load_quantized(tmp_path / device) for device in ("cpu", "cuda"))
    for name in ("a.weight", "b.weight"):
        one, other = here[name], there[name]
        assert torch.equal(one.packed, other.packed)
        if double_quant:  # of the mean the last bits may differ, by its order of additions
            torch.testing.assert_close(other.stored_scale.offset, one.stored_scale.offset, rtol=2**-21, atol=0)
            apart = (one.stored_scale.codes.int() - other.stored_scale.codes.int()).abs()
            assert apart.max() <= 1 and apart.count_nonzero() <= len(apart) / 1000


def test_the_defaults_of_torch_change_no_byte_of_a_file(tmp_path):
    tensors = {"a.weight": torch.randn(64, 64), "b": torch.randn(3)}
    safetensors.torch.save_file(tensors, tmp_path / "in.safetensors")

    def files(name):
        for format in ("nf4", "nvfp4", "q4_0", "uniform"):
            double_quant = format in ("nf4", "uniform")
            path = tmp_path / f"{name}-{format}"
            nf4lab.quantize_checkpoint(tmp_path / "in.safetensors", path, format, double_quant=double_quant)
            nf4lab.save_quantized(f"{path}-again", nf4lab.load_quantized(path))
            yield path.read_bytes(), (tmp_path / f"{path}-again").read_bytes()

    expected = list(files("plain"))
    try:
        for dtype in (torch.float16, torch.bfloat16, torch.float64):
            torch.set_default_dtype(dtype)
            assert list(files(str(dtype))) == expected
        torch.set_default_dtype(torch.float32)
        torch.set_default_device("meta")
        assert list(files("meta")) == expected
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


SPAWNED = """
import pickle, sys
from nf4lab import save_quantized
save_quantized(sys.argv[2], {"w": pickle.load(open(sys.argv[1], "rb"))})
"""


def test_copies_pickles_and_other_processes_keep_the_keys_of_a_file(tmp_path):
    q = nf4lab.quantize(torch.randn(64, 64), double_quant=True)
    nf4lab.save_quantized(tmp_path / "a", {"w": q})
    for twin in (copy.copy(q), copy.deepcopy(q), pickle.loads(pickle.dumps(q)), q.to("cpu")):
        nf4lab.save_quantized(tmp_path / "b", {"w": twin})
        assert (tmp_path / "b").read_bytes() == (tmp_path / "a").read_bytes()
    (tmp_path / "pickle").write_bytes(pickle.dumps(q))
    subprocess.run([sys.executable, "-c", SPAWNED, tmp_path / "pickle", tmp_path / "c"], check=True)
    assert (tmp_path / "c").read_bytes() == (tmp_path / "a").read_bytes()
    assert "w.quant_state.bitsandbytes__nf4" in safetensors.torch.load_file(tmp_path / "c")


def keys_of(q, path):
    """The file that holds q, as bytes."""
    nf4lab.save_quantized(path, {"w": q})
    return path.read_bytes()


@pytest.mark.parametrize("double_quant", [False, True, "linear8"])
@pytest.mark.parametrize("format", nf4lab.FORMATS)
def test_every_format_keeps_its_keys_through_every_way_to_be_sent(tmp_path, format, double_quant):
    if double_quant and nf4lab.FORMATS[format].constants_dtype != torch.float32:
        pytest.skip(f"{format} has constants of its own")
    q = nf4lab.quantize(torch.randn(64, 64), format, double_quant=double_quant)
    kept, stored = keys_of(q, tmp_path / "a"), io.BytesIO()
    torch.save(q, stored)
    stored.seek(0)
    twins = [pickle.loads(pickle.dumps(q, protocol)) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    twins += [torch.load(stored, weights_only=False), nf4lab.load_quantized(tmp_path / "a")["w"]]
    twins += [replace(q, format=replace(q.format)), replace(q, format=copy.deepcopy(copy.copy(q.format)))]
    for twin in twins:
        assert twin.format == q.format and hash(twin.format) == hash(q.format)
        assert keys_of(twin, tmp_path / "b") == kept
    assert keys_of(nf4lab.quantize(q.dequantize(), twins[-1].format), tmp_path / "b") == keys_of(
        nf4lab.quantize(q.dequantize(), format), tmp_path / "c"
    )


def test_a_format_is_what_its_levels_are_and_not_what_it_is_called(tmp_path):
    levels, w = nf4lab.FORMATS["nf4"].levels, torch.randn(64, 64)
    kept = keys_of(nf4lab.quantize(w), tmp_path / "a")
    for same in (levels.double(), levels.tolist(), levels.numpy(), nn.Parameter(levels.clone())):
        assert keys_of(nf4lab.quantize(w, nf4lab.Format("nf4", same)), tmp_path / "b") == kept
    other = levels.clone()
    other[3] += 0.01
    q = nf4lab.quantize(w, nf4lab.Format("nf4", other))
    assert b"bitsandbytes__nf4" not in keys_of(q, tmp_path / "c")
    assert torch.equal(nf4lab.load_quantized(tmp_path / "c")["w"].dequantize(), q.dequantize())


def test_writing_to_what_a_file_or_a_layer_hands_out_moves_no_level(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(64, 64))
    nf4lab.quantize_model_(model, double_quant=True)
    expected = nf4lab.quantize(torch.ones(64), double_quant=True).dequantize()
    for tensor in (*model.state_dict().values(), *parts_of("w", model[0].quantized).values()):
        tensor.zero_()
    nf4lab.save_quantized(tmp_path / "a", {"w": nf4lab.quantize(torch.ones(64), double_quant=True)})
    for q in nf4lab.load_quantized(tmp_path / "a").values():
        q.format.levels.zero_()
    assert torch.equal(nf4lab.quantize(torch.ones(64), double_quant=True).dequantize(), expected)


# --- configurations that can't be those of the files

OVERDONE = [
    ("Llama", {"num_hidden_layers": 10**9}, r"in/config\.json: num_hidden_layers is 1000000000, and there are 16"),
    ("Llama", {"num_hidden_layers": -2}, r"in/config\.json: num_hidden_layers is -2"),
    ("Llama", {"num_hidden_layers": "2"}, r"in/config\.json: transformers makes no model of it: .*num_hidden_layers"),
    ("Llama", {"num_hidden_layers": 2.5}, r"in/config\.json: transformers makes no model of it: .*num_hidden_layers"),
    ("Llama", {"hidden_size": 10**12}, r"in: tensor '.*' has shape \(.*\) in its file, \(.*0000.*\) by its"),
    ("Llama", {"hidden_size": 10**40}, r"in/config\.json: transformers makes no model of it: "),
    ("Llama", {"hidden_size": -64}, r"in/config\.json: transformers makes no model of it: "),
    ("Llama", {"hidden_size": "wide"}, r"in/config\.json: transformers makes no model of it: .*hidden_size"),
    ("Llama", {"vocab_size": 10**15}, r"in: tensor '.*' has shape \(128, 64\) in its file, \(10{15}, 64\) by"),
    ("Llama", {"vocab_size": -1}, r"in/config\.json: transformers makes no model of it: "),
    ("Llama", {"intermediate_size": 96}, r"in: tensor '.*mlp.*' has shape .*: transformers does not open it"),
    ("Llama", {"num_attention_heads": 0}, r"in/config\.json: transformers makes no model of it: "),
    ("Llama", {"hidden_act": "none"}, r"in/config\.json: transformers makes no model of it: "),
    ("Marian", {"max_position_embeddings": 10**9}, r"max_position_embeddings is 1000000000, and there are \d+ weights"),
    ("GPT-2", {"n_positions": 10**9}, r"in/config\.json: n_positions is 1000000000"),
    ("GPT-2", {"n_layer": 10**9}, r"in/config\.json: n_layer is 1000000000"),
    ("T5", {"num_decoder_layers": 10**9}, r"in/config\.json: num_decoder_layers is 1000000000"),
    (
        "Mixtral",
        {"num_local_experts": 10**9},
        r"in: tensor '.*gate.weight' has shape \(4, 64\) in its file, \(10{9}, 64\)",
    ),
    ("Mixtral", {"num_local_experts": -4}, r"in/config\.json: transformers makes no model of it: "),
    ("Switch Transformers", {"num_experts": 10**9}, r"no model of it: it has more than \d+ parameters, of which"),
]


def test_a_rotary_model_of_very_many_positions_is_quantized(folder_of, tmp_path):
    folder, _ = folder_of("Llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 10**12}))
    assert nf4lab.quantize_checkpoint(folder, tmp_path / "out")["quantized"] == 14


@pytest.mark.parametrize(("name", "changes", "words"), OVERDONE, ids=[f"{n} {c}" for n, c, _ in OVERDONE])
def test_a_configuration_that_can_not_be_the_files_is_refused_at_once(folder_of, tmp_path, name, changes, words):
    folder, _ = folder_of(name)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    before = time.process_time()
    with pytest.raises(ValueError, match=words):
        nf4lab.quantize_checkpoint(folder, tmp_path / "out")
    assert time.process_time() - before < 20  # it takes one or two; what transformers would build takes days
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


class Counting(TorchDispatchMode):
    """Counts the operations of torch."""

    n = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.n += 1
        return function(*args, **kwargs or {})


@pytest.mark.parametrize(("double_quant", "most"), [(False, 26), (True, 39)])
def test_a_small_tensor_takes_few_operations_of_torch_views_included(tmp_path, double_quant, most):
    counted = {}
    for n in (10, 20, 40):  # enough that a kernel quantizes; what only a first run does is in none of the last two
        folder = tmp_path / str(n)
        folder.mkdir()
        safetensors.torch.save_file(
            {f"part_{k}.weight": torch.ones(64, 64) for k in range(n)}, folder / "model.safetensors"
        )
        with Counting() as counting:
            nf4lab.quantize_checkpoint(folder, tmp_path / f"{n}-nf4", double_quant=double_quant)
        counted[n] = counting.n
    assert (counted[40] - counted[20]) / 20 <= most
