"""Memory of a program as the TPU compiler lays it out, long before its code is there.

A compiler places all buffers within seconds. Turning them into code takes it minutes for a training
step, and changes none of their sizes: so read the sizes, and leave.
"""

import re
import threading
import time
from pathlib import Path
from typing import Any

_ALLOCATION = re.compile(
    r"^allocation \d+: size (?P<size>\d+), (?P<color>color \d+, )?page \d+,(?P<kind>.*)", re.M
)
# Of the files that tell of the buffers, the one that is written last.
_LAST = "*.after_optimizations_after_buffer_assignment.txt"


def place(lowered: Any, dump: Path) -> tuple[dict[str, int], str]:
    """Bytes of one device, and the program, from a compilation that is then left alone.

    The process must end by `os._exit`: the compiler goes on in a thread until then.

    Args:
        lowered: of `jax.jit(function).trace(...)`.
        dump: an empty folder, where `--xla_dump_to` in `XLA_FLAGS` points.

    Returns:
        `parameters` (with those that the results overwrite), `outputs` beside them and
        `temporaries`; and the optimised HLO.

    Raises:
        Exception: what the compiler raises, such as that it needs more memory than there is.
    """
    failed: list[BaseException] = []

    def compile_() -> None:
        try:
            lowered.compile()
        except BaseException as error:  # raised again below
            failed.append(error)

    thread = threading.Thread(target=compile_, daemon=True)
    thread.start()
    while thread.is_alive() and not list(dump.glob(_LAST)):
        time.sleep(1)
    time.sleep(2)  # an error comes as soon as the buffers are placed, and files are written whole
    if failed:
        raise failed[0]
    (buffers,) = dump.glob("*after_optimizations-buffer-assignment.txt")
    (program,) = dump.glob(_LAST)
    return _sizes(buffers.read_text()), program.read_text()


def _sizes(text: str) -> dict[str, int]:
    """Bytes in HBM by what they are for."""
    found = {"parameters": 0, "outputs": 0, "temporaries": 0}
    for allocation in _ALLOCATION.finditer(text):
        kind = allocation["kind"]
        if allocation["color"]:  # another memory of the chip
            continue
        if " parameter " in kind:
            found["parameters"] += int(allocation["size"])
        elif "maybe-live-out" in kind:
            found["outputs"] += int(allocation["size"])
        elif "preallocated-temp" in kind:
            found["temporaries"] += int(allocation["size"])
    return found
