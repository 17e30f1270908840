"""The TPU kernels of block-sparse attention, interpreted, against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import jit
from jax.experimental.pallas import tpu as pltpu
from pallas.attention_inputs import arrays
from tolerances import assert_close
from vmonarch_jax.pallas_kernels.block_sizes import BlockSizes
from vmonarch_jax.pallas_kernels.block_sparse import walk
from vmonarch_jax.pallas_kernels.block_sparse.tpu import block_sparse
from vmonarch_jax.pallas_kernels.tpu.call import interpreted, recording

# groups, query blocks, key blocks, kept at most, block, real keys, head dim, value dim, dtype
SIZES = [
    (2, 5, 7, 5, 64, 440, 64, 64, "float32"),
    (1, 3, 4, 3, 128, 512, 128, 128, "bfloat16"),
    (1, 6, 5, 5, 64, 310, 128, 64, "bfloat16"),
    (1, 5, 8, 4, 16, 120, 64, 128, "float32"),
    (1, 2, 2, 2, 256, 500, 64, 64, "float32"),
]
SMALL = BlockSizes(tpu_rows=192, tpu_keys=128)


def lists(groups, rows, blocks, most, seed=0):
    """Kept blocks of each row in random order, `most` at most; the second row keeps none."""
    generator = np.random.default_rng(seed)
    order = generator.permuted(np.tile(np.arange(blocks), (groups, rows, 1)), axis=-1)
    counts = generator.integers(1, most + 1, (groups, rows))
    counts[:, 1] = 0
    return jnp.asarray(order[..., :most], jnp.int32), jnp.asarray(counts, jnp.int32)


def kept_pairs(indices, counts, block, n, s, length):
    """Which pairs of tokens are kept, `[groups, n, s]`, row by row."""
    keep = np.zeros((len(indices), n, s), bool)
    for g, rows in enumerate(np.asarray(indices)):
        for p, row in enumerate(rows):
            for c in row[: counts[g, p]]:
                keep[g, p * block : (p + 1) * block, c * block : min((c + 1) * block, length)] = 1
    return keep


def expected(q, k, v, keep, dout, dlse, scale):
    """`out, lse, dq, dk, dv` in float64, each written out."""
    q, k, v, dout, dlse = (np.asarray(x, np.float64) for x in (q, k, v, dout, dlse))
    x = np.where(keep, scale * q @ k.swapaxes(1, 2), -np.inf)
    some = keep.any(-1)
    top = np.where(some, x.max(-1, initial=-np.inf), 0)
    weights = np.exp(x - top[..., None])
    total = weights.sum(-1)
    p = weights / np.where(some, total, 1)[..., None]
    with np.errstate(divide="ignore"):
        lse = top + np.log(total)
    dp = dout @ v.swapaxes(1, 2)
    ds = p * (dp - (p * dp).sum(-1, keepdims=True) + dlse[..., None])
    back = scale * ds.swapaxes(1, 2) @ q, p.swapaxes(1, 2) @ dout
    return p @ v, lse, scale * ds @ k, *back


def check(size, *, loud=1.0, sizes=SMALL, how=True, gradient=True):
    groups, rows, blocks, most, block, length, d, e, dtype = size
    n, s = rows * block, blocks * block
    q, k, v, dout = arrays([(groups, n, d), (groups, s, d), (groups, s, e), (groups, n, e)], dtype)
    (dlse,) = arrays([(groups, n)], "float32", 1)
    q = (loud * q).astype(dtype)
    indices, counts = lists(groups, rows, blocks, most)

    def call(q, k, v, indices, counts, dout, dlse):
        def part(q, k, v):
            return block_sparse(
                q, k, v, indices, counts,
                block=block, length=length, scale=0.1, block_sizes=sizes,
            )  # fmt: skip

        if not gradient:
            return *part(q, k, v), None
        result, pullback = jax.vjp(part, q, k, v)
        return *result, pullback((dout, dlse))

    with interpreted(how):
        out, lse, got = jit(call)(q, k, v, indices, counts, dout, dlse)
    keep = kept_pairs(indices, counts, block, n, s, length)
    wanted = expected(q, k, v, keep, dout, dlse, 0.1)
    assert out.dtype == v.dtype
    assert_close(out, wanted[0], dtype, "forward")
    assert_close(lse, wanted[1], dtype, "lse")
    for x, want in zip(got or (), wanted[2:], strict=False):
        assert x.dtype == q.dtype
        assert_close(x, want, dtype, "gradient")


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_forward_and_gradients(size):
    check(size)


def test_everything_in_one_step():
    check(SIZES[0], sizes=BlockSizes())


@pytest.mark.parametrize("loud", [40.0, -40.0])
def test_extreme_scores_take_the_careful_path(loud):
    check(SIZES[0], loud=loud, gradient=False)


@pytest.mark.parametrize("size", SIZES[:2], ids=str)
def test_races_and_uninitialised_memory(size):
    how = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    check(size, how=how)


def test_keys_that_do_not_fit_are_taken_in_parts(monkeypatch):
    monkeypatch.setattr(walk, "parts", lambda blocks, *_: [range(3), range(3, blocks)])
    size = (1, 5, 5, 4, 64, 300, 64, 64, "float32")
    with recording() as launches:
        check(size)
    names = [launch.name for launch in launches]
    assert {name: names.count(name) for name in names} == {
        "block_sparse": 2, "block_sparse_dq": 2, "block_sparse_dkv": 2,
    }  # fmt: skip


def test_parts_are_equal_shares_that_fit(monkeypatch):
    assert walk.parts(512, 64, (128, 128), "bfloat16") == [range(512)]
    monkeypatch.setattr(walk, "VMEM_SHARE", 0.2)
    found = walk.parts(512, 64, (64, 128), "float32")
    assert [*found[0], *found[-1]][-1] == 511
    assert len({len(part) for part in found[:-1]}) == 1
    assert len(found) > 1
    room = 0.2 * 100 * 2**20 - walk.OTHER_BYTES
    assert max(map(len, found)) * 64 * 256 * 4 <= room


def test_nan_stays_in_its_block():
    size = SIZES[0]
    _, rows, blocks, _, block, length, d, e, dtype = size
    q, k, v = arrays([(1, rows * block, d), (1, blocks * block, d), (1, blocks * block, e)], dtype)
    indices = jnp.tile(jnp.arange(2, dtype=jnp.int32), (1, rows, 1))
    counts = jnp.full((1, rows), 2, jnp.int32)
    with interpreted():
        out, lse = block_sparse(
            q.at[0, 70, 5].set(jnp.nan), k, v, indices, counts,
            block=block, length=length, scale=0.1, block_sizes=SMALL,
        )  # fmt: skip
    bad = np.arange(rows * block) == 70
    np.testing.assert_array_equal(np.isnan(lse[0]), bad)
    np.testing.assert_array_equal(np.isnan(out[0]).all(-1), bad)
    np.testing.assert_array_equal(np.isnan(out[0]).any(-1), bad)


def refuse(match, dtype="float32", block=64, **more):
    x = jnp.zeros((1, 2 * block, 64), dtype)
    lists = jnp.zeros((1, 2, 1), jnp.int32), jnp.ones((1, 2), jnp.int32)
    with pytest.raises(NotImplementedError, match=match):
        block_sparse(
            x, x, x, *lists, block=block, length=2 * block, scale=1.0, block_sizes=BlockSizes()
        )


def test_refusals():
    refuse("need a TPU")
    with interpreted():
        refuse("float16", "float16")
        refuse("power of two from 16 on in bfloat16, got 8", "bfloat16", 8)
        refuse("got 96", block=96)
