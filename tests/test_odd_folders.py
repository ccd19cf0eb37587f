"""Folders and files as other tools leave them: caches of links, odd metadata, adapters beside the model, own code."""

import hashlib
import json
import shutil

import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn

import nf4lab
from nf4lab.__main__ import main
from nf4lab.choice import skips

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from architectures import make, outputs, plainly  # noqa: E402


@pytest.fixture
def llama(tmp_path):
    """A folder with a tiny Llama, and what its layers in 4 bits answer."""
    model = make("Llama")
    model.save_pretrained(tmp_path / "in")
    nf4lab.quantize_model_(model)
    return tmp_path / "in", outputs(model)


def answers_of(folder, name="Llama"):
    """What transformers makes of a folder, with bitsandbytes."""
    return outputs(plainly(type(make(name)).from_pretrained(folder)))


def rewrite(folder, change=dict, metadata=None):
    """Change the tensors of a folder's file and its metadata."""
    path = folder / "model.safetensors"
    safetensors.torch.save_file(change(safetensors.torch.load_file(path)), path, metadata)


def configure(folder, **values):
    """Change keys of a folder's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# --- files


@pytest.mark.parametrize("metadata", [None, {"format": "mlx"}, {"format": "np", "ключ": 'a "b"\n' * 500}])
def test_whatever_the_metadata_says_transformers_opens_the_result_and_the_rest_is_kept(
    bitsandbytes, llama, tmp_path, metadata
):
    folder, expected = llama
    rewrite(folder, metadata=metadata)
    nf4lab.quantize_checkpoint(folder, tmp_path / "out")
    assert torch.equal(answers_of(tmp_path / "out"), expected)
    with safetensors.safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == (metadata or {}) | {"format": "pt"}


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json"])
def test_a_link_that_leads_nowhere_is_no_file_that_is_not_there(llama, tmp_path, name):
    folder, _ = llama
    if name == "model.safetensors.index.json":
        (folder / "model.safetensors").unlink()
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("nowhere")
    with pytest.raises(FileNotFoundError, match=rf"No such file or directory: '{folder / name}'"):
        nf4lab.quantize_checkpoint(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("shard", ["a\0.safetensors", "../in/model.safetensors", "sub/a.safetensors", 3])
def test_an_index_names_files_of_its_folder(llama, shard):
    folder, _ = llama
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(ValueError, match=r"index\.json: a shard is a safetensors file in the same folder; got "):
        nf4lab.load_quantized(folder)


def test_an_index_may_write_a_dot_and_a_slash_before_its_shards(bitsandbytes, llama, tmp_path):
    _, expected = llama
    make("Llama").save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    path = tmp_path / "shards" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps(index | {"weight_map": {k: f"./{v}" for k, v in index["weight_map"].items()}}))
    nf4lab.quantize_checkpoint(tmp_path / "shards", tmp_path / "out")
    assert torch.equal(answers_of(tmp_path / "out"), expected)


def test_of_a_file_and_an_index_the_file_counts_as_in_transformers(bitsandbytes, llama, tmp_path):
    folder, expected = llama
    stale = {"metadata": {}, "weight_map": {"gone.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(stale))
    counts = nf4lab.quantize_checkpoint(folder, tmp_path / "out")
    assert torch.equal(answers_of(tmp_path / "out"), expected) and counts["left_out"] == []


@pytest.mark.parametrize("key", ["lm_head.weight", "model.embed_tokens.weight", "both"])
def test_a_tied_weight_may_stand_under_either_name_or_both(bitsandbytes, tmp_path, key):
    model = make("tied Llama")
    model.save_pretrained(tmp_path / "in")
    nf4lab.quantize_model_(model)

    def change(tensors):
        table = tensors.pop("model.embed_tokens.weight")
        names = ["lm_head.weight", "model.embed_tokens.weight"] if key == "both" else [key]
        return tensors | {name: table.clone() for name in names}

    rewrite(tmp_path / "in", change, {"format": "pt"})
    nf4lab.quantize_checkpoint(tmp_path / "in", tmp_path / "out")
    assert torch.equal(answers_of(tmp_path / "out", "tied Llama"), outputs(model))


@pytest.mark.parametrize(("shape", "is_weight"), [((1,), False), ((), False), ((64,), False), ((64, 64), True)])
def test_a_scale_in_8_bits_is_no_quantized_weight(llama, tmp_path, shape, is_weight):
    folder, _ = llama
    scale = torch.ones(shape).to(torch.float8_e4m3fn)
    rewrite(folder, lambda tensors: tensors | {"model.layers.0.self_attn.k_scale": scale}, {"format": "pt"})
    if is_weight:
        with pytest.raises(ValueError, match="quantized already, by FP8"):
            nf4lab.quantize_checkpoint(folder, tmp_path / "out")
    else:
        assert nf4lab.quantize_checkpoint(folder, tmp_path / "out")["quantized"] == 14


# --- folders


def test_a_snapshot_of_a_cache_is_read_through_its_links_and_left_as_it_is(bitsandbytes, llama, tmp_path):
    folder, expected = llama
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0123abcd"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in folder.iterdir():
        name = hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.move(path, blobs / name)
        (blobs / name).chmod(0o444)
        (snapshot / path.name).symlink_to(f"../../blobs/{name}")
    snapshot.chmod(0o555)
    before = {path: path.read_bytes() for path in blobs.iterdir()}
    nf4lab.quantize_checkpoint(snapshot, tmp_path / "out")
    assert torch.equal(answers_of(tmp_path / "out"), expected)
    assert {path: path.read_bytes() for path in blobs.iterdir()} == before
    for path in (tmp_path / "out").iterdir():
        assert not path.is_symlink() and path.stat().st_mode & 0o200  # what was read-only there is a file of one's own
    assert main(["inspect", str(snapshot / "model.safetensors")]) == 0


@pytest.mark.parametrize("name", ["наш v1.5 ü.safetensors", "model.json", "a.b.c", "%20;$(x) 'y'", "-nf4"])
def test_a_folder_may_be_called_anything(bitsandbytes, llama, tmp_path, name, monkeypatch):
    folder, expected = llama
    folder.rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "to").mkdir()
    words = ["quantize", "--quiet", "--", name, f"to/{name}"]
    assert main(words) == 0 and torch.equal(answers_of(tmp_path / "to" / name), expected)
    assert nf4lab.load_quantized(tmp_path / "to" / name)


@pytest.mark.parametrize("word", ["half", "float16", "bfloat16", "float", None])
def test_a_dtype_by_its_other_name_is_computed_in(bitsandbytes, tmp_path, word):
    dtype = getattr(torch, word or "float32")
    make("Llama").to(dtype).save_pretrained(tmp_path / "in")
    configure(tmp_path / "in", dtype=word)
    nf4lab.quantize_checkpoint(tmp_path / "in", tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.model.layers[0].mlp.up_proj.compute_dtype == model.model.norm.weight.dtype == dtype


MISMATCHES = [("float32", "bfloat16"), ("bfloat16", "float32"), ("float16", "bfloat16"), ("float32", "float16")]


@pytest.mark.filterwarnings("ignore:.*of the weights stay")
@pytest.mark.parametrize(("of_the_file", "of_the_model"), [*MISMATCHES, ("float16", "float16"), ("bfloat16", None)])
@pytest.mark.parametrize("name", ["Llama", "GPT-2", "BERT", "T5", "Nomic BERT", "DeepSeek-V3"])
def test_weights_get_the_dtype_of_the_configuration_as_transformers_loads_them(
    bitsandbytes, tmp_path, name, of_the_file, of_the_model
):
    make(name).to(getattr(torch, of_the_file)).save_pretrained(tmp_path / "in")
    configure(tmp_path / "in", dtype=of_the_model)
    computed = {"bnb_4bit_compute_dtype": getattr(torch, of_the_model or of_the_file)}
    how = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **computed)
    theirs = plainly(type(make(name)).from_pretrained(tmp_path / "in", quantization_config=how))
    nf4lab.quantize_checkpoint(tmp_path / "in", tmp_path / "out", max_shard_size="40KB")
    ours = plainly(type(theirs).from_pretrained(tmp_path / "out"))
    dtypes = {n: tensor.dtype for n, tensor in theirs.state_dict().items()}
    assert {n: tensor.dtype for n, tensor in ours.state_dict().items()} == dtypes
    kept = {
        n for n, dtype in dtypes.items() if dtype == torch.float32 and n.endswith((".wo.weight", "correction_bias"))
    }
    if of_the_model == "float16" and name in ("T5", "DeepSeek-V3"):  # which keep these in float32
        assert kept and all(nf4lab.load_quantized(tmp_path / "out")[n].dtype == torch.float32 for n in kept)
    assert torch.equal(outputs(ours), outputs(theirs))


def test_a_file_of_two_dtypes_gets_one(bitsandbytes, tmp_path):
    make("Llama").bfloat16().save_pretrained(tmp_path / "bfloat16")
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "bfloat16")
    configure(tmp_path / "bfloat16", torch_dtype="bfloat16", dtype=None)
    rewrite(tmp_path / "bfloat16", lambda w: {n: t.float() if t.dim() == 1 else t for n, t in w.items()})
    nf4lab.quantize_checkpoint(tmp_path / "bfloat16", tmp_path / "out")
    nf4lab.quantize_model_(model)
    assert torch.equal(answers_of(tmp_path / "out"), outputs(model))


@pytest.mark.parametrize("empty", [{}, None])
def test_an_empty_quantization_config_is_none(bitsandbytes, llama, tmp_path, empty):
    folder, expected = llama
    configure(folder, quantization_config=empty)
    nf4lab.quantize_checkpoint(folder, tmp_path / "out")
    assert torch.equal(answers_of(tmp_path / "out"), expected)


# --- adapters


@pytest.fixture
def adapted(llama):
    """The folder of a model, with an adapter on it and a layer that is trained whole."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=32, target_modules=["q_proj"], modules_to_save=["o_proj"], init_lora_weights=False)
    return llama[0], peft.get_peft_model(make("Llama"), config)


