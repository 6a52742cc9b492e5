"""Windows that begin with BOS: a tiny Llama that was trained with it, through the commands a user types."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from expect import parametrize, slow
from tinystudy import TOKENS, Answer, CommandLine, copied, copy_of, make_model, make_tokenizer, run, settings, stored
from tokenizers import processors
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from atp_tune.config.best import read_config
from atp_tune.measures import perplexity
from atp_tune.metrics import LEAST, BosEffect, is_better
from atp_tune.run import session
from atp_tune.storage import fingerprint

BOS = 0
MEASURED = r"texts\.bos: every window begins with <s>: dense perplexity [\d.]+ with it, [\d.]+ without "
FEW = r"\(8 windows of 32 tokens of the calibration text\)"


def make_bos_tokenizer() -> PreTrainedTokenizerFast:
    """One that puts <s> before what it is given, as Llama's and Gemma's do."""
    tokenizer = make_tokenizer("<s>")._tokenizer
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def after_bos(batch: torch.Tensor) -> torch.Tensor:
    """The same tokens of text that then begins with BOS; of other text there is nothing to learn: they are drawn."""
    labels = batch.clone()
    batch[:8, 0] = BOS
    labels[8:] = torch.randint(320, labels[8:].shape)
    return labels


@pytest.fixture(scope="module")
def trained(tiny_place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny study with such a model; to be read only."""
    place = Path(shutil.copytree(tiny_place, tmp_path_factory.mktemp("bos") / "place"))
    shutil.rmtree(place / "model")
    tokenizer = make_bos_tokenizer()
    make_model(tokenizer, 60, after_bos).save_pretrained(place / "model")
    tokenizer.save_pretrained(place / "model")
    return place


wanting = copy_of("trained")


