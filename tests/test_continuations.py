"""Continuations of prompts at the end of a study, and by the command `generate`; where they are shown."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from byhand import ByHand
from families import few
from synthetic import new_study
from test_card import body, card, rows
from test_config import config
from tinystudy import CommandLine, run, settings, stored

from atp_tune.cli import tables, terminal
from atp_tune.config.best import read_config
from atp_tune.events import Event, Message
from atp_tune.metrics import PROMPTS, Continuations
from atp_tune.results.annotations import attached
from atp_tune.results.formatting import in_one_line
from atp_tune.results.goals import best_trial, goal_in
from atp_tune.results.results import allocation_of
from atp_tune.results.summary import summarise
from atp_tune.run import generation as generation_prompts
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


def numbers_of(study: optuna.Study) -> Any:
    kept = {key: value for key, value in study.user_attrs.items() if key not in ("continuations", "made_from")}
    return kept, [(trial.params, trial.values, trial.user_attrs["nlls"]) for trial in study.trials]


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


@pytest.mark.slow
def test_a_study_ends_with_what_its_models_write(place: Path) -> None:
    """Dense, uniform, and the best of each allocation; it was the best of all alone."""
    study = run(place, ASKED, "allocation.beta=[0.0, 0.02]", 'allocation.names=["atp", "alphapruning"]')
    found, ranked = texts_of(place), {allocation_of(trial): trial for trial in goal_in(study).rivals()}
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


@pytest.mark.slow
def test_no_number_of_a_study_changes(place: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(place, tmp_path / "other"))
    overrides = ("texts.calibration.draws=2", "search.trials=4", 'search.objective=["perplexity", "kl"]')
    with_texts, without = run(place, ASKED, *overrides), run(other, *overrides)
    assert "continuations" in with_texts.user_attrs
    assert "continuations" not in without.user_attrs
    assert numbers_of(with_texts) == numbers_of(without)


@pytest.mark.slow
def test_a_paper_s_study_has_texts_too(place: Path) -> None:
    """Its final scores prune nothing: the test text is the validation text."""
    text = (place / "tiny.toml").read_text()
    start, end = text.index("[texts.test]"), text.index("[search]")
    (place / "tiny.toml").write_text('protocol = "paper"\n' + text[:start] + text[end:])
    run(place, ASKED)
    found = texts_of(place)
    assert found
    assert list(found.dense) == [by_hand(place, prompt, None) for prompt in PROMPTS]
    assert list(found.uniform) == [by_hand(place, prompt, [0.6] * 4) for prompt in PROMPTS]


@pytest.mark.slow
def test_only_the_run_that_measures_writes(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A study that ended without texts has none, and is not loaded again for them; more trials may bring them."""
    run(place)
    assert texts_of(place) is None
    run(place, ASKED)
    assert texts_of(place) is None
    study = run(place, ASKED, "search.trials=12")
    best = best_trial(study)
    assert best
    assert (texts_of(place) is not None) == (best.number > 2)


@pytest.mark.slow
def test_prompts_of_one_s_own(place: Path, command: CommandLine) -> None:
    study = ("--study", place / "tiny.toml", *settings(ASKED))
    answer = command(*study, "--prompt", "The import system", "--prompt", 'a "b" [c] ü')
    assert answer.code == 0
    found = texts_of(place)
    assert found
    assert found.prompts == (*PROMPTS, "The import system", 'a "b" [c] ü')
    for prompt in found.prompts:
        assert f"\n{prompt} …\n  dense    " in answer.out
    assert command(*study).out.count("\n  uniform  ") == 5  # shown again, without a model


@pytest.mark.parametrize("prompt", ["", "  ", "\udcff"])
def test_a_prompt_that_is_no_text(prompt: str, place: Path, command: CommandLine) -> None:
    expected = "Invalid value for --prompt: must be a text, and not empty; see tune.py --help"
    assert command("--study", place / "tiny.toml", "--prompt", prompt).error == expected


def left_out(place: Path, *overrides: str) -> list[str]:
    notes: list[str] = []

    def hear(event: Event) -> None:
        notes.extend([event.text] if isinstance(event, Message) else [])

    study = run(place, ASKED, *overrides, watch=hear)
    assert "continuations" not in study.user_attrs
    assert read_config(place / "tiny.best.json").scored()
    return [note for note in notes if note.startswith("continuations")]


@pytest.mark.slow
def test_a_model_that_fails_to_write_loses_no_study(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("of the\nmodel's own")

    monkeypatch.setattr(generation_prompts, "generate", fail)
    assert left_out(place) == ["continuations: left out, ZeroDivisionError: of the model's own"]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["offload", "room"])
