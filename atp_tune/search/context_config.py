"""The settings of a context of trials, from a study or from a configuration."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from atp_tune.checkpoints.models import Ask, ask_nothing
from atp_tune.spec.config import Config
from atp_tune.spec.images import CLASSES, IMAGES
from atp_tune.spec.plugged import plug_in_config
from atp_tune.spec.prune import PruneConfig
from atp_tune.spec.quantize import QuantizeConfig
from atp_tune.spec.study import Data, ModelConfig, Study
from atp_tune.spec.typed import Interval


@dataclass(frozen=True)
class ContextConfig:
    """The settings of a context: model, pruners, texts by role, and the folder of relative paths (`base`).

    `batches`: sizes for `TrialContext.begin`. `draws`: of the calibration text, each with a pool of its own if plans
    are found `by_prices`. `bos`: windows begin with BOS; None if
    the dense model's perplexity on the calibration text decides. `inputs`, `score`: a row of `inputs.KINDS` and of
    `scores.SCORES`. `sparsities`: the interval of a study that searches one. `quantize`: weights are rounded,
    after pruning to `bits` in every block. `ask`: what a command must know before the model is read.
    """

    model: ModelConfig
    prune: PruneConfig
    texts: dict[str, Data]
    base: Path
    device: str
    batches: Mapping[str, int] = field(default_factory=dict)
    draws: int = 1
    bos: bool | None = False
    inputs: str = "tokens"
    score: str = "next-token"
    sparsities: Interval | None = None
    quantize: QuantizeConfig | None = None
    bits: int | None = None
    by_prices: bool = False
    ask: Ask = ask_nothing

    @classmethod
    def of_study(cls, study: Study, base: Path, bos: bool | None) -> "ContextConfig":
        """The settings for a study's trials."""
        data, model, interval = study.data, study.model, study.interval
        texts: dict[str, Data] = {"calibration": data.calibration, "validation": data.validation}
        if data.test is not None:
            texts["test"] = data.test
        kind, draws, score = inputs_of(study.score), data.calibration.draws, study.score
        made = cls(model, study.prune, texts, base, study.device, {}, draws, bos, kind, score, interval)
        return replace(made.rounding(study), by_prices=bool(study.allocation.by_prices))

    def rounding(self, study: Study) -> "ContextConfig":
        """The same, with weights rounded as a study asks."""
        return self if study.bits is None else replace(self, quantize=study.quantize, bits=study.fixed_bits)

    @classmethod
    def of_config(
        cls, config: Config, texts: dict[str, Data], base: Path, device: str, allowed: Mapping[str, bool]
    ) -> "ContextConfig":
        """The settings for a configuration's plan, with its plug-ins; `allowed` as for `apply`, UserError likewise."""
        plug_in_config(config, texts, base, allowed.get("trust_plugins", False))
        model, batches, bos = config.model.model(allowed), config.batches, config.bos
        kind, score = inputs_of(config.score), config.score
        made = cls(model, config.prune, texts, base, device, batches=batches, bos=bos, inputs=kind, score=score)
        return replace(made, quantize=config.quantize, bits=config.fixed_bits)


def inputs_of(score: str) -> str:
    """The kind of input that a score is of: a row of `inputs.KINDS`."""
    return IMAGES if score == CLASSES else "tokens"
