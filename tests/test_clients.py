"""nf4lab between its neighbours: bitsandbytes' layers adopted, models saved in five ways, PEFT, Trainer."""

import copy
import hashlib
import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

import nf4lab
from nf4lab.checkpoints import architecture

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("bitsandbytes")

from architectures import ALL, ARCHITECTURES, MIXTURES, MORE, SPLIT, inputs_of, make, outputs, plainly  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*of the weights stay")
FUSED = ("Mixtral", "Qwen3-MoE")


def in_4_bits(name, folder):
    """The model that transformers and bitsandbytes make of a saved one of that name."""
    make(name).save_pretrained(folder)
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model_class = getattr(transformers, ALL[name][0])
    return plainly(model_class.from_pretrained(folder, quantization_config=config))


def digest(model):
    """What the model answers, to the bit, in one word."""
    return hashlib.sha256(outputs(model).numpy().tobytes()).hexdigest()


def in_another_process(script, **names):
    """The digests that a script prints, which knows this module's names and those given, in a new interpreter.

    There too bitsandbytes' fall-backs run plainly: as the fixture `bitsandbytes` says, they compile for a minute.
    """
    head = f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom test_clients import *\n"
    head += "".join(f"{name} = {value!r}\n" for name, value in names.items())
    command = [sys.executable, "-c", head + textwrap.dedent(script)]
    plain = os.environ | {"TORCHDYNAMO_DISABLE": "1"}
    done = subprocess.run(command, env=plain, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [line.split()[1] for line in done.stdout.splitlines() if line.startswith("digest: ")]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_bitsandbytes_wrote_is_adopted_and_released_with_the_same_answers(bitsandbytes, tmp_path, name):
    model = in_4_bits(name, tmp_path / "in")
    model.save_pretrained(tmp_path / "bnb")
    model = plainly(type(model).from_pretrained(tmp_path / "bnb"))
    expected, dtypes = outputs(model), {n: p.dtype for n, p in model.named_parameters()}
    names = nf4lab.adopt_(model)
    model.save_pretrained(tmp_path / "adopted")
    again = plainly(type(model).from_pretrained(tmp_path / "adopted"))
    assert torch.equal(outputs(again), expected)
    layers = [model.get_submodule(n) for n in names]
    assert len(names) >= 8 and all(type(layer) is nf4lab.Linear4bit for layer in layers)
    assert torch.equal(outputs(model), expected)
    assert nf4lab.release_(model) == names
    assert {n: p.dtype for n, p in model.named_parameters()} == dtypes
    assert torch.equal(outputs(plainly(model)), expected)
    assert nf4lab.adopt_(model) == names
    assert [layer.was_conv1d for layer in (model.get_submodule(n) for n in names)] == [name == "GPT-2"] * len(names)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA GPU")
@pytest.mark.parametrize("double_quant", [False, True])
def test_layers_on_a_gpu_are_adopted_and_released_there(double_quant):
    bnb = pytest.importorskip("bitsandbytes.nn")
    settings = dict(compute_dtype=torch.bfloat16, compress_statistics=double_quant, quant_type="nf4")
    model = nn.Sequential(bnb.Linear4bit(512, 256, bias=False, **settings)).cuda()
    x = torch.randn(3, 512, dtype=torch.bfloat16, device="cuda")
    before, kept = model(x), {key: part.clone() for key, part in model.state_dict().items()}
    assert nf4lab.adopt_(model) == ["0"] and isinstance(model[0], nf4lab.Linear4bit)
    assert {part.device.type for part in model.state_dict().values()} == {"cuda"}
    assert (model(x) - before).abs().max() <= 2**-7 * before.abs().max()
    nf4lab.release_(model)
    assert all(torch.equal(part, kept[key]) for key, part in model.state_dict().items())
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in FUSED])
def test_a_quantized_model_is_saved_and_opened_by_transformers(bitsandbytes, tmp_path, name):
    model = make(name)
    rows = nf4lab.quantize_model_(model)
    model.save_pretrained(tmp_path / "out")
    loaded = plainly(type(model).from_pretrained(tmp_path / "out"))
    four_bit = {n for n, m in loaded.named_modules() if type(m).__name__ == "Linear4bit"}
    assert four_bit == {row.name for row in rows}
    assert torch.equal(outputs(loaded), outputs(model))


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("how", [{}, {"format": "int4"}, {"double_quant": True}])
def test_a_model_with_quantized_experts_is_saved_and_opened_by_nf4lab(tmp_path, name, how):
    model = make(name)
    nf4lab.quantize_model_(model, **how)
    model.save_pretrained(tmp_path / "out")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert config.quantization_config["quant_method"] == "nf4lab"
    again = type(model)(config).eval()
    nf4lab.load_model_(again, tmp_path / "out")
    assert torch.equal(outputs(again), outputs(model))


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3-MoE", "GPT-2", "ViT", "T5"])
@pytest.mark.parametrize("how", [{}, {"format": "int4"}, {"double_quant": True}])
def test_a_folder_of_nf4labs_own_is_opened_by_nf4lab_its_experts_joined(tmp_path, name, how):
    model = make(name)
    model.save_pretrained(tmp_path / "in")
    experts = ["*experts*"] if name in FUSED else []
    nf4lab.quantize_checkpoint(tmp_path / "in", tmp_path / "out", **how, include=["*", *experts])
    again = make(name, seed=1)
    nf4lab.load_model_(again, tmp_path / "out")
    layers = [m for m in again.modules() if isinstance(m, nf4lab.Linear4bit | nf4lab.Experts4bit)]
    by_hand = make(name)
    for n, layer in again.named_modules():
        if isinstance(layer, nf4lab.Linear4bit):
            w = by_hand.get_parameter(f"{n}.weight").data
            turned = w.shape != layer.weight.shape or name == "GPT-2"
            expected = nf4lab.quantize(w.T if turned else w, **how).dequantize()
            assert torch.equal(layer.weight, expected)
        elif isinstance(layer, nf4lab.Experts4bit):
            whole = by_hand.get_parameter(n).data
            parts = whole if "down" in n else whole.unflatten(1, (2, -1)).flatten(0, 1)  # gate and up, expert by expert
            expected = torch.cat([nf4lab.quantize(p, **how).dequantize().flatten() for p in parts])
            assert torch.equal(layer.weight.flatten(), expected)
    assert len(layers) >= 8 and outputs(again).isfinite().all()


