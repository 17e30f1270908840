"""Tuning a Wan model from a folder of videos to a LoRA or a whole model, and back into use."""

import dataclasses
import functools
import json
import os
import shutil
import signal
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from vmonarch_jax.models import FlowConfig, cli, split_params
from vmonarch_jax.models.checkpoint import Checkpoints
from vmonarch_jax.models.loop import Interrupted
from vmonarch_jax.models.metrics import read_csv
from vmonarch_jax.models.step import TrainConfig, init_state
from vmonarch_jax.models.wan.finetune import tune as tuning
from vmonarch_jax.models.wan.finetune.adapters import LoRA
from vmonarch_jax.models.wan.finetune.cache import ClipCache, ClipSettings
from vmonarch_jax.models.wan.finetune.data import find_clips, read_clip
from vmonarch_jax.models.wan.finetune.tune import Tuning, tune
from vmonarch_jax.models.wan.keys_transformer import transformer_entries
from vmonarch_jax.models.wan.weights.detect import detect
from vmonarch_jax.models.wan.weights.load import load_part
from vmonarch_jax.models.wan.weights.lora import merge_lora
from vmonarch_jax.models.wan.weights.random_folder import random_folder, small_config
from wan_clips import moving_square, write_clips, write_video

import vmonarch_jax as vm

