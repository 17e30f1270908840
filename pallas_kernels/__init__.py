"""The speed: one folder a kernel, each beside its float32 oracle.

`attend`   softmax attention of groups of rows that also returns its log-sum-exp: dense rows
           and the R step of Monarch attention (mean queries on their own key block).
`l_step`   the L step of Monarch attention: rows against the linearised blocks.

Kernels know arrays and block sizes only: no grids, no methods, no public names.
"""
