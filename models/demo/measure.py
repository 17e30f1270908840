"""Numbers about each method: certificate, time, FLOPs and likeness to the dense videos."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

import vmonarch_jax as vm

from ..dit import VideoDiT, capture_qkv
from ..flow import interpolate
from ..layers import AttentionMethod
from .conditions import Conditions

Videos = Float[np.ndarray, "batch frames height width 3"]
#: Stands for the infinite PSNR of equal videos, which no JSON can hold.
_MOST_PSNR = 100.0
_SSIM_WINDOW = 7


def likeness(videos: Videos, reference: Videos) -> tuple[float, float]:
    """Returns PSNR in decibels and SSIM of videos in [-1, 1], both the mean over the videos.

    The PSNR of a video is that of its mean squared error over all frames; its SSIM is the mean of
    the SSIM of its frames.
    """
    # SSIM compares means by their ratio, so it needs intensities that start at black, at zero
    videos, reference = ((x + 1) / 2 for x in (videos, reference))
    psnr, ssim = [], []
    window = min(_SSIM_WINDOW, *(n - 1 + n % 2 for n in videos.shape[2:4]))
    for video, wanted in zip(videos, reference, strict=True):
        equal = np.array_equal(video, wanted)
        psnr.append(_MOST_PSNR if equal else peak_signal_noise_ratio(wanted, video, data_range=1))
        ssim += [
            structural_similarity(a, b, win_size=window, channel_axis=-1, data_range=1)
            for a, b in zip(wanted, video, strict=True)
        ]
    return float(np.mean(psnr)), float(np.mean(ssim))


@functools.partial(jax.jit, static_argnums=0)
def _gaps(graph, state, x, t, label, caption):
    model = nnx.merge(graph, state)
    seen = capture_qkv(model, x, t, label, caption)
    grid = model.config.grid_of(x.shape[1:4])
    rows = []
    for (q, k, v), method in zip(seen, model.methods(), strict=True):
        if isinstance(method, vm.Corrected):  # no log-sum-exp, so no certificate
            rows.append(jnp.full((*q.shape[:3],), jnp.nan))
            continue
        _, lse = method(q, k, v, grid=grid, return_lse=True)
        rows.append(vm.attention_gap(q, k, lse, grid=grid))
    q, k, v = (jnp.stack(parts) for parts in zip(*seen, strict=True))
    return jnp.stack(rows), q, k, v


def gaps(
    model: VideoDiT, videos: Videos, conditions: Conditions, t: float
) -> tuple[Float[np.ndarray, "layers batch rows heads"], tuple[Array, Array, Array]]:
    """Returns `KL(approximate row || dense row)` of every row, and q, k and v of every layer.

    The model runs under its own attention on `videos`, noised to time `t`, so q and k are the ones
    that it meets in use. A method that remembers acts as if nothing had gone before: AdaSpa
    searches. NaN for `vm.Corrected`, which has no certificate.

    Args:
      model: the model under the method.
      videos: clean videos.
      conditions: their labels and captions, and the noise.
      t: time in (0, 1).

    Returns:
      KL in nats, and `(q, k, v)`, each `[layers, batch, seq, heads, head_dim]`.
    """
    times = jnp.full(len(videos), t)
    x, _ = interpolate(jnp.asarray(videos), conditions.noise, times)
    gap, *qkv = _gaps(*nnx.split(model), x, times, conditions.label, conditions.caption)
    return np.asarray(gap), tuple(qkv)


def attention_seconds(
    method: AttentionMethod,
    qkv: tuple[Array, Array, Array],
    grid: vm.VideoGrid,
    steps: int,
    repeats: int,
) -> float:
    """Returns the seconds that attention alone takes in all layers on all steps.

    After a pass that compiles: the median of `repeats` passes times the steps, or, of a method that
    remembers and so differs from step to step, a pass for each step.
    """
    layers = list(zip(*qkv, strict=True))
    if not vm.remembers(method):
        run = functools.partial(_attend, method, grid, None, None)
        return steps * median_seconds(lambda: [run(*layer) for layer in layers], repeats)
    batch, _, heads, head_dim = qkv[0].shape[1:]
    sizes = {"batch": batch, "heads": heads, "head_dim": head_dim, "dtype": qkv[0].dtype}
    fresh = jax.jit(lambda: vm.init_state(method, grid, **sizes))()

    def sampler(steps: int) -> list[Array]:
        states, out = [fresh] * len(layers), []
        for step in range(steps):
            for n, layer in enumerate(layers):
                found, states[n] = _attend(method, grid, states[n], jnp.int32(step), *layer)
                out.append(found)
        return out

    jax.block_until_ready(sampler(1))
    began = time.perf_counter()
    jax.block_until_ready(sampler(steps))
    return time.perf_counter() - began


@functools.partial(jax.jit, static_argnums=(0, 1))
def _attend(method, grid, state, step, q, k, v):
    return vm.attend(method, q, k, v, grid=grid, state=state, step=step)


def median_seconds(call: Callable[[], object], repeats: int, enough: float = float("inf")) -> float:
    """Returns the median time of `call`, after a warm-up that is not counted.

    Args:
      call: what is timed; its result is waited for.
      repeats: calls at most.
      enough: seconds after which no further call begins.
    """
    jax.block_until_ready(call())
    seconds: Sequence[float] = []
    while len(seconds) < repeats and sum(seconds) < enough:
        began = time.perf_counter()
        jax.block_until_ready(call())
        seconds = [*seconds, time.perf_counter() - began]
    return float(np.median(seconds))
