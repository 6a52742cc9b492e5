"""NaN and infinity, wherever they can arise, end a trial or a command with the reason, and no plan is made of them."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from expect import parametrize, slow
from pages import REPO, filled
from tinystudy import few_steps, run
from torch import Tensor

from atp_tune.blocks import gradients
from atp_tune.blocks.gradients import BlockGradients, Sample
from atp_tune.blocks.replay import AutoBatch
from atp_tune.checkpoints.checkpoint import Checkpoint
from atp_tune.inputs.windows import TOKEN_WINDOWS
from atp_tune.pruners.rounding import Grid
from atp_tune.pruners.statistics import InputNorms
from atp_tune.scores import next_token

Break = Callable[[pytest.MonkeyPatch], None]


def infinite_gradient(patch: pytest.MonkeyPatch) -> None:
    """One weight's gradient is infinite, in one block."""
    own = BlockGradients.backward

    def broken(self: Any, index: int, entering: Tensor, leaving: Tensor, take: gradients.Take, each: bool) -> Tensor:
        def infinite(index: int, total: Any) -> None:
            if index == 2:
                next(iter(total.values()))[0, 0] = math.inf
            take(index, total)

        return own(self, index, entering, leaving, infinite, each)

    patch.setattr(BlockGradients, "backward", broken)


def infinite_norm(patch: pytest.MonkeyPatch) -> None:
    own = InputNorms.add

    def broken(self: InputNorms, x: Tensor) -> None:
        own(self, x)
        self._squares[0] = math.inf

    patch.setattr(InputNorms, "add", broken)


def undefined_scale(patch: pytest.MonkeyPatch) -> None:
    own = Grid.of

    def broken(groups: Tensor, bits: int, symmetric: bool) -> Grid:
        found = own(groups, bits, symmetric)
        found.scale[0] = math.nan
        return found

    patch.setattr(Grid, "of", broken)


@dataclass(frozen=True)
class Case:
    """What is not finite, the settings of a study in which it is met, and how its trials end."""

    what: str
    settings: tuple[str, ...]
    breaks: Break
    reason: str


PRICES, ROWS = (f'allocation="{name}"' for name in ("gradient", "gradient-rows"))
CASES = [
    Case("a gradient, for `gradient`", (PRICES,), infinite_gradient, "prices are not finite"),
    Case("a gradient, for `gradient-rows`", (ROWS,), infinite_gradient, "prices of rows are not finite"),
    Case("a gradient, for bits by prices", (PRICES, "bits=3.5"), infinite_gradient, "prices of bits are not finite"),
    Case("a statistic of inputs", (), infinite_norm, "norms of inputs not finite"),
    Case("a scale of rounded weights", ("bits=3.5",), undefined_scale, "Hessian not finite"),
]
ELSEWHERE = [  # seen in other tests
    ("a weight of the model, a loss of the dense model", "the study does not begin: one line, exit code 2"),
    ("a Hessian (SparseGPT, ALPS, refinement, GPTQ, channels)", "the trial fails: `Hessian not finite`"),
    ("a loss of the pruned model", "the trial fails: `perplexity is inf`"),
    ("a weight or a sparsity from a plug-in", "the trial fails, and the message names the plug-in"),
    ("a spectrum without a tail (`alphapruning`)", "the trial fails, and the message names block and linear"),
    ("a loss in training", "training ends with the reason, and the plan stays as it was pruned"),
    ("a perplexity on the test text", "it is shown as `inf`, without a change, and written into no JSON file"),
]


@slow
@parametrize("case", CASES, ids=lambda case: case.what)
def test_a_trial_ends_with_the_reason(case: Case, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few_steps(monkeypatch)
    case.breaks(monkeypatch)
    if "bits=3.5" in case.settings:
        tiny = (place / "tiny.toml").read_text().replace("sparsity = 0.6", "bits = 3.5")
        (place / "tiny.toml").write_text(tiny + "\n[quantize]\ngroup_size = 16\n")
    trial = run(place, *case.settings, "search.trials=2").get_trials()[-1]  # the first may be uniform
    assert trial.value is None
    assert case.reason in trial.user_attrs["failure"]


def test_the_page_has_the_table() -> None:
    rows = [f"| {case.what} | the trial fails: `{case.reason}` |" for case in CASES]
    rows += [f"| {what} | {end} |" for what, end in ELSEWHERE]
    table = "\n".join(["| what is NaN or infinite | what happens |", "|---|---|", *rows])
    filled(REPO / "docs/reliability.md", "tests/test_not_finite.py", table)


def test_gradients_in_float16_are_those_of_float32(tiny_place: Path) -> None:
    """Without a scale their median error was 0.2 at 2,048 tokens, and the worst linear's rows had prices of noise."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192, hidden_size=32, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4
    )
    model, ids = LlamaForCausalLM(config).eval(), torch.randint(8192, (2, 512))
    full, half = (gradients_of(model.to(dtype), ids) for dtype in (torch.float32, torch.float16))
    assert max([float((half[key] - full[key]).norm() / full[key].norm()) for key in full]) < 0.02


def gradients_of(model: torch.nn.Module, ids: Tensor) -> dict[tuple[int, str], Tensor]:
    checkpoint = Checkpoint(model, torch.device("cpu"), "none")  # type: ignore[arg-type]
    batch = AutoBatch(torch.device("cpu"), 1, 1, lambda _: None)
    found = dict[tuple[int, str], Tensor]()
    BlockGradients(checkpoint, TOKEN_WINDOWS, next_token.NEXT_TOKEN.gradient, batch, batch).visit(
        Sample(ids),
        lambda index, linear, weight: weight,
        lambda index, total: found.update({(index, key): value.clone() for key, value in total.items()}),
    )
    return found


def test_a_gradient_that_overflows_is_scaled_down() -> None:
    """ReLU of a large input: the first scale overflows, a lower one does not."""
    x = torch.full((64, 1), 3e3, dtype=torch.float16)
    weight = torch.full((1, 1), 0.5, dtype=torch.float16, requires_grad=True)
    [found] = gradients._by(x @ weight, [weight], torch.full((64, 1), 1e-6))
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(64 * 3e3 * 1e-6, rel=1e-3)
