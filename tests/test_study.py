from typing import Any

import pytest
from expect import parametrize
from pydantic import BaseModel, ValidationError

from atp_tune.config.data import KINDS, MANUAL, MIXED, Text
from atp_tune.config.study import Study
from atp_tune.config.studyfile import PATTERNS, dotted_keys, table_model


def raw(**changes: Any) -> dict[str, Any]:
    texts = {
        "calibration": {"source": "c4"},
        "validation": {"source": "wikitext2", "split": "validation"},
        "test": {"source": "wikitext2", "split": "test"},
    }
    return {"sparsity": 0.5, "model": {"source": "org/name"}, "texts": texts, "search": {"trials": 1}} | changes


def field_of(key: str) -> Any:
    *tables, name = key.split(".")
    table: type[BaseModel] | None = Study
    for part in tables:
        assert table
        table = table_model(table, part)
    assert table
    return table.model_fields[name]


@parametrize("role", ["calibration", "validation", "test"])
@parametrize("other", ["calibration", "validation", "test"])
def test_roles_never_share_a_text(role: str, other: str) -> None:
    data = raw()
    data["texts"][role] = data["texts"][other]
    if role == other:
        Study.model_validate(data)
        return
    with pytest.raises(ValidationError, match="reads the same documents"):
        Study.model_validate(data)


@parametrize(
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


SOURCES = {"c4": {"c4"}, MIXED: {*KINDS}, MANUAL: {"manual"}, "mixed:news,code": {"news", "code"}}
SOURCES |= {f"{MIXED}:{kind}": {kind} for kind in KINDS}


@parametrize("one", SOURCES)
def test_overlap_of_kinds(one: str) -> None:
    """`mixed` and a kind of it, or the manual by its other name, were taken for texts that share nothing."""
    for other, kinds in SOURCES.items():
        for part, is_same in (((0, 0.5), True), ((0.5, 1), False)):
            cut_elsewhere = one != other and MANUAL in (one, other)  # `mixed` leaves some of the manual out
            found = Text(source=one, part=(0, 0.5), nsamples=2).overlaps(Text(source=other, part=part))
            assert found is bool(SOURCES[one] & kinds and (is_same or cut_elsewhere)), (other, part)


@parametrize("pattern", ["2:4", "4:8"])
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


@parametrize("key", list(dotted_keys()))
def test_every_pattern_has_its_own_words(key: str) -> None:
    assert bool([part for part in field_of(key).metadata if getattr(part, "pattern", None)]) == (key in PATTERNS)
