"""Text from a model in memory, by the `generate` of transformers: greedily or at a temperature; prompts and chats.

Prompts are plain text, without a chat template: a template adds instructions that one-shot pruning never saw, and chat
tuning hides the difference that is to be shown. Prompts of equally many tokens are a batch; none is padded, since some
families compute other numbers with padding.

A chat goes by the tokenizer's chat template, else as plain continuation.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, StoppingCriteriaList, TextStreamer

from atp_tune.blocks.replay import Replay
from atp_tune.checkpoints.blocks import check_known
from atp_tune.checkpoints.convert import one_line
from atp_tune.errors import UserError
from atp_tune.inputs.windows import bos_id

OnToken = Callable[[int], bool]  # takes the number of tokens so far; True ends the text


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
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    config = GenerationConfig(
        max_new_tokens=tokens, eos_token_id=ends or None, pad_token_id=ends[0] if ends else 0,
        **(sampling if temperature else {"do_sample": False}),
    )  # fmt: skip
    prompt = ids.shape[1]

    def ends_text(sequences: Tensor, scores: Any, **more: Any) -> Tensor:
        """Whether each sequence of the batch ends with its last token."""
        is_end = on_token is not None and on_token(sequences.shape[1] - prompt)
        return torch.full((len(sequences),), is_end, device=sequences.device)

    # Without the model's own settings, which `generate` would add to those that it is given.
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        sequences: Tensor = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config, streamer=streamer,
            stopping_criteria=StoppingCriteriaList([ends_text]),
        )  # fmt: skip
    finally:
        model.generation_config = own
    return sequences[:, prompt:]


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end a text, by the model's generation settings, its config and the tokenizer."""
    tokens = list[Any]()
    for source in (getattr(model, "generation_config", None), model.config.get_text_config(), tokenizer):
        ends = getattr(source, "eos_token_id", None)
        tokens += ends if isinstance(ends, list) else [ends]
    return list(dict.fromkeys(token for token in tokens if isinstance(token, int)))


def longest(model: Any) -> int | None:
    """The number of positions of a model; None if its config names none."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None


WeightsOf = Callable[[int], dict[str, Tensor]]  # tensors of a block on the compute device


def continued(
    replay: Replay,
    weights_of: WeightsOf,
    tokenizer: Any,
    prompts: Sequence[str],
    tokens: int,
    bos: bool,
    step: Callable[[int, int], None],
) -> tuple[str, ...]:
    """The continuation of each prompt by a model with these blocks, of at most `tokens` tokens.

    `bos`: prompts begin with BOS, as the study's windows do; else as the tokenizer begins a text. `step` is called with
    the number of tokens so far, over all batches, and their greatest number.
    """
    with replay.whole(weights_of) as model:
        rows = [encode(prompt, tokenizer, end_tokens(model, tokenizer), bos) for prompt in prompts]
        lengths = dict.fromkeys(map(len, rows))
        texts = dict[int, str]()
        for batch, length in enumerate(lengths):
            numbers = [number for number, row in enumerate(rows) if len(row) == length]
            ids = torch.tensor([rows[number] for number in numbers], device=replay.checkpoint.device)

            def count(done: int, before: int = batch * tokens) -> bool:
                step(before + done, len(lengths) * tokens)
                return False

            new = generate(model, tokenizer, ids, tokens, on_token=count)
            texts.update(zip(numbers, (tokenizer.decode(row, skip_special_tokens=True) for row in new), strict=True))
    return tuple(texts[number] for number in range(len(prompts)))


def encode(prompt: str, tokenizer: Any, ends: Sequence[int], bos: bool) -> list[int]:
    """The ids of a prompt; UserError if there are none."""
    ids = list(tokenizer(prompt, verbose=False).input_ids)
    while len(ids) > 1 and ids[-1] in ends:  # some tokenizers end each text
        ids.pop()
    first = bos_id(tokenizer) if bos else None
    ids = ids if first is None or ids[:1] == [first] else [first, *ids]
    if not ids:
        raise UserError(f'prompt "{prompt}": has no tokens; give another text')
    return ids


ChatMessage = dict[Literal["role", "content"], str]


@dataclass(frozen=True)
class ChatOptions:
    """Most tokens of an answer, and the temperature; 0 is greedy."""

    tokens: int
    temperature: float = 0.0


@dataclass(frozen=True)
class Answer:
    """The text of an answer, and what ended it: the model, the number of tokens, or the person."""

    text: str
    ended_by: Literal["model", "length", "person"]


class Pieces(TextStreamer):
    """Passes an answer on, word by word, as soon as its text cannot change."""

    def __init__(self, tokenizer: Any, say: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._say = say

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Passes a piece on."""
        self._say(text)


@dataclass(frozen=True)
class Speaker:
    """A model and its tokenizer; `opened`: a context in which the model is whole; `bos`: plain texts begin with BOS."""

    opened: Callable[[], AbstractContextManager[nn.Module]]
    device: torch.device
    tokenizer: Any
    bos: bool

    @property
    def has_template(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return bool(getattr(self.tokenizer, "chat_template", None))

    def answer(
        self,
        messages: Sequence[ChatMessage],
        options: ChatOptions,
        say: Callable[[str], None],
        is_stopped: Callable[[], bool],
    ) -> Answer:
        """Answers the last message, or continues it as text; asks `is_stopped` after each token.

        UserError if the template cannot write the messages, or if the model has no position left for an answer.
        """
        ids: list[int]
        if not self.has_template:
            ids = encode(messages[-1]["content"], self.tokenizer, (), self.bos)
        else:
            try:
                ids = self.tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=True)[
                    "input_ids"
                ]
            except Exception as error:  # a template is a program of the model's author
                raise UserError(f"the chat template cannot write these messages: {one_line(error)}") from error
        with self.opened() as model:
            most = longest(model)
            if most is not None and len(ids) >= most:
                raise UserError(f"the text has {len(ids)} tokens, the model takes {most}; /reset begins a new one")
            tokens = options.tokens if most is None else min(options.tokens, most - len(ids))
            (new,) = generate(
                model, self.tokenizer, torch.tensor([ids], device=self.device), tokens, options.temperature,
                on_token=lambda done: is_stopped(), streamer=Pieces(self.tokenizer, say),
            ).tolist()  # fmt: skip
            is_whole = new[-1] in end_tokens(model, self.tokenizer)
        text = self.tokenizer.decode(new, skip_special_tokens=True)
        return Answer(text, "model" if is_whole else "person" if is_stopped() else "length")
