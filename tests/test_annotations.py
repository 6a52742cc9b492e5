import json
import re
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from families import few
from plans import planned
from tinystudy import CommandLine, run, stored, study_file

from atp_tune.config.best import Config, ZeroShot, read_config
from atp_tune.errors import UserError
from atp_tune.metrics import Speed
from atp_tune.results.annotations import attach, attached, study_of
from atp_tune.results.stored import best_config

SCORES = ZeroShot(tasks=(), mean={}, dtype="float32", device="cpu", seconds={"dense": 1.0}, versions={"torch": "2.6.0"})
FOUND = {
    "sizes": {"dense": 9, "sparse": 9, "dense_zstd": 8, "sparse_zstd": 5},
    "zeros": {"self_attn.q_proj": 0.5},
    "engines": [],
}
NEWER = {**FOUND, "zeros": {"self_attn.q_proj": 0.75}}
SPEED = Speed.model_validate(FOUND)


def best_of(place: Path) -> tuple[Path, Config]:
    return place / "tiny.best.json", read_config(place / "tiny.best.json")


def test_what_was_found_is_in_the_file_and_on_the_study(done: Path) -> None:
    path, config = best_of(done)
    assert attach(path, config, "speed", FOUND) == [str(path), "study tiny"]
    assert read_config(path) == config.model_copy(update={"speed": SPEED})
    assert stored(done).user_attrs["speed"] == {str(config.trial): FOUND}
    assert attached(stored(done), config.trial) == {"speed": FOUND}
    assert attached(stored(done), config.trial + 1) == {}


