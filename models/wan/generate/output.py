"""Videos as files: MP4 and PNG frames, with what made them inside."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import av
import numpy as np
from jaxtyping import Float
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ...demo.files import replacing
from ...pictures import to_uint8

Video = Float[np.ndarray, "frames height width 3"]

# Constant quality of H.264: 0 is lossless, 51 the worst; at 16 nobody sees a difference.
_QUALITY = "16"


def save_mp4(path: pathlib.Path, video: Video, fps: int, metadata: Mapping[str, Any]) -> None:
    """Writes H.264 in an MP4 file.

    Args:
      path: the file; it appears when it is whole.
      video: in [-1, 1], of an even height and width.
      fps: frames a second.
      metadata: JSON values; kept in the container as `comment`, the prompt also as `title`.
    """
    height, width = video.shape[1:3]
    with (
        replacing(path) as partial,
        av.open(str(partial), "w", options={"movflags": "faststart"}) as container,
    ):
        container.metadata["title"] = str(metadata.get("prompt", ""))
        container.metadata["comment"] = json.dumps(metadata, ensure_ascii=False)
        stream = container.add_stream("libx264", rate=fps, options={"crf": _QUALITY})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for picture in video:
            frame = av.VideoFrame.from_ndarray(to_uint8(picture), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def read_metadata(path: pathlib.Path) -> dict[str, Any]:
    """What `save_mp4` put into a file.

    Raises:
      ValueError: the file holds none.
    """
    with av.open(str(path)) as container:
        comment = container.metadata.get("comment", "")
    try:
        return dict(json.loads(comment))
    except ValueError as error:
        raise ValueError(f"{path}: expected a video of vmonarch generate, got another") from error


def save_frames(folder: pathlib.Path, video: Video, metadata: Mapping[str, Any]) -> None:
    """Writes `0000.png` and so on, each with the metadata as its text `vmonarch`."""
    folder.mkdir(parents=True, exist_ok=True)
    info = PngInfo()
    info.add_itxt("vmonarch", json.dumps(metadata, ensure_ascii=False))
    for n, picture in enumerate(video):
        with replacing(folder / f"{n:04d}.png") as partial:
            Image.fromarray(to_uint8(picture)).save(partial, pnginfo=info)
