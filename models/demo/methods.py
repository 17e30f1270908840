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
      weights: "dense", "tuned" or "salad".
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


#: What the shipped weights of SALAD were tuned to: blocks of a quarter of a frame, by content.
SALAD = vm.Salad(sparse="top_k", tile=(1, 4, 4), block_size=16, sparsity=0.9)


def entries(steps: int) -> tuple[Entry, ...]:
    """Returns the columns of a comparison over so many sampling steps.

    AdaSpa has its paper's schedule, in shares of the steps: dense for a fifth of them, then a
    search, and another one after three fifths. What is corrected, on every sixth step, is VMonarch
    of one iteration: its error is the larger one, and as steady. Guided VMonarch is exact on one
    frame for each frame instead of in the first one, and remembers nothing.
    """
    first, second = steps // 5, 3 * steps // 5
    adaspa = vm.AdaSpa(block_size=16, warmup_steps=first, search_steps=(first, second))
    corrected = vm.Corrected(vm.VMonarch(steps=1, recompute_frames=0), every=6)
    guided = vm.Guided(vm.VMonarch(recompute_frames=0), exact_blocks=1)
    return (
        Entry("dense", ("Dense", "exact"), "dense", vm.Dense(), "#333333"),
        Entry("vmonarch", ("VMonarch", "training-free"), "dense", vm.VMonarch(), "#0072B2"),
        Entry("vmonarch_tuned", ("VMonarch", "tuned"), "tuned", vm.VMonarch(), "#D55E00"),
        Entry("tiled", ("Tiled Monarch", "training-free"), "dense", vm.TiledMonarch(), "#009E73"),
        Entry("adaspa", ("AdaSpa", "training-free"), "dense", adaspa, "#CC79A7"),
        Entry("salad", ("SALAD", "tuned"), "salad", SALAD, "#E69F00"),
        Entry("guided", ("Guided", "VMonarch"), "dense", guided, "#8B5A2B"),
        Entry("corrected", ("Corrected", "VMonarch"), "dense", corrected, "#56B4E9"),
    )


def shipped(name: str) -> pathlib.Path:
    """Returns the folder of the shipped weights "dense", "vmonarch" or "salad", if they exist."""
    return pathlib.Path(str(importlib.resources.files("vmonarch_jax.models") / "tiny" / name))


def load_entries(
    steps: int,
    dense: pathlib.Path | None,
    tuned: pathlib.Path | None,
    salad: pathlib.Path | None,
) -> list[tuple[Entry, VideoDiT]]:
    """Returns the methods with their models, dense attention first.

    Args:
      steps: of the sampler.
      dense: weights trained under dense attention; the shipped ones if not given.
      tuned: weights tuned to VMonarch; the shipped ones if `dense` is not given either. Weights
        tuned from another model would say nothing, so with `dense` alone the method is left out.
      salad: weights tuned to SALAD, likewise.

    Raises:
      ValueError: a folder holds no model, or the models differ in more than linear branches.
    """
    folders = {"dense": dense or shipped("dense"), "tuned": tuned, "salad": salad}
    for weights, name in (("tuned", "vmonarch"), ("salad", "salad")):
        if dense is None and folders[weights] is None and shipped(name).is_dir():
            folders[weights] = shipped(name)
    loaded = []
    for entry in entries(steps):
        folder = folders[entry.weights]
        if folder is not None:
            loaded.append((entry, load_model(folder, attention=entry.method)))
    config = loaded[0][1].config
    for entry, model in loaded:
        if dataclasses.replace(model.config, linear_layers=config.linear_layers) != config:
            raise ValueError(
                f"expected models of the same configuration, got {folders['dense']} and "
                f"{folders[entry.weights]} with different ones"
            )
    return loaded
