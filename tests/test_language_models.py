"""The small language models of benchmarks/language_models.py: their texts, their tokenizer, and training in little."""

import importlib
import random
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from prose import prose
from test_benchmarks import BENCHMARKS, benchmark
from tinystudy import CommandLine, settings

from atp_tune.config.studyfile import load
from atp_tune.utils.cache import sha256_of

NAMES = ("llama-small", "gpt-neox-small")
PAGE = """<html><head><title>t</title><style>p {}</style></head><body><nav>Next</nav>
<h1>Files<a href="#files">¶</a></h1><p>One &amp;
two.</p><table><tr><td>a</td><td>b</td></tr></table><pre>def f():
    return 1
</pre><script>x = 1</script>Rest<br>of it</body></html>"""


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("language_texts")


@pytest.fixture
def models(texts: Any) -> Any:
    return benchmark("language_models")


def pages(count: int, seed: int = 0) -> list[list[str]]:
    """Made-up pages of paragraphs, some of which are in several pages."""
    rng, words = random.Random(seed), prose(40_000).split()
    known = [" ".join(rng.choices(words, k=rng.randint(1, 60))) for _ in range(3 * count)]
    return [[rng.choice(known) for _ in range(rng.randint(1, 30))] for _ in range(count)]


def test_text_of_a_page(texts: Any) -> None:
    found = texts.paragraphs("a.html", PAGE)
    assert found == ["Files", "One & two.", "a b", "def f():\n    return 1", "Rest of it"]
    assert texts.paragraphs("a.txt.gz", "one\ntwo\n\n \n three") == ["one two", "three"]


def test_no_paragraph_is_twice(texts: Any) -> None:
    given = [*pages(200), ["long"] * 9, ["x" * (texts.LONGEST + 1)], ["y" * texts.SHORTEST]]
    found = [text.split("\n\n") for text in texts.once(given)]
    assert max(Counter(part for page in found for part in page).values()) == 1
    assert found[-1] == ["y" * texts.SHORTEST]
    lengths = [sum(map(len, page)) for page in found]
    assert min(lengths) >= texts.SHORTEST
    assert max(lengths) <= texts.LONGEST
    assert {part for page in found for part in page} <= {part for page in given for part in page}


def test_parts_share_no_page(texts: Any) -> None:
    documents = texts.once(pages(2000))
    found = texts.parts_of(documents)
    assert Counter(text for part in found.values() for text in part) == Counter(documents)
    whole = sum(map(len, documents))
    for part, share in texts.SHARES.items():
        assert sum(map(len, found[part])) / whole == pytest.approx(share, abs=0.01)
    assert texts.parts_of(reversed(documents)) == found  # the text of a page decides, not its place
    paragraphs = [{line for text in part for line in text.split("\n\n")} for part in found.values()]
    assert sum(map(len, paragraphs)) == len(set().union(*paragraphs))


def test_pages_of_a_package(texts: Any, tmp_path: Path) -> None:
    if shutil.which("dpkg-deb") is None:
        pytest.skip("needs dpkg-deb")
    tree = tmp_path / "tree"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN" / "control").write_text(
        "Package: a-doc\nVersion: 1:2\nArchitecture: all\nMaintainer: a <a@example.org>\nDescription: a\n"
    )
    for name in ("b.en.html", "a.en.html", "a.de.html"):
        (tree / name).write_text(f"<p>{name}</p>")
    built = ["dpkg-deb", "--root-owner-group", "--build", str(tree), str(tmp_path / "a-doc_1%3a2_all.deb")]
    subprocess.run(built, check=True, capture_output=True)
    package = texts.Package("a-doc", "1:2", "0" * 64, r"\.en\.html$")
    file = texts.fetched(package, tmp_path)  # which is there
    with pytest.raises(SystemExit, match="not a-doc 1:2"):
        next(texts.of_package(package, file))
    package = replace(package, sha256=sha256_of(file))
    assert list(texts.of_package(package, file)) == [["a.en.html"], ["b.en.html"]]


def test_tokenizer_gives_the_text_back(models: Any) -> None:
    tokenizer = models.make_tokenizer([prose(20_000)], 400)
    assert len(tokenizer) == 400
    assert tokenizer.eos_token_id == 0
    for text in (prose(3000), "  def f():\n\treturn 'ü → 漢 🙂'\n\n", "", " "):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_windows_predict_each_token_once(models: Any) -> None:
    tokenizer = models.make_tokenizer([prose(20_000)], 400)
    given = [prose(4000), "b" * 999, prose(7000)]
    naive = [token for text in given for token in [*tokenizer(text)["input_ids"], 0]]
    windows = models.windows_of(given, tokenizer)
    size = models.SEQLEN
    expected = [naive[start : start + size + 1] for start in range(0, len(naive) - size, size)]
    assert sorted(windows.tolist()) == sorted(expected)
    assert windows.tolist() != expected  # in random order


@pytest.mark.parametrize("name", NAMES)
def test_studies_are_valid(name: str, models: Any) -> None:
    study = load(str(BENCHMARKS / "studies" / f"{name}.toml"), []).study
    assert study.model.source.endswith(f"build/language/{name}")
    assert set(models.MODELS) == set(NAMES)


@pytest.mark.slow
def test_from_a_folder_to_pruned_models(
    models: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: CommandLine,
) -> None:
    """Texts, tokenizer, both models and their studies in little; what is there is not made again."""
    (tmp_path / "pages").mkdir()
    for number, page in enumerate(pages(400)):
        (tmp_path / "pages" / f"{number}.txt").write_text("\n\n".join(page))
    out, tiny = tmp_path / "out", models.Shape(width=32, blocks=2, heads=2, vocabulary=400, steps=8)
    monkeypatch.setattr(models, "MODELS", {name: (make, tiny) for name, (make, _) in models.MODELS.items()})
    monkeypatch.setattr(sys, "argv", ["language_models.py", "--folder", f"{tmp_path}/pages", "--out", str(out)])
    models.main()
    said = capsys.readouterr().out
    assert said.count("step 8 of 8: loss") == 2
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
        answer = command("prune", "--study", study, "--beta", "0", *settings(*few))
        assert answer.code == 0, answer.err
        assert "wanda uniform, sparsity 0.6: perplexity" in answer.out


@pytest.mark.slow
def test_training_goes_on(models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped and resumed, it ends at the bits of an undisturbed run; another number of steps is refused."""
    shape = models.Shape(width=32, blocks=2, heads=2, vocabulary=300)
    windows = torch.randint(300, (10, models.SEQLEN + 1), generator=torch.Generator().manual_seed(1))

    def fresh() -> Any:
        torch.manual_seed(0)
        return models.llama(shape)

    whole = fresh()
    models.train(whole, windows, 6, tmp_path / "a.part")
    assert not (tmp_path / "a.part").exists()
    monkeypatch.setattr(models, "SAVED_EVERY", 0.0)
    step, calls = models.step_of, []

    def stopped(*words: Any) -> float:
        calls.append(0)
        if len(calls) == 4:
            raise KeyboardInterrupt
        loss: float = step(*words)
        return loss

    monkeypatch.setattr(models, "step_of", stopped)
    with pytest.raises(KeyboardInterrupt):
        models.train(fresh(), windows, 6, tmp_path / "b.part")
    with pytest.raises(SystemExit, match="another number of steps"):
        models.train(fresh(), windows, 7, tmp_path / "b.part")
    other = fresh()
    models.train(other, windows, 6, tmp_path / "b.part")
    assert len(calls) == 4 + 3
    for one, two in zip(whole.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
