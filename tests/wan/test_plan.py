"""What `--dry-run` says: on one device, on a mesh that need not be there, against what compiled."""

import dataclasses
import json
import math
import types
from pathlib import Path

import jax
import pytest
from jax.sharding import AbstractMesh
from vmonarch_jax.models import cli
from vmonarch_jax.models.wan import presets
from vmonarch_jax.models.wan.generate import plan
from vmonarch_jax.models.wan.generate.estimate import (
    step_bytes,
    text_bytes,
    vae_bytes,
    weight_bytes,
)
from vmonarch_jax.models.wan.linear_branch import with_linear_layers
from vmonarch_jax.models.wan.memory import state_bytes
from vmonarch_jax.models.wan.request import Request
from vmonarch_jax.models.wan.sharding import AXES, Sharding
from vmonarch_jax.models.wan.weights.random_folder import random_folder, small_config

import vmonarch_jax as vm
from benchmarks.wan_memory import HBM
from benchmarks.wan_steps import SIZES

RECORD = Path(__file__).parents[2] / "benchmarks" / "wan_memory.json"
MODELS = {"1.3B": presets.MODELS["wan2.1-t2v-1.3B"], "14B": presets.MODELS["wan2.1-t2v-14B"]}
VAES = {"2.1": MODELS["1.3B"], "2.2": presets.MODELS["wan2.2-ti2v-5B"]}


def on(**sizes):
    """A mesh that is not there; `None` without any sizes."""
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    return Sharding(AbstractMesh(shape, AXES)) if sizes else None


def recorded(*parts):
    """What was compiled of some parts and fits, by name; of transformers calls, not tuning."""
    cases = json.loads(RECORD.read_text())["cases"]
    return {
        name: case for name, case in cases.items()
        if case["part"] in parts and case["fits"] and not case.get("tuned")
    }  # fmt: skip


def beside_weights(case):
    return sum(case[part] for part in ("inputs", "outputs", "temporaries"))


def test_estimate_of_encoding_and_decoding_is_near_what_is_compiled():
    config = MODELS["1.3B"]
    (text,) = recorded("text").values()
    assert text_bytes(config) == pytest.approx(beside_weights(text), rel=0.3)
    videos = recorded(*(f"{way}-{version}" for way in ("decoder", "encoder") for version in VAES))
    assert len(videos) >= 6
    off = {}
    for name, case in videos.items():
        way, version = case["part"].split("-")
        config, (frames, height, width) = VAES[version], SIZES[case["size"]]
        request = Request.of(config, prompt="a cat", size=(width, height), frames=frames)
        estimate = vae_bytes(config, request, way == "decoder", on(**dict(case["mesh"])))
        taken = beside_weights(case)
        if abs(estimate - taken) > 0.4 * taken:
            off[name] = f"estimate {estimate / 2**30:.2f} GiB, compiled {taken / 2**30:.2f}"
    assert off == {}


def test_estimate_of_a_step_is_near_what_is_compiled():
    off = {}
    for name, case in recorded(*MODELS).items():
        config, placement = MODELS[case["part"]], on(**dict(case["mesh"]))
        if case["attention"] == "salad":
            sizes = with_linear_layers(config.transformer, range(config.transformer.layers))
            config = dataclasses.replace(config, transformer=sizes)
        weights = weight_bytes(config, "transformer", placement)
        # some small ones stay float32, which in the record are bfloat16
        assert case["weights"] <= weights < 1.01 * case["weights"], name
        grid = config.grid_of(*SIZES[case["size"]])
        kind = "TPU7x" if case["chip"] == "7x" else ""
        estimate = weights + step_bytes(config.transformer, grid, case["batch"], placement, kind)
        taken = case["weights"] + beside_weights(case)
        # nobody minds a hundredth of the device's memory, which is more where many share a video
        if abs(estimate - taken) > max(taken / 3, 0.01 * HBM[case["chip"]] * 2**30):
            off[name] = f"estimate {estimate / 2**30:.2f} GiB, compiled {taken / 2**30:.2f}"
    assert off == {}


