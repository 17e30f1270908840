"""The `vmonarch` command: the whole way from training to pictures, and its error messages."""

import numpy as np
import pytest
from PIL import Image
from vmonarch_jax.models import CONFIGS, load_model, load_params
from vmonarch_jax.models.cli import main
from vmonarch_jax.models.cli_options import caption_of, label_of
from vmonarch_jax.models.metrics import read_csv

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
    flags += ["--attention", "tiled", "--out", str(out), "--solver", "heun"]
    assert main(["sample", "--model", str(tuned / "export"), *flags]) == 0
    with Image.open(out) as gif, Image.open(out.with_suffix(".png")) as strip:
        assert gif.n_frames == 2
        assert gif.size == (2 * 16 * 6, 16 * 6)
        assert strip.size == (2 * 16 * 3, 2 * 16 * 3)
    assert "2 videos under TiledMonarch(" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ([*TRAIN, "--out", "RUN", "--steps", "5"], "expected the run that is there"),
        ([*TRAIN, "--out", "NEW", "--steps", "0"], "expected steps >= 1, got 0"),
        ([*TRAIN, "--out", "NEW", "--frames", "0"], "expected frames >= 1, got 0"),
        ([*TRAIN, "--out", "NEW", "--tile", "1x8x8"], "--attention dense"),
        ([*TRAIN, "--out", "NEW", "--attention", "vmonarch", "--steps-attention", "0"], "got 0"),
        (["finetune", "--from", "NEW", "--out", "NEW2"], "config.json: expected"),
        (["sample", "--model", "NEW"], "config.json: expected"),
        (["sample", "--model", "EXPORT", "--video", "fly:coffee"], "got 'fly'"),
        (["sample", "--model", "EXPORT", "--video", "cut:tea"], "got 'tea'"),
        (["sample", "--model", "EXPORT", "--steps", "0"], "expected steps >= 1"),
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
        (["explain", "--grid", "21x30"], "expected FRAMESxHEIGHTxWIDTH such as 1x8x8, got '21x30'"),
    ],
)
def test_wrong_flags_get_usage_and_status_2(capsys, command, words):
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


def test_conditions_by_name():
    assert label_of("pan_left") == 0
    assert label_of("none") == CONFIGS["micro"].classes
    assert label_of("3") == 3
    np.testing.assert_array_equal(caption_of("chelsea"), np.eye(8)[1])
    np.testing.assert_array_equal(caption_of("coffee>rocket"), np.eye(8)[2] + 0.5 * np.eye(8)[3])
    assert not caption_of("none").any()
