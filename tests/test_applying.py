import json
import math
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from time import sleep
from typing import Any

import pytest
import torch
from byhand import ByHand
from expect import parametrize, refused, slow
from families import few
from plans import planned
from processes import popen
from safetensors.torch import load_file
from tinystudy import BLOCKS, CommandLine, settings, study_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from atp_tune.api.pruning import prune_study
from atp_tune.config.best import Config, read_config
from atp_tune.errors import TrialError, UserError
from atp_tune.events import Place, ignore_events
from atp_tune.folders import applying
from atp_tune.folders.applying import apply
from atp_tune.measures import Perplexity
from atp_tune.plan import Plan
from atp_tune.run.session import Session
from atp_tune.scores import Scores

pytestmark = pytest.mark.usefixtures("without_warnings")


@pytest.fixture
def config(done: Path) -> Config:
    return read_config(done / "tiny.best.json")


def applied(config: Config, place: Path, out: Path) -> Perplexity:
    return apply(config, out, Place(place / config.folder, "cpu"))


def tensors(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        found |= load_file(shard)
    return found


def block_of(name: str) -> int | None:
    """Index of the block whose linear a tensor is, by its name alone."""
    parts = name.split(".")
    return int(parts[2]) if parts[1] == "layers" and parts[-2].endswith("_proj") else None


def same_bytes(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def check_zeros(folder: Path, source: Path, pruner: str, sparsities: tuple[float, ...]) -> None:
    """Zeros as promised, counted in the files; what was not pruned is the source's, byte for byte."""
    before, after = tensors(source), tensors(folder)
    assert before.keys() == after.keys()
    assert len([name for name in before if block_of(name) is not None]) == 7 * BLOCKS
    for name in before:
        block = block_of(name)
        if block is None:
            assert same_bytes(before[name], after[name])
            continue
        zeros = (after[name] == 0).sum(1)
        if pruner in ("wanda", "dsnot"):
            assert set(zeros.tolist()) == {int(after[name].shape[1] * sparsities[block])}
        else:
            assert int(zeros.sum()) == int(after[name].numel() * sparsities[block])
        if pruner not in ("sparsegpt", "alps"):
            kept = after[name] != 0
            assert torch.equal(after[name][kept], before[name][kept])


# --- apply


@slow
@parametrize("pruner", few(["wanda", "magnitude", "sparsegpt", "dsnot", "alps"], ["wanda"]))
def test_a_sparse_checkpoint_is_what_the_configuration_says(
    pruner: str, done: Path, config: Config, tmp_path: Path
) -> None:
    sparsities = (0.4, 0.47, 0.53, 0.6)
    config = config.model_copy(update={"plan": planned(pruner, "atp", sparsities)})
    measured = applied(config, done, tmp_path / "out")
    check_zeros(tmp_path / "out", done / "model", pruner, sparsities)
    assert measured.value == pytest.approx(math.exp(fmean(ByHand(done, tmp_path / "out").nlls("test"))), rel=1e-5)


@slow
def test_it_loads_as_any_checkpoint_and_keeps_the_promise(done: Path, config: Config, tmp_path: Path) -> None:
    measured = applied(config, done, tmp_path / "new" / "out")
    assert config.scored()
    assert measured.value == pytest.approx(config.scored().value, rel=1e-3)
    out = tmp_path / "new" / "out"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    ids = tokenizer("The quick brown fox", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape == (1, ids.shape[1] + 4)
    by_hand = ByHand(done, out)
    assert math.exp(fmean(by_hand.nlls("test"))) == pytest.approx(config.scored().value, rel=1e-3)
    assert by_hand.zeros() == pytest.approx(config.sparsity.realised)
    check_zeros(out, done / "model", config.plan.method, config.plan.amounts)
    assert {file.name for file in out.iterdir()} == {
        "atp_tune.json", "README.md", *(file.name for file in (done / "model").iterdir())
    }  # fmt: skip
    about = read_config(out / "atp_tune.json")
    assert about.scored() == measured
    scores = {**about.scores, "best": config.scores["best"]}
    assert about.manifest is not None  # tests/test_verifying.py
    changed = {"scores": scores, "folder": config.folder, "manifest": None}
    assert about.model_copy(update=changed) == config
    assert (out / about.folder).resolve() == done
    assert [file.name for file in out.parent.iterdir()] == ["out"]


# --- what is refused, with nothing left behind


def test_a_folder_that_is_replaced_while_it_is_measured_is_left_alone(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was described as this one, with the perplexity of the other."""
    about = tmp_path / "out" / "atp_tune.json"
    other = config.model_copy(update={"trial": 99})

    def replaced(*_: object) -> dict[str, Scores]:
        other.write(about)
        return {"test": {"nlls": [1.0, 2.0]}}

    config.write(about)
    monkeypatch.setattr(applying, "folder_scores", replaced)
    with refused("was replaced while it was measured, and is left as it is"):
        applying.measured_folder(None, tmp_path / "out")  # type: ignore[arg-type]
    assert read_config(about) == other


@parametrize("error", [TrialError("no"), KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_failure_half_way_leaves_nothing(
    error: BaseException, done: Path, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(bench: Session, plan: Plan, grids: bool = False) -> Iterator[Any]:
        for block in prune(bench, plan):
            if block.index == 2:
                raise error
            yield block

    prune, before = Session.prune, sorted(tmp_path.iterdir())
    monkeypatch.setattr(Session, "prune", half)
    with pytest.raises(UserError if isinstance(error, OSError) else type(error)):
        applied(config, done, tmp_path / "out")
    assert [file for file in sorted(tmp_path.iterdir()) if file.name != "cache"] == [
        file for file in before if file.name != "cache"
    ]


# --- prune, without a study


@slow
def test_prune_once_equals_the_trial(done: Path, config: Config) -> None:
    assert config.scored()
    file = study_file(done, f"prune.pruners=['{config.plan.method}']")
    plan, measured = prune_study(file, config.plan.parameters, None, ignore_events)
    assert plan.amounts == config.plan.amounts
    assert (plan.method, plan.allocation) == (config.plan.method, "atp")
    assert measured.value == pytest.approx(config.scored().value, rel=1e-6)
    assert measured.stderr == pytest.approx(config.scored().stderr, rel=1e-4)


# --- memory


MANY = 28  # blocks
# What the C library keeps of freed memory for the next tensor is bounded, and not the model's.
LEAN = "import atp_tune.run.session as b, atp_tune.cli as c; b.reuse_freed_memory = lambda: False; c.main()"


@pytest.fixture(scope="module")
def large(tiny_place: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """The folder of a model of random bf16 numbers in six shards, to be read only; bytes of a block."""
    folder = Path(shutil.copytree(tiny_place / "model", tmp_path_factory.mktemp("large") / "model"))
    shape = LlamaConfig.from_pretrained(folder)
    shape.update({"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": MANY, "head_dim": 256})
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(shape, dtype=torch.bfloat16)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="120MB")
    return folder, sum(tensor.numel() * 2 for tensor in model.model.layers[0].parameters())


def anonymous(process: int) -> int:
    """Bytes that a process holds apart from mapped files; 0 where it is gone."""
    try:
        found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    except OSError:
        return 0
    return 1024 * int(found[1]) if found else 0


@slow
@parametrize("offload", ["disk", "auto"])
def test_a_large_folder_is_written_in_the_memory_of_a_few_blocks(
    offload: str, large: tuple[Path, int], place: Path, tmp_path: Path
) -> None:
    """Written and measured again: the model is not in memory, it lies in mapped files."""
    (model, block), out = large, tmp_path / "sparse"
    shutil.rmtree(place / "model")
    (place / "model").symlink_to(model)
    few = [f"texts.{role}.{key}" for role in ("calibration", "test") for key in ("nsamples=2", "seqlen=8")]
    words = ["prune", "--study", place / "tiny.toml", "--beta", "0.01", "--out", out]
    words += settings(f"model.offload={offload}", "model.dtype=bfloat16", *few)
    heard, held = tmp_path / "heard", {"writing": [0], "checking": [0]}
    with heard.open("wb") as file:
        environment = {**os.environ, "COLUMNS": "300"}
        process = popen([sys.executable, "-c", LEAN, *words], stdout=file, env=environment)
        while process.poll() is None:
            phase = "checking" if b"checking" in heard.read_bytes() else "writing"
            if b"writing" in heard.read_bytes():
                held[phase].append(anonymous(process.pid))
            sleep(0.01)
    assert process.returncode == 0, heard.read_text()
    assert len(list(out.glob("*.safetensors"))) >= 5
    assert len(held["checking"]) > 10
    began = held["writing"][1]
    grown = {phase: max(sizes) - began for phase, sizes in held.items()}
    assert all(sizes < 9 * block < MANY * block / 3 for sizes in grown.values()), (grown, began)


@slow
@parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_folder_in_another_number_format(dtype: str, done: Path, command: CommandLine, tmp_path: Path) -> None:
    """Of a .gguf file of 98 MB the folder had 538 MB, in float32, whatever the study computed in."""
    out = tmp_path / "out"
    words = ("apply", "--config", done / "tiny.best.json", "--device", "cpu", "--dtype", dtype)
    command.ok(*words, "--out", out)
    command.ok("apply", "--verify", out)
    there, source = load_file(out / "model.safetensors"), load_file(done / "model" / "model.safetensors")
    kind = getattr(torch, dtype)
    assert {one.dtype for one in there.values()} == {kind} and there.keys() == source.keys()
    assert all(torch.equal(one[one != 0], source[name].to(kind)[one != 0]) for name, one in there.items())
    assert json.loads((out / "config.json").read_text())["dtype"] == dtype
    assert AutoModelForCausalLM.from_pretrained(out).dtype == kind


@slow
@parametrize("computed", ["bfloat16", "float32"])
def test_a_folder_of_a_gguf_file_is_as_the_study_computed(
    computed: str, done: Path, command: CommandLine, tmp_path: Path
) -> None:
    (done / "model" / "origin.json").write_text('{"file": "tiny.gguf", "sha256": "0"}')  # as a conversion leaves it
    words = ("prune", "--study", done / "tiny.toml", "--beta", "0.01", "--set", f"model.dtype={computed}")
    measured = command(*words, "--device", "cpu")
    written = command(*words, "--device", "cpu", "--out", tmp_path / "out")
    assert measured.code == written.code == 0
    said = [next(line for line in one.out.splitlines() if ": perplexity " in line) for one in (measured, written)]
    assert said[0] == said[1]
    kinds = {one.dtype for one in load_file(tmp_path / "out" / "model.safetensors").values()}
    assert kinds == {getattr(torch, computed)}
