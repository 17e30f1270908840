"""Which block sizes a kernel runs with: the caller's, else the tuner's, else the kernel's own."""

import functools
import json
import math
from importlib import resources
from typing import Any

from ..block_sizes import BlockSizes
from . import chips, mode


@functools.cache
def entries() -> dict[str, dict[str, list[dict[str, Any]]]]:
    """The recorded table: by chip and kernel, a list of shapes with their best blocks."""
    text = resources.files(__package__ or "").joinpath("table.json").read_text()
    return json.loads(text)


def nearest(kernel: str, shape: dict[str, int], dtype: Any) -> dict[str, Any] | None:
    """The recorded entry of this dtype whose shape is nearest in ratio; `None` if there is none.

    Entries of another dtype do not count: a float32 product takes six passes, so blocks that are
    best in bfloat16 make its bodies far too long.
    """
    known = entries().get(chips.current().name, {}).get(kernel, [])

    def distance(entry: dict[str, Any]) -> float:
        return sum(abs(math.log(entry["shape"].get(n, 1) / size)) for n, size in shape.items())

    return min((e for e in known if e["dtype"] == str(dtype)), key=distance, default=None)


def choose(
    kernel: str,
    shape: dict[str, int],
    dtype: Any,
    defaults: dict[str, int],
    block_sizes: BlockSizes,
) -> dict[str, int]:
    """Block sizes by name, for the names in `defaults` ("rows", "keys", "positions", "tiles").

    A kernel still has to fit them to its shape: entries come from other shapes, overrides from
    people.
    """
    entry = nearest(kernel, shape, dtype)
    exact = entry is not None and entry["shape"] == shape and entry["dtype"] == str(dtype)
    mode.note_choice(kernel, entry if exact else None)
    blocks = defaults | (entry["blocks"] if entry else {})
    for name in blocks:
        asked = getattr(block_sizes, f"tpu_{name}", None)
        if asked is not None:
            blocks[name] = asked
    return blocks
