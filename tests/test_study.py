from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from atp_tune.config.data import KINDS, MANUAL, MIXED, Text
from atp_tune.config.prune import PruneConfig
from atp_tune.config.search import SearchConfig
from atp_tune.config.study import AllocationConfig, ModelConfig, Study
from atp_tune.config.studyfile import PATTERNS, keys_of, table_of


def raw(**changes: Any) -> dict[str, Any]:
    texts = {
        "calibration": {"source": "c4"},
        "validation": {"source": "wikitext2", "split": "validation"},
        "test": {"source": "wikitext2", "split": "test"},
    }
    base = {"sparsity": 0.5, "model": {"source": "org/name"}, "texts": texts, "search": {"trials": 1}}
    return base | changes


def field_of(key: str) -> Any:
    *tables, name = key.split(".")
    table: type[BaseModel] | None = Study
    for part in tables:
        assert table
        table = table_of(table, part)
    assert table
    return table.model_fields[name]


def test_defaults() -> None:
    study = Study.model_validate(raw())
    assert study.protocol == "held-out"
    assert study.prune.pruners == ("wanda",)
    assert study.allocation.names == ("atp",)
    assert study.test_text is study.texts.test


def test_frozen() -> None:
    study = Study.model_validate(raw())
    with pytest.raises(ValidationError):
        study.sparsity = 0.1  # type: ignore[misc]


def test_round_trip_through_json() -> None:
    study = Study.model_validate(raw())
    assert Study.model_validate_json(study.model_dump_json()) == study


def test_paper_protocol_reports_on_the_search_text() -> None:
    data = raw(protocol="paper")
    with pytest.raises(ValidationError, match="leave it out"):
        Study.model_validate(data)
    del data["texts"]["test"]
    study = Study.model_validate(data)
    assert study.test_text is study.texts.validation


def test_held_out_protocol_needs_a_report_text() -> None:
    data = raw()
    del data["texts"]["test"]
    with pytest.raises(ValidationError, match=r"texts\.test: is needed"):
        Study.model_validate(data)


@pytest.mark.parametrize("role", ["calibration", "validation", "test"])
@pytest.mark.parametrize("other", ["calibration", "validation", "test"])
def test_roles_never_share_a_text(role: str, other: str) -> None:
    data = raw()
    data["texts"][role] = data["texts"][other]
    if role == other:
        Study.model_validate(data)
        return
    with pytest.raises(ValidationError, match="reads the same documents"):
        Study.model_validate(data)


@pytest.mark.parametrize(
    ("one", "other", "overlap"),
    [
        ((0, 0.5), (0.5, 1), False),
        ((0, 0.5), (0.4, 1), True),
        ((0, 1), (0.4, 0.6), True),
        ((0.5, 1), (0, 0.5), False),
    ],
)
def test_overlap_of_parts(one: tuple[float, float], other: tuple[float, float], overlap: bool) -> None:
    first, second = Text(source="c4", part=one), Text(source="c4", part=other)
    assert first.overlaps(second) is second.overlaps(first) is overlap
    assert not first.overlaps(Text(source="c4", part=other, split="validation"))
    shuffled = [text.model_copy(update={"shuffle": True}) for text in (first, second)]
    assert shuffled[0].overlaps(shuffled[1]) is overlap
    assert shuffled[0].overlaps(second) is second.overlaps(shuffled[0]) is True


SOURCES = {"c4": {"c4"}, MIXED: {*KINDS}, MANUAL: {"manual"}, **{f"{MIXED}:{kind}": {kind} for kind in KINDS}}


@pytest.mark.parametrize("one", SOURCES)
def test_overlap_of_kinds(one: str) -> None:
    """`mixed` and a kind of it, or the manual by its other name, were taken for texts that share nothing."""
    for other, kinds in SOURCES.items():
        for part, is_same in (((0, 0.5), True), ((0.5, 1), False)):
            cut_elsewhere = one != other and MANUAL in (one, other)  # `mixed` leaves some of the manual out
            found = Text(source=one, part=(0, 0.5), nsamples=2).overlaps(Text(source=other, part=part))
            assert found is bool(SOURCES[one] & kinds and (is_same or cut_elsewhere)), (other, part)


@pytest.mark.parametrize(
    ("table", "values", "message"),
    [
        (ModelConfig, {"source": "pypi:a"}, "source: must pin a wheel"),
        (ModelConfig, {"source": "pypi:a==1"}, "sha256: is needed"),
        (AllocationConfig, {"beta": [1, 0]}, "beta: the interval"),
        (
            PruneConfig,
            {"pattern": "4:2"},
            "pattern: must be unstructured, N:M with N < M as in 2:4, or mixed:M as in mixed:8, got",
        ),
        (Text, {"source": "c4", "sampling": "random"}, "nsamples: a random draw"),
        (Text, {"source": "c4", "part": [0.5, 0.5]}, "part: "),
        (SearchConfig, {}, "trials: is needed with the sampler gp"),
        (SearchConfig, {"sampler": "tpe"}, "trials: is needed with the sampler tpe"),
    ],
)
def test_rules_between_keys_name_their_key(table: type[BaseModel], values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        table.model_validate(values)
    (details,) = caught.value.errors()
    text = str(details["ctx"]["error"])
    assert text.startswith(message)
    assert text.partition(":")[0] in table.model_fields


@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
def test_a_fixed_pattern_leaves_nothing_to_share_out(pattern: str) -> None:
    uniform = {"names": ["uniform"]}
    assert Study.model_validate(raw(prune={"pattern": pattern}, allocation=uniform)).prune.pattern == pattern
    for changes in ({"allocation": {"names": ["uniform", "atp"]}}, {"allocation": uniform, "sparsity": 0.6}, {}):
        with pytest.raises(ValidationError) as caught:
            Study.model_validate(raw(prune={"pattern": pattern}, **changes))
        (details,) = caught.value.errors()
        assert str(details["ctx"]["error"]) == (
            f"prune.pattern: {pattern} makes 0.5 zeros in every block; set sparsity = 0.5 and "
            'allocation = "uniform" (prune: --allocation uniform), or pattern = "mixed:8"'
        )


def test_patterns_that_leave_freedom() -> None:
    for pattern in ("unstructured", "mixed:8"):
        assert Study.model_validate(raw(prune={"pattern": pattern}, sparsity=0.55)).prune.pattern == pattern
    third = raw(prune={"pattern": "1:3"}, allocation={"names": ["uniform"]}, sparsity=0.333333)
    assert Study.model_validate(third).prune.settings("magnitude") == {"group": 3}


def test_settings_of_a_pruner_are_its_table_and_the_group() -> None:
    prune = PruneConfig.model_validate({"pattern": "mixed:8", "alps": {"rho": 0.5}})
    assert prune.settings("magnitude") == {"group": 8}
    assert prune.settings("wanda") == {"compare": "row", "group": 8}
    assert prune.settings("alps") == {"damping": 0.01, "rho": 0.5, "iterations": 300, "steps": 10, "group": 8}


def test_grid_needs_no_number_of_trials() -> None:
    assert SearchConfig(sampler="grid").trials is None


@pytest.mark.parametrize("device", ["auto", "cpu", "mps", "cuda", "cuda:3"])
def test_devices(device: str) -> None:
    assert Study.model_validate(raw(device=device)).device == device


@pytest.mark.parametrize("key", list(keys_of()))
def test_every_pattern_has_its_own_words(key: str) -> None:
    field = field_of(key)
    patterns = [part for part in field.metadata if getattr(part, "pattern", None)]
    assert bool(patterns) == (key in PATTERNS)
