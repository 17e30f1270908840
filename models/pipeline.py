"""The input pipeline: videos by index, shuffled and batched by grain."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import grain
import numpy as np
from absl import flags

from .labels import MOTIONS, PHOTOS
from .motions import make_video


@dataclasses.dataclass(frozen=True)
class MotionVideos:
    """A random-access source of videos: item `n` depends on `(seed, n)` and on nothing else.

    Items are dicts of `video [frames, size, size, 3]` in [-1, 1], `label []` (int32, an index into
    `MOTIONS`) and `caption [photos]`. Motions and subjects take turns, so every window of 80
    indices holds each pair once.

    Raises:
      ValueError: a size is not positive, or the seed is negative.
    """

    seed: int = 0
    length: int = 16_384
    frames: int = 16
    size: int = 32

    def __post_init__(self) -> None:
        for name in ("length", "frames", "size"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} >= 1, got {getattr(self, name)}")
        if self.seed < 0:
            raise ValueError(f"expected seed >= 0, got {self.seed}")

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, np.ndarray | np.generic]:
        index = int(index)
        if not 0 <= index < self.length:
            raise IndexError(f"expected an index in [0, {self.length}), got {index}")
        rng = np.random.default_rng([self.seed, index])
        motion = index % len(MOTIONS)
        subject = index // len(MOTIONS) % len(PHOTOS)
        video, caption = make_video(motion, subject, rng, frames=self.frames, size=self.size)
        return {"video": video, "label": np.int32(motion), "caption": caption}


class Source(Protocol):
    """Items by index, each a dict of arrays; the same index always gives the same item."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


def batches(
    source: Source, *, batch_size: int, seed: int = 0, workers: int = 0
) -> grain.DatasetIterator[dict[str, Any]]:
    """Returns an endless, shuffled, checkpointable iterator of batches.

    Args:
      source: where the items come from.
      batch_size: items a batch; an epoch's last, short batch is dropped.
      seed: seed of the shuffle, drawn anew every epoch.
      workers: processes that render; 0 renders in this one, with two threads that run ahead.

    Returns:
      An iterator with `get_state()` and `set_state(state)`; the batches do not depend on `workers`.

    Raises:
      ValueError: an epoch holds no full batch.
    """
    if not 1 <= batch_size <= len(source):
        raise ValueError(f"expected batch_size in [1, {len(source)}], got {batch_size}")
    dataset = (
        grain.MapDataset.source(source)
        .seed(seed)
        .shuffle()
        .batch(batch_size, drop_remainder=True)
        .repeat()
        # a few batches ahead are plenty: a training step takes far longer than rendering one
        .to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4))
    )
    if workers:
        if not flags.FLAGS.is_parsed():  # grain reads absl's flags, which only absl's apps parse
            flags.FLAGS.mark_as_parsed()
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    return iter(dataset)
