"""What XLA runs around the kernels: the operations of a compiled program and the bytes they move.

Bytes are what an array takes with its tiles padded, wherever the compiler put it: at a model's
sizes all of it is in HBM. Staging copies between HBM and VMEM are left out.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

WIDTHS = {"pred": 1, "s4": 0.5, "u4": 0.5}
# Operations that move nothing, or whose work is counted in what they call.
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota",
    "copy-done", "async-done", "partition-id", "opt-barrier", "slice-done", "add-dependency",
}  # fmt: skip
SLICES = {"slice", "dynamic-slice"}
ASYNC = {"async-start", "async-update"}


@dataclasses.dataclass(frozen=True)
class Operation:
    """One operation of a compiled program.

    Args:
        name: of the instruction.
        kind: its opcode; a kernel's is "kernel".
        bytes: read and written at each run.
        runs: how often it runs, by the loops around it.
        source: where it comes from, as JAX named it.
        shape: of what it writes.
        flops: of a kernel's own cost estimate.
        moved: bytes, of the same.
    """

    name: str
    kind: str
    bytes: int
    runs: int
    source: str
    shape: str
    flops: int = 0
    moved: int = 0


@dataclasses.dataclass(frozen=True)
class _Line:
    name: str
    type: str
    kind: str
    operands: tuple[str, ...]
    text: str
    root: bool


def operations(text: str) -> list[Operation]:
    """All that runs, kernels included, in the text of a compiled program."""
    computations = _computations(text)
    entry = re.search(r"^ENTRY %?([\w.\-]+)", text, re.M)
    return list(_run(entry[1], computations, 1)) if entry else []


def around(text: str) -> list[Operation]:
    """The operations that are no kernels and move something, the largest first."""
    found = [op for op in operations(text) if op.kind != "kernel" and op.bytes]
    return sorted(found, key=lambda op: -op.bytes * op.runs)


def size(type_: str) -> int:
    """Bytes of an array type, or of a tuple of them, as printed in HLO, tiles padded."""
    total = 0.0
    for match in re.finditer(r"\b([a-z]+\d*[a-z\d]*)\[([\d,]*)\](?:\{([^}]*)\})?", type_):
        digits = re.search(r"\d+", match[1])
        width = WIDTHS.get(match[1]) or (int(digits[0]) / 8 if digits else 0)
        dims = [int(n) for n in match[2].split(",") if n]
        order, _, tiling = (match[3] or "").partition(":")
        minor = [int(n) for n in order.split(",") if n] or list(range(len(dims)))[::-1]
        tile = re.search(r"T\(([\d,]+)\)", tiling)
        steps = [int(n) for n in tile[1].split(",")] if tile else []
        # A scalar's tile is no memory worth the name.
        for step, axis in zip(reversed(steps), minor, strict=False):
            dims[axis] = -(-dims[axis] // step) * step
        total += width * math.prod(dims)
    return round(total)


def _run(name: str, computations: dict[str, dict[str, _Line]], runs: int) -> Iterator[Operation]:
    lines = computations.get(name, {})
    for line in lines.values():
        if line.kind == "while":
            body = re.search(r"body=%?([\w.\-]+)", line.text)
            if body:
                yield from _run(body[1], computations, runs * _trips(line, computations))
        elif line.kind in ("call", "conditional"):
            for called in re.findall(r"(?:to_apply|_computation)=%?([\w.\-]+)", line.text):
                yield from _run(called, computations, runs)
        elif line.kind not in FREE:
            kernel = line.kind == "custom-call" and "tpu_custom_call" in line.text
            source = re.search(r'op_name="([^"]*)"', line.text)
            kind = "kernel" if kernel else line.kind
            called = re.search(r"calls=%?([\w.\-]+)", line.text)
            inside = computations.get(called[1], {}) if called else {}
            if any(x.kind == "custom-call" for x in inside.values()):
                kind = "custom-call"  # a kernel that reads or writes a slice of an array
            moved = _moved(line, lines, computations)
            shape = re.sub(r"\{[^}]*\}", "", line.type)
            told = [
                re.search(rf'"{key}":"(\d+)"', line.text) for key in ("flops", "bytes_accessed")
            ]
            estimate = [int(n[1]) if kernel and n else 0 for n in told]
            name = source[1] if source else ""
            yield Operation(line.name, kind, moved, runs, name, shape, *estimate)


def _trips(loop: _Line, computations: dict[str, dict[str, _Line]]) -> int:
    """How often a loop turns: as the compiler says, or up to the number that it counts to."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.text)
    if known:
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop.text)
    lines = computations.get(condition[1], {}) if condition else {}
    root = next((x for x in lines.values() if x.root), None)
    if root is None or root.kind != "compare" or "direction=LT" not in root.text:
        return 1
    counts = [re.match(r".* constant\((\d+)\)", lines[name].text) for name in root.operands[1:]]
    return int(counts[0][1]) if counts and counts[0] else 1


