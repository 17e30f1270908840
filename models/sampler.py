"""Samplers: Euler and Heun along the flow, with classifier-free guidance."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from .attention_schedule import Attention, runs_of
from .dit import VideoDiT
from .flow import guide, shift_time
from .layers import AttentionMethod

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
    velocity: Callable[[Array, Array, Any], tuple[Array, Any]],
    x: Float[Array, "batch *shape"],
    state: Any,
    t: Float[Array, ""],
    t_next: Float[Array, ""],
    solver: str,
) -> tuple[Float[Array, "batch *shape"], Any]:
    """Moves `x` along `dx/dt = velocity(x, t)` from `t` to `t_next`.

    Euler is first order. Heun averages the velocities at both ends and is second order, for two
    calls a step; its step to 0 is Euler's, because a model hardly sees `t = 0` in training.

    Args:
      velocity: `(x, t, state) -> (velocity, state)`; Heun's second call gets the state of its
        first one.
      x: the sample at time `t`.
      state: what the model remembers.
      t: the time.
      t_next: the time after the step.
      solver: one of `SOLVERS`.
    """
    first, state = velocity(x, t, state)
    euler = x + (t_next - t) * first
    if solver == "euler":
        return euler, state

    def heun():
        second, after = velocity(euler, t_next, state)
        return x + (t_next - t) * (first + second) / 2, after

    return jax.lax.cond(t_next > 0, heun, lambda: (euler, state))


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

    def without_memory(x, t, state, step):
        return velocity(x, t), state

    return _integrate(without_memory, x, None, times, 0, solver)[0]


def _integrate(velocity, x, state, times, first, solver):
    """`integrate` with what the model remembers; `first` is the number of the first step."""

    def body(carry, now):
        x, state = carry
        t, t_next, step = now
        now_velocity = functools.partial(velocity, step=step)
        return solver_step(now_velocity, x, state, t, t_next, solver), None

    steps = first + jnp.arange(len(times) - 1)
    return jax.lax.scan(body, (x, state), (times[:-1], times[1:], steps))[0]


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

    Methods that remember something between steps get the number of the step, from 0, and what they
    remembered in the same layer the last time that they ran there, also where a schedule ran others
    in between. Under guidance they see the doubled batch. Both calls of a step of Heun have the
    number of that step, and the second one gets what the first one remembers.

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
    graph, params = nnx.split(model)
    attention = model.attention if attention is None else attention
    seen = len(x) * (2 if guidance != 1 else 1)
    remembered: dict[tuple[int, AttentionMethod], Any] = {}
    for first, end, methods in runs_of(attention, steps, model.config.depth):
        places = list(enumerate(methods))
        fresh = _fresh(graph, methods, seen, params, x)
        memory = tuple(remembered.get(place, new) for place, new in zip(places, fresh, strict=True))
        call = functools.partial(
            _follow, graph, methods, solver, guidance != 1, params,
            guidance=jnp.float32(guidance), label=label, caption=caption,
        )  # fmt: skip
        # with `on_step` every step is a loop of one, of the same program
        last = [end] if on_step is None else range(first + 1, end + 1)
        for n, until in itertools.pairwise([first, *last]):
            x, memory = call(x=x, memory=memory, first=n, times=times[n : until + 1])
            if on_step is not None:
                on_step(until, x)
        remembered.update(zip(places, memory, strict=True))
    return jnp.clip(x, -1, 1)


# Under `jit` with the arrays of the steps, so that states are bound to a device where these are: a
# state that is not would make the first step another program.
@functools.partial(jax.jit, static_argnums=(0, 1, 2), keep_unused=True)
def _fresh(graph, methods, batch, params, x):
    """What each layer remembers before it is called for the first time."""
    return nnx.merge(graph, params).init_attention_state(batch, x.shape[1:4], methods)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _follow(
    graph, methods, solver, guided, params, *, x, memory, first, times, guidance, label, caption
):  # fmt: skip
    """`integrate` with the model as the velocity; compiled once for each method and shape."""
    model = nnx.merge(graph, params)

    def forward(x, t, label, caption, **memory):
        return model(x, t, label, caption, attention=methods, **memory)

    guided_velocity = guide(forward, guidance if guided else 1, model.config.classes)

    def velocity(x, t, state, step):
        times = jnp.full(x.shape[:1], t)
        return guided_velocity(x, times, label, caption, attention_state=state, step=step)

    return _integrate(velocity, x, memory, times, first, solver)


def _check_solver(solver: str) -> None:
    if solver not in SOLVERS:
        raise ValueError(f"expected a solver of {SOLVERS}, got {solver!r}")
