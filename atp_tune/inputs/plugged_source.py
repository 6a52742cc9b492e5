"""A source of texts that is a plug-in: a function from what follows its name, and the study's folder, to documents."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from atp_tune.cache import sha256_of_json
from atp_tune.errors import PluginError, UserError, is_text
from atp_tune.plugins import guarded
from atp_tune.registry import Origin
from atp_tune.spec.plugged import parts_of
from atp_tune.spec.texts import Text


class PluginSource:
    """The `TextSource` around a plug-in; PluginError, which names the plug-in and its file, for a wrong result."""

    form = ".*"

    def __init__(self, function: Callable[[str, Path], Sequence[str]], origin: Origin) -> None:
        self._function = function
        self._origin = origin
        self.__doc__ = getattr(function, "__doc__", None)

    def read(self, text: Text, base: Path) -> Sequence[str]:
        """The documents."""
        with guarded(self._origin, "it could not be read"):
            found = self._function(parts_of(text.source)[1], base)
        if not isinstance(found, list | tuple) or not all(isinstance(each, str) and is_text(each) for each in found):
            raise PluginError(f"{self._origin}: returned something else than a list of str of valid text")
        return found

    def identify(self, text: Text, base: Path) -> str:
        """SHA-256 of the documents."""
        return sha256_of_json(list(self.read(text, base)))


def finished(found: Any, origin: Origin) -> PluginSource:
    """The source of a plug-in; UserError if it is none."""
    if not callable(found) or isinstance(found, type):
        raise UserError(f"{origin}: is no source of texts: must be a function of a str and a folder")
    return PluginSource(found, origin)
