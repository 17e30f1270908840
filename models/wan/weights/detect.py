"""Which model a folder holds, in which layout, and where the files of each part are."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Mapping

from ..config import TransformerConfig, WanConfig
from ..presets import MODELS, VAE_2_1, VAE_2_2
from .configs import FIELDS, config_from_json, read_config, read_json, read_original
from .stored import Stored

Path = pathlib.Path

#: Our own note in a folder that `save_weights` or `export_weights` wrote.
NOTE = "vmonarch_wan.json"

# Where each part lies in the Diffusers layout: a folder of the part's name, and this stem.
STEMS = {
    "transformer": "diffusion_pytorch_model",
    "transformer_2": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "image_encoder": "model",
}
# In the original layout: patterns of file names, the wanted ones first.
ORIGINAL_FILES = {
    "vae": ("Wan2.*_VAE.safetensors", "Wan2.*_VAE.pth"),
    "text_encoder": ("models_t5_*.safetensors", "models_t5_*.pth"),
    "image_encoder": ("models_clip_*.safetensors", "models_clip_*.pth"),
}
ORIGINAL_EXPERTS = {"transformer": "high_noise_model", "transformer_2": "low_noise_model"}
_ORIGINAL_TOKENIZER = "google/umt5-xxl"


@dataclasses.dataclass(frozen=True)
class Found:
    """What a folder of weights holds.

    Attributes:
      folder: the folder.
      config: the model; `config.name` is a published name where all sizes are that model's.
      convention: of keys and layout: "diffusers", "original", or "orbax" (our own).
      parts: files of each part that is there ("orbax": its folder): "transformer",
        "transformer_2" (the expert of low noise), "vae", "text_encoder", "image_encoder".
      tokenizer: folder of the tokenizer's files, or `None`.
    """

    folder: Path
    config: WanConfig
    convention: str
    parts: Mapping[str, tuple[Path, ...]]
    tokenizer: Path | None = None

    def require(self, *parts: str) -> None:
        """Raises `ValueError` that names all of these parts (or "tokenizer") that are missing."""
        missing = [
            f"{part} ({_place(self.convention, part)})"
            for part in parts
            if (self.tokenizer is None if part == "tokenizer" else part not in self.parts)
        ]
        if missing:
            raise ValueError(
                f"{self.folder}: expected {', '.join(missing)}; found {_listing(self.folder)}"
            )

    @property
    def required(self) -> tuple[str, ...]:
        """The parts that making a video takes."""
        parts = ["transformer", "vae", "text_encoder", "tokenizer"]
        if self.config.boundary is not None:
            parts.insert(1, "transformer_2")
        if self.config.image is not None:
            parts.append("image_encoder")
        return tuple(parts)


def detect(folder: str | Path) -> Found:
    """Finds out what a folder of weights holds; reads headers and json files only.

    Layouts: Diffusers' (`model_index.json`, a folder a part), the original repositories'
    (`config.json` and shards beside `Wan2.1_VAE.pth` and so on, or `high_noise_model` and
    `low_noise_model`), one transformer alone of either, and what `save_weights` wrote.

    Raises:
      ValueError: there is no Wan transformer, or an index, a json file or a shard is missing or
        damaged; the message says what was expected and what was found.

    Example:
      found = detect("Wan2.1-T2V-1.3B-Diffusers")
      found.require(*found.required)
      model = load_part(found, "transformer")
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: expected a folder of Wan weights, got none")
    if (folder / NOTE).is_file():
        found = _noted(folder)
    elif (folder / "model_index.json").is_file() or (folder / "transformer/config.json").is_file():
        found = _diffusers(folder)
    elif all((folder / name).is_dir() for name in ORIGINAL_EXPERTS.values()):
        found = _original(folder)
    elif (folder / "config.json").is_file():
        alone = read_json(folder / "config.json")
        if "model_type" in alone and "num_heads" in alone and "dim" in alone:
            found = _original(folder)
        else:
            found = _diffusers(folder)
    else:
        raise ValueError(
            f"{folder}: expected Wan weights: model_index.json and a folder transformer "
            "(Diffusers), or config.json beside diffusion_pytorch_model*.safetensors, or "
            "high_noise_model and low_noise_model (original); found " + _listing(folder)
        )
    channels = found.config.vae.latent_channels
    if "vae" in found.parts and channels != found.config.transformer.out_channels:
        raise ValueError(
            f"{folder}: expected a VAE of the transformer's {found.config.transformer.out_channels}"
            f" channels, got one of {channels}"
        )
    return found


