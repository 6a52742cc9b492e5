import json
import math
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean
from time import sleep
from typing import Any

import pytest
import torch
from byhand import ByHand
from families import few
from plans import planned
from processes import popen
from safetensors.torch import load_file, save_file
from tinystudy import BLOCKS, CommandLine, quiet, settings, study_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from atp_tune.api.pruning import prune_study
from atp_tune.checkpoints import devices
from atp_tune.config.best import Config, read_config
from atp_tune.errors import TrialError, UserError
from atp_tune.events import Event, Place, TrialStarted, ignore_events
from atp_tune.folders import applying
from atp_tune.folders.applying import apply, cast, declare, plan_of, write_sparse
from atp_tune.measures import Perplexity
from atp_tune.plan import Plan
from atp_tune.run.session import Session, Setup
from atp_tune.scores import Scores


@pytest.fixture(autouse=True)
def without_warnings() -> Iterator[None]:
    with quiet():
        yield


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


def message(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def check_zeros(folder: Path, source: Path, pruner: str, sparsities: tuple[float, ...]) -> None:
    """Zeros as promised, counted in the files; what was not pruned is the source's, byte for byte."""
    before, after = tensors(source), tensors(folder)
    assert before.keys() == after.keys()
    pruned = [name for name in before if block_of(name) is not None]
    assert len(pruned) == 7 * BLOCKS
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


@pytest.mark.slow
@pytest.mark.parametrize("pruner", few(["wanda", "magnitude", "sparsegpt", "dsnot", "alps"], ["wanda"]))
def test_a_sparse_checkpoint_is_what_the_configuration_says(
    pruner: str, done: Path, config: Config, tmp_path: Path
) -> None:
    sparsities = (0.4, 0.47, 0.53, 0.6)
    config = config.model_copy(update={"plan": planned(pruner, "atp", sparsities)})
    measured = applied(config, done, tmp_path / "out")
    check_zeros(tmp_path / "out", done / "model", pruner, sparsities)
    assert measured.value == pytest.approx(math.exp(fmean(ByHand(done, tmp_path / "out").nlls("test"))), rel=1e-5)


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_checkpoint_in_shards_stays_in_shards(done: Path, config: Config, tmp_path: Path) -> None:
    source = done / "model"
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    (source / "model.safetensors").unlink()
    model.save_pretrained(source, max_shard_size="40KB")
    shards = sorted(file.name for file in source.glob("*.safetensors"))
    assert len(shards) > 2
    file = study_file(done, "prune.pruners=['wanda']", "model.dtype=bfloat16")
    plan, _ = prune_study(file, {"beta": 0.04}, tmp_path / "out", ignore_events)
    assert sorted(file.name for file in (tmp_path / "out").glob("*.safetensors")) == shards
    check_zeros(tmp_path / "out", source, "wanda", plan.amounts)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16


@pytest.mark.slow
def test_only_the_file_and_the_model_are_needed(done: Path, tmp_path: Path) -> None:
    """No database, no study file: the JSON moved elsewhere says where its relative paths start."""
    for file in ("tiny.db", "tiny.toml", "validation.txt"):
        (done / file).unlink()
    config = read_config(done / "tiny.best.json")
    assert config.scored()
    assert applied(config, done, tmp_path / "out").value == pytest.approx(config.scored().value, rel=1e-3)


@pytest.mark.slow
def test_the_same_again_is_the_same(done: Path, config: Config, tmp_path: Path) -> None:
    applied(config, done, tmp_path / "one")
    applied(config, done, tmp_path / "two")
    one, two = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    assert all(same_bytes(one[name], two[name]) for name in one)


@pytest.mark.slow
def test_an_empty_folder_is_free(done: Path, config: Config, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    applied(config, done, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.slow
def test_a_folder_is_written_with_one_copy_of_each_block(
    done: Path, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of blocks that lie in host memory: what is dense is read from there, not from the device."""
    texts = {"calibration": config.calibration, "test": config.texts.test}
    model = config.model.model().model_copy(update={"offload": "cpu"})
    bench = Session.open(Setup(model, config.prune, texts, Place(done, "cpu")))
    plan, copied, copy_to = plan_of(config, bench), Counter[int](), devices.copy_to
    assert len(list(bench.prune(plan))) == BLOCKS  # the dense model's states are measured once

    def counted(device: torch.device, tensor: Tensor) -> Tensor:
        copied.update([tensor.data_ptr()])
        return copy_to(device, tensor)

    monkeypatch.setattr(devices, "copy_to", counted)
    write_sparse(bench, plan, tmp_path / "out", config)
    first = {tensor.data_ptr() for tensor in bench.checkpoint.blocks[0].parameters()}
    assert copied.keys() >= {tensor.data_ptr() for tensor in bench.checkpoint.blocks.parameters()} - first
    assert all(times == 1 or place in first for place, times in copied.items())
    assert max(copied[place] for place in first) <= 2  # the pass that would follow is prepared
    check_zeros(tmp_path / "out", done / "model", config.plan.method, config.plan.amounts)


# --- what is refused, with nothing left behind


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_is_there_is_not_overwritten(kind: str, done: Path, config: Config, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if kind == "folder":
        out.mkdir()
    (out / "mine" if kind == "folder" else out).write_text("mine")
    events: list[Event] = []
    said = message(lambda: apply(config, out, Place(done, "cpu", watch=events.append)))
    assert said == f"--out {out}: exists already; choose another folder or remove it"
    assert (out / "mine" if kind == "folder" else out).read_text() == "mine"
    assert events == []  # asked before any work


def edit_weights(place: Path) -> None:
    file = place / "model" / "model.safetensors"
    edited = load_file(file)
    edited["model.norm.weight"][0] += 1
    save_file(edited, file, metadata={"format": "pt"})


@pytest.mark.slow
def test_another_model_is_refused(done: Path, config: Config, tmp_path: Path) -> None:
    edit_weights(done)
    said = message(lambda: applied(config, done, tmp_path / "out"))
    assert said.startswith("model.fingerprint: model is ")
    assert said.endswith(
        f"… here, the configuration was found for {config.model.fingerprint[:12]}…; give it the model of the study"
    )
    assert not (tmp_path / "out").exists()


def test_a_wrong_number_of_blocks_is_refused(done: Path, config: Config, tmp_path: Path) -> None:
    config = config.model_copy(update={"plan": planned("wanda", "atp", (0.5,) * 3)})
    said = message(lambda: applied(config, done, tmp_path / "out"))
    assert said == "plan.levels: 3 for a model of 4 blocks; take the file that a study or `export` wrote"
    assert not (tmp_path / "out").exists()


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
    with pytest.raises(UserError, match="was replaced while it was measured, and is left as it is"):
        applying.measured_folder(None, tmp_path / "out")  # type: ignore[arg-type]
    assert read_config(about) == other


def test_a_place_that_cannot_be_written(done: Path, config: Config, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    said = message(lambda: applied(config, done, tmp_path / "file" / "out"))
    assert said.startswith(f"--out {tmp_path / 'file' / 'out'}: cannot be written: ")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_model_that_is_gone(done: Path, config: Config, tmp_path: Path) -> None:
    shutil.rmtree(done / "model")
    assert 'model.source: "model" is no folder' in message(lambda: applied(config, done, tmp_path / "out"))


@pytest.mark.parametrize("error", [TrialError("no"), KeyboardInterrupt(), OSError(28, "No space left on device")])
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


@pytest.mark.slow
def test_prune_once_equals_the_trial(done: Path, config: Config) -> None:
    assert config.scored()
    file = study_file(done, f"prune.pruners=['{config.plan.method}']")
    plan, measured = prune_study(file, config.plan.parameters, None, ignore_events)
    assert plan.amounts == config.plan.amounts
    assert (plan.method, plan.allocation) == (config.plan.method, "atp")
    assert measured.value == pytest.approx(config.scored().value, rel=1e-6)
    assert measured.stderr == pytest.approx(config.scored().stderr, rel=1e-4)


@pytest.mark.slow
def test_prune_once_writes_what_it_measures(done: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    file = study_file(done)
    plan, measured = prune_study(file, {"beta": 0.05}, tmp_path / "out", events.append)
    check_zeros(tmp_path / "out", done / "model", "wanda", plan.amounts)
    assert measured.value == pytest.approx(prune_study(file, {"beta": 0.05}, None, ignore_events)[1].value, rel=1e-6)
    titles = [event.title for event in events if isinstance(event, TrialStarted)]
    assert titles == [f"writing {tmp_path / 'out'}", f"checking {tmp_path / 'out'}"]


@pytest.mark.slow
def test_what_was_pruned_once_is_made_again_from_its_folder(done: Path, tmp_path: Path) -> None:
    _, measured = prune_study(study_file(done), {"beta": 0.05}, tmp_path / "one", ignore_events)
    about = read_config(tmp_path / "one" / "atp_tune.json")
    assert (about.trial, about.scored()) == (None, measured)
    again = apply(about, tmp_path / "two", Place(tmp_path / "one" / about.folder, "cpu"))
    assert again == measured
    one, two = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    assert all(same_bytes(one[name], two[name]) for name in one)


@pytest.mark.slow
def test_prune_once_of_a_uniform_allocation(done: Path) -> None:
    file = study_file(done, "allocation.names=['uniform']", "sparsity=0.25")
    plan, _ = prune_study(file, {}, None, ignore_events)
    assert plan.amounts == (0.25,) * BLOCKS


@pytest.mark.slow
def test_prune_once_takes_the_allocation_that_has_a_beta(done: Path) -> None:
    plan, _ = prune_study(study_file(done, "allocation.names=['uniform', 'atp']"), {"beta": 0.1}, None, ignore_events)
    assert (plan.allocation, plan.parameters) == ("atp", {"beta": 0.1})


def test_prune_once_refuses_a_beta_that_is_not_admissible(done: Path) -> None:
    said = message(lambda: prune_study(study_file(done), {"beta": 0.4}, None, ignore_events))
    assert said == "--beta: β = 0.4 is outside the admissible interval [-0.333333, 0.333333]"


def test_prune_once_does_not_overwrite(done: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_text("mine")
    said = message(lambda: prune_study(study_file(done), {"beta": 0.0}, out, ignore_events))
    assert said == f"--out {out}: exists already; choose another folder or remove it"


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


@pytest.mark.slow
@pytest.mark.parametrize("offload", ["disk", "auto"])
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


def test_an_index_says_how_large_the_weights_are(tmp_path: Path) -> None:
    """After `--dtype` it had the size of the dense model's weights."""
    for name in ("a", "b"):
        save_file({name: torch.ones(3, 5)}, tmp_path / f"{name}.dense")
        cast(tmp_path / f"{name}.dense", tmp_path / f"{name}.safetensors", torch.bfloat16)
    index = {"metadata": {"total_size": 120}, "weight_map": {name: f"{name}.safetensors" for name in ("a", "b")}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text("{}")
    declare(tmp_path, torch.bfloat16)
    assert json.loads((tmp_path / "model.safetensors.index.json").read_text()) == {
        **index,
        "metadata": {"total_size": 60},
    }


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_folder_in_another_number_format(dtype: str, done: Path, command: CommandLine, tmp_path: Path) -> None:
    """Of a .gguf file of 98 MB the folder had 538 MB, in float32, whatever the study computed in."""
    out = tmp_path / "out"
    words = ("apply", "--config", done / "tiny.best.json", "--device", "cpu", "--dtype", dtype)
    assert command(*words, "--out", out).code == 0
    assert command("apply", "--verify", out).code == 0
    there, source = load_file(out / "model.safetensors"), load_file(done / "model" / "model.safetensors")
    kind = getattr(torch, dtype)
    assert {one.dtype for one in there.values()} == {kind} and there.keys() == source.keys()
    assert all(torch.equal(one[one != 0], source[name].to(kind)[one != 0]) for name, one in there.items())
    assert json.loads((out / "config.json").read_text())["dtype"] == dtype
    assert AutoModelForCausalLM.from_pretrained(out).dtype == kind


@pytest.mark.slow
@pytest.mark.parametrize("computed", ["bfloat16", "float32"])
def test_a_folder_of_a_gguf_file_is_as_the_study_computed(
    computed: str, done: Path, command: CommandLine, tmp_path: Path
) -> None:
    (done / "model" / "origin.json").write_text('{"file": "tiny.gguf", "sha256": "0"}')  # as a conversion leaves it
    words = ("prune", "--study", done / "tiny.toml", "--beta", "0.01", "--set", f"model.dtype={computed}")
    measured = command(*words, "--device", "cpu")
    written = command(*words, "--device", "cpu", "--out", tmp_path / "out")
    assert measured.code == written.code == 0, measured.err + written.err
    said = [next(line for line in one.out.splitlines() if ": perplexity " in line) for one in (measured, written)]
    assert said[0] == said[1]
    kinds = {one.dtype for one in load_file(tmp_path / "out" / "model.safetensors").values()}
    assert kinds == {getattr(torch, computed)}
