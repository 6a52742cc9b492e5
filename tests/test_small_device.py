"""Whole commands on a device that is made to look small: what does not fit is streamed, and values stay the same."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from expect import slow
from tinystudy import Answer, CommandLine, settings, stored

from atp_tune.checkpoints import checkpoint

SMALL = "200kB"  # the model has 136 kB, a window takes 119 kB


@pytest.fixture
def tune(command: CommandLine, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, str, int], Answer]:
    """Runs a study to so many trials on a device of that size."""

    def tune(place: Path, memory: str, trials: int) -> Answer:
        monkeypatch.setenv("ATP_TUNE_DEVICE_MEMORY", memory)
        return command("--study", place / "tiny.toml", "--trials", str(trials))

    return tune


@slow
def test_a_study_on_a_small_device_streams_and_comes_to_the_same_bits(
    place: Path, tmp_path: Path, tune: Callable[[Path, str, int], Answer]
) -> None:
    """Both go on from one study: its batches, which decide the last bits, are those of the small device."""
    assert tune(place, SMALL, 1).code == 0
    roomy = Path(shutil.copytree(place, tmp_path / "roomy"))
    answers = [tune(place, SMALL, 4), tune(roomy, "", 4)]
    assert [answer.code for answer in answers] == [0, 0]
    said = "blocks are kept in host memory and copied to the device one by one"
    assert [said in answer.out for answer in answers] == [True, False]
    streamed, whole = stored(place), stored(roomy)
    assert whole.user_attrs["batches"] == streamed.user_attrs["batches"]
    assert set(streamed.user_attrs["batches"].values()) == {1}
    assert len({trial.value for trial in streamed.trials}) == 4
    for one, other in zip(streamed.trials, whole.trials, strict=True):
        assert one.params == other.params
        assert one.values == other.values
        assert one.user_attrs["nlls"] == other.user_attrs["nlls"]
    assert streamed.user_attrs["test_nlls"] == whole.user_attrs["test_nlls"]


@slow
def test_where_host_memory_is_small_too_blocks_are_on_disk(
    place: Path, command: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATP_TUNE_DEVICE_MEMORY", SMALL)
    monkeypatch.setattr(checkpoint, "host_memory", lambda: 10_000)
    answer = command.ok("--study", place / "tiny.toml", *settings("search.trials=1"))
    assert "blocks are kept on disk and copied to the device one by one" in answer.out
