"""Rows with sparsities of their own: offsets, masks and prices against loops, and studies through the command."""

import base64
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from expect import parametrize, slow
from families import CPU, FAMILIES, MIXTURES, bench_of, few, random_ids, tiny
from hypothesis import given
from hypothesis import strategies as st
from naive_allocations import scores
from test_pricing import FAST, close, places_in_rows, pricing_of, uneven, whole_gradients
from tinystudy import CommandLine, settings, stored
from torch import Tensor
from torch.nn import functional

from atp_tune.allocations import LinearSparsities, Shape, gradient
from atp_tune.allocations.gradient import DISTANCE
from atp_tune.allocations.rows import RowOffsets, RowSparsities, zeros_of_rows
from atp_tune.blocks.gradients import BAND, ByPlaces, RowPricing, Sample
from atp_tune.blocks.prune_pass import of_rows
from atp_tune.blocks.replay import AutoBatch
from atp_tune.config.best import read_config
from atp_tune.config.prune import NLL_SHARES
from atp_tune.events import ignore_events
from atp_tune.plan import Plan
from atp_tune.pruners import make_pruner
from atp_tune.pruners.refinement import Treatment
from atp_tune.pruners.rounding import RTN
from atp_tune.pruners.statistics import InputNorms
from atp_tune.pruners.wanda import Ranks, Wanda
from atp_tune.run.dense_model import dense_final_states
from atp_tune.run.session import Session

rows_of_bytes = st.lists(st.integers(-127, 127), min_size=1, max_size=12)


def as_bytes(row: Sequence[int]) -> bytes:
    return bytes(np.array(row, dtype=np.int8))


# Offsets


@given(rows_of_bytes, st.integers(1, 40), st.floats(0, 1))
def test_zeros_of_rows_are_those_of_the_formula(row: list[int], columns: int, sparsity: float) -> None:
    """Of all whole numbers c, each is tried."""
    found = zeros_of_rows(columns, sparsity, as_bytes(row)).tolist()
    total = int(len(row) * columns * sparsity)
    assert sum(found) == total and all(0 <= zeros <= columns for zeros in found)

    def at(c: int) -> list[int]:
        return [min(columns, max(0, math.floor((columns * offset + c) / 256))) for offset in row]

    least, most = -columns * max(row), columns * (256 - min(row))  # no zeros, and nothing else
    c = max(c for c in range(least, most + 1) if sum(at(c)) <= total)
    assert all(low <= zeros <= high for low, zeros, high in zip(at(c), found, at(c + 1), strict=True))
    left = [k for k, (low, high) in enumerate(zip(at(c), at(c + 1), strict=True)) if low < high]
    taken = [k for k, low in enumerate(at(c)) if found[k] > low]
    assert taken == left[: len(taken)]  # the first


def test_offsets_are_stored_as_text_and_read_again() -> None:
    shapes = ((Shape(3, 4, True), Shape(2, 8, False)), (), (Shape(1, 4, True),))
    offsets = RowOffsets(((as_bytes([-127, 0, 127]), as_bytes([1, -1])), (), (as_bytes([5]),)))
    assert RowOffsets.read(offsets.stored(), shapes) == offsets
    far = np.array([0.5, -9.0, 0.0019])
    assert RowOffsets.of([[far]]).blocks == ((as_bytes([127, -127, 0]),),)
    assert offsets.scaled(0.5).blocks[0] == (as_bytes([-64, 0, 64]), as_bytes([0, 0]))
    other = RowOffsets(((as_bytes([-127, 10, 27]), as_bytes([1, 3])), (), (as_bytes([5]),)))
    assert offsets.towards(other, 0.25).blocks[0] == (as_bytes([-127, 2, 102]), as_bytes([1, 0]))


@parametrize(
    ("text", "message"),
    [
        ("%%%", "no offsets of rows in base64"),
        ("AAAA", "no offsets of rows in base64"),
        (base64.b64encode(zlib.compress(b"\1" * 5)).decode(), "not one offset for each of the 6 rows"),
        (base64.b64encode(zlib.compress(b"\1" * 10**7)).decode(), "not one offset for each of the 6 rows"),
        (base64.b64encode(zlib.compress(b"\1" * 6)[:-3]).decode(), "not one offset for each of the 6 rows"),
    ],
)
def test_offsets_of_another_model_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RowOffsets.read(text, ((Shape(4, 4, True), Shape(2, 4, False)),))


def test_between_two_targets_offsets_are_linear() -> None:
    rows = [RowOffsets(((as_bytes([offset, -offset]),),)) for offset in (20, 40)]
    ends = [RowSparsities(((s,),), offsets) for s, offsets in zip((0.3, 0.4), rows, strict=True)]
    found = gradient.between((0.3, 0.4), ends, 0.35)
    assert found.linears[0][0] == pytest.approx(0.35) and found.offsets == RowOffsets(((as_bytes([30, -30]),),))
    assert gradient.between((0.3, 0.4), ends, 0.4) == ends[1]


