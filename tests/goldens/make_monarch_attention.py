"""Makes `monarch_attention.npz` anew from the published torch code of MonarchAttention.

    git clone https://github.com/cjyaras/monarch-attention
    pip install torch==2.13.0
    python tests/goldens/make_monarch_attention.py monarch-attention

Their code is run where it lies and is no part of this repository. The inputs keep clear of three
habits of that code that are not in the paper:

- a block whose keys are all masked still draws attention there: every block keeps a key;
- a masked token (unlike a padded one) still starts as a mean query: its query is set to zero;
- rows whose logits are all very negative underflow: the logits are of order one.

Written from commit 137c73c30857fa3ce686b09c99bacf23e36d00d9.
"""

import argparse
import importlib.util
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent

# n tokens, block size, steps, padding, share of masked keys, key dim, value dim
CASES = [
    (n, block, steps, pad, masked, 8, dv)
    for n, block, dv in [(24, 6, 8), (23, 5, 12), (17, 4, 8)]
    for steps in (1, 2, 3)
    for pad in ("post", "pre")
    for masked in (0.0, 0.3)
    if not (n % block == 0 and pad == "pre")
] + [(13, 13, 2, "post", 0.0, 4, 4), (13, 1, 2, "post", 0.0, 4, 4), (11, 20, 2, "pre", 0.2, 4, 4)]


def make_inputs(rng, n, dim, value_dim, batch=2, heads=2):
    shapes = {"query": dim, "key": dim, "value": value_dim}
    return {
        name: rng.normal(size=(batch, n, heads, d)).astype(np.float32) for name, d in shapes.items()
    }


def make_mask(rng, n, block, pad, masked, batch=2):
    mask = rng.random((batch, n)) >= masked
    shift = -n % block if pad == "pre" else 0
    for first in range(-shift, n, block):  # every block keeps a key
        mask[:, max(first, 0)] = True
    return mask


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path, help="your checkout of cjyaras/monarch-attention")
    parser.add_argument("--output", type=Path, default=HERE / "monarch_attention.npz")
    args = parser.parse_args()

    import torch

    source = args.checkout / "ma" / "ma_torch.py"
    if not source.is_file():
        parser.error(f"no ma/ma_torch.py in {args.checkout}")
    spec = importlib.util.spec_from_file_location("ma_torch", source)
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)

    def run(query, key, value, mask, steps, block, pad, dtype):
        q, k, v = (
            torch.from_numpy(a).to(dtype).permute(0, 2, 1, 3).contiguous()
            for a in (query, key, value)
        )
        out = theirs.monarch_attention_torch(
            q, k, v, torch.from_numpy(mask), steps, block, pad == "pre"
        )
        return out.permute(0, 2, 1, 3).contiguous().numpy()

    rng = np.random.default_rng(20250523)
    arrays, rows = {}, []
    for index, (n, block, steps, pad, masked, dim, value_dim) in enumerate(CASES):
        if f"query.{n}" not in arrays:  # the inputs are shared by all cases of one length
            inputs = make_inputs(rng, n, dim, value_dim)
            arrays |= {f"{name}.{n}": a for name, a in inputs.items()}
        query, key, value = (arrays[f"{name}.{n}"] for name in ("query", "key", "value"))
        mask = make_mask(rng, n, block, pad, masked)
        query = np.where(mask[:, :, None, None], query, np.float32(0))
        out = run(query, key, value, mask, steps, block, pad, torch.float32)
        wide = run(query, key, value, mask, steps, block, pad, torch.float64)
        assert np.abs(out - wide).max() < 1e-5, "their own float32 is off here; pick other inputs"
        arrays |= {f"mask.{index}": mask, f"out.{index}": out}
        rows.append((n, block, steps, pad == "pre"))
    np.savez_compressed(args.output, cases=np.array(rows), **arrays)
    print(f"{args.output}: {len(CASES)} cases, {args.output.stat().st_size / 1024:.0f} KB")


if __name__ == "__main__":
    main()
