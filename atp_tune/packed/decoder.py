"""All blocks of a decoder for its next token in one call of the kernel, in the place of transformers' Python.

`attach` puts a `Decoder` before the forward of a packed model. Where blocks are like Llama's (RMS norms, rotary
positions, heads that share keys and values, a gated SiLU) it computes the next token of up to 8 texts: on the CPU, with
a `DynamicCache`, without a gradient. All else goes to the forward of the family, and so do models which are not shown
to be equal to it, each block on made-up states, and all of them on the first token that is asked for.
"""

import ctypes
import weakref
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import logging

from atp_tune.packed import kernel

logger = logging.get_logger(__name__)
PRODUCTS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip
NORMS = ("input_layernorm", "self_attn.q_norm", "self_attn.k_norm", "post_attention_layernorm")
CHILDREN = {"", "self_attn", "mlp", "mlp.act_fn", *PRODUCTS, *NORMS}  # what a block may consist of
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"
KNOWN = ("input_ids", "attention_mask", "position_ids", CACHE, "use_cache", "cache_position")  # words of a call
ROOM = 256  # positions by which room for keys and values grows
MADE_UP = 4  # tokens that a block is shown to be equal on
# How far states may be from transformers' own, of their size. Products with codes round x to 16 bits, and in bfloat16
# transformers rounds whatever it computes.
CLOSE, CLOSE_IN = 1e-3, {torch.float32: 1e-2, torch.bfloat16: 0.1}  # what a block adds, in float32; states after all


class _Layer(ctypes.Structure):
    """`struct layer` of kernel_decoder.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in (*PRODUCTS, *NORMS, "keys", "values")),
        ("room", ctypes.c_int64),
    )


class _Decoder(ctypes.Structure):
    """`struct decoder` of kernel_decoder.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("layers", "norm", "parallel", "team")),
        *((name, ctypes.c_int64) for name in ("count", "width", "heads", "shared", "size", "inner")),
        ("epsilon", ctypes.c_float), ("scaling", ctypes.c_float), ("type", ctypes.c_int32), ("isa", ctypes.c_int32),
    )  # fmt: skip


