"""How keys of study files that were renamed are read, shown with rows that are made up."""

import json
import re
from pathlib import Path
from typing import Any

import optuna
import pytest
from synthetic import made_up

from atp_tune.errors import UserError
from atp_tune.merging import merge
from atp_tune.serving.notes import facts_of
from atp_tune.sparse.provenance import read_text
from atp_tune.spec import former
from atp_tune.spec.config import read_config
from atp_tune.spec.facts import facts
from atp_tune.spec.former import (
    KEYS,
    VALUES,
    present_facts,
    present_key,
    present_keys,
    present_value,
    stored_facts,
    stored_value,
)
from atp_tune.spec.study import ScreenConfig, Text
from atp_tune.spec.studyfile import from_settings, load, settings
from atp_tune.storage.fingerprint import CHANGED, check_facts, create_study, is_screening

REPO = Path(__file__).parents[1]
GOLDEN = REPO / "tests" / "golden" / "config.json"
# Keys of today in the place of future ones: a key, a key of three texts, one that moves to another table, and a table.
ROWS = {
    "sparseness": "sparsity",
    "texts.calibration.sections": "texts.calibration.windows",
    "texts.search.sections": "texts.search.windows",
    "texts.report.sections": "texts.report.windows",
    "prune.sampler": "search.sampler",
    "search.sieve": "search.screen",
    "search.sieve.stride": "search.screen.every",
    "prune.input": "prune.statistics",
}
OLD = """
sparseness = 0.6
model.source = "org/name"
prune = {pruners = ["wanda"], input = "dense", sampler = "tpe"}
search = {trials = 5, sieve = {trials = 9, stride = 3}}

[texts]
calibration = {source = "c4", draw = "random", sections = 4}
search = {source = "wikitext2", split = "validation", sections = 7}
report = {source = "wikitext2", split = "test"}
"""


@pytest.fixture(autouse=True)
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for old, new in ROWS.items():
        monkeypatch.setitem(KEYS, old, new)
    monkeypatch.chdir(tmp_path)
    new = OLD
    for key, value in ROWS.items():
        new = re.sub(rf"\b{key.rpartition('.')[2]}\b", value.rpartition(".")[2], new)
    new = new.replace(', sampler = "tpe"', "").replace("{trials = 5", '{sampler = "tpe", trials = 5')
    (tmp_path / "old.toml").write_text(OLD)
    (tmp_path / "new.toml").write_text(new)
    return tmp_path


def test_a_study_file_with_former_keys_is_the_same_study() -> None:
    old, new = load("old.toml").study, load("new.toml").study
    assert old == new
    assert (old.sparsity, old.search.sampler, old.texts.search.windows) == (0.6, "tpe", 7)
    assert old.search.screen is not None and old.search.screen.every == 3
    assert facts(old) == facts(new)


def test_overrides_with_former_keys() -> None:
    given = ["texts.report.sections = 3", "prune.sampler=random", "search.sieve.stride=2", "search.sieve.confirm=1"]
    file = load("new.toml", given)
    assert file.overrides == (
        "texts.report.windows= 3", "search.sampler=random", "search.screen.every=2", "search.screen.confirm=1",
    )  # fmt: skip
    report, screen = file.study.texts.report, file.study.search.screen
    assert report is not None and screen is not None
    assert (report.windows, file.study.search.sampler, screen.every, screen.confirm) == (3, "random", 2, 1)
    whole = load(
        "new.toml", ["texts.report={source='file:a.txt', sections=3}", "search.sieve={trials=2, stride=3}"]
    ).study
    assert whole.texts.report == Text(source="file:a.txt", windows=3)
    assert whole.search.screen == ScreenConfig(trials=2, every=3)
    with pytest.raises(UserError) as caught:
        load("old.toml", ["texts.search.sections=0"])
    said = "old.toml with --set texts.search.sections=0: texts.search.windows: must be at least 1, got 0"
    assert str(caught.value) == said


@pytest.mark.parametrize(
    ("one", "both", "key", "now"),
    [
        ("sparseness = 0.6", "sparseness = 0.6\nsparsity = 0.5", "sparseness", "sparsity"),
        ("sections = 7", "sections = 7, windows = 2", "texts.search.sections", "texts.search.windows"),
    ],
)
def test_a_file_with_both_names_is_refused(one: str, both: str, key: str, now: str) -> None:
    Path("both.toml").write_text(OLD.replace(one, both))
    with pytest.raises(UserError) as caught:
        load("both.toml")
    assert str(caught.value) == f"both.toml: {key}: unknown key; it is called {now} now, which is there too"


