import copy
from collections.abc import Callable
from typing import Any

import naive
import pytest
import test_prune_pass
import torch
from expect import parametrize, slow
from families import ALL, MIXTURES, TOKENS, bench_of, few, random_ids, same_bits, tiny
from plans import planned
from test_experts import silence
from test_prune_pass import atp_plan, check_same_weights, magnitude, wanda, work_of
from torch import Tensor, nn

from atp_tune.blocks.prune_pass import Pass, prune_sequentially
from atp_tune.blocks.replay import Replay
from atp_tune.checkpoints.blocks import find_linears
from atp_tune.config.prune import PruneConfig
from atp_tune.errors import TrialError
from atp_tune.plan import Plan
from atp_tune.pruners import make_pruner
from atp_tune.pruners.statistics import InputNorms

PruneMatrix = Callable[[Tensor, Tensor, float], Tensor]
ONE_PASS = PruneConfig(statistics="sequential")


def order_of(model: Any, block: str, ids: Tensor) -> list[str]:
    """Names in the model of the linears of a block, in the order in which they multiply."""
    linears, met = find_linears(model.get_submodule(block)), list[str]()
    plain = {x.name for x in linears if x.expert is None}
    paths = {x.key.rpartition(".")[0] for x in linears if x.expert is not None}
    hooks = [
        model.get_submodule(f"{block}.{name}").register_forward_pre_hook(lambda *_, name=name: met.append(name))
        for name in (*plain, *paths)
    ]
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    experts = {path: [x.name for x in linears if x.key.rpartition(".")[0] == path] for path in paths}
    return [f"{block}.{name}" for found in met for name in experts.get(found, [found])]


def naive_pass(model: Any, work: Any, plan: Plan, prune: PruneMatrix) -> Any:
    """A copy of the model, pruned linear after linear, with a full forward of the copy before each."""
    ids, pruned = random_ids(5, TOKENS, seed=0), copy.deepcopy(model)
    for index, sparsity in enumerate(plan.amounts):
        for name in order_of(model, f"{work.checkpoint.blocks_name}.{index}", ids):
            x = naive.inputs_of(pruned, [name], ids)[name]
            with torch.no_grad():
                weight = naive.weight_of(pruned, name)
                weight.copy_((prune if len(x) else magnitude)(weight.clone(), x, sparsity))
    return pruned


@slow
@parametrize("family", few(ALL, ("llama", "gpt2", "bloom", "deepseek_v3", "gpt_oss", "qwen2_moe-mixed")))
def test_each_linear_is_measured_behind_all_that_is_pruned(family: str) -> None:
    model = tiny(family)
    before, work = copy.deepcopy(model).state_dict(), bench_of(model, ONE_PASS)
    plan = atp_plan(work, "wanda")
    pruned, sparse = list(work.prune(plan)), naive_pass(model, work, plan, wanda)
    check_same_weights(pruned, sparse, work)
    assert all(same_bits(tensor, before[name]) for name, tensor in model.state_dict().items())

    ids = random_ids(5, TOKENS, seed=0)
    blocks = work.checkpoint.blocks_name
    for block in pruned:  # the hidden states that move on are those behind the pruned block
        after = naive.states_of(sparse, sparse.get_submodule(blocks), ids)[block.index]
        dense = naive.states_of(model, model.get_submodule(blocks), ids)[block.index]
        assert block.error == pytest.approx(float((after - dense).norm() / dense.norm()), rel=1e-4)