def _place(convention: str, part: str) -> str:
    if convention != "original":
        return f"a folder {part}"
    if part == "tokenizer":
        return f"a folder {_ORIGINAL_TOKENIZER}"
    if part in ORIGINAL_EXPERTS:
        return f"a folder {ORIGINAL_EXPERTS[part]}"
    return f"a file {ORIGINAL_FILES[part][-1]}"


def _listing(folder: Path) -> str:
    names = sorted(p.name + "/" * p.is_dir() for p in folder.iterdir())
    if not names:
        return "an empty folder"
    more = f" and {len(names) - 12} more" if len(names) > 12 else ""
    return ", ".join(names[:12]) + more


def find_shards(folder: Path, stem: str) -> tuple[Path, ...]:
    """The weight files of one part: those of its index, one file, or all its numbered shards.

    Raises:
      ValueError: the index is damaged, or files are missing; all of them are named.
    """
    index = folder / f"{stem}.safetensors.index.json"
    if index.is_file():
        where = read_json(index).get("weight_map")
        plain = isinstance(where, dict) and all(
            isinstance(name, str) and Path(name).name == name for name in where.values()
        )
        if not where or not plain:
            raise ValueError(f"{index}: expected weight_map from keys to files beside it, got none")
        names = sorted(set(where.values()))
    elif (folder / f"{stem}.safetensors").is_file():
        names = [f"{stem}.safetensors"]
    else:
        shards = [p.name for p in sorted(folder.glob(f"{stem}-*-of-*.safetensors"))]
        total = re.search(r"-of-(\d+)\.safetensors$", shards[0]) if shards else None
        if total is None:
            raise ValueError(
                f"{folder}: expected {stem}.safetensors, or its shards; found {_listing(folder)}"
            )
        count = int(total[1])
        names = [f"{stem}-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{folder}: expected {len(names)} files of weights, got no {', '.join(missing)}: is "
            "the download complete?"
        )
    return tuple(folder / name for name in names)


def _noted(folder: Path) -> Found:
    note = read_json(folder / NOTE)
    try:
        config = config_from_json(note.get("config", {}))
    except ValueError as error:
        raise ValueError(f"{folder / NOTE}: {error}") from error
    convention = note.get("convention")
    if convention == "orbax":
        parts = {part: (folder / part,) for part in FIELDS if (folder / part).is_dir()}
        tokenizer = folder / "tokenizer"
        found = Found(folder, config, "orbax", parts, tokenizer if tokenizer.is_dir() else None)
        found.require("transformer")
        return found
    if convention == "diffusers":
        return dataclasses.replace(_diffusers(folder), config=config)
    if convention == "original":
        return dataclasses.replace(_original(folder), config=config)
    raise ValueError(
        f"{folder / NOTE}: expected convention of orbax, diffusers or original, got {convention!r}"
    )


