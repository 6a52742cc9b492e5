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


@pytest.mark.slow
def test_what_plan_foretells_of_shapes(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their weights take no room on the disk; a descent with rows is counted."""
    large = benchmark("large_plan")
    monkeypatch.setattr(large, "PLACE", tmp_path)
    told = []
    for words in ((), ("--set", "allocation=['uniform']")):
        monkeypatch.setattr(sys, "argv", ["large_plan.py", "tiny", *words])
        with pytest.raises(SystemExit) as ended:
            large.main()
        assert ended.value.code == 0
        told.append(capfd.readouterr().out)
    assert ", of which " in told[0] and "for prices" in told[0] and "for prices" not in told[1]
    assert "does not fit" not in told[0]
    model = next(tmp_path.glob("tiny-*"))
    assert all(file.stat().st_blocks * 512 < 20_000 for file in model.glob("block-*.safetensors"))


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


@pytest.mark.slow
def test_memory(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a model large enough to be told from what libraries take: host memory at rest and while a trial runs."""
    memory = benchmark("memory")
    monkeypatch.setattr(memory, "SIZES", {"0.1 GB": memory.SIZES["0.1 GB"]})
    monkeypatch.setattr(sys, "argv", ["memory.py"])
    memory.main()
    head, *measured = rows(capsys.readouterr().out)
    for row in measured:
        found = dict(zip(head, row, strict=True))
        assert float(found["× weights"]) < 1.1
        assert float(found["copies"]) < 2.5  # two, and what the allocator takes: up to 2.3 beside other jobs
        if found["weights lie"] in ("none", "disk"):
            assert float(found["loading"]) < 0.1 * float(found["weights"])
    assert len(measured) == 6


def test_speedup_shows_its_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tables between the marks are those of the runs, and the rest of the page stays."""
    from atp_tune.metrics.speed import Measured, Rates, Sizes, Speed

    monkeypatch.syspath_prepend(str(BENCHMARKS))
    speedup = benchmark("speedup")
    page, runs = tmp_path / "speedup.md", tmp_path / "speedup" / "runs.jsonl"
    page.write_text(f"before\n{speedup.MARKS[0]}\nold\n{speedup.MARKS[1]}\nafter\n")
    monkeypatch.setattr(speedup, "PAGE", page)
    monkeypatch.setattr(speedup, "RUNS", runs)
    monkeypatch.setattr(sys, "argv", ["speedup.py", "--show"])
    rates = Rates(dense=(10.0, 20.0, 30.0), sparse=(20.0, 20.0, 20.0))
    row = Measured(
        engine="torch", version="2", dtype="float32", device="a CPU", cores=2, tokens=8, steps=4, logits=None,
        prefill=rates, decode=rates,
    )  # fmt: skip
    found = Speed(sizes=Sizes(dense=1, sparse=1, dense_zstd=1, sparse_zstd=1), zeros={}, engines=(row,))
    speedup.keep("a model", found)
    assert speedup.known() == {("a model", "a CPU"): found}
    speedup.main()
    text = page.read_text()
    assert text.startswith(f"before\n{speedup.MARKS[0]}\n\n### a model, a CPU\n\n| engine")
    assert text.endswith(f"\n\n{speedup.MARKS[1]}\nafter\n")
    assert "old" not in text
    head, prefill, decode = rows(text)
    assert prefill[2:] == ["20.0 (10.0 to 30.0)", "20.0 (20.0 to 20.0)", "1.00 (0.67 to 2.00)×", "1.00×"]
    assert decode[1] == "decode"
    assert head[-1] == "sparse / torch's best dense"


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
    out = place / "results.md"
    options = f"--study {place}/tiny.toml --title tiny --out {out} --database {place}/a.db --targets 0.5 --trials 2"
    words = [*options.split(), "--pruners", "wanda", "--allocations", "uniform", "atp", "lsa", "prices"]
    monkeypatch.setattr(sys, "argv", ["allocations.py", *words])
    benchmark("allocations").main()
    assert "0.5-wanda-lsa" in capsys.readouterr().out
    head, _, *lines = rows(out.read_text())
    cells = [dict(zip(head, line, strict=True)) for line in lines]
    assert [line["allocation"] for line in cells] == ["uniform", "atp", "lsa", "prices"]
    assert all("±" in line["test, against uniform"] and "±" in line["prices against it, test"] for line in cells[1:3])
    benchmark("allocations").main()
    assert capsys.readouterr().out == f"{out}\n"


@pytest.mark.slow
def test_refinement(place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    words = f"--study {place}/tiny.toml --pruners wanda magnitude --swaps 0 9 --steps 4".split()
    monkeypatch.setattr(sys, "argv", ["refinement.py", *words])
    benchmark("refinement").main()
    found = rows(capsys.readouterr().out)[1:]
    ways = [["0", "0"], ["0", "4"], ["9", "4"]]
    assert [row[1:4] for row in found] == [
        ["dense", "", ""],
        *([n, *way] for n in ("wanda", "magnitude") for way in ways),
    ]
    changed = [row for k, row in enumerate(found) if k not in (0, 1, 4)]
    assert all("±" in row[5] and row[7] for row in changed), changed
    assert any(row[5].startswith("-") for row in changed)  # of a random model not all, on every CPU


def made_up(page: Any, series: str, name: str, size: int, nlls: list[float], **more: Any) -> Any:
    """A point of a made-up study, whose validation text is a nat harder than its test text."""
    texts = {"validation": [nll + 1 for nll in nlls], "test": nlls}
    found = {"values": "bf16", "facts": "a", "bits": 16.0, "zeros": 0.0, "ranks": {}, "seconds": 1.0, **more}
    return page.Measured(study="s", series=series, name=name, bytes=size, nlls=texts, cpu="", date="", **found)


@pytest.fixture
def compressions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """The command and its page, whose files lie in a folder of their own."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    command, page = benchmark("compressions"), importlib.import_module("compressions_page")
    for name, file in (("POINTS", "points.jsonl"), ("RATES", "rates.jsonl"), ("PAGE", "page.md"), ("PICTURE", "a.svg")):
        monkeypatch.setattr(page, name, tmp_path / "kept" / file)
    monkeypatch.setattr(page, "svg", lambda figures: f"{len(figures)} figures")  # a browser draws them elsewhere
    (tmp_path / "kept").mkdir()
    page.PAGE.write_text(f"before\n{page.MARKS[0]}\nold\n{page.MARKS[1]}\nafter\n")
    return command, page


def test_compressions_on_the_envelope(compressions: tuple[Any, Any]) -> None:
    """None is beaten by another in both; of equal bytes, and of equal perplexities, one stays."""
    _, page = compressions
    sizes = {"a": (9, 1.0), "b": (5, 1.0), "c": (5, 1.5), "d": (4, 2.0), "e": (7, 1.2), "f": (1, 9.0), "g": (6, 0.9)}
    points = [made_up(page, "2:4", name, size, [nll]) for name, (size, nll) in sizes.items()]
    found = page.envelope(points, page.on_validation)
    assert [one.name for one in found] == ["f", "d", "b", "g"]
    for one in found:
        assert all(other.bytes > one.bytes for other in points if page.on_validation(other) < page.on_validation(one))


def test_compressions_are_shown(compressions: tuple[Any, Any]) -> None:
    """The last line of a point counts; the table has the nats from dense, paired, and measured rates alone."""
    from atp_tune.metrics.speed import Measured, Rates

    _, page = compressions
    dense, old, new = (
        made_up(page, series, name, size, nlls, values=values, facts=facts)
        for series, name, size, nlls, values, facts in (
            ("dense", "16 bits", 2_000_000, [1.0, 2.0, 3.0], "bf16", "a"),
            ("zeros", "50 %", 1_000_000, [5.0, 5.0, 5.0], "int8", "b"),
            ("zeros", "50 %", 1_000_000, [1.5, 2.4, 3.6], "int8", "c"),
        )
    )
    for one in (dense, old, new):
        page.keep(one)
    assert page.known() == [dense, new]
    rates = Rates(dense=(10.0, 20.0), sparse=(20.0, 30.0))
    speed = Measured(
        engine="packed int8", version="2", dtype="float32", device="a CPU", cores=2, tokens=8, steps=4, logits=None,
        prefill=rates, decode=rates,
    )  # fmt: skip
    page.keep_rate(page.Rate(new.key, "today", speed))
    assert [rate.speed for rate in page.rates()] == [speed]
    page.write_page()
    text = page.PAGE.read_text()
    assert text.startswith(f"before\n{page.MARKS[0]}\n\n### s\n\n| ")
    assert text.endswith(f"\n\n{page.MARKS[1]}\nafter\n")
    head, first, second = rows(text)
    assert dict(zip(head, first, strict=True))["tokens/s (dense)"] == "15.0"
    row = dict(zip(head, second, strict=True))
    assert row["nats, test"] == "+0.500 ± 0.058"  # of 0.5, 0.4, 0.6
    assert (row["MB"], row["tokens/s (dense)"], row["of dense"]) == ("1.0", "25.0 (15.0)", "1.75 (1.50 to 2.00)×")
    assert page.PICTURE.read_text() == "2 figures"  # by bytes, and by speed


@pytest.mark.slow
def test_compressions(
    compressions: tuple[Any, Any], place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every kind of point; bytes are those of the folders; what is kept is not measured again; then speed."""
    command, page = compressions
    shown = (
        "dense, 16 bits", "bits, GPTQ, 3", "bits, GPTQ, prices, 3", "zeros, 50 %", "zeros, prices, 50 %",
        "zeros and bits, 50 %, 4 bits", "channels, 25 %", "2:4, Wanda",
    )  # fmt: skip
    points = [point for point in command.points() if point.title in shown]
    monkeypatch.setattr(command, "points", lambda: points)
    words = ["compressions.py", "--study", f"{place}/tiny.toml"]
    monkeypatch.setattr(sys, "argv", words)
    command.main()
    found = {(one.series, one.name, one.values): one for one in page.known()}
    assert len(found) == sum(len(point.values) for point in points) == 10
    dense = found["dense", "16 bits", "bf16"]
    assert all(one.bytes < dense.bytes for one in found.values() if one is not dense)
    assert found["bits, GPTQ, prices", "3", "bits"].bits <= found["bits, GPTQ", "3", "bits"].bits
    assert found["2:4", "Wanda", "bf16"].bits == 9  # of 16: half the values, and a bit for each weight
    assert found["channels", "25 %", "bf16"].bits == pytest.approx(12, abs=0.5)
    kept = page.POINTS.read_text()
    capsys.readouterr()
    command.main()
    assert page.POINTS.read_text() == kept
    page.POINTS.write_text("".join(line + "\n" for line in kept.splitlines() if '"int8"' not in line))
    command.main()
    assert {one.key: one.nlls for one in page.known()} == {one.key: one.nlls for one in found.values()}
    monkeypatch.setattr(sys, "argv", [*words, "--speed", "--tokens", "8", "--runs", "1"])
    command.main()
    engines = {rate.key[1:]: rate.speed.engine for rate in page.rates()}
    assert engines == {
        ("zeros", "50 %", "bf16"): "packed bf16", ("zeros", "50 %", "int8"): "packed int8",
        ("zeros, prices", "50 %", "bf16"): "packed bf16", ("zeros, prices", "50 %", "int8"): "packed int8",
        ("channels", "25 %", "bf16"): "torch", ("2:4", "Wanda", "bf16"): "packed bf16",
    }  # fmt: skip
    assert "### tiny" in page.PAGE.read_text()
