"""Studies over an interval of sparsities, run for real: a front, the sparsest plan within a limit, and a resume."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from expect import parametrize, refused, slow
from families import scores_of
from test_runner import states
from test_zeroshot import make_tasks
from tinystudy import CommandLine, copied, run, stored, study_file

from atp_tune.config.best import read_config
from atp_tune.events import Event, TrialStarted
from atp_tune.measures import change
from atp_tune.plan import Plan, target_in
from atp_tune.results.goals import best_trial, goal_in, limit_excess, pareto_front
from atp_tune.results.summary import summarise
from atp_tune.search.runner import StudyRun, open_context, tune
from atp_tune.search.space import make_space
from atp_tune.storage.fingerprint import stored_batches

INTERVAL = "sparsity=[0.3,0.8]"
SCREEN = ("search.sampler=tpe", "search.screen.trials=8", "search.screen.stride=3", "search.screen.confirm=3")
SEARCH = """\
sampler = "tpe"

[search.screen]
trials = 8
stride = 3
confirm = 3
"""
LIMIT = (INTERVAL, *SCREEN, "search.trials=12")


def make_front(place: Path) -> None:
    """Makes the study file one of a front, without `search.trials`."""
    file = place / "tiny.toml"
    text = file.read_text().replace("sparsity = 0.6\n", "sparsity = [0.3, 0.8]\n")
    file.write_text(text.replace('trials = 3\nsampler = "random"\n', SEARCH))


@pytest.fixture(scope="module")
def ran(tiny_place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished front, to be read only."""
    with copied(tiny_place, tmp_path_factory) as place:
        make_front(place)
        run(place)
        return place


@slow
def test_bytes_and_speed_of_each_point(ran: Path, tmp_path: Path, command: CommandLine, cache: Path) -> None:
    place = tmp_path / "tiny"
    shutil.copytree(ran, place)
    dense, points = summarise(stored(place)).dense_bytes, summarise(stored(place)).points
    sizes = [point.packed_bytes or 0 for point in points]
    assert sizes == sorted(sizes, reverse=True)
    assert dense is not None
    assert dense == sizes[0] > sizes[-1]  # at 30 % nothing is packed
    words = ("speedup", "--study", place / "tiny.toml", "--tokens", 8, "--runs", 1, "--device", "cpu")
    answer = command.ok(*words)
    found = summarise(stored(place))
    assert found.speed is not None
    names = [[row.engine for row in point.speed.engines] for point in found.points if point.speed]
    dense_rows = names[0]
    assert set(dense_rows) == {"torch"}  # in float32, and in bfloat16 where that is fast
    packed = names[-1][len(dense_rows) :]
    assert names[-1][: len(dense_rows)] == dense_rows
    assert packed in (["packed", "packed bf16", "packed int8"], ["packed", "packed int8"], ["packed", "packed bf16"])
    head, _, dense_row, *rows = [line.split("|") for line in answer.out.splitlines() if line.startswith("|")]
    column = [cell.strip() for cell in head].index("tokens/s")
    assert all(float(row[column]) > 0 for row in [dense_row, *rows[: len(points)]])
    assert dense_row[column - 1].strip() == f"{dense / 1e6:.1f} MB"
    assert "decoded one at a time, weights not rounded, by the fastest engine" in answer.out
    assert not list((cache / "sparse").iterdir())
    assert "trial" not in command(*words).err  # each is stored


@slow
@parametrize("objective", ["perplexity", "kl"])
def test_the_test_text_beside_a_trial_has_the_bits_of_the_test_text_alone(
    tiny_place: Path, tmp_path: Path, objective: str
) -> None:
    place = Path(shutil.copytree(tiny_place, tmp_path / "tiny"))
    make_front(place)
    events: list[Event] = []
    asked = (f"search.objective={objective}", "texts.calibration.nsamples=5")
    file = study_file(place, *asked)
    study = tune(StudyRun(file, "tiny", None, events.append))
    titles = [event.title for event in events if isinstance(event, TrialStarted)]
    assert [title for title in titles if title.startswith("test text")] == ["test text: dense model"]
    found = {name: dict(study.user_attrs.get(name, {})) for name in ("test_nlls", "test_kls")}
    numbers = {str(trial.number) for trial in study.trials}
    assert found["test_nlls"].keys() == {"dense", *numbers}
    assert found["test_kls"].keys() == (numbers if objective == "kl" else set())
    with open_context(StudyRun(file, "tiny", None, events.append), study) as context:
        context.begin(stored_batches(study))
        space = make_space(file.study, context.budget(file.study.highest))
        for trial in study.trials:
            blocks = ((block.index, block.weights) for block in context.prune(space.plan(trial.params)))
            scores = scores_of(context, blocks, "test", kl=objective == "kl")
            assert scores["nlls"] == found["test_nlls"][str(trial.number)]
            assert scores.get("kls", []) == found["test_kls"].get(str(trial.number), [])