class Blocks:
    """Blocks of a model for the kernel, which reads weights and norms where they are; `norm` comes behind them.

    dtype: of states, norms, keys and values. Errors: ValueError.
    """

    def __init__(self, layers: list[Any], norm: Any, dtype: torch.dtype) -> None:
        variant = kernel.kernel_name() or ""
        self._loaded: Any = kernel.library()
        if variant not in kernel.FASTER or dtype not in kernel.DENSE:
            raise ValueError(f"there are no loops for {dtype} on this CPU")
        parts = [dict(layer.named_modules()) for layer in layers]
        if unlike := {name for each in parts for name in each.keys() ^ CHILDREN} - {*NORMS[1:3]}:
            raise ValueError(f"its blocks are not like Llama's: {min(unlike)}")
        self.roots, self.dtype = [*layers, *([] if norm is None else [norm])], dtype
        self._every = [module for root in self.roots for module in root.modules()]
        self.own = [vars(module) for module in self._every]
        self._packed = [module for module in self._every if hasattr(module, "_of_kernel")]
        self._norms = [module for module in self._every if hasattr(module, "variance_epsilon")]
        self._attentions = [layer.self_attn for layer in layers]
        self._table, self._weights = (_Layer * len(layers))(), list[kernel.Weight]()
        for row, each in zip(self._table, parts, strict=True):
            for name in PRODUCTS:
                setattr(row, name, self._product(each[name]))
            for name in NORMS:
                setattr(row, name, self._norm(each.get(name)))
        shapes = [(weight.rows, weight.columns) for weight in self._weights]
        (heads, width), (shared, _), *_, (_, inner) = shapes[: len(PRODUCTS)]
        size = layers[0].self_attn.head_dim
        whole = [(heads, width), (shared, width), (shared, width), (width, heads)]
        whole += [(inner, width), (inner, width), (width, inner)]
        if shapes != whole * len(layers) or shared % size or heads % shared:
            raise ValueError(f"its blocks of width {width} with heads of {size} do not fit")
        self.places = self.now()
        (epsilon,), (scaling,) = ({*each} for each in self.places[-2:])  # ValueError if blocks differ
        self.fields = _Decoder(
            None, self._norm(norm), kernel.parallel(), kernel.parallel("omp_get_num_threads"),
            len(layers), width, heads // size, shared // size, size, inner,
            epsilon, scaling, kernel.FLOATS[dtype], kernel.VARIANTS[variant],
        )  # fmt: skip

    def _product(self, linear: Any) -> int:
        """The address of a weight for the kernel."""
        if hasattr(linear, "_of_kernel"):
            weight = getattr(linear._of_kernel(torch.empty(0, dtype=self.dtype)), "weight", None)
        else:
            weight = kernel.dense_weight(linear.weight, linear.bias, self.dtype)
        if weight is None:
            raise ValueError(f"the kernel has no product for {linear}")
        self._weights.append(weight)
        return ctypes.addressof(weight)

    def _norm(self, norm: Any) -> int | None:
        weight = norm and norm.weight
        if weight is not None and not (weight.is_cpu and weight.dtype == self.dtype and weight.is_contiguous()):
            raise ValueError(f"a norm is not of {self.dtype}")
        return kernel.address(weight)

    def now(self) -> tuple[list[Any], ...]:
        """State that the addresses hold for: modules and their code, the kernel's matrices, tensors and versions."""
        parts = (part for own in self.own for part in own["_parameters"].values())
        changing = [part for module in self._packed for part in module._parameters.values()]
        return (
            [child for own in self.own for child in own["_modules"].values()],
            [type(module).forward for module in self._every],
            [module._matrix for module in self._packed],  # held: they have what they computed of the tensors
            [*map(kernel.address, parts)],
            [None if part is None or part.is_inference() else part._version for part in changing],
            [module.variance_epsilon for module in self._norms],
            [module.scaling for module in self._attentions],
        )

    def next(self, x: Tensor, turn: tuple[Tensor, ...], seen: Tensor | None, past: Any) -> Tensor | None:
        """States [texts, 1, width] behind the blocks of x [texts, 1, width]; its keys and values join those of `past`.

        turn: cosines and sines [1 or texts, 1, size] of its positions; seen: bool [texts, positions with this], or None
        if all are. None if `past` is not for it, or x is not finite.
        """
        texts, length, shared, size = len(x), past.get_seq_length(), self.fields.shared, self.fields.size
        shape, table = (texts, shared, length, size), type(self._table).from_buffer_copy(self._table)  # of this thread
        cosines, sines = (part.expand(texts, -1, -1).contiguous() for part in turn)
        kept = [layer for layer in past.layers if type(layer) is DynamicLayer and layer.is_initialized]
        tensors: list[Any] = [part for layer in kept for part in (layer.keys, layer.values)]
        fits = (
            len(kept) == len(past.layers) == len(table)
            and cosines.shape == sines.shape == (texts, 1, size)
            and all(part.shape == shape for part in tensors)
        )
        if not fits or {self.dtype} != {part.dtype for part in (*tensors, cosines, sines, x)}:
            return None
        for row, layer in zip(table, past.layers, strict=True):
            keys, values = _with_room(layer)
            row.keys, row.values, row.room = keys.data_ptr(), values.data_ptr(), keys.shape[2]
        y, places = x.new_empty(x.shape), (x.contiguous(), cosines, sines, seen)
        fields, loaded = _Decoder.from_buffer_copy(self.fields), self._loaded
        fields.layers = ctypes.addressof(table)
        addresses = ctypes.addressof(fields), *map(kernel.address, places)
        if not kernel.succeed(loaded.atp_decode(*addresses, length, texts, y.data_ptr(), torch.get_num_threads())):
            return None
        for layer in past.layers:
            buffers = layer.atp_room[3:]
            layer.keys, layer.values = (buffer.narrow(2, 0, length + 1) for buffer in buffers)
            layer.atp_room = id(layer), layer.keys, layer.values, *buffers
        return y


