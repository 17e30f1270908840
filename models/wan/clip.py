"""The CLIP vision encoder of Wan2.1's image to video: a picture in, image states out."""

from __future__ import annotations

import functools

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8

from .config import ImageConfig

# Mean and deviation of each colour, as CLIP was trained with.
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)
# Of cubic convolution (Keys 1981): the slope at one pixel's distance, as in torch.
_SHARP = -0.75

_ACTIVATIONS = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}


#: How a picture becomes a square: its middle, or all of it.
FITS = ("crop", "squeeze")


def preprocess_image(
    image: UInt8[np.ndarray, "height width 3"], size: int = 224, fit: str = FITS[0]
) -> Float[np.ndarray, "size size 3"]:
    """A picture as the encoder takes it: a square, colours as `(colour / 255 - mean) / std`.

    Mean and deviation are CLIP's. With "crop" the shorter side is resized to `size` (bicubic) and
    the middle cut out: what Transformers' `CLIPImageProcessor` does, hence Diffusers'
    `WanImageToVideoPipeline`. With "squeeze" the whole picture is resized to the square, bicubic
    without antialiasing: what the original repository does.

    Args:
      image: one picture, any size.
      size: pixels of each side of the square, `ImageConfig.size`.
      fit: "crop" or "squeeze".

    Returns:
      Float32; stack pictures for a batch.

    Raises:
      ValueError: not a uint8 array `[height, width, 3]`, `size` is below 1, or no such `fit`.

    Example:
      pixels = preprocess_image(np.asarray(PIL.Image.open("cat.png").convert("RGB")))[None]
    """
    from PIL import Image  # the encoder itself does without it

    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3 or not image.size:
        raise ValueError(f"expected uint8 [height, width, 3], got {image.dtype} {image.shape}")
    if size < 1:
        raise ValueError(f"expected size >= 1, got {size}")
    if fit not in FITS:
        raise ValueError(f"expected a fit of {FITS}, got {fit!r}")
    if fit == "squeeze":
        rows, columns = (_bicubic(side, size) for side in image.shape[:2])
        return _coloured(np.einsum("yh,hwc,xw->yxc", rows, image, columns, optimize=True))
    height, width = (size * side // min(image.shape[:2]) for side in image.shape[:2])
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
    top, left = (height - size) // 2, (width - size) // 2
    return _coloured(np.asarray(resized)[top : top + size, left : left + size])


def _coloured(square: np.ndarray) -> Float[np.ndarray, "size size 3"]:
    scaled = square.astype(np.float32) / 255
    return (scaled - np.asarray(_MEAN, np.float32)) / np.asarray(_STD, np.float32)


def _bicubic(side: int, size: int) -> Float[np.ndarray, "size side"]:
    """Weights that resize a side: cubic convolution of four neighbours, the border repeated."""
    places = (np.arange(size) + 0.5) * side / size - 0.5
    first = np.floor(places)
    weights = np.zeros((size, side))
    for tap in range(-1, 3):
        x = np.abs(places - first - tap)
        near = (_SHARP + 2) * x**3 - (_SHARP + 3) * x**2 + 1
        far = _SHARP * (x**3 - 5 * x**2 + 8 * x - 4)
        at = np.clip(first + tap, 0, side - 1).astype(int)
        np.add.at(weights, (np.arange(size), at), np.where(x <= 1, near, far))
    return weights


class Attention(nnx.Module):
    """Self-attention with biased projections."""

    def __init__(self, config: ImageConfig, *, rngs: nnx.Rngs, param_dtype: jnp.dtype) -> None:
        heads = (config.heads, config.dim // config.heads)
        linear = functools.partial(
            nnx.LinearGeneral, dtype=config.compute_dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.q = linear(config.dim, heads)
        self.k = linear(config.dim, heads)
        self.v = linear(config.dim, heads)
        self.out = linear(heads, config.dim, axis=(-2, -1))

    def __call__(self, x: Float[Array, "batch seq dim"]) -> Float[Array, "batch seq dim"]:
        return self.out(jax.nn.dot_product_attention(self.q(x), self.k(x), self.v(x)))


class Block(nnx.Module):
    """Formula: `x += attn(norm1(x))`, then `x += fc2(act(fc1(norm2(x))))`."""

    def __init__(self, config: ImageConfig, *, rngs: nnx.Rngs, param_dtype: jnp.dtype) -> None:
        linear = functools.partial(
            nnx.Linear, dtype=config.compute_dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.norm1 = _norm(config, param_dtype, rngs)
        self.attn = Attention(config, rngs=rngs, param_dtype=param_dtype)
        self.norm2 = _norm(config, param_dtype, rngs)
        self.fc1 = linear(config.dim, config.ffn_dim)
        self.fc2 = linear(config.ffn_dim, config.dim)
        self.activation = config.activation

    def __call__(self, x: Float[Array, "batch seq dim"]) -> Float[Array, "batch seq dim"]:
        x = x + self.attn(self.norm1(x)).astype(jnp.float32)
        h = _ACTIVATIONS[self.activation](self.fc1(self.norm2(x)))
        return x + self.fc2(h).astype(jnp.float32)


class CLIPVision(nnx.Module):
    """Encodes pictures as CLIP's vision transformer does, up to the last block but one.

    Wan's transformer was trained on the states before the last block, so the last block, the
    final norm and the projection are not part of this model: `clip_ignored` names their
    keys. Equal to `hidden_states[-2]` of Transformers' `CLIPVisionModel`. Matmuls are in the
    configuration's dtype; norms, softmax and the residual stream in float32.

    Args:
      config: the sizes; `layers` counts the last block as well.
      rngs: keys of the initial weights.
      param_dtype: of the weights.

    Raises:
      ValueError: fewer than two layers, or an activation that is not known.

    Example:
      encoder = CLIPVision(ImageConfig(), rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16)
      states = encoder(preprocess_image(image)[None])                # [1, 257, 1280]

    Source: Radford et al. (arXiv 2103.00020); the weights are OpenCLIP's ViT-H/14.
    """

    def __init__(
        self, config: ImageConfig, *, rngs: nnx.Rngs, param_dtype: jnp.dtype = jnp.float32
    ) -> None:
        if config.layers < 2:
            raise ValueError(f"expected layers >= 2, got {config.layers}")
        if config.activation not in _ACTIVATIONS:
            raise ValueError(
                f"expected activation of {sorted(_ACTIVATIONS)}, got {config.activation!r}"
            )
        self.config = config
        init = nnx.initializers.normal(config.dim**-0.5)
        positions = (config.size // config.patch) ** 2 + 1

        def param(*shape: int) -> nnx.Param:
            return nnx.Param(init(rngs.params(), shape, param_dtype))

        self.patch = param(config.patch, config.patch, 3, config.dim)
        self.class_token = param(config.dim)
        self.positions = param(positions, config.dim)
        self.norm = _norm(config, param_dtype, rngs)

        @nnx.split_rngs(splits=config.layers - 1)
        @nnx.vmap
        def stack(rngs: nnx.Rngs) -> Block:
            return Block(config, rngs=rngs, param_dtype=param_dtype)

        self.blocks = stack(rngs)

    def __call__(
        self, pixels: Float[Array, "batch size size 3"]
    ) -> Float[Array, "batch states dim"]:
        """Returns the states of the class token and of all patches, row by row, in float32.

        Args:
          pixels: of `preprocess_image`.

        Raises:
          ValueError: pictures of another size than the configuration's.
        """
        config = self.config
        if pixels.ndim != 4 or pixels.shape[1:] != (config.size, config.size, 3):
            raise ValueError(
                f"expected pixels [batch, {config.size}, {config.size}, 3], got {pixels.shape}"
            )
        dtype = config.compute_dtype
        patches = einops.rearrange(
            pixels, "z (h p) (w q) c -> z (h w) p q c", p=config.patch, q=config.patch
        )
        kernel = self.patch[...].astype(dtype)
        x = jnp.einsum("znpqc,pqcd->znd", patches.astype(dtype), kernel).astype(jnp.float32)
        first = jnp.broadcast_to(self.class_token[...].astype(jnp.float32), (len(x), 1, config.dim))
        x = jnp.concatenate([first, x], axis=1) + self.positions[...].astype(jnp.float32)
        graph, layers = nnx.split(self.blocks)

        def block(x, layer):
            return nnx.merge(graph, layer)(x), None

        return jax.lax.scan(block, self.norm(x), layers)[0]


def _norm(config: ImageConfig, param_dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(
        config.dim,
        epsilon=config.eps,
        dtype=jnp.float32,
        param_dtype=param_dtype,
        use_fast_variance=False,
        rngs=rngs,
    )
