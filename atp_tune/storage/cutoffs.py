"""Trials that were cut off, their process gone before they had a value: which of them are given up.

A machine that goes away takes a trial with it that is as good as any other, and is run again. A trial that ends its
process itself would do so for ever. Of each time that a trial was cut off a `CutOff` is kept, and they tell the two
apart: what a trial does itself happens to it alone, and at the same place each time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

SAME = 3  # crashes, or times at one place, after which a trial is given up
MOST = 25  # times in all after which it is, whatever the reasons: more than bad luck, fewer than for ever


@dataclass(frozen=True)
class CutOff:
    """One time that a trial was cut off.

    `place`: after which step, if its host has seen that; `crash`: the signal or exception by which its process ended
    itself; `alone`: its host went on, and with it all other trials there.
    """

    place: str | None = None
    crash: str | None = None
    alone: bool = False

    @classmethod
    def read(cls, stored: Mapping[str, Any]) -> "CutOff":
        """One that was stored as an attribute; what is not of its kind is not known."""
        place, crash = (found if isinstance(found := stored.get(key), str) else None for key in ("place", "crash"))
        return cls(place, crash, stored.get("alone") is True)

    def stored(self) -> dict[str, str | bool]:
        """As an attribute of a trial."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    def __str__(self) -> str:
        """` after prune 12 of 30 (Segmentation fault)`; empty where nothing is known."""
        place = f" {self.place}" if self.place else ""
        return place + (f" ({self.crash})" if self.crash else "")


def why_given_up(cut_offs: Sequence[CutOff]) -> str:
    """Why a trial with these cut-offs, the earliest first, is not run again, as in `cut off …`; empty if it is.

    - It crashed `SAME` times: a process does not send itself a signal for another's sake.
    - It alone died at the same place `SAME` times, as by the system's killer where memory runs out; once more, and in a
      row, if it has died elsewhere too. Those of unknown place say nothing, and those that others shared neither. Kills
      from outside, at random among n steps, are taken for its own with probability 1/n², and 1/n³ for each one more.
    - It was cut off `MOST` times: a leak, say, that ends it anywhere, or a machine that never lives long enough for it.
    """
    crashes = [one.crash for one in cut_offs if one.crash]
    places = [one.place for one in cut_offs if one.alone and one.place]
    if len(crashes) >= SAME:
        return f"{len(crashes)} times by itself ({', '.join(dict.fromkeys(crashes))})"
    needed = SAME + (len(set(places)) > 1)
    if len(places) >= needed and len(set(places[-needed:])) == 1:
        return f"{needed} times in a row {places[-1]}"
    return f"{len(cut_offs)} times" if len(cut_offs) >= MOST else ""
