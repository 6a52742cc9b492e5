import json
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import optuna
import pytest
from expect import parametrize, refusal, slow
from optuna.artifacts import FileSystemArtifactStore, get_all_artifact_meta, upload_artifact
from optuna.trial import FrozenTrial, TrialState
from synthetic import DISTRIBUTIONS, made_up, new_study, storage_in
from tinystudy import CommandLine, run, stored

from atp_tune.api import merging
from atp_tune.api.merging import Share, merge
from atp_tune.report.servers import Maintenance
from atp_tune.results.goals import best_trial
from atp_tune.results.summary import summarise

pytestmark = pytest.mark.usefixtures("without_warnings")


def united(out: Path, *files: Path, name: str | None = None) -> tuple[optuna.Study, list[Share]]:
    return merge([str(file) for file in files], out, name)


def same(trial: FrozenTrial) -> tuple[Any, ...]:
    """All of a trial but its number and id."""
    return (
        trial.state, trial.values, trial.params, trial.distributions, trial.user_attrs, trial.system_attrs,
        trial.intermediate_values, trial.datetime_start, trial.datetime_complete,
    )  # fmt: skip


def left_alone(out: Path, *files: Path, name: str | None = None) -> str:
    before = {file: file.read_bytes() for file in files if file.is_file()}
    said = refusal(united, out, *files, name=name)
    assert {file: file.read_bytes() for file in before} == before
    assert [path for path in out.parent.iterdir() if path.name.startswith(".")] == []
    return said


@slow
def test_a_study_and_its_copy_are_the_study(done: Path, tmp_path: Path) -> None:
    shutil.copyfile(done / "tiny.db", tmp_path / "copy.db")
    study, shares = united(tmp_path / "new" / "out.db", done / "tiny.db", tmp_path / "copy.db")
    before = study_of(done / "tiny.db")
    assert [share.known for share in shares] == [0, 6]
    assert [(t.number, *same(t)) for t in study.trials] == [(t.number, *same(t)) for t in before.trials]
    assert study.user_attrs == before.user_attrs
    assert summarise(study) == summarise_as(before, study)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out.db"]


def summarise_as(study: optuna.Study, other: optuna.Study) -> Any:
    """The summary of a study, with the other's ids of its trials."""
    for trial, twin in zip(study.get_trials(deepcopy=False), other.get_trials(deepcopy=False), strict=True):
        trial._trial_id = twin._trial_id
    return summarise(study)


def study_of(file: Path, name: str = "tiny") -> optuna.Study:
    return stored(file.parent, name, file)


@slow
def test_three_machines_that_went_on_from_a_copy(place: Path, tmp_path: Path, command: CommandLine) -> None:
    run(place, "search.trials=2")
    files = [place / "tiny.db"]
    for index in (1, 2):
        files.append(tmp_path / f"{index}.db")
        shutil.copyfile(place / "tiny.db", files[-1])
    for index, file in enumerate(files):
        run(place, f"search.trials={3 + index}", f"storage=sqlite:///{file}")
    assert command("merge", *files, "--out", tmp_path / "out.db").out.splitlines() == [
        f"{files[0]}: 3 trials",
        f"{files[1]}: 4 trials, 2 of them known already",
        f"{files[2]}: 5 trials, 2 of them known already",
        f"{tmp_path / 'out.db'}: 8 trials, 8 of 8 done",
        f"resume: python tune.py --study tiny --storage sqlite:///{tmp_path / 'out.db'}",
    ]
    study = study_of(tmp_path / "out.db")
    begins = [trial.datetime_start for trial in study.trials]
    assert begins == sorted(begins, key=str)
    assert [trial.number for trial in study.trials] == list(range(8))
    sources = [study_of(file) for file in files]
    for source in sources:
        for name, nlls in source.user_attrs["test_nlls"].items():
            if name != "dense":
                twin = next(t for t in study.trials if same(t) == same(source.trials[int(name)]))
                assert study.user_attrs["test_nlls"][str(twin.number)] == nlls
    best = min((trial for source in sources for trial in source.trials), key=lambda trial: trial.value or 0)
    assert best_trial(study) is not None
    assert study.best_value == best.value


# --- made up studies


def made(file: Path, *trials: FrozenTrial, **attributes: Any) -> optuna.Study:
    study = new_study(file)
    study.add_trials(trials)
    for name, value in attributes.items():
        study.set_user_attr(name, value)
    return study


