"""Studies with `bits`: rounding to widths, a study and its files end to end, what is refused."""

import re
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from expect import parametrize, refused, slow
from families import checkpoint_of, tiny
from hypothesis import given
from hypothesis import strategies as st
from plans import planned
from pydantic import ValidationError
from safetensors.torch import load_file
from test_config import config
from tinystudy import STUDY, CommandLine, copied, copy_of, run, stored
from transformers import AutoModelForCausalLM

from atp_tune.allocations import bits
from atp_tune.config.best import Config, read_config
from atp_tune.config.prune import WIDTHS, Bits, PruneConfig, QuantizeConfig
from atp_tune.folders.exporting import FORMATS, as_csv, linear_widths
from atp_tune.plan import Plan

BITS = "[quantize]\nquantizers = ['rtn', 'gptq']\ngroup_size = 16\n\n[allocation]\nbeta = 'both'\n"


# rounding

blocks = st.lists(st.tuples(st.floats(2, 8), st.integers(1, 1000)), min_size=1, max_size=12)


@given(blocks, st.sampled_from([WIDTHS, (2, 8), (3, 4), (4,)]))
def test_the_mean_stays_within_and_each_goes_one_step_at_most(found: Any, widths: tuple[int, ...]) -> None:
    wanted = [min(widths[-1], max(widths[0], b)) for b, _ in found]
    sizes = [size for _, size in found]
    rounded = bits.rounded(wanted, sizes, widths)
    assert set(rounded) <= set(widths)
    total = sum(b * size for b, size in zip(wanted, sizes, strict=True))
    missing = total - sum(b * size for b, size in zip(rounded, sizes, strict=True))
    assert missing > -1e-6 * total
    for b, was, size in zip(rounded, wanted, sizes, strict=True):
        below, above = max(w for w in widths if w <= was + 1e-9), min(w for w in widths if w >= was - 1e-9)
        assert b in (below, above)
        if b < above:  # another step would be too much
            assert (above - b) * size > missing - 1e-6 * total


def by_price(costs: list[list[float]], sizes: list[int], price: float) -> list[int]:
    """For each linear on its own, the fewest bits at the least cost plus price for all bits of its weights."""
    pairs = zip(costs, sizes, strict=True)
    return [min(WIDTHS, key=lambda b: (row[WIDTHS.index(b)] + price * b * size, b)) for row, size in pairs]


cost = st.floats(0, 1).map(lambda value: round(value, 4))
priced = st.lists(st.tuples(st.lists(cost, min_size=6, max_size=6), st.integers(1, 9)), min_size=1, max_size=4)


@given(priced, st.floats(0.0001, 0.2))
def test_the_cheapest_bits_are_those_of_all_plans(found: Any, price: float) -> None:
    """At the bits of a price none of all plans with as many bits or fewer costs less; of others, none that is kept."""
    costs, sizes = [list(row) for row, _ in found], [size for _, size in found]

    def cost_of(plan: Any) -> float:
        return sum(row[WIDTHS.index(b)] for row, b in zip(costs, plan, strict=True))

    def bits_in(plan: Any) -> int:
        return sum(b * size for b, size in zip(plan, sizes, strict=True))

    target = bits_in(by_price(costs, sizes, price)) / sum(sizes)
    stored = [[width * size for width in WIDTHS] for size in sizes]
    plan = [WIDTHS[index] for index in bits.cheapest(costs, stored, target * sum(sizes))]
    assert bits_in(plan) <= target * sum(sizes) + 1e-6
    least = min(cost_of(other) for other in product(WIDTHS, repeat=len(sizes)) if bits_in(other) <= bits_in(plan))
    assert cost_of(plan) == pytest.approx(least, abs=1e-9)


@parametrize(("group", "symmetric", "expected"), [(16, False, 3 + 3 * 19 / 40), (-1, True, 3 + 16 / 40)])
def test_scales_and_zero_points_are_counted(group: int, symmetric: bool, expected: float) -> None:
    assert bits.stored_bits(5, 40, 3, group, 0 if symmetric else 3) == pytest.approx(200 * expected)


# a study


