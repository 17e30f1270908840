"""Compiling for a GPU that is not there, and what the compiled program says about its speed.

The CUDA packages of JAX compile without a device. What is known then: that XLA, cuDNN's calls,
Triton and Mosaic GPU accept the program; its optimised HLO and its memory; and, by `ptxas -v`, the
registers, spills and shared memory of each kernel. Nothing is run, so nothing is timed.
Call `Compiler` before anything else touches JAX: it needs `pip install -e .[gpu]`, and no GPU.
"""

import dataclasses
import glob
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

# As XLA prints them on such devices: `stream_executor.GpuTargetConfigProto`.
_TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  threads_per_core_limit: 2048 fpus_per_core: {fpus}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_core: {core_memory} shared_memory_per_block_optin: {block_memory}
  core_count: {cores} memory_bandwidth: {bandwidth} l2_cache_size: {l2} clock_rate_ghz: {clock}
  device_memory_size: {memory} cuda_compute_capability {{ {capability} }}
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} runtime_version {{ major: 13 }}
device_description_str: "{name}"
"""


@dataclasses.dataclass(frozen=True)
class Device:
    """A GPU as the compiler sees it.

    Args:
        name: as its driver spells it.
        topology: as `jax.experimental.topologies` names it.
        arch: as ptxas names it.
        capability: its compute capability.
        config: the text of its `GpuTargetConfigProto`.
    """

    name: str
    topology: str
    arch: str
    capability: str
    config: str


def _device(name: str, topology: str, arch: str, **figures: Any) -> Device:
    major = re.search(r"major: (\d+)", figures["capability"])
    return Device(
        name, topology, arch, f"{major[1] if major else 0}.0", _TARGET.format(name=name, **figures)
    )


DEVICES = {
    "h100": _device(
        "NVIDIA H100 80GB HBM3", "nvidia:h100", "sm_90a",
        fpus=128, core_memory=233_472, block_memory=232_448, cores=132,
        bandwidth=3_352_320_000_000, l2=52_428_800, clock=1.98, memory=84_978_434_048,
        capability="major: 9 feature_extension: ACCELERATED_FEATURES",
    ),
    "a100": _device(
        "NVIDIA A100-SXM4-80GB", "nvidia:a100", "sm_80",
        fpus=64, core_memory=167_936, block_memory=166_912, cores=108,
        bandwidth=2_039_000_000_000, l2=41_943_040, clock=1.41, memory=84_974_239_744,
        capability="major: 8",
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What ptxas says about a kernel.

    Args:
        name: of the kernel.
        registers: of a thread.
        spills: bytes of registers stored to and loaded from memory, of a thread.
        stack: bytes of a thread's stack frame.
        shared: bytes of static shared memory of a block; what is given at the launch is not in it.
        wgmma: warpgroup products in its text.
        notes: what else ptxas said: wgmma that it had to serialise, for one.
    """

    name: str
    registers: int
    spills: int
    stack: int
    shared: int
    wgmma: int
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled program: its optimised HLO, its memory, and its kernels' PTX by file name."""

    hlo: str
    memory: Any
    ptx: dict[str, str]

    def calls(self, target: str = "") -> list[str]:
        """The targets of the custom calls whose name contains `target`, one entry a call."""
        found = re.findall(r'custom_call_target="([^"]*)"', self.hlo)
        return [name for name in found if target in name]


