"""`status`, `export` and `studies` for programs and for those who wait: JSON, `--watch`, screens and pipes."""

import json
import math
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime, timedelta
from io import StringIO
from pathlib import Path
from typing import Any

import optuna
import plans
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState, create_trial
from processes import popen
from rich.console import Console
from tinystudy import HANGS, LONG, TUNE, CommandLine, finish, hear, run, settings, start, stored, study_file

from atp_tune.cli import tables, terminal
from atp_tune.cli.terminal import quiet
from atp_tune.config import studyfile
from atp_tune.config.best import read_config
from atp_tune.errors import UserError
from atp_tune.measures import TEXTS, Perplexity
from atp_tune.results.formatting import duration, method_of
from atp_tune.results.status import Status, status_of, to_json
from atp_tune.results.summary import Summary, summarise
from atp_tune.storage import process

NOW = datetime(2026, 1, 1, 12)
DISTRIBUTIONS = {
    "pruner": CategoricalDistribution(("wanda", "magnitude")),
    "allocation": CategoricalDistribution(("atp", "curve", "er")),
    "beta": FloatDistribution(0, 1),
}


@pytest.fixture(autouse=True)
def without_warnings() -> Iterator[None]:
    with quiet():
        yield


@pytest.fixture
def study() -> optuna.Study:
    made = optuna.create_study(study_name="s")
    made.set_user_attr("fingerprint", {"sparsity": 0.7})
    made.set_user_attr("total", 9)
    return made


def add(
    study: optuna.Study,
    beta: float,
    value: float | None = None,
    state: TrialState = TrialState.COMPLETE,
    seconds: float = 100,
    **attributes: Any,
) -> None:
    """A trial that began `seconds` before `NOW`, and ended then if it has."""
    params: dict[str, Any] = {"pruner": "wanda", "allocation": "atp", "beta": beta}
    waiting = state == TrialState.WAITING
    trial = create_trial(
        state=state,
        value=value,
        params={} if waiting else params,
        distributions={} if waiting else DISTRIBUTIONS,
        user_attrs={**plans.stored([0.6 - beta, 0.6 + beta]), **attributes},
    )
    trial.datetime_start = None if waiting else NOW - timedelta(seconds=seconds)
    trial.datetime_complete = NOW if state.is_finished() else None
    study.add_trial(trial)


def document(study: optuna.Study) -> dict[str, Any]:
    text = to_json(status_of(summarise(study), NOW))
    assert "Infinity" not in text
    assert "NaN" not in text
    parsed: dict[str, Any] = json.loads(text)
    return parsed


def words(study: optuna.Study) -> str:
    return tables.progress_line(status_of(summarise(study), NOW))


# --- the document


def test_the_document_of_a_finished_study(done: Path, command: CommandLine) -> None:
    answer = command("status", "--study", done / "tiny.toml", "--json")
    assert (answer.code, answer.err) == (0, "")
    says, summary = json.loads(answer.out), summarise(stored(done))
    assert summary.best_trial
    assert says["format"] == "atp_tune.status/3"
    assert (says["study"], says["sparsity"], says["done"], says["total"]) == ("tiny", 0.5, 6, 6)
    assert (says["complete"], says["running"], says["seconds_left"]) == (True, [], None)
    results, uniform = summary.results, summary.uniform_trial
    for model, named in (("dense", "dense"), (uniform, "uniform")):
        for text in TEXTS:
            assert says[named]["perplexity"][text] == results.score(model, text).model_dump()  # type: ignore[union-attr,arg-type]
    assert says["best"] == says["ranks"][0]
    best = says["best"]
    assert best["trial"] == summary.best_trial.number
    assert {"pruner": best["pruner"], "allocation": "atp", **best["parameters"]} == summary.best_trial.params
    found = {text: results.score(summary.best_trial, text) for text in TEXTS}
    assert best["scores"] == {"perplexity": {text: score.model_dump() for text, score in found.items() if score}}
    against = results.against_uniform(summary.ranks[0])
    assert against
    assert best["against_uniform"]["perplexity"] == {**against.change.model_dump(), "on": "test"}
    assert [trial["number"] for trial in says["trials"]] == list(range(6))
    trial = says["trials"][best["trial"]]
    assert trial["state"] == "complete"
    assert trial["params"] == summary.best_trial.params
    assert trial["scores"] == best["scores"]
    assert trial["realised"] == summary.best_trial.user_attrs["realised"]
    assert trial["seconds"] == pytest.approx(sum(summary.best_trial.user_attrs["seconds"].values()))
    assert trial["remark"] is None


