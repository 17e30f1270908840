"""Tiled Monarch attention of one iteration, fused: what a pair of tiles needs stays in VMEM.

For each pair of a query tile a and a key tile f, each of m blocks of b tokens:

    x[k,j,i]  = scale * q[a,k,j] . K[f,k,i] ;  R = softmax_i x ;  lseR[k,j] = logsumexp_i x
    aL[k,j]   = scale * sum_i R[k,j,i] K[f,k,i] ;  Y[k,j] = sum_i R[k,j,i] V[f,k,i]
    F[l,j,(f,k)] = q[a,l,j] . aL[k,j] - cL[k,j] ,  cL[k,j] = q[a,k,j] . aL[k,j] - lseR[k,j]

and over all pairs of one query tile, with one softmax over every (f, k):

    out[a,l,j] = sum_(f,k) softmax_(f,k)(F) Y[a,f,k,j] ;  lse[a,l,j] = logsumexp_(f,k) F

`aL` and `Y` have as many rows as there are pairs of tokens in the same position and block: tiles
times more than K has. They are never written to HBM.
"""
