"""A descent by prices that was interrupted goes on where it was."""

from pathlib import Path
from typing import Any

import pytest
import torch
from expect import parametrize
from families import bench_of, tiny

from atp_tune.allocations.rows import RowSparsities
from atp_tune.blocks.gradients import Pricing, RowPricing
from atp_tune.config.prune import PruneConfig
from atp_tune.events import Message
from atp_tune.run import dense_model as module
from atp_tune.run.dense_model import DescentSteps


@parametrize("rows", [False, True], ids=["gradient", "gradient-rows"])
@parametrize("interrupted", [1, 4, 5, 19], ids=lambda step: f"step {step}")
def test_an_interrupted_descent_goes_on(
    rows: bool, interrupted: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the steps that it has not taken, to the same bits, also where an end of a path lies between them."""
    model, pricing = tiny("llama").requires_grad_(False), RowPricing if rows else Pricing
    targets, taken, prices = (0.4, 0.5, 0.6), list[int](), pricing.prices
    said, stop = list[str](), [interrupted]

    def counted(self: Any, *given: Any) -> Any:
        if len(taken) in stop:
            raise KeyboardInterrupt
        taken.append(1)
        return prices(self, *given)

    def ends(folder: str) -> tuple[RowSparsities, ...]:
        monkeypatch.setenv("ATP_TUNE_CACHE", str(tmp_path / folder))
        context = bench_of(model, PruneConfig(pruners=("wanda",)))
        context.watch = lambda event: said.append(event.text) if isinstance(event, Message) else None
        return context._priced(targets, "wanda", rows)

    monkeypatch.setattr(pricing, "prices", counted)
    with pytest.raises(KeyboardInterrupt):
        ends("cache")
    [left] = (tmp_path / "cache" / "gradient").glob("*.part")
    stop.clear()
    found, total = ends("cache"), len(taken)
    assert total == module.steps_along(targets) == 20 and not left.exists()
    assert f"gradient: goes on after step {interrupted} of 20" in said
    assert found == ends("whole") and len(taken) == 40


def test_steps_that_cannot_be_read_are_taken_again(tmp_path: Path) -> None:
    file = tmp_path / "steps.part"
    DescentSteps(file).add([[0.5, 1e-17]], {"offsets": torch.ones(3)})
    again = DescentSteps(file)
    assert again.prices == [[[0.5, 1e-17]]] and again.state["offsets"].tolist() == [1, 1, 1]
    file.write_bytes(file.read_bytes()[:-5])
    assert (broken := DescentSteps(file)).prices == [] and broken.state == {}
