import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from pydantic import ValidationError

from atp_tune.config.prune import PruneConfig, with_tables
from atp_tune.pruners import PRUNERS, SETTINGS, make_pruner
from atp_tune.utils.frozen import SettingsTable
from atp_tune.utils.registry import Registry


class MineSettings(SettingsTable):
    strength: float = 2.0


class Mine(MineSettings):
    group: int | None = None


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


def test_a_study_file_has_a_table_for_each_pruner_with_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {name for name in SETTINGS if name in PruneConfig.model_fields} == set(SETTINGS) <= set(PRUNERS)
    monkeypatch.setitem(PRUNERS, "mine", f"{__name__}:Mine")
    monkeypatch.setitem(SETTINGS, "mine", f"{__name__}:MineSettings")
    config = with_tables(PruneConfig).model_validate({"pattern": "mixed:8", "mine": {"strength": 5}})
    assert config.settings("mine") == {"strength": 5.0, "group": 8}
    assert make_pruner("mine", config.settings("mine")) == Mine(strength=5, group=8)
    with pytest.raises(ValidationError, match="strength: must be a number, got true"):
        with_tables(PruneConfig).model_validate({"mine": {"strength": True}})


def test_what_a_cache_names_a_pruner_by_stays() -> None:
    """Dense statistics lie on disks under a hash of it."""
    assert repr(make_pruner("sparsegpt")) == "SparseGPT(damping=0.01, columns=128, group=None)"
    assert repr(make_pruner("magnitude", {"group": 4})) == "Magnitude(group=4)"
