"""A model that answers messages, piece by piece: by its tokenizer's chat template, else as plain continuation."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers import TextStreamer

from atp_tune.checkpoints.convert import one_line
from atp_tune.errors import UserError
from atp_tune.generation.decoding import end_tokens, generate, longest
from atp_tune.generation.prompts import encode

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
        ids = self._encode(messages)
        with self.opened() as model:
            most = longest(model)
            if most is not None and len(ids) >= most:
                raise UserError(f"the text has {len(ids)} tokens, the model takes {most}; /reset begins a new one")
            tokens = options.tokens if most is None else min(options.tokens, most - len(ids))
            prompt = torch.tensor([ids], device=self.device)
            (new,) = generate(
                model, self.tokenizer, prompt, tokens, options.temperature,
                on_token=lambda done: is_stopped(), streamer=Pieces(self.tokenizer, say),
            ).tolist()  # fmt: skip
            is_whole = new[-1] in end_tokens(model, self.tokenizer)
        text = self.tokenizer.decode(new, skip_special_tokens=True)
        return Answer(text, "model" if is_whole else "person" if is_stopped() else "length")

    def _encode(self, messages: Sequence[ChatMessage]) -> list[int]:
        if not self.has_template:
            return encode(messages[-1]["content"], self.tokenizer, (), self.bos)
        try:
            found = self.tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=True)
            return list(found["input_ids"])
        except Exception as error:  # a template is a program of the model's author
            raise UserError(f"the chat template cannot write these messages: {one_line(error)}") from error
