"""Sizes, zeros, engines and the command `speedup`."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from expect import parametrize, refused, slow
from safetensors.torch import load_file, save_file
from tinystudy import CommandLine, settings, stored, study_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
)

from atp_tune.api.pruning import prune_study
from atp_tune.blocks.prune_pass import PrunedBlock
from atp_tune.checkpoints.checkpoint import Checkpoint
from atp_tune.cli.evaluate import rates_table
from atp_tune.config.best import read_config
from atp_tune.events import ignore_events
from atp_tune.folders import comparing, speed
from atp_tune.folders.comparing import pack_linears, packed_copy
from atp_tune.folders.speed import About, Workload, in_format_of, measured
from atp_tune.metrics import GRAPH, SIDES, Measured, Phase, Rates, Side, Sizes, Speed
from atp_tune.packed.layout import Kind
from atp_tune.run import observers

SHAPE = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.3,
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("without_warnings")


def random_model(family: str = "llama") -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SHAPE)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:  # norms and biases are 1 and 0 in a new model
                parameter.normal_(1 if "norm" in name else 0, 0.3)
    return model


# --- sizes and zeros


@parametrize("sparse", [torch.float32, torch.bfloat16])
def test_bytes_are_compared_in_one_number_format(sparse: torch.dtype, cache: Path, tmp_path: Path) -> None:
    """A folder in bfloat16 of a .gguf file was said to be half of its dense model, whose files are in float32."""
    for name, dtype in (("dense", torch.float32), ("sparse", sparse)):
        (tmp_path / name).mkdir()
        save_file({"weight": torch.ones(3, 5, dtype=dtype)}, tmp_path / name / "model.safetensors")
    with in_format_of(tmp_path / "sparse", tmp_path / "dense") as dense:
        assert load_file(dense / "model.safetensors")["weight"].dtype == sparse
        assert (dense == tmp_path / "dense") == (sparse == torch.float32)
        assert dense.is_relative_to(cache) == (sparse != torch.float32)


# --- turns


class Counting:
    """An engine whose runs take 1, 2, 3, … seconds."""

    about = About("counting", "1", "float32", "none", 2)
    phases = ("prefill", "decode")

    def __init__(self) -> None:
        self.asked: list[tuple[Side, Phase]] = []

    def seconds(self, side: Side, phase: Phase) -> float:
        self.asked.append((side, phase))
        return float(len(self.asked))


def test_dense_and_sparse_take_turns_and_the_first_round_is_not_counted() -> None:
    engine = Counting()

    @contextmanager
    def opening() -> Iterator[Counting]:
        yield engine

    found = measured(opening(), "counting", Workload(tokens=50, steps=5, runs=2, batch=2), ignore_events)
    once = [("dense", "prefill"), ("sparse", "prefill"), ("dense", "decode"), ("sparse", "decode")]
    assert engine.asked == 3 * once
    assert found.prefill == Rates(dense=(100 / 5, 100 / 9), sparse=(100 / 6, 100 / 10))
    assert found.rates["decode"].dense == (10 / 7, 10 / 11)
    assert found.rates["prefill"].ratios == pytest.approx((5 / 6, 9 / 10))
    assert (found.batch, found.name) == (2, "counting, float32, batch 2")


def test_the_sparse_model_against_the_best_dense_one_in_torch() -> None:
    def row(engine: str, dtype: str, dense: float) -> Measured:
        rates = Rates(dense=(dense, 1, 100), sparse=(6, 6, 6))
        own = {"engine": engine, "version": "1", "dtype": dtype, "device": "cpu", "cores": 2, "logits": None}
        return Measured.model_validate({**own, "tokens": 1, "steps": 1, "prefill": rates, "decode": rates})

    rows = (row("torch", "float32", 3), row("torch", "bfloat16", 4), row("other", "float32", 50))
    found = Speed(sizes=Sizes(dense=1, sparse=1, dense_zstd=1, sparse_zstd=1), zeros={}, engines=rows)
    assert found.over_torch(rows[2], "decode") == 1.5
    in_graph = rows[0].model_copy(update={"graph": Rates(dense=(12, 12, 12), sparse=(30, 30, 30))})
    found = found.model_copy(update={"engines": (in_graph, *rows[1:])})
    assert [found.over_torch(row, phase) for row, phase in ((in_graph, GRAPH), (rows[2], "decode"))] == [2.5, 0.5]
    assert found.over_torch(in_graph, "prefill") == 1.5 and found.fastest == 30


def test_a_packed_copy_computes_as_the_pruned_model_and_leaves_the_dense_one(
    tiny_place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is refused before anything is pruned where memory has no room for it: the process was killed."""
    checkpoint = Checkpoint.load(tiny_place / "model", torch.float32, torch.device("cpu"), False)
    other = AutoModelForCausalLM.from_pretrained(tiny_place / "model")
    blocks = []
    for index, linears in enumerate(checkpoint.linears):
        weights = dict(checkpoint.weights(index))
        for linear in linears[1:]:  # the first stays dense
            weight = weights[linear.key].clone()
            weight[:, ::2] = 0
            weights[linear.key] = weight
            other.get_parameter(checkpoint.key(index, linear)).data.copy_(weight)
        blocks.append(PrunedBlock(index, weights))
    ids = torch.arange(12)[None]
    model: Any = checkpoint.model
    before = model(ids).logits
    packed, count = packed_copy(checkpoint, blocks, "a test", "another")
    assert count == sum(len(linears) - 1 for linears in checkpoint.linears)
    torch.testing.assert_close(packed(ids).logits, other(ids).logits)
    assert torch.equal(model(ids).logits, before)
    assert packed.get_input_embeddings().weight is model.get_input_embeddings().weight
    assert type(model.get_output_embeddings()) is nn.Linear
    for memory in ("host_memory", "free_memory"):
        monkeypatch.setattr(observers, memory, lambda *_: 1)
    with refused(r"^a test: a pruned copy needs .* GiB beside the dense model"):
        packed_copy(checkpoint, (pytest.fail(f"block {index} was pruned") for index in range(1)), "a test", "another")


