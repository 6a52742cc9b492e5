"""What version 0.1 wrote is read as before: study files, databases, a configuration, a sparse folder, `--set` keys.

In tests/former/version-0.1.tar.xz, made by that version: half.toml, whose database has 10 of 12 trials; done.toml,
which is complete, with its configuration and the sparse folder that `apply` made of it.
"""

import tarfile
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tinystudy import CommandLine, settings, stored

from atp_tune.spec.config import AllocationRef, read_config

pytestmark = pytest.mark.slow
ARCHIVE = Path(__file__).parent / "former" / "version-0.1.tar.xz"
HERE = "--allow-device-change"  # it was made on some CPU
KEYS = ("texts.search.windows=16", "texts.report.windows=16", "model.residency='host'", "prune.statistics='sequential'",
        "search.settle=true")  # fmt: skip


@pytest.fixture
def former(tmp_path: Path) -> Path:
    with tarfile.open(ARCHIVE) as archive:
        safely = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # not before Python 3.11.4
        archive.extractall(tmp_path / "former", **safely)
    return tmp_path / "former"


def test_a_database_half_done_goes_on(former: Path, command: CommandLine) -> None:
    before = [trial.values for trial in stored(former, "half", former / "half.db").trials[:10]]
    answer = command("--study", former / "half.toml", HERE)
    assert answer.code == 0, answer.err
    study = stored(former, "half", former / "half.db")
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 12
    assert [trial.values for trial in study.trials[:10]] == before


def test_a_complete_study_is_shown_and_exported(former: Path, command: CommandLine) -> None:
    config = former / "done.best.json"
    uniform = AllocationRef(name="uniform", beta=None)  # version 0.1 called it atp with β = 0
    written = read_config(config).model_copy(update={"allocation": uniform})
    for words in (
        ["--study", former / "done.toml", HERE, *settings(*KEYS)],
        ["status", "--study", former / "done.toml"],
    ):
        answer = command(*words)
        assert answer.code == 0, answer.err
        assert "58.56 ± 3.74" in answer.out
    assert read_config(config) == written
    config.unlink()
    assert command("export", "--study", former / "done.toml").code == 0
    assert read_config(config) == written
    assert command("report", "--study", former / "done.toml", "--out", former / "report.html").code == 0


def test_a_configuration_makes_its_folder_again(former: Path, command: CommandLine) -> None:
    answer = command("apply", "--config", former / "done.best.json", "--out", former / "again")
    assert answer.code == 0, answer.err
    name = "model.safetensors"
    old, new = load_file(former / "sparse" / name), load_file(former / "again" / name)
    assert {key: int(tensor.count_nonzero()) for key, tensor in new.items()} == {
        key: int(tensor.count_nonzero()) for key, tensor in old.items()
    }


def test_a_sparse_folder_is_fine_tuned(former: Path, command: CommandLine) -> None:
    text = ("--text", f"file:{former}/calibration.txt")
    options = ("--out", former / "tuned", "--steps", "2", "--batch", "2", "--tokens", "32", "--patience", "0")
    answer = command("finetune", "--model", former / "sparse", *text, *options)
    assert answer.code == 0, answer.err