def test_a_file_of_an_adapter_is_refused(adapted, tmp_path, capsys):
    _, model = adapted
    model.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    assert main(["quantize", str(path), str(tmp_path / "out.safetensors"), "--quiet"]) == 1
    assert "no tensor is chosen: of 6, 6 included, 0 excluded; base_model" in (said := capsys.readouterr().err)
    assert said.endswith(" stays: adapter\n") and not (tmp_path / "out.safetensors").exists()


def test_in_a_file_of_a_model_with_an_adapter_on_it_the_adapter_stays(adapted, tmp_path):
    _, model = adapted
    state = {key: value.clone() for key, value in model.state_dict().items()}
    safetensors.torch.save_file(state, tmp_path / "in.safetensors")
    counts = nf4lab.quantize_checkpoint(tmp_path / "in.safetensors", tmp_path / "out.safetensors")
    back = nf4lab.load_quantized(tmp_path / "out.safetensors")
    four_bit = {name for name, tensor in back.items() if isinstance(tensor, nf4lab.QuantizedTensor)}
    in_memory = {row.name + ".weight" for row in nf4lab.quantize_model_(model)}
    assert four_bit == in_memory and len(four_bit) == 12
    assert {name for name, why in counts["kept"].items() if why == "adapter"} == {
        key for key, value in state.items() if ("lora_" in key or "o_proj" in key) and value.dim() == 2
    }