SETTINGS = ClipSettings(5, (48, 32), 16)
CONFIG = TrainConfig(steps=4, batch_size=2, warmup_steps=1, save_every=2, learning_rate=1e-2)
TUNING = Tuning(vm.VMonarch(), LoRA(rank=3, alpha=6), dtype="float32")


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    """Runs with the same settings share one compiled step."""
    kept, make = {}, tuning.gradient_of

    def gradient_of(model_config, model, flow, how, *rest):
        made = make(model_config, model, flow, how, *rest)
        return kept.setdefault((model_config, flow, how, *rest), made)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "gradient_of", gradient_of)
        patch.setattr(tuning, "make_update", functools.cache(tuning.make_update))
        yield


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Folders of weights and of videos, and a cache that is filled."""
    root = tmp_path_factory.mktemp("finetune")
    random_folder(root / "wan", small_config("t2v"))
    write_clips(root / "videos", 3)
    open_cache(root).fill(progress=False)
    return root


def open_cache(root, folder=None, settings=SETTINGS, weights="wan"):
    clips = find_clips(root / "videos")
    return ClipCache(detect(root / weights), clips, settings, folder or root / "cache", "float32")


def losses(folder):
    return [{**row, "seconds": ""} for row in read_csv(folder / "metrics.csv")]


# Cache


def counting(loaded):
    def load(found, part, dtype):
        loaded.append(part)
        return load_part(found, part, dtype)

    return load


def test_cache_encodes_only_what_is_new(places, tmp_path):
    root = tmp_path / "copy"
    root.mkdir()
    (root / "wan").symlink_to(places / "wan")
    write_clips(root / "videos", 3)
    loaded = []
    source = open_cache(root, places / "cache").fill(counting(loaded), progress=False)
    assert loaded == [], "the same videos and captions are known by what is in them"
    assert len(source) == 3
    shapes = {name: value.shape for name, value in source[1].items()}
    assert shapes == {"latents": (2, 4, 6, 6), "text": (512, 20)}
    assert (source[1]["text"][20:] == 0).all()
    assert np.abs(source.empty_text()).sum() > 0
    vae = load_part(detect(root / "wan"), "vae", jnp.float32)
    pixels = read_clip(find_clips(root / "videos")[2], 5, (48, 32), 16)
    expected = jax.jit(lambda v: vae.encode(v))(pixels[None].astype(np.float32) / 127.5 - 1)
    np.testing.assert_allclose(source[2]["latents"], expected[0], atol=1e-4)

    before = open_cache(root, places / "cache").key
    (root / "videos" / "clip1.txt").write_text("another fox")
    changed = open_cache(root, places / "cache")
    assert changed.key != before
    changed.fill(counting(loaded), progress=False)
    assert loaded == ["text_encoder"]
    write_video(root / "videos" / "clip0.mp4", moving_square(5, seed=9))
    open_cache(root, places / "cache").fill(counting(loaded), progress=False)
    assert loaded == ["text_encoder", "vae"]
    path = min((places / "cache").glob("latents-*"))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    for where in (places, root):  # it is a file of one of them
        open_cache(where, places / "cache").fill(counting(loaded), progress=False)
    assert path.read_bytes() == whole
    assert loaded == ["text_encoder", "vae", "vae"]
    assert not list((places / "cache").glob(".partial*"))


def test_interrupted_cache_keeps_what_it_has(places, tmp_path, monkeypatch):
    loaded = []

    def load(found, part, dtype):
        if part == "text_encoder":
            os.kill(os.getpid(), signal.SIGINT)
        return counting(loaded)(found, part, dtype)

    with pytest.raises(Interrupted, match="stopped after 0 of 4 captions"):
        open_cache(places, tmp_path).fill(load, progress=False)
    assert loaded == ["vae", "text_encoder"]
    source = open_cache(places, tmp_path).fill(counting(loaded), progress=False)
    assert loaded == ["vae", "text_encoder", "text_encoder"]
    other = open_cache(places).fill(progress=False)
    for n in range(3):
        chex.assert_trees_all_equal(source[n], other[n])


# Runs


@pytest.fixture(scope="module")
def run(places):
    """A whole run."""
    folder = places / "run"
    assert tune(folder, open_cache(places), CONFIG, TUNING, progress=False).is_file()
    return folder


def test_lora_file_changes_the_model(places, run):
    found = detect(places / "wan")
    assert sorted(path.name for path in run.iterdir()) == [
        "checkpoints", "lora.safetensors", "loss.png", "metrics.csv", "run.json",
    ]  # fmt: skip
    assert len(losses(run)) == 4
    base = split_params(load_part(found, "transformer", None))[1]
    entries = transformer_entries(found.config.transformer)
    merged = merge_lora(base, run / "lora.safetensors", entries)
    moved = {name for name in base if (np.asarray(base[name]) != np.asarray(merged[name])).any()}
    assert moved == {f"blocks.attn.{name}.kernel" for name in ("q", "k", "v", "out")}
    _, trained, _ = tuning.prepare(found, TUNING, CONFIG.seed)
    with Checkpoints(run / "checkpoints", 2) as checkpoints:
        state, _ = checkpoints.restore(init_state(trained, CONFIG))
    a, b = (state.ema[f"blocks.attn.q.lora_{which}"] for which in "ab")
    expected = 2 * np.einsum("lir,lro->lio", a, b).reshape(base["blocks.attn.q.kernel"].shape)
    difference = merged["blocks.attn.q.kernel"] - base["blocks.attn.q.kernel"]
    np.testing.assert_allclose(difference, expected, atol=1e-6)


def test_interrupted_run_goes_on_to_the_bit(places, run, tmp_path):
    def interrupt(state):
        if int(state.step) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    cache = open_cache(places)
    with pytest.raises(Interrupted, match="stopped after step 3 of 4"):
        tune(tmp_path, cache, CONFIG, TUNING, progress=False, on_checkpoint=interrupt)
    assert tune(tmp_path, cache, CONFIG, TUNING, progress=False) == tmp_path / "lora.safetensors"
    assert losses(tmp_path) == losses(run)
    assert (tmp_path / "lora.safetensors").read_bytes() == (run / "lora.safetensors").read_bytes()

    other = dataclasses.replace(TUNING, attention=vm.Dense())
    with pytest.raises(ValueError, match=r"run.json: expected the run that is there, attention"):
        tune(tmp_path, cache, CONFIG, other, progress=False)
    fewer = ClipCache(cache.found, cache.clips[:2], SETTINGS, cache.folder, "float32")
    with pytest.raises(ValueError, match=r"run.json: expected the run that is there, data"):
        tune(tmp_path, fewer, CONFIG, TUNING, progress=False)


@pytest.mark.slow
def test_killed_run_goes_on_to_the_bit(places, run, tmp_path):
    script = (
        "import os, pathlib, signal, sys; sys.path.insert(0, sys.argv[1])\n"
        "import test_finetune as t\n"
        "def kill(state):\n"
        "    os.kill(os.getpid(), signal.SIGKILL) if int(state.step) == 2 else None\n"
        "cache = t.open_cache(pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3]) / 'cache')\n"
        "run = pathlib.Path(sys.argv[3])\n"
        "t.tune(run, cache, t.CONFIG, t.TUNING, progress=False, on_checkpoint=kill)\n"
    )
    here = os.path.dirname(__file__)
    command = [sys.executable, "-c", script, here, str(places), str(tmp_path)]
    path = os.pathsep.join([os.path.dirname(here), here])
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
    assert subprocess.run(command, check=False, env=environment).returncode == -signal.SIGKILL
    tune(tmp_path, open_cache(places, tmp_path / "cache"), CONFIG, TUNING, progress=False)
    assert losses(tmp_path) == losses(run)
    assert (tmp_path / "lora.safetensors").read_bytes() == (run / "lora.safetensors").read_bytes()


@pytest.mark.slow
def test_full_tuning_learns_one_video_and_goes_home(places, tmp_path):
    (tmp_path / "videos").mkdir()
    (tmp_path / "wan").symlink_to(places / "wan")
    write_video(tmp_path / "videos" / "one.mkv", moving_square(5))
    (tmp_path / "videos" / "one.txt").write_text("a red fox")
    config = TrainConfig(
        steps=60, batch_size=1, warmup_steps=5, learning_rate=3e-3, schedule="constant",
        ema_decay=0.0, save_every=60, flow=FlowConfig(shift=3.0),
    )  # fmt: skip
    how = Tuning(vm.VMonarch(), lora=None, dtype="float32", remat="dots")
    made = tune(tmp_path / "run", open_cache(tmp_path), config, how, progress=False)
    assert made == tmp_path / "run" / "model"
    values = [float(row["loss"]) for row in losses(tmp_path / "run")]
    assert np.mean(values[-10:]) < 0.5 * np.mean(values[:10])

    source, tuned = detect(places / "wan"), detect(made)
    tuned.require(*tuned.required)
    assert tuned.config == source.config
    before, after = (
        split_params(load_part(found, "transformer", None))[1] for found in (source, tuned)
    )
    assert all((np.asarray(before[name]) != np.asarray(after[name])).any() for name in before)
    for part in ("vae", "text_encoder"):
        chex.assert_trees_all_equal(
            *(split_params(load_part(found, part, None))[1] for found in (source, tuned))
        )
    assert not list(made.parent.glob(".model*"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "size", "fields"),
    [
        ("t2v-two", (48, 32), {"part": "transformer_2"}),
        ("ti2v", (64, 32), {"first_frame_share": 0.5}),
        ("i2v", (48, 32), {"dtype": "bfloat16"}),
    ],
)
def test_every_kind_of_model_is_tuned(places, tmp_path, kind, size, fields):
    random_folder(tmp_path / "wan", small_config(kind))
    (tmp_path / "videos").symlink_to(places / "videos")
    settings = dataclasses.replace(SETTINGS, size=size)
    cache = open_cache(tmp_path, settings=settings)
    config = dataclasses.replace(CONFIG, steps=2)
    made = tune(
        tmp_path / "run", cache, config, dataclasses.replace(TUNING, **fields), progress=False
    )
    assert np.isfinite([float(row["loss"]) for row in losses(tmp_path / "run")]).all()
    found = cache.found
    part = fields.get("part", "transformer")
    base = split_params(load_part(found, part, None))[1]
    merge_lora(base, made, transformer_entries(found.config.transformer))


# The command


def command(places, out, *flags):
    common = ["--size", "48x32", "--frames", "5", "--dtype", "float32", "--quiet"]
    weights = [] if "--weights" in flags or "--from" in flags else ["--weights", places / "wan"]
    data = [] if "--data" in flags else ["--data", places / "videos"]
    arguments = ["finetune", *weights, *data, "--out", out, *common, *flags]
    return cli.main([str(argument) for argument in arguments])


def test_command_tunes_and_says_how_to_use_it(places, tmp_path, capsys):
    flags = ["--steps", "4", "--batch-size", "2", "--warmup-steps", "1", "--save-every", "2"]
    flags += ["--learning-rate", "0.01", "--rank", "3", "--alpha", "6", "--shift", "2"]
    assert command(places, tmp_path / "run", *flags, "--cache", places / "cache") == 0
    said = capsys.readouterr().out
    assert "lora.safetensors" in said
    assert f"vmonarch generate --weights {places / 'wan'} --lora" in said
    settings = json.loads((tmp_path / "run" / "run.json").read_text())
    assert settings["train"]["flow"]["shift"] == 2
    assert settings["tuning"]["lora"] == {"rank": 3, "alpha": 6, "projections": ["attn"]}
    assert "VMonarch" in settings["attention"]


@pytest.mark.slow
def test_generate_uses_the_file(places, run, tmp_path, capsys):
    flags = ["--prompt", "a red fox", "--size", "48x32", "--frames", "5", "--steps", "2"]
    flags += ["--dtype", "float32", "--png", "--weights", str(places / "wan"), "--out"]

    def frames(name, *lora):
        assert cli.main(["generate", *flags, str(tmp_path / f"{name}.mp4"), *map(str, lora)]) == 0
        found = sorted((tmp_path / name).glob("*.png"))
        return np.stack([np.asarray(Image.open(path), int) for path in found])

    file = run / "lora.safetensors"
    plain, tuned = frames("plain"), frames("tuned", "--lora", file)
    assert np.abs(tuned - plain).mean() > 1
    weak = frames("weak", "--lora", file, "--lora-strength", "0")
    np.testing.assert_array_equal(weak, plain)
    written = json.loads((tmp_path / "tuned.json").read_text())
    assert written["lora"][0]["path"] == "lora.safetensors"
    capsys.readouterr()
    for lora, words in (
        (["--lora-low", file], "expected transformer_2"),
        (["--lora", places / "wan" / "vae" / "config.json"], "expected .safetensors"),
        (["--lora", min((places / "cache").glob("latents*"))], "expected a LoRA of this model"),
    ):
        assert cli.main(["generate", *flags, str(tmp_path / "no.mp4"), *map(str, lora)]) == 2
        assert words in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("full", [True, False])
def test_four_devices_do_as_one(places, tmp_path, full):
    flags = ["--steps", "3", "--batch-size", "4", "--warmup-steps", "1", "--learning-rate", "0.003"]
    flags += ["--full"] if full else ["--rank", "3"]
    write_clips(tmp_path / "videos", 4)
    flags += ["--data", str(tmp_path / "videos"), "--cache", str(tmp_path / "cache")]
    assert command(places, tmp_path / "one", *flags) == 0
    program = "import sys; from vmonarch_jax.models import cli; sys.exit(cli.main(sys.argv[1:]))"
    common = ["--weights", places / "wan", "--size", "48x32", "--frames", "5"]
    common += ["--dtype", "float32", "--quiet", "--out", tmp_path / "four", *flags, "--mesh"]
    devices = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": devices}
    made, written = tmp_path / "four" / ("model" if full else "lora.safetensors"), []
    # the second call finds a whole run, which was on another mesh
    for mesh in ("data=2,fsdp=2", "fsdp=4"):
        shutil.rmtree(made) if made.is_dir() else made.unlink(missing_ok=True)
        subprocess.run(
            [sys.executable, "-c", program, "finetune", *common, mesh], check=True, env=environment
        )
        files = made.rglob("transformer/*.safetensors") if full else [made]
        written.append([path.read_bytes() for path in sorted(files)])
    assert written[0] == written[1]
    one, four = (
        [[float(row[name]) for name in ("loss", "grad_norm")] for row in losses(tmp_path / run)]
        for run in ("one", "four")
    )
    np.testing.assert_allclose(four, one, rtol=1e-3)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--data", "EMPTY"], "expected videos"),
        (["--data", "NONE"], "expected a folder of videos"),
        (["--weights", "EMPTY"], "expected Wan weights"),
        (["--size", "50x32"], "of a height that 16 divides and a width that 16 divides"),
        (["--frames", "4"], "makes videos of 4 n + 1 frames"),
        (["--frames", "9"], "expected 9 frames of each of 3 videos, got 3 without"),
        (["--batch-size", "4"], "expected at least batch_size = 4 videos, got 3"),
        (["--projections", "attn,head"], "of attn, cross, attn.k, attn.out, attn.q"),
        (["--full", "--rank", "4"], "expected no --rank with --full"),
        (["--expert", "low"], "expected no --expert of a model of one"),
        (["--first-frame-share", "0.5"], "is given no first frame"),
        (["--workers", "2"], "expected no --workers with --weights"),
        (["--optimizer", "muon"], "expected --optimizer adamw"),
        (["--steps", "0"], "expected steps >= 1, got 0"),
        (["--mesh", "data=3"], "whose product is"),
        (["--from", "EMPTY"], "expected no --data, --size with --from"),
    ],
)
def test_mistakes_get_one_message_before_anything_slow(places, tmp_path, capsys, flags, words):
    (tmp_path / "empty").mkdir()
    named = {"EMPTY": tmp_path / "empty", "NONE": tmp_path / "none"}
    assert command(places, tmp_path / "run", *(named.get(flag, flag) for flag in flags)) == 2
    error = capsys.readouterr().err
    assert error.startswith("vmonarch finetune: error: ")
    assert words in error
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_folder_is_no_run_before_its_videos_are_good(places, tmp_path, capsys):
    """Mended videos are other data, and the same command must take them."""
    write_clips(tmp_path / "videos", 1)
    video = tmp_path / "videos" / "clip0.mp4"
    video.write_bytes(video.read_bytes()[:300])
    flags = ["--data", tmp_path / "videos", "--cache", places / "cache"]
    assert command(places, tmp_path / "run", *flags) == 2
    assert "clip0.mp4: expected a readable video" in capsys.readouterr().err
    assert list((tmp_path / "run").iterdir()) == []
    assert command(places, video, *flags) == 2
    assert f"expected --out of a folder, got the file {video}" in capsys.readouterr().err


def test_long_captions_and_runs_inside_the_weights_are_refused(places, tmp_path, capsys):
    write_clips(tmp_path, 1)
    (tmp_path / "clip0.txt").write_text("fox " * 600)
    assert command(places, tmp_path / "run", "--data", tmp_path) == 2
    assert "expected a prompt of at most 512 tokens, got 601" in capsys.readouterr().err
    assert command(places, places / "wan" / "run") == 2
    assert "expected --out outside of the weights" in capsys.readouterr().err
