"""Memory of a GPU and pinned memory: taken, given back, and run out for real."""

import gc
import logging
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from cards import MIB, bench_on, held, let_go, little_memory, pruned_blocks, same_blocks, trial
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from atp_tune.blocks.prune_pass import advance
from atp_tune.blocks.replay import AutoBatch, Replay
from atp_tune.checkpoints import devices
from atp_tune.checkpoints.checkpoint import Checkpoint
from atp_tune.checkpoints.devices import free_memory
from atp_tune.errors import TrialError
from atp_tune.events import Event, Message
from atp_tune.inputs.windows import TOKEN_WINDOWS

pytestmark = pytest.mark.gpu


def test_pinned_memory_is_registered_and_freed(card: torch.device) -> None:
    size = 64 * MIB
    for _ in range(20):  # what stayed registered could not be registered again where the system maps it again
        memory = devices.pinned(size)
        place = memory.data_ptr()
        view = memory[5:].view(-1)
        assert memory.is_pinned() and view.is_pinned()
        del memory
        gc.collect()
        assert view.is_pinned()  # it lives as long as what lies in it
        del view
        gc.collect()
        assert not is_mapped(place)


def is_mapped(place: int) -> bool:
    """Whether an address is one of this process's."""
    ranges = (line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines())
    return any(int(start, 16) <= place < int(end, 16) for start, end in ranges)


def test_copies_from_pinned_memory_do_not_wait(card: torch.device) -> None:
    memory = devices.pinned(512 * MIB)
    memory.fill_(7)
    target, after = torch.empty_like(memory, device=card), torch.cuda.Event()
    torch.cuda.synchronize(card)
    target.copy_(memory, non_blocking=True)
    after.record(torch.cuda.current_stream(card))
    assert not after.query()  # 512 MiB take 10 ms or more
    after.synchronize()
    assert bool((target == 7).all())


def test_a_registration_that_fails_poisons_nothing(
    card: torch.device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """CUDA refuses memory that is registered already; its error must not surface where a later kernel is started."""
    memory = devices.pinned(16 * MIB)
    monkeypatch.setattr(devices, "plain", lambda size: memory[:size])
    devices._say_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        again = devices.pinned(len(memory))
    assert "cannot be pinned" in caplog.text
    notes: list[Event] = []
    batch = AutoBatch(card, 1, 1, notes.append)
    before = batch.windows
    assert batch.run(lambda windows: float((torch.ones(1000, device=card) * 2).sum())) == 2000
    torch.cuda.synchronize(card)
    assert again.data_ptr() == memory.data_ptr()
    assert (batch.windows, notes) == (before, [])


WIDE: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 8192, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 256,
}  # fmt: skip


@torch.inference_mode()
def test_memory_that_runs_out_halves_the_batch(device: torch.device) -> None:
    """64 windows of 256 tokens take more than 1.5 GB in a block that is 128 times as wide inside."""
    torch.manual_seed(0)
    checkpoint = Checkpoint(LlamaForCausalLM(LlamaConfig(**WIDE)).eval(), device, "none")
    replay = Replay(checkpoint, TOKEN_WINDOWS)
    hidden = replay.embed(torch.randint(64, (64, 256), device=device)).clone()
    start, notes = hidden.clone(), list[Event]()
    batch = AutoBatch(device, 256, 1, notes.append)
    batch.windows = 64
    with little_memory(device, 400 * MIB):
        advance(replay, batch, 0, checkpoint.weights(0), hidden)
    assert 1 <= batch.windows < 64
    assert notes == [Message("memory ran out: going on with 32 windows at a time")]
    expected = moved(replay, start, batch.windows)
    assert torch.equal(hidden, expected)


def moved(replay: Replay, hidden: Tensor, windows: int) -> Tensor:
    """The states behind the first block, in batches of so many windows."""
    weights = replay.checkpoint.weights(0)
    return torch.cat([replay.run(0, weights, rows) for rows in torch.split(hidden, windows)])


def test_a_trial_that_does_not_fit_fails_and_the_next_one_runs(card: torch.device) -> None:
    context = bench_on(card)
    before = trial(context).items["nlls"]
    sizes = context.batches
    with little_memory(card, 2 * MIB), pytest.raises((TrialError, torch.OutOfMemoryError), match="out of memory"):
        trial(context)
    context.begin(sizes)
    assert trial(context).items["nlls"] == before


@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_a_bench_that_is_let_go_frees_its_memory(offload: Any, device: torch.device) -> None:
    """All of the model's memory, and without anybody's emptying PyTorch's cache first."""
    trial(bench_on(device, offload))  # libraries take memory for good where they are first used
    let_go(device)
    free, taken = (free_memory(device), held(device)) if device.type == "cuda" else (0, 0)
    context = bench_on(device, offload)
    trial(context)
    model = weakref.ref(context.checkpoint.model)
    del context
    gc.collect()
    assert model() is None
    if device.type == "cuda":
        assert held(device) < taken + 8 * MIB
        assert free_memory(device) > free - 64 * MIB


def test_streaming_holds_few_blocks(card: torch.device) -> None:
    """The dense block, the next one and the pruned one: 3 of 8, and activations."""
    peaks = {}
    for offload in ("none", "cpu"):
        let_go(card)
        base = held(card)
        context = bench_on(card, offload)  # type: ignore[arg-type]
        weights = sum(p.numel() * p.element_size() for p in context.checkpoint.blocks.parameters())
        torch.cuda.reset_peak_memory_stats(card)
        trial(context)
        peaks[offload] = torch.cuda.max_memory_allocated(card) - base
        del context
    assert peaks["none"] - peaks["cpu"] > 0.5 * weights


def test_a_small_device_streams_and_comes_to_the_same(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = pruned_blocks(bench_on(device))
    taken = held(device) if device.type == "cuda" else 0
    model = sum(p.numel() * p.element_size() for p in bench_on(device).checkpoint.model.parameters())
    monkeypatch.setenv("ATP_TUNE_DEVICE_MEMORY", str(taken + model))
    context = bench_on(device, offload=None)
    assert context.checkpoint.offload == "cpu"
    context.begin(usual_batches(device, monkeypatch))
    assert same_blocks(pruned_blocks(context), expected)


def usual_batches(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """The batches that there are where memory is not short."""
    with monkeypatch.context() as patch:
        patch.delenv("ATP_TUNE_DEVICE_MEMORY")
        return bench_on(device).batches
