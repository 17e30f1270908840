"""Makes goldens/wan/samplers_original.npz: trajectories of the schedulers of Wan's repository.

Run with torch and diffusers installed, on a clone of Wan-Video/Wan2.1 or Wan2.2, which share them:
`python tests/goldens/make_wan_original_samplers.py CLONE`.
"""

import importlib.util
import pathlib
import sys

import numpy as np
from make_wan_samplers import run

OUT = pathlib.Path(__file__).parent / "wan" / "samplers_original.npz"


def module(clone, name):
    """One file of the repository alone: the package as a whole wants a GPU."""
    spec = importlib.util.spec_from_file_location(name, clone / f"wan/utils/{name}.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def trajectories(clone, noise):
    """`(times, samples)` of each case by its name in the test, set up as its pipelines do."""

    def unipc(steps, shift):
        scheduler = module(clone, "fm_solvers_unipc").FlowUniPCMultistepScheduler(shift=1)
        scheduler.set_timesteps(steps, shift=shift)
        return run(scheduler, noise)

    def dpm(steps, shift):
        solvers = module(clone, "fm_solvers")
        scheduler = solvers.FlowDPMSolverMultistepScheduler(shift=1)
        scheduler.set_timesteps(sigmas=solvers.get_sampling_sigmas(steps, shift))
        return run(scheduler, noise)

    return {
        "unipc_50_5": unipc(50, 5.0),
        "unipc_20_16": unipc(20, 16.0),
        "unipc_7_3": unipc(7, 3.0),
        "dpm_50_5": dpm(50, 5.0),
        "dpm_20_16": dpm(20, 16.0),
        "dpm_7_3": dpm(7, 3.0),
    }


def main():
    """Writes the file."""
    noise = np.random.default_rng(7).normal(size=(2, 3, 5, 4)).astype(np.float32)
    arrays = {"noise": noise}
    for name, (times, samples) in trajectories(pathlib.Path(sys.argv[1]), noise).items():
        arrays |= {f"{name}_times": times, name: samples}
    np.savez_compressed(OUT, **arrays)


if __name__ == "__main__":
    main()