@slow
@parametrize("where", ["here", "without a compiler", "without memory"])
def test_a_study_ends_with_the_size_and_speed_of_its_best(
    where: str, done: Path, command: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are measured once; where they cannot be, one line says why and nothing fails."""
    if where == "without a compiler":
        monkeypatch.setattr(comparing, "kernel_name", lambda: None)
    for memory in ("host_memory", "free_memory") if where == "without memory" else ():
        monkeypatch.setattr(observers, memory, lambda *_: 1)
    words = ("--study", done / "tiny.toml", *settings("speed=true", "device=cpu"))
    first = command(*words)
    found = read_config(done / "tiny.best.json").speed
    assert first.is_clean
    if where != "here":
        said = {
            "without a compiler": "the kernel of packed weights needs a CPU and a C compiler (cc), or the wheel "
            "ziglang",
            "without memory": "memory: a pruned copy needs 0.0 GiB beside the dense model; write it with `apply`, then "
            "speedup DIR",
        }[where]
        assert f"speed: not measured, {said}" in first.out.splitlines() and found is None
        return
    assert found and found.sizes.packed and found.sizes.packed < found.sizes.dense
    assert [row.engine for row in found.engines] == ["packed"]
    assert "nothing to do" not in first.out
    assert "| decode, tokens per second: packed, " in first.out and "| packed, MB " in first.out
    again = command(*words)
    assert "nothing to do" in again.out and "| packed, MB " in again.out
    assert read_config(done / "tiny.best.json").speed == found
    command.ok("report", "--study", done / "tiny.toml", "--format", "md")
    assert "| packed, MB | " in (done / "tiny.report.md").read_text()


class Fixed:
    """An opening of an engine that is there."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def __enter__(self) -> Any:
        return self.engine

    def __exit__(self, *_: object) -> None:
        self.engine.close()


def decoders(dense: Any, kind: Kind = "same") -> tuple[speed.Eager, Workload]:
    """A model and its packed copy with half of its weights, decoded by torch's compiler too, on a CPU in one graph."""
    checkpoint = Checkpoint(copy.deepcopy(dense).requires_grad_(False), torch.device("cpu"))
    for index, linears in enumerate(checkpoint.linears):
        for linear in linears:
            checkpoint.weights(index)[linear.key][:, ::2] = 0
    assert pack_linears(checkpoint, kind)
    task = Workload(tokens=6, steps=4, runs=1, batch=2)
    about = speed.about_torch("packed", torch.float32, torch.device("cpu"))
    models = {"dense": dense, "sparse": checkpoint.model}
    ids = torch.randint(60, (2, 10), generator=torch.Generator().manual_seed(1))
    return speed.Eager(about, models, ids, task, {"backend": "aot_eager"}), task  # type: ignore[arg-type]


@slow
@parametrize(("family", "kind"), [("llama", "same"), ("qwen2", "int8"), ("qwen3", "bf16")])
def test_decoding_in_one_graph_gives_the_same_tokens(family: str, kind: Kind) -> None:
    """With a static cache, dense and packed; the compiler refuses a break of the graph (`fullgraph`)."""
    pytest.importorskip("triton")
    engine, task = decoders(random_model(family), kind)
    assert engine.phases == ("prefill", "decode", GRAPH)
    for side in SIDES:
        eager, compiled = (engine._run(side, phase)[1] for phase in ("decode", GRAPH))
        torch.testing.assert_close(compiled, eager)
        assert torch.equal(compiled.argmax(-1), eager.argmax(-1))
    found = measured(Fixed(engine), "packed", task, ignore_events)  # type: ignore[arg-type]
    assert list(found.rates) == ["prefill", "decode", GRAPH]
    assert len(found.rates[GRAPH].dense) == len(found.rates["decode"].sparse) == 1
    speed = Speed(sizes=Sizes(dense=1, sparse=1), engines=(found,))
    assert [row.split("|")[2].strip() for row in rates_table(speed).splitlines()[2:]] == list(found.rates)
    assert Measured.model_validate_json(found.model_dump_json()) == found


def test_another_result_is_no_graph(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch, "compile", lambda call, **_: call)
    assert decoders(random_model())[0].phases == ("prefill", "decode", GRAPH)
    monkeypatch.setitem(speed.EXACT, torch.float32, -1.0)
    assert decoders(random_model())[0].phases == ("prefill", "decode")
    assert any("ValueError: with a static cache logits differ by " in message for message in caplog.messages)


# --- 2:4


def test_two_zeros_in_each_group_of_four_inputs() -> None:
    weight = torch.ones(3, 8)
    weight[:, ::2] = 0
    speed.check_groups("q_proj", weight)
    weight[1, 0] = 1
    with refused("--engine semi-structured: q_proj is not 2:4 everywhere"):
        speed.check_groups("q_proj", weight)
    weight[1, 1] = 0  # another of the same group
    speed.check_groups("q_proj", weight)
    with refused("not 2:4"):
        speed.check_groups("q_proj", torch.zeros(2, 6))


def test_other_linears_are_not_compressed() -> None:
    model = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=16, n_embd=8, n_layer=1, n_head=2, n_positions=8))
    with refused(r"attn.c_attn is no nn.Linear, and torch.sparse compresses no other"):
        speed.compress(Checkpoint(model, torch.device("cpu")))


