"""What the devices of a mesh say to each other: what the table of rules announces, and what is so.

A compiled program that holds a collective which is not announced moves data that nobody meant to
move, usually because an activation was laid out otherwise than its neighbours.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh

from .config import VAEConfig
from .sharding import Sharding

KINDS = ("all-to-all", "all-gather", "all-reduce", "reduce-scatter", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Announced:
    """Collectives that a program may hold.

    Attributes:
      kinds: names of XLA's operations.
      axes: mesh axes along which the devices may talk, any of them.
      why: what they are for.
      most: elements of the largest result; `None`: any number.
      whole: whether the devices must talk along all of these axes together.
    """

    kinds: tuple[str, ...]
    axes: tuple[str, ...]
    why: str
    most: int | None = None
    whole: bool = False


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective of a compiled program.

    Attributes:
      kind: name of XLA's operation.
      axes: mesh axes along which the devices talk.
      elements: of the result on one device.
      source: the operation of the model that it came from, as JAX names it.
    """

    kind: str
    axes: tuple[str, ...]
    elements: int
    source: str


def announced(
    sharding: Sharding, training: bool = False, unsplit: int = 0, states: int = 0
) -> tuple[Announced, ...]:
    """The collectives that the rules imply, in the forward pass or in a training step.

    Args:
      sharding: the mesh and its rules.
      training: whether gradients are taken.
      unsplit: elements on one device of the largest activation that is whole along the mesh axes
        of "seq", such as text states. Where these are smaller than a parameter, the compiler may
        rather multiply them by the parts of it that each device has, and sum.
      states: elements on one device of what linear branches sum over tokens: the larger of the
        states of its heads and of its samples' mean tokens. 0: there are no such branches.
    """
    batch, seq = sharding.axes("batch"), sharding.axes("seq")
    params = sharding.axes("embed", "params")
    sums = tuple({*sharding.axes("heads"), *sharding.axes("mlp")})
    found = (
        Announced(("all-to-all",), seq, "self-attention: heads for tokens, and back"),
        Announced(("all-gather",), params, "parameters, a layer at a time"),
        Announced(
            ("collective-permute",), params, "the same in a ring, a part at a time (7x)", whole=True
        ),
        Announced(("all-gather",), seq, "tokens of the output, put back into a video"),
        Announced(
            ("all-reduce",), sums, "products that sum over heads or mlp; mean squares over heads"
        ),
    )
    if unsplit:
        why = "products of text and time with the parts of a parameter"
        found = (*found, Announced(("all-reduce",), params, why, unsplit))
    if states:
        why = "sums over tokens of the linear branches"
        found = (*found, Announced(("all-reduce",), seq, why, states))
    if not training:
        return found
    both = ("all-reduce", "reduce-scatter")
    heads, why = sharding.axes("heads"), "gradients of what linear branches add to the heads"
    extra = (Announced(("all-gather",), heads, why),) if states else ()
    return (
        *found,
        *extra,
        Announced(both, (*batch, *seq), "gradients of parameters"),
        Announced(("all-reduce",), sharding.mesh.axis_names, "the loss; norms of gradients", 1),
    )


