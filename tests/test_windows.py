import json
import pydoc_data.topics
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from expect import parametrize, refusal, refused, slow
from families import few
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from atp_tune.config.data import KINDS, Text
from atp_tune.inputs.items import Items
from atp_tune.inputs.windows import TOKEN_WINDOWS, shared_windows, token_windows

TOPICS = [pydoc_data.topics.topics[key] for key in sorted(pydoc_data.topics.topics)]
TOPICS_SOURCE = "package:pydoc_data.topics:topics"


def saved_tokenizer(folder: Path, words: bool) -> Path:
    """A tokenizer that puts <s> first: byte-level BPE over words, or BPE over the whole text as Llama 2 has it."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    if words:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    special = ["<unk>", "<s>"]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False, max_token_length=12)
    tokenizer.train_from_iterator(TOPICS[:30], trainer)
    if not words:
        tokenizer.pre_tokenizer = None  # type: ignore[assignment]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>", model_max_length=16)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_tokenizer(tmp_path_factory.mktemp("words"), words=True)


@pytest.fixture(scope="session")
def unsplit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_tokenizer(tmp_path_factory.mktemp("unsplit"), words=False)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on neither texts nor tokenizers can be read."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a cache hit reads nothing")

    monkeypatch.setattr("atp_tune.inputs.windows.documents", refuse)
    monkeypatch.setattr("atp_tune.inputs.windows._encoder", refuse)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", refuse)


def write(path: Path, *texts: str) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return f"file:{path.name}"


def wanda(texts: list[str], folder: Path, windows: int, tokens: int, seed: int) -> list[list[int]]:
    """The C4 loader of Wanda and SparseGPT, as they wrote it down."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    random.seed(seed)
    drawn = []
    for _ in range(windows):
        while True:
            i = random.randint(0, len(texts) - 1)
            ids = tokenizer(texts[i], verbose=False).input_ids
            if len(ids) > tokens:
                break
        i = random.randint(0, len(ids) - tokens - 1)
        drawn.append(ids[i : i + tokens])
    return drawn


@parametrize(("seed", "tokens"), [(0, 64), (1, 64), (0, 700)])
def test_random_is_the_loader_of_wanda(seed: int, tokens: int, folder: Path, tmp_path: Path) -> None:
    text = Text(source=TOPICS_SOURCE, sampling="random", nsamples=17, seqlen=tokens, seed=seed)
    found = token_windows(text, folder, tmp_path)
    assert found.ids.dtype == np.int64
    assert found.ids.tolist() == wanda(TOPICS, folder, 17, tokens, seed)


