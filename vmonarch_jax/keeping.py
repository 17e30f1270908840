"""Keeping what the attention kernels returned, so that a backward pass need not run them again.

A backward pass that starts from the inputs alone runs the whole forward pass once more. Most of
that is the R steps and the dense rows. Their results are a few arrays of the size of q, so a
backend that `keeps` records them on the way forward, in order, and the backward pass replays them:
the kernels' `known` argument stands in for the run, and the gradient is that of the kernel.
"""

import dataclasses
from typing import Any

from .dispatch import Backend

KERNELS = ("attend", "r_step")


def record(backend: Backend) -> tuple[Backend, list[Any]]:
    """The backend, and the list to which the results of its attention kernels are added."""
    kept: list[Any] = []

    def recorded(kernel: Any) -> Any:
        def run(*arrays: Any, **settings: Any) -> Any:
            kept.append(kernel(*arrays, **settings))
            return kept[-1]

        return run

    kernels = {name: recorded(getattr(backend, name)) for name in KERNELS}
    return dataclasses.replace(backend, **kernels), kept


def replay(backend: Backend, kept: Any) -> Backend:
    """The backend with kernels that take their results from `kept`, in the recorded order."""
    results = iter(kept)

    def replayed(kernel: Any) -> Any:
        def run(*arrays: Any, **settings: Any) -> Any:
            return kernel(*arrays, known=next(results), **settings)

        return run

    kernels = {name: replayed(getattr(backend, name)) for name in KERNELS}
    return dataclasses.replace(backend, **kernels)
