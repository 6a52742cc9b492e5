"""Resuming a study on another device or in another number format: by name only, and shown."""

import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from expect import slow
from optuna.storages import BaseStorage
from test_serving import served
from tinystudy import CommandLine, copied, copy_of, run

from atp_tune.config.best import read_config
from atp_tune.results.formatting import study_remarks, trial_remark
from atp_tune.results.goals import best_trial
from atp_tune.results.summary import summarise
from atp_tune.storage import opening

GPU = "NVIDIA H100 80GB HBM3"


@pytest.fixture(scope="module")
def made(tiny_place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of three trials, of which two are measured in float32 on the CPU; to be read only."""
    with copied(tiny_place, tmp_path_factory) as place:
        run(place, "search.trials=2")
        return place


began = copy_of("made")


def on_gpu(place: Path) -> None:
    """As if the trials so far had been measured on a GPU."""
    with closing(sqlite3.connect(place / "tiny.db")) as connection:
        query = "UPDATE trial_user_attributes SET value_json = ? WHERE key = 'device'"
        assert connection.execute(query, (json.dumps(GPU),)).rowcount == 2
        connection.commit()


@slow
def test_another_number_format(began: Path, command: CommandLine) -> None:
    words = ["--study", str(began / "tiny.toml"), "--trials", "3", "--set", "model.dtype=bfloat16"]
    assert command(*words).error == (
        'study tiny: model.dtype is "bfloat16", was "float32". Put it back, or start another study with '
        "--study-name NAME, or mix them in this one with --allow-device-change"
    )
    command.ok(*words, "--allow-device-change")
    study = opening.find_study(open_db(began), "tiny")
    assert study is not None
    assert [trial.user_attrs["dtype"] for trial in study.trials] == ["float32", "float32", "bfloat16"]
    assert study.user_attrs["fingerprint"]["model.dtype"] == "float32"
    best = best_trial(study)
    assert best is not None
    assert read_config(began / "tiny.best.json").model.dtype == best.user_attrs["dtype"]
    command("report", "--study", began / "tiny.toml", "--format", "json", "--out", began / "r.json")
    trials = json.loads((began / "r.json").read_text())["studies"][0]["trials"]
    assert [trial["remark"] for trial in trials] == [None, None, "in bfloat16"]


def open_db(place: Path) -> BaseStorage:
    db = opening.open_storage(f"sqlite:///{place / 'tiny.db'}", create=False)
    assert db is not None
    return db


@slow
def test_another_device(began: Path, command: CommandLine) -> None:
    on_gpu(began)
    words = ["--study", str(began / "tiny.toml")]
    assert command(*words, "--trials", "3").error == (
        f"study tiny: its trials ran on {GPU}, here is cpu. Go on there, start another study with --study-name NAME, "
        "or mix them in this one with --allow-device-change"
    )
    answer = command.ok(*words, "--trials", "3", "--allow-device-change")
    sentence = (
        "1 of 3 trials ran on cpu: perplexities of different devices differ in the last digits, "
        "those of different number formats by per cents."
    )
    assert sentence in answer.out
    assert "on cpu" in command("status", *words).out
    for kind in ("html", "md"):
        command("report", *words, "--out", began / f"r.{kind}")
        assert sentence in (began / f"r.{kind}").read_text()
    with served(began / "tiny.db") as dashboard:
        shown = dashboard.study("tiny")
    assert sentence in shown["note"]["body"]
    assert [("Remark: on cpu." in trial["note"]["body"]) for trial in shown["trials"]] == [False, False, True]


@slow
def test_trials_of_before_have_no_remark(began: Path) -> None:
    """Early trials did not record their number format."""
    with closing(sqlite3.connect(began / "tiny.db")) as connection:
        connection.execute("DELETE FROM trial_user_attributes WHERE key = 'dtype'")
        connection.commit()
    study = opening.find_study(open_db(began), "tiny")
    assert study is not None
    summary = summarise(study)
    assert study_remarks(summary) == []
    assert [trial_remark(trial, summary) for trial in summary.trials] == ["", ""]
