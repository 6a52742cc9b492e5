"""The kernel for packed weights: each variant that this CPU has, against sums in float64.

The slow tests compile it once more: with sanitizers, with emulated AVX-512, and for aarch64.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from expect import parametrize, slow
from families import few
from packedweights import FLOATS, Guarded, close, close_rounded, coded_matrix, codes, pack, sparse
from torch import Tensor
from torch.testing import assert_close

from atp_tune.packed import kernel
from atp_tune.packed.kernel import BATCH, CodedMatrix, PackedMatrix, kernel_name, multiplies
from atp_tune.utils import system

TYPES = (*FLOATS, torch.int8)
SHAPES = [(1, 1), (3, 7), (5, 31), (1, 33), (5, 64), (3, 576), (5, 1000), (150, 1000)]
VARIANTS = [*kernel.variants(), "torch"]
MANY = (9, 16, 40, 100, 128, 200, 390, 800)  # tokens, in every part of a tile and in several groups of tiles
HERE = Path(__file__).parent
SOURCE = Path(kernel.__file__).with_name("kernel.c")


@pytest.fixture(autouse=True, scope="module")
def compiled() -> None:
    """The library is beside its source after an editable install."""
    if kernel.library() is None and "CI" not in os.environ:
        pytest.skip("not compiled; run: python hatch_build.py")


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name = str(request.param)
    monkeypatch.setenv("ATP_TUNE_ISA", name)
    return name


def matrices(shape: tuple[int, int], dtype: torch.dtype) -> tuple[PackedMatrix, PackedMatrix, Tensor, Tensor]:
    """A packed matrix, the same with a bias, the numbers that it stands for, and the bias."""
    weight, bias = sparse(shape, dtype), torch.randn(shape[0])
    scales = torch.rand(shape[0], 1) / 100 if dtype == torch.int8 else None
    full = weight if scales is None else weight.double() * scales.double()
    return pack(weight, scales), pack(weight, scales, bias), full, bias


@parametrize("dtype", TYPES)
@parametrize("shape", few(SHAPES, SHAPES[::2]))
def test_products(shape: tuple[int, int], dtype: torch.dtype, variant: str) -> None:
    matrix, biased, full, bias = matrices(shape, dtype)
    for inputs, tokens in product(FLOATS, range(BATCH + 1)):
        x = torch.randn(tokens, shape[1]).to(inputs)
        y = matrix.product(x)
        assert y.dtype == inputs
        close(y, x, full)
        close(biased.product(x), x, full, bias)


@parametrize("dtype", TYPES)
@parametrize("shape", few([(1, 1), (3, 7), (70, 100), (150, 1000)], [(3, 7)]))
def test_many_tokens(shape: tuple[int, int], dtype: torch.dtype, variant: str) -> None:
    matrix, biased, full, bias = matrices(shape, dtype)
    for inputs, tokens in product(FLOATS, MANY[shape[0] % 3 :: 3]):
        x = torch.randn(tokens, shape[1]).to(inputs)
        y, other = matrix.product(x), biased.product(x)
        if not multiplies(None if variant == "torch" else variant, inputs, tokens, dtype):
            assert y is None and other is None
            continue
        assert y is not None and other is not None
        assert y.dtype == inputs
        close(y, x, full)
        close(other, x, full, bias)


@parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_many_tokens_that_are_not_finite_are_left_to_torch(bad: float, variant: str) -> None:
    """Zeros of the weight, which would make no numbers of them, are left out by the kernel."""
    weight, x = sparse((20, 70), torch.float32), torch.randn(40, 70)
    x[11, 69] = bad
    matrix = pack(weight)
    assert matrix.product(x) is None
    assert_close(operator(matrix, x), x @ weight.T, equal_nan=True)


@parametrize("columns, groups", [(64, 2), (96, 3), (192, 2), (1024, 8), (1056, 11)])
def test_scales_of_groups(columns: int, groups: int, variant: str) -> None:
    weight, scales = sparse((6, columns), torch.int8), torch.rand(6, groups) / 100
    matrix, full = pack(weight, scales), weight * scales.repeat_interleave(columns // groups, dim=1)
    for tokens in (1, 2, 3, 8):
        x = torch.randn(tokens, columns)
        close(matrix.product(x), x, full)
    assert torch.equal(matrix.rows(1, 5), full[1:5])
    assert torch.equal(matrix.rows(0, 6, torch.bfloat16), full.bfloat16())


def test_every_float16_becomes_the_nearest(variant: str) -> None:
    """From and to all finite numbers of 16 bits, and the float32 half-way between."""
    for dtype in (torch.float16, torch.bfloat16):
        numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        numbers = numbers[numbers.isfinite() & (numbers != 0)]
        assert torch.equal(pack(numbers[None]).rows(0, 1), numbers[None])
        wide = numbers.float()
        between = torch.cat([wide, wide * (1 + 2.0**-9), wide * (1 + 2.0**-12), wide * (1 - 2.0**-12), wide * 1.5])
        between = between[(between != 0) & between.isfinite()][None]
        assert torch.equal(pack(between).rows(0, 1, dtype), between.to(dtype))


@pytest.fixture
def guarded() -> Iterator["Guarded"]:
    pages = Guarded()
    yield pages
    pages.close()


@pytest.mark.skipif(sys.platform != "linux", reason="needs mprotect")
@parametrize("dtype", TYPES)
@parametrize("shape", [(1, 1), (5, 31), (3, 100), (6, 576)])
def test_nothing_is_read_behind_the_end(
    shape: tuple[int, int], dtype: torch.dtype, variant: str, guarded: Guarded
) -> None:
    for density in (0.0, 0.02, 0.3):
        weight = sparse(shape, dtype, density)
        scales = torch.rand(shape[0], 1) if dtype == torch.int8 else None
        plain = pack(weight, scales)
        values, bitmask = (guarded.place(t) if t.numel() else t for t in (plain.values, plain.bitmask))
        at_the_end = PackedMatrix(values, bitmask, shape[1], None if scales is None else guarded.place(scales))
        for inputs in FLOATS:
            x = guarded.place(torch.randn(3, shape[1]).to(inputs))
            y, expected = at_the_end.product(x), plain.product(x.clone())
            assert_close(y, expected, rtol=0, atol=1e-2 if variant == "torch" else 0)
            x = guarded.place(torch.randn(33, shape[1]).to(inputs))
            assert_close(at_the_end.product(x), plain.product(x.clone()), rtol=0, atol=0)
        assert torch.equal(at_the_end.rows(0, shape[0]), plain.rows(0, shape[0]))


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@slow
def test_the_same_bits(variant: str, threads: None) -> None:
    """At every run, with any number of threads, and with other tokens beside."""
    if variant == "torch":
        pytest.skip("torch's own order")
    for dtype in (torch.bfloat16, torch.float32, torch.int8):
        scales = torch.rand(130, 5) if dtype == torch.int8 else None
        matrix, x = pack(sparse((130, 640), dtype), scales), torch.randn(BATCH, 640).bfloat16()
        torch.set_num_threads(1)
        expected, rows = matrix.product(x), matrix.rows(0, 130)
        for number in (2, 3, 1, 2):
            torch.set_num_threads(number)
            assert torch.equal(matrix.product(x), expected) and torch.equal(matrix.rows(0, 130), rows)
            for tokens in range(1, BATCH):
                assert torch.equal(matrix.product(x[:tokens]), expected[:tokens])


@parametrize("bad", [torch.inf, torch.nan])
def test_tiles_multiply_what_is_not_finite(bad: float, variant: str) -> None:
    """By zeros too, which makes no numbers, as in a dense product; only in the rows of that token."""
    if variant != "amx":
        pytest.skip("has no tiles")
    weight, x = sparse((20, 70), torch.bfloat16), torch.randn(40, 70).bfloat16()
    x[11, 69] = bad
    y, dense = pack(weight).product(x), x.float() @ weight.float().T
    assert y is not None
    assert torch.equal(y.isfinite(), dense.isfinite()) and torch.equal(y.isnan(), dense.isnan())
    assert not y[11].isfinite().any()


@parametrize(
    "vendor, flags, name, by_torch",
    [
        ("GenuineIntel", "avx512_vbmi2 avx512_bf16", "avx512-vbmi2", False),
        ("GenuineIntel", "avx512_vbmi2 avx512_bf16 amx_tile amx_bf16", "amx", False),
        ("GenuineIntel", "avx512_bf16 amx_bf16", "avx512", True),
        ("GenuineIntel", "avx512_vbmi2", "avx512-vbmi2", False),  # Ice Lake
        ("GenuineIntel", "avx512_bf16", "avx512", False),  # Cooper Lake
        ("AuthenticAMD", "avx512_vbmi2 avx512_bf16", "avx512-bf16", True),
        ("AuthenticAMD", "", "avx512", False),
    ],
)
def test_the_variant_of_a_cpu(
    vendor: str, flags: str, name: str, by_torch: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether many tokens in bfloat16 are left to torch, too."""
    if kernel.library() is None or sys.platform != "linux" or "avx2" not in kernel.variants():
        pytest.skip("needs the library for x86")
    fields = {"vendor_id": vendor, "flags": f"{' '.join(kernel._AVX512)} {flags}"}
    monkeypatch.setattr(system, "cpu_field", fields.get)
    compiled = kernel._compiled() | 1 << kernel.VARIANTS["amx"]  # which the system may have refused here
    monkeypatch.setattr(kernel, "_compiled", lambda: compiled)
    assert kernel.variants.__wrapped__()[0] == name
    monkeypatch.setattr(kernel, "torch_multiplies_bf16_fast", system.multiplies_bf16_fast)
    bf16, wide = torch.bfloat16, torch.float32
    assert multiplies(name, bf16, 100, bf16) is multiplies(name, bf16, 100, torch.int8) is not by_torch
    assert multiplies(name, bf16, 100, wide) is not system.multiplies_bf16_fast()
    assert multiplies(name, bf16, BATCH + 1, bf16) and multiplies(name, wide, 100, wide)


