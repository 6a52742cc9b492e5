from typing import Any

import pytest
import torch
from families import FAMILIES, few, tiny
from plans import planned
from test_context import bench_of

from atp_tune.blocks import dense_metrics
from atp_tune.blocks.dense_metrics import PerBlock, can_rank
from atp_tune.config.prune import PruneConfig
from atp_tune.pruners import make_pruner
from atp_tune.pruners.statistics import InputNorms
from atp_tune.pruners.wanda import Ranks
from atp_tune.run import dense_model
from atp_tune.run.session import Session

PATTERNS = ("unstructured", "mixed:8")


def pruned(work: Session, sparsity: float) -> list[dict[str, torch.Tensor]]:
    return [
        block.weights for block in work.prune(planned("wanda", "uniform", (sparsity,) * len(work.checkpoint.blocks)))
    ]


@pytest.mark.parametrize("family", few(FAMILIES, ("llama", "gpt2")))
@pytest.mark.parametrize("pattern", PATTERNS)
def test_masks_are_the_same_with_ranks_and_without(family: str, pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    work = bench_of(tiny(family), PruneConfig(statistics="dense", pattern=pattern))
    ranked = {sparsity: pruned(work, sparsity) for sparsity in (0.0, 0.3, 0.5, 0.77, 1.0)}
    assert all(isinstance(x, Ranks) for (kept,) in [work.measured._ranked.values()] for b in kept for x in b.values())
    monkeypatch.setattr(dense_model, "can_rank", lambda *args: False)
    work.measured._ranked.clear()
    for sparsity, blocks in ranked.items():
        for block, plain in zip(blocks, pruned(work, sparsity), strict=True):
            assert all(torch.equal(block[name], plain[name]) for name in plain)


def test_ranks_are_found_at_the_second_trial_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    original = Ranks.of.__func__  # type: ignore[attr-defined]
    counting = classmethod(lambda cls, *args: calls.append(1) or original(cls, *args))
    monkeypatch.setattr(Ranks, "of", counting)
    work = bench_of(tiny("llama"), PruneConfig(statistics="dense"))
    pruned(work, 0.5)
    assert not calls
    for _ in range(3):
        pruned(work, 0.6)
    assert len(calls) == 4 * 7


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("wanda", {}, True),
        ("wanda", {"compare": "row-variant"}, False),
        ("wanda", {"compare": "matrix"}, False),
        ("wanda", {"group": 8}, True),
        ("wanda", {"group": 8, "compare": "matrix"}, True),
        ("magnitude", {}, False),
        ("sparsegpt", {}, False),
    ],
)
def test_only_what_compares_rows_or_groups_is_ranked(name: str, settings: dict[str, Any], expected: bool) -> None:
    assert can_rank(make_pruner(name, settings), bench_of(tiny("llama")).checkpoint) == expected


def test_without_room_nothing_is_ranked(monkeypatch: pytest.MonkeyPatch) -> None:
    work = bench_of(tiny("llama"), PruneConfig(statistics="dense"))
    needed = dense_metrics.RANK_BYTES * sum(work.checkpoint.sizes)
    for free, expected in (
        (needed / dense_metrics.RANK_SHARE * 0.99, False),
        (needed / dense_metrics.RANK_SHARE * 1.01, True),
    ):
        monkeypatch.setattr(dense_metrics, "free_memory", lambda device, free=free: free)
        assert can_rank(make_pruner("wanda"), work.checkpoint) == expected


def test_other_settings_of_wanda_take_the_norms() -> None:
    weight, norms = torch.randn(5, 12), InputNorms(12, torch.device("cpu"))
    norms.add(torch.randn(9, 12))
    for found in (Ranks.of(weight, norms), Ranks.of(weight, norms, 4)):
        check_settings(weight, norms, found)


def check_settings(weight: torch.Tensor, norms: InputNorms, found: Ranks) -> None:
    for settings in ({"compare": "row-variant"}, {"compare": "matrix"}, {"group": 4}, {}):
        pruner = make_pruner("wanda", settings)
        assert torch.equal(pruner.prune(weight, 0.4, found), pruner.prune(weight, 0.4, norms))


def test_slices_are_lists_of_blocks() -> None:
    work = bench_of(tiny("llama"), PruneConfig(statistics="dense"))
    pruned(work, 0.5)
    (found,) = work.measured._ranked.values()
    assert isinstance(found, PerBlock) and len(found) == 4
    assert [set(block) for block in found[1:3]] == [set(found[1]), set(found[2])]
