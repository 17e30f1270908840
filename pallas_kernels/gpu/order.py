"""The orders of axes between which arrays stay where they are in memory.

Callers hold tokens before heads, `[entries, frames, n, heads, d]`, and the arithmetic speaks of
groups, `[entries * heads, frames, n, d]`. These functions name the axes of a caller's array as a
kernel wants them. To XLA that is a change of names as long as nobody asks for the groups in their
own order, because the compiler, not this code, chooses where each axis lies.
"""

from jaxtyping import Array, Shaped


def by_frame(x: Shaped[Array, "g M *rest"], entries: int) -> Shaped[Array, "x y *rest"]:
    """Frames of all entries, then heads: `[entries * frames, heads, ...]`.

    `g` counts the heads of each of the `entries` of a batch, one entry after the other.
    """
    g, frames, *rest = x.shape
    x = x.reshape(entries, g // entries, frames, *rest).swapaxes(1, 2)
    return x.reshape(entries * frames, g // entries, *rest)


def by_group(x: Shaped[Array, "x y *rest"], entries: int) -> Shaped[Array, "g M *rest"]:
    """The inverse of `by_frame`."""
    all_frames, heads, *rest = x.shape
    x = x.reshape(entries, all_frames // entries, heads, *rest).swapaxes(1, 2)
    return x.reshape(entries * heads, all_frames // entries, *rest)


def by_entry(x: Shaped[Array, "g *rest"], entries: int) -> Shaped[Array, "x y *rest"]:
    """Entries, then heads: `[entries, heads, ...]`."""
    return x.reshape(entries, -1, *x.shape[1:])


def from_entries(x: Shaped[Array, "x y *rest"]) -> Shaped[Array, "g *rest"]:
    """The inverse of `by_entry`."""
    return x.reshape(-1, *x.shape[2:])


def rows_first(x: Shaped[Array, "g M n d"], entries: int) -> Shaped[Array, "z M n h d"]:
    """As a caller's array lies in memory: `[entries, frames, n, heads, d]`."""
    return x.reshape(entries, -1, *x.shape[1:]).transpose(0, 2, 3, 1, 4)


def groups_first(x: Shaped[Array, "z M n h d"]) -> Shaped[Array, "g M n d"]:
    """The inverse of `rows_first`."""
    x = x.transpose(0, 3, 1, 2, 4)
    return x.reshape(-1, *x.shape[2:])
