import json
import random
from pathlib import Path

import optuna
import pytest
from synthetic import storage_in

from atp_tune.config import finding
from atp_tune.config.data import LOCAL, TEXT_SOURCES, is_local_text, text_name
from atp_tune.config.facts import facts, is_local
from atp_tune.config.finding import find, known
from atp_tune.config.studyfile import (
    StudyFile,
    from_settings,
    load,
    settings,
)
from atp_tune.errors import UserError

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
    with pytest.raises(UserError) as caught:
        load(name, overrides)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def message_of(content: str | bytes) -> str:
    Path("x.toml").write_bytes(content.encode() if isinstance(content, str) else content)
    return message("x.toml")


# Shipped studies


def test_studies_are_shipped() -> None:
    names = {path.stem for path in SHIPPED}
    held_out = {"smol-60", "llama70", "llama2-70b", "llama3-8b"}
    assert names >= held_out | {f"paper-{name}" for name in held_out}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_study(path: Path) -> None:
    loaded = load(str(path))
    assert path.read_text().splitlines()[:2] == [
        "#:schema ./study.schema.json",
        f"# python tune.py --study {path.stem}",
    ]
    by_paper = {"imagenet-deit": "paper-images", "imagenet-convnext": "paper-images"}
    known = "paper" if path.stem.startswith("paper-") else "held-out"
    assert loaded.study.protocol == by_paper.get(path.stem, known)
    assert find(path.stem) == path


@pytest.mark.parametrize("path", [path for path in SHIPPED if path.stem.startswith("paper-")], ids=str)
def test_paper_twin_differs_only_in_protocol(path: Path) -> None:
    paper, held_out = load(str(path)).study, load(path.stem.removeprefix("paper-")).study
    assert (paper.sparsity, paper.model.source) == (held_out.sparsity, held_out.model.source)
    assert paper.prune == held_out.prune
    assert paper.texts.calibration.text == held_out.texts.calibration.text
    assert (paper.search.sampler, paper.search.step) == ("grid", 0.002)


# Mistakes

