"""Timing side by side, and where it was done."""

import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jaxlib


def alternate(
    calls: Mapping[str, Callable[[], Any]], rounds: int, warm_up: int = 1
) -> dict[str, list[float]]:
    """Seconds of every call in every round.

    The calls take turns, A B C, C B A, A B C and so on: what slows the machine down for a while
    slows its neighbours too, so ratios within a round can be trusted where seconds cannot.
    """
    for call in calls.values():
        for _ in range(warm_up):
            jax.block_until_ready(call())
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds):
        order = list(calls) if turn % 2 == 0 else list(reversed(calls))
        for name in order:
            start = time.perf_counter()
            jax.block_until_ready(calls[name]())
            seconds[name].append(time.perf_counter() - start)
    return seconds


def pair_ratio(slow: list[float], fast: list[float]) -> float:
    """The median over rounds of how many times faster `fast` is."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def place() -> str:
    """Device, versions, threads and load, as lines of Markdown."""
    device = jax.devices()[0]
    lines = [
        f"- device: {device.device_kind} ({_processor()})",
        (
            f"- versions: JAX {jax.__version__}, jaxlib {jaxlib.__version__}, "
            f"Python {platform.python_version()}, {platform.system()}"
        ),
        f"- threads: {_usable_cores()} usable cores; load average {_load()} at the start",
    ]
    commit = _commit()
    if commit:
        lines.append(f"- commit: {commit}")
    return "\n".join(lines)


def _processor() -> str:
    try:
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        names = []
    name = names[0].strip() if names else platform.processor() or platform.machine()
    return f"{os.cpu_count()}-core {platform.machine()} CPU, {name}"


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _load() -> str:
    return " / ".join(f"{x:.1f}" for x in os.getloadavg()) if hasattr(os, "getloadavg") else "n/a"


def _commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip() if done.returncode == 0 else ""
