"""What the attention of all layers remembers from one denoising step to the next."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

import vmonarch_jax as vm

from ..attention_schedule import Attention, runs_of
from .config import TransformerConfig, WanConfig
from .request import Request
from .sharding import Sharding


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["states"], meta_fields=["methods"]
)
@dataclasses.dataclass(frozen=True)
class Memory:
    """A state for each method that remembers something; a tree of arrays.

    Attributes:
      methods: the methods.
      states: of each method, its states of all layers, stacked in front, `[layers, batch, ...]`.
        Layers that run other methods have one too: they may run this one on another step.
    """

    methods: tuple[vm.Attention, ...] = ()
    states: tuple[Any, ...] = ()

    def of(self, method: vm.Attention) -> Any:
        """The method's state; `None` where it has none."""
        return dict(zip(self.methods, self.states, strict=True)).get(method)

    def replaced(self, method: vm.Attention, state: Any) -> Memory:
        """With another state of one of the methods."""
        return Memory(self.methods, tuple(
            state if known == method else old
            for known, old in zip(self.methods, self.states, strict=True)
        ))  # fmt: skip

    def layer(self, index: Int[Array, ""]) -> Memory:
        """Of one layer, without the axis of layers."""
        read = functools.partial(jax.lax.dynamic_index_in_dim, index=index, keepdims=False)
        return jax.tree.map(read, self)

    def with_layer(self, index: Int[Array, ""], own: Memory) -> Memory:
        """With another content of one layer."""
        write = functools.partial(jax.lax.dynamic_update_index_in_dim, index=index, axis=0)
        return jax.tree.map(write, self, own)


#: Of no method at all.
EMPTY = Memory()


def begin(
    config: TransformerConfig,
    grid: vm.VideoGrid,
    batch: int,
    methods: Sequence[vm.Attention],
    known: Memory = EMPTY,
    placement: Sharding | None = None,
) -> Memory:
    """What is remembered before a step of these methods.

    Args:
      config: of the transformer.
      grid: of its tokens.
      batch: videos in a call; guidance in one call doubles it.
      methods: of the layers.
      known: what is remembered already, and stays.
      placement: where states lie on a mesh; they are made there.

    Raises:
      ValueError: a method does not fit the grid.
    """
    new = [m for m in dict.fromkeys(methods) if vm.remembers(m) and m not in known.methods]
    if not new:
        return known

    def build() -> tuple[Any, ...]:
        sizes = {"batch": batch, "heads": config.heads, "head_dim": config.head_dim}
        states = [vm.init_state(m, grid, **sizes, dtype=config.compute_dtype) for m in new]
        return tuple(
            jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (config.layers, *leaf.shape)), state)
            for state in states
        )

    where = None if placement is None else placement.state_shardings(jax.eval_shape(build))
    states = jax.jit(build, out_shardings=where)()
    return Memory((*known.methods, *new), (*known.states, *states))


def calls_of(request: Request, guidance: float, batched: bool) -> tuple[int, int]:
    """How often a step calls the transformer, and with how many videos."""
    count = len(request.prompt)
    if guidance <= 1:
        return 1, count
    return (1, 2 * count) if batched else (2, count)


def let_go(config: WanConfig, request: Request, index: int) -> bool:
    """Whether nothing is remembered behind a step, because no other step of its expert follows."""
    experts = request.experts(config)
    return index + 1 == len(experts) or experts[index + 1][0] != experts[index][0]


def after(
    config: WanConfig, request: Request, attention: Attention, done: int, batched: bool
) -> tuple[Memory, ...]:
    """The shapes of what is remembered after `done` steps: a memory for each call of a step."""
    if done == 0 or let_go(config, request, done - 1):
        return ()
    return next(
        found for index, found in _during(config, request, attention, batched) if index == done - 1
    )


def state_bytes(
    config: WanConfig,
    request: Request,
    attention: Attention,
    batched: bool,
    placement: Sharding | None = None,
) -> dict[str, int]:
    """Bytes of what is remembered while each expert runs, at most; with a mesh, on one device."""

    def held_by_one(leaf: jax.ShapeDtypeStruct) -> int:
        shape = leaf.shape
        if placement is not None:
            where: Any = placement.state_shardings(leaf)
            shape = where.shard_shape(shape)
        return math.prod(shape) * leaf.dtype.itemsize

    most: dict[str, int] = {}
    experts = request.experts(config)
    for index, found in _during(config, request, attention, batched):
        held = sum(map(held_by_one, jax.tree.leaves(found)))
        most[experts[index][0]] = max(most.get(experts[index][0], 0), held)
    return most


def _during(
    config: WanConfig, request: Request, attention: Attention, batched: bool
) -> Iterator[tuple[int, tuple[Memory, ...]]]:
    """The shapes of what each step works on."""
    sizes, grid, experts = config.transformer, request.grid(config), request.experts(config)
    found: tuple[Memory, ...] = ()
    for first, end, methods in runs_of(attention, request.steps, sizes.layers):
        for index in range(first, end):
            calls, batch = calls_of(request, experts[index][1], batched)
            begun = functools.partial(begin, sizes, grid, batch, methods)
            found = tuple(jax.eval_shape(begun, known) for known in found or (EMPTY,) * calls)
            yield index, found
            if let_go(config, request, index):
                found = ()