@pytest.mark.parametrize("name", MIXTURES)
def test_a_folder_with_its_experts_named_answers_as_the_model_quantized_in_memory(tmp_path, name):
    model = make(name)
    model.save_pretrained(tmp_path / "in")
    nf4lab.quantize_checkpoint(tmp_path / "in", tmp_path / "out", include=["*", "*experts*"])
    rows, again = nf4lab.quantize_model_(model), make(name, seed=1)
    nf4lab.load_model_(again, tmp_path / "out")
    assert sum("experts" in row.name for row in rows) >= 2 and rows.kept_share < 0.25
    assert torch.equal(outputs(again), outputs(model))


def test_rwkv_which_divides_its_weights_in_place_is_refused_in_words_and_its_folder_is_right(bitsandbytes, tmp_path):
    theirs, model = in_4_bits("RWKV", tmp_path / "in"), make("RWKV")
    nf4lab.quantize_checkpoint(tmp_path / "in", tmp_path / "out")
    assert torch.equal(outputs(plainly(type(model).from_pretrained(tmp_path / "out"))), outputs(theirs))
    nf4lab.quantize_model_(model)
    with pytest.raises(RuntimeError, match="what is written to it would be lost"):
        outputs(model)


def test_what_a_model_computes_and_no_file_has_is_its_own_when_nf4lab_opens_a_folder(tmp_path):
    model, again = make("Marian"), make("Marian", seed=1)
    model.save_pretrained(tmp_path / "in")
    nf4lab.quantize_checkpoint(tmp_path / "in", tmp_path / "out")
    nf4lab.quantize_model_(model)
    nf4lab.load_model_(again, tmp_path / "out")
    assert torch.equal(outputs(again), outputs(model))


@pytest.mark.parametrize("format", nf4lab.FORMATS)
def test_a_model_in_any_format_is_saved_and_opened_by_nf4lab(tmp_path, format):
    model = make("tied Llama")
    nf4lab.quantize_model_(model, format)
    model.save_pretrained(tmp_path / "out")
    again = make("tied Llama", seed=1)
    nf4lab.load_model_(again, tmp_path / "out")
    assert torch.equal(outputs(again), outputs(model))
    assert again.lm_head.weight is again.model.embed_tokens.weight


@pytest.mark.parametrize("way", ["memory", "folder"])
def test_an_embedding_that_is_named_goes_into_4_bits_and_comes_back(tmp_path, way):
    model, again, include = make("Llama"), make("Llama", seed=1), ["*", "*embed_tokens*"]
    if way == "memory":
        rows = nf4lab.quantize_model_(model, include=include)
        assert rows[0].name == "model.embed_tokens"
        model.save_pretrained(tmp_path / "out")
    else:
        model.save_pretrained(tmp_path / "in")
        nf4lab.quantize_checkpoint(tmp_path / "in", tmp_path / "out", include=include)
        nf4lab.quantize_model_(model, include=include)
    nf4lab.load_model_(again, tmp_path / "out")
    assert isinstance(again.model.embed_tokens, nf4lab.Embedding4bit)
    assert torch.equal(outputs(again), outputs(model))


def test_a_model_on_the_meta_device_whose_buffers_no_file_has_is_refused(tmp_path):
    model = make("Llama")
    nf4lab.quantize_model_(model)
    model.save_pretrained(tmp_path / "out")
    with torch.device("meta"):
        again = type(model)(model.config)
    with pytest.raises(ValueError, match=r"buffer .model\.rotary_emb\.inv_freq. is on the meta device"):
        nf4lab.load_model_(again, tmp_path / "out")


