"""Training: it learns, it resumes to the bit after a kill, and its files say what is wrong."""

import csv
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from vmonarch_jax.models import (
    VideoDiT,
    VideoDiTConfig,
    export_params,
    load_model,
    load_params,
    split_params,
)
from vmonarch_jax.models.checkpoint import Checkpoints
from vmonarch_jax.models.loop import Interrupted
from vmonarch_jax.models.metrics import MetricsCSV, plot_losses, read_csv
from vmonarch_jax.models.step import TrainConfig, init_state, learning_rate, make_step
from vmonarch_jax.models.train import train

import vmonarch_jax as vm

SCRIPT = pathlib.Path(__file__).with_name("training_run.py")
MODEL = VideoDiTConfig(frames=2, height=8, width=8, patch=(1, 4, 4), dim=24, depth=1, heads=2)
CONFIG = TrainConfig(steps=6, batch_size=2, warmup_steps=2, save_every=2)


def contents(folder: pathlib.Path):
    """The newest checkpoint's whole state, with where the data iterator stands."""
    _, params = split_params(VideoDiT(MODEL, rngs=nnx.Rngs(9)))
    with Checkpoints(folder / "checkpoints", 1) as checkpoints:
        return checkpoints.restore(init_state(params, CONFIG))


def test_killed_run_resumes_to_the_bit(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    command = [sys.executable, str(SCRIPT), str(killed), "5"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    assert subprocess.run(command, check=False, env=environment).returncode == -signal.SIGKILL
    with Checkpoints(killed / "checkpoints", 2) as checkpoints:
        assert checkpoints.latest() == 4
    for folder in (killed, whole):
        train(folder, MODEL, CONFIG, attention=vm.Dense(), progress=False)
    (state, data), (expected, expected_data) = contents(killed), contents(whole)
    assert int(state.step) == 6
    assert data == expected_data
    chex.assert_trees_all_equal(state, expected)
    assert np.ptp([float(row["loss"]) for row in read_csv(whole / "metrics.csv")]) > 0
    rows, expected_rows = (read_csv(f / "metrics.csv") for f in (killed, whole))
    assert [row["step"] for row in rows] == [str(n) for n in range(1, 7)]
    for row, other in zip(rows, expected_rows, strict=True):
        assert {**row, "seconds": ""} == {**other, "seconds": ""}
    chex.assert_trees_all_equal(load_params(killed / "export"), load_params(whole / "export"))


def batch(size: int = 2):
    rng = np.random.default_rng(0)
    return {
        "video": rng.uniform(-1, 1, (size, *MODEL.video_shape)).astype(np.float32),
        "label": np.arange(size, dtype=np.int32),
        "caption": np.eye(8, dtype=np.float32)[:size],
    }


@pytest.mark.parametrize(
    ("attention", "dtype", "optimizer"),
    [(vm.Dense(), "float32", "adamw"), (vm.VMonarch(), "bfloat16", "muon")],
    ids=["dense-float32-adamw", "vmonarch-bfloat16-muon"],
)
def test_training_lowers_the_loss(attention, dtype, optimizer):
    config = TrainConfig(
        steps=60, batch_size=2, optimizer=optimizer, learning_rate=3e-3, warmup_steps=5
    )
    model = VideoDiT(dataclasses.replace(MODEL, dtype=dtype), attention=attention, rngs=nnx.Rngs(0))
    state, step, losses = init_state(split_params(model)[1], config), make_step(model, config), []
    for _ in range(60):
        state, metrics = step(state, batch())
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])
    chex.assert_tree_all_finite(state)


def test_step_is_clipped_adamw_with_a_warm_average():
    config = TrainConfig(steps=10, batch_size=2, warmup_steps=0, clip_norm=1e-3, ema_decay=0.5)
    model = VideoDiT(MODEL, rngs=nnx.Rngs(0))
    params = jax.tree.map(np.array, split_params(model)[1])
    state, metrics = make_step(model, config)(init_state(split_params(model)[1], config), batch())
    assert metrics["grad_norm"] > 1e-3, "clipping must have something to do"
    clipped = jax.tree.map(lambda m: m / (1 - 0.9), state.optimizer[1][0].mu)
    np.testing.assert_allclose(optax.tree.norm(clipped), 1e-3, rtol=1e-3)
    for name, value in params.items():
        decay = 0.1  # min(0.5, 1 / 10) at the first step
        expected = decay * value + (1 - decay) * state.params[name]
        chex.assert_trees_all_close(state.ema[name], expected, atol=1e-6)
    # with a vanishing gradient Adam stays put, and only matrices decay
    frozen = np.abs(state.params["blocks.0.attention.q_norm.scale"] - 1).max()
    assert frozen <= config.learning_rate * 1.01


def test_schedule_warms_up_and_ends_at_zero():
    rate = learning_rate(TrainConfig(steps=100, warmup_steps=10, learning_rate=2e-3))
    np.testing.assert_allclose([rate(0), rate(5), rate(10)], [0, 1e-3, 2e-3], rtol=1e-6)
    np.testing.assert_allclose([rate(55), rate(100)], [1e-3, 0], atol=1e-9)