def _diffusers(folder: Path) -> Found:
    index_path = folder / "model_index.json"
    index = read_json(index_path) if index_path.is_file() else {}
    scheduler = folder / "scheduler/scheduler_config.json"
    shift = read_json(scheduler).get("flow_shift") if scheduler.is_file() else None
    places = {part: folder / part for part in STEMS if (folder / part / "config.json").is_file()}
    if not places:
        places = {"transformer": folder}  # the transformer's own folder was given
    if "transformer" not in places:
        raise ValueError(
            f"{folder}: expected a transformer in transformer/config.json; found {_listing(folder)}"
        )
    if (index.get("transformer_2") or [None])[0] and "transformer_2" not in places:
        raise ValueError(
            f"{folder}: expected transformer_2/config.json, because model_index.json names two "
            f"experts; found {_listing(folder)}: is the download complete?"
        )
    configs = {part: read_config(part, at / "config.json") for part, at in places.items()}
    transformer: TransformerConfig = configs["transformer"]
    if configs.get("transformer_2", transformer) != transformer:
        raise ValueError(
            f"{folder}: expected two experts of the same sizes, got {transformer} and "
            f"{configs['transformer_2']}"
        )
    # Only the pipeline's file says so; a transformer alone is known by its sizes.
    timed = dataclasses.replace(transformer, per_token_time=True)
    if index.get("expand_timesteps", any(timed == m.transformer for m in MODELS.values())):
        transformer = timed
    known = _nearest(
        folder, transformer, "transformer_2" in places, index.get("boundary_ratio"), shift
    )
    config = dataclasses.replace(
        known,
        vae=configs.get("vae", known.vae),
        text=configs.get("text_encoder", known.text),
        image=configs.get("image_encoder", known.image),
    )
    if config.name in MODELS and config != known:
        config = dataclasses.replace(config, name=folder.resolve().name)
    parts = {part: find_shards(at, STEMS[part]) for part, at in places.items()}
    tokenizer = folder / "tokenizer"
    return Found(folder, config, "diffusers", parts, tokenizer if tokenizer.is_dir() else None)


def _original(folder: Path) -> Found:
    if (folder / "config.json").is_file():
        places = {"transformer": folder}
    else:
        places = {part: folder / name for part, name in ORIGINAL_EXPERTS.items()}
    parts = {part: find_shards(at, STEMS[part]) for part, at in places.items()}
    found = [read_original(at / "config.json", Stored(parts[part])) for part, at in places.items()]
    if any(one != found[0] for one in found):
        raise ValueError(f"{folder}: expected two experts of the same sizes, got {found}")
    _, transformer = found[0]
    config = _nearest(folder, transformer, "transformer_2" in parts, None, None)
    for part, patterns in ORIGINAL_FILES.items():
        files = [path for pattern in patterns for path in sorted(folder.glob(pattern))]
        if files:
            parts[part] = (files[0],)
    if "vae" in parts:
        vae = VAE_2_2 if "2.2" in parts["vae"][0].name else VAE_2_1
        config = dataclasses.replace(config, vae=vae)
    tokenizer = folder / _ORIGINAL_TOKENIZER
    return Found(folder, config, "original", parts, tokenizer if tokenizer.is_dir() else None)


def _nearest(
    folder: Path,
    transformer: TransformerConfig,
    two: bool,
    boundary: float | None,
    shift: float | None,
) -> WanConfig:
    """The published model of these sizes, or these sizes with the settings of one of its kind."""

    def kind(sizes: TransformerConfig, two: bool) -> tuple[bool, ...]:
        image = sizes.in_channels > sizes.out_channels, sizes.image_dim is not None
        return two, sizes.per_token_time, *image, sizes.image_positions is not None

    wanted = kind(transformer, two)
    alike = [m for m in MODELS.values() if kind(m.transformer, m.boundary is not None) == wanted]
    equal = [m for m in alike if m.transformer == transformer]
    if equal:
        # Two published models differ in nothing but the shift, which downloads do not all say
        # right: the folder's name goes first.
        name = folder.resolve().name.upper()
        small = "480P" in name or ("720P" not in name and shift == 3.0)
        chosen = next((m for m in equal if small == m.name.endswith("480P")), equal[0])
        return dataclasses.replace(chosen, boundary=boundary or chosen.boundary)
    chosen = alike[0] if alike else MODELS["wan2.1-t2v-1.3B"]
    return dataclasses.replace(
        chosen,
        name=folder.resolve().name,
        transformer=transformer,
        boundary=(boundary or chosen.boundary) if two else None,
        shift=chosen.shift if shift is None else shift,
    )
