"""Training of kept weights, by `finetune` or by the table `[recover]` of a study, after its search and under guard.

    recover = {}            with the defaults below
    [recover]
    steps = 128

`recovered`, in the configuration of the best trial, holds the same settings and what they came to. See
docs/finetune.md.
"""

from typing import Literal, Self

from pydantic import Field, FiniteFloat, model_validator

from atp_tune.measures import Change, Perplexity
from atp_tune.utils.frozen import FrozenModel, SettingsTable

FEWEST, MOST = 8, 32  # windows that are held out
SHARE = 10  # one of so many windows is held out
Loss = Literal["both", "kl", "next-token"]
NLL_SHARES: dict[Loss, float] = {"both": 0.5, "kl": 0.0, "next-token": 1.0}  # the rest is KL from the dense model
RATES = {"lora": 1e-3, "scales": 3e-3}  # default learning rates
RANK = 8  # of LoRA, by default


class Training(SettingsTable):
    """How kept weights are trained; all zeros stay."""

    train: Literal["scales", "lora"] = Field(
        "scales", description="scales: one for each row and column of each linear; lora: masked LoRA"
    )
    loss: Loss = Field(
        "both",
        description="kl: KL divergence from the dense model's predictions; next-token: NLL of the text; both: the mean",
    )
    steps: int = Field(64, ge=1, description="training steps, each on one batch")
    batch: int = Field(2, ge=1, description="windows per step; of an image classifier, images")
    seqlen: int | None = Field(
        None, ge=2, description="tokens per window; default: those of the validation text's windows"
    )
    learning_rate: float | None = Field(
        None, gt=0, description="the highest, after warm-up; default: 0.003, of lora 0.001"
    )
    rank: int | None = Field(None, ge=1, description="of lora alone; default: 8")
    alpha: int | None = Field(
        None, ge=1, description="of lora alone: adapters are scaled by alpha / rank; default: twice the rank"
    )
    eval_every: int = Field(8, ge=1, description="steps between two measurements of the loss on held-out windows")
    patience: int = Field(
        3,
        ge=0,
        description="measurements without a lower held-out loss after which training ends; 0: nothing is held out",
    )
    seed: int = Field(0, ge=0, description="of adapters and of the order of the windows")

    @model_validator(mode="after")
    def _of_lora(self) -> Self:
        for key in ("rank", "alpha"):
            if getattr(self, key) is not None and self.train != "lora":
                raise ValueError(f'{key}: is a setting of train = "lora"; leave it out')
        return self

    @property
    def has_teacher(self) -> bool:
        """Whether the dense model's predictions take part in the loss."""
        return NLL_SHARES[self.loss] < 1

    @property
    def rate(self) -> float:
        """The highest learning rate."""
        return RATES[self.train] if self.learning_rate is None else self.learning_rate

    def filled(self, seqlen: int | None) -> "Training":
        """The settings with a value for each; `seqlen`: tokens per window, if they have none."""
        rank = (self.rank or RANK) if self.train == "lora" else None
        own = {
            "rank": rank, "alpha": rank and (self.alpha or 2 * rank), "learning_rate": self.rate,
            "seqlen": self.seqlen or seqlen,
        }  # fmt: skip
        return Training(**{**self.model_dump(include={*Training.model_fields}), **own})


class RecoverConfig(Training):
    """How the kept weights of the best plan are trained; training text: the calibration text's."""

    min_increase: float = Field(
        0.0,
        ge=0,
        description="train only if pruning raises the perplexity on the validation text by this share: 0.2 is 20 %",
    )


class RecoveredScores(FrozenModel):
    """Perplexity on one text after training, and its change from the same plan before, paired by windows."""

    perplexity: Perplexity
    change: Change


class Recovered(FrozenModel):
    """The result of training by `settings`.

    `kept`: whether the loss on held-out windows and the perplexity on the validation text fell, so that `apply` trains
    the model; else `reason` says what did not, or why there was no training (`skipped`), in one line. `step` is the
    step whose weights were best, of `steps` that were done. `test` is None with the paper's protocol, `against_uniform`
    (on the test text) if uniform was not measured. `kinds`: perplexity by kind of a mixed test text.
    """

    settings: RecoverConfig
    kept: bool
    skipped: bool = False
    reason: str = ""
    step: int = 0
    steps: int = 0
    seconds: FiniteFloat = 0.0
    validation: RecoveredScores | None = None
    test: RecoveredScores | None = None
    against_uniform: Change | None = None
    kinds: dict[str, Perplexity] = Field({})