def test_the_keys_that_are_promised(study: optuna.Study) -> None:
    add(study, 0.1, 8.0, stderr=0.5)
    says = document(study)
    assert list(says) == [
        "format", "study", "sparsity", "done", "total", "complete", "seconds_left", "running", "dense", "uniform",
        "best", "ranks", "trials", "screening", "objective", "front",
        "bos", "uniform_draws", "windows", "limit", "points",
        "dense_bytes", "dense_tokens_per_second", "dense_images_per_second", "requested", "sign", "bits",
        "kinds",
    ]  # fmt: skip
    assert list(says["best"]) == [
        "trial", "pruner", "allocation", "parameters", "scores", "against_uniform", "draws", "sparsity",
    ]  # fmt: skip
    assert (says["objective"], says["front"], [*says["best"]["scores"]]) == (["perplexity"], [], ["perplexity"])
    assert list(says["trials"][0]) == [
        "number", "state", "params", "parameters", "plan", "scores", "realised", "seconds", "remark",
        "cut_off", "sparsity", "packed_bytes", "bits", "effective_bits", "quantized_bytes",
    ]  # fmt: skip


def test_a_study_that_has_just_begun(study: optuna.Study) -> None:
    add(study, 0.0, state=TrialState.WAITING)
    says = document(study)
    assert (says["done"], says["best"], says["ranks"]) == (0, None, [])
    assert (says["dense"], says["uniform"]) == ({"perplexity": {"validation": None, "test": None}}, {})
    assert says["trials"][0]["state"] == "waiting"


def test_what_is_not_finite_is_null(study: optuna.Study) -> None:
    study.set_user_attr("dense", [1e9])
    study.set_user_attr("test_nlls", {"dense": [math.inf], "0": [2.0, 2000.0], "1": [1.0, 1.0]})
    add(study, 0.0, 10.0, nlls=[2.0, 2.0])
    add(study, 0.1, 9.0, nlls=[1.0, 1.0])
    add(study, 0.2, math.inf, stopped_after=8)
    says = document(study)
    assert says["dense"] == {"perplexity": {"validation": None, "test": None}}
    assert says["uniform"]["perplexity"]["test"] is None
    assert says["best"]["against_uniform"]["perplexity"] == {"value": -1.0, "stderr": None, "on": "test"}
    assert says["trials"][2]["scores"]["perplexity"]["validation"] is None
    assert says["trials"][2]["remark"] == "stopped after 8 windows"


def test_a_lost_process_is_named(study: optuna.Study) -> None:
    add(study, 0.1, state=TrialState.RUNNING, seconds=35, host="elsewhere", pid=1)
    add(study, 0.1, state=TrialState.RUNNING, seconds=7, **{**process.identity(), "process_started": 0.0})
    elsewhere, lost = document(study)["running"]
    assert elsewhere == {
        "trial": 0, "plan": "wanda atp β=0.10000", "seconds": 35.0, "host": "elsewhere", "lost": False,
    }  # fmt: skip
    assert lost["lost"]
    assert words(study) == "[0/9] no best yet, trial 0 runs for 35 s, trial 1 was lost with its process"


def test_how_often_a_trial_was_cut_off(study: optuna.Study) -> None:
    died, before = {"place": "after prune 1 of 2", "alone": True}, {"alone": False}
    add(study, 0.1, state=TrialState.FAIL, lost="its process died", cut_off=died)
    add(study, 0.1, 8.0)
    assert [(trial["cut_off"], trial["remark"]) for trial in document(study)["trials"]] == [
        (1, "its process died after prune 1 of 2"), (0, None),
    ]  # fmt: skip
    queued = create_trial(state=TrialState.RUNNING, system_attrs={"cut_offs": [before, died]})
    study.add_trial(queued)
    assert [(trial["cut_off"], trial["remark"]) for trial in document(study)["trials"][2:]] == [
        (2, "cut off 2 times before"),
    ]  # fmt: skip


