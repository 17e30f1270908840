"""What an R step returns."""

from typing import NamedTuple

from jaxtyping import Array, Float


class RStep(NamedTuple):
    """`aL` in the dtype of K, the averages `ys` in that of their values, `cL` and lse in float32.

    `cL` is taken from the rounded `aL`: then `F = lse + (q - qt) . aL` stays the tangent plane,
    exact at `q = qt`, whatever the rounding. A key block without any key has `lse = -inf`,
    `cL = 0`, and zeros elsewhere.
    """

    al: Float[Array, "g M n d"]
    ys: tuple[Float[Array, "g M n _"], ...]
    cl: Float[Array, "g M n"]
    lse: Float[Array, "g M n"]
