"""The table `[prune]` of a study: pruners, their settings, and the pattern of zeros.

The table of a pruner that is a plug-in is kept as it is written: `spec.plugged` checks it once the code may run.
"""

from collections.abc import Callable
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    ValidationInfo,
    create_model,
    model_validator,
)
from pydantic_core import InitErrorDetails

from atp_tune.allocations.budget import ranked_by
from atp_tune.config.patterns import parse
from atp_tune.config.recover import Loss
from atp_tune.plugins import IN_SCHEMA, short_name
from atp_tune.pruners import PRUNERS, SETTINGS, Pruner, Quantizer, make_pruner
from atp_tune.pruners.settings import ChannelSettings
from atp_tune.utils.frozen import STORED, OneOf, SettingsTable, check_once, relocated
from atp_tune.utils.registry import Registry

UPDATING = ("sparsegpt", "alps")  # pruners that change weights that they keep
OF_CHANNELS = ("wanda", "magnitude")  # pruners that score channels
PrunerName = Annotated[str, OneOf(PRUNERS, IN_SCHEMA)]
Model = TypeVar("Model", bound=SettingsTable)


def with_tables(model: type[Model]) -> type[Model]:
    """Adds to the model one table for each pruner that has settings."""
    tables: dict[str, Any] = {name: (settings, settings()) for name, settings in SETTINGS.items()}
    return create_model(model.__name__, __base__=model, __module__=model.__module__, __doc__=model.__doc__, **tables)


_WITHOUT_TABLES: list[JsonValue] = [{"required": [name]} for name in PRUNERS.data if name not in SETTINGS]


