"""Tiny models of random weights, one for each kind of architecture that transformers' users have, and an input each."""

import torch

SMALL = dict(vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
LLAMA = SMALL | dict(num_key_value_heads=2, max_position_embeddings=64)
EXPERTS = dict(num_experts_per_tok=2, output_router_logits=False)
T5 = dict(vocab_size=128, d_model=64, d_ff=128, d_kv=16, num_layers=2, num_heads=4)
GPT2 = dict(vocab_size=128, n_embd=64, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0)
VIT = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, image_size=16,
           patch_size=8, num_labels=32)  # fmt: skip

# name: (class of the model, class of its configuration, arguments)
ARCHITECTURES = {
    "Llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA | dict(tie_word_embeddings=False)),
    "tied Llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA | dict(tie_word_embeddings=True)),
    "Qwen2": ("Qwen2ForCausalLM", "Qwen2Config", LLAMA),
    "Gemma": ("GemmaForCausalLM", "GemmaConfig", LLAMA | dict(head_dim=16)),
    "GPT-2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "T5": ("T5ForConditionalGeneration", "T5Config", T5),
    "BERT": ("BertForMaskedLM", "BertConfig", SMALL | dict(max_position_embeddings=64)),
    "Mixtral": ("MixtralForCausalLM", "MixtralConfig", LLAMA | EXPERTS | dict(num_local_experts=4)),
    "Qwen3-MoE": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        LLAMA | EXPERTS | dict(num_experts=4, moe_intermediate_size=32, head_dim=16, decoder_sparse_step=1),
    ),
    "Llama classifier": ("LlamaForSequenceClassification", "LlamaConfig", LLAMA | dict(num_labels=3, pad_token_id=0)),
    "BERT classifier": ("BertForSequenceClassification", "BertConfig", SMALL | dict(num_labels=32)),
    "ViT": ("ViTForImageClassification", "ViTConfig", VIT),
    "MiniLM": ("BertModel", "BertConfig", SMALL | dict(max_position_embeddings=64)),
}


def make(name, seed=0):
    """The model of that name, in evaluation mode, with weights of a trained one's size."""
    import transformers

    model_class, config_class, arguments = ARCHITECTURES[name]
    torch.manual_seed(seed)
    config = getattr(transformers, config_class)(**arguments)
    return getattr(transformers, model_class)(config).eval()


def inputs_of(model):
    """One input that the model takes."""
    torch.manual_seed(1)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, 16, 16)}
    ids = torch.randint(1, 128, (2, 7))
    return {"input_ids": ids} | ({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})


@torch.no_grad()
def outputs(model):
    """What the model answers to its input: logits, or the last hidden state of a model without a head."""
    answer = model(**inputs_of(model))
    return answer.logits if hasattr(answer, "logits") else answer.last_hidden_state
