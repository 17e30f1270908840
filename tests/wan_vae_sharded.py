"""Runs on 8 CPU devices, in a process of its own (wan/test_vae_sharding.py): prints what it found.

XLA_FLAGS=--xla_force_host_platform_device_count=8 python tests/wan_vae_sharded.py flat shortcuts
"""

import json
import sys

import jax
import numpy as np
from compiling import jit
from vmonarch_jax.models.params import split_params
from vmonarch_jax.models.wan.collectives import announced_pictures, collectives, unannounced
from vmonarch_jax.models.wan.conditions import beside_channels, first_frame
from vmonarch_jax.models.wan.config import VAEConfig
from vmonarch_jax.models.wan.pipeline import WanPipeline
from vmonarch_jax.models.wan.sharding import Sharding, make_mesh
from vmonarch_jax.models.wan.weights.random_folder import small_config
from wan_vae_cases import Case, inputs_of, relative_error, vae_of

FLAT = VAEConfig(
    dim=4, decoder_dim=4, multipliers=(1, 2), halve_time=(True,), blocks=1, latent_channels=2,
    mean=(0.1, -0.2), std=(1.5, 0.7),
)  # fmt: skip
SHORTCUTS = VAEConfig(
    dim=4, decoder_dim=4, multipliers=(2, 2), halve_time=(True,), blocks=1, latent_channels=2,
    mean=(0.1, -0.2), std=(1.5, 0.7), patch=2, residual=True,
)  # fmt: skip
# Configuration, latents and mesh.
CASES = {
    "flat": (FLAT, (3, 4, 64), {"context": 8}),
    "shortcuts": (SHORTCUTS, (2, 8, 32), {"context": 4, "tensor": 2}),
    # five columns for eight devices, of which three hold nothing
    "flat_odd": (FLAT, (3, 3, 5), {"context": 8}),
    "shortcuts_odd": (SHORTCUTS, (2, 3, 5), {"data": 2, "context": 2, "tensor": 2}),
}
PICTURES = (None, None, "rows", "columns", None)


def measured(config: VAEConfig, latents: tuple[int, int, int], sizes: dict) -> dict[str, dict]:
    """Both directions on the mesh and on one device."""
    case, sharding = Case(config, latents, batch=1), Sharding(make_mesh(**sizes))
    rebuild, params = split_params(vae_of(config))
    pictures = sharding.placed(*PICTURES)
    even = latents[1] % sharding.ways("rows") == latents[2] % sharding.ways("columns") == 0
    allowed = announced_pictures(sharding, config, latents)
    found = {}
    for direction, x in zip(("encode", "decode"), inputs_of(case), strict=True):

        def run(params, x, sharding, direction=direction):
            return getattr(rebuild(params), direction)(x, sharding=sharding)

        one = jit(run, static_argnums=2).lower(params, x, None).compile()
        given = jax.device_put(x, pictures if even else sharding.placed())
        placed = jax.device_put(params, sharding.placed())
        many = jit(run, static_argnums=2).lower(placed, given, sharding).compile()
        got, want = many(placed, given), np.asarray(one(params, x))
        hlo = many.as_text()
        alone, spread = one.memory_analysis(), many.memory_analysis()
        found[direction] = {
            "difference": relative_error(got, want),
            "unannounced": [
                f"{c.kind} along {c.axes}, {c.elements}: {c.source}"
                for c in unannounced(hlo, sharding, allowed=allowed)
            ],
            "kinds": sorted({c.kind for c in collectives(hlo, sharding.mesh)}),
            "input": [
                x.nbytes,
                spread.argument_size_in_bytes - alone.argument_size_in_bytes + x.nbytes,
            ],
            "output": [want.nbytes, spread.output_size_in_bytes],
            "temporaries": [alone.temp_size_in_bytes, spread.temp_size_in_bytes],
        }
    return found


def pipeline() -> dict[str, float]:
    """What a pipeline encodes and decodes on a mesh, against one device."""
    vae, sharding = vae_of(FLAT), Sharding(make_mesh(context=4, tensor=2))
    draw = np.random.RandomState(3)
    first, last = draw.randint(0, 256, (2, 6, 14, 3)).astype(np.uint8)
    latents = draw.standard_normal((2, 2, 3, 7, 2)).astype(np.float32)
    config = small_config("t2v")
    made = {
        place: (
            first_frame(vae, first, place),
            beside_channels(vae, first, 5, last, place),
            WanPipeline(config, {"vae": vae}, placement=place).decode(latents),
        )
        for place in (None, sharding)
    }
    names = ("first_frame", "beside_channels", "decode")
    return {
        name: relative_error(got, np.asarray(want))
        for name, got, want in zip(names, made[sharding], made[None], strict=True)
    }


if __name__ == "__main__":
    found = {name: measured(*CASES[name]) for name in sys.argv[1:] if name != "pipeline"}
    if "pipeline" in sys.argv:
        found["pipeline"] = pipeline()
    print(json.dumps(found))
