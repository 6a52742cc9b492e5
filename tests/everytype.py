"""A tiny random model of every causal and image-text type that transformers knows.

Sizes go by the names of a config's fields, which most types share; `OTHERWISE` has what a type wants besides.
"""

import dataclasses
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto import modeling_auto

CAUSAL = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
IMAGES = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
VOCABULARY = 97
LARGEST = 2e7  # weights; what does not get smaller by the sizes below is not tiny

_SIZES = {
    1: "n_group topk_group num_expert_group n_shared_experts num_shared_experts first_k_dense_replace "
    "moe_n_shared_experts num_expert_groups",
    2: "num_key_value_heads num_kv_heads n_kv_heads num_experts_per_tok num_experts_per_token moe_topk moe_k "
    "top_k_experts moe_top_k multi_query_group_num num_codebooks num_nextn_predict_layers temporal_patch_size",
    4: "num_hidden_layers num_layers n_layer n_layers encoder_layers decoder_layers num_decoder_layers depth "
    "num_attention_heads num_heads n_head n_heads encoder_attention_heads decoder_attention_heads num_encoder_layers "
    "num_encoder_attention_heads num_decoder_attention_heads encoder_num_layers decoder_num_layers num_experts "
    "n_routed_experts num_local_experts moe_num_experts n_experts linear_num_key_heads linear_num_value_heads "
    "linear_num_heads qk_rope_head_dim index_n_heads",
    5: "sliding_window attention_window local_attention",
    8: "head_dim q_lora_rank kv_lora_rank o_lora_rank v_head_dim qk_nope_head_dim linear_key_head_dim "
    "linear_value_head_dim linear_head_dim attention_head_dim d_kv patch_size index_head_dim global_head_dim "
    "swa_head_dim ssm_state_size mamba_d_state state_size mamba_head_dim mamba_d_head chunk_size mamba_chunk_size "
    "rank kv_channels",
    16: "image_size expert_ffn_hidden_size index_topk",
    32: "hidden_size d_model n_embd dim embed_dim d_embed word_embed_proj_dim hidden_dim width projection_dim "
    "encoder_hidden_size decoder_hidden_size text_hidden_size out_hidden_size embedding_size emb_dim "
    "hidden_size_per_layer_input input_hidden_size output_hidden_size proj_hidden_size output_dim lru_width",
    48: "intermediate_size ffn_dim d_ff n_inner encoder_ffn_dim decoder_ffn_dim moe_intermediate_size mlp_dim "
    "shared_expert_intermediate_size moe_shared_expert_intermediate_size dim_feedforward intermediate_dim "
    "ffn_hidden_size intermediate_size_mlp expert_hidden_size moe_ffn_hidden_size shared_intermediate_size",
    64: "max_position_embeddings n_positions n_ctx max_seq_len max_source_positions max_target_positions",
    VOCABULARY: "vocab_size vocab_size_per_layer_input",
}
SIZES = {name: size for size, names in _SIZES.items() for name in names.split()}
TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}

Settings = dict[str, Any]
ROPE: Settings = {"rope_type": "default", "rope_theta": 10000.0}


def _turned(*sections: int) -> Settings:
    return {"rope_parameters": {**ROPE, "mrope_section": list(sections)}}


