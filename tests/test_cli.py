import io
import json
import os
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import sleep

import optuna
import pytest
from expect import slow
from preloaded import held
from processes import output
from tinystudy import HANGS, LONG, CommandLine, finish, run, settings, start, study_file, wait_for

from atp_tune.cli.terminal import interruptible
from atp_tune.config.best import read_config
from atp_tune.storage import opening, progress

ROLES = ("calibration", "validation", "test")
# Prints which of the heavy libraries the command line imported.
SPY = """
import atexit, sys
heavy = ("torch", "transformers", "datasets", "optuna")
atexit.register(lambda: print("imported:", *(name for name in heavy if name in sys.modules)))
from atp_tune.cli import main
main()
"""


def spied(*arguments: str | Path) -> tuple[str, set[str]]:
    """Output of a command in a process of its own, and what it imported of the heavy libraries."""
    printed, _, names = output(sys.executable, "-c", SPY, *arguments, timeout=HANGS).rpartition("imported:")
    return printed, set(names.split())


# --- the whole way, in processes of their own


@slow
def test_a_run_can_be_watched_and_is_not_done_twice(place: Path, command: CommandLine) -> None:
    study = place / "tiny.toml"
    process = start("--study", study, *settings(*LONG, "search.trials=9"), inject=partial(held, place, 1))
    wait_for(place / "tiny.db", 1, process)
    watched = command.ok("status", "--study", study)
    assert re.search(r"1 +running +wanda atp ", watched.out)
    assert re.search(r"0 +complete +wanda uniform ", watched.out)
    assert "1 of 9 trials are done" in watched.out
    command.ok("export", "--study", study, *settings(*LONG), "--out", place / "early.json")
    assert read_config(place / "early.json").scored() is None
    (place / "go-1").touch()

    answer = finish(process)
    assert answer.is_clean
    lines = answer.out.splitlines()
    assert lines[:2] == ["loading the model and the texts", "dense model"]
    trial = re.compile(r"\[\d/9\] trial \d: wanda (?:uniform|atp β=0\.\d{5}): perplexity \d+\.\d\d in \d+ s ")
    assert len([line for line in lines if trial.match(line)]) == 9
    ahead = [line for line in lines if line.startswith(("[", "test text:"))]  # of the whole command, never 0
    assert len(ahead) in (11, 12) and all(re.search(r"\b[1-9]\d* (s|min) left\)$", line) for line in ahead)
    assert "\ntexts: calibration.txt to calibrate, validation.txt and test.txt to measure\n" in answer.out
    assert re.search(r"\nbest: trial \d, wanda \+ ", answer.out)
    assert f"python tune.py apply --config {place / 'tiny.best.json'} --out tiny-sparse" in answer.out

    before = (place / "tiny.db").read_bytes()
    output, imported = spied("--study", study, *settings(*LONG, "search.trials=9"))
    assert imported == {"optuna"}
    assert (place / "tiny.db").read_bytes() == before
    assert output.splitlines()[:2] == [
        "complete: 9 of 9 trials; nothing to do (--trials N adds more)", "tiny: 60% sparsity",
    ]  # fmt: skip
    assert re.search(r"\nbest: trial \d, wanda \+ ", output)


@slow
def test_a_second_ctrl_c_ends_at_once(place: Path) -> None:
    """Both fall into the same trial: whichever is heard, the process ends, and the study goes on later."""
    process = start("--study", place / "tiny.toml", *settings(*LONG), inject=partial(held, place, 1))
    wait_for(place / "tiny.db", 1, process)
    os.kill(process.pid, signal.SIGINT)
    os.kill(process.pid, signal.SIGINT)
    answer = finish(process)
    assert answer.code in (130, -signal.SIGINT)
    assert "Traceback" not in answer.err
    study = run(place, *LONG)
    assert progress.counted(study) == 3
    assert not progress.running(study)


@slow
def test_bad_input_as_a_process(place: Path) -> None:
    """The first as a user starts it."""
    for arguments in (["--study", "nosuch"], ["status", "--study", place / "tiny.toml"], ["prune", "no"]):
        answer = finish(start(*arguments, alone=arguments[0] == "--study"))
        assert answer.error
        assert answer.out in {"", "loading the model and the texts\n"}


# --- help


# --- a run


def stored(place: Path, name: str = "tiny", file: str | None = None) -> optuna.Study:
    url = file or study_file(place).storage_url
    db = opening.open_storage(url, create=False)
    assert db
    study = opening.find_study(db, name)
    assert study
    return study


