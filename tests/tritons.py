"""Triton kernels without a GPU: run by Triton's interpreter, and compiled for GPUs that need not be here."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

WHY = "Triton has wheels for Linux only"


def interpreted(code: str) -> None:
    """Runs code that prints "done", in a process of its own: Triton reads the variable when a kernel is defined."""
    pytest.importorskip("triton", reason=WHY)
    path = os.pathsep.join((str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")))
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=300)
    assert done.stdout == "done\n", done.stderr


def compiles(
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    capability: int,
    cache: Path,
    patch: pytest.MonkeyPatch,
) -> None:
    """To machine code: the interpreter runs what the compiler refuses."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    patch.setenv("TRITON_CACHE_DIR", str(cache))
    source = ASTSource(kernel, {**types, **dict.fromkeys(constants, "constexpr")}, constants)
    assert triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]
