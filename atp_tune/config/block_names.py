"""The name of the blocks of a model, by which files and studies tell them.

model.layers                                          model.layers.0, model.layers.1, …
vision_tower.layers (2) + language_model.layers       two blocks of a vision tower, then those of the language model
"""

import re

_BOTH = re.compile(r"(?P<tower>.+) \((?P<count>\d{1,4})\) \+ (?P<rest>.+)")


def joined(tower: str, count: int, rest: str) -> str:
    """The name of the `count` blocks of a vision tower and of those of the language model."""
    return f"{tower} ({count}) + {rest}"


def in_tower(blocks: object) -> int:
    """The number of blocks, the first, that are of a vision tower; 0 for all other names."""
    found = _BOTH.fullmatch(blocks) if isinstance(blocks, str) else None
    return int(found["count"]) if found else 0


def block_name(blocks: str, index: int) -> str:
    """The name in the model of one block."""
    found = _BOTH.fullmatch(blocks)
    if found is None:
        return f"{blocks}.{index}"
    count = int(found["count"])
    return f"{found['tower']}.{index}" if index < count else f"{found['rest']}.{index - count}"
