import pytest
import torch
from expect import parametrize
from families import CPU

from atp_tune.blocks import replay
from atp_tune.blocks.replay import AutoBatch
from atp_tune.checkpoints import devices
from atp_tune.errors import TrialError
from atp_tune.events import Event, Message

CUDA = torch.device("cuda")


def batch_of(windows: int, notes: list[Event], monkeypatch: pytest.MonkeyPatch) -> AutoBatch:
    monkeypatch.setattr(devices.gc, "collect", int)  # takes longer than all else here
    monkeypatch.setattr(replay, "TOKENS", {"cpu": windows})
    batch = AutoBatch(CPU, 1, 1, notes.append)
    assert batch.windows == windows
    return batch


@parametrize(
    ("device", "free", "tokens", "windows"),
    [
        (CPU, 10**12, 2048, 1),
        (CPU, 10**12, 512, 4),
        (CPU, 10**12, 5000, 1),  # never less than one
        (CUDA, 10**12, 2048, 16),
        (CUDA, 2048 * 1000 * 20, 2048, 4),  # 0.3 of memory fits 6 windows
        (CUDA, 2048 * 1000 * 27, 2048, 8),
        (CUDA, 0, 2048, 1),
    ],
)
def test_the_largest_power_of_two_that_fits_and_is_fast(
    device: torch.device, free: int, tokens: int, windows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay, "free_memory", lambda device: free)
    assert AutoBatch(device, tokens, 1000, print).windows == windows


def test_slices_cover_all_windows_once_though_memory_runs_out_among_them(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, limit = batch_of(4, [], monkeypatch), {0: 4, 4: 2, 6: 2, 8: 2}

    def step(rows: slice) -> list[int]:
        if rows.stop - rows.start > limit[rows.start]:
            raise MemoryError
        return list(range(9))[rows]

    assert batch.over(9, step) == [[0, 1, 2, 3], [4, 5], [6, 7], [8]]
    assert batch.over(0, step) == []


@parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("MPS backend out of memory"),
    ],
)
def test_halved_until_it_fits_and_said_once(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[Event] = []
    batch, tried = batch_of(16, notes, monkeypatch), []

    def step(windows: int) -> int:
        tried.append(windows)
        if windows > 2:
            raise error
        return windows

    assert batch.run(step) == 2
    assert tried == [16, 8, 4, 2]
    assert batch.run(step) == 2
    assert tried == [16, 8, 4, 2, 2]
    assert notes == [Message("memory ran out: going on with 8 windows at a time")]


def test_one_window_that_does_not_fit_fails_the_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[Event] = []
    batch = batch_of(4, notes, monkeypatch)

    def step(windows: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    for _ in range(2):
        with pytest.raises(TrialError, match="out of memory with one window at a time"):
            batch.run(step)
    assert len(notes) == 1


def test_pruning_is_tried_once_more_with_memory_released(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    def work(fails: int) -> str:
        told.append("tried")
        if told.count("tried") <= fails:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return "done"

    monkeypatch.setattr(replay, "release_memory", lambda: told.append("released"))
    assert replay.once_more(lambda: work(1)) == "done"
    assert told == ["tried", "released", "tried"]
    told.clear()
    with pytest.raises(torch.OutOfMemoryError):
        replay.once_more(lambda: work(2))
    with pytest.raises(ValueError, match="out of memory"):
        replay.once_more(lambda: int("out of memory"))
    assert told == ["tried", "released", "tried"]


def test_a_trial_begins_with_the_size_of_its_study_and_says_so_if_it_does_not_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    notes: list[Event] = []
    batch = batch_of(16, notes, monkeypatch)

    def step(windows: int) -> int:
        if windows > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return windows

    for _ in range(2):
        batch.begin(8)
        assert batch.windows == 8
        assert batch.run(step) == 4
    assert notes == [Message("memory ran out: going on with 4 windows at a time")] * 2


def test_a_cpu_does_not_begin_with_more_than_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its system would end the process, where a GPU says that memory ran out."""
    for device, expected in ((CPU, 4), (CUDA, 32)):
        notes: list[Event] = []
        monkeypatch.setattr(replay, "free_memory", lambda device: 7 * 100 * 10)
        batch = AutoBatch(device, 100, 10, notes.append)
        batch.begin(32)
        assert batch.windows == expected
        assert len(notes) == (expected < 32)