def test_interrupt_saves_and_the_same_call_goes_on(tmp_path):
    def interrupt(state):
        if int(state.step) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match="stopped after step 3 of 6"):
        train(
            tmp_path, MODEL, CONFIG, attention=vm.Dense(), progress=False, on_checkpoint=interrupt
        )
    with Checkpoints(tmp_path / "checkpoints", 2) as checkpoints:
        assert checkpoints.latest() == 3
    train(tmp_path, MODEL, CONFIG, attention=vm.Dense(), progress=False)
    assert [int(row["step"]) for row in read_csv(tmp_path / "metrics.csv")] == list(range(1, 7))
    assert (tmp_path / "loss.png").stat().st_size > 1000
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["4", "6"]

    other = dataclasses.replace(CONFIG, learning_rate=1.0)
    message = r"run.json: expected the run that is there, train.learning_rate = "
    with pytest.raises(ValueError, match=message):
        train(tmp_path, MODEL, other, attention=vm.Dense(), progress=False)
    with pytest.raises(ValueError, match="expected workers = 0, as this run was started, got 1"):
        train(tmp_path, MODEL, CONFIG, attention=vm.Dense(), workers=1, progress=False)
    with pytest.raises(ValueError, match=r"run.json: .*VMonarch"):
        train(tmp_path, MODEL, CONFIG, attention=vm.VMonarch(), progress=False)
    for path in (tmp_path / "checkpoints" / "6" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"checkpoints/6/state: expected a complete set of"):
        train(tmp_path, MODEL, CONFIG, attention=vm.Dense(), progress=False)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": 0}, "expected steps >= 1, got 0"),
        ({"learning_rate": -1.0}, "expected learning_rate > 0, got -1.0"),
        ({"optimizer": "sgd"}, "expected an optimizer of ('adamw', 'muon'), got 'sgd'"),
        ({"ema_decay": 1.0}, "expected ema_decay in [0, 1), got 1.0"),
        ({"warmup_steps": -1}, "expected warmup_steps >= 0, got -1"),
    ],
)
def test_train_config_errors(change, words):
    with pytest.raises(ValueError) as error:
        TrainConfig(**change)
    assert words in str(error.value)


@pytest.fixture
def exported(tmp_path):
    model = VideoDiT(MODEL, rngs=nnx.Rngs(0))
    export_params(tmp_path / "model", MODEL, split_params(model)[1], note="a note")
    return tmp_path / "model"


def test_export_keeps_bfloat16_values(exported):
    config, params = load_params(exported)
    assert config == MODEL
    _, original = split_params(VideoDiT(MODEL, rngs=nnx.Rngs(0)))
    rounded = {n: p.astype(jnp.bfloat16).astype(jnp.float32) for n, p in original.items()}
    chex.assert_trees_all_equal(params, rounded)
    model = load_model(exported, attention=vm.VMonarch(), remat=True)
    assert model.attention == vm.VMonarch()
    assert model.config.remat
    assert json.loads((exported / "config.json").read_text())["note"] == "a note"
    # a second export replaces the first and leaves nothing beside it
    export_params(exported, MODEL, {n: 0 * p for n, p in original.items()})
    assert not any(np.any(p) for p in load_params(exported)[1].values())
    assert [p.name for p in exported.parent.iterdir()] == ["model"]


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def damage(folder):
    data = max((folder / "params").rglob("*"), key=lambda p: p.is_file() and p.stat().st_size)
    raw = bytearray(data.read_bytes())
    raw[len(raw) // 2] ^= 0xFF
    data.write_bytes(raw)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: (f / "config.json").unlink(), "config.json: expected the configuration"),
        (lambda f: (f / "config.json").write_text("{"), "got JSONDecodeError"),
        (lambda f: (f / "config.json").write_text("{}"), "got KeyError: 'format'"),
        (lambda f: edit(f, format="other"), "expected format 'vmonarch-video-dit-1', got 'other'"),
        (lambda f: edit(f, config={"unknown": 1}), "got TypeError"),
        (lambda f: edit(f, config={**dataclasses.asdict(MODEL), "dim": 48}), "of shape"),
        (lambda f: edit(f, config={**dataclasses.asdict(MODEL), "depth": 2}), "'blocks.1."),
        (
            lambda f: edit(f, config={**dataclasses.asdict(MODEL), "caption_dim": 0}),
            "expected no parameter",
        ),
        (lambda f: edit(f, sha256="0"), "expected values of SHA-256 0, got"),
        (
            lambda f: [p.write_bytes(b"") for p in (f / "params").rglob("*") if p.is_file()],
            "params: ",
        ),
        (lambda f: (f / "params").rename(f / "gone"), "params: expected a folder of arrays"),
        (damage, "params: expected"),
    ],
)
def test_damaged_exports_say_what_is_wrong(exported, spoil, words):
    spoil(exported)
    with pytest.raises(ValueError) as error:
        load_params(exported)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_overrides_must_leave_the_parameters_alone(exported):
    with pytest.raises(ValueError, match="of shape"):
        load_model(exported, dim=48)


def test_initial_parameters_must_fit(tmp_path):
    with pytest.raises(ValueError, match="initial parameters: expected parameter"):
        train(tmp_path, MODEL, CONFIG, attention=vm.Dense(), initial={}, progress=False)


def test_metrics_drop_what_is_run_again(tmp_path):
    path = tmp_path / "sub" / "metrics.csv"
    metrics = MetricsCSV(path, ("loss",))
    for step in range(1, 5):
        metrics.write(step, {"loss": step / 3})
    with path.open("a") as file:
        file.write("5,")  # a row that a kill cut short
    metrics = MetricsCSV(path, ("loss",), step=3)
    metrics.write(4, {"loss": 9.0})
    with path.open() as file:
        rows = list(csv.reader(file))
    assert rows == [["step", "loss"], ["1", "0.333333"], ["2", "0.666667"], ["3", "1"], ["4", "9"]]
    plot_losses({"a": path, "none": tmp_path / "missing.csv"}, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
