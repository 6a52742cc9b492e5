"""The small language models of benchmarks/language_models.py: their texts, their tokenizer, and training in little."""

import importlib
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from expect import parametrize, slow
from prose import prose
from test_benchmarks import BENCHMARKS, benchmark
from tinystudy import CommandLine, settings

from atp_tune.config.studyfile import load

NAMES = ("llama-small", "gpt-neox-small")


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("language_texts")


@pytest.fixture
def models(texts: Any) -> Any:
    return benchmark("language_models")


def pages(count: int) -> list[list[str]]:
    """Made-up pages of paragraphs, some of which are in several pages."""
    rng, words = random.Random(0), prose(40_000).split()
    known = [" ".join(rng.choices(words, k=rng.randint(1, 60))) for _ in range(3 * count)]
    return [[rng.choice(known) for _ in range(rng.randint(1, 30))] for _ in range(count)]


@parametrize("name", NAMES)
def test_studies_are_valid(name: str, models: Any) -> None:
    study = load(str(BENCHMARKS / "studies" / f"{name}.toml"), []).study
    assert study.model.source.endswith(f"build/language/{name}")
    assert set(NAMES) < set(models.MODELS)


@slow
def test_from_a_folder_to_pruned_models(
    models: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: CommandLine,
) -> None:
    """Texts, tokenizers, all models and their studies in little; what is there is not made again."""
    (tmp_path / "pages").mkdir()
    for number, page in enumerate(pages(400)):
        (tmp_path / "pages" / f"{number}.txt").write_text("\n\n".join(page))
    out, tiny = tmp_path / "out", models.Shape(width=32, blocks=2, heads=2, vocabulary=400, steps=8)
    monkeypatch.setattr(
        models,
        "MODELS",
        {
            name: (make, replace(tiny, spaces=shape.spaces, vocabulary=700 if shape.spaces else 400))
            for name, (make, shape) in models.MODELS.items()
        },
    )
    monkeypatch.setattr(sys, "argv", ["language_models.py", "--folder", f"{tmp_path}/pages", "--out", str(out)])
    models.main()
    said = capsys.readouterr().out
    assert said.count("step 8 of 8: loss") == 3
    assert not list(out.glob("*.part*"))
    models.main()
    assert [line for line in capsys.readouterr().out.splitlines() if "sha256" in line] == [
        line for line in said.splitlines() if "sha256" in line
    ]
    (out / "studies").mkdir()
    few = [f"texts.{role}.{key}" for role in ("validation", "test") for key in ("nsamples=2", "stride=1")]
    few += ["texts.calibration.nsamples=2", "texts.calibration.draws=1"]
    for name in NAMES:
        study = out / "studies" / f"{name}.toml"
        shipped = (BENCHMARKS / "studies" / study.name).read_text()
        study.write_text(shipped.replace("../../build/language", ".."))
        answer = command.ok("prune", "--study", study, "--beta", "0", *settings(*few))
        assert "wanda uniform, 60% sparsity: perplexity" in answer.out
