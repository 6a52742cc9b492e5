"""Loads a slim checkpoint of atp_tune with transformers; a copy of this file lies in each slim folder.

    import atp_tune                                        # or trust_remote_code=True in the call
    model = AutoModelForCausalLM.from_pretrained("DIR")    # of a classifier: AutoModelForImageClassification

A slim model is a model of its family whose blocks have lost channels: some of its linears are narrower, and each block
has widths of its own. All linears are dense, so every device and library multiplies by them fast. The config has a
model type of its own, so that nothing loads the folder without this file. Format: docs/formats.md of atp_tune.
"""

import shutil
from functools import cache
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.auto import modeling_auto
from transformers.pytorch_utils import Conv1D

MODEL_TYPE = "atp_slim"  # of the config, and the name of its table
VERSION = 1  # of the format
AUTO_CLASSES = {  # the class is a key of the table, but for language models
    "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING,
    "AutoModelForImageClassification": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
}
LANGUAGE = "AutoModelForCausalLM"
STD = 0.02  # of random weights


def checked_table(config: dict[str, Any]) -> dict[str, Any]:
    """The table of narrower linears in a `config.json`; ValueError if it is not what this version writes."""
    table = config.get(MODEL_TYPE)
    if not isinstance(table, dict) or table.get("version") != VERSION:
        raise ValueError(f"slim folder: its config has no table {MODEL_TYPE} of version {VERSION}")
    family, auto_class = table.get("family"), table.get("class", LANGUAGE)
    if not isinstance(auto_class, str) or auto_class not in AUTO_CLASSES:
        raise ValueError(f"slim folder: the table {MODEL_TYPE} in its config is damaged")
    kind: Any = CONFIG_MAPPING[family] if isinstance(family, str) and family in CONFIG_MAPPING else None
    if kind not in AUTO_CLASSES[auto_class]:
        raise ValueError(f"slim folder: transformers {transformers.__version__} has no models {family}")
    linears = table.get("linears")
    if not isinstance(linears, dict) or not all(map(_is_shape, linears.values())):
        raise ValueError(f"slim folder: the table {MODEL_TYPE} in its config is damaged")
    return table


def _is_shape(shape: Any) -> bool:
    return isinstance(shape, list) and len(shape) == 2 and all(type(side) is int and side > 0 for side in shape)


def narrow(model: nn.Module, linears: dict[str, list[int]]) -> None:
    """Gives linears of a model new, random weights [out, in] of these shapes, in place.

    ValueError for a linear that the model does not have.
    """
    for name, (rows, columns) in linears.items():
        try:
            linear: Any = model.get_submodule(name)
        except AttributeError:
            raise ValueError(f"slim folder: its model has no linear {name}") from None
        if not isinstance(linear, nn.Linear | Conv1D):
            raise ValueError(f"slim folder: {name} is no linear in its model")
        old, bias = linear.weight, linear.bias
        transposed = isinstance(linear, Conv1D)
        if rows > old.shape[1 if transposed else 0] or columns > old.shape[0 if transposed else 1]:
            raise ValueError(f"slim folder: {name} is wider than in its family's model")
        linear.weight = nn.Parameter(old.new_empty((columns, rows) if transposed else (rows, columns)))
        nn.init.normal_(linear.weight, std=STD)  # as of a new model; those of files are loaded after it
        if bias is not None:
            linear.bias = nn.Parameter(bias.new_zeros(rows))
        if transposed:
            linear.nx, linear.nf = columns, rows
        else:
            linear.in_features, linear.out_features = columns, rows


class SlimConfig(PretrainedConfig):  # type: ignore[no-untyped-call]
    """What `AutoConfig` takes for a slim folder: `from_dict` returns the config of the model's own family."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """A config of the family's class with the table of linears; ValueError for another format."""
        table = checked_table(config_dict)
        kind: Any = CONFIG_MAPPING[table["family"]]
        own = slim_config(kind, table.get("class", LANGUAGE))
        return own.from_dict({**config_dict, "model_type": table["family"]}, **kwargs)


