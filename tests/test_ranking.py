from typing import Any

import pytest
import torch
from expect import parametrize
from families import FAMILIES, few, tiny
from plans import planned
from test_context import bench_of

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


@parametrize("family", few(FAMILIES, ("llama", "gpt2")))
@parametrize("pattern", PATTERNS)
def test_masks_are_the_same_with_ranks_and_without(family: str, pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    work = bench_of(tiny(family), PruneConfig(statistics="dense", pattern=pattern))
    ranked = {sparsity: pruned(work, sparsity) for sparsity in (0.0, 0.3, 0.5, 0.77, 1.0)}
    assert all(isinstance(x, Ranks) for (kept,) in [work.measured._ranked.values()] for b in kept for x in b.values())
    monkeypatch.setattr(dense_model, "can_rank", lambda *args: False)
    work.measured._ranked.clear()
    for sparsity, blocks in ranked.items():
        for block, plain in zip(blocks, pruned(work, sparsity), strict=True):
            assert all(torch.equal(block[name], plain[name]) for name in plain)


@parametrize(
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
