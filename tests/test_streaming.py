import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from expect import parametrize, slow
from families import ALL, CPU, bench_of, checkpoint_of, few, nlls_of, same_bits, tiny
from plans import planned
from tinystudy import wait_until
from torch import Tensor

from atp_tune.checkpoints import devices
from atp_tune.checkpoints.devices import Freed, Stream, Tensors, Wanted
from atp_tune.checkpoints.files import Offload

BLOCKS: list[Tensors] = [{"a": torch.full((50, 4), float(i)), "norm": torch.arange(4) + i} for i in range(5)]


class Watched:
    """Keeps count of the copies that are alive, and of the most there were."""

    def __init__(self) -> None:
        self.order: list[float] = []
        self.threads: set[str] = set()
        self.most = 0
        self._storages: list[weakref.ref[Any]] = []
        self.fails: dict[float, BaseException] = {}

    def __call__(self, device: torch.device, tensor: Tensor) -> Tensor:
        if tensor.dim() == 1:
            return tensor.clone()
        number = float(tensor[0, 0])
        self.order.append(number)
        self.threads.add(threading.current_thread().name)
        if number in self.fails:
            raise self.fails.pop(number)
        copy = tensor.clone()
        self._storages.append(weakref.ref(copy.untyped_storage()))
        self.most = max(self.most, self.alive)
        return copy

    @property
    def alive(self) -> int:
        """Counted when it is asked for: a finalizer may come after the stream's own, which lets the next copy begin."""
        return sum(storage() is not None for storage in self._storages)


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> Watched:
    watched = Watched()
    monkeypatch.setattr(devices, "copy_to", watched)
    return watched


@pytest.fixture
def stream(copies: Watched) -> Stream:
    return Stream(BLOCKS, CPU)


def settle(stream: Stream) -> None:
    """Returns when the thread has done all that it does by itself: the second of two messages has been taken."""
    for _ in range(2):
        stream._requests.put(Freed(0, 0, None))
    wait_until(stream._requests.empty)


def check(found: Tensors, index: int) -> None:
    assert found.keys() == BLOCKS[index].keys()
    assert all(same_bits(tensor, BLOCKS[index][name]) for name, tensor in found.items())
    assert not any(tensor.data_ptr() == BLOCKS[index][name].data_ptr() for name, tensor in found.items())


def test_no_more_than_two_are_alive_where_norms_are_kept(stream: Stream, copies: Watched) -> None:
    kept = []
    for index in [*range(5)] * 4:
        block = stream.get(index)
        kept.append(block["norm"])
        settle(stream)
    assert copies.most == 2
    assert len(copies.order) == 21


UPWARDS = [*range(8)]
STEP = [*UPWARDS, *(index for index in UPWARDS[::-1] for _ in range(2))]  # by prices: each on the way back asks twice


@parametrize(
    ("asked", "made"),
    [
        (UPWARDS, [*range(8), 0]),
        (UPWARDS * 2, [*range(8), *range(8), 0]),
        (UPWARDS[::-1], [7, 0, 6, 5, 4, 3, 2, 1, 0, 1]),
        (STEP, [*range(8), 0, 6, 5, 4, 3, 2, 1, 0, 1]),
        (STEP * 2, [*range(8), 0, 6, 5, 4, 3, 2, 1, 0, *range(1, 8), 0, 6, 5, 4, 3, 2, 1, 0, 1]),
        ([3, 3, 3, 4], [3, 4, 5]),
    ],
    ids=["upwards", "two trials", "downwards", "a step by prices", "two steps", "one again"],
)
def test_copies_that_are_made(asked: list[int], made: list[int], copies: Watched) -> None:
    """On the way back they were four for each block, half of them useless, and none while another computed."""
    stream = Stream([{"a": torch.full((50, 4), float(index))} for index in range(8)], CPU)
    for index in asked:
        found = stream.get(index)
        settle(stream)
        assert bool((found["a"] == index).all())
        del found
    settle(stream)
    assert copies.order == made


