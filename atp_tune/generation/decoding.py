"""How tokens are chosen: greedily, or at a temperature; and the tokens that end a text."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from atp_tune.checkpoints.classes import check_known
from atp_tune.errors import UserError

OnToken = Callable[[int], bool]  # takes the number of tokens so far; True ends the text


class PerToken(StoppingCriteria):
    """Calls a function after each token, which may end the text there."""

    def __init__(self, on_token: OnToken) -> None:
        self._on_token = on_token
        self._done = 0

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Whether each sequence of the batch ends."""
        self._done += 1
        return torch.full((len(input_ids),), self._on_token(self._done), device=input_ids.device)


@torch.inference_mode()
def generate(
    model: Any,
    tokenizer: Any,
    ids: Tensor,
    tokens: int,
    temperature: float = 0.0,
    on_token: OnToken | None = None,
    streamer: Any = None,
) -> Tensor:
    """At most `tokens` new tokens [sequences, new] after prompts of one length, `ids` [sequences, prompt].

    `temperature`: 0 is greedy, and draws nothing at random. The model's own generation settings (penalties, cut-offs)
    are not used, since they would hide what pruning does. UserError for a model that cannot generate.
    """
    if not getattr(model, "can_generate", bool)():
        raise UserError(f"model {type(model).__name__}: cannot generate text")
    check_known(model, int(ids.max()), "prompt")
    ends = end_tokens(model, tokenizer)
    sampled = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=tokens, eos_token_id=ends or None, pad_token_id=ends[0] if ends else 0,
        **{"do_sample": False, **sampled},
    )  # fmt: skip
    criteria = StoppingCriteriaList([PerToken(on_token)] if on_token else [])
    with _without_own_settings(model):
        found: Tensor = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config, streamer=streamer,
            stopping_criteria=criteria,
        )  # fmt: skip
    return found[:, ids.shape[1] :]


@contextmanager
def _without_own_settings(model: Any) -> Iterator[None]:
    """Hides the generation settings of a model, which `generate` would add to those that it is given."""
    own, model.generation_config = model.generation_config, GenerationConfig()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        model.generation_config = own


def end_tokens(model: nn.Module, tokenizer: Any) -> list[int]:
    """The tokens that end a text, by the model's generation settings, its config and the tokenizer."""
    config: Any = model.config
    found: list[Any] = []
    for source in (getattr(model, "generation_config", None), config.get_text_config(), tokenizer):
        ends = getattr(source, "eos_token_id", None)
        found += ends if isinstance(ends, list) else [ends]
    return list(dict.fromkeys(token for token in found if isinstance(token, int)))


def longest(model: nn.Module) -> int | None:
    """The number of positions of a model; None if its config names none."""
    config: Any = model.config
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None
