"""What `env` tells of the machine: true here, and also where torch cannot be imported."""

import json
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import psutil
import pytest
import torch
from expect import slow
from packaging.requirements import Requirement
from tinystudy import HANGS, TUNE, CommandLine

from atp_tune.api.environment import PACKAGES, MachineReport
from atp_tune.utils.system import EXTRAS

PROJECT = tomllib.loads((TUNE.parent / "pyproject.toml").read_text())["project"]


@slow
def test_what_is_here(command: CommandLine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("ATP_TUNE_CACHE", str(cache))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("ATP_TUNE_TOKEN", "hf_secret")
    answer = command("env", "--json")
    assert answer.is_clean
    assert "secret" not in answer.out
    found = MachineReport.model_validate_json(answer.out)
    assert found.versions == {name: found.versions[name] for name in PACKAGES}
    assert found.versions["torch"] == version("torch")
    assert found.problems == ()
    assert found.caches["atp_tune"].model_dump() == {"path": "~/cache", "bytes": None}
    assert found.variables["ATP_TUNE_CACHE"] == "~/cache"
    assert not cache.exists()
    assert found.cpu is not None and found.memory is not None and found.gpus is not None
    assert found.cpu.usable == len(psutil.Process().cpu_affinity() or [])
    assert found.cpu.torch_threads == torch.get_num_threads()
    assert 0 < found.memory.available <= found.memory.total == psutil.virtual_memory().total
    assert len(found.gpus.devices) == torch.cuda.device_count()

    (cache / "windows").mkdir(parents=True)
    (cache / "windows" / "x").write_bytes(bytes(3 << 20))
    (cache / "link").symlink_to(cache / "windows" / "x")
    text = command("env").out
    assert re.search(r"^cache: +atp_tune: ~/cache \(0\.00 GiB\)$", text, re.MULTILINE)
    size = json.loads(command("env", "--json").out)["caches"]["atp_tune"]["bytes"]
    assert 3 << 20 <= size < (3 << 20) + 4096
    assert f"torch {version('torch')}, transformers {version('transformers')}" in text
    assert "hf_secret" not in text


@slow
def test_a_torch_that_cannot_be_imported(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.12: cannot open shared object file')\n")
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(TUNE), "env"],
        capture_output=True, text=True, timeout=HANGS, check=False, env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "problem:   GPUs: ImportError: libcudart.so.12: cannot open shared object file" in done.stdout
    assert f"optuna {version('optuna')}" in done.stdout


def test_the_extras_are_those_of_the_project() -> None:
    """By name; `all` has the others, `dev` and `docs` are for those who change the program."""
    extras = {
        name: {Requirement(text).name for text in texts} for name, texts in PROJECT["optional-dependencies"].items()
    }
    del extras["all"], extras["dev"], extras["docs"]
    assert {name: set(modules.values()) for name, modules in EXTRAS.items()} == extras
