"""Which slow tests a run tries: of many cases a push takes a tenth, and not the longest of several; a release all."""

import os
from collections import defaultdict
from collections.abc import Iterable
from zlib import crc32

import pytest

EVERY = 1 if os.environ.get("ATP_TUNE_CASES") == "all" else 10
FEW = 6  # cases of a test that are all tried
AT_A_RELEASE = (  # a minute or more each on two cores, of what a shorter test of the same file sees too
    "tests/test_applying.py::test_a_large_folder_is_written_in_the_memory_of_a_few_blocks[auto]",
    "tests/test_ray.py::test_more_workers_than_gpus",
    "tests/test_ray.py::test_two_hosts",
    "tests/test_slurm.py::test_an_array_runs_a_study[time is up]",
    "tests/test_smollm2.py::test_fine_tuning_makes_it_better",
    "tests/test_smollm2.py::test_the_grid_of_the_paper_equals_prune",
)
WHOLE = tuple(f"tests/test_{name}" for name in ("conformance", "docs_run", "compat", "schema"))  # each case is its own


def left_out(items: Iterable[pytest.Item]) -> list[pytest.Item]:
    """The slow tests that are not tried; of many cases by the hash of their names, in every run the same."""
    longest = [item for item in items if item.nodeid in AT_A_RELEASE and EVERY > 1]
    tests = defaultdict[str, list[pytest.Item]](list)
    for item in items:
        if item.get_closest_marker("slow") and not item.nodeid.startswith(WHOLE):
            tests[item.nodeid.partition("[")[0]].append(item)
    return longest + [item for cases in tests.values() if len(cases) > FEW for item in drawn(cases)]


def drawn(cases: list[pytest.Item]) -> list[pytest.Item]:
    """All but one in `EVERY` cases, drawn by their names: families, say, alternate with number formats."""
    return sorted(cases, key=lambda item: crc32(item.nodeid.encode()))[-(-len(cases) // EVERY) :]