@pytest.fixture
def two_four(place: Path, tmp_path: Path) -> Path:
    """A sparse folder in the pattern 2:4."""
    overrides = ("prune.pattern='2:4'", "sparsity=0.5", "allocation='uniform'")
    prune_study(study_file(place, *overrides), {}, tmp_path / "two_four", ignore_events)
    return tmp_path / "two_four"


def test_semi_structured_with_rocm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose capabilities are 9.0 and above: an MI300 would have passed."""
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "AMD Instinct MI300X")
    with refused(r"of compute capability 8\.0 or above, AMD Instinct MI300X is none"):
        speed.check_semi_structured("2:4", torch.device("cuda", 0))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_semi_structured_on_a_card(two_four: Path, command: CommandLine) -> None:
    command.ok("speedup", two_four, "--engine", "semi-structured", "--tokens", 8, "--runs", 1)


# --- the command


def check_stored(found: Speed | None) -> None:
    assert found is not None
    assert found.sizes.dense == found.sizes.sparse > found.sizes.sparse_zstd
    assert len(found.zeros) == 7
    assert all(0.4 < share < 0.6 for share in found.zeros.values())
    assert found.engines[0].name == "torch, float32"
    assert len(found.engines[0].rates["decode"].dense) == len(found.engines[0].rates["prefill"].sparse) == 2


@slow
def test_what_is_measured_is_shown_and_kept(done: Path, command: CommandLine, cache: Path) -> None:
    path = done / "tiny.best.json"
    config = read_config(path)
    options = ("--tokens", 8, "--runs", 2, "--device", "cpu")
    answer = command.ok("speedup", "--config", path, *options)
    assert "Zeros in a dense file make nothing smaller or faster by themselves" in answer.out
    assert "| torch, float32" in answer.out
    assert f"stored in {path}, study tiny" in answer.out
    found = read_config(path)
    check_stored(found.speed)
    assert found.model_copy(update={"speed": None}) == config
    kept = stored(done).user_attrs["speed"][str(config.trial)]
    assert Speed.model_validate(kept) == found.speed
    pruned = list((cache / "sparse").iterdir())
    assert "writing" not in command("speedup", "--config", path, *options).out
    assert list((cache / "sparse").iterdir()) == pruned


def test_another_dense_model(done: Path, command: CommandLine) -> None:
    file = done / "model" / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"][0] += 1
    save_file(weights, file, metadata={"format": "pt"})
    assert command("speedup", "--config", done / "tiny.best.json").error.startswith("model.fingerprint: ")
