"""Costs of bits against gradients of the whole model, window by window, and the plan that follows from them."""

import math
from typing import Any

import naive
import pytest
import torch
from expect import parametrize, slow
from families import CPU, FAMILIES, MIXTURES, bench_of, few, random_ids, tiny
from torch import Tensor
from torch.nn import functional

from atp_tune.allocations import Budget
from atp_tune.allocations.budget import Costs
from atp_tune.allocations.gradient import cheapest_shares
from atp_tune.blocks.gradients import BitPricing, BlockGradients
from atp_tune.blocks.replay import AutoBatch
from atp_tune.pruners.rounding import RTN
from atp_tune.run.dense_model import CalibrationGradients, bit_costs
from atp_tune.run.session import Session

WIDTHS, GROUP = (2, 3, 5), 8
LEVELS = [GROUP, False, [*WIDTHS]]


def costs_of(context: Session, ids: Tensor) -> Costs:
    """The costs of asymmetric groups of 8, a few windows at a time."""
    batch = AutoBatch(CPU, 1, 1, lambda text: None)
    batch.windows = 4
    gradients = BlockGradients(context.checkpoint, context.inputs, context.score.gradient, batch, context.heads)
    return BitPricing(gradients, at_widths).costs(ids)


def at_widths(index: int, linear: Any, weight: Tensor) -> list[Tensor]:
    return [RTN(GROUP, False).quantize(weight, bits, None) for bits in WIDTHS]


def naive_costs(model: Any, context: Session, ids: Tensor) -> list[list[list[float]]]:
    """The formula, weight by weight, with the gradients of the whole model."""
    checkpoint, total = context.checkpoint, dict[tuple[int, int, int], float]()
    model.requires_grad_(True)
    for window in ids:
        model.zero_grad()
        logits = model(input_ids=window[None], use_cache=False).logits[0, :-1]
        functional.cross_entropy(logits, window[1:]).backward()
        for i, linears in enumerate(checkpoint.linears):
            for k, linear in enumerate(linears):
                parameter = model.get_parameter(checkpoint.key(i, linear))
                weight = linear.matrix(parameter.data)
                gradient = None if parameter.grad is None else linear.matrix(parameter.grad)
                for b, bits in enumerate(WIDTHS):
                    error = (naive.rtn(weight, bits, GROUP, False) - weight).flatten().tolist()
                    slopes = [0.0] * len(error) if gradient is None else gradient.flatten().tolist()
                    found = math.fsum(e * g for e, g in zip(error, slopes, strict=True))
                    total[i, k, b] = total.get((i, k, b), 0.0) + found**2 / len(ids)
    model.requires_grad_(False)
    return [
        [[total[i, k, b] for b in range(len(WIDTHS))] for k in range(len(linears))]
        for i, linears in enumerate(checkpoint.linears)
    ]


def flat(costs: Any) -> list[float]:
    return [cost for block in costs for linear in block for cost in linear]


@parametrize("family", few([*FAMILIES, *MIXTURES], ("llama",)))
def test_costs_are_by_gradients_of_the_whole_model(family: str) -> None:
    model = tiny(family)
    context, ids = bench_of(model), random_ids(3, seed=5)
    expected = flat(naive_costs(model, context, ids))
    assert flat(costs_of(context, ids)) == pytest.approx(expected, rel=2e-3, abs=1e-6 * max(expected))
    assert min(expected) >= 0


@slow
def test_costs_are_kept_and_give_a_plan(cache: Any) -> None:
    context = bench_of(tiny("llama").requires_grad_(False))
    said: list[Any] = []
    pool = context.windows["calibration"]
    parts = (context.checkpoint, context.inputs, context.score, pool, context.heads, said.append)
    gradients = CalibrationGradients(*parts)
    with torch.inference_mode():
        found = bit_costs(gradients, at_widths, "model", LEVELS)
    assert said
    said.clear()
    assert flat(bit_costs(gradients, at_widths, "model", LEVELS)) == flat(found)
    assert not said
    shapes = context.checkpoint.shapes
    shares = cheapest_shares(found, Budget(0.5, (), shapes, widths=WIDTHS))
    assert [len(row) for row in shares] == [len(row) for row in shapes]
    sizes = [shape.size for row in shapes for shape in row]
    mean = sum(s * size for s, size in zip((s for row in shares for s in row), sizes, strict=True)) / sum(sizes)
    assert 0.5 - 1e-9 <= mean < 0.55
    assert {round(s, 9) for row in shares for s in row} <= {0.0, round(2 / 3, 9), 1.0}
    for other in ([4, False, [*WIDTHS]], [GROUP, True, [*WIDTHS]]):
        assert len(bit_costs(gradients, at_widths, "model", other)[0][0]) == len(WIDTHS)
        assert said
        said.clear()
