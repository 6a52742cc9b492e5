"""The study of a model that comes without a study file: a preset says how much is measured, a choice on which texts.

Quick is a first answer: about 3 minutes of two cores for a model of 135M parameters, with one draw of the calibration
text and no training. Thorough is the setup of the papers (128 calibration windows of 2048 tokens, the whole of
WikiText-2).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atp_tune.errors import UserError
from atp_tune.measures import Limit
from atp_tune.spec.texts import MANUAL, MIXED, Text, short_source

if TYPE_CHECKING:
    from atp_tune.checkpoints.models import ModelFolder

C4_WINDOWS = 256  # of a part of C4 that would be measured whole; the papers measure C4 on as many


@dataclass(frozen=True)
class Preset:
    """Sizes of a study: windows of each text (None: all of it), at most `seqlen` tokens each, draws and trials.

    Over an interval of sparsities: `screened` points on a part of the validation text, of which `confirmed` sparsities
    are measured in full; within a limit at most `limited` trials, with prices alone after a screening if
    `screens_prices`: else κ is 1. `recovers`: the best plan's kept weights are trained.
    """

    trials: int
    seqlen: int
    calibration: int
    validation: int | None
    test: int | None
    screened: int
    confirmed: int = 8
    limited: int = 12
    screens_prices: bool = True
    draws: int = 3
    recovers: bool = True

    @property
    def windows(self) -> dict[str, int | None]:
        """Number of windows by role."""
        return {"calibration": self.calibration, "validation": self.validation, "test": self.test}


PRESETS = {
    "quick": Preset(
        trials=8,
        seqlen=256,
        calibration=20,  # four of each of five kinds of text
        validation=20,
        test=25,
        screened=12,
        confirmed=5,
        limited=6,
        screens_prices=False,
        draws=1,
        recovers=False,
    ),
    "balanced": Preset(trials=20, seqlen=2048, calibration=64, validation=64, test=None, screened=36),
    "thorough": Preset(trials=40, seqlen=2048, calibration=128, validation=None, test=None, screened=48, confirmed=10),
}
RECOVERED = 256  # tokens per window, at most, on which kept weights are trained, see docs/finetune.md
WORTH_TRAINING = 0.25  # increase of perplexity by pruning from which on training takes off 8 % at least, as measured
STRIDE = 4  # every so many-th validation window is screened
_C4: dict[str, dict[str, Any]] = {
    "calibration": {"source": "c4", "split": "train", "sampling": "random"},
    "validation": {"source": "c4", "split": "validation", "part": (0.0, 0.5)},
    "test": {"source": "c4", "split": "validation", "part": (0.5, 1.0)},
}
_WIKITEXT2: dict[str, dict[str, Any]] = {
    role: {"source": "wikitext2", "split": split}
    for role, split in {"calibration": "train", "validation": "validation", "test": "test"}.items()
}
HUB_TEXTS: Mapping[str, Mapping[str, dict[str, Any]]] = {
    "papers": {**_WIKITEXT2, "calibration": _C4["calibration"]},
    "c4": _C4,
    "wikitext2": _WIKITEXT2,
}
LOCAL_TEXTS = {"mixed": MIXED, "packaged": MANUAL}  # their sources, of each of which three parts are used
WHOLE = (0.0, 1.0)
PARTS = {"calibration": (0.0, 0.3), "validation": (0.3, 0.65), "test": (0.65, 1.0)}


def texts_from_hub(choice: str, preset: Preset, folder: "ModelFolder") -> dict[str, dict[str, Any]]:
    """The texts of a study, by role, from one of `HUB_TEXTS`."""
    sizes, seqlen = preset.windows, min(preset.seqlen, context_length(folder) or preset.seqlen)
    found = {
        role: {**text, "nsamples": sizes[role] or (C4_WINDOWS if text["source"] == "c4" else None), "seqlen": seqlen}
        for role, text in HUB_TEXTS[choice].items()
    }
    found["calibration"]["draws"] = preset.draws
    return {role: {key: value for key, value in text.items() if value is not None} for role, text in found.items()}


def texts_from(
    sources: Mapping[str, tuple[str, tuple[float, float]]], preset: Preset, folder: "ModelFolder", base: Path
) -> dict[str, dict[str, Any]]:
    """The texts of a study, from a local source and a part of it for each role, with as many windows as there are.

    Documents of a source that is cut into parts are shuffled, so that the parts are of one kind; paragraphs, where it
    has one document, stay in their order. UserError if a part is shorter than one window.
    """
    from atp_tune.inputs.windows import first_windows

    sizes, seqlen = preset.windows, min(preset.seqlen, context_length(folder) or preset.seqlen)
    found: dict[str, dict[str, Any]] = {}
    cut = {source for source, part in sources.values() if part != WHOLE}
    shuffled = {source for source in cut if _has_documents(source, base)}
    for role, (source, part) in sources.items():
        own = {"source": source, "part": part, **({"shuffle": True} if source in shuffled else {})}
        text = Text(**own, seqlen=seqlen)
        draws = preset.draws if role == "calibration" else 1
        most = (sizes[role] or 1_000_000 // draws) * draws
        try:
            there = len(first_windows(text, folder.path, base, most, trusted=folder.trusted))
        except UserError as error:
            what = f"the part of {short_source(source)} for {role}" if part != WHOLE else f"the text for {role}"
            raise UserError(f"{what}: {error}{', or' if ';' in str(error) else ';'} give a longer text") from None
        draws = min(draws, there)
        found[role] = {**own, "nsamples": there // draws, "seqlen": seqlen}
        if role == "calibration":
            found[role]["draws"] = draws
    return found


def _has_documents(source: str, base: Path) -> bool:
    """Whether a local source has more than one document; False for one that cannot be read, which is said later."""
    from atp_tune.inputs.documents import documents

    try:
        return len(documents(Text(source=source), base)) > 1
    except UserError:
        return False


def search_over_interval(
    preset: Preset, windows: int | None, limit: Limit | None, is_unscreened: bool = False
) -> dict[str, Any]:
    """The table `search` of a study over an interval of sparsities, with or without a limit.

    `windows`: of the validation text, None if their number is not known; `is_unscreened`: within a limit. UserError if
    there is one window only: at least two are screened, for an error.
    """
    if windows == 1:
        raise UserError("texts.validation: has one window, and an interval of sparsities needs two; give a longer text")
    stride = STRIDE if windows is None else min(STRIDE, windows // 2)
    screen = {"trials": preset.screened, "confirm": preset.confirmed, "stride": stride}
    return {
        "objective": ["kl"] if limit and "max_kl" in limit else ["perplexity"],
        "sampler": "tpe",
        **({} if limit and is_unscreened else {"screen": screen}),
        **({"trials": preset.limited} if limit else {}),
    }


def context_length(folder: "ModelFolder") -> int | None:
    """Tokens that a model can take at once; None if its config does not say."""
    from atp_tune.checkpoints.classes import model_config

    config = model_config(folder.path, folder.trusted).get_text_config()
    return getattr(config, "max_position_embeddings", None)
