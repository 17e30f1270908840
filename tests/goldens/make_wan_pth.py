"""Writes tests/goldens/wan/tensors.pth, the files that PyTorch writes in small; takes torch.

python tests/goldens/make_wan_pth.py
"""

import collections
from pathlib import Path

import torch

FILE = Path(__file__).parent / "wan" / "tensors.pth"


def main():
    whole = torch.arange(24, dtype=torch.float32)
    torch.save(
        collections.OrderedDict(
            matrix=whole.reshape(4, 6),
            transposed=whole.reshape(4, 6).T,  # of the same storage
            window=whole[3:21].reshape(3, 6)[:, 1:4],
            half=torch.arange(5).half() / 4,
            bfloat=(torch.arange(6) / 8).bfloat16().reshape(2, 3),
            parameter=torch.nn.Parameter(torch.tensor([1.5, -2.5])),
            scalar=torch.tensor(7.0),
            empty=torch.zeros(0, 3),
            whole=torch.arange(3),
        ),
        FILE,
    )


if __name__ == "__main__":
    main()