def test_experts_that_quantizing_again_would_move_are_not_joined_and_the_loaded_model_is_quantized_instead(tmp_path):
    model, every = make("Mixtral"), ["*", "*experts*"]
    model.save_pretrained(tmp_path / "in")
    nf4lab.quantize_checkpoint(tmp_path / "in", tmp_path / "out", "nvfp4", include=every)
    with pytest.raises(ValueError, match="and nvfp4 does not hold the whole: quantize the original's loaded model"):
        nf4lab.load_model_(make("Mixtral"), tmp_path / "out")
    rows = nf4lab.quantize_model_(type(model).from_pretrained(tmp_path / "in"), "nvfp4", include=every)
    assert any("experts" in row.name for row in rows)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_model_of_16_bits_computes_in_them_from_memory_from_a_folder_and_adopted(bitsandbytes, tmp_path, dtype):
    dtype = getattr(torch, dtype)
    model = make("Llama").to(dtype)
    model.save_pretrained(tmp_path / "in")
    nf4lab.quantize_checkpoint(tmp_path / "in", tmp_path / "folder")
    model = type(model).from_pretrained(tmp_path / "in")  # `.to` has rounded what is no weight, too
    nf4lab.quantize_model_(model)
    model.save_pretrained(tmp_path / "memory")
    expected = outputs(model)
    for way in ("folder", "memory"):
        loaded = plainly(type(model).from_pretrained(tmp_path / way))
        assert loaded.model.layers[0].mlp.up_proj.compute_dtype == dtype
        assert torch.equal(outputs(loaded), expected)
        nf4lab.adopt_(loaded)
        assert torch.equal(outputs(loaded), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("double_quant", [False, True])
def test_after_a_pass_on_a_cpu_with_bfloat16_a_model_is_adopted_with_the_constants_that_it_has(
    bitsandbytes, tmp_path, double_quant, dtype
):
    if not bitsandbytes.has_avx512bf16():
        pytest.skip("this CPU has no AVX512-BF16")
    make("Llama").to(dtype).save_pretrained(tmp_path / "in")
    nf4lab.quantize_checkpoint(tmp_path / "in", tmp_path / "out", double_quant=double_quant)
    fresh, model = (transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out") for _ in range(2))
    nf4lab.adopt_(fresh)
    outputs(model)
    with pytest.warns(UserWarning, match="has rounded the constants of 'model.* and of 13 more to bfloat16"):
        names = nf4lab.adopt_(model)
    for name in names:
        old, new = fresh.get_submodule(name).quantized, model.get_submodule(name).quantized
        assert torch.equal(new.packed, old.packed)
        if double_quant:  # quantized anew by bitsandbytes: a step of its 256 levels, at most 1/64 of the largest
            torch.testing.assert_close(new.absmax, old.absmax, rtol=0, atol=old.absmax.max().item() / 32)
        else:
            assert torch.equal(new.absmax, old.absmax.bfloat16().float())


def test_a_model_that_is_cast_after_it_was_quantized_is_opened_to_compute_as_it_was_quantized(bitsandbytes, tmp_path):
    dtypes = []
    for before in (True, False):
        model = make("Llama")
        model = model.to(torch.bfloat16) if before else model
        nf4lab.quantize_model_(model)
        model.to(torch.bfloat16).save_pretrained(tmp_path / str(before))
        dtypes.append(type(model).from_pretrained(tmp_path / str(before)).model.layers[0].mlp.up_proj.compute_dtype)
    assert dtypes == [torch.bfloat16, torch.float32]


@pytest.mark.parametrize("include", ["*", "*q_proj"])
def test_a_model_with_its_adapters_merged_is_saved_as_what_it_is_and_opened(bitsandbytes, tmp_path, include):
    model = make("Llama")
    nf4lab.quantize_model_(model)
    nf4lab.add_lora_(model, rank=4, include=include)
    nf4lab.merge_lora_(model)
    model.save_pretrained(tmp_path / "out")
    again = plainly(type(model).from_pretrained(tmp_path / "out"))
    assert torch.equal(outputs(again), outputs(model))
    four_bit = {n for n, m in again.named_modules() if type(m).__name__ == "Linear4bit"}
    assert four_bit == {n for n, m in model.named_modules() if isinstance(m, nf4lab.Linear4bit)}
    assert len(four_bit) == (0 if include == "*" else 12)


@pytest.mark.parametrize("way", ["memory", "adopted", "loaded"])
@pytest.mark.parametrize("include", ["*", "*attn.c_proj"])  # the square one, whose transpose fits too
def test_merged_layers_of_gpt_2_are_stored_transposed_again(bitsandbytes, tmp_path, way, include):
    model = in_4_bits("GPT-2", tmp_path / "in") if way == "adopted" else make("GPT-2")
    if way == "adopted":
        nf4lab.adopt_(model)
    elif way == "loaded":
        nf4lab.quantize_model_(model)
        model.save_pretrained(tmp_path / "4bit")
        model = make("GPT-2", seed=1)
        nf4lab.load_model_(model, tmp_path / "4bit")
    else:
        nf4lab.quantize_model_(model)
    for parameter in nf4lab.add_lora_(model, rank=4, include=include):
        nn.init.normal_(parameter, std=0.1)
    expected = outputs(model)
    nf4lab.merge_lora_(model)
    assert type(model.transformer.h[0].attn.c_proj).__name__ == "Conv1D"
    torch.testing.assert_close(outputs(model), expected)
    model.save_pretrained(tmp_path / "out")
    again = plainly(type(model).from_pretrained(tmp_path / "out"))
    torch.testing.assert_close(outputs(again), expected)


@pytest.mark.parametrize("init", ["loftq", "pissa"])
@pytest.mark.parametrize("include", ["*attn.c_proj", "*"])
def test_adapters_of_gpt_2_start_from_its_transposed_originals(init, include):
    model = make("GPT-2")
    originals = {key: value.clone() for key, value in model.state_dict().items()}
    nf4lab.quantize_model_(model)
    nf4lab.add_lora_(model, rank=32, include=include, init=init, originals=originals)
    for block in model.transformer.h:
        name = next(name for name, module in model.named_modules() if module is block.attn.c_proj)
        original = originals[f"{name}.weight"].T
        rounded = nf4lab.quantize(original).dequantize()
        # An adapter of half the rank takes the larger half of what rounding leaves (LoftQ), or of what is rounded.
        assert (block.attn.c_proj.weight - original).norm() < (rounded - original).norm() * 0.5**0.5
    nf4lab.merge_lora_(model)
    assert type(model.transformer.h[0].attn.c_proj).__name__ == "Conv1D"


@pytest.mark.parametrize("name", ["T5", "tied Llama", "BART", "Whisper"])
def test_adapters_on_every_architecture_answer_as_merged_saved_and_opened(bitsandbytes, tmp_path, name):
    model = make(name)
    nf4lab.quantize_model_(model)
    for parameter in nf4lab.add_lora_(model, rank=4):
        nn.init.normal_(parameter, std=0.05)
    expected = outputs(model)
    nf4lab.merge_lora_(model)
    model.save_pretrained(tmp_path / "out")
    torch.testing.assert_close(outputs(type(model).from_pretrained(tmp_path / "out")), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("change", [nf4lab.adopt_, nf4lab.release_, nf4lab.load_model_])
def test_a_layer_with_hooks_is_refused_by_everything_that_replaces_layers(bitsandbytes, tmp_path, change):
    model = make("Llama")
    nf4lab.quantize_model_(model)
    model.save_pretrained(tmp_path / "out")
    more = (tmp_path / "out",) if change is nf4lab.load_model_ else ()
    if change is nf4lab.load_model_:
        model = make("Llama")
    elif change is nf4lab.adopt_:
        nf4lab.release_(model)
    layer = model.model.layers[1].mlp.up_proj
    layer.register_forward_hook(lambda layer, x, y: 2 * y)
    with pytest.raises(ValueError, match=r"layer 'model\.layers\.1\.mlp\.up_proj' has hooks, which would be lost"):
        change(model, *more)
    assert model.model.layers[1].mlp.up_proj is layer


def test_a_model_that_accelerate_has_offloaded_can_not_be_saved_and_could_before(tmp_path):
    import accelerate

    model = make("Llama")
    nf4lab.quantize_model_(model)
    model.save_pretrained(tmp_path / "before")
    expected = outputs(model)
    accelerate.cpu_offload(model, execution_device="cpu", offload_buffers=True)
    assert torch.equal(outputs(model), expected)
    with pytest.raises(NotImplementedError, match="no data"):
        model.save_pretrained(tmp_path / "after")
    again = make("Llama", seed=1)
    nf4lab.load_model_(again, tmp_path / "before")
    accelerate.dispatch_model(again, {"": "cpu"})
    assert torch.equal(outputs(again), expected)


@pytest.mark.parametrize("named", ["embed_tokens", "lm_head"])
def test_tokens_are_not_added_to_a_table_or_a_head_in_4_bits(named):
    model = make("Llama")
    nf4lab.quantize_model_(model, include=["*", f"*{named}*"])
    with pytest.raises(TypeError, match="which is not an instance of"):
        model.resize_token_embeddings(140)


def test_a_model_saved_in_several_files_is_loaded_file_by_file_as_accelerate_does(tmp_path):
    import accelerate

    models = [make("Llama", seed=k) for k in range(2)]
    for model in models:
        nf4lab.quantize_model_(model, double_quant=True)
    accelerate.Accelerator(cpu=True).save_model(models[0], tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) >= 4
    accelerate.load_checkpoint_in_model(models[1], tmp_path)
    assert torch.equal(outputs(models[1]), outputs(models[0]))
    resumed = make("Llama", seed=2)
    nf4lab.quantize_model_(resumed, double_quant=True)
    transformers.trainer.load_sharded_checkpoint(resumed, tmp_path)  # as Trainer resumes
    assert torch.equal(outputs(resumed), outputs(models[0]))
    with pytest.raises(AttributeError):
        accelerate.load_checkpoint_in_model(models[1], tmp_path, device_map={"": "cpu"})


def test_an_adopted_model_is_cast_and_a_released_one_is_transformers_quantized_again(bitsandbytes, tmp_path):
    model = in_4_bits("Llama", tmp_path)
    before = {mark: getattr(model, mark) for mark in ("hf_quantizer", "quantization_method", "is_quantized")}
    nf4lab.adopt_(model)
    assert outputs(model.to(torch.bfloat16)).dtype == torch.bfloat16
    assert outputs(model.float()).dtype == torch.float32
    nf4lab.release_(model)
    assert {mark: getattr(model, mark) for mark in before} == before
    with pytest.raises(ValueError, match="You cannot cast a bitsandbytes model"):
        model.to(torch.bfloat16)


def test_transformers_refuses_a_folder_that_is_nf4labs_own(tmp_path):
    model = make("Llama")
    nf4lab.quantize_model_(model, "int4")
    model.save_pretrained(tmp_path / "out")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        type(model).from_pretrained(tmp_path / "out")


def test_a_checkpoint_that_does_not_fit_is_refused_by_name_and_the_model_is_as_it_was(tmp_path):
    model, other = make("Llama"), make("GPT-2")
    nf4lab.quantize_model_(model)
    model.save_pretrained(tmp_path / "out")
    before = dict(other.state_dict())
    with pytest.raises(ValueError, match=r"tensor 'model.layers.0.mlp.down_proj.weight' is stored in 4 bits"):
        nf4lab.load_model_(other, tmp_path / "out")
    assert all(torch.equal(before[k], v) for k, v in other.state_dict().items())


@pytest.mark.parametrize("name", [*MORE, *SPLIT])
def test_all_three_ways_of_more_architectures_give_bitsandbytes_own_answers(bitsandbytes, tmp_path, name):
    theirs = in_4_bits(name, tmp_path / "in")
    expected, model_class = outputs(theirs), type(theirs)
    nf4lab.quantize_checkpoint(tmp_path / "in", tmp_path / "folder")
    ours = plainly(model_class.from_pretrained(tmp_path / "folder"))
    assert torch.equal(outputs(ours), expected)
    model = make(name)
    nf4lab.quantize_model_(model)
    assert torch.equal(outputs(model), expected)
    model.save_pretrained(tmp_path / "memory")
    assert torch.equal(outputs(plainly(model_class.from_pretrained(tmp_path / "memory"))), expected)
    assert nf4lab.adopt_(ours) == nf4lab.adopt_(theirs)
    assert torch.equal(outputs(ours), expected) and torch.equal(outputs(theirs), expected)


def test_what_convolutions_add_to_a_difference_is_where_their_weights_lie_in_memory(bitsandbytes, tmp_path):
    theirs = in_4_bits("FocalNet", tmp_path / "in")
    nf4lab.quantize_checkpoint(tmp_path / "in", tmp_path / "out")
    ours = plainly(type(theirs).from_pretrained(tmp_path / "out"))
    answers = []
    for model in (ours, theirs):
        for p in model.parameters():
            p.data = p.data if hasattr(p, "quant_state") else p.data.clone()
        answers.append(outputs(model))
    assert torch.equal(*answers)


@pytest.mark.parametrize("name", SPLIT)
def test_what_a_file_has_in_one_matrix_is_4_bit_layers_in_every_way(bitsandbytes, tmp_path, name):
    theirs = in_4_bits(name, tmp_path / "in")
    expected, four_bit = outputs(theirs), {n for n, m in theirs.named_modules() if type(m).__name__ == "Linear4bit"}
    counts = nf4lab.quantize_checkpoint(tmp_path / "in", tmp_path / "folder", double_quant=True, max_shard_size="20KB")
    stored = nf4lab.load_quantized(tmp_path / "folder")
    assert {n.removesuffix(".weight") for n, w in stored.items() if isinstance(w, nf4lab.QuantizedTensor)} >= {
        n for n in four_bit if n.endswith(("q_proj", "k_proj", "v_proj"))
    }
    assert counts["quantized"] < len(four_bit) and len(list((tmp_path / "folder").glob("*.safetensors"))) > 2
    model, again = make(name), make(name, seed=1)
    nf4lab.quantize_model_(model, double_quant=True)
    nf4lab.load_model_(again, tmp_path / "folder")
    assert torch.equal(outputs(again), outputs(model))
    assert nf4lab.adopt_(theirs) and set(four_bit) == {
        n for n, m in theirs.named_modules() if isinstance(m, nf4lab.Linear4bit)
    }
    theirs.save_pretrained(tmp_path / "adopted")
    assert torch.equal(outputs(plainly(type(theirs).from_pretrained(tmp_path / "adopted"))), expected)


def test_in_a_folder_a_matrix_of_several_layers_stays_whole_where_it_is_excluded(bitsandbytes, tmp_path):
    make("Nomic BERT").save_pretrained(tmp_path / "in")
    nf4lab.quantize_checkpoint(tmp_path / "in", tmp_path / "out", exclude="*layers.1.attn.Wqkv*")
    model = transformers.NomicBertForMaskedLM.from_pretrained(tmp_path / "out")
    first, second = (layer.self_attn for layer in model.nomic_bert.layers)
    kinds = [type(layer.q_proj).__name__ for layer in (first, second)]
    assert kinds == ["Linear4bit", "Linear"] and type(second.o_proj).__name__ == "Linear4bit"
    assert torch.equal(second.k_proj.weight, make("Nomic BERT").nomic_bert.layers[1].self_attn.k_proj.weight)


def test_several_weights_that_transformers_has_joined_in_4_bits_are_refused_in_words(bitsandbytes, tmp_path):
    in_4_bits("Nomic BERT", tmp_path / "in").save_pretrained(tmp_path / "theirs")
    with pytest.raises(ValueError, match=r"Wqkv.weight': the quant_state is not JSON: several stand in one"):
        nf4lab.load_quantized(tmp_path / "theirs")


@pytest.mark.parametrize("way", ["folder", "memory"])
def test_where_a_models_own_names_are_renamed_the_layers_that_would_be_lost_stay(bitsandbytes, tmp_path, way):
    model = make("Laguna")
    experts = [f"model.layers.1.mlp.experts.{part}_proj" for part in ("gate_up", "down")]
    if way == "memory":
        nf4lab.quantize_model_(model, exclude=experts)
        model.save_pretrained(tmp_path / "out")
    else:
        model.save_pretrained(tmp_path / "in", save_original_format=False)
        counts = nf4lab.quantize_checkpoint(tmp_path / "in", tmp_path / "out")
        lost = [n for n, why in counts["kept"].items() if why == architecture.RENAMED]
        assert lost == [f"model.layers.1.mlp.shared_experts.{part}_proj.weight" for part in ("down", "gate", "up")]
        nf4lab.quantize_model_(model, exclude=[*experts, "*shared_experts*"])
    loaded = plainly(type(model).from_pretrained(tmp_path / "out"))
    assert torch.equal(outputs(loaded), outputs(model))


def test_empty_matrices_stay_of_which_bitsandbytes_makes_what_was_in_memory(bitsandbytes, tmp_path):
    model = make("Gemma 3n", hidden_size_per_layer_input=0)
    model.save_pretrained(tmp_path / "in")
    counts = nf4lab.quantize_checkpoint(tmp_path / "in", tmp_path / "out")
    assert {why for n, why in counts["kept"].items() if "per_layer" in n} == {"empty"}
    nf4lab.quantize_model_(model)
    assert torch.equal(outputs(plainly(type(model).from_pretrained(tmp_path / "out"))), outputs(model))


def test_a_layer_that_bitsandbytes_has_not_quantized_yet_is_refused_by_name(bitsandbytes):
    import bitsandbytes as library

    model = nn.Sequential(nn.Linear(64, 64), library.nn.Linear4bit(64, 64))
    with pytest.raises(ValueError, match="layer '1' is not quantized yet"):
        nf4lab.adopt_(model)


def test_a_format_that_bitsandbytes_lacks_is_not_released():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    nf4lab.quantize_model_(model, include="0")
    nf4lab.quantize_model_(model, "int4")
    with pytest.raises(ValueError, match="layer '1': bitsandbytes has no word for QuantizedTensor"):
        nf4lab.release_(model)
    assert isinstance(model[0], nf4lab.Linear4bit)


# --- five ways of saving, in another process

LOADED = """
    def fresh(double_quant):
        model = make("Llama")
        nf4lab.quantize_model_(model, double_quant=double_quant)
        for p in model.parameters():
            p.data.zero_()
        return model

    def show(model):
        print("digest:", digest(model))

    for folder, double_quant in folders:
        model = fresh(double_quant)
        model.load_state_dict(safetensors.torch.load_file(folder + "/save_file.safetensors"))
        show(model)
        model = fresh(double_quant)
        safetensors.torch.load_model(model, folder + "/save_model.safetensors")
        show(model)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder + "/save_pretrained")
        nf4lab.adopt_(model)
        show(model)
        show(torch.load(folder + "/torch_save.pt", weights_only=False))
        show(pickle.loads(Path(folder + "/pickle").read_bytes()))
"""


def test_five_ways_of_saving_give_the_same_bits_in_another_process(tmp_path):
    folders, expected = [], []
    for double_quant in (False, True):
        folder = tmp_path / str(double_quant)
        model = make("Llama")
        nf4lab.quantize_model_(model, double_quant=double_quant)
        model.save_pretrained(folder / "save_pretrained")
        safetensors.torch.save_file(model.state_dict(), folder / "save_file.safetensors")
        safetensors.torch.save_model(model, str(folder / "save_model.safetensors"))
        torch.save(model, folder / "torch_save.pt")
        (folder / "pickle").write_bytes(pickle.dumps(model))
        folders.append((str(folder), double_quant))
        expected += [digest(model)] * 5
    assert expected[0] != expected[5]
    assert in_another_process(LOADED, folders=folders) == expected


@pytest.mark.parametrize("name", FUSED)
def test_a_model_with_quantized_experts_is_loaded_copied_and_sent(tmp_path, name):
    model, others = make(name), [make(name, seed=1) for _ in range(4)]
    nf4lab.quantize_model_(model, double_quant=True)
    for other in others:
        nf4lab.quantize_model_(other, double_quant=True)
    expected, state = outputs(model), model.state_dict()
    others[0].load_state_dict(state)
    others[1].load_state_dict(state, assign=True)
    safetensors.torch.save_file(state, tmp_path / "file")
    safetensors.torch.load_model(others[2], tmp_path / "file")
    set_model_state_dict(others[3], get_model_state_dict(model))
    copies = [copy.deepcopy(others[0]), pickle.loads(pickle.dumps(others[0]))]
    for other in (*others, *copies):
        assert torch.equal(outputs(other), expected)
    with pytest.raises(RuntimeError, match=r"experts\.gate_up_proj: it is not quantized, but torch.float32"):
        copies[0].load_state_dict(make(name).state_dict())


# --- PEFT


@pytest.fixture
def with_peft():
    """(PEFT, a quantized tiny Llama with its adapters on two kinds of layers)."""
    peft = pytest.importorskip("peft")
    from nf4lab.layers import peft_lora

    model = make("Llama")
    nf4lab.quantize_model_(model, double_quant=True)
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    return peft, peft.get_peft_model(model, peft_lora.register(config)).eval()


def test_pefts_adapters_sit_on_nf4labs_layers_and_train(with_peft):
    _, model = with_peft
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(3, 64)
    expected = layer.base_layer(x) + layer.lora_B["default"](layer.lora_A["default"](x)) * layer.scaling["default"]
    assert torch.equal(layer(x), expected)
    ids = inputs_of(model)["input_ids"]
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.01)
    losses = []
    for _ in range(8):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


def test_pefts_adapters_are_saved_and_loaded_onto_the_same_bits(with_peft, tmp_path):
    peft, model = with_peft
    expected = outputs(model)
    model.save_pretrained(tmp_path / "adapters")
    base = make("Llama")
    nf4lab.quantize_model_(base, double_quant=True)
    from nf4lab.layers import peft_lora

    config = peft_lora.register(peft.PeftConfig.from_pretrained(tmp_path / "adapters"))
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapters", config=config).eval()
    assert torch.equal(outputs(again), expected)


def test_merging_rounds_the_sum_as_the_layer_was_and_unmerging_brings_the_bytes_back(with_peft):
    _, model = with_peft
    layer = model.base_model.model.model.layers[1].mlp.down_proj
    before, total = layer.base_layer.packed.clone(), layer.base_layer.weight + layer.get_delta_weight("default")
    plain, merged = outputs(model), nf4lab.quantize(total, double_quant=True).dequantize()
    with pytest.warns(UserWarning, match="merging an adapter into 4 bits rounds the sum"):
        model.merge_adapter()
    assert torch.equal(layer.base_layer.weight, merged) and not torch.equal(layer.base_layer.packed, before)
    model.unmerge_adapter()
    assert torch.equal(layer.base_layer.packed, before) and torch.equal(outputs(model), plain)
    with pytest.warns(UserWarning, match="rounds the sum"):
        unloaded = model.merge_and_unload()
    assert torch.equal(unloaded.model.layers[1].mlp.down_proj.weight, merged)
    assert isinstance(unloaded.model.layers[1].mlp.down_proj, nf4lab.Linear4bit)


@pytest.mark.parametrize("kind", ["LoraConfig", "IA3Config", "LoHaConfig", "OFTConfig", "VeraConfig"])
def test_adapters_of_peft_that_were_there_before_answer_are_not_merged_and_are_taken_away(kind):
    peft = pytest.importorskip("peft")
    more = {"feedforward_modules": [], "init_ia3_weights": False} if kind == "IA3Config" else {}
    more |= {"OFTConfig": {"oft_block_size": 16}, "VeraConfig": {"r": 4}}.get(kind, {})
    model = peft.get_peft_model(make("Llama"), getattr(peft, kind)(target_modules=["q_proj"], **more)).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.01)
    nf4lab.quantize_model_(model)
    by_hand = copy.deepcopy(model)
    for name, layer in list(by_hand.named_modules()):
        if isinstance(layer, nf4lab.Linear4bit):
            by_hand.set_submodule(name, layer.to_linear())
    assert torch.equal(outputs(model), outputs(by_hand))
    with pytest.raises(RuntimeError, match="what is written to it would be lost"):
        copy.deepcopy(model).merge_adapter()
    assert torch.equal(outputs(model.unload()), outputs(by_hand.unload()))


@pytest.mark.parametrize("kind", ["IA3Config", "LoHaConfig", "OFTConfig", "VeraConfig", "AdaLoraConfig"])
def test_other_adapters_of_peft_are_refused_by_4_bit_layers(kind):
    peft, model = pytest.importorskip("peft"), make("Llama")
    nf4lab.quantize_model_(model)
    more = {"IA3Config": {"feedforward_modules": []}, "AdaLoraConfig": {"total_step": 10}}.get(kind, {})
    with pytest.raises((ValueError, TypeError), match=r"not supported|compatible with VeRA"):
        peft.get_peft_model(model, getattr(peft, kind)(target_modules=["q_proj"], **more))


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PromptEncoderConfig"])
def test_pefts_prompts_want_an_embedding_that_is_not_in_4_bits(kind):
    peft = pytest.importorskip("peft")
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = make("Llama")
    nf4lab.quantize_model_(model)
    assert peft.get_peft_model(model, config)(**inputs_of(model)).logits.isfinite().all()
    model = make("Llama")
    nf4lab.quantize_model_(model, include=["*", "*embed_tokens*"])
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):
        peft.get_peft_model(model, config)(**inputs_of(model))


