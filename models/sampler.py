"""Samplers: Euler and Heun along the flow, with classifier-free guidance."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from .attention_schedule import Attention, runs_of
from .dit import VideoDiT
from .flow import guide, shift_time

SOLVERS = ("euler", "heun")


def time_steps(steps: int, shift: float = 1.0, start: float = 1.0) -> Float[Array, " steps_1"]:
    """Returns `steps + 1` times from `start` down to 0, even before `shift_time` bends them.

    Raises:
      ValueError: `steps < 1`, `shift <= 0` or `start` outside (0, 1].
    """
    if steps < 1 or shift <= 0:
        raise ValueError(f"expected steps >= 1 and shift > 0, got {steps} and {shift}")
    if not 0 < start <= 1:
        raise ValueError(f"expected a start time in (0, 1], got {start}")
    even = start / (shift - (shift - 1) * start)  # the inverse of shift_time
    return shift_time(jnp.linspace(even, 0.0, steps + 1), shift)


def solver_step(
    velocity: Callable[[Array, Array], Array],
    x: Float[Array, "batch *shape"],
    t: Float[Array, ""],
    t_next: Float[Array, ""],
    solver: str,
) -> Float[Array, "batch *shape"]:
    """Moves `x` along `dx/dt = velocity(x, t)` from `t` to `t_next`.

    Euler is first order. Heun averages the velocities at both ends and is second order, for two
    calls a step; its step to 0 is Euler's, because a model hardly sees `t = 0` in training.
    """
    first = velocity(x, t)
    euler = x + (t_next - t) * first
    if solver == "euler":
        return euler
    return jax.lax.cond(
        t_next > 0,
        lambda: x + (t_next - t) * (first + velocity(euler, t_next)) / 2,
        lambda: euler,
    )


def integrate(
    velocity: Callable[[Array, Array], Array],
    x: Float[Array, "batch *shape"],
    times: Float[Array, " steps_1"],
    solver: str = "euler",
) -> Float[Array, "batch *shape"]:
    """Follows the flow through all of `times` in one `lax.scan`.

    Raises:
      ValueError: the solver is not one of `SOLVERS`.
    """
    _check_solver(solver)

    def body(x, ends):
        t, t_next = ends
        return solver_step(velocity, x, t, t_next, solver), None

    return jax.lax.scan(body, x, (times[:-1], times[1:]))[0]


def sample(
    model: VideoDiT,
    key: Key[Array, ""] | None,
    label: Int[Array, " batch"],
    caption: Float[Array, "batch caption_dim"] | None = None,
    *,
    steps: int = 20,
    guidance: float = 2.0,
    shift: float = 6.0,
    solver: str = "euler",
    attention: Attention | None = None,
    size: tuple[int, int, int] | None = None,
    start: tuple[Float[Array, "batch frames height width channels"], float] | None = None,
    on_step: Callable[[int, Array], None] | None = None,
) -> Float[Array, "batch frames height width channels"]:
    """Returns videos in [-1, 1].

    Args:
      model: the model.
      key: draws the noise; may be `None` with `start`.
      label: classes; their number is the batch size.
      caption: caption vectors, or `None`.
      steps: solver steps.
      guidance: weight of classifier-free guidance; 1 is none, and half the cost.
      shift: of the times. A large one makes the last step a long one, which ends on the model's
        mean instead of on a sample of the fine grain that a small model knows little about.
      solver: "euler" or "heun".
      attention: overrides the model's method, or methods; frozen values are compiled once. An
        `AttentionSchedule` is compiled once for each distinct tuple of methods.
      size: frames, height and width in pixels; the configuration's if not given.
      start: `(x, t)` begins from an already noised video instead of from noise at `t = 1`.
      on_step: called as `on_step(n, x)` after step `n` of `steps`, from 1 on. The steps then run
        one by one; without it all steps of the same methods are one compiled loop.

    Raises:
      ValueError: a solver, number or shape is wrong.
    """
    _check_solver(solver)
    label = jnp.asarray(label, jnp.int32)
    config = model.config
    if start is None:
        if key is None:
            raise ValueError("expected a key, or start=(x, t), got neither")
        shape = (*(size or config.video_shape[:3]), 3)
        start = jax.random.normal(key, (*label.shape, *shape)), 1.0
    x, begin = start
    times = time_steps(steps, shift, begin)
    graph, state = nnx.split(model)
    attention = model.attention if attention is None else attention
    for first, end, methods in runs_of(attention, steps, model.config.depth):
        call = functools.partial(
            _follow, graph, methods, solver, guidance != 1, state,
            guidance=jnp.float32(guidance), label=label, caption=caption,
        )  # fmt: skip
        if on_step is None:
            x = call(x=x, times=times[first : end + 1])
            continue
        for n in range(first, end):
            x = call(x=x, times=times[n : n + 2])
            on_step(n + 1, x)
    return jnp.clip(x, -1, 1)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _follow(graph, methods, solver, guided, state, *, x, times, guidance, label, caption):
    """`integrate` with the model as the velocity; compiled once for each method and shape."""
    model = nnx.merge(graph, state)

    def forward(x, t, label, caption):
        return model(x, t, label, caption, attention=methods)

    velocity = guide(forward, guidance if guided else 1, model.config.classes)
    return integrate(
        lambda x, t: velocity(x, jnp.full(x.shape[:1], t), label, caption), x, times, solver
    )


def _check_solver(solver: str) -> None:
    if solver not in SOLVERS:
        raise ValueError(f"expected a solver of {SOLVERS}, got {solver!r}")
