import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from time import sleep

import optuna
import pytest
from optuna.trial import TrialState
from tinystudy import HANGS, LONG, CommandLine, few_at_a_time, finish, run, settings, start, study_file, wait_for

import atp_tune
from atp_tune.cli.terminal import interruptible
from atp_tune.config.best import read_config
from atp_tune.events import Event, Step, TrialStarted
from atp_tune.storage import opening, progress

ROLES = ("calibration", "validation", "test")
COMMANDS = ["", "status", "export", "apply", "prune", "finetune", "studies", "merge", "schema", "env"]
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
    command = [sys.executable, "-c", SPY, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANGS, check=True)
    output, _, names = done.stdout.rpartition("imported:")
    return output, set(names.split())


# --- the whole way, in processes of their own


@pytest.mark.slow
def test_a_run_can_be_watched_and_is_not_done_twice(place: Path, command: CommandLine) -> None:
    study = place / "tiny.toml"
    process = start("--study", study, *settings(*LONG, "search.trials=9"))
    wait_for(place / "tiny.db", 1, process)
    watched = command("status", "--study", study)
    while not re.search(r"[1-8] +running +wanda ", watched.out):  # it may have been between two trials
        assert process.poll() is None
        watched = command("status", "--study", study)
    assert watched.code == 0
    assert re.search(r"0 +complete +wanda uniform ", watched.out)
    assert re.search(r"[1-8] of 9 trials are done", watched.out)
    assert command("export", "--study", study, *settings(*LONG), "--out", place / "early.json").code == 0
    assert read_config(place / "early.json").scored() is None

    answer = finish(process)
    assert (answer.code, answer.err) == (0, "")
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


@pytest.mark.slow
def test_what_needs_no_model_loads_none(done: Path) -> None:
    for name in ("status", "export"):
        output, imported = spied(name, "--study", done / "tiny.toml")
        assert imported == {"optuna"}
        assert output
    assert "torch" not in spied("studies")[1]


@pytest.mark.slow
def test_apply_and_prune_as_processes(done: Path, tmp_path: Path) -> None:
    answer = finish(
        start("apply", "--config", done / "tiny.best.json", "--out", tmp_path / "out", "--device", "cpu", alone=True)
    )
    assert (answer.code, answer.err) == (0, "")
    assert f"sparse checkpoint: {tmp_path / 'out'}" in answer.out
    answer = finish(start("prune", "--study", done / "tiny.toml", "--beta", "0.05"))
    assert (answer.code, answer.err) == (0, "")
    assert "wanda atp β=0.05000, sparsity 0.5: perplexity " in answer.out


@pytest.mark.slow
def test_a_second_ctrl_c_ends_at_once(place: Path) -> None:
    """Both fall into the same trial: whichever is heard, the process ends, and the study goes on later."""
    process = start("--study", place / "tiny.toml", *settings(*LONG))
    wait_for(place / "tiny.db", 1, process)
    os.kill(process.pid, signal.SIGINT)
    os.kill(process.pid, signal.SIGINT)
    answer = finish(process)
    assert answer.code in (130, -signal.SIGINT)
    assert "Traceback" not in answer.err
    study = run(place, *LONG)
    assert progress.counted(study) == 3
    assert not progress.running(study)


@pytest.mark.slow
def test_bad_input_as_a_process(place: Path) -> None:
    """The first as a user starts it."""
    for arguments in (["--study", "nosuch"], ["status", "--study", place / "tiny.toml"], ["prune", "no"]):
        answer = finish(start(*arguments, alone=arguments[0] == "--study"))
        assert answer.error
        assert answer.out in {"", "loading the model and the texts\n"}


# --- help


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example(name: str, command: CommandLine) -> None:
    answer = command(*name.split(), "--help")
    assert answer.code == 0
    assert re.search(rf"python tune\.py {name or '--study smol'}", answer.out)


def test_nothing_shows_help(command: CommandLine) -> None:
    assert "Usage" in command().out


def test_the_version(command: CommandLine) -> None:
    assert command("--version").out == f"atp_tune {atp_tune.__version__}\n"


# --- a run