def _moved(line: _Line, lines: dict[str, _Line], computations: dict) -> int:
    """Bytes that one run reads and writes; of a large array, only the part that is touched."""
    operands = [lines[name] for name in line.operands if name in lines]
    if line.kind == "copy-start" or line.kind == "slice-start":
        return 0  # staged in VMEM for whoever uses it next, which is counted
    if line.kind == "copy" and _without_space(line.type) == _without_space(operands[0].type):
        return 0
    if line.kind in ASYNC:
        # A copy by a SparseCore; its type starts with what it reads and what it writes.
        ends = re.findall(r"[a-z]+\d+\[[\d,]+\](?:\{[^}]*\})?", line.type)[:2]
        return sum(map(size, ends)) if line.name.startswith("sparse-core") and operands else 0
    if line.kind in SLICES:
        return 2 * size(line.type)
    if line.kind == "dynamic-update-slice":
        return 2 * size(operands[1].type)
    inner = re.search(r"calls=%?([\w.\-]+)", line.text)
    if line.kind != "fusion" or not inner or inner[1] not in computations:
        return size(line.type) + sum(size(x.type) for x in operands)
    body = computations[inner[1]]
    total = 0
    for number, operand in enumerate(operands):
        parameter = next(
            (
                x
                for x in body.values()
                if x.kind == "parameter" and f"parameter({number})" in x.text
            ),
            None,
        )
        if parameter is None:
            continue
        name = parameter.name
        users = [x for x in body.values() if name in x.operands]
        if len(users) == 1 and users[0].kind == "bitcast":
            name = users[0].name
            users = [x for x in body.values() if name in x.operands]
        if users and all(x.kind in SLICES for x in users):
            total += sum(size(x.type) for x in users)
        elif not (
            users
            and all(x.kind == "dynamic-update-slice" for x in users)
            and all(x.operands[0] == name for x in users)
        ):
            total += size(operand.type)
    root = next(x for x in body.values() if x.root)
    if root.kind == "dynamic-update-slice" and root.operands[1] in body:
        return total + size(body[root.operands[1]].type)
    return total + size(line.type)


def _without_space(type_: str) -> str:
    return re.sub(r"S\(\d+\)", "", type_)


def _computations(text: str) -> dict[str, dict[str, _Line]]:
    """By name, the lines of each computation by their own names."""
    found: dict[str, dict[str, _Line]] = {}
    current: dict[str, _Line] = {}
    for row in text.splitlines():
        head = re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$", row)
        if head and " = " not in row.split("(")[0]:
            current = found.setdefault(head[1], {})
            continue
        match = re.match(r"\s+(ROOT )?%?([\w.\-]+) = (.*)", row)
        if not match:
            continue
        rest = match[3]
        stop = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
        call = re.match(r"\s*([\w\-]+)\(", rest[stop:])
        if not call:
            continue
        start = stop + call.end() - 1
        inside = rest[start : _closing(rest, start) + 1]
        current[match[2]] = _Line(
            match[2],
            rest[:stop],
            call[1],
            tuple(re.findall(r"%([\w.\-]+)", inside)),
            rest,
            bool(match[1]),
        )
    return found


def _closing(text: str, start: int) -> int:
    """Where the bracket that opens at `start` closes."""
    depth = 0
    for place in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place
    return len(text) - 1
