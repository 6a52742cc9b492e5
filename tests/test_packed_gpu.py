"""The Triton kernels of packed weights: compiled for GPUs that need not be here, and run in Triton's interpreter."""

from pathlib import Path
from typing import Any

import pytest
import torch
from expect import parametrize, slow
from numpy import packbits
from torch import Tensor
from torch.nn import functional
from tritons import WHY, compiles, interpreted

from atp_tune.packed import gpu
from atp_tune.packed.gpu import GpuMatrix

CPU = torch.device("cpu")
SHAPES = [(1, 1), (3, 7), (33, 70), (9, 300), (70, 576), (9, 512)]


def sparse(shape: tuple[int, int], share: float, dtype: torch.dtype) -> Tensor:
    return (torch.randn(shape) * (torch.rand(shape) < share)).to(dtype)


def packed(weight: Tensor, scales: Tensor | None = None, bias: Tensor | None = None) -> GpuMatrix:
    """Packed by numpy; `weight`: with `scales` the codes."""
    kept = weight.cpu() != 0
    bitmask = torch.from_numpy(packbits(kept.numpy(), axis=-1, bitorder="little")).to(weight.device)
    return GpuMatrix(weight[kept.to(weight.device)], bitmask, weight.shape[1], scales, bias)


def signs(*shape: int) -> Tensor:
    """Ones and minus ones, whose sums are exact in each float type here."""
    return torch.randint(2, shape) * 2.0 - 1


