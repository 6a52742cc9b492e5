"""Types of ggml, in which llama.cpp stores matrices: each cuts rows into blocks of weights, which have so many bytes.

    bits a weight = 8 bytes / weights of a block, scales included

A test compares the table with the package `gguf`.
"""

from collections.abc import Mapping, Sequence

from atp_tune.allocations.bits import cheapest
from atp_tune.errors import UserError

BLOCKS = {  # weights and bytes of a block
    "IQ2_XXS": (256, 66), "IQ2_XS": (256, 74), "IQ2_S": (256, 82), "Q2_K": (256, 84), "IQ3_XXS": (256, 98),
    "Q3_K": (256, 110), "IQ3_S": (256, 110), "IQ4_XS": (256, 136), "Q4_K": (256, 144), "IQ4_NL": (32, 18),
    "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_K": (256, 176), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q6_K": (256, 210),
    "Q8_0": (32, 34), "BF16": (1, 2),
}  # fmt: skip


def type_bits(name: str) -> float:
    """Bits of a weight, scales included."""
    weights, size = BLOCKS[name]
    return 8 * size / weights


def fitting(columns: int) -> list[str]:
    """The types whose blocks rows of so many weights can be cut into; any length has BF16."""
    return [name for name, (weights, _) in BLOCKS.items() if columns % weights == 0]


def cheapest_types(costs: Sequence[Mapping[str, float]], weights: Sequence[int], most: float) -> list[str]:
    """The type of each matrix, cheapest in all within so many bits; UserError if the smallest take more.

    `costs`: of each matrix by type; `weights`: the number of each.
    """
    # Of types of one size the cheapest is a choice; the first of equal ones.
    choices = list[list[str]]()
    for row in costs:
        sizes = sorted({type_bits(name) for name in row})
        choices.append([min((name for name in row if type_bits(name) == size), key=row.__getitem__) for size in sizes])
    rows = [[type_bits(name) * count for name in own] for own, count in zip(choices, weights, strict=True)]
    if (least := sum(row[0] for row in rows)) > most:
        asked, fewest = (f"{size / sum(weights):.4g}" for size in (most, least))
        raise UserError(
            f"bits: {asked} a weight are less than the smallest types take, {fewest}, 16 where no block divides a row"
        )
    prices = [[row[name] for name in own] for row, own in zip(costs, choices, strict=True)]
    return [own[place] for own, place in zip(choices, cheapest(prices, rows, most), strict=True)]
