from pathlib import Path
from typing import Any

import pytest
import torch
from families import CPU, TOKENS, VOCABULARY, bench_of, checkpoint_of, nlls_of, random_ids, same_bits, tiny
from plans import planned

from atp_tune.blocks import replay
from atp_tune.config import prune
from atp_tune.config.prune import PruneConfig
from atp_tune.events import Place, Step, ignore_events
from atp_tune.inputs import tokens
from atp_tune.inputs.items import Items
from atp_tune.run import observers, session
from atp_tune.run.observers import can_keep
from atp_tune.run.session import Session

UNIFORM = planned("wanda", "uniform", (0.5,) * 4)


def steps(events: list[Any]) -> list[tuple[str, int, int]]:
    return [(event.phase, event.done, event.total) for event in events if isinstance(event, Step)]


def test_what_decides_a_value_is_told() -> None:
    work = bench_of(tiny("llama", torch.bfloat16))
    assert work.contents() == {
        "model.content": "content",
        "model.dtype": "bfloat16",
        "texts.bos": False,
        "texts.calibration.content": work.windows["calibration"].content,
        "texts.validation.content": work.windows["validation"].content,
        "texts.test.content": work.windows["test"].content,
    }


def test_each_block_is_a_step() -> None:
    events: list[Any] = []
    work = bench_of(tiny("llama"), watch=events.append)
    list(work.prune(UNIFORM))
    assert steps(events) == [("prune", done, 4) for done in (1, 2, 3, 4)]
    events.clear()
    nlls_of(work, work.blocks(None), "test")
    assert steps(events) == [("evaluate", done, 4) for done in (1, 2, 3, 4)]


def test_dense_statistics_are_steps_once() -> None:
    events: list[Any] = []
    work = bench_of(tiny("llama"), PruneConfig(statistics="dense"), watch=events.append)
    list(work.prune(UNIFORM))
    assert steps(events)[:4] == [("measure", done, 4) for done in (1, 2, 3, 4)]
    events.clear()
    list(work.prune(UNIFORM))
    assert {phase for phase, *_ in steps(events)} == {"prune"}


def test_pruning_and_evaluating_go_hand_in_hand() -> None:
    """Block after block, so that no more than one pruned block need be held."""
    events: list[Any] = []
    work = bench_of(tiny("llama"), watch=events.append)
    pruned = ((block.index, block.weights) for block in work.prune(UNIFORM))
    streamed = nlls_of(work, pruned, "validation")
    assert [phase for phase, *_ in steps(events)] == ["prune", "evaluate"] * 4
    assert streamed == nlls_of(work, [(block.index, block.weights) for block in work.prune(UNIFORM)], "validation")


def test_plans_are_compared_once_if_they_do_the_same() -> None:
    """An equal allocation by another pruner is another model."""
    work, scores = bench_of(tiny("llama")), observers.RoleScores("test")
    named = {name: planned(name, "uniform", (0.5,) * 4) for name in ("wanda", "magnitude")}
    work.compare({**named, "again": planned("wanda", "atp", (0.5,) * 4)}, [scores])
    assert scores.found["again"] is scores.found["wanda"]
    assert scores.found["magnitude"]["nlls"] != scores.found["wanda"]["nlls"]


