"""A short training run that kills itself in the middle.

Usage: training_run.py FOLDER STEP; SIGKILL comes right after that step's row of metrics.
"""

import os
import pathlib
import signal
import sys

from vmonarch_jax.models import VideoDiTConfig
from vmonarch_jax.models.metrics import MetricsCSV
from vmonarch_jax.models.step import TrainConfig
from vmonarch_jax.models.train import train

import vmonarch_jax as vm

MODEL = VideoDiTConfig(frames=2, height=8, width=8, patch=(1, 4, 4), dim=24, depth=1, heads=2)
CONFIG = TrainConfig(steps=6, batch_size=2, warmup_steps=2, save_every=2)


def main(folder: str, kill_after: int) -> None:
    write = MetricsCSV.write

    def deadly(self, step, values):
        write(self, step, values)
        if step == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)

    MetricsCSV.write = deadly
    train(pathlib.Path(folder), MODEL, CONFIG, attention=vm.Dense(), progress=False)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
