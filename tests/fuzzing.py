"""What a stranger can hand over, damaged: each target takes random bytes, and lets nothing but a UserError through.

The bytes decide where a valid document is changed and into what. `tests/test_fuzz.py` draws them with hypothesis,
`scripts/fuzz` with atheris.
"""

import json
import math
import tempfile
import tomllib
from collections.abc import Callable
from copy import deepcopy
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import optuna
import plans
import tomli_w
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import FrozenTrial, TrialState
from synthetic import BOUND, made_up, new_study

from atp_tune.cli import tables, terminal
from atp_tune.config import studyfile
from atp_tune.config.best import read_config
from atp_tune.config.studyfile import StudyFile, dotted_keys, from_settings, settings
from atp_tune.errors import UserError
from atp_tune.report import figures, formats, publishing
from atp_tune.report.formats import gather
from atp_tune.results.status import best_config, make_status, study_columns, to_json
from atp_tune.results.summary import summarise
from atp_tune.storage import fingerprint, opening
from atp_tune.storage.fingerprint import facts

SMOL = Path(__file__).parents[1] / "studies" / "smol.toml"
JUNK: list[Any] = [
    None, True, False, "", "x", "wanda", "\x1b[31mred\x9b", "\ud800", "a\0b", "../../x", "/etc/passwd", "`</p>\n```\n",
    -1, 0, 1, 2**31, 2**63, 10**30, -0.0, 0.5, 1e-320, 1e308, -1e308, math.nan, math.inf, -math.inf,
    [], {}, [[]], [1], ["x"], [math.inf, 1.0], [0.1, None], {"": 1}, {"x": {}}, {"dense": [1e308, 1e308]}, "9" * 5000,
]  # fmt: skip


class Choices:
    """Random bytes as choices; when they are used up, it is always the first that is chosen."""

    def __init__(self, data: bytes) -> None:
        self._left = iter(data)

    def __call__(self, options: int) -> int:
        high, low = next(self._left, 0), next(self._left, 0)
        return (high * 256 + low) % options

    def junk(self) -> Any:
        return deepcopy(JUNK[self(len(JUNK))])


def damaged(document: Any, choose: Choices) -> Any:
    """A copy of a JSON-like document with one to three changes anywhere in it."""
    document = deepcopy(document)
    for _ in range(1 + choose(3)):
        _damage(document, choose)
    return document


def _damage(node: Any, choose: Choices) -> None:
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            return
        key = keys[choose(len(keys))]
        child = node[key]
        if isinstance(child, dict | list) and child and choose(4):
            node = child
            continue
        match choose(4):
            case 0:
                del node[key]
            case 1 if isinstance(node, dict):
                node[f"{key}{choose(3)}"] = choose.junk()
            case _:
                node[key] = choose.junk()
        return


def damaged_bytes(content: bytes, choose: Choices) -> bytes:
    """A copy of a file with one to four bytes changed, taken out, or put in."""
    changed = bytearray(content)
    for _ in range(1 + choose(4)):
        place = choose(len(changed) + 1)
        match choose(3):
            case 0:
                changed[place : place + choose(40)] = b""
            case 1:
                changed[place:place] = bytes([choose(256)])
            case _:
                changed[place : place + 1] = bytes([choose(256)])
    return bytes(changed)


def refused(what: Callable[[], Any]) -> Any:
    """What a call gives, or None where it is refused, in one line that a terminal can show."""
    try:
        return what()
    except UserError as error:
        assert str(error).isprintable() or "\u00a0" in str(error)
        assert len(str(error)) < 30_000
        return None


@cache
def scratch() -> Path:
    return Path(tempfile.mkdtemp(prefix="atp_tune.fuzz."))


@cache
def finished() -> tuple[StudyFile, dict[str, Any], list[FrozenTrial]]:
    """A study file, and attributes and trials as a study of it holds them."""
    study = new_study(scratch() / "made.db")
    study.set_user_attr("test_nlls", {"dense": [2.9] * 16, "0": [4.1] * 16, "2": [4.0] * 16})
    curve = {"beta": [0.0, 0.1], "mean": [60.0, 61.0], "low": [50.0, 51.0], "high": [70.0, 71.0]}
    study.set_user_attr("gp_posterior", {"before": 3, "curves": {"wanda": curve}})
    attrs = study.user_attrs
    attrs["fingerprint"] |= {"model.dtype": "float32", "prune.pruners": ["wanda"]}
    file = studyfile.load(str(SMOL))
    attrs["made_from"] = settings(file)
    trials = [
        made_up(0.0, host="here", pid=1, process_started=1.0, peak_bytes={"prune": 1}, dtype="float32"),
        made_up(0.0, "sparsegpt"),
        made_up(BOUND / 3, experts_without_tokens=["0.x"], **plans.stored([0.6] * 30, [[0.5, 0.7]] * 30)),
        made_up(None, allocation="owl", lam=0.1),
        made_up(BOUND / 2, state=TrialState.FAIL, failure="out of memory"),
        made_up(BOUND / 4, state=TrialState.RUNNING, host="here", pid=1, process_started=1.0),
        made_up(BOUND, stopped_after=8),
        made_up(BOUND / 3, repeats=2),
    ]
    return file, attrs, trials


