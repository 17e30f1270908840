"""Inside `jax.shard_map`: along which axes of the mesh arrays vary, where JAX cannot tell.

It follows that through its own operations and checks it (`check_vma`), but not through kernels and
rules of ours, and a loop's first value must vary as its last one does.
"""

from collections.abc import Callable
from typing import Any

import jax


def varying(tree: Any, *likes: Any) -> Any:
    """The arrays of `tree`, held to vary along every axis that an array of `likes` varies along."""
    axes = _axes(likes)

    def one(x: Any) -> Any:
        more = axes - jax.typeof(x).manual_axis_type.varying
        return jax.lax.pcast(x, tuple(more), to="varying") if more else x

    return jax.tree.map(one, tree) if axes else tree


def kernel_results(make: Callable[[Any], Callable[..., Any]], out_shape: Any) -> Any:
    """`make(out_shape)`, a kernel, with results that vary along the axes that its arrays do."""

    def call(*arrays: jax.Array) -> Any:
        axes = _axes(arrays)
        kind = jax.typeof(arrays[0]).manual_axis_type.update(varying=axes)

        def mark(shape: Any) -> Any:
            return jax.ShapeDtypeStruct(shape.shape, shape.dtype, manual_axis_type=kind)

        # A Mosaic GPU kernel forgets what its results were marked with.
        return varying(make(jax.tree.map(mark, out_shape))(*arrays), arrays)

    return call


def _axes(tree: Any) -> frozenset[Any]:
    kinds = [jax.typeof(x).manual_axis_type for x in jax.tree.leaves(tree)]
    return frozenset().union(*(kind.varying for kind in kinds))
