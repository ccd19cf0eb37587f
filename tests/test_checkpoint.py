"""Checkpoints: what is written comes back, bitsandbytes reads it, and what bitsandbytes wrote is read."""

import dataclasses
import json
import re

import pytest
import safetensors.torch
import torch

import nf4lab
from nf4lab.checkpoints.files import opened
from nf4lab.checkpoints.keys import from_parts, parts_of


def weight(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_equal(a, b):
    """Two stored tensors are the same: bytes, constants, format, shape and dtype."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b)
        return
    assert (a.shape, a.dtype, a.block_size, a.nbytes) == (b.shape, b.dtype, b.block_size, b.nbytes)
    assert a.format.name == b.format.name and torch.equal(a.format.levels, b.format.levels)
    assert torch.equal(a.packed, b.packed) and torch.equal(a.scale, b.scale)
    assert torch.equal(a.dequantize(), b.dequantize())


@pytest.mark.parametrize("double_quant", [False, True, "linear8", "linear4"])
@pytest.mark.parametrize("format", nf4lab.FORMATS)
def test_every_format_comes_back_from_a_file(tmp_path, format, double_quant):
    if double_quant and nf4lab.FORMATS[format].constants_dtype.itemsize == 1:
        pytest.skip("constants of one byte are not quantized any further")
    original = nf4lab.quantize(weight(33, 77), format, double_quant=double_quant)
    nf4lab.save_quantized(tmp_path / "a.safetensors", {"w": original})
    back = nf4lab.load_quantized(tmp_path / "a.safetensors")
    assert list(back) == ["w"] and back["w"].format is nf4lab.FORMATS[format]
    assert_equal(back["w"], original)


@pytest.mark.parametrize("shape", [(), (1,), (0, 4), (3, 5), (2, 3, 7), (64, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_every_shape_and_dtype_comes_back(tmp_path, shape, dtype):
    tensors = {"w": nf4lab.quantize(weight(*shape, dtype=dtype), double_quant=True), "b": weight(*shape, dtype=dtype)}
    nf4lab.save_quantized(tmp_path / "a.safetensors", tensors)
    back = nf4lab.load_quantized(tmp_path / "a.safetensors")
    for name, tensor in tensors.items():
        assert_equal(back[name], tensor)


def test_a_format_of_ones_own_comes_back_with_its_levels_and_its_group_size(tmp_path):
    own = nf4lab.Format("mine", torch.linspace(-1, 1, 11), constants_dtype=torch.bfloat16)
    original = nf4lab.quantize(weight(40, 40), own, 32, nf4lab.DoubleQuant("linear8", centred=False, group_size=7))
    nf4lab.save_quantized(tmp_path / "a.safetensors", {"w": original})
    back = nf4lab.load_quantized(tmp_path / "a.safetensors")["w"]
    assert_equal(back, original)
    assert back.format.constants_dtype == torch.bfloat16 and back.format.normalize is own.normalize


@pytest.mark.parametrize(
    ("n_levels", "stored_bits"), [(3, None), (3, 3), (7, None), (7, 4), (7, 8), (17, None), (256, None)]
)
def test_codes_of_every_width_come_back(tmp_path, n_levels, stored_bits):
    own = nf4lab.Format("mine", torch.linspace(-1, 1, n_levels), stored_bits=stored_bits)
    original = nf4lab.quantize(weight(13, 17), own, 32, double_quant=True)
    nf4lab.save_quantized(tmp_path / "a.safetensors", {"w": original})
    back = nf4lab.load_quantized(tmp_path / "a.safetensors")["w"]
    assert_equal(back, original)
    assert back.format == own


def test_a_file_from_before_there_were_widths_has_codes_of_four_bits(tmp_path):
    own = nf4lab.Format("mine", torch.linspace(-1, 1, 7), stored_bits=4)
    parts = parts_of("w", nf4lab.quantize(weight(8, 8), own))
    state = json.loads(bytes(parts["w.quant_state.nf4lab"].tolist()))
    assert "stored_bits" not in state["fields"]  # as files had it then
    assert from_parts("w", parts).format == own


@pytest.mark.parametrize("format", ["nf4", "mxfp4", "nvfp4", "bof4-s", "q4_0"])
def test_a_searched_scale_and_every_other_field_of_a_format_come_back(tmp_path, format):
    own = nf4lab.FORMATS[format].searched((1.0, 0.75, 1.25))
    original = nf4lab.quantize(weight(24, 64), own)
    nf4lab.save_quantized(tmp_path / "a.safetensors", {"w": original})
    back = nf4lab.load_quantized(tmp_path / "a.safetensors")["w"]
    assert_equal(back, original)
    for field in dataclasses.fields(nf4lab.Format):
        values = (getattr(f, field.name) for f in (own, back.format))
        assert torch.equal(*values) if field.name == "levels" else len(set(values)) == 1, field.name


def test_constants_are_stored_in_the_dtype_of_their_format(tmp_path):
    half = nf4lab.Format("half", torch.linspace(-1, 1, 16), constants_dtype=torch.float16)
    nf4lab.save_quantized(tmp_path / "a.safetensors", {"w": nf4lab.quantize(weight(8, 64), half)})
    assert safetensors.torch.load_file(tmp_path / "a.safetensors")["w.scale"].dtype == torch.float16


def test_a_normalisation_of_ones_own_is_refused_and_leaves_nothing_behind(tmp_path):
    own = nf4lab.Format("mine", torch.linspace(-1, 1, 16), lambda blocks: (blocks.abs().mean(dim=1), None))
    with pytest.raises(ValueError, match="'mine' normalises by a function of its own, which no file can hold"):
        nf4lab.save_quantized(tmp_path / "a.safetensors", {"w": nf4lab.quantize(weight(8, 8), own)})
    assert not list(tmp_path.iterdir())


def test_plain_tensors_of_every_dtype_come_back_and_safetensors_reads_them_too(tmp_path):
    dtypes = [torch.bool, torch.uint8, torch.int64, torch.float16, torch.float8_e4m3fn, torch.complex64, torch.int32]
    tensors = {str(dtype): torch.arange(3).to(dtype) for dtype in dtypes}
    tensors |= {"quantized": nf4lab.quantize(weight(5, 9)), "not contiguous": weight(4, 6).T, "scalar": torch.tensor(2)}
    nf4lab.save_quantized(tmp_path / "a.safetensors", tensors)
    back, by_library = (
        load(tmp_path / "a.safetensors") for load in (nf4lab.load_quantized, safetensors.torch.load_file)
    )
    for name, tensor in tensors.items():
        assert_equal(back[name], tensor)
        assert name == "quantized" or torch.equal(by_library[name], tensor)


def test_every_tensor_lies_at_a_multiple_of_its_itemsize(tmp_path):
    tensors = {f"q{n}": nf4lab.quantize(weight(n), double_quant=n % 2 == 0) for n in range(1, 9)}
    tensors |= {"byte": torch.zeros(3, dtype=torch.uint8), "half": torch.zeros(3).half(), "long": torch.zeros(1).long()}
    nf4lab.save_quantized(tmp_path / "a.safetensors", tensors)
    with opened(tmp_path / "a.safetensors") as (file,):
        assert file._data_start % 8 == 0
        assert all(entry.start % entry.dtype.itemsize == 0 for entry in file.entries.values())


def test_a_plain_tensor_that_takes_a_key_of_a_quantized_one_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"two tensors want the name 'w\.absmax'"):
        nf4lab.save_quantized(
            tmp_path / "a.safetensors", {"w": nf4lab.quantize(weight(8, 8)), "w.absmax": torch.ones(1)}
        )


def test_anything_but_a_tensor_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"'w' must be a QuantizedTensor or a torch\.Tensor; got list"):
        nf4lab.save_quantized(tmp_path / "a.safetensors", {"w": [1.0]})


@pytest.mark.parametrize(
    ("name", "tensor", "error", "match"),
    [
        (1, torch.ones(2), TypeError, "a tensor's name must be a string; got 1"),
        ("__metadata__", torch.ones(2), ValueError, "'__metadata__' is no tensor's"),
        ("w", torch.eye(2).to_sparse(), ValueError, "'w' must be dense and have data; got torch.sparse_coo on cpu"),
        ("w", torch.ones(2, device="meta"), ValueError, "got torch.strided on meta"),
    ],
)
def test_what_no_reader_could_open_is_not_written(tmp_path, name, tensor, error, match):
    with pytest.raises(error, match=match):
        nf4lab.save_quantized(tmp_path / "a.safetensors", {name: tensor})
    assert not list(tmp_path.iterdir())


def test_a_view_is_saved_as_the_numbers_that_it_is(tmp_path):
    z = torch.tensor([[1 + 2j, 3j]], dtype=torch.complex64)
    views = {"conjugate": z.conj(), "negative": z.conj().imag, "one": z.conj().imag[0, 1], "repeated": z.expand(3, 2)}
    views |= {"turned": z.real.bfloat16().T, "in 8 bits": z.real.to(torch.float8_e4m3fn)[0, ::2]}
    nf4lab.save_quantized(tmp_path / "a.safetensors", views)
    for name, tensor in nf4lab.load_quantized(tmp_path / "a.safetensors").items():
        assert torch.equal(tensor.to(torch.complex64), views[name].to(torch.complex64)), name


def test_a_model_of_another_shape_is_refused_by_the_tensors_name(tmp_path):
    tensors = {"0.weight": nf4lab.quantize(weight(8, 64)), "0.bias": torch.ones(8)}
    nf4lab.save_quantized(tmp_path / "a.safetensors", tensors)
    with pytest.raises(ValueError, match=r"tensor '0\.weight' has shape \(8, 64\); the model's is \(4, 64\)"):
        nf4lab.load_model_(torch.nn.Sequential(torch.nn.Linear(64, 4)), tmp_path / "a.safetensors")


# bitsandbytes


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("format", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_bitsandbytes_reads_our_file_and_gets_the_same_bytes_values_and_outputs(
    bitsandbytes, tmp_path, format, double_quant, dtype
):
    import bitsandbytes as library

    original = nf4lab.quantize(weight(96, 192, dtype=dtype), format, double_quant=double_quant)
    nf4lab.save_quantized(tmp_path / "a.safetensors", {"layer.weight": original, "layer.bias": weight(96, dtype=dtype)})
    stored = safetensors.torch.load_file(tmp_path / "a.safetensors")
    bias = stored.pop("layer.bias")
    data = stored.pop("layer.weight")
    theirs = library.nn.Params4bit.from_prequantized(data=data, quantized_stats=stored, device="cpu")
    assert torch.equal(theirs.data.reshape(-1), original.packed) and theirs.quant_state.nested == double_quant
    values = bitsandbytes.dequantize_4bit(theirs.data, theirs.quant_state)
    assert values.dtype == dtype and torch.equal(values, original.dequantize())
    layer = library.nn.Linear4bit(192, 96, quant_type=format, compute_dtype=dtype)
    layer.weight, layer.bias = theirs, torch.nn.Parameter(bias)
    layer.train()  # in eval mode it rewrites its weight for the CPU's bfloat16 units
    x = weight(5, 192, seed=1, dtype=dtype)
    with torch.no_grad():
        assert torch.equal(layer(x), torch.nn.functional.linear(x, original.dequantize(), bias))


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_a_file_that_bitsandbytes_wrote_gives_its_bytes_and_values(
    bitsandbytes, tmp_path, format, double_quant, storage
):
    import bitsandbytes as library

    layer = library.nn.Linear4bit(
        192, 96, quant_type=format, compress_statistics=double_quant, quant_storage=storage
    )  # fmt: skip
    with torch.no_grad():
        layer.weight.data = weight(96, 192, dtype=torch.bfloat16)
    layer = layer.to("cpu")
    safetensors.torch.save_file(layer.state_dict(), tmp_path / "a.safetensors")
    ours = nf4lab.load_quantized(tmp_path / "a.safetensors")
    assert sorted(ours) == ["bias", "weight"] and torch.equal(ours["bias"], layer.bias)
    assert ours["weight"].dtype == torch.bfloat16
    assert torch.equal(ours["weight"].packed, layer.weight.data.reshape(-1).view(torch.uint8))
    theirs = bitsandbytes.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert torch.equal(ours["weight"].dequantize(), theirs)


def test_where_rows_end_inside_a_block_we_read_what_bitsandbytes_wrote(bitsandbytes, tmp_path):
    # Its CPU decoder (0.50.2) then gives other values than it encoded, as if each row began a block. Asked for one
    # long row it is right, and that is what its file means.
    packed, state = bitsandbytes.quantize_4bit(weight(96, 160), quant_type="nf4", compress_statistics=False)
    parts = {"w": packed} | {f"w.{key}": part for key, part in state.as_dict(packed=True).items()}
    safetensors.torch.save_file(parts, tmp_path / "a.safetensors")
    ours = nf4lab.load_quantized(tmp_path / "a.safetensors")["w"].dequantize()
    state.shape = torch.Size([1, 96 * 160])
    assert torch.equal(ours.reshape(1, -1), bitsandbytes.dequantize_4bit(packed, state))


@pytest.mark.parametrize("double_quant", [False, True])
def test_our_keys_are_those_that_bitsandbytes_writes(bitsandbytes, double_quant):
    w = weight(96, 192)
    packed, state = bitsandbytes.quantize_4bit(w, quant_type="nf4", compress_statistics=double_quant)
    theirs = {"w": packed} | {f"w.{key}": part for key, part in state.as_dict(packed=True).items()}
    ours = parts_of("w", nf4lab.quantize(w, double_quant=double_quant))
    assert sorted(ours) == sorted(theirs)
    for key, part in ours.items():
        assert (part.dtype, part.dim()) == (theirs[key].dtype, theirs[key].dim())
        if "quant_state" in key:
            mine, other = (json.loads(bytes(p.tolist())) for p in (part, theirs[key]))
            assert mine.pop("nested_offset", 0) == pytest.approx(other.pop("nested_offset", 0), rel=1e-6)
            assert mine == other
        elif key != "w.absmax" or not double_quant:  # its CPU code takes another second-level code now and then
            assert torch.equal(part, theirs[key])


def test_bitsandbytes_refuses_what_it_has_no_words_for(bitsandbytes):
    import bitsandbytes as library

    parts = parts_of("w", nf4lab.quantize(weight(8, 64), "int4"))
    with pytest.raises(ValueError, match="exactly one `quant_state` item"):
        library.nn.Params4bit.from_prequantized(data=parts.pop("w"), quantized_stats=parts, device="cpu")


def test_bitsandbytes_says_that_it_does_not_take_blocks_of_16(bitsandbytes):
    parts = parts_of("w", nf4lab.quantize(weight(8, 64), block_size=16))
    data = parts.pop("w")
    state = bitsandbytes.QuantState.from_dict(parts, device="cpu")
    with pytest.raises(ValueError, match="invalid blocksize 16"):
        bitsandbytes.dequantize_4bit(data, state)


def test_the_parts_lead_back_to_the_tensor_without_a_file():
    original = nf4lab.quantize(weight(7, 9), double_quant=True)
    assert_equal(from_parts("w", parts_of("w", original)), original)


# Shards


@pytest.fixture
def sharded(tmp_path):
    """A folder with a checkpoint in three shards: the parts of one quantized tensor lie in two of them."""
    folder = tmp_path / "in"
    folder.mkdir()
    tensors = {f"layer{i}.weight": nf4lab.quantize(weight(64, 64, seed=i), double_quant=True) for i in range(3)}
    parts = [part for name, q in tensors.items() for part in parts_of(name, q).items()]
    weight_map = {}
    for i, chosen in enumerate((parts[:4], parts[4:9], parts[9:])):
        name = f"model-{i + 1:05d}-of-00003.safetensors"
        safetensors.torch.save_file(dict(chosen), folder / name)
        weight_map |= dict.fromkeys(dict(chosen), name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder, tensors


@pytest.mark.parametrize("by", ["folder", "index"])
def test_a_checkpoint_in_shards_is_read_as_one(sharded, by):
    folder, tensors = sharded
    back = nf4lab.load_quantized(folder if by == "folder" else folder / "model.safetensors.index.json")
    assert sorted(back) == sorted(tensors)
    for name, tensor in tensors.items():
        assert_equal(back[name], tensor)


def rewrite_index(folder, change):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


SHARD = "model-00002-of-00003.safetensors"
BAD_INDEXES = {
    "a tensor too many": (lambda m: m.update(ghost=SHARD), r"index.json says that tensor 'ghost' is in model-00002"),
    "a tensor too few": (lambda m: m.pop("layer0.weight"), r"says that tensor 'layer0.weight' .* does not place it"),
    "in another shard": (
        lambda m: m.update({"layer0.weight.quant_map": SHARD}),
        r"tensor 'layer0.weight.quant_map' is in model-0000",
    ),
    "outside the folder": (lambda m: m.update(x="../x.safetensors"), r"in the same folder; got '../x.safetensors'"),
    "a pickle": (lambda m: m.update(x="x.bin"), r"a shard is a safetensors file in the same folder; got 'x.bin'"),
    "no tensors": (lambda m: m.clear(), r"must map tensors to shards under 'weight_map'; got \{\}"),
}


@pytest.mark.parametrize(("change", "message"), BAD_INDEXES.values(), ids=BAD_INDEXES)
def test_an_index_that_disagrees_with_its_shards_is_refused(sharded, change, message):
    rewrite_index(sharded[0], change)
    with pytest.raises(ValueError, match=message):
        nf4lab.load_quantized(sharded[0])


def test_a_missing_shard_is_refused_by_name(sharded):
    (sharded[0] / SHARD).unlink()
    with pytest.raises(FileNotFoundError, match=SHARD):
        nf4lab.load_quantized(sharded[0])


def test_a_model_in_4_bits_already_takes_no_4_bit_file(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(64, 4))
    nf4lab.quantize_model_(model)
    nf4lab.save_quantized(tmp_path / "a.safetensors", {"0.weight": model[0].quantized})
    with pytest.raises(ValueError, match=r"^layer '0' is in 4 bits already: load into the model as its "):
        nf4lab.load_model_(model, tmp_path / "a.safetensors")


@pytest.mark.parametrize("act", [nf4lab.load_quantized, lambda name: nf4lab.quantize_checkpoint(name, "out")])
def test_a_name_of_the_hub_is_told_how_it_becomes_a_folder(tmp_path, monkeypatch, act):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"hf download owner/model-1\.7B --local-dir model-1\.7B$"):
        act("owner/model-1.7B")
    (tmp_path / "owner").mkdir()  # then it is a folder's name, mistyped
    with pytest.raises(FileNotFoundError, match="No such file or directory"):
        act("owner/model-1.7B")
    assert [path.name for path in tmp_path.iterdir()] == ["owner"]


def test_a_folder_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape("holds neither model.safetensors.index.json nor")):
        nf4lab.load_quantized(tmp_path)


# A whole checkpoint


@pytest.fixture
def llama(tmp_path):
    """A folder with a tiny Llama in shards, as transformers saves it, and the model."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "in", max_shard_size="100KB")
    return tmp_path / "in", model


def test_a_sharded_checkpoint_is_quantized_shard_by_shard(llama, tmp_path):
    folder, model = llama
    counts = nf4lab.quantize_checkpoint(folder, tmp_path / "out", double_quant=True)
    names = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)} - {"lm_head"}
    back = nf4lab.load_quantized(tmp_path / "out")
    assert {name for name, t in back.items() if isinstance(t, nf4lab.QuantizedTensor)} == {f"{n}.weight" for n in names}
    for name, tensor in model.state_dict().items():
        expected = nf4lab.quantize(tensor, double_quant=True) if name.removesuffix(".weight") in names else tensor
        assert_equal(back[name], expected)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in folder.iterdir()}
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == counts["bytes_after"] < counts["bytes_before"]
    assert counts["quantized"] == len(names) and counts["tensors"] == len(model.state_dict())


