"""The methods that the demo compares, and the weights that they run on."""

from __future__ import annotations

import dataclasses
import importlib.resources
import pathlib

import vmonarch_jax as vm

from ..dit import VideoDiT
from ..export import load_model
from ..layers import AttentionMethod


@dataclasses.dataclass(frozen=True)
class Entry:
    """One column of the comparison.

    Attributes:
      key: name in files.
      title: name in pictures, two lines.
      weights: "dense" or "tuned".
      method: the attention.
      colour: of the method in every picture (Okabe and Ito's palette, told apart by everyone).
    """

    key: str
    title: tuple[str, str]
    weights: str
    method: AttentionMethod
    colour: str

    @property
    def name(self) -> str:
        """The title in one line."""
        return ", ".join(line for line in self.title if line)


ENTRIES = (
    Entry("dense", ("Dense", "exact"), "dense", vm.Dense(), "#333333"),
    Entry("vmonarch", ("VMonarch", "training-free"), "dense", vm.VMonarch(), "#0072B2"),
    Entry("vmonarch_tuned", ("VMonarch", "tuned"), "tuned", vm.VMonarch(), "#D55E00"),
    Entry("tiled", ("Tiled Monarch", "training-free"), "dense", vm.TiledMonarch(), "#009E73"),
)


def shipped(name: str) -> pathlib.Path:
    """Returns the folder of the shipped weights "dense" or "vmonarch"; it may not exist."""
    return pathlib.Path(str(importlib.resources.files("vmonarch_jax.models") / "tiny" / name))


def load_entries(
    dense: pathlib.Path | None, tuned: pathlib.Path | None
) -> list[tuple[Entry, VideoDiT]]:
    """Returns the methods with their models, dense attention first.

    Args:
      dense: weights trained under dense attention; the shipped ones if not given.
      tuned: weights tuned to VMonarch; the shipped ones if neither is given. Weights tuned from
        another model would say nothing, so with `dense` alone the tuned method is left out.

    Raises:
      ValueError: a folder holds no model, or the two models differ in shape.
    """
    if tuned is None and dense is None and shipped("vmonarch").is_dir():
        tuned = shipped("vmonarch")
    folders = {"dense": dense or shipped("dense"), "tuned": tuned}
    loaded = []
    for entry in ENTRIES:
        folder = folders[entry.weights]
        if folder is not None:
            loaded.append((entry, load_model(folder, attention=entry.method)))
    config = loaded[0][1].config
    for entry, model in loaded:
        if model.config != config:
            raise ValueError(
                f"expected both models of the same configuration, got {folders['dense']} and "
                f"{folders[entry.weights]} with different ones"
            )
    return loaded
