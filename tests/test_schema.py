"""The JSON schema of study files: as it is shipped, as taplo reads it, and against what the program accepts."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from expect import parametrize, slow
from jsonschema import Draft7Validator
from tinystudy import HANGS, CommandLine

from atp_tune.allocations import ALLOCATIONS
from atp_tune.config.study import Study
from atp_tune.config.studyfile import SCHEMA, override, read, study_schema
from atp_tune.pruners import PRUNERS

REPO = Path(__file__).parents[1]
SHIPPED = sorted((REPO / "studies").glob("*.toml"))
SMOL = REPO / "studies" / "smol.toml"
VALIDATOR = Draft7Validator(study_schema())
TAPLO = shutil.which("taplo")


def study(*settings: str) -> dict[str, Any]:
    """The tables of the study `smol` with other values."""
    data = read(SMOL)
    for setting in settings:
        override(data, setting, SMOL)
    return data


def accepted(data: dict[str, Any]) -> bool:
    """Whether the program accepts it; the schema must say the same."""
    found = VALIDATOR.is_valid(data)
    try:
        Study.model_validate(data)
    except ValueError:
        assert not found
        return False
    assert found, next(VALIDATOR.iter_errors(data)).message
    return True


def test_the_shipped_file_is_what_the_command_prints(command: CommandLine) -> None:
    """If not: python tune.py schema > studies/study.schema.json."""
    answer = command("schema")
    assert answer.is_clean
    assert (REPO / "studies" / SCHEMA).read_text() == answer.out
    Draft7Validator.check_schema(study_schema())


@parametrize(
    "settings",
    [
        *(f"allocation={name}" for name in ALLOCATIONS),
        'allocation=["atp", "owl"]',
        'allocation={names = "atp"}',
        "allocation.beta=both",
        "allocation.beta=[0, 0.01]",
        "search.objective=kl",
        'search.objective=["kl", "perplexity"]',
        "search.screen=none",
        "search.screen={trials = 3, stride = 2}",
        *(f'prune.pruners=["{name}"]' for name in PRUNERS),
        "prune.alps.rho=1",
        "prune.wanda={compare = 'row-variant'}",
        *(f"model.offload={place}" for place in ("auto", "none", "cpu", "disk")),
        "texts.bos=auto",
        "texts.bos=true",
        "device=cuda:1",
        "storage=sqlite:///x.db",
    ],
)
def test_what_the_program_accepts(settings: str) -> None:
    assert accepted(study(settings))


@parametrize(
    "settings",
    [
        "sparsity=1.5", "sparsity=much", "sparsty=0.5", "protocol=other", "model.sorce=x", "model.offload=elsewhere",
        "allocation=apt", 'allocation=["atp", "wol"]', "allocation.beta=[0]", "allocation.beta=up",
        'prune.pruners=["wandda"]', "prune.pruners=wanda", "prune.pruners=[]", "prune.alps.roh=1", "prune.magnitude={}",
        "search.objective=loss", "search.objective=[]", "search.screen=some", "search.screen={stride = 2}",
        "search.trials=0", "search.trials=1.5", "texts.calibration.nsamples=0", "texts.validation.part=[0, 2]",
        "texts.validation.draws=3", "texts.bos=maybe", "device=gpu", "model.sha256=abc", "search.seed=true",
    ],
)  # fmt: skip
def test_what_the_program_refuses(settings: str) -> None:
    assert not accepted(study(settings))


# As an editor's TOML plugin reads it


def taplo(path: Path) -> subprocess.CompletedProcess[str]:
    assert TAPLO, "pip install taplo"
    return subprocess.run(
        [TAPLO, "check", "--colors", "never", str(path)],
        capture_output=True, text=True, timeout=HANGS, check=False, cwd=path.parent,
    )  # fmt: skip


@slow
@parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_taplo_finds_no_mistake(path: Path) -> None:
    done = taplo(path)
    assert done.returncode == 0, done.stderr


@slow
@parametrize(
    ("before", "after", "said"),
    [
        ("sparsity = 0.4", "sparsity = 1.4", "1.4 is not valid under any of the schemas listed"),
        ('pruners = ["wanda"]', 'pruners = ["wandda"]', '"wandda" is not valid under any of'),
        ("seqlen = 128", "seqlan = 128", "'seqlan' was unexpected"),
        ("[search]", "[serch]", '"search" is a required property'),
        ("[texts.validation]", "[texts.validation]\nnsample = 3", "'nsample' was unexpected"),
    ],
)
def test_taplo_marks_a_mistake(before: str, after: str, said: str, tmp_path: Path) -> None:
    shutil.copy(REPO / "studies" / SCHEMA, tmp_path)
    text = SMOL.read_text()
    assert text.count(before) == 1
    path = tmp_path / "smol.toml"
    path.write_text(text.replace(before, after))
    done = taplo(path)
    assert done.returncode != 0
    assert said in re.sub(r"\s+", " ", done.stderr), done.stderr
