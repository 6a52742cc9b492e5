"""Tells transformers of packed checkpoints as soon as both it and atp_tune are imported, in either order."""

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

REGISTER = "atp_tune.packed.modeling_atp_sparse"  # at the end of its import
WAITED = "transformers.models.auto.modeling_auto"  # imported before any model can be loaded


def register() -> None:
    """Registers the model type now if transformers is there, else when it comes; nothing is imported for it."""
    if WAITED in sys.modules:
        import_module(REGISTER)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder, Loader):
    """Finds one module as the others do, and has it followed by the registration."""

    _loader: Any

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != WAITED:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            self._loader, spec.loader = spec.loader, self
        return spec

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        import_module(REGISTER)  # nothing more to do where this import is what brought transformers
