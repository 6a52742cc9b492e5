"""`export` in formats of others, and that what they do with it is what `apply` does."""

import json
import os
import re
import subprocess
import venv
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from byhand import ByHand
from expect import parametrize, refusal, refused, slow
from families import few
from plans import planned
from processes import output
from safetensors.torch import load_file
from test_config import config
from tinystudy import BLOCKS, CommandLine, quiet, stored, study_file
from torch import Tensor

from atp_tune.api.pruning import prune_study
from atp_tune.config.best import Config, read_config
from atp_tune.config.prune import PruneConfig
from atp_tune.events import ignore_events
from atp_tune.folders.exporting import FORMATS, as_csv, as_recipe, as_yaml
from atp_tune.inputs.windows import token_windows
from atp_tune.plan import Plan
from atp_tune.pruners.settings import SparseGPTSettings, WandaSettings

DOCS = Path(__file__).parents[1] / "docs" / "formats.md"
NAMES = (("attn.q", "mlp.up"), ("attn.q", "mlp.up"), ("mlp.up",))


def by_linear(pruner: str = "sparsegpt") -> dict[str, Any]:
    rows = (0.5, 0.6), (0.55, 0.65), (0.7,)
    return {"plan": planned(pruner, "curve", (0.575, 0.6, 0.625), None, rows), "linears": NAMES}


def by_block(pruner: str, *sparsities: float) -> Plan:
    return planned(pruner, "atp", sparsities or (0.575, 0.6, 0.625), {"beta": 0.0125})


def recipe(**changes: Any) -> Any:
    """The modifiers of a recipe, as another program reads it."""
    return list(yaml.safe_load(as_recipe(config(**changes)))["sparsity_stage"].values())


# --- the command


@slow
@parametrize("kind", FORMATS)
def test_a_study_and_its_configuration_give_the_same_file(kind: str, done: Path, command: CommandLine) -> None:
    ending = FORMATS[kind][0]
    config, made = done / "tiny.best.json", done / f"tiny.best{ending}"
    trial = next(trial.number for trial in stored(done).trials if trial.params["pruner"] == "wanda")
    words = ("export", "--study", done / "tiny.toml", "--trial", str(trial), "--out")
    assert command(*words, made, "--format", kind).out == f"{made}\n"
    one = made.read_bytes()
    made.unlink()
    assert command(*words, config).out == f"{config}\n"
    assert command("export", "--config", done / "tiny.best.json", "--format", kind).out == f"{made}\n"
    assert made.read_bytes() == one
    (done / "sub").mkdir()
    out = done / "sub" / f"x{ending}"
    assert command("export", "--config", done / "tiny.best.json", "--out", out).out == f"{out}\n"
    assert out.read_bytes() == one or (kind == "json" and read_config(out).folder == "..")


# --- tables


@parametrize("make", [as_csv, as_yaml, as_recipe])
@parametrize("name", ["=1+1", "+1", "a\nb", "a,b", "@x", "- x: &a", ""])
def test_a_name_that_no_module_has(make: Callable[[Config], str], name: str) -> None:
    """A spreadsheet takes some for formulas."""
    for changed in ({"blocks": name}, {**by_linear(), "linears": ((name, "b"), *NAMES[1:])}):
        with refused("is not the name of a module"):
            make(config(**changed))


# --- recipes


def test_a_recipe_by_linear_and_by_number() -> None:
    (one,) = recipe(**by_linear("wanda"))
    assert one["WandaPruningModifier"]["sparsity"] == [0.5, 0.6, 0.55, 0.65, 0.7]
    assert one["WandaPruningModifier"]["targets"][-1] == "model.layers.2.mlp.up"
    mixed = recipe(plan=by_block("wanda", 0.5, 0.0, 0.5, 0.75), prune=PruneConfig(pattern="mixed:4"))
    assert [modifier["WandaPruningModifier"] for modifier in mixed] == [
        {"sparsity": 0.5, "mask_structure": "2:4", "targets": ["model.layers.0", "model.layers.2"]},
        {"sparsity": 0.75, "mask_structure": "3:4", "targets": ["model.layers.3"]},
    ]
    groups = recipe(
        prune=PruneConfig(pattern="2:4", sparsegpt=SparseGPTSettings(columns=30)),
        plan=by_block("sparsegpt", 0.5, 0.5, 0.5),
    )
    assert groups[0]["SparseGPTModifier"]["block_size"] == 28


