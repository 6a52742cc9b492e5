"""`pattern = "channels"`: found by running a block, scored and refitted as in naive loops, counted exactly."""

import copy
import math
import random
from typing import Any

import naive
import pytest
import torch
from expect import parametrize, refused
from families import CPU, TOKENS, bench_of, copy_of, few, random_ids, same_bits, tiny
from plans import linears_of
from torch import Tensor, nn

from atp_tune.allocations.channels import BlockChannels, ChannelSet, rounded
from atp_tune.blocks.channels import find_channels, too_sparse
from atp_tune.config.prune import PruneConfig, make_plan, parse
from atp_tune.errors import TrialError
from atp_tune.pruners.selection import HessianAndMoments, channel_scores, refitted
from atp_tune.pruners.settings import ChannelSettings
from atp_tune.run.session import Session

CHANNELS = parse("channels")


def settings(**keys: Any) -> PruneConfig:
    pruners = keys.pop("pruners", ("wanda",))
    return PruneConfig(pattern="channels", pruners=pruners, channels=ChannelSettings(**{"round_to": 1, **keys}))


# which channels there are

GATED = (("mlp.gate_proj", 1), ("mlp.up_proj", 1)), "mlp.down_proj", 40
GROUPED = (("self_attn.q_proj", 12), ("self_attn.k_proj", 6), ("self_attn.v_proj", 6)), "self_attn.o_proj", 2
OWN = (("self_attn.q_proj", 6), ("self_attn.k_proj", 6), ("self_attn.v_proj", 6)), "self_attn.out_proj", 4
FUSED = (("attention.query_key_value", 18),), "attention.dense", 4
FOUND = {
    "llama": [GROUPED, GATED],
    "gemma3": [GROUPED, GATED],
    "qwen3": [GROUPED, GATED],
    "opt": [OWN, ((("fc1", 1),), "fc2", 40)],
    "gpt_neox": [FUSED, ((("mlp.dense_h_to_4h", 1),), "mlp.dense_4h_to_h", 40)],
}
NO_HEADS = {
    "gpt2": ((("mlp.c_fc", 1),), "mlp.c_proj", 96),  # queries of all heads, then all keys, then all values
    "olmo2": GATED,  # normalises the queries of all heads together
    "falcon": ((("mlp.dense_h_to_4h", 1),), "mlp.dense_4h_to_h", 96),  # one key/value head
}


@parametrize("family", few(FOUND, ("llama",)))
def test_channels_are_found_by_running_the_block(family: str) -> None:
    work = bench_of(tiny(family))
    blocks = find_channels(work.replay, ChannelSettings(heads=True))
    assert len(blocks) == len(work.checkpoint.blocks)
    for block in blocks:
        assert [(one.writers, one.reader, one.count) for one in block.sets] == FOUND[family]
        sizes = dict(block.linears)
        for one in block.sets:
            assert one.weights * one.count == sum(sizes[name] for name in one.linears)
        assert block.size == sum(sizes.values())
    assert all(block.heads is None for block in find_channels(work.replay, ChannelSettings()))


def test_channels_of_a_model_that_was_pruned_are_found_again() -> None:
    """As of a masked folder: rows of zeros, the first among them."""
    model = tiny("llama").requires_grad_(False)
    for block in model.model.layers:
        block.mlp.up_proj.weight[:9] = block.mlp.gate_proj.weight[:9] = 0
        block.mlp.down_proj.weight[:, :9] = 0
        block.self_attn.q_proj.weight[:12] = block.self_attn.k_proj.weight[:6] = block.self_attn.v_proj.weight[:6] = 0
    for found in find_channels(bench_of(model).replay, ChannelSettings(heads=True)):
        assert [(one.writers, one.reader, one.count) for one in found.sets] == FOUND["llama"]