# Masks


def by_rows(weight: Tensor, x: Tensor, zeros: Sequence[int]) -> Tensor:
    """The weight without the lowest scores of each row, the leftmost of equal ones first."""
    norms = x.float().square().sum(0).sqrt()
    kept = weight.clone()
    for r, count in enumerate(zeros):
        found = (weight[r].abs().float() * norms).tolist()
        for j in sorted(range(len(found)), key=lambda j: (found[j], j))[:count]:
            kept[r, j] = 0
    return kept


@parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_lose_their_lowest_scores(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(6, 16).to(dtype), torch.randn(40, 16)
    weight[2, 3:9] = 0.5  # ties
    norms = InputNorms(16, torch.device("cpu"))
    norms.add(x)
    zeros = torch.tensor([0, 16, 8, 5, 9, 1])
    rule = of_rows(make_pruner("wanda"), zeros)
    expected = by_rows(weight, x, zeros.tolist())
    assert torch.equal(rule.prune(weight, 0.9, norms), expected)
    assert torch.equal(rule.prune(weight, 0.9, Ranks.of(weight, norms)), expected)


def test_what_follows_the_masks_keeps_them() -> None:
    """Refinement, and rounding."""
    torch.manual_seed(0)
    weight, x = torch.randn(6, 16), torch.randn(40, 16)
    zeros = torch.tensor([2, 14, 8, 5, 9, 1])
    kind = make_pruner("wanda", refine=3).measures
    assert kind is not None
    both = kind(16, torch.device("cpu"))
    both.add(x)
    mask = by_rows(weight, x, zeros.tolist()) == 0
    refined = of_rows(make_pruner("wanda", refine=3), zeros).prune(weight, 0.5, both)
    assert torch.equal(refined == 0, mask) and not torch.equal(refined[~mask], weight[~mask])
    norms = InputNorms(16, torch.device("cpu"))
    norms.add(x)
    rule: Any = of_rows(Treatment(Wanda(), quantizer=RTN(-1, False)), zeros)
    rounded = rule.rounded(rule.prune(weight, 0.5, norms), 8, norms)
    assert (rounded == 0)[mask].all() and not torch.equal(rounded[~mask], weight[~mask])


# Prices


def row_pricing_of(context: Session) -> RowPricing:
    base = pricing_of(context)
    assert isinstance(base.levels, ByPlaces)
    return RowPricing(base.gradients, base.levels.places)


def dense_states(context: Session, ids: Tensor) -> Tensor:
    """Final hidden states of the dense model."""
    batch = AutoBatch(CPU, 1, 1, lambda text: None)
    return dense_final_states(context.replay, batch, [ids], ignore_events)[0]


def naive_step(
    model: Any,
    context: Session,
    linears: LinearSparsities,
    offsets: list[list[list[float]]],
    ids: Tensor,
    share: float,
) -> tuple[list[list[float]], list[list[list[float]]]]:
    """Prices of linears and of their rows, by the gradient of a whole pruned copy's loss: a share of NLL, and KL."""
    all_scores = scores(model, context.checkpoint, context.items("calibration"), "wanda")
    places, zeros = {}, {}

    def zeroed(i: int, k: int, weight: Tensor) -> Tensor:
        rows, columns = weight.shape
        places[i, k] = places_in_rows([all_scores[i][k][r * columns : (r + 1) * columns] for r in range(rows)])
        zeros[i, k] = [min(columns, max(0, round(columns * (linears[i][k] + d)))) for d in offsets[i][k]]
        return places[i, k] < torch.tensor(zeros[i, k])[:, None]

    def loss(logits: Tensor) -> Tensor:
        p = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1).detach().softmax(1)
        kl = (p * (p.log() - logits.log_softmax(1))).sum(1).mean()
        return share * functional.cross_entropy(logits, ids[:, 1:].flatten()) + (1 - share) * kl

    of_linears: list[list[float]] = []
    of_rows_: list[list[list[float]]] = []
    for i, row in enumerate(whole_gradients(model, context, ids, zeroed, loss)):
        of_linears.append([])
        of_rows_.append([])
        for k, (weight, slopes) in enumerate(row):
            columns, each = weight.shape[1], []
            for r in range(weight.shape[0]):
                near = [
                    j
                    for j in range(columns)
                    if abs(int(places[i, k][r, j]) - zeros[i, k][r]) < max(1, int(BAND * columns))
                ]
                each.append([-float(slopes[r, j]) * float(weight[r, j]) for j in near])
            flat = [cost for costs in each for cost in costs]
            mean = math.fsum(flat) / len(flat)
            of_linears[-1].append(mean)
            of_rows_[-1].append([math.fsum(costs) / len(costs) if costs else mean for costs in each])
    return of_linears, of_rows_


