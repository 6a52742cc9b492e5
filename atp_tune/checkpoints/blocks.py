"""Which class loads a folder, and what is pruned of its model: blocks, their linears, experts of a mixture.

Blocks are in one list, or in several lists in the stages of an image classifier.

Of a model that reads images beside text those of its vision tower may come before those of its language model.
Between the stages of an image classifier lie steps such as downsampling, which belong to no block and stay dense.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageClassification, AutoModelForImageTextToText
from transformers.models.auto import modeling_auto
from transformers.pytorch_utils import Conv1D

from atp_tune.checkpoints.convert import MODEL_TYPE, as_user_error
from atp_tune.checkpoints.files import SLIM, check_plain, config_in
from atp_tune.config.typed import joined
from atp_tune.errors import UserError

# --- The class of transformers that loads a folder, and the part of the model that is pruned.
#
# A folder holds a language model, a model that also reads images, or an image classifier.
#
# A model that also reads images is a language model with towers. Only the language model is pruned, measured on texts.
# The class that a folder was saved from tells which kind of model it holds, since one model type may have both.

AUTO_CLASSES = (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForImageClassification)


def auto_class(folder: Path) -> Any:
    """The auto class that loads a folder: of language models, of models that also read images, of classifiers."""
    config = config_in(folder)
    kind, names = str(config.get("model_type")), config.get("architectures")
    if kind in (MODEL_TYPE, SLIM):  # of the family that it was made from
        table = config.get(kind)
        name = table.get("class") if isinstance(table, dict) else None
        return next((each for each in AUTO_CLASSES if each.__name__ == name), AutoModelForCausalLM)
    if "auto_map" in config:
        return AutoModelForCausalLM
    if isinstance(names, list) and len(names) == 1 and names[0] in _classifiers():
        return AutoModelForImageClassification
    name = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(kind)
    reads = name is not None and (kind not in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or names == [name])
    return AutoModelForImageTextToText if reads else AutoModelForCausalLM


def model_config(folder: Path, trusted: bool) -> Any:
    """The transformers config of a folder; UserError if it cannot be read. `trusted`: code in it may run."""
    with as_user_error(f"model {folder}: transformers cannot read its config.json"):
        return AutoConfig.from_pretrained(folder, trust_remote_code=trusted, local_files_only=True)


def hidden_width(config: Any, of_images: bool) -> int:
    """Width of the hidden states of the part that is pruned; of a model with stages the largest."""
    part = getattr(config, "vision_config", config) if of_images else config.get_text_config()
    values = (getattr(part, name, 0) for name in ("hidden_sizes", "hidden_size", "embed_dim"))
    of_stages = next(filter(None, values), 0)
    return max(of_stages) if isinstance(of_stages, list | tuple) else int(of_stages)


def check_known(model: Any, highest: int, what: str) -> None:
    """UserError if the highest token of a text has no embedding, so the tokenizer is of another model."""
    count = len(model.get_input_embeddings().weight)
    if highest >= count:
        raise UserError(
            f"{what}: the tokenizer makes token {highest} of it, the model knows {count}; take the model's own"
        )


def reads_images(folder: Path) -> bool:
    """Whether transformers loads the folder as a model that also reads images."""
    return auto_class(folder) is AutoModelForImageTextToText


def _classifiers() -> set[str]:
    """Names of the classes of transformers that classify images."""
    values = modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.values()
    return {name for names in values for name in ([names] if isinstance(names, str) else names)}


def is_image_classifier(model: nn.Module) -> bool:
    """Whether a model is an image classifier of transformers."""
    return any(kind.__name__ in _classifiers() for kind in type(model).__mro__)


def classifies_images(folder: Path) -> bool:
    """Whether a folder was saved from an image classifier of transformers, or is packed or slim from such a folder."""
    return auto_class(folder) is AutoModelForImageClassification


def check_language(folder: Path, what: str) -> None:
    """UserError, which begins with `what`, if a folder holds an image classifier."""
    if classifies_images(folder):
        raise UserError(f"{what}: the model in {folder} is an image classifier, which has no text; see docs/images.md")


def language_model(model: nn.Module) -> nn.Module:
    """The part of a model that is searched for blocks: the decoder, or all of it without towers."""
    config = getattr(model, "config", None)
    find = getattr(model, "get_decoder", None)
    if config is None or find is None or config.get_text_config() is config:
        return model
    return find() or model


# --- The linears of a block, the weight matrices that are pruned.
#
# Pruned: `nn.Linear` and its subclasses, GPT-2's `Conv1D`, experts of a mixture. Dense: routers, convolutions over
# tokens, parameters of a recurrence.

OTHERS = 0.25  # largest size of other matrices, relative to the linears of a block


@dataclass(frozen=True)
class Linear:
    """A prunable weight matrix: the path of its module in the block; `transposed`: the weight is stored [in, out].

    The matrix of an expert is a slice of a 3-D tensor; its name ends in the index, `[expert]`.
    """

    name: str
    out_features: int
    in_features: int
    transposed: bool
    expert: int | None = None

    @property
    def key(self) -> str:
        """Name in the block of the tensor that holds the weight."""
        return f"{self.name}.weight" if self.expert is None else self.name.removesuffix(f"[{self.expert}]")

    @property
    def module(self) -> str:
        """Path in the block of the module that multiplies by the weight."""
        return self.key.rpartition(".")[0]

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.out_features * self.in_features

    def matrix(self, stored: Tensor) -> Tensor:
        """View [out, in] of the weight in the tensor that holds it."""
        own = stored if self.expert is None else stored[self.expert]
        return own.T if self.transposed else own


def is_state_space(name: str) -> bool:
    """Whether a linear is Mamba's Δ projection, whose weight the model may read without calling the module, so that
    its inputs are unknown.
    """
    return name.rpartition(".")[2] == "dt_proj"


def find_linears(block: nn.Module, of_images: bool = False) -> list[Linear]:
    """The prunable linears of a block, in the order of its modules.

    `of_images`: of an image classifier, whose other matrices, which are convolutions and biases by position, stay
    dense. Errors: UserError if there is none, or in a language model for a weight of an unknown kind.
    """
    if of_images:
        # Without those that make a bias of attention from positions, not from images, as SwinV2's.
        return [
            Linear(name, part.out_features, part.in_features, False)
            for name, part in block.named_modules()
            if isinstance(part, nn.Linear) and "position_bias" not in name
        ]
    experts = {name: _expert_linears(name, module) for name, module in block.named_modules() if holds_experts(module)}
    gates, prunable = find_gates(block), []
    for name, module in block.named_modules():
        if name in experts:
            prunable += experts[name]
        elif isinstance(module, nn.Linear | Conv1D) and module not in gates and not is_state_space(name):
            transposed = isinstance(module, Conv1D)
            rows, columns = module.weight.T.shape if transposed else module.weight.shape
            prunable.append(Linear(name, rows, columns, transposed))
    check_plain(block, (linear.key for linear in prunable))
    if not prunable:
        raise UserError(f"model block {type(block).__name__}: has no linear that can be pruned")
    # UserError if matrices outside the linears hold more than `OTHERS`: the block would be denser than reported.
    known = {linear.key for linear in prunable} | {
        f"{name}.weight" for name, module in block.named_modules() if module in gates
    }
    others = {
        name: parameter.numel()
        for name, parameter in block.named_parameters()
        if name not in known
        and sum(size > 1 for size in parameter.shape) > 1
        and not is_state_space(name.rpartition(".")[0])
    }
    if sum(others.values()) > OTHERS * sum(linear.size for linear in prunable):
        name = max(others, key=others.__getitem__)
        kind = type(block.get_submodule(name.rpartition(".")[0])).__name__
        raise UserError(f"model module {kind}: {name.rpartition('.')[2]} is a matrix in a form that is not known")
    return prunable


def _expert_linears(path: str, module: nn.Module) -> list[Linear]:
    linears = []
    for weight in expert_weights(module):
        experts, *shape = getattr(module, weight).shape
        rows, columns = shape[::-1] if module.is_transposed else shape
        linears += [
            Linear(expert_name(path, weight, expert), rows, columns, bool(module.is_transposed), expert)
            for expert in range(experts)
        ]
    return linears


# --- Experts of a mixture, as transformers 5 stores and runs them.
#
# An experts module holds two 3-D parameters, W_up [experts, wide, width] and W_down [experts, width, inner]; if
# `is_transposed`, the last two dimensions are swapped. For the tokens X_e that the router sends to expert e:
#
#     H_e = gate(X_e W_up[e]ᵀ + b_up[e])    X_e [tokens of e, width], H_e [tokens of e, inner] the inputs of W_down[e]
#
# `gate` is a method of the module. Source: `use_experts_implementation` in `transformers.integrations.moe`.

ATTRIBUTES = ("num_experts", "has_bias", "is_transposed", "_apply_gate")


def holds_experts(module: nn.Module) -> bool:
    """Whether a module itself has stacked matrices: parameters with over two dimensions, at least two larger than 1.

    Filters [channels, 1, width] of a depthwise convolution over tokens, as in state-space blocks, do not count.
    """
    is_depthwise = isinstance(module, nn.Conv1d) and module.groups == module.in_channels == module.out_channels
    return not is_depthwise and any(map(_is_stack, module.parameters(recurse=False)))


def _is_stack(parameter: Tensor) -> bool:
    return parameter.dim() > 2 and sum(size > 1 for size in parameter.shape) > 1


def expert_weights(module: Any) -> tuple[str, str]:
    """Names of W_up and W_down of an experts module; UserError if it stores experts in another way."""
    deep = {name: parameter.dim() for name, parameter in module.named_parameters(recurse=False) if _is_stack(parameter)}
    up = "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"
    if deep != {up: 3, "down_proj": 3} or not all(hasattr(module, name) for name in ATTRIBUTES):
        kind, name = type(module).__name__, next(iter(deep))
        raise UserError(f"model module {kind}: {name} has {deep[name]} dimensions in a form that is not known")
    return up, "down_proj"


def expert_name(path: str, weight: str, expert: int) -> str:
    """The name of an expert's matrix as a linear of its block, such as `mlp.experts.down_proj[3]`."""
    return f"{path}.{weight}[{expert}]"


