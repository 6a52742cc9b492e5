"""Seconds of a trial: each phase to the end of its own kernels. A CPU, which may be busy, is only to run the tests."""

from time import perf_counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cards import bench_on, trial

from atp_tune.blocks.prune_pass import advance, measure_and_advance, wait_for
from atp_tune.cost.probe import probe
from atp_tune.pruners.statistics import InputNorms
from atp_tune.run.session import Session

pytestmark = pytest.mark.gpu


def near(found: float, expected: float, factor: float, device: torch.device) -> bool:
    """Whether seconds differ by no more than a factor and 10 ms, on a GPU; anything goes on a CPU."""
    return device.type == "cpu" or expected / factor - 0.01 < found < factor * expected + 0.01


def test_phases_add_up_to_the_wall(device: torch.device) -> None:
    context = bench_on(device)
    trial(context)
    wait_for(device)
    began = perf_counter()
    record = trial(context)
    wait_for(device)
    whole = perf_counter() - began
    seconds = record.close()["seconds"]
    assert set(seconds) == {"calibrate", "prune", "evaluate"}
    assert min(seconds.values()) > 0
    assert near(sum(seconds.values()), whole, 1.1, device)


def test_listening_counts_for_calibration(device: torch.device) -> None:
    """On a GPU its kernels end long after they were started, where the pruner first waits for a number."""
    context = bench_on(device, dtype=torch.bfloat16, windows=64)
    trial(context)
    expected = min(calibration_seconds(context) for _ in range(3))
    assert near(min(trial(context).close()["seconds"]["calibrate"] for _ in range(3)), expected, 2, device)


@torch.inference_mode()
def calibration_seconds(context: Session) -> float:
    """The two passes over the calibration windows, each block's alone."""
    replay, batch, device = context.replay, context.batch("calibration"), context.checkpoint.device
    ids = torch.from_numpy(context.windows["calibration"].ids).to(device)
    hidden, seconds = replay.embed(ids).clone(), 0.0
    for block in context.blocks(None):
        wait_for(device)
        began = perf_counter()
        measure_and_advance(replay, batch, block.index, block.weights, hidden, InputNorms, stops=True)
        advance(replay, batch, block.index, block.weights, hidden)
        wait_for(device)
        seconds += perf_counter() - began
    return seconds


@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_the_probe_foretells_calibration(offload: str, device: torch.device) -> None:
    """Seconds per token of the phase that grows with the text, as `plan` multiplies them."""
    context = bench_on(device, offload, windows=64)  # type: ignore[arg-type]
    trial(context)
    methods = SimpleNamespace(short_names=("wanda",))
    study: Any = SimpleNamespace(methods=methods, highest=0.5, search=SimpleNamespace(objective=()))
    rates = probe(context, study, 0.0)
    tokens = context.windows["calibration"].ids.size
    foretold = rates.pruners["wanda"].calibrate * tokens * len(context.checkpoint.blocks)
    found = min(trial(context).close()["seconds"]["calibrate"] for _ in range(3))
    assert foretold > 0
    assert near(foretold, found, 4, device)