@parametrize(
    ("changes", "reason"),
    [
        (
            {"plan": by_block("magnitude")},
            "pruner = magnitude: llm-compressor has a modifier for",
        ),
        (
            {"plan": by_block("wanda"), "prune": PruneConfig(wanda=WandaSettings(compare="row-variant"))},
            "compares scores of a row",
        ),
        ({"plan": by_block("sparsegpt", 0.5, 1.0, 0.6)}, "cannot zero a whole matrix by SparseGPT"),
        ({**by_linear(), "linears": (("a[0]", "a[1]"), *NAMES[1:])}, "has no name for a single expert"),
    ],
)
def test_what_a_recipe_cannot_say(changes: Any, reason: str) -> None:
    assert reason in refusal(as_recipe, config(**changes))


# --- what others do with it


def example() -> str:
    """The code of docs/formats.md that reads a table."""
    blocks = [block for block in re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL) if "csv" in block]
    assert len(blocks) == 1
    assert len(blocks[0].splitlines()) <= 12
    return blocks[0]


@slow
@parametrize("allocation", few(["atp", "er"], ["er"]))
def test_the_example_of_the_docs(allocation: str, done: Path, tmp_path: Path, command: CommandLine) -> None:
    """Its rows lose what magnitude pruning by hand takes from each row."""
    file = study_file(done, f"allocation.names=['{allocation}']", "prune.pruners=['magnitude']")
    with quiet():
        plan, _ = prune_study(file, {"beta": 0.05} if allocation == "atp" else {}, tmp_path / "sparse", ignore_events)
    about = tmp_path / "sparse" / "atp_tune.json"
    command.ok("export", "--config", about, "--out", tmp_path / "best.csv")
    code = example().replace("smol.best.csv", str(tmp_path / "best.csv")).replace("DENSE", str(done / "model"))
    names: dict[str, Any] = {}
    exec(code, names)  # the docs' own words
    by_hand, found = ByHand(done), names["model"].model.layers
    for block in range(BLOCKS):
        sparsities = [level.amount for level in plan.of(block, 7)]
        modules = [module for module in found[block].modules() if isinstance(module, torch.nn.Linear)]
        for dense, linear, sparsity in zip(by_hand.linears(block), modules, sparsities, strict=True):
            for row, original in zip(linear.weight, dense.weight, strict=True):
                gone = original.abs().argsort(stable=True)[: int(len(row) * sparsity)]
                assert torch.equal(row, original.index_fill(0, gone, 0))


WAYS: dict[str, tuple[dict[str, float], list[str], dict[str, Any]]] = {
    "wanda": ({"beta": 0.05}, [], {}),
    "wanda, dense statistics": ({"beta": 0.05}, ["prune.statistics=dense"], {"propagate_error": False}),
    "wanda, sequential": ({"beta": 0.05}, ["prune.statistics=sequential"], {"sequential_targets": ["Linear"]}),
    "wanda, curve": ({"beta": 0.03, "split": 0.05}, ["allocation.names=['curve']"], {}),
    "wanda, er": ({}, ["allocation.names=['er']"], {}),
    "wanda, 2:4": ({}, ["allocation.names=['uniform']", "prune.pattern=2:4", "sparsity=0.5"], {}),
    "wanda, mixed:8": ({"beta": 0.1}, ["prune.pattern=mixed:8"], {}),
    "sparsegpt": ({"beta": 0.05}, ["prune.pruners=['sparsegpt']", "prune.sparsegpt.columns=16"], {}),
    "sparsegpt, mixed:8": ({"beta": 0.1}, ["prune.pruners=['sparsegpt']", "prune.pattern=mixed:8"], {}),
}


@pytest.fixture
def llmcompressor() -> Iterator[Path]:
    """By hand: the Python that is named, or a new environment, since llm-compressor pins what we don't."""
    named = os.environ.get("ATP_TUNE_LLMCOMPRESSOR")
    if not named:
        pytest.skip("installs 1.5 GB: ATP_TUNE_LLMCOMPRESSOR=install, or the Python that has llm-compressor")
    if named != "install":
        yield Path(named)
        return
    with TemporaryDirectory(dir="/var/tmp") as folder:  # 1.5 GB, too much for memory
        venv.create(folder, with_pip=True)
        python = Path(folder) / "bin" / "python"
        subprocess.run([python, "-m", "pip", "install", "-q", "--no-compile", "llmcompressor>=0.14"], check=True)
        yield python


