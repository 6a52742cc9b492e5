"""Greedy continuations of prompts by the dense and the pruned models, as stored in a configuration and on a study."""

from collections.abc import Iterator
from typing import Literal, Self, get_args

from pydantic import Field, PositiveInt, model_validator

from atp_tune.frozen import FrozenModel

TOKENS = 48  # of a continuation, at most
# Eight usual words each: most tokenizers make equally many tokens of them, so they are one batch without padding.
PROMPTS = (
    "The capital of France is the city of",
    "Once upon a time there was a little",
    "To make a cup of tea you first",
)
ModelName = Literal["dense", "uniform", "best"]
NAMES: tuple[ModelName, ...] = get_args(ModelName)


class Continuations(FrozenModel):
    """What dense, uniform with the same pruner, and best make of each prompt, in the order of `prompts`.

    `tokens`: the most that were generated. Fewer if a model ends its text. Prompts are continued as they are, without a
    chat template.
    """

    prompts: tuple[str, ...] = Field(min_length=1)
    tokens: PositiveInt
    dtype: str
    dense: tuple[str, ...]
    uniform: tuple[str, ...]
    best: tuple[str, ...]

    @model_validator(mode="after")
    def _as_many(self) -> Self:
        if any(len(self.of(name)) != len(self.prompts) for name in NAMES):
            raise ValueError("not one continuation for each prompt")
        return self

    def of(self, name: ModelName) -> tuple[str, ...]:
        """The continuations of a model."""
        return {"dense": self.dense, "uniform": self.uniform, "best": self.best}[name]

    def rows(self) -> Iterator[tuple[str, dict[ModelName, str]]]:
        """Each prompt with its continuation by each model."""
        for index, prompt in enumerate(self.prompts):
            yield prompt, {name: self.of(name)[index] for name in NAMES}
