"""How the fused tiled kernels cut their work, and how they want their arrays laid out.

`rows`: for each block k, the queries of A query tiles at all positions, `[A*b, d]`: what the R step
multiplies with K. Several blocks are *packed* side by side in the lanes of one product.
`positions`: for each position j, the queries of all blocks of one tile, `[m, d]`: what the L step
multiplies with aL. Both are made outside the kernels, where a transposition costs bandwidth only.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ..block_sizes import BlockSizes
from ..tpu import chips, table

# Statically unrolled stages of one grid step: R products and positions. More would not compile in
# reasonable time.
MOST_STAGES = 640
LANES = 128


def up(n: int, multiple: int) -> int:
    """`n` rounded up to a multiple."""
    return -(-n // multiple) * multiple


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes of one launch; all are counts, widths in elements.

    Args:
        a, f, m, b, d, e: query tiles, key tiles, blocks a tile, positions a block, head dim and
            value dim, as the caller has them.
        dtype: of q, K and V.
        queries: query tiles a grid step (A).
        keys: key tiles a grid step (F).
        pack: blocks side by side in one R product.
    """

    a: int
    f: int
    m: int
    b: int
    d: int
    e: int
    dtype: Any
    queries: int
    keys: int
    pack: int

    @property
    def narrow(self) -> bool:
        """Whether two values fit one 32-bit word, so that two blocks share a row of scratch."""
        return jnp.dtype(self.dtype).itemsize == 2

    @property
    def words(self) -> int:
        """Blocks that share a row of 32-bit words."""
        return 2 if self.narrow else 1

    @property
    def blocks(self) -> int:
        """Blocks a tile, padded to whole packs and words."""
        return up(self.m, math.lcm(self.words, self.pack))

    @property
    def packs(self) -> int:
        """R products a key tile."""
        return self.blocks // self.pack

    @property
    def columns(self) -> int:
        """Keys a block, padded to whole tiles of sublanes."""
        return up(self.b, 8 * self.words)

    @property
    def rows(self) -> int:
        """Rows of an R product: the positions of the query tiles of a grid step."""
        return self.queries * self.b

    @property
    def pairs(self) -> int:
        """Columns of F in a grid step: (key tile, block), padded to whole tiles of sublanes."""
        return up(self.keys * self.blocks, 8 * self.words)

    @property
    def stride(self) -> int:
        """Rows of 32-bit words between two positions in scratch."""
        return self.pairs // self.words

    @property
    def joint(self) -> bool:
        """Whether K and V of a token share 128 lanes."""
        return self.d + self.e <= LANES

    @property
    def depth(self) -> int:
        """Lanes of a query."""
        return LANES if self.joint else up(self.d, LANES)

    @property
    def width(self) -> int:
        """Lanes of `[K | V]`."""
        return LANES if self.joint else up(self.d, LANES) + up(self.e, LANES)

    @property
    def value_at(self) -> int:
        """First lane of the part of `[aL | Y]` that the L step multiplies for the output."""
        return 0 if self.joint else self.depth

    @property
    def out_width(self) -> int:
        """Lanes of an output row; the value stands at lane d of it when `joint`, else at 0."""
        return self.width - self.value_at

    @property
    def query_steps(self) -> int:
        """Grid steps over query tiles."""
        return -(-self.a // self.queries)

    @property
    def key_steps(self) -> int:
        """Grid steps over key tiles."""
        return -(-self.f // self.keys)

    def vmem(self) -> int:
        """Bytes of VMEM of the forward kernel, blocks twice for their pipeline."""
        size, lanes = jnp.dtype(self.dtype).itemsize, up(self.pairs, LANES)
        m = up(self.m, 8)
        q_rows = self.packs * up(self.rows, 8) * self.pack * self.depth * size
        q_positions = self.rows * up(m, 8 * self.words) * self.depth * size
        kv = self.keys * self.blocks * self.columns * self.width * size
        out = self.rows * m * self.out_width * size
        scratch = self.rows * up(self.pairs // self.words, 8) * self.width * 4
        sums = self.rows * m * self.out_width * 4 + 3 * up(self.rows, 8) * lanes * 4
        return 2 * (q_rows + q_positions + kv + out) + scratch + sums + 2**21


def fit(
    q: Any,
    k: Any,
    v: Any,
    block_sizes: BlockSizes,
    *,
    kernel: str,
    lanes: int = 256,
    keys: int = 0,
    vmem: Callable[[Plan], int] = Plan.vmem,
) -> Plan:
    """The plan for these arrays.

    `lanes` is how wide F should be where nothing else is known; `keys` forces the key tiles a grid
    step; `vmem` says what a plan needs.

    Raises:
        NotImplementedError: for a dtype or a shape that the kernels cannot serve.
    """
    if q.dtype not in (jnp.bfloat16, jnp.float32) or k.dtype != q.dtype or v.dtype != q.dtype:
        raise NotImplementedError(
            "fused tiled kernels take bfloat16 or float32, one dtype for query, key and value, "
            f"got {q.dtype}, {k.dtype}, {v.dtype}"
        )
    _, a, m, b, d = q.shape
    f, e = k.shape[1], v.shape[-1]
    shape = {"a": a, "f": f, "m": m, "b": b, "d": d, "e": e}
    if keys:
        asked = {"keys": keys, "tiles": 1}
    else:
        tokens = m * b * default_keys(f, m, b, lanes)
        defaults = {"keys": tokens, "tiles": 1}
        asked = table.choose(kernel, shape, q.dtype, defaults, block_sizes)
        asked["keys"] = max(1, asked["keys"] // (m * b))
    words = 4 // q.dtype.itemsize
    pack = max(1, min(LANES // up(b, 8 * words), m, 4))
    pack = 1 << (pack.bit_length() - 1)
    queries, keys = min(asked["tiles"], a), min(asked["keys"], f)
    limit = chips.current().vmem
    while True:
        plan = Plan(a, f, m, b, d, e, q.dtype, queries, keys, pack)
        stages = plan.keys * plan.packs + plan.rows
        if stages <= MOST_STAGES and vmem(plan) <= limit:
            return plan
        if queries > 1:
            queries -= 1
        elif keys > 1:
            keys -= 1
        else:
            raise NotImplementedError(
                f"fused tiled kernels unroll {stages} products (at most {MOST_STAGES}) and need "
                f"{vmem(plan) / 2**20:.0f} MiB of VMEM (at most {limit / 2**20:.0f}) for tiles "
                f"of {m} blocks of {b} tokens"
            )


def default_keys(f: int, m: int, b: int, most: int) -> int:
    """Key tiles a grid step: F about `most` lanes wide, few tiles of padding."""

    def cost(keys: int) -> float:
        lanes = up(keys * m, LANES)
        return -(-f // keys) * (keys * m * b + b * lanes / 4)

    return min(range(1, min(f, max(1, most // m)) + 1), key=lambda keys: (cost(keys), keys))


def pad(x: Array, sizes: dict[int, int]) -> Array:
    """Zeros after the end of the named axes, up to these sizes."""
    widths = [(0, sizes.get(axis, size) - size) for axis, size in enumerate(x.shape)]
    return jnp.pad(x, widths) if any(w for _, w in widths) else x


def query_rows(plan: Plan, q: Float[Array, "g a m b d"]) -> Float[Array, "g A c r w"]:
    """Queries for the R step, `[g, query steps, packs, A*b, pack*depth]`."""
    steps = plan.query_steps
    q = pad(q, {1: steps * plan.queries, 2: plan.blocks, 4: plan.depth})
    q = q.reshape(-1, steps, plan.queries, plan.packs, plan.pack, plan.b, plan.depth)
    q = jnp.einsum("gsacpjd->gscajpd", q)
    return q.reshape(-1, steps, plan.packs, plan.rows, plan.pack * plan.depth)


def from_rows(plan: Plan, x: Float[Array, "g A c r w"]) -> Float[Array, "g a m b d"]:
    """The inverse of `query_rows`."""
    x = x.reshape(-1, plan.query_steps, plan.packs, plan.queries, plan.b, plan.pack, plan.depth)
    x = jnp.einsum("gscajpd->gsacpjd", x)
    x = x.reshape(-1, plan.query_steps * plan.queries, plan.blocks, plan.b, plan.depth)
    return x[:, : plan.a, : plan.m, :, : plan.d]


def positions(plan: Plan, x: Float[Array, "g a m b w"], lanes: int) -> Float[Array, "g A r m w"]:
    """Arrays of queries by position, `[g, query steps, A*b, m, lanes]`."""
    steps = plan.query_steps
    x = pad(x, {1: steps * plan.queries, 4: lanes})
    return x.swapaxes(2, 3).reshape(-1, steps, plan.rows, plan.m, lanes)


def from_positions(plan: Plan, x: Float[Array, "g A r m w"]) -> Float[Array, "g a m b w"]:
    """The inverse of `positions`, all lanes."""
    x = x.reshape(-1, plan.query_steps * plan.queries, plan.b, plan.m, x.shape[-1])
    return x[:, : plan.a].swapaxes(2, 3)


def keys_and_values(
    plan: Plan, k: Array, v: Array, keys: Bool[Array, "g f m b"] | None
) -> Float[Array, "g F m b w"]:
    """`[K | V]` with zeros where a key is masked: what it holds must not matter."""
    if not plan.joint:
        k = pad(k, {4: plan.depth})
    kv = jnp.concatenate([k, v], axis=-1)
    if keys is not None:
        kv = jnp.where(keys[..., None], kv, 0)
    sizes = {1: plan.key_steps * plan.keys, 2: plan.blocks, 3: plan.columns, 4: plan.width}
    return pad(kv, sizes)


def blocks_there(plan: Plan, groups: int, keys: Bool[Array, "g f m b"] | None) -> Array:
    """1 where a key block has keys, `[g, key steps, 1, pairs]`, in float32."""
    if keys is None:
        some = jnp.ones((groups, plan.f, plan.m), jnp.float32)
    else:
        some = keys.any(-1).astype(jnp.float32)
    some = pad(some, {1: plan.key_steps * plan.keys, 2: plan.blocks})
    some = some.reshape(-1, plan.key_steps, 1, plan.keys * plan.blocks)
    return pad(some, {3: plan.pairs})


def key_lines(plan: Plan, keys: Bool[Array, "g f m b"]) -> Float[Array, "g F c 1 w"]:
    """1 at the keys of each pack that are there, `[g, f, packs, 1, pack*columns]`."""
    sizes = {1: plan.key_steps * plan.keys, 2: plan.blocks, 3: plan.columns}
    lines = pad(keys.astype(jnp.float32), sizes)
    return lines.reshape(*lines.shape[:2], plan.packs, 1, plan.pack * plan.columns)