REPLACED = [  # what stands in GOOD, what stands there instead, the message
    ("sparsity = 0.6", "sparsity = 1.2", "sparsity: must be less than 1, got 1.2"),
    ("sparsity = 0.6", "sparsity = 0", "sparsity: must be greater than 0, got 0"),
    ("sparsity = 0.6", 'sparsity = "much"', 'sparsity: must be a number, got "much"'),
    ("sparsity = 0.6", "sparsity = {a = 1}", "sparsity: must be a number, got a table"),
    (
        '[model]\nsource = "org/name"\n\n[prune]',
        'speed = true\n[model]\nsource = "org/name"\n\n[prune]\npattern = "channels"',
        'speed: packed weights have single zeros, which prune.pattern = "channels" makes none of; leave it out',
    ),
    ("sparsity = 0.6", "sparsity = [0.3, 1.2]", "sparsity[1]: must be less than 1, got 1.2"),
    (
        "sparsity = 0.6",
        "sparsity = [0.8, 0.3]",
        "sparsity: the interval [0.8, 0.3] must run from the lower to the higher",
    ),
    ("sparsity = 0.6", "", "sparsity: is needed"),
    ("sparsity = 0.6", "sparsty = 0.6", "sparsty: unknown key; did you mean sparsity? (and 1 more mistake)"),
    (
        "sparsity = 0.6",
        "sparsity = 2\ntrials = 5",
        "trials: unknown key; did you mean search.trials? (and 1 more mistake)",
    ),
    (
        "sparsity = 0.6",
        'sparsity = 2\n"a\\nb" = 5',
        r'"a\nb": unknown key; known here are description, protocol, bits, sparsity, limit, model, prune, quantize, '
        "allocation, images, texts, search, recover, continuations, speed, storage, "
        "device (and 1 more mistake)",
    ),
    ("pruners =", "pruner =", "prune.pruner: unknown key; did you mean prune.pruners?"),
    (
        "pruners =",
        "qqq =",
        "prune.qqq: unknown key; known here are pruners, statistics, sparsegpt, pattern, refine, gradient_at, "
        "loss, channels, wanda, dsnot, alps",
    ),
    (
        '["wanda"]',
        '["wandda"]',
        'prune.pruners[0]: must be one of magnitude, wanda, sparsegpt, dsnot, alps, got "wandda"; did you mean wanda?',
    ),
    ('["wanda"]', '"wanda"', 'prune.pruners: must be a list, got "wanda"'),
    ('["wanda"]', "[]", "prune.pruners: must hold at least 1 value, got []"),
    (
        '["wanda"]',
        '["wanda", 7, "spargpt"]',
        "prune.pruners[1]: must be one of magnitude, wanda, sparsegpt, dsnot, alps, got 7 (and 1 more mistake)",
    ),
    ("[0, 0.01]", "[0.02, 0.01]", "allocation.beta: the interval [0.02, 0.01] runs backwards"),
    ("[0, 0.01]", '"atuo"', 'allocation.beta: must be one of auto, both or be a list, got "atuo"; did you mean auto?'),
    ("[0, 0.01]", '[0, "b"]', 'allocation.beta[1]: must be a number, got "b"'),
    ("[0, 0.01]", "[0]", "allocation.beta[1]: is needed, got [0]"),
    ("[0, 0.01]", "[0, 0, 0]", "allocation.beta: must be one of auto, both or hold at most 2 values, got [0, 0, 0]"),
    ("nsamples = 4", "", "texts.calibration.nsamples: a random draw needs their number"),
    ("nsamples = 4", "nsamples = 0", "texts.calibration.nsamples: must be at least 1, got 0"),
    ("nsamples = 4", "nsamples = 4.5", "texts.calibration.nsamples: must be a whole number, got 4.5"),
    ("nsamples = 4", "nsamples = true", "texts.calibration.nsamples: must be a number, got true"),
    ("nsamples = 4", "nsamples = 4\ndraws = false", "texts.calibration.draws: must be a number, got false"),
    ("nsamples = 4", "nsamples = inf", "texts.calibration.nsamples: must be finite, got Infinity"),
    ("nsamples = 4", "part = [0, 2]", "texts.calibration.part[1]: must be at most 1, got 2"),
    ("nsamples = 4", "nsamples = 4\npart = [1, 1]", "texts.calibration.part: [1.0, 1.0] holds nothing"),
    ("nsamples = 4", "search.trials = 4", "texts.calibration.search: unknown key; did you mean search?"),
    (
        '"test"',
        '"validation"',
        "texts.test: reads the same documents as texts.validation; give it another split or part",
    ),
    ('[model]\nsource = "org/name"', "model = 5", "model: must be a table, got 5"),
    ('[model]\nsource = "org/name"', "", "model: is needed"),
    ('"org/name"', '""', 'model.source: must not be empty, got ""'),
    ('"org/name"', "2024-01-31", 'model.source: must be a string in quotes, got "2024-01-31"'),
    ('"org/name"', '"pypi:wheel"', 'model.source: must pin a wheel as pypi:NAME==VERSION, got "pypi:wheel"'),
    (
        '"org/name"',
        '"pypi:wheel==1"',
        "model.sha256: is needed with a pypi: source, so that the wheel can be checked",
    ),
    (
        '"org/name"',
        '"org/name"\nsha256 = "ABC"',
        'model.sha256: must be 64 hexadecimal digits in lower case, got "ABC"',
    ),
    ("trials = 5", "", "search.trials: is needed with the sampler gp where no points are screened"),
]


@pytest.mark.parametrize(("old", "new", "expected"), REPLACED, ids=range(len(REPLACED)))
def test_wrong_value_or_key(old: str, new: str, expected: str) -> None:
    assert GOOD.count(old) == 1
    assert message_of(GOOD.replace(old, new)) == f"x.toml: {expected}"