def check_floats(shape: tuple[int, int], share: float, dtype: torch.dtype, device: torch.device = CPU) -> None:
    """Rows of any numbers, and products of 1 to 16 tokens with numbers whose sums are exact: to the last bit."""
    weight = sparse(shape, share, dtype).to(device)
    matrix = packed(weight)
    assert matrix.rows(0, shape[0]).equal(weight)
    assert matrix.rows(shape[0] // 2, shape[0], torch.float32).equal(weight[shape[0] // 2 :].float())
    weight = (signs(*shape) * (torch.rand(shape) < share)).to(device, dtype)
    for bias in (None, signs(shape[0]).to(device)):
        matrix = packed(weight, bias=bias)
        for tokens in (1, 2, 16):
            x = signs(tokens, shape[1]).to(device, dtype)
            y = matrix.product(x, forced=True)
            exact = functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
            assert y is not None and y.equal(exact.to(dtype))  # which rounds sums above 256


def check_codes(shape: tuple[int, int], groups: int, device: torch.device = CPU) -> None:
    """Scales are powers of 2, so that these sums are exact too."""
    codes = torch.randint(-3, 4, shape) * (torch.rand(shape) < 0.4)
    scales = 2.0 ** torch.randint(-1, 2, (shape[0], groups))
    weight = (codes * scales.repeat_interleave(shape[1] // groups, dim=1)).to(device)
    matrix = packed(codes.to(device, torch.int8), scales.to(device))
    assert matrix.rows(0, shape[0]).equal(weight)
    for tokens in (1, 3):
        x = signs(tokens, shape[1]).to(device, torch.float16)
        y = matrix.product(x, forced=True)
        assert y is not None and y.double().equal(functional.linear(x.double(), weight.double()))


INTERPRETED = """
import torch
from test_packed_gpu import SHAPES, check_codes, check_floats, check_rest
from atp_tune.packed.gpu import has_kernel
assert has_kernel(torch.device("cpu"))
torch.manual_seed(0)
for shape in SHAPES:
    check_floats(shape, 0.3, torch.bfloat16)
for dtype in (torch.bfloat16, torch.float16):
    for share in (0, 0.5, 1):
        check_floats((5, 40), share, dtype)
for shape, groups in (((5, 7), 1), ((33, 64), 2), ((5, 192), 3)):
    check_codes(shape, groups)
check_rest()
print("done")
"""


def check_rest() -> None:
    """Inputs that are not finite, those that have no product, and the operator."""
    weight = sparse((6, 64), 0.3, torch.bfloat16)
    matrix = packed(weight)
    x = torch.ones(1, 64, dtype=torch.bfloat16)
    x[0, 3] = torch.inf
    y = matrix.product(x)  # one token is never left to others
    assert y is not None
    torch.testing.assert_close(y, functional.linear(x, weight), equal_nan=True)
    assert [matrix.product(other, forced=True) for other in (x.float(), x[:0], x.expand(17, 64))] == [None] * 3
    assert matrix.product(x.expand(2, 64)) is None  # nothing is known of this device
    x = torch.randn(2, 3, 64).bfloat16()
    for tokens in (x, x.repeat(4, 1, 1)):
        y = gpu.linear(tokens, matrix.values, matrix.bitmask, matrix.offsets, None, None)
        assert y.shape == (*tokens.shape[:-1], 6)
        torch.testing.assert_close(y.float(), functional.linear(tokens, weight).float(), rtol=0.02, atol=0.05)


@slow
def test_the_kernels_in_tritons_interpreter() -> None:
    interpreted(INTERPRETED)


@slow
@parametrize("capability", [80, 90])
@parametrize(
    ("tokens", "x", "values", "group", "unit"),
    [
        (1, "bf16", "bf16", 0, 256),
        (16, "bf16", "bf16", 0, 64),
        (16, "bf16", "i8", 4, 256),
        (1, "fp16", "i8", -1, 64),
        (16, "fp16", "fp32", 0, 2),
    ],
)
def test_the_product_compiles(
    tokens: int,
    x: str,
    values: str,
    group: int,
    unit: int,
    capability: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("triton", reason=WHY)
    import triton.language as tl

    from atp_tune.packed.kernel_triton import _multiply

    tensors: dict[str, str] = {
        "x_at": f"*{x}", "values_at": f"*{values}", "bitmask_at": "*u8", "offsets_at": "*i64", "scales_at": "*fp32",
        "bias_at": "*bf16", "y_at": f"*{x}", "tokens": "i32", "rows": "i32", "units": "i32",
    }  # fmt: skip
    constants: dict[str, Any] = {
        "UNIT": unit, "GROUP": group, "TOKENS": tokens,
        "ROWS": 8 if tokens == 1 else 32, "BYTES": 32, "KIND": tl.bfloat16 if x == "bf16" else tl.float16,
    }  # fmt: skip
    if not group:
        constants["scales_at"] = None
    if values == "fp32":
        constants["bias_at"] = None
    compiles(_multiply, tensors, constants, capability, tmp_path, monkeypatch)


@slow
def test_the_unpacking_compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason=WHY)
    from atp_tune.packed.kernel_triton import _unpack

    tensors = {"values_at": "*bf16", "bitmask_at": "*u8", "offsets_at": "*i64", "out_at": "*bf16"}
    constants = {"scales_at": None, "UNIT": 2, "GROUP": 0, "ROWS": 4, "BYTES": 32}
    compiles(_unpack, {**tensors, "rows": "i32", "units": "i32"}, constants, 90, tmp_path, monkeypatch)


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = sparse((4, 64), 0.5, torch.bfloat16)
    matrix = packed(weight)
    with pytest.raises(ValueError, match="values, but the bitmask has"):
        GpuMatrix(matrix.values[1:], matrix.bitmask, 64)
    with pytest.raises(ValueError, match="lies on cpu and meta; needed: cpu"):
        GpuMatrix(matrix.values.to("meta"), matrix.bitmask, 64)
    with pytest.raises(ValueError, match="has a bit after its 57 columns"):
        GpuMatrix(torch.ones(8), torch.full((1, 8), 128, dtype=torch.uint8), 57)
    with pytest.raises(ValueError, match=r"x is \[1, 32\] on cpu; needed: \[tokens, 64\]"):
        matrix.product(torch.ones(1, 32, dtype=torch.bfloat16))
    for first, last in ((0, 9), (3, 2), (-1, 2)):
        with pytest.raises(ValueError, match=f"has 4 rows, not {first} to {last}"):
            matrix.rows(first, last)
    monkeypatch.setattr(gpu, "MOST_VALUES", len(matrix.values))
    with pytest.raises(ValueError, match="a GPU's kernel takes fewer than"):
        packed(weight)


def test_a_kernel_that_computes_something_else_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("triton", reason=WHY)
    gpu.has_kernel.cache_clear()
    monkeypatch.setattr(GpuMatrix, "product", lambda matrix, x, forced=False: x.new_zeros(len(x), 2))
    monkeypatch.setattr(GpuMatrix, "rows", lambda matrix, *_: matrix.values.new_zeros(2, 128))
    assert not gpu.has_kernel(CPU)
    gpu.has_kernel.cache_clear()
    (record,) = caplog.records
    assert record.getMessage().endswith("unpacked for each product: RuntimeError: it computes something else")
