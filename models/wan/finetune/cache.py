"""Latents and text states on disk, each encoded once: a killed run goes on where it was."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from tqdm import tqdm

from ...loop import Interrupted, stop_signals
from ...params import Params, split_params
from ..conditions import (
    beside_channels,
    check_texts,
    image_states,
    rebuild_vae,
    text_states,
)
from ..config import VAEConfig
from ..tokenizer import WanTokenizer
from ..weights.detect import Found
from ..weights.load import check_files, load_part
from ..weights.stored import Stored, write_safetensors
from .data import Clip, check_clips, content_hash, read_clip

# Part of every key: a change of what is stored makes all of it anew.
_FORMAT = "vmonarch-wan-cache-1"
# Of a file of weights, this many pieces of this many bytes tell it from any other.
_PIECES, _PIECE = 64, 1 << 16


@dataclasses.dataclass(frozen=True)
class ClipSettings:
    """How videos become latents.

    Attributes:
      frames: of each video.
      size: width and height in pixels.
      fps: frames a second.
    """

    frames: int
    size: tuple[int, int]
    fps: float


@dataclasses.dataclass(frozen=True)
class CachedClips:
    """A random-access source of what is cached of each clip.

    Items are dicts of `latents [t, h, w, channels]`, `text [text_length, text_dim]`, zero behind
    the end, and for models that need an image `beside [t, h, w, extra]` and, where the model has an
    image encoder, `image [n, image_dim]`.

    Attributes:
      clips: files of each clip's arrays.
      empty: file of the states of the empty caption.
      text_length: states of a text.
    """

    clips: tuple[Mapping[str, pathlib.Path], ...]
    empty: pathlib.Path
    text_length: int

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        item: dict[str, np.ndarray] = {}
        for path in self.clips[int(index)].values():
            item |= _read(path)
        return item | {"text": self._padded(item["text"])}

    def empty_text(self) -> np.ndarray:
        """States of the empty caption."""
        return self._padded(_read(self.empty)["text"])

    def _padded(self, text: np.ndarray) -> np.ndarray:
        return np.pad(text, ((0, self.text_length - len(text)), (0, 0)))


class ClipCache:
    """The files of some clips in a cache folder.

    A file's name is the hash of all that decides what is in it: the video's bytes or the caption,
    the size, and the weights that encode it. Files are written beside and renamed when complete;
    one that is damaged all the same counts as missing.

    Args:
      found: the model.
      clips: from `find_clips`.
      settings: how they become latents.
      folder: the cache; several runs and sizes may share one.
      text_dtype: of the text states.

    Raises:
      ValueError: the model can't make that size, a caption is too long, or files of the parts that
        encode are missing or damaged.

    Example:
      cache = ClipCache(detect(weights), find_clips("videos"), settings, pathlib.Path("cache"))
      source = cache.fill()
    """

    def __init__(
        self,
        found: Found,
        clips: Sequence[Clip],
        settings: ClipSettings,
        folder: pathlib.Path,
        text_dtype: Any = jnp.bfloat16,
    ) -> None:
        self.found, self.clips, self.settings = found, tuple(clips), settings
        self.folder, self.text_dtype = pathlib.Path(folder), jnp.dtype(text_dtype)
        config = found.config
        width, height = settings.size
        config.grid_of(settings.frames, height, width)
        images = ["image_encoder"] if self._sees_image else []
        check_files(found, "vae", "text_encoder", "tokenizer", *images)
        self.tokenizer = WanTokenizer.load(found.tokenizer or "", config.transformer.text_length)
        check_texts(self.tokenizer, [clip.caption for clip in self.clips])
        vae = _key(dataclasses.asdict(config.vae)), fingerprint(found.parts["vae"])
        video = [*dataclasses.astuple(settings), *vae]
        encoder = [*found.parts["text_encoder"], found.tokenizer]
        text = [_key(dataclasses.asdict(config.text)), str(self.text_dtype), fingerprint(encoder)]
        image = [fingerprint(found.parts["image_encoder"])] if self._sees_image else []
        hashes = [content_hash(clip) for clip in self.clips]
        self._texts = {c: self._path("text", c, text) for c in ("", *self._captions())}
        self._files = [
            {
                "latents": self._path("latents", digest, video),
                **({"beside": self._path("beside", digest, video)} if config.needs_image else {}),
                **({"image": self._path("image", digest, [*video, *image])} if image else {}),
                "text": self._texts[clip.caption],
            }
            for clip, digest in zip(self.clips, hashes, strict=True)
        ]

    @property
    def key(self) -> str:
        """A hash of everything that is trained on."""
        return _key([[path.name for path in files.values()] for files in self._files])

    def lacking(self) -> tuple[list[int], list[int], list[str]]:
        """What is to be encoded: numbers of videos and of first frames, and captions.

        Raises:
          ValueError: videos are too short or damaged; all are named.
        """
        videos = [
            n for n, files in enumerate(self._files) if self._lacks(files, "latents", "beside")
        ]
        images = [n for n, files in enumerate(self._files) if self._lacks(files, "image")]
        texts = [text for text, path in self._texts.items() if not self._whole("text", path)]
        wanted = [self.clips[n] for n in sorted({*videos, *images})]
        check_clips(wanted, self.settings.frames, self.settings.fps)
        return videos, images, texts

    def fill(
        self,
        load: Callable[[Found, str, Any], Any] = load_part,
        progress: bool = True,
    ) -> CachedClips:
        """Encodes what is missing, one part of the model at a time, and returns the source.

        Args:
          load: gives a part of the model by name, in a dtype.
          progress: whether to show progress bars.

        Raises:
          ValueError: videos are too short or damaged; all are named before any is encoded.
          Interrupted: Ctrl-C, or SIGTERM; what is encoded by then is kept.
        """
        videos, images, texts = self.lacking()
        self.folder.mkdir(parents=True, exist_ok=True)
        with stop_signals() as stop:

            def each(items: Sequence[Any], what: str) -> Iterable[Any]:
                bar = tqdm(items, desc=what, disable=not (progress and items))
                for done, item in enumerate(bar):
                    if stop():
                        raise Interrupted(f"stopped after {done} of {len(items)} {what}")
                    yield item

            if videos:
                self._encode_videos(load(self.found, "vae", jnp.float32), each(videos, "videos"))
            # each part is an argument alone, so that it is let go before the next is loaded
            config = self.found.config
            if images and config.image is not None:
                self._encode_images(
                    load(self.found, "image_encoder", config.image.compute_dtype),
                    each(images, "first frames"),
                )
            if texts:
                self._encode_texts(
                    load(self.found, "text_encoder", config.text.compute_dtype),
                    each(texts, "captions"),
                )
        length = self.found.config.transformer.text_length
        return CachedClips(tuple(self._files), self._texts[""], length)

    def _encode_videos(self, vae: Any, numbers: Iterable[int]) -> None:
        params = split_params(vae)[1]
        for n in numbers:
            pixels, files = self._pixels(n), self._files[n]
            video = jnp.asarray(pixels[None].astype(np.float32) / 127.5 - 1)
            latents = _encode(vae.config, params, video)
            if "beside" in files:
                beside = beside_channels(vae, pixels[0], self.settings.frames)
                _write(files["beside"], "beside", np.asarray(beside[0]))
            _write(files["latents"], "latents", np.asarray(latents[0]))

    def _encode_images(self, encoder: Any, numbers: Iterable[int]) -> None:
        for n in numbers:
            states = image_states(encoder, self._pixels(n)[0])
            _write(self._files[n]["image"], "image", np.asarray(states[0]))

    def _encode_texts(self, encoder: Any, texts: Iterable[str]) -> None:
        for text in texts:
            _, mask = self.tokenizer.encode([text])
            states = text_states(encoder, self.tokenizer, [text])[0, : int(mask.sum())]
            _write(self._texts[text], "text", np.asarray(states.astype(self.text_dtype)))

    def _pixels(self, n: int) -> np.ndarray:
        settings = self.settings
        return read_clip(self.clips[n], settings.frames, settings.size, settings.fps)

    @property
    def _sees_image(self) -> bool:
        return self.found.config.image is not None

    def _captions(self) -> list[str]:
        return list(dict.fromkeys(clip.caption for clip in self.clips))

    def _path(self, kind: str, content: str, settings: Sequence[Any]) -> pathlib.Path:
        return self.folder / f"{kind}-{_key([_FORMAT, kind, content, *settings])}.safetensors"

    def _lacks(self, files: Mapping[str, pathlib.Path], *kinds: str) -> bool:
        return any(kind in files and not self._whole(kind, files[kind]) for kind in kinds)

    def _whole(self, kind: str, path: pathlib.Path) -> bool:
        """Whether a file is there with all that it should have."""
        config, settings = self.found.config, self.settings
        width, height = settings.size
        latent = config.vae.latent_size(settings.frames, height, width)
        beside = config.transformer.in_channels - config.transformer.out_channels
        shapes = {
            "latents": (*latent, config.vae.latent_channels),
            "beside": (*latent, beside),
            "text": (None, config.transformer.text_dim),
            "image": (None, config.transformer.image_dim),
        }
        try:
            tensor = Stored([path])[kind]
        except (ValueError, KeyError):
            return False
        return len(tensor.shape) == len(shapes[kind]) and all(
            want in (None, got) for got, want in zip(tensor.shape, shapes[kind], strict=True)
        )


def fingerprint(paths: Iterable[pathlib.Path | None]) -> str:
    """A hash that tells weights from others, from sizes and pieces of their files.

    Whole files would take minutes to read, and pieces spread over all of one differ as soon as it
    is of another training.
    """
    total = hashlib.sha256()
    for path in paths:
        if path is None:
            continue
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        for file in files:
            size = file.stat().st_size
            total.update(f"{file.name}:{size}\n".encode())
            with file.open("rb") as opened:
                step = max(_PIECE, size // _PIECES)
                for start in range(0, size, step):
                    opened.seek(start)
                    total.update(opened.read(_PIECE))
    return total.hexdigest()


def _key(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def _write(path: pathlib.Path, name: str, value: np.ndarray) -> None:
    """Writes beside and renames: a file by its own name is always whole."""
    handle, partial = tempfile.mkstemp(prefix=".partial-", dir=path.parent)
    os.close(handle)
    try:
        tensors = {name: (value.shape, value.dtype)}
        write_safetensors(pathlib.Path(partial), tensors, lambda _: value)
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        pathlib.Path(partial).unlink(missing_ok=True)
        raise


def _read(path: pathlib.Path) -> dict[str, np.ndarray]:
    return {name: np.array(tensor.read()) for name, tensor in Stored([path]).items()}


@functools.partial(jax.jit, static_argnums=0)
def _encode(config: VAEConfig, params: Params, video: Array) -> Array:
    return rebuild_vae(config, params).encode(video)
