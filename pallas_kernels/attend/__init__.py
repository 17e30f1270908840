"""Softmax attention of groups of rows, with its log-sum-exp.

    x[g,n,s]   = scale * q[g,n] . k[g,s] + bias[g,s]        (masked keys left out)
    lse[g,n]   = logsumexp_s x
    out[g,n]   = gain * sum_s exp(x - lse) values[g,s]      (for each of `values` and `gains`)

The R step of Monarch attention is this with a group a key block, the mean queries as rows and
`[K, V]` as values
with gains `[scale, 1]`; dense rows are this with a group a head.
"""