@slow
def test_what_names_trials_by_number_follows(tmp_path: Path) -> None:
    first, second = made_up(0.0), made_up(0.001)
    failed = made_up(0.02, state=TrialState.FAIL, failure="out of memory")
    again = made_up(0.02, state=TrialState.FAIL, failure="failed before, as trial 0: out of memory")
    lost = made_up(0.003, state=TrialState.FAIL, lost="its process died")
    retried = made_up(0.003)
    retried.system_attrs = {"failed_trial": 2, "retry_history": [2]}
    repeated = made_up(0.003, repeats=3)
    belief = {"before": 4, "curves": {}}
    of_a = {"test_nlls": {"dense": [1.0], "1": [1.5]}, "speed": {"0": {"x": 1}, "1": {"x": 2}}}
    of_b = {"test_nlls": {"dense": [2.0], "3": [2.5]}, "speed": {"3": {"x": 3}}, "zero_shot": {"4": {"x": 4}}}
    made(tmp_path / "a.db", first, second, gp_posterior={"before": 2, "curves": {}}, **of_a)
    made(tmp_path / "b.db", failed, again, lost, retried, repeated, gp_posterior=belief, **of_b)
    study = united(tmp_path / "out.db", tmp_path / "b.db", tmp_path / "a.db")[0]
    assert [trial.params["beta"] for trial in study.trials] == [0.0, 0.001, 0.02, 0.02, 0.003, 0.003, 0.003]
    assert study.user_attrs["test_nlls"] == {"dense": [2.0], "1": [1.5], "5": [2.5]}
    assert study.user_attrs["speed"] == {"0": {"x": 1}, "1": {"x": 2}, "5": {"x": 3}}
    assert study.user_attrs["zero_shot"] == {"6": {"x": 4}}
    assert study.user_attrs["gp_posterior"] == belief
    assert study.trials[3].user_attrs["failure"] == "failed before, as trial 2: out of memory"
    assert study.trials[5].system_attrs == {"failed_trial": 4, "retry_history": [4]}
    assert study.trials[6].user_attrs["repeats"] == 5
    assert study.user_attrs["total"] == 16


@slow
def test_trials_that_have_not_ended_stay_where_they_are(tmp_path: Path, command: CommandLine) -> None:
    waiting = optuna.create_trial(
        state=TrialState.WAITING, params={"beta": 0.1}, distributions={"beta": DISTRIBUTIONS["beta"]}
    )
    running = optuna.create_trial(state=TrialState.RUNNING)
    made(tmp_path / "a.db", made_up(0.0), running, waiting, made_up(0.002))
    made(tmp_path / "b.db", made_up(0.001))
    answer = command("merge", tmp_path / "a.db", tmp_path / "b.db", "--out", tmp_path / "out.db")
    assert answer.out.splitlines()[0] == f"{tmp_path / 'a.db'}: 2 trials; 2 running or waiting trials are left out"
    study = study_of(tmp_path / "out.db", "made-up")
    assert [trial.params["beta"] for trial in study.trials] == [0.0, 0.002, 0.001]


@slow
def test_artifacts_come_along(done: Path, tmp_path: Path) -> None:
    (tmp_path / "sketch.txt").write_text("of the study")
    (tmp_path / "trial.txt").write_text("of a trial")
    files = [done / "tiny.db", tmp_path / "other.db"]
    shutil.copyfile(*files)
    for file in files:
        folder = file.with_suffix(".artifacts")
        folder.mkdir(exist_ok=True)
        Maintenance(storage_in(file), folder, print).turn()
    study, store = study_of(files[1]), FileSystemArtifactStore(files[1].with_suffix(".artifacts"))
    upload_artifact(artifact_store=store, file_path=str(tmp_path / "sketch.txt"), study_or_trial=study)
    study.enqueue_trial({})
    trial = study.ask()
    upload_artifact(artifact_store=store, file_path=str(tmp_path / "trial.txt"), study_or_trial=trial)
    study.tell(trial, 99.0)
    (files[1].with_suffix(".artifacts") / "stray").write_text("of nobody")
    study.set_user_attr("note", "an attribute of my own")
    found = united(tmp_path / "out.db", files[1], files[0])[0]
    (own,), (of_trial,) = get_all_artifact_meta(found), get_all_artifact_meta(found.trials[-1], storage=found._storage)
    folder = tmp_path / "out.artifacts"
    assert (own.filename, (folder / own.artifact_id).read_text()) == ("sketch.txt", "of the study")
    assert (of_trial.filename, (folder / of_trial.artifact_id).read_text()) == ("trial.txt", "of a trial")
    assert len(list(folder.iterdir())) == 2
    united(tmp_path / "again.db", files[0], files[1])  # those of the second file come along too
    assert {path.name for path in (tmp_path / "again.artifacts").iterdir()} == {path.name for path in folder.iterdir()}
    assert found.metric_names == ["perplexity"]
    assert found.user_attrs["note"] == "an attribute of my own"


