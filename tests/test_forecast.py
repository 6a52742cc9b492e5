import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from expect import parametrize
from families import few
from goldens import STUDIES, Golden, inside, prepare, told, words
from tinystudy import study_file
from torch.nn.modules.module import register_module_forward_pre_hook

from atp_tune.allocations import gradient
from atp_tune.checkpoints.files import Free, ModelSizes
from atp_tune.config.study import Study
from atp_tune.cost.forecast import (
    UNKNOWN,
    Amounts,
    Bytes,
    Done,
    Part,
    ProbeRates,
    PrunerRate,
    Tokens,
    parts,
    passes,
    peaks,
    problems,
    sums,
)
from atp_tune.cost.planning import Known

TOKENS = Tokens(calibration=1000, validation=300, test=200, curve=100)
RATES = ProbeRates(
    blocks=4,
    load=5.0,
    run={"calibration": 0.001, "validation": 0.002, "test": 0.003},
    dense=0.004,
    ends=0.01,
    fetch=0.0,
    pruners={"wanda": PrunerRate(0.0015, 0.25), "magnitude": PrunerRate(0.001, 0.125)},
    work=7,
)


def known(study: Study, done: Done, rates: ProbeRates = RATES) -> list[Part]:
    return list(parts(Amounts(study, TOKENS, 10, 12, 3.0, False), done, rates))


def study(place: Path, *keys: str) -> Study:
    return study_file(place, "prune.pruners=['wanda', 'magnitude']", "continuations.tokens=0", *keys).study


def test_the_whole_is_the_sum_of_its_parts(tiny_place: Path) -> None:
    costs = {"wanda": passes("block", True, TOKENS, 300), "magnitude": passes("block", False, TOKENS, 300)}
    trials = [RATES.trial(name, cost).total for name, cost in costs.items()]
    report = [
        RATES.trial(name, cost.model_copy(update={"evaluate": 200}), "test").total for name, cost in costs.items()
    ]
    spec = study(tiny_place)
    dense, tested, curve = RATES.dense_on(300, "validation"), RATES.dense_on(200, "test"), 4 * 100 * 0.001
    tokens, seconds, left = sums(known(spec, Done(10)))
    assert seconds == left == pytest.approx(5 + curve + dense + tested + 5 * sum(trials) + sum(report))
    _, half, left = sums(known(spec, Done(10, 6)))
    assert half == seconds
    assert left == pytest.approx(5 + curve + tested + 2 * sum(trials) + sum(report))
    assert sums(known(spec, Done(10, 10)))[2] == 0
    assert sums(known(spec, Done(10), UNKNOWN)) == (tokens, None, None)


RUNS = {
    **{name: STUDIES[name] for name in ("kl", "front", "zeros-bits", "draws", "recover", "allocations")},
    "dense": Golden(settings=("prune.statistics=dense", "texts.calibration.draws=2")),
    "sequential": Golden(settings=("prune.statistics=sequential",)),
    "size": Golden(settings=("quantize.group_size=16", "allocation=['gradient']"), goal='size = "3.9bpw"'),
    "screening": Golden(settings=("search={screen={trials=6,stride=2,confirm=2}}", "search.objective=kl")),
}


@parametrize("name", few(RUNS, {"kl"}))
def test_a_run_sends_what_is_foretold(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens through all blocks, counted where a block runs; what goes back too takes as long as three."""
    sent = 0

    def count(block: Any, arguments: Any) -> None:
        nonlocal sent
        if type(block).__name__ == "LlamaDecoderLayer" and "forward" not in vars(block):  # else the model passes it by
            sent += arguments[0][..., 0].numel() * (3 if torch.is_grad_enabled() else 1)

    monkeypatch.setattr("atp_tune.run.dense_model.COST_TOKENS", 4096)  # as many as the text has
    prepare(RUNS[name], tmp_path)
    study = words("--study", "tiny.toml", *RUNS[name].settings)
    with patch.dict(os.environ, ATP_TUNE_CACHE=str(tmp_path / "cache")), inside(tmp_path):
        plan = json.loads(told("plan", *study, "--json"))
        hook = register_module_forward_pre_hook(count)
        try:
            told(*study)
        finally:
            hook.remove()
    assert sent == plan["whole"]["tokens"] * plan["weights"]["blocks"]


def test_descents_wait_for_what_copies_take_beyond_the_products(tiny_place: Path) -> None:
    """Two copies of each of 4 blocks a step, of 20, against tokens that are counted as those that go through twice."""
    spec = study(tiny_place, "allocation=gradient")
    plain, slow = (known(spec, Done(3), replace(RATES, fetch=fetch))[2] for fetch in (0.0, 1000.0))
    assert plain.seconds == pytest.approx(4 * plain.tokens / 2 * RATES.dense)
    assert slow.seconds == pytest.approx(4 * 2 * gradient.STEPS * 1000)


SIZES = ModelSizes(total=1000, blocks=(100, 300, 200, 300), bytes=4000, itemsize=4)


TEXTS = {role: {"source": f"file:{role}.txt"} for role in ("calibration", "validation", "test")}
SEARCHES = Study.model_validate(
    {"sparsity": 0.5, "model": {"source": "model"}, "texts": TEXTS, "search": {"trials": 1}}
)
WHOLE = Known(
    SEARCHES, TOKENS, windows=10, validation_windows=12, passes=3.0, is_short=False, main=None, screening=None,
    sizes=SIZES, width=8, itemsize=2, free=Free(0, 0), has_own_memory=True, process=10,
)  # fmt: skip


def held(**changes: int) -> Bytes:
    return replace(WHOLE.held(50), **changes)


def test_bytes() -> None:
    found = held()
    assert (found.total, found.blocks, found.largest, found.files, found.converts) == (2000, 1800, 600, 4000, True)
    assert (found.calibration, found.validation, found.dense) == (16000, 4800, 4 * 1600)
    assert found.states == 4800 + 2 * 16000
    assert held(sequential=500).states == found.states + 500
    assert not replace(WHOLE, itemsize=4).held(0).converts
    search = SEARCHES.search.model_copy(update={"objective": ("kl",)})
    by_kl = replace(WHOLE, study=SEARCHES.model_copy(update={"search": search})).held(50)
    assert by_kl == replace(found, dense=found.dense + 16 * (300 + 200))


@parametrize(("offload", "device", "host"), [("none", 2000, 0), ("cpu", 200 + 1200, 1800), ("disk", 1400, 0)])
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


@parametrize(
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
