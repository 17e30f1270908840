"""How the autoencoders' parameters are stored in Diffusers' and in the original's convention."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from .config import VAEConfig
from .vae.decoder import up_widths
from .weights.entry import Entry


def vae_entries(config: VAEConfig) -> tuple[Entry, ...]:
    """Every parameter of `WanVAE(config)`, once, with its keys in both conventions.

    All are `None` in `logical`: the autoencoder is small, and each device holds it whole;
    a mesh splits its pictures (`vae/picture.py`).
    """
    channels = config.latent_channels
    return (
        *_encoder(config),
        *_linear("quant", "quant_conv", "conv1", 2 * channels, 2 * channels, 3),
        *_linear("post_quant", "post_quant_conv", "conv2", channels, channels, 3),
        *_decoder(config),
    )


def _encoder(config: VAEConfig) -> Iterator[Entry]:
    widths = [config.dim * m for m in (1, *config.multipliers)]
    pixels = 3 * config.patch**2
    yield from _conv("encoder.conv_in", "encoder.conv_in", "encoder.conv1", pixels, widths[0])
    place = 0  # of a layer in the flat list of Wan2.1
    for n, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        level, theirs = f"encoder.levels.{n}", f"encoder.down_blocks.{n}"
        for block in range(config.blocks):
            if config.residual:
                keys = (f"{theirs}.resnets.{block}", f"encoder.downsamples.{n}.downsamples.{block}")
            else:
                keys = (f"encoder.down_blocks.{place}", f"encoder.downsamples.{place}")
            yield from _block(
                f"{level}.blocks.{block}", *keys, outputs if block else inputs, outputs
            )
            place += 1
        if n == len(config.halve_time):
            continue
        if config.residual:
            keys = (f"{theirs}.downsampler", f"encoder.downsamples.{n}.downsamples.{config.blocks}")
        else:
            keys = (f"encoder.down_blocks.{place}", f"encoder.downsamples.{place}")
        ours, (hf, original) = f"{level}.halve", keys
        yield from _image_conv(
            f"{ours}.space", f"{hf}.resample.1", f"{original}.resample.1", outputs, outputs
        )
        if config.halve_time[n]:
            names = (f"{ours}.time", f"{hf}.time_conv", f"{original}.time_conv")
            yield from _conv(*names, outputs, outputs, (3, 1, 1))
        place += 1
    yield from _middle("encoder", widths[-1])
    yield from _head("encoder", widths[-1], 2 * config.latent_channels)


def _decoder(config: VAEConfig) -> Iterator[Entry]:
    levels = up_widths(config)
    channels, first = config.latent_channels, levels[0][0]
    yield from _conv("decoder.conv_in", "decoder.conv_in", "decoder.conv1", channels, first)
    yield from _middle("decoder", first)
    place = 0
    for n, (inputs, width, outputs) in enumerate(levels):
        level, theirs = f"decoder.levels.{n}", f"decoder.up_blocks.{n}"

        def original(layer: int, n: int = n, place: int = place) -> str:
            if config.residual:
                return f"decoder.upsamples.{n}.upsamples.{layer}"
            return f"decoder.upsamples.{place + layer}"

        for block in range(config.blocks + 1):
            keys = (f"{theirs}.resnets.{block}", original(block))
            yield from _block(f"{level}.blocks.{block}", *keys, width if block else inputs, width)
        place += config.blocks + 2
        if n == len(config.halve_time):
            continue
        hf = f"{theirs}.upsampler" if config.residual else f"{theirs}.upsamplers.0"
        ours, old = f"{level}.double", original(config.blocks + 1)
        yield from _image_conv(
            f"{ours}.space", f"{hf}.resample.1", f"{old}.resample.1", width, outputs
        )
        if config.halve_time[::-1][n]:
            names = (f"{ours}.time", f"{hf}.time_conv", f"{old}.time_conv")
            yield from _conv(*names, width, 2 * width, (3, 1, 1))
    yield from _head("decoder", levels[-1][-1], 3 * config.patch**2)


def _middle(side: str, dim: int) -> Iterator[Entry]:
    ours, hf, original = f"{side}.middle", f"{side}.mid_block", f"{side}.middle"
    yield from _block(f"{ours}.block1", f"{hf}.resnets.0", f"{original}.0", dim, dim)
    attention, hf_attention = f"{ours}.attention", f"{hf}.attentions.0"
    yield _scale(f"{attention}.norm", f"{hf_attention}.norm", f"{original}.1.norm", dim, 2)
    for name, key, width in (("qkv", "to_qkv", 3 * dim), ("out", "proj", dim)):
        keys = (f"{hf_attention}.{key}", f"{original}.1.{key}")
        yield from _linear(f"{attention}.{name}", *keys, dim, width, 2)
    yield from _block(f"{ours}.block2", f"{hf}.resnets.1", f"{original}.2", dim, dim)


def _head(side: str, dim: int, outputs: int) -> Iterator[Entry]:
    yield _scale(f"{side}.norm_out", f"{side}.norm_out", f"{side}.head.0", dim, 3)
    yield from _conv(f"{side}.conv_out", f"{side}.conv_out", f"{side}.head.2", dim, outputs)


def _block(ours: str, hf: str, original: str, inputs: int, outputs: int) -> Iterator[Entry]:
    yield _scale(f"{ours}.norm1", f"{hf}.norm1", f"{original}.residual.0", inputs, 3)
    yield from _conv(f"{ours}.conv1", f"{hf}.conv1", f"{original}.residual.2", inputs, outputs)
    yield _scale(f"{ours}.norm2", f"{hf}.norm2", f"{original}.residual.3", outputs, 3)
    yield from _conv(f"{ours}.conv2", f"{hf}.conv2", f"{original}.residual.6", outputs, outputs)
    if inputs != outputs:
        keys = (f"{hf}.conv_shortcut", f"{original}.shortcut")
        yield from _linear(f"{ours}.shortcut", *keys, inputs, outputs, 3)


def _scale(ours: str, hf: str, original: str, dim: int, sides: int) -> Entry:
    stored = (dim,) + (1,) * sides
    return Entry(
        f"{ours}.scale", f"{hf}.gamma", f"{original}.gamma", (dim,), stored, logical=(None,)
    )


def _bias(ours: str, hf: str, original: str, dim: int) -> Entry:
    names = (f"{ours}.bias", f"{hf}.bias", f"{original}.bias")
    return Entry(*names, (dim,), (dim,), logical=(None,))


def _conv(
    ours: str,
    hf: str,
    original: str,
    inputs: int,
    outputs: int,
    kernel: tuple[int, ...] = (3, 3, 3),
) -> Iterator[Entry]:
    rank = len(kernel)
    yield Entry(
        f"{ours}.kernel",
        f"{hf}.weight",
        f"{original}.weight",
        shape=(*kernel, inputs, outputs),
        stored=(outputs, inputs, *kernel),
        axes=(*range(2, rank + 2), 1, 0),
        logical=(None,) * (rank + 2),
    )
    yield _bias(ours, hf, original, outputs)


def _image_conv(ours: str, hf: str, original: str, inputs: int, outputs: int) -> Iterator[Entry]:
    yield from _conv(ours, hf, original, inputs, outputs, (3, 3))


def _linear(
    ours: str, hf: str, original: str, inputs: int, outputs: int, sides: int
) -> Iterator[Entry]:
    """A convolution of one pixel, of `sides` dimensions where it is stored."""
    yield Entry(
        f"{ours}.kernel",
        f"{hf}.weight",
        f"{original}.weight",
        shape=(inputs, outputs),
        stored=(outputs, inputs) + (1,) * sides,
        axes=(1, 0, *range(2, sides + 2)),
        logical=(None, None),
    )
    yield _bias(ours, hf, original, outputs)
