"""The videos: determinism, what each class shows, and the pipeline around them."""

import numpy as np
import pytest
from scipy import ndimage
from vmonarch_jax.models import CONFIGS, MOTIONS, PHOTOS, VideoDiTConfig
from vmonarch_jax.models.motions import View, make_video, render
from vmonarch_jax.models.photos import TEXTURES, load
from vmonarch_jax.models.pipeline import MotionVideos, batches


def video_of(motion: str, photo: str = "chelsea", seed: int = 0, **kwargs):
    return make_video(
        MOTIONS.index(motion), PHOTOS.index(photo), np.random.default_rng(seed), **kwargs
    )


def test_configuration_fits_the_data():
    assert VideoDiTConfig().classes == len(MOTIONS) >= 8
    assert CONFIGS["tiny"].caption_dim == len(PHOTOS)


@pytest.mark.parametrize("name", [*PHOTOS, *TEXTURES])
def test_photographs_load(name):
    photo = load(name)
    assert min(photo.height, photo.width) == 1
    for level in photo.levels:
        assert level.min() >= -1
        assert level.max() <= 1
    assert photo.levels[0].std() > 0.1


def test_unknown_photograph():
    with pytest.raises(ValueError, match=r"expected a photograph of .* got 'lena'"):
        load("lena")


def test_items_depend_on_seed_and_index_alone():
    source = MotionVideos(3)
    again = MotionVideos(3)
    order = [7, 161, 8, 7]
    for a, b in zip(
        [source[n] for n in order], [again[n] for n in reversed(order)][::-1], strict=True
    ):
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])
    assert np.abs(source[7]["video"] - source[87]["video"]).max() > 0.1
    assert np.abs(source[7]["video"] - MotionVideos(4)[7]["video"]).max() > 0.1


def test_items_are_balanced_and_in_range():
    source = MotionVideos(0, length=80, frames=4, size=8)
    pairs = set()
    for item in source:
        assert item["video"].shape == (4, 8, 8, 3)
        assert item["video"].dtype == np.float32
        assert np.abs(item["video"]).max() <= 1
        pairs.add((int(item["label"]), int(item["caption"].argmax())))
    assert len(pairs) == len(MOTIONS) * len(PHOTOS)


@pytest.mark.parametrize(
    ("motion", "shift"),
    [("pan_left", (0, -1)), ("pan_right", (0, 1)), ("pan_up", (-1, 0)), ("pan_down", (1, 0))],
)
@pytest.mark.parametrize("photo", ["chelsea", "tissue"])
def test_pans_move_the_picture_the_way_they_say(motion, shift, photo):
    video, _ = video_of(motion, photo, size=64)
    a, b = video[6, ..., 1], video[9, ..., 1]

    def error(dy, dx):
        return np.square(np.roll(a, (dy, dx), (0, 1)) - b)[12:-12, 12:-12].mean()

    errors = {(dy, dx): error(dy, dx) for dy in range(-10, 11) for dx in range(-10, 11)}
    dy, dx = min(errors, key=errors.get)
    assert np.sign([dy, dx]).tolist() == list(shift)
    assert max(abs(dy), abs(dx)) >= 4


def test_zooms_and_rotations_are_what_they_say():
    for motion, zoom, degrees in [
        ("zoom_in", 1.2, 0),
        ("zoom_out", 1 / 1.2, 0),
        ("rotate_cw", 1, -20),
        ("rotate_ccw", 1, 20),
    ]:
        video, _ = video_of(motion, "motorcycle", size=64)
        a, b = video[4, ..., 0], video[11, ..., 0]
        angle = np.deg2rad(degrees)
        # where in a the picture at each place of b is, if the motion is the expected one
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])

        def moved(matrix, a=a):
            middle = np.full(2, 31.5)
            return ndimage.affine_transform(a, matrix, middle - matrix @ middle, order=1)

        inner = (slice(14, -14),) * 2
        error = {
            name: np.square(moved(m) - b)[inner].mean()
            for name, m in [("right", turn / zoom), ("still", np.eye(2)), ("wrong", turn.T * zoom)]
        }
        assert error["right"] < 0.7 * error["still"] < 0.7 * error["wrong"], (motion, error)


