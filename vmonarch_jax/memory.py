"""Methods that remember something between denoising steps: their state and how it is threaded.

Neighbouring denoising steps see almost the same video, so what one step finds out (which blocks
matter, how wrong a cheap attention is) serves the next ones. A method value holds none of it: the
state is a pytree of arrays that the caller hands in and gets back, one for each layer.

Every leaf of a state has the batch as its first axis, and its heads as the second one where it has
heads at all: states can be doubled for guidance, and sharded as the attention itself is.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp

from . import checks
from .grid import VideoGrid, positive_int

T = TypeVar("T")

#: A denoising step, counted from 0: a Python int, or traced inside a loop over steps.
Step = int | jax.Array


@runtime_checkable
class Remembering(Protocol):
    """A method value that remembers something from one denoising step to the next."""

    def init_state(
        self,
        grid: VideoGrid,
        *,
        batch: int,
        heads: int,
        head_dim: int,
        value_dim: int | None = None,
        dtype: Any = jnp.float32,
    ) -> Any:
        """The state before the first step: arrays of the shapes that every later one has."""
        ...

    def __call__(
        self,
        query: Any,
        key: Any,
        value: Any,
        *,
        grid: VideoGrid,
        state: Any = None,
        step: Step | None = None,
    ) -> Any:
        """`(out, state)`; without a state the output alone, as if nothing had gone before."""
        ...


def remembers(method: Any) -> bool:
    """Whether a method value remembers something between denoising steps.

    Example:
        >>> vm.remembers(vm.AdaSpa()), vm.remembers(vm.VMonarch())
        (True, False)
    """
    # a class has the methods of its values
    return isinstance(method, Remembering) and not isinstance(method, type)


def init_state(
    method: Any,
    grid: Any,
    *,
    batch: int,
    heads: int,
    head_dim: int,
    value_dim: int | None = None,
    dtype: Any = jnp.float32,
) -> Any:
    """What `method` remembers before the first denoising step, for one layer.

    Args:
        method: a method value.
        grid: a `vm.VideoGrid` or `(frames, height, width)`, in tokens.
        batch: entries of the batch that the layer sees; guidance in one call doubles it.
        heads: of the layer.
        head_dim: of query and key.
        value_dim: of value; `None`: `head_dim`.
        dtype: of query, key and value.

    Returns:
        A pytree of arrays with the batch in front, or `None` for a method that remembers nothing.

    Raises:
        ValueError: if a size is wrong, the method does not fit the grid, or it is no method value.

    Example:
        >>> state = vm.init_state(vm.AdaSpa(), grid, batch=2, heads=12, head_dim=128)
        >>> for step in range(50):
        ...     out, state = vm.attend(method, q, k, v, grid=grid, state=state, step=step)
    """
    checks.method_value(method)
    grid = VideoGrid.of(grid)
    sizes = {"batch": batch, "heads": heads, "head_dim": head_dim}
    sizes = {name: positive_int(name, size) for name, size in sizes.items()}
    value_dim = sizes["head_dim"] if value_dim is None else positive_int("value_dim", value_dim)
    if not remembers(method):
        return None
    return method.init_state(grid, **sizes, value_dim=value_dim, dtype=jnp.dtype(dtype))


def attend(
    method: Any,
    query: Any,
    key: Any,
    value: Any,
    *,
    grid: Any,
    state: Any = None,
    step: Step | None = None,
    **options: Any,
) -> tuple[Any, Any]:
    """Any method value on any denoising step: `(out, state)`, as a model calls it.

    Args:
        method: a method value, remembering or not.
        query: `[batch, seq, heads, head_dim]`.
        key: as `query`.
        value: `[batch, seq, heads, value_dim]`.
        grid: a `vm.VideoGrid` or `(frames, height, width)`, in tokens.
        state: what `vm.init_state` or the step before returned; `None`: the method acts as if
            nothing had gone before, and remembers nothing.
        step: the denoising step, from 0. A Python int compiles what that step does and no more; a
            traced one compiles every kind of step, and chooses as it runs.
        **options: passed on: `implementation`, `return_lse`, `block_sizes`.

    Returns:
        The output, or the part with `return_lse=True`, and the state for the next step, of the same
        structure, shapes and dtypes.

    Raises:
        ValueError: as the method itself; for a state without a step, or no method value.
    """
    checks.method_value(method)
    if state is None or not remembers(method):
        return method(query, key, value, grid=grid, **options), state
    if step is None:
        raise ValueError("expected `step`, the number of the denoising step, beside `state`")
    return method(query, key, value, grid=grid, state=state, step=step, **options)


def by_phase(phase: Step, branches: Sequence[Callable[..., T]], *operands: Any) -> T:
    """`branches[phase](*operands)`; one branch is compiled for a Python int, all for a traced one.

    Branches of a traced phase must return the same structure, shapes and dtypes.
    """
    if isinstance(phase, int):
        return branches[phase](*operands)
    return jax.lax.switch(phase, list(branches), *operands)


def check_state(state: Any, expected: Any) -> None:
    """Whether a state is one of this method on arrays of these sizes.

    Args:
        state: what the caller handed in.
        expected: a `NamedTuple` of the shapes and dtypes that it must have.

    Raises:
        ValueError: if it is not.
    """
    kind = type(expected)
    if not isinstance(state, kind):
        raise ValueError(f"`state` must be a vm.{kind.__name__}, got {type(state).__name__}")
    for name in kind._fields:
        want, got = (arrays_in_words(getattr(side, name)) for side in (expected, state))
        if want != got:
            raise ValueError(f"`state.{name}` must be {want} for this method and call, got {got}")


def arrays_in_words(tree: Any) -> str:
    """`"float32 (2, 5, 35), bool (2,)"` for the arrays of a pytree; `"None"` without any."""
    return ", ".join(f"{x.dtype} {x.shape}" for x in jax.tree.leaves(tree)) or "None"
