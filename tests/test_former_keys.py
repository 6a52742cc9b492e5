"""What version 0.1 wrote under other names: study files, `--set`, configurations, attributes of studies and trials."""

import json
import tomllib
from pathlib import Path
from typing import Any, get_args

import optuna
import pytest
from synthetic import made_up

from atp_tune.dashboard.notes import facts_of
from atp_tune.errors import UserError
from atp_tune.merging import merge
from atp_tune.sparse.provenance import read_text
from atp_tune.spec.config import FORMAT, read_config
from atp_tune.spec.facts import facts
from atp_tune.spec.former import (
    ATTRIBUTES,
    KEYS,
    VALUES,
    present_facts,
    present_key,
    present_keys,
    present_value,
    stored_value,
)
from atp_tune.spec.study import Study
from atp_tune.spec.studyfile import from_settings, load, settings
from atp_tune.spec.texts import Text
from atp_tune.storage.fingerprint import CHANGED, check_facts, create_study, is_screening
from atp_tune.storage.validation import checked_trial

HERE = Path(__file__).parent
GOLDEN = HERE / "golden" / "config.json"
FORMER = HERE / "former" / "config-0.1.json"  # the same configuration as version 0.1 wrote it
OLD = """
sparsity = 0.6
model = {source = "org/name", residency = "host"}
search = {trials = 5, settle = true}

[texts]
calibration = {source = "c4", draw = "random", windows = 4, tokens = 64}
search = {source = "wikitext2", split = "validation", windows = 7, every = 2}
report = {source = "wikitext2", split = "test"}
"""
NEW = """
sparsity = 0.6
model = {source = "org/name", offload = "cpu"}
search = {trials = 5, early_termination = true}

[texts]
calibration = {source = "c4", sampling = "random", nsamples = 4, seqlen = 64}
validation = {source = "wikitext2", split = "validation", nsamples = 7, stride = 2}
test = {source = "wikitext2", split = "test"}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old.toml").write_text(OLD)
    (tmp_path / "new.toml").write_text(NEW)
    return tmp_path


def test_a_study_file_with_former_keys_is_the_same_study() -> None:
    old, new = load("old.toml").study, load("new.toml").study
    assert old == new
    assert (old.model.offload, old.search.early_termination) == ("cpu", True)
    assert (old.texts.calibration.sampling, old.texts.calibration.seqlen) == ("random", 64)
    assert (old.texts.validation.nsamples, old.texts.validation.stride) == (7, 2)
    assert facts(old) == facts(new)


@pytest.mark.parametrize(("former", "present"), KEYS.items())
def test_every_row_names_a_key_that_there_is(former: str, present: str) -> None:
    model: Any = Study
    for name in present.split("."):
        kinds = get_args(model.model_fields[name].annotation) or (model.model_fields[name].annotation,)
        model = kinds[0]
    assert present_key(former) == present
    assert present_key(present) == present


def test_overrides_with_former_keys() -> None:
    given = ["texts.report.windows = 3", "model.residency=device", "search.screen.trials=3", "search.screen.every=2"]
    file = load("new.toml", [*given, "search.settle=false"])
    assert file.overrides == (
        "texts.test.nsamples= 3", "model.offload=device", "search.screen.trials=3", "search.screen.stride=2",
        "search.early_termination=false",
    )  # fmt: skip
    test, screen = file.study.texts.test, file.study.search.screen
    assert test is not None and screen is not None
    assert (test.nsamples, file.study.model.offload, screen.stride) == (3, "none", 2)
    whole = load("new.toml", ["texts.report={source='file:a.txt', windows=3}"]).study
    assert whole.texts.test == Text(source="file:a.txt", nsamples=3)
    assert load("new.toml", ["texts.validation.windows=9"]).study.texts.validation.nsamples == 9
    with pytest.raises(UserError) as caught:
        load("old.toml", ["texts.search.windows=0"])
    said = "old.toml with --set texts.search.windows=0: texts.validation.nsamples: must be at least 1, got 0"
    assert str(caught.value) == said


@pytest.mark.parametrize(
    ("one", "both", "key", "now"),
    [
        ('residency = "host"', 'residency = "host", offload = "cpu"', "model.residency", "model.offload"),
        ("windows = 7", "windows = 7, nsamples = 2", "texts.validation.windows", "texts.validation.nsamples"),
    ],
)
def test_a_file_with_both_names_is_refused(one: str, both: str, key: str, now: str) -> None:
    Path("both.toml").write_text(OLD.replace(one, both))
    with pytest.raises(UserError) as caught:
        load("both.toml")
    assert str(caught.value) == f"both.toml: {key}: unknown key; it is called {now} now, which is there too"


def test_what_is_stored_of_a_study_file() -> None:
    stored = json.loads(json.dumps(settings(load("new.toml", ["texts.test.nsamples=3"]))))
    before = {**stored, "settings": tomllib.loads(OLD), "overrides": ["texts.report.windows=3"]}
    before["settings"]["texts"]["report"]["windows"] = 3
    again = from_settings(before)
    assert (again.study, again.overrides) == (from_settings(stored).study, ("texts.test.nsamples=3",))
    with pytest.raises((ValueError, TypeError)):
        from_settings({**before, "settings": 5})


def test_former_attributes_of_a_study() -> None:
    made = facts(load("new.toml").study)
    by_former_name = {
        key.replace("validation", "search").replace("texts.test", "texts.report").replace("nsamples", "windows")
        .replace("seqlen", "tokens").replace("stride", "every").replace("sampling", "draw"): value
        for key, value in made.items()
    }  # fmt: skip
    assert "texts.search.windows" in by_former_name and present_facts(by_former_name) == made == present_facts(made)
    db = optuna.storages.InMemoryStorage()
    study = optuna.create_study(study_name="s", storage=db)
    study.set_user_attr("fingerprint", by_former_name)
    study.set_user_attr("reports", {"dense": [1.0], "0": [2.0]})
    study.set_user_attr("reports:1", [3.0])
    study.set_user_attr("test_nlls:2", [4.0])
    study.set_user_attr("settled", [5, 2])
    study.add_trial(made_up(0.0))
    raw = study._storage.get_all_trials(study._study_id)[0]
    study._storage.create_new_trial(study._study_id, raw)
    found = create_study(db, "s", made)
    assert found.user_attrs["fingerprint"] == made
    assert found.user_attrs["test_nlls"] == {"dense": [1.0], "0": [2.0], "1": [3.0], "2": [4.0]}
    assert found.user_attrs["terminated_early"] == [5, 2]
    assert not ATTRIBUTES.keys() & found.user_attrs.keys()
    with pytest.raises(UserError, match=r"texts\.validation\.nsamples is 8, was 7\."):
        check_facts(found, {**made, "texts.validation.nsamples": 8})


def test_former_attributes_of_a_trial() -> None:
    sizes = {"calibration": 8, "search": 16, "report": 4, "heads": 64}
    trial = optuna.create_trial(value=1.0, user_attrs={"unheard": ["a"], "batches": sizes, "seconds": {"search": 1.0}})
    found = checked_trial(trial).user_attrs
    assert found["experts_without_tokens"] == ["a"]
    assert found["batches"] == {"calibration": 8, "validation": 16, "test": 4, "heads": 64}
    assert found["seconds"] == {"search": 1.0}
    assert trial.user_attrs["unheard"] == ["a"]  # Optuna's own stays


def test_a_screening_that_was_made_by_former_keys_is_one() -> None:
    study = optuna.create_study(study_name="s.screen")
    given = [f"{key}=1".replace("validation", "search").replace("stride", "every") for key in CHANGED]
    study.set_user_attr("made_from", {"overrides": given})
    assert is_screening(study)


def test_a_configuration_of_version_0_1(folder: Path) -> None:
    read = read_config(FORMER)
    assert read == read_config(GOLDEN)
    assert read.to_json() == GOLDEN.read_text(encoding="utf-8")
    content = json.loads(FORMER.read_text(encoding="utf-8"))
    Path("mixed.json").write_text(json.dumps({**content, "format": FORMAT}))
    with pytest.raises(UserError, match=r"perplexity\.validation: is needed"):
        read_config(Path("mixed.json"))


def test_a_table_where_a_value_should_be_is_left_to_validation() -> None:
    assert present_keys({"texts": {"search": 1}, "search": 5}) == {"texts": {"validation": 1}, "search": 5}
    assert present_keys({"texts": {"search": {}}, "model": {}}) == {"texts": {"validation": {}}, "model": {}}


@pytest.mark.parametrize("value", ["block", "sequential", "dense"])
def test_values_of_facts_go_both_ways(value: str) -> None:
    stored = stored_value("prune.statistics", value)
    assert present_value("prune.statistics", stored) == value
    assert (stored == value) == (value not in VALUES["prune.statistics"])
    assert present_value("search.sampler", stored) == stored_value("search.sampler", stored) == stored


def close(db: optuna.storages.RDBStorage) -> None:
    """Optuna's own storage keeps its connection open."""
    db.remove_session()
    db.engine.dispose()