@pytest.mark.parametrize(
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


def test_integer_of_many_digits() -> None:
    assert message_of(f"a = {'9' * 5000}").startswith("x.toml: exceeds the limit")
    assert message_of(f"seed = 0x{'f' * 5000}\n" + GOOD).startswith("x.toml: seed: unknown key")
    assert message_of(GOOD.replace("0.6", f"0x{'f' * 5000}")).endswith("got a value too large to show")


def test_long_values_are_cut() -> None:
    long = GOOD.replace("0.6", repr("a" * 500))
    assert message_of(long) == f'x.toml: sparsity: must be a number, got "{"a" * 58}…'


def test_byte_order_mark_and_crlf_are_read() -> None:
    Path("x.toml").write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())
    assert load("x.toml").study.sparsity == 0.6


def test_directory_and_unreadable_file(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("d.toml").mkdir()
    assert message("d.toml") == "d.toml: cannot be read: Is a directory"

    def denied(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", denied)
    assert message("x.toml") == "x.toml: cannot be read: Permission denied"


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


@pytest.mark.slow
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


def test_junk_bytes_are_always_one_line() -> None:
    rng = random.Random(1)
    for _ in range(300):
        assert message_of(rng.randbytes(rng.randint(1, 60))).startswith("x.toml: ")


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
    study = load("x.toml", ["texts.test={source='c4', split='validation'}"]).study
    assert study.test_text.source == "c4"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("sparsity", "must have the form key.path=value"),
        ("=3", "must have the form key.path=value"),
        ("prune..pruners=3", "must have the form key.path=value"),
        ("sparsity.x=3", "sparsity: is not a table"),
        ("prune.pruners.0=wanda", "prune.pruners: is not a table"),
        ("search.trails=3", "search.trails: unknown key; did you mean search.trials?"),
        ("serch.trials=3", "serch: unknown key; did you mean search?"),
        ("sparsity=1.5", "sparsity: must be less than 1, got 1.5"),
        ("texts.validation={}", "texts.validation.source: is needed"),
        (
            "model.dtype=bf16",
            'model.dtype: must be one of auto, float32, bfloat16, float16, got "bf16"; did you mean bfloat16?',
        ),
    ],
)
def test_wrong_override(override: str, expected: str) -> None:
    assert message("x.toml", "search.seed=1", override) == f"x.toml with --set {override}: {expected}"


def test_mistake_of_the_file_does_not_blame_the_override() -> None:
    Path("x.toml").write_text(GOOD.replace("0.6", "6"))
    assert message("x.toml", "search.seed=1") == "x.toml: sparsity: must be less than 1, got 6"


# Where a study is found, and where its results go


def test_first_folder_wins(folder: Path) -> None:
    (folder / "studies").mkdir()
    (folder / "studies" / "smol.toml").write_text(GOOD)
    assert find("smol") == Path("studies/smol.toml")
    assert find("llama70") == REPO / "studies" / "llama70.toml"
    assert find("x.toml") == Path("x.toml")
    assert [path.stem for path in known()] == sorted(path.stem for path in SHIPPED)
    assert Path("studies/smol.toml") in known()


def test_study_file_is_frozen(folder: Path) -> None:
    loaded = load("./x.toml")
    assert (loaded.name, loaded.folder.resolve()) == ("x", folder)
    assert loaded == StudyFile("x", Path("x.toml"), loaded.study)
    with pytest.raises(AttributeError):
        loaded.name = "y"  # type: ignore[misc]


@pytest.mark.parametrize(
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
    assert loaded.best_of(loaded.name) == Path(best.format(folder))


def test_embedded_study_keeps_its_results_here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finding, "EMBEDDED", folder / "installed")
    (folder / "installed").mkdir()
    (folder / "installed" / "y.toml").write_text(GOOD)
    loaded = load("y")
    assert loaded.folder == folder / "installed"
    assert loaded.storage_url == f"sqlite:///{folder}/studies/y.db"
    assert loaded.best_of(loaded.name) == folder / "studies" / "y.best.json"


# Facts


def test_facts_of_a_study() -> None:
    known_facts = facts(load("x.toml").study)
    expected = {
        "protocol": "held-out",
        "sparsity": 0.6,
        "model.source": "org/name",
        "prune.pruners": ["wanda"],
        "prune.sparsegpt.columns": 128,
        "allocation.beta": [0.0, 0.01],
        "texts.calibration.sampling": "random",
        "texts.validation.split": "validation",
        "search.sampler": "gp",
    }
    assert {key: known_facts[key] for key in expected} == expected
    absent = {"description", "storage", "device", "search.trials", "model.dtype", "model.revision"}
    assert not absent & known_facts.keys()
    assert json.loads(json.dumps(known_facts)) == known_facts


