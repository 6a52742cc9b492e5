"""What trackers get of a study, read back with their own tools; and that none of them stops it."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tinystudy import CommandLine, settings, stored

from atp_tune.cli.tracking import TRACKERS
from atp_tune.results.summary import summarise

FEW = settings("texts.calibration.nsamples=2", "texts.validation.nsamples=4", "texts.test.nsamples=4")
ROWS = list[tuple[int, float]]  # steps and values
BLOCK = 1 << 15
pytestmark = pytest.mark.slow


def from_tensorboard(place: Path) -> dict[str, ROWS]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator").EventAccumulator
    read = accumulator(str(place / "tiny.tensorboard"), size_guidance={"scalars": 0})
    read.Reload()
    return {tag: [(event.step, event.value) for event in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def from_mlflow(place: Path) -> dict[str, ROWS]:
    client = pytest.importorskip("mlflow").MlflowClient(tracking_uri=f"sqlite:///{place / 'tiny.mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("atp_tune").experiment_id])
    assert (run.info.run_name, run.info.status) == ("tiny", "FINISHED")
    return {
        name: [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, name)]
        for name in run.data.metrics
    }


def logged(content: bytes) -> Iterator[bytes]:
    """The records of a file of wandb: after 7 bytes LevelDB's log, in blocks of 32 KiB that split records."""
    assert content.startswith(b":W&B")
    at, parts = 7, b""
    while at + 7 <= len(content):
        if (left := BLOCK - at % BLOCK) < 7:
            at += left
            continue
        size, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        parts += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def from_wandb(place: Path) -> dict[str, ROWS]:
    """From the files of all offline runs, which have one id."""
    records = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    found: dict[str, ROWS] = {}
    files = sorted((place / "tiny.wandb").rglob("*.wandb"))
    assert len({file.name for file in files}) == 1
    for file in files:
        for content in logged(file.read_bytes()):
            record = records.Record()
            record.ParseFromString(content)
            row = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            for name, value in row.items():
                if name != "plan":
                    found.setdefault(name, []).append((int(row["trial"]), value))
            for item in record.summary.update:
                key = item.key or ".".join(item.nested_key)
                if key.startswith("final/"):
                    found[key] = [(-1, json.loads(item.value_json))]
    return found


READERS: dict[str, Callable[[Path], dict[str, ROWS]]] = {
    "tensorboard": from_tensorboard, "mlflow": from_mlflow, "wandb": from_wandb,
}  # fmt: skip


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("CONFIG", "CACHE", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "wandb"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def track(command: CommandLine, place: Path, *words: str | Path) -> Any:
    return command.ok("--study", place / "tiny.toml", *FEW, *words)


@pytest.mark.parametrize("name", READERS)
def test_each_trial_is_written_once_over_resumed_runs(name: str, place: Path, command: CommandLine) -> None:
    pytest.importorskip(name)
    said = [
        line for line in track(command, place, "--track", name, "--trials", "2").out.splitlines() if "--track" in line
    ]
    assert len(said) == 1  # where it writes; it did not fail
    assert str(place / "tiny.") in said[0]
    track(command, place, "--trials", "3")  # what an untracked run did is written by the next
    track(command, place, "--track", name, "--trials", "4")
    track(command, place, "--track", name)  # complete: nothing is new
    found, study = READERS[name](place), stored(place)
    perplexities = [trial.values[0] for trial in study.trials]
    assert [step for step, _ in found["trial/perplexity"]] == [0, 1, 2, 3]
    assert [value for _, value in found["trial/perplexity"]] == pytest.approx(perplexities, rel=1e-6)
    assert [value for _, value in found["best/perplexity"]] == pytest.approx(
        [min(perplexities[: k + 1]) for k in range(4)], rel=1e-6
    )
    betas = [(trial.number, pytest.approx(trial.params["beta"])) for trial in study.trials if "beta" in trial.params]
    assert found["parameters/beta"] == betas
    summary = summarise(study)
    assert (
        summary.results.score("dense", "validation")
        and summary.results.score(summary.best_trial, "test")
        and summary.best_trial
    )
    assert found["baseline/dense"][-1][1] == pytest.approx(summary.results.score("dense", "validation").value, rel=1e-6)
    assert {"trial/perplexity_stderr", "baseline/uniform", "final/test/uniform", "trial/seconds"} <= found.keys()
    assert found["final/test/best"][-1][1] == pytest.approx(
        summary.results.score(summary.best_trial, "test").value, rel=1e-6
    )
    assert found["final/best_trial"][-1][1] == summary.best_trial.number
    for key, rows in found.items():
        assert max(Counter(step for step, _ in rows).values()) == 1, key


class Fails:
    place = "nowhere"

    def __init__(self, *study: Any) -> None:
        pass

    def steps(self, name: str) -> set[int]:
        return set()

    def log(self, *record: Any) -> None:
        raise OSError("disk\nfull")


def test_a_tracker_that_fails_is_said_once(place: Path, command: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TRACKERS, "mlflow", Fails)
    answer = track(command, place, "--track", "mlflow", "--track", "tensorboard", "--trials", "3")
    assert answer.out.count("--track mlflow: OSError: disk full; the study goes on without it\n") == 1
    assert len(from_tensorboard(place)["trial/perplexity"]) == 3


def test_what_a_tracker_cannot_write_is_said(place: Path, command: CommandLine) -> None:
    (place / "tiny.tensorboard").write_text("mine")
    assert track(command, place, "--track", "tensorboard", "--trials", "2").out.count("--track tensorboard: ") == 1
    assert (place / "tiny.tensorboard").read_text() == "mine"
