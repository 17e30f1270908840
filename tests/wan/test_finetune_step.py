"""A step of tuning before it is run: its shapes, what it would take, and a batch in parts."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from vmonarch_jax.models import FlowConfig, cli
from vmonarch_jax.models.step import abstract_state, init_state
from vmonarch_jax.models.wan.finetune.adapters import LoRA
from vmonarch_jax.models.wan.finetune.cache import ClipCache, ClipSettings
from vmonarch_jax.models.wan.finetune.data import find_clips
from vmonarch_jax.models.wan.finetune.plan import make_tuning_plan, step_flops, step_memory
from vmonarch_jax.models.wan.finetune.prepare import (
    Tuning,
    abstract,
    gradient_of,
    prepare,
    train_config,
)
from vmonarch_jax.models.wan.generate.plan import Device
from vmonarch_jax.models.wan.presets import MODELS
from vmonarch_jax.models.wan.sharding import AXES, Sharding
from vmonarch_jax.models.wan.weights.detect import detect
from vmonarch_jax.models.wan.weights.random_folder import (
    random_folder,
    random_params,
    small_config,
)
from wan_clips import write_clips

import vmonarch_jax as vm

KINDS = {
    "lora": Tuning(vm.VMonarch(), LoRA(rank=3)),
    "full": Tuning(vm.VMonarch(), None),
    "salad": Tuning(vm.Salad(), LoRA(rank=3, projections=("cross",)), linear_branch=True),
}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A folder of weights and one of videos."""
    root = tmp_path_factory.mktemp("step")
    random_folder(root / "wan", small_config("t2v"))
    write_clips(root / "videos", 2)
    return root


def cache_of(places):
    clips = find_clips(places / "videos")
    return ClipCache(detect(places / "wan"), clips, ClipSettings(5, (48, 32), 16), places / "cache")


@pytest.mark.slow
def test_a_batch_in_parts_is_the_batch():
    """Frames that are given differ from video to video, and so does what a part is judged by."""
    config = small_config("ti2v")
    one_layer = dataclasses.replace(config.transformer, layers=1)
    config = dataclasses.replace(config, transformer=one_layer)
    how = Tuning(vm.Dense(), LoRA(rank=2), dtype="float32", remat="none", first_frame_share=0.5)
    model, shapes, _ = abstract(config, how)
    rng = np.random.default_rng(0)
    trained = {
        name: jnp.asarray(0.1 * rng.normal(size=x.shape), x.dtype) for name, x in shapes.items()
    }
    frozen = random_params(config, "transformer")
    sizes = config.transformer
    batch = {
        "latents": rng.normal(size=(4, 3, 4, 6, sizes.out_channels)).astype(np.float32),
        "text": rng.normal(size=(4, 7, sizes.text_dim)).astype(np.float32),
    }
    empty = jnp.zeros((7, sizes.text_dim))

    def gradient(parts):
        function = gradient_of(config, model, FlowConfig(), how, parts=parts)
        return jax.jit(function)(trained, jax.random.key(1), batch, frozen, empty)

    whole, split = gradient(1), gradient(2)
    assert all(np.abs(value).max() > 0 for value in whole[1].values())
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(split), strict=True):
        np.testing.assert_allclose(b, a, atol=1e-5 * np.abs(a).max())


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_are_those_of_what_is_loaded(places, kind):
    how, config = KINDS[kind], train_config(kind == "full")
    found = detect(places / "wan")
    shapes = abstract(found.config, how)[1:]
    _, trained, frozen = prepare(found, how, seed=0)
    chex.assert_trees_all_equal_shapes_and_dtypes((trained, frozen), shapes)
    state = init_state(trained, config)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, abstract_state(shapes[0], config))
    plan = make_tuning_plan(cache_of(places), config, how)
    held = {
        "weights that stay": frozen,
        "weights that are trained": state.params,
        "their average and moments": (state.step, state.ema, state.optimizer),
    }
    for what, tree in held.items():
        assert plan.memory.get(what, 0) == sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    assert plan.parameters[0] == sum(leaf.size for leaf in trained.values())


def test_a_mesh_holds_its_share_of_full_size_weights():
    mesh = jax.sharding.AbstractMesh((1, 2, 4, 1), AXES)
    _, trained, frozen = abstract(
        MODELS["wan2.1-t2v-14B"], Tuning(vm.VMonarch()), Sharding(mesh)  # pyright: ignore
    )  # fmt: skip
    whole = {name: np.prod(x.shape) for name, x in frozen.items()}
    share = {name: np.prod(x.sharding.shard_shape(x.shape)) for name, x in frozen.items()}
    assert sum(whole.values()) > 14e9
    assert sum(share.values()) < 1.01 * sum(whole.values()) / 8
    assert all(x.sharding.is_fully_replicated for x in trained.values()), "adapters are thin"


