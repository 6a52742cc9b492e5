"""Trials whose process went away, and what a process leaves of the one that it ran."""

import faulthandler
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence

import pytest
from expect import parametrize, slow
from hypothesis import given, settings
from hypothesis import strategies as st

from atp_tune.events import Event, Step, TrialStarted
from atp_tune.storage.progress import MOST, CutOff, Trace, forget, trace_left, why_given_up
from atp_tune.utils.cache import cache_dir

PLACES = st.sampled_from(["after prune 1 of 2", "after prune 2 of 2"])
CRASHES = st.sampled_from(["Aborted", "RuntimeError"])
NONE = st.none()
ANY = st.builds(CutOff, st.one_of(NONE, PLACES), st.one_of(NONE, CRASHES), st.booleans())
SHARED = st.builds(CutOff, PLACES, alone=st.just(False))
UNKNOWN = st.builds(CutOff, alone=st.booleans())
quick = settings(max_examples=200, deadline=None, derandomize=True, database=None)


def dies(*places: str) -> list[CutOff]:
    return [CutOff(place, alone=True) for place in places]


# --- the judge


@parametrize(
    ("cut_offs", "why"),
    [
        ([], ""),
        (dies("a", "a"), ""),
        (dies("a", "a", "a"), "3 times in a row a"),
        (dies("a", "b", "a", "b", "a", "b", "a"), ""),  # nobody can tell, yet
        (dies("a", "b", "b", "b"), ""),  # two of three by chance, perhaps
        (dies("a", "b", "b", "b", "b"), "4 times in a row b"),
        (dies("a", "a", "b", "a", "a", "a"), ""),  # it had come further
        ([*dies("a", "a"), CutOff("b"), CutOff(), *dies("a")], "3 times in a row a"),
        ([CutOff("a")] * 10, ""),  # its machine went away with it
        ([CutOff(crash="Aborted", alone=True)] * 2, ""),
        ([CutOff("a", "Aborted"), *dies("b"), CutOff("b", "Aborted"), CutOff("c", "Bus error")],
         "3 times by itself (Aborted, Bus error)"),
        (dies(*map(str, range(24))), ""),
        (dies(*map(str, range(25))), "25 times"),
        ([CutOff()] * 25, "25 times"),
    ],
)  # fmt: skip
def test_which_are_given_up(cut_offs: Sequence[CutOff], why: str) -> None:
    assert why_given_up(cut_offs) == why


@slow
@quick
@given(st.lists(ANY, max_size=MOST), PLACES, st.lists(st.lists(st.one_of(SHARED, UNKNOWN), max_size=3), min_size=4))
def test_a_trial_that_dies_at_one_place_is_given_up_whatever_else_happens_to_it(
    before: list[CutOff], place: str, between: list[list[CutOff]]
) -> None:
    assert why_given_up([*before, *[one for others in between for one in (*others, *dies(place))]])


@slow
@quick
@given(st.lists(st.one_of(SHARED, UNKNOWN), max_size=MOST - 1))
def test_what_others_share_or_nobody_has_seen_is_nobodys_fault(cut_offs: list[CutOff]) -> None:
    assert why_given_up(cut_offs) == ""


@slow
@quick
@given(st.lists(ANY, max_size=MOST - 2), st.one_of(SHARED, UNKNOWN))
def test_the_end_of_a_machine_changes_no_verdict(cut_offs: list[CutOff], shared: CutOff) -> None:
    assert bool(why_given_up([*cut_offs, shared])) == bool(why_given_up(cut_offs))


@slow
@quick
@given(st.lists(PLACES, max_size=MOST - 1))
def test_of_the_places_the_last_ones_decide(places: list[str]) -> None:
    four = any(places[-4:] == [place] * 4 for place in places)
    assert bool(why_given_up(dies(*places))) == (four or (len(places) == 3 and len(set(places)) == 1))


# --- what a process leaves


@pytest.fixture
def without_faulthandler() -> Iterator[None]:
    """As in a process that is no test."""
    was_enabled = faulthandler.is_enabled()
    faulthandler.disable()
    yield
    if was_enabled:
        faulthandler.enable()


def here(study: str = "s", trial: int = 3) -> tuple[str | None, str | None]:
    return trace_left(study, trial, os.getpid())


def test_each_step_is_written_down_before_it_is_told() -> None:
    told: list[tuple[Event, str | None]] = []
    trace = Trace()
    watch = trace.heard_by(lambda event: told.append((event, here()[0])))
    events: list[Event] = [
        TrialStarted("trial 3", None, 3), Step("prune", 1, 2), Step("evaluate", 1, 2), Step("prune", 2, 2),
        Step("evaluate", 2, 2), Step("evaluate", 1, 2), Step("evaluate", 2, 2),
    ]  # fmt: skip
    with trace.of("s", 3):
        for event in events:
            watch(event)
    assert [event for event, _ in told] == events
    assert [place for _, place in told] == [
        "at its beginning", "after prune 1 of 2", "after evaluate 1 of 2", "after prune 2 of 2",
        "after evaluate 2 of 2", "after evaluate 1 of 2, part 2", "after evaluate 2 of 2, part 2",
    ]  # fmt: skip


@pytest.mark.usefixtures("without_faulthandler")
def test_the_places_of_one_trial_are_not_those_of_the_next() -> None:
    trace = Trace()
    watch = trace.heard_by(lambda event: None)
    for trial in (3, 4):
        with trace.of("s", trial):
            assert faulthandler.is_enabled()
            watch(Step("prune", 2, 2))
            assert here(trial=trial) == ("after prune 2 of 2", None)
        assert not faulthandler.is_enabled()


ENDING = """
import os, sys
from atp_tune.events import Step
from atp_tune.storage.progress import Trace

trace = Trace()
watch = trace.heard_by(lambda event: None)
with trace.of("a study / of ü", 7):
    watch(Step("prune", 2, 30))
    os.kill(os.getpid(), int(sys.argv[1]))
"""


@parametrize(
    ("number", "crash"),
    [(signal.SIGKILL, None), (signal.SIGABRT, "Aborted"), (signal.SIGSEGV, "Segmentation fault")],
)
def test_what_a_killed_process_leaves(number: signal.Signals, crash: str | None) -> None:
    process = subprocess.Popen([sys.executable, "-c", ENDING, str(int(number))])
    assert process.wait(60) == -number
    assert trace_left("a study / of ü", 7, process.pid) == ("after prune 2 of 30", crash)
    assert trace_left("a study / of ü", 8, process.pid) == (None, None)
    forget("a study / of ü", 7, process.pid)
    assert not list(cache_dir("running").iterdir())
