from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from expect import parametrize, refused

from atp_tune.checkpoints import devices
from atp_tune.checkpoints.devices import (
    device_limit,
    find_device,
    find_dtype,
    free_memory,
    is_out_of_memory,
    make_current,
)

CPU = torch.device("cpu")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes the machine have so many CUDA devices, and MPS or not."""

    def make(cuda: int, mps: bool) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: cuda - 1)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return make


@parametrize(("cuda", "mps", "found"), [(2, True, "cuda:1"), (0, True, "mps"), (0, False, "cpu")])
def test_auto_takes_the_fastest(cuda: int, mps: bool, found: str, machine: Any) -> None:
    machine(cuda, mps)
    assert find_device("auto") == torch.device(found)


@parametrize(("name", "cuda"), [("cuda", 0), ("cuda:0", 0), ("cuda:2", 2), ("mps", 2)])
def test_a_device_that_is_not_here(name: str, cuda: int, machine: Any) -> None:
    machine(cuda, False)
    with refused(f"^device: {name} is not on this machine .*; try --device cpu or auto$"):
        find_device(name)


@parametrize(
    ("vendor", "flags", "dtype"),
    [
        ("AuthenticAMD", "fpu avx2 avx512f", torch.float32),
        ("AuthenticAMD", "fpu avx512_bf16", torch.bfloat16),
        ("GenuineIntel", "fpu avx512_bf16", torch.float32),
        ("GenuineIntel", "amx_bf16 fpu", torch.bfloat16),
        ("AuthenticAMD", "fpu not_avx512_bf16_at_all", torch.float32),
    ],
)
def test_auto_is_bf16_where_the_cpu_has_it(
    vendor: str, flags: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = f"processor\t: 0\nvendor_id\t: {vendor}\nflags\t\t: {flags}\nflags\t: other"
    monkeypatch.setattr(Path, "read_text", lambda self, **_: text)
    assert find_dtype("auto", CPU) == dtype


@parametrize(("capability", "dtype"), [((7, 5), torch.float32), ((8, 0), torch.bfloat16)])
def test_auto_is_bf16_where_the_gpu_has_it(
    capability: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert find_dtype("auto", torch.device("cuda")) == dtype


def test_free_memory_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the allocator keeps of freed tensors is free: 40 of the 300 that it has taken hold tensors."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (500, 900))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 300)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 40)
    assert free_memory(torch.device("cuda")) == 760


@parametrize("way", ["ieee", "tf32"])
def test_the_name_of_a_gpu_says_how_it_multiplies_float32(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As NVIDIA's images have it set: a trial's `device` differs, and a study does not go on there by itself."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(fp32_precision=way))
    assert devices.device_name(torch.device("cuda", 0)) == ("NVIDIA H100, TF32" if way == "tf32" else "NVIDIA H100")


@parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("any text"), True),
        (MemoryError(), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 4 bytes."), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnXpotrf(…)`"), True),
        (RuntimeError("cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(…)`"), False),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("shapes do not match"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_says_that_memory_ran_out(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) == expected


@parametrize(
    ("text", "size"),
    [("2GiB", 2 * 1024**3), ("1.5 kB", 1500), ("600M", 6 * 10**8), ("10B", 10), ("3Mi", 3 * 1024**2), ("", None)],
)
def test_a_device_may_be_given_less_memory(text: str, size: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATP_TUNE_DEVICE_MEMORY", text)
    assert device_limit() == size
    monkeypatch.setattr(devices, "host_memory", lambda: 10**12)
    assert free_memory(CPU) == (size or 10**12)


def test_a_limit_counts_what_a_gpu_holds_already(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATP_TUNE_DEVICE_MEMORY", "100B")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**9, 10**9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 500)
    for held, free in ((30, 70), (200, 0)):
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device, held=held: held)
        assert free_memory(torch.device("cuda")) == free


@parametrize("text", ["much", "-1GB", "2 GiB or so", "1e9"])
def test_a_limit_that_is_no_size_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATP_TUNE_DEVICE_MEMORY", text)
    with refused(r"^ATP_TUNE_DEVICE_MEMORY: must be a size like 2GiB or 600M, got"):
        free_memory(CPU)


def test_work_makes_its_device_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for name in ("cpu", "cuda:1", "cuda"):  # without an index it is the current one already
        make_current(torch.device(name))
    assert chosen == [torch.device("cuda:1")]