def test_dense_weights(variant: str, guarded: Guarded) -> None:
    for dtype, shape in product((torch.bfloat16, torch.float32), ((1, 64), (5, 192), (130, 640), (1000, 576))):
        weight, bias = guarded.place(torch.randn(shape).to(dtype)), torch.randn(shape[0]).to(dtype)
        for tokens in (1, 2, 3, 4, 7, 8):
            x = torch.randn(1, tokens, shape[1]).to(dtype)
            y, other = kernel.dense_linear(x, weight), kernel.dense_linear(x, weight, bias)
            if variant not in kernel.FASTER:
                assert y is None and other is None
                continue
            assert y is not None and other is not None and y.shape == (1, tokens, shape[0]) and y.dtype == dtype
            close(y[0], x[0], weight)
            close(other[0], x[0], weight, bias)


def test_dense_weights_that_are_left_to_torch() -> None:
    if kernel_name() not in kernel.FASTER:
        pytest.skip("needs a variant for dense weights")
    weight, x = torch.randn(6, 128), torch.randn(4, 128)
    assert kernel.dense_linear(x, weight) is not None
    for other, values in (
        (weight.half(), x.half()),
        (weight, x.bfloat16()),
        (weight.double(), x.double()),
        (weight[:, :64], x[:, :64]),
        (torch.randn(6, 100), x[:, :100]),
        (weight.to("meta"), x.to("meta")),
        (weight, torch.randn(9, 128)),
        (weight, torch.randn(0, 128)),
        (weight, torch.randn(4, 64)),
        (weight.as_subclass(Elsewhere), x),
        (weight, x.as_subclass(Elsewhere)),
    ):
        assert kernel.dense_linear(values, other) is None
    assert kernel.dense_linear(x, weight, torch.randn(6).half()) is None