def test_settings_reach_sparsegpt(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    original = prune.make_pruner
    monkeypatch.setattr(prune, "make_pruner", lambda *args: made.append(args) or original(*args))
    work = bench_of(tiny("llama"), PruneConfig.model_validate({"sparsegpt": {"damping": 0.5, "columns": 7}}))
    for pruner in ("sparsegpt", "wanda"):
        list(work.prune(planned(pruner, "uniform", (0.5,) * 4)))
    assert made == [
        ("sparsegpt", {"damping": 0.5, "columns": 7, "group": None}, 0, 0, None),
        ("wanda", {"compare": "row", "group": None}, 0, 0, None),
    ]


def test_blocks_keep_to_the_pattern_of_the_study() -> None:
    work = bench_of(tiny("llama"), PruneConfig(pattern="mixed:8"))
    sparsities = (0.375, 0.5, 0.625, 0.875)
    for block in work.prune(planned("wanda", "atp", sparsities, {"beta": 0.1})):
        linears = work.checkpoint.linears[block.index]
        for linear in linears:
            zeros = (linear.matrix(block.weights[linear.key]) == 0).reshape(-1, 8).sum(1)
            assert set(zeros.tolist()) == {8 * sparsities[block.index]}
        assert linears


def test_batches_are_sized_for_blocks_and_for_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory for 0.3 · free bytes: 12 bytes a logit, and twice every linear's input and output in a block."""
    model, widths = tiny("llama"), (24 + 24, 24 + 12, 24 + 12, 24 + 24, 24 + 40, 24 + 40, 40 + 24)
    block, head = TOKENS * 2 * sum(widths) * 4, TOKENS * 12 * VOCABULARY
    monkeypatch.setattr(replay, "free_memory", lambda device: int(4.1 * block / 0.3))
    work = bench_of(model)
    assert work.batch("calibration").windows == 4
    monkeypatch.setattr(replay, "free_memory", lambda device: int(2.1 * head / 0.3))
    assert bench_of(model).heads.windows == 2


@pytest.mark.slow
def test_masks_depend_on_the_calibration_text_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial, `apply` and `evaluate` load other texts beside it, of other lengths."""
    monkeypatch.setitem(replay.TOKENS, "cpu", 4 * TOKENS)
    model = tiny("llama")
    whole = bench_of(model)
    calibration = whole.windows["calibration"]
    longer = Items.windows(random_ids(2, 4 * TOKENS, seed=3).numpy())
    plan = planned("wanda", "uniform", (0.5,) * 4)
    for texts in ({"calibration": calibration}, {"calibration": calibration, "test": longer}):
        other = Session(whole.folder, whole.checkpoint, texts, PruneConfig(), ignore_events)
        assert other.batch("calibration").windows == whole.batch("calibration").windows == 4
        for one, two in zip(other.prune(plan), whole.prune(plan), strict=True):
            assert all(same_bits(one.weights[name], two.weights[name]) for name in two.weights)
    assert other.batch("test").windows == 1


def test_a_bench_opens_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`open` resolves, draws windows and loads, in the number format that is asked for."""
    from atp_tune.checkpoints.models import ModelFolder
    from atp_tune.config.data import Text
    from atp_tune.config.study import ModelConfig
    from atp_tune.inputs.items import Items

    tiny("llama").save_pretrained(tmp_path / "model")
    ids = torch.arange(2 * TOKENS).view(2, TOKENS).numpy()
    asked: list[Any] = []
    folder = ModelFolder(tmp_path / "model", "sha", "model")
    monkeypatch.setattr(session, "resolve", lambda model, base, *_: asked.append((model.source, base)) or folder)
    monkeypatch.setattr(tokens, "token_windows", lambda *_, **options: Items.windows(ids))
    setup = session.Setup(
        ModelConfig(source="model", dtype="bfloat16"),
        PruneConfig(),
        {"calibration": Text(source="c4")},
        Place(tmp_path, "cpu"),
    )
    work = Session.open(setup)
    assert asked == [("model", tmp_path)]
    assert work.checkpoint.dtype == torch.bfloat16 and work.checkpoint.device == CPU
    assert len(list(work.prune(UNIFORM))) == 4


@pytest.mark.parametrize(("free", "expected"), [(10**9, True), (0, False)])
def test_blocks_are_kept_where_they_fit(free: int, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observers, "free_memory", lambda device: free)
    assert can_keep(checkpoint_of(tiny("llama"))) == expected
    assert not can_keep(checkpoint_of(tiny("llama"), "cpu"))
