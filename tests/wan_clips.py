"""Small videos in files, for tests of what reads them."""

import fractions
import pathlib

import av
import numpy as np
from PIL import Image


def moving_square(frames: int, height: int = 40, width: int = 56, seed: int = 0) -> np.ndarray:
    """A bright square that crosses a coloured picture, `[frames, height, width, 3]` uint8."""
    rng = np.random.default_rng(seed)
    video = np.broadcast_to(rng.integers(20, 160, 3, np.uint8), (frames, height, width, 3)).copy()
    for n in range(frames):
        x = (3 * n + 5 * seed) % (width - 12)
        video[n, 10:24, x : x + 12] = 240
    return video


def write_video(path: pathlib.Path, video: np.ndarray, fps: int = 16) -> pathlib.Path:
    """Writes a video in the format of the path's suffix, or a folder of frames without one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.suffix:
        path.mkdir()
        for n, frame in enumerate(video):
            Image.fromarray(frame).save(path / f"frame_{n}.png")
        return path
    if path.suffix == ".gif":
        first, *rest = (Image.fromarray(frame) for frame in video)
        first.save(path, save_all=True, append_images=rest, duration=round(1000 / fps), loop=0)
        return path
    codec = {".mp4": "mpeg4", ".webm": "libvpx-vp9", ".mkv": "ffv1"}[path.suffix]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.height, stream.width = video.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.time_base = fractions.Fraction(1, fps)
        if codec == "mpeg4":
            stream.bit_rate = 4_000_000
        for frame in video:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def write_clips(folder: pathlib.Path, count: int = 3, frames: int = 5) -> pathlib.Path:
    """A folder of short videos with captions beside them."""
    words = ("a red fox runs in snow", "a blue cat sleeps", "the dog in rain", "a cat on snow")
    for n in range(count):
        suffix = (".mp4", ".gif", "")[n % 3]
        write_video(folder / f"clip{n}{suffix}", moving_square(frames, seed=n))
        (folder / f"clip{n}.txt").write_text(words[n % 4] + "\n")
    return folder
