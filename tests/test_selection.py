import random
import weakref
from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import torch
from expect import parametrize, slow
from families import few, same_bits
from hypothesis import given
from hypothesis import strategies as st
from naive import groups_mask, lowest_mask
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from atp_tune.pruners import selection
from atp_tune.pruners.selection import (
    lowest,
    lowest_in_matrix,
    lowest_in_rows,
    nonzeros,
    order_in_rows,
    ranks,
    zeroed,
    zeros_in_row,
)


def scores(seed: int, values: int | None) -> Tensor:
    """Random scores [rows, columns]; from few values, so that they tie, or from all floats."""
    generator = random.Random(seed)
    rows, columns = generator.randint(1, 9), generator.randint(1, 70)
    torch.manual_seed(seed)
    return torch.randint(values, (rows, columns)).float() if values else torch.randn(rows, columns)


@parametrize("values", [None, 1, 2, 3, 10])
def test_the_same_as_a_stable_sort(values: int | None) -> None:
    for seed in range(20):
        s = scores(seed, values)
        for count in {0, 1, s.shape[1] // 3, s.shape[1] // 2, s.shape[1] - 1, s.shape[1]}:
            mask = lowest(s, count)
            assert mask.dtype == torch.bool
            assert torch.equal(mask, lowest_mask(s.tolist(), count)), (seed, count)


@parametrize("values", [None, 2, 10])
@parametrize("choose", [lowest_in_rows, lowest_in_matrix])
def test_groups(choose: Callable[..., Tensor], values: int | None) -> None:
    for seed in range(20):
        s = scores(seed, values)
        for sparsity, group in ((0.5, 4), (0.25, 8), (0.7, 10), (1.0, 4), (0.0, 4), (0.5, 100)):
            assert torch.equal(choose(s, sparsity, group), groups_mask(s.tolist(), sparsity, group)), (seed, group)


def test_the_number_in_a_group_is_safe_from_rounding() -> None:
    """0.29 · 100 is 28.999999999999996."""
    assert lowest_in_rows(torch.randn(2, 205), 0.29, 100).sum(1).tolist() == [29 + 29 + 1] * 2


def by_sorting(s: Tensor, count: int) -> Tensor:
    order = s.argsort(dim=1, stable=True)[:, :count]
    return torch.zeros_like(s, dtype=torch.bool).scatter_(1, order, True)


def large(values: int | None, shape: tuple[int, int] = (700, 577)) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if values is None:
        return torch.randn(shape, generator=generator)
    return torch.randint(values, shape, generator=generator).float()


@parametrize("threads", [1, 2, 3])
@parametrize("values", [None, 50])
def test_many_rows_in_threads(values: int | None, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    s = large(values)
    for count in (1, 345, 576):
        assert torch.equal(lowest(s, count), by_sorting(s, count)), count
        assert torch.equal(ranks(s) < count, by_sorting(s, count)), count


@slow
@parametrize("order", ["random", "ascending", "descending", "a sample that misleads"])
@parametrize("values", few([None, 2, 50], [50]))
def test_a_large_matrix_is_selected_by_a_sample(values: int | None, order: str) -> None:
    """Also where the sample's strides meet other scores than there are, and nothing lies between its two."""
    s = large(values).flatten()
    if order == "a sample that misleads":
        s[:: s.numel() // 4096] = 1e9
    elif order != "random":
        s = s.sort(descending=order == "descending").values
    s = s.reshape(700, 577)
    for sparsity in (1e-6, 1e-5, 0.29, 0.5, 0.7, 0.999, 0.999999):
        count = int(s.numel() * sparsity)
        expected = by_sorting(s.reshape(1, -1), count).reshape(s.shape)
        assert torch.equal(lowest_in_matrix(s, sparsity), expected), sparsity


def test_what_is_not_finite() -> None:
    """NaN is the highest score; a threshold that is NaN takes nothing, as before numpy selected."""
    nan, inf = float("nan"), float("inf")
    s = torch.tensor([[nan, 1.0, -inf, inf, 0.0, 2.0]])
    for rows in (s, s.expand(2, -1)):
        assert lowest(rows, 2)[0].nonzero().flatten().tolist() == [2, 4]
        assert lowest(rows, 5)[0].nonzero().flatten().tolist() == [1, 2, 3, 4, 5]
        assert not lowest(torch.full_like(rows, nan), 3).any()
    many = torch.cat([torch.full((300,), nan), torch.full((300,), inf), torch.arange(9400.0)]).reshape(10, -1)
    assert torch.equal(lowest_in_matrix(many, 0.5), many < 5000)
    mask = lowest_in_matrix(many, 0.95)  # and 100 of the infinite ones
    assert int(mask.sum()) == 9500 and not many[mask].isnan().any()


@parametrize("values", [None, 1, 2, 3, 10])
def test_ranks_are_places_in_a_stable_sort(values: int | None) -> None:
    for seed in range(20):
        s = scores(seed, values)
        places = ranks(s)
        assert places.dtype == torch.int16
        for sparsity in (0.0, 0.1, 0.29, 0.5, 0.7, 0.999, 1.0):
            expected = lowest_mask(s.tolist(), int(s.shape[1] * sparsity))
            assert torch.equal(places < int(s.shape[1] * sparsity), expected), (seed, sparsity)


@parametrize("values", [None, 2, 10])
def test_the_order_in_which_groups_lose_weights(values: int | None) -> None:
    for seed in range(20):
        s = scores(seed, values)
        for group in (None, 2, 3, 8, 100):
            places = order_in_rows(s, group)
            assert places.sort(1).values.tolist() == [[*range(s.shape[1])]] * len(s)
            for sparsity in (0.0, 0.2, 1 / 3, 0.375, 0.5, 0.9, 1.0):
                count = zeros_in_row(s.shape[1], sparsity, group)
                assert torch.equal(places < count, lowest_in_rows(s, sparsity, group)), (seed, group, sparsity)


@parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_zeroed_is_masked_fill(dtype: torch.dtype) -> None:
    nan, inf = float("nan"), float("inf")
    weight = torch.tensor([[1.0, -2.0, nan, inf], [-0.0, -inf, nan, -3.0]]).to(dtype)
    for gone in (torch.tensor([[True, True, True, True], [True, True, False, False]]), weight > 0, weight < 0):
        assert same_bits(zeroed(weight, gone), weight.masked_fill(gone, 0))
        assert same_bits(zeroed(weight.T, gone.T), weight.T.masked_fill(gone.T, 0))


@pytest.fixture
def as_on_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch selects, from samples that are small enough to be wrong in a small matrix."""
    monkeypatch.setattr(selection, "_for_numpy", lambda scores: False)
    monkeypatch.setattr(selection, "SAMPLE", 16)


VALUES = st.one_of(  # many ties, few, and what is not finite
    st.integers(0, 3).map(float), st.floats(-4, 4, width=16), st.sampled_from([float("inf"), -float("inf"), 0.0, -0.0])
)


@pytest.mark.usefixtures("as_on_an_accelerator")
@given(
    values=st.lists(VALUES, min_size=2, max_size=300),
    rows=st.integers(1, 4),
    share=st.floats(0, 1),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    transposed=st.booleans(),
)
@hypothesis.settings(
    derandomize=True, deadline=None, max_examples=500,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)  # fmt: skip
@slow
def test_torch_selects_as_a_stable_sort_does(
    values: list[float], rows: int, share: float, dtype: torch.dtype, transposed: bool
) -> None:
    s = torch.tensor(values[: max(1, len(values) // rows) * rows], dtype=dtype).reshape(min(rows, len(values)), -1)
    s = s.T if transposed else s
    count = int(s.numel() * share)
    expected = lowest_mask([s.flatten().tolist()], count).reshape(s.shape)
    assert torch.equal(lowest_in_matrix(s, share), expected)


@pytest.mark.usefixtures("as_on_an_accelerator")
@parametrize("order", ["random", "ascending", "a sample that misleads"])
@parametrize("values", [None, 2, 50])
def test_torch_selects_from_a_large_matrix(values: int | None, order: str) -> None:
    s = large(values, (60, 577)).flatten()
    if order == "a sample that misleads":
        s[:: s.numel() // 16] = 1e9
    s = (s.sort().values if order == "ascending" else s).reshape(60, 577)
    for sparsity in (1e-4, 0.29, 0.5, 0.7, 0.999):
        expected = by_sorting(s.reshape(1, -1), int(s.numel() * sparsity)).reshape(s.shape)
        assert torch.equal(lowest_in_matrix(s, sparsity), expected), sparsity


class Peak(TorchDispatchMode):
    """The most bytes that results of torch's operations took at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self._now, self._known = 0, 0, set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in tree_leaves(args) if isinstance(x, Tensor)}
        for result in tree_leaves(found):
            if isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in given | self._known:
                storage = result.untyped_storage()
                self._known.add(storage.data_ptr())
                self._now += storage.nbytes()
                weakref.finalize(storage, self._forget, storage.data_ptr(), storage.nbytes())
        self.bytes = max(self.bytes, self._now)
        return found

    def _forget(self, place: int, size: int) -> None:
        self._known.discard(place)
        self._now -= size


@parametrize(("dtype", "most"), [(torch.float32, 4.1), (torch.bfloat16, 8.1)])
def test_torch_selects_with_a_few_bytes_a_score(dtype: torch.dtype, most: float, monkeypatch: Any) -> None:
    """A sort takes 12 a float32 for its results alone, and on CUDA as much again for its work."""
    monkeypatch.setattr(selection, "_for_numpy", lambda scores: False)
    s = large(None, (1000, 1000)).to(dtype)
    with Peak() as sorting:
        s.flatten().sort()
    with Peak() as peak:
        mask = lowest_in_matrix(s, 0.6)
    assert int(mask.sum()) == 600_000
    assert sorting.bytes >= 10 * s.numel()
    assert peak.bytes <= most * s.numel()


def test_without_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for formats that it does not know."""
    s = large(20, (30, 40))
    monkeypatch.setattr(selection, "_for_numpy", lambda scores: False)
    assert torch.equal(lowest_in_matrix(s, 0.4), by_sorting(s.reshape(1, -1), 480).reshape(s.shape))
    assert torch.equal(lowest(s, 13), by_sorting(s, 13))


@parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_nonzeros_counts_what_is_not_zero_by_value(dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).smallest_normal
    weight = torch.tensor([[0.0, -0.0, float("nan"), float("inf")], [tiny, -tiny, 1.0, -3.0]], dtype=dtype)
    assert int(nonzeros(weight)) == int(nonzeros(weight.T)) == 6