@slow
@parametrize("tokens", few([7, 64, 1000], [64]))
@parametrize("part", [(0.0, 1.0), (0.9, 1.0)])
def test_consecutive_is_the_convention_of_wikitext(
    tokens: int, part: tuple[float, float], folder: Path, tmp_path: Path
) -> None:
    total, offset, texts = sum(map(len, TOPICS)), 0, []
    for topic in TOPICS:
        if part[0] <= offset / total < part[1]:
            texts.append(topic)
        offset += len(topic)
    ids = AutoTokenizer.from_pretrained(folder)("\n\n".join(texts), verbose=False).input_ids
    expected = [ids[i * tokens : (i + 1) * tokens] for i in range(len(ids) // tokens)]
    found = token_windows(Text(source=TOPICS_SOURCE, seqlen=tokens, part=part), folder, tmp_path)
    assert found.ids.dtype == np.int64
    assert found.ids.tolist() == expected


@slow
@parametrize("windows", few([1, 9, 150], [9]))
@parametrize("name", ["folder", "unsplit"])
def test_the_first_windows_are_those_of_the_whole(
    windows: int, name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = request.getfixturevalue(name)
    ids = AutoTokenizer.from_pretrained(folder)("\n\n".join(TOPICS), verbose=False).input_ids
    found = token_windows(Text(source=TOPICS_SOURCE, nsamples=windows, seqlen=128), folder, tmp_path)
    assert found.ids.ravel().tolist() == ids[: windows * 128]


@parametrize(
    ("settings", "expected"),
    [
        ({"seqlen": 8, "nsamples": 5},
         "nsamples: file:a.jsonl has 21 tokens, that is 2 windows of 8; 5 windows cannot be cut, "
         "lower nsamples or seqlen"),
        ({"seqlen": 22},
         "nsamples: file:a.jsonl has 21 tokens, that is 0 windows of 22; one window cannot be cut, "
         "lower nsamples or seqlen"),
    ],
)  # fmt: skip
def test_too_few_windows(settings: dict[str, int], expected: str, folder: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", "a" * 9, "b" * 9)
    assert refusal(token_windows, Text(source=source, **settings), folder, tmp_path) == expected


@parametrize("draw", ["random", "consecutive"])
def test_a_second_call_reads_nothing(draw: str, folder: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    text = Text(source=TOPICS_SOURCE, sampling=draw, nsamples=3, seqlen=32)
    first = token_windows(text, folder, tmp_path)
    request.getfixturevalue("poisoned")
    second = token_windows(text, folder, tmp_path)
    assert np.array_equal(first.ids, second.ids)
    assert first.content == second.content


def test_roles_share_no_window() -> None:
    def windows(*rows: list[int]) -> Items:
        return Items.windows(np.array(rows))

    check, one = TOKEN_WINDOWS.check_disjoint, windows([1, 2], [3, 4])
    check({"calibration": one, "validation": windows([2, 1], [4, 3]), "test": windows([1, 3, 2])})
    check({"calibration": windows([1, 2], [1, 2])})
    assert refusal(check, {"calibration": one, "validation": windows([5, 6]), "test": windows([7, 8], [3, 4])}) == (
        "texts.test: window 1 is also in texts.calibration; give them other texts or parts"
    )
    with refused(r"texts.test: window 0 has text that is also in texts.calibration"):
        check({"calibration": one, "test": windows([1, 2, 3])})


@given(st.integers(2, 300), st.integers(2, 300), st.integers(0, 400), st.booleans(), st.integers(0, 1000))
def test_text_in_another_cut_is_found(one: int, other: int, start: int, bos: bool, seed: int) -> None:
    """A copy of a text whose windows are longer or begin elsewhere was taken for another text."""
    text = np.random.default_rng(seed).integers(0, 30, 1400)

    def cut(tokens: int, from_: int) -> Items:
        rows = text[from_ : from_ + 1000 // tokens * tokens].reshape(-1, tokens)
        first = np.zeros((len(rows), int(bos)), dtype=rows.dtype)
        return Items.windows(np.concatenate([first, rows], 1), bos)

    def runs(row: np.ndarray, run: int) -> set[tuple[int, ...]]:
        ids = row[int(bos) :].tolist()
        return {tuple(ids[i : i + run]) for i in range(len(ids) - run + 1)}

    a, b, shorter = cut(one, 0), cut(other, start), min(one, other)
    run = max(shorter // 2, min(shorter, 64))
    known = set().union(*(runs(row, run) for row in b.ids))
    naive = [index for index, row in enumerate(a.ids) if runs(row, run) & known]
    assert shared_windows(a, b) == naive
    assert naive or shorter < 128


# --- windows that begin with BOS

BOS = 1


@parametrize("tokens", [2, 7, 64, 1000])
@parametrize("windows", [None, 3])
def test_each_token_of_a_text_is_predicted_once(tokens: int, windows: int | None, folder: Path, tmp_path: Path) -> None:
    text = Text(source=write(tmp_path / "a.jsonl", *TOPICS[:9]), seqlen=tokens, nsamples=windows)
    ids = AutoTokenizer.from_pretrained(folder)("\n\n".join(TOPICS[:9]), verbose=False).input_ids
    assert ids[0] == BOS
    found = token_windows(text, folder, tmp_path, bos=True)
    count = (len(ids) - 1) // (tokens - 1) if windows is None else windows
    assert found.bos
    assert found.ids.dtype == np.int64
    assert found.ids.shape == (count, tokens)
    assert set(found.ids[:, 0]) == {BOS}
    assert found.ids[:, 1:].ravel().tolist() == ids[1 : 1 + count * (tokens - 1)]


def test_two_bos_never_follow_each_other(folder: Path, tmp_path: Path) -> None:
    """Not even where a text spells it, as one that was made by joining documents."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    joined = "<s>" + "<s>".join(TOPICS[:9])
    assert tokenizer(joined, verbose=False).input_ids.count(BOS) == 10
    texts = [write(tmp_path / "a.jsonl", joined), write(tmp_path / "b.jsonl", "".join(TOPICS[:9]))]
    for draw in ("consecutive", "random"):
        ids = token_windows(
            Text(source=texts[0], seqlen=2, nsamples=900, sampling=draw), folder, tmp_path, bos=True
        ).ids
        assert (ids == BOS).sum() == 900
    first = token_windows(Text(source=texts[0], seqlen=50, nsamples=2), folder, tmp_path, bos=True)
    other = token_windows(Text(source=texts[1], seqlen=50, nsamples=2), folder, tmp_path, bos=True)
    assert first.ids.tolist() == other.ids.tolist()


def kinds_of(windows: Items, folder: Path) -> list[str]:
    """The kind of each window: the word that only its kind has; the manual has none of them."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    said = [tokenizer.decode(ids, skip_special_tokens=True) for ids in windows.ids]
    return [next((kind for kind in KINDS[1:] if f"{kind}ish " in text), "manual") for text in said]


@pytest.mark.usefixtures("mixed")
@parametrize("sampling", ["consecutive", "random"])
@parametrize(("nsamples", "stride", "draws"), [(5, 1, 1), (12, 1, 1), (3, 1, 1), (12, 2, 1), (12, 1, 3)])
def test_windows_of_mixed_are_of_each_kind_in_turn(
    sampling: Any, nsamples: int, stride: int, draws: int, folder: Path
) -> None:
    text = Text(source="mixed", sampling=sampling, nsamples=nsamples, seqlen=40, stride=stride, part=(0.3, 0.65))
    count = draws if sampling == "random" else 1
    found = token_windows(text, folder, Path(), draws=count)
    expected = [KINDS[at % len(KINDS)] for at in range(nsamples)] * count
    assert kinds_of(found, folder) == expected[::stride]
    assert count > 1 or [text.turns[at % len(KINDS)] for at in range(len(found))] == expected[::stride]
