"""What the tests of guided attention share: methods on a grid, and arrays."""

import jax.numpy as jnp
import numpy as np

import vmonarch_jax as vm

GRID = (4, 3, 2)
SIZES = {"batch": 2, "heads": 2, "head_dim": 4}
METHODS = {
    "frames": vm.VMonarch(),
    "tubes": vm.VMonarch(block=(4, 1, 1), recompute_frames=0, scale=0.7),
    "tubes, one frame exact": vm.VMonarch(block=(4, 1, 1), recompute_frames=(2,)),
    "boxes": vm.VMonarch(steps=3, block=(2, 3, 1), recompute_frames=0, entropy_gradient=True),
    "rows": vm.TiledMonarch(tile=GRID),
}
TUBES = METHODS["tubes"]


def arrays(seed=0, dtype="float32", batch=2):
    """Peaked enough that blocks differ; bfloat16 mean queries want it flatter."""
    rng = np.random.default_rng(seed)
    shape = (batch, int(np.prod(GRID)), SIZES["heads"], SIZES["head_dim"])
    size = 1.0 if dtype == "bfloat16" else 1.7
    return tuple(jnp.asarray(size * rng.standard_normal(shape), dtype) for _ in range(3))
