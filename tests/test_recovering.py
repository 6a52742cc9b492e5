"""`recover`, as a user asks for it: the best plan of a study is trained at its end, and `apply` writes it."""

import os
import shutil
import signal
from functools import partial
from pathlib import Path
from platform import node
from typing import Any

import pytest
import torch
from byhand import ByHand
from expect import parametrize, slow
from faults import Command
from preloaded import at_call, kill
from test_applying import block_of, same_bytes, tensors
from tinystudy import CommandLine, copied, settings, stored

from atp_tune import tune
from atp_tune.config.best import Config, dumps, read_config
from atp_tune.config.prune import RecoverConfig, Recovered
from atp_tune.config.study import Study
from atp_tune.events import Place
from atp_tune.folders import finetuning
from atp_tune.folders.card import FINETUNED, Finetuned, PerplexityChange
from atp_tune.folders.finetuning import NO_GAIN, NoGainError, Trained, recovered
from atp_tune.folders.training import Trainer
from atp_tune.measures import Change, Perplexity, change, perplexity
from atp_tune.results.formatting import recovery_note
from atp_tune.results.summary import summarise
from atp_tune.utils import cache as entries
from atp_tune.utils.cache import cache_dir

SHORT = ("recover.steps=24", "recover.batch=4", "recover.learning_rate=0.01")


def part() -> Path:
    """Where a run of training keeps what it has trained."""
    return cache_dir("recovered") / "x.safetensors"


def run(place: Path, command: CommandLine, *overrides: str) -> Any:
    return command("--study", place / "tiny.toml", *settings(*overrides))