def test_an_adapter_beside_the_model_stays_behind_in_words_and_one_in_a_subfolder_goes_along(
    bitsandbytes, llama, adapted, tmp_path
):
    folder, model = adapted
    model.peft_config["default"].base_model_name_or_path = str(folder)
    model.save_pretrained(folder)  # transformers would open the result as this adapter's, on the original model
    model.save_pretrained(folder / "speech-lora")
    counts = nf4lab.quantize_checkpoint(folder, tmp_path / "out")
    assert counts["left_out"] == ["adapter_config.json", "adapter_model.safetensors"]
    assert torch.equal(answers_of(tmp_path / "out"), llama[1])
    parts = {path.name for path in (tmp_path / "out" / "speech-lora").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= parts


# --- models with code of their own

OWN_CODE = """
from types import SimpleNamespace
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

class TinyConfig(PretrainedConfig):
    model_type = "tiny-of-ones-own"

class Tiny(PreTrainedModel):
    config_class = TinyConfig

    def __init__(self, config):
        super().__init__(config)
        self.tok, self.pos = nn.Embedding(160, 64), nn.Embedding(96, 64)
        self.blocks = nn.ModuleList([nn.Linear(64, 64) for _ in range(3)])
        self.out = nn.Linear(64, 160, bias=False)
        self.post_init()

    def forward(self, input_ids, **others):
        x = self.tok(input_ids) + self.pos.weight[: input_ids.shape[1]]
        for block in self.blocks:
            x = x + block(x)
        return SimpleNamespace(logits=self.out(x))
"""


@pytest.mark.filterwarnings("ignore:.*of the weights stay")
@pytest.mark.parametrize("kind", ["tiny-of-ones-own", "bert"])  # of a type that transformers knows, too
def test_a_model_with_code_of_its_own_keeps_its_tables_whatever_they_are_called(bitsandbytes, tmp_path, kind):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "tiny.py").write_text(OWN_CODE.replace("tiny-of-ones-own", kind))
    where = {"AutoConfig": "tiny.TinyConfig", "AutoModel": "tiny.Tiny"}
    sizes = {"vocab_size": 160, "max_position_embeddings": 96}
    config = sizes | {"model_type": kind, "architectures": ["Tiny"], "auto_map": where}
    (folder / "config.json").write_text(json.dumps(config))
    tables = {"tok": nn.Embedding(160, 64), "pos": nn.Embedding(96, 64), "out": nn.Linear(64, 160, bias=False)}
    layers = nn.ModuleDict(tables | {"blocks": nn.ModuleList([nn.Linear(64, 64) for _ in range(3)])})
    safetensors.torch.save_file(layers.state_dict(), folder / "model.safetensors", {"format": "pt"})
    counts = nf4lab.quantize_checkpoint(folder, tmp_path / "out")
    assert set(counts["kept"]) == {"tok.weight", "pos.weight", "out.weight"} and counts["quantized"] == 3
    model = transformers.AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True)
    four_bit = [name for name, layer in model.named_modules() if type(layer).__name__ == "Linear4bit"]
    assert four_bit == ["blocks.0", "blocks.1", "blocks.2"]
    assert model(torch.arange(5)[None]).logits.isfinite().all()


