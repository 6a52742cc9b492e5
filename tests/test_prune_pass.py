import copy
import weakref
from collections.abc import Callable
from typing import Any

import naive
import pytest
import torch
from expect import parametrize, slow
from families import (
    ALL,
    CPU,
    MIXTURES,
    TOKENS,
    bench_of,
    copy_of,
    few,
    nlls_of,
    random_ids,
    replay_of,
    same_bits,
    tiny,
)
from plans import planned
from torch import Tensor, nn
from torch.testing import assert_close

from atp_tune.allocations.formulas import atp
from atp_tune.blocks import prune_pass
from atp_tune.blocks.channels import ChannelPruner
from atp_tune.blocks.prune_pass import PrunedBlock, advance, measure_and_advance
from atp_tune.blocks.replay import AutoBatch, Replay
from atp_tune.checkpoints import devices
from atp_tune.config.prune import PruneConfig, make_plan
from atp_tune.plan import Plan
from atp_tune.pruners.settings import SparseGPTSettings
from atp_tune.pruners.statistics import Hessian, InputNorms
from atp_tune.pruners.wanda import Wanda
from atp_tune.run.session import Session

PruneMatrix = Callable[[Tensor, Tensor, float], Tensor]  # weight [out, in], x [tokens, in], sparsity
TARGET = 0.55


def atp_plan(bench: Session, pruner: str) -> Plan:
    budget = bench.budget(TARGET)
    beta = 0.8 * atp.bounds(budget)["beta"][1]
    return make_plan(pruner, "atp", budget, {"beta": beta})


