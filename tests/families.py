"""Tiny random models of the families that the engine must run, and a bench over them."""

from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from atp_tune.blocks.prune_pass import PrunedBlock
from atp_tune.blocks.replay import Replay
from atp_tune.blocks.verification import verified
from atp_tune.checkpoints.checkpoint import Checkpoint
from atp_tune.checkpoints.files import Offload
from atp_tune.checkpoints.models import ModelFolder
from atp_tune.config.prune import PruneConfig
from atp_tune.config.study import ModelConfig
from atp_tune.events import EventHandler, Place, ignore_events
from atp_tune.inputs.items import Items
from atp_tune.inputs.windows import TOKEN_WINDOWS
from atp_tune.run.observers import RoleScores
from atp_tune.run.session import Session, Setup
from atp_tune.scores import Scores
from atp_tune.scores.next_token import NEXT_TOKEN

CPU = torch.device("cpu")
VOCABULARY = 97
TOKENS = 13

SETTINGS: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("models.yaml").read_text())


def by_kind(families: dict[str, Any]) -> dict[str, tuple[str, dict[str, Any]]]:
    """The type of each family, and its settings."""
    return {
        name: (found["kind"], {key: value for key, value in found.items() if key != "kind"})
        for name, found in families.items()
    }


FAMILIES, MIXTURES = by_kind(SETTINGS["families"]), by_kind(SETTINGS["mixtures"])
ALL = FAMILIES | MIXTURES
MIXTURE, DEEPSEEK = SETTINGS["mixture"], MIXTURES["deepseek_v3"][1]
MULTIMODAL = SETTINGS["multimodal"]  # settings of the language model, of the tower, and the rest


def few(kinds: Iterable[Any], fast: Collection[Any]) -> list[Any]:
    """Parameters of a test: all kinds, those that are not `fast` in the slow suite alone."""
    return [pytest.param(kind, marks=() if kind in fast else pytest.mark.slow) for kind in kinds]


def multimodal(family: str, **settings: Any) -> Any:
    """A model that reads images beside text; `settings` of its language model come over the family's."""
    text, tower, rest = MULTIMODAL[family]
    tokens = {"image_token_id": VOCABULARY - 1} if "image_token_index" not in rest else {}
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, text_config=text | settings, vision_config=tower, **tokens, **rest)
    return AutoModelForImageTextToText.from_config(config).eval()


def tiny(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model with weights so large that every block changes what comes out; the same at every call."""
    kind, settings = ALL[family]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 1.5 / parameter.shape[-1] ** 0.5)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.to(dtype).eval()


def checkpoint_of(model: nn.Module, offload: Offload | None = None, device: torch.device = CPU) -> Checkpoint:
    return Checkpoint(model, device, offload)


def replay_of(model: nn.Module) -> Replay:
    return Replay(checkpoint_of(model), TOKEN_WINDOWS)


def check(checkpoint: Checkpoint) -> Replay:
    """The replay of a language model, compared with the model itself."""
    return verified(checkpoint, TOKEN_WINDOWS, NEXT_TOKEN)


def random_ids(windows: int, tokens: int = TOKENS, seed: int = 0) -> Tensor:
    return torch.randint(VOCABULARY, (windows, tokens), generator=torch.Generator().manual_seed(seed))


class NoFolder(ModelFolder):
    """Stands for the folder of a model that was never saved."""

    def stored_bytes(self) -> tuple[int, int]:
        return 0, 4


def setup_of(prune: PruneConfig | None = None, watch: EventHandler = ignore_events, **more: Any) -> Setup:
    """The setup of a bench whose model and windows are given."""
    return Setup(ModelConfig(source="given"), prune or PruneConfig(), {}, Place(Path(), watch=watch), **more)


def bench_of(
    model: nn.Module,
    prune: PruneConfig | None = None,
    watch: EventHandler = ignore_events,
    folder: Path = Path(),
    offload: Offload | None = None,
    ids: Callable[[int, int, int], Tensor] | None = None,
    device: torch.device = CPU,
) -> Session:
    """A bench over random windows, or those that `ids` draws: 5 of calibration, 7 of search, 3 of report."""
    windows, draw = {"calibration": 5, "validation": 7, "test": 3}, ids or random_ids
    texts = {
        role: Items.windows(draw(count, TOKENS, seed).numpy()) for seed, (role, count) in enumerate(windows.items())
    }
    checkpoint = checkpoint_of(model, offload, device)
    place = (folder, "content", "tiny")
    source = NoFolder(*place) if folder == Path() else ModelFolder(*place)
    return Session(source, checkpoint, texts, setup_of(prune, watch))


def scores_of(work: Session, blocks: Iterable[Any], role: str, kl: bool = False) -> Scores:
    """Scores of a model that is given as blocks, or by index and tensors, on one text."""
    given = (block if isinstance(block, PrunedBlock) else PrunedBlock(*block) for block in blocks)
    found: Scores
    [found] = work.measure(None, [RoleScores(role, kl)], blocks=given)
    return found


def nlls_of(work: Session, blocks: Iterable[Any], role: str) -> list[float]:
    """Window NLLs of a model that is given so."""
    return scores_of(work, blocks, role)["nlls"]


def copy_of(model: Any) -> dict[str, Tensor]:
    """A model's tensors as they are now."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal byte by byte, so that -0 is not 0 and NaN is itself."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
