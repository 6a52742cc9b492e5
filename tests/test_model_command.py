"""`tune.py MODEL`: a study without a study file."""

import json
import re
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
from expect import parametrize, refused, slow
from tinystudy import Answer, CommandLine, stored

from atp_tune.api.arguments import changed
from atp_tune.api.arguments import overrides as typed
from atp_tune.api.presets import (
    HUB_TEXTS,
    PRESETS,
    StudyRequest,
    preset_texts,
)
from atp_tune.checkpoints.models import resolve
from atp_tune.cli import tune
from atp_tune.config.data import Text
from atp_tune.config.prune import RecoverConfig
from atp_tune.config.study import ModelConfig, Study
from atp_tune.config.studyfile import StudyFile, load, tables, write_study
from atp_tune.config.typed import WHOLE, goal, parse_limit, parse_target
from atp_tune.inputs.sources import documents

QUICK = ("--preset", "quick", "--trials", "2", "--set", "texts.calibration.draws=1")


@pytest.fixture
def here(tiny_place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the folder of a model and a text."""
    shutil.copytree(tiny_place / "model", tmp_path / "Tiny_Llama")
    shutil.copyfile(tiny_place / "long.txt", tmp_path / "own.txt")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@slow
def test_a_model_is_tuned_and_resumed(here: Path, command: CommandLine) -> None:
    words = ("Tiny_Llama", "--sparsity", "0.5", "--texts", "own.txt", "--recover", *QUICK)
    answer = command(*words)
    assert answer.is_clean
    name = "tiny_llama-50-quick-own"
    assert f"study: studies/{name}.toml" in answer.out
    assert re.search(r"^quick: 2 trials, about \d+ s, of which .* to train the best plan", answer.out, re.M)
    assert "[2/2]" in answer.out
    best = json.loads((here / "studies" / f"{name}.best.json").read_text())
    assert best["sparsity"]["target"] == 0.5
    assert best["recovered"]["settings"]["seqlen"] == 256  # of the usual [recover]
    assert "rained after pruning: " in answer.out
    study = load(name).study
    assert study.recover == RecoverConfig(seqlen=256, min_increase=0.25)
    assert study.model.source == str(here / "Tiny_Llama")
    assert (study.search.trials, study.texts.calibration.draws) == (2, 1)  # the file says what options set
    command.ok("--study", name)
    again = command(*words)
    assert "[1/2]" not in again.out
    assert "best" in again.out
    assert "[3/3]" in command(*[word if word != "2" else "3" for word in words], "--no-recover").out
    assert len(stored(here, name, here / "studies" / f"{name}.db").trials) == 3
    command.ok("status", "--study", name)


@slow
def test_a_dry_run_writes_nothing(here: Path, command: CommandLine) -> None:
    answer = command("Tiny_Llama", "--texts", "own.txt", "--preset", "quick", "--dry-run", "--device", "cpu")
    assert answer.is_clean
    assert "sparsity = [0.3, 0.7]" in answer.out and "max_increase = 0.1" in answer.out
    assert "[recover]" not in answer.out and "\ndraws = " not in answer.out
    assert "Made by: python tune.py Tiny_Llama --texts own.txt --preset quick --device cpu\n" in answer.out
    assert "at most 6 trials, " in answer.out
    answer = command("Tiny_Llama", "--texts", "own.txt", "--size", "3.3bpw", "--dry-run", "--device", "cpu")
    assert 'size = "3.3bpw"' in answer.out and "act_order = true" in answer.out and "sparsity" not in answer.out
    for words, said in (
        (("--sparsity", "0.5"), "--sparsity: --size finds zeros and bits that fit it; leave one of them out"),
        (("--max-kl", "0.1"), "--max-kl: --size finds zeros"),
        (("--allocation", "atp"), "allocation.names: atp has no prices of bits"),
    ):
        assert said in command("Tiny_Llama", "--texts", "own.txt", "--size", "3.3bpw", *words).error
    assert "--size: must be bits a weight" in command("Tiny_Llama", "--size", "small").error
    assert not (here / "studies").exists()


@slow
def test_a_model_that_cannot_be_pruned_leaves_no_file(here: Path, command: CommandLine) -> None:
    config = json.loads((here / "Tiny_Llama" / "config.json").read_text())
    (here / "Tiny_Llama" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 9}))
    assert "has no " in command("Tiny_Llama", "--texts", "own.txt", *QUICK).error
    assert not list((here / "studies").glob("*.toml"))


@slow
@pytest.mark.usefixtures("mixed")
def test_the_texts_without_the_hub(here: Path, command: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibrated on the manual alone, a model was twice as bad on other kinds of text as on manuals."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    answer = command("./Tiny_Llama", "--device", "cpu", *QUICK)
    assert answer.is_clean
    line = "texts: manual, news, tales, debates, code, since the hub is out of reach (--texts FILE takes your own)"
    assert line in answer.out
    assert "\ntexts: parts of manual, news, tales, debates and code\n" in answer.out  # below the tables
    assert re.search(r"\| test perplexity by kind +\| manual +\| news +\| tales +\| debates +\| code +\|", answer.out)
    assert load("tiny_llama-max-increase-10-quick").study.recover is None
    assert load("tiny_llama-max-increase-10-quick").study.texts.test.source == "mixed"  # type: ignore[union-attr]


def error(answer: Answer, folder: Path) -> str:
    """The line of an error, after which no study file is there."""
    assert not list(folder.glob("studies/*.toml"))
    return answer.error


@slow
@parametrize("sparsity", [0.5, 0.6])
def test_a_study_file_that_is_written_meanwhile_is_not_replaced(
    sparsity: float, here: Path, command: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the same command beside this one, which then joins, or by another, which is refused."""
    make, started, path = StudyRequest.study, list[Path](), here / "studies" / "a.toml"

    def made_by_two(request: StudyRequest, *arguments: Any) -> Study:
        write_study(path, make(StudyRequest("Tiny_Llama", sparsity, "quick"), "cpu", {}, print), ())
        return make(request, *arguments)

    monkeypatch.setattr(StudyRequest, "study", made_by_two)
    monkeypatch.setattr(tune, "_start", lambda path, options: started.append(path))
    answer = command("Tiny_Llama", "--sparsity", "0.5", "--preset", "quick", "--name", "a")
    assert tomllib.loads(path.read_text())["sparsity"] == sparsity
    assert len(started) == (sparsity == 0.5), answer
    assert sparsity == 0.5 or "sparsity is 0.6 there, and 0.5 is asked for" in answer.error


def test_another_study_of_the_same_name(here: Path, command: CommandLine) -> None:
    request = StudyRequest("Tiny_Llama", 0.5, "quick", texts="own.txt")
    study = request.study("cpu", {}, lambda _: None)
    request.check_same(study, Path("a.toml"))
    for other, key in (
        (StudyRequest("Tiny_Llama", 0.6), "sparsity is 0.5 there, and 0.6 is asked for"),
        (StudyRequest("Tiny_Llama", 0.5, pruners=("alps",)), "prune.pruners is wanda there, and alps"),
        (StudyRequest("Tiny_Llama", 0.5, texts="c4"), "texts.validation.source is file:"),
        (StudyRequest("other/Tiny_Llama", 0.5), "model.source is /"),
        (StudyRequest("Tiny_Llama", (0.3, 0.8)), "sparsity is 0.5 there, and 0.3..0.8 is asked for"),
    ):
        with refused(key):
            other.check_same(study, Path("a.toml"))


@parametrize(("windows", "stride"), [(None, 4), (16, 4), (8, 4), (7, 3), (3, 1), (2, 1)])
def test_a_short_text_is_screened_on_two_windows_at_least(windows: int | None, stride: int) -> None:
    request = StudyRequest("model", (0.3, 0.8))
    assert request.search(PRESETS["quick"], windows, ("atp",))["screen"]["stride"] == stride
    assert windows is None or len(range(0, windows, stride)) >= 2
    with refused("validation: has one window, and an interval of sparsities needs two"):
        request.search(PRESETS["quick"], 1, ("atp",))


@parametrize("preset", PRESETS)
@parametrize("choice", HUB_TEXTS)
def test_texts_of_the_hub(choice: str, preset: str, tiny_place: Path) -> None:
    """They make a study whose texts share nothing, with windows that the model can take."""
    model = ModelConfig(source=str(tiny_place / "model"))
    texts = preset_texts(choice, PRESETS[preset], resolve(model, Path()))
    study = Study.model_validate({"sparsity": 0.5, "model": model, "texts": texts, "search": {"trials": 1}})
    assert study.texts.calibration.nsamples == PRESETS[preset].calibration
    assert {study.texts.calibration.seqlen, study.test_text.seqlen} == {256}


@parametrize(
    ("text", "expected"),
    [
        ("0.6", 0.6),
        ("60%", 0.6),
        ("7%", 0.07),
        ("0.3..0.8", (0.3, 0.8)),
        ("30%..80%", (0.3, 0.8)),
        (" 7 % .. .5", (0.07, 0.5)),
    ],
)
def test_sparsities_as_people_type_them(text: str, expected: float | tuple[float, float]) -> None:
    assert parse_target(text) == expected


@parametrize(
    ("overrides", "sparsity", "limit"),
    [
        (["sparsity=0.5"], 0.5, None),
        (["sparsity=[0.3, 0.8]"], (0.3, 0.8), None),
        (["sparsity=[0.3, 0.8]", "limit.max_kl=0.2"], (0.3, 0.8), {"max_kl": 0.2}),
        (["limit.max_kl=0.2"], WHOLE, {"max_kl": 0.2}),
        (["limit={min_accuracy={piqa=0.6}, items=9}"], WHOLE, {"min_accuracy": {"piqa": 0.6}}),
        (["limit=none"], WHOLE, None),
        (["search.objective=kl"], WHOLE, {"max_kl": 0.1}),
        (['search.objective=["kl"]', "sparsity=0.5"], 0.5, None),
    ],
)
def test_what_settings_ask_for_is_asked_for(overrides: list[str], sparsity: object, limit: object, here: Path) -> None:
    """Without an option a limit was added that nobody gave, and the settings were refused for it."""
    settings = dict(text.split("=", 1) for text in overrides)
    assert goal(None, {}, tables(overrides)) == (sparsity, limit)
    python = {
        key: tomllib.loads(f"v = {value}")["v"] if value[0] in "[{0" else value for key, value in settings.items()
    }
    asked = tables(typed(python))
    target, found = goal(None, {}, asked)
    assert (target, found) == (sparsity, limit)
    if limit is None or "min_accuracy" not in limit:  # type: ignore[operator]
        request = StudyRequest("Tiny_Llama", target, "quick", texts="own.txt", limit=found, settings=asked)
        study = request.study("cpu", {}, lambda _: None)
        file = changed(StudyFile("a", Path("a.toml"), study), python, False)
        assert (file.study.sparsity, file.study.limit and file.study.limit.given) == (sparsity, limit)


@parametrize(
    ("allocation", "sparsity", "settings"),
    [
        ("atp", 0.5, {"prune.pattern": "channels"}),
        ("atp", WHOLE, {"prune.pattern": "channels"}),
        ("gradient-rows", 0.5, {"bits": 4}),
    ],
)
def test_nothing_unasked_contradicts_a_setting(
    allocation: str, sparsity: Any, settings: dict[str, Any], here: Path
) -> None:
    """The speed, the training and the screening of a preset were, each, a reason to refuse channels."""
    limit = {"max_increase": 0.1} if sparsity == WHOLE else None
    asked = tables(typed(settings))
    request = StudyRequest("Tiny_Llama", sparsity, "balanced", (), (allocation,), "own.txt", limit, settings=asked)
    study = request.study("cpu", {}, lambda _: None)
    file = changed(StudyFile("a", Path("a.toml"), study), settings, False)
    assert bool(file.study.recover) == file.study.speed == ("bits" in settings)


@parametrize(
    ("recover", "expected"), [(None, None), (False, None), (True, RecoverConfig(seqlen=256, min_increase=0.25))]
)
def test_recover_of_a_study_made_without_it(
    recover: bool | None, expected: object, here: Path, command: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was ignored."""
    started: list[Any] = []
    monkeypatch.setattr(tune, "_start", lambda path, options, *_: started.append(options.load(str(path)).study))
    words = ("Tiny_Llama", "--set", "sparsity=0.5", "--preset", "quick", "--texts", "own.txt")
    for more in ((), () if recover is None else ("--recover",) if recover else ("--no-recover",)):
        command.ok(*words, *more)
    assert [study.recover for study in started] == [None, expected]
    assert [path.name for path in here.glob("studies/*.toml")] == ["tiny_llama-50-quick-own.toml"]


def test_limits_as_people_type_them() -> None:
    for key, text, value in (
        ("max_increase", "5%", 0.05), ("max_increase", "0.05", 0.05), ("max_increase", "150%", 1.5),
        ("max_perplexity", "20", 20.0), ("max_kl", "1e-1", 0.1),
    ):  # fmt: skip
        assert parse_limit(key, text) == value
        assert goal(None, {key: text}, {}) == (WHOLE, {key: value})
    assert goal(None, {}, {}) == (WHOLE, {"max_increase": 0.1})
    assert goal("60%", {}, {}) == (0.6, None)


def test_paragraphs_are_the_documents_of_one_file(tmp_path: Path) -> None:
    """Joined again they are the text: a file without parts is read as before."""
    file = tmp_path / "a.txt"
    for words, joint in (("one\n\ntwo two\n\nthree", "\n\n"), ("one\ntwo two\nthree", "\n")):
        file.write_text(words)
        text = Text(source=f"file:{file}")
        assert list(documents(text, tmp_path)) == [words]
        halves = [documents(text.model_copy(update={"part": part}), tmp_path) for part in ((0, 0.5), (0.5, 1))]
        assert joint.join([*halves[0], *halves[1]]) == words
        assert halves[1] == ["three"]
