import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import naive
import pytest
import torch
from expect import parametrize, slow
from families import CPU, same_bits
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from atp_tune.errors import TrialError
from atp_tune.pruners import PRUNERS, make_pruner, statistics
from atp_tune.pruners.alps import ALPS
from atp_tune.pruners.dsnot import DSnoT
from atp_tune.pruners.sparsegpt import SparseGPT
from atp_tune.pruners.statistics import Hessian, InputMoments, InputNorms, Scaled, _factor, precise, widens
from atp_tune.pruners.wanda import Magnitude, Wanda

Problem = tuple[Tensor, Tensor]  # weight and inputs

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
dtypes = st.sampled_from(DTYPES)
sparsities = st.sampled_from([0.0, 0.1, 0.29, 0.5, 0.7, 0.999, 1.0]) | st.floats(0, 1)
# [out, in]: one row, one column, wide, tall, and hardly ever a multiple of anything
shapes = st.sampled_from([(1, 1), (1, 23), (19, 1), (31, 17), (5, 100)]) | st.tuples(
    st.integers(1, 20), st.integers(1, 40)
)
small = st.tuples(st.integers(1, 19), st.integers(1, 29))


def problem(shape: tuple[int, int], seed: int = 0) -> Problem:
    """Weight [out, in] and inputs [4·in + 5, in] that are somewhat correlated."""
    generator = torch.Generator().manual_seed(1000 * shape[0] + shape[1] + seed)
    out, width = shape
    x = torch.randn(4 * width + 5, width, generator=generator)
    mix = torch.eye(width) + 0.3 * torch.randn(width, width, generator=generator) / width**0.5
    return torch.randn(out, width, generator=generator), x @ mix


def tied_problem(shape: tuple[int, int], seed: int = 0) -> Problem:
    """Weights from five values, and columns of inputs that are equal or never active; all sums are exact."""
    generator = torch.Generator().manual_seed(shape[1] + seed)
    weight = torch.randint(-2, 3, shape, generator=generator) / 4
    few = torch.randint(-2, 3, (16, 3), generator=generator).float()  # 16 tokens, so that means are exact too
    few[:, 2] = 0
    return weight, few[:, torch.arange(shape[1]) % 3]


@st.composite
def problems(draw: st.DrawFn, of: st.SearchStrategy[tuple[int, int]] = shapes) -> Problem:
    """Correlated inputs, up to three of which are dead."""
    shape = draw(of)
    weight, x = problem(shape, draw(st.integers(0, 999)))
    x[:, sorted(draw(st.sets(st.integers(0, shape[1] - 1), max_size=3)))] = 0
    return weight, x


tied_problems = st.builds(tied_problem, shapes, st.integers(0, 999))


def decided(form: Callable[[Tensor], tuple[Any, Tensor]], x: Tensor) -> tuple[Any, Tensor]:
    """What a literal form gives for inputs, its mask last; the test passes over problems that hang on rounding."""
    result = form(x.double())
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assume(torch.equal(result[1], form(x * (1 + 1e-5 * noise))[1]))
    return result


def heard(kind: Any, x: Tensor, batches: int = 1) -> Any:
    """Statistics of inputs, which come in so many batches."""
    found = kind(x.shape[1], CPU)
    for part in x.tensor_split(batches):
        found.add(part)
    return found


norms_of, hessian_of, moments_of = (partial(heard, kind) for kind in (InputNorms, Hessian, InputMoments))


