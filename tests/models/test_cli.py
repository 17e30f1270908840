"""The `vmonarch` command: the whole way from training to pictures, and its error messages."""

import argparse

import numpy as np
import pytest
from PIL import Image
from vmonarch_jax.models import CONFIGS, load_model, load_params
from vmonarch_jax.models.cli import main
from vmonarch_jax.models.cli_options import add_attention, attention_of, caption_of, label_of
from vmonarch_jax.models.metrics import read_csv

import vmonarch_jax as vm

TRAIN = ["train", "--config", "micro", "--frames", "2", "--batch-size", "2", "--quiet"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "dense"
    assert main([*TRAIN, "--steps", "2", "--out", str(folder)]) == 0
    return folder


def test_train_finetune_sample(run, tmp_path, capsys):
    assert load_params(run / "export")[0].frames == 2
    tuned = tmp_path / "tuned"
    flags = ["--attention", "vmonarch", "--steps-attention", "1", "--recompute-frames", "0"]
    flags += ["--steps", "3", "--batch-size", "2", "--out", str(tuned), "--quiet"]
    assert main(["finetune", "--from", str(run / "export"), *flags]) == 0
    assert len(read_csv(tuned / "metrics.csv")) == 3
    run_json = (tuned / "run.json").read_text()
    assert "VMonarch(steps=1" in run_json
    assert "recompute_frames=0" in run_json
    assert load_model(tuned / "export").config.frames == 2
    out = tmp_path / "pictures" / "two.gif"
    flags = ["--steps", "2", "--video", "cut:coffee>rocket", "--video", "pan_left:none"]
    flags += ["--attention", "corrected", "--corrected-method", "tiled", "--refresh-every", "2"]
    flags += ["--out", str(out), "--solver", "heun"]
    assert main(["sample", "--model", str(tuned / "export"), *flags]) == 0
    with Image.open(out) as gif, Image.open(out.with_suffix(".png")) as strip:
        assert gif.n_frames == 2
        assert gif.size == (2 * 16 * 6, 16 * 6)
        assert strip.size == (2 * 16 * 3, 2 * 16 * 3)
    assert "2 videos under Corrected(method=TiledMonarch(" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ([*TRAIN, "--out", "RUN", "--steps", "5"], "expected the run that is there"),
        ([*TRAIN, "--out", "NEW", "--steps", "0"], "expected steps >= 1, got 0"),
        ([*TRAIN, "--out", "NEW", "--frames", "0"], "expected frames >= 1, got 0"),
        (
            [*TRAIN, "--out", "NEW", "--tile", "1x8x8"],
            "no options with --attention dense, got --tile",
        ),
        (
            [*TRAIN, "--out", "NEW", "--attention", "adaspa", "--exact-blocks", "2"],
            "--warmup-attention, --search-steps) with --attention adaspa, got --exact-blocks",
        ),
        (
            [*TRAIN, "--out", "NEW", "--attention", "guided", "--corrected-method", "tiled"],
            "expected no --corrected-method with --attention guided",
        ),
        ([*TRAIN, "--out", "NEW", "--attention", "window", "--sparsity", "2"], "got 2.0"),
        ([*TRAIN, "--out", "NEW", "--attention", "vmonarch", "--steps-attention", "0"], "got 0"),
        (["finetune", "--from", "NEW", "--out", "NEW2"], "config.json: expected"),
        (["sample", "--model", "NEW"], "config.json: expected"),
        (["sample", "--model", "EXPORT", "--video", "fly:coffee"], "got 'fly'"),
        (["sample", "--model", "EXPORT", "--video", "cut:tea"], "got 'tea'"),
        (["sample", "--model", "EXPORT", "--steps", "0"], "expected steps >= 1"),
        (["sample", "--model", "EXPORT", "--implementation", "cudnn"], "'cudnn': needs an NVIDIA"),
    ],
)
def test_mistakes_get_one_line_and_status_2(run, tmp_path, capsys, command, words):
    places = {"RUN": run, "EXPORT": run / "export", "NEW": tmp_path / "a", "NEW2": tmp_path / "b"}
    assert main([str(places.get(word, word)) for word in command]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"vmonarch {command[0]}: error: ")
    assert words in error


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ([], "required: command"),
        (["fly"], "invalid choice: 'fly'"),
        (["train", "--out", "a", "--speed", "9"], "unrecognized arguments: --speed 9"),
        (["train"], "required: --out"),
        (["train", "--out", "a", "--steps", "many"], "invalid int value: 'many'"),
        (["explain", "--search-steps", "1,-2"], "expected steps from 0 such as 10,30, got '1,-2'"),
        (["explain", "--attention", "sparse"], "invalid choice: 'sparse'"),
        (["explain", "--implementation", "xla,cuda"], "a sequence of these or None, got 'cuda'"),
        (["explain", "--grid", "21x30"], "expected FRAMESxHEIGHTxWIDTH such as 1x8x8, got '21x30'"),
    ],
)
def test_wrong_flags_get_usage_and_status_2(capsys, command, words):
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "method"),
    [
        ("--attention vmonarch --block 2x4x4", vm.VMonarch(block=(2, 4, 4))),
        ("--attention window --window 2x4x4 --tile 4x4x4", vm.SlidingWindow((2, 4, 4), (4, 4, 4))),
        ("--attention salad --sparse top_k --sparsity 0.5", vm.Salad(sparse="top_k", sparsity=0.5)),
        (
            "--attention adaspa --warmup-attention 2 --search-steps 2,5 --block-size 32",
            vm.AdaSpa(warmup_steps=2, search_steps=(2, 5), block_size=32),
        ),
        (
            "--attention guided --exact-blocks 3 --refresh-every 4 --steps-attention 1",
            vm.Guided(vm.VMonarch(steps=1), exact_blocks=3, every=4),
        ),
        ("--attention corrected --refresh-steps 0,4", vm.Corrected(refresh_steps=(0, 4))),
        (
            "--attention corrected --corrected-method tiled --residual float8 --tile 1x4x4",
            vm.Corrected(vm.TiledMonarch(tile=(1, 4, 4)), dtype="float8"),
        ),
        (
            "--attention corrected --corrected-method guided --refresh-every 5 --exact-blocks 2",
            vm.Corrected(vm.Guided(exact_blocks=2), every=5),
        ),
    ],
)
def test_methods_by_flags(flags, method):
    parser = argparse.ArgumentParser()
    add_attention(parser)
    assert attention_of(parser.parse_args(flags.split())) == method


def test_implementation_of_all_calls(capsys):
    assert main(["explain", "--grid", "2x8x8", "--implementation", "cudnn,reference"]) == 0
    out = capsys.readouterr().out
    assert "runs on         'reference'" in out
    assert "'cudnn'" in out


def test_conditions_by_name():
    assert label_of("pan_left") == 0
    assert label_of("none") == CONFIGS["micro"].classes
    assert label_of("3") == 3
    np.testing.assert_array_equal(caption_of("chelsea"), np.eye(8)[1])
    np.testing.assert_array_equal(caption_of("coffee>rocket"), np.eye(8)[2] + 0.5 * np.eye(8)[3])
    assert not caption_of("none").any()
