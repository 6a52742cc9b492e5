"""Continuations of prompts at the end of a study, and by the command `generate`; where they are shown."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from byhand import ByHand
from expect import parametrize, slow
from tinystudy import CommandLine, run, stored

from atp_tune.cli import tables, terminal
from atp_tune.config.best import read_config
from atp_tune.events import Event, Message
from atp_tune.metrics import PROMPTS, Continuations
from atp_tune.results.formatting import in_one_line
from atp_tune.results.goals import goal_in
from atp_tune.results.results import allocation_name, attached
from atp_tune.results.summary import summarise
from atp_tune.run import observers

TOKENS = 8
ASKED = f"continuations.tokens={TOKENS}"
FOUND = Continuations(
    prompts=("One | two", "three"), tokens=5, dtype="float32", dense=("a\n\nb", "c"),
    uniform=("\x1b[31md :smile:", "e"), best=("<b>f</b>", "g"),
    others={"gradient-rows": ("h", "i")},
)  # fmt: skip


def texts_of(place: Path) -> Continuations | None:
    return summarise(stored(place)).continuations


def by_hand(place: Path, prompt: str, sparsities: list[float] | None) -> str:
    """The greedy continuation by a copy of the model, pruned in place."""
    made = ByHand(place)
    if sparsities is not None:
        made.prune("wanda", sparsities)
    ids = made.tokenizer(prompt).input_ids
    tokens: list[int] = []
    with torch.no_grad():
        while len(tokens) < TOKENS and 0 not in tokens:
            tokens.append(int(made.model(input_ids=torch.tensor([ids + tokens])).logits[0, -1].argmax()))
    return str(made.tokenizer.decode(tokens, skip_special_tokens=True))


@slow
def test_a_study_ends_with_what_its_models_write(place: Path) -> None:
    """Dense, uniform, and the best of each allocation; it was the best of all alone."""
    study = run(place, ASKED, "allocation.beta=[0.0, 0.02]", 'allocation.names=["atp", "alphapruning"]')
    found, ranked = texts_of(place), {allocation_name(trial): trial for trial in goal_in(study).leaders()}
    assert found
    assert found.prompts == PROMPTS
    ranked["best"] = ranked.pop(next(iter(ranked)))
    assert {*found.names} == {"dense", "uniform", *ranked}
    assert found.others
    sparsities = {"dense": None, "uniform": [0.6] * 4}
    sparsities |= {name: trial.user_attrs["plan"]["levels"] for name, trial in ranked.items()}
    for name in found.names:
        assert list(found.of(name)) == [by_hand(place, prompt, sparsities[name]) for prompt in PROMPTS], name
    assert read_config(place / "tiny.best.json").continuations == found


def left_out(place: Path, *overrides: str) -> list[str]:
    notes: list[str] = []

    def hear(event: Event) -> None:
        notes.extend([event.text] if isinstance(event, Message) else [])

    assert "continuations" not in run(place, ASKED, *overrides, watch=hear).user_attrs
    assert read_config(place / "tiny.best.json").scored()
    return [note for note in notes if note.startswith("continuations")]


@slow
@parametrize("how", ["offload", "room"])
def test_a_model_without_room_is_left_out(how: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if how == "room":
        monkeypatch.setattr(observers, "free_memory", lambda device: 1000)
    assert left_out(place, *["model.offload=disk"] * (how == "offload")) == [
        "continuations: left out, the model leaves no room for a pruned copy; `tune.py generate` makes them"
    ]


# The command


@slow
def test_generate_with_a_configuration(done: Path, command: CommandLine) -> None:
    best = read_config(done / "tiny.best.json")
    files = {path: path.read_bytes() for path in (done / "tiny.best.json", done / "tiny.db")}
    read = command.ok("generate", "--config", done / "tiny.best.json", "--tokens", "6", "--prompt", "The import")
    titles = [line.split(" wanda")[0] for line in read.out.splitlines() if line.startswith(("continuations", "The "))]
    assert titles == ["continuations: dense", "continuations: uniform", "continuations: best", "The import …"]
    assert {path: path.read_bytes() for path in files} == files  # a question of its own is stored nowhere
    answer = command("generate", "--config", done / "tiny.best.json", "--tokens", "6")
    found = read_config(done / "tiny.best.json").continuations
    assert found
    assert (found.tokens, found.prompts) == (6, PROMPTS)
    assert attached(stored(done), best.trial)["continuations"] == found
    assert f"\n{PROMPTS[2]} …\n  dense    {in_one_line(found.dense[2])}\n" in answer.out
    assert answer.out.endswith(f"stored in {done / 'tiny.best.json'} and on study tiny\n")


# Where they are shown


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool, int], str]:
    def show(is_terminal: bool, width: int) -> str:
        console = type(terminal.console())(
            soft_wrap=True, markup=False, highlight=False, emoji=False, force_terminal=is_terminal, width=width,
            color_system=None, legacy_windows=False,
        )  # fmt: skip
        for module in (tables, terminal):
            monkeypatch.setattr(module, "console", lambda: console)
        with console.capture() as captured:
            tables.show_continuations(FOUND)
        return captured.get()

    return show
