"""The knee of a front: where what is lost begins to grow faster than what is gained."""

from collections.abc import Sequence

LEAST = 3  # points that have a knee


def knee(points: Sequence[tuple[float, float]]) -> int | None:
    """The index of the point (x, y) that is furthest below the chord from the first to the last.

    x ascends, and y too; both are finite. None of fewer than `LEAST` points, or where none is below. Source: Satopää et
    al., Finding a "Kneedle" in a Haystack, 2011, whose scaling of both axes to [0, 1] changes no order of distances.
    """
    if len(points) < LEAST:
        return None
    (left, low), *_, (right, high) = points
    below = [low + (high - low) * (x - left) / (right - left) - y for x, y in points[1:-1]]
    return 1 + below.index(max(below)) if max(below) > 0 else None
