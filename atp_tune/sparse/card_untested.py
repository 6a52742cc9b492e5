"""What a model card admits: what was not tested, by what its configuration has, and texts that repeat themselves."""

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from atp_tune.checkpoints.trust import read_table
from atp_tune.metrics.continuations import Continuations
from atp_tune.spec.config import Config
from atp_tune.spec.data import ImageSet

REPEATS = 0.5  # of its bytes, which zlib needs: usual prose of 60 to 250 bytes takes 0.65 and more, a loop 0.45 at most
SHORTEST = 60  # bytes of a text that is judged


def untested(config: Config, folder: Path, text: str) -> Iterator[str]:
    """A line for each; `folder`: of the dense model, `text`: the test text in words."""
    device = config.manifest and config.manifest.environment.device
    if device:
        cpu = device.startswith("cpu")
        yield (
            "A GPU: it was pruned and measured on a CPU." if cpu else f"A CPU: it was pruned and measured on {device}."
        )
    if isinstance(config.texts.test, ImageSet):
        yield f"Pictures unlike those of {text}, and single classes."
    else:
        yield from _of_texts(config, folder, text)
    if config.draws is None:
        yield "Other windows of the calibration text."
    if config.speed is None:
        yield "Speed and memory."


def _of_texts(config: Config, folder: Path, text: str) -> Iterator[str]:
    yield f"Text unlike {text}: other subjects, other languages."
    most, seqlen = _longest(folder / "config.json"), getattr(config.texts.test, "seqlen", 0)
    if most is not None and most > seqlen:
        yield f"Contexts of more than {seqlen:,} tokens; the dense model takes {most:,}."
    done = [] if config.zero_shot is None else sorted({task.task for task in config.zero_shot.tasks})
    yield f"Tasks other than {', '.join(done)}." if done else "Tasks: no benchmark was run."
    if config.continuations is None:
        yield "What it writes: no text was generated."
    yield "Conversations, facts, refusals and bias, all of which pruning changes."


def _longest(file: Path) -> int | None:
    """The tokens that a model takes at once, by its config.json."""
    table: dict[str, Any] = read_table(file) if file.is_file() else {}
    found = table.get("max_position_embeddings") or (table.get("text_config") or {}).get("max_position_embeddings")
    return found if isinstance(found, int) else None


def loops(found: Continuations, this: str) -> str:
    """A sentence on the texts of `this` model and of the dense one that repeat themselves; "" if none of its own do."""
    own, dense = (sum(map(_repeats, texts)) for texts in (found.best, found.dense))
    if not own:
        return ""
    return f"{own} of the {len(found.best)} texts of {this} repeat themselves, of the dense model's {dense or 'none'}."


def _repeats(text: str) -> bool:
    said = text.encode()
    return len(said) >= SHORTEST and len(zlib.compress(said, 9)) < REPEATS * len(said)
