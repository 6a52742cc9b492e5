import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean, pstdev, stdev
from typing import Any

import pytest
import torch
from tinystudy import TOKENS, CommandLine, stored
from transformers import AutoModelForCausalLM, AutoTokenizer

from atp_tune.blocks import replay
from atp_tune.blocks.prune_pass import Pass
from atp_tune.checkpoints.checkpoint import Checkpoint
from atp_tune.config.best import read_config
from atp_tune.events import Event, Place, Step
from atp_tune.folders.applying import plan_of
from atp_tune.folders.comparing import TaskOptions, evaluate, evaluate_folder
from atp_tune.measures import TaskScore, difference, mean_of_tasks
from atp_tune.run import observers
from atp_tune.run.observers import Kept
from atp_tune.run.session import Session, Setup
from atp_tune.utils.extras import install

ROOT = Path(__file__).parents[1]
OFFLINE_TASKS = ROOT / "scripts" / "offline-tasks"
NOWHERE = "http://127.0.0.1:9"  # nobody listens there
ELSEWHERE = """\
task: {name}
dataset_path: {path}
test_split: test
output_type: multiple_choice
doc_to_text: context
doc_to_target: answer
doc_to_choice: choices
"""


def make_tasks(folder: Path, count: int) -> Path:
    subprocess.run([sys.executable, str(OFFLINE_TASKS), str(folder), str(count)], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the data of tasks lies once it is read, for all tests."""
    return tmp_path_factory.mktemp("datasets")


@pytest.fixture(autouse=True)
def data_cache(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(built))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tasks(tmp_path_factory.mktemp("tasks"), 20)


@pytest.fixture
def tasks(made: Path, tmp_path: Path) -> Path:
    """A folder of tasks for one test; the data lies in `made`."""
    return Path(shutil.copytree(made, tmp_path / "tasks"))


def items_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@torch.inference_mode()
def naive_accuracy(folder: Path, file: Path) -> float:
    """Share of items whose own continuation has the highest sum of log-likelihoods, computed one by one."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    right = []
    for item in items_of(file):
        sums = []
        for choice in item["choices"]:
            start_ = len(tokenizer(item["context"]).input_ids)
            ids = tokenizer(item["context"] + " " + choice).input_ids
            logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            sums.append(sum(float(logs[place - 1, ids[place]]) for place in range(start_, len(ids))))
        right.append(sums.index(max(sums)) == item["answer"])
    return fmean(right)


def evaluated(command: CommandLine, *words: str | Path) -> dict[str, Any]:
    answer = command("evaluate", *words, "--json")
    assert answer.code == 0, answer.err
    found: dict[str, Any] = json.loads(answer.out)
    return found


def accuracies(found: dict[str, Any], model: str) -> dict[str, float]:
    return {task["task"]: task["scores"][model]["acc"]["value"] for task in found["tasks"]}


# --- what the scores are


@pytest.mark.slow
def test_a_configuration_and_the_folder_made_from_it(
    done: Path, tasks: Path, tmp_path: Path, command: CommandLine
) -> None:
    config, sparse = done / "tiny.best.json", tmp_path / "sparse"
    found = evaluated(command, "--config", config, "--tasks", f"{tasks}/")
    assert command("apply", "--config", config, "--out", sparse).code == 0
    applied = evaluated(command, sparse, "--tasks", f"{tasks}/")
    dense = evaluated(command, done / "model", "--tasks", f"{tasks}/")
    for task, other in zip(found["tasks"], applied["tasks"], strict=True):
        assert task["scores"]["best"] == other["scores"]["model"]
    assert accuracies(found, "dense") == accuracies(dense, "model")
    for folder, model in ((done / "model", "dense"), (sparse, "best")):
        naive = {f"offline_{name}": naive_accuracy(folder, tasks / f"{name}.test.jsonl") for name in ("far", "near")}
        assert accuracies(found, model) == pytest.approx(naive)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of lm-eval's own modules
def test_lm_eval_reads_a_packed_folder_as_the_sparse_one(
    done: Path, tasks: Path, tmp_path: Path, command: CommandLine
) -> None:
    sparse, packed = tmp_path / "sparse", tmp_path / "packed"
    assert command("apply", "--config", done / "tiny.best.json", "--out", sparse).code == 0
    assert command("pack", sparse, "--out", packed).code == 0
    assert json.loads((packed / "config.json").read_text())["model_type"] == "atp_sparse"

    def scores(folder: Path) -> dict[str, Any]:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager

        found = simple_evaluate(
            "hf", {"pretrained": str(folder), "dtype": "float32", "prefix_token_id": 0}, device="cpu",
            tasks=["offline_far", "offline_near"], bootstrap_iters=0,
            task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        )  # fmt: skip
        assert found
        return {
            name: [float(answer[0]) for sample in samples for answer in sample["filtered_resps"]]
            for name, samples in found["samples"].items()
        }

    before, after = scores(sparse), scores(packed)
    assert {name: len(values) for name, values in after.items()} == {"offline_far": 80, "offline_near": 80}
    for name, values in before.items():
        assert after[name] == pytest.approx(values, rel=1e-5)


@pytest.mark.slow
def test_scores_are_stored_and_shown(done: Path, tasks: Path, command: CommandLine) -> None:
    config = done / "tiny.best.json"
    answer = command("evaluate", "--config", config, "--tasks", f"{tasks}/far.yaml, {tasks}/near.yaml", "--limit", "2")
    assert answer.code == 0, answer.err
    pruner = read_config(config).plan.method
    assert answer.out.startswith(f"reading the tasks\ndense\nuniform {pruner} uniform\nbest {pruner} ")
    assert answer.out.endswith(f"stored in {config} and on study tiny\n")
    assert answer.err == ""
    found = read_config(config).zero_shot
    assert found
    assert [(task.task, task.items, task.metric) for task in found.tasks] == [
        ("offline_far", 2, "acc"), ("offline_near", 2, "acc")
    ]  # fmt: skip
    assert stored(done).user_attrs["zero_shot"] == {str(read_config(config).trial): found.model_dump(mode="json")}
    first = next(line for line in answer.out.splitlines() if line.startswith("| offline_far"))
    shown = f"{found.tasks[0].scores['dense']['acc'].value:.1%} ± "
    assert shown in first
    assert "zero-shot accuracy: dense " in command("status", "--study", done / "tiny.toml").out
    for kind in ("html", "md", "json"):
        file = done / f"report.{kind}"
        assert command("report", "--study", done / "tiny.toml", "--out", file).code == 0
        text = file.read_text(encoding="utf-8")
        assert (shown in text) if kind != "json" else json.loads(text)["studies"][0]["zero_shot"]["limit"] == 2


@pytest.mark.slow
def test_progress_counts_every_answer_of_every_model(done: Path, tasks: Path) -> None:
    config, events = read_config(done / "tiny.best.json"), list[Event]()
    evaluate(config, TaskOptions((f"{tasks}/far.yaml",), 1, None, 2), Place(done, "cpu", watch=events.append))
    steps = [event for event in events if isinstance(event, Step) and event.phase == "answer"]
    assert [(step.done, step.total) for step in steps] == [(done, 4) for _ in range(3) for done in range(1, 5)]


@pytest.mark.slow
def test_it_prunes_in_the_batches_of_the_trial(done: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, seen, step = read_config(done / "tiny.best.json"), set(), Pass.step
    monkeypatch.setitem(replay.TOKENS, "cpu", 2 * TOKENS)  # a machine whose own are smaller

    def noted(self: Pass, *more: Any) -> Any:
        seen.add(self.batch.windows)
        return step(self, *more)

    monkeypatch.setattr(Pass, "step", noted)
    evaluate(config, TaskOptions((f"{tasks}/far.yaml",), 1, None, 1), Place(done, "cpu"))
    assert seen == {config.batches["calibration"]} == {8}


@pytest.mark.slow
def test_examples_before_each_item(done: Path, tasks: Path, command: CommandLine) -> None:
    words = (done / "model", "--tasks", f"{tasks}/far.yaml", "--limit", "2")
    found = [evaluated(command, *words, "--num-fewshot", str(shots)) for shots in (0, 2, 2)]
    assert [one["tasks"][0]["num_fewshot"] for one in found] == [0, 2, 2]
    assert found[1]["tasks"] == found[2]["tasks"]
    norms = [one["tasks"][0]["scores"]["model"] for one in found]
    assert set(norms[0]) == {"acc", "acc_norm"}


@pytest.mark.slow
def test_no_program_is_asked_about_the_machine(done: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def noted(process: Any, *words: Any, **options: Any) -> None:
        asked.append(words)
        begin(process, *words, **options)

    begin, asked = subprocess.Popen.__init__, list[Any]()
    monkeypatch.setattr(subprocess.Popen, "__init__", noted)
    evaluate_folder(done / "model", TaskOptions((f"{tasks}/far.yaml",), 1, None, 1), Place(done, "cpu"))
    assert asked == []


@pytest.mark.slow
def test_a_group_has_one_row(done: Path, tasks: Path, command: CommandLine) -> None:
    (tasks / "group.yaml").write_text(
        "group: both\ntask: [offline_far, offline_near]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )
    words = (done / "model", "--limit", "5", "--tasks")
    alone = accuracies(evaluated(command, *words, f"{tasks}/far.yaml,{tasks}/near.yaml"), "model")
    grouped = evaluated(command, *words, f"{tasks}/")
    assert accuracies(grouped, "model") == {"both": pytest.approx(fmean(alone.values()))}
    assert grouped["tasks"][0]["items"] == 10


def test_statistics_by_hand() -> None:
    ours, base = [1.0, 1.0, 0.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0, 1.0]
    found = difference(ours, base)
    assert found
    cells = [0, 1, 0, 1, -1] * 2 + [0, 0, 1, -1]  # half an item is added to each kind of pair
    assert (found.value, found.stderr) == pytest.approx((0.2, pstdev(cells) / 7**0.5))
    found = difference([2.0, 3.0, 5.0], [1.0, 1.0, 1.0])
    assert found and (found.value, found.stderr) == pytest.approx((7 / 3, stdev([1, 2, 4]) / 3**0.5))
    assert difference([1.0], [0.0]) is None
    assert difference(ours, base[:-1]) is None
    both = mean_of_tasks([TaskScore(value=0.2, stderr=0.03), TaskScore(value=0.6, stderr=0.04)])
    assert (both.value, both.stderr) == (pytest.approx(0.4), pytest.approx(math.sqrt(0.03**2 + 0.04**2) / 2))
    assert mean_of_tasks([TaskScore(value=0.2, stderr=0.03), TaskScore(value=0.6, stderr=0)]).stderr == 0


# --- where the weights lie


@pytest.mark.slow
def test_copies_in_host_memory_and_streamed_blocks_score_the_same(
    done: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = read_config(done / "tiny.best.json")
    asked = TaskOptions((f"{tasks}/far.yaml",), 2, None, 4)
    usual = evaluate(config, asked, Place(done, "cpu"))
    monkeypatch.setattr(observers, "ROOM", 0)
    assert evaluate(config, asked, Place(done, "cpu")).tasks == usual.tasks
    monkeypatch.setenv("ATP_TUNE_DEVICE_MEMORY", "100kB")
    assert evaluate(config, asked, Place(done, "cpu")).tasks == usual.tasks


def test_the_dense_model_stays_as_it_is(done: Path) -> None:
    config = read_config(done / "tiny.best.json")
    texts = {"calibration": config.calibration}
    context = Session.open(Setup(config.model.model(), config.prune, texts, Place(done, "cpu")))
    before = {
        name: (tensor.data_ptr(), tensor.clone()) for name, tensor in context.checkpoint.model.state_dict().items()
    }
    plan = plan_of(config, context)
    ids = torch.arange(12)[None]
    dense = context.checkpoint.model(ids).logits
    [weights_of] = context.measure(plan, [Kept("evaluate", "evaluate DIR")])
    with context.replay.whole(weights_of) as model:
        assert not torch.equal(model(ids).logits, dense)
    assert torch.equal(context.checkpoint.model(ids).logits, dense)
    after = context.checkpoint.model.state_dict()
    assert all(
        after[name].data_ptr() == place and torch.equal(after[name], was) for name, (place, was) in before.items()
    )


@pytest.mark.slow
def test_the_model_is_let_go_of(done: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    released, original = [], Checkpoint.release

    def release(checkpoint: Checkpoint) -> None:
        original(checkpoint)
        released.append(len(list(checkpoint.model.parameters())))

    monkeypatch.setattr(Checkpoint, "release", release)
    asked = TaskOptions((f"{tasks}/far.yaml",), 1, None, 4)
    evaluate(read_config(done / "tiny.best.json"), asked, Place(done, "cpu"))
    evaluate_folder(done / "model", asked, Place(done, "cpu"))
    assert released == [0, 0]


@pytest.mark.slow
def test_no_room_for_a_pruned_copy(
    done: Path, tasks: Path, command: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(observers, "ROOM", 0)
    monkeypatch.setattr(observers, "host_memory", lambda: 1000)
    answer = command("evaluate", "--config", done / "tiny.best.json", "--tasks", f"{tasks}/far.yaml", "--limit", "1")
    assert answer.error.endswith("write it with `apply`, then evaluate DIR")


# --- data that cannot be had


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", NOWHERE)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", NOWHERE)


@pytest.mark.slow
def test_a_task_without_its_data_is_named_and_the_others_run(
    done: Path, tasks: Path, command: CommandLine, no_hub: None
) -> None:
    (tasks / "away.yaml").write_text(ELSEWHERE.format(name="away", path="org/away"))
    (tasks / "wrong.yaml").write_text(ELSEWHERE.format(name="wrong", path="json"))
    answer = command("evaluate", done / "model", "--tasks", f"{tasks}/", "--limit", "2")
    assert answer.code == 0, answer.err
    lines = answer.out.splitlines()
    away = "away: left out, its data is not in the cache, and the hub is out of reach"
    assert away in lines[: lines.index(str(done / "model"))]  # before the model is loaded
    assert any(line.startswith("wrong: left out, ") for line in lines)
    assert "offline_far" in answer.out


@pytest.mark.slow
def test_nothing_to_run_is_one_line(
    done: Path, tmp_path: Path, command: CommandLine, no_hub: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the hub is not asked again and again, as its client would by itself, for 23 seconds."""
    (tmp_path / "away.yaml").write_text(ELSEWHERE.format(name="away", path="org/away"))
    naps = list[float]()
    monkeypatch.setattr(time, "sleep", naps.append)
    answer = command("evaluate", "--config", done / "tiny.best.json", "--tasks", tmp_path / "away.yaml")
    assert answer.error == (
        f"--tasks: the hub is out of reach, and the cache has no data for {tmp_path}/away.yaml; run this once where "
        "there is a network and bring its HF_HOME along, or give tasks of your own: --tasks FOLDER/"
    )
    assert sum(naps) < 5


@pytest.mark.slow
def test_data_comes_from_the_hub(
    done: Path, tasks: Path, tmp_path: Path, hub: tuple[Path, list[str]], command: CommandLine
) -> None:
    data = hub[0] / "datasets" / "org" / "here"
    data.mkdir(parents=True)
    shutil.copyfile(tasks / "far.test.jsonl", data / "test.jsonl")
    (tmp_path / "here.yaml").write_text(ELSEWHERE.format(name="here", path="org/here"))
    words = (done / "model", "--limit", "5", "--tasks")
    found = evaluated(command, *words, tmp_path / "here.yaml")
    local = evaluated(command, *words, tasks / "far.yaml")
    assert accuracies(found, "model")["here"] == accuracies(local, "model")["offline_far"]
    assert any("org/here" in path for path in hub[1])


@pytest.fixture(scope="module")
def index() -> Any:
    """Of all tasks that lm-eval has, which takes seconds to read; to be read only."""
    from atp_tune.scores import tasks

    with tasks.quiet(*tasks.LIBRARIES):
        return tasks.TaskManager(include_path=[], include_defaults=True)


@pytest.fixture
def known_index(index: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from atp_tune.scores import tasks

    def known(*, include_path: list[Path], include_defaults: bool) -> Any:
        assert (include_path, include_defaults) == ([], True)
        return index

    monkeypatch.setattr(tasks, "TaskManager", known)


@pytest.mark.slow
def test_the_seven_without_a_hub(command: CommandLine, no_hub: None, known_index: None) -> None:
    answer = command("evaluate", ROOT / "tests", "--tasks", "zero-shot")
    assert answer.error.startswith(
        "--tasks: the hub is out of reach, and the cache has no data for boolq, piqa, hellaswag, winogrande, arc_easy, "
        "arc_challenge, openbookqa; "
    )


# --- what is wrong on the command line


@pytest.mark.slow
def test_an_unknown_name_is_told_with_close_ones(done: Path, command: CommandLine, known_index: None) -> None:
    answer = command("evaluate", done / "model", "--tasks", "helaswag")
    assert answer.error.startswith("--tasks helaswag: lm-eval has no such task or group; did you mean hellaswag or ")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["model", "--tasks", "none/"], "--tasks none/: there is no such folder and no such .yaml file"),
        (["model", "--tasks", "x.yaml"], "--tasks x.yaml: there is no such folder and no such .yaml file"),
        (["model", "--tasks", "model/"],
         "--tasks model: holds no task, that is no .yaml file with the keys task and dataset_path"),
        (["none"], "none: there is no such folder"),
        (["model", "--tasks", " , "], "--tasks: names no task"),
        (["--config", "none.json"],
         "none.json: No such file or directory; write one with: python tune.py export --study NAME"),
        (["--config", "tiny.best.json", "--storage", "sqlite:///none.db"],
         "--storage sqlite:///none.db: has no study tiny whose trial"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(
    words: list[str], expected: str, done: Path, command: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(done)
    assert command("evaluate", *words).error.startswith(expected)


def test_lm_eval_is_an_extra(done: Path, command: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    answer = command("evaluate", done / "model")
    assert answer.error == f"evaluate: lm-eval is not installed; run: {install('eval')}"


# --- the tasks; tests/test_smollm2.py has the real model


@pytest.mark.slow
def test_offline_tasks_are_the_same_each_time_and_fair(made: Path, tmp_path: Path) -> None:
    again = make_tasks(tmp_path / "again", 20)
    for name in ("far", "near"):
        items = items_of(made / f"{name}.test.jsonl")
        assert items == items_of(again / f"{name}.test.jsonl")
        assert len({item["context"] for item in items}) == 20
        assert all(len(set(item["choices"])) == 4 for item in items)
        assert {item["answer"] for item in items} == {0, 1, 2, 3}
        assert not {item["context"] for item in items_of(made / f"{name}.train.jsonl")} & {x["context"] for x in items}