class Elsewhere(Tensor):
    """A tensor whose numbers might lie elsewhere, as of a quantized weight."""


def operator(matrix: PackedMatrix, x: Tensor) -> Tensor:
    parts = (matrix.values, matrix.bitmask, matrix.offsets, matrix.scales, matrix.bias)
    result: Tensor = torch.ops.atp_sparse.linear(x, *parts)
    return result


def test_the_operator(variant: str) -> None:
    weight, bias = sparse((6, 96), torch.int8), torch.randn(6).bfloat16()
    scales = torch.rand(6, 3) / 100
    matrix, full = pack(weight, scales, bias), weight * scales.repeat_interleave(32, dim=1)
    for shape in ((1, 96), (96,), (2, 3, 96), (5, 40, 96), (0, 96)):
        x = torch.randn(shape)
        y = operator(matrix, x)
        assert y.shape == (*shape[:-1], 6)
        close(y.view(-1, 6), x.view(-1, 96), full, bias)
    half = torch.randn(3, 96).bfloat16()
    assert torch.equal(operator(matrix, half), matrix.product(half))


def test_offsets_that_are_wrong_read_nothing_else(variant: str) -> None:
    """The operator does not count the bits; what is outside the values counts as zero."""
    weight, x = sparse((8, 640), torch.bfloat16), torch.randn(1, 640)
    matrix = pack(weight)
    for wrong in (-1, -(2**62), 10**6, 2**62, 2**63 - 1):
        offsets = torch.full((9,), wrong, dtype=torch.int64)
        assert torch.ops.atp_sparse.linear(x, matrix.values, matrix.bitmask, offsets, None, None).shape == (1, 8)


