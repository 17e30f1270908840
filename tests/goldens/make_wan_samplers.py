"""Makes goldens/wan/samplers.npz: trajectories of the schedulers of Diffusers.

Run with torch and diffusers installed: `python tests/goldens/make_wan_samplers.py`.
"""

import pathlib

import numpy as np
import torch
from diffusers.schedulers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

OUT = pathlib.Path(__file__).parent / "wan" / "samplers.npz"


def field(x, time):
    """A nonlinear velocity that mixes entries; the same formula as in the test."""
    angle = torch.tensor(float(time) / 300)
    return torch.sin(3 * x) + 0.5 * torch.roll(x, 1, -1) * torch.cos(angle) + x


def trajectory(scheduler, noise, **times):
    """Times and the sample after each step, of a scheduler whose times are not set yet."""
    scheduler.set_timesteps(**times)
    return run(scheduler, noise)


def run(scheduler, noise):
    """Times and the sample after each step."""
    x, seen = torch.from_numpy(noise), []
    for time in scheduler.timesteps:
        x = scheduler.step(field(x, time), time, x, return_dict=False)[0]
        seen.append(x.numpy())
    return scheduler.timesteps.numpy().astype(np.float32), np.stack(seen)


def unipc(shift, order=2):
    """The scheduler that Wan is published with."""
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=shift,
        solver_order=order,
    )


def dpm(shift, order=2):
    """Its DPM-Solver++ for models of flow matching."""
    return DPMSolverMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=shift,
        solver_order=order,
    )


def trajectories(noise):
    """`(times, samples)` of each case by its name in the test."""
    # Wan's own scheduler takes these levels before the shift
    original = np.linspace(float(np.float32(0.999)), 0.0, 21)[:-1]
    euler = FlowMatchEulerDiscreteScheduler
    return {
        "unipc_20_5": trajectory(unipc(5.0), noise, num_inference_steps=20),
        "unipc_7_3": trajectory(unipc(3.0), noise, num_inference_steps=7),
        "unipc_20_12": trajectory(unipc(12.0), noise, num_inference_steps=20),
        "unipc_20_5_first_order": trajectory(unipc(5.0, 1), noise, num_inference_steps=20),
        "unipc_20_5_original": trajectory(unipc(5.0), noise, sigmas=original),
        "dpm_20_5": trajectory(dpm(5.0), noise, num_inference_steps=20),
        "dpm_7_3": trajectory(dpm(3.0), noise, num_inference_steps=7),
        "dpm_20_5_first_order": trajectory(dpm(5.0, 1), noise, num_inference_steps=20),
        "euler_20_5": trajectory(euler(shift=5.0), noise, num_inference_steps=20),
        "euler_7_3": trajectory(euler(shift=3.0), noise, num_inference_steps=7),
    }


def main():
    """Writes the file."""
    noise = np.random.default_rng(7).normal(size=(2, 3, 5, 4)).astype(np.float32)
    arrays = {"noise": noise}
    for name, (times, samples) in trajectories(noise).items():
        arrays |= {f"{name}_times": times, name: samples}
    OUT.parent.mkdir(exist_ok=True)
    np.savez_compressed(OUT, **arrays)


if __name__ == "__main__":
    main()