@pytest.mark.filterwarnings("ignore:.*of the weights stay")
@pytest.mark.parametrize("name", ["Nomic BERT", "Mixtral", "BERT", "GPT-2", "T5"])
def test_beside_code_of_its_own_a_folder_of_a_known_type_opens_by_transformers_class(bitsandbytes, tmp_path, name):
    model = make(name)
    model.save_pretrained(tmp_path / "in")
    configure(tmp_path / "in", auto_map={"AutoConfig": "configuration_own.Own", "AutoModel": "modeling_own.Own"})
    counts = nf4lab.quantize_checkpoint(tmp_path / "in", tmp_path / "out")
    opened = plainly(type(model).from_pretrained(tmp_path / "out"))
    four_bit = {n for n, m in opened.named_modules() if type(m).__name__ == "Linear4bit"}
    nf4lab.quantize_model_(model, include=lambda n, layer: n in four_bit)
    assert torch.equal(outputs(opened), outputs(model)) and len(four_bit) == counts["quantized"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    matrices = {n.removesuffix(".weight"): w for n, w in nf4lab.load_quantized(tmp_path / "out").items()}
    for n, w in matrices.items():  # the code, which has a layer for each matrix of the file, would be told the same
        if len(w.shape) == 2 and not isinstance(w, nf4lab.QuantizedTensor):
            assert skips(config["llm_int8_skip_modules"], n)
        elif len(w.shape) == 2:
            assert not skips(config["llm_int8_skip_modules"], n)
