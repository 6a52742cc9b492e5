"""A stranger's code is planted in each key and file by which some could run; it runs where a person says so alone."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from expect import parametrize, refused, slow
from pages import REPO, filled
from test_trust import CODE, change
from tinystudy import CommandLine

import atp_tune
from atp_tune.config.studyfile import load
from atp_tune.storage.fingerprint import facts

PLUGINS = ("--trust-plugins",)
YAML = """\
task: own
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{place}/data.jsonl"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: !function own.text
doc_to_choice: c
doc_to_target: a
metric_list: [{{metric: acc}}]
"""


@dataclass(frozen=True)
class Way:
    """A place for code: what names it, what plants it, and the words that permit it, if any do."""

    key: str
    what: str
    plant: Callable[[Path, str], tuple[str, ...]]  # a reader's folder and the code → the words of the command
    permit: tuple[str, ...] = ()

    @property
    def permits(self) -> str:
        return " ".join(self.permit)


def study(place: Path, *changes: tuple[str, str], more: str = "") -> tuple[str, ...]:
    """The command that runs the study with other lines."""
    text = (place / "tiny.toml").read_text().replace("[allocation]\nbeta = [0.0, 0.1]\n", "")
    for old, new in changes:
        assert re.search(old, text), old
        text = re.sub(old, new, text, count=1)
    (place / "stranger.toml").write_text(text + more)
    return ("--study", str(place / "stranger.toml"), "--trials", "1")


def plugin(table: str) -> Callable[[Path, str], tuple[str, ...]]:
    def plant(place: Path, code: str) -> tuple[str, ...]:
        (place / "own.py").write_text(code)
        return (*study(place), "--set", table)

    return plant


def in_package(place: Path, code: str) -> tuple[str, ...]:
    (place / "on_path" / "strangers").mkdir(parents=True)
    (place / "on_path" / "strangers" / "__init__.py").write_text(code + "\nTEXT = ['a text'] * 400\n")
    return study(place, (r'"file:calibration.txt"', '"package:strangers:TEXT"'))


def in_a_task(name: str) -> Callable[[Path, str], tuple[str, ...]]:
    def plant(place: Path, code: str) -> tuple[str, ...]:
        tasks = place / "tasks"
        tasks.mkdir()
        (tasks / "own.py").write_text(code + "\n\ndef text(doc):\n    return doc['q']\n")
        rows = [json.dumps({"q": f"the {k}", "c": ["a", "b"], "a": k % 2}) for k in range(8)]
        (tasks / "data.jsonl").write_text("\n".join(rows))
        (tasks / "own.yaml").write_text(YAML.format(place=tasks))
        limit = f'sparsity = [0.2, 0.4]\nlimit = {{min_accuracy = {{"{name}" = 0.1}}, items = 4}}'
        return study(place, ("sparsity = 0.[56]", limit))

    return plant


def in_the_model(place: Path, code: str) -> tuple[str, ...]:
    (place / "model" / "modeling_own.py").write_text(code + CODE.format(marker=str(place / "ran")))
    classes = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    change(place / "model" / "config.json", model_type="own", auto_map=classes)
    return study(place, (r"\[model\]", "[model]\ntrust_remote_code = true"))


def in_a_generation_folder(place: Path, code: str) -> tuple[str, ...]:
    (place / "model" / "custom_generate").mkdir()
    (place / "model" / "custom_generate" / "generate.py").write_text(code + "\ndef generate(**_): ...\n")
    change(place / "model" / "config.json", custom_generate="model")
    return study(place)


def in_a_dataset_script(place: Path, code: str) -> tuple[str, ...]:
    (place / "texts").mkdir()
    (place / "texts" / "texts.py").write_text(code)
    return study(place, (r'"file:calibration.txt"', f'"hub:{place}/texts"'))


def in_a_configuration(place: Path, code: str) -> tuple[str, ...]:
    in_package(place, code)
    change(place / "tiny.best.json", calibration=calibration(place) | {"source": "package:strangers:TEXT"})
    return ("apply", "--config", str(place / "tiny.best.json"), "--out", str(place / "out"))


def calibration(place: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((place / "tiny.best.json").read_text())["calibration"]
    return found


OTHERS = "package:MODULE:NAME, not of Python itself"
REMOTE = "--set", "model.trust_remote_code=true"
WAYS = [
    Way("prune.pruners", "FILE.py:NAME", plugin('prune.pruners=["own.py:Own"]'), PLUGINS),
    Way("allocation.names", "FILE.py:NAME", plugin('allocation.names=["own.py:Own"]'), PLUGINS),
    Way("search.sampler", "FILE.py:NAME", plugin('search.sampler="own.py:Own"'), PLUGINS),
    Way("search.score", "FILE.py:NAME", plugin('search.score="own.py:Own"'), PLUGINS),
    Way("texts.ROLE.source", "FILE.py:NAME", plugin('texts.validation.source="own.py:Own"'), PLUGINS),
    Way("texts.ROLE.source, images.ROLE.source", OTHERS, in_package, PLUGINS),
    Way("the same of a configuration", OTHERS, in_a_configuration, PLUGINS),
    Way("limit.min_accuracy", "a task's YAML file", in_a_task("tasks/own.yaml"), PLUGINS),
    Way("limit.min_accuracy", "a folder of tasks", in_a_task("tasks/"), PLUGINS),
    Way("model.trust_remote_code", "true, in the file", in_the_model, REMOTE),
    Way("model.source", "a folder with custom_generate/generate.py", in_a_generation_folder),
    Way("texts.ROLE.source", "a dataset with a script", in_a_dataset_script),
]


@slow
@parametrize("way", WAYS, ids=lambda way: f"{way.key}, {way.what}")
def test_code_in_a_study_runs_only_with_permission(
    way: Way, done: Path, command: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers.dynamic_module_utils

    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    place, ran = done, done / "ran"
    monkeypatch.syspath_prepend(str(place / "on_path"))
    monkeypatch.delitem(sys.modules, "strangers", raising=False)
    words = way.plant(place, f"from pathlib import Path\nPath({str(ran)!r}).touch()\n")
    before = command(*words)
    assert not ran.exists()
    if way.permit:
        assert before.code == 2
        assert way.permits in before.error
        command(*words, *way.permit)
        assert ran.exists()  # so the code that was planted can run


def test_the_page_lists_each_way() -> None:
    permits = [f"`{way.permits}`" if way.permit else "nothing: it never runs" for way in WAYS]
    rows = [f"| {way.key} | {way.what} | {permit} |" for way, permit in zip(WAYS, permits, strict=True)]
    table = "\n".join(["| key | value | what permits it |", "|---|---|---|", *rows])
    filled(REPO / "docs/security.md", "tests/test_permissions.py", table)


def test_in_python_the_permission_is_an_argument(place: Path) -> None:
    """It was called `--set model.trust_remote_code=true`, or `true`, which Python has not."""
    (_, file, *_) = study(place, (r"\[model\]", "[model]\ntrust_remote_code = true"))
    with refused(r'then add settings=\{"model.trust_remote_code": True\}$'):
        atp_tune.tune(file, progress=False)


def test_a_database_permits_no_code(place: Path) -> None:
    """A stored study's settings come from whoever made the database, overrides included."""
    file = load(str(place / "tiny.toml"), ["model.trust_remote_code=true"])
    assert file.permissions["trust_remote_code"]
    stored = json.loads(json.dumps(atp_tune.config.studyfile.settings(file)))
    assert not atp_tune.config.studyfile.from_settings(stored).permissions["trust_remote_code"]


def test_a_task_s_code_is_a_fact_of_the_study(place: Path) -> None:
    file = load(in_a_task("tasks/own.yaml")(place, "")[1])
    before = facts(file.study, file.folder)["plugins.own.content"]
    with (place / "tasks" / "own.py").open("a") as stream:
        stream.write("# changed\n")
    assert facts(file.study, file.folder)["plugins.own.content"] != before
    shutil.rmtree(place / "tasks")
    assert facts(file.study, file.folder)["plugins.own.content"] != before
