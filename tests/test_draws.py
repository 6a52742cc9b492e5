"""Other draws of the calibration text: how much of a result is due to the one that was drawn."""

import json
import math
from itertools import combinations
from pathlib import Path
from statistics import fmean, mean, stdev
from typing import Any

import numpy as np
import optuna
import pytest
from expect import parametrize, refused, slow
from families import nlls_of, setup_of
from tinystudy import TOKENS, CommandLine, copied, copy_of, few_steps, run, settings, stored, study_file

from atp_tune.checkpoints.models import resolve
from atp_tune.config.data import Calibration
from atp_tune.config.prune import make_plan
from atp_tune.config.study import ModelConfig
from atp_tune.errors import TrialError
from atp_tune.events import Event, Place, TrialStarted
from atp_tune.inputs.items import Items
from atp_tune.inputs.windows import TokenWindows, load_tokenizer, token_windows
from atp_tune.measures import perplexity
from atp_tune.metrics import over_draws
from atp_tune.plan import Plan
from atp_tune.results.summary import summarise, undrawn
from atp_tune.run import session as module
from atp_tune.run.session import Session, Setup
from atp_tune.search.objective import FinalScores

THREE = "texts.calibration.draws=3"


@pytest.fixture(scope="module")
def drawn_once(tiny_done: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that is complete, with three draws; its best is not uniform; to be read only."""
    with copied(tiny_done, tmp_path_factory) as place:
        run(place, THREE)
        return place


drawn = copy_of("drawn_once")


def titles(events: list[Event]) -> list[str]:
    return [event.title for event in events if isinstance(event, TrialStarted)]


def measured_anew(place: Path, trial: optuna.trial.FrozenTrial, **keys: Any) -> list[float]:
    """Window NLLs on the test text of a trial's plan, with another calibration text of 8 windows: the last ones."""
    spec = study_file(place).study
    texts = {"calibration": spec.texts.calibration.model_copy(update=keys), "test": spec.test_text}
    opened = Session.open(Setup(spec.model, spec.prune, texts, Place(place, "cpu")))
    ids = opened.windows["calibration"].ids[-8:]
    windows = {**opened.windows, "calibration": Items.windows(np.ascontiguousarray(ids))}
    context = Session(opened.folder, opened.checkpoint, windows, setup_of(spec.prune))
    plan = Plan.model_validate(trial.user_attrs["plan"])
    return nlls_of(context, ((block.index, block.weights) for block in context.prune(plan)), "test")


@slow
@parametrize(("pool", "each"), [(512, 512), (4096, None)])
def test_a_plan_that_is_fitted_is_fitted_anew_to_each_draw(
    pool: int, each: int | None, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan of the first draw was pruned by the others, whose windows lie in the text that it was fitted to.

    A text that has no room for three pools is cut into three, and the first draw's plan is another than the study's.
    """
    few_steps(monkeypatch)
    monkeypatch.setattr(module, "POOL", pool)
    keys = ('allocation=["gradient"]', "search.trials=2")
    run(place, *keys, "texts.calibration.draws=1")
    trial = next(trial for trial in stored(place).trials if trial.params["kappa"])
    for draw in (1, 2):  # as an earlier version has stored it
        stored(place).set_user_attr(f"draws:{trial.number}:{draw}", [9.0] * 16)
    study = run(place, *keys, THREE)
    whole = token_windows(Calibration(source="file:calibration.txt", seqlen=TOKENS), place / "model", place)
    per = min(pool // TOKENS, len(whole) // 3)
    assert study.user_attrs["fitted_to"]["3"] == [per * TOKENS, pool] and per * TOKENS == (each or per * TOKENS)
    spec = study_file(place, *keys).study
    opened = Session.open(Setup.of_study(spec, place, False))
    expected = []
    for draw in range(3):
        items, fitted = whole.thinned(1, draw * per, draw * per + 8), whole.thinned(1, draw * per, (draw + 1) * per)
        windows = {**opened.windows, "calibration": items}
        context = Session(opened.folder, opened.checkpoint, windows, setup_of(spec.prune))
        monkeypatch.setattr(context, "_pool", lambda fitted=fitted: fitted)
        plan = make_plan("wanda", "gradient", context.budget(0.6), {"kappa": trial.params["kappa"]})
        blocks = context.prune(plan)
        expected.append(nlls_of(context, ((block.index, block.weights) for block in blocks), "test"))
    found = study.user_attrs["refits"][str(trial.number)]["3"]
    assert [found[str(draw)] for draw in range(3)] == [pytest.approx(nlls, rel=1e-5) for nlls in expected]
    assert (found["0"] == study.user_attrs["test_nlls"][str(trial.number)]) == (each is not None)
    summary = summarise(study)
    over = summary.over_draws[trial.number]
    assert over.perplexities == pytest.approx([perplexity(nlls).value for nlls in expected], rel=1e-5)
    assert summary.complete and over.count == 3 and over.fitted_to == (per * TOKENS, pool)
    beside = "" if each else f"where the plan itself is fitted to {pool:,}, "
    assert f"the plan fitted anew to {per * TOKENS:,} tokens of each draw, {beside}mean ±" in over.how(
        "windows", "tokens", True
    )


@slow
def test_a_random_draw_is_drawn_again_with_the_seeds_that_follow(place: Path) -> None:
    lines = (place / "long.txt").read_text().split("\n\n")
    rows = [json.dumps({"text": "\n\n".join(lines[k : k + 8])}) for k in range(0, len(lines), 8)]
    (place / "calibration.jsonl").write_text("\n".join(rows))
    keys = ("texts.calibration.source=file:calibration.jsonl", "texts.calibration.sampling=random")
    study = run(place, THREE, *keys, "texts.calibration.seed=5")
    best = summarise(study).best_trial
    assert best is not None
    for draw in (1, 2):
        text = {"source": "file:calibration.jsonl", "sampling": "random", "seed": 5 + draw}
        expected = measured_anew(place, best, **text)
        assert study.user_attrs["draws"][str(best.number)][str(draw)] == pytest.approx(expected, rel=1e-6)


def numbers(place: Path) -> tuple[list[float], list[float]]:
    """Perplexities of the best, and its changes against uniform, by draw, from what is stored."""
    study, summary = stored(place), summarise(stored(place))
    assert summary.best_trial is not None and summary.uniform_trial is not None
    found = []
    for trial in (summary.best_trial, summary.uniform_trial):
        name = str(trial.number)
        draws = study.user_attrs["draws"][name]
        found.append([fmean(nlls) for nlls in (study.user_attrs["test_nlls"][name], draws["1"], draws["2"])])
    own, base = found
    return [math.exp(one) for one in own], [math.exp(one - two) - 1 for one, two in zip(own, base, strict=True)]


@slow
def test_what_was_measured_before_a_process_died_is_kept(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, calls = FinalScores._redrawn, [0]

    def dies(*own: Any) -> list[float]:
        calls[0] += 1
        if calls[0] == 4:  # uniform and best of two draws
            raise KeyboardInterrupt
        return whole(*own)

    monkeypatch.setattr(FinalScores, "_redrawn", dies)
    with pytest.raises(KeyboardInterrupt):
        run(place, THREE)
    known = stored(place).user_attrs["draws"]
    left = undrawn(stored(place), 3)
    assert (sum(map(len, known.values())), len(left)) == (3, 1)
    assert not summarise(stored(place)).complete
    assert [found.count for found in summarise(stored(place)).over_draws.values()] == [2, 2]
    monkeypatch.undo()
    events: list[Event] = []
    study = run(place, THREE, watch=events.append)
    assert titles(events) == [f"draw 3 of 3: trial {left[0][1]}"]
    assert {name: study.user_attrs["draws"][name]["1"] for name in known} == {n: k["1"] for n, k in known.items()}
    assert summarise(study).complete


@slow
def test_a_draw_that_gives_no_number_ends_no_study(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prices that were not finite ended the run after all of its trials, without its best configuration.

    Later the study never was complete: each run measured again, and the spread over the draws before was shown.
    """
    whole = FinalScores._redrawn

    def fails(*own: Any) -> list[float]:
        if own[2] == 2:
            raise TrialError("prices are not finite")
        return whole(*own)

    monkeypatch.setattr(FinalScores, "_redrawn", fails)
    events: list[Event] = []
    study = run(place, THREE, watch=events.append)
    assert (place / "tiny.best.json").exists()
    assert [sorted(found) for found in study.user_attrs["draws"].values()] == [["1", "2"]] * 2
    assert any("prices are not finite; its spread over draws is left out" in str(event) for event in events)
    assert summarise(study).complete
    assert summarise(study).over_draws == {}
    events.clear()
    run(place, THREE, watch=events.append)
    assert not any(isinstance(event, TrialStarted) or "no number" in str(event) for event in events)


@slow
def test_the_paper_s_protocol_is_measured_on_the_text_it_searches(place: Path) -> None:
    toml = (place / "tiny.toml").read_text()
    start, end = toml.index("[texts.test]"), toml.index("[search]")
    (place / "tiny.toml").write_text('protocol = "paper"\n' + toml[:start] + toml[end:])
    study = run(place, THREE)
    assert all(len(nlls) == 16 for found in study.user_attrs["draws"].values() for nlls in found.values())
    assert all(found.count == 3 for found in summarise(study).over_draws.values())


@slow
def test_a_text_too_short_for_them_is_one_line_before_anything_runs(place: Path, command: CommandLine) -> None:
    tokens = len(token_windows(Calibration(source="file:calibration.txt", seqlen=2), place / "model", place).ids) * 2
    answer = command("--study", place / "tiny.toml", *settings("texts.calibration.draws=100"))
    have = answer.error.partition(" has ")[2].partition(" tokens")[0]
    assert int(have) in (tokens, tokens + 1)
    assert answer.error == (
        "texts.calibration.draws: 100 draws of 8 windows follow each other in a text; file:calibration.txt "
        f"has {have} tokens, that is {int(have) // TOKENS} windows of {TOKENS}; 800 windows cannot be cut, lower "
        'nsamples or seqlen, or draws, or set sampling = "random"'
    )
    assert not list(place.glob("*.db"))
    assert command("plan", "--study", place / "tiny.toml", *settings("texts.calibration.draws=100")).code == 2


@parametrize("sampling", ["consecutive", "random"])
@parametrize(("positions", "pool"), [(0, 1), (1024, 32), (10**6, None)])
def test_draws_share_no_token(sampling: str, positions: int, pool: int | None, place: Path) -> None:
    """Windows of another seed could lie in those of the first, and pools were all the first."""
    (place / "numbers.jsonl").write_text(json.dumps({"text": " ".join(map(str, range(9000)))}) + "\n")
    text = Calibration(source="file:numbers.jsonl", sampling=sampling, nsamples=4, seqlen=32, seed=1, draws=3)
    kind, folder = TokenWindows(), resolve(ModelConfig(source="model"), place)
    if pool is None and sampling == "random":
        with refused("too short for 3 draws of 31250 windows of 32 tokens that share none"):
            kind.draws(text, 3, positions, folder, place, False)
        return
    found = kind.draws(text, 3, positions, folder, place, False)
    assert found[0][0].content == kind.read({"calibration": text}, folder, place, False)["calibration"].content
    if pool:
        assert found[0][1].content == kind.many(text, positions, folder, place, False).content
    whole = text.model_copy(update={"nsamples": None, "sampling": "consecutive"})
    third = len(token_windows(whole, place / "model", place)) // 3
    assert {(len(items), len(each)) for items, each in found} == {(4, pool or third)}
    encode = load_tokenizer(folder.path, False)
    places = []
    for items, each in found:
        words = " ".join(encode.decode(row) for row in np.vstack([items.ids, each.ids])).split()
        places.append({int(word) for word in words if len(word) == 4 and word.isdigit()})
    assert not any(len(one & other) > 2 for one, other in combinations(places, 2))  # a number that a window cuts


def test_spread_and_change_by_hand() -> None:
    best, uniform = [[1.0, 2.0], [1.2, 2.2], [0.9, 2.0]], [[1.5, 2.5], [1.6, 2.7], [1.5, 2.4]]
    found = over_draws(best, uniform)
    assert found is not None and found.change is not None
    values, changes = [math.exp(1.5), math.exp(1.7), math.exp(1.45)], [math.exp(-x) - 1 for x in (0.5, 0.45, 0.5)]
    assert (found.count, found.perplexities) == (3, pytest.approx(tuple(values)))
    assert (found.perplexity.mean, found.perplexity.sd) == pytest.approx((mean(values), stdev(values)))
    assert (found.change.mean, found.change.sd) == pytest.approx((mean(changes), stdev(changes)))
    assert over_draws(best[:1], uniform[:1]) is None
    assert over_draws([[1.0], [math.inf]], None) is None
    assert over_draws([[1.0], [math.nan]], None) is over_draws([[1.0], [1.0]], [[1.0], [math.nan]]) is None


# --- what ± is


# --- what is stored of the report, row by row


@slow
def test_two_hosts_that_end_a_study_together_lose_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other, written, set_attr = [], dict[str, list[float]](), optuna.Study.set_user_attr

    def at_the_same_moment(self: optuna.Study, key: str, value: Any) -> None:
        """What another host stores just before this one does, of a trial that this one does not measure."""
        if key.startswith("test") and not other:
            other.append(key)
            theirs = key.partition(":")[0]
            if theirs == key:  # a whole table
                set_attr(stored(place), key, {"7": [1.5, 2.5]})
            else:
                set_attr(stored(place), f"{theirs}:7", [1.5, 2.5])
        set_attr(self, key, value)

    monkeypatch.setattr(optuna.Study, "set_user_attr", at_the_same_moment)
    run(place)
    written = stored(place).user_attrs["test_nlls"]
    assert written["7"] == [1.5, 2.5]
    assert len(written) == 4
