"""Study files that are written: with comments, and equal to the study when they are read back."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atp_tune.config.study import Study
from atp_tune.config.studyfile import load, study_text, write_study

SHIPPED = sorted((Path(__file__).parents[1] / "studies").glob("*.toml"))
SETTINGS: dict[str, Any] = {
    "sparsity": 0.6,
    "model": {"source": "org/name"},
    "texts": {
        "calibration": {"source": "c4", "split": "train"},
        "validation": {"source": "wikitext2", "split": "validation"},
        "test": {"source": "wikitext2", "split": "test"},
    },
    "search": {"trials": 5},
}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_study_comes_back(path: Path, tmp_path: Path) -> None:
    study = load(str(path)).study
    write_study(tmp_path / "made" / "it.toml", study, [f"from {path.stem}"])
    assert load(str(tmp_path / "made" / "it.toml")).study == study
    assert [file.name for file in (tmp_path / "made").iterdir()] == ["it.toml"]


@given(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1), st.floats(0, 1, exclude_min=True, exclude_max=True)
)
def test_any_text_comes_back(text: str, sparsity: float) -> None:
    study = Study.model_validate(
        {**SETTINGS, "description": text, "sparsity": sparsity, "model": {"source": text, "revision": text}}
        if not text.startswith("pypi:")
        else SETTINGS
    )
    assert Study.model_validate(tomllib.loads(study_text(study, [text]))) == study
