"""Tiny random models of the families that the engine must run, and a bench over them."""

from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from atp_tune.blocks.prune_pass import PrunedBlock
from atp_tune.blocks.replay import Replay
from atp_tune.blocks.verification import verified
from atp_tune.checkpoints.checkpoint import Checkpoint
from atp_tune.checkpoints.files import Offload
from atp_tune.checkpoints.models import ModelFolder
from atp_tune.config.prune import PruneConfig
from atp_tune.events import EventHandler, ignore_events
from atp_tune.inputs.items import Items
from atp_tune.inputs.windows import TOKEN_WINDOWS
from atp_tune.run.observers import RoleScores
from atp_tune.run.session import Session
from atp_tune.scores import Scores
from atp_tune.scores.next_token import NEXT_TOKEN

CPU = torch.device("cpu")
VOCABULARY = 97
TOKENS = 13

SPECIAL: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    **SPECIAL,
}
GEMMA: dict[str, Any] = {**BASE, "head_dim": 6, "sliding_window": 5}
MIXED = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
FALCON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    **SPECIAL,
}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**BASE, "attention_bias": True}),
    "llama-tied": ("llama", {**BASE, "tie_word_embeddings": True}),
    "mistral": ("mistral", {**BASE, "sliding_window": 5}),
    "qwen2": ("qwen2", BASE),
    "qwen3": ("qwen3", {**BASE, "head_dim": 6}),
    "gemma2": ("gemma2", GEMMA),
    "gemma3": ("gemma3_text", {**GEMMA, "layer_types": MIXED}),
    "phi3": ("phi3", {**BASE, "pad_token_id": 0}),
    "olmo2": ("olmo2", {**BASE, "pad_token_id": 0}),
    "opt": (
        "opt",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 24,
            "ffn_dim": 40,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 24,
            **SPECIAL,
            "pad_token_id": 1,
        },
    ),
    "gpt2": (
        "gpt2",
        {"vocab_size": VOCABULARY, "n_embd": 24, "n_layer": 3, "n_head": 4, "n_positions": 64, **SPECIAL},
    ),
    "gpt_neox": ("gpt_neox", {**BASE, "num_hidden_layers": 3}),
    "falcon": ("falcon", {**FALCON, "multi_query": True, "alibi": False}),
    "falcon-alibi": ("falcon", {**FALCON, "multi_query": False, "alibi": True, "parallel_attn": False}),
    "falcon-new": ("falcon", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "bloom": ("bloom", {"vocab_size": VOCABULARY, "hidden_size": 24, "n_layer": 3, "n_head": 4, **SPECIAL}),
}
MIXTURE: dict[str, Any] = {**BASE, "num_hidden_layers": 3, "num_experts_per_tok": 2, "pad_token_id": 0}
QWEN: dict[str, Any] = {
    **MIXTURE,
    "num_experts": 4,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 20,
    "head_dim": 6,
}
DEEPSEEK: dict[str, Any] = {
    **MIXTURE,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "moe_intermediate_size": 16,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "v_head_dim": 6,
}
MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {**MIXTURE, "num_local_experts": 4}),
    "qwen2_moe": ("qwen2_moe", QWEN),
    "qwen2_moe-mixed": ("qwen2_moe", {**QWEN, "decoder_sparse_step": 2, "tie_word_embeddings": True}),
    "qwen3_moe": ("qwen3_moe", {**QWEN, "norm_topk_prob": True}),
    "qwen3_moe-mixed": ("qwen3_moe", {**QWEN, "mlp_only_layers": [0, 2]}),
    "olmoe": ("olmoe", {**MIXTURE, "num_experts": 5}),
    "deepseek_v3": ("deepseek_v3", DEEPSEEK),
    "hunyuan_v1_moe": ("hunyuan_v1_moe", {**MIXTURE, "num_experts": 4, "moe_topk": 2, "head_dim": 6}),
    "gpt_oss": ("gpt_oss", {**MIXTURE, "num_local_experts": 4, "head_dim": 6, "sliding_window": 5}),
}
ALL = FAMILIES | MIXTURES

