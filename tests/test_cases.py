"""Which of many cases of a slow test a run tries."""

from types import SimpleNamespace
from typing import Any

import cases
import pytest
from pages import REPO


def items(name: str, count: int, mark: str = "slow") -> list[Any]:
    def of(case: int) -> Any:
        return SimpleNamespace(nodeid=f"{name}[{case}]", get_closest_marker=lambda asked: asked == mark or None)

    return [of(case) for case in range(count)]


@pytest.mark.parametrize(("count", "tried"), [(6, 6), (7, 3), (9, 3), (282, 94)])
def test_a_third_of_many_slow_cases_is_tried(count: int, tried: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "EVERY", 3)
    all_of_it = items("tests/test_a.py::test_it", count)
    less = cases.left_out([*all_of_it, *items("tests/test_b.py::test_it", 5)])
    assert len(all_of_it) - len(less) == tried
    assert less == cases.left_out(all_of_it)
    assert {item.nodeid for item in less} < {item.nodeid for item in all_of_it} or not less


def test_what_is_always_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, conformance = items("tests/test_a.py::test_it", 30, "fast"), items("tests/test_conformance.py::test_it", 30)
    assert cases.left_out([*fast, *conformance]) == []
    monkeypatch.setattr(cases, "EVERY", 1)
    assert cases.left_out(items("tests/test_a.py::test_it", 30)) == []


@pytest.mark.parametrize("name", cases.AT_A_RELEASE)
def test_the_longest_wait_for_a_release(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file, _, rest = name.partition("::")
    function, _, case = rest.partition("[")
    text = (REPO / file).read_text(encoding="utf-8")
    assert f"def {function}(" in text
    assert case.removesuffix("]") in text
    [item] = items(name, 1)
    item.nodeid = name
    assert cases.left_out([item]) == [item]
    monkeypatch.setattr(cases, "EVERY", 1)
    assert cases.left_out([item]) == []


def test_each_value_of_two_parameters_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stride would meet one of three number formats alone."""
    monkeypatch.setattr(cases, "EVERY", 3)
    product = [
        SimpleNamespace(nodeid=f"tests/test_a.py::test_it[{family}-{dtype}]", get_closest_marker=lambda asked: asked)
        for family in range(10) for dtype in range(3)
    ]  # fmt: skip
    less = cases.left_out(product)  # type: ignore[arg-type]
    tried = {item.nodeid[24:-1] for item in product if item not in less}
    assert len({one.partition("-")[2] for one in tried}) == 3
    assert len(tried) == 10