# --- databases of strangers

NAME = "01234567-89ab-cdef-0123-456789abcdef"


def meta_of(name: object, **changed: object) -> str:
    return json.dumps({"artifact_id": name, "filename": "x", "mimetype": "text/html", "encoding": None, **changed})


@slow
@parametrize("kind", ["artifacts:", "dashboard:artifacts:1:", "of a trial"])
def test_an_artifact_is_a_file_of_its_folder(kind: str, tmp_path: Path) -> None:
    """Names that lead out of it, and links, whether or not what they lead to is there."""
    home, folder = tmp_path / "home", tmp_path / "home" / "download" / "a" / "b"
    files, secret = folder / "there.artifacts", tmp_path / "home" / "secret"
    (files / "sub").mkdir(parents=True)
    (home / "work").mkdir()
    names = ["../../../../.bashrc", "../../../.bashrc", str(secret), "sub/x", "..", "", ".", f"{NAME}/../../../x", NAME]
    for place in (*home.glob("*"), folder, folder.parent, home):
        (place / ".bashrc").write_text("of a stranger" if place == folder else "mine")
    secret.write_text("mine")
    (files / NAME).symlink_to(secret)
    (files / "sub" / "x").write_text("x")
    study = made(folder / "there.db", made_up(0.0))
    made(folder / "here.db", made_up(0.001))
    for name in names:
        if kind == "of a trial":
            study._storage._backend.engine.dispose()  # type: ignore[attr-defined]
            set_trial_attr(folder / "there.db", f"artifacts:{name}", meta_of(name))
        else:
            study._storage.set_study_system_attr(study._study_id, f"{kind}{name}", meta_of(name))
    before = {path: path.read_bytes() for path in home.rglob("*") if path.is_file()}
    found = united(home / "work" / "both.db", folder / "here.db", folder / "there.db")[0]
    assert {path: path.read_bytes() for path in before} == before
    assert sorted(path.name for path in (home / "work").iterdir()) == [".bashrc", "both.db"]
    attrs = found._storage.get_study_system_attrs(found._study_id)
    kept = [key for keys in (attrs, *(trial.system_attrs for trial in found.trials)) for key in keys if "artif" in key]
    assert [key.rpartition(":")[2] for key in kept] == [NAME]


def set_trial_attr(database: Path, key: str, value: object) -> None:
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute(
            "INSERT INTO trial_system_attributes (trial_id, key, value_json) VALUES (1, ?, ?)", (key, json.dumps(value))
        )


# --- what is refused


@slow
def test_other_facts_are_named(tmp_path: Path) -> None:
    made(tmp_path / "a.db", made_up(0.0))
    study = made(tmp_path / "b.db", made_up(0.0))
    study.set_user_attr("fingerprint", {**study.user_attrs["fingerprint"], "sparsity": 0.7, "prune.damping": 1})
    assert left_alone(tmp_path / "out.db", tmp_path / "a.db", tmp_path / "b.db") == (
        f"merge: {tmp_path / 'b.db'} holds another study than {tmp_path / 'a.db'}: "
        "prune.damping is 1, was not set; sparsity is 0.7, was 0.6"
    )
    assert not (tmp_path / "out.db").exists()


def test_a_file_that_appears_meanwhile_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The artifacts were left beside another's file, and the error gave no advice."""
    out, write = tmp_path / "out.db", merging._write
    for name in ("one.db", "two.db"):
        new_study(tmp_path / name).add_trial(made_up(0.001))

    def while_another_writes(folder: Path, *arguments: Any) -> None:
        write(folder, *arguments)
        (folder / "artifacts").mkdir()
        out.write_text("another's")

    monkeypatch.setattr(merging, "_write", while_another_writes)
    assert left_alone(out, tmp_path / "one.db", tmp_path / "two.db").endswith("out.db exists; name a new file")
    assert out.read_text() == "another's" and not out.with_suffix(".artifacts").exists()
