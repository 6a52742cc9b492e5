"""Codes of rounded weights: bit packing and decoding against loops, packed folders with codes, damaged ones."""

import json
import re
import shutil
from collections.abc import Callable
from copy import deepcopy
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from expect import parametrize, refused
from families import ALL, bench_of, few, same_bits
from hypothesis import given
from hypothesis import strategies as st
from plans import planned
from safetensors.torch import load_file
from test_packing import bytes_of, changed_tensor, edited, first, logits, registered, same_files, sparse_model
from test_pruners import Problem, dtypes, hessian_of, problem, problems, tied_problems
from test_quantizers import DAMPING, sizes, widths
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM

from atp_tune.allocations.bits import stored_bits
from atp_tune.checkpoints.convert import unpack_folder
from atp_tune.config.prune import QuantizeConfig
from atp_tune.folders.applying import Shards
from atp_tune.folders.packing import Codes, _encoded, pack_folder
from atp_tune.packed import kernel
from atp_tune.packed.layout import Coded, encode, pack_codes, spread
from atp_tune.packed.modeling_atp_sparse import (
    BITMASK,
    CODES,
    LEAST,
    SCALES,
    ZEROS,
    CodedLinear,
    SparseLinear,
    unpack_codes,
)
from atp_tune.pruners import QUANTIZERS
from atp_tune.pruners.rounding import Grid
from atp_tune.search.objective import Record

__all__ = ["registered"]  # a fixture of each test here
REPO = Path(__file__).parents[1]
STEP = 2.0**-11  # largest relative change of a scale by float16


# bits and grids, against loops


def naive_codes(packed: Tensor, bits: int, count: int) -> list[int]:
    """One bit after the other, the lowest of each byte first."""
    stream = [byte >> bit & 1 for byte in packed.tolist() for bit in range(8)]
    return [sum(stream[i * bits + bit] << bit for bit in range(bits)) for i in range(count)]