@parametrize("columns", [30, 64, 100])
def test_offsets_near_the_end_of_the_values(columns: int, variant: str, guarded: Guarded) -> None:
    """Rows with all their bits, which begin before and after the place from which a copy is read."""
    count = 900
    for dtype in FLOATS:
        values = guarded.place(torch.randn(count).to(dtype))
        border = count - columns - 64
        starts = [0, border - 1, border, border + 1, count - columns, count - 65, count - 1, count, -1, 2**62]
        bits = np.packbits(np.ones((len(starts), columns), dtype=bool), axis=-1, bitorder="little")
        offsets = torch.tensor([*starts, count])
        row_of = [values[start : start + columns] if 0 <= start < count else values[:0] for start in starts]
        weight = torch.stack([torch.cat([row, row.new_zeros(columns - len(row))]) for row in row_of])
        for tokens in (1, 4, 8):
            x = torch.randn(tokens, columns)
            if variant == "torch":
                continue  # its own operations look at the bits, not at offsets
            y = torch.ops.atp_sparse.linear(x, values, guarded.place(torch.from_numpy(bits)), offsets, None, None)
            close(y, x, weight)


def test_what_is_refused() -> None:
    matrix, scales = pack(sparse((4, 64), torch.float32)), torch.ones(4, 2)
    values, bitmask = matrix.values, matrix.bitmask
    small = values.to(torch.int8)
    cases = {
        "97 values, but the bitmask has 98 bits": (values[1:], bitmask, 64),
        "values are [98] float64": (values.double(), bitmask, 64),
        "values are [49] float32 on cpu, not contiguous": (values[::2], bitmask, 64),
        "bitmask is [4, 8] uint8 on cpu; needed: [rows, 9] uint8 for 65": (values, bitmask, 65),
        "bitmask is [4, 8] int8": (values, bitmask.view(torch.int8), 64),
        "lies on cpu and meta; needed: cpu": (values, bitmask.to("meta"), 64),
        "int8 values need scales": (small, bitmask, 64),
        "others have none": (values, bitmask, 64, scales),
        "scales are [4, 4] float32": (small, bitmask, 64, torch.ones(4, 4)),
        "scales are [4, 2] float64": (small, bitmask, 64, scales.double()),
        "bias is [3] float32": (values, bitmask, 64, None, torch.ones(3)),
    }
    for words, arguments in cases.items():
        with pytest.raises(ValueError, match=r"^packed weight: ") as caught:
            PackedMatrix(*arguments)
        assert words in str(caught.value) and "\n" not in str(caught.value)
    for x in (torch.ones(9, 63), torch.ones(1, 63), torch.ones(64), torch.ones(1, 64).double()):
        with pytest.raises(ValueError, match=r"^packed weight: x is .*; needed: \[tokens, 64\] of a float type"):
            matrix.product(x)
    for first, last in ((-1, 2), (3, 2), (0, 5)):
        with pytest.raises(ValueError, match="has 4 rows"):
            matrix.rows(first, last)
    with pytest.raises(ValueError, match=r"needed: \[5\] int64"):
        torch.ops.atp_sparse.linear(torch.ones(1, 64), values, bitmask, matrix.offsets[:4], None, None)