def naive_move(smooth: list[float], offsets: list[float], found: list[float]) -> tuple[list[float], list[float]]:
    """The moving means and offsets of a linear's rows after one step."""
    smooth = [0.7 * v + 0.3 * p for v, p in zip(smooth, found, strict=True)]
    mean = math.fsum(smooth) / len(smooth)
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in smooth) / len(smooth))
    moved = [d - DISTANCE * max(-3.0, min(3.0, (v - mean) / deviation)) for d, v in zip(offsets, smooth, strict=True)]
    return smooth, [d - math.fsum(moved) / len(moved) for d in moved]


@parametrize("family", few(FAMILIES, FAST))
def test_rows_move_by_gradients_of_the_whole_pruned_model(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps, ten times as long, so that the second has other masks than the first, and KL alone (`prune.loss`)."""
    monkeypatch.setattr("atp_tune.blocks.gradients.DISTANCE", 10 * DISTANCE)
    monkeypatch.setattr("test_gradient_rows.DISTANCE", 10 * DISTANCE)
    model = tiny(family)
    context, sparsities = bench_of(model), uneven(bench_of(model))
    pricing = row_pricing_of(context)
    shapes = context.checkpoint.shapes
    offsets = [[[0.0] * shape.rows for shape in row] for row in shapes]
    smooth = [[[0.0] * shape.rows for shape in row] for row in shapes]
    for step, loss in enumerate(("both", "kl")):
        ids, share = random_ids(6, seed=5 + step), NLL_SHARES[loss]
        of_linears, of_rows_ = naive_step(model, context, sparsities, offsets, ids, share)
        assert close(pricing.prices(sparsities, Sample(ids, dense_states(context, ids), share)), of_linears)
        for i, row in enumerate(of_rows_):
            for k, found in enumerate(row):
                smooth[i][k], offsets[i][k] = naive_move(smooth[i][k], offsets[i][k], found)
        for i, row in enumerate(context.checkpoint.linears):
            for k, linear in enumerate(row):
                assert pricing._offsets[i, linear.name].tolist() == pytest.approx(offsets[i][k], abs=2e-4)
    kept = pricing.offsets().blocks
    assert any(any(row) for block in kept for row in block)
    for row, block in zip(offsets, kept, strict=True):
        for wanted, numbers in zip(row, block, strict=True):
            assert np.frombuffer(numbers, np.int8).tolist() == pytest.approx([256 * d for d in wanted], abs=0.6)


@parametrize("family", few(MIXTURES, ("mixtral",)))
def test_rows_of_an_expert_without_tokens_stay(family: str) -> None:
    context = bench_of(tiny(family))
    pricing = row_pricing_of(context)
    found = pricing.prices(uneven(context), Sample(random_ids(1, 2)))
    assert all(math.isfinite(price) for row in found for price in row)
    assert all(offsets.isfinite().all() for offsets in pricing._offsets.values())


# Which pruners


# Studies

STUDY = settings('allocation=["gradient-rows"]', "search.trials=4")


@slow
def test_a_study_with_rows(place: Path, command: CommandLine, cache: Path) -> None:
    """It is resumed, exported, applied and packed with the rows that its trials stored, also without the cache."""
    answer = command("--study", place / "tiny.toml", *STUDY)
    assert answer.is_clean
    assert "gradient-rows (κ = " in answer.out
    study = stored(place)
    one = study.trials[1].user_attrs
    plans = [Plan.model_validate(trial.user_attrs["plan"]) for trial in study.trials]
    assert [plan.by_row for plan in plans[:3]] == [False, True, True] and plans[1].levels != plans[2].levels
    assert one["realised"] == pytest.approx(0.6, abs=1e-3)
    assert one["realised"] > study.trials[0].user_attrs["realised"]
    command.ok("--study", place / "tiny.toml", "--study-name", "again", *STUDY)
    assert [t.values for t in stored(place, "again").trials] == [t.values for t in study.trials]
    for file in (cache / "gradient").glob("*"):
        file.unlink()
    best = read_config(place / "tiny.best.json")
    assert best.plan.allocation == "gradient-rows" and best.plan.by_row
    words = ("--config", place / "tiny.best.json")
    assert "(+0.000%)" in command.ok("apply", *words, "--out", place / "sparse").out
    assert "(+0.000%)" in command.ok("apply", *words, "--packed", "--out", place / "packed").out
    assert not list((cache / "gradient").glob("*.json"))
    assert "Each row of each linear has its own share of zeros" in (place / "sparse" / "README.md").read_text()
    recipe = command(
        "export", "--study", place / "tiny.toml", "--format", "llm-compressor", "--out", place / "recipe.yaml"
    )
    assert recipe.code == 2 and "gradient-rows" in recipe.err
    listed = command.ok("export", *words, "--format", "csv", "--out", place / "listed.csv")
    assert "rows of a linear differ in sparsity" in listed.err
    assert command("export", *words, "--out", place / "again.json").err == ""
