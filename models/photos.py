"""Photographs that ship inside scikit-image, as antialiased image pyramids.

Nothing is downloaded: only files that the scikit-image wheel itself contains are used.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from importlib.metadata import version

import numpy as np
import skimage
from jaxtyping import Float
from PIL import Image
from scipy import ndimage

#: Textures that sprites wear; never a subject, so a sprite always stands out from its background.
TEXTURES = ("moon", "brick", "coins", "grass")

_FILES = {
    "astronaut": "astronaut.png",
    "chelsea": "chelsea.png",
    "coffee": "coffee.png",
    "rocket": "rocket.jpg",
    "motorcycle": "motorcycle_left.png",
    "retina": "retina.jpg",
    "hubble": "hubble_deep_field.jpg",
    "tissue": "ihc.png",
    "moon": "moon.png",
    "brick": "brick.png",
    "coins": "coins.png",
    "grass": "grass.png",
}
#: Short sides of the pyramid's levels in pixels, a factor of sqrt(2) apart: between two
#: neighbouring levels a bilinear blend shows neither aliasing nor visible blur.
LEVELS = tuple(round(256 * 2 ** (-0.5 * n)) for n in range(9))


@dataclasses.dataclass(frozen=True)
class Pyramid:
    """One photograph at every size of `LEVELS`, values in [-1, 1].

    Positions are measured in short sides of the photograph from its top left corner, so a
    photograph of 400 x 600 pixels spans `(0, 1) x (0, 1.5)`.
    """

    name: str
    levels: tuple[Float[np.ndarray, "height width 3"], ...]
    height: float
    width: float

    def sample(
        self,
        y: Float[np.ndarray, "*shape"],
        x: Float[np.ndarray, "*shape"],
        spacing: float,
    ) -> Float[np.ndarray, "*shape 3"]:
        """Reads colours at positions `(y, x)` whose neighbours lie `spacing` apart.

        The two levels whose pixels are nearest to `spacing` are read bilinearly and blended
        (trilinear mip-mapping). Positions outside the photograph are mirrored back into it.
        """
        # level n has pixels 1 / LEVELS[n] apart; find the real n with that spacing
        wanted = np.clip(2 * np.log2(LEVELS[0] * spacing), 0, len(LEVELS) - 1)
        low = min(int(wanted), len(LEVELS) - 2)
        blend = wanted - low
        out = np.zeros((*np.shape(y), 3), np.float32)
        for level, weight in ((low, 1 - blend), (low + 1, blend)):
            image = self.levels[level]
            # float64 throughout: the result must not depend on how a platform rounds positions
            rows, cols = y * LEVELS[level] - 0.5, x * LEVELS[level] - 0.5
            for channel in range(3):
                out[..., channel] += weight * ndimage.map_coordinates(
                    image[..., channel], (rows, cols), order=1, mode="mirror"
                )
        return out


@functools.cache
def load(name: str) -> Pyramid:
    """Returns the pyramid of one photograph of `labels.PHOTOS` or `TEXTURES` (cached).

    Raises:
      ValueError: the name is not known.
      FileNotFoundError: this installation of scikit-image lacks the file.
    """
    if name not in _FILES:
        raise ValueError(f"expected a photograph of {sorted(_FILES)}, got {name!r}")
    path = pathlib.Path(skimage.__file__).parent / "data" / _FILES[name]
    if not path.exists():
        raise FileNotFoundError(f"scikit-image {version('scikit-image')} ships no {path}")
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    short = min(image.size)
    levels = []
    for side in LEVELS:
        width, height = (round(length * side / short) for length in image.size)
        resized = image.resize((width, height), Image.Resampling.LANCZOS)
        levels.append(np.asarray(resized, np.float32) / 127.5 - 1.0)
    return Pyramid(name, tuple(levels), image.size[1] / short, image.size[0] / short)