def python(code: str, *words: object, **variables: str) -> "subprocess.CompletedProcess[str]":
    path = os.pathsep.join((str(HERE), os.environ.get("PYTHONPATH", str(HERE.parent))))
    environment = {**os.environ, "PYTHONPATH": path, **variables}
    command = [sys.executable, "-c", code, *map(str, words)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)


# Random packed weights at the ends of their arrays, on the variants named; the reference is the portable one.
OTHERS = """
import sys
from pathlib import Path
import torch
from atp_tune.packed import kernel
kernel.LIBRARY = Path(sys.argv[1])
kernel._flags = lambda: frozenset().union(kernel._CODES, *kernel._NEEDS.values())
kernel.system.is_amd = lambda: False  # whose CPUs have no tiles
from packedweights import FLOATS, Guarded, close, close_rounded, coded_matrix, codes, pack, sparse
from atp_tune.packed import kernel
from atp_tune.packed.kernel import PackedMatrix, multiplies
guarded = Guarded()
for variant in sys.argv[2:]:
    assert variant in kernel.variants(), kernel.variants()
    kernel._chosen = lambda asked: variant
    for shape in ((1, 1), (3, 7), (5, 31), (6, 64), (3, 100), (5, 384), (9, 576), (150, 1000)):
        for dtype in (*FLOATS, torch.int8):
            for density in (0.0, 0.05, 0.3, 1.0):
                weight = sparse(shape, dtype, density)
                groups = 2 if shape[1] % 64 == 0 and density == 0.3 else 1
                scales = torch.rand(shape[0], groups) if dtype == torch.int8 else None
                full = weight
                if scales is not None:
                    full = weight * scales.repeat_interleave(shape[1] // groups, dim=1)
                plain = pack(weight, scales)
                values, bitmask = (guarded.place(t) if t.numel() else t for t in (plain.values, plain.bitmask))
                matrix = PackedMatrix(values, bitmask, shape[1], scales)
                assert torch.equal(matrix.rows(0, shape[0]), full)
                several = (1, 3, 8, 11, *((50, 130, 400) if density == 0.3 else ()))
                types = (*FLOATS, *FLOATS, torch.float32)[: len(several)]
                if variant == "amx":
                    several, types = (11, 16, 50), (torch.bfloat16,) * 3
                    full = full.bfloat16() if groups > 1 and scales is not None else full
                for inputs, tokens in zip(types, several, strict=True):
                    x = guarded.place(torch.randn(tokens, shape[1]).to(inputs))
                    y = matrix.product(x)
                    if y is None:
                        assert not multiplies(variant, inputs, tokens, dtype)
                    else:
                        close(y, x, full)
    for dtype in (torch.bfloat16, torch.float32):
        weight = guarded.place(torch.randn(7, 192).to(dtype))
        for tokens in (1, 2, 4, 8):
            x = guarded.place(torch.randn(tokens, 192).to(dtype))
            y = kernel.dense_linear(x, weight)
            assert (y is None) == (variant not in kernel.FASTER)
            if y is not None:
                close(y, x, weight)
    for bits in range(2, 9) if kernel.multiplies_codes(64, 64) else ():
        for shape, density in (((1, 64), 1.0), ((3, 128), 0.3), ((9, 576), 0.05), ((2, 4480), 0.5)):
            coded, full = codes(shape, bits, density=density)
            matrix = coded_matrix(coded, guarded.place)
            assert torch.equal(matrix.rows(0, shape[0]), full)
            for tokens in (1, 2, 4, 8):
                x = guarded.place(torch.randn(tokens, shape[1]))
                close_rounded(matrix.product(x), x, full)
print("done")
"""


def build(library: Path, *options: str) -> None:
    command = ["cc", "-std=c11", "-fPIC", "-shared", *options, "-o", str(library), str(SOURCE)]
    subprocess.run(command, check=True, capture_output=True, text=True)


# --- codes of rounded weights


@pytest.fixture(params=["avx512-vbmi2", "avx2"])
def isa_of_codes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param not in kernel.variants():
        pytest.skip("another CPU")
    monkeypatch.setenv("ATP_TUNE_ISA", request.param)
    if not kernel.multiplies_codes(64, 64):
        pytest.skip("needs AVX-512 with VBMI, VBMI2 and VNNI, or AVX2 that deposits bits fast")


