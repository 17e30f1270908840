"""The command from end to end, on a small random Wan model in a folder like a download."""

import json
import os
import re
import shutil
import subprocess
import sys
import types

import av
import numpy as np
import pytest
from PIL import Image
from tolerances import assert_close
from vmonarch_jax.models import cli
from vmonarch_jax.models.attention_schedule import AttentionSchedule
from vmonarch_jax.models.wan.generate import progress, run
from vmonarch_jax.models.wan.generate.output import read_metadata
from vmonarch_jax.models.wan.pipeline import WanPipeline
from vmonarch_jax.models.wan.request import Request
from vmonarch_jax.models.wan.weights.random_folder import random_folder, small_config

import vmonarch_jax as vm


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return random_folder(tmp_path_factory.mktemp("weights") / "wan", small_config("t2v"))


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    return random_folder(tmp_path_factory.mktemp("weights") / "wan", small_config("ti2v"))


def call(folder, out, *flags, prompt="a red fox runs in snow", size="48x32"):
    """The command's exit status, with a job that is small."""
    common = ["--size", size, "--frames", "5", "--steps", "4", "--dtype", "float32"]
    arguments = ["generate", "--weights", str(folder), "--prompt", prompt, "--out", str(out)]
    return cli.main([*arguments, *common, *flags])


