import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from expect import parametrize, slow
from families import CPU, bench_of, few, same_bits, tiny
from plans import planned
from test_prune_pass import atp_plan

from atp_tune.blocks import dense_metrics
from atp_tune.blocks.dense_metrics import block_file, cached_statistics, is_room, save_all
from atp_tune.config.prune import PruneConfig
from atp_tune.events import Message
from atp_tune.pruners import PRUNERS
from atp_tune.pruners.statistics import Hessian, InputMoments, InputNorms
from atp_tune.run import dense_model

DENSE = PruneConfig(statistics="dense")
KINDS: dict[Any, Any] = {
    InputNorms: lambda s: [s.norms()],
    InputMoments: lambda s: [s.norms(), s.means(), s.variances()],
    Hessian: lambda s: [s.matrix(), s.dead(), s.factor(0.01), s.factor(0.5)],
}


def blocks_of(kind: Any) -> list[dict[str, Any]]:
    """Two blocks: a and b share an object, c has one of its own."""
    found = []
    for seed in range(2):
        x = torch.randn(30, 9, generator=torch.Generator().manual_seed(seed))
        x[:, 4] = 0
        shared, own = kind(9, CPU), kind(5, CPU)
        shared.add(x)
        own.add(x[:, :5])
        found.append({"a": shared, "b": shared, "c": own})
    return found


@parametrize("small", [0, 1 << 20])
@parametrize("kind", KINDS)
def test_what_is_kept_is_what_was_measured(
    kind: Any, small: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense_metrics, "SMALL", small)
    blocks = blocks_of(kind)
    if kind is Hessian:
        blocks[0]["a"].factor(0.01)  # one is kept with its factor, the others are factorised when they are asked
    save_all(tmp_path / "kept", blocks)
    kept = cached_statistics(tmp_path / "kept", kind, 2, CPU)
    assert len(kept) == 2 and len(kept[0:2]) == 2
    for index in (1, 0, 0):
        assert kept[index]["a"] is kept[index]["b"] or not small
        for name, statistics in blocks[index].items():
            for one, other in zip(KINDS[kind](kept[index][name]), KINDS[kind](statistics), strict=True):
                assert same_bits(one, other)
        assert kept[index].keys() == blocks[index].keys()
    assert (kept[0] is kept[0]) == bool(small)


@parametrize("kind", KINDS)
def test_the_room_that_is_needed(kind: Any, tmp_path: Path) -> None:
    for inputs in (64, 200):
        statistics = kind(inputs, CPU)
        statistics.add(torch.randn(10, inputs))
        if kind is Hessian:
            statistics.factor(0.01)
        save_all(tmp_path / str(inputs), [{"a": statistics}])
        size = block_file(tmp_path / str(inputs), 0).stat().st_size
        assert size - 1000 < kind.bytes_for(inputs) <= size
    assert is_room(tmp_path, 1000) and not is_room(tmp_path, 1 << 60)


@slow
@parametrize("pruner", few(PRUNERS, ("wanda", "sparsegpt")))
def test_kept_statistics_prune_alike(pruner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned(pruner, "atp", (0.4, 0.5, 0.6, 0.7))
    with monkeypatch.context() as patch:
        patch.setattr(dense_model, "is_room", lambda folder, needed: False)
        expected = list(bench_of(tiny("llama"), DENSE).prune(plan))
    for _ in range(2):
        for a, b in zip(bench_of(tiny("llama"), DENSE).prune(plan), expected, strict=True):
            assert all(same_bits(tensor, b.weights[name]) for name, tensor in a.weights.items())


@parametrize("room", [True, False])
def test_a_disk_that_is_full_keeps_them_in_memory(room: bool, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(dense_metrics, "save_file", refuse)
    monkeypatch.setattr(dense_model, "is_room", lambda folder, needed: room)
    events: list[Any] = []
    work = bench_of(tiny("llama"), DENSE, watch=events.append)
    first, second = (list(work.prune(atp_plan(work, "wanda"))) for _ in range(2))
    assert all(same_bits(t, b.weights[n]) for a, b in zip(first, second, strict=True) for n, t in a.weights.items())
    [note] = [event.text for event in events if isinstance(event, Message)]
    why = "No space left on device" if room else "no room"
    assert f"{why}; dense statistics are kept in memory" in note
    assert list((cache / "statistics").iterdir()) == []
