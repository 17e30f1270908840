"""Dense attention by other kernels, by static schedule: what speedups are measured against.

    python -m benchmarks.splash --chip v6e             # the recorded blocks, compiled again
    python -m benchmarks.splash --chip v6e --search    # all blocks; records the best few

JAX's splash attention and, where tokamax is installed, tokamax's: full mask, bfloat16, one head of
128. Both want lengths that are multiples of their blocks; padded keys are counted as work, but the
mask that would hide them is not, in their favour. Parts of a kernel that run once a row of blocks
(clearing and writing the accumulators) are counted once a row, by the jumps in the schedule; inner
loops are unrolled in both. Layouts of q, k and v other than the usual are not searched.
"""

import argparse
import dataclasses
import importlib.util
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vmonarch_jax.pallas_kernels.tpu.chips import Chip

from .aot import Compiled, Compiler, Schedule

RECORD = Path(__file__).with_name("splash.json")
HEAD_DIM = 128
KEPT = 3  # of the best blocks found, how many are recorded
# By kind, the kernels of it: name of the library, then the pass.
KINDS = ("splash forward", "splash fused", "splash unfused", "tokamax forward", "tokamax fused")
LENGTH = 8192  # that the search compiles for: schedules of a step do not depend on it


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Rows of queries, keys in VMEM, and keys that one product takes."""

    q: int
    kv: int
    compute: int


@dataclasses.dataclass(frozen=True)
class Count:
    """Cycles of a kernel: of each grid step, and those that a row of blocks adds."""

    step: int
    row: int
    matmul: float
    spills: int

    def cycles(self, rows: int, steps: int) -> int:
        """Of a grid of `rows` rows of `steps` steps."""
        return rows * (steps * self.step + self.row)


def installed(kind: str) -> bool:
    """Whether the library of a kind is here."""
    return not kind.startswith("tokamax") or importlib.util.find_spec("tokamax") is not None


def kernel(
    kind: str, length: int, forward: Blocks, backward: Blocks | None = None, heads: int = 1
) -> Callable:
    """Attention of `[heads, length, d]` arrays, `length` a multiple of every block."""
    shape = (length, length)
    sizes = {"block_q": forward.q, "block_kv": forward.kv, "block_kv_compute": forward.compute}
    if backward is not None:
        sizes |= {"block_q_dkv": backward.q, "block_kv_dkv": backward.kv}
        sizes["block_kv_dkv_compute"] = backward.compute
    if kind.startswith("tokamax"):
        from tokamax._src.ops.experimental.tpu.splash_attention import (
            splash_attention_kernel as tokamax_kernel,
        )
        from tokamax._src.ops.experimental.tpu.splash_attention import (
            splash_attention_mask as tokamax_mask,
        )

        config = tokamax_kernel.SplashConfig(**sizes, use_experimental_scheduler=True)
        return tokamax_kernel.make_splash_mha_single_device(
            tokamax_mask.FullMask(shape), config=config
        )
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel,
        splash_attention_mask,
    )

    fused = kind == "splash fused"
    if kind == "splash unfused":
        assert backward is not None
        sizes |= {"block_q_dq": backward.q, "block_kv_dq": backward.kv}
    return splash_attention_kernel.make_splash_mha_single_device(
        splash_attention_mask.MultiHeadMask([splash_attention_mask.FullMask(shape)] * heads),
        block_sizes=splash_attention_kernel.BlockSizes(**sizes, use_fused_bwd_kernel=fused),
    )


def compiled(
    compiler: Compiler, kind: str, length: int, forward: Blocks, backward: Blocks | None = None
) -> Compiled:
    """One head of it; with `backward`, the gradients of q, k and v."""
    import jax
    import jax.numpy as jnp

    x = jax.ShapeDtypeStruct((1, length, HEAD_DIM), jnp.bfloat16)
    with as_if_on(compiler.devices[0]):
        call = kernel(kind, length, forward, backward)
        if backward is None:
            return compiler(call, x, x, x)

        def gradients(q, k, v, out_bar):
            return jax.vjp(call, q, k, v)[1](out_bar)

        return compiler(gradients, x, x, x, x)


def count(schedule: Schedule) -> Count:
    """Tells apart what every grid step runs from what the first and the last of a row do.

    A branch that is most of the kernel is the work of a step, run every time. Of two such (one
    with a mask and one without) the smaller runs here. All other branches run once a row.
    """
    work = [part for part in schedule.branches if part > schedule.cycles / 4]
    other = [part for part in schedule.branches if part not in work]
    step = schedule.cycles - sum(schedule.branches) + min(work, default=0)
    return Count(step, sum(other), schedule.busy("matmul"), schedule.used["spill"])


def kernels(result: Compiled) -> list[Schedule]:
    """The attention kernels of a compiled program, in the order of its calls."""
    found = [s for s in result.kernels if "splash" in s.name or "attention" in s.name]
    return [s for s in found if s.cycles > 100]


def as_if_on(device: Any) -> Any:
    """Kernels traced inside believe to be on this device (tokamax asks which chip it is)."""
    import jax
    from jax._src import mesh

    facts = {"device_kind": device.device_kind, "num_cores": device.num_cores, "platform": "tpu"}
    fields = {field.name for field in dataclasses.fields(mesh.AbstractDevice)}
    on = mesh.AbstractDevice(**{name: fact for name, fact in facts.items() if name in fields})
    return jax.sharding.use_abstract_mesh(
        jax.sharding.AbstractMesh((1,), ("x",), abstract_device=on)
    )


def candidates(kind: str) -> Iterator[Blocks]:
    """Blocks worth a try: smaller ones were slower, larger ones do not fit in VMEM.

    For the backward pass a first look at twice as many found differences of 2%.
    """
    if not kind.endswith("forward"):
        yield from (Blocks(1024, 2048, 1024), Blocks(2048, 1024, 1024))
        return
    for q in (512, 1024, 2048):
        for kv in (1024, 2048, 4096):
            for compute in (512, 1024):
                if 2**21 <= q * kv <= 2**23:
                    yield Blocks(q, kv, compute)


def search(compiler: Compiler, kind: str, tried: list[dict]) -> Iterator[dict]:
    """Yields what each blocks not yet tried cost, as entries of the record."""
    forward = kind.endswith("forward")
    for blocks in candidates(kind):
        name = dataclasses.asdict(blocks)
        if any(
            entry["blocks"] == name and ("counts" in entry or "failed" in entry) for entry in tried
        ):
            continue
        small = Blocks(512, 512, 512)
        try:
            if forward:
                result = compiled(compiler, kind, LENGTH, blocks)
            else:
                result = compiled(compiler, kind, LENGTH, small, blocks)
        except Exception as error:  # out of VMEM, or refused by the kernel: not a candidate
            yield {"blocks": name, "failed": str(error)[:80]}
            continue
        counts = [count(schedule) for schedule in kernels(result)[0 if forward else 1 :]]
        entry = {"blocks": name, "counts": [dataclasses.asdict(c) for c in counts]}
        yield entry | {"pairs": round(cost(kind, entry, 2**15).cycles / 2**10)}


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one head: cycles, bytes, and the larger of the two in cycles."""

    cycles: int
    moved: int
    bound: float


