from collections.abc import Callable
from pathlib import Path

import pytest
from expect import parametrize, refused

from atp_tune.errors import UserError
from atp_tune.utils.system import check_free, check_writable, written


def test_a_path_starts_at_its_base_or_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert written("a/b.txt", tmp_path, "source") == tmp_path / "a" / "b.txt"
    assert written("~/b.txt", tmp_path, "source") == tmp_path / "home" / "b.txt"
    assert written("/b.txt", tmp_path, "source") == Path("/b.txt")
    (tmp_path / "file").touch()
    assert written("file/b.txt", tmp_path, "source") == tmp_path / "file" / "b.txt"


@parametrize(
    ("text", "reason"),
    [
        ("~nobody-at-all/x", "home directory"),
        ("a\0b", "has a character that no path can have"),
        ("a\ud800b", "has a character that no"),
        ("x" * 5000, "File name too long"),
    ],
)
def test_what_no_file_can_be_called(text: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=reason) as caught:
        written(text, tmp_path, "texts.validation.source")
    assert str(caught.value).startswith('texts.validation.source: "')
    assert len(str(caught.value)) < 300


@parametrize("ask", [check_free, check_writable])
@parametrize(
    ("name", "said"),
    [
        ("n" * 300, "name is too long"), ("n" * 249, "name is too long"), ("n" * 300 + "/x", "name is too long"),
        ("file/x", "file is no folder"), ("new/deep/x", ""),
    ],
)  # fmt: skip
def test_a_place_to_write_to(ask: Callable[[Path], None], name: str, said: str, tmp_path: Path) -> None:
    """A name of 300 characters was an OSError; one that leaves no room for a temporary name was one after the work."""
    (tmp_path / "file").touch()
    if not said:
        ask(tmp_path / name)
        return
    with refused(said):
        ask(tmp_path / name)
