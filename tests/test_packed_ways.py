"""Packed linears, and the dense ones beside them, in each way in which torch runs a module: right, or refused.

Their kernels read and write by addresses, which no tracer, transform or mode sees: a traced module gave memory that
nothing had filled, tangents and gradients of a weight were lost.
"""

import warnings
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from expect import parametrize, slow
from torch import Tensor, func, nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from atp_tune.packed.kernel import kernel_name, multiplies_codes
from atp_tune.packed.layout import encode, pack, packed_linear
from atp_tune.packed.modeling_atp_sparse import SCALES, VALUES, CodedLinear, DenseLinear, SparseLinear
from atp_tune.pruners.rounding import RTN

pytestmark = pytest.mark.filterwarnings(  # of torch.jit, which func.jvp imports, before torch 2.15 and since
    "ignore::DeprecationWarning", "ignore:.torch.jit:FutureWarning"
)
Way = Callable[[Any, Tensor, Tensor], Tensor]
ROWS, COLUMNS, GROUP = 16, 64, 32


class Subclass(Tensor):
    """A tensor that another library might have."""


def learnt(module: Any, x: Tensor, name: str) -> Tensor:
    """The gradient of a parameter."""
    parameter: Tensor = module.get_parameter(name).requires_grad_()
    module(x).square().sum().backward()
    assert parameter.grad is not None
    return parameter.grad


def gradient(module: Any, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    module(x).float().square().sum().backward()
    assert x.grad is not None
    return x.grad


def gradient_of_values(module: Any, x: Tensor) -> Tensor:
    if isinstance(module, SparseLinear):
        return learnt(module, x, "weight_values")
    return learnt(module, x, "weight")[module.weight != 0]


def penalty(module: Any, x: Tensor) -> Tensor:
    """A gradient of a gradient."""
    x = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
    return torch.autograd.grad(slope.square().sum(), x)[0]


def tangent(module: Any, x: Tensor, t: Tensor) -> Tensor:
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(module(forward_ad.make_dual(x, t))).tangent
        assert found is not None
        return found.clone()


def tangent_of_bias(module: Any, x: Tensor, t: Tensor) -> Tensor:
    with forward_ad.dual_level():
        bias = forward_ad.make_dual(module.bias, t[0, :ROWS])
        found = forward_ad.unpack_dual(func.functional_call(module, {"bias": bias}, (x,))).tangent
        assert found is not None
        return found.clone()


def traced(module: Any, x: Tensor, other: Tensor, exact: bool = True) -> Tensor:
    """Warnings are errors: nothing was left out."""
    found: Tensor = torch.jit.trace(module, x, check_trace=exact)(other)
    return found


def cast(module: Any, x: Tensor, dtype: torch.dtype = torch.bfloat16, enabled: bool = True) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", dtype, enabled=enabled):
        found: Tensor = module(x)
    return found


def in_onnx(module: Any, x: Tensor, other: Tensor, folder: Path, dynamo: bool) -> Tensor:
    onnx = pytest.importorskip("onnx")
    reference = pytest.importorskip("onnx.reference")
    if dynamo:
        pytest.importorskip("onnxscript")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module.eval(), (x,), folder / "it.onnx", dynamo=dynamo, verbose=False)
    graph = onnx.load(folder / "it.onnx")
    named = {graph.graph.input[0].name: other.numpy()}
    return torch.from_numpy(reference.ReferenceEvaluator(graph).run(None, named)[0].copy())


def compiled(module: Any, backend: str = "aot_eager") -> Any:
    torch._dynamo.reset()
    return torch.compile(module, backend=backend, fullgraph=True)


def without(way: Callable[[], Any], run: Callable[[], Tensor]) -> Tensor:
    with way():
        return run()


def counted(module: Any, x: Tensor) -> Tensor:
    with FlopCounterMode(display=False) as counter:
        module(x)
    return torch.tensor(counter.get_total_flops())


def stacked(module: Any, x: Tensor) -> Tensor:
    """A product with each of several weights at once."""
    state, _ = func.stack_module_state([module, deepcopy(module)])
    found: Tensor = func.vmap(lambda own: func.functional_call(module, own, (x,)))(state)
    return found


