"""`finetune`, as a user types it: on a folder that `apply` has written from the tiny study."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from byhand import ByHand
from expect import parametrize, refusal, slow
from safetensors.torch import save_file
from test_applying import block_of, same_bytes, tensors
from tinystudy import TOKENS, CommandLine, copy_of, finish, start, wait_until

from atp_tune.config.best import read_config
from atp_tune.config.data import Text
from atp_tune.config.prune import Training
from atp_tune.events import Place
from atp_tune.folders import finetuning
from atp_tune.folders.card import ABOUT, FINETUNED, Finetuned, origin, read_text, rooted
from atp_tune.folders.finetuning import finetune
from atp_tune.folders.training import order
from atp_tune.measures import change, perplexity

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


place = copy_of("tiny_sparse")


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


@slow
def test_a_sparse_folder_is_tuned_and_keeps_its_zeros(place: Path, command: CommandLine) -> None:
    longer = (*SHORT, "--steps", "30", "--learning-rate", "0.003", "--text", f"file:{place / 'long.txt'}")
    answer = command("finetune", place / "sparse", "--out", place / "out", *longer)
    assert answer.is_clean
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


@slow
@parametrize("train", ["lora", "scales"])
def test_the_dense_models_predictions_are_learnt(place: Path, command: CommandLine, train: str) -> None:
    longer = (*SHORT, "--steps", "30", "--text", f"file:{place / 'long.txt'}", "--eval-every", "10")
    answer = command("finetune", place / "sparse", "--out", place / "out", *longer, "--loss", "kl", "--train", train)
    assert answer.is_clean
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
    assert ("LoRA" if train == "lora" else "Scales within each linear") in card
    assert "loss kl" in card


@slow
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


@slow
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


# --- a run that is cut off


@slow
def test_a_killed_process_goes_on_to_the_same_weights(place: Path, command: CommandLine) -> None:
    options = ("finetune", place / "sparse", *SHORT, "--steps", str(5 * finetuning.SAVED))
    command.ok(*options, "--out", place / "whole")
    process = start(*options, "--out", place / "out")
    wait_until(lambda: (place / "out.part").exists() or process.poll() is not None)
    process.kill()
    process.communicate()
    assert not (place / "out").exists()
    answer = finish(start(*options, "--out", place / "out"))
    assert answer.code == 0
    assert "resumes after step " in answer.out
    one, other = tensors(place / "whole"), tensors(place / "out")
    assert all(same_bytes(one[name], other[name]) for name in one)
    assert not list(place.glob(".*")) and not (place / "out.part").exists()


# --- the dense model of `--loss kl` and `both`


@slow
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
    said = refusal(run, place, *arguments, **settings)
    assert not [file.name for file in place.iterdir() if file.name.startswith(("out", "."))]
    return said


@parametrize(("role", "name"), [("validation", "validation"), ("test", "test")])
def test_the_texts_that_measure_are_not_trained_on(role: str, name: str, place: Path) -> None:
    source = f"file:{place / f'{name}.txt'}"
    assert refused(place, source) == (
        f"--text: {source} shares documents with the {role} text; give another source, split or part"
    )


@parametrize(("role", "tokens"), [("test", TOKENS), ("test", TOKENS + 5), ("validation", 4 * TOKENS)])
def test_a_copy_of_a_text_that_measures_is_found_out(place: Path, role: str, tokens: int) -> None:
    shutil.copyfile(place / f"{role}.txt", place / "copy.txt")
    said = refused(place, f"file:{place / 'copy.txt'}", tokens=tokens)
    assert said.startswith("--text: ")
    assert said.endswith(f"windows of file:{place / 'copy.txt'} are in the {role} text too; give another source")


@parametrize("content", ["{", "[]", '{"format": "atp_tune.config/1"}', '"text"', "{}"])
def test_a_record_that_is_none(content: str, place: Path) -> None:
    (place / "sparse" / ABOUT).write_text(content)
    assert refused(place).startswith(f"{place / 'sparse' / ABOUT}: ")


# --- texts on the command line


def test_paths_start_where_the_configuration_was(place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`apply` writes down where they start, seen from the folder; so that may be read from anywhere."""
    monkeypatch.chdir(tmp_path)
    found = origin(place / "sparse")
    assert found is not None
    assert found.calibration.source == f"file:{place / 'calibration.txt'}"
    assert rooted(Text(source="c4"), place).source == "c4"
