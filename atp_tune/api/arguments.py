"""From the arguments of `tune` and `prune` to a study file, as the command line makes one from its options."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from atp_tune.errors import UserError
from atp_tune.measures import Limit
from atp_tune.spec import finding
from atp_tune.spec.plugged import plug_in
from atp_tune.spec.study import Study
from atp_tune.spec.studyfile import PLACES, StudyFile, absolute_storage, invalid, load, override, tables
from atp_tune.spec.typed import goal, only_limit
from atp_tune.spec.writing import toml_value

# --- What a caller gives from memory, a model with its tokenizer and texts, and how studies come to it.

ROLES = ("calibration", "validation", "test")


@dataclass(frozen=True)
class Sources:
    """How a study file names what is lent; None for what is not."""

    model: str | None = None
    device: str | None = None
    texts: str | Mapping[str, str] | None = None


@dataclass(frozen=True)
class Lender:
    """A model in memory with its tokenizer, if there is one, and documents: of one text, or by role."""

    model: Any = None
    tokenizer: Any = None
    texts: str | Mapping[str, str | list[str]] | list[str] | None = None

    @classmethod
    def of(cls, model: Any, tokenizer: Any, texts: Any) -> "Lender":
        """What of these arguments lies in memory; UserError for texts of another type."""
        return cls(model, tokenizer, texts_of(texts))

    @contextmanager
    def lend(self) -> Iterator[Sources]:
        """Lends model and texts; they are found by the sources that it yields until the end."""
        with ExitStack() as stack:
            model, device = None, None
            if self.model is not None:
                from atp_tune.checkpoints.checkpoint import lent

                model = stack.enter_context(lent(self.model, self.tokenizer)).id
                device = _device_of(self.model)
            yield Sources(model, device, self._lend_texts(stack))

    def _lend_texts(self, stack: ExitStack) -> str | Mapping[str, str] | None:
        from atp_tune.inputs.sources import lent

        def named(texts: str | list[str]) -> str:
            return texts if isinstance(texts, str) else stack.enter_context(lent(texts))

        if self.texts is None:
            return None
        if isinstance(self.texts, str | list):
            return named(self.texts)
        return {role: named(texts) for role, texts in self.texts.items()}


def texts_of(texts: Any) -> str | Mapping[str, str | list[str]] | list[str] | None:
    """A name or path of texts, documents, or either by role, from what a caller gives; UserError for anything else."""
    from atp_tune.inputs.sources import documents_of

    def one(value: Any, what: str) -> str | list[str]:
        if isinstance(value, str) and any(space in value.strip() for space in "\n ") and not Path(value).is_file():
            raise UserError(f"{what}: is neither a file nor a name of texts; give documents as a list, as in [text]")
        return str(value) if isinstance(value, str | Path) else documents_of(value, what)

    if texts is None or not isinstance(texts, Mapping):
        return None if texts is None else one(texts, "texts")
    if {*texts} != {*ROLES}:
        raise UserError(
            "texts: give calibration, validation and test, or one list, of which three parts are used; "
            f"got {', '.join(map(str, texts)) or 'none'}"
        )
    return {role: one(value, f'texts["{role}"]') for role, value in texts.items()}


def _device_of(model: Any) -> str:
    """The device of a model's weights, as in a study file."""
    device = next(model.parameters()).device
    return str(device) if device.type == "cuda" else str(device.type)


def is_model(value: Any) -> bool:
    """Whether an argument is a model in memory, even one that is not treated, and no name of one."""
    return not isinstance(value, str | Path) and hasattr(value, "parameters")


def names(value: str | Sequence[str] | None) -> tuple[str, ...]:
    """One name or several, as a tuple."""
    return (value,) if isinstance(value, str) else tuple(value or ())


Target = float | str | tuple[float, float]
Settings = Mapping[str, Any]


BOOLEANS = {"true": "True", "false": "False"}
OPTION = re.compile(r"(?<![\w-])--([a-z]+(?:-[a-z]+)*)")


@contextmanager
def as_arguments(**names: str) -> Iterator[None]:
    """Calls options of the command line in errors as the arguments of Python that they are here, unless by `names`."""
    try:
        yield
    except UserError as error:
        text = str(error)
        if "tune.py" in text:  # a whole command
            raise
        raise UserError(as_in_python(text, **names)) from None


