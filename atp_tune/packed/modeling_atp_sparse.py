"""Loads a packed or a slim checkpoint of atp_tune with transformers; a copy of this file lies in each such folder.

    import atp_tune                                        # or trust_remote_code=True in the call
    model = AutoModelForCausalLM.from_pretrained("DIR")    # of a packed one dequantize=True: with dense weights

A packed linear keeps its nonzero weights and one bit for each weight. It multiplies by atp_tune's kernel where that is
installed, and by torch elsewhere. Weights that were rounded to few bits lie in the files as codes of so many bits. Its
weights have a variant of their own, `model.packed*.safetensors`.

A slim model is a model of its family whose blocks have lost channels: some of its linears are narrower, and each block
has widths of its own. All linears are dense, so every device and library multiplies by them fast.

Both configs have a model type of their own, so that nothing loads the folder without this file; a quantizer of
transformers is skipped with a warning where it is not registered. Format: docs/formats.md of atp_tune.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, GenerationConfig, PretrainedConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.auto import modeling_auto
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

try:
    from atp_tune.packed import kernel

    kernel.check_interface(8)
    from atp_tune.packed import decoder, gpu
except ImportError as error:  # a folder is loaded where atp_tune, or a version that fits this file, is not installed
    kernel, MISSING = None, str(error)  # type: ignore[assignment]
else:
    MISSING = "it was not compiled here"

DTYPES = {"bf16": torch.bfloat16, "int8": torch.int8}  # of values that are rounded, whatever the model's own is
logger = logging.get_logger(__name__)
SLOW = f"packed weights: torch multiplies, slowly, without the kernel of atp-tune ({MISSING})"
TILE = 4 << 20  # bytes of unpacked rows: 3.4 ms for a weight of 46 MB, of which the allocation alone takes 30 if whole
GROUP = 32  # columns that every group of scales has a multiple of
LEAST = 0.45  # share of zeros from which a packed matrix is smaller, and no slower

MODEL_TYPE, SLIM = "atp_sparse", "atp_slim"  # of the config, and the name of its table
VERSION, WITH_CODES = 1, 2  # of the format; the second of folders that have codes
LANGUAGE = "AutoModelForCausalLM"  # the class, a key of the table, if that has none
STD = 0.02  # of random weights
VARIANT = "packed"
WEIGHTS, INDEX = "model.packed.safetensors", "model.safetensors.index.packed.json"
AUTO_CLASSES = {
    "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING,
    "AutoModelForImageTextToText": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    "AutoModelForImageClassification": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
}
PARTS = VALUES, BITMASK, SCALES, CODES, ZEROS = "_values", "_bitmask", "_scales", "_codes", "_zeros"  # ends of names
Table = dict[str, Any]  # of a config, or of a part of it
Get = Callable[[str], Tensor | None]  # a tensor of files by its name, if they have it
_HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def unpack(values: Tensor, bitmask: Tensor, columns: int, scales: Tensor | None = None) -> Tensor:
    """The dense tensor [..., columns] of a packed one.

    values [nonzeros], row by row; bitmask uint8 [..., ⌈columns/8⌉], the lowest bit first; scales [..., groups] of int8
    values, each for columns/groups columns. Errors: ValueError if they disagree, but not in a graph, which cannot look.
    """
    in_graph = _is_graph()
    kept = _bits(bitmask)[..., :columns] if in_graph else kept_by(bitmask, columns, values.numel())
    if values.dim() != 1:
        raise ValueError(f"packed weight: values {list(values.shape)} are no list")
    if scales is None:
        return torch.zeros(kept.shape, dtype=values.dtype, device=values.device).masked_scatter_(kept, values)
    if not in_graph and (scales.shape[:-1] != kept.shape[:-1] or not scales.shape[-1] or columns % scales.shape[-1]):
        raise ValueError(f"packed weight: scales {list(scales.shape)} are not of {list(kept.shape)} weights")
    codes = torch.zeros(kept.shape, dtype=scales.dtype, device=values.device)
    codes.masked_scatter_(kept, values.to(scales.dtype))
    return (codes.view(*scales.shape, -1) * scales.unsqueeze(-1)).view(kept.shape)


def _is_graph() -> bool:
    """Whether a graph is being made, in which no number of a tensor is known."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]


def bitmask_of(kept: Tensor) -> Tensor:
    """The bits of a mask [..., columns], uint8 [..., ⌈columns/8⌉], the lowest bit first."""
    bits = nn.functional.pad(kept, (0, -kept.shape[-1] % 8)).view(*kept.shape[:-1], -1, 8)
    return (bits * _powers(kept.device)).sum(-1, dtype=torch.uint8)


