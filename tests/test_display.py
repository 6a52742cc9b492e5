"""Progress as plain lines, where the output is no terminal."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atp_tune.api import arguments
from atp_tune.cli import display
from atp_tune.cli.display import Display
from atp_tune.cli.terminal import markdown
from atp_tune.cost.remaining import Remaining
from atp_tune.events import Ahead, Message, Step, TrialEnded, TrialStarted

PARTS = {
    "dense": (1, 9.0),
    "screening": (3, 2.0),
    "trial": (3, 20.0),
    "test": (2, 20.0),
    "generate": (2, 9.0),
    "draw": (2, 20.0),
}


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_the_estimate_ends_at_the_end_and_is_never_0(data: st.DataObject) -> None:
    """Whatever the parts take: one second at least is left; with seconds by size the estimate is right at once."""
    pace = data.draw(st.sampled_from((1.0, 0.01, 30.0)))
    even = data.draw(st.booleans())
    remaining, now, said = Remaining(), 0.0, list[tuple[float, float]]()

    def pass_time(part: str) -> None:
        nonlocal now
        now += pace * (PARTS[part][1] if even else data.draw(st.floats(0.0, 50.0)))
        if (left := remaining.left(now)) is not None:
            assert left >= 1
            said.append((now, left))

    remaining.hear(Ahead(PARTS), now)
    begin = lambda title: remaining.hear(TrialStarted(title, None), now)  # noqa: E731
    begin("dense model")
    pass_time("dense")
    for what in ("screening", "trial"):
        for number in range(3):
            begin(f"{what} {number}")
            pass_time(what)
            remaining.hear(TrialEnded(number, {"perplexity": 1.0}, None, {"perplexity": 1.0}, number + 1, 3, what), now)
    for _ in range(2):
        begin("test text: trial 1")
        pass_time("test")
        remaining.hear(Step("generate", 1, 1), now)
        pass_time("generate")
    for _ in range(2):
        begin("draw 2 of 3: trial 1")
        pass_time("draw")
    assert said
    assert not even or all(abs(at + left - now) <= max(1.0, 0.11 * now) for at, left in said)


def test_a_long_phase_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """At most a line a minute; two phases that take turns are both followed."""
    now = 0.0
    monkeypatch.setattr(display, "monotonic", lambda: now)
    show = Display()
    show(TrialStarted("gradient", None))
    for step in range(1, 45):
        now += 7.0
        show(Step("step", step, 44))
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == ["gradient", "gradient: step 9 of 44, 4 min left", "gradient: step 18 of 44, 3 min left"]
    assert len(lines) == 1 + 44 * 7 // 63
    show(TrialStarted("trial 0", None, 0))
    for step in range(1, 11):
        for phase in ("prune", "evaluate"):
            now += 4.0
            show(Step(phase, step, 10))
    assert capsys.readouterr().out.splitlines() == ["trial 0: prune 8 of 10, 16 s left"]
    show(TrialStarted("trial 1", None, 1))
    for step in (1, 2, 3, 4, 1, 2, 3, 4):  # it ends, and begins again, as each part of the windows does
        now += 30.0
        show(Step("evaluate", step, 4))
    said = ["trial 1: evaluate 2 of 4, 60 s left", "trial 1: evaluate 2 of 4, 60 s left"]
    assert capsys.readouterr().out.splitlines() == said


def test_a_bar_of_python_is_made_when_work_begins_and_has_the_whole_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An error before left an empty bar above it."""
    now = 0.0
    monkeypatch.setattr(arguments, "monotonic", lambda: now)
    lines = arguments.Lines(has_bar=True)
    lines(Message("loading"))
    assert lines.bar is None and capsys.readouterr().err == ""
    lines(Ahead({"dense": (1, 10), "trial": (3, 20), "test": (2, 20)}))
    for title in ("dense model", "trial 0"):
        now += 10
        lines(TrialStarted(title, None))
    lines.bar.close()
    assert "trial 0:  17%" in (said := capsys.readouterr().err) and said.rstrip().endswith("ETA 0:01:40")


def test_cells_of_a_table_are_shown_as_they_are() -> None:
    """Names of tasks, of files and of metrics hold brackets and colons, which rich would take for markup."""
    *_, row = markdown(("task", "a"), [("piqa [acc_norm]", "x :smile: [bold]y")]).splitlines()
    assert [cell.strip() for cell in row.strip("|").split("|")] == ["piqa [acc_norm]", "x :smile: [bold]y"]