@pytest.mark.slow
def test_trials_is_the_total(place: Path, command: CommandLine) -> None:
    assert command("--study", place / "tiny.toml", "--trials", "2").code == 0
    assert command("--study", place / "tiny.toml", "--trials", "3").code == 0
    assert len(stored(place).trials) == 3


def stored(place: Path, name: str = "tiny", file: str | None = None) -> optuna.Study:
    url = file or study_file(place).storage_url
    db = opening.open_storage(url, create=False)
    assert db
    study = opening.find_study(db, name)
    assert study
    return study


@pytest.mark.slow
def test_a_timeout_leaves_the_rest_for_later(place: Path, command: CommandLine) -> None:
    answer = command("--study", place / "tiny.toml", "--timeout", "0")
    assert answer.code == 0
    assert "0 of 3 trials are done" in answer.out


@pytest.mark.slow
def test_another_storage_and_another_name(
    place: Path, command: CommandLine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ("--study", place / "tiny.toml", "--storage", "sqlite:///elsewhere.db", "--study-name", "other")
    answer = command(*options, "--trials", "2")
    assert answer.code == 0
    assert not (place / "tiny.db").exists()
    assert len(stored(place, "other", f"sqlite:///{tmp_path}/elsewhere.db").trials) == 2
    best = tmp_path / "other.best.json"
    assert read_config(best).study == "other"
    assert "python tune.py apply --config other.best.json --out other-sparse" in answer.out
    line = next(line for line in answer.out.splitlines() if line.startswith("talk with it:"))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"The import")))
    assert command(*shlex.split(line.partition("tune.py ")[2]), "--max-new-tokens", "2").code == 0
    assert "2 complete" not in command("status", *options).err
    assert command("export", *options).out.strip() == str(best)
    assert command("status", "--study", place / "tiny.toml").code == 2


@pytest.mark.slow
def test_ctrl_c(place: Path, command: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    from atp_tune.cli import display

    class Interrupting(display.Display):
        def __call__(self, event: Event) -> None:
            super().__call__(event)
            self.title = event.title if isinstance(event, TrialStarted) else getattr(self, "title", "")
            if isinstance(event, Step) and self.title == "trial 1":
                raise KeyboardInterrupt

    handler = signal.getsignal(signal.SIGINT)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(display, "Display", Interrupting)
            answer = command("--study", place / "tiny.toml")
    finally:
        signal.signal(signal.SIGINT, handler)
    assert answer.code == 130
    assert answer.err == ""
    said = f"stopped: finished trials are in {place / 'tiny.db'}; the same command resumes the study"
    assert answer.out.splitlines()[-1] == said
    again = command("--study", place / "tiny.toml")
    assert again.code == 0
    assert "tiny: goes on, 1 of 3 trials are stored" in again.out.splitlines()
    assert [t.state.name for t in stored(place).trials] == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    remarks = command("status", "--study", place / "tiny.toml").out
    assert re.search(r"1 +fail +wanda .*interrupted", remarks)


def test_the_second_one_ends_at_once() -> None:
    before = signal.getsignal(signal.SIGINT)
    with interruptible():
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) == before


def test_sigterm_is_ctrl_c_and_a_second_one_is_nothing() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with interruptible():
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before


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


