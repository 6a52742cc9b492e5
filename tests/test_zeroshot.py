import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import fmean, pstdev, stdev
from typing import Any

import pytest
import torch
from expect import slow
from test_models import write_gguf
from tinystudy import TOKENS, CommandLine, stored
from transformers import AutoModelForCausalLM, AutoTokenizer

from atp_tune.blocks import replay
from atp_tune.blocks.prune_pass import Pass
from atp_tune.checkpoints.convert import gguf_folder
from atp_tune.config.best import read_config
from atp_tune.events import Place, silent
from atp_tune.folders.comparing import TaskOptions, evaluate
from atp_tune.measures import TaskScore, difference, mean_of_tasks
from atp_tune.run import observers

ROOT = Path(__file__).parents[1]
OFFLINE_TASKS = ROOT / "scripts" / "offline-tasks"


def make_tasks(folder: Path) -> Path:
    subprocess.run([sys.executable, str(OFFLINE_TASKS), str(folder), "20"], check=True, capture_output=True)
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
    return make_tasks(tmp_path_factory.mktemp("tasks"))


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
    answer = command.ok("evaluate", *words, "--json")
    found: dict[str, Any] = json.loads(answer.out)
    return found


def accuracies(found: dict[str, Any], model: str) -> dict[str, float]:
    return {task["task"]: task["scores"][model]["acc"]["value"] for task in found["tasks"]}


# --- what the scores are


@slow
def test_a_configuration_and_the_folder_made_from_it(
    done: Path, tasks: Path, tmp_path: Path, command: CommandLine
) -> None:
    config, sparse = done / "tiny.best.json", tmp_path / "sparse"
    found = evaluated(command, "--config", config, "--tasks", f"{tasks}/")
    command.ok("apply", "--config", config, "--out", sparse)
    applied = evaluated(command, sparse, "--tasks", f"{tasks}/")
    dense = evaluated(command, done / "model", "--tasks", f"{tasks}/")
    for task, other in zip(found["tasks"], applied["tasks"], strict=True):
        assert task["scores"]["best"] == other["scores"]["model"]
    assert accuracies(found, "dense") == accuracies(dense, "model")
    for folder, model in ((done / "model", "dense"), (sparse, "best")):
        naive = {f"offline_{name}": naive_accuracy(folder, tasks / f"{name}.test.jsonl") for name in ("far", "near")}
        assert accuracies(found, model) == pytest.approx(naive)


@slow
def test_scores_are_stored_and_shown(done: Path, tasks: Path, command: CommandLine) -> None:
    config = done / "tiny.best.json"
    answer = command.ok(
        "evaluate", "--config", config, "--tasks", f"{tasks}/far.yaml, {tasks}/near.yaml", "--limit", "2"
    )
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
        command.ok("report", "--study", done / "tiny.toml", "--out", file)
        text = file.read_text()
        assert (shown in text) if kind != "json" else json.loads(text)["studies"][0]["zero_shot"]["limit"] == 2


@slow
def test_it_prunes_in_the_batches_of_the_trial(done: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, seen, step = read_config(done / "tiny.best.json"), set(), Pass.step
    monkeypatch.setitem(replay.TOKENS, "cpu", 2 * TOKENS)  # a machine whose own are smaller

    def noted(self: Pass, *more: Any) -> Any:
        seen.add(self.batch.windows)
        return step(self, *more)

    monkeypatch.setattr(Pass, "step", noted)
    evaluate(config, TaskOptions((f"{tasks}/far.yaml",), 1, None, 1), Place(done, "cpu"))
    assert seen == {config.batches["calibration"]} == {8}


@slow
def test_examples_before_each_item(done: Path, tasks: Path, command: CommandLine) -> None:
    words = (done / "model", "--tasks", f"{tasks}/far.yaml", "--limit", "2")
    found = [evaluated(command, *words, "--num-fewshot", str(shots)) for shots in (0, 2, 2)]
    assert [one["tasks"][0]["num_fewshot"] for one in found] == [0, 2, 2]
    assert found[1]["tasks"] == found[2]["tasks"]
    assert set(next(one["tasks"][0]["scores"]["model"] for one in found)) == {"acc", "acc_norm"}


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


@slow
def test_a_gguf_file_is_scored_as_its_folder(tasks: Path, tmp_path: Path, command: CommandLine) -> None:
    words = "--tasks", f"{tasks}/far.yaml", "--limit", "4"
    found = evaluated(command, file := write_gguf(tmp_path / "tiny.gguf"), *words)
    folder = evaluated(command, gguf_folder(file, silent), *words)
    assert found["tasks"] == folder["tasks"]


@slow
def test_no_room_for_a_pruned_copy(
    done: Path, tasks: Path, command: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(observers, "ROOM", 0)
    monkeypatch.setattr(observers, "host_memory", lambda: 1000)
    answer = command("evaluate", "--config", done / "tiny.best.json", "--tasks", f"{tasks}/far.yaml", "--limit", "1")
    assert answer.error.endswith("write it with `apply`, then evaluate DIR")


# --- where the weights lie


# --- data that cannot be had


@pytest.fixture(scope="module")
def index() -> Any:
    """Of all tasks that lm-eval has, which takes seconds to read; to be read only."""
    from atp_tune.scores import tasks

    with tasks.quiet(*tasks.LIBRARIES):
        return tasks.TaskManager(include_path=[], include_defaults=True)


# --- what is wrong on the command line


# --- the tasks; tests/test_smollm2.py has the real model


@slow
def test_offline_tasks_are_the_same_each_time_and_fair(made: Path, tmp_path: Path) -> None:
    again = make_tasks(tmp_path / "again")
    for name in ("far", "near"):
        items = items_of(made / f"{name}.test.jsonl")
        assert items == items_of(again / f"{name}.test.jsonl")
        assert len({item["context"] for item in items}) == 20
        assert all(len(set(item["choices"])) == 4 for item in items)
        assert {item["answer"] for item in items} == {0, 1, 2, 3}
        assert not {item["context"] for item in items_of(made / f"{name}.train.jsonl")} & {x["context"] for x in items}