RECORD = json.loads((Path(__file__).parents[2] / "benchmarks/wan_memory.json").read_text())["cases"]
COMPILED = [name for name, case in RECORD.items() if case.get("tuned") and case["fits"]]


@pytest.mark.parametrize("name", COMPILED)
def test_memory_is_near_what_the_compiler_takes(name):
    case = RECORD[name]
    model = MODELS[{"1.3B": "wan2.1-t2v-1.3B", "14B": "wan2.1-t2v-14B"}[case["part"]]]
    methods = {"dense": vm.Dense(), "vmonarch": vm.VMonarch(), "salad": vm.Salad()}
    method = methods[case["attention"]]
    lora = LoRA() if case["tuned"] == "lora" else None
    how = Tuning(method, lora, linear_branch=case["attention"] == "salad")
    sizes = dict(case["mesh"])
    mesh = jax.sharding.AbstractMesh(tuple(sizes.get(axis, 1) for axis in AXES), AXES)
    sharding = Sharding(mesh) if sizes else None  # pyright: ignore[reportArgumentType]
    config = train_config(lora is None, batch_size=case["batch"])
    found = step_memory(model, config, how, vm.VideoGrid(21, 30, 52), sharding)
    compiled = case["weights"] + case["inputs"] + case["outputs"] + case["temporaries"]
    assert sum(found.values()) == pytest.approx(compiled, rel=0.25)


def test_dry_run_says_what_a_step_takes(places, tmp_path, capsys):
    common = ["finetune", "--weights", places / "wan", "--data", places / "videos", "--dry-run"]
    common += ["--size", "48x32", "--frames", "5", "--steps", "40", "--out", tmp_path / "run"]

    def said(*flags):
        assert cli.main([str(flag) for flag in (*common, *flags)]) == 0
        return capsys.readouterr().out

    one = said("--rank", "3")
    for line in (
        "data: 2 videos of 5 x 48x32 at 16 a second, 2 of them to be encoded first",
        "tokens of a video: 12 (2x2x3)",
        "trained: LoRA of rank 3 on attn, under VMonarch",
        "a step: 1 video, 1 at a time, on 1 device",
        "memory of a device in all: about",
        "40 steps: about",
    ):
        assert line in one
    assert "a step: 2 videos, 1 at a time" in said("--batch-size", "2", "--accumulate", "2")
    assert "trained: all weights" in said("--full")
    mesh = said("--mesh", "fsdp=2", "--batch-size", "2")
    assert "2 videos, 2 at a time, on 2 devices" in mesh, "which this machine need not have"
    assert not (tmp_path / "run").exists()
    assert not (places / "cache").exists()
    wrong = [*common, "--batch-size", "2", "--accumulate", "3"]
    assert cli.main([str(flag) for flag in wrong]) == 2
    assert "parts (--accumulate) that divide batch_size = 2, got 3" in capsys.readouterr().err


def test_flops_count_what_is_computed_again():
    """Under dense attention at full size: the forward pass of the paper's count, and its parts."""
    config, grid = MODELS["wan2.1-t2v-1.3B"], vm.VideoGrid(21, 30, 52)
    how = Tuning(vm.Dense(), None, remat="none")
    methods = [vm.Dense()] * config.transformer.layers
    heads = {"heads": 12, "head_dim": 128}
    forward = vm.flops.transformer(vm.flops.WAN_1_3B, vm.Dense(), grid)
    attention = 30 * vm.flops.attention(vm.Dense(), grid, **heads)
    counted = {
        remat: step_flops(config, dataclasses.replace(how, remat=remat), methods, grid)
        for remat in ("none", "dots", "full")
    }
    assert counted["none"] == 3 * forward + attention // 2
    assert counted["dots"] - counted["none"] == attention
    assert counted["full"] - counted["none"] == forward
    thin = step_flops(config, dataclasses.replace(how, lora=LoRA()), methods, grid)
    assert counted["none"] - thin == forward - attention


@pytest.mark.parametrize(("memory", "said"), [(1 << 40, ", of the"), (1 << 10, "MORE THAN")])
def test_plan_says_whether_a_device_has_the_memory(places, memory, said):
    plan = make_tuning_plan(cache_of(places), train_config(), KINDS["lora"])
    plan = dataclasses.replace(plan, device=Device("TPU v5e", memory, 197e12))
    assert plan.fits == (memory > plan.peak)
    assert f"{said} {'the ' * (said == 'MORE THAN')}1" in str(plan)
    assert "at the peak rate of TPU v5e a step takes" in str(plan)


@pytest.mark.slow
def test_eight_devices_and_parts_give_the_gradient_of_one():
    # The number of CPU devices is fixed when JAX starts, so this takes a process of its own.
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, Path(__file__).parent.parent / "wan_tuned.py"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr[-4000:]
    for tuned, got in json.loads(done.stdout.splitlines()[-1]).items():
        assert got["difference"] < 1e-5, tuned
        assert got["unannounced"] == [], tuned
