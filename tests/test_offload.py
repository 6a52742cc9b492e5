import pytest

from atp_tune.checkpoints.offload import Free, choose


@pytest.mark.parametrize(
    ("total", "blocks", "free", "where"),
    [
        (70, 60, Free(100, 0), "none"),
        (71, 60, Free(100, 100), "cpu"),
        (71, 70, Free(100, 100), "cpu"),
        (80, 71, Free(100, 100), "disk"),
        (10**6, 10**6, Free(0, 0, bounded=False), "none"),
    ],
)
def test_the_first_place_where_they_fit(total: int, blocks: int, free: Free, where: str) -> None:
    assert choose(total, blocks, free) == where
