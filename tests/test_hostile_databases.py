"""Names and databases of strangers: they reach no file outside their folder, no terminal, and no page."""

import json
import os
import random
import re
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import optuna
import pytest
from expect import parametrize, refused, slow
from families import few
from fuzzing import Choices
from optuna.trial import TrialState
from test_serving import served
from tinystudy import CommandLine, run

from atp_tune.storage import opening, progress
from atp_tune.storage.attributes import FOREIGN

SEEDS = int(os.environ.get("ATP_TUNE_FUZZ_RUNS", "10"))  # runs on damaged databases
ESCAPES = "\x1b[2J\x9b31m\u202e"
HTML = "<img src=x onerror=alert(1)>"


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


ARTIFACTS = re.compile(r"(tiny|done)/tiny\.artifacts(/[0-9a-f-]{36})?")
NAMES = ["../../x", "/tmp/x", "..", ".", "-x", "a b", "a/../../b", "~", "é", "x" * 200]


@slow
@parametrize("name", few(NAMES, ["../../x"]))
def test_a_name_stays_in_its_folder(name: str, place: Path, command: CommandLine) -> None:
    before = files(place.parent)
    command.ok("--study", place / "tiny.toml", f"--study-name={name}", "--trials", "1")
    for kind in ("html", "md"):
        command.ok("report", "--study", place / "tiny.toml", f"--study-name={name}", "--format", kind)
    plain = name.replace("/", "_")
    made = {
        f"tiny/{end}" for end in ("tiny.db", *(f"{plain}{x}" for x in (".best.json", ".report.html", ".report.md")))
    }
    new = {path for path in files(place.parent) - before if not path.startswith("cache")}
    assert {path for path in new if not ARTIFACTS.fullmatch(path)} == made


@parametrize("name", ["", "a\nb", "a\x1b[2Jb", "x" * 201, "a\udcff", "\u202e", "a\tb"])
def test_a_name_that_no_study_gets(name: str, place: Path, command: CommandLine) -> None:
    with refused("its name must have 1 to 200 bytes, all printable") as caught:
        run(place, name=name)
    assert str(caught.value).isprintable()
    assert not (place / "tiny.db").exists()


# A database that somebody hands over


def change(database: Path, query: str, *values: Any) -> None:
    with closing(sqlite3.connect(database)) as connection:
        assert connection.execute(query, values).rowcount
        connection.commit()


def study_of(done: Path, name: str = "tiny") -> optuna.Study:
    db = opening.open_storage(f"sqlite:///{done / 'tiny.db'}", create=False)
    assert db is not None
    study = opening.find_study(db, name)
    assert study is not None
    return study


@pytest.fixture
def hostile(done: Path) -> Path:
    """A study whose name, attributes and parameters act on terminals, Markdown and HTML."""
    name = f"a{ESCAPES}`{HTML}\n# b|$x$"
    change(done / "tiny.db", "UPDATE studies SET study_name = ?", name)
    words = json.dumps(f"{ESCAPES}{HTML}\n\n# `x` | y")
    change(done / "tiny.db", "UPDATE trial_user_attributes SET value_json = ? WHERE key IN ('device', 'host')", words)
    change(done / "tiny.db", "UPDATE trials SET state = 'FAIL' WHERE number = 5")
    change(
        done / "tiny.db",
        "INSERT INTO trial_user_attributes (trial_id, key, value_json) SELECT trial_id, 'failure', ? FROM trials",
        words,
    )
    made = study_of(done, name).user_attrs["made_from"]
    made["settings"]["description"] = json.loads(words)
    made["name"] = f"{HTML}\n```"
    study_of(done, name).set_user_attr("made_from", made)
    return done


def name_in(place: Path) -> str:
    with closing(sqlite3.connect(place / "tiny.db")) as connection:
        return str(connection.execute("SELECT study_name FROM studies").fetchone()[0])


@slow
def test_a_terminal_shows_it_and_does_not_act_on_it(hostile: Path, command: CommandLine) -> None:
    words = ("--study", hostile / "tiny.toml", "--study-name", name_in(hostile))
    for answer in (command("status", *words), command("status", *words, "--json"), command("export", *words)):
        shown = answer.out + answer.err
        assert shown
        assert not {char for char in shown if not char.isprintable()} - {"\n", "\u202e"}
    assert "\\x1b[2J" in command("status", *words).out
    assert "\n# b" not in command("status", *words).out


