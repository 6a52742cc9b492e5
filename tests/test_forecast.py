from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from atp_tune.allocations import prices
from atp_tune.checkpoints.headers import ModelSizes
from atp_tune.checkpoints.offload import Free
from atp_tune.cost import once
from atp_tune.cost.forecast import (
    Passes,
    ProbeRates,
    PrunerRate,
    ScreeningCost,
    TrainingCost,
    dense_seconds,
    passes,
    screened,
    trained,
    trial_seconds,
    whole,
)
from atp_tune.cost.memory import Bytes, Tokens, bytes_of, peaks, problems
from atp_tune.spec.recover import RecoverConfig

TOKENS = Tokens(calibration=1000, validation=300, test=200, curve=100)
RATES = ProbeRates(
    load=5.0,
    run={"calibration": 0.001, "validation": 0.002, "test": 0.003},
    dense=0.004,
    ends=0.01,
    fetch=0.0,
    pruners={"wanda": PrunerRate(0.0015, 0.25), "magnitude": PrunerRate(0.001, 0.125)},
    work=7,
)


def test_tokens_of_a_trial() -> None:
    assert passes("block", True, TOKENS, 300) == Passes(listen=1000, run=1000, evaluate=300)
    assert passes("sequential", True, TOKENS, 300) == Passes(listen=0, run=1000, evaluate=300)
    assert passes("dense", True, TOKENS, 300) == Passes(listen=0, run=100, evaluate=300)
    assert passes("block", False, TOKENS, 300) == Passes(listen=0, run=100, evaluate=300)
    assert passes("block", True, TOKENS, 300).total == 2300


def test_seconds_of_a_trial_are_those_of_its_passes() -> None:
    found = trial_seconds(RATES, "wanda", passes("block", True, TOKENS, 300), blocks=4)
    assert found.calibrate == pytest.approx(4 * 1000 * 0.0015)
    assert found.prune == 1.0
    assert found.evaluate == pytest.approx(4 * 300 * 0.002 + 300 * 0.01)
    assert found.total == pytest.approx(6 + 1 + 5.4)


def test_a_block_takes_as_long_as_its_work_or_its_way() -> None:
    cost = passes("block", True, TOKENS, 300)
    work = 1.5 + 0.25 + 0.6
    for fetch in (1.0, 10.0):
        found = trial_seconds(replace(RATES, fetch=fetch), "wanda", cost, blocks=4)
        assert found.total == pytest.approx(4 * max(fetch, work) + 3)
    assert dense_seconds(replace(RATES, fetch=10.0), 300, 4, "validation") == pytest.approx(40 + 3)


def test_the_whole_is_the_sum_of_its_parts() -> None:
    costs = {"wanda": passes("block", True, TOKENS, 300), "magnitude": passes("block", False, TOKENS, 300)}
    trials = [trial_seconds(RATES, name, cost, 4).total for name, cost in costs.items()]
    report = [
        trial_seconds(RATES, name, cost.model_copy(update={"evaluate": 200}), 4, "test").total
        for name, cost in costs.items()
    ]
    found = whole(RATES, 10, 0, costs, TOKENS, 4, once=0, rows=2)
    dense = dense_seconds(RATES, 300, 4, "validation") + dense_seconds(RATES, 200, 4, "test")
    curve = 4 * 100 * 0.001
    assert found.seconds == pytest.approx(5 + curve + dense + 5 * sum(trials) + sum(report))
    assert found.seconds_left == found.seconds
    assert found.tokens == 5 * (2300 + 400) + 300 + 100 + 200 + 2 * (1050 + 200)
    half = whole(RATES, 10, 6, costs, TOKENS, 4, once=0, rows=2)
    assert half.seconds == found.seconds
    assert half.seconds_left == pytest.approx(
        5 + curve + dense - dense_seconds(RATES, 300, 4, "validation") + 2 * sum(trials) + sum(report)
    )
    assert whole(RATES, 10, 10, costs, TOKENS, 4, once=0, rows=2).seconds_left == 0


