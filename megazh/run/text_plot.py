"""A curve in characters: each has two by four dots (Braille, Unicode 2800 to 28FF), or is a star without these."""

import math
from collections.abc import Sequence

_BRAILLE = 0x2800
# Bit of each dot of a character, by row and column (The Unicode Standard, section 21.1).
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))


def text_plot(
    values: Sequence[float], width: int, height: int, braille: bool = True, above: float = 0.0
) -> tuple[list[str], float, float]:
    """Draw values at equal distances, joined by lines; values that are not finite leave gaps.

    Args:
        values: what to draw, at least one of them finite. Where there are more than dots, the mean of each stretch.
        width: characters of a line.
        height: number of lines.
        braille: whether the terminal has Braille.
        above: share of the points, the highest ones, that may lie above the upper edge, where they are drawn: the begin
            of a loss would leave no room for all that follows.

    Returns:
        The lines, top down, and the values at the lower and at the upper edge.
    """
    across, down = (2, 4) if braille else (1, 1)
    columns, rows = width * across, height * down
    means = _means(values, columns)
    finite = sorted(value for value in means if math.isfinite(value))
    low, high = finite[0], finite[int((len(finite) - 1) * (1 - above))]
    if high - low < 1e-12:
        low, high = low - 0.5, high + 0.5
    grid = [[0] * width for _ in range(height)]

    def row_of(value: float) -> int:
        return max(0, min(rows - 1, int((high - value) / (high - low) * rows)))

    before: int | None = None
    for column, value in enumerate(means):
        if not math.isfinite(value):
            before = None
            continue
        row = row_of(value)
        # From the height of the point before it, one dot short, so that steep curves stay joined.
        start = row if before is None or before == row else before + (1 if row > before else -1)
        for each in range(min(start, row), max(start, row) + 1):
            grid[each // down][column // across] |= _DOTS[each % down][column % across]
        before = row
    empty = chr(_BRAILLE) if braille else " "
    draw = (lambda dots: chr(_BRAILLE + dots)) if braille else (lambda dots: "*" if dots else " ")
    return ["".join(map(draw, line)).rstrip(empty) for line in grid], low, high


def _means(values: Sequence[float], count: int) -> list[float]:
    """As many values as columns: the mean of the finite ones in each stretch; few values are spread."""
    total, means = len(values), []
    if total <= count:
        return [values[min(total - 1, number * total // count)] for number in range(count)]
    for number in range(count):
        part = values[number * total // count : (number + 1) * total // count]
        finite = [value for value in part if math.isfinite(value)]
        means.append(sum(finite) / len(finite) if finite else math.nan)
    return means
