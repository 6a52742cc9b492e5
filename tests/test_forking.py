"""A command that was forked does what one does that was started: its words, its exit code, its environment."""

import re
import signal
import subprocess
from functools import partial
from pathlib import Path

import preloaded
import pytest
from forking import CONTEXT, ensure_preloaded
from tinystudy import finish, hear, settings, start

pytestmark = pytest.mark.slow


def test_everything_is_imported_before_a_command_begins() -> None:
    ensure_preloaded()
    process = CONTEXT.Process(target=exec, args=("import sys; sys.exit('preloaded' not in sys.modules)",))
    process.start()
    process.join()
    assert process.exitcode == 0


def test_it_is_the_same_as_a_started_one(place: Path) -> None:
    for words in (["plan", "--study", "tiny/tiny.toml"], ["status", "--study", "nosuch"]):
        one, other = (finish(start(*words, cwd=place.parent, alone=alone)) for alone in (False, True))
        assert re.sub(r"[\d.,]+", "", one.out) == re.sub(r"[\d.,]+", "", other.out)
        assert (one.code, one.err) == (other.code, other.err)


def test_its_pipes_hold_more_than_a_pipe_does(place: Path) -> None:
    words = partial(preloaded.say, 300_000)
    answer = finish(start("status", "--study", place / "tiny.toml", inject=words))
    assert len(answer.out) == len(answer.err.partition("error")[0]) == 300_000
    assert answer.code == 2


def test_it_is_heard_and_ends_by_a_signal(place: Path) -> None:
    process = start("--study", place / "tiny.toml", *settings("search.trials=500"))
    assert "dense model" in hear(process, "dense model")
    assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.communicate(timeout=0)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.send_signal(signal.SIGKILL)  # nobody is there any more
    assert process.communicate()[1] == ""
    assert not Path(f"/proc/{process.pid}").exists()