def test_transformers_loads_the_quantized_folder_with_bitsandbytes(bitsandbytes, llama, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    nf4lab.quantize_checkpoint(llama[0], tmp_path / "out", double_quant=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, tensor in nf4lab.load_quantized(tmp_path / "out").items():
        theirs = model.get_parameter(name)
        if isinstance(tensor, nf4lab.QuantizedTensor):
            theirs = bitsandbytes.dequantize_4bit(theirs.data, theirs.quant_state)
            tensor = tensor.dequantize()
        assert torch.equal(theirs, tensor), name


def test_patterns_choose_what_is_quantized(tmp_path):
    tensors = {"a.weight": weight(8, 8), "b.weight": weight(8, 8), "b.table": weight(8, 8), "c.weight": weight(8)}
    safetensors.torch.save_file(tensors, tmp_path / "in.safetensors")
    nf4lab.quantize_checkpoint(
        tmp_path / "in.safetensors", tmp_path / "out.safetensors", "int4", include=["a.*", "b.*"], exclude=["*.table"]
    )
    back = nf4lab.load_quantized(tmp_path / "out.safetensors")
    assert [n for n in sorted(back) if isinstance(back[n], nf4lab.QuantizedTensor)] == ["a.weight", "b.weight"]


def test_a_target_that_exists_is_left_alone(tmp_path):
    safetensors.torch.save_file({"a.weight": weight(8, 8)}, tmp_path / "in.safetensors")
    (tmp_path / "out.safetensors").write_text("precious")
    with pytest.raises(FileExistsError, match=r"out\.safetensors exists already; nothing was written"):
        nf4lab.quantize_checkpoint(tmp_path / "in.safetensors", tmp_path / "out.safetensors")
    assert (tmp_path / "out.safetensors").read_text() == "precious"


def test_a_weight_that_is_not_finite_is_refused_by_name_and_nothing_is_left_behind(llama, tmp_path):
    folder, _ = llama
    name = "model.layers.1.mlp.up_proj.weight"
    shard = folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]
    tensors = safetensors.torch.load_file(shard)
    tensors[name][3, 4] = torch.nan
    safetensors.torch.save_file(tensors, shard)
    with pytest.raises(ValueError, match=rf"{shard.name}: tensor '{name}': x must be finite .* at index \(3, 4\)"):
        nf4lab.quantize_checkpoint(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