def test_what_is_measured_once_on_the_dense_model() -> None:
    costs = {"wanda": passes("dense", True, TOKENS, 300)}
    one, other = (whole(RATES, 10, 0, costs, TOKENS, 4, once=once, rows=None) for once in (0, 1000))
    assert (one.seconds or 0) + 4 * 1000 * 0.004 == pytest.approx(other.seconds)
    assert (one.tokens or 0) + 2000 == other.tokens


def test_a_screening_comes_on_top() -> None:
    costs = {"wanda": passes("block", True, TOKENS, 300)}
    screening = ScreeningCost(trials=6, done=0, evaluated=75, once=1000)
    plain = whole(RATES, 3, 0, costs, TOKENS, 4, once=0, rows=1)
    found = screened(plain, screening, RATES, costs, 4)
    assert found.screened == 6 and plain.screened == 0
    assert (found.tokens or 0) - (plain.tokens or 0) == 7 * 75 + 2 * 1000
    trial = 4 * 0.25 + 75 * (4 * 0.002 + 0.01)
    once = 4 * 1000 * 0.004 + dense_seconds(RATES, 75, 4, "validation")
    assert (found.seconds or 0) - (plain.seconds or 0) == pytest.approx(once + 6 * trial)
    assert found.seconds_left == found.seconds
    late = screened(plain, replace(screening, done=4), RATES, costs, 4)
    assert (late.seconds_left or 0) - (plain.seconds_left or 0) == pytest.approx(2 * trial)
    unknown = screened(whole(None, 3, 0, costs, TOKENS, 4, once=0, rows=1), screening, None, costs, 4)
    assert unknown.seconds is None and unknown.tokens == found.tokens


def test_the_training_of_the_best_plan_comes_on_top() -> None:
    """64 steps of 2 windows of 32 tokens; 9 measurements of 8, 1 of the dense model; texts before and after."""
    known: Any = SimpleNamespace(tokens=TOKENS, validation_windows=10)
    training = once.training(known, RecoverConfig(seqlen=32))
    assert training == TrainingCost(forward=2 * 64 * 64 + (9 + 1) * 256, backward=64 * 64, measured=1000, loads=5)
    alone = once.training(known, RecoverConfig(loss="next-token", steps=8))
    assert alone == TrainingCost(forward=8 * 60 + 2 * 240, backward=8 * 60, measured=1000, loads=4)
    plain = whole(RATES, 3, 0, {"wanda": passes("block", True, TOKENS, 300)}, TOKENS, 4, once=0, rows=1)
    found, late = (trained(plain, alone, RATES, 4, is_done) for is_done in (False, True))
    tokens = 8 * 60 + 2 * 240 + 2 * 8 * 60 + 1000
    assert (found.tokens or 0) - (plain.tokens or 0) == tokens
    assert (found.seconds or 0) - (plain.seconds or 0) == pytest.approx(tokens * (4 * 0.002 + 0.01) + 4 * 5)
    assert found.seconds_left == found.seconds == late.seconds
    assert late.seconds_left == plain.seconds_left
    unknown = plain.model_copy(update={"seconds": None, "seconds_left": None})
    assert trained(unknown, alone, None, 4, False).seconds is None


def test_descents_wait_for_what_copies_take_beyond_the_products() -> None:
    """Two copies of each of 4 blocks a step, of 20, against tokens that are counted as those that go through twice."""
    study = SimpleNamespace(descents=((("prices",), False),), by_bits=False, interval=None, highest=0.5)
    study.allocation = SimpleNamespace(by_prices=True)
    known: Any = SimpleNamespace(study=study, tokens=TOKENS, windows=10, passes=3, sizes=SIZES)
    copies, products = 4 * 2 * prices.STEPS, 4 * once.descents(known) * RATES.dense
    assert once.waiting_seconds(known, RATES) == 0
    found = once.waiting_seconds(known, replace(RATES, fetch=1000.0))
    assert found == pytest.approx(copies * 1000 - products)


