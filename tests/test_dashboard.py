"""What Optuna's own `optuna-dashboard` shows of a study that a run has written, without `serve`."""

import json
import sqlite3
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna_dashboard import get_note, save_note
from processes import popen
from tinystudy import HANGS, free_port, run, stored, study_file, wait_until

from atp_tune.dashboard.publishing import publish, without_rests
from atp_tune.events import Event, Message
from atp_tune.search import trial_loop
from atp_tune.storage.attributes import PREFIX, joined
from atp_tune.storage.database import Database

# No more than six: a trial's page shows six lines, and the last by name is ± stderr.
COLUMNS = {"packed MB", "± stderr", "zeros %", "time (s)", "peak GB", "device", "host"}


@pytest.fixture
def plain(done: Path) -> Iterator[str]:
    """The address of `optuna-dashboard` on the database of a finished study, as a user starts it."""
    port, program = free_port(), Path(sys.executable).parent / "optuna-dashboard"
    address = f"http://127.0.0.1:{port}"
    command = [str(program), f"sqlite:///{done / 'tiny.db'}", "--port", str(port)]
    process = popen([*command, "--artifact-dir", str(done / "tiny.artifacts")])
    wait_until(lambda: process.poll() is not None or answers_http(address))
    yield address
    process.terminate()
    process.wait(HANGS)


def answers_http(address: str) -> bool:
    try:
        urllib.request.urlopen(address, timeout=HANGS).close()
    except OSError:
        return False
    return True


def get(address: str) -> Any:
    with urllib.request.urlopen(address, timeout=HANGS) as answer:
        return json.loads(answer.read())


@pytest.mark.slow
def test_the_plain_dashboard_shows_note_figures_and_files(plain: str, done: Path) -> None:
    study = get(f"{plain}/api/studies/1?after=0")
    assert study["note"]["body"].startswith("## tiny: `model` at 50% sparsity")
    assert "below uniform’s on the test text" in study["note"]["body"]
    figures = {figure["id"]: json.loads(figure["graph_object"]) for figure in study["plotly_graph_objects"]}
    assert sorted(figures) == ["error", "perplexity", "seconds", "sparsity"]
    assert all(figure["data"] for figure in figures.values())
    assert {attr["key"] for attr in study["union_user_attrs"]} == COLUMNS
    assert all(len(attr["value"]) < 60 for trial in study["trials"] for attr in trial["user_attrs"])
    assert all(len(attr["value"]) < 60 for attr in study["user_attrs"])
    assert {attr["key"] for attr in study["user_attrs"]} > {"model.source", "sparsity", "trials"}
    assert {artifact["filename"] for artifact in study["artifacts"]} == {"best.json"}


def test_the_note_names_a_study_file_outside_of_studies(done: Path) -> None:
    """Its name alone would find another file of that name, or none."""
    owner: Any = stored(done)
    note, file = get_note(owner), owner.user_attrs["made_from"]["path"]
    assert f"python tune.py --study {file}    # resume" in note
    assert "python tune.py --study tiny.toml --storage grpc://HOST:13000 " in note


@pytest.mark.slow
def test_a_later_run_replaces_the_note_and_keeps_own_words(done: Path) -> None:
    study = stored(done)
    owner: Any = study
    save_note(owner, get_note(owner) + "\nAsk Ada about trial 4.\n")
    run(done, "search.trials=7")
    note = get_note(owner)
    assert note.count("## tiny:") == 1
    assert "7 of 7 trials are done." in note
    assert note.endswith("Ask Ada about trial 4.\n")
    files = [key for key in study._storage.get_study_system_attrs(1) if key.startswith("artifacts:")]
    assert len(files) == len(list((done / "tiny.artifacts").iterdir())) == 1


