import json
import math
import os
import subprocess
import sys
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
import torch
from tinystudy import CommandLine, stored
from transformers import AutoModelForCausalLM, AutoTokenizer

from atp_tune.config import Measure, read_config
from atp_tune.zeroshot import compared, difference, mean

OFFLINE_TASKS = Path(__file__).parents[1] / "scripts" / "offline-tasks"


def make_tasks(folder: Path, count: int) -> Path:
    subprocess.run([sys.executable, str(OFFLINE_TASKS), str(folder), str(count)], check=True, capture_output=True)
    return folder


@pytest.fixture(autouse=True)
def data_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tasks(tmp_path_factory.mktemp("tasks"), 20)


@torch.inference_mode()
def naive_choices(folder: Path, file: Path) -> list[bool]:
    """Whether the continuation with the highest summed log-likelihood is the right one, item by item."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    right = []
    for line in file.read_text().splitlines():
        item = json.loads(line)
        sums = []
        for choice in item["choices"]:
            start = len(tokenizer(item["context"]).input_ids)
            ids = tokenizer(item["context"] + " " + choice).input_ids
            logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            sums.append(sum(float(logs[place - 1, ids[place]]) for place in range(start, len(ids))))
        right.append(sums.index(max(sums)) == item["answer"])
    return right


def evaluated(command: CommandLine, *words: str | Path) -> dict[str, Any]:
    answer = command("evaluate", *words, "--json")
    assert answer.code == 0, answer.err
    found: dict[str, Any] = json.loads(answer.out)
    return found


def accuracies(found: dict[str, Any], model: str) -> dict[str, float]:
    return {task["task"]: task["scores"][model]["acc"]["value"] for task in found["tasks"]}


def test_a_configuration_and_the_folder_made_from_it(
    done: Path, tasks: Path, tmp_path: Path, command: CommandLine
) -> None:
    config = done / "tiny.best.json"
    found = evaluated(command, "--config", config, "--tasks", f"{tasks}/")
    assert command("apply", "--config", config, "--out", tmp_path / "sparse").code == 0
    applied = evaluated(command, "--model", tmp_path / "sparse", "--tasks", f"{tasks}/")
    dense = evaluated(command, "--model", done / "model", "--tasks", f"{tasks}/")
    for task, other in zip(found["tasks"], applied["tasks"], strict=True):
        assert task["scores"]["best"] == other["scores"]["model"]
    assert accuracies(found, "dense") == accuracies(dense, "model")
    for folder, model in ((done / "model", "dense"), (tmp_path / "sparse", "best")):
        naive = {f"offline_{name}": fmean(naive_choices(folder, tasks / f"{name}.test.jsonl")) for name in ("far", "near")}
        assert accuracies(found, model) == pytest.approx(naive)
    kept = read_config(config).zero_shot
    assert kept
    assert json.loads(kept.model_dump_json()) == found
    assert stored(done).user_attrs["zero_shot"] == {str(read_config(config).trial): found}
