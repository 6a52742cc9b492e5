"""The inner loop of SparseGPT in its three ways."""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from expect import parametrize, slow
from families import few
from torch import Tensor
from tritons import WHY, compiles, interpreted

from atp_tune.pruners import sparsegpt
from atp_tune.pruners.sparsegpt import plain, strips, sweep

CPU = torch.device("cpu")
SHAPES = [(1, 1), (1, 40), (3, 7), (16, 5), (17, 30), (40, 2500), (128, 33), (130, 200)]


def problem(shape: tuple[int, int], share: float = 0.5) -> tuple[Tensor, Tensor, Tensor]:
    """W [B, out], U [B, B] with positive diagonal, and G [B, out] where a share of the weights goes."""
    generator = torch.Generator().manual_seed(shape[0] + 1000 * shape[1])
    W = torch.randn(shape, generator=generator)
    U = torch.randn(shape[0], shape[0], generator=generator).mul_(0.2 / shape[0] ** 0.5).triu_(1)
    U += torch.diag(0.5 + torch.rand(shape[0], generator=generator))
    return W, U, (torch.rand(shape, generator=generator) < share) / U.diagonal()[:, None]


def by_hand(W: Tensor, U: Tensor, G: Tensor) -> Tensor:
    """Entry by entry in float64, each from the errors of the columns before."""
    W, U, G = W.double(), U.double(), G.double()
    errors = torch.zeros_like(W)
    for j in range(len(W)):
        for k in range(j):
            W[j] -= U[k, j] * errors[k]
        errors[j] = W[j] * G[j]
    return W


@parametrize("share", [0.0, 0.6, 1.0])
@parametrize("shape", few(SHAPES, [(3, 7), (17, 30)]))
@parametrize("way", [plain, strips, sweep])
def test_by_hand(way: Callable[..., Tensor], shape: tuple[int, int], share: float) -> None:
    W, U, G = problem(shape, share)
    expected = by_hand(W, U, G)
    others = G.T.contiguous().T  # a transposed view, as a mask may be
    for factors in (G, others):
        torch.testing.assert_close(way(W.clone(), U, factors).double(), expected, rtol=1e-4, atol=1e-5)


INTERPRETED = """
import torch
from test_columns import by_hand, problem
from atp_tune.pruners.sparsegpt import on_gpu
from atp_tune.pruners.columns_triton import tiles
assert on_gpu(torch.device("cpu")) is tiles  # the interpreter needs no compiler
for shape in ((1, 1), (1, 300), (3, 7), (17, 30), (128, 33), (130, 5)):
    W, U, G = problem(shape)
    expected = by_hand(W, U, G)
    torch.testing.assert_close(tiles(W.clone(), U, G).double(), expected, rtol=1e-4, atol=1e-5)
print("done")
"""


@slow
def test_the_kernel_in_tritons_interpreter() -> None:
    interpreted(INTERPRETED)


@slow
@parametrize("capability", [80, 90])
@parametrize("columns", few([128, 100, 256], [100]))
def test_the_kernel_compiles(columns: int, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton", reason=WHY)
    from atp_tune.pruners.columns_triton import _sweep

    tensors = dict.fromkeys(("w_at", "u_at", "g_at"), "*fp32")
    constants = {"COLUMNS": columns, "PADDED": triton.next_power_of_2(columns), "ROWS": 32}
    compiles(_sweep, {**tensors, "out": "i32"}, constants, capability, tmp_path, monkeypatch)


@pytest.fixture
def launched() -> Iterator[None]:
    """No kernel was launched yet in this process."""
    pytest.importorskip("triton", reason=WHY)
    sparsegpt.on_gpu.cache_clear()
    yield
    sparsegpt.on_gpu.cache_clear()


class Compiles:
    """In the place of the kernel: its launch begins as Triton's does, by building a module with a C compiler."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., object]:
        from triton.runtime.build import compile_module_from_src

        return lambda *_: compile_module_from_src(src="int here;", name="here")


def test_without_a_compiler_columns_are_swept_plainly(
    launched: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    from triton.runtime import build

    from atp_tune.pruners import columns_triton

    getattr(build, "_find_compiler", cache(int)).cache_clear()
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setattr(columns_triton, "_sweep", Compiles())
    assert [sparsegpt.on_gpu(CPU) for _ in range(3)] == [plain] * 3
    (record,) = caplog.records
    assert "RuntimeError: Failed to find C compiler" in record.getMessage()
    assert "\n" not in record.getMessage()


def test_memory_that_ran_out_is_no_reason_to_do_without(launched: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step is tried again with less by who knows how, and the kernel is there then."""
    from atp_tune.pruners import columns_triton

    errors: list[Exception] = [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        MemoryError(),
    ]

    def tiles(W: Tensor, U: Tensor, G: Tensor) -> Tensor:
        if errors:
            raise errors[0]
        return W

    monkeypatch.setattr(columns_triton, "tiles", tiles)
    while errors:
        with pytest.raises(type(errors[0])) as caught:
            sparsegpt.on_gpu(CPU)
        assert caught.value is errors.pop(0)
    assert sparsegpt.on_gpu(CPU) is tiles
