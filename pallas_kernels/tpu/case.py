"""A kernel at a real shape: what the schedule table, the tuner and the gates compile."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from ..block_sizes import BlockSizes


@dataclasses.dataclass(frozen=True)
class Case:
    """One kernel at one real shape, one head's worth of it.

    Args:
        kernel: the name under which it is launched.
        shape: the sizes that its blocks are chosen by, as it passes them to `table.choose`.
        dtype: of its large arrays.
        build: from block sizes to a function of the arrays that launches it.
        arguments: the arrays, of one head.
        candidates: blocks worth trying, as the table spells them: "rows", "keys", ...
        name: where the shape comes from, such as "21x30x52 with values".
    """

    kernel: str
    shape: dict[str, int]
    dtype: str
    build: Callable[[BlockSizes], Callable[..., Any]]
    arguments: tuple[jax.ShapeDtypeStruct, ...]
    candidates: tuple[dict[str, int], ...]
    name: str = ""

    def function(self, blocks: dict[str, int] | None = None) -> Callable[..., Any]:
        """The function to compile, with these blocks (`None`: the table's or the kernel's own)."""
        fields = {f"tpu_{name}": size for name, size in (blocks or {}).items()}
        return self.build(BlockSizes(**fields))