def test_without_a_probe_tokens_are_known_and_seconds_not() -> None:
    costs = {"wanda": passes("block", True, TOKENS, 300)}
    found = whole(None, 10, 0, costs, TOKENS, 4, once=0, rows=None)
    assert (found.tokens, found.seconds, found.seconds_left) == (23400, None, None)
    assert whole(RATES, None, 0, costs, TOKENS, 4, once=0, rows=None).seconds is None


SIZES = ModelSizes(total=1000, blocks=(100, 300, 200, 300), bytes=4000, itemsize=4)


def held(**changes: int) -> Bytes:
    return replace(bytes_of(SIZES, 2, 8, TOKENS, work=50, process=10), **changes)


def test_bytes() -> None:
    found = held()
    assert (found.total, found.blocks, found.largest, found.files, found.converts) == (2000, 1800, 600, 4000, True)
    assert (found.calibration, found.validation, found.dense) == (16000, 4800, 4 * 1600)
    assert found.states == 4800 + 2 * 16000
    assert held(sequential=500).states == found.states + 500
    assert not bytes_of(SIZES, 4, 8, TOKENS, 0, 0).converts


@pytest.mark.parametrize(
    ("offload", "device", "host"), [("none", 2000, 0), ("cpu", 200 + 1200, 1800), ("disk", 1400, 0)]
)
def test_memory_by_residency(offload: str, device: int, host: int) -> None:
    free = Free(10**6, 10**6)
    found = peaks(held(), offload, free, has_own_memory=True)  # type: ignore[arg-type]
    assert found.device == device + 36800 + 50
    assert found.host == 10 + host + 6400
    assert found.loading == 10 + 2000 + 4000
    same = peaks(held(), offload, Free(10**6, 10**6, bounded=False), has_own_memory=False)  # type: ignore[arg-type]
    assert (same.host, same.device) == (found.host + device + 36800 + 50, None)


def lines(free: Free, offload: str = "none", **changes: int) -> tuple[str, ...]:
    own = held(**changes)
    return problems(own, peaks(own, offload, free, has_own_memory=True), offload, windows=10)  # type: ignore[arg-type]


G = 1024**3


def test_what_fits_is_no_problem() -> None:
    assert lines(Free(10**6, 10**6)) == ()


@pytest.mark.parametrize(
    ("free", "changes", "offload", "said"),
    [
        (Free(9 * G, 9 * G), {"total": 10 * G, "blocks": 9 * G, "largest": G, "converts": False}, "none",
         'device memory: 10.0 GiB are needed, 9.0 GiB are free; set model.offload = "auto"'),
        (Free(4 * G, 9 * G), {"calibration": 5 * G}, "none",
         "device memory: 10.0 GiB are needed, 4.0 GiB are free; set texts.calibration.nsamples = 3"),
        (Free(4 * G, 9 * G), {"calibration": 2 * G, "sequential": 4 * G}, "none",
         "device memory: 8.0 GiB are needed, 4.0 GiB are free; set texts.calibration.nsamples = 4"),
        (Free(4 * G, 9 * G), {"work": 5 * G}, "none",
         "device memory: 5.0 GiB are needed, 4.0 GiB are free; take shorter windows or a larger device"),
        (Free(4 * G, G), {"blocks": 2 * G, "converts": False}, "cpu",
         'host memory: 2.0 GiB are needed, 1.0 GiB are free; set model.offload = "disk"'),
        (Free(4 * G, G), {"dense": 2 * G}, "disk",
         "host memory: 2.0 GiB are needed, 1.0 GiB are free; free some, or take a smaller model"),
        (Free(4 * G, G), {"total": 2 * G}, "none",
         "host memory: 2.0 GiB are needed, 1.0 GiB are free; loading converts the weights: give the model in the "
         "number format that it is computed in, or set model.dtype to its own"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line_with_a_way_out(
    free: Free, changes: dict[str, int], offload: str, said: str
) -> None:
    assert lines(free, offload, **changes) == (said,)