def test_a_mesh_divides_what_its_rules_divide():
    config = MODELS["14B"]
    whole = weight_bytes(config, "transformer")
    for sizes in ({"context": 8}, {"fsdp": 2, "context": 4}, {"tensor": 8}):
        share = weight_bytes(config, "transformer", on(**sizes))
        # those without heads or hidden channels are not split along tensor
        assert whole / 8 <= share < 1.2 * whole / 8, sizes
        assert weight_bytes(config, "vae", on(**sizes)) == weight_bytes(config, "vae")
    request = Request.of(config, prompt="a cat", size=(832, 480))
    grid = request.grid(config)
    one = step_bytes(config.transformer, grid, 2)
    assert step_bytes(config.transformer, grid, 2, on(data=2)) == step_bytes(
        config.transformer, grid, 1
    )
    for sizes in ({"data": 2, "context": 4}, {"context": 8}, {"tensor": 8}):
        assert one / 16 < step_bytes(config.transformer, grid, 2, on(**sizes)) < one, sizes
    (held,) = state_bytes(config, request, vm.Corrected(), True).values()
    sizes = config.transformer
    assert held > 2 * sizes.layers * grid.tokens * sizes.dim * 2  # two texts, bfloat16
    (share,) = state_bytes(config, request, vm.Corrected(), True, on(data=2, context=4)).values()
    assert held / 8 <= share < 1.01 * held / 8
    video = vae_bytes(config, request, True)
    assert video / 4 <= vae_bytes(config, request, True, on(data=2, context=2)) < 1.1 * video / 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return random_folder(tmp_path_factory.mktemp("weights") / "wan", small_config("t2v"))


def dry_run(folder, *flags):
    common = ["--prompt", "a fox", "--size", "48x32", "--frames", "5", "--steps", "4"]
    return cli.main(["generate", "--weights", str(folder), *common, "--dry-run", *flags])


def test_report_of_a_mesh_that_is_not_there(folder, capsys):
    assert dry_run(folder) == 0
    alone = capsys.readouterr().out
    assert "per device" not in alone
    assert dry_run(folder, "--mesh", "data=2", "--compare", "corrected") == 0
    said = capsys.readouterr().out
    assert "mesh: data=2; memory is per device, 2 devices" in said
    assert "per device" in said.split("peak memory: ")[1]
    assert "comparison: " in said
    assert dry_run(folder, "--mesh", "data=2", "--two-calls") == 2
    assert "data * fsdp divides the 1 videos of a call" in capsys.readouterr().err
    assert dry_run(folder, "--mesh", "tensor=5") == 2
    assert "divides 3 heads" in capsys.readouterr().err


def test_report_knows_the_device(folder, monkeypatch, capsys):
    device = types.SimpleNamespace(
        device_kind="TPU v5 lite", memory_stats=lambda: {"bytes_limit": 2**20}
    )
    with monkeypatch.context() as patch:
        patch.setattr(plan.jax, "devices", lambda: [device])
        here = plan.Device.here()
        assert dry_run(folder, "--mesh", "data=2") == 0
    said = capsys.readouterr().out
    assert here == plan.Device("TPU v5 lite", 2**20, 197e12)
    assert "MORE THAN the 1.0 MiB of a TPU v5 lite" in said
    flops = float(said.split("denoising: ")[1].split()[0]) * 1e15
    assert "at the peak rate of 2 x TPU v5 lite (197 TFLOP/s each in bfloat16)" in said
    seconds = float(said.split("these alone take ")[1].split()[0])
    assert math.isclose(seconds, flops / 2 / 197e12, rel_tol=0.1)
    assert plan.Device.here().peak is None, "of a CPU nothing is said"
    assert jax.devices()[0].platform == "cpu"
