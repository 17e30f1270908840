"""Runs on 8 CPU devices, in a process of its own (test_sharding.py): prints what it found.

XLA_FLAGS=--xla_force_host_platform_device_count=8 python tests/sharded.py
"""

import json

import jax
import numpy as np
from cases import cotangents_of, inputs_of, library, make
from compiling import jit
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

CASES = {
    "dense": make("dense", 12, 20, heads=4),
    "monarch": make("monarch", 23, block_size=5, heads=4),
    "vmonarch": make("vmonarch", 3, 2, 4, heads=4),
    "tiled": make("tiled", 3, 2, 4, heads=4),
}
MESH = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "heads"))
TOKENS = P("data", None, "heads", None)
ROWS = P("data", None, "heads")


def everything(function):
    def results(arrays, cotangents):
        out, pull = jax.vjp(lambda *a: tuple(function(*a)), *arrays)
        return *out, pull(cotangents)

    return results


def distance(one, other):
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return max(float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in pairs)


def main():
    found = {"devices": jax.device_count()}
    specs = ((TOKENS,) * 3, (TOKENS, ROWS))
    for name, case in CASES.items():
        for implementation in ("reference", "xla"):
            function = everything(library(case, implementation=implementation))
            arguments = (inputs_of(case), cotangents_of(case))
            want = jit(function)(*arguments)
            mapped = jax.shard_map(
                function, mesh=MESH, in_specs=specs, out_specs=(TOKENS, ROWS, (TOKENS,) * 3)
            )
            got = jit(mapped)(*arguments)
            key = f"{name} {implementation}"
            found[f"{key} shard_map"] = distance(got, want)
            assert got[0].sharding.is_equivalent_to(NamedSharding(MESH, TOKENS), 4), key
            if implementation == "reference":
                continue
            # Left to the compiler: arrays that lie sharded over batch and heads.
            shardings = jax.tree.map(lambda spec: NamedSharding(MESH, spec), specs)
            placed = jax.device_put(arguments, shardings)
            found[f"{key} automatic"] = distance(jit(function)(*placed), want)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
