"""The L step on any GPU: this library's kernel where it serves, else XLA's."""

from collections.abc import Callable
from typing import Any

from ..gpu import mode
from ..numerics import scaled
from . import xla


def middle(*arrays: Any, **settings: Any) -> Any:
    """The mean queries of the next iteration, as `gpu.middle`."""
    return _either("middle", xla.middle, arrays, **settings)


def last(*arrays: Any, **settings: Any) -> Any:
    """`(out, lse)`, as `gpu.last`."""
    return _either("last", xla.last, arrays, **settings)


def _either(
    name: str,
    other: Callable[..., Any],
    arrays: Any,
    *,
    gain: float = 1.0,
    entries: int = 1,
    **settings: Any,
) -> Any:
    if not mode.unavailable():
        from . import gpu  # imports Mosaic GPU: only where it can run

        try:
            return getattr(gpu, name)(*arrays, gain=gain, entries=entries, **settings)
        except NotImplementedError:  # a dtype, a size or a mask that it does not take
            pass
    q, al, *others = arrays
    return other(q, scaled(al, gain), *others, **settings)