class SlimModel:
    """The class that `auto_map` of a slim folder names; the subclass of the family's own class does the work."""

    config_class = SlimConfig

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """The model of a slim folder."""
        config = SlimConfig.from_pretrained(path) if config is None else config
        auto_class = getattr(config, MODEL_TYPE).get("class", LANGUAGE)
        return getattr(transformers, auto_class).from_pretrained(path, *args, config=config, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Transformers asks it of a class that comes with a folder; `slim_config` registers its own."""


def places(auto_class: str = LANGUAGE) -> dict[str, str]:
    """The `auto_map` of a slim folder."""
    stem = Path(__file__).stem
    return {"AutoConfig": f"{stem}.{SlimConfig.__name__}", auto_class: f"{stem}.{SlimModel.__name__}"}


def _model_class(family: Any, auto_class: str) -> Any:
    """The class of transformers that loads a family; DeiT has a second one, with a teacher, which cannot be slim."""
    found = AUTO_CLASSES[auto_class][family]
    return found[0] if isinstance(found, tuple) else found


@cache
def slim_config(family: Any, auto_class: str = LANGUAGE) -> Any:
    """A subclass of a family's config that is saved as a slim one; its model class is registered."""

    def to_dict(self: Any) -> dict[str, Any]:
        return {**super(made, self).to_dict(), "model_type": MODEL_TYPE, "auto_map": places(auto_class)}

    def reduce(self: Any, protocol: Any) -> Any:
        return _reduced(self, made, (family, auto_class, False), protocol)

    made: Any = type(
        f"Slim{family.__name__}", (family,), {"to_dict": to_dict, "__reduce_ex__": reduce, "__module__": __name__}
    )
    model = slim_model(made, _model_class(family, auto_class), auto_class)
    getattr(transformers, auto_class).register(made, model, exist_ok=True)
    return made


@cache
def slim_model(config_class: Any, family: Any, auto_class: str) -> Any:
    """A subclass of a family's model class, with narrower linears."""

    def init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        super(made, self).__init__(config, *args, **kwargs)
        narrow(self, getattr(config, MODEL_TYPE)["linears"])

    def from_pretrained(cls: Any, path: Any, /, *args: Any, **options: Any) -> Any:
        """The model; ValueError if a weight is not in the files in the shape that the config says."""
        wanted = options.pop("output_loading_info", False)
        asked = {**options, "output_loading_info": True, "ignore_mismatched_sizes": True}
        model, found = super(made, cls).from_pretrained(path, *args, **asked)
        wrong = [*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])]
        if wrong:
            raise ValueError(f"slim folder: its files have no {min(wrong)} of the shape that its config says")
        return (model, found) if wanted else model

    def save_pretrained(self: Any, folder: Any, *args: Any, **options: Any) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(__file__, Path(folder) / Path(__file__).name)  # first: `push_to_hub` uploads what is there
        super(made, self).save_pretrained(folder, *args, **options)

    def reduce(self: Any, protocol: Any) -> Any:
        return _reduced(self, made, (config_class.__base__, auto_class, True), protocol)

    methods = {
        "__reduce_ex__": reduce,
        "__init__": init,
        "from_pretrained": classmethod(from_pretrained),
        "save_pretrained": save_pretrained,
        "config_class": config_class,
        "__module__": __name__,
    }
    made: Any = type(f"Slim{family.__name__}", (family,), methods)
    for known in (family.__name__, config_class.model_type):  # what transformers would look up for the family
        if (renamed := get_checkpoint_conversion_mapping(known)) is not None:  # type: ignore[no-untyped-call]
            register_checkpoint_conversion_mapping(made.__name__, renamed, overwrite=True)
            break
    return made


def _blank(family: Any, auto_class: str, is_model: bool) -> Any:
    """An object without state, which pickle fills: a config, or a model; their classes have no names of their own."""
    config = slim_config(family, auto_class)
    kind = slim_model(config, _model_class(family, auto_class), auto_class) if is_model else config
    return kind.__new__(kind)


def _reduced(found: Any, made: Any, words: tuple[Any, str, bool], protocol: Any) -> Any:
    """What pickle and `copy` make an object of a class `made` from; one of a subclass as usual."""
    if type(found) is not made:
        return super(made, found).__reduce_ex__(protocol)
    return _blank, words, getattr(found, "__getstate__", lambda: found.__dict__)()


if __name__.startswith("atp_tune."):  # the copy in a folder is named by the folder's config
    AutoConfig.register(MODEL_TYPE, SlimConfig, exist_ok=True)
