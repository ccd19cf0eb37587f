"""Tiny models of random weights, one for each kind of architecture that transformers' users have, and an input each."""

import torch

SMALL = dict(vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
LLAMA = SMALL | dict(num_key_value_heads=2, max_position_embeddings=64)
EXPERTS = dict(num_experts_per_tok=2, output_router_logits=False)
T5 = dict(vocab_size=128, d_model=64, d_ff=128, d_kv=16, num_layers=2, num_heads=4)
GPT2 = dict(vocab_size=128, n_embd=64, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0)
VIT = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, image_size=16,
           patch_size=8, num_labels=32)  # fmt: skip

OPT = dict(vocab_size=128, hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4,
           max_position_embeddings=64, word_embed_proj_dim=64)  # fmt: skip
GPTJ = GPT2 | dict(rotary_dim=8)
NEO = dict(vocab_size=128, hidden_size=64, num_layers=2, attention_types=[[["global", "local"], 1]], num_heads=4,
           max_position_embeddings=64, window_size=8)  # fmt: skip
BART = dict(vocab_size=128, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
            encoder_ffn_dim=128, decoder_attention_heads=4, decoder_ffn_dim=128,
            max_position_embeddings=64)  # fmt: skip
WHISPER = BART | dict(max_source_positions=32, max_target_positions=32, num_mel_bins=16, pad_token_id=0, bos_token_id=1,
                      eos_token_id=2, decoder_start_token_id=1)  # fmt: skip
DEBERTA = SMALL | dict(max_position_embeddings=64, relative_attention=True, pos_att_type=["p2c", "c2p"])
SWIN = dict(image_size=16, patch_size=2, embed_dim=64, depths=[1, 1], num_heads=[2, 4], window_size=4, num_labels=32)
SIGLIP2 = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, patch_size=8,
               num_patches=4)  # fmt: skip
SWITCH = T5 | dict(num_experts=4, num_decoder_layers=2, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1)
MAMBA = dict(vocab_size=128, hidden_size=64, num_hidden_layers=2, state_size=32, time_step_rank=64)
LLAMA4 = LLAMA | dict(head_dim=16, intermediate_size_mlp=128, num_local_experts=4, num_experts_per_tok=1,
                      interleave_moe_layer_step=2)  # fmt: skip

GEMMA3N = LLAMA | dict(head_dim=16, hidden_size_per_layer_input=64, vocab_size_per_layer_input=128, altup_num_inputs=2,
                       num_kv_shared_layers=0, activation_sparsity_pattern=[0.0, 0.0],
                       layer_types=["sliding_attention", "full_attention"], pad_token_id=0)  # fmt: skip

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

# More of them, for what stands in one table only.
MORE = {
    "OPT": ("OPTForCausalLM", "OPTConfig", OPT),
    "BLOOM": ("BloomForCausalLM", "BloomConfig", dict(vocab_size=128, hidden_size=64, n_layer=2, n_head=4)),
    "GPT-NeoX": ("GPTNeoXForCausalLM", "GPTNeoXConfig", SMALL | dict(max_position_embeddings=64)),
    "GPT-Neo": ("GPTNeoForCausalLM", "GPTNeoConfig", NEO),
    "GPT-J": ("GPTJForCausalLM", "GPTJConfig", GPTJ),
    "Phi": ("PhiForCausalLM", "PhiConfig", SMALL | dict(max_position_embeddings=64)),
    "Phi-3": ("Phi3ForCausalLM", "Phi3Config", LLAMA | dict(pad_token_id=0)),
    "Gemma 3": ("Gemma3ForCausalLM", "Gemma3TextConfig", LLAMA | dict(head_dim=16)),
    "Qwen3": ("Qwen3ForCausalLM", "Qwen3Config", LLAMA | dict(head_dim=16)),
    "OLMo 2": ("Olmo2ForCausalLM", "Olmo2Config", LLAMA),
    "RoBERTa": ("RobertaForMaskedLM", "RobertaConfig", SMALL | dict(max_position_embeddings=64)),
    "DeBERTa v2": ("DebertaV2ForMaskedLM", "DebertaV2Config", DEBERTA),
    "DistilBERT": (
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        dict(vocab_size=128, dim=64, hidden_dim=128, n_layers=2, n_heads=4, max_position_embeddings=64),
    ),
    "XLNet": ("XLNetLMHeadModel", "XLNetConfig", dict(vocab_size=128, d_model=64, n_layer=2, n_head=4, d_inner=128)),
    "BART": ("BartForConditionalGeneration", "BartConfig", BART),
    "Marian": ("MarianMTModel", "MarianConfig", BART | dict(pad_token_id=0, decoder_start_token_id=0)),
    "Whisper": ("WhisperForConditionalGeneration", "WhisperConfig", WHISPER),
    "CLIP": ("CLIPVisionModel", "CLIPVisionConfig", VIT),
    "Swin": ("SwinForImageClassification", "SwinConfig", SWIN),
    "Gemma 3n": ("Gemma3nForCausalLM", "Gemma3nTextConfig", GEMMA3N),
}
# Of which a file has the query, the key and the value in one matrix, and the model a layer for each; with gate and up,
# in HRM and GTE, too.
HRM = SMALL | dict(num_layers_per_stack=2, num_hidden_layers=8, head_dim=16, H_cycles=1, L_cycles=3)
SPLIT = {
    "Nomic BERT": ("NomicBertForMaskedLM", "NomicBertConfig", SMALL | dict(max_position_embeddings=64)),
    "GTE": ("GteForMaskedLM", "GteConfig", SMALL | dict(max_position_embeddings=64)),
    "Jina embeddings v3": (
        "JinaEmbeddingsV3ForMaskedLM",
        "JinaEmbeddingsV3Config",
        SMALL | dict(max_position_embeddings=64),
    ),
    "HRM": ("HrmTextForCausalLM", "HrmTextConfig", HRM),
}
# Of whose layers transformers casts the inputs to the weight's dtype, without keeping them in float32.
CASTING = {
    "Switch Transformers": ("SwitchTransformersForConditionalGeneration", "SwitchTransformersConfig", SWITCH),
    "Long T5": ("LongT5ForConditionalGeneration", "LongT5Config", T5 | dict(local_radius=4)),
    "SigLIP 2": ("Siglip2VisionModel", "Siglip2VisionConfig", SIGLIP2),
    "Swin v2": ("Swinv2ForImageClassification", "Swinv2Config", SWIN),
}
# Mixtures whose experts transformers keeps in three-dimensional parameters, each in a way of its own.
ROUTED = dict(n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, n_group=2, topk_group=1,
              first_k_dense_replace=1)  # fmt: skip
