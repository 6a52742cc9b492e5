"""Every test has a cache of its own and one thread."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from localhub import serve

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ATP_TUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, list[str]]]:
    """The folder of a hub on this machine, and the paths it was asked for."""
    import datasets
    from huggingface_hub import constants

    root, cache = tmp_path / "hub", str(tmp_path / "hf")
    root.mkdir()
    with serve(root) as (url, asked):
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", cache)
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", url)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
        monkeypatch.setattr(datasets.config, "HF_MODULES_CACHE", cache)
        yield root, asked
