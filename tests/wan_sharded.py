"""Runs on 8 CPU devices, in a process of its own (wan/test_sharding.py): prints what it found.

XLA_FLAGS=--xla_force_host_platform_device_count=8 python tests/wan_sharded.py model 0 1 2 3
"""

import dataclasses
import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from compiling import jit
from flax import nnx
from remembering import Echo
from vmonarch_jax.models.params import split_params
from vmonarch_jax.models.wan.collectives import collectives, unannounced
from vmonarch_jax.models.wan.conditions import Conditions
from vmonarch_jax.models.wan.config import TransformerConfig
from vmonarch_jax.models.wan.generate.compare import certify
from vmonarch_jax.models.wan.keys_transformer import transformer_entries
from vmonarch_jax.models.wan.linear_branch import BRANCH
from vmonarch_jax.models.wan.memory import begin
from vmonarch_jax.models.wan.pipeline import WanPipeline
from vmonarch_jax.models.wan.presets import MODELS
from vmonarch_jax.models.wan.request import Request
from vmonarch_jax.models.wan.sharding import Sharding, make_mesh
from vmonarch_jax.models.wan.transformer import WanTransformer

import vmonarch_jax as vm

METHODS = {"dense": vm.Dense(), "vmonarch": vm.VMonarch(), "tiled": vm.TiledMonarch()}
BATCH, HEADS, TEXT = 4, 8, 5
# 45 tokens: none of these numbers of devices divides them.
GRID = vm.VideoGrid(3, 5, 3)
CONFIG = TransformerConfig(
    dim=96, heads=HEADS, layers=2, ffn_dim=160, in_channels=4, out_channels=4, text_dim=24,
    text_length=7, freq_dim=16, dtype="float32", per_token_time=True,
)  # fmt: skip


MESHES = (
    {"data": 2, "context": 2, "tensor": 2},
    {"context": 8},
    {"fsdp": 2, "context": 2, "tensor": 2},
    {"fsdp": 4, "tensor": 2},
)


def difference(one, other):
    """Largest difference of two trees' arrays, each relative to the array's largest value."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    pairs = [(np.asarray(a), np.asarray(b)) for a, b in pairs]
    return max(float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-3)) for a, b in pairs)


def drawn(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def with_gradients(function):
    """`function`'s output and its gradients for all arguments, against fixed cotangents."""

    def run(*arrays):
        out, pull = jax.vjp(function, *arrays)
        return out, pull(jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape))

    return run


def attention():
    """`Sharding.attend` against the method itself, where tokens divide and where they do not."""
    calls = (
        ("vmonarch", vm.VideoGrid(4, 2, 4), {"context": 8}),
        ("tiled", GRID, {"data": 2, "context": 2, "tensor": 2}),
        ("dense", GRID, {"context": 8}),
    )
    found = {}
    for name, grid, mesh in calls:
        sharding, method = Sharding(make_mesh(**mesh)), METHODS[name]
        arrays = [drawn(n, BATCH, grid.tokens, HEADS, 6) for n in range(3)]

        def call(q, k, v, s=sharding, m=method, g=grid):
            q, k, v = (s.constrain(x, "batch", "seq", "heads", None) for x in (q, k, v))
            return s.attend(m, q, k, v, g)

        want = jit(with_gradients(lambda *a, m=method, g=grid: m(*a, grid=g)))(*arrays)
        compiled = jit(with_gradients(call)).lower(*arrays).compile()
        found[f"{name}, {grid.tokens} tokens, {mesh}"] = {
            "difference": difference(compiled(*arrays), want),
            "exchanges": exchanges(compiled, sharding),
        }
    q, k, v = (drawn(n, BATCH, size, HEADS, 6) for n, size in enumerate((GRID.tokens, TEXT, TEXT)))
    sharding = Sharding(make_mesh(data=2, context=2, tensor=2))
    want = jit(with_gradients(vm.dense_attention))(q, k, v)
    over = jit(with_gradients(lambda *a: sharding.attend(vm.Dense(), *a, None)))
    compiled = over.lower(q, k, v).compile()
    found["text"] = {
        "difference": difference(compiled(q, k, v), want),
        "exchanges": exchanges(compiled, sharding),
    }
    return found


def exchanges(compiled, sharding):
    kinds = [c.kind for c in collectives(compiled.as_text(), sharding.mesh)]
    return kinds.count("all-to-all")


