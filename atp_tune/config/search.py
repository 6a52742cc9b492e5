"""The tables `[search]`, `[search.screen]` and `[limit]` of a study: how Optuna searches, and for what."""

from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BeforeValidator, Field, field_validator, model_validator

from atp_tune.config.prune import check_names
from atp_tune.measures import Limit
from atp_tune.plan import Share
from atp_tune.plugins import IN_SCHEMA
from atp_tune.utils.registry import OneOf, Registry, SettingsTable

Objective = Literal["perplexity", "kl", "accuracy"]
MIN = Field(min_length=1)
Objectives = Annotated[tuple[Objective, ...], MIN]
ACCURACY = "accuracy"  # of images: minimised is the top-1 error
CROSS_ENTROPY = "cross-entropy"  # of images: another name of the perplexity, which is its exponential
Named = Literal["perplexity", "kl", "accuracy", "cross-entropy"]
# Functions from a seed to the Optuna sampler that proposes an allocation's parameters.
SAMPLERS = Registry[Any](
    "sampler",
    {
        "gp": "atp_tune.search.samplers:gp",
        "tpe": "atp_tune.search.samplers:tpe",
        "grid": "atp_tune.search.samplers:at_random",
        "random": "atp_tune.search.samplers:at_random",
    },
    "atp_tune.samplers",
    "atp_tune.search.samplers:finished",
)
NEXT_TOKEN = "next-token"  # the score of language models
SCORES = Registry[Any](  # objects of type `scores.Score`
    "score",
    {NEXT_TOKEN: "atp_tune.scores.next_token:NEXT_TOKEN", "classes": "atp_tune.scores.classes:CLASSES"},
    "atp_tune.scores",
    "atp_tune.scores.next_token:finished",
)


def or_none(table: Any) -> BeforeValidator:
    """Accepts "none" in the place of a table, by which an override takes it away."""
    return BeforeValidator(lambda value: None if value == "none" else value, table | Literal["none"])


class ScreenConfig(SettingsTable):
    """A cheaper search before the study, with statistics of the dense model and a part of the validation windows.

    It only has to rank points: the best ones are measured again in full.
    """

    trials: int = Field(ge=1)
    """number of points to screen, over all runs; a grid is screened as a whole"""
    stride: int = Field(4, ge=1)
    """use every stride-th validation window only, from the first"""
    confirm: int = Field(2, ge=1)
    """number of best points that the study measures first, before uniform"""


class SearchConfig(SettingsTable):
    """How Optuna searches for the best plan."""

    trials: int | None = Field(None, ge=1)
    """total number over all runs; optional for a grid and for a study that screens"""
    objective: Objectives = ("perplexity",)
    (
        "values to minimise; cross-entropy of images is shown as its exponential, the perplexity over classes; "
        "kl: divergence from the dense predictions; accuracy of images: the top-1 error, alone"
    )
    sampler: Annotated[str, OneOf(SAMPLERS, IN_SCHEMA)] = "gp"
    """gp, tpe, grid or random"""
    score: Annotated[str, OneOf(SCORES, IN_SCHEMA)] = NEXT_TOKEN
    """of a window: next-token, its mean NLL per predicted token, or a plug-in"""
    seed: int = Field(0, ge=0)
    """seed of the sampler"""
    step: float = Field(0.002, gt=0)
    """distance between the β of a grid"""
    stopper: Literal["none", "wilcoxon"] = "none"
    """stops trials that are unlikely to be the best"""
    early_termination: bool = False
    """end the study when a better point would gain less than 2% of the value, at 90% confidence"""
    screen: Annotated[ScreenConfig | None, or_none(ScreenConfig)] = None
    """a cheaper search for first points; "none": no such search"""

    @field_validator("objective", mode="before", json_schema_input_type=Named | Annotated[tuple[Named, ...], MIN])
    @classmethod
    def _listed(cls, value: Any) -> Any:
        listed = (value,) if isinstance(value, str) else value
        is_list = isinstance(listed, list | tuple)
        return tuple("perplexity" if name == CROSS_ENTROPY else name for name in listed) if is_list else listed

    @field_validator("objective")
    @classmethod
    def _in_order(cls, value: tuple[Objective, ...]) -> tuple[Objective, ...]:
        """Removes repetitions and sorts: the order of a trial's values in Optuna."""
        return tuple(name for name in get_args(Objective) if name in value)

    @model_validator(mode="after")
    def _counted(self) -> Self:
        check_names((self.sampler,), "sampler", SAMPLERS)
        check_names((self.score,), "score", SCORES)
        if self.trials is None and self.sampler != "grid" and self.screen is None:
            raise ValueError(f"trials: is needed with the sampler {self.sampler} where no points are screened")
        if self.screen and self.sampler != "grid" and self.screen.confirm > self.screen.trials:
            raise ValueError(f"screen.confirm: must be at most search.screen.trials, {self.screen.trials}")
        if self.early_termination and self.sampler in ("grid", "random"):
            raise ValueError(
                f'early_termination: {self.sampler} does not learn from earlier trials; take "gp" or "tpe"'
            )
        given = {
            "stopper": self.stopper != "none",
            "early_termination": self.early_termination,
            "screen": self.screen is not None,
        }
        if len(self.objective) > 1 and any(given.values()):
            first, *others = [key for key, is_given in given.items() if is_given]
            listed = " and ".join(["it", *(f"search.{key}" for key in others)])
            raise ValueError(f"{first}: compares by one value; leave {listed} out, or give search.objective one name")
        # Accuracy moves in steps of one image: what tells plans apart more finely is refused.
        given["objective"] = len(self.objective) > 1
        for key in ("objective", "screen", "early_termination"):
            if given[key] and ACCURACY in self.objective:
                raise ValueError(
                    f"{key}: accuracy moves in steps of one image, too coarse for this; "
                    + ("give it alone" if key == "objective" else f'leave {key} out, or search by "{CROSS_ENTROPY}"')
                )
        return self


class LimitConfig(SettingsTable):
    """How much worse than the dense model the sparsest plan may be: one of these keys, within the standard error."""

    max_increase: float | None = Field(None, gt=0)
    """of perplexity on the validation text against the dense model, as a share: 0.05 is 5 %"""
    max_perplexity: float | None = Field(None, gt=1)
    """on the validation text"""
    max_kl: float | None = Field(
        None, gt=0, description='nats per token from the dense predictions; with search.objective = "kl"'
    )
    max_drop: float | None = Field(None, gt=0, lt=1)
    (
        "of image classifiers: of accuracy on the validation images against the dense model, as a share: 0.01 is "
        "one point"
    )
    min_accuracy: dict[str, Share] | None = Field(None, min_length=1)
    """on tasks of lm-eval, by name or path; all of them must reach it"""
    items: int | None = Field(None, ge=2)
    """of each task of min_accuracy, at most"""

    @model_validator(mode="after")
    def _one(self) -> Self:
        keys = [key for key in type(self).model_fields if key != "items"]
        if len(self.given) != 1:
            raise ValueError(f"max_increase: give one of {', '.join(keys)}, and no other")
        if self.items is not None and self.min_accuracy is None:
            raise ValueError("items: belongs to min_accuracy; leave it out")
        return self

    @property
    def given(self) -> Limit:
        """The limit itself: a key and its value."""
        return {key: value for key, value in self if value is not None and key != "items"}