with_codes = pytest.mark.usefixtures("isa_of_codes")


@with_codes
@parametrize("bits", range(2, 9))
@parametrize(
    ("shape", "size", "symmetric", "density"),
    [
        ((1, 64), 64, False, 1.0),
        ((7, 640), -1, True, 0.3),
        ((150, 1024), 128, False, 0.5),
        ((5, 4480), 64, False, 0.05),
    ],
)
def test_codes_give_the_weights_and_their_products(
    shape: tuple[int, int], size: int, symmetric: bool, density: float, bits: int
) -> None:
    """In every number format, of any number of tokens; with a row of zeros and one without any."""
    (coded, full), bias = codes(shape, bits, size, symmetric, density), torch.randn(shape[0])
    matrix, biased = coded_matrix(coded), coded_matrix(coded, bias=bias)
    for dtype in FLOATS:
        assert torch.equal(matrix.rows(0, shape[0], dtype), full.to(dtype))
        assert torch.equal(matrix.rows(shape[0] // 2, shape[0], dtype), full.to(dtype)[shape[0] // 2 :])
        for tokens in (0, 1, 2, 3, 4, 5, 8, 9, 24):
            x = torch.randn(tokens, shape[1]).mul(torch.randn(shape[1]).exp()).to(dtype)
            close_rounded(matrix.product(x), x, full)
            close_rounded(biased.product(x), x, full, bias)
    assert matrix.product(torch.zeros(25, shape[1])) is None


@with_codes
def test_products_with_codes_depend_on_their_token_alone() -> None:
    """Not on what is beside it, nor on the number of threads."""
    coded, _ = codes((1024, 640), 4)
    matrix, x = coded_matrix(coded), torch.randn(8, 640)
    every, threads = matrix.product(x), torch.get_num_threads()
    assert every is not None
    for tokens in (1, 2, 3, 5):
        assert torch.equal(few_of := matrix.product(x[:tokens]), every[:tokens]), few_of  # type: ignore[arg-type]
    torch.set_num_threads(3)
    try:
        assert torch.equal(matrix.product(x), every)  # type: ignore[arg-type]
    finally:
        torch.set_num_threads(threads)


@with_codes
def test_codes_read_nothing_behind_their_arrays(guarded: Guarded) -> None:
    for bits, density in product(range(2, 9), (0.05, 0.5, 1.0)):
        coded, full = codes((5, 192), bits, density=density)
        matrix, x = coded_matrix(coded, guarded.place), guarded.place(torch.randn(3, 192))
        close_rounded(matrix.product(x), x, full)
        assert torch.equal(matrix.rows(4, 5), full[4:])


@with_codes
def test_a_bitmask_that_changes_under_codes_does_no_harm(guarded: Guarded) -> None:
    """The numbers are wrong; what is read lies in the arrays."""
    for factor in (1, 3, 1000, -1):
        matrix = coded_matrix(codes((5, 192), 4)[0], guarded.place)
        bitmask, offsets = matrix.parts[1:3]
        assert bitmask is not None
        bitmask.fill_(255)
        offsets.mul_(factor)
        assert matrix.product(torch.randn(2, 192)) is not None
        assert matrix.rows(0, 5).shape == (5, 192)


@with_codes
@parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_tokens_that_are_not_finite_are_not_rounded(bad: float) -> None:
    matrix, x = coded_matrix(codes((6, 128), 4)[0]), torch.randn(3, 128)
    x[1, 77] = bad
    assert matrix.product(x) is None


@with_codes
def test_tokens_of_any_size() -> None:
    coded, full = codes((6, 128), 4)
    matrix = coded_matrix(coded)
    for size in (0.0, 1e-42, 1e-30, 1e30):
        x = torch.randn(2, 128) * size
        assert_close(matrix.product(x), x @ full.T, rtol=1e-3, atol=1e-38 + size * 1e-3)
    assert matrix.product(torch.full((1, 128), 1e37)) is None  # their sum is not finite


@with_codes
@parametrize("end, change", [
    ("_codes", lambda t: t[1:]), ("_codes", lambda t: t.to(torch.int8)), ("_scales", lambda t: t[:, :1].repeat(1, 3)),
    ("_scales", lambda t: t.float()), ("_scales", lambda t: t[0]), ("_scales", lambda t: t[:, :0]),
    ("_bitmask", lambda t: t[:3].clone()), ("_codes", lambda t: t.to("meta")),
])  # fmt: skip
def test_what_are_no_codes_is_refused(end: str, change: Callable[[Tensor], Tensor]) -> None:
    coded, _ = codes((6, 128), 4)
    zeros, parts = torch.zeros(6, 2, dtype=torch.uint8), {**coded.parts, end: change(coded.parts[end])}
    with pytest.raises(ValueError, match="are no codes of"):
        CodedMatrix(parts["_codes"], 4, parts["_scales"], zeros, 0, 128, parts["_bitmask"])


@with_codes
def test_what_codes_cannot_be_multiplied_by_is_refused() -> None:
    matrix, bias = coded_matrix(codes((6, 128), 4)[0]), torch.zeros(6)
    operator = torch.ops.atp_sparse.coded
    words = (matrix.unit, 4, *matrix.parts)
    for x in (torch.ones(1, 64), torch.ones(40, 64), torch.ones(1, 128).long(), torch.ones(128), torch.ones(1, 192)):
        with pytest.raises(ValueError, match="needed: "):
            matrix.product(x)
        if x.dim() == 2:
            with pytest.raises(ValueError, match="needed: "):
                operator(x, *words)
    for wrong in (bias[:2], bias.double(), bias[:1].expand(6)):
        with pytest.raises(ValueError, match="are no codes of"):
            coded_matrix(codes((6, 128), 4)[0], bias=wrong)
    x = torch.randn(30, 128)
    assert_close(operator(x.bfloat16(), *words[:-1], bias), (x @ matrix.rows(0, 6).T).bfloat16(), rtol=0.05, atol=0.05)


@slow
def test_with_sanitizers(tmp_path: Path) -> None:
    if shutil.which("cc") is None and "CI" not in os.environ:
        pytest.skip("needs a C compiler")
    build(tmp_path / "checked.so", "-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    asan = subprocess.run(["cc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True).stdout
    names = [name for name in kernel.variants() if name in ("portable", "avx2", "neon")]
    variables = {"LD_PRELOAD": asan.strip(), "ASAN_OPTIONS": "detect_leaks=0"}
    done = python(OTHERS, tmp_path / "checked.so", *names, **variables)
    assert done.stdout == "done\n", done.stderr[-3000:]


@slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs SIMDe")
def test_avx512_emulated(tmp_path: Path) -> None:
    """Each instruction by SIMDe, a library of headers; the rounding of the bfloat16 dot product is its own."""
    if "avx2" not in kernel.variants():
        pytest.skip("needs AVX2")
    if not Path("/usr/include/simde").is_dir() and "CI" not in os.environ:
        pytest.skip("needs libsimde-dev")
    header = HERE / "emulated_avx512.h"
    options = ("-O1", "-mavx2", "-mfma", "-mf16c", "-mpopcnt", "-mbmi", "-mbmi2", "-fno-strict-aliasing")
    build(tmp_path / "emulated.so", *options, f'-DEMULATED_AVX512="{header}"')
    done = python(OTHERS, tmp_path / "emulated.so", "avx512", "avx512-vbmi2", "avx512-bf16", "amx")
    assert done.stdout == "done\n", done.stderr[-3000:]


@slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs qemu-user")
def test_neon_emulated(tmp_path: Path) -> None:
    """Against the portable loops, by a program in C."""
    compiler, emulator = shutil.which("aarch64-linux-gnu-gcc"), shutil.which("qemu-aarch64")
    if (compiler is None or emulator is None) and "CI" not in os.environ:
        pytest.skip("needs gcc-aarch64-linux-gnu and qemu-user")
    program, options = tmp_path / "program", ("-std=c11", "-O2", "-static", "-Wall", "-Wextra", "-Werror")
    subprocess.run([str(compiler), *options, "-o", program, HERE / "packed_on_neon.c"], check=True)
    assert subprocess.run([str(emulator), program], check=True, capture_output=True, text=True).stdout == "done\n"
