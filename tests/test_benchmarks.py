"""The benchmarks that run in seconds on a small model: their code is the one that runs on large ones."""

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
from expect import slow

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def benchmark(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for their annotations
    spec.loader.exec_module(module)
    return module


def rows(text: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")
    ]


@slow
def test_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a slow card: 7B has half of its windows there."""
    gpu = benchmark("gpu")
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--tiny"])
    monkeypatch.setattr(gpu, "find_floor", lambda context, shape: gpu.Floor(1 + 30 * shape.name.startswith("7B"), 1, 1))
    gpu.main()
    found = rows(capsys.readouterr().out)
    kernel, found = found[:6], found[6:]
    assert [row[0] for row in kernel[1:]] == ["calibrate", "prune", "way", "`strips`", "`plain`"]
    ways = [("7B, tiny, 4 windows", "resident"), ("70B, tiny", "resident"), ("70B, tiny", "streamed")]
    assert [(row[0], row[1]) for row in found[1:4]] == ways
    assert [row[6] for row in found[1:4]] == ["16.00", "2", "2"]
    assert [row[0] for row in found[5:8]] == ["resident", "streamed, copied ahead", "streamed, copied when asked for"]
    assert all("×" in row[2] and "×" in row[3] and "×" in row[5] for row in found[1:4])
    assert [row[7] == "–" for row in found[1:4]] == [True, True, False]  # no floor of copies where there are none
    assert len(found) == 8


@slow
def test_allocations(place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A line for each allocation, plug-ins too; the command again measures nothing."""
    out = place / "tiny.md"
    options = f"--study {place}/tiny.toml --title tiny --out {out} --database {place}/a.db --targets 0.5 --trials 2"
    words = [*options.split(), "--pruners", "wanda", "--allocations", "uniform", "atp", "lsa", "gradient"]
    monkeypatch.setattr(sys, "argv", ["allocations.py", *words])
    benchmark("allocations").main()
    assert "0.5-wanda-lsa" in capsys.readouterr().out
    head, _, *lines = rows(out.read_text())
    cells = [dict(zip(head, line, strict=True)) for line in lines]
    assert [line["allocation"] for line in cells] == ["uniform", "atp", "lsa", "gradient"]
    assert all("±" in line["test, against uniform"] for line in cells[1:])
    assert all("±" in line["against atp"] for line in cells if line["allocation"] != "atp")
    benchmark("allocations").main()
    assert capsys.readouterr().out == f"{out}\n"
