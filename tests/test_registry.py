import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from atp_tune.pruners import make_pruner
from atp_tune.utils.registry import Registry


@pytest.fixture
def fruits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry[object]]:
    """Of a package of which nothing is imported yet; one of its modules cannot be."""
    (tmp_path / "fruit_stand").mkdir()
    (tmp_path / "fruit_stand" / "__init__.py").touch()
    (tmp_path / "fruit_stand" / "apple.py").write_text("class Apple:\n    pass\n")
    (tmp_path / "fruit_stand" / "stone.py").write_text("raise ImportError('no pip in it')\n")
    monkeypatch.syspath_prepend(tmp_path)
    rows = {"apple": "fruit_stand.apple:Apple", "stone": "fruit_stand.stone:Stone", "whole": "fruit_stand.apple"}
    yield Registry("fruit", {**rows, "seven": 7})
    for name in [name for name in sys.modules if name.startswith("fruit_stand")]:
        del sys.modules[name]


def test_a_row_is_imported_when_it_is_asked_for(fruits: Registry[object]) -> None:
    assert list(fruits) == ["apple", "stone", "whole", "seven"] and len(fruits) == 4
    assert "apple" in fruits and "pear" not in fruits
    assert "fruit_stand" not in sys.modules
    apple = fruits["apple"]
    assert isinstance(apple, type) and apple.__name__ == "Apple"
    assert "fruit_stand.stone" not in sys.modules
    assert fruits["apple"] is apple
    whole = fruits["whole"]
    assert isinstance(whole, ModuleType) and whole.Apple is apple
    assert fruits["seven"] == 7
    with pytest.raises(ImportError, match="no pip in it"):
        fruits["stone"]


def test_what_a_cache_names_a_pruner_by_stays() -> None:
    """Dense statistics lie on disks under a hash of it."""
    assert repr(make_pruner("sparsegpt")) == "SparseGPT(damping=0.01, columns=128, group=None)"
    assert repr(make_pruner("magnitude", {"group": 4})) == "Magnitude(group=4)"
