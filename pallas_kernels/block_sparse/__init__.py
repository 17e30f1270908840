"""Softmax attention on chosen pairs of blocks, and the mass of every pair.

    x[n,s]    = scale q[n] . k[s]                     (keys at `length` and after left out)
    lse[n]    = logsumexp of x[n,s] over the s in key blocks indices[p, :counts[p]]
    out[n]    = sum over the same s of exp(x - lse) v[s]
    mass[p,c] = sum over n in query block p, s in key block c of exp(x[n,s] - lse[n])

with n in query block p. Blocks have `block` tokens; queries and keys come padded to whole blocks.
"""