def run_theirs(python: Path, jobs: list[Any], model: Path, windows: Path) -> None:
    """Has llm-compressor make what the jobs say of a model, with its calibration windows."""
    file = windows.with_name("jobs.json")
    file.write_text(json.dumps(jobs))
    output(python, Path(__file__).with_name("llmcompress.py"), model, windows, file)


@slow
def test_llm_compressor_prunes_as_apply_does(
    done: Path, tmp_path: Path, command: CommandLine, llmcompressor: Path
) -> None:
    jobs, windows = [], tmp_path / "windows.npy"
    for way, (parameters, overrides, arguments) in WAYS.items():
        file, out = study_file(done, "prune.pruners=['wanda']", *overrides), tmp_path / way
        with quiet():
            prune_study(file, parameters, out, ignore_events)
        command.ok("export", "--config", out / "atp_tune.json", "--format", "llm-compressor")
        made = out / "atp_tune.recipe.yaml"
        assert all(f"{key}={value}".replace("'", '"') in made.read_text() for key, value in arguments.items())
        options = {"pipeline": "sequential", **arguments}
        jobs.append({"recipe": str(made), "out": str(tmp_path / f"{way}.theirs"), "arguments": options})
        np.save(windows, token_windows(file.study.texts.calibration, done / "model", done).ids)
    run_theirs(llmcompressor, jobs, done / "model", windows)
    for way in WAYS:
        ours, theirs = load_file(tmp_path / way / "model.safetensors"), load_file(tmp_path / f"{way}.theirs")
        pruned = [name for name in ours if name.endswith("_proj.weight")]
        assert len(pruned) == 7 * BLOCKS
        for name in pruned:
            check_same(way, ours[name], theirs[name])


def check_same(way: str, ours: Tensor, theirs: Tensor) -> None:
    """Wanda: the same weights. SparseGPT: one zero more in each block of columns, in groups the same zeros."""
    if way.startswith("wanda"):
        assert torch.equal(ours, theirs)
    elif way.endswith("8"):
        assert torch.equal(ours == 0, theirs == 0)
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)
    else:
        columns = [(part == 0).sum() for part in theirs.split(16, 1)]
        assert columns == [(part == 0).sum() + 1 for part in ours.split(16, 1)]


@slow
@parametrize("symmetric", [False, True])
def test_llm_compressor_rounds_as_apply_does(
    place: Path, tmp_path: Path, command: CommandLine, llmcompressor: Path, symmetric: bool
) -> None:
    """The same bits, of RTN and GPTQ, also with the columns in the order of their inputs."""
    rounds = f"[quantize]\ngroup_size = 16\nsymmetric = {str(symmetric).lower()}\n"
    toml = (place / "tiny.toml").read_text().replace("sparsity = 0.6", "bits = 3.5")
    (place / "tiny.toml").write_text(f"{toml}\n{rounds}")
    jobs, windows = [], tmp_path / "windows.npy"
    ways = {"rtn": ("rtn", "false", 0.1), "gptq": ("gptq", "false", -0.1), "ordered": ("gptq", "true", -0.1)}
    for way, (name, order, beta) in ways.items():
        file, out = study_file(place, f"quantize.quantizers=['{name}']", f"quantize.act_order={order}"), tmp_path / way
        with quiet():
            prune_study(file, {"beta": beta}, out, ignore_events)
        command.ok("export", "--config", out / "atp_tune.json", "--format", "llm-compressor")
        recipe, theirs = str(out / "atp_tune.recipe.yaml"), str(tmp_path / f"{way}.theirs")
        jobs.append({"recipe": recipe, "out": theirs, "arguments": {"pipeline": "sequential"}})
        np.save(windows, token_windows(file.study.texts.calibration, place / "model", place).ids)
    run_theirs(llmcompressor, jobs, place / "model", windows)
    for way in ways:
        ours, theirs_ = load_file(tmp_path / way / "model.safetensors"), load_file(tmp_path / f"{way}.theirs")
        rounded = [key for key in ours if key.endswith("_proj.weight")]
        assert len(rounded) == 7 * BLOCKS
        for key in rounded:
            assert torch.equal(ours[key], theirs_[key]), (way, key)
    ordered, plain = (load_file(tmp_path / way / "model.safetensors") for way in ("ordered", "gptq"))
    assert not all(torch.equal(ordered[key], plain[key]) for key in rounded)