@parametrize("family", few(NO_HEADS, ("gpt2",)))
def test_heads_that_cannot_go_alone_stay(family: str) -> None:
    work = bench_of(tiny(family))
    (block, *_) = find_channels(work.replay, ChannelSettings())
    assert [(block.mlp.writers, block.mlp.reader, block.mlp.count)] == [NO_HEADS[family]]
    with refused(r"no heads that can go one by one; set prune.channels.heads = false$"):
        find_channels(work.replay, ChannelSettings(heads=True))


@parametrize(
    ("family", "reason"),
    [("phi3", "it has no MLPs whose inner channels can go one by one"), ("mixtral", "mlp.experts holds experts")],
)
def test_a_block_without_channels_is_refused_in_one_line(family: str, reason: str) -> None:
    with refused(f'^prune.pattern: "channels" cannot prune block 0 .*{reason}'):
        find_channels(bench_of(tiny(family)).replay, ChannelSettings())


class Leaking(nn.Module):
    """An MLP whose inner channels are also read by something else than its second linear."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.inner.gate_proj(x), self.inner.up_proj(x)
        found: Tensor = self.inner.down_proj(torch.sigmoid(gate) * up) + up[..., :1] * 1e-3
        return found


def test_rows_that_are_read_elsewhere_too_are_no_channels() -> None:
    model = tiny("llama")
    for block in model.model.layers:
        block.mlp = Leaking(block.mlp)
    with refused("no MLPs whose inner channels"):
        find_channels(bench_of(model).replay, ChannelSettings())


# how many go

MLP = ChannelSet(10, (("up", 1),), "down", 1, 2 * 8)
HEADS = ChannelSet(3, (("q", 4), ("k", 2)), "o", 4, 40)


def block(round_to: int = 1, heads: bool = False) -> BlockChannels:
    linears = (("q", 48), ("k", 24), ("o", 48), ("up", 80), ("down", 80))
    return BlockChannels(MLP, HEADS if heads else None, linears, round_to)


def gone(shares: tuple[float, ...]) -> float:
    sizes = [size for _, size in block().linears]
    return sum(share * size for share, size in zip(shares, sizes, strict=True)) / sum(sizes)


@parametrize("round_to", [1, 3, 8])
@parametrize("heads", [False, True])
def test_the_mean_is_kept_and_widths_are_multiples(round_to: int, heads: bool) -> None:
    draw = random.Random(round_to)
    for _ in range(100):
        blocks = [block(round_to, heads)] * 7
        highest = min(one.highest for one in blocks)
        wanted = [draw.random() * highest for _ in blocks]
        target = sum(wanted) / 7
        rows = rounded(wanted, blocks, target)
        step = max(a - b for a, b in zip(blocks[0].kept, blocks[0].kept[1:], strict=False)) * MLP.weights
        assert abs(sum(map(gone, rows)) / 7 - target) <= step / 2 / blocks[0].size + 1e-9
        for row, s in zip(rows, wanted, strict=True):
            kept = round(10 * (1 - row[-1]))
            assert kept == 10 or (kept % round_to == 0 and kept > 0)
            assert abs(gone(row) - s) <= step / blocks[0].size + 1e-9


def test_sparsities_above_what_channels_can_make_are_lowered_and_the_others_raised() -> None:
    highest = block().highest
    assert highest == 9 * 16 / 280
    rows = rounded([0.0, 0.6, 0.9], [block()] * 3, 0.5)
    assert gone(rows[2]) == pytest.approx(highest)
    assert sum(map(gone, rows)) / 3 == pytest.approx(0.5, abs=8 / 280)


# scores and refit


def samples(tokens: int, inputs: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, inputs, generator=generator) * torch.rand(inputs, generator=generator) * 3 + 0.5
    x[:, 2] = 0  # a dead input
    return x


def measured(x: Tensor) -> HessianAndMoments:
    found = HessianAndMoments(x.shape[1], CPU)
    for part in x.split(7):
        found.add(part)
    return found


def naive_scores(weight: Tensor, x: Tensor, columns: int, score: str) -> list[float]:
    """Channel by channel and token by token, in float64."""
    scores = []
    for start in range(0, weight.shape[1], columns):
        total = 0.0
        for j in range(start, start + columns):
            values = x[:, j].double().tolist()
            mean = math.fsum(values) / len(values) if score == "fluctuation" else 0.0
            energy = math.fsum((v - mean) ** 2 for v in values)
            total += energy * math.fsum(w * w for w in weight[:, j].double().tolist())
        scores.append(total)
    return scores


@parametrize("columns", [1, 3])
@parametrize("score", ["norm", "fluctuation"])
def test_scores_are_those_of_a_naive_loop(columns: int, score: str) -> None:
    weight, x = torch.randn(11, 15, generator=torch.Generator().manual_seed(1)), samples(29, 15)
    moments = measured(x).parts["moments"]
    energies = moments.variances() * 29 if score == "fluctuation" else moments.norms().square()
    found = channel_scores(weight, energies, columns)
    assert found.tolist() == pytest.approx(naive_scores(weight, x, columns, score), rel=1e-4)


def least_squares(weight: Tensor, lost: Tensor, x: Tensor, damping: float) -> Tensor:
    """The weight [out, in] by `torch.linalg.lstsq`: inputs that stay to outputs before, and the ridge as rows."""
    w, inputs, there = weight.double(), x.double() * math.sqrt(2 / len(x)), ~lost
    ridge = damping * naive.hessian(x).diagonal().mean()
    left = torch.cat([inputs[:, there], ridge.sqrt() * torch.eye(int(there.sum()), dtype=torch.float64)])
    right = torch.cat([inputs @ w.T, ridge.sqrt() * w[:, there].T])
    found = torch.zeros_like(w)
    found[:, there] = torch.linalg.lstsq(left, right, driver="gelsd").solution.T
    return found


@parametrize("tokens", [9, 64])
def test_the_refit_is_that_of_lstsq(tokens: int) -> None:
    """Also with fewer tokens than inputs, and with inputs that are dead."""
    weight, x = torch.randn(5, 13, generator=torch.Generator().manual_seed(2)), samples(tokens, 13)
    lost = torch.tensor([j in (0, 4, 5, 12) for j in range(13)])
    found = refitted(weight, lost, measured(x).parts["hessian"].matrix(), 0.01)
    assert not found[:, lost].any()
    torch.testing.assert_close(found.double(), least_squares(weight, lost, x, 0.01), rtol=1e-4, atol=1e-5)
    before, after = (float(((x @ (w - weight).T) ** 2).sum()) for w in (weight.masked_fill(lost, 0), found))
    assert after < before


def test_a_hessian_that_overflows_is_a_failed_trial() -> None:
    with pytest.raises(TrialError, match="Hessian not finite"):
        refitted(torch.ones(2, 3), torch.tensor([True, False, False]), torch.full((3, 3), math.inf), 0.01)


# the pass


def naive_pass(model: Any, work: Session, shares: Any, keys: ChannelSettings, pruner: str) -> Any:
    """A copy of the model, pruned block after block in its full forward, channel by channel."""
    pruned, ids, name = (
        copy.deepcopy(model).requires_grad_(False),
        random_ids(5, TOKENS, seed=0),
        work.checkpoint.blocks_name,
    )
    for index, channels in enumerate(work.channels):
        row = dict(zip((linear for linear, _ in channels.linears), shares[index], strict=True))
        inputs = naive.inputs_of(pruned, [f"{name}.{index}.{one.reader}" for one in channels.sets], ids)
        for one in channels.sets:
            path = f"{name}.{index}"
            reader, x = naive.weight_of(pruned, f"{path}.{one.reader}"), inputs[f"{path}.{one.reader}"]
            writers = [(naive.weight_of(pruned, f"{path}.{writer}"), rows) for writer, rows in one.writers]
            if pruner == "magnitude":
                squares = [sum(float(v) ** 2 for v in reader[:, c * one.columns : (c + 1) * one.columns].flatten())
                           + sum(float(v) ** 2 for w, rows in writers for v in w[c * rows : (c + 1) * rows].flatten())
                           for c in range(one.count)]  # fmt: skip
            else:
                squares = naive_scores(reader, x, one.columns, keys.score)
            count = round(one.count * row[one.reader])
            order = sorted(range(one.count), key=lambda c: squares[c])[:count]
            lost = torch.zeros(reader.shape[1], dtype=torch.bool)
            with torch.no_grad():
                for c in order:
                    lost[c * one.columns : (c + 1) * one.columns] = True
                    for w, rows in writers:
                        w[c * rows : (c + 1) * rows] = 0
                if count and keys.refit:
                    reader.copy_(least_squares(reader, lost, x, keys.damping))
                else:
                    reader[:, lost] = 0
    return pruned


@parametrize("family", few(["llama", "opt", "gpt_neox", "gpt2", "gemma3"], ("llama",)))
@parametrize(
    ("pruner", "keys"),
    [
        ("wanda", {"refit": False}),
        ("wanda", {"score": "fluctuation"}),
        ("magnitude", {"refit": False}),
    ],
)
def test_the_pass_is_that_of_naive_loops(family: str, pruner: str, keys: dict[str, Any]) -> None:
    model = tiny(family)
    before = copy_of(model)
    prune = settings(pruners=(pruner,), heads=family not in NO_HEADS, **keys)
    work = bench_of(model, prune)
    plan = make_plan(pruner, "atp", work.budget(0.35), {"beta": 0.05}, CHANNELS)
    pruned = list(work.prune(plan))
    expected = naive_pass(model, work, linears_of(plan), prune.channels, pruner).state_dict()
    total = 0
    for one in pruned:
        for name, tensor in one.weights.items():
            reference = expected[f"{work.checkpoint.blocks_name}.{one.index}.{name}"]
            torch.testing.assert_close(tensor, reference, rtol=2e-3, atol=2e-4)
            assert torch.equal(tensor == 0, reference == 0)
        linears = work.checkpoint.linears[one.index]
        assert one.zeros == {x.name: int((x.matrix(one.weights[x.key]) == 0).sum()) for x in linears}
        total += sum(one.zeros.values())
        assert sum(one.zeros.values()) / work.checkpoint.sizes[one.index] == pytest.approx(plan.amounts[one.index])
    assert total / sum(work.checkpoint.sizes) == pytest.approx(0.35, abs=0.01)
    assert all(same_bits(tensor, model.state_dict()[name]) for name, tensor in before.items())


def test_more_than_the_mlp_has_is_refused() -> None:
    work = bench_of(tiny("llama"), settings())
    with refused(r"^sparsity: 0.7 is more than the 0.\d+ that channels of this model can make"):
        work.budget(0.7)


@parametrize(
    ("step", "heads", "highest"), [(64, False, "0"), (10, False, "0"), (10, True, "0"), (7, False, r"0\.1714")]
)
def test_the_setting_that_bounds_the_sparsity_is_named(step: int, heads: bool, highest: str) -> None:
    said = f"of 10 channels of an MLP a multiple of {step} must stay, so that the sparsity is {highest} at most"
    with refused(f"^prune.channels.round_to: {said}, not 0.2; lower it$"):
        raise too_sparse(0.2, [block(step, heads)] * 3, ChannelSettings(round_to=step, heads=heads))


def test_the_bound_of_beta_keeps_every_block_within_what_channels_can_make() -> None:
    work = bench_of(tiny("llama"), settings())
    budget = work.budget(0.4)
    from atp_tune.allocations.formulas import atp

    plan = make_plan("wanda", "atp", budget, {"beta": atp.bounds(budget)["beta"][1]}, CHANNELS)
    step = work.channels[0].mlp.weights / work.channels[0].size
    assert max(plan.amounts) == pytest.approx(budget.highest, abs=step)
    assert budget.mean(plan.amounts) == pytest.approx(0.4, abs=step)


# what does not go with channels
