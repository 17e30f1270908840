"""The L step of Monarch attention: rows of one query tile against linearised key blocks.

    F[l,j,k]  = q[l,j] . aL[k,j] - cL[k,j]
    L[j,l,:]  = softmax_k F
    middle:   cR[k,j] = sum_l L[j,l,k] ;  qt[k,j] = sum_l L[j,l,k] q[l,j] / max(cR[k,j], floor)
    last:     out[l,j] = sum_k L[j,l,k] Y[k,j] ;  lse[l,j] = logsumexp_k F

`l` counts the m blocks of the query tile, `k` the M key blocks, `j` the b positions of a block.
"""
