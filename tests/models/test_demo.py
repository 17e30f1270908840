"""`vmonarch demo` on a small random model: files, numbers, the user's own input, errors."""

import csv
import json

import av
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from vmonarch_jax.models import VideoDiTConfig, export_params, load_params, split_params
from vmonarch_jax.models.attention_schedule import flops_of_steps
from vmonarch_jax.models.cli import main
from vmonarch_jax.models.demo.files import replacing
from vmonarch_jax.models.demo.inputs import read_videos
from vmonarch_jax.models.demo.maps import attention_matrix, pick_heads
from vmonarch_jax.models.demo.measure import likeness
from vmonarch_jax.models.demo.methods import entries
from vmonarch_jax.models.salad import add_branches

import vmonarch_jax as vm

CONFIG = VideoDiTConfig(frames=4, height=16, width=16, patch=(1, 4, 4), dim=24, depth=1, heads=2)
METHODS = ["dense", "vmonarch", "vmonarch_tuned", "tiled", "adaspa", "salad", "guided", "corrected"]


@pytest.fixture(scope="module")
def weights(awake, tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights") / "model"
    export_params(folder, CONFIG, split_params(awake(CONFIG))[1])
    return folder


@pytest.fixture(scope="module")
def salad_weights(weights, tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights") / "salad"
    export_params(folder, *add_branches(*load_params(weights)))
    return folder


def clip(path, frames=6, size=(24, 20)):
    """A GIF of a square that moves to the right."""
    pictures = [Image.new("RGB", size, (200, 60, 30)) for _ in range(frames)]
    for n, picture in enumerate(pictures):
        picture.paste((20, 120, 240), (n, 6, n + 8, 14))
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=50)
    return path


def check_numbers(folder, methods):
    with (folder / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["key"] for row in rows] == methods
    for row in rows:
        empty = {
            "dense": {"psnr", "ssim", "kl_mean", "kl_worst"},
            "corrected": {"kl_mean", "kl_worst"},
        }
        empty = empty.get(row["key"], set())
        numbers = {k: v for k, v in row.items() if k not in ("key", "name", "input_psnr")}
        assert {k for k, v in numbers.items() if not v} == empty
        assert np.isfinite([float(v) for v in numbers.values() if v]).all()
    found = json.loads((folder / "results.json").read_text())
    assert [row["key"] for row in found["methods"]] == methods
    text = (folder / "table.md").read_text()
    assert all(name in text for name in ("Dense", "VMonarch, training-free", "Tiled Monarch"))
    return rows


def test_demo_from_noise(weights, salad_weights, tmp_path, capsys):
    out = tmp_path / "demo"
    flags = ["--quick", "--out", str(out), "--model-dense", str(weights)]
    flags += ["--model-tuned", str(weights), "--model-salad", str(salad_weights)]
    assert main(["demo", *flags]) == 0
    rows = check_numbers(out, METHODS)
    # the same weights and method give the same video
    assert rows[1]["psnr"] == rows[2]["psnr"]
    with Image.open(out / "comparison.gif") as gif:
        assert gif.n_frames == CONFIG.frames
        assert gif.width > 7 * 160
        assert gif.height > 2 * 160
    names = ["attention_matrices", "attention_query", "kl_per_head", "scaling"]
    for name in [*names, "strip_comparison", *(f"strip_{key}" for key in METHODS)]:
        with Image.open(out / f"{name}.png") as picture:
            picture.load()
            assert min(picture.size) > 200
    assert all((out / f"{name}.pdf").stat().st_size > 1000 for name in names)
    with (out / "scaling.csv").open(newline="") as file:
        scaling = list(csv.DictReader(file))
    assert {row["curve"] for row in scaling} == {"library", "dense", "tiled", "vmonarch"}
    assert all(float(row["seconds"]) > 0 for row in scaling)
    assert not [path for path in out.iterdir() if "partial" in path.name]
    printed = capsys.readouterr().out
    assert (out / "table.md").read_text().splitlines()[0] in printed
    assert str(out) in printed


def test_demo_on_own_input(weights, tmp_path, capsys):
    out = tmp_path / "demo"
    flags = ["--quick", "--out", str(out), "--model-dense", str(weights), "--steps", "1"]
    assert main(["demo", *flags, "--input", str(clip(tmp_path / "clip.gif"))]) == 0
    rows = check_numbers(out, ["dense", "vmonarch", "tiled", "adaspa", "guided", "corrected"])
    assert all(np.isfinite(float(row["input_psnr"])) for row in rows)
    printed = capsys.readouterr().out
    assert "no weights tuned to VMonarch" in printed
    assert "no weights tuned to SALAD" in printed
    # one step: AdaSpa searches, corrected attention refreshes, and both are dense
    assert all(float(row["psnr"]) > 60 for row in rows if row["key"] in ("adaspa", "corrected"))
    with Image.open(out / "comparison.gif") as gif:
        assert gif.n_frames == CONFIG.frames
        assert gif.width > 6 * 160  # the input is a column too


@pytest.mark.parametrize(
    ("make", "flags", "words"),
    [
        (lambda p: p / "none.mp4", [], "none.mp4: expected a video"),
        (lambda p: (p / "a.mp4").write_text("no") and p / "a.mp4", [], "a readable video or image"),
        (lambda p: clip(p / "short.gif", 3), [], "expected at least 4 frames, got 3"),
        (lambda p: (p / "empty").mkdir() or p / "empty", [], "in the folder, got no files"),
        (lambda p: clip(p / "a.gif"), ["--strength", "0"], "--strength in (0, 1], got 0.0"),
        (lambda p: clip(p / "a.gif"), ["--steps", "0"], "--steps >= 1, got 0"),
        (lambda p: clip(p / "a.gif"), ["--seed", "-1"], "--seed >= 0, got -1"),
        (lambda p: clip(p / "a.gif"), ["--model-dense", "nowhere"], "config.json: expected"),
    ],
)
def test_mistakes_get_one_line_and_status_2(weights, tmp_path, capsys, make, flags, words):
    command = ["demo", "--quick", "--out", str(tmp_path / "out"), "--model-dense", str(weights)]
    assert main([*command, "--input", str(make(tmp_path)), *flags]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert error[0].startswith("vmonarch demo: error: ")
    assert words in error[0]
    assert not (tmp_path / "out").exists()


def test_folder_of_photographs_and_videos(tmp_path):
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (40, 90, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "b.png")
    Image.fromarray(noise[:, :40]).convert("L").save(tmp_path / "c.jpg")
    (tmp_path / "a.txt").write_text("not a picture")
    with av.open(str(tmp_path / "d.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height = 48, 32
        for n in range(9):
            picture = np.full((32, 48, 3), 20 * n, np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture)):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    names, videos = read_videos(tmp_path, 4, 16, 16)
    assert names == (("b", "photograph"), ("c", "photograph"), ("d", "video"))
    assert videos.shape == (3, 4, 16, 16, 3)
    assert videos.dtype == np.float32
    assert np.abs(videos).max() <= 1
    # a pan moves to the side, a video goes through its whole length
    assert all(np.abs(np.diff(videos[n], axis=0)).max() > 0.05 for n in (0, 1))
    levels = (videos[2].mean((1, 2, 3)) + 1) * 127.5
    np.testing.assert_allclose(levels, [0, 60, 100, 160], atol=8)
    assert len(read_videos(tmp_path, 4, 16, 16, most=1)[0]) == 1


def test_damaged_image(tmp_path):
    path = tmp_path / "half.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match="expected a readable image"):
        read_videos(path, 4, 16, 16)


def test_matrix_of_a_method():
    grid = vm.VideoGrid(3, 2, 4)
    q, k = (2 * jax.random.normal(key, (24, 8)) for key in jax.random.split(jax.random.key(0)))
    dense = attention_matrix(vm.Dense(), q, k, grid)
    np.testing.assert_allclose(dense, jax.nn.softmax(q @ k.T * 8**-0.5), atol=1e-6)
    monarch = attention_matrix(vm.VMonarch(), q, k, grid)
    np.testing.assert_allclose(monarch.sum(1), 1, atol=1e-5)

    # the divergence of the two matrices is what the certificate says
    @jax.jit
    def certificate(q, k):
        _, lse = vm.VMonarch()(q, k, k, grid=grid, return_lse=True)
        return vm.attention_gap(q, k, lse)[0, :, 0]

    gap = certificate(q[None, :, None], k[None, :, None])
    np.testing.assert_allclose((monarch * np.log(monarch / dense)).sum(1), gap, atol=1e-5)


def test_picked_heads():
    gap = jnp.array([[3.0, 1.0], [0.5, 2.0]])[:, None, None] * jnp.ones((2, 1, 5, 2))
    found = [(title.split("(")[1].split(")")[0], *place) for title, *place in pick_heads(gap)]
    assert found == [("closest", 1, 0), ("median", 0, 1), ("worst", 0, 0)]
    assert len(pick_heads(np.asarray(gap)[:1])) == 2
    assert len(pick_heads(np.asarray(gap)[:1, ..., :1])) == 1


def test_columns_of_a_comparison():
    steps = {entry.key: entry.method for entry in entries(50)}
    paper = vm.AdaSpa(block_size=16)
    assert steps["adaspa"] == paper, "the paper's schedule at its number of steps"
    sizes = {"heads": 3, "head_dim": 64}
    grid = vm.VideoGrid(16, 8, 8)
    dense = vm.flops.attention(vm.Dense(), grid, **sizes)
    shares = {"vmonarch": 0.26, "adaspa": 0.45, "salad": 0.12, "guided": 0.26, "corrected": 0.3}
    for key, most in shares.items():
        count = sum(flops_of_steps(steps[key], 50, 1, grid, **sizes))
        assert count < most * 50 * dense, key


def test_likeness_of_equal_and_of_shifted_videos():
    video = np.random.default_rng(0).uniform(-1, 0.8, (2, 3, 16, 16, 3)).astype(np.float32)
    assert likeness(video, video) == (100.0, 1.0)
    psnr, ssim = likeness(video + 0.2, video)
    assert psnr == pytest.approx(20, abs=1e-3)  # 20 log10(2 / 0.2)
    assert 0.8 < ssim < 1


def test_a_file_is_whole_or_not_there(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def interrupted():
        with replacing(path) as partial:
            partial.write_text("ne")
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