def naive_weights(coded: Coded) -> list[list[float]]:
    """(q - z) Δ, weight by weight."""
    form, parts = coded.about["codes"], coded.parts
    columns, rows = coded.about["shape"][::-1] if not coded.about.get("transposed") else coded.about["shape"]
    count = coded.about["nonzeros"] if form["mask"] else rows * columns
    codes = iter(naive_codes(parts[CODES], form["bits"], count))
    size = columns if form["group_size"] == -1 else form["group_size"]
    groups = -(-columns // size)
    middle = [2 ** (form["bits"] - 1)] * rows * groups
    zeros = middle if form["symmetric"] else naive_codes(parts[ZEROS], form["bits"], rows * groups)
    found = []
    for row in range(rows):
        found.append([0.0] * columns)
        for column in range(columns):
            if form["mask"] and not int(parts[BITMASK][row, column // 8]) >> column % 8 & 1:
                continue
            group = column // size
            scale = float(parts[SCALES][row, group]) * 2.0 ** form["exponent"]
            found[row][column] = (next(codes) - zeros[row * groups + group]) * scale
    assert next(codes, None) is None
    return found


@parametrize("bits", range(2, 9))
def test_codes_are_packed_bit_by_bit(bits: int) -> None:
    for count in (0, 1, 7, 8, 9, 33):
        codes = torch.randint(0, 2**bits, (count,), generator=torch.Generator().manual_seed(count))
        packed = pack_codes(codes, bits)
        assert packed.dtype == torch.uint8 and len(packed) == -(-count * bits // 8)
        assert naive_codes(packed, bits, count) == codes.tolist() == unpack_codes(packed, bits, count).tolist()
        with pytest.raises(ValueError, match=r"codes .* are not"):
            unpack_codes(packed, bits, count + 8)


@given(
    problems() | tied_problems, dtypes, widths, sizes, st.booleans(), st.booleans(), st.sampled_from([0, 0.3, 0.7, 1.0])
)
def test_codes_give_the_rounded_weights(
    case: Problem, dtype: torch.dtype, bits: int, size: int, symmetric: bool, gptq: bool, share: float
) -> None:
    weight, x = case[0].to(dtype), case[1]
    gone = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < share
    weight = weight.masked_fill(gone, 0)
    quantizer = QUANTIZERS["gptq" if gptq else "rtn"](size, symmetric, DAMPING)
    rounded = quantizer.quantize(weight, bits, hessian_of(x) if gptq else None, gone)
    coded = encode(rounded, quantizer.grid(weight, bits), bits, size, symmetric, False)
    found = coded.decoded()
    assert torch.equal(found, torch.tensor(naive_weights(coded), dtype=torch.float32))
    assert torch.equal(found == 0, rounded == 0)
    loose = STEP + {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}[dtype]
    assert_close(found, rounded.float(), rtol=loose, atol=1e-7)
    promised = stored_bits(*weight.shape, bits, size, 0 if symmetric else bits, int((rounded == 0).sum()))
    rows, columns = weight.shape
    slack = 8 * 2 + (rows * (-columns % 8) if BITMASK in coded.parts else 0)
    assert 0 <= 8 * sum(part.nbytes for part in coded.parts.values()) - promised < slack


def test_what_is_not_on_the_grid_is_refused() -> None:
    weight, _ = problem((5, 24))
    quantizer = QUANTIZERS["rtn"](8, False, DAMPING)
    rounded, grid = quantizer.quantize(weight, 4, None), quantizer.grid(weight, 4)
    for wrong in (weight, rounded * (1 + 1e-6), rounded + 100, rounded.masked_fill(rounded > 0, float("nan"))):
        with pytest.raises(ValueError, match="not on the grid"):
            encode(wrong, grid, 4, 8, False, False)
    with pytest.raises(ValueError, match="not on the grid"):
        encode(rounded, Grid(grid.scale * 2, grid.zero, grid.top), 4, 8, False, False)


# folders


def folders(
    place: Path, name: Any, quantize: QuantizeConfig, shares: tuple[float, ...], bits: tuple[int, ...],
    dtype: torch.dtype = torch.float32, change: Callable[[Any], None] = lambda model: None,
) -> dict[str, Any]:  # fmt: skip
    """Writes the dense, the sparse and the packed folder; returns what a trial of the same plan records."""
    model = (sparse_model(name, 0.0) if isinstance(name, str) else name).to(dtype)
    change(model)
    model.save_pretrained(place / "dense", max_shard_size="40KB")
    context = bench_of(model, folder=place / "dense")
    context.quantize, context.prunes = quantize, any(shares)
    plan = planned("magnitude" if context.prunes else "rtn", "uniform", shares, bits=bits)
    record = Record(context)
    context.measure(plan, [record])
    (place / "codes").mkdir()
    codes, checkpoint = Codes(place / "codes", quantize), context.checkpoint

    def weights() -> Any:
        for block in context.prune(plan, grids=True):
            for key in {linear.key: None for linear in checkpoint.linears[block.index]}:
                full = checkpoint.key(block.index, next(x for x in checkpoint.linears[block.index] if x.key == key))
                dense = checkpoint.as_saved(full, checkpoint.model.get_parameter(full).detach())
                for part, now in codes.save(checkpoint, block, key).items():
                    rounded = checkpoint.as_saved(full, block.weights[key])[part].float()
                    assert_close(now, rounded, rtol=0.01, atol=1e-6)
                    yield part, dense[part], now

    shutil.copytree(place / "dense", place / "sparse")
    found = list(weights())
    shards = Shards(place / "dense", str(checkpoint.model.base_model_prefix), whole=True)
    shards.write(place / "sparse", {name for name, _, _ in found}, iter(found))
    pack_folder(place / "sparse", place / "packed", codes=codes)
    return record.close()


CASES = [
    ("llama-tied", QuantizeConfig(group_size=8), (0.2, 0.6), (4, 4)),  # groups that the kernel has no scales for
    ("llama-tied", QuantizeConfig(group_size=-1, symmetric=True), (0.6, 0.6), (3, 3)),
    ("gpt2", QuantizeConfig(group_size=-1), (0.2, 0.6), (5, 5)),
    ("gpt2", QuantizeConfig(group_size=7), (0.6, 0.6), (8, 8)),
    ("mixtral", QuantizeConfig(group_size=16), (0.6, 0.6), (2, 2)),
    ("gpt_oss", QuantizeConfig(group_size=16), (0.6, 0.2), (6, 6)),
    ("llama", QuantizeConfig(group_size=16), (0, 0), (3, 8)),  # no zeros: every matrix is dense in memory
]


@parametrize("dtype", few([torch.float32, torch.bfloat16], [torch.float32]))
@parametrize("case", few(CASES, [CASES[0], CASES[2]]))
def test_a_folder_is_packed_loaded_saved_and_unpacked(case: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    name, quantize, shares, bits = case

    def no_zeros(model: Any) -> None:
        for key, parameter in model.named_parameters():
            parameter.data += 0.1 * ("bias" in key)

    blocks = len(bench_of(sparse_model(name, 0.0)).checkpoint.blocks)
    repeated = [(one * blocks)[:blocks] for one in (shares, bits)]
    promised = folders(tmp_path, name, quantize, *repeated, dtype, no_zeros)["quantized_bytes"]
    packed, load = tmp_path / "packed", AutoModelForCausalLM.from_pretrained
    table = json.loads((packed / "config.json").read_text())["atp_sparse"]
    entries = {**table["linears"], **table["stored"]}
    assert table["version"] == 2 and all("codes" in about for about in entries.values())
    rows = sum(prod(about["shape"]) // 8 for about in entries.values() if about["codes"]["mask"])
    assert 0 <= bytes_of(packed) - promised <= 2 * len(entries) + rows // 8 + 8 * len(entries)
    expected = logits(load(tmp_path / "sparse"))
    model = load(packed, dtype=torch.float32 if table["values"] == "int8" else dtype)
    loose = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    assert_close(logits(model).float(), expected.float(), **loose)
    kept = [module for module in model.modules() if isinstance(module, SparseLinear)]
    zeros = (1 - about["nonzeros"] / prod(about["shape"]) for about in table["linears"].values())
    assert len(kept) == sum(share >= LEAST for share in zeros) and bool(kept) == any(shares)
    assert {module.weight_values.dtype for module in kept} <= {torch.int8 if table["values"] == "int8" else dtype}
    assert torch.equal(logits(load(packed, dequantize=True, dtype=dtype)), expected)
    model.save_pretrained(tmp_path / "saved")
    if kept:
        assert torch.equal(logits(load(tmp_path / "saved")), logits(model))
    unpack_folder(packed, tmp_path / "unpacked")
    assert same_files(tmp_path / "sparse", tmp_path / "unpacked")
    if dtype == torch.float32:
        found, dense = read_by_documentation(packed), tensors_of(tmp_path / "unpacked")
        assert found.keys() == dense.keys()
        for key, tensor in dense.items():
            assert np.array_equal(found[key], tensor.numpy()), key


def read_by_documentation(folder: Path) -> Any:
    """The tensors of a packed folder by the reader in docs/formats.md."""
    text = (REPO / "docs/formats.md").read_text()
    (code,) = re.findall(r"```python\n(import json\n.*?)```", text, re.DOTALL)
    found: dict[str, Any] = {"sys": None}
    exec(code.replace("sys.argv[1]", repr(str(folder))), found)
    return found["tensors"]


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def in_groups(
    place: Path, group_size: int, symmetric: bool, bits: int, share: float = 0.6, wide: int = 96, **more: Any
) -> Any:
    """A wide tiny Llama with codes, as it is loaded."""
    config = {**ALL["llama"][1], "hidden_size": 64, "intermediate_size": wide, "head_dim": 16, **more}
    quantize = QuantizeConfig(group_size=group_size, symmetric=symmetric)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **config))
    blocks = len(model.model.layers)
    folders(place, model, quantize, (share,) * blocks, (bits,) * blocks)
    return AutoModelForCausalLM.from_pretrained(place / "packed")


@parametrize(
    ("group_size", "symmetric", "bits", "dtype"),
    [(32, False, 4, torch.int8), (-1, True, 8, torch.int8), (16, False, 4, torch.float32), (32, False, 8, None)],
)
def test_the_kernel_multiplies_by_codes(
    group_size: int, symmetric: bool, bits: int, dtype: torch.dtype | None, tmp_path: Path
) -> None:
    """As int8 values without loss where its groups and numbers allow."""
    found = in_groups(tmp_path, group_size, symmetric, bits)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dequantize=True)
    linears = {name: module for name, module in found.named_modules() if isinstance(module, SparseLinear)}
    assert len(linears) == 7 * len(found.model.layers)
    for name, linear in linears.items():
        assert torch.equal(linear.weight, dense.get_submodule(name).weight)
        if not isinstance(linear, CodedLinear):
            assert linear.weight_values.dtype == dtype or dtype is None
    ids = torch.tensor([[5, 6, 7]])
    with torch.inference_mode():
        assert_close(
            found(ids).logits, dense(ids).logits, rtol=1e-5, atol=1e-4 if kernel.multiplies_codes(64, 64) else 1e-6
        )
    found.save_pretrained(tmp_path / "saved")
    assert same_bits(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), logits(found))
    unpack_folder(tmp_path / "saved", tmp_path / "unpacked")
    assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "unpacked")), logits(found))


