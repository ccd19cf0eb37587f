"""What is quantized: the same as by transformers' bitsandbytes integration, and the reason for what is not."""

from pathlib import Path

import pytest
from torch import nn

from nf4lab import choice

transformers = pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")

from architectures import ARCHITECTURES, SPLIT, make  # noqa: E402


def replaced_by_transformers(model):
    """The names of the layers that transformers' integration of bitsandbytes puts its own in for."""
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

    config = transformers.BitsAndBytesConfig(load_in_4bit=True)
    quantizer = Bnb4BitHfQuantizer(config, pre_quantized=False)
    quantizer._process_model_before_weight_loading(model, device_map=None)
    return {name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"}


@pytest.mark.parametrize("name", [*ARCHITECTURES, *SPLIT])
def test_the_same_layers_are_chosen_as_transformers_chooses(name):
    found = choice.candidates(make(name))
    ours = {c.names[0] for c in choice.choose(found, "*", ())[0] if c.kind != "experts"}
    assert ours == replaced_by_transformers(make(name))


def test_what_is_left_alone_has_its_reason():
    reasons = {c.names[0]: c.stays for c in choice.candidates(make("T5")) if c.stays}
    assert reasons["lm_head"] == "its weight is also that of shared"
    assert reasons["shared"] == "embedding"
    assert reasons["encoder.block.0.layer.0.SelfAttention.relative_attention_bias"] == "embedding"
    assert reasons["encoder.block.1.layer.1.DenseReluDense.wo"] == "kept in float32"
    moe = {c.names[0]: c.stays for c in choice.candidates(make("Mixtral"))}
    assert moe["model.layers.0.mlp.gate.weight"] == "in a MixtralTopKRouter"
    assert moe["lm_head"] == "output head" and moe["model.layers.1.mlp.experts.down_proj"] == ""


def test_a_skip_list_in_the_configuration_replaces_the_default_as_in_transformers():
    model = make("Llama")
    model.config.quantization_config = {"llm_int8_skip_modules": ["q_proj", "model.layers.1"]}
    chosen, others = choice.choose(choice.candidates(model), "*", ())
    names = {c.names[0] for c in chosen}
    assert "lm_head" in names and "model.layers.0.self_attn.k_proj" in names
    assert not any("q_proj" in name or "layers.1." in name for name in names)
    assert ("skip list", "model.layers.0.self_attn.q_proj") in {(why, c.names[0]) for c, why in others}


@pytest.mark.parametrize(
    ("patterns", "name", "expected"),
    [
        (["layer.1"], "layer.1.attention", True),
        (["layer.1"], "layer.11.attention", False),
        (["mlp.gate"], "mlp.gate_proj", False),
        (["fc1"], "decoder.layers.23.fc1", True),
        (["layer.*"], "layer.11.attention", True),
        (["^score$"], "model.score", False),
    ],
)
def test_a_skip_list_is_read_as_transformers_reads_it(patterns, name, expected):
    from transformers.quantizers.quantizers_utils import should_convert_module

    assert choice.skips(patterns, name) is expected is not should_convert_module(name, patterns)


class Mixture(nn.Module):
    """A plain mixture: a gate beside its experts, and a head."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(32, 4)
        self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))
        self.gate_proj = nn.Linear(32, 32)
        self.lm_head = nn.Linear(32, 50)


@pytest.mark.parametrize(
    ("include", "more"),
    [("*", set()), ("*head*", {"lm_head"}), (["*", "lm_head"], {"lm_head"}), (["*", "gate"], {"gate"})],
)
def test_heads_and_routers_of_plain_models_stay_unless_a_pattern_names_them(include, more):
    default = {f"experts.{k}" for k in range(4)} | {"gate_proj"}
    chosen, _ = choice.choose(choice.candidates(Mixture()), include, ())
    assert {c.names[0] for c in chosen} == (more if include == "*head*" else default | more)


def test_names_alone_tell_heads_embeddings_and_routers():
    shapes = dict.fromkeys(
        ["model.embed_tokens.weight", "lm_head.weight", "shared.weight", "h.0.mlp.gate.weight", "wte.weight",
         "h.0.mlp.experts.0.w1.weight", "h.0.relative_attention_bias.weight", "h.0.up.weight", "table"], (64, 64)
    )  # fmt: skip
    found = choice.candidates_by_name(shapes | {"norm.weight": (64,)})
    assert {c.names[0] for c in found if not c.stays} == {"h.0.mlp.experts.0.w1.weight", "h.0.up.weight"}
    assert [c.names[0] for c in choice.choose(found, ["lm_head.weight"], ())[0]] == ["lm_head.weight"]


def test_a_name_fits_a_pattern_where_one_of_its_names_does_with_dots_and_case():
    tied = ("lm_head", "model.embed_tokens")
    assert choice.matches(tied, "*embed*") and choice.matches(tied, ["none", "lm_?ead"])
    assert choice.matches("model.layers.10.q_proj", "model*q_proj") and choice.matches("a.b", "[ab].b")
    assert not choice.matches(tied, "*EMBED*") and not choice.matches(tied, "head") and not choice.matches(tied, ())


def test_patterns_from_an_iterator_choose_as_those_from_a_list():
    found, patterns = choice.candidates(make("Llama")), ["*lm_head*", "*q_proj"]
    chosen = choice.choose(found, patterns, ["*layers.1.*"])[0]
    assert [c.names[0] for c in chosen] == ["model.layers.0.self_attn.q_proj", "lm_head"]
    assert choice.choose(found, iter(patterns), iter(["*layers.1.*"]))[0] == chosen


def test_names_are_matched_in_one_place():
    package = Path(choice.__file__).parent
    assert [p.name for p in sorted(package.rglob("*.py")) if "fnmatch" in p.read_text()] == ["choice.py"]