def announced_pictures(
    sharding: Sharding, config: VAEConfig, latents: tuple[int, int, int]
) -> tuple[Announced, ...]:
    """The collectives that the rules imply in the autoencoder, in either direction.

    Args:
      sharding: the mesh and its rules.
      config: of the autoencoder.
      latents: frames, rows and columns of a video's latents.
    """
    frames, *sides = latents
    names = ("rows", "columns")
    ways = [sharding.ways(name) for name in names]
    shares = [-(-size // n) for size, n in zip(sides, ways, strict=True)]
    filled = [share * n for share, n in zip(shares, ways, strict=True)]
    time, scale, _ = config.strides
    widest = max(max(config.dim, config.decoder_dim) * max(config.multipliers), 3 * config.patch**2)
    # as many frames as there are for a latent one with those before, and a corner at either end
    edge = (time + 2) * (max(shares) * scale // config.patch + 2) * widest
    whole = max(
        math.prod(filled) * 2 * widest, frames * math.prod(filled) * 2 * config.latent_channels
    )
    if filled != sides:
        video = 3 * (time * (frames - 1) + 1) * math.prod(filled) * scale**2
        edge, whole = max(edge, video), max(whole, video)
    axes = tuple(axis for name in names for axis in sharding.axes(name))
    return (
        Announced(("collective-permute",), axes, "edges; odd pictures, shared out anew", edge),
        Announced(
            ("all-gather",), axes, "pixels of a frame for attention; latents; odd pictures", whole
        ),
    )


def unannounced(
    hlo: str,
    sharding: Sharding,
    training: bool = False,
    unsplit: int = 0,
    states: int = 0,
    allowed: Sequence[Announced] | None = None,
) -> list[Collective]:
    """The collectives of a compiled program (`compiled.as_text()`) that no rule announces.

    What `announced` says of the other arguments, unless `allowed` is given.
    """
    if allowed is None:
        allowed = announced(sharding, training, unsplit, states)

    def fits(found: Collective, rule: Announced) -> bool:
        within = rule.most is None or found.elements <= rule.most
        axes, known = set(found.axes), set(rule.axes)
        along = axes == known if rule.whole else axes <= known
        return found.kind in rule.kinds and along and within

    return [
        found
        for found in collectives(hlo, sharding.mesh)
        if not any(fits(found, rule) for rule in allowed)
    ]


def collectives(hlo: str, mesh: Mesh) -> list[Collective]:
    """All collectives of a compiled program between devices of a mesh.

    Args:
      hlo: `compiled.as_text()`; those inside loops stand there once.
      mesh: whose devices it was compiled for, in its order.
    """
    found = []
    operation = re.compile(rf"= (?P<shape>.*?) (?P<kind>{'|'.join(KINDS)})(-start)?\(")
    for line in hlo.splitlines():
        match = operation.search(line)
        if not match:
            continue
        axes = _axes(_groups(line, mesh.size), mesh)
        source = re.search(r'op_name="([^"]*)"', line)
        shapes = re.findall(r"\w+\[([\d,]*)\]", match["shape"])
        sizes = [math.prod(int(n) for n in shape.split(",") if n) for shape in shapes]
        if axes:
            found.append(Collective(match["kind"], axes, max(sizes), source[1] if source else ""))
    return found


def _groups(line: str, devices: int) -> np.ndarray:
    """The groups of devices that talk to each other, one a row, as numbers in the mesh's order.

    XLA writes them as lists `{{0,1},{2,3}}`, as a reshaped and transposed count
    `[2,4]<=[4,2]T(1,0)`, by axes of a mesh of its own `mesh['a'=4,'b'=2] {'a'}`, or as pairs.
    """
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}?(, |$)", line):
        return np.array([int(n) for n in re.findall(r"\d+", pairs[1])]).reshape(-1, 2)
    if counted := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        return _counted(_numbers(counted[2]), counted[3]).reshape(_numbers(counted[1]))
    ids = r"(?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?"
    if named := re.search(rf"replica_groups=mesh\[(.*?)\]{ids} \{{(.*?)\}}", line):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        chosen = re.findall(r"'(\w+)'", named[4])
        if ":(" in named[4]:
            raise NotImplementedError(f"expected groups along whole axes, got {named[0]}")
        count = _numbers(named[2]) or [math.prod(sizes.values())]
        ids = _counted(count, named[3]).reshape(list(sizes.values()))
        where = [list(sizes).index(name) for name in chosen]
        ids = np.moveaxis(ids, where, range(-len(where), 0))
        return ids.reshape(-1, math.prod(sizes[name] for name in chosen))
    lists = re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", line)
    groups = re.findall(r"\{([\d,]+)\}", lists[1]) if lists else []
    if not groups:  # none given: all of them
        return np.arange(devices)[None]
    return np.array([[int(n) for n in group.split(",")] for group in groups])


def _numbers(text: str | None) -> list[int]:
    return [int(n) for n in (text or "").split(",") if n]


def _counted(shape: list[int], order: str | None) -> np.ndarray:
    """The devices in turn, reshaped and transposed: `[4,2]T(1,0)`."""
    ids = np.arange(math.prod(shape)).reshape(shape)
    return ids.transpose(_numbers(order)) if order else ids


def _axes(groups: np.ndarray, mesh: Mesh) -> tuple[str, ...]:
    """The mesh axes along which members of a group differ."""
    shape = tuple(mesh.shape.values())
    places = np.stack(np.unravel_index(groups, shape), axis=-1)
    differ = (places != places[:, :1]).any(axis=(0, 1))
    return tuple(axis for axis, is_split in zip(mesh.axis_names, differ, strict=True) if is_split)