@pytest.mark.slow
def test_a_merged_study_has_present_names(folder: Path) -> None:
    made = {**facts(load("new.toml").study), "model.content": "a", "model.dtype": "float32"}
    for name, texts in (("a.db", "texts.validation"), ("b.db", "texts.search")):
        db = optuna.storages.RDBStorage(f"sqlite:///{folder / name}")
        study = optuna.create_study(study_name="s", storage=db)
        study.set_user_attr("fingerprint", {key.replace("texts.validation", texts): made[key] for key in made})
        study.add_trial(made_up(0.0))
        close(db)
    merged = merge([str(folder / "a.db"), str(folder / "b.db")], folder / "out.db", None)
    assert merged.study.user_attrs["fingerprint"] == made
    raw = optuna.storages.RDBStorage(f"sqlite:///{folder / 'out.db'}")
    assert raw.get_study_system_attrs(1)["atp_tune:fingerprint"] == made
    close(raw)


def test_a_text_of_the_command_line_and_the_dashboard() -> None:
    text = read_text("--text", '{source = "c4", draw = "random", windows = 3}', 64)
    assert (text.nsamples, text.seqlen) == (3, 64)
    shown = facts_of({"fingerprint": {"texts.search.source": "c4"}})
    assert shown == {"texts.validation.source": "c4", "trials": "not known yet"}