class Made(TorchDispatchMode):
    """Keeps count of the bytes of tensors that are made: of the largest, and of most at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.most = 0
        self._alive: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in (each for each in torch.utils._pytree.tree_leaves(found) if isinstance(each, Tensor)):
            storage = tensor.untyped_storage()
            self._alive[storage._cdata] = weakref.ref(storage)
            self.largest = max(self.largest, storage.nbytes())
        self.most = max(self.most, sum(one.nbytes() for alive in self._alive.values() if (one := alive()) is not None))
        return found


def pruned_by(pruner: Any, weight: Tensor, x: Tensor, sparsity: float) -> Tensor:
    statistics = None if pruner.measures is None else pruner.measures(x.shape[1], CPU)
    if statistics is not None:
        statistics.add(x)
    pruned: Tensor = pruner.prune(weight, sparsity, statistics)
    return pruned


WANDA = {"row": naive.wanda_mask, "row-variant": naive.wanda_variant_mask, "matrix": naive.wanda_matrix_mask}


@parametrize("compare", WANDA)
@given(problems() | tied_problems, dtypes, sparsities)
def test_wanda_is_its_loop(compare: Any, case: Problem, dtype: torch.dtype, sparsity: float) -> None:
    weight, x = case[0].to(dtype), case[1]
    pruned = Wanda(compare=compare).prune(weight, sparsity, norms_of(x, 3))
    assert same_bits(pruned, weight.masked_fill(WANDA[compare](weight, x, sparsity), 0))


@parametrize(("width", "sparsity", "zeros"), [(10, 0.7, 7), (100, 0.29, 28), (100, 0.57, 56), (50, 0.5, 25)])
def test_counts_are_floors_of_the_float_product(width: int, sparsity: float, zeros: int) -> None:
    """As in the papers' code: 0.29 · 100 is 28.999999999999996, so 28."""
    weight, x = problem((3, width))
    assert (Wanda().prune(weight, sparsity, norms_of(x)) == 0).sum(1).tolist() == [zeros] * 3
    assert int((Magnitude().prune(weight[:1], sparsity, None) == 0).sum()) == zeros


@given(problems() | tied_problems, dtypes, sparsities)
def test_magnitude_is_its_sort(case: Problem, dtype: torch.dtype, sparsity: float) -> None:
    weight = case[0].to(dtype)
    pruned = Magnitude().prune(weight, sparsity, None)
    assert same_bits(pruned, weight.masked_fill(naive.magnitude_mask(weight, sparsity), 0))


@slow
@given(problems(), sparsities, st.sampled_from([1, 4, 16, 128]) | st.integers(1, 40))
def test_sparsegpt_is_the_dense_inverse(case: Problem, sparsity: float, columns: int) -> None:
    weight, x = case
    expected, mask = decided(lambda x: naive.sparsegpt(weight, x, sparsity, 0.01, columns), x)
    pruned = SparseGPT(columns=columns).prune(weight, sparsity, hessian_of(x, 3))
    assert torch.equal(pruned == 0, mask | (x == 0).all(0))
    assert_close(pruned.double(), expected, rtol=1e-4, atol=1e-5)


@given(shapes, sparsities, st.integers(1, 20))
def test_sparsegpt_breaks_ties_by_position(shape: tuple[int, int], sparsity: float, columns: int) -> None:
    """Inputs that are all alike and not correlated: nothing is carried on, and the mask is one stable sort."""
    weight = torch.randint(1, 3, shape, generator=torch.Generator().manual_seed(0)).float()
    x = 2 * torch.eye(shape[1])
    pruned = SparseGPT(columns=columns).prune(weight, sparsity, hessian_of(x))
    expected, mask = naive.sparsegpt(weight, x, sparsity, 0.01, columns)
    assert torch.equal(pruned == 0, mask)
    assert torch.equal(pruned.double(), expected)


@slow
@parametrize("columns", [40, 128])
@parametrize("group", [None, 4])
@parametrize("shape", [(50, 300), (7, 129), (600, 130)])
def test_sparsegpt_column_by_column(shape: tuple[int, int], group: int | None, columns: int) -> None:
    """Over several blocks and strips of columns."""
    weight, x = problem(shape)
    x[:, 5] = 0
    pruned = SparseGPT(columns=columns, group=group).prune(weight, 0.5, hessian_of(x))
    expected, gone = naive.sparsegpt(weight, x, 0.5, 0.01, columns, group)
    assert torch.equal(pruned == 0, gone | (x == 0).all(0))
    assert_close(pruned.double(), expected, rtol=1e-4, atol=1e-5)


