"""Block-sparse attention and block masses against float64, under every implementation."""

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sparse_oracle
from cases import IMPLEMENTATIONS
from compiling import jit
from hypothesis import strategies as st
from tolerances import assert_close

import vmonarch_jax as vm

pytestmark = pytest.mark.usefixtures("tpu_interpreted")
over_implementations = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)

# Queries, keys, block, kept share, head and value dim: whole blocks, short last ones, one block.
SIZES = [(24, 24, 8, 0.4, 4, 4), (45, 37, 8, 0.5, 8, 6), (7, 40, 16, 0.6, 4, 4), (5, 3, 8, 1, 4, 8)]


def case_of(size, dtype="float32", batch=2, heads=2):
    seq, keys, block, share, dim, value_dim = size
    rng = np.random.default_rng(seq)
    shapes = ((seq, dim), (keys, dim), (keys, value_dim))
    arrays = [jnp.asarray(rng.normal(size=(batch, n, heads, d)), dtype) for n, d in shapes]
    keep = rng.random((batch, heads, -(-seq // block), -(-keys // block))) < share
    keep[0, 0, 0] = False  # a row of blocks without any key
    cotangents = [
        jnp.asarray(rng.normal(size=(batch, seq, heads, value_dim)), dtype),
        jnp.asarray(rng.normal(size=(batch, seq, heads)), jnp.float32),
    ]
    return arrays, keep, cotangents, block


def run(function, *arrays):
    try:
        return jit(function)(*arrays)
    except NotImplementedError as reason:
        pytest.skip(str(reason))


@over_implementations
@pytest.mark.parametrize(
    ("size", "dtype"), [*((size, "float32") for size in SIZES), (SIZES[1], "bfloat16")], ids=str
)
def test_attention_and_gradients(size, dtype, implementation):
    arrays, keep, cotangents, block = case_of(size, dtype)

    def everything(arrays, cotangents):
        def call(*arrays):
            how = IMPLEMENTATIONS[implementation] | {"return_lse": True}
            return tuple(vm.block_sparse_attention(*arrays, keep, block, **how))

        (out, lse), pull = jax.vjp(call, *arrays)
        dout, dlse = cotangents
        return out, lse, pull((dout, jnp.where(jnp.isfinite(lse), dlse, 0)))

    out, lse, found = run(everything, arrays, cotangents)
    want_out, want_lse = sparse_oracle.block_sparse(*arrays, keep, block)
    assert out.dtype == dtype
    assert lse.dtype == jnp.float32
    assert_close(out, want_out, dtype, "forward")
    assert_close(lse, want_lse, dtype, "lse")
    wanted = sparse_oracle.gradients(*arrays, keep, block, *cotangents)
    for name, got, want in zip(("query", "key", "value"), found, wanted, strict=True):
        assert got.dtype == dtype
        assert_close(got, want, dtype, "gradient", name)


@over_implementations
def test_masses(implementation):
    arrays, _, _, block = case_of(SIZES[1])
    how = IMPLEMENTATIONS[implementation]

    def both(q, k, v):
        part = vm.dense_attention(q, k, v, **how, return_lse=True)
        # a log-sum-exp of other inputs: rows do not sum to their number
        other = vm.block_mass(q, k, part.lse + 1, block, **how)
        return part, other, vm.dense_attention_mass(q, k, v, block, **how)

    (out, lse), other, fused = run(both, *arrays)
    want = sparse_oracle.block_mass(*arrays[:2], lse, block)
    assert_close(other, want / np.e, "float32", "forward")
    assert_close(fused[0], out, "float32", "forward")
    assert_close(fused[1], lse, "float32", "lse")
    assert_close(fused[2], want, "float32", "forward")
    tokens = np.array([8, 8, 8, 8, 8, 5])
    assert_close(fused[2].sum(-1), np.broadcast_to(tokens, (2, 2, 6)), "float32", "forward")


@over_implementations
def test_forms_of_blocks_agree(implementation):
    arrays, keep, _, block = case_of(SIZES[1])
    keep[:] = np.arange(keep.shape[-1]) < 3  # three blocks in every row
    indices, counts = vm.top_blocks(jnp.asarray(keep, jnp.float32), 3)

    def every(q, k, v, keep, indices, counts):
        forms = (keep, indices, vm.Blocks(indices, counts))
        how = IMPLEMENTATIONS[implementation]
        return [vm.block_sparse_attention(q, k, v, form, block, **how) for form in forms]

    first, *others = run(every, *arrays, jnp.asarray(keep), indices, counts)
    for other in others:
        assert_close(other, first, "float32", "forward")


@over_implementations
def test_all_blocks_are_dense(implementation):
    arrays, keep, _, block = case_of(SIZES[1])
    how = IMPLEMENTATIONS[implementation] | {"return_lse": True}

    def both(q, k, v):
        full = jnp.ones(keep.shape, bool)
        return vm.block_sparse_attention(q, k, v, full, block, **how), vm.dense_attention(
            q, k, v, **how
        )

    sparse, dense = run(both, *arrays)
    assert_close(sparse.out, dense.out, "float32", "forward")
    assert_close(sparse.lse, dense.lse, "float32", "lse")


def test_parts_over_complements_merge_to_dense():
    arrays, keep, _, block = case_of(SIZES[1])
    parts = [
        vm.block_sparse_attention(*arrays, kept, block, return_lse=True) for kept in (keep, ~keep)
    ]
    merged = vm.merge_attention(parts)
    dense = vm.dense_attention(*arrays, return_lse=True)
    assert_close(merged.out, dense.out, "float32", "forward")
    # the certificate of one part is what the other one holds
    gap = vm.attention_gap(*arrays[:2], parts[1].lse)
    assert_close(gap, dense.lse - parts[1].lse, "float32", "kl")
    assert (np.asarray(gap) >= 0).all()


def test_vmap_is_a_loop():
    arrays, keep, _, block = case_of(SIZES[0])
    keep = jnp.asarray(np.stack([keep, ~keep]))
    many = [jnp.stack([a, a[::-1] * 0.7]) for a in arrays]

    def call(q, k, v, keep):
        return vm.block_sparse_attention(q, k, v, keep, block)

    mapped = jit(jax.vmap(call))(*many, keep)
    for n in range(2):
        chex.assert_trees_all_close(mapped[n], call(*(a[n] for a in many), keep[n]), atol=1e-6)


def test_unused_slots_are_ignored():
    arrays, _, _, block = case_of(SIZES[0])
    counts = jnp.full((2, 2, 3), 1, jnp.int32)
    rows = [jnp.broadcast_to(jnp.array(row, jnp.int32), (2, 2, 3, 3)) for row in
            ((1, 0, 2), (1, 1, -7), (1, 99, 99))]  # fmt: skip
    outs = [vm.block_sparse_attention(*arrays, vm.Blocks(r, counts), block) for r in rows]
    for out in outs[1:]:
        chex.assert_trees_all_close(out, outs[0], atol=1e-6)


def test_memory_is_linear():
    """Twice the tokens under the same budget of blocks: twice the temporaries, not four times."""

    def temporaries(seq):
        x = jax.ShapeDtypeStruct((1, seq, 2, 32), jnp.float32)
        blocks = vm.Blocks(
            jax.ShapeDtypeStruct((1, 2, seq // 64, 6), jnp.int32),
            jax.ShapeDtypeStruct((1, 2, seq // 64), jnp.int32),
        )

        def loss(q, k, v, blocks):
            return vm.block_sparse_attention(q, k, v, blocks, 64, implementation="xla").sum()

        compiled = jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x, blocks).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    small, large = temporaries(4096), temporaries(8192)
    assert large < 2.2 * small
    assert large < 8192**2  # not even a byte for each pair


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(st.data())
def test_top_blocks_are_a_stable_sort(data):
    blocks = data.draw(st.integers(1, 9))
    scores = data.draw(st.lists(st.integers(0, 3), min_size=blocks, max_size=blocks))
    keep = data.draw(st.integers(1, blocks))
    always = data.draw(st.sets(st.integers(0, blocks - 1), max_size=keep))
    indices, counts = vm.top_blocks(jnp.array(scores, jnp.float32), keep, tuple(always))
    order = sorted(range(blocks), key=lambda c: (c not in always, -scores[c], c))
    np.testing.assert_array_equal(indices, sorted(order[:keep]))
    assert int(counts) == keep


X = jnp.zeros((1, 20, 2, 4))
FULL = np.ones((1, 2, 3, 3), bool)
ROWS = jnp.zeros((1, 2, 3, 1), jnp.int32)


@pytest.mark.parametrize(
    ("blocks", "block_size", "message"),
    [
        (FULL, 0, "`block_size` must be a positive integer, got 0"),
        (FULL[..., :2], 8, r"\(1, 2, 3, 3\), got \(1, 2, 3, 2\)"),
        (FULL, 16, r"\(1, 2, 2, 2\), got \(1, 2, 3, 3\)"),
        (ROWS[0], 8, r"or a boolean map .* got \(2, 3, 1\)"),
        (ROWS + 0.5, 8, "must be integers, got float32"),
        (ROWS + 3, 8, "must lie in 0..2, got 3..3"),
        (ROWS - 1, 8, "must lie in 0..2, got -1..-1"),
        (jnp.concatenate([ROWS, ROWS], -1), 8, "distinct within a row"),
        (vm.Blocks(ROWS, jnp.full((1, 2, 3), 2)), 8, "must lie in 0..1, got 2..2"),
        (vm.Blocks(ROWS, jnp.ones((1, 2), jnp.int32)), 8, r"= \(1, 2, 3\), got \(1, 2\)"),
        (vm.Blocks(ROWS[:, :, :2], jnp.ones((1, 2, 3), jnp.int32)), 8, r"got \(1, 2, 2, 1\)"),
    ],
)
def test_mistakes_are_told(blocks, block_size, message):
    with pytest.raises(ValueError, match=message):
        vm.block_sparse_attention(X, X, X, blocks, block_size)


def test_other_mistakes_are_told():
    with pytest.raises(ValueError, match=r"`lse` must be .* \(1, 20, 2\), got \(1, 2, 20\)"):
        vm.block_mass(X, X, jnp.zeros((1, 2, 20)), 8)
    with pytest.raises(ValueError, match=r"`keep` must lie in 1..3, got 4"):
        vm.top_blocks(jnp.zeros((2, 3)), 4)
    with pytest.raises(ValueError, match=r"`always` must hold blocks in 0..2, got \(5,\)"):
        vm.top_blocks(jnp.zeros((2, 3)), 2, always=(5,))