@pytest.mark.slow
def test_failures_are_told(place: Path, command: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    from atp_tune.pruners.statistics import Hessian

    upper = Hessian._upper
    monkeypatch.setattr(Hessian, "_upper", lambda self: -upper(self))
    answer = command("--study", place / "tiny.toml", "--set", "prune.pruners=['sparsegpt']", "--trials", "2")
    assert answer.code == 0
    reason = "Hessian not positive definite, even with damping 100"
    assert f"trial 0: sparsegpt uniform: failed: {reason}" in answer.out
    assert "no best yet" in answer.out
    shown = command("status", "--study", place / "tiny.toml")
    assert shown.code == 0
    assert reason in shown.out


@pytest.mark.slow
def test_a_model_with_nan_is_one_line(place: Path, command: CommandLine) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    file = place / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    answer = command("--study", place / "tiny.toml")
    assert answer.error.startswith("model.source: the perplexity of the dense model model is not finite: its weights")
    assert command("status", "--study", place / "tiny.toml").code == 0
    assert command("export", "--study", place / "tiny.toml").error.startswith("study tiny: no trial has a value yet")


# --- status, export, studies


def test_status_shows_every_trial_and_the_summary(done: Path, command: CommandLine) -> None:
    answer = command("status", "--study", done / "tiny.toml")
    assert answer.code == 0
    for trial in stored(done).trials:
        plan = f"atp β={trial.params['beta']:.5f}" if trial.params["beta"] else "uniform"
        row = rf"{trial.number} +complete +{trial.params['pruner']} {plan} +{trial.value:.2f} ±"
        assert re.search(row, answer.out)
    assert "spread: " in answer.out
    assert re.search(r"\n\| dense +\| 0% +\| \d+\.\d\d ± \d+\.\d\d +\| \d+\.\d\d ±", answer.out)


@pytest.mark.slow
def test_status_of_what_repeats_and_what_was_stopped(
    place: Path, command: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    few_at_a_time(monkeypatch)
    study = run(place, "search.stopper=wilcoxon", "search.trials=6")
    study.enqueue_trial(study.trials[0].params)
    run(place, "search.stopper=wilcoxon", "search.trials=7")
    answer = command("status", "--study", place / "tiny.toml")
    assert "as trial 0" in answer.out
    assert re.search(r"stopped after \d+ windows", answer.out)


@pytest.mark.parametrize("name", ["status", "export"])
def test_a_study_that_has_not_begun(name: str, place: Path, command: CommandLine) -> None:
    answer = command(name, "--study", place / "tiny.toml")
    assert answer.error == f"study tiny: has no trials yet; run: python tune.py --study {place / 'tiny.toml'}"
    assert answer.out == ""
    assert not (place / "tiny.db").exists()


@pytest.mark.parametrize("name", ["status", "export"])
def test_another_name_that_is_not_there(name: str, done: Path, command: CommandLine) -> None:
    answer = command(name, "--study", done / "tiny.toml", "--study-name", "other")
    assert answer.error.startswith("study other: has no trials yet; run: ")


@pytest.mark.slow
def test_status_of_a_study_without_a_trial_that_ended(place: Path, command: CommandLine) -> None:
    run(place, timeout=0)
    answer = command("status", "--study", place / "tiny.toml")
    assert answer.code == 0
    assert "waiting" in answer.out
    assert command("export", "--study", place / "tiny.toml").error.startswith("study tiny: no trial has a value yet")


@pytest.mark.slow
def test_export_writes_what_the_run_wrote(done: Path, command: CommandLine, tmp_path: Path) -> None:
    written = (done / "tiny.best.json").read_bytes()
    (done / "tiny.best.json").unlink()
    assert command("export", "--study", done / "tiny.toml").out == f"{done / 'tiny.best.json'}\n"
    assert (done / "tiny.best.json").read_bytes() == written
    out = tmp_path / "a" / "b" / "best.json"
    assert command("export", "--study", done / "tiny.toml", "--out", out).out == f"{out}\n"
    config = read_config(out)
    assert (out.parent / config.folder).resolve() == done.resolve()
    assert config.model_copy(update={"folder": "."}) == read_config(done / "tiny.best.json")


def test_export_refuses_a_study_file_that_says_something_else_now(done: Path, command: CommandLine) -> None:
    """Its sparsity and texts go into the configuration: they would not be what the trials were measured with."""
    before = (done / "tiny.best.json").read_bytes()
    answer = command("export", "--study", done / "tiny.toml", "--set", "texts.calibration.nsamples=4")
    assert answer.error.startswith("study tiny: texts.calibration.nsamples is 4, was 8.")
    assert (done / "tiny.best.json").read_bytes() == before
    assert command("export", "--study", done / "tiny.toml", "--set", "search.trials=99").code == 0


@pytest.mark.slow
def test_studies(done: Path, command: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(done, tmp_path / "studies")
    (tmp_path / "studies" / "broken.toml").write_text("sparsity = ")
    shutil.copy(done / "tiny.toml", tmp_path / "studies" / "torn.toml")
    (tmp_path / "studies" / "torn.db").write_text("no database" * 1000)
    shutil.copy(done / "tiny.toml", tmp_path / "studies" / "waiting.toml")
    assert command("--study", "tiny", "--study-name", "other", "--trials", "2", "--set", "sparsity=0.5").code == 0
    answer = command("studies")
    assert answer.code == 0
    assert re.search(r"tiny +6 of 6, best \d+\.\d\d +a tiny Llama", answer.out)
    assert re.search(r"other +2 of 2, best \d+\.\d\d +--study tiny --study-name other", answer.out)
    assert re.search(r"broken +invalid ", answer.out)
    assert re.search(r"torn +invalid .*not a database", answer.out)
    assert re.search(r"waiting +not started ", answer.out)
    assert re.search(r"smol +not started ", answer.out)
    assert command("status", "--study", "tiny").code == 0


# --- apply and prune


@pytest.mark.slow
def test_apply_compares_with_the_promise(done: Path, command: CommandLine, tmp_path: Path) -> None:
    answer = command("apply", "--config", done / "tiny.best.json", "--out", tmp_path / "out", "--device", "cpu")
    assert answer.code == 0
    assert re.search(r"perplexity on the test text: .* ± .*, the configuration says .* \([+-]0\.000%\)", answer.out)
    assert "warning" not in answer.out
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.slow
def test_apply_warns_of_another_number(done: Path, command: CommandLine, tmp_path: Path) -> None:
    content = json.loads((done / "tiny.best.json").read_text())
    content["scores"]["best"]["perplexity"]["test"]["value"] *= 1.01
    (done / "tiny.best.json").write_text(json.dumps(content))
    answer = command("apply", "--config", done / "tiny.best.json", "--out", tmp_path / "out", "--device", "cpu")
    assert answer.code == 0
    assert "warning: they differ by more than 0.1 %" in answer.out


@pytest.mark.slow
def test_apply_of_an_early_export(done: Path, command: CommandLine, tmp_path: Path) -> None:
    content = json.loads((done / "tiny.best.json").read_text())
    content["scores"]["best"]["perplexity"]["test"] = None
    (done / "tiny.best.json").write_text(json.dumps(content))
    answer = command("apply", "--config", done / "tiny.best.json", "--out", tmp_path / "out", "--device", "cpu")
    assert answer.code == 0
    assert "(the configuration has none yet)" in answer.out


@pytest.mark.slow
def test_prune_with_a_study(done: Path, command: CommandLine, tmp_path: Path) -> None:
    answer = command("prune", "--study", done / "tiny.toml", "--beta", "0.05", "--out", tmp_path / "out")
    assert answer.code == 0
    assert re.search(
        r"wanda atp β=0\.05000, sparsity 0\.5: perplexity \d+\.\d\d ± \d+\.\d\d on the test text", answer.out
    )
    assert f"sparse checkpoint: {tmp_path / 'out'}" in answer.out
    answer = command("prune", "--study", done / "tiny.toml", "--sparsity", "0.3", "--pruner", "magnitude")
    assert "magnitude uniform, sparsity 0.3: perplexity" in answer.out


@pytest.mark.slow
def test_prune_with_a_study_over_an_interval(place: Path, command: CommandLine) -> None:
    """One sparsity leaves the limit out, which needs an interval."""
    toml = (place / "tiny.toml").read_text().replace("sparsity = 0.6", "sparsity = [0.3, 0.8]")
    (place / "tiny.toml").write_text(f"{toml}\n[limit]\nmax_increase = 0.1\n")
    words = ("prune", "--study", place / "tiny.toml", "--beta", "0.02")
    assert "searches from 30% to 80%; give one" in command(*words).error
    answer = command(*words, "--sparsity", "0.5")
    assert (answer.code, answer.err) == (0, "")
    assert "wanda atp β=0.02000, sparsity 0.5: perplexity " in answer.out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--allocation", "owl"], "wanda owl M=5 λ=0.08"),
        (["--allocation", "owl", "--parameter", "lam=0.1", "--parameter", "M=3"], "wanda owl M=3 λ=0.1"),
        (["--allocation", "alphapruning", "--pruner", "dsnot"], "dsnot alphapruning ε=0.3"),
        (["--allocation", "er", "--pruner", "alps"], "alps er"),
        (["--allocation", "global", "--pruner", "magnitude"], "magnitude global"),
        (["--allocation", "curve", "--beta", "0.02", "--parameter", "value=-0.2"], "β=0.02000 γ=0 φ=0 δ=0 ν=-0.2"),
        (["--allocation", "curve", "--parameter", "φ=-0.1"], "wanda curve β=0.00000 γ=0 φ=-0.1 δ=0 ν=0"),
        (["--allocation", "uniform", "--set", "prune.pattern=4:8", "--pruner", "sparsegpt"], "sparsegpt uniform"),
        (["--beta", "0.1", "--set", "prune.pattern=mixed:8"], "wanda atp β=0.10000"),
        (["--set", "prune.wanda.compare=row-variant"], "wanda uniform"),
    ],
    ids=str,
)
def test_prune_with_every_allocation(options: list[str], said: str, done: Path, command: CommandLine) -> None:
    answer = command("prune", "--study", done / "tiny.toml", *options)
    assert (answer.code, answer.err) == (0, "")
    assert re.search(rf"{re.escape(said)}, sparsity 0\.5: perplexity \d+\.\d\d ±", answer.out)


@pytest.mark.slow
def test_prune_without_a_study_starts_from_where_the_user_stands(
    place: Path, command: CommandLine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Neither the model nor the texts are looked for beside the package's own prune.toml."""
    tables = (f'texts.{role}={{source = "file:{role}.txt", nsamples = 16, seqlen = 32}}' for role in ROLES)
    options = ("model", "--pruner", "wanda", "--sparsity", "0.5", "--beta", "0.02", "--device", "cpu")
    monkeypatch.chdir(place)
    answer = command("prune", *options, *settings(*tables))
    assert answer.code == 0
    assert "wanda atp β=0.02000, sparsity 0.5: perplexity " in answer.out
    shutil.move(place / "model", tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    assert command("prune", "--study", place / "tiny.toml", *options).code == 0


# --- names that look like markup


@pytest.mark.slow
def test_brackets_in_a_path_are_no_markup(done: Path, command: CommandLine, tmp_path: Path) -> None:
    odd = tmp_path / "[red]a[/b] é"
    shutil.copytree(done, odd)
    answer = command("status", "--study", odd / "tiny.toml")
    assert answer.code == 0
    assert str(odd / "tiny.best.json") in answer.out
    answer = command("apply", "--config", odd / "tiny.best.json", "--out", odd / "out", "--device", "cpu")
    assert answer.code == 0
    assert f"sparse checkpoint: {odd / 'out'}" in answer.out
    answer = command("prune", "--study", odd / "tiny.toml", "--out", odd / "out2")
    assert answer.code == 0
    assert f"sparse checkpoint: {odd / 'out2'}" in answer.out


def test_brackets_in_a_reason_are_no_markup(done: Path, command: CommandLine) -> None:
    study = stored(done)
    failed = optuna.create_trial(state=TrialState.FAIL, user_attrs={"failure": "[enforce fail] no [/x]"})
    study.add_trial(failed)
    answer = command("status", "--study", done / "tiny.toml")
    assert answer.code == 0
    assert "[enforce fail] no [/x]" in answer.out


# --- what is wrong, in one line

Edit = Callable[[Path], None]


def write(name: str, content: str | bytes) -> Edit:
    def edit(place: Path) -> None:
        (place / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return edit


def cut(name: str) -> Edit:
    def edit(place: Path) -> None:
        file = place / name
        file.write_bytes(file.read_bytes()[:-500])

    return edit


def remove(name: str) -> Edit:
    def edit(place: Path) -> None:
        path = place / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return edit


STUDY = ["--study", "tiny.toml"]


@pytest.mark.parametrize(
    ("edit", "arguments", "expected"),
    [
        (None, ["--study", "nosuch"], "nosuch: no such study; known are"),
        (None, ["--study", "smoll"], "did you mean smol?"),
        (None, ["--study", "no/such.toml"], "no/such.toml: no such file"),
        (write("tiny.toml", "sparsity = "), STUDY, "tiny.toml: line 1: invalid value"),
        (write("tiny.toml", b"\xff"), STUDY, "tiny.toml: line 1: is not UTF-8 text"),
        (write("tiny.toml", "sparsity = 0.5"), STUDY, "tiny.toml: model: is needed"),
        (None, [*STUDY, "--set", "sparsty=0.5"], "unknown key; did you mean sparsity?"),
        (None, [*STUDY, "--set", "sparsity=1.5"], "sparsity: must be less than 1, got 1.5"),
        (None, [*STUDY, "--set", "sparsity"], "must have the form key.path=value"),
        (None, [*STUDY, "--set", "search.sampler=magic"], "search.sampler: must be one of gp, tpe, grid, random"),
        (None, [*STUDY, "--set", "search.sampler=grid", "--set", "search.step=9"], "search.step: 9 is larger than"),
        (None, [*STUDY, "--set", "allocation.beta=[0, 9]"], "allocation.beta: [0, 9] leaves the admissible interval"),
        (None, [*STUDY, "--set", "texts.test.source=file:validation.txt"],
         "texts.test: reads the same documents as texts.validation"),
        (None, [*STUDY, "--set", "texts.validation.nsamples=9999"],
         "texts.validation.nsamples: file:validation.txt has "),
        (None, [*STUDY, "--storage", "study.db"], "storage: not a storage URL"),
        (None, [*STUDY, "--storage", "sqlite:///model"], "is a folder; name a file"),
        (None, [*STUDY, "--storage", "sqlite:///tiny.toml/x.db"], "name another with --storage"),
        (None, [*STUDY, "--storage", "sqlite://"], "a database in memory is gone at the end"),
        (None, [*STUDY, "--storage", "nosuch://u:secret@h/d"], "storage nosuch://u:***@h/d: Can't load plugin"),
        (write("tiny.db", "x" * 5000), STUDY, "tiny.db: is damaged (file is not a database)"),
        (None, [*STUDY, "--device", "tpu"], "device: must be auto, cpu, mps, cuda or cuda:N"),
        (None, [*STUDY, "--device", "cuda:99"], "device: cuda:99 is not on this machine"),
        (remove("model"), STUDY, 'model.source: "model" is no folder'),
        (remove("model/config.json"), STUDY, "holds no config.json"),
        (remove("model/model.safetensors"), STUDY, "where are its weights?"),
        (cut("model/model.safetensors"), STUDY, "transformers cannot load it"),
        (write("model/config.json", "{}"), STUDY, "transformers cannot load it"),
        (write("model/tokenizer.json", "{"), STUDY, "the tokenizer in "),
        (remove("validation.txt"), STUDY, "texts.validation.source: there is no file"),
        (write("validation.txt", b"\xff\xfe"), STUDY, "is not UTF-8 text"),
        (write("validation.txt", ""), STUDY, "holds no text"),
        (None, ["status", "--study", "nosuch"], "nosuch: no such study"),
        (None, ["status", *STUDY, "--storage", "x"], "storage: not a storage URL"),
        (None, ["export", *STUDY], "has no trials yet"),
        (None, ["apply", "--config", "no.json", "--out", "out"], "no.json: No such file or directory; write one with"),
        (None, ["apply", "--config", "tiny.toml", "--out", "out"], "tiny.toml: not JSON"),
        (write("c.json", "{}"), ["apply", "--config", "c.json", "--out", "out"], "c.json: study: is needed"),
        (None, ["prune", *STUDY, "--beta", "9"], "--beta: β = 9 is outside the admissible interval"),
        (None, ["prune", *STUDY, "--beta", "nan"], "--beta: β = nan is outside the admissible interval"),
        (None, ["prune", *STUDY, "--beta", "0.1", "--set", "allocation.names=['uniform']"],
         "--beta: the allocation uniform has no beta; its parameters: none"),
        (None, ["prune", *STUDY, "--allocation", "curve", "--parameter", "gama=0.1"],
         "--parameter gama: the allocation curve has no gama; its parameters: beta, gamma, ends, split, value"),
        (None, ["prune", *STUDY, "--allocation", "curve", "--parameter", "gamma=1"],
         "--parameter gamma: γ = 1 is outside the admissible interval [-0.2, 0.2]"),
        (None, ["prune", *STUDY, "--allocation", "alp"], "allocation.names[0]: must be one of uniform, atp, "),
        (None, ["prune", *STUDY, "--pruner", "magic"], "must be one of magnitude, wanda, sparsegpt, dsnot, alps"),
        (None, ["prune", *STUDY, "--sparsity", "70"], "sparsity: must be less than 1, got 70"),
        (None, ["prune", *STUDY, "--set", "sparsity=[0.3, 0.8]"],
         "--sparsity: tiny.toml searches from 30% to 80%; give one, such as --sparsity 0.6"),
        (None, ["prune", *STUDY, "--out", "model"], "--out model: exists already"),
        (None, ["prune", "nosuch", *STUDY], 'model.source: "nosuch" is no folder'),
        (None, ["prune", "nosuch"], 'model.source: "nosuch" is no folder'),
        (None, ["prune", *STUDY, "--out", "validation.txt/out"], "--out validation.txt/out: cannot be written"),
    ],
    ids=lambda value: value.__qualname__ if callable(value) else str(value),  # the same in each process of xdist
)  # fmt: skip
def test_bad_input_is_one_line(
    edit: Edit | None, arguments: list[str], expected: str, place: Path, command: CommandLine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(place)
    if edit:
        edit(place)
    answer = command(*arguments)
    assert expected in answer.error
    assert "secret" not in answer.error
    assert not (place / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--nosuch"], "No such option"),
        (["--study", "tiny.toml", "--trials", "many"], "Input should be a valid integer"),
        (["--study", "tiny.toml", "--trials", "0"], "Input should be greater than or equal to 1"),
        (["--study", "tiny.toml", "--timeout", "-1"], "Input should be greater than or equal to 0"),
        (["--trials", "3"], "as in --study smol"),
        (["nosuch"], "No such command 'nosuch'. A model is ORG/NAME, a folder"),
        (["status"], "Missing option"),
        (["apply", "--config", "x.json"], "Missing option"),
        (["prune", "--beta", "x"], "Input should be a valid number"),
        (["prune", "--study", "smol", "--allocation", "curve"], "curve without any is uniform"),
        (["prune", "--study", "smol", "--beta", "0.1", "--parameter", "β=0.2"], "β is given twice"),
        (["prune", "--study", "smol", "--parameter", "gamma"], '"gamma" is not NAME=NUMBER'),
    ],
    ids=str,
)
def test_a_wrong_option_is_explained(arguments: list[str], expected: str, command: CommandLine) -> None:
    answer = command(*arguments)
    assert answer.out == ""
    assert expected in answer.error
    assert "Value error" not in answer.error
    assert re.search(r"(; see|\? See) tune\.py( \w+)? --help$", answer.error)


@pytest.mark.parametrize("name", ["", "export"])
def test_other_settings_are_one_line(name: str, done: Path, command: CommandLine) -> None:
    answer = command(*name.split(), "--study", done / "tiny.toml", "--set", "sparsity=0.6")
    assert answer.error == (
        "study tiny: sparsity is 0.6, was 0.5. Put it back, or start another study with --study-name NAME"
    )


def test_export_to_a_place_that_cannot_be_written(done: Path, command: CommandLine) -> None:
    answer = command("export", "--study", done / "tiny.toml", "--out", done / "validation.txt" / "best.json")
    assert answer.error.endswith("; choose another place with --out FILE")


def test_apply_refuses_in_one_line(done: Path, command: CommandLine) -> None:
    options = ("apply", "--config", done / "tiny.best.json", "--device", "cpu", "--out")
    assert command(*options, done).error == f"--out {done}: exists already; choose another folder or remove it"
    content = json.loads((done / "tiny.best.json").read_text())
    content["model"]["fingerprint"] = "0" * 64
    (done / "tiny.best.json").write_text(json.dumps(content))
    assert command(*options, done / "out").error.startswith("model.fingerprint: model is ")
    assert not (done / "out").exists()