MEASURED = {
    **FOUND,
    "engines": [
        {
            "engine": "torch", "version": "2.6", "dtype": "float32", "device": "a <CPU>", "cores": 2, "tokens": 8,
            "steps": 4, "logits": None, "prefill": {"dense": [10, 20, 30], "sparse": [20, 40, 30]},
            "decode": {"dense": [5], "sparse": [4]},
        }
    ],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", few(["html", "md", "json"], ["md"]))
def test_speed_is_shown_by_status_and_in_reports(kind: str, done: Path, command: CommandLine) -> None:
    path, config = best_of(done)
    report = ("report", "--study", done / "tiny.toml", "--out", done / f"report.{kind}")
    assert command(*report).code == 0
    assert "tokens per second" not in (done / f"report.{kind}").read_text()
    attach(path, config, "speed", MEASURED)
    assert command(*report).code == 0
    text = (done / f"report.{kind}").read_text()
    if kind == "json":
        assert json.loads(text)["studies"][0]["speed"]["engines"][0]["decode"] == {"dense": [5], "sparse": [4]}
    else:
        for shown in (
            "Size and speed",
            "2.00 (1.00 to 2.00)× as fast",
            "0.80 (0.80 to 0.80)× as fast",
            "prefill, tokens per second: torch, float32",
        ):
            assert shown in text
        assert "<CPU>" not in text
    shown = command("status", "--study", done / "tiny.toml").out
    assert re.search(
        r"decode, tokens per second: torch, float32 +\| +5\.0 +\| +4\.0 +\| 0\.80 \(0\.80 to 0\.80\)× as fast", shown
    )


@pytest.mark.slow
def test_what_is_written_again_keeps_it(done: Path, command: CommandLine) -> None:
    path, config = best_of(done)
    attach(path, config, "speed", FOUND)
    attach(path, config, "zero_shot", SCORES)
    path.unlink()
    command("export", "--study", done / "tiny.toml")
    found = read_config(path)
    assert (found.speed, found.zero_shot) == (SPEED, SCORES)
    path.unlink()
    run(done)  # is complete, and writes its best down
    assert read_config(path) == found


def test_a_file_keeps_what_its_study_does_not_know(done: Path) -> None:
    path, config = best_of(done)
    (done / "tiny.db").rename(done / "away.not")
    assert attach(path, config, "speed", FOUND) == [str(path)]
    (done / "away.not").rename(done / "tiny.db")
    assert best_config(study_file(done), stored(done), path).speed == SPEED
    assert best_config(study_file(done), stored(done), done / "other.json").speed is None


def test_another_best_does_not_inherit_it(done: Path) -> None:
    path, config = best_of(done)
    other = config.model_copy(update={"trial": config.trial - 1, "speed": SPEED})
    other.write(path)
    assert best_config(study_file(done), stored(done), path).speed is None


def test_a_file_that_has_changed_meanwhile(done: Path) -> None:
    """Others may attach to it, or write the next best into it, while something is measured."""
    path, config = best_of(done)
    attach(path, config, "zero_shot", SCORES)
    attach(path, config, "speed", FOUND)
    assert read_config(path).zero_shot == SCORES
    next_best = config.model_copy(update={"trial": config.trial + 1})
    next_best.write(path)
    assert attach(path, config, "speed", NEWER) == ["study tiny"]
    assert read_config(path) == next_best
    assert attached(stored(done), config.trial)["speed"] == NEWER


def test_a_disk_that_is_full_keeps_the_old_file(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, config = best_of(done)
    before = path.read_bytes()

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", refuse)
    with pytest.raises(UserError, match="No space left on device"):
        attach(path, config, "speed", FOUND)
    assert path.read_bytes() == before


# --- where the study is


def test_a_study_is_found_beside_the_file_and_beside_its_study_file(done: Path, tmp_path: Path) -> None:
    path, config = best_of(done)
    (done / "tiny.db").rename(done / "label.db")  # as a study with another name in the storage
    assert study_of(path, config) is not None
    elsewhere = tmp_path / "out" / "best.json"
    best_config(study_file(done), study_of(path, config) or stored(done), elsewhere).write(elsewhere)
    assert study_of(elsewhere, read_config(elsewhere)) is not None
    shutil.copyfile(path, tmp_path / "out" / "moved.json")
    assert study_of(tmp_path / "out" / "moved.json", config) is None


def test_a_storage_by_name(done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, config = best_of(done)
    monkeypatch.chdir(tmp_path)
    (done / "tiny.db").rename(tmp_path / "moved.db")
    assert attach(path, config, "speed", FOUND, "sqlite:///moved.db") == [str(path), "study tiny"]
    with pytest.raises(UserError) as caught:
        study_of(path, config, "sqlite:///none.db")
    assert str(caught.value) == (
        f"--storage sqlite:///none.db: has no study tiny whose trial {config.trial} is that of {path}"
    )


@pytest.mark.parametrize(
    "changed",
    [{"trial": 99}, {"plan": planned("wanda", "atp", (0.5,) * 4)}],
)
def test_another_study_of_the_same_name_is_left_alone(done: Path, changed: dict[str, object]) -> None:
    path, config = best_of(done)
    assert study_of(path, config.model_copy(update=changed)) is None


def test_databases_of_others_are_left_as_they_are(done: Path) -> None:
    path, config = best_of(done)
    (done / "tiny.db").unlink()
    with closing(sqlite3.connect(done / "a.db")) as database:
        database.execute("CREATE TABLE mine (x)")
    (done / "b.db").write_bytes(b"no database")
    (done / "c.db").mkdir()
    before = (done / "a.db").read_bytes()
    assert study_of(path, config) is None
    assert (done / "a.db").read_bytes() == before
    assert (done / "b.db").read_bytes() == b"no database"


# --- what strangers may have stored


@pytest.mark.parametrize(
    "value",
    [
        3,
        "x",
        {"0": 3},
        {"x": {}},
        {"0": {**FOUND, "zeros": {"\ud800": 0.5}}},
        {"0": {**FOUND, "zeros": {"x": float("nan")}}},
    ],
)
def test_what_is_not_of_its_kind_is_as_if_it_were_not_there(done: Path, value: object) -> None:
    path, config = best_of(done)
    study = stored(done)
    text = json.dumps(value).replace('"0"', f'"{config.trial}"')
    study.set_user_attr("speed", json.loads(text))
    assert best_config(study_file(done), stored(done), done / "new.json").speed is None
    assert attach(path, config, "speed", FOUND) == [str(path), "study tiny"]
    assert attached(stored(done), config.trial) == {"speed": FOUND}
