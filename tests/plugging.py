"""Plug-ins for tests: files of code, and registries that forget them afterwards."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from atp_tune import plugins
from atp_tune.plugins import REGISTRIES, registry


def loaded(kind: str, place: str, folder: Path) -> ModuleType:
    """The module of a place, whose object is held by the registry of its kind."""
    plugins.load(kind, place, folder, "plug-in")
    origin = registry(kind).origin(plugins.short_name(place))
    assert origin is not None and origin.file is not None
    return next(
        module.code for (file, sha), module in plugins._modules.items() if (file, sha) == (origin.file, origin.sha256)
    )


@contextmanager
def forgotten() -> Iterator[None]:
    """Registries and modules are afterwards as they were."""
    known = [registry(kind) for kind in REGISTRIES]
    before = [(dict(each._added), dict(each._held), dict(each._loaded)) for each in known]
    modules = {*sys.modules}
    try:
        yield
    finally:
        for each, (added, held, imported) in zip(known, before, strict=True):
            each._added, each._held, each._loaded = added, held, imported
        for name in {*sys.modules} - modules:
            if name.startswith("own_"):
                del sys.modules[name]