def test_time_left(study: optuna.Study) -> None:
    """Three measured trials of 100, 200 and 300 s; a repeat costs nothing, and a failure does not tell the pace."""
    for seconds in (100, 200, 300):
        add(study, 0.1, 10.0, seconds=seconds)
    add(study, 0.1, 10.0, seconds=1, repeats=0)
    add(study, 0.2, state=TrialState.FAIL, seconds=1, failure="no")
    assert document(study)["seconds_left"] is None
    assert words(study) == "[5/9] best 10.00 (trial 0), no trial runs"
    add(study, 0.3, state=TrialState.RUNNING, seconds=50)
    assert document(study)["seconds_left"] == pytest.approx(4 * 200 - 50)
    assert words(study) == "[5/9] best 10.00 (trial 0), trial 5 runs for 50 s, about 12 min left"
    add(study, 0.3, state=TrialState.RUNNING, seconds=500)
    assert document(study)["seconds_left"] == pytest.approx((4 * 200 - 50 - 200) / 2)


def test_the_report_is_awaited(study: optuna.Study) -> None:
    study.set_user_attr("total", 1)
    add(study, 0.0, 10.0)
    assert words(study) == "[1/1] best 10.00 (trial 0), the test text is not measured yet"
    assert not document(study)["complete"]
    study.set_user_attr("test_nlls", {"dense": [1.0], "0": [2.0]})
    assert document(study)["complete"]


def test_without_a_total(study: optuna.Study) -> None:
    bare = optuna.create_study(study_name="early")
    add(bare, 0.0, 10.0)
    assert words(bare) == "[1] best 10.00 (trial 0), no trial runs"
    assert not document(bare)["complete"]


@pytest.mark.parametrize(
    ("seconds", "said"), [(0, "0 s"), (89.4, "89 s"), (90, "2 min"), (5000, "83 min"), (9000, "2.5 h")]
)
def test_durations(seconds: float, said: str) -> None:
    assert duration(seconds) == said


# --- export and studies