def as_in_python(text: str, **names: str) -> str:
    """A line with the arguments of Python in the place of options."""
    text = text.replace("--trust-plugins", "trust_plugins=True").replace("--texts FILE", "texts=")
    text = re.sub(r"--set (\S+)=(\S+?)(?=[:.;,)]*(?:\s|$))", _setting, text)
    return OPTION.sub(lambda found: names.get(found[1], found[1].replace("-", "_")), text)


def _setting(found: re.Match[str]) -> str:
    return f'settings={{"{found[1]}": {BOOLEANS.get(found[2], found[2])}}}'


def overrides(settings: Settings) -> list[str]:
    """Settings as overrides of a study file, `key=value`; UserError for a value that TOML has not."""
    found = []
    for key, value in settings.items():
        try:
            found.append(f"{key}={toml_value(value)}")
        except (TypeError, ValueError):
            raise UserError(f"settings: {key}: {value!r} is no value of a study file") from None
    return found


def study_file(
    study: str | Path | Study, storage: str | None, settings: Settings, plugins: bool | None = None
) -> StudyFile:
    """The file of a study by name or path, or of a `Study` itself, with another storage and other settings.

    `plugins`: None where no code of plug-ins is needed, else whether it may run.
    """
    place = {} if storage is None else {"storage": absolute_storage(storage, Path())}
    if not isinstance(study, Study):
        with as_arguments():
            return load(str(study), overrides({**settings, **place}), plugins)
    file = StudyFile("study", Path("study.toml"), study)
    return changed(file, {**settings, **place}, bool(plugins))


def changed(file: StudyFile, settings: Settings, plugins: bool) -> StudyFile:
    """A copy of a study file that need not exist, with other settings; UserError for wrong ones.

    The code of its plug-ins runs, that of places in files and modules only if `plugins`. The caller has made the study.
    """
    data = file.study.model_dump(mode="json", exclude_unset=True)
    texts = overrides(settings)
    keys = [(text, override(data, text, file.path)) for text in texts]
    try:
        study = plug_in(Study.model_validate(data), file.folder, plugins)
    except ValidationError as error:
        # An error of a study file that does not exist, without its name: the key comes first.
        raise UserError(
            re.sub(r"^\S+\.toml(?: with --set .+?)?: (?=[\w.\[\]]+: )", "", str(invalid(file.path, error, keys)))
        ) from None
    kept = tuple(text for text in texts if not text.startswith(PLACES))
    return replace(file, study=study, overrides=(*file.overrides, *kept), trusts_plugins=plugins, trusts_model=True)


def is_study(value: Any) -> bool:
    """Whether an argument names a study, or is one: a `Study`, a .toml file, or the name of a known study."""
    if isinstance(value, Study):
        return True
    if not isinstance(value, str | Path) or Path(value).is_dir():
        return False
    return Path(value).suffix == ".toml" or str(value) in [path.stem for path in finding.known()]


def goal_of(
    sparsity: Target | None, limits: Mapping[str, Any], settings: Settings
) -> tuple[float | tuple[float, float], Limit | None, Mapping[str, Any]]:
    """The sparsity or interval to search, the limit, and the settings as tables; UserError for wrong ones."""
    asked = tables(overrides(settings))
    return *goal(sparsity, only_limit(limits), asked), asked


def requested(
    model: Any,
    sources: Sources,
    *,
    sparsity: float | tuple[float, float],
    limit: Limit | None,
    preset: str | None,
    pruners: Sequence[str],
    allocations: Sequence[str],
    name: str | None,
    device: str | None,
    allowed: Mapping[str, bool],
    notify: Any,
    recover: bool | None,
    settings: Mapping[str, Any],
) -> StudyFile:
    """The study of a model, as `tune.py MODEL` makes it; `sources`: of what is lent; `settings`: as tables."""
    from atp_tune.api.presets import StudyRequest

    source, where = sources.model or str(model), sources.device or device
    request = StudyRequest(
        source, sparsity, preset, tuple(pruners), tuple(allocations), sources.texts, limit, recover, settings
    )
    label = name or (StudyRequest(type(model).__name__, sparsity).name if sources.model else request.name)
    study = request.study(label, where, allowed, notify)
    return StudyFile(
        label, Path(f"{label}.toml"), study if where is None else study.model_copy(update={"device": where})
    )