LATENT: Settings = {"num_key_value_heads": 4}  # attention of DeepSeek's kind
MAMBA: Settings = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_expand": 2, "mamba_n_groups": 1}
COMPASS: Settings = {
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE},
}
INDEXED: Settings = {
    "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
    "indexer_compress_ratio": 2, "hc_lowrank": 4,
}  # fmt: skip
HYBRID = ["mamba", "hybrid", "mamba", "hybrid"]
LATENTS = """axk1 axk2 deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa minicpm3 mistral4 sarvam_mla
youtu"""
TURNED = """cosmos3_edge glm46v glm4v hunyuan_vl paddleocr_vl qwen2_5_omni_thinker qwen2_5_vl qwen2_vl
qwen3_omni_moe_thinker"""
OTHERWISE: dict[str, Settings] = {
    **{kind: LATENT for kind in LATENTS.split()},  # noqa: C420 - a constant
    **{kind: {"text_config": LATENT} for kind in ("kimi_k25", "mistral_large4")},
    **{kind: {"text_config": _turned(1, 1, 2)} for kind in TURNED.split()},
    **{kind: {"text_config": _turned(2, 1, 1)} for kind in ("glm_ocr", "glmga")},
    **{kind: {"rotary_dim": 4} for kind in ("codegen", "gptj")},
    "glm4v_moe": {"text_config": _turned(1, 1, 0)},
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "blt": {
        "encoder_config": {"hidden_size_global": 32}, "decoder_config": {"hidden_size_global": 32},
        "encoder_hash_byte_group_vocab": 50,
    },
    "chameleon": {
        "vocabulary_map": {"<image>": 96, "IMGIMGAZ": 95},
        "vq_config": {"base_channels": 32, "channel_multiplier": [1], "latent_channels": 32, "num_embeddings": 32},
    },
    "cohere_compass": {"text_config": COMPASS},
    "cohere_compass_text": COMPASS,
    "cpmant": {"prompt_length": 4, "position_bias_max_distance": 64, "dim_head": 8},
    "dots3_note_text": {
        **LATENT, "head_dim": 12, "swa_head_dim": 12, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8,
        "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4,
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", "sparse"] * 2, "n_group": 1, "topk_group": 1}},
    "ernie4_5_vl_moe": {"text_config": {"moe_intermediate_size": [48, 48], **_turned(1, 1, 2)}},
    "florence2": {
        "vision_config": {
            "patch_size": [7, 3, 3, 3], "embed_dim": [8] * 4, "num_heads": [1] * 4, "num_groups": [1] * 4,
            "depths": [1] * 4,
        }
    },
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 8,
    },
    "gemma4_assistant": {"text_config": {"model_type": "gemma4_text", "hidden_size_per_layer_input": 0}},
    "glm5_next": {"text_config": {**LATENT, "qk_rope_head_dim": 0, "head_dim": 0, "index_kpool": 4}},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granite4_vision": {
        "deepstack_layer_map": [[0, 0]], "downsample_rate": "1/2", "vision_config": {"hidden_size": 64},
    },
    "granitemoehybrid": {**MAMBA, "layers_block_type": ["mamba", "attention"] * 2},
    "hy_v4_vl": {"text_config": {"rope_parameters": {**ROPE, "mrope_section": [1, 1, 0]}}},
    "janus": {
        "vq_config": {"base_channels": 32, "channel_multiplier": [1], "latent_channels": 32, "num_embeddings": 32}
    },
    "kimi_linear": {**LATENT, "layer_types": ["linear_attention", "full_attention"] * 2},
    **{kind: {"layer_types": ["conv", "full_attention"] * 2} for kind in ("lfm2", "lfm2_moe")},
    "longcat_flash": {**LATENT, "head_dim": 4},
    "mamba2": {"num_heads": 8, "head_dim": 8, "expand": 2, "n_groups": 1},
    "molmo2": {"vision_config": {"image_size": [16, 16]}, "adapter_config": {"vision_feature_layer": [1, 2]}},
    "muse_spark": {
        "audio_config": {"hidden_sizes": [8] * 4, "depths": [1] * 4}, "projector_hidden_size": 32,
        "text_config": {"moe_hidden_size": 32}, "vision_config": {"pos_emb_height": 4, "pos_emb_width": 4},
    },
    "nemotron_h": {"layers_block_type": ["mamba", "attention", "mlp", "moe"]},
    "phi4_multimodal": {"audio_config": {"num_blocks": 1}, "vision_config": {"num_hidden_layers": 1}},
    "nemotron_h_omni": {
        "vision_config": {"model_type": "radio", "video_temporal_patch_size": 2},
        "text_config": {"model_type": "nemotron_h", "layers_block_type": ["mamba", "attention", "mlp", "moe"]},
    },
    "qwen4_exp": {"text_config": INDEXED},
    "qwen4_exp_text": INDEXED,
    "reformer": {
        "is_decoder": True, "axial_pos_shape": [4, 4], "axial_pos_embds_dim": [16, 16], "attention_head_size": 8,
        "max_position_embeddings": 16, "feed_forward_size": 48,
    },
    "roc_bert": {"pronunciation_vocab_size": 20, "shape_vocab_size": 20},
    "xmod": {"default_language": "en_XX", "is_decoder": True},
    "zamba": {"layers_block_type": HYBRID, "attention_head_dim": 16, "attention_hidden_size": 64},
    "zamba2": {"layers_block_type": HYBRID, "num_mem_blocks": 1, "n_mamba_heads": 8},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


def types() -> list[str]:
    """Every type of causal and of image-text models, by name."""
    return sorted({*CAUSAL, *IMAGES})


def model_of(kind: str, **settings: Any) -> Any:
    """A tiny model of a type, with settings that come over the type's; every block changes what comes out.

    MemoryError if it is not tiny, and whatever transformers raises where it cannot be built.
    """
    auto = AutoModelForCausalLM if kind in CAUSAL else AutoModelForImageTextToText
    config = _config(CONFIG_MAPPING[kind], OTHERWISE.get(kind, {}) | settings)
    with torch.device("meta"):
        weights = sum(parameter.numel() for parameter in auto.from_config(config).parameters())
    if weights > LARGEST:
        raise MemoryError(f"{weights:.0g} weights")
    torch.manual_seed(0)
    model = auto.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 1.5 / parameter.shape[-1] ** 0.5)
            elif parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def _config(cls: Any, otherwise: Settings) -> Any:
    fields = {field.name for field in dataclasses.fields(cls)}
    parts = {name: part for name, part in getattr(cls, "sub_configs", {}).items() if name in fields}
    last = iter(range(VOCABULARY - 1, 0, -1))
    settings: Settings = {}
    for name in sorted(fields):
        if name in SIZES:
            settings[name] = SIZES[name]
        elif name.endswith(("_token_id", "_token_index")):
            settings[name] = TOKENS[name] if name in TOKENS else next(last)
    settings |= {name: value for name, value in otherwise.items() if name not in parts}
    for name, part in parts.items():
        made = _part(cls, name, part, dict(otherwise.get(name, {})))
        settings |= {} if made is None else {name: made}
    return cls(**settings)


def _part(cls: Any, name: str, part: Any, otherwise: Settings) -> Any:
    """A part's configuration; None where it has none by default."""
    if part is AutoConfig:
        kind = otherwise.pop("model_type", None)
        default = getattr(cls(), name)
        if kind is None and default is None:
            return None
        part = CONFIG_MAPPING[kind] if kind else type(default)
    return _config(part, otherwise)