def test_the_variant_of_wanda_is_where_the_bisection_leads() -> None:
    """One threshold for the share of every row, and as many zeros as were asked for."""
    weight, x = problem((13, 40))
    weight[:4, 5:] /= 50  # rows with few large scores
    gone = Wanda(compare="row-variant").prune(weight, 0.5, norms_of(x)) == 0
    scores = (weight.abs() * norms_of(x).norms()).double()
    low, high = 0.0, 1.0
    for _ in range(60):
        alpha = (low + high) / 2
        ordered = scores.sort(1).values
        reached = (ordered.cumsum(1) <= alpha * scores.sum(1, keepdim=True)).sum(1, keepdim=True)
        mask = scores <= torch.where(reached > 0, ordered.gather(1, (reached - 1).clamp(min=0)), -1)
        if mask.sum() > 260:
            high = alpha
        else:
            low, found = alpha, mask
    assert int(gone.sum()) == 260
    assert torch.equal(gone, found)
    assert gone[:4].sum() > 1.3 * 4 * 20


@slow
@given(problems(), dtypes, sparsities, st.sampled_from(["wanda", "magnitude"]), st.sampled_from([0.0, 0.015625]))
def test_dsnot_is_its_loop(case: Problem, dtype: torch.dtype, sparsity: float, initial: Any, shift: float) -> None:
    weight, x = case[0].to(dtype), case[1] + shift
    _, mask = decided(lambda x: (None, naive.dsnot_mask(weight, x, sparsity, initial, None)), x)
    pruned = DSnoT(initial=initial).prune(weight, sparsity, moments_of(x))
    assert same_bits(pruned, weight.masked_fill(mask, 0))
    assert set((pruned == 0).sum(1).tolist()) == {int(x.shape[1] * sparsity)}


@parametrize("chosen", [{"cycles": 0}, {"cycles": 2}, {"threshold": 30.0}, {"power": 0.0}, {"power": 2.0}])
@parametrize("group", [None, 8])
def test_settings_of_dsnot(chosen: dict[str, Any], group: int | None) -> None:
    weight, x = problem((13, 29))
    pruned = DSnoT(group=group, **chosen).prune(weight, 0.5, moments_of(x))
    assert torch.equal(pruned == 0, naive.dsnot_mask(weight, x, 0.5, "wanda", group, **chosen))
    others = DSnoT(group=group).prune(weight, 0.5, moments_of(x))
    assert not torch.equal(pruned, others)


@slow
@given(problems(small), sparsities)
def test_alps_is_its_dense_inverse(case: Problem, sparsity: float) -> None:
    weight, x = case
    expected, mask = decided(lambda x: naive.alps(weight, x, sparsity), x)
    pruned = ALPS().prune(weight, sparsity, hessian_of(x, 3))
    assert torch.equal(pruned == 0, mask)
    assert int(mask.sum()) == int(weight.numel() * sparsity)
    assert_close(pruned.double(), expected, rtol=1e-3, atol=1e-4)


@slow
@settings(max_examples=10)
@given(
    st.tuples(st.integers(8, 30), st.integers(8, 64)),
    st.sampled_from([0.25, 0.375, 0.625, 0.75]),
    st.sampled_from([None, 8]),
    st.sampled_from([0.1, 4.0, 60.0, 1e7]),
)
def test_the_admm_of_alps_in_float64(shape: tuple[int, int], sparsity: float, group: int | None, rho: float) -> None:
    """To the last bit, over enough iterations that float32 might have turned one; also from a ρ that is too large."""
    weight, x = (part.double() for part in problem(shape))
    gram = x.T @ x + 0.01 * x.square().sum(0).mean() * torch.eye(shape[1])
    scales = gram.diagonal().sqrt()
    matrix = gram / torch.outer(scales, scales)
    scaled = Scaled(scales, matrix)
    pruner = ALPS(rho=rho, group=group)
    first = pruner._smallest(weight * scales, sparsity)
    mask = pruner._smallest(pruner._admm(weight * scales, scaled, sparsity, first), sparsity)
    assert torch.equal(mask, naive.alps(weight, x, sparsity, group, rho=rho)[1])