with_codes = pytest.mark.skipif(
    not kernel.multiplies_codes(64, 64) or torch.cuda.is_available(), reason="needs AVX-512 with VBMI, VBMI2 and VNNI"
)


@with_codes
@parametrize(
    ("share", "group_size", "symmetric", "bits", "wide"),
    [(0.6, 64, False, 4, 128), (0.0, 64, False, 3, 128), (0.6, -1, True, 8, 128), (0.3, 64, False, 5, 96)],
)
def test_codes_stay_codes_in_memory(
    share: float,
    group_size: int,
    symmetric: bool,
    bits: int,
    wide: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the bytes of the file; few tokens, and many, have the logits of the dense weights, and so after each change.

    A matrix with another number of inputs than 64 of them is expanded as on other CPUs, beside them.
    """
    found = in_groups(tmp_path, group_size, symmetric, bits, share, wide, attention_bias=True)
    packed, load = tmp_path / "packed", AutoModelForCausalLM.from_pretrained
    dense, blocks = load(packed, dequantize=True), len(found.model.layers)
    coded = {name: module for name, module in found.named_modules() if isinstance(module, CodedLinear)}
    assert len(coded) == (7 if wide == 128 else 6) * blocks
    stored = tensors_of(packed)
    for name, module in coded.items():
        assert_close(module.weight, dense.get_submodule(name).weight, rtol=0, atol=0)
        own = {f"{name}.{key}": part for key, part in module.named_parameters() if key != "bias"}
        assert all(torch.equal(part, stored[key]) and part.dtype == stored[key].dtype for key, part in own.items())
    many = torch.randint(0, 90, (1, 50))
    with torch.inference_mode():
        for ids in (many, many[:, :1], many[:, :8], many[:, :20]):
            assert_close(found(ids).logits, dense(ids).logits, rtol=1e-3, atol=1e-4)
        few = found(many[:, :3]).logits
        assert torch.equal(deepcopy(found)(many[:, :3]).logits, few)
        for model in (found, deepcopy(found)):  # a copy has not multiplied yet
            torch._dynamo.reset()
            assert_close(torch.compile(model, backend="aot_eager")(many[:, :3]).logits, few, rtol=1e-3, atol=1e-4)
    found.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved")), logits(found))
    if wide == 128:  # what was expanded is saved as that
        assert tensors_of(tmp_path / "saved").keys() == stored.keys()
    rounded = logits(dense.to(torch.bfloat16))
    for half in (load(packed, dtype=torch.bfloat16), load(packed).to(torch.bfloat16)):
        assert {m.weight_scales.dtype for m in half.modules() if isinstance(m, CodedLinear)} == {torch.float16}
        assert_close(logits(half), rounded, rtol=0.05, atol=0.05)
    graphs: list[object] = []  # one for all layers of a shape, however many

    def counted(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    apart = [torch.compile(module, backend=counted) for module in coded.values() if module.in_features == 64]
    with torch.inference_mode():
        for linear in apart:
            linear(torch.ones(1, 64))
    assert len(graphs) <= len({tuple(part.shape for part in module.parameters()) for module in coded.values()})
    name, module = next(iter(coded.items()))
    changed, x = deepcopy(module), torch.ones(1, 64)
    with torch.no_grad():
        once = changed(x) - changed(x * 0)
        changed.weight_scales.mul_(2)  # what is computed of them follows
        assert_close(changed(x) - changed(x * 0), 2 * once, rtol=1e-3, atol=1e-4)
    embedded = found.get_input_embeddings()(many[:, :3]).detach().requires_grad_()
    found(inputs_embeds=embedded).logits.square().sum().backward()
    expected = embedded.detach().clone().requires_grad_()
    load(packed, dequantize=True)(inputs_embeds=expected).logits.square().sum().backward()
    assert_close(embedded.grad, expected.grad, rtol=1e-3, atol=1e-4)
    for isa, count in {"avx2": len(coded), "portable": 0}.items():
        monkeypatch.setenv("ATP_TUNE_ISA", isa)
        other = load(packed)
        assert len([module for module in other.modules() if isinstance(module, CodedLinear)]) == count
        with torch.inference_mode():
            assert_close(other(many[:, :3]).logits, few, rtol=1e-3, atol=1e-4)


@with_codes
@parametrize("tied", [False, True])
def test_a_head_is_rounded_to_8_bits_in_memory(tied: bool, tmp_path: Path) -> None:
    """To the nearest of 255 numbers by groups of 64; embeddings stay as they are, and what is saved has it."""
    in_groups(tmp_path, 64, False, 4, wide=128, tie_word_embeddings=tied)
    packed, load = tmp_path / "packed", AutoModelForCausalLM.from_pretrained
    plain, rounded = load(packed), load(packed, int8_head=True)
    dense = plain.lm_head.weight.detach()
    assert torch.equal(rounded.model.embed_tokens.weight, plain.model.embed_tokens.weight)
    scale = (dense.abs().amax(1, keepdim=True) / 127).half().float()  # one group of 64 columns
    assert_close(rounded.lm_head.weight, (dense / scale).round().clamp(-127, 127) * scale, rtol=2e-3, atol=1e-6)
    assert 0 < (rounded.lm_head.weight - dense).abs().max() < 0.51 * scale.max()
    rounded.save_pretrained(tmp_path / "again")
    again, ids = load(tmp_path / "again"), torch.randint(0, 90, (1, 5))
    exact = load(tmp_path / "again", dequantize=True)
    assert torch.equal(exact.lm_head.weight, rounded.lm_head.weight) and not again.config.tie_word_embeddings
    with torch.inference_mode():
        assert torch.equal(again(ids).logits, rounded(ids).logits)
        assert_close(exact(ids).logits, rounded(ids).logits, rtol=1e-3, atol=1e-4)
    assert torch.equal(load(tmp_path / "again", int8_head=True).lm_head.weight, rounded.lm_head.weight)
    with pytest.raises(ValueError, match="int8_head: needs a packed language model"):
        load(packed, int8_head=True, dequantize=True)


@with_codes
def test_codes_of_a_transposed_matrix_stay(tmp_path: Path) -> None:
    """GPT-2's, which lie the other way round, with biases."""
    config = AutoConfig.for_model("gpt2", **{**ALL["gpt2"][1], "n_embd": 64, "n_head": 4})
    model = AutoModelForCausalLM.from_config(config)
    blocks = len(model.transformer.h)
    folders(tmp_path, model, QuantizeConfig(group_size=64), (0.5,) * blocks, (4,) * blocks)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dequantize=True)
    coded = {name: module for name, module in found.named_modules() if isinstance(module, CodedLinear)}
    assert len(coded) == 4 * blocks and all(module.transposed for module in coded.values())
    assert all(torch.equal(module.weight, dense.get_submodule(name).weight) for name, module in coded.items())
    assert_close(logits(found), logits(dense), rtol=1e-3, atol=1e-4)


