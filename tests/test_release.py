"""What a command holds of a model is let go before it, or what comes after it, asks for more."""

import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from expect import parametrize, slow
from families import CPU, bench_of, copy_of, nlls_of, same_bits, setup_of, tiny
from plans import planned
from tinystudy import CommandLine, run, settings, stored
from torch import Tensor, nn

from atp_tune.blocks.prune_pass import Pass
from atp_tune.checkpoints.checkpoint import Checkpoint
from atp_tune.checkpoints.files import Offload
from atp_tune.config.prune import PruneConfig
from atp_tune.plan import Plan
from atp_tune.run.session import Session


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What happens to the models of a command: each load, and how many are left when a GPU's cache is emptied."""
    events: list[Any] = []
    models: list[weakref.ref[nn.Module]] = []
    load, empty = Checkpoint.load.__func__, torch.cuda.empty_cache  # type: ignore[attr-defined]

    def loading(cls: type[Checkpoint], *args: Any, **options: Any) -> Checkpoint:
        events.append("loaded")
        checkpoint: Checkpoint = load(cls, *args, **options)
        models.append(weakref.ref(checkpoint.blocks[0]))
        return checkpoint

    def emptying() -> None:
        if events:  # else it is of what came before
            events.append(sum(model() is not None for model in models))
        empty()

    monkeypatch.setattr(Checkpoint, "load", classmethod(loading))
    monkeypatch.setattr(torch.cuda, "empty_cache", emptying)
    gc.disable()  # so that it is no chance what it has found by then
    yield events
    gc.enable()


ONCE, TWICE, THRICE = (["loaded", 0] * times for times in (1, 2, 3))


@slow
def test_a_study_lets_go_of_its_model(place: Path, command: CommandLine, loads: list[Any]) -> None:
    command.ok("--study", place / "tiny.toml", *settings("search.trials=2"))
    assert loads == ONCE


@slow
def test_apply_and_finetune(done: Path, command: CommandLine, loads: list[Any], tmp_path: Path) -> None:
    best, sparse = done / "tiny.best.json", tmp_path / "sparse"
    command.ok("apply", "--config", best, "--out", sparse)
    assert loads == TWICE
    loads.clear()
    options = ("--loss", "next-token", "--steps", "2", "--seqlen", "32", "--batch", "2", "--patience", "0")
    command.ok("finetune", sparse, "--out", tmp_path / "tuned", *options)
    assert loads == THRICE


@slow
@parametrize("offload", ["none", "cpu", "disk"])
def test_a_bench_that_is_closed_holds_nothing(offload: Offload, tmp_path: Path) -> None:
    """Nor does what was made of it: a screening, a budget, the weights' stream."""
    tiny("llama").save_pretrained(tmp_path)
    checkpoint = Checkpoint.load(tmp_path, torch.float32, CPU, offload=offload)
    texts = bench_of(tiny("llama")).windows
    context = Session(
        bench_of(tiny("llama")).folder, checkpoint, texts, setup_of(PruneConfig(statistics="dense"), print)
    )
    with context:
        others = [context.screening(2), context.budget(0.5)]
        assert others[1].dense_metrics.outlier_ratios(3)  # type: ignore[attr-defined]
        assert len(list(context.prune(planned("wanda", "uniform", (0.5,) * 4)))) == 4
        held = [weakref.ref(tensor.untyped_storage()) for tensor in checkpoint.model.parameters()]
        assert all(storage() is not None for storage in held)
    assert all(storage() is None for storage in held)
    assert others


@parametrize("offload", ["none", "cpu"])
def test_a_callers_model_is_given_back_by_the_bench(offload: Offload) -> None:
    model = tiny("llama").train()
    before = copy_of(model)
    with bench_of(model, offload=offload) as context:
        assert nlls_of(context, context.blocks(None), "test")
    assert model.training
    assert all(same_bits(tensor, before[name]) for name, tensor in copy_of(model).items())


@slow
def test_a_trial_for_which_memory_ran_out_leaves_no_tensors(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Optuna keeps the error of a trial that failed, and so its frames, until the collector of garbage comes."""
    held: list[Callable[[], Tensor | None]] = []
    original = Pass.run

    def running(self: Pass, plan: Plan, hidden: Tensor, items: Any) -> Any:
        for block in original(self, plan, hidden, items):
            if plan.is_uniform:
                yield block
                continue
            held.extend(map(weakref.ref, (hidden, *block.weights.values())))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    alive: list[bool] = []
    monkeypatch.setattr(Pass, "run", running)
    gc.collect()
    gc.disable()
    try:
        run(place, "search.trials=2", watch=lambda event: alive.append(any(found() is not None for found in held)))
    finally:
        gc.enable()
    assert stored(place).trials[1].user_attrs["failure"] == "out of memory"
    assert held and not alive[-1]