def _with_room(layer: Any) -> tuple[Tensor, Tensor]:
    """Keys and values [texts, shared, room, size] of a layer of a cache, with room for one more at least.

    They are those that the layer's own are views of, or, if those are new, shared or fill them, copies.
    """
    owner, keys, values, *buffers = getattr(layer, "atp_room", (None,) * 3)
    length = layer.keys.shape[2]
    own = owner == id(layer) and keys is layer.keys and values is layer.values
    if not own or length == buffers[0].shape[2]:
        texts, shared, _, size = layer.keys.shape
        buffers = [layer.keys.new_empty(texts, shared, (length // ROOM + 2) * ROOM, size) for _ in range(2)]
        for buffer, part in zip(buffers, (layer.keys, layer.values), strict=True):
            buffer[:, :, :length] = part
        layer.atp_room = id(layer), layer.keys, layer.values, *buffers
    return buffers[0], buffers[1]


class Decoder:
    """In the place of a model's forward: by the kernel where it has that, else by the forward of the model's class."""

    def __init__(self, model: Any) -> None:
        self._model = weakref.ref(model)  # or it would be freed late
        self._blocks: Blocks | None = None
        self._unlike = ""  # why the family's forward computes all

    @property
    def model(self) -> Any:
        """The model; it has this as its forward."""
        return self._model()

    def __getstate__(self) -> Any:
        return self.model  # no addresses, which a copy does not share

    __setstate__ = __init__

    def __call__(self, *args: Any, **words: Any) -> Any:
        """Returns what the model's forward returns."""
        states = None if args or not self.may_take(words) else self._next(words)
        if states is None:
            return type(self.model).forward(self.model, *args, **words)
        return BaseModelOutputWithPast(last_hidden_state=states, **{CACHE: words[CACHE]})

    def may_take(self, words: dict[str, Any]) -> bool:
        """Whether a call is for one more token of a few texts, and nothing else is asked for, nor sees it."""
        ids, mask, config = words.get("input_ids"), words.get("attention_mask"), self.model.config
        if not isinstance(ids, Tensor) or not (mask is None or isinstance(mask, Tensor)):
            return False
        return (
            ids.dim() == 2
            and ids.shape[1] == 1
            and 0 < len(ids) <= kernel.BATCH
            and not (torch.is_grad_enabled() or self.model.training or torch.is_autocast_enabled("cpu"))
            and type(words.get(CACHE)) is DynamicCache
            and False not in (words.get("use_cache"), words.get("return_dict"))
            and not (config.output_attentions or config.output_hidden_states)
            and all(value is None or value is False for name, value in words.items() if name not in KNOWN)
            and not kernel.watched(ids)
            and not nn.modules.module._has_any_global_hook()  # type: ignore[no-untyped-call]
        )

    def _next(self, words: Any) -> Tensor | None:
        """States [texts, 1, width] behind the norm; None where the family's forward is to give them."""
        model, config, blocks = self.model, self.model.config, self._blocks
        ids, mask, places, past = map(words.get, KNOWN[:4])
        if self._unlike:
            return None
        layers = [*model.layers._modules.values()][: config.num_hidden_layers]
        try:
            if blocks is None or blocks.roots != [*layers, model.norm] or blocks.now() != blocks.places:
                kinds, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
                if {*(kinds or ())} - {"full_attention"} or (window is not None and not kinds):
                    raise ValueError("it attends to a window")  # beyond which a block computes something else
                blocks, self._blocks = Blocks(layers, model.norm, model.embed_tokens.weight.dtype), None
            # Modules may have hooks, or a forward of their own as accelerate gives.
            hooked = (own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own for own in blocks.own)
            if any(hooked) or config._attn_implementation not in ("eager", "sdpa"):
                return None
            # What the family's forward makes of its inputs.
            x, length = model.embed_tokens(ids), past.get_seq_length()
            seen = None if mask is None else mask.bool().contiguous()
            if seen is not None and (seen.shape != (len(x), length + 1) or not seen[:, -1].all()):
                return None
            seen = None if seen is None or seen.all() else seen
            turn = model.rotary_emb(x, position_ids=torch.full((1, 1), length) if places is None else places)
            if self._blocks is None:  # it is to be shown that they are equal
                ours = blocks.next(x, turn, seen, deepcopy(past))
                if ours is None or not ours.isfinite().all():
                    return None
                for number, layer in enumerate(layers):
                    _show_equal(model, layer, number)
                theirs = type(model).forward(model, **{**words, CACHE: deepcopy(past)}).last_hidden_state
                _compare("its states", ours, theirs, 0, CLOSE_IN[blocks.dtype])
                self._blocks = blocks
        except (AttributeError, TypeError, ValueError, RuntimeError) as error:
            self._unlike = f"packed weights: transformers computes what is between the products ({error})"
            logger.info(self._unlike)  # in the middle of an answer, so no warning
            return None
        return blocks.next(x, turn, seen, past)


def _show_equal(model: Any, layer: Any, number: int) -> None:
    """ValueError unless a block gives what the family's own does, in float32, for tokens far from each other."""
    # A copy in float32; packed weights, which take an x of any type, are shared.
    own = deepcopy(layer, {id(module): module for module in layer.modules() if hasattr(module, "_of_kernel")})
    for module in own.modules():
        if not hasattr(module, "_of_kernel"):
            for part in module.parameters(recurse=False):
                part.data = part.float()
    positions = torch.linspace(0, model.config.max_position_embeddings - 1, MADE_UP).long()[None]
    x = model.embed_tokens.weight[None, :MADE_UP].float()
    turn = deepcopy(model.rotary_emb)(x, position_ids=positions)
    theirs = own(x, attention_mask=None, position_ids=positions, position_embeddings=turn)
    blocks = Blocks([own], None, torch.float32)
    empty = x.new_empty(1, blocks.fields.shared, 0, blocks.fields.size)
    past = DynamicCache([(empty, empty)])
    for at in range(MADE_UP):
        ours = blocks.next(x[:, at : at + 1], tuple(part[:, at : at + 1] for part in turn), None, past)
    _compare(f"block {number}", ours, theirs[:, -1:], x[:, -1:], CLOSE)


def _compare(what: str, ours: Tensor | None, theirs: Tensor, before: Tensor | float, close: float) -> None:
    """ValueError unless what was added to the states is the same but for a share of it."""
    if ours is None or not (ours - theirs).norm() <= close * (theirs - before).norm():
        raise ValueError(f"{what} would differ from it")


def attach(model: nn.Module) -> None:
    """Puts a `Decoder` before the forward of each model that has embeddings, blocks, a norm and rotary positions."""
    for module in model.modules():
        if module._modules.keys() == {"embed_tokens", "layers", "norm", "rotary_emb"}:
            module.forward = Decoder(module)


def round_head(model: Any, kind: Any, model_type: str) -> None:
    """Rounds the head of a packed model to 8 bits in memory; embeddings that it shares weights with keep theirs.

    kind: of the linear, which is a class of the folder's own file. Errors: ValueError where it cannot be so.
    """
    from atp_tune.packed.layout import in_16_bits

    head, table = model.get_output_embeddings(), getattr(model.config, model_type, {})
    if isinstance(head, kind):
        return
    fits = "stored" in table and isinstance(head, nn.Linear) and not torch.cuda.is_available()
    if not fits or not kernel.multiplies_codes(head.in_features, kernel.BLOCK):
        raise ValueError("int8_head: needs a packed language model, products with codes (AVX-512 VBMI or AVX2), no GPU")
    # The nearest of 255 numbers, whose largest is that of kernel.BLOCK columns.
    groups = head.weight.detach().float().view(head.out_features, -1, kernel.BLOCK)
    largest = groups.abs().amax(-1)
    scales, exponent = in_16_bits(largest / 127, largest > 0)
    steps = scales.float() * 2.0**exponent
    codes = (groups / steps.unsqueeze(-1)).nan_to_num_(0).round_().clamp_(-127, 127).to(torch.int8)
    form = {"bits": 8, "group_size": kernel.BLOCK, "symmetric": True, "mask": False, "exponent": exponent}
    about = {"shape": [*head.weight.shape], "nonzeros": int(codes.count_nonzero()), "codes": form}
    linear = kind(head, about)
    linear.weight_codes = nn.Parameter(codes.view(torch.uint8).flatten() ^ 128, False)
    linear.weight_scales, linear.bias = nn.Parameter(scales, False), head.bias
    # A model that is saved has it.
    name = next(name for name, module in model.named_modules() if module is head)
    model.set_submodule(name, linear)
    linears = {**table["linears"], f"{name}.weight": about}
    setattr(model.config, model_type, {**table, "version": 2, "linears": linears})
    model.config.tie_word_embeddings = False