def test_pefts_modules_to_save_train_nothing_of_a_4_bit_layer_and_all_of_one_that_was_left_out():
    peft = pytest.importorskip("peft")
    from nf4lab.layers import peft_lora

    for exclude, trained in (((), 0), ("*o_proj", 2)):
        model = make("Llama")
        nf4lab.quantize_model_(model, exclude=exclude)
        config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["o_proj"])
        model = peft.get_peft_model(model, peft_lora.register(config))
        assert sum("o_proj" in name for name, p in model.named_parameters() if p.requires_grad) == trained
    model = make("Mixtral")
    nf4lab.quantize_model_(model)
    config = peft.LoraConfig(target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"])
    with pytest.warns(RuntimeWarning, match="no parameter was matched"):
        model = peft.get_peft_model(model, peft_lora.register(config))
    assert not [name for name, p in model.named_parameters() if p.requires_grad and "experts" in name]


def test_pefts_adapters_on_a_square_layer_of_gpt_2_merge_as_they_answer_whatever_fan_in_fan_out_says():
    peft = pytest.importorskip("peft")
    from nf4lab.layers import peft_lora

    model = make("GPT-2")
    nf4lab.quantize_model_(model)
    config = peft.LoraConfig(target_modules=["attn.c_proj"], fan_in_fan_out=True, init_lora_weights=False)
    model = peft.get_peft_model(model, peft_lora.register(config)).eval()
    layer, x = model.base_model.model.transformer.h[0].attn.c_proj, torch.randn(3, 64)
    change = layer(x) - layer.base_layer(x)
    torch.testing.assert_close(change, x @ layer.get_delta_weight("default").T)


def test_a_variant_of_lora_that_needs_the_whole_weight_is_refused():
    peft = pytest.importorskip("peft")
    from nf4lab.layers import peft_lora

    model = make("Llama")
    nf4lab.quantize_model_(model)
    config = peft_lora.register(peft.LoraConfig(target_modules=["q_proj"], use_dora=True))
    with pytest.raises(ValueError, match="PEFT's LoRA is the plain one, without use_dora"):
        peft.get_peft_model(model, config)
    with pytest.raises(TypeError, match=r"^register takes a LoraConfig; got IA3Config$"):
        peft_lora.register(peft.IA3Config())


def test_adapters_on_what_is_still_bitsandbytes_are_refused_and_not_put_on_the_head_alone(bitsandbytes):
    model = make("Llama")
    nf4lab.quantize_model_(model)
    nf4lab.release_(model)
    with pytest.raises(
        ValueError, match=r"^layer 'model\.layers\.0\.self_attn\.q_proj' is in bitsandbytes' 4 bits: call"
    ):
        nf4lab.add_lora_(model)
    assert not any(isinstance(layer, nf4lab.LoRALinear) for layer in model.modules())
    assert len(nf4lab.add_lora_(model, include="*lm_head")) == 2  # this says that the head is meant


# --- Trainer


KINDS = ("peft", "nf4lab", "adopted, peft", "adopted, nf4lab")


def model_with_adapters(kind, folder):
    """A tiny Llama in 4 bits, quantized here or adopted, with adapters on its two q_proj: PEFT's or nf4lab's."""
    torch.manual_seed(0)
    if "adopted" in kind:
        model = in_4_bits("Llama", folder + "/in")
        nf4lab.adopt_(model)
    else:
        model = make("Llama")
        nf4lab.quantize_model_(model)
    if "nf4lab" in kind:
        nf4lab.add_lora_(model, rank=4, include="*q_proj")
        return model
    import peft

    from nf4lab.layers import peft_lora

    config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    return peft.get_peft_model(model, peft_lora.register(config))


def trainer(model, folder):
    """A Trainer of four steps that saves after the second and the fourth in `folder`/run."""
    arguments = transformers.TrainingArguments(
        folder + "/run", max_steps=4, save_steps=2, per_device_train_batch_size=2, learning_rate=0.01,
        report_to=[], disable_tqdm=True, use_cpu=True, logging_steps=1, lr_scheduler_type="constant",
    )  # fmt: skip
    data = [
        {"input_ids": ids, "labels": ids}
        for ids in torch.randint(1, 128, (16, 7), generator=torch.Generator().manual_seed(0))
    ]
    return transformers.Trainer(model, arguments, train_dataset=data)


def digest_of_adapters(model):
    """All that was trained, four matrices, to the bit, in one word."""
    trained = [p.detach().numpy().tobytes() for p in model.parameters() if p.requires_grad]
    assert len(trained) == 4
    return hashlib.sha256(b"".join(trained)).hexdigest()


RESUMED = """
    for adapters, folder in folders.items():
        model = model_with_adapters(adapters, folder)
        resumed = trainer(model, folder)
        resumed.train(resume_from_checkpoint=folder + "/run/checkpoint-2")
        assert resumed.state.global_step == 4
        print("digest:", digest_of_adapters(model))
        print("digest:", digest(model.eval()))
"""


def test_what_trainer_saved_is_resumed_by_another_process_with_equal_bits(bitsandbytes, tmp_path):
    pytest.importorskip("peft")
    folders, expected = {kind: str(tmp_path / kind) for kind in KINDS}, []
    for adapters, folder in folders.items():
        model = model_with_adapters(adapters, folder)
        before = digest_of_adapters(model)
        trainer(model, folder).train()
        expected += [digest_of_adapters(model), digest(model.eval())]
        assert expected[-2] != before
    assert in_another_process(RESUMED, folders=folders) == expected
