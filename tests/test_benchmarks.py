"""The benchmarks that run in seconds on a small model: their code is the one that runs on large ones."""

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

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


@pytest.mark.slow
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


def test_gpu_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    gpu = benchmark("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit, match="no CUDA device here"):
        gpu.main()


def test_blocks_of_the_large_shape_share_memory() -> None:
    import torch

    gpu = benchmark("gpu")
    model = gpu.make_model(gpu.TINY[1], 2, torch.device("cpu"))
    places = [block.mlp.up_proj.weight.data_ptr() for block in model.model.layers]
    assert len(places) == 6
    assert len(set(places)) == 2
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def test_speedup_shows_its_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tables between the marks are those of the runs, and the rest of the page stays."""
    from atp_tune.metrics import Measured, Rates, Sizes, Speed

    monkeypatch.syspath_prepend(str(BENCHMARKS))
    speedup = benchmark("speedup")
    page, runs = tmp_path / "speedup.md", tmp_path / "speedup" / "runs.jsonl"
    page.write_text(f"before\n{speedup.MARKS[0]}\nold\n{speedup.MARKS[1]}\nafter\n")
    monkeypatch.setattr(speedup, "PAGE", page)
    monkeypatch.setattr(speedup, "RUNS", runs)
    monkeypatch.setattr(sys, "argv", ["speedup.py", "--show"])
    rates = Rates(dense=(10.0, 20.0, 30.0), sparse=(20.0, 20.0, 20.0))
    both = {
        "version": "2", "dtype": "float32", "device": "a CPU", "cores": 2, "tokens": 8, "steps": 4, "logits": None,
        "prefill": rates, "decode": rates,
    }  # fmt: skip
    own, slow = Measured(engine="packed", **both), Rates(dense=(5.0,), sparse=(5.0,))
    torchs = Measured(engine="torch", **{**both, "prefill": slow, "decode": slow})
    sizes = Sizes(dense=1, sparse=1, dense_zstd=1, sparse_zstd=1)
    found = Speed(sizes=sizes, zeros={}, engines=(torchs, own))
    speedup.keep("a model", found)
    assert speedup.known() == {("a model", "a CPU"): found}
    speedup.main()
    text = page.read_text()
    assert text.startswith(f"before\n{speedup.MARKS[0]}\n\n### a CPU\n\n| model")
    assert text.endswith(f"\n\n{speedup.MARKS[1]}\nafter\n")
    assert "old" not in text
    head, line = rows(text)
    assert head == ["model", "engine", "prefill", "decode"]
    assert line == ["a model", "packed, float32", *["20.0 (1.00×, 4.00×)"] * 2]


def test_random_llama_has_zeros_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    speedup = benchmark("speedup")
    small = {**speedup.WIDE, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": 32}
    dense, sparse = (speedup.random_llama(share, small) for share in (0.0, 0.7))
    weight, other = (model.model.layers[0].mlp.up_proj.weight for model in (dense, sparse))
    assert float((other == 0).float().mean()) == pytest.approx(0.7, abs=0.03)
    assert bool((weight[other != 0] == other[other != 0]).all())


@pytest.mark.slow
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
