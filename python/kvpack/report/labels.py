"""Places text labels beside points so that they cover neither each other nor the points. Plain geometry in pixels."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple


class Box(NamedTuple):
    """A rectangle; y grows upwards."""

    left: float
    bottom: float
    right: float
    top: float

    def overlap(self, other: Box) -> float:
        """Area that both cover."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.top, other.top) - max(self.bottom, other.bottom)
        return width * height if width > 0 and height > 0 else 0.0


_DISTANCES = (7.0, 13.0, 20.0, 28.0, 38.0, 50.0, 64.0, 80.0)
_ANGLES = (0, 45, 90, 135, 180, 225, 270, 315, 22, 68, 112, 158, 202, 248, 292, 338)


def _candidates(x: float, y: float, width: float, height: float) -> list[tuple[float, Box]]:
    """Boxes around a point, each with the price of being there: near and to the right is best."""
    boxes = []
    for distance, (rank, angle) in itertools.product(_DISTANCES, enumerate(_ANGLES)):
        across, up = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        middle_x = x + across * (distance + width / 2)
        middle_y = y + up * (distance + height / 2)
        box = Box(middle_x - width / 2, middle_y - height / 2, middle_x + width / 2, middle_y + height / 2)
        boxes.append((distance + 0.1 * rank, box))
    return boxes


def place_labels(
    points: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    obstacles: Sequence[Box],
    bounds: Box,
) -> list[Box]:
    """Chooses a box for each label, greedily in the order given.

    Args:
        points: the position that each label names.
        sizes: width and height of each label.
        obstacles: what labels should not cover: markers, error bars.
        bounds: what labels must stay inside; where nothing fits, the least bad place is taken.

    Returns:
        One box per label, in the same order.
    """
    placed: list[Box] = []
    for (x, y), (width, height) in zip(points, sizes, strict=True):

        def cost(candidate: tuple[float, Box]) -> float:
            price, box = candidate
            area = (box.right - box.left) * (box.top - box.bottom)
            outside = area - box.overlap(bounds)
            covered = sum(box.overlap(other) for other in placed)
            hidden = sum(box.overlap(other) for other in obstacles)
            return price + 20.0 * covered + 20.0 * outside + 2.0 * hidden

        placed.append(min(_candidates(x, y, width, height), key=cost)[1])
    return placed