@pytest.fixture(scope="module")
def ran(tiny_place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished study; to be read only."""
    with copied(tiny_place, tmp_path_factory) as place:
        toml = STUDY.replace("sparsity = 0.6", "bits = 3.5").replace("trials = 3", "trials = 6")
        (place / "tiny.toml").write_text(toml + "\n" + BITS)
        run(place)
        return place


bits_done = copy_of("ran")


@slow
def test_apply_writes_what_the_trial_measured(bits_done: Path, command: CommandLine) -> None:
    best = read_config(bits_done / "tiny.best.json")
    assert best.quantize is not None
    assert best.bits == Bits(target=3.5, nominal=3.5, effective=3.5 + 19.5 / 16)
    assert best.plan.by_bits and sum(best.plan.amounts) == 14
    assert "(+0.000%)" in command("apply", "--config", bits_done / "tiny.best.json", "--out", bits_done / "out").out
    card = (bits_done / "out" / "README.md").read_text()
    assert "rounded to 3.50 bits each, 4.72 with the scales of groups" in card
    assert "quantized" in card
    assert "zero" not in card.lower()
    made = read_config(bits_done / "out" / "atp_tune.json")
    assert (made.plan, made.quantize, made.bits) == (best.plan, best.quantize, best.bits)
    command.ok("apply", "--verify", bits_done / "out")
    check_codes(bits_done, command, zeros=False)
    beta = f"--beta={best.plan.parameters.get('beta') or 0.01}"
    words = ["prune", "--study", bits_done / "tiny.toml", beta, "--out", bits_done / "pruned"]
    assert "3.5 bits: perplexity" in command(*words).out
    for words, reason in (
        (["apply", "--slim", "--config", bits_done / "tiny.best.json"], "only whole channels can be cut"),
        (
            ["finetune", bits_done / "out", "--seqlen", "32"],
            "its weights are rounded, and training would undo",
        ),
        (["speedup", bits_done / "out"], "weights are rounded, and run as floats"),
        (
            ["prune", "--study", bits_done / "tiny.toml", "--pruner", "wanda", "--beta", "0.1"],
            "is of zeros; leave it out",
        ),
    ):
        more = ["--out", bits_done / "no"] if words[0] in ("apply", "finetune") else []
        refused = command(*words, *more)
        assert refused.code == 2, words
        assert reason in refused.err
        assert not (bits_done / "no").exists()


def check_codes(place: Path, command: CommandLine, zeros: bool) -> None:
    """The folder of codes of a study's best trial: its bytes, its perplexity, and all that reads it."""
    best, codes = read_config(place / "tiny.best.json"), place / "codes"
    said = command("apply", "--config", place / "tiny.best.json", "--out", codes, "--packed").out
    change = re.search(r"\(([+-]\d+\.\d+)%\)", said)
    assert change and abs(float(change[1])) < 0.5  # by scales of 16 bits alone
    command.ok("apply", "--verify", codes)
    trial = next(trial for trial in stored(place).get_trials() if trial.number == best.trial)
    tensors = {name: tensor for file in codes.glob("*.safetensors") for name, tensor in load_file(file).items()}
    rows = sum(tensor.shape[0] for name, tensor in tensors.items() if name.endswith("_bitmask"))
    more = sum(tensor.nbytes for tensor in tensors.values()) - trial.user_attrs["quantized_bytes"]
    assert 0 <= more <= rows + 2 * sum(name.endswith("_codes") for name in tensors)
    assert bool(rows) == zeros
    card = (codes / "README.md").read_text()
    assert "codes" in card and "as floats" not in card and "It needs `import atp_tune` before it" in card
    again = command("apply", "--config", codes / "atp_tune.json", "--out", place / "again", "--packed").out
    assert "byte for byte" in again and "(+0.000%)" in again
    rates = command("speedup", codes, "--engine", "packed", "--tokens", "8", "--runs", "1")
    assert ("packed" in rates.out) if zeros else re.search("run as floats|has 45% zeros", rates.err)
    command.ok("unpack", codes, "--out", place / "unpacked")
    found, loaded = (AutoModelForCausalLM.from_pretrained(place / name) for name in ("unpacked", "codes"))
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.inference_mode():
        torch.testing.assert_close(loaded(ids).logits, found(ids).logits, rtol=1e-4, atol=1e-5)


# what is refused


def rounded(*bits: float, method: str = "gptq", linears: Any = None, sparsities: Any = None) -> Plan:
    return planned(method, "atp", sparsities or (None,) * len(bits), {"beta": 0.0125}, linears, bits)


ROUNDED: dict[str, Any] = {
    "quantize": QuantizeConfig(group_size=32), "plan": rounded(4, 3, 4), "bits": Bits(target=3.7, nominal=11 / 3),
    "prune": PruneConfig(),
    "linears": (("attn.q", "mlp.up"),) * 2 + (("mlp.up",),),
}  # fmt: skip


@parametrize(
    ("changes", "reason"),
    [
        ({"plan": planned("wanda", "atp", (0.5, 0.6, 0.7))}, "quantize: is needed with bits and a plan that has bits"),
        ({"quantize": None}, "quantize: is needed with bits and a plan that has bits"),
        ({"plan": rounded(4, 3)}, "linears: not one name for each linear"),
        ({"plan": rounded(3, 4, 4, linears=((4, 4), (3, 3), (4, 4)))}, "linears: not one name for each linear"),
        ({"plan": rounded(4, 3, 4, method="awq")}, "Input should be 'rtn', 'gptq' or 'ggml'"),
        ({"plan": rounded(4, 3, 4, method="wanda")}, "Input should be 'rtn', 'gptq' or 'ggml'"),
        ({"plan": rounded(4, 4, 4, sparsities=(0.5, 0.6, 0.7))}, "Input should be 'magnitude', 'wanda'"),
    ],
)
def test_what_a_configuration_of_a_stranger_may_not_say(changes: Any, reason: str) -> None:
    values = config(**{**ROUNDED, **changes}).model_dump(mode="json")
    with pytest.raises(ValidationError, match=re.escape(reason)):
        Config.model_validate(values)


# exports


def made(kind: str, **changes: Any) -> str:
    return FORMATS[kind][1](config(**{**ROUNDED, **changes}))


RTN = rounded(4, 3, 4, method="rtn")


BY_LINEAR: dict[str, Any] = {
    "plan": rounded(3.25, 3, 8, linears=((4, 3), (3, 3), (8,))),
    "linears": (("attn.q_proj", "mlp.up_proj"),) * 2 + (("mlp.up_proj",),),
}  # fmt: skip


def test_recipes_of_bits_by_linear() -> None:
    (stage,) = yaml.safe_load(made("llm-compressor", **BY_LINEAR)).values()
    groups = stage["bits_modifiers"]["GPTQModifier"]["config_groups"].values()
    assert {group["weights"]["num_bits"]: group["targets"] for group in groups} == {
        3: ["model.layers.0.mlp.up_proj", "model.layers.1.attn.q_proj", "model.layers.1.mlp.up_proj"],
        4: ["model.layers.0.attn.q_proj"],
        8: ["model.layers.2.mlp.up_proj"],
    }
    rows = as_csv(config(**{**ROUNDED, **BY_LINEAR})).splitlines()
    assert rows[:3] == ["block,module,bits", "0,model.layers.0.attn.q_proj,4", "0,model.layers.0.mlp.up_proj,3"]


@parametrize(
    ("changes", "reason"),
    [({"linears": None}, "linears: the configuration lacks"), ({"blocks": "a'b\n"}, "is not the name of a module")],
)
def test_what_recipes_cannot_say(changes: Any, reason: str) -> None:
    with refused(reason):
        made("llm-compressor", **changes)


@parametrize(
    ("changes", "engine", "reason"),
    [
        (
            {"quantize": None, "plan": planned("wanda", "atp", (0.5, 0.6, 0.7)), "bits": None},
            "mlx",
            "without zeros and types",
        ),
        ({"conv1d": True}, "compressed-tensors", "rounds nn.Linear alone, and this model has Conv1D"),
        ({"linears": (("mlp.up[0]",),) * 3}, "compressed-tensors", "has no name for a single expert"),
    ],
)
def test_what_engines_do_not_store(changes: Any, engine: Any, reason: str) -> None:
    asked = config(**{**ROUNDED, "quantize": QuantizeConfig(group_size=16), **changes})
    with refused(f"--format {engine}: .*{reason}"):
        linear_widths(asked, engine)


def of_llm_compressor(text: str) -> dict[int, set[str]]:
    """The linears that a recipe names, by number of bits."""
    (stage,) = yaml.safe_load(text).values()
    (modifier,) = stage["bits_modifiers"].values()
    return {group["weights"]["num_bits"]: set(group["targets"]) for group in modifier["config_groups"].values()}


@parametrize("family", ["llama", "gpt2", "mixtral", "qwen2_moe"])
def test_recipes_name_the_linears_that_apply_rounds(family: str) -> None:
    model = tiny(family)
    checkpoint = checkpoint_of(model)
    own = tuple((3, 4, 4, 3)[: len(checkpoint.blocks)])
    known: dict[str, Any] = {"plan": rounded(*own), "blocks": checkpoint.blocks_name}
    known |= {"linears": tuple(map(tuple, checkpoint.linear_names)), "conv1d": checkpoint.has_conv1d}
    if family != "llama":
        reason = "this model has Conv1D" if family == "gpt2" else "no name for a single expert"
        with refused(f"--format llm-compressor: .*{reason}"):
            made("llm-compressor", **known)
        return
    wanted: dict[int, set[str]] = {}
    for i, linears in enumerate(checkpoint.linears):
        wanted.setdefault(own[i], set()).update(f"{checkpoint.blocks_name}.{i}.{linear.name}" for linear in linears)
    assert of_llm_compressor(made("llm-compressor", **known)) == wanted