def test_statistics_are_gone_before_the_pruned_block_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of SparseGPT may be larger than the block."""
    known: list[weakref.ref[Any]] = []
    alive: list[int] = []

    def measured(*arguments: Any, **options: Any) -> Any:
        found = measure_and_advance(*arguments, **options)
        known.extend(map(weakref.ref, found[0].values()))
        return found

    def advanced(*arguments: Any) -> Tensor:
        alive.append(sum(one() is not None for one in known))
        return advance(*arguments)

    monkeypatch.setattr(prune_pass, "measure_and_advance", measured)
    monkeypatch.setattr(prune_pass, "advance", advanced)
    work = bench_of(tiny("llama"), prune=PruneConfig(pruners=("sparsegpt",)))
    list(work.prune(atp_plan(work, "sparsegpt")))
    assert known and alive == [0] * len(work.checkpoint.blocks)


def naive_pass(model: Any, work: Session, plan: Plan, prune: PruneMatrix, dense: bool = False) -> Any:
    """A copy of the model, pruned block after block in its full forward; and the error curve."""
    ids, blocks = random_ids(5, TOKENS, seed=0), work.checkpoint.blocks_name
    pruned, errors = copy.deepcopy(model), []
    states = naive.states_of(model, work.checkpoint.blocks, ids)
    for index, sparsity in enumerate(plan.amounts):
        names = [f"{blocks}.{index}.{linear.name}" for linear in work.checkpoint.linears[index]]
        inputs = naive.inputs_of(model if dense else pruned, names, ids)
        for name in names:
            rule = prune if len(inputs[name]) else magnitude  # an expert without a token
            with torch.no_grad():
                weight = naive.weight_of(pruned, name)
                weight.copy_(rule(weight.clone(), inputs[name], sparsity))
        after = naive.states_of(pruned, pruned.get_submodule(blocks), ids)[index]
        errors.append(float((after - states[index]).norm() / states[index].norm()))
    return pruned, errors


def wanda(weight: Tensor, x: Tensor, sparsity: float) -> Tensor:
    return weight.masked_fill(naive.wanda_mask(weight, x, sparsity), 0)


def magnitude(weight: Tensor, x: Tensor, sparsity: float) -> Tensor:
    return weight.masked_fill(naive.magnitude_mask(weight, sparsity), 0)


def check_same_weights(pruned: list[PrunedBlock], expected: Any, work: Session) -> None:
    """All tensors of all blocks, bit by bit."""
    found = expected.state_dict()
    assert len(pruned) == len(work.checkpoint.blocks)
    for block in pruned:
        for name, tensor in block.weights.items():
            assert same_bits(tensor, found[f"{work.checkpoint.blocks_name}.{block.index}.{name}"]), name


@slow
@parametrize("family", ALL)
def test_wanda_with_atp_in_every_family(family: str) -> None:
    model = tiny(family)
    before, work = copy_of(model), bench_of(model)
    plan = atp_plan(work, "wanda")
    pruned = list(work.prune(plan))

    expected, errors = naive_pass(model, work, plan, wanda)
    check_same_weights(pruned, expected, work)
    assert [block.error for block in pruned] == pytest.approx(errors, rel=1e-4)

    for block, sparsity, linears in zip(pruned, plan.amounts, work.checkpoint.linears, strict=True):
        assert block.experts_without_tokens == ()
        counts = {x.name: x.out_features * int(x.in_features * sparsity) for x in linears}
        assert block.zeros == counts
        assert {x.name: int((x.matrix(block.weights[x.key]) == 0).sum()) for x in linears} == counts
    realised = sum(sum(block.zeros.values()) for block in pruned) / sum(work.checkpoint.sizes)
    assert TARGET - 1 / 16 < realised <= TARGET  # at most one weight per row of 16 or more is lost to the floor

    after = model.state_dict()
    assert all(same_bits(tensor, after[name]) for name, tensor in before.items())


@parametrize("family", few(ALL, ("llama", "gpt2", "falcon", "gemma3", "mixtral", "gpt_oss")))
def test_sparsegpt_in_every_family(family: str) -> None:
    model = tiny(family)
    before = copy_of(model)
    work = bench_of(model, PruneConfig(sparsegpt=SparseGPTSettings(damping=0.02, columns=16)))
    plan = atp_plan(work, "sparsegpt")
    pruned = list(work.prune(plan))
    for block, sparsity, linears in zip(pruned, plan.amounts, work.checkpoint.linears, strict=True):
        for x in linears:
            widths = [min(16, x.in_features - start) for start in range(0, x.in_features, 16)]
            assert block.zeros[x.name] == sum(int(x.out_features * width * sparsity) for width in widths)
            assert block.weights[x.key].isfinite().all()
    assert all(0 < block.error < 2 for block in pruned)
    after = model.state_dict()
    assert all(same_bits(tensor, after[name]) for name, tensor in before.items())


@parametrize("family", ["llama", "gpt2", "falcon", "qwen2_moe", "gpt_oss"])
def test_magnitude_measures_nothing(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("atp_tune.blocks.prune_pass.measure_and_advance", lambda *_: pytest.fail("measured"))
    model = tiny(family)
    work = bench_of(model)
    plan = atp_plan(work, "magnitude")
    pruned = list(work.prune(plan))
    expected, errors = naive_pass(model, work, plan, magnitude)
    check_same_weights(pruned, expected, work)
    assert [block.error for block in pruned] == pytest.approx(errors, rel=1e-4)


@slow
@parametrize("family", ["llama", "gpt2", *few(MIXTURES, ("deepseek_v3", "gpt_oss"))])
def test_sparsegpt_is_its_naive_pass(family: str) -> None:
    def prune(weight: Tensor, x: Tensor, sparsity: float) -> Tensor:
        return naive.sparsegpt(weight, x, sparsity, 0.05, 32)[0].float()

    model = tiny(family)
    work = bench_of(model, PruneConfig(sparsegpt=SparseGPTSettings(damping=0.05, columns=32)))
    plan = planned("sparsegpt", "atp", (0.4, 0.6, 0.5, 0.5)[: len(work.checkpoint.blocks)])
    expected = naive_pass(model, work, plan, prune)[0].state_dict()
    for block in work.prune(plan):
        for linear in work.checkpoint.linears[block.index]:
            found = linear.matrix(block.weights[linear.key])
            wanted = linear.matrix(expected[work.checkpoint.key(block.index, linear)])
            assert torch.equal(found == 0, wanted == 0)
            assert_close(found, wanted, rtol=1e-3, atol=1e-3)


@slow
@parametrize("family", ["llama", "gpt2", "gemma3", "bloom", "qwen3_moe"])
def test_dense_statistics_are_of_the_dense_model(family: str) -> None:
    model = tiny(family)
    work = bench_of(model, PruneConfig(statistics="dense"))
    plan = atp_plan(work, "wanda")
    expected, errors = naive_pass(model, work, plan, wanda, dense=True)
    first, second = list(work.prune(plan)), list(work.prune(plan))
    for pruned in (first, second):  # statistics are measured by the first and kept
        check_same_weights(pruned, expected, work)
        assert [block.error for block in pruned] == pytest.approx(errors, rel=1e-4)
    others = list(bench_of(model).prune(plan))
    assert not all(
        torch.equal(a.weights[x.key], b.weights[x.key])
        for a, b in zip(first, others, strict=True)
        for x in work.checkpoint.linears[a.index]
    )


def work_of(model: Any, windows: int) -> tuple[Replay, AutoBatch, Tensor]:
    replay = replay_of(model)
    batch = AutoBatch(CPU, TOKENS, 1, print)
    batch.windows = windows
    with torch.inference_mode():
        return replay, batch, replay.embed(random_ids(7)).clone()


@parametrize("family", few(["llama", "gpt2", "falcon-alibi", "mistral", *MIXTURES], ("gpt2", "gpt_oss")))
@parametrize(("kind", "value"), [(InputNorms, InputNorms.norms), (Hessian, Hessian.matrix)])
@torch.inference_mode()
def test_statistics_do_not_depend_on_the_batch_size(family: str, kind: Any, value: Any) -> None:
    model, found = tiny(family), []
    for windows in (8, 1, 2, 3):
        replay, batch, hidden = work_of(model, windows)
        weights = replay.checkpoint.weights(0)
        statistics, _ = measure_and_advance(replay, batch, 0, weights, hidden, kind, stops=True)
        found.append({name: value(s) for name, s in statistics.items()})
        full = naive.inputs_of(
            model, [f"{replay.checkpoint.blocks_name}.0.{x.name}" for x in replay.checkpoint.linears[0]], random_ids(7)
        )
        for linear in replay.checkpoint.linears[0]:
            x = full[f"{replay.checkpoint.blocks_name}.0.{linear.name}"]
            expected = naive.hessian(x).float() if kind is Hessian else x.square().sum(0).sqrt()
            assert_close(found[-1][linear.name], expected, rtol=1e-4, atol=1e-5)
    for other in found[1:]:
        for name, tensor in other.items():
            assert_close(tensor, found[0][name], rtol=1e-4, atol=1e-5)


def limit_memory(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """From here on a block with more than `most` windows is too much."""
    monkeypatch.setattr(devices.gc, "collect", int)  # takes longer than all else here
    original = Replay.step

    def step(self: Replay, index: int, hidden: Tensor) -> Tensor:
        if len(hidden) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return original(self, index, hidden)

    monkeypatch.setattr(Replay, "step", step)


@slow
@parametrize("most", [1, 2, 3])
@parametrize("prune", [PruneConfig(), PruneConfig(statistics="sequential"), PruneConfig(statistics="dense")])
def test_memory_that_runs_out_changes_no_result(prune: PruneConfig, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, events = tiny("llama"), []
    plan = atp_plan(bench_of(model), "wanda")
    expected = list(bench_of(model, prune).prune(plan))
    work = bench_of(model, prune, watch=events.append)
    limit_memory(monkeypatch, most)
    assert work.batch("calibration").windows >= 5
    for a, b in zip(work.prune(plan), expected, strict=True):
        assert a.error == pytest.approx(b.error, rel=1e-4)
        assert all(same_bits(tensor, b.weights[name]) for name, tensor in a.weights.items())
    assert work.batch("calibration").windows == {1: 1, 2: 2, 3: 2}[most]
    assert len([event for event in events if "memory ran out" in str(event)]) == 1


def limit_embedding(model: nn.Module, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on the model, its blocks aside, has memory for `most` windows at a time."""
    monkeypatch.setattr(devices.gc, "collect", int)
    original = model.forward

    def forward(input_ids: Tensor, **options: Any) -> Any:
        if len(input_ids) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4.00 GiB")
        return original(input_ids=input_ids, **options)

    monkeypatch.setattr(model, "forward", forward)