def test_facts_say_what_not_how_long() -> None:
    base = facts(load("x.toml").study)
    elsewhere = ["search.trials=99", "device=cpu", "storage=sqlite://", "description=z"]
    assert facts(load("x.toml", elsewhere).study) == base
    assert facts(load("x.toml", ["search.seed=9"]).study) != base


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


def test_facts_leave_out_local_sources(folder: Path) -> None:
    (folder / "org" / "name").mkdir(parents=True)
    study = load("x.toml", ["texts.validation={source='file:a.txt'}", "model.dtype=float32"]).study
    assert "model.source" not in facts(study)
    assert "model.source" in facts(study, folder / "org")
    assert "texts.validation.source" not in facts(study)
    assert facts(study)["texts.test.source"] == "wikitext2"
    assert facts(study)["model.dtype"] == "float32"


@pytest.mark.parametrize("source", ["m.gguf", "a/b.gguf", "./m", "../m", "/m", "~/m", "here"])
def test_is_local(source: str, folder: Path) -> None:
    (folder / "here").mkdir()
    assert is_local(source, folder)


@pytest.mark.parametrize("source", ["org/name", "gpt2", "pypi:a==1", "x.toml", "a" * 5000, "a\0b"], ids=range(6))
def test_is_not_local(source: str, folder: Path) -> None:
    assert not is_local(source, folder)


def test_is_local_text() -> None:
    assert is_local_text("file:a.txt")
    assert not is_local_text("wikitext2")


def test_the_names_of_sources_are_those_that_are_read() -> None:
    from atp_tune.config.data import FORMS
    from atp_tune.inputs.documents import SOURCES

    assert set(TEXT_SOURCES) == {name for name in SOURCES if SOURCES.is_built_in(name)}
    assert set(LOCAL) < {*TEXT_SOURCES, *FORMS}


@pytest.mark.parametrize("kind", LOCAL)
def test_folders_of_this_machine_are_in_no_name(kind: str) -> None:
    from atp_tune.config.study import Text
    from atp_tune.folders.card import words
    from atp_tune.folders.publishing import published
    from atp_tune.results.formatting import _named

    source = f"{kind}:/home/me/secret/corpus"
    texts = {"atp_tune.json": json.dumps({"model": {"source": "org/m"}, "texts": {"test": {"source": source}}})}
    said = [text_name(source), _named(source), words(Text(source=source)), *published(texts, Path()).values()]
    assert all("secret" not in name and "corpus" in name for name in said)


def test_the_short_form_of_allocation_takes_overrides_of_its_table(folder: Path) -> None:
    path = REPO / "studies" / "smol-allocations.toml"
    study = load(str(path), ["allocation.beta=both"]).study
    assert study.allocation.beta == "both"
    assert study.allocation.names[:2] == ("atp", "curve")
    assert load("smol", ["allocation=owl", "allocation.beta=both"]).study.allocation.names == ("owl",)
    assert load("smol", ["allocation.names=owl"]).study.allocation.names == ("owl",)


@pytest.mark.parametrize("key", ["allocation.names", "prune.pruners"])
def test_a_name_that_is_there_twice(key: str, folder: Path) -> None:
    name = "wanda" if "pruners" in key else "owl"
    with pytest.raises(UserError, match=rf'{key}: holds "{name}" 2 times'):
        load("smol", [f"{key}=['{name}', '{name}']"])


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_settings_hold_the_whole_study(path: Path) -> None:
    file = load(str(path), ["search.trials=7", "storage=postgresql://me:secret@host/db"])
    stored = json.loads(json.dumps(settings(file)))
    assert "secret" not in str(stored)
    again = from_settings(stored)
    assert again.study == file.study.model_copy(update={"storage": None, "device": "auto"})
    assert (again.name, again.folder) == (file.name, file.folder.absolute())
