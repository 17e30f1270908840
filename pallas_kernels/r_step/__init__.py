"""The R step of Monarch attention: the mean queries of each key block attend to that block.

    x[k,j,i] = scale * qt[k,j] . K[k,i]                     (masked keys left out)
    lse[k,j] = logsumexp_i x ;  R[k,j,:] = softmax_i x
    aL[k,j]  = scale * sum_i R[k,j,i] K[k,i]
    Y[k,j]   = sum_i R[k,j,i] V[k,i]                        (last iteration only)
    cL[k,j]  = sum_i R log R = qt[k,j] . aL[k,j] - lse[k,j]

`k` counts the M key blocks of b keys each, `j` the n positions (n = b, or b for each of several
query tiles side by side). Leading axes (batch, heads) come first: `[..., M, n, d]`.
"""

from .step import RStep

__all__ = ["RStep"]
