"""Loads and saves weights on 8 CPU devices, in a process of its own; prints what it found.

XLA_FLAGS=--xla_force_host_platform_device_count=8 python tests/wan_weights_sharded.py FOLDER
"""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from vmonarch_jax.models.params import split_params
from vmonarch_jax.models.wan.sharding import Sharding, make_mesh
from vmonarch_jax.models.wan.weights.detect import detect
from vmonarch_jax.models.wan.weights.load import load_part
from vmonarch_jax.models.wan.weights.lora import merge_lora, save_lora
from vmonarch_jax.models.wan.weights.parts import part_entries
from vmonarch_jax.models.wan.weights.save import export_weights, save_weights
from wan_weights import SMALL, random_params

NAME = "blocks.mlp_in.kernel"


def same(got, want):
    return all(np.array_equal(np.asarray(got[name]), value) for name, value in want.items())


def placed(params, sharding):
    wanted = sharding.param_shardings(part_entries(SMALL, "transformer"))
    return all(value.sharding == wanted[name] for name, value in params.items())


def main():
    folder = Path(sys.argv[1])
    want = random_params(SMALL)
    export_weights(folder / "a", SMALL, {"transformer": want})
    one, other = Sharding(make_mesh(fsdp=4, tensor=2)), Sharding(make_mesh(context=2, fsdp=4))

    model = load_part(detect(folder / "a"), "transformer", jnp.float32, one)
    params = split_params(model)[1]
    found = {"devices": jax.device_count(), "loaded": same(params, want)}
    found["split"] = placed(params, one)
    shapes = {shard.data.shape for shard in params[NAME].addressable_shards}
    found["shares"] = shapes == {(3, 6, 20)}

    save_weights(folder / "b", SMALL, {"transformer": params})
    again = split_params(load_part(detect(folder / "b"), "transformer", jnp.float32, other))[1]
    found["restored elsewhere"] = same(again, want) and placed(again, other)

    export_weights(folder / "c", SMALL, {"transformer": again}, "original")
    back = split_params(load_part(detect(folder / "c"), "transformer", jnp.float32))[1]
    found["exported"] = same(back, want)

    a, b = np.ones((3, 24, 2), np.float32), np.ones((3, 2, 40), np.float32)
    entries = part_entries(SMALL, "transformer")
    save_lora(folder / "lora.safetensors", {NAME: (a, b)}, entries)
    merged = merge_lora(params, folder / "lora.safetensors", entries)
    found["lora"] = same(merged, want | {NAME: want[NAME] + 2}) and placed(merged, one)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