@slow
@parametrize("statistics", ["block", "dense", "sequential"])
@parametrize("family", ["olmoe", "gpt_oss"])
def test_an_expert_that_no_token_is_sent_to_is_pruned_by_magnitude(family: str, statistics: Any) -> None:
    model = silence(tiny(family))
    work, plan = bench_of(model, PruneConfig(statistics=statistics)), planned("wanda", "atp", (0.4, 0.5, 0.6))
    pruned = list(work.prune(plan))
    names = ("mlp.experts.gate_up_proj[2]", "mlp.experts.down_proj[2]")
    assert [block.experts_without_tokens for block in pruned] == [(), names, ()]
    if statistics == "sequential":
        expected = naive_pass(model, work, plan, wanda)
    else:
        expected = test_prune_pass.naive_pass(model, work, plan, wanda, dense=statistics == "dense")[0]
    check_same_weights(pruned, expected, work)
    for linear in work.checkpoint.linears[1]:
        if linear.name in names:
            dense = naive.weight_of(model, f"model.layers.1.{linear.name}")
            assert same_bits(linear.matrix(pruned[1].weights[linear.key]), magnitude(dense, dense, 0.5))
            assert pruned[1].zeros[linear.name] == int(linear.size * 0.5)


@parametrize("family", few(["llama", "mistral", "bloom", *MIXTURES], ("mistral", "gpt_oss")))
@torch.inference_mode()
def test_batches_do_not_matter_and_each_block_runs_once(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, found, original = planned("wanda", "uniform", (0.5,) * 4), [], Replay.step
    for windows in (8, 1, 3):
        replay, batch, hidden = work_of(tiny(family), windows)
        ran: list[int] = []
        monkeypatch.setattr(
            Replay, "step", lambda self, index, rows, ran=ran: ran.append(len(rows)) or original(self, index, rows)
        )
        work = Pass(replay, batch, make_pruner("wanda"), None, in_one_pass=True)
        found.append(list(work.run(plan, hidden)))
        assert sum(ran) == 7 * len(replay.checkpoint.blocks)
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            for name, tensor in a.weights.items():
                torch.testing.assert_close(b.weights[name], tensor, rtol=1e-5, atol=1e-6)


class Pair(nn.Module):
    """Two linears; the second is left out where the first number of the input is negative."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        after: Tensor = self.a(x)
        return after if x.flatten()[0] < 0 else self.b(after)


def prune_pair(block: nn.Module, batches: list[Tensor]) -> list[str]:
    met: list[str] = []
    runs = [lambda x=x: block(x) for x in batches]
    prune_sequentially(block, find_linears(block), InputNorms, runs, lambda linear, statistics: met.append(linear.name))
    return met


def test_batches_that_part_are_an_error() -> None:
    block, x = Pair(), torch.ones(2, 3)
    assert prune_pair(block, [x, x]) == ["a", "b"]
    with pytest.raises(TrialError, match=r'different orders; set statistics = "block"$'):
        prune_pair(block, [x, -x])
    with pytest.raises(TrialError, match="linear b was not run by its block"):
        prune_pair(block, [-x, -x])


def test_a_linear_that_runs_twice_is_pruned_once() -> None:
    class Twice(Pair):
        def forward(self, x: Tensor) -> Tensor:
            again: Tensor = self.a(self.b(self.a(x)))
            return again

    assert prune_pair(Twice(), [torch.ones(2, 3)] * 2) == ["a", "b"]


class Mixed(nn.Module):
    """A block that computes one linear under autocast, as a model's own code may."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 6), nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            hidden = self.up(x)
        return x + self.down(hidden.float())


def test_a_setting_of_torch_around_a_linear_is_an_error_and_does_not_stay() -> None:
    """In a greenlet that stops there it would hold for the other batches, and for the process."""
    block, rows = Mixed(), torch.randn(2, 3, 8)
    runs = [lambda row=row: block(row) for row in rows]
    with pytest.raises(TrialError, match=r'changes settings of torch.*set statistics = "block"$'):
        prune_sequentially(block, find_linears(block), InputNorms, runs, lambda linear, statistics: None)
    assert not torch.is_autocast_enabled("cpu")
    assert block(rows[0]).dtype == torch.float32
    assert (nn.Linear(2, 2)(torch.ones(1, 2))).dtype == torch.float32
