import random

import pytest
import torch
from naive import lowest_mask
from torch import Tensor

from atp_tune.pruners.selection import lowest


def scores(seed: int, values: int | None) -> Tensor:
    """Random scores [rows, columns]; from few values, so that they tie, or from all floats."""
    generator = random.Random(seed)
    rows, columns = generator.randint(1, 9), generator.randint(1, 70)
    torch.manual_seed(seed)
    return torch.randint(values, (rows, columns)).float() if values else torch.randn(rows, columns)


@pytest.mark.parametrize("values", [None, 1, 2, 3, 10])
def test_the_same_as_a_stable_sort(values: int | None) -> None:
    for seed in range(20):
        s = scores(seed, values)
        for count in {0, 1, s.shape[1] // 3, s.shape[1] // 2, s.shape[1] - 1, s.shape[1]}:
            mask = lowest(s, count)
            assert mask.dtype == torch.bool
            assert torch.equal(mask, lowest_mask(s.tolist(), count)), (seed, count)


def test_ties_in_some_rows_only() -> None:
    s = torch.tensor([[3.0, 1.0, 2.0, 4.0], [1.0, 1.0, 1.0, 0.0], [5.0, 5.0, 5.0, 5.0]])
    assert lowest(s, 2).tolist() == [
        [False, True, True, False],
        [True, False, False, True],
        [True, True, False, False],
    ]


@pytest.mark.parametrize("count", [-1, 0])
def test_nothing(count: int) -> None:
    assert not lowest(torch.randn(3, 4), count).any()


@pytest.mark.parametrize("count", [4, 5])
def test_everything(count: int) -> None:
    assert lowest(torch.randn(3, 4), count).all()


def test_infinite_scores_go_last() -> None:
    s = torch.tensor([[float("inf"), 1.0, float("inf"), 0.0]])
    assert lowest(s, 3).tolist() == [[True, True, False, True]]


def test_zeros_of_both_signs_tie() -> None:
    s = torch.tensor([[0.0, -0.0, 0.0, 1.0]])
    assert lowest(s, 2).tolist() == [[True, True, False, False]]


def test_a_transposed_view() -> None:
    s = torch.randint(3, (17, 5), generator=torch.Generator().manual_seed(0)).float().T
    assert torch.equal(lowest(s, 8), lowest_mask(s.tolist(), 8))
