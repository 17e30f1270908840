"""The one table of tolerances, and the one comparison that uses it.

`|actual - expected| <= tolerance * max(1, max |expected|)`. The oracle gets the same rounded
inputs in float64, so a bfloat16 entry covers what is rounded on the way: factors and outputs.
The log-sum-exp is float32 in both.
"""

import numpy as np

TOLERANCES = {
    ("float32", "forward"): 1e-5,
    ("float32", "lse"): 1e-5,
    ("float32", "kl"): 2e-5,
    ("float32", "gradient"): 5e-5,
    ("bfloat16", "forward"): 2e-2,
    ("bfloat16", "lse"): 2e-2,
    ("bfloat16", "kl"): 3e-2,
    ("bfloat16", "gradient"): 4e-2,
}


def assert_close(actual, expected, dtype, kind, message=""):
    """Compares with the oracle; infinities must stand in the same places."""
    actual, expected = (np.asarray(a, dtype=np.float64) for a in (actual, expected))
    assert actual.shape == expected.shape, f"{message}: {actual.shape} != {expected.shape}"
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(actual[~finite], expected[~finite], err_msg=message)
    if not finite.any():
        return
    tolerance = TOLERANCES[np.dtype(dtype).name, kind]
    allowed = tolerance * max(1.0, np.abs(expected[finite]).max())
    # NaN fails too: it is not <= anything.
    worst = np.abs(actual[finite] - expected[finite]).max()
    assert worst <= allowed, f"{message} {kind}: off by {worst:.3g}, allowed {allowed:.3g}"
