"""Early stopping: which step is best, when training ends, and how many windows are held out."""

from expect import parametrize

from atp_tune.config.prune import Training
from atp_tune.folders.training import EarlyStop, windows_held_out, windows_read

SETTINGS = Training(
    train="lora",
    loss="next-token",
    eval_every=20,
    steps=10,
    rank=2,
    alpha=4,
    learning_rate=0.1,
    seqlen=8,
    batch=9,
    seed=0,
    patience=2,
)


def after(*losses: float, patience: int = 2) -> EarlyStop:
    found = EarlyStop(patience)
    for index, loss in enumerate(losses):
        found.add(10 * index, loss)
    return found


@parametrize(
    ("losses", "best", "has_ended"),
    [
        ([3.0], 0, False),
        ([3.0, 2.0], 10, False),
        ([3.0, 2.0, 2.5], 10, False),
        ([3.0, 2.0, 2.5, 2.1], 10, True),
        ([3.0, 2.0, 2.5, 1.9], 30, False),
        ([3.0, 3.5, 3.1], 0, True),
        ([3.0, 3.0, 3.0], 0, True),  # the first of equals
    ],
)
def test_the_lowest_loss_is_best_and_patience_ends_it(losses: list[float], best: int, has_ended: bool) -> None:
    found = after(*losses)
    assert (found.best[0], found.has_ended) == (best, has_ended)


def test_a_long_text_gives_the_steps_all_their_windows() -> None:
    for steps in (1, 3, 10, 50, 500):
        settings = SETTINGS.model_copy(update={"steps": steps})
        found = windows_read(settings)
        own = windows_held_out(found, settings)
        assert 8 <= own <= 32
        assert found - own >= steps * 9
        assert own == min(max(8, found // 10), 32)


@parametrize(("found", "own"), [(1, 0), (15, 0), (16, 8), (60, 8), (95, 9)])
def test_a_short_text_is_divided_or_not(found: int, own: int) -> None:
    assert windows_held_out(found, SETTINGS) == own
