from typing import Any

import pytest
import torch
from families import TOKENS, VOCABULARY, bench_of, nlls_of, random_ids, same_bits, setup_of, tiny
from plans import planned

from atp_tune.blocks import replay
from atp_tune.events import Step
from atp_tune.inputs.items import Items
from atp_tune.run import observers
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


def test_batches_are_sized_for_blocks_and_for_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory for 0.3 · free bytes: 12 bytes a logit, and twice every linear's input and output in a block."""
    model, widths = tiny("llama"), (24 + 24, 24 + 12, 24 + 12, 24 + 24, 24 + 40, 24 + 40, 40 + 24)
    block, head = TOKENS * 2 * sum(widths) * 4, TOKENS * 12 * VOCABULARY
    monkeypatch.setattr(replay, "free_memory", lambda device: int(4.1 * block / 0.3))
    assert bench_of(model).batch("calibration").windows == 4
    monkeypatch.setattr(replay, "free_memory", lambda device: int(2.1 * head / 0.3))
    assert bench_of(model).heads.windows == 2


@pytest.mark.slow
def test_masks_depend_on_the_calibration_text_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial, `apply` and `evaluate` load other texts beside it, of other lengths."""
    monkeypatch.setitem(replay.TOKENS, "cpu", 4 * TOKENS)
    whole = bench_of(tiny("llama"))
    calibration = whole.windows["calibration"]
    longer = Items.windows(random_ids(2, 4 * TOKENS, seed=3).numpy())
    plan = planned("wanda", "uniform", (0.5,) * 4)
    for texts in ({"calibration": calibration}, {"calibration": calibration, "test": longer}):
        other = Session(whole.folder, whole.checkpoint, texts, setup_of())
        assert other.batch("calibration").windows == whole.batch("calibration").windows == 4
        for one, two in zip(other.prune(plan), whole.prune(plan), strict=True):
            assert all(same_bits(one.weights[name], two.weights[name]) for name in two.weights)
    assert other.batch("test").windows == 1
