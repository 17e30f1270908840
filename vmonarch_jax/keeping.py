"""Keeping what the attention kernels returned, so that a backward pass need not run them again.

A backward pass that starts from the inputs alone runs the whole forward pass once more. Most of
that is the R steps and the dense rows. Their results are a few arrays of the size of q, so a
backend that `keeps` records them on the way forward, in order, and the backward pass replays them:
the kernels' `known` argument stands in for the run, and the gradient is that of the kernel.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from .dispatch import Backend

KERNELS = ("attend", "r_step", "tiled")


def record(backend: Backend) -> tuple[Backend, list[Any]]:
    """The backend, and the list to which the results of its attention kernels are added."""
    kept: list[Any] = []

    def recorded(kernel: Any) -> Any:
        def run(*arrays: Any, **settings: Any) -> Any:
            kept.append(kernel(*arrays, **settings))
            return kept[-1]

        return run

    return _with_kernels(backend, recorded), kept


def replay(backend: Backend, kept: Any) -> Backend:
    """The backend with kernels that take their results from `kept`, in the recorded order."""
    left = list(kept)

    def replayed(kernel: Any) -> Any:
        def run(*arrays: Any, **settings: Any) -> Any:
            # One that declines the call took nothing on the way forward either.
            result = kernel(*arrays, known=left[0] if left else None, **settings)
            left.pop(0)
            return result

        return run

    return _with_kernels(backend, replayed)


def _with_kernels(backend: Backend, wrap: Callable[[Any], Any]) -> Backend:
    kernels = {name: getattr(backend, name) for name in KERNELS}
    wrapped = {name: wrap(kernel) for name, kernel in kernels.items() if kernel is not None}
    return dataclasses.replace(backend, **wrapped)
