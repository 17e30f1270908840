"""Where everything lies on a mesh of devices: one table of rules, and attention under it.

The mesh has four axes. Along `data` devices hold different videos; along `fsdp` too, and parts of
every parameter, which they gather a layer at a time; along `context` they hold different tokens of
the same videos; along `tensor` different heads and hidden channels. `collectives.py` lists what
the devices then have to say to each other.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.experimental import mesh_utils
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

import vmonarch_jax as vm
from vmonarch_jax.memory import Step

from ..params import Model, split_params
from .weights.entry import Entry

T = TypeVar("T")

#: Axes of the mesh, outermost first: neighbours along `tensor` talk the most.
AXES = ("data", "fsdp", "context", "tensor")


@dataclasses.dataclass(frozen=True)
class Rule:
    """Which mesh axes split an axis of an array.

    Attributes:
      logical: name of the array's axis.
      params: mesh axes where the array is a parameter, its gradient or its optimizer's state;
        vectors lie as activations do.
      activations: where it is anything else: activations, cached states, text and image states.
    """

    logical: str
    params: tuple[str, ...] = ()
    activations: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("params", "activations"):
            axes = tuple(getattr(self, name))
            object.__setattr__(self, name, axes)
            if not set(axes) <= set(AXES):
                raise ValueError(f"{self.logical}: expected {name} of mesh axes {AXES}, got {axes}")


#: The table. Parameters are split along `context` too: the devices there hold tokens of the same
#: videos, and would else all hold the same weights. Inside self-attention the mesh axes of "seq" go
#: to "heads", after those that heads have already. "rows" and "columns" are those of the
#: autoencoder's pictures, one video at a time, so that all devices share in it.
RULES = (
    Rule("layers"),
    Rule("batch", activations=("data", "fsdp")),
    Rule("seq", activations=("context",)),
    Rule("text"),
    Rule("embed", params=("fsdp", "context")),
    Rule("heads", params=("tensor",), activations=("tensor",)),
    Rule("head_dim"),
    Rule("mlp", params=("tensor",), activations=("tensor",)),
    Rule("rows", activations=("data", "fsdp", "tensor")),
    Rule("columns", activations=("context",)),
)


def make_mesh(
    data: int = 1,
    fsdp: int = 1,
    context: int = 1,
    tensor: int = 1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """A mesh with axes data, fsdp, context and tensor.

    Args:
      data: devices along `data`, and so on.
      fsdp: likewise.
      context: likewise.
      tensor: likewise.
      devices: those to use, as many as the product of the sizes; `None`: all there are.

    Raises:
      ValueError: a size is below 1, or the product is not the number of devices.

    Example:
      mesh = make_mesh(context=4, tensor=2)                                      # 8 devices
    """
    shape = (data, fsdp, context, tensor)
    if min(shape) < 1:
        raise ValueError(f"expected sizes of {AXES} of at least 1, got {shape}")
    devices = jax.devices() if devices is None else list(devices)
    if math.prod(shape) != len(devices):
        raise ValueError(
            f"expected sizes of {AXES} whose product is {len(devices)} devices, got {shape}, "
            f"whose product is {math.prod(shape)}"
        )
    # An axis may wind around two axes of the torus: 8 along one of a 4 x 4 slice.
    grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 4)


@dataclasses.dataclass(frozen=True)
class Sharding:
    """Places parameters and activations on a mesh, and runs attention there; a frozen value.

    Attributes:
      mesh: with axes data, fsdp, context and tensor (`make_mesh`).
      rules: the table; `RULES`, or a copy with other mesh axes for some names.

    Raises:
      ValueError: the mesh has other axes, or a rule stands twice.

    Example:
      sharding = Sharding(make_mesh(context=4, tensor=2))
      params = jax.device_put(params, sharding.param_shardings(entries(config)))
      out = model(latent, time, text, attention=vm.VMonarch(), sharding=sharding)
    """

    mesh: Mesh
    rules: tuple[Rule, ...] = RULES

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", tuple(self.rules))
        names = [rule.logical for rule in self.rules]
        if len(set(names)) < len(names):
            raise ValueError(f"expected one rule for each name, got {names}")
        if tuple(self.mesh.axis_names) != AXES:
            raise ValueError(f"expected a mesh with axes {AXES}, got {self.mesh.axis_names}")

    def axes(self, logical: str | None, of: str = "activations") -> tuple[str, ...]:
        """The mesh axes of one logical axis; `of` is a column of the table.

        Raises:
          ValueError: the table has no such name, or column.
        """
        if of not in ("params", "activations"):
            raise ValueError(f"expected column 'params' or 'activations' of the table, got {of!r}")
        if logical is None:
            return ()
        for rule in self.rules:
            if rule.logical == logical:
                return getattr(rule, of)
        known = [rule.logical for rule in self.rules]
        raise ValueError(f"expected a logical axis of {known} or None, got {logical!r}")

    def ways(self, logical: str | None, of: str = "activations") -> int:
        """Into how many parts one logical axis is split."""
        return math.prod(self.mesh.shape[axis] for axis in self.axes(logical, of))

    def spec(self, logical: Sequence[str | None], of: str = "activations") -> PartitionSpec:
        """The partition of an array with these axes; `of` is a column of the table.

        Raises:
          ValueError: the table lacks a name.
        """
        return PartitionSpec(*(self.axes(name, of) or None for name in logical))

    def placed(self, *logical: str | None) -> NamedSharding:
        """Where an activation with these axes lies: what `jax.device_put` and `jax.jit` take.

        Raises:
          ValueError: the table lacks a name.
        """
        return self._placed(self.spec(logical))

    def constrain(self, x: Array, *logical: str | None) -> Array:
        """Lays an activation out by the names of its axes.

        The tokens of an odd video need not divide: the last devices along `context` then hold
        fewer of them. Every other axis must.

        Raises:
          ValueError: the number of names is not the rank, a name is unknown, or an axis does not
            divide.
        """
        if len(logical) != x.ndim:
            raise ValueError(f"expected {x.ndim} names for shape {x.shape}, got {logical}")
        for name, size in zip(logical, x.shape, strict=True):
            if name != "seq":
                self._divides(name, size)
        return jax.lax.with_sharding_constraint(x, self._placed(self.spec(logical)))

    def param_shardings(self, entries: Iterable[Entry]) -> dict[str, NamedSharding]:
        """The sharding of each parameter by name, from the logical axes of its entry.

        Raises:
          ValueError: a name is unknown, or an axis does not divide.
        """
        found = {}
        for entry in entries:
            names, of = entry.logical or (None,) * len(entry.full_shape), _column(entry)
            for name, size in zip(names, entry.full_shape, strict=True):
                self._divides(name, size, of, f"{entry.name}: ")
            found[entry.name] = self._placed(self.spec(names, of))
        return found

    def gather(self, module: Model, entries: Iterable[Entry], under: str = "") -> Model:
        """The module with parameters laid out for computing: whole along axes that only store them.

        Left to itself the compiler may rather move activations to where the parameters lie.
        Gradients go back to where these lie. Parameters that stack layers stay as they are: gather
        those of one layer where it runs.

        Args:
          module: whose parameters have the entries' names behind `under`; others are left alone.
          entries: of the whole model.
          under: such as "blocks.", where the module is one layer of the model's blocks.
        """
        known = {entry.name: entry for entry in entries}

        def laid_out(name: str, value: Array) -> Array:
            entry = known.get(under + name)
            if entry is None or not entry.logical:
                return value
            stacked = entry.layers > 0
            if stacked and len(entry.logical) == value.ndim:
                return value
            names = entry.logical[1:] if stacked else entry.logical
            there, here = self.spec(names), self.spec(names, _column(entry))
            return _moved(value, self._placed(there), self._placed(here))

        rebuild, params = split_params(module)
        return rebuild({name: laid_out(name, value) for name, value in params.items()})

    def attend(
        self,
        method: Any,
        q: Float[Array, "batch seq heads head_dim"],
        k: Float[Array, "batch keys heads head_dim"],
        v: Float[Array, "batch keys heads head_dim"],
        grid: vm.VideoGrid | None,
        state: Any = None,
        step: Step | None = None,
    ) -> Any:
        """`method(q, k, v, grid=grid)`, each device on its own share; with a state, also the next.

        In self-attention (`grid` given) devices along `context` exchange heads for tokens, so that
        each holds all tokens of some heads; they run the method on these, kernels and all, and
        exchange back. Where they do not divide the tokens (32,760 on 16), rows of zeros are
        appended for the exchanges and cut off before the method sees them.

        With `grid=None` the keys are others (text, image), whole on every device: queries stay
        where they are, and nothing is exchanged.

        A state lies where its heads are attended to. What a method compares between heads (the
        tiers of `vm.AdaSpa`) it compares between those of a device.

        Raises:
          ValueError: heads do not divide by `context * tensor` (`tensor` without a grid), the batch
            does not by `data * fsdp`, or shapes do not fit.

        Reference: DeepSpeed-Ulysses (arXiv 2309.14509), section 3.
        """
        if q.ndim != 4 or k.shape != v.shape or (q.shape[0], *q.shape[2:]) != (
            k.shape[0], *k.shape[2:]
        ):  # fmt: skip
            raise ValueError(
                "expected q, k, v [batch, seq, heads, head_dim] of one batch, heads and head_dim, "
                f"got {q.shape}, {k.shape} and {v.shape}"
            )
        if grid is not None and not q.shape[1] == k.shape[1] == grid.tokens:
            raise ValueError(
                f"expected {grid.tokens} tokens of grid {grid.shape}, "
                f"got {q.shape[1]} and {k.shape[1]}"
            )
        self._divides("batch", q.shape[0])
        self._divides("heads", q.shape[2], also="seq" if grid is not None else None)
        tokens = self.spec(("batch", "heads", "seq", None))
        keys = tokens if grid is not None else self.spec(("batch", "heads", "text", None))
        ways = self.ways("seq")

        def share(arrays: Any, state: Any, step: Any) -> Any:
            if grid is None:
                out = method(*(x.swapaxes(1, 2) for x in arrays), grid=None).swapaxes(1, 2)
                return out, None
            context = self.axes("seq") if ways > 1 else ()
            return _exchanged(
                method, arrays, grid, context, state, static if step is None else step
            )

        # Checks of what varies over which axis know nothing of kernels; every array here is split
        # along all axes or whole, so that JAX sums gradients over the right ones without them.
        traced = isinstance(step, jax.Array)
        static = None if traced else step
        states = jax.tree.map(lambda leaf: self._state_spec(leaf.ndim), state)
        mapped = jax.shard_map(
            share, mesh=self.mesh, in_specs=((tokens, keys, keys), states, PartitionSpec()),
            out_specs=(tokens, states), check_vma=False,
        )  # fmt: skip
        # Heads-major, as projections write them and kernels want them.
        arrays = [x.swapaxes(1, 2) for x in (q, k, v)]
        arrays[0] = _padded(arrays[0], ways)
        if grid is not None:
            arrays[1:] = [_padded(x, ways) for x in arrays[1:]]
        out, after = mapped(tuple(arrays), state, step if traced else None)
        out = out[:, :, : q.shape[1]].swapaxes(1, 2)
        return out if state is None else (out, after)

    def _state_spec(self, axes: int) -> PartitionSpec:
        """Of a state of `[batch, heads, ...]` or `[batch]`: heads as they are attended to."""
        heads = (*self.axes("heads"), *self.axes("seq"))
        return PartitionSpec(*(self.axes("batch"), heads)[:axes])

    def state_shardings(self, states: T) -> T:
        """Where states lie, `[layers, batch, heads, ...]` or `[layers, batch]`, leaf by leaf."""
        return jax.tree.map(
            lambda x: self._placed(PartitionSpec(None, *self._state_spec(x.ndim - 1))), states
        )

    def constrain_states(self, states: T) -> T:
        """Lays states of all layers out as `state_shardings` says."""
        where = self.state_shardings(states)
        return jax.tree.map(jax.lax.with_sharding_constraint, states, where)

    def _divides(
        self,
        name: str | None,
        size: int,
        of: str = "activations",
        where: str = "",
        also: str | None = None,
    ) -> None:
        axes = (*self.axes(name, of), *self.axes(also, of))
        sizes = [self.mesh.shape[axis] for axis in axes]
        if size % math.prod(sizes):
            raise ValueError(
                f"{where}expected {name} that {' * '.join(axes)} = {' * '.join(map(str, sizes))} "
                f"divides, got {size}"
            )

    def _placed(self, spec: PartitionSpec) -> NamedSharding:
        return NamedSharding(self.mesh, spec)


def _column(entry: Entry) -> str:
    """Of the table: vectors lie as they are used; to gather them would cost more than it saves."""
    return "params" if len(entry.shape) > 1 else "activations"


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _moved(x: Array, there: NamedSharding, here: NamedSharding) -> Array:
    """`x` laid out as `there`; its gradient as `here`."""
    del here
    if there.is_fully_replicated:
        # In memory as it is stored, or XLA may turn the parameters of all layers at once, for the
        # backward pass. It gathers what it is asked this of, so not where devices keep parts.
        x = with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))
    return jax.lax.with_sharding_constraint(x, there)


def _moved_forward(x, there, here):
    return _moved(x, there, here), None


def _moved_backward(there, here, saved, gradient):
    del saved
    # First as the parameter was used: the sum over tokens ends there, and no activation is moved
    # to where the parameter lies. The compiler joins the sum and the cut (reduce-scatter).
    gradient = jax.lax.with_sharding_constraint(gradient, there)
    return (jax.lax.with_sharding_constraint(gradient, here),)


_moved.defvjp(_moved_forward, _moved_backward)


def _padded(x: Array, ways: int) -> Array:
    """Zeros behind the tokens of a heads-major array until `ways` divides them."""
    missing = -x.shape[2] % ways
    return jnp.pad(x, ((0, 0), (0, 0), (0, missing), (0, 0))) if missing else x


def _exchanged(
    method: Any, arrays: Any, grid: vm.VideoGrid, context: tuple[str, ...], state: Any, step: Any
) -> tuple[Array, Any]:
    """Self-attention of one device: some tokens of its heads to all tokens of some, and back."""
    local = arrays[0].shape[2]
    if context:
        arrays = [jax.lax.all_to_all(x, context, 1, 2, tiled=True) for x in arrays]
    q, k, v = (x[:, :, : grid.tokens].swapaxes(1, 2) for x in arrays)
    out, after = vm.attend(method, q, k, v, grid=grid, state=state, step=step)
    out = out.swapaxes(1, 2)
    if not context:
        return out, after
    whole = local * math.prod(jax.lax.axis_size(axis) for axis in context)
    out = _padded(out, whole)
    return jax.lax.all_to_all(out, context, 2, 1, tiled=True), after
