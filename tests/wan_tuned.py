"""The gradient of tuning on eight CPU devices, its batch in parts, beside that of one device.

Runs by itself: `python tests/wan_tuned.py`, with eight devices in `XLA_FLAGS`.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
from vmonarch_jax.models.flow import FlowConfig
from vmonarch_jax.models.wan.collectives import unannounced
from vmonarch_jax.models.wan.config import TransformerConfig
from vmonarch_jax.models.wan.finetune.adapters import LoRA
from vmonarch_jax.models.wan.finetune.prepare import Tuning, abstract, gradient_of
from vmonarch_jax.models.wan.presets import MODELS
from vmonarch_jax.models.wan.sharding import Sharding, make_mesh
from wan_sharded import difference

import vmonarch_jax as vm

BATCH, PARTS = 8, 2
MODEL = dataclasses.replace(
    MODELS["wan2.1-t2v-1.3B"],
    transformer=TransformerConfig(
        dim=96,
        heads=4,
        layers=1,
        ffn_dim=128,
        in_channels=4,
        out_channels=4,
        text_dim=24,
        freq_dim=32,
        text_length=8,
    ),
)


def gradient(how: Tuning, sharding: Sharding | None, parts: int):
    """Loss and gradient at fixed parameters, and the compiled program."""
    model, *shapes = abstract(MODEL, how, sharding)
    rng = np.random.default_rng(0)

    def drawn(shape):
        value = (rng.normal(size=shape.shape) * shape.shape[-1] ** -0.5).astype(shape.dtype)
        return jnp.asarray(value) if sharding is None else jax.device_put(value, shape.sharding)

    trained, frozen = ({n: drawn(tree[n]) for n in sorted(tree)} for tree in shapes)
    batch = {
        "latents": rng.normal(size=(BATCH, 3, 6, 8, 4)).astype(np.float32),
        "text": rng.normal(size=(BATCH, 8, 24)).astype(np.float32),
    }
    empty = np.zeros((8, 24), np.float32)
    if sharding is not None:
        place = {n: sharding.placed("batch", *[None] * (x.ndim - 1)) for n, x in batch.items()}
        batch, empty = jax.device_put((batch, empty), (place, sharding.placed()))
    function = jax.jit(gradient_of(MODEL, model, FlowConfig(), how, sharding, parts))
    given = trained, jax.random.key(1), batch, frozen, empty
    compiled = function.lower(*given).compile()
    return compiled(*given), compiled


def main() -> dict[str, dict[str, object]]:
    """By what is tuned: the difference to one device, and what was not announced."""
    sharding = Sharding(make_mesh(data=2, fsdp=2, context=2))
    found = {}
    for name, lora in (("lora", LoRA(rank=3)), ("full", None)):
        how = Tuning(vm.Dense(), lora, dtype="float32", remat="none")
        want, _ = gradient(how, None, 1)
        got, compiled = gradient(how, sharding, PARTS)
        found[name] = {
            "difference": difference(got, want),
            "unannounced": [
                f"{c.kind} along {c.axes} of {c.elements}: {c.source}"
                for c in unannounced(compiled.as_text(), sharding, training=True)
            ],
        }
    return found


if __name__ == "__main__":
    print(json.dumps(main()))