@pytest.mark.slow
def test_a_run_publishes_a_new_best(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """During the run too, if the last time is long ago; each time one transaction."""
    monkeypatch.setattr(trial_loop, "PUBLISH", 0)
    versions: list[int] = []
    wrote = Database.set_study_system_attrs

    def watched(self: Database, study_id: int, attributes: dict[str, Any]) -> None:
        wrote(self, study_id, attributes)
        versions.append(attributes["dashboard:note_ver"])

    monkeypatch.setattr(Database, "set_study_system_attrs", watched)
    run(place)
    assert versions == list(range(1, len(versions) + 1))
    assert len(versions) > 1


@pytest.mark.slow
def test_what_cannot_be_written_is_said_and_ends_no_run(place: Path) -> None:
    (place / "elsewhere").mkdir()
    (place / "tiny.artifacts").symlink_to(place / "elsewhere")
    heard: list[Event] = []
    study = run(place, watch=heard.append)
    assert len(study.trials) == 3
    said = [event.text for event in heard if isinstance(event, Message) and event.text.startswith("warning")]
    assert len(said) == 1
    assert "tiny.artifacts: is a link to" in said[0]
    assert not list((place / "elsewhere").iterdir())


@pytest.mark.parametrize(
    "parts",
    [{"note_ver": 1, "note_str:3": "x"}, {"note_ver": "x"}, {"note_ver": [1], "note_str:0": 5}],
    ids=["without its first part", "an invalid version", "no text"],
)
def test_a_note_that_no_dashboard_writes_is_ignored(parts: dict[str, object], done: Path) -> None:
    study = stored(done)
    with closing(sqlite3.connect(done / "tiny.db")) as connection, connection:
        connection.execute("DELETE FROM study_system_attributes WHERE key LIKE 'dashboard:note%'")
    for key, value in parts.items():
        study._storage.set_study_system_attr(1, f"dashboard:{key}", value)
    publish(study, study_file(done).storage_url, None)
    assert "## tiny:" in study._storage.get_study_system_attrs(1)["dashboard:note_str:0"]


def test_attributes_are_written_together_or_not_at_all(done: Path) -> None:
    db = stored(done)._storage._backend  # type: ignore[attr-defined]
    before = db.get_study_system_attrs(1)
    with pytest.raises(TypeError):
        db.set_study_system_attrs(1, {"one": 1, "other": object()})
    assert db.get_study_system_attrs(1) == before


def test_a_figure_that_became_shorter_leaves_nothing_behind() -> None:
    stored_parts = {"dashboard:plot_data:a:0": "x", "dashboard:plot_data:a:1": "y", "dashboard:plot_data:b:0": "z"}
    made = without_rests({"dashboard:plot_data:a:0": "new"}, stored_parts)
    assert made == {"dashboard:plot_data:a:0": "new", "dashboard:plot_data:a:1": ""}


def test_details_are_apart_in_the_database_and_together_in_the_program(done: Path) -> None:
    plain = optuna.storages.RDBStorage(f"sqlite:///{done / 'tiny.db'}")
    trial = plain.get_all_trials(1)[0]
    plain.remove_session()
    plain.engine.dispose()
    assert set(trial.user_attrs) == COLUMNS
    assert f"{PREFIX}nlls" in trial.system_attrs
    own = stored(done).trials[0]
    assert (own.user_attrs, own.system_attrs) == joined(trial.user_attrs, trial.system_attrs)
    assert own.user_attrs["stderr"] == trial.system_attrs[f"{PREFIX}stderr"]
    assert not [key for key in own.system_attrs if key.startswith(PREFIX)]


@pytest.mark.slow
def test_a_study_of_version_0_1_is_published_when_it_is_run_again(done: Path) -> None:
    """One that was finished before notes were written."""
    study = stored(done)
    with closing(sqlite3.connect(done / "tiny.db")) as connection, connection:
        connection.execute("DELETE FROM study_system_attributes WHERE key LIKE 'dashboard:%'")
    run(done)
    assert "dashboard:note_ver" in study._storage.get_study_system_attrs(1)
    publish(study, study_file(done).storage_url, None)
