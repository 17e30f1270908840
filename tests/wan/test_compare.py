"""The certificate of a denoising step: right by hand, and the same on eight devices as on one."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import jit
from tolerances import assert_close
from vmonarch_jax.models import AttentionSchedule
from vmonarch_jax.models.wan.generate.compare import Watched, certified_step, certify
from vmonarch_jax.models.wan.pipeline import WanPipeline
from vmonarch_jax.models.wan.request import Request
from vmonarch_jax.models.wan.transformer_layers import OneDevice
from vmonarch_jax.models.wan.weights.random_folder import random_folder, small_config

import vmonarch_jax as vm

SPARSE = vm.AdaSpa(0.5, 4, (1,), warmup_steps=1)


class Seen(OneDevice):
    """Keeps the matrix of each layer's self-attention, where it is one, its queries and keys."""

    def __init__(self):
        self.layers = []

    def attend(self, method, q, k, v, grid, state=None, step=None):
        if grid is not None and not isinstance(method, vm.Corrected):
            one = jnp.eye(grid.tokens, dtype=v.dtype)[:, None]
            values = jnp.broadcast_to(one, (*v.shape[:3], grid.tokens))
            matrix, _ = vm.attend(method, q, k, values, grid=grid, state=state, step=step)
            self.layers.append((matrix, q, k))
        return super().attend(method, q, k, v, grid, state, step)


def divergences(matrix, q, k):
    """KL of each row from the dense one, in float64."""
    matrix, q, k = (np.asarray(x, np.float64) for x in (matrix, q, k))
    logits = np.einsum("znhd,zmhd->znhm", q, k) * q.shape[-1] ** -0.5
    logits -= logits.max(-1, keepdims=True)
    dense = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    kept = np.where(matrix > 1e-12, matrix, 1)
    return np.where(matrix > 1e-12, matrix * np.log(kept / dense), 0).sum(-1)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = random_folder(tmp_path_factory.mktemp("weights") / "wan", small_config("t2v"))
    return WanPipeline.open(folder, "float32")


@pytest.fixture(scope="module")
def request_(pipeline):
    return Request.of(
        pipeline.config, prompt="a red fox", negative_prompt="rain", size=(48, 32), frames=5,
        steps=3,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("index", "batched"),
    [(0, True), pytest.param(2, False, marks=pytest.mark.slow)],
    ids=["first", "last"],
)
def test_certificate_is_the_divergence_by_hand(index, batched, pipeline, request_, monkeypatch):
    # AdaSpa attends densely on step 0, searches on step 1, and then keeps half of the blocks
    sparse = SPARSE if index else vm.TiledMonarch()
    methods = (vm.VMonarch(), sparse, vm.Corrected(vm.VMonarch(), every=3))
    conditions = pipeline.conditions(request_)
    progress = pipeline.begin(request_, pipeline.noise(request_))
    for n in range(index):
        progress = pipeline.step(
            request_, conditions, n, progress, attention=methods, batched=batched
        )
    # step 2 is the last one: nothing is remembered behind it
    got = certify(pipeline, request_, conditions, index, progress, methods, batched)

    model, texts = pipeline.part("transformer"), (conditions.text, conditions.negative)
    calls = [jnp.concatenate(texts)] if batched else texts
    memories = progress.attention or (None,) * len(calls)

    def layers(text, memory):
        seen = Seen()
        x = jnp.concatenate([progress.x] * len(text))
        time = jnp.full(len(text), request_.sampler_value().times[index])
        model(x, time, text, attention=methods, memory=memory, step=index, sharding=seen)
        return seen.layers

    switch = jax.lax.switch
    with monkeypatch.context() as patch:  # a scan is a loop, and a switch runs its branch alone
        patch.setattr(jax.lax, "scan", _scan)
        patch.setattr(jax.lax, "switch", lambda index, calls, *args: (
            calls[index](*args) if isinstance(index, np.integer) else switch(index, calls, *args)
        ))  # fmt: skip
        seen = [jit(layers)(*call) for call in zip(calls, memories, strict=True)]
    assert [len(layers) for layers in seen] == [2] * len(calls)
    for layer in range(2):
        gaps = np.concatenate([divergences(*call[layer]) for call in seen])
        row, expected = got[layer], (gaps.mean(), gaps.max())
        assert_close((row["mean_kl"], row["max_kl"]), expected, "float32", "kl", f"layer {layer}")
        assert row["max_kl"] > 1e-3
    assert got[2] == {"mean_kl": None, "max_kl": None}


@pytest.mark.parametrize(
    ("attention", "step"),
    [
        (vm.VMonarch(), 5),
        (vm.Dense(), 5),
        (AttentionSchedule(vm.VMonarch(), warmup_steps=4), 7),
        (vm.Guided(vm.VMonarch(), every=5), 6),  # of 1 to 4 and 6 to 9
        (vm.AdaSpa(block_size=8, warmup_steps=1, search_steps=(1, 5)), 6),  # of 2 to 4, 6 to 9
    ],
    ids=str,
)
def test_certified_step_is_one_of_the_usual(attention, step):
    config = small_config("t2v")
    request = Request.of(config, prompt="a", steps=10, size=(96, 64), frames=9)
    assert certified_step(attention, request, config) == step


def _scan(body, carry, layers):
    leaves, tree = jax.tree.flatten(layers)
    for n in range(len(leaves[0])):
        carry, _ = body(carry, jax.tree.unflatten(tree, [leaf[n] for leaf in leaves]))
    return carry, None


def test_watching_changes_nothing_but_what_is_remembered():
    grid = vm.VideoGrid(3, 2, 4)
    q, k, v = (jax.random.normal(jax.random.key(n), (2, grid.tokens, 3, 8)) for n in range(3))
    sizes = {"batch": 2, "heads": 3, "head_dim": 8}
    for method in (vm.TiledMonarch(), vm.Corrected(vm.TiledMonarch())):
        watched = Watched(method)
        assert watched == Watched(dataclasses.replace(method))
        state, own = (vm.init_state(m, grid, **sizes) for m in (watched, method))
        for step in range(2):
            out, state = vm.attend(watched, q, k, v, grid=grid, state=state, step=step)
            wanted, own = vm.attend(method, q, k, v, grid=grid, state=own, step=step)
            np.testing.assert_array_equal(out, wanted)
        certified = not isinstance(method, vm.Corrected)
        for number in (state.mean, state.largest):
            assert number.shape == (2, 3)
            assert np.isfinite(number).all() == certified
        np.testing.assert_array_equal(
            watched(q, k, v, grid=grid), method(q, k, v, grid=grid)
        )  # without a state


@pytest.mark.slow
def test_certificate_on_eight_devices_is_that_of_one():
    # The number of CPU devices is fixed when JAX starts, so this takes a process of its own.
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    command = [sys.executable, Path(__file__).parent.parent / "wan_sharded.py", "certificate"]
    done = subprocess.run(
        command, env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True, text=True, timeout=580,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 1
    for mesh, rows in found.items():
        assert_close(rows["got"], rows["want"], "float32", "kl", mesh)
        assert min(largest for _, largest in rows["got"]) > 1e-3, mesh
        assert rows["none"] == [[None, None]] * 2, mesh