@with_tables
class PruneConfig(SettingsTable):
    """How weights are chosen: the pruners to compare, the source of their statistics, and the pattern of zeros."""

    model_config = ConfigDict(extra="allow", json_schema_extra={"not": {"anyOf": _WITHOUT_TABLES}})
    __pydantic_extra__: dict[str, dict[str, JsonValue]]  # tables of plug-ins, by short name

    pruners: tuple[PrunerName, ...] = Field(
        ("wanda",), min_length=1, description="Optuna chooses, if there are several"
    )
    statistics: Literal["block", "sequential", "dense"] = Field(
        "block",
        description="source: inputs with earlier blocks pruned, with all earlier linears pruned, or of the dense model",
    )
    sparsegpt: Any = None  # keeps its place in the order of keys; `with_tables` sets the type
    pattern: str = Field("unstructured", description="unstructured, N:M (N zeros in every M inputs) or mixed:M")
    refine: int = Field(
        0, ge=0, description="steps of conjugate gradients that update the kept weights, after any pruner; 0: none"
    )
    gradient_at: Literal["wanda", "own"] = Field(
        "wanda",
        description="weights at which allocations by the gradient take it: masks of Wanda (magnitude of itself), or "
        "what the pruner itself makes of them, refinement included",
    )
    loss: Loss = Field(
        "both",
        description="of the descent of gradient-rows. kl: KL divergence from the dense model's predictions; "
        "next-token: NLL of the text; both: the mean",
    )
    channels: ChannelSettings = Field(ChannelSettings(), description='of pattern = "channels": whole channels go')

    @model_validator(mode="wrap")
    @classmethod
    def _known(cls, data: Any, inner: Callable[[Any], Self], info: ValidationInfo) -> Self:
        """Refuses keys that are neither of this table nor tables of plug-ins, beside what else is wrong."""
        if not isinstance(data, dict) or info.context == STORED:
            return inner(data)
        names = data.get("pruners", ())
        named = {short_name(name) for name in names if isinstance(name, str)} if isinstance(names, list | tuple) else ()
        unknown = [key for key in data if key not in cls.model_fields and not _has_table(key, named)]
        wrong = [InitErrorDetails(type="extra_forbidden", loc=(key,), input=data[key]) for key in unknown]
        try:
            found = inner({key: value for key, value in data.items() if key not in unknown})
        except ValidationError as error:
            raise ValidationError.from_exception_data(cls.__name__, [*wrong, *relocated(error)]) from None
        if wrong:
            raise ValidationError.from_exception_data(cls.__name__, wrong)
        return found

    @model_validator(mode="after")
    def _patterned(self) -> Self:
        check_names(self.pruners, "pruners", PRUNERS)
        try:
            parse(self.pattern)
        except ValueError as error:
            raise ValueError(f"pattern: {error}") from None
        self._check_channels()
        return self

    def _check_channels(self) -> None:
        """ValueError for a setting that does not go with whole channels, or for one that goes with them alone."""
        if not parse(self.pattern).channels:
            if self.channels != ChannelSettings():
                raise ValueError(f'channels: belongs to pattern = "channels", and the pattern is {self.pattern}')
            return
        other = [name for name in self.pruners if name not in OF_CHANNELS]
        compare: str = self.settings("wanda")["compare"]
        for key, is_given, reason in (
            ("pruners", other, f"{(*other, '')[0]} scores no channels; take {' or '.join(OF_CHANNELS)}"),
            ("statistics", self.statistics != "block", f'must be "block", not "{self.statistics}"'),
            ("refine", self.refine, "updates single weights; leave it out for prune.channels.refit"),
            ("wanda.compare", compare != "row", f"{compare} compares single weights; leave it out"),
        ):
            if is_given:
                raise ValueError(f'{key}: {reason} where pattern = "channels"')

    def settings(self, pruner: str) -> dict[str, Any]:
        """Arguments of a pruner: the keys of its table, if it has one, and the pattern's group."""
        table = getattr(self, pruner).model_dump() if pruner in SETTINGS else self.tables.get(pruner, {})
        return {**table, "group": parse(self.pattern).group}

    def told(self, pruner: str) -> dict[str, Any]:
        """The settings that determine what a pruner removes, for people and other programs.

        Of whole channels those of `channels`; magnitude measures no `score`.
        """
        if not parse(self.pattern).channels:
            return self.settings(pruner)
        return self.channels.model_dump(exclude={"score"} if pruner == "magnitude" else None)

    def pruner(self, name: str, quantizer: Quantizer | None = None) -> Pruner:
        """Makes a pruner of the study, with what follows it: refinement, and rounding by a quantizer.

        UserError if it is a plug-in without groups and the pattern has some.
        """
        return make_pruner(name, self.settings(name), self.refine, quantizer)

    def has_own_prices(self, name: str) -> bool:
        """Whether the gradient is taken at what a pruner makes of the weights: masks of scores do not tell it."""
        in_groups = name == "wanda" and parse(self.pattern).group is not None
        is_masked = self._takes_lowest_of_rows(name) or in_groups or name == "magnitude"
        return self.gradient_at == "own" and (self.refine > 0 or not is_masked)

    def by_rows(self, name: str) -> bool:
        """Whether the allocation `gradient-rows` gives rows offsets: the pruner takes the lowest scores of each."""
        is_whole = parse(self.pattern).group is None and not parse(self.pattern).channels
        return is_whole and self._takes_lowest_of_rows(name) and not self.has_own_prices(name)

    def _takes_lowest_of_rows(self, name: str) -> bool:
        return name == "wanda" and bool(self.settings(name)["compare"] == "row")

    def priced_by(self, name: str) -> str:
        """The levels that `gradient` descends by for a pruner: the places of a score, or its own weights."""
        return f"weights of {name}" if self.has_own_prices(name) else ranked_by(name)

    @property
    def short_names(self) -> tuple[str, ...]:
        """The short names of the pruners."""
        return tuple(map(short_name, self.pruners))

    @property
    def tables(self) -> dict[str, dict[str, JsonValue]]:
        """The tables of plug-ins, as they are written, by short name."""
        return self.__pydantic_extra__ or {}


def _has_table(name: Any, named: Any) -> bool:
    """Whether a name is that of a plug-in, which may have a table."""
    return isinstance(name, str) and not PRUNERS.is_built_in(name) and (name in named or name in PRUNERS)


def check_names(names: tuple[str, ...], key: str, registry: Registry[Any]) -> None:
    """ValueError if a name occurs twice under `key`, two plug-ins have one, or one has that of a built-in object."""
    check_once(names, key)
    known: dict[str, str] = {}
    for name in names:
        short = short_name(name)
        if short != name and registry.is_built_in(short):
            raise ValueError(f"{key}: {name} has the name of the built-in {registry.kind} {short}; rename the plug-in")
        if short in known:
            raise ValueError(f"{key}: {known[short]} and {name} are both called {short}; rename one of the plug-ins")
        known[short] = name