@with_codes
@parametrize(("change", "said"), [
    (lambda f: edited(f, lambda t: form_of(t).update(bits=3)), "are no codes of|that its config says"),
    (lambda f: changed_tensor(f, CODES, lambda t: t[:-1].clone()), "that its config says"),
    (lambda f: changed_tensor(f, CODES, lambda _: None), "that its config says|has no tensor"),
    (lambda f: changed_tensor(f, SCALES, lambda t: t[:, :0].clone()), "that its config says"),
    (lambda f: changed_tensor(f, ZEROS, lambda _: None), "that its config says|has no tensor"),
    (lambda f: changed_tensor(f, BITMASK, lambda t: t ^ 1), "are no codes of"),
    (lambda f: changed_tensor(f, CODES, lambda t: t ^ 3), "codes are not 0"),
    (lambda f: changed_tensor(f, ZEROS, lambda t: t ^ 3), "codes are not 0"),
    (lambda f: edited(f, lambda t: form_of(t).update(symmetric=True)), "codes are not 0"),
])  # fmt: skip
def test_damaged_codes_that_would_stay_are_refused(change: Callable[[Path], None], said: str, tmp_path: Path) -> None:
    in_groups(tmp_path, 64, False, 4, 0.6, 128)
    change(tmp_path / "packed")
    with pytest.raises(ValueError, match=said):
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed")