class Compiler:
    """Compiles functions for one GPU of a kind."""

    def __init__(self, device: str = "h100", count: int = 1) -> None:
        """Sets the process up; the first `Compiler` of a process must come before JAX starts.

        Args:
            device: a kind of `DEVICES`.
            count: how many of them one host has, for programs of several; `devices` has them.
        """
        self.device = DEVICES[device]
        self._dump = tempfile.TemporaryDirectory(prefix="ptx-")
        # Autotuning would run candidates on a device.
        flags = f"--xla_dump_to={self._dump.name} --xla_gpu_autotune_level=0"
        os.environ.update(
            JAX_PLATFORMS="cpu",
            JAX_SKIP_CUDA_CONSTRAINTS_CHECK="1",
            MOSAIC_GPU_DUMP_TO=self._dump.name,
            MOSAIC_GPU_DUMP_PTX="1",
            XLA_FLAGS=f"{os.environ.get('XLA_FLAGS', '')} {flags}",
        )
        import jax
        from jax.experimental import topologies
        from jax.sharding import SingleDeviceSharding

        jax.config.update("jax_platforms", "cpu")
        topology = topologies.get_topology_desc(
            platform="cuda", topology_name=self.device.topology, topology=f"1x1x{count}",
            target_config=self.device.config,
        )  # fmt: skip
        self.devices = topology.devices
        self._sharding = SingleDeviceSharding(self.devices[0])

    def __call__(self, function: Any, *arguments: Any, donate: bool = False) -> Compiled:
        """Compile `function` for arguments given as `ShapeDtypeStruct`s (or arrays, or trees).

        They lie on the first device, but for those that say where they lie. With `donate` the
        memory of the first may hold results.
        """
        import jax
        from vmonarch_jax.pallas_kernels.gpu import mode

        shutil.rmtree(self._dump.name)
        os.mkdir(self._dump.name)

        def placed(x: Any) -> Any:
            told = x.sharding if isinstance(x, jax.ShapeDtypeStruct) else None
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=told or self._sharding)

        # A fresh function: JAX would otherwise hand back what it traced for another device.
        def fresh(*arguments: Any) -> Any:
            return function(*arguments)

        with mode.compiling_for(self.device.capability):
            jitted = jax.jit(fresh, donate_argnums=(0,) if donate else ())
            traced = jitted.trace(*jax.tree.map(placed, arguments))
            compiled = traced.lower().compile()
        files = sorted(glob.glob(f"{self._dump.name}/**/*.ptx", recursive=True))
        # A module without kernels of its own leaves an empty file.
        texts = {os.path.basename(path): Path(path).read_text() for path in files}
        ptx = {name: text for name, text in texts.items() if ".version" in text}
        return Compiled(compiled.as_text() or "", compiled.memory_analysis(), ptx)

    def kernels(self, compiled: Compiled) -> list[Kernel]:
        """What ptxas says about each kernel of a compiled program.

        Raises:
            RuntimeError: if ptxas refuses one.
        """
        found: dict[str, Kernel] = {}
        for text in compiled.ptx.values():
            found |= {kernel.name: kernel for kernel in self._assemble(text)}
        return list(found.values())

    def _assemble(self, ptx: str) -> list[Kernel]:
        source = Path(self._dump.name) / "kernel.ptx"
        source.write_text(ptx)
        arch = re.search(r"^\.target (\w+)", ptx, re.M)
        done = subprocess.run(
            [ptxas(), "-v", f"-arch={arch[1] if arch else self.device.arch}", str(source),
             "-o", str(source.with_suffix(".cubin"))],
            capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"ptxas: {done.stderr[-2000:]}")
        return read_ptxas(done.stdout + done.stderr, ptx)


def read_ptxas(said: str, ptx: str) -> list[Kernel]:
    """The kernels in what `ptxas -v` printed about `ptx`."""
    notes = tuple(
        line.strip()
        for line in said.splitlines()
        if "warning" in line.lower() or "Potential" in line
    )
    found = []
    for part in re.split(r"Compiling entry function ", said)[1:]:
        name = part.split("'")[1]

        def number(pattern: str, part: str = part) -> int:
            match = re.search(pattern, part)
            return int(match[1]) if match else 0

        spills = number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads")
        body = ptx[ptx.find(f".entry {name}") :]
        found.append(
            Kernel(
                name,
                number(r"Used (\d+) registers"),
                spills,
                number(r"(\d+) bytes stack frame"),
                number(r"(\d+) bytes smem"),
                body.count("wgmma.mma_async"),
                notes,
            )
        )
    return found


def ptxas() -> str:
    """The assembler that comes with JAX's CUDA packages, else one on the path.

    Raises:
        FileNotFoundError: if there is none.
    """
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for path in glob.glob(f"{folder}/*/bin/ptxas"):
            return path
    found = shutil.which("ptxas")
    if found is None:
        raise FileNotFoundError("no ptxas: install the project with its extra `gpu`")
    return found
