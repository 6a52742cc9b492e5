"""A tiny random model of every causal and image-text type that transformers knows.

Sizes go by the names of a config's fields, which most types share; tests/models.yaml has what a type wants besides.
"""

import dataclasses
from typing import Any

import torch
from families import SETTINGS
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
OTHERWISE: dict[str, Settings] = {
    kind: settings for kinds, settings in SETTINGS["types"].items() for kind in kinds.split()
}


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