def test_what_is_stored_of_a_study_file(rows: Path) -> None:
    stored = json.loads(json.dumps(settings(load("new.toml", ["texts.report.windows=3"]))))
    text = json.dumps(stored)
    for old, new in {"windows": "sections", "every": "stride", "screen": "sieve", "sparsity": "sparseness"}.items():
        text = re.sub(rf"\b{old}\b", new, text)
    before = json.loads(text)
    assert before["overrides"] == ["texts.report.sections=3"]
    again = from_settings(before)
    assert (again.study, again.overrides) == (from_settings(stored).study, ("texts.report.windows=3",))
    with pytest.raises((ValueError, TypeError)):
        from_settings({**before, "settings": 5})


def test_facts_are_stored_under_former_names(rows: Path) -> None:
    made = facts(load("new.toml").study)
    stored = stored_facts(made)
    assert stored["texts.search.sections"] == 7 and stored["search.sieve.stride"] == 3 and stored["sparseness"] == 0.6
    assert "search.screen.every" in made and not set(ROWS.values()) & set(stored)
    assert present_facts(stored) == made == present_facts(made)
    db = optuna.storages.InMemoryStorage()
    study = create_study(db, "s", made)
    assert optuna.load_study(study_name="s", storage=db).user_attrs["fingerprint"] == stored
    assert study.user_attrs["fingerprint"] == made
    check_facts(study, made)
    with pytest.raises(UserError, match=r"texts\.search\.windows is 8, was 7\."):
        check_facts(study, {**made, "texts.search.windows": 8})


def test_a_screening_that_was_made_by_former_keys_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KEYS, "texts.search.stride", "texts.search.every")
    study = optuna.create_study(study_name="s.screen")
    given = [f"{key}=1" for key in CHANGED]
    study.set_user_attr("made_from", {"overrides": [one.replace("every", "stride") for one in given]})
    assert is_screening(study)


def test_a_configuration_with_former_keys(rows: Path) -> None:
    content = json.loads(GOLDEN.read_text(encoding="utf-8"))
    for text in (content["calibration"], *content["texts"].values()):
        text["sections"] = text.pop("windows")
    content["prune"]["input"] = content["prune"].pop("statistics")
    Path("old.json").write_text(json.dumps(content))
    read = read_config(Path("old.json"))
    assert read == read_config(GOLDEN)
    assert read.to_json() == GOLDEN.read_text(encoding="utf-8")


def test_no_row_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(former, "KEYS", {})
    data: dict[str, Any] = {"a": {}, "b": {"c": {"d": [1, {"e": 2}]}}, 'q"."': 1, "prune": 5}
    assert present_keys(data) == data
    assert present_key("texts.search.sections") == "texts.search.sections"
    assert former.present_override(" a . b =c= d") == " a . b =c= d"


def test_a_table_where_a_value_should_be_is_left_to_validation() -> None:
    assert present_keys({"prune": {"sampler": 1}, "search": 5}) == {"prune": {"sampler": 1}, "search": 5}
    assert present_keys({"search": {"sieve": 3}}) == {"search": {"screen": 3}}
    assert present_keys({"search": {"sieve": {}}, "texts": {}}) == {"search": {"screen": {}}, "texts": {}}


@pytest.mark.parametrize("value", ["block", "sequential", "dense"])
def test_values_of_facts_go_both_ways(value: str) -> None:
    stored = stored_value("prune.statistics", value)
    assert present_value("prune.statistics", stored) == value
    assert (stored == value) == (value not in VALUES["prune.statistics"])
    assert present_value("search.sampler", stored) == stored_value("search.sampler", stored) == stored


def test_a_merged_study_keeps_the_stored_names(rows: Path) -> None:
    made = {**facts(load("new.toml").study), "model.content": "a", "model.dtype": "float32"}
    for name in ("a.db", "b.db"):
        db = optuna.storages.RDBStorage(f"sqlite:///{rows / name}")
        create_study(db, "s", made).add_trial(made_up(0.0))
    merged = merge([str(rows / "a.db"), str(rows / "b.db")], rows / "out.db", None)
    assert merged.study.user_attrs["fingerprint"] == made
    raw = optuna.load_study(study_name="s", storage=f"sqlite:///{rows / 'out.db'}")
    assert raw.user_attrs["fingerprint"] == stored_facts(made)


def test_a_text_of_the_command_line_and_the_dashboard() -> None:
    text = read_text("--text", '{source = "c4", draw = "random", sections = 3}', 64)
    assert (text.windows, text.tokens) == (3, 64)
    assert facts_of({"fingerprint": {"sparseness": 0.6}}) == {"sparsity": 0.6, "trials": "not known yet"}
