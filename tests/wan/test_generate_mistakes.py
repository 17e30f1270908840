"""What users get wrong, and files that are: one message, exit status 2, and nothing was loaded."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from vmonarch_jax.models import cli
from vmonarch_jax.models.wan.conditions import fit_image
from vmonarch_jax.models.wan.pipeline import WanPipeline
from vmonarch_jax.models.wan.weights.detect import detect
from vmonarch_jax.models.wan.weights.load import check_files
from vmonarch_jax.models.wan.weights.random_folder import random_folder, small_config
from wan_clips import write_clips


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    root = tmp_path_factory.mktemp("weights")
    return {kind: random_folder(root / kind, kind) for kind in ("t2v", "t2v-two")}


@pytest.fixture
def refused(kinds, tmp_path, monkeypatch, capsys):
    """Calls the command, which must refuse; returns what it says."""
    monkeypatch.setattr(WanPipeline, "part", lambda *_: pytest.fail("a part was loaded"))
    monkeypatch.chdir(tmp_path)

    def call(*flags, folder=kinds["t2v"], prompt="a red fox"):
        arguments = ["generate", "--weights", str(folder), "--prompt", prompt]
        sizes = ["--size", "48x32", "--frames", "5", "--steps", "4"]
        assert cli.main([*arguments, *sizes, *map(str, flags)]) == 2
        assert not list(tmp_path.glob("*.partial"))
        said = capsys.readouterr().err
        assert said.startswith("vmonarch generate: error: ")
        return said

    return call


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def pointer(path):
    path.write_text("version https://git-lfs.github.com/spec/v1\nsize 12\n")


@pytest.mark.parametrize("part", ["transformer", "text_encoder", "vae"])
@pytest.mark.parametrize("damage", [cut, pointer, pathlib.Path.unlink])
def test_damaged_files_are_found_first(part, damage, kinds, refused, tmp_path):
    copy = shutil.copytree(kinds["t2v"], tmp_path / "copy")
    damage(sorted((copy / part).glob("*.safetensors"))[-1])
    said = refused(folder=copy)
    assert part in said
    assert "expected" in said
    assert len(said.splitlines()) == 1


def test_tensors_of_other_sizes_are_found_first(kinds, refused, tmp_path):
    copy = shutil.copytree(kinds["t2v"], tmp_path / "copy")
    path = copy / "transformer/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"ffn_dim": 96}))
    said = refused(folder=copy)
    assert "blocks.0.ffn.net.0.proj.weight" in said
    assert "expected (96, 48), got (84, 48)" in said


def test_an_expert_that_was_not_downloaded_is_missed(kinds, refused, tmp_path):
    copy = shutil.copytree(kinds["t2v-two"], tmp_path / "copy")
    shutil.rmtree(copy / "transformer_2")
    assert "expected transformer_2/config.json" in refused(folder=copy)


@pytest.mark.parametrize("part", ["transformer", "text_encoder", "vae"])
def test_tuning_finds_damaged_files_before_clips_are_encoded(part, kinds, tmp_path, capsys):
    copy = shutil.copytree(kinds["t2v"], tmp_path / "copy")
    cut(sorted((copy / part).glob("*.safetensors"))[-1])
    flags = ["--data", write_clips(tmp_path / "clips", 1), "--size", "48x32", "--frames", "5"]
    command = ["finetune", "--weights", copy, *flags, "--out", tmp_path / "run", "--quiet"]
    assert cli.main([str(one) for one in command]) == 2
    said = capsys.readouterr().err
    assert part in said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_parts_are_checked_alone(kinds, tmp_path):
    copy = shutil.copytree(kinds["t2v"], tmp_path / "copy")
    cut(next((copy / "text_encoder").glob("*.safetensors")))
    check_files(detect(copy), "transformer", "vae", "tokenizer")
    with pytest.raises(ValueError, match="text_encoder"):
        check_files(detect(copy))
    with pytest.raises(ValueError, match="expected image_encoder"):
        check_files(detect(copy), "image_encoder")


@pytest.mark.parametrize("kind", ["vae", "llm"])
def test_folders_of_something_else(kind, kinds, refused, tmp_path):
    other = tmp_path / "other"
    if kind == "vae":
        shutil.copytree(kinds["t2v"] / "vae", other)
        assert "expected WanTransformer3DModel, got AutoencoderKLWan" in refused(folder=other)
        return
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    assert "expected WanTransformer3DModel, got LlamaForCausalLM" in refused(folder=other)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--dense-steps", "-1"), "expected --dense-steps >= 0, got -1"),
        (("--dense-steps", "9"), "expected at most 4 dense steps, got 9"),
        (("--dense-layers=0,0",), "expected each of --dense-layers once"),
        (("--guidance-low", "3"), "one transformer: expected no guidance_low, got 3"),
        (("--lora-strength", "nan"), "expected a --lora-strength that is finite"),
        (("--out", "file/video.mp4"), "expected --out in a folder that can be written to"),
        (("--compare", "tiled", "--recompute-frames", "9"), "recompute_frames"),
    ],
)
def test_flags_that_do_not_fit(flags, message, refused, tmp_path):
    (tmp_path / "file").touch()
    assert message in refused(*flags)


@pytest.mark.parametrize("prompt", ["", "  \n"])
def test_empty_prompts(prompt, refused):
    assert "expected a prompt, got an empty one" in refused(prompt=prompt)


def test_pictures_are_whole(kinds, refused, tmp_path):
    Image.new("RGB", (90, 60)).save("first.jpg")
    cut(tmp_path / "first.jpg")
    folder = random_folder(tmp_path / "i2v", "i2v-two")
    assert "expected a whole image" in refused("--image", "first.jpg", folder=folder)
    assert "expected a whole image" in refused("--image", tmp_path, folder=folder)


def test_pictures_are_shown_as_they_were_meant():
    upright = np.zeros((20, 40, 3), np.uint8)
    upright[:10, :20] = 200, 30, 60  # top left
    orientation = Image.Exif()
    orientation[274] = 6  # held on its side: turn by 90 degrees to the right
    turned = Image.fromarray(np.rot90(upright))
    turned.info["exif"] = orientation.tobytes()
    np.testing.assert_array_equal(fit_image(turned, (40, 20)), upright)
    clear = Image.fromarray(upright).convert("RGBA")
    clear.putalpha(Image.new("L", clear.size, 0))
    assert fit_image(clear, (40, 20)).min() == 255
    grey = np.full((20, 40), 128 * 257, np.uint16)
    assert (
        fit_image(Image.fromarray(grey), (40, 20)).tolist() == np.full_like(upright, 128).tolist()
    )


def test_usage_is_short(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["generate", "--weights", "w", "--prompt", "p", "--frames", "many"])
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_help_names_the_methods_of_an_option(capsys):
    with pytest.raises(SystemExit):
        cli.main(["generate", "--help"])
    said = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "alternating updates [vmonarch (2), tiled (1)]" in said
    assert "sampling steps that search for blocks [adaspa (10,30)]" in said


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="limits of a process are POSIX's")
def test_a_full_disk_ends_in_a_message(kinds, tmp_path):
    # a limit on the size of files stands for the disk: the write fails alike
    program = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); "
        "from vmonarch_jax.models import cli; sys.exit(cli.main(sys.argv[1:]))"
    )
    flags = ["--size", "48x32", "--frames", "5", "--steps", "2", "--out", tmp_path / "video.mp4"]
    command = ["generate", "--weights", kinds["t2v"], "--prompt", "a red fox", *flags]
    ran = subprocess.run(
        [sys.executable, "-c", program, *map(str, command)], capture_output=True, text=True
    )
    assert ran.returncode == 2, ran.stderr
    assert "Traceback" not in ran.stderr
    assert "too large" in ran.stderr
    assert not (tmp_path / "video.mp4").exists()


@pytest.mark.parametrize("convention", ["diffusers", "original"])
def test_small_folders_are_found_as_what_they_are(convention, tmp_path):
    folder = random_folder(tmp_path / "wan", "ti2v", convention)
    found = detect(folder)
    check_files(found)
    assert found.convention == convention
    small = small_config("ti2v", found.config.transformer.dtype)
    assert found.config.transformer == small.transformer
    assert found.config.vae == small.vae
    assert sorted(p.name for p in tmp_path.iterdir()) == ["wan"]
    with pytest.raises(ValueError, match="expected no such folder"):
        random_folder(folder, "ti2v", convention)
    with pytest.raises(ValueError, match=r"expected a kind of t2v, .* got 'wan'"):
        random_folder(tmp_path / "other", "wan")