@slow
def test_a_timeout_leaves_the_rest_for_later(place: Path, command: CommandLine) -> None:
    assert "0 of 3 trials are done" in command.ok("--study", place / "tiny.toml", "--timeout", "0").out


@slow
def test_another_storage_and_another_name(
    place: Path, command: CommandLine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ("--study", place / "tiny.toml", "--storage", "sqlite:///elsewhere.db", "--study-name", "other")
    answer = command.ok(*options, "--trials", "2")
    assert not (place / "tiny.db").exists()
    assert len(stored(place, "other", f"sqlite:///{tmp_path}/elsewhere.db").trials) == 2
    best = tmp_path / "other.best.json"
    assert read_config(best).study == "other"
    assert "python tune.py apply --config other.best.json --out other-sparse" in answer.out
    line = next(line for line in answer.out.splitlines() if line.startswith("talk with it:"))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"The import")))
    command.ok(*shlex.split(line.partition("tune.py ")[2]), "--max-new-tokens", "2")
    assert "2 complete" not in command("status", *options).err
    assert command("export", *options).out.strip() == str(best)
    assert command("status", "--study", place / "tiny.toml").code == 2


def test_the_second_one_ends_at_once() -> None:
    before = signal.getsignal(signal.SIGINT)
    with interruptible():
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) == before


def test_ctrl_c_does_not_break_a_transaction(tmp_path: Path) -> None:
    """Sent while SQLAlchemy runs a statement, it is raised after it; the database is not left locked."""
    import sqlalchemy

    engine = sqlalchemy.create_engine(f"sqlite:///{tmp_path}/some.db")
    done = list[str]()

    def interrupt(*args: object) -> None:
        signal.raise_signal(signal.SIGINT)
        done.append("statement")

    sqlalchemy.event.listen(engine, "before_cursor_execute", interrupt)
    with interruptible(), pytest.raises(KeyboardInterrupt):
        with engine.begin() as connection:
            connection.execute(sqlalchemy.text("create table t (x integer)"))
        done.append("transaction")
        sleep(HANGS)
    engine.dispose()
    assert done == ["statement", "transaction"]


# --- status, export, studies


def test_export_refuses_a_study_file_that_says_something_else_now(done: Path, command: CommandLine) -> None:
    """Its sparsity and texts go into the configuration: they would not be what the trials were measured with."""
    before = (done / "tiny.best.json").read_bytes()
    answer = command("export", "--study", done / "tiny.toml", "--set", "texts.calibration.nsamples=4")
    assert answer.error.startswith("study tiny: texts.calibration.nsamples is 4, was 8.")
    assert (done / "tiny.best.json").read_bytes() == before
    command.ok("export", "--study", done / "tiny.toml", "--set", "search.trials=99")


# --- apply and prune


@slow
def test_apply_compares_with_the_promise(done: Path, command: CommandLine, tmp_path: Path) -> None:
    answer = command.ok("apply", "--config", done / "tiny.best.json", "--out", tmp_path / "out", "--device", "cpu")
    assert re.search(r"perplexity on the test text: .* ± .*, the configuration says .* \([+-]0\.000%\)", answer.out)
    assert "warning" not in answer.out
    assert (tmp_path / "out" / "model.safetensors").exists()


@slow
def test_prune_without_a_study_starts_from_where_the_user_stands(
    place: Path, command: CommandLine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Neither the model nor the texts are looked for beside the package's own prune.toml."""
    tables = (f'texts.{role}={{source = "file:{role}.txt", nsamples = 16, seqlen = 32}}' for role in ROLES)
    options = ("model", "--pruner", "wanda", "--sparsity", "0.5", "--beta", "0.02", "--device", "cpu")
    monkeypatch.chdir(place)
    assert "wanda atp β=0.02000, 50% sparsity: perplexity " in command.ok("prune", *options, *settings(*tables)).out
    shutil.move(place / "model", tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    command.ok("prune", "--study", place / "tiny.toml", *options)


# --- names that look like markup


# --- what is wrong, in one line

Edit = Callable[[Path], None]


def remove(name: str) -> Edit:
    def edit(place: Path) -> None:
        path = place / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return edit


def test_apply_refuses_in_one_line(done: Path, command: CommandLine) -> None:
    options = ("apply", "--config", done / "tiny.best.json", "--device", "cpu", "--out")
    content = json.loads((done / "tiny.best.json").read_text())
    content["model"]["fingerprint"] = "0" * 64
    (done / "tiny.best.json").write_text(json.dumps(content))
    assert command(*options, done / "out").error.startswith("model.fingerprint: model is ")
    assert not (done / "out").exists()