def test_a_model_without_room_is_left_out(how: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if how == "room":
        monkeypatch.setattr(observers, "free_memory", lambda device: 1000)
    said = left_out(place, *["model.offload=disk"] * (how == "offload"))
    assert said == [
        "continuations: left out, the model leaves no room for a pruned copy; `tune.py generate` makes them"
    ]


# The command


@pytest.mark.slow
def test_generate_with_a_configuration(done: Path, command: CommandLine) -> None:
    best = read_config(done / "tiny.best.json")
    files = {path: path.read_bytes() for path in (done / "tiny.best.json", done / "tiny.db")}
    read = command("generate", "--config", done / "tiny.best.json", "--tokens", "6", "--prompt", "The import")
    assert read.code == 0
    titles = [line.split(" wanda")[0] for line in read.out.splitlines() if line.startswith(("continuations", "The "))]
    assert titles == ["continuations: dense", "continuations: uniform", "continuations: best", "The import …"]
    assert {path: path.read_bytes() for path in files} == files  # a question of its own is stored nowhere
    answer = command("generate", "--config", done / "tiny.best.json", "--tokens", "6")
    found = read_config(done / "tiny.best.json").continuations
    assert found
    assert (found.tokens, found.prompts) == (6, PROMPTS)
    assert attached(stored(done), best.trial)["continuations"] == found.model_dump(mode="json")
    assert f"\n{PROMPTS[2]} …\n  dense    {in_one_line(found.dense[2])}\n" in answer.out
    assert answer.out.endswith(f"stored in {done / 'tiny.best.json'} and on study tiny\n")


@pytest.mark.slow
def test_generate_with_a_study_equals_its_own_texts(place: Path, command: CommandLine) -> None:
    run(place, ASKED, "allocation.beta=[0.0, 0.02]", 'continuations.prompts=["The import"]')
    expected = texts_of(place)
    (place / "tiny.best.json").unlink()
    wishes = settings("allocation.beta=[0.0, 0.02]", 'continuations.prompts=["The import"]')
    own = ("--study", place / "tiny.toml", *wishes)
    answer = command("generate", *own, "--tokens", str(TOKENS), "--json")
    assert json.loads(answer.out) == (expected and expected.model_dump(mode="json"))
    assert not (place / "tiny.best.json").exists()
    assert texts_of(place) == expected


@pytest.mark.slow
def test_generate_streams_where_a_study_does_not(done: Path, command: CommandLine, monkeypatch: Any) -> None:
    arguments = ("generate", "--config", done / "tiny.best.json", "--tokens", "6", "--json")
    expected = command(*arguments).out
    monkeypatch.setenv("ATP_TUNE_DEVICE_MEMORY", "100kB")
    assert command(*arguments).out == expected


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "Invalid value for --config: give either --config FILE or --study NAME"),
        (["--config", "x", "--study", "y"], "Invalid value for --config: give either --config FILE or --study NAME"),
        (["--config", "x", "--set", "a=1"], "Invalid value for --set: only with --study"),
        (["--config", "x", "--study-name", "y"], "Invalid value for --study-name: only with --study"),
        (["--config", "x", "--prompt", ""], "Invalid value for --prompt: must be a text, and not empty"),
        (
            ["--config", "x", "--tokens", "0"],
            "Invalid value for '--tokens': Input should be greater than or equal to",
        ),
        (["--config", "nowhere.json"], "nowhere.json: No such file or directory; write one with: "),
        (["--study", "TINY"], "study tiny: has no trials yet; run: python tune.py --study "),
    ],
)
def test_wrong_options(arguments: list[str], expected: str, tiny_place: Path, command: CommandLine) -> None:
    given = [str(tiny_place / "tiny.toml") if word == "TINY" else word for word in arguments]
    assert command("generate", *given).error.startswith(expected)


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


@pytest.mark.parametrize(("is_terminal", "width"), [(True, 80), (False, 200)])
def test_one_below_the_other(is_terminal: bool, width: int, shown: Callable[[bool, int], str]) -> None:
    assert shown(is_terminal, width) == (
        "\nOne | two …\n  dense         a ↵ b\n  uniform       \\x1b[31md :smile:\n"
        "  gradient-rows h\n  best          <b>f</b>\n"
        "\nthree …\n  dense         c\n  uniform       e\n  gradient-rows i\n  best          g\n"
        "\ngreedy, without a chat template, at most 5 tokens, in float32; ↵: a line break\n\n"
    )


def test_side_by_side(shown: Callable[[bool, int], str]) -> None:
    lines = [line.split() for line in shown(True, 140).splitlines()]
    assert ["dense", "uniform", "gradient-rows", "best"] in lines
    assert ["a", "↵", "b", "\\x1b[31md", ":smile:", "h", "<b>f</b>"] in lines


@pytest.mark.parametrize("kind", few(["html", "md", "json"], ["md", "json"]))
def test_in_reports(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datetime import datetime

    from synthetic import made_up

    from atp_tune.report import gather, write

    study = new_study(None)
    study.add_trials([made_up(0.0), made_up(0.006)])
    write([gather(study, datetime(2026, 1, 2))], kind, tmp_path / "before")
    study.set_user_attr("continuations", {"1": FOUND.model_dump(mode="json"), "0": {"prompts": 1}})
    write([gather(study, datetime(2026, 1, 2))], kind, tmp_path / "after")
    before, after = ((tmp_path / name).read_text(encoding="utf-8") for name in ("before", "after"))
    if kind == "json":
        assert json.loads(before)["studies"][0]["continuations"] is None
        assert json.loads(after)["studies"][0]["continuations"] == FOUND.model_dump(mode="json")
        return
    assert "Continuations" not in before
    expected = {
        "md": "| One \\| two | a ↵ b | \\\\x1b\\[31md :smile: | h | \\<b\\>f\\</b\\> |",
        "html": '<td class="word">One | two</td><td class="word">a ↵ b</td><td class="word">\\x1b[31md :smile:</td>'
        '<td class="word">h</td><td class="word">&lt;b&gt;f&lt;/b&gt;</td>',
    }
    assert expected[kind] in after
    assert "<b>f" not in after.replace("\\<b", "")


def test_in_the_model_card() -> None:
    made = card(config(continuations=FOUND))
    assert rows(made, "## What it writes")[2:4] == [
        ["One \\", "two", "a ↵ b", "\\\\x1b\\[31md :smile:", "\\<b\\>f\\</b\\>"],
        ["three", "c", "e", "g"],
    ]
    assert "Each text is greedy, without a chat template" in body(made)
    assert "## What it writes" not in body(card())


@pytest.mark.parametrize("changed", [{"best": ("one",)}, {"prompts": ()}, {"tokens": 0}, {"dense": (1, 2)}, {"x": 1}])
def test_what_is_no_such_record(changed: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Continuations"):
        Continuations.model_validate({**FOUND.model_dump(), **changed})
