"""What Optuna's own `optuna-dashboard` shows of a study that a run has written, without `serve`."""

import json
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from expect import slow
from processes import popen
from tinystudy import HANGS, free_port, run, wait_until

from atp_tune.events import Event, Message
from atp_tune.search import runner
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


@slow
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


@slow
def test_a_run_publishes_a_new_best(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """During the run too, if the last time is long ago; each time one transaction."""
    monkeypatch.setattr(runner, "PUBLISH", 0)
    versions: list[int] = []
    wrote = Database.set_study_system_attrs

    def watched(self: Database, study_id: int, attributes: dict[str, Any]) -> None:
        wrote(self, study_id, attributes)
        versions.append(attributes["dashboard:note_ver"])

    monkeypatch.setattr(Database, "set_study_system_attrs", watched)
    run(place)
    assert versions == list(range(1, len(versions) + 1))
    assert len(versions) > 1


@slow
def test_what_cannot_be_written_is_said_and_ends_no_run(place: Path) -> None:
    (place / "elsewhere").mkdir()
    (place / "tiny.artifacts").symlink_to(place / "elsewhere")
    heard: list[Event] = []
    assert len(run(place, watch=heard.append).trials) == 3
    said = [event.text for event in heard if isinstance(event, Message) and event.text.startswith("warning")]
    assert len(said) == 1
    assert "tiny.artifacts: is a link to" in said[0]
    assert not list((place / "elsewhere").iterdir())
