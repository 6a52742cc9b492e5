"""The points that benchmarks/compressions.py measures: ways to compress a model, each with the keys of its study."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from compressions_page import DENSE

from atp_tune.allocations import ALLOCATIONS
from atp_tune.plan import Plan
from atp_tune.run.session import Session
from atp_tune.sparse.applying import only_plan
from atp_tune.spec.study import Study
from atp_tune.spec.studyfile import StudyFile

PATH = (0.5, 0.7)  # one descent by prices serves all sparsities
COMPRESSION = ("sparsity", "bits", "prune", "quantize", "allocation", "limit", "description")  # keys of a point's own
Values = Literal["bf16", "int8", "bits"]  # what is stored of a kept weight
Keys = Mapping[str, Any]
SHARES = (50, 60, 70)  # percent of zeros
GROUPS = {"group_size": 64}  # of weights that share a scale


@dataclass(frozen=True)
class Point:
    """A way to compress: the series that it belongs to, its name there, the keys of its study, and β's sign.

    `beta`: 0 is uniform; else β is half its bound with this sign, the first point of a search.
    """

    series: str
    name: str
    keys: Keys = field(default_factory=dict)
    values: tuple[Values, ...] = ("bf16",)
    beta: int = 0

    @property
    def title(self) -> str:
        """What it is called."""
        return f"{self.series}, {self.name}"

    @property
    def runs(self) -> bool:
        """Whether tokens per second are measured: of channels, and of zeros, which do not depend on the pruner."""
        return self.series in ("zeros", "zeros, prices", "channels") or self.title == "2:4, Wanda"

    @property
    def is_dense(self) -> bool:
        """Whether nothing is done but rounding to 16 bits."""
        return self.series == DENSE

    def study_file(self, base: StudyFile) -> StudyFile:
        """The study of this point with model and texts of another."""
        data = base.study.model_dump(mode="json", exclude_unset=True)
        kept = {key: value for key, value in data.items() if key not in COMPRESSION}
        study = Study.model_validate({**kept, "sparsity": PATH[0], "allocation": "uniform", **self.keys})
        return replace(base, study=study)

    def plan(self, context: Session, file: StudyFile) -> Plan:
        """Its plan."""
        if not self.beta:
            return only_plan(file, context, {})
        half = ALLOCATIONS["atp"].initial_points(context.budget(file.study.highest))[0]["beta"]
        return only_plan(file, context, {"beta": self.beta * half})


def zeros(percent: int, pruner: str = "wanda", allocation: str = "uniform", **more: Any) -> Keys:
    """Zeros anywhere; Wanda's kept weights are refined."""
    prune = {"pruners": [pruner], **({"refine": 5} if pruner == "wanda" else {})}
    return {"sparsity": percent / 100, "prune": prune, "allocation": allocation, **more}


def pattern(pruner: str, **more: Any) -> Keys:
    """Two zeros in every four inputs."""
    return {"sparsity": 0.5, "prune": {"pruners": [pruner], "pattern": "2:4", **more}}


def channels(percent: int) -> Keys:
    """Fewer channels, refitted."""
    return {"sparsity": percent / 100, "prune": {"pattern": "channels"}, "allocation": "atp"}


def rounded(bits: float, quantizer: str, sign: int = 0) -> Point:
    """Fewer bits, zeros nowhere."""
    name = f"{bits:g}" + {0: "", 1: ", β > 0", -1: ", β < 0"}[sign]
    keys = {"sparsity": None, "bits": bits, "quantize": {"quantizers": [quantizer], **GROUPS}, "allocation": "atp"}
    return Point(f"bits, {quantizer.upper()}", name, keys, ("bits",), sign)


def by_prices(bits: float) -> Point:
    """Fewer bits by GPTQ, those of each linear by prices."""
    keys = {**rounded(bits, "gptq").keys, "allocation": "prices"}
    return Point("bits, GPTQ, prices", f"{bits:g}", keys, ("bits",))


def in_order(bits: float) -> Point:
    """Fewer bits by GPTQ, columns in the order of their inputs' size."""
    keys = {**rounded(bits, "gptq").keys, "quantize": {"quantizers": ["gptq"], **GROUPS, "act_order": True}}
    return Point("bits, GPTQ, act-order", f"{bits:g}", keys, ("bits",))


def zeros_and_bits(percent: int, bits: int, pruner: str = "wanda", allocation: str = "uniform") -> Point:
    """Zeros, and the others rounded by GPTQ."""
    name = f"{percent} %, {bits} bits" + (", SparseGPT" if pruner != "wanda" else "")
    more = {"bits": bits, "quantize": {"quantizers": ["gptq"], **GROUPS}}
    series = "zeros and bits" + (", prices" if allocation == "prices" else "")
    return Point(series, name, zeros(percent, pruner, allocation, **more), ("bits",))


def points() -> Iterator[Point]:
    """All points, the most telling first, those that need a descent by prices last."""
    both: tuple[Values, ...] = ("int8", "bf16")
    yield Point(DENSE, "16 bits")
    yield rounded(4, "gptq")
    yield rounded(3, "gptq")
    yield Point("zeros", "50 %", zeros(50), both)
    yield zeros_and_bits(50, 4)
    yield Point("channels", "25 %", channels(25), beta=1)
    yield rounded(3.5, "gptq", -1)
    yield in_order(3)
    yield from (by_prices(bits) for bits in (3.5, 3, 4.5))
    yield Point("zeros", "70 %", zeros(70), both)
    yield Point("zeros", "60 %", zeros(60), both)
    yield Point("2:4", "Wanda", pattern("wanda", refine=5))
    yield in_order(3.5)
    yield zeros_and_bits(50, 8)
    yield from (Point("channels", f"{percent} %", channels(percent), beta=1) for percent in (15, 35))
    yield from (rounded(bits, "rtn") for bits in (3, 4))
    yield from (Point("zeros, prices", f"{percent} %", zeros(percent, "wanda", "prices"), both) for percent in SHARES)
    yield zeros_and_bits(50, 4, "wanda", "prices")
    yield from (Point("zeros, SparseGPT", f"{percent} %", zeros(percent, "sparsegpt"), ("int8",)) for percent in SHARES)
    yield zeros_and_bits(50, 4, "sparsegpt")
    yield Point("2:4", "SparseGPT", pattern("sparsegpt"))
    yield from (rounded(8, quantizer) for quantizer in ("gptq", "rtn"))
    yield rounded(3.5, "rtn", -1)
    yield from (rounded(bits, quantizer) for bits in (3.5, 4.5) for quantizer in ("gptq", "rtn"))
