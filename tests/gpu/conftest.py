"""Where the tests of this folder run: a CUDA device, or a CPU where ATP_TUNE_GPU_TESTS_ON=cpu tries their logic."""

import os

import pytest
import torch

ON = "ATP_TUNE_GPU_TESTS_ON"


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The first CUDA device, or the CPU where that was asked for."""
    if os.environ.get(ON) == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip(f"no CUDA device; {ON}=cpu runs on a CPU what can")
    return torch.device("cuda:0")


@pytest.fixture(scope="session")
def card(device: torch.device) -> torch.device:
    """The same, for what a CPU has not."""
    if device.type != "cuda":
        pytest.skip("only CUDA has this")
    return device


@pytest.fixture(scope="session")
def second(card: torch.device) -> torch.device:
    """Another CUDA device beside the first."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device alone")
    return torch.device("cuda:1")
