"""Small whole pipelines: what is asked of them, the noise and the image they start from."""

import dataclasses

import numpy as np
from vmonarch_jax.models.wan.request import Request
from vmonarch_jax.models.wan.weights.random_folder import small_config


@dataclasses.dataclass(frozen=True)
class Case:
    """One run of one kind of model.

    Attributes:
      kind: of `small_config`.
      request: what is asked.
      image: whether it starts from an image.
      last: whether it ends on one, too.
    """

    kind: str
    request: Request
    image: bool = False
    last: bool = False

    def noise(self):
        """Latents to start from, channels last."""
        shape = self.request.latent_shape(small_config(self.kind))
        return np.random.RandomState(5).standard_normal(shape).astype(np.float32)

    def pixels(self):
        """An image at the request's size, or `None`: smooth colours, no noise."""
        if not self.image:
            return None
        width, height = self.request.size
        y, x = np.mgrid[0:height, 0:width]
        colours = [np.sin(x / 5) + np.cos(y / 7), np.sin((x + y) / 9), np.cos(x * y / 300)]
        return np.clip(127.5 + 60 * np.stack(colours, -1), 0, 255).astype(np.uint8)

    def last_pixels(self):
        """The last image: the first one upside down, darker; or `None`."""
        return self.pixels()[::-1] // 2 if self.last else None


def _request(prompt, **given):
    return Request(prompt, "blurry static", **({"size": (64, 32), "frames": 5, "steps": 5} | given))


CASES = {
    # two texts of different lengths, an odd grid
    "text": Case("t2v", _request(("a red fox runs in snow", "the cat"), size=(48, 80), frames=9)),
    "one_frame": Case("t2v", _request("the blue dog", frames=1, steps=4, guidance=1.0)),
    "euler": Case("t2v", _request("the blue dog", sampler="euler", steps=3)),
    "two_experts": Case("t2v-two", _request("a cat", shift=5.0, guidance=4.0, guidance_low=3.0)),
    "text_5b": Case("ti2v", _request("a dog, a fox", size=(64, 96))),
    "image_5b": Case("ti2v", _request("a dog, a fox", size=(64, 96)), image=True),
    "image_clip": Case("i2v", _request("a red dog", size=(80, 48), shift=3.0), image=True),
    "image_two_experts": Case("i2v-two", _request("a dog on snow", guidance=3.5), image=True),
    "two_images_clip": Case(
        "flf2v",
        _request(("a red dog", "the fox"), size=(48, 80), shift=16.0),
        image=True,
        last=True,
    ),
    "two_images_two_experts": Case(
        "i2v-two", _request("a dog on snow", frames=9, guidance=3.5), image=True, last=True
    ),
}

#: The cases that are stored as goldens.
STORED = ("two_experts", "image_5b", "image_clip", "two_images_clip")