def test_alps_refuses_what_is_not_a_number() -> None:
    with pytest.raises(TrialError, match="Hessian not finite"):
        ALPS().prune(torch.ones(2, 3), 0.5, hessian_of(torch.tensor([[1.0, float("nan"), 2.0]])))


@slow
@settings(max_examples=60)
@given(
    st.sampled_from(sorted(PRUNERS)),
    problems(small),
    st.integers(2, 10).flatmap(lambda m: st.tuples(st.integers(0, m), st.just(m))),
)
def test_groups(name: str, case: Problem, pattern: tuple[int, int]) -> None:
    """As many zeros in every group as asked for, and where the most literal form has them."""
    (weight, x), (zeros, group) = case, pattern
    sparsity = zeros / group

    def literal(x: Tensor) -> Tensor:
        match name:
            case "magnitude":
                return naive.groups_mask(weight.abs().tolist(), sparsity, group)
            case "wanda":
                return naive.groups_mask(naive.wanda_scores(weight, x), sparsity, group)
            case "sparsegpt":
                return naive.sparsegpt(weight, x, sparsity, 0.01, 128 // group * group, group)[1] | (x == 0).all(0)
            case "dsnot":
                return naive.dsnot_mask(weight, x, sparsity, "wanda", group)
        return naive.alps(weight, x, sparsity, group)[1]

    _, expected = decided(lambda x: (None, literal(x)), x)
    gone = pruned_by(make_pruner(name, {"group": group}), weight, x, sparsity) == 0
    assert torch.equal(gone, expected)
    for start in range(0, x.shape[1], group):
        if name != "sparsegpt" or not (x == 0).all(0).any():  # which zeroes dead inputs besides
            part = gone[:, start : start + group]
            assert set(part.sum(1).tolist()) == {int(part.shape[1] * sparsity + 1e-6)}


@parametrize("columns", [1, 4, 10, 128])
def test_sparsegpt_chooses_a_group_when_its_turn_comes(columns: int) -> None:
    """Whatever the blocks of columns are: they carry errors, and do not cut groups."""
    weight, x = problem((9, 30))
    pruned = SparseGPT(columns=columns, group=4).prune(weight, 0.5, hessian_of(x))
    expected, mask = naive.sparsegpt(weight, x, 0.5, 0.01, 12, 4)
    assert torch.equal(pruned == 0, mask)
    assert_close(pruned.double(), expected, rtol=1e-4, atol=1e-5)


@parametrize("name", PRUNERS)
def test_what_is_given_stays_as_it_is(name: str) -> None:
    weight, x = problem((6, 20))
    x[:, 3] = 0
    before, pruner = weight.clone(), make_pruner(name)
    statistics = None if pruner.measures is None else pruner.measures(20, CPU)
    if statistics is not None:
        statistics.add(x)
    first = pruner.prune(weight, 0.5, statistics)
    assert same_bits(weight, before)
    assert same_bits(pruner.prune(weight, 0.5, statistics), first)


@parametrize("dtype", DTYPES)
def test_input_norms(dtype: torch.dtype) -> None:
    x = torch.randn(4, 6, 9, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[:, :, 4] = 0
    norms = InputNorms(9, CPU)
    norms.add(x[:3])
    norms.add(x[3:])
    assert norms.norms().dtype == torch.float32
    expected = [sum(v * v for v in column) ** 0.5 for column in x.reshape(-1, 9).double().T.tolist()]
    assert norms.norms().tolist() == pytest.approx(expected, rel=1e-6)


def test_input_norms_of_a_gpu_make_no_copy_of_the_inputs() -> None:
    """Tensors without memory stand for those of a GPU; that both ways come to the same is seen on one."""
    with FakeTensorMode(), Made() as made:
        x = torch.empty(50, 20, 16, dtype=torch.bfloat16, device="cuda")
        norms = InputNorms(16, x.device)
        norms.add(x)
    assert made.largest == x.nbytes
    squares = norms.tensors()["squares"]
    assert (squares.device.type, squares.dtype) == ("cuda", torch.float32)


@parametrize("dtype", DTYPES)
def test_input_moments(dtype: torch.dtype) -> None:
    """Also where the variance is a millionth of the squared mean."""
    x = torch.randn(6, 50, 9, generator=torch.Generator().manual_seed(0))
    x[:, :, 3] = 1000 + x[:, :, 3] * (1 if dtype == torch.float32 else 50)
    x[:, :, 4], x[:, :, 5] = 0, 0.5
    x = x.to(dtype)
    moments = InputMoments(9, CPU)
    for part in (x[:3], x[:0], x[3:5], x[5:]):
        moments.add(part)
    flat = x.reshape(-1, 9).double()
    assert_close(moments.norms().double(), flat.norm(dim=0), rtol=1e-6, atol=0)
    assert_close(moments.means().double(), flat.mean(0), rtol=1e-5, atol=1e-7)
    assert_close(moments.variances().double(), flat.var(0, correction=0), rtol=1e-4, atol=0)
    assert InputMoments(2, CPU).variances().tolist() == [0, 0]


def test_the_scaled_hessian_and_its_inverse() -> None:
    x = problem((1, 12))[1]
    x[:, 5] = 0
    hessian = hessian_of(x)
    scaled = hessian.scaled(0.01)
    H = 2 * x.double().T @ x.double() / len(x)
    H += 0.01 * H.diagonal().mean() * torch.eye(12)
    assert_close(scaled.scales.double() ** 2, H.diagonal(), rtol=1e-5, atol=0)
    assert_close(scaled.matrix.double() * scaled.scales * scaled.scales[:, None], H, rtol=1e-5, atol=1e-6)
    inverse = torch.linalg.inv(scaled.matrix.double() + 0.3 * torch.eye(12))
    assert_close(scaled.inverse(0.3).double(), inverse, rtol=1e-4, atol=1e-5)
    rounded = Scaled(scaled.scales, torch.tensor([[1.0, 1.1], [1.1, 1.0]]))  # by rounding not positive definite
    assert_close(rounded.inverse(0.05), torch.linalg.inv(rounded.matrix + 0.05 * torch.eye(2)))
    assert hessian.scaled(0.01) is scaled
    hessian.add(x)
    assert hessian.scaled(0.01) is not scaled


@parametrize("dtype", DTYPES)
def test_hessian(dtype: torch.dtype) -> None:
    x = torch.randn(4, 6, 9, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[:, :, 4] = 0
    hessian = Hessian(9, CPU)
    hessian.add(x[:3])
    hessian.add(x[3:])
    assert hessian.matrix().dtype == torch.float32
    assert_close(hessian.matrix().double(), naive.hessian(x.reshape(-1, 9)), rtol=1e-5, atol=1e-6)
    assert hessian.dead().tolist() == [j == 4 for j in range(9)]


@parametrize("shape", [(1, 3), (1, 255), (1, 256), (1, 257), (1, 520)])
def test_a_hessian_in_panels(shape: tuple[int, int]) -> None:
    x = problem(shape)[1]
    matrix = hessian_of(x, 3).matrix()
    assert_close(matrix.double(), 2 * x.double().T @ x.double() / len(x), rtol=1e-5, atol=1e-5)
    assert torch.equal(matrix, matrix.T)
    assert torch.equal(hessian_of(x, 3).matrix(), matrix)


def test_what_is_summed_up_without_a_copy_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device has to multiply bf16 into float32; the CPU's product of bf16 matrices is rounded to bf16.

    ROCm's devices are called cuda too, and raise there.
    """
    cuda = torch.device("cuda")
    assert not widens(CPU, torch.bfloat16) and not widens(cuda, torch.float32)
    assert widens(cuda, torch.bfloat16) == widens(cuda, torch.float16) == hasattr(torch.ops.aten.mm, "dtype")
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert not widens(cuda, torch.bfloat16) and not widens(cuda, torch.float16)


def test_a_hessian_of_wide_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of a GPU with a product that the CPU has not."""
    monkeypatch.setattr("atp_tune.pruners.statistics.widens", lambda device, dtype: dtype == torch.bfloat16)
    monkeypatch.setattr(torch.ops.aten.mm, "dtype", lambda a, b, dtype: a.to(dtype) @ b.to(dtype), raising=False)
    x = problem((1, 300))[1].bfloat16()
    assert_close(hessian_of(x, 2).matrix(), hessian_of(x.float(), 2).matrix())


def test_the_factor() -> None:
    x = problem((1, 12))[1]
    R = hessian_of(x).factor(0.01).double()
    H = naive.hessian(x)
    H += 0.01 * H.diagonal().mean() * torch.eye(12)
    assert torch.equal(R, R.triu())
    assert_close(R @ R.T, H, rtol=1e-5, atol=1e-6)
    U = torch.linalg.cholesky(torch.linalg.inv(H), upper=True)
    assert_close(torch.linalg.inv(R), U, rtol=1e-5, atol=1e-6)


@parametrize(("ordered", "matrices"), [(False, 2), (True, 3)])
def test_memory_that_the_factor_takes(ordered: bool, matrices: int) -> None:
    """Matrices as large as the Hessian beside it, which were five and six: of 28672 inputs each has 3.3 GB."""
    hessian = hessian_of(problem((1, 64))[1])
    with Made() as made:
        hessian.factor(0.01, ordered)
    assert matrices <= made.most / hessian.matrix().nbytes < matrices + 0.1


@parametrize("way", [lambda hessian: hessian.factor(0.01), lambda hessian: hessian.scaled(0.01).inverse(1)])
def test_where_factors_are_computed(way: Callable[[Hessian], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """What MPS may lack is computed where `precise` says: here a device without memory."""
    assert [precise(torch.device(name)).type for name in ("cpu", "mps", "cuda")] == ["cpu", "cpu", "cuda"]
    places: list[str] = []
    monkeypatch.setattr(statistics, "precise", lambda device: torch.device("meta"))
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda matrix: places.append(matrix.device.type) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        way(hessian_of(problem((1, 12))[1]))
    assert places == ["meta"]


@parametrize(("lowest", "damping"), [(0.05, 0.1), (0.5, 1.0), (5.0, 10.0), (50.0, 100.0)])
def test_damping_is_raised_until_the_hessian_is_positive_definite(lowest: float, damping: float) -> None:
    """A symmetric matrix with mean diagonal 1 and one eigenvalue of -lowest: 0.01 is not enough, `damping` is."""
    axes = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    H = axes @ torch.diag(torch.tensor([-lowest, *[(8 + lowest) / 7] * 7], dtype=torch.float64)) @ axes.T
    R = _factor(H.float(), 0.01).double()
    assert_close(R @ R.T, H + damping * torch.eye(8), rtol=1e-4, atol=1e-5)


@parametrize(
    "x",
    [
        torch.full((5, 4), float("nan")),
        torch.tensor([[1.0, float("nan"), 2.0]]),
        torch.tensor([[1.0, float("inf"), 2.0]]),
    ],
)
def test_a_hessian_that_is_not_a_number(x: Tensor) -> None:
    with pytest.raises(TrialError, match="Hessian not finite"):
        SparseGPT().prune(torch.ones(2, x.shape[1]), 0.5, hessian_of(x))


def test_damping_that_is_not_enough_when_raised() -> None:
    x = torch.randn(1, 40, generator=torch.Generator().manual_seed(0))
    with pytest.raises(TrialError, match="even with damping 1e-26"):
        hessian_of(x).factor(1e-30)
