"""SparseGPT's Triton kernel: compiled on a GPU; through Triton's interpreter (TRITON_INTERPRET=1) on a CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_columns import SHAPES, problem

from atp_tune.pruners import sparsegpt

pytestmark = pytest.mark.gpu
LARGE = [(128, 4096), (128, 11008), (256, 8192), (100, 4097)]


@pytest.fixture
def runs(device: torch.device) -> torch.device:
    """Where the kernel runs."""
    pytest.importorskip("triton", reason="Triton has wheels for Linux only")
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("a CPU needs TRITON_INTERPRET=1")
    return device


@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("shape", [*SHAPES, *LARGE])
def test_the_kernel_equals_the_plain_columns(shape: tuple[int, int], share: float, runs: torch.device) -> None:
    from atp_tune.pruners.columns_triton import tiles

    if runs.type == "cpu" and shape[0] * shape[1] > 5000:
        pytest.skip("the interpreter is slow")
    W, U, G = (part.to(runs) for part in problem(shape, share))
    expected = sparsegpt.plain(W.double(), U.double(), G.double())
    torch.testing.assert_close(tiles(W.clone(), U, G).double(), expected, rtol=1e-4, atol=1e-4)
    transposed = G.T.contiguous().T
    torch.testing.assert_close(tiles(W.clone(), U, transposed).double(), expected, rtol=1e-4, atol=1e-4)


def test_the_kernel_is_what_a_gpu_takes(runs: torch.device) -> None:
    from atp_tune.pruners.columns_triton import tiles

    sparsegpt.on_gpu.cache_clear()
    assert sparsegpt.on_gpu(runs) is tiles


WITHOUT = """
import logging, sys
import torch
from test_columns import by_hand, problem
from atp_tune.pruners.sparsegpt import plain, on_gpu, sweep
logging.basicConfig(stream=sys.stdout, format="%(message)s")
device = torch.device("cuda:0")
for shape in ((17, 30), (128, 33)):
    W, U, G = problem(shape)
    expected = by_hand(W, U, G)
    found = sweep(*(part.to(device) for part in (W, U, G)))
    torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-4, atol=1e-5)
assert on_gpu(device) is plain
"""


def test_without_a_compiler(card: torch.device, tmp_path: Path) -> None:
    """As in a slim image: nothing on the PATH, and no kernel that was compiled before."""
    path = os.pathsep.join((str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")))
    hidden = {"PATH": str(tmp_path), "TRITON_CACHE_DIR": str(tmp_path / "triton"), "PYTHONPATH": path}
    env = {name: value for name, value in os.environ.items() if name not in ("CC", "TRITON_INTERPRET")} | hidden
    done = subprocess.run([sys.executable, "-c", WITHOUT], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith("SparseGPT without its Triton kernel")
    assert "Failed to find C compiler" in line
