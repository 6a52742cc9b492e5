"""`finetune`, as a user types it: on a folder that `apply` has written from the tiny study."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from byhand import ByHand
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from test_applying import block_of, same_bytes, tensors
from tinystudy import TOKENS, CommandLine, finish, settings, start, wait_until

from atp_tune.config.best import read_config
from atp_tune.config.data import Text
from atp_tune.config.recover import Training
from atp_tune.errors import UserError
from atp_tune.events import Event, Message, Place
from atp_tune.folders import finetuning
from atp_tune.folders.applying import apply
from atp_tune.folders.finetuning import finetune
from atp_tune.folders.provenance import ABOUT, FINETUNED, Finetuned, origin, read_text, rooted
from atp_tune.folders.training import order
from atp_tune.measures import change, perplexity
from atp_tune.utils.extras import install

SHORT = (
    "--train",
    "lora",
    "--loss",
    "next-token",
    "--eval-every",
    "20",
    "--patience",
    "5",
    "--steps",
    "6",
    "--batch",
    "4",
    "--seqlen",
    str(TOKENS),
    "--learning-rate",
    "0.01",
)
SETTINGS = Training(
    train="lora",
    loss="next-token",
    eval_every=20,
    patience=0,
    steps=6,
    rank=4,
    alpha=8,
    learning_rate=0.01,
    seqlen=TOKENS,
    batch=4,
    seed=0,
)


@pytest.fixture(scope="module")
def tiny_sparse(tiny_done: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished tiny study with the folder `sparse` beside it; to be read only."""
    place = Path(shutil.copytree(tiny_done, tmp_path_factory.mktemp("sparse") / "place"))
    config = read_config(place / "tiny.best.json")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATP_TUNE_CACHE", str(place.parent / "cache"))
        apply(config, place / "sparse", Place(place, "cpu"))
    return place


@pytest.fixture
def place(tiny_sparse: Path, tmp_path: Path, windows: None) -> Path:
    return Path(shutil.copytree(tiny_sparse, tmp_path / "place"))


def run(place: Path, text: str | None = None, test: str | None = None, **settings: Any) -> Finetuned:
    named = [value and read_text("--text", value, TOKENS) for value in (text, test)]
    changed = SETTINGS.model_copy(update=settings)
    return finetune(
        place / "sparse", place / "out", named[0] or None, named[1] or None, changed, Place(Path(), "cpu")
    ).record


def check_kept(before: Path, after: Path) -> None:
    """Zeros are the same zeros, linears have changed elsewhere, and all the rest is equal byte by byte."""
    old, new = tensors(before), tensors(after)
    assert old.keys() == new.keys()
    for name, was in old.items():
        if block_of(name) is None:
            assert same_bytes(was, new[name])
            continue
        assert torch.equal(was == 0, new[name] == 0)
        assert same_bytes(was[was == 0], new[name][was == 0])
        assert not torch.equal(was, new[name])