def test_the_device_is_current_in_the_thread_before_it_copies(copies: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a thread that is new it is the first GPU, on which a context of half a gigabyte would be opened."""
    told: list[object] = []
    thread = threading.current_thread
    monkeypatch.setattr(devices, "make_current", lambda device: told.append((thread().name, device, *copies.order)))
    Stream(BLOCKS, CPU).get(0)
    assert told == [("atp_tune blocks", CPU)]


def test_what_is_kept_is_never_written_to(stream: Stream, copies: Watched) -> None:
    kept = [stream.get(index) for index in [*range(5), *range(5)]]
    assert copies.order == [0, 1, *range(2, 5), *range(5)]  # nothing ahead once two were held
    for place, block in enumerate(kept):
        check(block, place % 5)


@parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), KeyError("x"), SystemExit(3)])
@parametrize("index", [0, 1])
def test_an_error_surfaces_as_itself_and_the_stream_goes_on(
    stream: Stream, copies: Watched, error: BaseException, index: int
) -> None:
    """Of a copy that is waited for, and of one made ahead."""
    copies.fails[index] = error
    if index:
        check(stream.get(0), 0)
    with pytest.raises(type(error)) as raised:
        stream.get(index)
    assert raised.value is error
    del error, raised
    check(stream.get(index), index)
    check(stream.get(index + 1), index + 1)


@slow
def test_the_thread_ends_with_the_checkpoint() -> None:
    gc.collect()
    before = {thread.ident for thread in threading.enumerate()}
    checkpoint = checkpoint_of(tiny("llama"), "cpu")
    checkpoint.weights(0)
    (new,) = [thread for thread in threading.enumerate() if thread.ident not in before]
    assert new.daemon
    del checkpoint
    gc.collect()
    assert not new.is_alive()


def test_a_consumer_that_was_interrupted_leaves_nothing_behind(stream: Stream, copies: Watched) -> None:
    """As by Ctrl-C while it waits: the block that it never got is not counted as held."""
    wanted = Wanted(2, None)
    stream._requests.put(wanted)
    del wanted
    settle(stream)
    assert copies.order == [2, 3]
    for index in (3, 4):
        check(stream.get(index), index)
    settle(stream)
    assert copies.order == [2, 3, 4, 0]


def values(family: str, offload: Offload, pruner: str = "wanda") -> tuple[list[Tensors], list[float]]:
    context = bench_of(tiny(family), offload=offload)
    assert context.checkpoint.offload == offload
    blocks = len(context.checkpoint.blocks)
    pruned = list(context.prune(planned(pruner, "uniform", (0.5,) * blocks)))
    nlls = nlls_of(context, ((block.index, block.weights) for block in pruned), "validation")
    return [block.weights for block in pruned], [*nlls, *nlls_of(context, context.blocks(None), "test")]


@slow
@parametrize("family", few(ALL, ("llama-tied", "gpt2", "gemma3", "falcon", "deepseek_v3", "gpt_oss", "olmoe")))
def test_where_weights_lie_changes_no_bit(family: str) -> None:
    resident, nlls = values(family, "none")
    for offload in ("cpu", "disk"):
        streamed, others = values(family, offload)
        assert nlls == others, offload
        for one, other in zip(resident, streamed, strict=True):
            assert one.keys() == other.keys()
            assert all(same_bits(tensor, other[name]) for name, tensor in one.items()), offload


def test_a_trial_holds_two_blocks_and_copies_each_once(copies: Watched) -> None:
    context = bench_of(tiny("llama"), offload="cpu")
    matrices = len(context.checkpoint.linears[0])
    stream = context.checkpoint._stream
    assert stream is not None
    list(context.prune(planned("wanda", "uniform", (0.5,) * 4)))  # what is measured once for all trials
    settle(stream)  # block 0 has been copied ahead
    copies.order.clear()
    copies.most = copies.alive
    pruned = ((block.index, block.weights) for block in context.prune(planned("wanda", "uniform", (0.5,) * 4)))
    nlls_of(context, pruned, "validation")
    settle(stream)
    assert copies.most <= 2 * matrices
    assert len(copies.order) == 4 * matrices  # blocks 1, 2 and 3, and 0 ahead of the next trial