def model(*chosen):
    """The forward pass and a step of training, each against one device; what was not announced."""
    rebuild, params = split_params(WanTransformer(CONFIG, rngs=nnx.Rngs(0)))
    entries = transformer_entries(CONFIG)
    size = (GRID.frames, 2 * GRID.height, 2 * GRID.width)
    data = (
        drawn(1, BATCH, *size, CONFIG.in_channels),
        1000 * jax.random.uniform(jax.random.key(2), (BATCH, GRID.frames)),
        drawn(3, BATCH, TEXT, CONFIG.text_dim),
    )
    optimizer = optax.sgd(0.1)  # its step is the gradient; Adam's is mostly its sign

    def forward(sharding, params, *data):
        return rebuild(params)(*data, attention=vm.VMonarch(), sharding=sharding)

    def step(sharding, params, state, *data):
        def loss(params):
            out = forward(sharding, params, *data)
            return jnp.square(out - data[0]).mean(), out

        (value, out), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(gradient, state, params)
        norm = optax.global_norm(gradient)
        return out, value, norm, updates, optax.apply_updates(params, updates)

    state = optimizer.init(params)
    want = jit(step, static_argnums=0)(None, params, state, *data)
    found = {}
    for number in chosen:
        sharding = Sharding(make_mesh(**MESHES[int(number)]))
        there = sharding.param_shardings(entries)
        placed = jax.device_put(params, there)
        given = [jax.device_put(x, sharding.placed("batch", *[None] * (x.ndim - 1))) for x in data]
        run = jit(forward, static_argnums=0).lower(sharding, placed, *given).compile()
        train = jit(step, static_argnums=0).lower(sharding, placed, state, *given).compile()
        got = train(placed, state, *given)
        kept = [got[3][n].sharding.is_equivalent_to(there[n], got[3][n].ndim) for n in params]
        found[str(sharding.mesh.shape_tuple)] = {
            "forward": difference(run(placed, *given), want[0]),
            "step": difference(got, want),
            "kept": all(kept),
            "unannounced": [
                f"{c.kind} along {c.axes}: {c.source}"
                for text, training in ((run.as_text(), False), (train.as_text(), True))
                for c in unannounced(text, sharding, training)
            ],
            "kinds": sorted({c.kind for c in collectives(run.as_text(), sharding.mesh)}),
        }
    return found


def memory():
    """Three steps of a model that remembers, on a mesh and on one device; where its states lie."""
    config = dataclasses.replace(CONFIG, layers=3)
    rebuild, params = split_params(WanTransformer(config, rngs=nnx.Rngs(0)))
    size = (GRID.frames, 2 * GRID.height, 2 * GRID.width)
    data = (
        drawn(1, BATCH, *size, config.in_channels),
        1000 * jax.random.uniform(jax.random.key(2), (BATCH,)),
        drawn(3, BATCH, TEXT, config.text_dim),
    )
    # tiers are compared between the heads of a device, so here all of them are alike
    sparse = vm.AdaSpa(0.5, 8, (1,), warmup_steps=0, head_adaptive=False)
    guided = vm.Guided(vm.VMonarch(block=(3, 1, 1)), exact_blocks=2, every=2)
    methods = (Echo(), vm.Corrected(sparse, refresh_steps=(2,)), guided)

    def forward(sharding, params, memory, step, *data):
        return rebuild(params)(
            *data, attention=methods, sharding=sharding, memory=memory, step=step
        )

    def run(sharding, params, compiled):
        memory = begin(config, GRID, BATCH, methods, placement=sharding)
        where = None if sharding is None else sharding.state_shardings(memory)
        outs, kept = [], []
        for step in range(3):
            out, memory = compiled(params, memory, jnp.int32(step), *data)
            outs.append(out)
            if where is not None:
                kept += jax.tree.leaves(
                    jax.tree.map(lambda x, w: x.sharding.is_equivalent_to(w, x.ndim), memory, where)
                )
        return outs, all(kept), memory

    want, _, states = run(None, params, jit(functools.partial(forward, None)))
    found = {}
    for sizes in MESHES[:1]:
        sharding = Sharding(make_mesh(**sizes))
        placed = jax.device_put(params, sharding.param_shardings(transformer_entries(config)))
        compiled = jit(functools.partial(forward, sharding))
        outs, kept, memory = run(sharding, placed, compiled)
        text = compiled.lower(placed, memory, jnp.int32(0), *data).compile().as_text()
        found[str(sizes)] = {
            "difference": difference(outs, want),
            "states": difference(
                jax.tree.map(lambda x: x.astype(jnp.float32), memory),
                jax.tree.map(lambda x: x.astype(jnp.float32), states),
            ),
            "kept": kept,
            "share": memory.of(methods[0])["last"].addressable_shards[0].data.shape,
            "unannounced": [
                f"{c.kind} along {c.axes}: {c.source}" for c in unannounced(text, sharding)
            ],
        }
    return found