def fake(module: Any, x: Tensor) -> Tensor:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        shape = module(mode.from_tensor(x)).shape
    return torch.tensor(shape)


def compiled_tangent(module: Any, x: Tensor, t: Tensor) -> Tensor:
    return tangent(compiled(module), x, t)


def compiled_jvp(module: Any, x: Tensor, t: Tensor) -> Tensor:
    found: Tensor = compiled(lambda x, t: func.jvp(module, (x,), (t,))[1])(x, t)
    return found


def loss(module: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: module(x).square().sum()


FAST: dict[str, Way] = {
    "no_grad": lambda m, x, y: without(torch.no_grad, lambda: m(x)),
    "inference_mode": lambda m, x, y: without(torch.inference_mode, lambda: m(x)),
    "deepcopy": lambda m, x, y: deepcopy(m)(x),
    "subclass of Tensor": lambda m, x, y: m(x.as_subclass(Subclass)).as_subclass(Tensor),
    "gradient": lambda m, x, y: gradient(m, x),
    "gradient of the bias": lambda m, x, y: learnt(m, x, "bias"),
    "gradient of the values": lambda m, x, y: gradient_of_values(m, x),
    "gradient of a gradient": lambda m, x, y: penalty(m, x),
    "forward AD": tangent,
    "forward AD of the bias": tangent_of_bias,
    "func.jvp": lambda m, x, y: func.jvp(m, (x,), (y,))[1],
    "func.grad": lambda m, x, y: func.grad(loss(m))(x),
    "func.jacfwd": lambda m, x, y: func.jacfwd(m)(x),
    "func.hessian": lambda m, x, y: func.hessian(loss(m))(x[:1]),
    "vmap": lambda m, x, y: torch.vmap(m)(x),
    "vmap of weights": lambda m, x, y: stacked(m, x),
    "another bias": lambda m, x, y: func.functional_call(m, {"bias": m.bias + 1}, (x,)),
    "autocast": lambda m, x, y: cast(m, x),
    "autocast, 40 tokens": lambda m, x, y: cast(m, x.repeat(14, 1)),
    "autocast to float16": lambda m, x, y: cast(m, x, torch.float16),
    "autocast, disabled within": lambda m, x, y: cast(m, x, enabled=False),
    "autocast of float64": lambda m, x, y: cast(m.double(), x.double()),
    "autocast, gradient": lambda m, x, y: gradient(lambda x: cast(m, x), x),
    "jit.trace": traced,
    "jit.trace, autocast": lambda m, x, y: traced(lambda x: cast(m, x), x, y, exact=False),
    "fx.symbolic_trace": lambda m, x, y: torch.fx.symbolic_trace(m)(y),
    "make_fx": lambda m, x, y: make_fx(m)(x)(y),
    "FakeTensorMode": lambda m, x, y: fake(m, x),
    "FlopCounterMode": lambda m, x, y: counted(m, x),
}
SLOW: dict[str, Way] = {
    "export": lambda m, x, y: torch.export.export(m, (x,)).module()(y),
    "compile": lambda m, x, y: without(torch.no_grad, lambda: compiled(m)(x)),
    "compile, backend eager": lambda m, x, y: compiled(m, "eager")(x),
    "compile, autocast": lambda m, x, y: cast(compiled(m), x),
    "compile, gradient": lambda m, x, y: gradient(compiled(m), x),
    "compile, gradient of the bias": lambda m, x, y: learnt(m, x, "bias") + 0 * compiled(m)(x).sum(),
    "compile, forward AD": compiled_tangent,
    "compile of func.jvp": compiled_jvp,
    "compile of func.grad": lambda m, x, y: compiled(func.grad(loss(m)))(x),
    "compile of vmap": lambda m, x, y: compiled(torch.vmap(m))(x),
}
# By torch's own words; what is not here is right. Bits and values that may disagree cannot be looked at there.
REFUSED = {
    "vmap of weights": "calling .item\\(\\) on a Tensor|inplace arithmetic",
    "fx.symbolic_trace": "cannot be used as inputs to control flow",
    "make_fx": "get value out of a tracing tensor",
    "FakeTensorMode": "_local_scalar_dense",
}


def make(kind: str) -> tuple[nn.Module, nn.Linear]:
    """A linear of a packed model, and the same as torch has it."""
    torch.manual_seed(0)
    linear = nn.Linear(COLUMNS, ROWS).requires_grad_(False)
    linear.weight[torch.rand(ROWS, COLUMNS) < 0.6] = 0
    if kind == "dense":
        module: Any = deepcopy(linear)
        module.__class__ = DenseLinear
        return module, linear
    if kind == "coded":
        quantizer = RTN(COLUMNS, False)
        rounded, grid = quantizer.quantize(linear.weight, 4, None), quantizer.grid(linear.weight, 4)
        kept = encode(rounded, grid, 4, COLUMNS, False, False)
        module = CodedLinear(linear, kept.about)
        for end, part in kept.parts.items():
            getattr(module, f"weight{end}").data = part
        module.bias.data = linear.bias.data
        module.check()
        linear.weight.copy_(module.weight)
        return module, linear
    module = packed_linear(linear, "bf16" if kind == "bf16" else "int8")
    if kind == "codes":  # as those of rounded weights are kept in memory: with scales of groups
        parts = pack(linear.weight, "int8", GROUP)
        module.weight_values.data, module.weight_scales.data = parts[VALUES], parts[SCALES]
    linear.weight.copy_(module.weight)
    return module, linear


KINDS = ("bf16", "int8", "codes", "dense", *(["coded"] if multiplies_codes(COLUMNS, COLUMNS) else []))
CASES = [
    *(pytest.param(way, kind, id=f"{way}-{kind}") for way in FAST for kind in KINDS),
    *(pytest.param(way, kind, id=f"{way}-{kind}", marks=slow) for way in SLOW for kind in KINDS[2::2]),
]


@parametrize(("way", "kind"), CASES)
def test_a_way_to_run_it(way: str, kind: str) -> None:
    (module, linear), run = make(kind), {**FAST, **SLOW}[way]
    if way == "jit.trace" and kind == "coded":  # what is traced is exact, the module rounds its tokens
        run = partial(traced, exact=False)
    if way == "gradient of the values" and kind in ("int8", "codes", "coded"):
        pytest.skip("integers have none")
    if way == "gradient of the values" and kind == "bf16":
        module.weight_values.data = module.weight_values.float()
    x, other = torch.randn(3, COLUMNS), torch.randn(3, COLUMNS)
    if way in REFUSED and kind != "dense":
        with pytest.raises(Exception, match=REFUSED[way]):
            run(module, x, other)
        return
    wanted = run(linear, x, other)
    found = run(module, x, other)
    rounded = "autocast" in way and "float64" not in way and "disabled" not in way
    loose = 0.02 if rounded else 1e-3 if kind == "coded" else 1e-4  # coded: tokens are rounded to 16 bits
    assert_close(found, wanted, rtol=loose, atol=loose if rounded else loose / 10)


@slow
@parametrize("dynamo", [False, True])
@parametrize("kind", KINDS[2:])
def test_a_graph_of_onnx(kind: str, dynamo: bool, tmp_path: Path) -> None:
    """It was one constant, without an input."""
    (module, linear), x, other = make(kind), torch.randn(3, COLUMNS), torch.randn(3, COLUMNS)
    assert_close(in_onnx(module, x, other, tmp_path, dynamo), linear(other), rtol=1e-4, atol=1e-5)


@slow
def test_a_linear_that_comes_to_a_kernel_is_compiled_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where rows start was made at a move only if the former device had a kernel; then the graph broke."""
    monkeypatch.setenv("ATP_TUNE_ISA", "torch")
    (module, linear), x = make("int8"), torch.randn(3, COLUMNS)
    assert_close(compiled(module)(x), linear(x))
    assert module._offsets is None
    monkeypatch.delenv("ATP_TUNE_ISA")
    if kernel_name() is None:
        pytest.skip("needs the kernel")
    graphs: list[Any] = []
    torch.compile(module.to("cpu"), backend=lambda graph, _: graphs.append(graph) or graph, fullgraph=True)(x)
    assert any("atp_sparse.linear" in str(node.target) for node in graphs[0].graph.nodes)
