"""Steps that a descent has taken, kept in the cache until it ends, so that an interrupted one goes on."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from atp_tune.allocations.prices import Prices
from atp_tune.cache import file_atomically


class DescentSteps:
    """The prices of each step so far, the ends reached by them as JSON, and the state of what measured the last prices.

    `file`: where they are kept. One that cannot be read counts as none.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self.prices: list[Prices] = []
        self.ends: list[Any] = []
        self.state: dict[str, Tensor] = {}
        with suppress(OSError, SafetensorError, ValueError, TypeError, KeyError), safe_open(file, "pt") as stored:
            found = json.loads(stored.metadata()["steps"])
            state = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            self.prices, self.ends, self.state = found["prices"], found["ends"], state

    def add(self, prices: Prices, state: dict[str, Tensor]) -> None:
        """Keeps one more step; without room on the disk it is not kept."""
        self.prices.append(prices)
        steps = json.dumps({"prices": self.prices, "ends": self.ends})
        with suppress(OSError, SafetensorError), file_atomically(self._file) as temporary:
            save_file(state, temporary, {"steps": steps})