def test_export_prints_the_configuration_and_writes_none(
    done: Path, command: CommandLine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    written = read_config(done / "tiny.best.json")
    (done / "tiny.best.json").unlink()
    answer = command("export", "--study", done / "tiny.toml", "--json")
    assert (answer.code, answer.err) == (0, "")
    assert not list(tmp_path.glob("**/*.best.json"))
    (tmp_path / "some.json").write_text(answer.out)
    config = read_config(tmp_path / "some.json")
    assert (tmp_path / config.folder).resolve() == done.resolve()
    assert config.model_copy(update={"folder": "."}) == written


def test_export_prints_what_it_writes(done: Path, command: CommandLine, tmp_path: Path) -> None:
    answer = command("export", "--study", done / "tiny.toml", "--json", "--out", tmp_path / "a" / "b.json")
    assert answer.out == (tmp_path / "a" / "b.json").read_text()


def test_a_configuration_without_a_finite_report_is_json(done: Path) -> None:
    config = read_config(done / "tiny.best.json")
    endless = {**config.scores["best"]["perplexity"], "test": Perplexity(value=math.inf, stderr=math.inf)}
    scores = {**config.scores, "best": {"perplexity": endless}}
    written = config.model_copy(update={"scores": scores}).to_json()
    assert json.loads(written)["scores"]["best"]["perplexity"]["test"] is None
    (done / "some.json").write_text(written)
    assert read_config(done / "some.json").scored("best", "validation") == config.scored("best", "validation")


@pytest.mark.slow
def test_studies(done: Path, command: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(done, tmp_path / "studies")
    (tmp_path / "studies" / "broken.toml").write_text("sparsity = ")
    (tmp_path / "studies" / "far.toml").write_text(
        'storage = "mysql://h/d"\n' + (done / "tiny.toml").read_text().replace("a tiny Llama", "far")
    )
    shutil.copy(done / "tiny.toml", tmp_path / "studies" / "new.toml")
    answer = command("studies", "--json")
    assert (answer.code, answer.err) == (0, "")
    found = {study["name"]: study for study in json.loads(answer.out)}
    summary = summarise(stored(done))
    best = summary.results.score(summary.best_trial, "validation")
    assert best
    assert found["tiny"] == {
        "name": "tiny", "state": "complete", "done": 6, "total": 6, "best": best.model_dump(),
        "description": "a tiny Llama", "path": "studies/tiny.toml", "error": None,
    }  # fmt: skip
    assert (found["broken"]["state"], found["broken"]["best"]) == ("invalid", None)
    assert found["broken"]["error"].startswith("studies/broken.toml: line 1: ")
    assert (found["far"]["state"], found["far"]["description"]) == ("unknown", "far")
    assert (found["new"]["state"], found["new"]["done"]) == ("not started", 0)
    assert "smol" in found


@pytest.mark.parametrize("arguments", [["status", "--json"], ["status"], ["export", "--json"]], ids=str)
def test_a_study_that_is_not_there(arguments: list[str], place: Path, command: CommandLine) -> None:
    answer = command(*arguments, "--study", place / "tiny.toml")
    assert answer.error == f"study tiny: has no trials yet; run: python tune.py --study {place / 'tiny.toml'}"
    assert answer.out == ""


# --- watching


@pytest.mark.slow
def test_a_watch_ends_with_the_study(place: Path) -> None:
    """It waits for the study, tells what changes, and gives the summary; beside it one that writes JSON lines."""
    options = ("status", "--study", place / "tiny.toml", "--watch", "--every", "0.1")
    waiting = "study tiny: has no trials yet; waiting for it\n"
    watch, lines = start(*options), start(*options, "--json")
    assert (hear(watch, "\n"), hear(lines, "\n", err=True)) == (waiting, waiting)
    runs = start("--study", place / "tiny.toml", *settings(*LONG, "search.trials=6"))
    watched = finish(watch)
    assert (watched.code, watched.err) == (0, "")
    assert "waiting for it" not in watched.out
    told = re.findall(r"^\[(\d)/6\] (?:no best yet|best \d+\.\d\d \(trial \d\)), ", watched.out, re.M)
    assert told == sorted(told)
    assert len(set(told)) > 1
    assert re.search(r"trial \d runs for \d+ s", watched.out)
    assert re.search(r"\n\| dense  .*\n\| wanda \+ uniform .*\n\| wanda \+ atp \(β = ", watched.out)
    assert watched.out.count("spread: ") == 1
    assert finish(runs).code == 0
    answer = finish(lines)
    assert (answer.code, answer.err) == (0, "")
    documents = [json.loads(line) for line in answer.out.splitlines()]
    assert len(documents) > 2
    assert [each["complete"] for each in documents] == [False] * (len(documents) - 1) + [True]
    assert (documents[-1]["done"], documents[-1]["study"]) == (6, "tiny")


@pytest.mark.slow
@pytest.mark.parametrize("exists", [True, False])
def test_ctrl_c_ends_a_watch(exists: bool, place: Path) -> None:
    if exists:
        run(place, timeout=0)
    process = start("status", "--study", place / "tiny.toml", "--watch", "--every", "0.1")
    assert process.stdout
    first = process.stdout.readline()
    process.send_signal(signal.SIGINT)
    answer = finish(process)
    assert (answer.code, answer.err) == (130, "")
    assert first.startswith("study tiny: has no trials yet" if not exists else " ")


def test_nothing_is_said_twice(place: Path, capsys: pytest.CaptureFixture[str], study: optuna.Study) -> None:
    """The clock alone is no change; a new trial is, and then it alone is shown."""
    view = tables.Changes()
    add(study, 0.0, 10.0)
    add(study, 0.1, state=TrialState.RUNNING)
    view.show(summarise(study))
    assert re.search(r"(?s) 0 +complete .* 1 +running .*\[1/9\] best", capsys.readouterr().out)
    view.show(summarise(study))
    assert capsys.readouterr().out == ""
    add(study, 0.2, 9.0)
    view.show(summarise(study))
    said = capsys.readouterr().out
    assert re.search(r" 2 +complete .*best", said)
    assert "running" not in said


@pytest.mark.slow
def test_a_study_that_goes_while_it_is_watched(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(place, timeout=0)
    looks = tables.looks(study_file(place), "tiny", 0)
    assert next(looks)
    optuna.delete_study(study_name="tiny", storage=study_file(place).storage_url)
    with pytest.raises(UserError, match="study tiny: cannot be read any more: it is gone"):
        next(looks)


def test_every_needs_watch(command: CommandLine) -> None:
    answer = command("status", "--study", "smol", "--every", "1")
    assert answer.code == 2
    assert "only with --watch" in answer.err


# --- screens


def screen(monkeypatch: pytest.MonkeyPatch, width: int, height: int) -> Console:
    made = Console(file=StringIO(), width=width, height=height, force_terminal=True, soft_wrap=True, markup=False)
    for module in (tables, terminal):
        monkeypatch.setattr(module, "console", lambda: made)
    return made


def drawn(console: Console, summary: Summary) -> list[str]:
    lines = console.render_lines(tables.fitting(summary, NOW), pad=False)
    return ["".join(segment.text for segment in line).rstrip() for line in lines]


def numbers(lines: list[str]) -> list[int]:
    return [int(found[1]) for line in lines if (found := re.match(r" +(\d+) +[a-z]", line))]


@pytest.mark.slow
def test_a_small_screen_shows_the_best_and_the_last(study: optuna.Study, monkeypatch: pytest.MonkeyPatch) -> None:
    study.set_user_attr("total", 60)
    for number in range(39):
        add(study, 0.001 * number, 8.0 if number == 3 else 10.0, stderr=0.5)
    add(study, 0.4, state=TrialState.RUNNING, seconds=35)
    for _ in range(20):
        add(study, 0.0, state=TrialState.WAITING)
    summary = summarise(study)
    lines = drawn(screen(monkeypatch, 80, 24), summary)
    assert len(lines) == 24
    assert numbers(lines) == [3, *range(23, 40)]
    assert re.search("3 +complete .* best$", lines[3])
    assert lines[-2:] == [
        "and 22 earlier and 20 waiting",
        "[39/60] best 8.00 (trial 3), trial 39 runs for 35 s, about 34 min left",
    ]
    assert numbers(drawn(screen(monkeypatch, 200, 50), summary)) == list(range(40))
    assert numbers(drawn(screen(monkeypatch, 200, 100), summary)) == list(range(60))


@pytest.mark.parametrize("height", [2, 5, 6, 8])
def test_a_tiny_screen_keeps_the_line_of_progress(
    height: int, study: optuna.Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(9):
        add(study, 0.001 * number, 10.0 - number)
    lines = drawn(screen(monkeypatch, 80, height), summarise(study))
    assert len(lines) <= height
    assert lines[-1].startswith("[9/9] best 2.00 (trial 8), ")


@pytest.mark.slow
def test_a_terminal_has_its_screen_back_at_the_end(done: Path) -> None:
    """On a terminal of 80 columns: the alternate screen is left, and the table after it is whole Markdown."""
    process, ours = on_terminal("status", "--study", done / "tiny.toml", "--watch", "--every", "0.1")
    written = b"".join(read(ours)).decode()
    assert process.wait(HANGS) == 0
    watched, _, after = written.partition("\x1b[?1049l")
    assert "\x1b[?1049h" in watched
    assert "[6/6] best " in watched
    assert "Traceback" not in written
    assert re.search(r"\r\n\| dense .*\|\r\n\| \w+ \+ uniform .*\|\r\n", after)


def read(descriptor: int) -> Iterator[bytes]:
    """What comes until the other side closes, which Linux calls an input/output error."""
    try:
        while chunk := os.read(descriptor, 4096):
            yield chunk
    except OSError:
        os.close(descriptor)


@pytest.mark.slow
def test_ctrl_c_on_a_terminal_leaves_what_was_seen(done: Path) -> None:
    stored(done).set_user_attr("total", 50)
    process, ours = on_terminal("status", "--study", done / "tiny.toml", "--watch", "--every", "0.1")
    seen, sent = b"", False
    for chunk in read(ours):
        seen += chunk
        if not sent and seen.count(b"[6/50]") == 2:
            process.send_signal(signal.SIGINT)
            sent = True
    assert process.wait(HANGS) == 130, seen[-3000:]
    assert b"Traceback" not in seen
    assert b"[6/50] best " in seen.partition(b"\x1b[?1049l")[2]


def on_terminal(*arguments: str | Path) -> tuple["subprocess.Popen[bytes]", int]:
    """A command on a terminal of 80 columns and 24 rows, and where what it writes can be read."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "80", "LINES": "24", "TERM": "xterm"}
    command = [sys.executable, str(TUNE), *map(str, arguments)]
    process = popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    return process, ours


# --- the table for a paper


def test_the_summary_is_one_markdown_table(study: optuna.Study, monkeypatch: pytest.MonkeyPatch, done: Path) -> None:
    """Whole at 40 columns, every row one line with the same number of cells, and nothing around it."""
    study.set_user_attr("dense", [1.0, 1.2])
    study.set_user_attr("made_from", studyfile.settings(study_file(done, "sparsity=0.7")))
    add(study, 0.0, 10.0, nlls=[2.0, 2.6], stderr=0.5, realised=0.6999)
    add(study, 0.1, 9.0, nlls=[1.9, 2.5], stderr=0.4, realised=0.7)
    for allocation, value in (("curve", 8.0), ("er", 12.0)):
        trial = create_trial(
            value=value,
            params={"pruner": "wanda", "allocation": allocation, "beta": 0.25},
            distributions=DISTRIBUTIONS,
            user_attrs={**plans.stored([0.5, 0.7]), "nlls": [1.8, 2.4], "stderr": 0.25},
        )
        study.add_trial(trial)
    other = create_trial(
        value=11.0, params={"pruner": "magnitude", "allocation": "atp", "beta": 0.0}, distributions=DISTRIBUTIONS
    )
    study.add_trial(other)
    console = screen(monkeypatch, 40, 10)
    tables.show_summary(summarise(study), study_file(done))
    assert isinstance(console.file, StringIO)
    text = re.sub(r"\x1b\[[0-9;]*m", "", console.file.getvalue())
    title, table, rest = text.split("\n\n", 2)
    assert title == "s: 70% sparsity"  # of the study, whatever the study file says now
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert all(line == line.strip() and line.startswith("|") and line.endswith("|") for line in table.splitlines())
    assert cells[0] == ["method", "sparsity", "validation perplexity", "test perplexity", "against uniform"]
    assert all(set(cell) == {"-"} for cell in cells[1])
    assert cells[2:] == [
        ["dense", "0%", "3.00 ± 0.30", "–", "–"],
        ["wanda + uniform", "69.99%", "10.00 ± 0.50", "–", "–"],
        ["magnitude + uniform", "–", "11.00", "–", "–"],
        ["wanda + curve (β = 0.25000)", "–", "8.00 ± 0.25", "–", "-18.1% (validation)"],
        ["wanda + atp (β = 0.10000)", "70.00%", "9.00 ± 0.40", "–", "-9.5% (validation)"],
        ["wanda + er (β = 0.25000)", "–", "12.00 ± 0.25", "–", "-18.1% (validation)"],
    ]
    assert rest.startswith("±: standard error over 2 windows (× 12.71 for 95 %); ")
    assert "\nbest: trial 2, wanda + curve (β = 0.25000)\n5 of 9 trials are done\n" in rest


def test_no_trial_is_better_than_uniform(study: optuna.Study, done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add(study, 0.0, 10.0)
    add(study, 0.1, 11.0)
    tables.show_summary(summarise(study), study_file(done))
    assert "\nbest: trial 0, wanda + uniform\nno trial is better than uniform\n" in capsys.readouterr().out


def test_methods() -> None:
    params = {"pruner": "wanda", "allocation": "er"}
    kinds: dict[str, Any] = {name: DISTRIBUTIONS[name] for name in params}
    assert method_of(create_trial(value=1.0, params=params, distributions=kinds)) == "wanda + er"


def test_the_clock_is_no_change(study: optuna.Study) -> None:
    add(study, 0.1, 10.0)
    add(study, 0.1, state=TrialState.RUNNING)
    summary = summarise(study)
    early, late = (status_of(summary, NOW + timedelta(seconds=seconds)) for seconds in (0, 9))
    assert isinstance(early, Status)
    assert early != late
    assert early.without_clock() == late.without_clock()