def form_of(table: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = first(table)["codes"]
    return found


DAMAGED: list[tuple[str, Callable[[Path], None], str]] = [
    ("version", lambda f: edited(f, lambda t: t["atp_sparse"].update(version=3)), "of version 1 or 2"),
    ("bits", lambda f: edited(f, lambda t: form_of(t).update(bits=3)), "are not .* of 3 bits"),
    ("9 bits", lambda f: edited(f, lambda t: form_of(t).update(bits=9)), "is damaged"),
    ("a word", lambda f: edited(f, lambda t: form_of(t).update(group_size="8")), "is damaged"),
    ("no exponent", lambda f: edited(f, lambda t: form_of(t).pop("exponent")), "is damaged"),
    ("groups", lambda f: edited(f, lambda t: form_of(t).update(group_size=5)), "scales .* are not of"),
    ("count", lambda f: edited(f, lambda t: first(t).update(nonzeros=5)), "are not 5 of"),
    ("cut codes", lambda f: changed_tensor(f, CODES, lambda t: t[:-1].clone()), "codes .* are not"),
    ("no codes", lambda f: changed_tensor(f, CODES, lambda _: None), "has no tensor"),
    ("no scales", lambda f: changed_tensor(f, SCALES, lambda _: None), "has no tensor"),
    ("scales", lambda f: changed_tensor(f, SCALES, lambda t: t.float()), "scales .* are not of"),
    ("no zeros", lambda f: changed_tensor(f, ZEROS, lambda _: None), "has no tensor"),
    ("zeros", lambda f: changed_tensor(f, ZEROS, lambda t: t[1:].clone()), "codes .* are not"),
    ("mask", lambda f: changed_tensor(f, BITMASK, lambda t: t ^ 1), "but the bitmask has|codes are not 0"),
]


@pytest.fixture(scope="module")
def coded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("coded")
    blocks = len(sparse_model("llama-tied").model.layers)
    folders(place, "llama-tied", QuantizeConfig(group_size=8), (0.6,) * blocks, (4,) * blocks)
    return place / "packed"


@parametrize(("change", "said"), [row[1:] for row in DAMAGED], ids=[row[0] for row in DAMAGED])
def test_a_damaged_folder_is_refused(change: Callable[[Path], None], said: str, coded: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(coded, tmp_path / "packed"))
    change(folder)
    with pytest.raises(ValueError, match=said):
        AutoModelForCausalLM.from_pretrained(folder)
    with refused(said):
        unpack_folder(folder, tmp_path / "unpacked")


def test_what_no_group_of_the_disk_has_is_refused() -> None:
    """Matrices whose inputs lie in another order there, and experts of one tensor with different bits."""
    quantize, quantizer = QuantizeConfig(group_size=4), QUANTIZERS["rtn"](4, False, DAMPING)
    weight, _ = problem((6, 10))
    rounded, grid = quantizer.quantize(weight, 3, None), quantizer.grid(weight, 3)
    scales, zeros = (spread(part, 4, 10) for part in (grid.scale, grid.zero))
    saved = [rounded, scales, zeros, torch.full((6, 10), 3.0)]
    assert_close(_encoded(saved, quantize, False).decoded(), rounded, rtol=STEP, atol=0)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="lie in another order"):
        _encoded([part[:, order] for part in saved], quantize, False)
    saved[3][0] = 4
    with pytest.raises(ValueError, match="different numbers of bits"):
        _encoded(saved, quantize, False)