@slow
@parametrize("prune", [PruneConfig(), PruneConfig(statistics="sequential"), PruneConfig(statistics="dense")])
def test_an_embedding_for_which_memory_runs_out_fails_no_trial(
    prune: PruneConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, events = tiny("gemma2"), list[Any]()
    plan = atp_plan(bench_of(model), "wanda")
    work = bench_of(model, prune, watch=events.append)
    limit_embedding(model, 2, monkeypatch)
    nlls = nlls_of(work, [(block.index, block.weights) for block in work.prune(plan)], "validation")
    assert [work.batch(role).windows for role in ("calibration", "validation")] == [2, 2]
    assert len([event for event in events if "memory ran out" in str(event)]) == 3  # for each text, and the head
    other = bench_of(model, prune)
    other.begin({"calibration": 2, "validation": 2, "heads": work.heads.windows})
    assert nlls_of(other, [(block.index, block.weights) for block in other.prune(plan)], "validation") == nlls


@parametrize("pattern", ["unstructured", "channels"])
def test_memory_that_runs_out_while_pruning_changes_no_result(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when it is in pieces: released once, it is enough."""
    context = bench_of(tiny("llama"), PruneConfig(pattern=pattern))
    plan = make_plan("wanda", "uniform", context.budget(0.3), {}, context.pattern)
    expected = [block.weights for block in context.prune(plan)]
    failed: list[str] = []

    def once(owner: Any, name: str) -> None:
        whole = getattr(owner, name)

        def instead(*arguments: Any) -> Any:
            failed.append(name)
            if len(failed) == 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return whole(*arguments)

        monkeypatch.setattr(owner, name, instead)

    once(*((Wanda, "prune") if pattern == "unstructured" else (ChannelPruner, "_scores")))
    found = [block.weights for block in context.prune(plan)]
    assert len(failed) > 2
    assert all(same_bits(one[name], other[name]) for one, other in zip(expected, found, strict=True) for name in one)
