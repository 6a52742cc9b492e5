"""RTN and GPTQ against loops; what is zero stays zero; the same blocks in the pass over the model."""

from typing import Any

import naive
import torch
from expect import parametrize, slow
from families import MIXTURES, bench_of, few, same_bits, tiny
from hypothesis import assume, given
from hypothesis import strategies as st
from test_pruners import Problem, dtypes, hessian_of, norms_of, problem, problems, small, tied_problems

from atp_tune.blocks.prune_pass import unmeasured
from atp_tune.config.prune import QuantizeConfig, make_plan
from atp_tune.plan import Plan
from atp_tune.pruners import QUANTIZERS
from atp_tune.pruners.refinement import Treatment
from atp_tune.pruners.rounding import GPTQ, RTN
from atp_tune.pruners.sparsegpt import SparseGPT
from atp_tune.pruners.wanda import Wanda
from atp_tune.run.session import Session

widths = st.integers(2, 8)
sizes = st.sampled_from([-1, 1, 3, 8, 128])
DAMPING = 0.01


@given(problems() | tied_problems, dtypes, widths, sizes, st.booleans())
def test_rtn_is_its_loop(case: Problem, dtype: torch.dtype, bits: int, size: int, symmetric: bool) -> None:
    weight = case[0].to(dtype)
    rounded = RTN(size, symmetric).quantize(weight, bits, None)
    assert rounded.dtype == dtype
    assert torch.equal(rounded, naive.rtn(weight, bits, size, symmetric))
    assert not rounded[weight == 0].any()


@slow
@given(problems(small), widths, sizes, st.booleans(), st.booleans(), st.booleans())
def test_gptq_is_its_loop(case: Problem, bits: int, size: int, symmetric: bool, sparse: bool, ordered: bool) -> None:
    weight, x = case
    zeros = weight < weight.median() if sparse else None
    weight = weight if zeros is None else weight.masked_fill(zeros, 0)
    order = hessian_of(x, 3).order().tolist() if ordered else None
    expected = naive.gptq(weight, x, bits, size, symmetric, DAMPING, zeros, order)
    noise = 1 + 1e-5 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    near = naive.gptq(weight * noise, x, bits, size, symmetric, DAMPING, zeros, order)
    assume(torch.allclose(near, expected, atol=1e-3, rtol=1e-3))  # else a weight lies between two values
    found = GPTQ(size, symmetric, DAMPING, ordered).quantize(weight, bits, hessian_of(x, 3), zeros)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-4)
    if zeros is not None:
        assert not found[zeros].any()
    assert not found[:, (x == 0).all(0)].any()


def test_columns_are_ordered_by_their_inputs() -> None:
    """The largest sum of squares first, dead inputs last, ties as they stand; a restored factor is the same."""
    hessian = hessian_of(torch.tensor([[1.0, 0.0, -3.0, 2.0, 1.0], [1.0, 0.0, 0.0, 2.0, -1.0]]), 1)
    assert hessian.order().tolist() == [2, 3, 0, 4, 1]
    R = hessian.factor(DAMPING, ordered=True)
    expected = hessian.matrix()[hessian.order()][:, hessian.order()]
    expected += DAMPING * expected.diagonal().mean() * torch.eye(5)
    torch.testing.assert_close(R @ R.T, expected)
    assert not torch.equal(R, hessian.factor(DAMPING))
    again = type(hessian).restored(hessian.tensors())
    assert torch.equal(again.factor(DAMPING, ordered=True), R)
    assert torch.equal(again.factor(DAMPING), hessian.factor(DAMPING))


@parametrize("name", ["rtn", "gptq"])
def test_after_a_pruner_zeros_stay(name: str) -> None:
    weight, x = problem((17, 29))
    both = Treatment(Wanda(), quantizer=QUANTIZERS[name](8, False, DAMPING))
    assert both.measures is not None
    statistics = both.measures(29, torch.device("cpu"))
    statistics.add(x)
    both.prepare(statistics)
    found = both.rounded(both.prune(weight, 0.5, statistics), 3, statistics)
    mask = naive.wanda_mask(weight, x, 0.5)
    assert not found[mask].any()
    sparse = Wanda().prune(weight, 0.5, norms_of(x))
    assert same_bits(found, QUANTIZERS[name](8, False, DAMPING).quantize(sparse, 3, hessian_of(x), mask))


@parametrize("inner", [Wanda(), SparseGPT()])
def test_a_refined_pruner_and_gptq_share_one_hessian(inner: Any) -> None:
    weight, x = problem((17, 29))
    pruner = Treatment(inner, 3)
    both = Treatment(inner, 3, quantizer=GPTQ(8, False))
    assert both.measures is pruner.measures
    assert both.measures is not None
    statistics = both.measures(29, torch.device("cpu"))
    statistics.add(x)
    both.prepare(statistics)
    sparse = pruner.prune(weight, 0.5, statistics)
    alone = GPTQ(8, False).quantize(sparse, 3, hessian_of(x), sparse == 0)
    assert same_bits(both.rounded(both.prune(weight, 0.5, statistics), 3, statistics), alone)


def test_a_linear_without_inputs_is_rounded_to_nearest() -> None:
    weight, _ = problem((5, 9))
    rule: Any = unmeasured(Treatment(None, quantizer=GPTQ(4, True)))
    assert same_bits(rule.rounded(rule.prune(weight, 0.0, None), 3, None), RTN(4, True).quantize(weight, 3, None))
    both: Any = unmeasured(Treatment(Wanda(), quantizer=GPTQ(4, True)))
    assert int((both.rounded(both.prune(weight, 0.5, None), 3, None) == 0).sum()) >= int(weight.numel() * 0.5)


# the pass over the blocks


def bench(family: str, **keys: Any) -> Session:
    work = bench_of(tiny(family))
    work.quantize, work.prunes = QuantizeConfig(group_size=12, **keys), False
    return work


def plan_of(work: Session, name: str, bits: float = 3.5) -> Plan:
    assert work.quantize is not None
    share = (8 - bits) / 6
    return make_plan(name, "uniform", work.budget(share), {})


@parametrize("family", few(("llama", "gpt2", *MIXTURES), ("llama", "gpt2")))
@parametrize("name", ["rtn", "gptq"])
def test_blocks_are_rounded_in_order(family: str, name: str) -> None:
    """Each behind those that are rounded already, each linear on its own."""
    work = bench(family)
    plan = plan_of(work, name)
    assert set(plan.amounts) == {3, 4}
    seen = []
    for block in work.prune(plan):
        dense = work.checkpoint.weights(block.index)
        for linear in work.checkpoint.linears[block.index]:
            was, now = linear.matrix(dense[linear.key]), linear.matrix(block.weights[linear.key])
            if name == "rtn":
                assert same_bits(now.contiguous(), naive.rtn(was, int(plan.amounts[block.index]), 12, False))
            for row in now[:3]:
                assert max(len(part.unique()) for part in row.split(12)) <= 2 ** int(plan.amounts[block.index])
        seen += set(block.bits.values())
    assert tuple(seen) == plan.amounts
