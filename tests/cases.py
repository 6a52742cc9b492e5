"""Which of many cases of a slow test a run tries: a push takes a sixth of them, a release all."""

import os
from collections import defaultdict
from collections.abc import Iterable
from zlib import crc32

import pytest

EVERY = 1 if os.environ.get("ATP_TUNE_CASES") == "all" else 6
FEW = 6  # cases of a test that are all tried
WHOLE = tuple(f"tests/test_{name}" for name in ("conformance", "docs_run", "compat", "schema"))  # each case is its own


def left_out(items: Iterable[pytest.Item]) -> list[pytest.Item]:
    """Of each slow test with many cases those that are not tried: by the hash of their names, in every run the same."""
    tests = defaultdict[str, list[pytest.Item]](list)
    for item in items:
        if item.get_closest_marker("slow") and not item.nodeid.startswith(WHOLE):
            tests[item.nodeid.partition("[")[0]].append(item)
    return [item for cases in tests.values() if len(cases) > FEW for item in drawn(cases)]


def drawn(cases: list[pytest.Item]) -> list[pytest.Item]:
    """All but one in `EVERY` cases, drawn by their names: families, say, alternate with number formats."""
    return sorted(cases, key=lambda item: crc32(item.nodeid.encode()))[-(-len(cases) // EVERY) :]