def test_cut_changes_once_and_says_to_what():
    video, caption = video_of("cut", "coffee")
    change = np.abs(np.diff(video, axis=0)).mean((1, 2, 3))
    assert np.count_nonzero(change) == 1
    cut = int(change.argmax()) + 1
    assert 4 <= cut <= 12
    assert sorted(caption[caption > 0]) == [0.5, 1.0]
    assert caption[PHOTOS.index("coffee")] == 1
    _, caption = video_of("pan_left", "coffee")
    assert caption.sum() == 1


def test_sprite_moves_over_a_still_photograph():
    video, _ = video_of("sprite", "rocket")
    background = np.median(video, axis=0)
    moving = np.abs(video - background).max(-1) > 0.1
    assert 0.03 < moving[2:-2].mean() < 0.4
    centres = np.array([ndimage.center_of_mass(frame) for frame in moving[3:13]])
    steps = np.diff(centres, axis=0)
    assert np.all(steps @ (centres[-1] - centres[0]) > 0), "one direction throughout"


def test_rendering_is_antialiased():
    """A view far smaller than the photograph's pixels averages them; it does not pick some."""
    photo = load("hubble")
    small = render(photo, View(0.5, 0.5, 0.9), 16)
    fine = render(photo, View(0.5, 0.5, 0.9), 128).reshape(16, 8, 16, 8, 3).mean((1, 3))
    picked = render(photo, View(0.5, 0.5, 0.9), 128)[4::8, 4::8]
    assert np.abs(small - fine).mean() < 0.35 * np.abs(picked - fine).mean()


def test_make_video_errors():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match=r"expected a motion in \[0, 10\), got 10"):
        make_video(10, 0, rng)
    with pytest.raises(ValueError, match=r"expected a subject in \[0, 8\), got -1"):
        make_video(0, -1, rng)


def test_source_errors():
    with pytest.raises(ValueError, match="expected frames >= 1, got 0"):
        MotionVideos(frames=0)
    with pytest.raises(ValueError, match="expected seed >= 0, got -1"):
        MotionVideos(-1)
    with pytest.raises(IndexError, match=r"expected an index in \[0, 16384\), got -1"):
        MotionVideos()[-1]
    with pytest.raises(ValueError, match=r"expected batch_size in \[1, 4\], got 5"):
        batches(MotionVideos(length=4), batch_size=5)


SMALL = MotionVideos(1, length=12, frames=2, size=8)


def test_epochs_hold_every_video_once_in_a_new_order():
    stream = batches(SMALL, batch_size=4, seed=5)
    epochs = [np.concatenate([next(stream)["video"] for _ in range(3)]) for _ in range(2)]
    flat = [epoch.reshape(12, -1) for epoch in epochs]
    assert not np.array_equal(flat[0], flat[1])
    every = np.stack([item["video"].reshape(-1) for item in SMALL])
    for epoch in flat:
        np.testing.assert_array_equal(epoch[np.lexsort(epoch.T)], every[np.lexsort(every.T)])


def test_iterator_goes_on_from_its_state():
    stream = batches(SMALL, batch_size=4, seed=5)
    for _ in range(4):
        next(stream)
    state = stream.get_state()
    expected = [next(stream)["video"] for _ in range(5)]
    other = batches(SMALL, batch_size=4, seed=5)
    other.set_state(state)
    np.testing.assert_array_equal([next(other)["video"] for _ in range(5)], expected)


@pytest.mark.slow
def test_batches_do_not_depend_on_the_workers():
    streams = [batches(SMALL, batch_size=4, seed=5, workers=n) for n in (0, 2)]
    for _ in range(5):
        np.testing.assert_array_equal(*(next(stream)["video"] for stream in streams))
