"""The memory of Wan steps as tables: all that is recorded, and what a user reads."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .cases import between_marks, table

DOCS = Path(__file__).parent.parent / "docs" / "wan.md"
# In the order of the tables.
PARTS = ("1.3B", "14B", "text", "decoder-2.1", "encoder-2.1", "decoder-2.2", "encoder-2.2")
CHIPS = ("v5e", "v6e", "7x")
_BYTES = ("weights", "inputs", "outputs", "temporaries")

PAGE = """# Memory of full-size Wan steps

Made by `python -m benchmarks.wan_memory` with JAX {jax} and libtpu {libtpu}, which compile for a
TPU that is not there. **Nothing here has run on a TPU.** GiB a device; a chip of 7x is two devices.

A step is one call of the transformer: 81 frames of 832x480 (480p: 32,760 tokens) or of 1280x720
(720p: 75,600), weights and products in bfloat16. Guidance in one call has batch 2; in two calls it
has batch 1 and takes the memory of that. Weights are split along fsdp and context and gathered a
layer at a time; what is gathered is among the temporaries. The compiler has 15.75 GiB of a v5e,
31.24 of a v6e and 94.74 of each device of a 7x. "text" is the text encoder (umT5-xxl in bfloat16,
two prompts of 512 tokens), which is freed before the transformer comes. "decoder" and "encoder" are
those of the autoencoders of Wan2.1 and Wan2.2, in float32, a latent frame at a time, for all 81
frames (704p: 121 frames of 1280x704); on 4 chips each holds a quarter of the columns.

One device's transformer steps were compiled whole. Of meshes and autoencoders these are the sizes
of the compiler's buffer assignment, as below: the same where both were read.

{table}

## Tuning

A step of `vmonarch finetune` with its defaults: forward, backward (each layer is computed anew
from what it was given), AdamW and the moving average. "lora": adapters of rank 32 on the
self-attention, beside weights frozen in bfloat16; "full": all weights, in float32, without a moving
average. Weights are those, with the optimizer's state, which the step overwrites; the batch is what
goes through the model at a time, and a step may take several (`--accumulate`). The sizes are those
of the compiler's buffer assignment; the code itself, which changes none of them, was not made.

{tuning}
"""


def total(entry: dict[str, Any]) -> float:
    """Bytes of one device in all."""
    if not entry["fits"]:
        return entry["needs"] * 2**30
    return sum(entry[part] for part in _BYTES)


def write(page: Path, entries: Iterable[dict[str, Any]], versions: dict[str, str]) -> None:
    """Writes the page of all entries, and the tables between the marks of `docs/wan.md`."""
    entries = sorted(entries, key=_place)
    steps = [entry for entry in entries if not entry.get("tuned")]
    tuned = [entry for entry in entries if entry.get("tuned")]
    of_all, of_tuned = (table(_HEAD, [_cells(e) for e in some], left=6) for some in (steps, tuned))
    jax, libtpu = versions.get("jax"), versions.get("libtpu")
    page.write_text(PAGE.format(jax=jax, libtpu=libtpu, table=of_all, tuning=of_tuned))
    text = _between(DOCS.read_text(), "memory", _steps(steps))
    DOCS.write_text(_between(text, "tuning", _tuning(tuned)))


def _place(entry: dict[str, Any]) -> tuple[Any, ...]:
    parts = PARTS.index(entry["part"]), entry["size"], CHIPS.index(entry["chip"])
    return *parts, entry["chips"], entry["batch"], entry["attention"]


def _cells(entry: dict[str, Any]) -> list[str]:
    """A row of the page."""
    named = f"{entry['part']} {entry.get('tuned', '')}".strip()
    cells = named, entry["size"], entry["chip"], str(entry["chips"]), _mesh(entry, "one device")
    sizes = (_gib(entry[part]) if part in entry else "" for part in _BYTES)
    return [*cells, entry["attention"], str(entry["batch"]), *sizes, _in_all(entry)]


def _steps(entries: Sequence[dict[str, Any]]) -> str:
    """Calls of a transformer under VMonarch beside dense attention, and the other parts."""
    dense = {_key(entry): entry for entry in entries if entry["attention"] == "dense"}
    rows = []
    for entry in entries:
        if entry["attention"] not in ("vmonarch", ""):
            continue
        moving = sum(entry[part] for part in ("inputs", "outputs")) if entry["fits"] else None
        name = entry["part"].replace("-", " ").replace("text", "text encoder")
        rows.append([
            name if entry["part"] == "text" else f"{name}, {entry['size']}",
            f"{entry['chips']} {entry['chip']}", _mesh(entry, "-"),
            _guidance(entry) if entry["attention"] else "", _gib(entry["weights"]), _gib(moving),
            _gib(entry["temporaries"]) if entry["fits"] else "", _in_all(entry),
            _in_all(dense[_key(entry)]) if _key(entry) in dense else "",
        ])  # fmt: skip
    head = ["model, video", "chips", "mesh", "guidance", "weights", "activations", "temporaries"]
    return table([*head, "in all", "with dense attention"], rows, left=4)


def _tuning(entries: Sequence[dict[str, Any]]) -> str:
    """Steps of tuning."""
    names = {"vmonarch": "VMonarch", "salad": "SALAD"}
    rows = [
        [
            entry["part"], {"lora": "LoRA", "full": "all weights"}[entry["tuned"]],
            f"{entry['chips']} {entry['chip']}", _mesh(entry, "-"),
            names.get(entry["attention"], entry["attention"]), str(entry["batch"]),
            _gib(entry["weights"]), _gib(entry["temporaries"]) if entry["fits"] else "",
            _in_all(entry),
        ]
        for entry in entries
    ]  # fmt: skip
    head = ["model", "what is tuned", "chips", "mesh", "method", "videos at a time"]
    return table([*head, "weights and optimizer", "temporaries", "in all"], rows, left=5)


def _key(entry: dict[str, Any]) -> tuple[Any, ...]:
    mesh = tuple(map(tuple, entry["mesh"]))
    return tuple(entry[name] for name in ("part", "size", "chip", "chips", "batch")) + mesh


def _mesh(entry: dict[str, Any], alone: str) -> str:
    return ", ".join(f"{axis} {n}" for axis, n in entry["mesh"]) or alone


def _guidance(entry: dict[str, Any]) -> str:
    """How a call is guided whose batch is that of the entry."""
    videos = entry["batch"] // 2
    if not videos:
        return "two calls"
    return "one call" if videos == 1 else f"one call, {videos} videos"


def _gib(size: int | None) -> str:
    return "" if size is None else f"{size / 2**30:.2f}"


def _in_all(entry: dict[str, Any]) -> str:
    return f"{total(entry) / 2**30:.2f}" + ("" if entry["fits"] else " (does not fit)")


def _between(text: str, what: str, new: str) -> str:
    """The text with another table between two marks."""
    start = f"<!-- {what}: made by python -m benchmarks.wan_memory -->"
    end = f"<!-- end of {what} -->"
    return between_marks(text, start, end, new, DOCS.name)


_HEAD = [
    "model", "size", "chip", "chips", "mesh", "attention", "batch", "weights", "inputs", "outputs",
    "temporaries", "in all",
]  # fmt: skip
