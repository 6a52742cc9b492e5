import json
from pathlib import Path
from typing import Any

from expect import parametrize, refusal
from plans import planned

from atp_tune.config.best import (
    BothDraws,
    Config,
    EvaluationTexts,
    ModelRef,
    Sparsity,
    read_config,
)
from atp_tune.config.data import Text
from atp_tune.config.prune import PruneConfig
from atp_tune.measures import Estimate, Perplexity, Role
from atp_tune.metrics import OverDraws, Spread
from atp_tune.pruners.settings import SparseGPTSettings

GOLDEN = Path(__file__).parent / "golden" / "config.json"


def scores(search: float, report: float | None) -> dict[str, dict[Role, Estimate | None]]:
    test = None if report is None else Perplexity(value=report, stderr=0.25)
    return {"perplexity": {"validation": Perplexity(value=search, stderr=0.5), "test": test}}


DRAWN = OverDraws(
    perplexities=(13.25, 13.5), perplexity=Spread(mean=13.375, sd=0.125), changes=(-0.25, -0.125),
    change=Spread(mean=-0.1875, sd=0.0625),
)  # fmt: skip


def config(**changes: Any) -> Config:
    made = Config(
        study="smöl",
        trial=7,
        model=ModelRef(id="org/name", revision="main", sha256=None, fingerprint="ab" * 32, dtype="bfloat16"),
        plan=planned("sparsegpt", "atp", (0.575, 0.6, 0.625), {"beta": 0.0125}),
        prune=PruneConfig(
            pruners=("wanda", "sparsegpt"), statistics="dense", sparsegpt=SparseGPTSettings(damping=0.02, columns=64)
        ),
        blocks="model.layers",
        sparsity=Sparsity(target=0.6, realised=0.5995),
        scores={"best": scores(12.5, 13.25), "dense": scores(8.0, 8.5), "uniform": scores(14.0, None)},
        calibration=Text(source="c4", split="train", sampling="random", nsamples=128, seed=3),
        batches={"calibration": 8, "validation": 16},
        draws=BothDraws(best=DRAWN, uniform=None),
        texts=EvaluationTexts(
            validation=Text(source="wikitext2", split="validation", seqlen=1024),
            test=Text(source="file:texts/ünïcode.txt", part=(0.25, 1.0)),
        ),
        seed=0,
        versions={"atp_tune": "0.1.0", "torch": "2.6.0"},
        folder="../studies",
    )
    return made.model_copy(update=changes)


def message(path: Path) -> str:
    return refusal(read_config, path).replace(str(path), "FILE")


def edited(path: Path, **changes: Any) -> Path:
    path.write_text(json.dumps({**json.loads(GOLDEN.read_text()), **changes}))
    return path


# --- the format, which is published


def test_the_format_is_the_golden_file(tmp_path: Path) -> None:
    """A change of these bytes is a change of the format: add keys, never rename or remove any."""
    config().write(tmp_path / "best.json")
    assert (tmp_path / "best.json").read_bytes() == GOLDEN.read_bytes()


def test_what_an_older_version_wrote_still_reads(tmp_path: Path) -> None:
    content = json.loads(GOLDEN.read_text())
    younger = ("zero_shot", "speed", "continuations", "blocks", "linears", "batches", "draws")
    del content["folder"], content["model"]["sha256"]
    content = {key: value for key, value in content.items() if key not in younger}
    (tmp_path / "old.json").write_text(json.dumps(content))
    read = read_config(tmp_path / "old.json")
    assert (read.folder, read.model.sha256, read.blocks) == (".", None, None)


# --- files that are none


ADVICE = "is it a configuration of atp_tune (atp_tune.config/4)?"


@parametrize(
    ("changes", "expected"),
    [
        ({"colour": 1}, f"FILE: colour: Extra inputs are not permitted; {ADVICE}"),
        ({"format": "atp_tune.config/5"}, f"FILE: format: Input should be 'atp_tune.config/4'; {ADVICE}"),
        ({"plan": {"method": "magic", "allocation": "atp", "levels": [0.5]}},
         f"FILE: plan.method: Input should be 'magnitude', 'wanda', 'sparsegpt', 'dsnot' or 'alps'; {ADVICE}"),
        ({"plan": {"method": "wanda", "allocation": "atp", "levels": [0.5, 1.5]}},
         f"FILE: plan.levels.1.sparsity: Input should be less than or equal to 1; {ADVICE}"),
        ({"plan": {"method": "wanda", "allocation": "atp", "levels": []}},
         f"FILE: plan.levels: Tuple should have at least 1 item after validation, not 0; {ADVICE}"),
        ({"model": {}}, f"FILE: model.id: is needed; {ADVICE}"),
        ({"sparsity": {"target": 0.6, "realised": -1}},
         f"FILE: sparsity.realised: Input should be greater than or equal to 0; {ADVICE}"),
    ],
)  # fmt: skip
def test_a_wrong_key_is_named(changes: dict[str, Any], expected: str, tmp_path: Path) -> None:
    assert message(edited(tmp_path / "best.json", **changes)) == expected


def test_numbers_that_no_file_can_hold_are_refused(tmp_path: Path) -> None:
    """Also infinity by its size: `apply` could not write it again."""
    for number in ("NaN", "1e999"):
        text = config().to_json().replace('"seed": ', f'"x": {number},\n  "seed": ', 1)
        (tmp_path / "best.json").write_text(text)
        assert message(tmp_path / "best.json").startswith("FILE: not JSON (Out of range")


# --- written whole or not at all


@parametrize("version", [1, 2, 3])
def test_a_file_of_an_older_format_is_refused_in_one_line(tmp_path: Path, version: int) -> None:
    said = message(edited(tmp_path / "best.json", format=f"atp_tune.config/{version}", block_sparsities=[0.5]))
    assert said.startswith(f"FILE: is of an older format, atp_tune.config/{version}; search again")