def make_front_of_bits(place: Path) -> None:
    """Makes the study file one of a front of bits."""
    make_front(place)
    file = place / "tiny.toml"
    text = file.read_text().replace("sparsity = [0.3, 0.8]\n", "bits = [3, 6]\n")
    file.write_text(text + '\n[quantize]\nquantizers = ["rtn"]\ngroup_size = 16\n')


@pytest.fixture(scope="module")
def of_bits(tiny_place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished front of bits, to be read only."""
    with copied(tiny_place, tmp_path_factory) as place:
        make_front_of_bits(place)
        run(place)
        return place


@slow
@parametrize(("front", "make"), [("ran", make_front), ("of_bits", make_front_of_bits)])
def test_a_front_goes_on_as_if_it_had_not_stopped(
    front: str, make: Callable[[Path], None], tiny_place: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    place = Path(shutil.copytree(tiny_place, tmp_path / "tiny"))
    make(place)
    run(place, timeout=0)  # not even the screening is done
    run(place, "search.trials=2")
    expected = stored(request.getfixturevalue(front)).trials
    whole = run(place, f"search.trials={len(expected)}")
    assert [trial.params for trial in whole.trials] == [trial.params for trial in expected]
    assert [trial.values for trial in whole.trials] == [trial.values for trial in expected]


@slow
def test_a_front_of_bits(of_bits: Path, tmp_path: Path, command: CommandLine) -> None:
    place = Path(shutil.copytree(of_bits, tmp_path / "tiny"))
    study, file = stored(place), str(place / "tiny.toml")
    assert study.metric_names == ["perplexity", "bits"] and len(study.directions) == 2
    points = summarise(study).points
    assert [point.target for point in points] == sorted(point.target for point in points)  # the largest model first
    sizes = [point.packed_bytes or 0 for point in points]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[-1]
    for point in points:
        bits = point.trial.params["bits"]
        assert point.trial.values == [pytest.approx(point.trial.values[0]), bits] and point.target == -bits
        assert Plan.model_validate(point.trial.user_attrs["plan"]).mean_bits(summarise(study).sizes) <= bits + 1e-9

    # Each command names bits where it named sparsities.
    said = json.loads(command.ok("status", "--study", file, "--json").out)
    assert (said["bits"], said["sparsity"], said["objective"]) == ([3, 6], None, ["perplexity", "bits"])
    assert [row["bits"] for row in said["points"]] == [-point.target for point in points]
    assert all(row["sparsity"] is None for row in (*said["points"], *said["trials"], said["best"]))
    answer = command.ok("export", "--study", file, "--bpw", "3.1", "--out", place / "a.json")
    assert "3 bits rtn" in answer.err and "the nearest to 3.1 bits on the front" in answer.err
    config = read_config(place / "a.json")
    assert config.bits is not None and (config.bits.target, config.plan.target) == (3, -3)
    assert command.ok("apply", "--config", place / "a.json", "--out", place / "rounded").code == 0
    for words, error in (
        (("--bpw", "7"), "--bpw: 7 bits is outside the study's interval, 3 bits to 6 bits"),
        (("--bpw", "3..4"), "--bpw: 3..4 is an interval; give the one number that the plan is to have"),
        (("--sparsity", "0.5"), "--sparsity: 50% is outside the study's interval, 3 bits to 6 bits"),
        (("--bpw", "3", "--trial", "1"), "--bpw: names one trial, and --trial another; leave one out"),
    ):
        assert error in command("export", "--study", file, *words).error
    page = place / "page.html"
    command.ok("report", "--study", file, "--out", page)
    text = page.read_text()
    for words in ("bits per weight", "searched from 3 bits to 6 bits", "uniform has the same quantizer and target"):
        assert words in text


@slow
def test_the_smallest_plan_within_a_limit(of_bits: Path, tmp_path: Path) -> None:
    """Beside every plan of the allocation at its start, and of uniform, which a search without a screening tries."""
    place = Path(shutil.copytree(of_bits, tmp_path / "tiny"))
    study = run(place, "limit.max_increase=0.02", "search.trials=12")
    best = best_trial(study)
    assert best is not None and limit_excess(study, best) <= 0
    inside = [trial.params["bits"] for trial in study.trials if trial.values and limit_excess(study, trial) <= 0]
    assert best.params["bits"] == min(inside) < 6
    assert "the smallest within" in goal_in(study).sparsest({"max_increase": 0.02}).why


@slow
def test_another_limit_goes_on_from_what_is_measured(ran: Path, tmp_path: Path) -> None:
    place = Path(shutil.copytree(ran, tmp_path / "tiny"))
    before = stored(place)
    count, by_sparsity = len(before.trials), {target_in(trial.params): trial for trial in pareto_front(before)}
    found = [change(before.user_attrs["dense"], trial.user_attrs["nlls"]) for trial in by_sparsity.values()]
    low, middle, high = sorted(one.value + one.stderr for one in found)
    study = run(place, f"limit.max_increase={(middle + high) / 2}", "search.trials=20")
    best, more = best_trial(study), len(study.trials)
    assert best is not None
    assert limit_excess(study, best) <= 0
    assert count < more < 20
    study = run(place, f"limit.max_increase={(low + middle) / 2}", "search.trials=20")
    stricter = best_trial(study)
    assert stricter is not None
    assert stricter.params["sparsity"] < best.params["sparsity"]
    assert read_config(place / "tiny.best.json").trial == stricter.number
    assert summarise(run(place, "search.trials=20")).limit is None


@slow
def test_a_limit_of_kl(tiny_place: Path, tmp_path: Path) -> None:
    place = Path(shutil.copytree(tiny_place, tmp_path / "tiny"))
    best = best_trial(run(place, *LIMIT, "search.objective=kl", "limit.max_kl=0.3"))
    assert best is not None
    assert best.values[0] <= 0.3
    assert best.values[1] == pytest.approx(1 - best.params["sparsity"])


@slow
def test_a_limit_of_accuracy(tiny_place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    tasks = make_tasks(tmp_path / "tasks")
    place = Path(shutil.copytree(tiny_place, tmp_path / "tiny"))
    least = f'limit.min_accuracy={{"{tasks}/far.yaml" = 0.2, "{tasks}/near.yaml" = 0.1}}'
    study = run(place, *LIMIT[:-1], "search.trials=5", least, "limit.items=10")
    assert states(study) == ["COMPLETE"] * len(study.trials)
    for trial in study.trials:
        found = trial.user_attrs["accuracies"]
        assert {*found} == {f"{tasks}/far.yaml", f"{tasks}/near.yaml"}
        assert all(0 <= value <= 1 and stderr >= 0 for value, stderr in found.values())
    assert "accuracies" not in stored(place, "tiny.screen").trials[0].user_attrs


@slow
@parametrize(
    ("least", "words"),
    [
        ('{"no_such_task" = 0.2}', "limit.min_accuracy no_such_task: lm-eval has no such task"),
        ('{"/nowhere/x.yaml" = 0.2}', "limit.min_accuracy /nowhere/x.yaml: there is no such folder"),
    ],
)
def test_a_task_that_is_not_there_is_named(
    tiny_place: Path, tmp_path: Path, least: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an index of one task: test_zeroshot.py has lm-eval's own, which takes seconds to read."""
    from atp_tune.scores import tasks

    monkeypatch.setattr(tasks, "TaskManager", lambda **_: SimpleNamespace(all_tasks=["hellaswag"]))
    place = Path(shutil.copytree(tiny_place, tmp_path / "tiny"))
    with refused(words):
        run(place, *LIMIT, f"limit.min_accuracy={least}")
