"""Commands that take the best of a study in the place of a configuration or a folder: `--study NAME`."""

import io
import sys
from pathlib import Path

import pytest
from expect import slow
from safetensors.torch import load_file
from tinystudy import CommandLine, settings


@slow
def test_what_is_made_is_what_the_configuration_makes(
    done: Path, tmp_path: Path, command: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the file of the best was deleted; a folder that is there is left as it is."""
    study, config = ("--study", done / "tiny.toml"), done / "tiny.best.json"
    for name, more in (("one", []), ("two", ["--packed"])):
        command.ok("apply", "--config", config, "--out", tmp_path / name, *more)
    config.unlink()
    command.ok("apply", *study, "--out", tmp_path / "own")
    assert command("pack", *study, "--out", tmp_path / "packed").is_clean
    for one, other in (("one", "own"), ("two", "packed")):
        (found,), (wanted,) = ([*(tmp_path / name).glob("*.safetensors")] for name in (other, one))
        ours, theirs = load_file(found), load_file(wanted)
        assert ours.keys() == theirs.keys() and all(ours[key].equal(theirs[key]) for key in ours)
    assert "exists already" in command("pack", *study, "--out", tmp_path / "packed").error
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"The import statement")))
    ours = command("chat", *study, "--max-new-tokens", "5")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"The import statement")))
    assert command("chat", tmp_path / "own", "--max-new-tokens", "5") == ours
    assert ours.is_clean and ours.out
    assert {path.name for path in tmp_path.iterdir()} >= {"one", "own", "packed"}


@slow
def test_a_study_whose_best_is_trained_is_talked_with_as_it_was_trained(
    place: Path, tmp_path: Path, command: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = settings("recover.steps=4", "recover.batch=2", "recover.learning_rate=0.01", "recover.eval_every=2")
    study = ("--study", place / "tiny.toml")
    command.ok(*study, *words)
    command.ok("apply", *study, "--out", tmp_path / "own")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"The import statement")))
    ours = command("chat", *study, "--max-new-tokens", "5")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"The import statement")))
    assert command("chat", tmp_path / "own", "--max-new-tokens", "5") == ours
    assert ours.is_clean