DEEPSEEK = ROUTED | dict(moe_intermediate_size=64, kv_lora_rank=64, q_lora_rank=64, qk_rope_head_dim=16,
                         qk_nope_head_dim=16, v_head_dim=16, num_key_value_heads=4)  # fmt: skip
JAMBA = dict(num_experts=2, num_experts_per_tok=1, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2,
             expert_layer_offset=1, mamba_d_state=16, mamba_dt_rank=64, use_mamba_kernels=False)  # fmt: skip
SHARED = dict(num_experts=4, moe_intermediate_size=64, shared_expert_intermediate_size=64, decoder_sparse_step=1)
NEXT = SHARED | dict(head_dim=16, linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=16,
                     linear_value_head_dim=16, num_hidden_layers=4)  # fmt: skip
MIXTURES = {
    "DeepSeek-V3": ("DeepseekV3ForCausalLM", "DeepseekV3Config", LLAMA | DEEPSEEK),
    "GPT-OSS": ("GptOssForCausalLM", "GptOssConfig", LLAMA | EXPERTS | dict(num_local_experts=4, head_dim=16)),
    "Jamba": ("JambaForCausalLM", "JambaConfig", LLAMA | JAMBA),
    "OLMoE": ("OlmoeForCausalLM", "OlmoeConfig", LLAMA | EXPERTS | dict(num_experts=4)),
    "PhiMoE": ("PhimoeForCausalLM", "PhimoeConfig", LLAMA | EXPERTS | dict(num_local_experts=4)),
    "Qwen2-MoE": ("Qwen2MoeForCausalLM", "Qwen2MoeConfig", LLAMA | EXPERTS | SHARED),
    "Qwen3-Next": ("Qwen3NextForCausalLM", "Qwen3NextConfig", LLAMA | EXPERTS | NEXT),
}
LAGUNA = LLAMA | EXPERTS | dict(num_experts=4, moe_intermediate_size=64, shared_expert_intermediate_size=64,
                                head_dim=16, num_attention_heads_per_layer=[4, 4], pad_token_id=0,
                                mlp_layer_types=["dense", "sparse"], layer_types=["full_attention"] * 2)  # fmt: skip
# The others that tests name.
OTHERS = {
    "Mamba": ("MambaForCausalLM", "MambaConfig", MAMBA),
    "Llama 4": ("Llama4ForCausalLM", "Llama4TextConfig", LLAMA4),
    "RWKV": ("RwkvForCausalLM", "RwkvConfig", dict(vocab_size=128, hidden_size=64, num_hidden_layers=2)),
    "FocalNet": (
        "FocalNetForImageClassification",
        "FocalNetConfig",
        dict(
            image_size=16,
            patch_size=2,
            embed_dim=64,
            hidden_sizes=[64, 128],
            depths=[1, 1],
            focal_levels=[2, 2],
            focal_windows=[3, 3],
            num_labels=32,
        ),
    ),
    "Falcon": ("FalconForCausalLM", "FalconConfig", SMALL),
    "Laguna": ("LagunaForCausalLM", "LagunaConfig", LAGUNA),
}
ALL = ARCHITECTURES | MORE | SPLIT | CASTING | MIXTURES | OTHERS


def make(name, seed=0, **changes):
    """The model of that name, in evaluation mode, with weights of a trained one's size; changes: in its arguments."""
    import transformers

    model_class, config_class, arguments = ALL[name]
    torch.manual_seed(seed)
    config = getattr(transformers, config_class)(**arguments | changes)
    return getattr(transformers, model_class)(config).eval()


def inputs_of(model):
    """One input that the model takes."""
    torch.manual_seed(1)
    if "Siglip2" in type(model).__name__:
        shapes = {"pixel_attention_mask": torch.ones(2, 4), "spatial_shapes": torch.tensor([[2, 2], [2, 2]])}
        return {"pixel_values": torch.randn(2, 4, 192)} | shapes
    if model.main_input_name == "input_features":
        return {"input_features": torch.randn(2, 16, 64), "decoder_input_ids": torch.randint(3, 128, (2, 7))}
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, 16, 16)}
    ids = torch.randint(1, 128, (2, 7))
    two = getattr(model.config, "is_encoder_decoder", False)
    return {"input_ids": ids} | ({"decoder_input_ids": ids} if two else {})


def plainly(model):
    """The model without bitsandbytes' arithmetic in bfloat16, which it has for some CPUs and for inference only."""
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    return model


@torch.no_grad()
def outputs(model):
    """What the model answers to its input: logits, or the last hidden state of a model without a head."""
    answer = model(**inputs_of(model))
    return answer.logits if hasattr(answer, "logits") else answer.last_hidden_state
