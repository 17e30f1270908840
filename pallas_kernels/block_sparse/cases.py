"""Block-sparse attention and block masses at real shapes: a head at 90% and 80% sparsity.

Also the two searches for blocks: masses by a log-sum-exp that is known, and dense attention with
its masses.
"""

import functools
import math

import jax
import jax.numpy as jnp

from ..block_sizes import BlockSizes
from ..tpu.case import Case
from .tpu import attend_mass, block_mass, block_sparse

# Name, tokens.
VIDEOS = (("21x30x52", 32760), ("21x45x80", 75600))
BLOCKS = (64, 128)
SHARES = (0.1, 0.2)  # of the blocks that are kept

DIM = 128


def lists(tokens: int, block: int, share: float) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Indices and counts of one head, with room for a share of all blocks."""
    blocks = -(-tokens // block)
    room = math.ceil(share * blocks)
    return (
        jax.ShapeDtypeStruct((1, blocks, room), jnp.int32),
        jax.ShapeDtypeStruct((1, blocks), jnp.int32),
    )


def padded(tokens: int, block: int) -> jax.ShapeDtypeStruct:
    """An array of one head in whole blocks."""
    return jax.ShapeDtypeStruct((1, -(-tokens // block) * block, DIM), jnp.bfloat16)


def blocks_of(block: int, room: int) -> dict[str, int]:
    """What the choice of block sizes goes by beside the shapes."""
    return {"block": block, "kept": room * block}


def label(name: str, block: int, share: float) -> str:
    """The name of a case."""
    return f"{name} blocks of {block}, {share:.0%} kept"


def _attend(block: int, length: int, block_sizes: BlockSizes):
    return functools.partial(
        block_sparse, block=block, length=length, scale=DIM**-0.5, block_sizes=block_sizes
    )


def _mass(block: int, length: int, block_sizes: BlockSizes):
    return functools.partial(
        block_mass, block=block, length=length, scale=DIM**-0.5, block_sizes=block_sizes
    )


def _attend_mass(block: int, length: int, block_sizes: BlockSizes):
    return functools.partial(
        attend_mass,
        block=block, rows=length, length=length, scale=DIM**-0.5, block_sizes=block_sizes,
    )  # fmt: skip


def _case(name: str, tokens: int, block: int, share: float) -> Case:
    array = padded(tokens, block)
    n = array.shape[1]
    kept = lists(tokens, block, share)
    room = kept[0].shape[-1]
    return Case(
        kernel="block_sparse",
        shape={"rows": n, "keys": n, "dim": DIM, "width": DIM} | blocks_of(block, room),
        dtype="bfloat16",
        build=functools.partial(_attend, block, tokens),
        arguments=(array, array, array, *kept),
        candidates=tuple({"rows": r, "keys": k} for r in (1024, 2048) for k in (512, 768, 1024)),
        name=label(name, block, share),
    )


def _mass_case(name: str, tokens: int, block: int) -> Case:
    array = padded(tokens, block)
    n = array.shape[1]
    return Case(
        kernel="block_mass",
        shape={"rows": n, "keys": n, "dim": DIM, "block": block},
        dtype="bfloat16",
        build=functools.partial(_mass, block, tokens),
        arguments=(array, array, jax.ShapeDtypeStruct((1, n), jnp.float32)),
        candidates=tuple({"rows": r, "keys": k} for r in (1024, 2048) for k in (1024, 2048)),
        name=f"{name} blocks of {block}",
    )


def _attend_mass_case(name: str, tokens: int, block: int) -> Case:
    array = padded(tokens, block)
    n = array.shape[1]
    return Case(
        kernel="attend_mass",
        shape={"rows": n, "keys": n, "dim": DIM, "width": DIM, "block": block},
        dtype="bfloat16",
        build=functools.partial(_attend_mass, block, tokens),
        arguments=(array, array, array),
        candidates=({"rows": 1024, "keys": 4096}, {"rows": 768, "keys": 8192}),
        name=f"{name} blocks of {block}",
    )


CASES = (
    *(_case(*video, block, share) for video in VIDEOS for block in BLOCKS for share in SHARES),
    *(_mass_case(*video, BLOCKS[0]) for video in VIDEOS),
    *(_attend_mass_case(*video, block) for video in VIDEOS for block in BLOCKS),
)
