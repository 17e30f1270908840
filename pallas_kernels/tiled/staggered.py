"""Products in the order that keeps a TPU's matrix units fed."""

from collections.abc import Callable, Sequence
from typing import Any


def staggered(items: Sequence[Any], stages: Sequence[Callable[..., Any]], lag: int) -> None:
    """Emits `stages` for every item, stage s of an item beside stage s-1 of the `lag`-th next.

    The compiler keeps the matmuls of a straight-line body in their order. Were each item's chain
    (matmul, exp2, matmul) written down whole, every matmul would wait for the one before it: 363
    cycles a position of the L step against 95 with its stages spread out.

    `stage(item, value)` gets what the previous stage returned for that item (`None` at first).
    """
    values: dict[int, Any] = {}
    for time in range(len(items) + lag * (len(stages) - 1)):
        for number, stage in enumerate(stages):
            index = time - lag * number
            if 0 <= index < len(items):
                values[index] = stage(items[index], values.pop(index, None))
        values.pop(time - lag * (len(stages) - 1), None)