@pytest.fixture(scope="module")
def trained(tiny_done: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished tiny study whose best plan was trained, with its cache; to be read only."""
    with copied(tiny_done, tmp_path_factory) as place:
        table = {"recover.steps": 24, "recover.batch": 4, "recover.learning_rate": 0.01}
        tune(place / "tiny.toml", settings=table, progress=False)
        return place


@pytest.fixture
def place(trained: Path, tmp_path: Path, cache: Path) -> Path:
    shutil.copytree(trained.parent / "cache", cache)
    return Path(shutil.copytree(trained, tmp_path / "place"))


def config_of(place: Path) -> Config:
    return read_config(place / "tiny.best.json")


@slow
def test_the_best_plan_is_trained_and_measured_as_by_hand(place: Path, command: CommandLine) -> None:
    answer = run(place, command, *SHORT)
    assert answer.is_clean
    assert "complete: 6 of 6 trials; nothing to do" in answer.out
    assert "training the kept weights of trial" not in answer.out  # it is done
    config = config_of(place)
    found = config.recovered
    assert found and found.kept and found.validation and found.test
    (row,) = [line for line in answer.out.splitlines() if ", trained " in line]
    assert str(found.validation.perplexity) in row
    assert str(found.test.perplexity) in row
    assert str(found.against_uniform) in row
    assert f"of which step {found.step} was taken" in answer.out
    written = command("apply", "--config", place / "tiny.best.json", "--out", place / "out")
    assert written.is_clean
    assert f"the configuration says {found.test.perplexity} (+0.000%)" in written.out
    by_hand, pruned = ByHand(place, place / "out"), ByHand(place).prune(config.plan.method, list(config.plan.amounts))
    for role, scores in (("validation", found.validation), ("test", found.test)):
        before, after = pruned.nlls(role), by_hand.nlls(role)
        assert scores.perplexity.value == pytest.approx(perplexity(after).value, rel=1e-5)
        assert scores.change.value == pytest.approx(change(before, after).value, rel=1e-2)
    uniform = ByHand(place).prune(config.plan.method, [0.5] * len(config.plan.amounts)).nlls("test")
    assert found.against_uniform is not None
    assert found.against_uniform.value == pytest.approx(change(uniform, by_hand.nlls("test")).value, abs=2e-3)


@slow
def test_rounded_weights_keep_their_codes_and_get_other_scales(place: Path, command: CommandLine) -> None:
    more = "bits = 3\n[quantize]\ngroup_size = 16\n[recover]\nsteps = 24\nbatch = 4\nlearning_rate = 0.01\n"
    text = (place / "tiny.toml").read_text()
    (place / "bits.toml").write_text(text.replace("[", more + "[", 1))
    assert command("--study", place / "bits.toml").is_clean
    config = place / "bits.best.json"
    assert read_config(config).is_trained
    for name, *options in ("plain",), ("packed", "--packed"), ("rounded", "--no-recover"):
        command.ok("apply", "--config", config, "--out", place / name, *options)
    command.ok("unpack", place / "packed", "--out", place / "codes")
    plain, codes, rounded = (tensors(place / name) for name in ("plain", "codes", "rounded"))
    for name, was in rounded.items():
        assert same_bytes(plain[name], codes[name])
        if block_of(name) is not None and was.dim() > 1:
            factors = (codes[name] / was).nan_to_num(0).view(-1, 16).amax(1, keepdim=True)  # one for each group
            assert torch.allclose(
                was.view(-1, 16) * factors, codes[name].view(-1, 16), rtol=1e-3, atol=0
            )  # scales of 16 bits


@slow
def test_apply_trains_again_or_takes_what_was_trained_and_keeps_the_zeros(
    place: Path, command: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = place / "tiny.best.json"
    plain = command("apply", "--config", config, "--out", place / "plain", "--no-recover")
    known = command("apply", "--config", config, "--out", place / "known")
    old = cache_dir("recovered") / "of last month.safetensors"
    old.touch()
    os.utime(old, (0, 0))
    monkeypatch.setattr(entries, "versions", lambda: {"torch": "another"})  # whose weights are not taken
    anew = command("apply", "--config", config, "--out", place / "anew")
    assert [answer.code for answer in (plain, known, anew)] == [0, 0, 0]
    assert "resumes after step 24 of 24" in known.out
    assert "step 24 of 24: loss" in anew.out
    assert not old.exists()
    assert not (place / "plain" / FINETUNED).exists()
    before, after, again = (tensors(place / name) for name in ("plain", "known", "anew"))
    for name, was in before.items():
        assert same_bytes(after[name], again[name])
        if block_of(name) is None:
            assert same_bytes(was, after[name])
        else:
            assert torch.equal(was == 0, after[name] == 0)
            assert not torch.equal(was, after[name])
    record = Finetuned.model_validate_json((place / "known" / FINETUNED).read_text())
    found = config_of(place).recovered
    assert found is not None
    assert record.settings == found.settings.filled(config_of(place).texts.validation.seqlen)
    assert record.validation and found.validation
    assert record.validation.after == found.validation.perplexity
    command.ok("apply", "--verify", place / "known")
    assert not [file.name for file in place.iterdir() if file.name.startswith(".")]


def seen_and_interrupted(folder: Path, *_: object) -> None:
    """Training that others see, and that ends at once."""
    assert recovery_note(summarise(stored(folder))).startswith(f"The best plan is being trained on {node()}, ")
    raise KeyboardInterrupt


@slow
def test_a_plan_that_costs_little_is_not_trained(place: Path, command: CommandLine) -> None:
    """Where pruning raised the perplexity by less than `min_increase`, which is asked again of other settings."""
    before = config_of(place)
    dense, pruned = before.scored("dense", "validation"), before.scored("best", "validation")
    assert dense and pruned
    increase = pruned.value / dense.value - 1
    answer = run(place, command, "recover.steps=9", f"recover.min_increase={increase + 0.001}")
    assert answer.is_clean
    reason = f"pruning changes the perplexity on the validation text by {increase:+.1%}, less than recover.min_increase"
    assert f"the best plan stays as it was pruned: {reason}" in answer.out
    assert "training the kept weights" not in answer.out
    found = config_of(place).recovered
    assert found is not None
    assert (found.skipped, found.kept, found.steps) == (True, False, 0)
    assert f"Not trained after pruning: {reason}" in command("status", "--study", place / "tiny.toml").out
    again = run(place, command, "recover.steps=9", f"recover.min_increase={increase + 0.001}")
    assert again.out.startswith("complete: 6 of 6 trials; nothing to do")
    least = f"recover.min_increase={max(0.0, increase - 0.001)}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("atp_tune.folders.finetuning.recovered", partial(seen_and_interrupted, place))
        assert run(place, command, "recover.steps=9", "recover.learning_rate=0.01", least).code == 130
    assert "Not trained yet: the same command" in command("status", "--study", place / "tiny.toml").out
    assert "step 9 of 9: loss" in run(place, command, "recover.steps=9", "recover.learning_rate=0.01", least).out


@slow
def test_what_prevents_training_is_said_and_ends_no_study(
    place: Path, command: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("atp_tune.folders.training.free_memory", lambda device: 1000)
    answer = run(place, command, "recover.steps=9")
    assert answer.is_clean
    (line,) = [line for line in answer.out.splitlines() if "stays as it was pruned" in line]
    assert line.startswith("warning: the best plan stays as it was pruned: training: needs about ")
    assert "lower batch, seqlen, or take a larger device" in line


@slow
def test_what_a_killed_training_left_is_removed_by_the_next(place: Path, cache: Path, command: CommandLine) -> None:
    """A whole model each time, for ever."""
    words = ("--study", place / "tiny.toml", *settings("recover.steps=6", "recover.batch=4"))
    for left in (1, 1):  # the second removes what the first left
        killed = Command(*words, inject=partial(at_call, Trainer, "step", 3, kill)).finish()
        assert killed.code == -signal.SIGKILL, killed
        assert len([*cache.glob("recovered/.*")]) == left
    command.ok(*words)
    assert [*cache.glob("recovered/.*")] == []


# The guard.


def judged(monkeypatch: pytest.MonkeyPatch, validation: PerplexityChange | None, first: float = 2.5) -> Recovered:
    """What is made of a run of training whose scores are given."""
    after = Perplexity(value=8, stderr=1)
    record = Finetuned.model_construct(
        before=Perplexity(value=10, stderr=1), after=after, change=Change(value=-0.2, stderr=0.1),
        held_out=None, losses=(1.0, 0.5), seconds=3.0, validation=validation,
    )  # fmt: skip
    scores = {"test": {"nlls": [first, 1.5]}}
    part().touch()
    monkeypatch.setattr(finetuning, "apply_trained", lambda *_: Trained(record, scores, part()))  # type: ignore[arg-type]
    own: Any = (None, RecoverConfig(), Place(Path(), "cpu"))
    return recovered(*own, uniform=[3.5, 2.5], kinds=("manual", "news"))


def changed(by: float) -> PerplexityChange:
    return PerplexityChange(
        before=Perplexity(value=10, stderr=1), after=Perplexity(value=10 * (1 + by), stderr=1),
        change=Change(value=by, stderr=0.01),
    )  # fmt: skip


def test_the_validation_text_decides_whether_training_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    worse = judged(monkeypatch, changed(0.02))
    assert not part().exists()  # no run will write it
    better = judged(monkeypatch, changed(-0.02))
    assert part().exists()
    assert (worse.kept, better.kept) == (False, True)
    assert worse.reason == "perplexity on the validation text changed by +2.0% ± 1.0%"
    assert better.test is not None
    assert better.test.change.value == pytest.approx(-0.2)
    assert better.against_uniform is not None
    assert better.against_uniform.value == pytest.approx(2.718281828**-1 - 1)
    assert (better.step, better.steps) == (2, 2)
    assert {kind: round(own.value, 2) for kind, own in better.kinds.items()} == {"manual": 12.18, "news": 4.48}


@parametrize("nll", [float("nan"), float("inf"), 701.0])
def test_what_is_not_finite_is_left_out(nll: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the two texts' own scores were, so the configuration could not be written after training."""
    found = judged(monkeypatch, changed(-0.02), nll)
    dumps(found.model_dump(mode="json"), None)
    assert {kind: round(own.value, 2) for kind, own in found.kinds.items()} == {"news": 4.48}


def test_no_gain_on_held_out_windows_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise NoGainError("training: no step …")

    monkeypatch.setattr(finetuning, "apply_trained", fails)
    found = recovered(None, RecoverConfig(), Place(Path(), "cpu"))  # type: ignore[arg-type]
    assert (found.kept, found.reason, found.validation) == (False, NO_GAIN, None)


# What is asked for.


def study(**changes: Any) -> Study:
    text = {"source": "c4", "split": "train", "nsamples": 4}
    texts = {
        role: {**text, "part": [k / 3, (k + 1) / 3]} for k, role in enumerate(("calibration", "validation", "test"))
    }
    return Study.model_validate(
        {"sparsity": 0.6, "model": {"source": "org/name"}, "texts": texts, "search": {"trials": 2}, "recover": {}}
        | changes
    )


# What is said.
