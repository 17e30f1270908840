"""One progress bar a phase, with the time left."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

_FORMAT = "{desc} {percentage:3.0f}% |{bar:24}| {elapsed} gone, {remaining} left"


class Phase(tqdm):
    """A bar on standard error that `update(work)` moves.

    Attributes:
      rate: work a second by which the time left is reckoned, 0 where it is not known; `None`: what
        was done so far over the time that it took.
    """

    rate: float | None = None

    @property
    def format_dict(self) -> dict[str, Any]:
        """What the bar shows."""
        shown = dict(super().format_dict)
        return shown if self.rate is None else shown | {"rate": self.rate}


def phase(name: str, total: float, done: float = 0) -> Phase:
    """Returns a bar that `update(work)` moves from `done` towards `total`."""
    return Phase(
        total=total, initial=done, desc=f"{name:<34}", bar_format=_FORMAT, file=sys.stderr,
        mininterval=0.5,
    )  # fmt: skip
