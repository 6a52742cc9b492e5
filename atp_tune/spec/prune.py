"""The table `[prune]` of a study: pruners, their settings, and the pattern of zeros."""

from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import Field, create_model, model_validator

from atp_tune.frozen import OneOf, SettingsTable, check_once
from atp_tune.pruners import PRUNERS, SETTINGS
from atp_tune.spec.patterns import parse

PrunerName = Annotated[str, OneOf(PRUNERS)]
Model = TypeVar("Model", bound=SettingsTable)


def with_tables(model: type[Model]) -> type[Model]:
    """Adds to the model one table for each pruner that has settings."""
    tables: dict[str, Any] = {name: (settings, settings()) for name, settings in SETTINGS.items()}
    return create_model(model.__name__, __base__=model, __module__=model.__module__, __doc__=model.__doc__, **tables)


@with_tables
class PruneConfig(SettingsTable):
    """How weights are chosen: the pruners to compare, the source of their statistics, and the pattern of zeros."""

    pruners: tuple[PrunerName, ...] = Field(
        ("wanda",), min_length=1, description="Optuna chooses, if there are several"
    )
    statistics: Literal["block", "sequential", "dense"] = Field(
        "block",
        description="source: inputs with earlier blocks pruned, with all earlier linears pruned, or of the dense model",
    )
    sparsegpt: Any = None  # keeps its place in the order of keys; `with_tables` sets the type
    pattern: str = Field("unstructured", description="unstructured, N:M (N zeros in every M inputs) or mixed:M")

    @model_validator(mode="after")
    def _patterned(self) -> Self:
        check_once(self.pruners, "pruners")
        try:
            parse(self.pattern)
        except ValueError as error:
            raise ValueError(f"pattern: {error}") from None
        return self

    def settings(self, pruner: str) -> dict[str, Any]:
        """Arguments of a pruner: the keys of its table, if it has one, and the pattern's group."""
        table = getattr(self, pruner).model_dump() if pruner in SETTINGS else {}
        return {**table, "group": parse(self.pattern).group}