def cost(kind: str, entry: dict, tokens: int, chip: Chip | None = None) -> Cost:
    """Of one pass of a recorded kind over `tokens` tokens, padded to its blocks.

    Forward: q and the output once, k and v once a row of blocks, and for a later backward pass the
    log-sum-exp in 128 copies. Fused backward: k, v and their gradients once; q and the output's
    gradient once a row; a share of q's gradient from every row, which XLA adds up afterwards.
    Unfused backward: the same without the shares, and as much again for q's gradient.
    """
    blocks = Blocks(**entry["blocks"])
    queries, keys = (-(-tokens // size) for size in (blocks.q, blocks.kv))
    q, kv = (n * size * HEAD_DIM * 2 for n, size in ((queries, blocks.q), (keys, blocks.kv)))
    by_query, by_key = 2 * q + queries * 2 * kv, 4 * kv + keys * 2 * q
    grids, moved, sums = {
        "forward": ([(queries, keys)], [by_query], 0),
        "fused": ([(keys, queries)], [by_key + keys * q], (keys + 1) * q + 2 * q),
        "unfused": ([(keys, queries), (queries, keys)], [by_key, by_query + q], 2 * q),
    }[kind.split()[1]]
    cycles = [
        Count(**c).cycles(*grid) for c, grid in zip(entry["counts"], grids, strict=True)
    ]  # fmt: skip
    rate = chip.bytes_per_cycle if chip else math.inf
    bound = sum(max(c, m / rate) for c, m in zip(cycles, moved, strict=True)) + sums / rate
    return Cost(sum(cycles), sum(moved) + sums, bound)


def best(chip: Chip, kind: str, tokens: int) -> tuple[dict, Cost] | None:
    """The recorded blocks that are fastest for so many tokens; `None` where none are recorded."""
    tried = [e for e in record().get(chip.name, {}).get(kind, []) if "counts" in e]
    costs = [(entry, cost(kind, entry, tokens, chip)) for entry in tried]
    return min(costs, key=lambda pair: pair[1].bound, default=None)


def record() -> dict[str, dict[str, list[dict]]]:
    """By chip and kind: the blocks tried, best first, with cycles for 2**20 pairs at 32,768."""
    return json.loads(RECORD.read_text()) if RECORD.exists() else {}


def main(arguments: list[str] | None = None) -> None:
    flags = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    flags.add_argument("--chip", required=True)
    flags.add_argument("--search", action="store_true", help="try all blocks, and record them")
    flags.add_argument("--kinds", nargs="*", default=KINDS, choices=KINDS)
    args = flags.parse_args(arguments)
    compiler = Compiler(args.chip)
    for kind in args.kinds:
        if not installed(kind):
            print(f"{kind}: skipped, tokamax is not installed")
            continue
        tried = record().get(args.chip, {}).get(kind, [])
        for entry in search(compiler, kind, tried) if args.search else ():
            print(args.chip, kind, entry, flush=True)
            tried.append(entry)
            tried.sort(key=lambda e: e.get("pairs", math.inf))
            known = record()
            known.setdefault(args.chip, {})[kind] = tried
            RECORD.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
        for entry in tried[:KEPT]:
            print(args.chip, kind, entry)


if __name__ == "__main__":
    main()
