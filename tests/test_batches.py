"""The batch size as a fact of a study: kept on resuming, on other machines, and by what is made of its best trial."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from expect import slow
from families import same_bits
from safetensors.torch import load_file
from tinystudy import TOKENS, CommandLine, run, stored

from atp_tune.blocks import prune_pass, replay
from atp_tune.blocks.replay import Replay
from atp_tune.config.best import read_config
from atp_tune.events import Place
from atp_tune.folders.applying import apply
from atp_tune.results.summary import summarise

ELSEWHERE = 2  # windows of the tiny study's that go through a block at a time on a machine of less memory


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine whose own batches are smaller."""
    monkeypatch.setitem(replay.TOKENS, "cpu", ELSEWHERE * TOKENS)
    return monkeypatch


@pytest.fixture
def began(place: Path) -> Path:
    """A study of which two trials are measured, in the batches of this machine: all 8 calibration windows at once."""
    run(place, "search.trials=2")
    return place


def sizes(place: Path) -> list[tuple[int, int]]:
    """Calibration and validation windows at a time, trial by trial."""
    return [
        (t.user_attrs["batches"]["calibration"], t.user_attrs["batches"]["validation"]) for t in stored(place).trials
    ]


@slow
def test_a_study_is_resumed_in_its_own_batches(began: Path, elsewhere: pytest.MonkeyPatch) -> None:
    assert stored(began).user_attrs["batches"] == {"calibration": 8, "validation": 16, "test": 16, "heads": 64}
    run(began, "search.trials=3")
    assert [t.user_attrs["batches"]["calibration"] for t in stored(began).trials][2:] == [8]
    assert sizes(began) == [(8, 16)] * 3
    assert summarise(stored(began)).unlike == {}


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[int]]:
    """Numbers of calls that measure a block, where memory runs out unless half the windows are taken."""
    calls, chosen = [0], set[int]()
    measure = prune_pass.measure_and_advance

    def failing(replay: Replay, batch: replay.AutoBatch, *more: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] in chosen:
            batch.run(lambda windows: raised() if windows > 4 else None)
        return measure(replay, batch, *more, **options)

    def raised() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(prune_pass, "measure_and_advance", failing)
    yield chosen


@slow
def test_memory_that_runs_out_in_one_trial_changes_that_one_alone(
    place: Path, full: set[int], command: CommandLine
) -> None:
    full.add(5)  # the first of the four blocks of the second trial
    answer = command("--study", place / "tiny.toml", "--trials", "3")
    assert "memory ran out: going on with 4 windows at a time" in answer.out
    assert sizes(place) == [(8, 16), (4, 16), (8, 16)]
    remark = "in batches of 4 calibration windows"
    assert summarise(stored(place)).unlike == {1: remark}
    sentence = f"1 of 3 trials ran {remark}: perplexities of different devices differ in the last digits, those of "
    sentence += "different number formats by per cents, those of different batches by about 1 %."
    status = command("status", "--study", place / "tiny.toml").out
    assert sentence in answer.out and sentence in status
    assert status.count(remark) == 2  # in the trial's row too
    document = json.loads(command("status", "--study", place / "tiny.toml", "--json").out)
    assert [trial["remark"] for trial in document["trials"]] == [None, remark, None]
    for kind in ("md", "html"):
        command("report", "--study", place / "tiny.toml", "--format", kind, "--out", place / f"r.{kind}")
        assert sentence in (place / f"r.{kind}").read_text()


def calibrated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many windows went through a block at a time, of each block that is pruned from now on."""
    seen, step = [], prune_pass.Pass.step

    def noted(self: prune_pass.Pass, *more: Any) -> Any:
        seen.append(min(self.batch.windows, 8))
        return step(self, *more)

    monkeypatch.setattr(prune_pass.Pass, "step", noted)
    return seen


@slow
def test_apply_takes_the_batches_of_the_trial(done: Path, tmp_path: Path, elsewhere: pytest.MonkeyPatch) -> None:
    config = read_config(done / "tiny.best.json")
    assert config.batches["calibration"] == 8
    seen = calibrated(elsewhere)
    apply(config, tmp_path / "out", Place(done, "cpu"))
    assert set(seen) == {8}
    assert read_config(tmp_path / "out" / "atp_tune.json").batches == config.batches
    shutil.rmtree(tmp_path / "out")
    former = config.model_copy(update={"batches": {}})
    seen.clear()
    apply(former, tmp_path / "out", Place(done, "cpu"))
    assert set(seen) == {ELSEWHERE}  # nothing else is known
    assert read_config(tmp_path / "out" / "atp_tune.json").batches == {"calibration": ELSEWHERE}


@slow
def test_what_another_machine_writes_is_equal_to_the_last_byte(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SparseGPT moves the weights that stay, by sums over all windows: their last bits show the batches."""
    run(place, "prune.pruners=['sparsegpt']", "search.trials=2")
    config = read_config(place / "tiny.best.json")
    folders = {"here": config, "there": config, "former": config.model_copy(update={"batches": {}})}
    for name, one in folders.items():
        if name == "there":
            monkeypatch.setitem(replay.TOKENS, "cpu", ELSEWHERE * TOKENS)
        apply(one, place / name, Place(place, "cpu"))
    here, there, former = (load_file(place / name / "model.safetensors") for name in folders)
    assert all(same_bits(here[name], there[name]) for name in here)
    assert not all(same_bits(here[name], former[name]) for name in here)