@slow
def test_the_dashboard_shows_it_as_text(hostile: Path) -> None:
    with served(hostile / "tiny.db") as dashboard:
        (found,) = dashboard.studies()
        shown = dashboard.study(found)
    notes = [shown["note"]["body"], *(trial["note"]["body"] for trial in shown["trials"])]
    for note in notes:
        without_code = re.sub(r"(`{3,})\n.*?\n\1|`[^`\n]*`", "", note.replace("\\`", ""), flags=re.DOTALL)
        assert "\x1b" not in note
        assert not re.search(r"(?<!\\)<", without_code)
        assert "\n# " not in note.replace("\n# b|$x$", "")
    assert sum("onerror" in note for note in notes) > 1


def test_a_trial_that_is_not_of_a_study_has_failed(done: Path) -> None:
    change(done / "tiny.db", "UPDATE trial_values SET value = -5 WHERE trial_id = 3")
    change(
        done / "tiny.db",
        "UPDATE trial_system_attributes SET value_json = 7 WHERE trial_id = 4 AND key = 'atp_tune:nlls'",
    )
    study = study_of(done)
    assert study.trials[2].state == TrialState.FAIL
    assert study.trials[2].user_attrs == {"failure": FOREIGN}
    assert study.trials[3].value is not None
    assert "nlls" not in study.trials[3].user_attrs
    assert [trial.number for trial in study.get_trials(states=(TrialState.FAIL,))] == [2]


def test_the_database_of_another_program_is_left_as_it_is(done: Path, command: CommandLine) -> None:
    """Also where a link leads to it: Optuna would make its tables there."""
    with closing(sqlite3.connect(done / "other.db")) as connection, connection:
        connection.execute("CREATE TABLE cookies (name TEXT)")
    before = (done / "other.db").read_bytes()
    (done / "tiny.db").unlink()
    (done / "tiny.db").symlink_to(done / "other.db")
    for words in (("status",), ("export",), ("report",), ()):
        assert "is another program's database" in command(*words, "--study", done / "tiny.toml").error
    assert (done / "other.db").read_bytes() == before


CELLS = {  # table → columns that a run reads
    "study_user_attributes": ("key", "value_json"),
    "study_system_attributes": ("key", "value_json"),
    "trial_user_attributes": ("key", "value_json"),
    "trial_system_attributes": ("key", "value_json"),
    "trial_params": ("param_name", "param_value", "distribution_json"),
    "trial_values": ("value", "value_type"),
    "trials": ("state", "number", "datetime_start", "datetime_complete"),
    "trial_heartbeats": ("heartbeat",),
}


def put_junk(database: Path, choose: Choices) -> None:
    """One cell of a study's database becomes what no program of ours would write there."""
    table = list(CELLS)[choose(len(CELLS))]
    column = CELLS[table][choose(len(CELLS[table]))]
    value = choose.junk()
    is_json = column == "value_json" or not isinstance(value, str | int | float | None)
    with closing(sqlite3.connect(database)) as connection, connection:
        rows = connection.execute(f"SELECT rowid FROM {table} ORDER BY rowid").fetchall()
        if rows:
            try:
                connection.execute(
                    f"UPDATE {table} SET {column} = ? WHERE rowid = ?",
                    (json.dumps(value) if is_json else value, *rows[choose(len(rows))]),
                )
            except (sqlite3.IntegrityError, OverflowError, UnicodeEncodeError):  # the database itself refuses it
                return


@pytest.fixture
def open_study(done: Path) -> Path:
    """A finished study that was asked for one trial more, which another machine runs, and for one that waits."""
    study = study_of(done)
    best = progress.measured(study)[0]
    for state, beta in ((TrialState.RUNNING, 0.03), (TrialState.WAITING, 0.04)):
        params = {**best.params, "beta": beta}
        gone = {"host": "here", "pid": 1, "process_started": 1.0}
        queued = {"fixed_params": params, "retry_history": [1]}
        trial = optuna.create_trial(
            state=state, params=params, distributions=best.distributions, user_attrs=gone, system_attrs=queued
        )
        study.add_trial(trial)
    study._storage.record_heartbeat(study.trials[-2]._trial_id)  # type: ignore[attr-defined]
    change(done / "tiny.db", "UPDATE trial_heartbeats SET heartbeat = datetime('now', '-1 hour')")
    return done


@slow
@parametrize("seed", range(SEEDS))
def test_a_run_on_a_damaged_database_ends_well_or_in_one_line(
    seed: int, open_study: Path, command: CommandLine
) -> None:
    choose = Choices(random.Random(seed).randbytes(64))
    for _ in range(1 + choose(3)):
        put_junk(open_study / "tiny.db", choose)
    before = files(open_study.parent)
    answer = command("--study", open_study / "tiny.toml", "--trials", "8")
    assert answer.code in (0, 2)
    assert answer.code == 0 or answer.error.isprintable()
    new = {path for path in files(open_study.parent) - before if not path.startswith("cache")}
    assert new <= {"done/tiny.artifacts"}
