"""What the speed and memory benchmarks compare, and the flags that they share."""

import argparse
import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax

import vmonarch_jax as vm

LIBRARY, DENSE = "`jax.nn.dot_product_attention`", "dense, ours"


@dataclasses.dataclass(frozen=True)
class Case:
    """A name, the method value that its FLOPs are counted by, and the function that runs."""

    name: str
    method: Any
    function: Callable[..., Any]


def cases(grid: vm.VideoGrid) -> list[Case]:
    """The library's attention, ours, and Monarch attention at several blocks on `grid`."""
    methods = {
        DENSE: vm.Dense(),
        "VMonarch": vm.VMonarch(),
        "VMonarch, no exact frame": vm.VMonarch(recompute_frames=0),
        "rows (1, 1, W)": vm.VMonarch(block=(1, 1, grid.width), recompute_frames=0),
        "tubes (T, 1, 1)": vm.VMonarch(block=(grid.frames, 1, 1), recompute_frames=0),
        "tiled Monarch": vm.TiledMonarch(),
    }

    def run(method: Any) -> Callable[..., Any]:
        return lambda q, k, v: method(q, k, v, grid=grid)

    library = Case(LIBRARY, vm.Dense(), jax.nn.dot_product_attention)
    return [library, *(Case(name, method, run(method)) for name, method in methods.items())]


def all_gradients(function: Callable[..., Any]) -> Callable[..., Any]:
    """The gradients of query, key and value for a given gradient of the output."""

    def gradients(query, key, value, out_bar):
        return jax.vjp(function, query, key, value)[1](out_bar)

    return gradients


def shape3(text: str) -> vm.VideoGrid:
    """Reads `21x15x26`; argparse turns the error into its message."""
    try:
        return vm.VideoGrid(*(int(part) for part in text.lower().split("x")))
    except (ValueError, TypeError) as error:
        raise argparse.ArgumentTypeError(
            f"expected FRAMESxHEIGHTxWIDTH such as 21x15x26, got {text!r}"
        ) from error


def parser(description: str | None, grid: str) -> argparse.ArgumentParser:
    """The shared flags: grid, heads, head dimension, dtype, `--quick`."""
    flags = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    flags.add_argument("--grid", type=shape3, default=shape3(grid), metavar="TxHxW")
    flags.add_argument("--heads", type=int, default=2)
    flags.add_argument("--head-dim", type=int, default=64)
    flags.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    flags.add_argument("--quick", action="store_true", help="a tiny grid: does it run at all?")
    return flags


def table(header: list[str], rows: list[list[str]], left: int = 1) -> str:
    """A Markdown table; all columns but the first few are aligned to the right."""
    width = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: list[str]) -> str:
        padded = [c.ljust(w) for c, w in zip(cells[:left], width[:left], strict=True)]
        padded += [c.rjust(w) for c, w in zip(cells[left:], width[left:], strict=True)]
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * w for w in width[:left]] + ["-" * (w - 1) + ":" for w in width[left:]]
    return "\n".join([line(header), line(rule), *(line(row) for row in rows)])


def between_marks(text: str, start: str, end: str, new: str, where: str) -> str:
    """The text with something else between two marks, which stay; `where` it is, for the message.

    Raises:
        ValueError: if the marks are not there.
    """
    pattern = re.compile(f"{re.escape(start)}.*?{re.escape(end)}", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"expected {start} and {end} in {where}, got neither")
    return pattern.sub(lambda _: f"{start}\n{new}\n{end}", text)
