"""Methods as values: frozen, hashable, called as `method(query, key, value, grid=grid)`.

What changes the result lives here; what changes only the speed is passed at the call.
"""

import dataclasses
from typing import Any, Protocol, runtime_checkable

from . import checks
from .dense import dense_attention
from .dispatch import Implementation
from .grid import Shape3, VideoGrid, positive_int
from .video import tiled_monarch_attention, vmonarch_attention


@runtime_checkable
class Attention(Protocol):
    """What a model takes as `attention=`."""

    def __call__(self, query: Any, key: Any, value: Any, *, grid: VideoGrid) -> Any:
        """Attention of `[batch, seq, heads, head_dim]` arrays on `grid`."""
        ...


@dataclasses.dataclass(frozen=True)
class Dense:
    """Exact attention, `vm.dense_attention`, as a method value.

    Example:
        >>> out = vm.Dense()(query, key, value, grid=grid)
    """

    scale: float | None = None

    def __call__(
        self,
        query: Any,
        key: Any,
        value: Any,
        *,
        grid: VideoGrid | Shape3 | None = None,
        implementation: Implementation = None,
        return_lse: bool = False,
        block_sizes: Any = None,
    ) -> Any:
        """Exact attention; `grid`, where given, must have `seq` tokens.

        Raises:
            ValueError: as `vm.dense_attention`.
        """
        if grid is not None:
            checks.grid_of(grid, query.shape[1])
        return dense_attention(
            query, key, value,
            scale=self.scale, implementation=implementation, return_lse=return_lse,
            block_sizes=block_sizes,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class VMonarch:
    """`vm.vmonarch_attention` as a method value; the fields are its arguments.

    Raises:
        ValueError: if a field can't be right on any grid; the call checks it against the grid.

    Example:
        >>> out = vm.VMonarch(steps=2)(query, key, value, grid=vm.VideoGrid(21, 30, 52))
    """

    steps: int = 2
    block: Shape3 | None = None
    tile: Shape3 | None = None
    recompute_frames: int | tuple[int, ...] = 1
    c_r_floor: float = 0.1
    entropy_gradient: bool = False
    scale: float | None = None

    def __post_init__(self) -> None:
        positive_int("steps", self.steps)
        checks.finite("c_r_floor", self.c_r_floor, least=0)
        for field in ("block", "tile", "recompute_frames"):
            # A list would make the value unhashable, and `jit` needs its hash.
            if isinstance(getattr(self, field), list):
                object.__setattr__(self, field, tuple(getattr(self, field)))

    def __call__(
        self,
        query: Any,
        key: Any,
        value: Any,
        *,
        grid: VideoGrid | Shape3,
        implementation: Implementation = None,
        return_lse: bool = False,
        key_mask: Any = None,
        block_sizes: Any = None,
    ) -> Any:
        """The method's attention on `grid`.

        Raises:
            ValueError: as `vm.vmonarch_attention`.
        """
        function = tiled_monarch_attention if isinstance(self, TiledMonarch) else vmonarch_attention
        settings = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return function(
            query, key, value,
            grid=grid, implementation=implementation, return_lse=return_lse, key_mask=key_mask,
            block_sizes=block_sizes, **settings,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TiledMonarch(VMonarch):
    """`vm.tiled_monarch_attention` (MonarchRT) as a method value.

    A tile is one frame and a block one row of it unless given; one step, no exact frames.

    Example:
        >>> out = vm.TiledMonarch()(query, key, value, grid=vm.VideoGrid(21, 30, 52))
    """

    steps: int = 1
    recompute_frames: int | tuple[int, ...] = 0
