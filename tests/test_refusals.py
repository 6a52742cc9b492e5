"""Whatever is wrong: one line that begins with the key, option, file or study at fault, exit code 2, nothing written.

tests/refusals.txt has the table: a line for each mistake, and words that its error holds.
"""

import re
import shlex
import shutil
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image
from test_pairs import STUDY as PAIRS
from test_towers import STUDY_OF_BOTH
from tinystudy import STUDY, CommandLine, settings

from atp_tune.config.studyfile import dotted_keys

PICTURES = """\
sparsity = 0.5
model.source = "m"
images = {calibration = {source = "idx:a"}, validation = {source = "idx:b"}, test = {source = "idx:c"}}
search = {trials = 6, objective = "accuracy"}
"""
STUDIES = {
    "interval": STUDY.replace("sparsity = 0.6", "sparsity = [0.3, 0.8]").replace('sampler = "random"\n', ""),
    "bits": STUDY.replace("sparsity = 0.6", "bits = 3.5"),
    "size": STUDY.replace("sparsity = 0.6", 'size = "3.9bpw"\nallocation = ["gradient"]'),
    "pairs": PAIRS,
    "towers": STUDY_OF_BOTH,
    "pictures": PICTURES,
    "cut": "sparsity = ",
    "few": "sparsity = 0.5",
}
LINES = {
    "a.jsonl": '{"text": "one", "n": 1}\n', "list.jsonl": '["text"]\n', "half.jsonl": '{"text": "one"}\n{"text"\n',
    "deep.jsonl": "[" * 100_000, "surrogate.jsonl": r'{"text": "\ud800"}', "empty.txt": "", "a.csv": "a",
    "no.parquet": "PAR1 not", "short.txt": "too short\n\nto prune with", "notes.txt": "no picture", "empty.json": "{}",
    "damaged.db": "x" * 5000, "digits.jsonl": '{"text": ' + "9" * 5000 + "}",
}  # fmt: skip


def read() -> list[tuple[str, bool, str, str]]:
    """Study, whether it is run, words and what is said, of each line of the table."""
    rows, study, is_run = list[tuple[str, bool, str, str]](), "", False
    for line in (Path(__file__).parent / "refusals.txt").read_text().splitlines():
        if heading := re.fullmatch(r"\[(\S+)( run)?\]", line):
            study, is_run = heading[1], bool(heading[2])
        elif line and not line.startswith("#"):
            words, said = line.rsplit(" => ", 1)
            rows.append((study, is_run, words, said))
    return rows


@pytest.fixture(scope="module")
def wrong(tiny_place: Path, tiny_done: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with studies, models and texts, most of which are wrong in some way; to be read only."""
    place = Path(shutil.copytree(tiny_place, tmp_path_factory.mktemp("wrong") / "place"))
    shutil.copyfile(tiny_done / "tiny.db", place / "done.db")
    for name, text in STUDIES.items():
        (place / f"{name}.toml").write_text(text)
    for name, text in LINES.items():
        (place / name).write_text(text)
    for name in ("latin.toml", "latin.toml.txt"):
        (place / name).write_bytes("Grüße, all".encode("latin-1"))
    (place / "cut.png").write_bytes(b"\x89PNG")
    (place / "done.artifacts").mkdir()
    Image.new("RGB", (8, 8)).save(place / "ok.png")
    (place / "device.txt").symlink_to("/dev/null")
    (place / "loop.txt").symlink_to("loop.txt")
    (place / "memory.txt").symlink_to("/proc/self/mem")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one"], "n": [1]}), place / "a.parquet")
    for name in ("empty", "bare", "half"):
        (place / name).mkdir()
    for name in ("bare", "half"):
        (place / name / "config.json").write_text("{}")
    (place / "half" / "a.safetensors").touch()
    weights = '{"weight_map": {"x": "a.safetensors", "y": "b.safetensors", "z": "b.safetensors"}}'
    (place / "half" / "model.safetensors.index.json").write_text(weights)
    for name in ("cut", "untyped", "unread"):
        shutil.copytree(place / "model", place / name)
    weights_ = place / "cut" / "model.safetensors"
    weights_.write_bytes(weights_.read_bytes()[:-500])
    (place / "untyped" / "config.json").write_text("{}")
    (place / "unread" / "tokenizer.json").write_text("{")
    return place


@pytest.mark.parametrize(("study", "is_run", "words", "said"), read(), ids=lambda value: str(value)[:60])
def test_it_is_one_line_that_names_what_is_wrong(
    study: str, is_run: bool, words: str, said: str, wrong: Path, command: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(wrong)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    before = {path: path.lstat().st_mtime_ns for path in wrong.rglob("*")}
    file = ["--study", f"{study}.toml" if Path(f"{study}.toml").exists() else study]
    given = shlex.split(words)
    if all(not word.startswith("-") and "=" in word for word in given) or words == "sparsity":
        given = [*([] if is_run else ["status"]), "$", *settings(*given)]
    answer = command(*[part for word in given for part in (file if word == "$" else [word])])
    assert said in answer.error and not (given[0] in ("status", "export") and answer.out)
    assert "secret" not in answer.error and "Value error" not in answer.error
    assert names_something(answer.error, [*file, *given]), answer.error
    assert {path: path.lstat().st_mtime_ns for path in wrong.rglob("*")} == before


def names_something(error: str, words: list[str]) -> bool:
    """Whether an error begins with a key, an option, or what a person typed, or says what was not understood."""
    if re.match(r"(No such|Missing|Invalid value for|the part of|[A-Z.|]+:)", error):
        return True
    subject = re.split(r": | ", error, maxsplit=1)[0].rstrip(":")
    key = re.sub(r"\[\d+\]", "", subject)
    return key in KEYS or subject.startswith("--") or any(subject in word or word in subject for word in words)


KEYS = {part for key in dotted_keys() for part in (key, key.rpartition(".")[0])}
