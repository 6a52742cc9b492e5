"""Greedy continuations of prompts by the dense and the pruned models, as stored in a configuration and on a study."""

from collections.abc import Iterator
from typing import Self

from pydantic import Field, PositiveInt, model_validator

from atp_tune.frozen import FrozenModel

TOKENS = 48  # of a continuation, at most
# Eight usual words each: most tokenizers make equally many tokens of them, so they are one batch without padding.
PROMPTS = (
    "The capital of France is the city of",
    "Once upon a time there was a little",
    "To make a cup of tea you first",
)
NAMES = ("dense", "uniform", "best")


class Continuations(FrozenModel):
    """Continuations of each prompt by dense, uniform with the same pruner, and best, in the order of `prompts`.

    `others`: the same of the best plan of each other allocation, by its name.
    `tokens`: the most that were generated. Fewer if a model ends its text. Prompts are continued as they are, without a
    chat template.
    """

    prompts: tuple[str, ...] = Field(min_length=1)
    tokens: PositiveInt
    dtype: str
    dense: tuple[str, ...]
    uniform: tuple[str, ...]
    best: tuple[str, ...]
    others: dict[str, tuple[str, ...]] = Field({}, max_length=100)

    @model_validator(mode="after")
    def _as_many(self) -> Self:
        if any(len(self.of(name)) != len(self.prompts) for name in self.names):
            raise ValueError("not one continuation for each prompt")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """The models, the best last."""
        return "dense", "uniform", *self.others, "best"

    def of(self, name: str) -> tuple[str, ...]:
        """The continuations of a model."""
        return {**self.others, "dense": self.dense, "uniform": self.uniform, "best": self.best}[name]

    def rows(self) -> Iterator[tuple[str, dict[str, str]]]:
        """Each prompt with its continuation by each model."""
        for index, prompt in enumerate(self.prompts):
            yield prompt, {name: self.of(name)[index] for name in self.names}