TEXT: dict[str, Any] = {key: value for key, value in BASE.items() if key not in SPECIAL} | {"pad_token_id": 0}
TOWER: dict[str, Any] = {
    "hidden_size": 64,  # so that the tower is larger than the language model
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
TURNED = {"rope_type": "default", "mrope_section": [1, 1, 1], "rope_theta": 10000.0}
QWEN_TEXT: dict[str, Any] = {**TEXT, "rope_parameters": TURNED}
QWEN_TOWER = {"depth": 3, "hidden_size": 64, "out_hidden_size": 24, "num_heads": 2, "patch_size": 8}
QWEN_TOKENS = {"video_token_id": 95, "vision_start_token_id": 94, "vision_end_token_id": 93}
CLIP, SIGLIP = {**TOWER, "model_type": "clip_vision_model"}, {**TOWER, "model_type": "siglip_vision_model"}
# A language model's settings, a tower's, and the rest.
MULTIMODAL: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "llava": ({**TEXT, "model_type": "llama"}, CLIP, {}),
    "llava_next": ({**TEXT, "model_type": "mistral"}, CLIP, {}),
    "llava_onevision": ({**TEXT, "model_type": "qwen2"}, SIGLIP, {}),
    "gemma3": (
        {**TEXT, "model_type": "gemma3_text", "head_dim": 6, "sliding_window": 5},
        SIGLIP,
        {"image_token_index": 96, "mm_tokens_per_image": 4},
    ),
    "idefics3": ({**TEXT, "model_type": "llama"}, TOWER, {"scale_factor": 1}),
    "smolvlm": ({**TEXT, "model_type": "llama"}, TOWER, {"scale_factor": 1}),
    "qwen2_vl": (QWEN_TEXT, {**QWEN_TOWER, "embed_dim": 64, "hidden_size": 24}, QWEN_TOKENS),
    "qwen2_5_vl": (QWEN_TEXT, QWEN_TOWER, QWEN_TOKENS),
    "qwen3_vl": ({**QWEN_TEXT, "head_dim": 6}, {**QWEN_TOWER, "deepstack_visual_indexes": [0]}, QWEN_TOKENS),
    "internvl": ({**TEXT, "model_type": "qwen2"}, {**TOWER, "image_size": [16, 16], "patch_size": [8, 8]}, {}),
    "mistral3": ({**TEXT, "model_type": "mistral", "head_dim": 6}, {**TOWER, "model_type": "pixtral"}, {}),
    "aya_vision": ({**TEXT, "model_type": "cohere2"}, SIGLIP, {}),
}


def few(kinds: Iterable[Any], fast: Collection[Any]) -> list[Any]:
    """Parameters of a test: all kinds, those that are not `fast` in the slow suite alone."""
    return [pytest.param(kind, marks=() if kind in fast else pytest.mark.slow) for kind in kinds]


def multimodal(family: str, **settings: Any) -> Any:
    """A model that reads images beside text; `settings` of its language model come over the family's."""
    text, tower, rest = MULTIMODAL[family]
    tokens = {"image_token_id": VOCABULARY - 1} if "image_token_index" not in rest else {}
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, text_config=text | settings, vision_config=tower, **tokens, **rest)
    return AutoModelForImageTextToText.from_config(config).eval()


def tiny(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model with weights so large that every block changes what comes out; the same at every call."""
    kind, settings = ALL[family]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 1.5 / parameter.shape[-1] ** 0.5)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.to(dtype).eval()


def checkpoint_of(model: nn.Module, offload: Offload | None = None, device: torch.device = CPU) -> Checkpoint:
    return Checkpoint(model, device, offload)


def replay_of(model: nn.Module) -> Replay:
    return Replay(checkpoint_of(model), TOKEN_WINDOWS)


def check(checkpoint: Checkpoint) -> Replay:
    """The replay of a language model, compared with the model itself."""
    return verified(checkpoint, TOKEN_WINDOWS, NEXT_TOKEN)


def random_ids(windows: int, tokens: int = TOKENS, seed: int = 0) -> Tensor:
    return torch.randint(VOCABULARY, (windows, tokens), generator=torch.Generator().manual_seed(seed))


class NoFolder(ModelFolder):
    """Stands for the folder of a model that was never saved."""

    def stored_bytes(self) -> tuple[int, int]:
        return 0, 4


def bench_of(
    model: nn.Module,
    prune: PruneConfig | None = None,
    watch: EventHandler = ignore_events,
    folder: Path = Path(),
    offload: Offload | None = None,
    ids: Callable[[int, int, int], Tensor] | None = None,
    device: torch.device = CPU,
) -> Session:
    """A bench over random windows, or those that `ids` draws: 5 of calibration, 7 of search, 3 of report."""
    windows, draw = {"calibration": 5, "validation": 7, "test": 3}, ids or random_ids
    texts = {
        role: Items.windows(draw(count, TOKENS, seed).numpy()) for seed, (role, count) in enumerate(windows.items())
    }
    checkpoint = checkpoint_of(model, offload, device)
    place = (folder, "content", "tiny")
    source = NoFolder(*place) if folder == Path() else ModelFolder(*place)
    return Session(source, checkpoint, texts, prune or PruneConfig(), watch)


def scores_of(work: Session, blocks: Iterable[Any], role: str, kl: bool = False) -> Scores:
    """Scores of a model that is given as blocks, or by index and tensors, on one text."""
    given = (block if isinstance(block, PrunedBlock) else PrunedBlock(*block) for block in blocks)
    found: Scores
    [found] = work.measure(None, [RoleScores(role, kl)], blocks=given)
    return found


def nlls_of(work: Session, blocks: Iterable[Any], role: str) -> list[float]:
    """Window NLLs of a model that is given so."""
    return scores_of(work, blocks, role)["nlls"]


def copy_of(model: Any) -> dict[str, Tensor]:
    """A model's tensors as they are now."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal byte by byte, so that -0 is not 0 and NaN is itself."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