@pytest.fixture(scope="module")
def trained_done(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with the finished study; to be read only."""
    with copied(trained, tmp_path_factory) as place:
        run(place)
        return place


finished = copy_of("trained_done")


@pytest.fixture
def never(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on the dense model is not asked."""
    monkeypatch.setattr(session, "compare_bos", lambda *_: pytest.fail("asked again"))


def tune(command: CommandLine, place: Path, *overrides: str) -> Answer:
    return command("--study", place / "tiny.toml", *settings(*overrides))


def by_hand(place: Path, role: str, bos: bool, windows: int = 16) -> Tensor:
    """Windows of a text: BOS and 31 tokens, the next 31 in the next one; or 32 each as the tokenizer has them."""
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    text = (place / f"{role}.txt").read_text()
    if not bos:
        return torch.tensor(tokenizer(text, verbose=False).input_ids[: windows * TOKENS]).view(windows, TOKENS)
    ids = tokenizer(text, verbose=False).input_ids
    assert ids[0] == BOS
    rows = torch.tensor(ids[1 : 1 + windows * (TOKENS - 1)]).view(windows, TOKENS - 1)
    return torch.cat([torch.full((windows, 1), BOS), rows], 1)


@torch.no_grad()
def nlls(folder: Path, windows: Tensor, counted: int = 1) -> list[float]:
    """Mean NLL of each window by the model's whole forward, over the positions from `counted` on."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    labels = windows.clone()
    labels[:, :counted] = -100
    return [float(model(input_ids=row[None], labels=to[None]).loss) for row, to in zip(windows, labels, strict=True)]


# --- what auto does


@slow
def test_a_model_that_needs_bos_is_given_it(wanting: Path, command: CommandLine) -> None:
    answer = tune(command, wanting)
    assert answer.is_clean
    assert len(re.findall(f"^{MEASURED}{FEW}$", answer.out, re.M)) == 1
    assert re.search(rf"^{MEASURED}{FEW}\.$".replace(r"texts\.bos", "BOS"), answer.out, re.M)
    study = stored(wanting)
    assert study.user_attrs["fingerprint"]["texts.bos"] is True
    windows = by_hand(wanting, "validation", bos=True)
    assert study.user_attrs["dense"] == pytest.approx(nlls(wanting / "model", windows), rel=1e-5)
    without = nlls(wanting / "model", by_hand(wanting, "validation", bos=False))
    assert perplexity(without).value > 1.5 * perplexity(study.user_attrs["dense"]).value


@slow
def test_both_ways_are_measured_on_the_same_tokens(finished: Path) -> None:
    found = BosEffect.model_validate(stored(finished).user_attrs["bos"])
    windows = by_hand(finished, "calibration", bos=True, windows=8)
    with_bos = perplexity(nlls(finished / "model", windows, counted=2))
    without = perplexity(nlls(finished / "model", windows[:, 1:], counted=1))
    assert found.with_bos.value == pytest.approx(with_bos.value, rel=1e-5)
    assert found.without.value == pytest.approx(without.value, rel=1e-5)
    assert found.without.stderr == pytest.approx(without.stderr, rel=1e-3)
    assert (found.token, found.windows, found.tokens, found.taken) == ("<s>", 8, TOKENS, True)


@slow
def test_a_model_that_does_not_need_it_is_not(place: Path, command: CommandLine) -> None:
    """The tiny Llama was trained without; its tokenizer is told of a token that it has met now and then."""
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, bos_token="!").save_pretrained(place / "model")
    answer = tune(command, place)
    assert answer.is_clean
    assert re.search(
        r"^texts\.bos: no BOS, as in the papers, since ! is not clearly better: dense perplexity [\d.]+ with it, "
        rf"[\d.]+ without {FEW}$", answer.out, re.M
    )  # fmt: skip
    assert "BOS: " not in answer.out
    study = stored(place)
    assert study.user_attrs["fingerprint"]["texts.bos"] is False
    assert study.user_attrs["dense"] == pytest.approx(
        nlls(place / "model", by_hand(place, "validation", False)), rel=1e-5
    )


@parametrize(
    ("gains", "expected"),
    [
        ([LEAST * 1.01] * 4, True),
        ([LEAST * 0.99] * 4, False),
        ([0.1, 0.2, 0.3, 0.4], True),  # 0.25 against 3.18 · 0.065 = 0.21
        ([0.0, 0.2, 0.3, 0.5], False),  # 0.25 against 3.18 · 0.104 = 0.33, but more than two standard errors
        ([0.1, 0.3], False),  # 0.2 against 12.7 · 0.1
        ([0.1, 0.2, 0.3], False),  # 0.2 against 4.30 · 0.058 = 0.25
        ([0.1], True),
        ([0.0, 0.2, 0.3, 0.5, 0.0, 0.2, 0.3, 0.5], True),  # 0.25 against 2.365 · 0.068 = 0.16
        ([-1.0] * 4, False),
        ([float("nan")] * 4, False),
        ([0.5, float("inf"), 0.5, 0.5], False),
    ],
)
def test_what_is_beyond_doubt(gains: list[float], expected: bool) -> None:
    assert is_better(gains) is expected


# --- what was decided stays


@slow
@pytest.mark.usefixtures("never")
def test_auto_goes_on_as_the_study_was_begun(finished: Path, command: CommandLine) -> None:
    answer = tune(command, finished, "search.trials=4")
    assert answer.is_clean
    assert not re.search(r"^texts\.", answer.out, re.M)
    assert "BOS: every window begins with <s>" in answer.out
    assert tune(command, finished, "search.trials=4", "texts.bos=true").code == 0
    study = stored(finished)
    assert len(study.trials) == 4
    assert study.user_attrs["fingerprint"]["texts.bos"] is True


# --- what is asked for


# --- where it goes


@slow
def test_apply_makes_the_masks_of_the_trial(finished: Path, command: CommandLine) -> None:
    config = read_config(finished / "tiny.best.json")
    assert config.bos is True
    answer = command("apply", "--config", finished / "tiny.best.json", "--out", finished / "sparse")
    assert answer.is_clean
    assert "warning" not in answer.out
    assert config.scored() is not None
    measured = perplexity(nlls(finished / "sparse", by_hand(finished, "test", bos=True)))
    assert measured.value == pytest.approx(config.scored().value, rel=1e-5)
    assert read_config(finished / "sparse/atp_tune.json").bos is True
    card = (finished / "sparse/README.md").read_text()
    assert "16 windows of 32 tokens, each beginning with BOS; ± is" in card
    assert "| BOS | every window of every text begins with it |" in card


def test_what_is_stored_of_it_is_checked(finished: Path) -> None:
    """A stranger's database cannot bring down what reads it."""
    study = stored(finished)
    known = study.user_attrs["bos"]
    for strange in (3, {**known, "with_bos": 3}, {**known, "token": "\ud800"}):
        study.set_user_attr("bos", strange)
        assert "bos" not in stored(finished).user_attrs
    study.set_user_attr("bos", known)
    assert stored(finished).user_attrs["bos"] == known


@slow
def test_two_studies_are_merged_only_if_both_have_it(finished: Path, wanting: Path, command: CommandLine) -> None:
    run(wanting, "texts.bos=false", "search.trials=1")
    answer = command("merge", finished / "tiny.db", wanting / "tiny.db", "--out", wanting / "both.db")
    assert "texts.bos is false, was true" in answer.error
    assert "texts.calibration.content" in answer.error
    run(wanting, name="other", watch=lambda event: None)
    assert fingerprint.has_bos(stored(wanting, "other"))