def linear():
    """A model one of whose layers has a linear branch, with its gradients, against one device."""
    config = dataclasses.replace(CONFIG, linear_layers=(0,))
    rebuild, params = split_params(WanTransformer(config, rngs=nnx.Rngs(0)))
    new = {name: drawn(4, *value.shape) for name, value in params.items() if BRANCH in name}
    params |= new
    size = (GRID.frames, 2 * GRID.height, 2 * GRID.width)
    data = (
        drawn(1, BATCH, *size, config.in_channels),
        1000 * jax.random.uniform(jax.random.key(2), (BATCH,)),
        drawn(3, BATCH, TEXT, config.text_dim),
    )

    def loss(params, sharding, *data):
        out = rebuild(params)(*data, attention=vm.Dense(), sharding=sharding)
        return jnp.square(out - data[0]).mean(), out

    step = jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
    gates = jit(
        lambda params, sharding, *data: rebuild(params).gates(*data, sharding=sharding),
        static_argnums=1,
    )
    want = step(params, None, *data)
    found = {}
    for sizes in MESHES[:1]:
        sharding = Sharding(make_mesh(**sizes))
        placed = jax.device_put(params, sharding.param_shardings(transformer_entries(config)))
        given = [jax.device_put(x, sharding.placed("batch", *[None] * (x.ndim - 1))) for x in data]
        compiled = step.lower(placed, sharding, *given).compile()
        text = compiled.as_text()
        samples = BATCH // sharding.ways("batch")
        heads = samples * HEADS // sharding.ways("heads")
        states = max(heads * config.head_dim**2, samples * config.dim)
        found[str(sizes)] = {
            "difference": difference(compiled(placed, *given), want),
            "gates": difference(gates(placed, sharding, *given), gates(params, None, *data)),
            "moved": all(float(jnp.abs(want[1][name][0]).max()) > 1e-6 for name in new),
            "unannounced": [
                f"{c.kind} along {c.axes}: {c.source}"
                for c in unannounced(text, sharding, training=True, states=states)
            ],
        }
    return found


def certificate():
    """The certificate of a step by a pipeline on a mesh, and by one on one device."""
    config = dataclasses.replace(
        MODELS["wan2.1-t2v-1.3B"],
        transformer=dataclasses.replace(CONFIG, in_channels=16, out_channels=16),
    )
    request = Request.of(config, prompt="", size=(8 * 6, 8 * 10), frames=9, steps=3)
    assert request.grid(config) == GRID
    conditions = Conditions(drawn(1, 1, TEXT, CONFIG.text_dim), drawn(2, 1, TEXT, CONFIG.text_dim))
    rebuild, params = split_params(WanTransformer(config.transformer, rngs=nnx.Rngs(0)))
    methods = (vm.VMonarch(), vm.Corrected())

    def certified(sharding):
        placed = params
        if sharding is not None:
            entries = transformer_entries(config.transformer)
            placed = jax.device_put(params, sharding.param_shardings(entries))
        parts = {"transformer": rebuild(placed)}
        pipeline = WanPipeline(config, parts, placement=sharding)
        start = pipeline.begin(request, pipeline.noise(request))
        return certify(pipeline, request, conditions, 0, start, methods, batched=True)

    found = {}
    for sizes in MESHES[:1]:
        want, got = (certified(sharding) for sharding in (None, Sharding(make_mesh(**sizes))))
        *want, none = ([row["mean_kl"], row["max_kl"]] for row in want)
        *got, also = ([row["mean_kl"], row["max_kl"]] for row in got)
        found[str(sizes)] = {"got": got, "want": want, "none": [none, also]}
    return found


if __name__ == "__main__":
    parts = {
        "attention": attention, "model": model, "memory": memory, "linear": linear,
        "certificate": certificate,
    }  # fmt: skip
    print(json.dumps(parts[sys.argv[1]](*sys.argv[2:])))
