"""Whole studies on a GPU, in processes of their own: killed, resumed, united, and on two devices."""

import signal
import subprocess
import sys
from pathlib import Path

import optuna
import preloaded
import pytest
import torch
from cards import bench_on, pruned_blocks, same_blocks
from tinystudy import LONG, Answer, Process, finish, quiet, run, settings, start, stored, wait_for

from atp_tune.api.merging import merge
from atp_tune.checkpoints.devices import find_device

pytestmark = pytest.mark.gpu
TOTAL = "search.trials=4"
PATIENCE = 240.0  # seconds for a process: on a fresh machine libraries take a minute to load


def begin(device: torch.device | None, *arguments: str | Path) -> Process:
    """`python tune.py …` on a GPU, or the CPU (None); a rehearsal's GPU is a CPU that passes for one."""
    is_rehearsal = device is not None and device.type == "cpu"
    return start(*arguments, inject=preloaded.pass_for_a_gpu if is_rehearsal else None)


def on(place: Path, device: torch.device | None, *overrides: str) -> tuple[str | Path, ...]:
    """The words of the tiny study on a device."""
    return "--study", place / "tiny.toml", *settings(f"device={device or 'cpu'}", TOTAL, *overrides)


def study(place: Path, device: torch.device | None, *overrides: str, words: tuple[str, ...] = ()) -> Answer:
    """The tiny study on a device, to its end."""
    answer = finish(begin(device, *on(place, device, *overrides), *words), PATIENCE)
    assert answer.code == 0, answer.err
    return answer


def values(found: optuna.Study) -> list[float]:
    """Of the trials that were measured, in their order."""
    return [trial.value for trial in found.trials if trial.value is not None]


def test_a_study_that_was_killed_goes_on(place: Path, device: torch.device) -> None:
    process = begin(device, *on(place, device, *LONG))
    wait_for(place / "tiny.db", 2, process, PATIENCE)
    process.kill()
    assert finish(process).code == -signal.SIGKILL
    study(place, device, *LONG)
    study(place, device, *LONG, f"storage=sqlite:///{place}/undisturbed.db")
    found, expected = stored(place), stored(place, database=place / "undisturbed.db")
    assert [trial.state.name for trial in found.trials].count("FAIL") == 1
    assert values(found) == pytest.approx(values(expected), rel=1e-6)
    assert (place / "tiny.best.json").exists()


def test_a_cpu_and_a_gpu_share_a_study(place: Path, device: torch.device) -> None:
    """One begins, the other goes on if it is told to; and what both found apart is united."""
    study(place, None)
    more = "search.trials=6"
    refused = finish(begin(device, *on(place, device, more)), PATIENCE).error
    assert "its trials ran on cpu, here is " in refused and "--allow-device-change" in refused
    study(place, device, more, words=("--allow-device-change",))
    mixed = stored(place)
    assert len(values(mixed)) == 6
    assert len({trial.user_attrs["device"] for trial in mixed.trials}) == 2
    study(place, device, f"storage=sqlite:///{place}/there.db", "search.seed=5")
    both, shares = merge([str(place / "tiny.db"), str(place / "there.db")], place / "both.db", None)
    assert [len(share.trials) for share in shares] == [6, 4]
    uniform = [trial.value for trial in both.trials if trial.params.get("beta") == 0.0]
    assert len(uniform) == 2
    assert uniform[0] == pytest.approx(uniform[1], rel=0.01)


def test_what_a_gpu_found_is_applied_there(place: Path, device: torch.device) -> None:
    study(place, device)
    words = ("--config", place / "tiny.best.json", "--out", place / "sparse", "--device", str(device))
    answer = finish(begin(device, "apply", *words), PATIENCE)
    assert answer.code == 0, answer.err
    assert "warning" not in answer.out + answer.err
    assert (place / "sparse" / "model.safetensors").exists()


def test_the_current_device_is_the_one_that_computes(card: torch.device) -> None:
    """Libraries, pinned memory and Triton take the current one, whatever tensors say."""
    device = find_device("auto")
    assert device == bench_on(device).checkpoint.device
    assert torch.cuda.current_device() == (device.index or 0)


def test_two_devices_come_to_the_same(second: torch.device, card: torch.device) -> None:
    assert same_blocks(pruned_blocks(bench_on(second, "cpu")), pruned_blocks(bench_on(card, "cpu")))


ALONE = """
import sys
import torch
sys.path[:0] = sys.argv[1:3]
from tinystudy import Path, run
run(Path(sys.argv[3]), "device=cuda:1")
print("on", torch.cuda.current_device(), torch.cuda.memory_reserved(0), torch.cuda.memory_reserved(1) > 0)
"""


def test_the_other_device_is_left_alone(second: torch.device, place: Path) -> None:
    words = [sys.executable, "-c", ALONE, str(Path(__file__).parents[1]), str(Path(__file__).parent), str(place)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1:] == ["on 1 0 True"], done.stderr


def test_two_workers_take_a_device_each(second: torch.device, place: Path) -> None:
    with quiet():
        expected = values(run(place, "device=cuda:0", TOTAL, *LONG, name="alone"))
    options = settings(TOTAL, *LONG)
    words = ("--study", place / "tiny.toml", "--devices", "cuda:0,cuda:1", "--workers", "2", *options)
    answer = finish(start(*words), PATIENCE)
    assert answer.code == 0, answer.err
    assert sorted(values(stored(place))) == pytest.approx(sorted(expected), rel=1e-6)
