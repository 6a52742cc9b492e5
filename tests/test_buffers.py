import gc
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from expect import parametrize, refused
from families import same_bits

from atp_tune.checkpoints import devices
from atp_tune.checkpoints.devices import mapped_files, move_into, on_disk, plain


@parametrize("buffer", [plain, on_disk])
def test_tensors_lie_side_by_side_with_their_values(buffer: Any) -> None:
    tensors = [torch.randn(3, 5), torch.arange(7, dtype=torch.int8), torch.randn(2, 3, 4).bfloat16(), torch.ones(0)]
    strided = torch.randn(4, 6).T
    before = [tensor.clone() for tensor in tensors]
    place = strided.data_ptr()
    move_into(buffer, [*tensors, strided])
    assert all(map(same_bits, tensors, before))
    assert strided.data_ptr() == place  # what is not contiguous stays as it is
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors[:3]}) == 1
    assert all(tensor.data_ptr() % 64 == 0 for tensor in tensors)


def test_memory_goes_back_when_the_last_tensor_goes(cache: Path) -> None:
    tensor = torch.randn(1000)
    move_into(on_disk, [tensor])
    view = tensor[5:]
    assert mapped_files()(view)
    assert not list(cache.glob("blocks/*"))
    del tensor
    gc.collect()
    assert f"{cache}/blocks" in Path("/proc/self/maps").read_text()
    del view
    gc.collect()
    assert f"{cache}/blocks" not in Path("/proc/self/maps").read_text()


def test_a_full_disk_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with refused(r"^model.offload: .*blocks: No space left on device; 2.0 GiB are wanted$"):
        on_disk(2 * 1024**3)


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists(), reason="no large pages here")
def test_plain_memory_asks_for_large_pages() -> None:
    """The kernel's flag `hg` of its range; whether it has such pages to give is the machine's."""
    memory = plain(4 << 20)
    ranges = re.findall(r"^(\w+)-(\w+) .*?^VmFlags:(.*?)$", Path("/proc/self/smaps").read_text(), re.M | re.S)
    (flags,) = [flags for start, end, flags in ranges if int(start, 16) <= memory.data_ptr() < int(end, 16)]
    assert "hg" in flags.split()


class Runtime:
    """CUDA's runtime: it registers memory or gives an error, which the check after the next kernel raises."""

    def __init__(self, answer: int = 0) -> None:
        self.answer = self.last_error = answer
        self.calls: list[Any] = []

    def cudaHostRegister(self, place: int, size: int, flags: int) -> int:  # noqa: N802 - CUDA's name
        self.calls.append((place, size))
        self.last_error = self.answer
        return self.answer

    def cudaHostUnregister(self, place: int) -> None:  # noqa: N802
        self.calls.append(place)

    def zeros(self, *size: int, device: str) -> None:
        """`torch.zeros` on such a device."""
        failure, self.last_error = self.last_error, 0
        if failure:
            raise RuntimeError("CUDA error: out of memory")


def test_pinned_memory_is_registered_and_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    memory = devices.pinned(5000)
    place = memory.data_ptr()
    assert place % 4096 == 0
    view = memory[:10]
    del memory
    assert runtime.calls == [(place, 5000)]
    del view
    assert runtime.calls == [(place, 5000), place]


def test_memory_that_cannot_be_pinned_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """The error is forgotten, or the next kernel would raise it, and it would look as if the device were full."""
    runtime = Runtime(answer=2)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch, "zeros", runtime.zeros)
    devices._say_once.cache_clear()
    assert [len(devices.pinned(size)) for size in (100, 200)] == [100, 200]
    assert len(runtime.calls) == 2  # nothing is unregistered that was not registered
    runtime.zeros(1, device="cuda")
    assert caplog.text.count("cannot be pinned (CUDA error 2)") == 1
