"""Parameters of an NNX model as a flat dict: what is trained, averaged and stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from flax import nnx
from jaxtyping import Array

#: Parameters by name, such as `blocks.0.attention.qkv.kernel`.
Params = dict[str, Array]

Model = TypeVar("Model", bound=nnx.Module)


def split_params(model: Model) -> tuple[Callable[[Mapping[str, Array]], Model], Params]:
    """Returns `(rebuild, params)`: `rebuild(params)` is the model with these parameters.

    Names depend on the model's attributes alone, so stored parameters outlive changes in how
    Flax lays out its state. `rebuild` is pure and works under any transformation.

    Example:
      rebuild, params = split_params(model)
      loss = lambda params: rebuild(params)(x, t, label).sum()
      gradient = jax.grad(loss)(params)
    """
    graph, state = nnx.split(model)
    variables = {".".join(map(str, path)): (path, v) for path, v in nnx.to_flat_state(state)}

    def rebuild(params: Mapping[str, Array]) -> Model:
        flat = [(path, v.replace(params[name])) for name, (path, v) in variables.items()]
        return nnx.merge(graph, nnx.from_flat_state(flat))

    return rebuild, {name: v.get_value() for name, (_, v) in variables.items()}


def check_params(got: Mapping[str, Any], expected: Mapping[str, Any], where: object) -> None:
    """Raises `ValueError` unless both have the same names and shapes.

    Args:
      got: arrays, or anything with a `shape`, by name.
      expected: likewise.
      where: named in the message.
    """
    if missing := sorted(set(expected) - set(got)):
        raise ValueError(f"{where}: expected parameter {missing[0]!r}, got none by that name")
    if extra := sorted(set(got) - set(expected)):
        raise ValueError(f"{where}: expected no parameter {extra[0]!r}, got one")
    for name, value in expected.items():
        if tuple(got[name].shape) != tuple(value.shape):
            raise ValueError(
                f"{where}: expected {name!r} of shape {tuple(value.shape)}, "
                f"got {tuple(got[name].shape)}"
            )