@pytest.mark.slow
def test_a_sparse_folder_is_tuned_and_keeps_its_zeros(place: Path, command: CommandLine) -> None:
    longer = (*SHORT, "--steps", "30", "--learning-rate", "0.003", "--text", f"file:{place / 'long.txt'}")
    answer = command("finetune", place / "sparse", "--out", place / "out", *longer)
    assert (answer.code, answer.err) == (0, "")
    check_kept(place / "sparse", place / "out")
    before, after = (ByHand(place, place / name).nlls("test") for name in ("sparse", "out"))
    done = Finetuned.model_validate_json((place / "out" / FINETUNED).read_text())
    assert done.before.value == pytest.approx(perplexity(before).value, rel=1e-5)
    assert done.after.value == pytest.approx(perplexity(after).value, rel=1e-5)
    assert done.change.value == pytest.approx(change(before, after).value, rel=1e-3)
    assert done.change.value < 0
    assert done.zeros.before == done.zeros.after
    assert done.zeros.before / done.zeros.weights == pytest.approx(ByHand(place, place / "out").zeros())
    zeros = f"{done.zeros.before:,}"
    assert f"| pruned     | {zeros} | {done.before}" in answer.out
    assert f"| fine-tuned | {zeros} | {done.after}" in answer.out
    assert "step 20 of 30: loss " in answer.out
    assert sorted(file.name for file in place.iterdir() if "out" in file.name) == ["out"]
    assert {file.name for file in (place / "out").iterdir()} == {
        FINETUNED, *(file.name for file in (place / "sparse").iterdir())
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("train", ["lora", "scales"])
def test_the_dense_models_predictions_are_learnt(place: Path, command: CommandLine, train: str) -> None:
    longer = (*SHORT, "--steps", "30", "--text", f"file:{place / 'long.txt'}", "--eval-every", "10")
    answer = command("finetune", place / "sparse", "--out", place / "out", *longer, "--loss", "kl", "--train", train)
    assert (answer.code, answer.err) == (0, "")
    check_kept(place / "sparse", place / "out")
    done = Finetuned.model_validate_json((place / "out" / FINETUNED).read_text())
    assert (done.settings.loss, done.settings.train, done.settings.rank) == ("kl", train, {"lora": 8}.get(train))
    assert done.teacher == read_config(place / "sparse" / ABOUT).model.fingerprint
    assert done.change.value < 0
    held = done.held_out
    assert held is not None
    assert [step for step, _ in held.losses] == [0, 10, 20, 30]
    by_hand = [ByHand(place, place / name).model for name in ("model", "sparse", "out")]
    ids = ByHand(place, place / "sparse").tokenizer((place / "long.txt").read_text(), verbose=False).input_ids
    rows = torch.tensor(ids[: 134 * TOKENS]).reshape(-1, TOKENS)[-held.windows :]
    dense, before, after = (model(input_ids=rows).logits[:, :-1].log_softmax(-1).detach() for model in by_hand)
    for found, (_, loss) in ((before, held.losses[0]), (after, min(held.losses, key=lambda each: each[1]))):
        assert loss == pytest.approx(float((dense.exp() * (dense - found)).sum(-1).mean()), rel=5e-2)  # bfloat16
    fell = f"loss on {held.windows} held-out windows: {held.losses[0][1]:.4f} → "
    assert fell in answer.out
    assert "held-out loss before training: " in answer.out
    assert f"(lowest after step {held.best})" in answer.out
    assert "training needs about " in answer.out
    card = (place / "out" / "README.md").read_text()
    assert f"The weights are those after step {held.best} of 30" in card
    assert ("LoRA" if train == "lora" else "Scales of the rows and columns") in card
    assert "loss kl" in card


@pytest.mark.slow
def test_training_that_helps_nothing_writes_nothing(place: Path, command: CommandLine) -> None:
    """At a rate that destroys the model: it stops before all steps, with one line, and leaves nothing."""
    words = (place / "sparse", "--out", place / "out", *SHORT, "--steps", "90", "--learning-rate", "3")
    answer = command("finetune", *words, "--eval-every", "2", "--patience", "2")
    assert answer.code == 2
    assert answer.error.startswith("training: no step lowered the loss on the ")
    assert " at best), so nothing was written; lower the learning rate, or give more or other text" in answer.error
    assert "stopped: the held-out loss has not fallen in 2 measurements" in answer.out
    assert "step 4 of 90: " in answer.out
    assert "step 6 of 90: " not in answer.out
    assert not [file.name for file in place.iterdir() if "out" in file.name]


@pytest.mark.slow
def test_a_text_that_is_too_short_is_not_divided(place: Path) -> None:
    (place / "short.txt").write_text("A short text about zeros. " * 20)
    notes: list[Event] = []
    text = read_text("--text", f"file:{place / 'short.txt'}", TOKENS)
    settings = SETTINGS.model_copy(update={"steps": 2, "patience": 2})
    done = finetune(
        place / "sparse", place / "out", text, None, settings, Place(Path(), "cpu", watch=notes.append)
    ).record
    assert done.held_out is None
    assert done.windows < 16
    assert any("too few to hold some out" in note.text for note in notes if isinstance(note, Message))


@pytest.mark.slow
def test_the_folder_says_what_was_done(place: Path) -> None:
    done = run(place)
    written = json.loads((place / "out" / FINETUNED).read_text())
    assert Finetuned.model_validate(written) == done
    assert written["format"] == "atp_tune.finetune/2"
    assert written["text"]["source"] == f"file:{place / 'calibration.txt'}"
    assert written["test"]["source"] == f"file:{place / 'test.txt'}"
    assert written["settings"] == SETTINGS.model_dump()
    assert len(written["losses"]) == 6
    assert all(0 < loss < 10 for loss in written["losses"])
    assert written["dense"]["value"] == read_config(place / "tiny.best.json").scored("dense", "test").value  # type: ignore[union-attr]
    assert (place / "out" / ABOUT).read_bytes() == (place / "sparse" / ABOUT).read_bytes()


@pytest.mark.slow
def test_the_card_says_it_and_the_new_metric(place: Path) -> None:
    before = (place / "sparse" / "README.md").read_text()
    done = run(place)
    card = (place / "out" / "README.md").read_text()
    assert "model-index" in before
    (metric,) = ModelCard.load(place / "out" / "README.md").data.eval_results
    assert metric.metric_value == pytest.approx(done.after.value, abs=1e-4)
    assert f"| **this model**, fine-tuned | {done.after} |\n" in card
    assert "license" not in before or "license" in card
    head, _, rest = card.partition("## Fine-tuned after pruning")
    section, _, older = rest.partition("\n## ")
    told = before.partition("---\n\n")[2].partition("## ")[0]
    assert head.endswith(told.replace("and without retraining.", "and trained after that.")) and "retrain" not in head
    assert f"{done.before} before, {done.after} after ({done.change})" in section
    assert f"{done.windows} windows of {TOKENS} tokens" in section
    assert "**this model**" in before
    assert card.count("**this model**") == 1
    assert "the model before fine-tuning" in older
    assert "neither pruned nor fine-tuned" in older
    assert older.count("\n## ") == before.count("\n## ") - 1
    assert str(place) not in card


@pytest.mark.slow
def test_windows_are_those_of_the_text_in_the_order_of_the_seed(place: Path) -> None:
    """The first loss is that of the sparse model on the first batch, by hand."""
    done = run(place, steps=1)
    by_hand = ByHand(place, place / "sparse")
    ids = by_hand.tokenizer((place / "calibration.txt").read_text(), verbose=False).input_ids
    rows = torch.tensor(ids[: 4 * TOKENS]).reshape(4, TOKENS)[order(4, SETTINGS.model_copy(update={"steps": 1}))]
    assert done.windows == 4
    with torch.no_grad():
        expected = float(by_hand.model(input_ids=rows, labels=rows).loss)
    assert done.losses[0] == pytest.approx(expected, rel=1e-2)  # bfloat16 where it is fast


@pytest.mark.slow
def test_a_folder_that_says_nothing_holds_out_a_part(place: Path) -> None:
    (place / "sparse" / ABOUT).unlink()
    (place / "sparse" / "README.md").unlink()
    (place / "many.jsonl").write_text("".join(json.dumps({"text": f"{n} " * 40}) + "\n" for n in range(100)))
    done = run(place, f"file:{place / 'many.jsonl'}", steps=2)
    assert (done.text.part, done.test.part) == ((0.0, 0.9), (0.9, 1.0))
    assert done.dense is None
    check_kept(place / "sparse", place / "out")


@pytest.mark.slow
def test_what_was_pruned_without_a_search_is_tuned_too(place: Path, command: CommandLine) -> None:
    assert command("prune", "--study", place / "tiny.toml", "--beta", "0.05", "--out", place / "once").code == 0
    assert command("finetune", place / "once", "--out", place / "tuned", *SHORT).code == 0
    check_kept(place / "once", place / "tuned")


@pytest.mark.slow
def test_it_can_be_tuned_again(place: Path, command: CommandLine) -> None:
    run(place)
    answer = command("finetune", place / "out", "--out", place / "again", *SHORT, "--seed", "1", "--patience", "0")
    assert answer.code == 0
    check_kept(place / "sparse", place / "again")


@pytest.mark.slow
def test_zeros_of_either_sign_stay(place: Path) -> None:
    file = place / "sparse" / "model.safetensors"
    edited = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    edited[name] = torch.where(edited[name] == 0, -edited[name], edited[name])
    save_file(edited, file, metadata={"format": "pt"})
    assert torch.signbit(edited[name][edited[name] == 0]).any()
    run(place, steps=2)
    check_kept(place / "sparse", place / "out")


# --- a run that is cut off


def interrupted(place: Path, after: int) -> None:
    def watch(event: Event) -> None:
        if isinstance(event, Message) and event.text.startswith(f"step {after} of"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(place / "sparse", place / "out", None, None, SETTINGS, Place(Path(), "cpu", watch=watch))


@pytest.mark.slow
def test_it_goes_on_where_it_was_cut_off(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetuning, "SAVED", 2)
    whole = run(place)
    shutil.move(place / "out", place / "whole")
    interrupted(place, after=4)
    assert not (place / "out").exists()
    assert (place / "out.part").is_file()
    notes: list[Event] = []
    again = finetune(
        place / "sparse", place / "out", None, None, SETTINGS, Place(Path(), "cpu", watch=notes.append)
    ).record
    assert Message("resumes after step 4 of 6") in notes
    assert again.losses == whole.losses
    one, other = tensors(place / "whole"), tensors(place / "out")
    assert all(same_bytes(one[name], other[name]) for name in one)
    assert not (place / "out.part").exists()


@pytest.mark.slow
def test_other_options_do_not_go_on_from_it(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetuning, "SAVED", 2)
    interrupted(place, after=2)
    with pytest.raises(UserError, match=r"out\.part: was begun with another learning-rate; give the same options"):
        run(place, learning_rate=0.02)
    with pytest.raises(UserError, match=r"out\.part: was begun with another text; "):
        run(place, f"file:{place / 'long.txt'}")


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on(place: Path, command: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetuning, "SAVED", 2)
    save = finetuning.folder_scores

    def interrupt(*arguments: Any) -> Any:
        if (place / "out.part").exists():
            os.kill(os.getpid(), signal.SIGINT)
        return save(*arguments)

    monkeypatch.setattr(finetuning, "folder_scores", interrupt)
    answer = command("finetune", place / "sparse", "--out", place / "out", *SHORT)
    assert answer.code == 130
    assert f"stopped: the same command resumes from {place / 'out'}.part" in answer.out
    assert not (place / "out").exists()


@pytest.mark.slow
def test_a_killed_process_goes_on_to_the_same_weights(place: Path, command: CommandLine) -> None:
    options = ("finetune", place / "sparse", *SHORT, "--steps", str(5 * finetuning.SAVED))
    whole = command(*options, "--out", place / "whole")
    assert whole.code == 0, whole.err
    process = start(*options, "--out", place / "out")
    wait_until(lambda: (place / "out.part").exists() or process.poll() is not None)
    process.kill()
    process.communicate()
    assert not (place / "out").exists()
    answer = finish(start(*options, "--out", place / "out"))
    assert answer.code == 0, answer.err
    assert "resumes after step " in answer.out
    one, other = tensors(place / "whole"), tensors(place / "out")
    assert all(same_bytes(one[name], other[name]) for name in one)
    assert not list(place.glob(".*")) and not (place / "out.part").exists()


# --- the dense model of `--loss kl` and `both`


def without_record(place: Path) -> tuple[str, ...]:
    """Options that need no `atp_tune.json`, which is removed."""
    (place / "sparse" / ABOUT).unlink()
    return (*SHORT, "--text", f"file:{place / 'long.txt'}", "--test-text", f"file:{place / 'test.txt'}")


@pytest.mark.slow
def test_a_teacher_that_is_named(place: Path, command: CommandLine) -> None:
    options = without_record(place)
    words = ("finetune", place / "sparse", "--out", place / "out", *options, "--loss", "kl")
    said = f"loss: {place / 'sparse'} has no atp_tune.json, so its dense model is not known; name it by --teacher"
    assert command(*words).error == said
    answer = command(*words, "--teacher", place / "model")
    assert (answer.code, answer.err) == (0, "")
    check_kept(place / "sparse", place / "out")


@pytest.mark.slow
def test_a_teacher_of_another_vocabulary(place: Path, command: CommandLine) -> None:
    other = Path(shutil.copytree(place / "model", place / "other"))
    config = json.loads((other / "config.json").read_text())
    vocabulary = config["vocab_size"]
    (other / "config.json").write_text(json.dumps({**config, "vocab_size": vocabulary - 7}))
    words = ("finetune", place / "sparse", "--out", place / "out", *SHORT, "--loss", "kl")
    assert command(*words, "--teacher", other).error == (
        f"--teacher {other}: has a vocabulary of {vocabulary - 7:,} tokens, the sparse model one of {vocabulary:,}; "
        "give the model that it was pruned from"
    )
    (other / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    words_of = tokenizer["model"]["vocab"]
    first, second, *_ = sorted(words_of, key=words_of.get)[-2:]
    words_of[first], words_of[second] = words_of[second], words_of[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert command(*words, "--teacher", other).error.startswith(f"--teacher {other}: its tokenizer has other tokens")


def test_a_dense_model_that_is_gone_or_another(place: Path, command: CommandLine) -> None:
    words = ("finetune", place / "sparse", "--out", place / "out", *SHORT, "--loss", "kl")
    save_file({"a": torch.ones(1)}, place / "model" / "more.safetensors")
    assert command(*words).error.startswith("model.fingerprint: ")
    shutil.rmtree(place / "model")
    error = command(*words).error
    assert error.startswith("loss: the dense model: model.source: ")
    assert error.endswith(", or name it by --teacher")
    assert command(*words, "--teacher", place / "none").error.startswith("--teacher: model.source: ")


# --- what is refused, with nothing left behind


def refused(place: Path, *arguments: Any, **settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        run(place, *arguments, **settings)
    assert not [file.name for file in place.iterdir() if file.name.startswith(("out", "."))]
    return str(caught.value)


@pytest.mark.parametrize(("role", "name"), [("validation", "validation"), ("test", "test")])
def test_the_texts_that_measure_are_not_trained_on(role: str, name: str, place: Path) -> None:
    source = f"file:{place / f'{name}.txt'}"
    assert refused(place, source) == (
        f"--text: {source} shares documents with the {role} text; give another source, split or part"
    )


def test_the_folders_report_text_is_kept_when_another_measures(place: Path) -> None:
    source = f"file:{place / 'test.txt'}"
    assert "shares documents with the study's test text" in refused(place, source, f"file:{place / 'long.txt'}")


@pytest.mark.parametrize(("role", "tokens"), [("test", TOKENS), ("test", TOKENS + 5), ("validation", 4 * TOKENS)])
def test_a_copy_of_a_text_that_measures_is_found_out(place: Path, role: str, tokens: int) -> None:
    shutil.copyfile(place / f"{role}.txt", place / "copy.txt")
    said = refused(place, f"file:{place / 'copy.txt'}", tokens=tokens)
    assert said.startswith("--text: ")
    assert said.endswith(f"windows of file:{place / 'copy.txt'} are in the {role} text too; give another source")


def test_a_text_is_needed_where_nothing_says_one(place: Path) -> None:
    (place / "sparse" / ABOUT).unlink()
    assert refused(place).startswith("--text: is needed, since the folder does not say how it was pruned; ")


@pytest.mark.parametrize("content", ["{", "[]", '{"format": "atp_tune.config/1"}', '"text"', "{}"])
def test_a_record_that_is_none(content: str, place: Path) -> None:
    (place / "sparse" / ABOUT).write_text(content)
    assert refused(place).startswith(f"{place / 'sparse' / ABOUT}: ")


def test_texts_that_are_gone_are_named_by_their_option(place: Path) -> None:
    (place / "calibration.txt").unlink()
    assert refused(place) == f"--text: source: there is no file {place / 'calibration.txt'}"
    (place / "test.txt").unlink()
    text = f"file:{place / 'long.txt'}"
    assert refused(place, text) == f"--test-text: source: there is no file {place / 'test.txt'}"


def test_a_text_shorter_than_a_window(place: Path) -> None:
    (place / "short.txt").write_text("short")
    assert "--text: seqlen: " in refused(place, f"file:{place / 'short.txt'}")


def test_what_is_there_is_not_overwritten(place: Path, command: CommandLine) -> None:
    (place / "mine").write_text("mine")
    answer = command("finetune", place / "sparse", "--out", place / "mine", *SHORT)
    assert answer.error == f"--out {place / 'mine'}: exists already; choose another folder or remove it"


def test_a_model_that_is_no_folder(place: Path, command: CommandLine) -> None:
    answer = command("finetune", place / "none", "--out", place / "out")
    assert answer.error.startswith(f"{place / 'none'}: is no folder; write one with: python tune.py apply")


def test_without_peft_it_says_what_to_install(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    assert refused(place) == f"training by LoRA: peft is not installed; run: {install('finetune')}"


@pytest.mark.parametrize(
    "options",
    [
        ("--steps", "0"),
        ("--rank", "0"),
        ("--alpha", "0"),
        ("--learning-rate", "-1"),
        ("--learning-rate", "nan"),
        ("--seqlen", "1"),
        ("--batch", "0"),
        ("--seed", "-1"),
        ("--patience", "-1"),
        ("--eval-every", "0"),
        ("--loss", "mse"),
        ("--train", "all"),
        ("--teacher", "model"),
        ("--rank", "4", "--train", "scales"),
        ("--alpha", "4", "--train", "scales"),
    ],
)
def test_options_that_make_no_sense(options: tuple[str, str], place: Path, command: CommandLine) -> None:
    answer = command("finetune", place / "sparse", "--out", place / "out", *options)
    assert answer.code == 2
    assert f"'{options[0]}'" in answer.err or options[0] in answer.err
    assert not (place / "out").exists()


# --- texts on the command line


def test_a_text_is_a_source_or_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert read_text("--text", "hub:ORG/NAME", 64) == Text(source="hub:ORG/NAME", seqlen=64)
    assert read_text("--text", "file:a.txt", 64).source == f"file:{tmp_path / 'a.txt'}"
    table = read_text("--text", '{source = "hub:ORG/NAME", split = "train", part = [0, 0.5], seqlen = 8}', 64)
    assert table == Text(source="hub:ORG/NAME", split="train", part=(0, 0.5), seqlen=8)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("{", "--text: { is not a TOML table: "),
        ("{split = 'train'}", "--text: source: "),
        ("{source = 'c4', windws = 3}", "--text: windws: "),
        ("{source = 'c4', part = [1, 0]}", "--text: text: "),
    ],
)
def test_a_table_with_a_mistake(value: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        read_text("--text", value, 64)
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)


def test_paths_start_where_the_configuration_was(place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`apply` writes down where they start, seen from the folder; so that may be read from anywhere."""
    monkeypatch.chdir(tmp_path)
    found = origin(place / "sparse")
    assert found is not None
    assert found.calibration.source == f"file:{place / 'calibration.txt'}"
    assert rooted(Text(source="c4"), place).source == "c4"


@pytest.mark.slow
def test_a_text_of_a_plug_in(place: Path, command: CommandLine) -> None:
    (place / "own.py").write_text("def own(name, folder):\n    return [(folder / name).read_text()]\n")
    source = settings('texts.calibration.source="own.py:own:calibration.txt"')
    words = ("--study", place / "tiny.toml", "--beta", "0.02", "--out", place / "made", *source, "--trust-plugins")
    assert command("prune", *words).code == 0
    again = ("finetune", place / "made", "--out", place / "out", *SHORT)
    assert command(*again).error == (
        "text.source: own.py:own is Python code, which is not run; read it, then allow it with --trust-plugins"
    )
    answer = command(*again, "--trust-plugins")
    assert (answer.code, answer.err) == (0, "")
    check_kept(place / "made", place / "out")
