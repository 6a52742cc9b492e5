"""atp_tune finds how to share out sparsity over the blocks of a language model, and prunes it.

    result = atp_tune.tune("HuggingFaceTB/SmolLM2-135M", sparsity=0.6)   # search: an Optuna study
    model = result.apply()                                               # the pruned model in memory
    model = atp_tune.prune(model, tokenizer, sparsity=0.6, texts=texts)  # prune once, without a search

Names are imported on first use, so that `import atp_tune` is fast.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from atp_tune.packed import register as register_packed

if TYPE_CHECKING:
    from atp_tune.api.configuration import Configuration, load_config
    from atp_tune.api.pruning import keep_zeros, perplexity, prune
    from atp_tune.api.result import Result, load_study
    from atp_tune.api.tuning import tune
    from atp_tune.config.study import Study
    from atp_tune.errors import UserError
    from atp_tune.plugins import allocation, pruner, sampler, score, text_source
    from atp_tune.utils.registry import SettingsTable

__all__ = [
    "Configuration", "Result", "SettingsTable", "Study", "UserError", "allocation", "keep_zeros", "load_config",
    "load_study", "perplexity", "prune", "pruner", "sampler", "score", "text_source", "tune",
]  # fmt: skip

_PLACES = {
    "Configuration": "api.configuration", "Result": "api.result", "SettingsTable": "utils.registry",
    "Study": "config.study", "UserError": "errors",
    "keep_zeros": "api.pruning", "load_config": "api.configuration", "load_study": "api.result",
    "perplexity": "api.pruning", "prune": "api.pruning", "tune": "api.tuning",
    **dict.fromkeys(("allocation", "pruner", "sampler", "score", "text_source"), "plugins"),
}  # fmt: skip

register_packed()

try:
    __version__ = version("atp-tune")
except PackageNotFoundError:  # run from a checkout that was not installed
    __version__ = "0.0.0"


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'atp_tune' has no attribute {name!r}")
    if _PLACES[name].startswith(("api.", "folders.")):
        from atp_tune.utils.system import wait_asleep

        wait_asleep()  # before torch is imported
    value = globals()[name] = getattr(import_module(f"atp_tune.{_PLACES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
