"""One progress bar a phase, with the time left."""

from __future__ import annotations

import sys

from tqdm import tqdm

_FORMAT = "{desc} {percentage:3.0f}% |{bar:24}| {elapsed} gone, {remaining} left"


def phase(name: str, total: float) -> tqdm:
    """Returns a bar on standard error that `update(work)` moves towards `total`."""
    return tqdm(
        total=total, desc=f"{name:<34}", bar_format=_FORMAT, file=sys.stderr, mininterval=0.5
    )
