"""`status`, `export` and `studies` for programs and for those who wait: JSON, `--watch`, screens and pipes."""

import json
import os
import pty
import re
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
from expect import slow
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState, create_trial
from processes import popen
from rich.console import Console
from tinystudy import HANGS, LONG, TUNE, CommandLine, finish, hear, settings, start, stored

from atp_tune.cli import tables, terminal
from atp_tune.results.status import make_status, to_json
from atp_tune.results.summary import Summary, summarise

NOW = datetime(2026, 1, 1, 12)
DISTRIBUTIONS = {
    "pruner": CategoricalDistribution(("wanda", "magnitude")),
    "allocation": CategoricalDistribution(("atp", "curve", "er")),
    "beta": FloatDistribution(0, 1),
}


pytestmark = pytest.mark.usefixtures("without_warnings")


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
    text = to_json(make_status(summarise(study), NOW))
    assert "Infinity" not in text
    assert "NaN" not in text
    parsed: dict[str, Any] = json.loads(text)
    return parsed


def words(study: optuna.Study) -> str:
    return tables.progress_line(make_status(summarise(study), NOW))


# --- the document


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


# --- export and studies


def test_export_prints_what_it_writes(done: Path, command: CommandLine, tmp_path: Path) -> None:
    answer = command("export", "--study", done / "tiny.toml", "--json", "--out", tmp_path / "a" / "b.json")
    assert answer.out == (tmp_path / "a" / "b.json").read_text()


# --- watching


@slow
def test_a_watch_ends_with_the_study(place: Path) -> None:
    """It waits for the study, tells what changes, and gives the summary; beside it one that writes JSON lines."""
    options = ("status", "--study", place / "tiny.toml", "--watch", "--every", "0.1")
    waiting = "study tiny: has no trials yet; waiting for it\n"
    watch, lines = start(*options), start(*options, "--json")
    assert (hear(watch, "\n"), hear(lines, "\n", err=True)) == (waiting, waiting)
    runs = start("--study", place / "tiny.toml", *settings(*LONG, "search.trials=6"))
    watched = finish(watch)
    assert watched.is_clean
    assert "waiting for it" not in watched.out
    told = re.findall(r"^\[(\d)/6\] (?:no best yet|best \d+\.\d\d \(trial \d\)), ", watched.out, re.M)
    assert told == sorted(told)
    assert len(set(told)) > 1
    assert re.search(r"trial \d runs for \d+ s", watched.out)
    assert re.search(r"\n\| dense  .*\n\| wanda \+ uniform .*\n\| wanda \+ atp \(β = ", watched.out)
    assert watched.out.count("spread: ") == 1
    assert finish(runs).code == 0
    answer = finish(lines)
    assert answer.is_clean
    documents = [json.loads(line) for line in answer.out.splitlines()]
    assert len(documents) > 2
    assert [each["complete"] for each in documents] == [False] * (len(documents) - 1) + [True]
    assert (documents[-1]["done"], documents[-1]["study"]) == (6, "tiny")


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


@slow
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


@slow
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


@slow
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