def kept_by(bitmask: Tensor, columns: int, count: int) -> Tensor:
    """The mask [..., columns] of bits; ValueError if they are not of so many columns and kept weights."""
    if bitmask.dtype != torch.uint8 or bitmask.dim() < 2 or bitmask.shape[-1] != -(-columns // 8):
        raise ValueError(f"packed weight: a bitmask {list(bitmask.shape)} {bitmask.dtype} is not of {columns} columns")
    kept = _bits(bitmask)
    if int(kept.sum()) != count or bool(kept[..., columns:].any()):
        raise ValueError(
            f"packed weight: {count} values of {columns} columns, but the bitmask has {int(kept.sum())} bits"
        )
    return kept[..., :columns]


def _bits(bitmask: Tensor) -> Tensor:
    return (bitmask.unsqueeze(-1) & _powers(bitmask.device)).ne(0).flatten(-2)


def _powers(device: torch.device) -> Tensor:
    """The values of the bits of a byte, [8] uint8; by operations that ONNX has too."""
    return 2 ** torch.arange(8, dtype=torch.uint8, device=device)


def unpack_codes(packed: Tensor, code_bits: int, count: int) -> Tensor:
    """`count` codes of `code_bits` ≤ 8 bits each, int16; packed uint8 [⌈count·code_bits/8⌉], the lowest bit first.

    Errors: ValueError if there are more or fewer.
    """
    if packed.dtype != torch.uint8 or not (_is_graph() or packed.shape == (-(-count * code_bits // 8),)):
        raise ValueError(
            f"packed weight: codes {list(packed.shape)} {packed.dtype} are not {count} of {code_bits} bits"
        )
    eights = -(-count // 8)  # 8 codes take `code_bits` bytes
    octets = (
        nn.functional.pad(packed, (0, eights * code_bits - -(-count * code_bits // 8))).view(eights, code_bits).short()
    )
    codes = torch.empty(eights, 8, dtype=torch.int16, device=packed.device)
    for index in range(8):
        first, shift = divmod(index * code_bits, 8)
        word = octets[:, first] | octets[:, first + 1] << 8 if shift + code_bits > 8 else octets[:, first]
        codes[:, index] = word >> shift & 2**code_bits - 1
    return codes.flatten()[:count]


def read_codes(get: Get, name: str, about: Table) -> tuple[Tensor, Tensor]:
    """Integers k = q - z of codes q, int16 [..., rows, columns], 0 where none is kept, and a scale of each, float32.

    get: gives its parts by name; about: its entry in the table of a config. Errors: ValueError if a part is missing, or
    if they disagree, but not in a graph, which cannot look.
    """
    form, (*rows, columns) = about["codes"], _packed_shape(about)
    count = about["nonzeros"] if form["mask"] else prod(about["shape"])
    size = columns if form["group_size"] == -1 else form["group_size"]
    codes, scales = unpack_codes(_part(get, name + CODES), form["bits"], count), _part(get, name + SCALES)
    groups = [*rows, -(-columns // size)]
    if not _is_graph() and (scales.dtype != torch.float16 or [*scales.shape] != groups):
        raise ValueError(f"packed weight: scales {list(scales.shape)} are not of {about['shape']} weights")
    zeros = zero_points(None if form["symmetric"] else _part(get, name + ZEROS), form["bits"], *groups)
    zeros, scales = (part.repeat_interleave(size, -1)[..., :columns] for part in (zeros, scales))
    if form["mask"]:
        mask, integers = _part(get, name + BITMASK), zeros.clone()
        integers.masked_scatter_(_bits(mask)[..., :columns] if _is_graph() else kept_by(mask, columns, count), codes)
    else:
        integers = codes.view(zeros.shape)
    integers = integers - zeros
    if not _is_graph() and int(integers.count_nonzero()) != about["nonzeros"]:
        raise ValueError(f"packed weight: {int(integers.count_nonzero())} codes are not 0, not {about['nonzeros']}")
    return integers, scales.float() * 2.0 ** form["exponent"]


def zero_points(zeros: Tensor | None, bits: int, *shape: int) -> Tensor:
    """The zero point of each group, int16, in the shape of the scales; those of symmetric codes are not stored."""
    if zeros is None:
        return torch.full(shape, 2 ** (bits - 1), dtype=torch.int16)
    return unpack_codes(zeros, bits, prod(shape)).view(shape)


def _part(get: Get, name: str) -> Tensor:
    tensor = get(name)
    if tensor is None:
        raise ValueError(f"packed folder: it has no tensor {name}")
    return tensor


def _packed_shape(about: Table) -> list[int]:
    """The shape of a packed tensor in its file; `transposed`: the last two sides are exchanged there."""
    *more, rows, columns = about["shape"]
    return [*more, columns, rows] if about.get("transposed") else [*more, rows, columns]


def read_packed(get: Get, name: str, about: Table) -> Tensor:
    """A packed tensor, dense, by its entry in the table of a config; a `Conv1D`'s is packed transposed.

    `get` gives its parts by name. ValueError if one is missing. One of codes is float32.
    """
    if "codes" in about:
        codes, scales = read_codes(get, name, about)
        dense = codes * scales
    else:
        shape = _packed_shape(about)
        dense = unpack(_part(get, name + VALUES), _part(get, name + BITMASK), shape[-1], get(name + SCALES))
        if [*dense.shape] != shape:
            raise ValueError(f"packed weight: has the shape {list(dense.shape)}, not {about['shape']}")
    return dense.mT.contiguous() if about.get("transposed") else dense


def _expanded(get: Get, name: str, about: Table, table: Table) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors in memory of a linear whose file has codes: int8 values are the integers, others weights."""
    codes, scales = read_codes(get, name, about)
    kept = codes != 0
    yield name + BITMASK, bitmask_of(kept)
    if table["values"] != "int8":
        yield name + VALUES, (codes * scales)[kept]
        return
    columns = codes.shape[-1] // groups_of(codes.shape[-1], table["group_size"])
    values, groups = codes[kept].to(torch.int8), scales[..., ::columns].contiguous()
    if not torch.equal(values.short(), codes[kept]) or not torch.equal(groups.repeat_interleave(columns, -1), scales):
        raise ValueError(f"packed folder: {name} cannot be kept as int8 values with scales of {columns} columns")
    yield name + VALUES, values
    yield name + SCALES, groups


def checked_table(config: Table, model_type: str = MODEL_TYPE) -> Table:
    """The table of packed tensors, or of narrower linears, in a `config.json`; ValueError if it is damaged."""
    form, table = FORMS[model_type], config.get(model_type)
    if not isinstance(table, dict) or table.get("version") not in form.versions:
        versions = " or ".join(map(str, form.versions))
        raise ValueError(f"{form.said}: its config has no table {model_type} of version {versions}")
    usual = {"values": "same", "class": LANGUAGE} if model_type == SLIM else {}  # keys of packed tables alone
    table = usual | table
    right = table.get("values") in ("same", *DTYPES) and type(table.get("group_size")) in (int, type(None))
    for part in (table.get(key) for key in form.parts):
        right = right and isinstance(part, dict) and all(map(form.is_entry, part.values()))
    family, auto = table.get("family"), table.get("class")
    if not right or not isinstance(auto, str) or auto not in AUTO_CLASSES:
        raise ValueError(f"{form.said}: the table {model_type} in its config is damaged")
    kind: Any = CONFIG_MAPPING[family] if isinstance(family, str) and family in CONFIG_MAPPING else None
    if kind not in AUTO_CLASSES[auto]:
        raise ValueError(f"{form.said}: transformers {transformers.__version__} has no models {family}")
    return table


def _is_shape(shape: Any) -> bool:
    """Whether it is a list of two sides or more, all numbers above 0."""
    return isinstance(shape, list) and len(shape) > 1 and all(type(side) is int and side > 0 for side in shape)


def _is_entry(about: Any) -> bool:
    """Whether shape and number of nonzeros of a packed tensor are numbers."""
    shape = about.get("shape") if isinstance(about, dict) else None
    return (
        _is_shape(shape)
        and type(about.get("nonzeros")) is int
        and about["nonzeros"] >= 0
        and ("codes" not in about or _is_form(about["codes"]))
    )


def _is_form(form: Any) -> bool:
    """Whether it says how codes lie in a file."""
    kinds = {"symmetric": bool, "mask": bool, "bits": int, "group_size": int, "exponent": int}
    if not isinstance(form, dict) or any(type(form.get(key)) is not kind for key, kind in kinds.items()):
        return False
    size = form["group_size"]
    return form["bits"] in range(2, 9) and (size == -1 or size > 0) and form["exponent"] in range(-149, 128)


class SparseLinear(nn.Module):
    """y = x Wᵀ + b with a packed W [out, in]; stands in the place of an `nn.Linear` or a `Conv1D` of the family.

    values: their dtype, by default that of the linear; groups: number of scales of a row of int8 values.
    """

    weight_values: nn.Parameter
    weight_bitmask: nn.Parameter
    weight_scales: nn.Parameter | None
    bias: nn.Parameter | None
    own: tuple[str, ...] = ("weight_values", "weight_bitmask", "weight_scales", "bias")  # names of its parameters

    def __init__(self, linear: Any, nonzeros: int, values: torch.dtype | None = None, groups: int = 1) -> None:
        scales = ((_sides(linear)[0], groups), torch.float32) if values == torch.int8 else None
        kept = (nonzeros,), values or linear.weight.dtype
        self._begin(linear, nonzeros, True, weight_values=kept, weight_scales=scales)

    def _begin(
        self, linear: Any, nonzeros: int, mask: bool, **parts: tuple[tuple[int, ...], torch.dtype] | None
    ) -> None:
        """Makes the parameters, of these shapes and types, and with those of a bitmask and of the linear's bias."""
        super().__init__()
        self.transposed, self._nonzeros = isinstance(linear, Conv1D), nonzeros
        rows, columns = self.out_features, self.in_features = _sides(linear)
        parts["weight_bitmask"] = ((rows, -(-columns // 8)), torch.uint8) if mask else None
        parts["bias"] = None if linear.bias is None else ((rows,), linear.weight.dtype)
        for name in self.own:
            part = parts[name]
            frozen = part and nn.Parameter(torch.empty(part[0], dtype=part[1]), requires_grad=False)
            self.register_parameter(name, frozen)
        self._matrix: Any = None  # of the kernel, made of these tensors when it is first needed
        self._places: tuple[int | None, ...] = ()  # where they lay then
        self._offsets: Tensor | None = None  # of the rows in the values
        self.register_load_state_dict_post_hook(_look_again)  # type: ignore[no-untyped-call]

    @property
    def weight(self) -> Tensor:
        """The dense weight, unpacked each time: [out, in], of a `Conv1D` [in, out]."""
        dense = self._dense()
        return dense.T if self.transposed else dense

    def forward(self, x: Tensor) -> Tensor:
        """Multiplies x [..., in] to y [..., out], by the kernel or, where it has no product, by the unpacked weight.

        The kernel reads and writes by addresses. So torch's own operations multiply where anything follows them, as a
        tracer does, and an operator stands for the kernel in a graph that is compiled, but not in one that is exported.
        """
        compiled = torch.compiler.is_compiling() and self._offsets is not None and x.dtype != torch.float64
        compiled = compiled and not torch.compiler.is_exporting() and not kernel.has_tangents()
        matrix: Any = None if compiled else self._of_kernel(x)
        if not compiled and matrix is None:
            return nn.functional.linear(x, self._dense().to(x.dtype), self.bias)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if compiled:
            return self._in_graph(x)
        learns = torch.is_grad_enabled() and x.requires_grad  # what is before it
        y = None if learns else cast("Tensor | None", matrix.product(x.reshape(-1, self.in_features)))
        if y is not None:
            return y.view(*x.shape[:-1], self.out_features)
        # Some rows at a time are unpacked, which are multiplied while a CPU's cache holds them.
        y = x.new_empty(*x.shape[:-1], self.out_features)
        step = max(1, TILE // (self.in_features * x.element_size())) if x.is_cpu else self.out_features
        for first in range(0, self.out_features, step):
            last = min(first + step, self.out_features)
            bias = None if self.bias is None else self.bias[first:last].to(x.dtype)
            y[..., first:last] = nn.functional.linear(x, matrix.rows(first, last, x.dtype), bias)
        return y

    def _in_graph(self, x: Tensor) -> Tensor:
        """The product as an operator, for a graph that is compiled."""
        parts = (self.weight_values, self.weight_bitmask, self._offsets, self.weight_scales, self.bias)
        return cast("Tensor", torch.ops.atp_sparse.linear(x, *parts))

    def check(self) -> None:
        """ValueError if bits and values disagree."""
        if self._of_kernel(next(self.parameters())) is None:
            self._dense()

    def _of_kernel(self, x: Tensor) -> Any:
        """The weight for the kernel; None where it does not run, or must not."""
        own: Table = self._parameters  # attributes take a microsecond each
        parts = values, *_ = [own[name] if name in own else getattr(self, name) for name in self.own]
        if (kernel is not None and kernel.watched(x, *parts)) or torch.float64 in (x.dtype, values.dtype):
            return None
        places = (
            *(None if part is None else part.data_ptr() for part in parts),
            # What else is computed of them: where rows start, and zero points.
            *(None if part is None or part.is_inference() else part._version for part in parts[1:-1]),
        )
        if self._matrix is None or places != self._places:  # new, moved or changed
            device = values.device
            if not _has_kernel(device):
                return None
            matrix = self._packed(device, *(None if part is None else part.detach() for part in parts))
            if matrix is None:
                return None
            # accelerate may fetch the weights for each use, and free them
            hook = getattr(self, "_hf_hook", None)
            if hook is not None and getattr(hook, "offload", True):
                return matrix
            self._matrix, self._places, self._offsets = matrix, places, matrix.offsets
        return self._matrix

    def _packed(self, device: torch.device, values: Any, bitmask: Any, scales: Any, bias: Any) -> Any:
        """The weight for the kernel of a device, which keeps the parts; None if that has none for it."""
        kind = kernel.PackedMatrix if device.type == "cpu" else gpu.GpuMatrix
        return kind(values, bitmask, self.in_features, scales, bias)

    def _dense(self) -> Tensor:
        return unpack(self.weight_values, self.weight_bitmask, self.in_features, self.weight_scales)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Casts and moves the tensors; scales keep their type."""
        scales = None if self.weight_scales is None else self.weight_scales.detach()
        self._matrix = self._offsets = None  # keeps the former tensors
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if scales is not None and self.weight_scales is not None and self.weight_scales.dtype != scales.dtype:
            self.weight_scales.data = scales.to(self.weight_scales.device)
        if not next(self.parameters()).is_meta:
            with suppress(ValueError):  # as after `to_empty`; who uses it is told
                self._of_kernel(next(self.parameters()))  # a graph that is compiled next needs its offsets
        return self

    def __getstate__(self) -> Table:
        return {**self.__dict__, "_matrix": None}  # addresses, which a copy does not share

    def extra_repr(self) -> str:
        """The sizes of the linear, and its share of zeros."""
        zeros = 1 - self._nonzeros / (self.in_features * self.out_features)
        return f"in_features={self.in_features}, out_features={self.out_features}, zeros={zeros:.1%}"


class CodedLinear(SparseLinear):
    """y = x Wᵀ + b with W in the codes of its files; up to 24 tokens x are rounded to 16 bits, 64 columns at a time.

    about: the entry of its tensor in the table of a config, of which `keeps_codes`.
    """

    own = ("weight_codes", "weight_bitmask", "weight_scales", "weight_zeros", "bias")

    def __init__(self, linear: Any, about: Table) -> None:
        (rows, columns), form = _sides(linear), about["codes"]
        groups = 1 if form["group_size"] == -1 else -(-columns // form["group_size"])
        count, bits = about["nonzeros"] if form["mask"] else rows * columns, form["bits"]
        zeros = None if form["symmetric"] else ((-(-rows * groups * bits // 8),), torch.uint8)
        codes, scales = ((-(-count * bits // 8),), torch.uint8), ((rows, groups), torch.float16)
        self.about, parts = about, {"weight_codes": codes, "weight_scales": scales, "weight_zeros": zeros}
        self._begin(linear, about["nonzeros"], form["mask"], **parts)

    def _packed(self, device: torch.device, codes: Any, bitmask: Any, scales: Any, *others: Any) -> Any:
        zeros, bias = others
        if device.type != "cpu" or not keeps_codes(self.about) or getattr(bias, "dtype", None) == torch.float64:
            return None
        form, columns = self.about["codes"], self.in_features
        points = zero_points(zeros, form["bits"], *scales.shape).to(torch.uint8)
        matrix = kernel.CodedMatrix(codes, form["bits"], scales, points, form["exponent"], columns, bitmask, bias)
        self._blocks = (*matrix.parts[2:5], matrix.unit)
        return matrix

    def check(self) -> None:
        """ValueError if bits and codes disagree, or if another number of weights is not 0 than the table says."""
        super().check()
        if self._matrix is not None and (found := self._matrix.nonzeros()) != self._nonzeros:
            raise ValueError(f"packed weight: {found} codes are not 0, not {self._nonzeros}")

    def _in_graph(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return nn.functional.linear(x, self._dense().to(x.dtype), self.bias)
        offsets, scales, zeros, unit = self._blocks
        parts = (self.weight_codes, self.weight_bitmask, offsets, scales, zeros, self.bias)
        return cast("Tensor", torch.ops.atp_sparse.coded(x, unit, self.about["codes"]["bits"], *parts))

    def _dense(self) -> Tensor:
        if torch.jit.is_tracing() and self._matrix is not None:  # type: ignore[attr-defined, no-untyped-call]
            return cast("Tensor", self._matrix.constant())
        parts = {name.removeprefix("weight"): getattr(self, name) for name in self.own}
        codes, scales = read_codes(parts.get, "", self.about)
        return codes * scales


def keeps_codes(about: Table) -> bool:
    """Whether a linear stays in memory as the codes of its files: this CPU's kernel has them, and there is no GPU."""
    may = kernel is not None and "codes" in about and not torch.cuda.is_available()
    return may and kernel.multiplies_codes(_packed_shape(about)[-1], about["codes"]["group_size"])


def _sides(linear: Any) -> tuple[int, int]:
    """Outputs and inputs of a linear or a `Conv1D`."""
    rows, columns = reversed(linear.weight.shape) if isinstance(linear, Conv1D) else linear.weight.shape
    return rows, columns


class DenseLinear(nn.Linear):
    """An `nn.Linear` of a packed model, such as its head: few tokens by the loops of atp_tune's kernel if it has any.

    Those read a weight faster than torch's. Instances are made of an `nn.Linear` by another `__class__`.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Multiplies x [..., in] to y [..., out]."""
        y = None if kernel is None else kernel.dense_linear(x, self.weight, self.bias)
        return super().forward(x) if y is None else y


def speed_dense_linears(model: nn.Module) -> None:
    """Makes a `DenseLinear` of each `nn.Linear`, in place, and has the kernel compute next tokens where it can."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = DenseLinear
    if kernel is not None:
        decoder.attach(model)


def _has_kernel(device: torch.device) -> bool:
    """Whether a kernel multiplies on this device; a line says once if it is missing."""
    if device.type not in ("cpu", "cuda"):
        return False
    if kernel is None or (device.type == "cpu" and kernel.kernel_name() is None):
        logger.warning_once(SLOW)
        return False
    return device.type == "cpu" or gpu.has_kernel(device)


def _look_again(linear: SparseLinear, _: Any) -> None:
    """Where values start in each row follows from bits that have been read anew."""
    linear._matrix = linear._offsets = None
    if not next(linear.parameters()).is_meta:
        linear.check()


def is_packable(module: Any) -> bool:
    """Whether a module multiplies by its weight and does nothing else, so that `SparseLinear` can replace it."""
    return type(module) in (nn.Linear, Conv1D) or type(module).__name__ == "FalconLinear"


def groups_of(columns: int, size: int | None) -> int:
    """Scales of a row of int8 values: one for each `size` columns, where they divide them, or one for all.

    Errors: ValueError for a size that is no multiple of `GROUP`.
    """
    if size is not None and (size < GROUP or size % GROUP):
        raise ValueError(f"a group of scales has a multiple of {GROUP} columns, not {size}")
    return columns // size if size is not None and columns % size == 0 else 1


def class_of(family: Any, auto_class: str) -> Any:
    """The model class that an auto class loads for a config's class; the first, where a family has several."""
    classes: Any = AUTO_CLASSES[auto_class][family]
    return classes[0] if isinstance(classes, tuple | list) else classes


class PackedConfig(PretrainedConfig):
    """The config of a packed folder for `AutoConfig`; `from_dict` returns that of the model's own family."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: Table, **kwargs: Any) -> Any:
        """A config of the family's class with the table of its tensors; ValueError for another format."""
        table = checked_table(config_dict, cls.model_type)
        family: Any = CONFIG_MAPPING[table["family"]]
        own = own_config(cls.model_type, family, table["class"])
        return own.from_dict({**config_dict, "model_type": table["family"]}, **kwargs)


class SlimConfig(PackedConfig):
    """The config of a slim folder for `AutoConfig`."""

    model_type = SLIM


class PackedModel:
    """The class that `auto_map` of a packed folder names; the subclass of the family's own class does the work."""

    config_class = PackedConfig

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """The model of the folder."""
        config = cls.config_class.from_pretrained(path) if config is None else config
        auto = getattr(config, cls.config_class.model_type).get("class", LANGUAGE)
        return getattr(transformers, auto).from_pretrained(path, *args, config=config, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Transformers asks it of a class that comes with a folder; `own_config` registers its own."""


class SlimModel(PackedModel):
    """The class that `auto_map` of a slim folder names."""

    config_class = SlimConfig


def auto_map(model_type: str, auto_class: str = LANGUAGE) -> dict[str, str]:
    """The entry of that name in the config of a folder."""
    prefix = f"{Path(__file__).stem}.{FORMS[model_type].name}"
    return {"AutoConfig": f"{prefix}Config", auto_class: f"{prefix}Model"}


@cache
def own_config(model_type: str, family: Any, auto_class: str) -> Any:
    """A subclass of a family's config that is saved as one of a model type; its model class is registered."""

    def to_dict(self: Any) -> Table:
        names = auto_map(model_type, auto_class)
        return {**super(subclass, self).to_dict(), "model_type": model_type, "auto_map": names}

    def of_family(self: Any) -> Any:
        saved = super(subclass, self).to_dict()
        return family.from_dict({key: value for key, value in saved.items() if key not in (model_type, "auto_map")})

    reduce = _pickled(model_type, family, auto_class, False)
    methods = {"to_dict": to_dict, "of_family": of_family, "__reduce_ex__": reduce, "__module__": __name__}
    subclass: Any = type(f"{FORMS[model_type].name}{family.__name__}", (family,), methods)
    subclass.own_model = _own_model(subclass, class_of(family, auto_class), model_type, auto_class)
    getattr(transformers, auto_class).register(subclass, subclass.own_model, exist_ok=True)
    return subclass


def _class(model_type: str, family: Any, auto_class: str, is_model: bool) -> Any:
    """The class of a config, or of a model, which has no name of its own."""
    config = own_config(model_type, family, auto_class)
    return config.own_model if is_model else config


def _blank(*words: Any) -> Any:
    """An object of such a class without state, which pickle fills."""
    kind = _class(*words)
    return kind.__new__(kind)


def _pickled(*words: Any) -> Callable[[Any, Any], Any]:
    """The function by which pickle and `copy` make an object of such a class; a subclass has its own."""

    def reduce(self: Any, protocol: Any) -> Any:
        subclass = _class(*words)
        if type(self) is not subclass:
            return super(subclass, self).__reduce_ex__(protocol)
        return _blank, words, getattr(self, "__getstate__", lambda: self.__dict__)()

    return reduce


def _own_model(config_class: Any, family: Any, model_type: str, auto_class: str) -> Any:
    """A subclass of a family's model class, with packed or narrower linears."""
    form = FORMS[model_type]

    def init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        super(subclass, self).__init__(config, *args, **kwargs)
        form.prepare(self, getattr(config, model_type))

    def from_pretrained(
        cls: Any, path: Any, /, *args: Any, config: Any = None, dequantize: bool = False, **options: Any
    ) -> Any:
        """The model; with `dequantize` one of the family's class, all weights dense.

        int8_head: the head's weights are rounded to 8 bits in memory, 64 to a scale.
        Errors: ValueError if a weight is not in the files, or if bits and values of one disagree.
        """
        wanted, rounded = options.pop("output_loading_info", False), options.pop("int8_head", False)
        load = family.from_pretrained if dequantize else super(subclass, cls).from_pretrained
        model, info = _load(load, path, args, config, model_type, dequantize, options)
        _check(model, info, form.said)
        if rounded:
            if kernel is None:
                raise ValueError(f"int8_head: {SLOW}")
            decoder.round_head(model, CodedLinear, model_type)
        return (model, info) if wanted else model

    def get_dtype_plan(self: Any, dtype: torch.dtype) -> dict[str, torch.dtype]:
        plan: dict[str, torch.dtype] = super(subclass, self)._get_dtype_plan(dtype)
        table = getattr(self.config, model_type)
        kind, linears = DTYPES.get(table.get("values")), table["linears"] if model_type == MODEL_TYPE else {}
        scales = {f"{name}_scales": torch.float16 if keeps_codes(linears[name]) else torch.float32 for name in linears}
        return plan | scales | ({} if kind is None else {"weight_values": kind})

    def save_pretrained(self: Any, folder: Any, *args: Any, **options: Any) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(__file__, Path(folder) / Path(__file__).name)  # first: `push_to_hub` uploads what is there
        super(subclass, self).save_pretrained(folder, *args, **{**options, **form.variant})

    methods = {
        "__reduce_ex__": _pickled(model_type, config_class.__base__, auto_class, True),
        "__init__": init,
        "from_pretrained": classmethod(from_pretrained),
        "save_pretrained": save_pretrained,
        "config_class": config_class,
        "__module__": __name__,
        "_get_dtype_plan": get_dtype_plan,
    }
    subclass: Any = type(f"{form.name}{family.__name__}", (family,), methods)
    for key in (family.__name__, config_class.model_type):  # what transformers would look up for the family
        if (renamed := get_checkpoint_conversion_mapping(key)) is not None:
            register_checkpoint_conversion_mapping(subclass.__name__, renamed, overwrite=True)
            break
    return subclass


def _load(load: Any, path: Any, args: Any, config: Any, model_type: str, dequantize: bool, options: Table) -> Any:
    """A model and what transformers says of its weights; tensors that stay no packed linears are unpacked in memory.

    load: `from_pretrained` of the packed class, or with `dequantize` of the family's.
    """
    hub = {key: options[key] for key in _HUB if key in options}
    if not isinstance(config, PretrainedConfig):
        config = (PackedConfig if model_type == MODEL_TYPE else SlimConfig).from_pretrained(path, **hub)
    table = getattr(config, model_type)
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # `_check` says it in one line
    expanded = any("codes" in about and not keeps_codes(about) for about in table["linears"].values())
    if model_type == SLIM or not (dequantize or table["stored"] or expanded):
        return load(path, *args, **{**options, "config": config, **FORMS[model_type].variant})
    # The table of what is in memory, and so it is saved: codes are expanded, and those with few zeros dense.
    linears = {
        name: {key: value for key, value in about.items() if key != "codes" or keeps_codes(about)}
        for name, about in table["linears"].items()
        if keeps_codes(about) or "codes" not in about or about["nonzeros"] <= (1 - LEAST) * prod(about["shape"])
    }
    state = dict(_unpacked(path, hub, table, {} if dequantize else linears))
    version = WITH_CODES if any("codes" in about for about in linears.values()) else VERSION
    setattr(config, MODEL_TYPE, {**table, "version": version, "linears": linears, "stored": {}})
    given = {key: value for key, value in options.items() if key not in (*hub, "variant")}
    with suppress(OSError):  # the folder has none
        given.setdefault("generation_config", GenerationConfig.from_pretrained(path, **hub))
    return load(None, *args, **{**given, "config": config.of_family() if dequantize else config, "state_dict": state})


def _replace_linears(model: Any, table: Table) -> None:
    """Puts a `SparseLinear` in the place of each packed linear; ValueError for one that the model cannot have.

    The others are sped up.
    """
    for tensor, about in table["linears"].items():
        name = tensor.removesuffix(".weight")
        linear = _find(model, name, "packed folder")
        if not is_packable(linear) or [*linear.weight.shape] != about["shape"]:
            raise ValueError(f"packed folder: {name} is no linear of shape {about['shape']} in its model")
        words = about["nonzeros"], DTYPES.get(table["values"]), groups_of(_sides(linear)[1], table["group_size"])
        model.set_submodule(name, CodedLinear(linear, about) if keeps_codes(about) else SparseLinear(linear, *words))
    speed_dense_linears(model)


def _find(model: nn.Module, name: str, prefix: str) -> Any:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise ValueError(f"{prefix}: its model has no linear {name}") from None


def _narrow(model: nn.Module, table: Table) -> None:
    """Gives linears of a model new, random weights [out, in] of the shapes in a table; ValueError for one it lacks."""
    for name, (rows, columns) in table["linears"].items():
        linear = _find(model, name, "slim folder")
        if not isinstance(linear, nn.Linear | Conv1D):
            raise ValueError(f"slim folder: {name} is no linear in its model")
        old, bias, transposed = linear.weight, linear.bias, isinstance(linear, Conv1D)
        shape, sides = (
            ((columns, rows), ("nx", "nf")) if transposed else ((rows, columns), ("in_features", "out_features"))
        )
        if any(new > side for new, side in zip(shape, old.shape, strict=True)):
            raise ValueError(f"slim folder: {name} is wider than in its family's model")
        linear.weight = nn.Parameter(old.new_empty(shape))
        nn.init.normal_(linear.weight, std=STD)  # as of a new model; those of files are loaded after it
        if bias is not None:
            linear.bias = nn.Parameter(bias.new_zeros(rows))
        for side, length in zip(sides, (columns, rows), strict=True):
            setattr(linear, side, length)


def _check(model: nn.Module, info: Table, prefix: str) -> None:
    """ValueError for a weight that transformers did not find, and for packed linears whose bits and values disagree."""
    wrong = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
    if wrong:
        raise ValueError(f"{prefix}: its files have no {min(wrong)} of the shape that its config says")
    for name, module in model.named_modules():
        if not isinstance(module, SparseLinear):
            continue
        module.requires_grad_(False)  # transformers has made each float parameter anew
        if not next(module.parameters()).is_meta:
            try:
                module.check()
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None


@contextmanager
def tensors_in(files: Iterable[str | Path]) -> Iterator[tuple[set[str], Get]]:
    """Opens files; the names of their tensors, and what gets one of them."""
    with ExitStack() as stack:
        opened = [stack.enter_context(safe_open(file, framework="pt")) for file in files]
        by_name = {name: tensors for tensors in opened for name in tensors.keys()}  # noqa: SIM118  (no mapping)
        yield {*by_name}, lambda name: by_name[name].get_tensor(name) if name in by_name else None


def _unpacked(path: Any, hub: Table, table: Table, linears: Table) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a folder; all are unpacked but those of `linears`, which stay packed, perhaps otherwise."""
    files: Any = [cached_file(path, WEIGHTS, _raise_exceptions_for_missing_entries=False, **hub)]
    if files == [None]:
        index = cached_file(path, INDEX, **hub)
        files, _ = get_checkpoint_shard_files(path, index, **hub)
    every = {**table["stored"], **table["linears"]}
    packed = {name: about for name, about in every.items() if name not in linears}
    coded = {name: every[name] for name in linears if "codes" in every[name] and "codes" not in linears[name]}
    with tensors_in(files) as (names, get):
        for name in names - {f"{name}{end}" for name in (*packed, *coded) for end in PARTS}:
            yield name, _part(get, name)
        for name, about in coded.items():
            yield from _expanded(get, name, about, table)
        for name, about in packed.items():
            yield name, read_packed(get, name, about)


class Form(NamedTuple):
    """A model type of atp_tune: how its table is checked, and how a new model of the family is made one.

    `parts`: keys of the table that hold entries; `variant`: of the weights' files, as transformers takes it.
    """

    name: str
    versions: tuple[int, ...]
    parts: tuple[str, ...]
    is_entry: Callable[[Any], bool]
    prepare: Callable[[Any, Table], None]
    variant: dict[str, str]

    @property
    def said(self) -> str:
        """How errors call a folder of the type."""
        return f"{self.name.lower()} folder"


FORMS = {
    MODEL_TYPE: Form(
        "Packed", (VERSION, WITH_CODES), ("linears", "stored"), _is_entry, _replace_linears, {"variant": VARIANT}
    ),
    SLIM: Form("Slim", (VERSION,), ("linears",), lambda shape: _is_shape(shape) and len(shape) == 2, _narrow, {}),
}
if __name__.startswith("atp_tune."):  # the copy in a folder is named by the folder's config
    AutoConfig.register(MODEL_TYPE, PackedConfig, exist_ok=True)
    AutoConfig.register(SLIM, SlimConfig, exist_ok=True)
