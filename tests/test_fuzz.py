"""Damaged documents of every kind; hypothesis draws the damage, always the same."""

import fuzzing
import pytest
from expect import parametrize, slow
from hypothesis import given, settings
from hypothesis import strategies as st

EXAMPLES = {"config": 100, "toml": 100, "stored": 20}


@slow
@parametrize("name", fuzzing.TARGETS)
def test_whatever_is_handed_over(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    @settings(max_examples=EXAMPLES[name])
    @given(st.binary(min_size=8, max_size=48))
    def check(data: bytes) -> None:
        fuzzing.TARGETS[name](data)

    check()
