"""The golden files under tests/golden are what the package shows and stores of a dozen tiny studies."""

import json
from pathlib import Path

import pytest
from goldens import HOME, STUDIES, difference, is_close, made, signature


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_is_as_it_was(name: str, tmp_path: Path) -> None:
    """To the last digit on the machine that wrote the files; close on others."""
    is_exact = signature() == json.loads((HOME / "signature.json").read_text())
    said = difference(name, made(name, tmp_path), is_exact)
    assert not said, f"{said}\n\nif that is meant: scripts/golden --write {name}"


def test_elsewhere_words_are_equal_and_numbers_close() -> None:
    assert is_close("trial 3: 16.91 ± 1.16", "trial 3: 16.93 ± 1.17")
    assert is_close('"value": 16.912856675452907', '"value": 16.90000000000001')
    assert is_close("458.8616674236156", "458.86162292402") and not is_close("458.8616674236156", "448.8616674236156")
    for other in ("trial 4: 16.91 ± 1.16", "trial 3: 17.91 ± 1.16", "trials 3: 16.91 ± 1.16"):
        assert not is_close("trial 3: 16.91 ± 1.16", other)
