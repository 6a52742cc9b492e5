"""A password in a storage URL is nowhere to be read: not in errors, not in what is stored, not beside it."""

from pathlib import Path

import pytest
from expect import parametrize, slow
from hypothesis import given
from hypothesis import strategies as st
from tinystudy import CommandLine, run, study_file

from atp_tune.errors import without_secrets
from atp_tune.report.publishing import study_note
from atp_tune.results.summary import summarise
from atp_tune.storage import remote
from atp_tune.storage.database import without_password

MARKER = "s3cr3t-marker"
ADDRESSES = [
    f"postgresql://me:{MARKER}@127.0.0.1:1/x",
    f"postgresql://127.0.0.1:1/x?user=me&password={MARKER}",
    f"postgresql+nosuch://me:{MARKER}@127.0.0.1/x",
    f"nosuch://me:{MARKER}@127.0.0.1/x",
    f"mysql://me:{MARKER}@127.0.0.1/x",
    f"postgresql://me:{MARKER}@host:port/x",
    f"postgresql://me:{MARKER}/@:@127.0.0.1:1/x",
    f"grpc://me:{MARKER}@127.0.0.1:1",
    f"grpcs://127.0.0.1:1/?token={MARKER}",
    f"postgresql://me:{MARKER}\udcff@127.0.0.1:1/x",
]
COMMANDS = [["--study"], ["status", "--study"], ["export", "--study"], ["report", "--study"], ["serve", "--study"]]


@parametrize("words", COMMANDS, ids=lambda words: words[0])
def test_no_command_prints_it(
    words: list[str], place: Path, command: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "FIRST", 0.05)
    for address in ADDRESSES:
        answer = command(*words, place / "tiny.toml", "--storage", address)
        assert answer.code == 2, address
        assert MARKER not in answer.out + answer.err, address


@parametrize("override", ["storage=[{}]", "storag={}", "storage.x={}", "device={}", "model.sha256=[{}]"])
def test_no_mistake_shows_it(override: str, place: Path, command: CommandLine) -> None:
    answer = command("status", "--study", place / "tiny.toml", "--set", override.format(f'"{ADDRESSES[0]}"'))
    assert MARKER not in answer.error
    toml = place / "tiny.toml"
    key, _, value = override.format(f'"{ADDRESSES[0]}"').partition("=")
    toml.write_text(f"{key.replace('device', 'protocol')} = {value}\n" + toml.read_text())
    assert MARKER not in command("status", "--study", toml).error


@slow
def test_it_is_not_stored(place: Path) -> None:
    file = study_file(place, f"storage={ADDRESSES[0]}")
    study = run(place, "search.trials=1")
    from atp_tune.config.studyfile import settings as stored

    study.set_user_attr("made_from", stored(file))
    assert MARKER not in study_note(summarise(study), without_password(file.storage_url))
    assert MARKER.encode() not in (place / "tiny.db").read_bytes()


@slow
def test_a_sparse_checkpoint_says_nothing_of_the_storage(place: Path, command: CommandLine, tmp_path: Path) -> None:
    words = ("prune", "--study", place / "tiny.toml", "--beta", "0.01", "--set", f"storage={ADDRESSES[0]}")
    command.ok(*words, "--out", tmp_path / "sparse")
    assert "beta" in (tmp_path / "sparse" / "atp_tune.json").read_text()
    assert MARKER not in (tmp_path / "sparse" / "atp_tune.json").read_text()


WORD = st.text(st.characters(codec="utf-8", exclude_characters="@/: \n", exclude_categories=["Z", "C"]), max_size=8)


@given(WORD, WORD, st.sampled_from(["", "@", "/", ":", "?x=", "@h:"]))
def test_whatever_a_password_holds(user: str, other: str, between: str) -> None:
    secret = f"{MARKER}{between}{MARKER}"
    for address in (f"postgresql://{user}:{secret}@{other}host:1/x", f"postgresql://{other}h/x?sslpassword={MARKER}"):
        shown = without_secrets(f"storage {address}: no such {user}")
        assert MARKER not in shown
        assert "host" in shown or "sslpassword" in shown