def frames_of(path):
    with av.open(str(path)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


def test_video_frames_and_metadata(folder, tmp_path, capsys):
    out = tmp_path / "video.mp4"
    assert call(folder, out, "--seed", "3", "--dense-steps", "1", "--png") == 0
    video = frames_of(out)
    assert video.shape == (5, 32, 48, 3)
    metadata = read_metadata(out)
    assert metadata == json.loads((tmp_path / "video.json").read_text())
    assert metadata["seed"] == 3
    assert metadata["prompt"] == "a red fox runs in snow"
    assert "VMonarch" in metadata["attention"]
    assert {"jax", "vmonarch_jax", "device", "steps", "shift", "guidance"} <= metadata.keys()
    with Image.open(tmp_path / "video" / "0004.png") as frame:
        assert json.loads(frame.text["vmonarch"]) == metadata
        # the video keeps brightness nearly, and colours at half the resolution
        assert np.abs(np.asarray(frame, int) - video[4]).mean(0).mean(0).max() < 40
        brightness = [np.asarray(x, float) @ (0.299, 0.587, 0.114) for x in (frame, video[4])]
        assert np.abs(brightness[0] - brightness[1]).mean() < 8
    assert sorted(p.name for p in tmp_path.iterdir()) == ["video", "video.json", "video.mp4"]
    assert "denoising" in capsys.readouterr().err


def test_interrupted_run_goes_on_bit_for_bit(folder, tmp_path, monkeypatch, capsys):
    # a method that remembers: what it knew goes on too
    flags = "--attention", "corrected", "--refresh-every", "3", "--residual", "float8"
    whole, halved = tmp_path / "whole.mp4", tmp_path / "halved.mp4"
    assert call(folder, whole, *flags, "--png") == 0
    step, calls = WanPipeline.step, []

    def interrupted(self, request, conditions, index, *rest, **options):
        if index == 2:
            raise KeyboardInterrupt
        return step(self, request, conditions, index, *rest, **options)

    monkeypatch.setattr(WanPipeline, "step", interrupted)
    assert call(folder, halved, *flags, "--png") == 130
    assert "--resume" in capsys.readouterr().err
    assert not halved.exists()

    assert call(folder, halved, *flags, "--png") == 2
    assert "--resume" in capsys.readouterr().err
    assert call(folder, halved, *flags, "--resume", "--seed", "1") == 2
    assert "expected seed of 0, got 1" in capsys.readouterr().err
    assert call(folder, halved, *flags, "--resume", "--seed", "1", "--shift", "3") == 2
    assert "expected seed of 0, got 1; shift of 5.0, got 3.0" in capsys.readouterr().err

    def counted(self, request, conditions, index, *rest, **options):
        calls.append(index)
        return step(self, request, conditions, index, *rest, **options)

    def no_conditions(*_):
        raise AssertionError("the text is not encoded again")

    monkeypatch.setattr(WanPipeline, "step", counted)
    monkeypatch.setattr(WanPipeline, "conditions", no_conditions)
    # what runs the attention changes only the speed
    named = "--implementation", "cudnn,xla"
    assert call(folder, halved, *flags, *named, "--png", "--resume") == 0
    assert calls == [2, 3]
    assert read_metadata(halved)["implementation"] == ["cudnn", "xla"]
    for n in range(5):
        expected, got = (tmp_path / name / f"{n:04d}.png" for name in ("whole", "halved"))
        np.testing.assert_array_equal(Image.open(got), Image.open(expected))
    assert not (tmp_path / "halved.mp4.partial").exists()


def test_time_left_is_that_of_steps_alone(monkeypatch, capsys):
    """What compiles, reads weights or comes in between is not reckoned with."""
    now = [0.0]
    monkeypatch.setattr(progress, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    config = small_config("t2v")
    request = Request.of(config, prompt="a fox", size=(48, 32), frames=5, steps=8)
    schedule = AttentionSchedule(vm.TiledMonarch(), warmup_steps=3)
    dense, tiled = (
        progress.flops_of_each_step(config, request, method)[0]
        for method in (vm.Dense(), vm.TiledMonarch())
    )
    found = []
    with progress.Denoising("denoising", config, request, schedule, done=1) as bar:
        for seconds in (100, 2, 50, 1, 1, 3):
            bar.start()
            now[0] += seconds
            bar.update()
            now[0] += 1000  # what lies between steps
            found.append(bar.seconds_left)
    # the first step after a resume compiles, and so does the first one under another method
    assert found[0] is None
    assert found[1] == pytest.approx(2 / dense * 5 * tiled)
    assert found[2] == pytest.approx(2 / dense * 4 * tiled)
    rates = sorted((dense / 2, tiled / 1, tiled / 1))
    assert found[4] == pytest.approx(2 * tiled / rates[1])
    assert "? left" in capsys.readouterr().err


def test_comparison_with_dense(folder, tmp_path, capsys):
    out = tmp_path / "video.mp4"
    assert call(folder, out, "--compare", "dense", "--dense-layers", "-1") == 0
    assert frames_of(out).shape == (5, 32, 96, 3)
    metadata = read_metadata(out)
    certificate = metadata["certificate"]
    assert len(certificate) == 3
    assert all(0 <= row["mean_kl"] <= row["max_kl"] for row in certificate)
    assert min(row["max_kl"] for row in certificate[:2]) > 1e-4
    assert certificate[2]["max_kl"] <= 1e-5  # that layer is dense
    assert 0 < metadata["psnr"] < 100
    assert re.search(r"PSNR \d+.* SSIM", capsys.readouterr().out)
    # equal attention, equal video
    assert call(folder, out, "--attention", "dense", "--compare", "dense") == 0
    assert read_metadata(out)["psnr"] == 100


def test_comparison_of_what_remembers(folder, tmp_path):
    out = tmp_path / "video.mp4"
    adaspa = ["--attention", "adaspa", "--warmup-attention", "1", "--block-size", "4"]
    assert call(folder, out, *adaspa, "--sparsity", "0.5", "--compare", "corrected") == 0
    certificate = read_metadata(out)["certificate"]
    assert all(1e-4 < row["max_kl"] for row in certificate)


@pytest.mark.slow
def test_what_has_no_certificate(folder, tmp_path, capsys):
    out = tmp_path / "video.mp4"
    flags = "--attention", "corrected", "--dense-layers", "0", "--compare", "dense"
    assert call(folder, out, *flags) == 0
    none = {"mean_kl": None, "max_kl": None}
    first, *others = read_metadata(out)["certificate"]
    assert first["max_kl"] <= 1e-5
    assert others == [none, none]
    assert "    2  no certificate" in capsys.readouterr().out


@pytest.mark.slow
def test_from_an_image(image_folder, tmp_path):
    picture = tmp_path / "first.png"
    pixels = np.random.default_rng(0).integers(0, 255, (70, 100, 3), np.uint8)
    Image.fromarray(pixels).save(picture)
    out = tmp_path / "video.mp4"
    flags = ("--image", str(picture), "--two-calls", "--sampler", "euler")
    assert call(image_folder, out, *flags, size="64x32") == 0
    assert frames_of(out).shape == (5, 32, 64, 3)
    assert read_metadata(out)["image"]


def test_between_two_images(tmp_path, capsys):
    folder = random_folder(tmp_path / "wan", small_config("flf2v"))
    for name, size in (("first", (100, 70)), ("last", (64, 90))):
        Image.new("RGB", size, (200, 80, 40)).save(tmp_path / f"{name}.png")
    negative = tmp_path / "negative.txt"
    arguments = ["--weights", folder, "--prompt", "a cat", "--frames", 5, "--dry-run"]
    arguments += ["--image", tmp_path / "first.png", "--negative-prompt-file", negative]

    def status(*more):
        return cli.main(["generate", *map(str, (*arguments, *more))])

    last = "--last-image", tmp_path / "last.png"
    for text, more, message in (
        ("fox " * 600, last, "at most 512 tokens"),
        ("", last, "expected a negative prompt, got an empty file"),
        ("blurry, static\n", (), "expected a last image, got none"),
    ):
        negative.write_text(text)
        assert status(*more) == 2
        assert message in capsys.readouterr().err
    assert status(*last, "--sampler", "dpm++", "--sampler-spacing", "original") == 0
    assert "tokens: 7,100 (2x50x71)" in capsys.readouterr().out  # 1136x800: the shape of the image


def test_dry_run_reads_no_weights(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(WanPipeline, "part", lambda *_: pytest.fail("a part was loaded"))
    out = tmp_path / "video.mp4"
    assert call(folder, out, "--dry-run", "--dense-steps", "1") == 0
    said = capsys.readouterr().out
    for wanted in ("load transformer: ", "load text_encoder", "load vae", "steps 1 to 1: Dense",
                   "steps 2 to 4: VMonarch", "peak memory", "FLOPs", "tokens: 12"):  # fmt: skip
        assert wanted in said
    assert "remembers" not in said
    assert call(folder, out, "--dry-run", "--attention", "corrected") == 0
    assert "attention remembers: 6.8 KiB" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--size", "50x32"), "48x32"),
        (("--frames", "6"), "5 frames"),
        (("--steps", "0"), "steps >= 1"),
        (("--guidance", "0.5"), "guidance >= 1"),
        (("--prompt", "fox " * 600), "at most 512 tokens"),
        (("--negative-prompt", "fox " * 600), "at most 512 tokens"),
        (("--out", "video.gif"), "ends in .mp4"),
        (("--image", "first.png"), "expected no image"),
        (("--last-image", "last.png"), "expected none, got one"),
        (("--negative-prompt-file", "none.txt"), "none.txt: expected a file of text"),
        (("--sampler", "euler", "--sampler-spacing", "original"), "'diffusers' of sampler 'euler'"),
        (("--weights", "nowhere"), "expected a folder of Wan weights"),
        (("--dense-layers", "7"), "a layer in"),
        (("--block", "9x9x9"), "`block` must fit the grid"),
        (("--attention", "dense", "--block", "1x2x3"), "no options"),
        (("--attention", "guided", "--exact-blocks", "99"), "at most the 2 blocks"),
    ],
)
def test_mistakes_are_found_before_anything_slow(flags, message, folder, tmp_path, monkeypatch,
                                                 capsys):  # fmt: skip
    monkeypatch.setattr(WanPipeline, "part", lambda *_: pytest.fail("a part was loaded"))
    assert call(folder, tmp_path / "video.mp4", *flags) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_incomplete_folders_are_named(folder, tmp_path, capsys):
    copy = shutil.copytree(folder, tmp_path / "copy")
    shutil.rmtree(copy / "vae")
    shutil.rmtree(copy / "tokenizer")
    assert call(copy, tmp_path / "video.mp4") == 2
    said = capsys.readouterr().err
    assert "vae" in said
    assert "tokenizer" in said


def test_an_image_is_asked_for(tmp_path, capsys):
    folder = random_folder(tmp_path / "wan", small_config("i2v-two"))
    assert call(folder, tmp_path / "video.mp4") == 2
    assert "makes a video from an image" in capsys.readouterr().err
    assert call(folder, tmp_path / "video.mp4", "--image", str(tmp_path / "none.png")) == 2
    assert "no such file" in capsys.readouterr().err


def test_a_mesh_that_does_not_fit_is_found_early(folder, tmp_path, capsys):
    assert call(folder, tmp_path / "video.mp4", "--mesh", "tensor=5") == 2
    assert "devices" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        call(folder, tmp_path / "video.mp4", "--mesh", "heads=2")


@pytest.mark.slow
def test_two_devices_make_the_video_of_one(folder, tmp_path):
    assert call(folder, tmp_path / "one.mp4", "--png", "--compare", "dense") == 0
    arguments = ["--weights", folder, "--out", tmp_path / "two.mp4", "--mesh", "data=2", "--png"]
    arguments += ["--prompt", "a red fox runs in snow", "--size", "48x32", "--frames", "5"]
    arguments += ["--steps", "4", "--dtype", "float32", "--compare", "dense"]
    devices = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    environment = {**os.environ, "XLA_FLAGS": devices}
    command = [sys.executable, "-m", "vmonarch_jax.models.cli", "generate", *map(str, arguments)]
    subprocess.run(command, env=environment, check=True)
    for n in range(5):
        one, two = (np.asarray(Image.open(tmp_path / name / f"{n:04d}.png"), int) for name in
                    ("one", "two"))  # fmt: skip
        assert np.abs(one - two).max() <= 1
    one, two = (read_metadata(tmp_path / name)["certificate"] for name in ("one.mp4", "two.mp4"))
    assert_close(*([list(row.values()) for row in rows] for rows in (two, one)), "float32", "kl")


def test_images_are_covered_and_cut_in_the_middle():
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, 20:40] = 255
    got = run.fit_image(Image.fromarray(pixels), (20, 20))
    assert got.shape == (20, 20, 3)
    assert got.min() > 200
