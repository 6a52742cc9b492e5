"""Values on a GPU: the same wherever weights lie, each time, and nearly those of a CPU."""

from statistics import fmean

import pytest
import torch
from cards import bench_on, plan, pruned_blocks, same_blocks, trial
from families import ALL, bench_of, nlls_of, tiny
from plans import planned

from atp_tune.checkpoints.files import Offload
from atp_tune.config.prune import PruneConfig

pytestmark = pytest.mark.gpu
PRUNERS = ["wanda", "sparsegpt", "magnitude"]


@pytest.mark.parametrize("offload", ["cpu", "disk"])
@pytest.mark.parametrize("pruner", PRUNERS)
def test_streamed_is_resident_to_the_last_bit(pruner: str, offload: Offload, device: torch.device) -> None:
    """Three trials in a row: a copy that is used before it is whole, or freed too early, need not show at once."""
    resident, streamed = bench_on(device), bench_on(device, offload)
    assert (resident.checkpoint.offload, streamed.checkpoint.offload) == ("none", offload)
    expected, nlls = pruned_blocks(resident, pruner), trial(resident, pruner).items["nlls"]
    for _ in range(3):
        assert same_blocks(pruned_blocks(streamed, pruner), expected)
        assert trial(streamed, pruner).items["nlls"] == nlls


def test_sequential_statistics_too(device: torch.device) -> None:
    settings = PruneConfig(statistics="sequential")
    expected = pruned_blocks(bench_on(device, prune=settings))
    assert same_blocks(pruned_blocks(bench_on(device, "cpu", prune=settings)), expected)


def test_a_trial_again_is_the_same_to_the_last_bit(device: torch.device) -> None:
    context = bench_on(device, dtype=torch.bfloat16)
    first, nlls = pruned_blocks(context), trial(context).items["nlls"]
    assert same_blocks(pruned_blocks(context), first)
    assert trial(context).items["nlls"] == nlls


@pytest.mark.parametrize("offload", ["cpu", "disk"])
@pytest.mark.parametrize("family", ALL)
def test_where_weights_lie_changes_no_bit(family: str, offload: Offload, device: torch.device) -> None:
    assert family_nlls(family, offload, device) == family_nlls(family, "none", device)


def family_nlls(family: str, offload: Offload, device: torch.device) -> list[float]:
    """Window NLLs of a pruned tiny model and of the dense one."""
    context = bench_of(tiny(family), offload=offload, device=device)
    blocks = context.prune(planned("wanda", "uniform", (0.5,) * len(context.checkpoint.blocks)))
    nlls = nlls_of(context, ((block.index, block.weights) for block in blocks), "validation")
    return [*nlls, *nlls_of(context, context.blocks(None), "test")]


@pytest.mark.parametrize("pruner", PRUNERS)
def test_a_cpu_comes_to_nearly_the_same(pruner: str, device: torch.device) -> None:
    """Zeros by the plan exactly, masks but for near-ties, NLLs but for those."""
    here, there = (bench_of(tiny("llama"), device=place) for place in (device, torch.device("cpu")))
    ones, others = (list(context.prune(plan(context, pruner))) for context in (here, there))
    weights = differ = 0
    for one, other in zip(ones, others, strict=True):
        assert one.zeros == other.zeros
        for linear in here.checkpoint.linears[one.index]:
            masks = [block.weights[linear.key].cpu() == 0 for block in (one, other)]
            differ += int((masks[0] != masks[1]).sum())
            weights += linear.size
    assert differ < 0.01 * weights
    nlls = [
        nlls_of(context, ((block.index, block.weights) for block in blocks), "validation")
        for context, blocks in ((here, ones), (there, others))
    ]
    assert fmean(nlls[0]) == pytest.approx(fmean(nlls[1]), rel=0.01)


def test_bf16_comes_near_float32(device: torch.device) -> None:
    benches = [bench_on(device, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    assert [context.dtype for context in benches] == ["float32", "bfloat16"]
    dense = [fmean(nlls_of(context, context.blocks(None), "validation")) for context in benches]
    pruned = [fmean(trial(context).items["nlls"]) for context in benches]
    assert dense[1] == pytest.approx(dense[0], rel=0.01)
    assert pruned[1] == pytest.approx(pruned[0], rel=0.02)
