"""The inner loop of SparseGPT in its three ways."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from atp_tune.pruners import columns
from atp_tune.pruners.columns import plain, strips, sweep

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


@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("way", [plain, strips, sweep])
def test_by_hand(way: Callable[..., Tensor], shape: tuple[int, int], share: float) -> None:
    W, U, G = problem(shape, share)
    expected = by_hand(W, U, G)
    others = G.T.contiguous().T  # a transposed view, as a mask may be
    for factors in (G, others):
        torch.testing.assert_close(way(W.clone(), U, factors).double(), expected, rtol=1e-4, atol=1e-5)


def test_the_first_columns_only() -> None:
    """As groups are done: their errors reach the columns that have no mask yet."""
    W, U, G = problem((9, 20))
    expected = by_hand(W, U, torch.cat([G[:4], torch.zeros(5, 20)]))
    torch.testing.assert_close(plain(W, U, G[:4]).double(), expected, rtol=1e-4, atol=1e-5)


def test_float64_is_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "strips", None)
    W, U, G = (part.double() for part in problem((20, 30)))
    torch.testing.assert_close(sweep(W.clone(), U, G), by_hand(W, U, G), rtol=1e-12, atol=1e-12)


def test_a_strip_of_one_column_is_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    W, U, G = problem((20, 30))
    monkeypatch.setattr(columns, "STRIP", 1)
    torch.testing.assert_close(strips(W.clone(), U, G), plain(W.clone(), U, G))


INTERPRETED = """
import torch
from test_columns import by_hand, problem
from atp_tune.pruners.columns_triton import tiles
for shape in ((1, 1), (1, 300), (3, 7), (17, 30), (128, 33), (130, 5)):
    W, U, G = problem(shape)
    expected = by_hand(W, U, G)
    torch.testing.assert_close(tiles(W.clone(), U, G).double(), expected, rtol=1e-4, atol=1e-5)
print("done")
"""


@pytest.mark.slow
def test_the_kernel_in_tritons_interpreter() -> None:
    """In a process of its own: Triton reads the variable when the kernel is defined."""
    pytest.importorskip("triton", reason="Triton has wheels for Linux only")
    here = Path(__file__).parent
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(here)}
    command = [sys.executable, "-c", INTERPRETED]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=300)
    assert done.stdout == "done\n", done.stderr
