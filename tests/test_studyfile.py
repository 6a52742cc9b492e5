import json
import random
from pathlib import Path

import optuna
import pytest
from expect import parametrize, refusal, slow
from synthetic import storage_in

from atp_tune.config import finding
from atp_tune.config.data import LOCAL, text_name
from atp_tune.config.finding import find, known
from atp_tune.config.studyfile import (
    load,
)
from atp_tune.errors import UserError
from atp_tune.storage.fingerprint import facts

REPO = Path(__file__).parents[1]
SHIPPED = sorted((REPO / "studies").rglob("*.toml"))
GOOD = """
sparsity = 0.6

[model]
source = "org/name"

[prune]
pruners = ["wanda"]

[allocation]
beta = [0, 0.01]

[texts.calibration]
source = "c4"
sampling = "random"
nsamples = 4

[texts.validation]
source = "wikitext2"
split = "validation"

[texts.test]
source = "wikitext2"
split = "test"

[search]
trials = 5
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.toml").write_text(GOOD)
    return tmp_path


def message(name: str, *overrides: str) -> str:
    return refusal(load, name, overrides)


def message_of(content: str | bytes) -> str:
    Path("x.toml").write_bytes(content.encode() if isinstance(content, str) else content)
    return message("x.toml")


# Shipped studies


def test_studies_are_shipped() -> None:
    names = {path.stem for path in SHIPPED}
    held_out = {"smol-60", "llama70", "llama2-70b", "llama3-8b"}
    assert names >= held_out | {f"paper-{name}" for name in held_out}


# Mistakes


@parametrize(
    ("content", "expected"),
    [
        ("a b", "line 1, column 3: expected '=' after a key in a key/value pair"),
        ("a = 1\na = 2", "line 2: cannot overwrite a value"),
        ("\n\na = [1", "line 3: unclosed array"),
        ("a = '\x01'", r"line 1, column 6: found invalid character '\x01'"),
        (b"a = 1\nb = '\xff'", "line 2: is not UTF-8 text"),
        ("a = " + "[" * 5000, "values are nested too deeply"),
        ("", "sparsity: is needed (and 3 more mistakes)"),
    ],
    ids=range(7),
)
def test_bad_syntax(content: str | bytes, expected: str) -> None:
    assert message_of(content) == f"x.toml: {expected}"


def test_missing_study(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finding, "_folders", lambda: (folder / "studies",))
    assert message("smoll") == "smoll: no such study; known are none"
    (folder / "studies").mkdir()
    for name in ("smol", "llama70"):
        (folder / "studies" / f"{name}.toml").touch()
    listed = "no such study; known are llama70, smol"
    assert message("smoll") == f"smoll: {listed}; did you mean smol?"
    assert message("a/lama70.toml") == "a/lama70.toml: no such file; did you mean llama70?"
    assert message("qqqqqq") == f"qqqqqq: {listed}"
    assert message("a\nb") == rf"a\nb: {listed}"
    assert message("a\0b.toml") == r"a\x00b.toml: no such file"
    study = optuna.create_study(storage=storage_in(folder / "studies" / "smol.db"), study_name="smol-kl")
    assert message("smol-kl") == "smol-kl: is no study file, but trials: --study smol --study-name smol-kl"
    assert message(study.study_name + "x").startswith(f"smol-klx: {listed}")
    assert message("a" * 5000).endswith("cannot be read: File name too long")


JUNK_VALUES = [
    *(
        "1",
        "-1",
        "1.5",
        "nan",
        "inf",
        "1e999",
        "true",
        '"x"',
        r'"a\nb"',
        r'"\u0085\u2028"',
        "''",
        "9" * 20,
        "",
    ),
    *("[]", "[1, 2]", "[nan, nan]", "[[", "{}", "{a = 1}", "[{a = 1}]", "2024-01-31", "07:32:00", "'''\n'''"),
]
JUNK_LINES = [
    "a.b = 1",
    r'"\n" = 1',
    "é",
    "",
    "[",
    "[[texts]]",
    "[model.x]",
    "[texts.calibration.x]",
    "search.x.y = 1",
]


def junk(rng: random.Random) -> str:
    lines = GOOD.splitlines()
    keys = [line.split(" = ")[0] for line in lines if "=" in line]
    for _ in range(rng.randint(1, 4)):
        assigned = f"{rng.choice(keys)} = {rng.choice(JUNK_VALUES)}"
        letters = "".join(rng.sample(GOOD, 9))
        lines[rng.randrange(len(lines))] = rng.choice([assigned, assigned, rng.choice(JUNK_LINES), letters])
    return "\n".join(lines)


@slow
def test_junk_is_always_one_line() -> None:
    rng = random.Random(0)
    refused = 0
    for _ in range(1500):
        Path("x.toml").write_text(junk(rng))
        try:
            load("x.toml")
        except UserError as error:
            refused += 1
            assert str(error).isprintable()  # so it holds no line break
            assert str(error).startswith("x.toml: ")
            assert "nput" not in str(error)
            assert "is not valid" not in str(error)
    assert 1000 < refused < 1500


# Overrides


def test_overrides_are_toml_or_plain_strings() -> None:
    overrides = [
        "sparsity=0.7",
        "model.source = other/name",
        'model.revision="12"',
        "prune.pruners=['sparsegpt']",
    ]
    study = load("x.toml", [*overrides, "prune.sparsegpt.damping=0.1", "description=a = b # c"]).study
    assert (study.sparsity, study.model.source, study.model.revision) == (0.7, "other/name", "12")
    assert (study.prune.pruners, study.prune.sparsegpt.damping) == (("sparsegpt",), 0.1)
    assert study.description == "a = b # c"


def test_override_holds_one_value() -> None:
    assert load("x.toml", ["description=1\nsparsity = 3"]).study.description == "1\nsparsity = 3"
    assert load("x.toml", ["texts.test={source='c4', split='validation'}"]).study.test_text.source == "c4"


# Where a study is found, and where its results go


def test_first_folder_wins(folder: Path) -> None:
    (folder / "studies").mkdir()
    (folder / "studies" / "smol.toml").write_text(GOOD)
    assert find("smol") == Path("studies/smol.toml")
    assert find("llama70") == REPO / "studies" / "llama70.toml"
    assert find("x.toml") == Path("x.toml")
    assert [*known()] == sorted(path.stem for path in SHIPPED)
    assert Path("studies/smol.toml") in known().values()


@parametrize(
    ("storage", "url", "best"),
    [
        (None, "sqlite:///{0}/x.db", "{0}/x.best.json"),
        ("sqlite:///sub/y.db", "sqlite:///{0}/sub/y.db", "{0}/sub/x.best.json"),
        ("sqlite:///y.db?timeout=9", "sqlite:///{0}/y.db?timeout=9", "{0}/x.best.json"),
        ("sqlite+pysqlite:///y.db", "sqlite+pysqlite:///{0}/y.db", "{0}/x.best.json"),
        ("sqlite:////abs/y.db", "sqlite:////abs/y.db", "/abs/x.best.json"),
        ("sqlite:///:memory:", "sqlite:///:memory:", "{0}/x.best.json"),
        ("sqlite://", "sqlite://", "{0}/x.best.json"),
        ("postgresql://host/db", "postgresql://host/db", "{0}/x.best.json"),
    ],
)
def test_results(storage: str | None, url: str, best: str, folder: Path) -> None:
    loaded = load("x.toml", [f"storage={storage}"] if storage else [])
    assert loaded.storage_url == url.format(folder)
    assert loaded.best_path(loaded.name) == Path(best.format(folder))


# Facts


def test_facts_of_young_keys_are_those_that_differ_from_their_defaults() -> None:
    """So that a study which was made before they were there goes on."""
    base = facts(load("x.toml").study)
    assert {key for key in base if key.startswith("prune.")} == {
        "prune.pruners",
        "prune.statistics",
        "prune.sparsegpt.damping",
        "prune.sparsegpt.columns",
    }
    changed = facts(
        load("x.toml", ["prune.pattern=mixed:8", "prune.wanda.compare=row-variant", "prune.alps.rho=1"]).study
    )
    others = {"prune.pattern": "mixed:8", "prune.wanda.compare": "row-variant", "prune.alps.rho": 1.0}
    assert changed == {**base, **others}


@parametrize("kind", LOCAL)
def test_folders_of_this_machine_are_in_no_name(kind: str) -> None:
    from atp_tune.config.study import Text
    from atp_tune.folders.publishing import published
    from atp_tune.results.formatting import _source_name

    source = f"{kind}:/home/me/secret/corpus"
    texts = {"atp_tune.json": json.dumps({"model": {"source": "org/m"}, "texts": {"test": {"source": source}}})}
    said = [text_name(source), _source_name(source), Text(source=source).told, *published(texts, Path()).values()]
    assert all("secret" not in name and "corpus" in name for name in said)
