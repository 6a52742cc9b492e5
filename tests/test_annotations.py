from pathlib import Path

from expect import parametrize, slow
from plans import planned
from tinystudy import CommandLine, run, stored

from atp_tune.config.best import Config, ZeroShot, read_config
from atp_tune.metrics import Sizes, Speed
from atp_tune.results.results import attach, attached, config_study

SCORES = ZeroShot(tasks=(), mean={}, dtype="float32", device="cpu", seconds={"dense": 1.0}, versions={"torch": "2.6.0"})
SPEED = Speed(sizes=Sizes(dense=9, sparse=9, dense_zstd=8, sparse_zstd=5), zeros={"self_attn.q_proj": 0.5})
NEWER = SPEED.model_copy(update={"zeros": {"self_attn.q_proj": 0.75}})


def best_of(place: Path) -> tuple[Path, Config]:
    return place / "tiny.best.json", read_config(place / "tiny.best.json")


def test_what_was_found_is_in_the_file_and_on_the_study(done: Path) -> None:
    path, config = best_of(done)
    assert attach(path, config, "speed", SPEED) == [str(path), "study tiny"]
    assert read_config(path) == config.model_copy(update={"speed": SPEED})
    assert stored(done).user_attrs["speed"] == {str(config.trial): SPEED.model_dump(mode="json")}
    assert attached(stored(done), config.trial) == {"speed": SPEED}
    assert attached(stored(done), config.trial + 1) == {}


@slow
def test_what_is_written_again_keeps_it(done: Path, command: CommandLine) -> None:
    path, config = best_of(done)
    attach(path, config, "speed", SPEED)
    attach(path, config, "zero_shot", SCORES)
    path.unlink()
    command("export", "--study", done / "tiny.toml")
    found = read_config(path)
    assert (found.speed, found.zero_shot) == (SPEED, SCORES)
    path.unlink()
    run(done)  # is complete, and writes its best down
    assert read_config(path) == found


def test_a_file_that_has_changed_meanwhile(done: Path) -> None:
    """Others may attach to it, or write the next best into it, while something is measured."""
    path, config = best_of(done)
    attach(path, config, "zero_shot", SCORES)
    attach(path, config, "speed", SPEED)
    assert read_config(path).zero_shot == SCORES
    next_best = config.model_copy(update={"trial": config.trial + 1})
    next_best.write(path)
    assert attach(path, config, "speed", NEWER) == ["study tiny"]
    assert read_config(path) == next_best
    assert attached(stored(done), config.trial)["speed"] == NEWER


# --- where the study is


@parametrize(
    "changed",
    [{"trial": 99}, {"plan": planned("wanda", "atp", (0.5,) * 4)}],
)
def test_another_study_of_the_same_name_is_left_alone(done: Path, changed: dict[str, object]) -> None:
    path, config = best_of(done)
    assert config_study(path, config.model_copy(update=changed)) is None


# --- what strangers may have stored