@cache
def configuration() -> dict[str, Any]:
    """A valid configuration, as a run writes it."""
    file, attrs, trials = finished()
    study = _stored(attrs, trials)
    return dict(json.loads(best_config(file, study, scratch() / "c.json").to_json()))


def config(data: bytes) -> None:
    """`apply --config FILE`, as far as the model."""
    choose = Choices(data)
    path = scratch() / "config.json"
    if choose(2):
        path.write_bytes(damaged_bytes(json.dumps(configuration(), indent=1).encode(), choose))
    else:
        path.write_text(json.dumps(damaged(configuration(), choose)))
    read = refused(lambda: read_config(path))
    if read is not None:
        read.to_json().encode()
        read.model.model({"allow_pickle": False})
        check_screen(lambda: terminal.echo(f"the configuration says {read.scored()}"))  # as `apply` does


def toml(data: bytes) -> None:
    """A study file, and overrides from `--set`."""
    choose = Choices(data)
    path = scratch() / "study.toml"
    content = SMOL.read_bytes()
    overrides: list[str] = []
    match choose(3):
        case 0:
            content = damaged_bytes(content, choose)
        case 1:
            try:
                content = tomli_w.dumps(damaged(tomllib.loads(content.decode()), choose)).encode()
            except (TypeError, ValueError):  # not everything can be written as TOML
                return
        case _:
            keys = list(dotted_keys())
            for _ in range(1 + choose(3)):
                value = choose.junk()
                text = value if isinstance(value, str) else json.dumps(value)
                overrides.append(f"{keys[choose(len(keys))]}{'=.'[choose(20) == 1]}{text}")
    path.write_bytes(content)
    file = refused(lambda: studyfile.load(str(path), overrides))
    if file is not None:
        facts(file.study, file.folder)
        assert file.best_path("../../x").parent == (file.database.parent if file.database else file.folder)
        assert from_settings(settings(file)).path == file.path.absolute()


def stored(data: bytes) -> None:
    """A database: status, notes, figures, reports and export of what it holds."""
    choose = Choices(data)
    file, attrs, trials = finished()
    attrs, trials = deepcopy(attrs), deepcopy(trials)
    for _ in range(1 + choose(2)):
        if choose(3) == 0:
            attrs = damaged(attrs, choose)
            continue
        _damage_trial(trials[choose(len(trials))], choose)
    study = _stored(attrs, trials)
    refused(lambda: look(study, file))
    if choose(8) == 1:
        refused(lambda: draw(study))


def _damage_trial(trial: FrozenTrial, choose: Choices) -> None:
    match choose(4):
        case 0:
            trial.values = [[], [-1.0], [0.0], [math.inf], [math.nan], [1.0, 2.0], [1e-300], [1e308], None][choose(9)]  # type: ignore[assignment]
            trial.state = list(TrialState)[choose(5)]
        case 1:
            name = ["pruner", "allocation", "beta", "lam", "\x1b[2J", "\ud800"][choose(6)]
            value = choose.junk()
            number = isinstance(value, int | float)
            trial._params[name] = value
            trial._distributions[name] = FloatDistribution(0, 1) if number else CategoricalDistribution(("x",))
        case _:
            trial.user_attrs = damaged(trial.user_attrs, choose)


def _stored(attrs: dict[str, Any], trials: list[FrozenTrial]) -> optuna.Study:
    kept = optuna.storages.InMemoryStorage()
    plain = optuna.create_study(storage=kept, study_name="made-up")
    for name, value in attrs.items():
        kept.set_study_user_attr(plain._study_id, name, value)
    for trial in trials:
        try:
            kept.create_new_trial(plain._study_id, trial)
        except (AssertionError, LookupError, RuntimeError):  # what this storage cannot hold at all
            continue
    study = opening.find_study(kept, "made-up")
    assert study is not None
    return study


def look(study: optuna.Study, file: StudyFile) -> None:
    """All that only reads, and is quick."""
    now = datetime(2026, 1, 1)
    summary = summarise(study)
    to_json(make_status(summary, now)).encode()
    check_screen(lambda: tables.show_status(summary, file))
    tables.progress_line(make_status(summary, now))
    publishing.study_note(summary, "sqlite:///x.db").encode()
    for trial in summary.trials:
        publishing.trial_note(trial, summary).encode()
        json.dumps(publishing.columns(trial)).encode()
    study_columns(study.user_attrs)
    refused(lambda: best_config(file, study, scratch() / "best.json").to_json().encode())
    refused(lambda: fingerprint.check_facts(study, facts(file.study), partly=True))
    refused(lambda: fingerprint.check_device(study, "cpu (2 threads)"))


def draw(study: optuna.Study) -> None:
    """Figures and reports, which take longer."""
    found = gather(study, datetime(2026, 1, 1))
    figures.draw(found.summary)
    figures.sparsities([found.summary, found.summary])
    figures.perplexities([found.summary, found.summary])
    for make in (formats.markdown, formats.machine, formats.latex):
        make([found, found])


def check_screen(show: Callable[[], None]) -> None:
    with terminal.console().capture() as captured:
        show()
    assert not {char for char in captured.get() if not char.isprintable()} - {"\n", "\u00a0"}


TARGETS = {"config": config, "toml": toml, "stored": stored}