def find_gates(block: nn.Module) -> set[nn.Module]:
    """The linears that gate experts: siblings of an experts module, or the only linear in a sibling (a router).

    They have one output per expert, or a single output, the gate of a shared expert.
    """
    gates = set[nn.Module]()
    for holder in block.modules():
        counts = {child.num_experts for child in holder.children() if holds_experts(child)}
        for child in holder.children() if counts else ():
            linears = [module for module in child.modules() if isinstance(module, nn.Linear)]
            if len(linears) == 1 and linears[0].weight.shape[0] in {1, *counts}:
                gates.add(linears[0])
    return gates


def expert_inputs(module: Any, weight: str, hidden: Tensor, chosen: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Expert and inputs [tokens, in] of W_up or W_down for each expert with tokens, with the weights of the module.

    hidden [tokens, width] and chosen experts [tokens, k] are the arguments of the module.
    """
    up, _ = expert_weights(module)
    for expert in range(module.num_experts):
        rows = hidden[(chosen == expert).any(-1)]
        if len(rows) and weight == up:
            yield expert, rows
        elif len(rows):
            wide = getattr(module, up)[expert]
            bias = getattr(module, f"{up}_bias")[expert] if module.has_bias else None
            rows = nn.functional.linear(rows, wide.T if module.is_transposed else wide, bias)
            yield expert, module._apply_gate(rows) if up == "gate_up_proj" else module.act_fn(rows)


@dataclass(frozen=True)
class Blocks:
    """The blocks in the order in which they run, and the name in the model of each.

    `name`: of their list; of several lists with `*` where they differ, such as swin.encoder.layers.*.blocks;
    see also `config.typed`. `in_tower`: so many of them, the first, are of the vision tower.
    """

    name: str
    names: tuple[str, ...]
    modules: nn.ModuleList
    in_tower: int = 0


def find_blocks(model: nn.Module, with_tower: bool = False) -> Blocks:
    """The blocks: the `nn.ModuleList` with the most parameters, or the lists in it; UserError if there is none.

    In a model that also reads images, only its language model is searched; `with_tower`: its vision tower too.
    """
    if with_tower:
        # The blocks of a model's vision tower; UserError if it has none.
        find = getattr(model, "get_encoder", None)
        tower: nn.Module | None = find and find(modality="image")
        if tower is None or language_model(model) in tower.modules():
            raise UserError(
                f'model.prune: {type(model).__name__} has no vision tower that transformers knows of; take ["language"]'
            )
        # Its blocks, and behind them those of the language model.
        first, others = _largest(model, tower), find_blocks(model)
        modules, count = nn.ModuleList([*first.modules, *others.modules]), len(first.names)
        return Blocks(joined(first.name, count, others.name), (*first.names, *others.names), modules, count)
    found = _largest(model, language_model(model))
    if not is_image_classifier(model):
        return found
    names, blocks = zip(*_leaves(found.name, found.modules), strict=True)
    without = next((block for block in blocks if not _has_linear(block)), None)
    if without is not None:
        raise UserError(
            f"model {type(model).__name__}: block {type(without).__name__} has no linear; models of convolutions "
            "alone cannot be pruned, take one with linears in all of its blocks, such as ViT, DINOv2, Swin or ConvNeXt"
        )
    # The name of the lists: the names of their blocks without the index, with `*` for parts that differ.
    rows = {tuple(name.split(".")[:-1]) for name in names}
    common = min(rows)[0]
    if len({len(row) for row in rows}) == 1:
        common = ".".join(parts[0] if len(set(parts)) == 1 else "*" for parts in zip(*rows, strict=True))
    return Blocks(common, names, nn.ModuleList(blocks))


def _largest(model: nn.Module, part: nn.Module) -> Blocks:
    """The list of the most parameters in a part of a model; UserError if it has no list."""
    inside = set(part.modules())
    modules = ((name, module) for name, module in model.named_modules() if module in inside)
    lists = [(name, module) for name, module in modules if isinstance(module, nn.ModuleList) and len(module)]
    if not lists:
        raise UserError(f"model {type(model).__name__}: has no list of blocks; only transformer models can be pruned")
    name, largest = max(lists, key=lambda pair: sum(p.numel() for p in pair[1].parameters()))
    return Blocks(name, tuple(f"{name}.{index}" for index in range(len(largest))), largest)


def _leaves(name: str, members: nn.ModuleList | nn.Sequential) -> Iterator[tuple[str, nn.Module]]:
    """The members of a list; in the place of a stage the members of its lists."""
    for index, member in enumerate(members):
        inner = list(_lists(f"{name}.{index}", member))
        if not inner:
            yield f"{name}.{index}", member
        for path, modules in inner:
            yield from _leaves(path, modules)


def _lists(name: str, module: nn.Module) -> Iterator[tuple[str, nn.ModuleList | nn.Sequential]]:
    """The outermost lists in a module, or the module itself, of blocks: all with linears inside."""
    if (
        isinstance(module, nn.ModuleList | nn.Sequential)
        and len(module)
        and all(_has_linear(member) and not isinstance(member, nn.Linear) for member in module)
    ):
        yield name, module
        return
    for key, child in module.named_children():
        yield from _lists(f"{name}.{key}", child)


def _has_linear(module: nn.Module) -> bool:
    return any(isinstance(inner, nn.Linear) for inner in module.modules())
