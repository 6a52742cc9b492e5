"""Another kind of input and another score: pixels and classes, as a file and a row each would bring them in."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from families import CPU, nlls_of, scores_of
from plans import planned
from torch import Tensor
from torch.nn import functional
from transformers import ViTConfig, ViTForImageClassification

from atp_tune import inputs, scores
from atp_tune.allocations import Budget
from atp_tune.blocks.verification import Difference, is_equal
from atp_tune.checkpoints.checkpoint import Checkpoint
from atp_tune.checkpoints.models import ModelFolder
from atp_tune.config.prune import PruneConfig
from atp_tune.events import ignore_events
from atp_tune.inputs import KINDS, Batch
from atp_tune.inputs.tokens import TOKEN_WINDOWS
from atp_tune.run.session import Session
from atp_tune.scores import SCORES, Scores
from atp_tune.scores.next_token import NEXT_TOKEN

SIZE, PATCH, CLASSES = 8, 4, 5


@dataclass(frozen=True)
class Images:
    """Items and, on the device, a batch of them: pixels [images, 3, height, width] and classes [images]."""

    pixels: Tensor
    classes: Tensor
    content: str = "images"
    positions: int = (SIZE // PATCH) ** 2 + 1

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, items: slice) -> "Images":
        return Images(self.pixels[items], self.classes[items])

    def batch(self, device: torch.device) -> "Images":
        return Images(self.pixels.to(device), self.classes.to(device))

    def thinned(self, stride: int) -> "Images":
        return self[::stride]


def random_images(count: int, seed: int) -> Images:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(count, 3, SIZE, SIZE, generator=generator)
    return Images(pixels, torch.randint(CLASSES, (count,), generator=generator))


class Pixels:
    """The part of an `InputKind` that a context which is given its items asks for."""

    called = "an image"
    has_steps = False

    def of(self, items: Mapping[str, Images]) -> "Pixels":
        return self

    def facts(self, items: Mapping[str, Images]) -> dict[str, bool]:
        return {}

    def forward(self, model: Any, batch: Images) -> Any:
        return model(pixel_values=batch.pixels)

    def examples(self, checkpoint: Checkpoint, items: int, positions: int) -> tuple[Images, ...]:
        return tuple(random_images(items, seed) for seed in range(3))


class Classes:
    def probes(self, checkpoint: Checkpoint) -> list[Images]:
        return [random_images(2, 0)]

    def check_head(self, replay: Any, runs: Any, logits: Tensor, is_routed: bool) -> None:
        if not is_equal(replay.logits(runs[0].batch, runs[0].hidden), logits):
            raise Difference("has other logits")

    def head_cost(self, checkpoint: Checkpoint, positions: int) -> tuple[int, int]:
        return 1, 12 * CLASSES

    def items(self, replay: Any, batch: Batch, hidden: Tensor, dense: Tensor | None) -> Scores:
        own = replay.logits(batch, hidden).log_softmax(1)
        nlls = functional.nll_loss(own, batch.classes, reduction="none").tolist()
        if dense is None:
            return {"nlls": nlls}
        other = replay.logits(batch, dense).log_softmax(1)
        kls = functional.kl_div(own, other, reduction="none", log_target=True).sum(1)
        return {"nlls": nlls, "kls": kls.tolist()}


PIXELS, CLASSIFIED = Pixels(), Classes()


@pytest.fixture
def context(monkeypatch: pytest.MonkeyPatch) -> Session:
    monkeypatch.setitem(inputs.KINDS, "pixels", f"{__name__}:PIXELS")
    monkeypatch.setitem(scores.SCORES, "hues", f"{__name__}:CLASSIFIED")
    torch.manual_seed(0)
    model = ViTForImageClassification(
        ViTConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=SIZE,
            patch_size=PATCH, num_labels=CLASSES,
        )
    )  # fmt: skip
    items = {"calibration": random_images(6, 1), "validation": random_images(7, 2)}
    folder, checkpoint = ModelFolder(Path(), "content", "vit"), Checkpoint(model, CPU)
    return Session(folder, checkpoint, items, PruneConfig(), ignore_events, inputs="pixels", score="hues")


def test_a_context_prunes_and_scores_what_it_knows_nothing_of(context: Session) -> None:
    model, search = context.checkpoint.model, random_images(7, 2)
    with torch.inference_mode():
        own = functional.cross_entropy(model(pixel_values=search.pixels).logits, search.classes, reduction="none")
    assert nlls_of(context, context.blocks(None), "validation") == pytest.approx(own.tolist(), rel=1e-5)
    plan = planned("sparsegpt", "uniform", (0.5,) * 3)
    pruned = [(block.index, block.weights) for block in context.prune(plan)]
    found = scores_of(context, pruned, "validation", kl=True)
    assert len(found["nlls"]) == len(found["kls"]) == 7 and min(found["kls"]) > 0
    assert scores_of(context, context.blocks(None), "validation", kl=True)["kls"] == pytest.approx([0.0] * 7, abs=1e-6)


def test_its_dense_model_is_measured_for_allocations(context: Session) -> None:
    budget: Budget = context.budget(0.5)
    assert len(budget.dense_metrics.outlier_ratios(3)) == 3  # type: ignore[union-attr]
    assert context.contents() == {
        "model.content": "content",
        "model.dtype": "float32",
        "images.calibration.content": "images",
        "images.validation.content": "images",
    }
    assert len(context.screening(2).windows["validation"]) == 4
    assert not context.bos


def test_the_rows_are_found() -> None:
    assert KINDS["tokens"] is TOKEN_WINDOWS
    assert SCORES["next-token"] is NEXT_TOKEN
