import random
from collections.abc import Callable

import pytest
import torch
from naive import groups_mask, lowest_mask
from torch import Tensor

from atp_tune.pruners.selection import lowest, lowest_in_matrix, lowest_in_rows


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


@pytest.mark.parametrize("values", [None, 2, 10])
@pytest.mark.parametrize("choose", [lowest_in_rows, lowest_in_matrix])
def test_groups(choose: Callable[..., Tensor], values: int | None) -> None:
    for seed in range(20):
        s = scores(seed, values)
        for sparsity, group in ((0.5, 4), (0.25, 8), (0.7, 10), (1.0, 4), (0.0, 4), (0.5, 100)):
            assert torch.equal(choose(s, sparsity, group), groups_mask(s.tolist(), sparsity, group)), (seed, group)


def test_the_number_in_a_group_is_safe_from_rounding() -> None:
    """0.29 · 100 is 28.999999999999996."""
    assert lowest_in_rows(torch.randn(2, 205), 0.29, 100).sum(1).tolist() == [29 + 29 + 1] * 2


def test_without_groups_over_rows_or_the_matrix() -> None:
    s = torch.tensor([[4.0, 3.0, 9.0], [1.0, 0.0, 2.0]])
    assert lowest_in_rows(s, 0.5).tolist() == [[False, True, False], [False, True, False]]
    assert lowest_in_matrix(s, 0.5).tolist() == [[False] * 3, [True] * 3]
