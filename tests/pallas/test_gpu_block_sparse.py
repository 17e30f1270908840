"""The GPU kernels of block-sparse attention and block masses, interpreted, against float64 NumPy.

What the interpreter tells and what it does not: see `test_gpu.py`. Nothing is under `jit`: beside
other work of the same program, the interpreter's threads can wait for ever for a thread of XLA's
pool, which those that wait at a barrier hold.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pallas.attention_inputs import arrays
from pallas.test_block_sparse import expected, kept_pairs, lists
from tolerances import assert_close
from vmonarch_jax.pallas_kernels.block_sizes import BlockSizes
from vmonarch_jax.pallas_kernels.block_sparse import gpu, gpu_walk
from vmonarch_jax.pallas_kernels.gpu import mode

import vmonarch_jax as vm

pytestmark = pytest.mark.usefixtures("gpu_interpreted")
SIZES = BlockSizes()


# groups, query blocks, key blocks, kept at most, block, real keys, head dim, value dim, dtype
CASES = [
    pytest.param((1, 3, 5, 4, 64, 310, 64, 64, "float16"), marks=pytest.mark.slow),
    (1, 2, 3, 3, 128, 300, 64, 128, "bfloat16"),
    pytest.param((1, 4, 4, 3, 64, 200, 128, 64, "bfloat16"), marks=pytest.mark.slow),
    pytest.param((1, 4, 12, 12, 64, 768, 64, 64, "bfloat16"), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("size", CASES, ids=str)
def test_forward_and_gradients(size, monkeypatch):
    """Lists of all lengths up to `kept at most`; the second row keeps none.

    With fewer slots than copies, and no more than a walk needs: heads of 128 have room for few.
    """
    monkeypatch.setattr(gpu_walk, "MOST_STAGES", 5)
    groups, rows, blocks, most, block, length, d, e, dtype = size
    n, s = rows * block, blocks * block
    shapes = [(groups, n, d), (groups, s, d), (groups, s, e), (groups, n, e)]
    q, k, v, dout = (x.astype(dtype) for x in arrays(shapes, "float32"))
    (dlse,) = arrays([(groups, n)], "float32", 1)
    indices, counts = lists(groups, rows, blocks, most)

    def call(q, k, v, indices, counts, dout, dlse):
        def part(q, k, v):
            return gpu.block_sparse(
                q, k, v, indices, counts,
                block=block, length=length, scale=0.1, block_sizes=SIZES,
            )  # fmt: skip

        result, pullback = jax.vjp(part, q, k, v)
        return *result, pullback((dout, dlse))

    out, lse, got = call(q, k, v, indices, counts, dout, dlse)
    keep = kept_pairs(indices, counts, block, n, s, length)
    wanted = expected(q, k, v, keep, dout, dlse, 0.1)
    # float16 is held to bfloat16's bounds.
    assert (out.dtype, lse.dtype) == (dtype, jnp.float32)
    assert_close(out, wanted[0], "bfloat16", "forward")
    assert_close(lse, wanted[1], "bfloat16", "lse")
    for x, want in zip(got, wanted[2:], strict=True):
        assert x.dtype == dtype
        assert_close(x, want, "bfloat16", "gradient")


# groups, query blocks, key blocks, block, real keys, head dim, dtype
MASSES = [
    pytest.param((1, 3, 5, 64, 300, 64, "bfloat16"), marks=pytest.mark.slow),
    (1, 1, 70, 64, 4410, 64, "float16"),
    pytest.param((2, 2, 3, 128, 384, 128, "bfloat16"), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("size", MASSES, ids=str)
def test_masses(size):
    groups, p, blocks, block, length, d, dtype = size
    n, s = p * block, blocks * block
    q, k = (x.astype(dtype) for x in arrays([(groups, n, d), (groups, s, d)], "float32"))
    (lse,) = arrays([(groups, n)], "float32", 1)
    lse = (lse + 7).at[:, -5:].set(jnp.inf)

    def call(q, k, lse):
        return gpu.block_mass(q, k, lse, block=block, length=length, scale=0.1, block_sizes=SIZES)

    got = call(q, k, lse)
    x = 0.1 * np.asarray(q, np.float64) @ np.asarray(k, np.float64).swapaxes(1, 2)
    weights = np.exp(x - np.asarray(lse, np.float64)[..., None])
    weights[..., length:] = 0
    assert got.dtype == jnp.float32
    want = weights.reshape(groups, p, block, blocks, block).sum((2, 4))
    assert_close(got, want, "bfloat16", "forward")


@pytest.mark.slow
def test_whole_calls_of_odd_lengths():
    """The padding of queries and keys, and all three functions, by name."""
    query, key, value = (x.astype("bfloat16") for x in arrays([(1, 70, 1, 64)] * 3, "float32"))
    keep = jnp.asarray([[[[True, False], [True, True]]]])

    def calls(implementation, query, key, value):
        how = {"implementation": implementation}
        sparse = vm.block_sparse_attention(query, key, value, keep, 64, **how, return_lse=True)
        return *sparse, *vm.dense_attention_mass(query, key, value, 64, **how)

    got = calls("pallas_gpu", query, key, value)
    want = calls("reference", *(x.astype(jnp.float32) for x in (query, key, value)))
    for x, wanted, kind in zip(got, want, ("forward", "lse") * 2 + ("forward",), strict=True):
        assert_close(x, wanted, "bfloat16", kind)


def kept_by(schedule, block, rows):
    """What a warpgroup of each row of blocks visits, by the rule that its walk goes by."""
    order, numbers = (np.asarray(x) for x in schedule)
    found = []
    for row in range(rows):
        tile, worker = (row // 2, row % 2) if block == 64 else (row, 0)
        lists = 128 // block
        copies, shared, *own, limit_a, limit_b = numbers[0, tile]
        mine, other = own[worker], own[1 - worker]
        places = [worker, *range(lists, lists + shared)]
        places += [lists + shared + i + min(i + worker, other) for i in range(mine)]
        assert places == sorted(set(places))
        assert places[-1] < copies <= order.shape[-1]
        blocks = order[0, tile, places] // block
        found.append((list(blocks), (limit_a, limit_b)[worker]))
    return found


@pytest.mark.parametrize("block", gpu_walk.BLOCKS)
@pytest.mark.parametrize("seed", range(3))
def test_schedules_visit_every_kept_block_once(block, seed):
    generator = np.random.default_rng(seed)
    rows, columns, short = 7, 9, 5
    keep = generator.random((1, rows, columns)) < (0.2, 0.5, 0.9)[seed]
    keep[0, 2] = False
    length = (columns - 1) * block + short
    schedule = gpu_walk.schedule(jnp.asarray(keep), block, length, block)
    for row, (blocks, limit) in enumerate(kept_by(schedule, block, rows)):
        if not keep[0, row].any():
            assert limit == 0
            assert len(blocks) == 1
            continue
        assert sorted(blocks) == list(np.flatnonzero(keep[0, row]))
        # The block that is not full comes first, where it is masked.
        assert limit == (short if keep[0, row, -1] else block)
        assert not keep[0, row, -1] or blocks[0] == columns - 1


def test_same_lists_are_copied_once():
    keep = jnp.ones((1, 2, 6), bool)
    _, numbers = gpu_walk.schedule(keep, 64, 6 * 64, 64)
    assert numbers[0, 0].tolist() == [7, 5, 0, 0, 64, 64]


def test_refusals():
    q = jnp.zeros((1, 128, 64), jnp.bfloat16)
    one = jnp.zeros((1, 1, 1), jnp.int32), jnp.ones((1, 1), jnp.int32)

    def call(x, block):
        return gpu.block_sparse(
            x, x, x, *one, block=block, length=128, scale=1.0, block_sizes=SIZES
        )

    with pytest.raises(NotImplementedError, match="blocks of 64 or 128 tokens, got 32"):
        call(q, 32)
    with pytest.raises(NotImplementedError, match="bfloat16 or float16"):
        call(q.astype(jnp.float32), 128)
    with pytest.raises(NotImplementedError, match="head dims of 64 or 128, got 32"):
        call(q[..., :32], 128)
    with mode.interpreted(None), pytest.raises(NotImplementedError, match="needs a Hopper GPU"):
        call(q, 128)
