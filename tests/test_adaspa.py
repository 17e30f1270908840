"""AdaSpa against its float64 oracle: choices, tiers, budgets, memory between steps, text."""

import dataclasses

import adaspa_oracle as oracle
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import jit
from tolerances import assert_close

import vmonarch_jax as vm
from vmonarch_jax.adaspa_search import Budget, Cut, choose, tiers

GRID = vm.VideoGrid(3, 3, 4)  # 36 tokens
HEADS, DIM = 5, 6
SMALL = vm.AdaSpa(sparsity=0.5, block_size=4, search_steps=(1, 3), warmup_steps=1, recall=0.7)
# Sequences that are no multiple of the block, borders within blocks, text on both sides.
METHODS = {
    "video": SMALL,
    "short last block": dataclasses.replace(SMALL, block_size=5, scale=0.7),
    "one budget": dataclasses.replace(SMALL, head_adaptive=False),
    "no cache": dataclasses.replace(SMALL, lse_cache=False),
    "sparse": dataclasses.replace(SMALL, sparsity=0.8, recall=0.4),
    "text after": dataclasses.replace(SMALL, text_tokens=6, block_size=5),
    "text before": dataclasses.replace(SMALL, text_tokens=6, block_size=5, text="before"),
    "text in whole blocks": dataclasses.replace(SMALL, text_tokens=8),
    "dense-ish": dataclasses.replace(SMALL, sparsity=0.2),
}
methods = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())


def arrays(method, seed=0, batch=2, heads=HEADS, dtype="float32", grid=GRID):
    """q, k, v whose heads differ in how much they concentrate."""
    rng = np.random.default_rng(seed)
    shape = (batch, grid.tokens + method.text_tokens, heads, DIM)
    q, k, v = (rng.standard_normal(shape) for _ in range(3))
    sharpness = np.array([4.0, 0.3, 2.0, 6.0, 1.0])[np.arange(heads) % 5]
    entry = np.array([1.0, 0.4])[np.arange(batch) % 2]
    q = q * sharpness[:, None] * entry[:, None, None, None]
    return tuple(jnp.asarray(x, dtype) for x in (q, k, v))


def drifting(method, steps, **keywords):
    """q, k and v of some denoising steps, each a little further from the first."""
    first, last = (arrays(method, seed, **keywords) for seed in (0, 1))
    return [
        tuple(a + 0.1 * n * (b - a) for a, b in zip(first, last, strict=True)) for n in range(steps)
    ]


def fresh(method, batch=2, heads=HEADS, dtype="float32", grid=GRID):
    return vm.init_state(method, grid, batch=batch, heads=heads, head_dim=DIM, dtype=dtype)


def kept_of(state):
    """The state's key blocks as sets, `[batch][heads][row blocks]`."""
    indices, counts = np.asarray(state.indices), np.asarray(state.counts)
    batch, heads, rows = counts.shape
    return [
        [[set(indices[z, h, p, : counts[z, h, p]].tolist()) for p in range(rows)]
         for h in range(heads)]
        for z in range(batch)
    ]  # fmt: skip


def unrolled(method, inputs, state, first=0, **options):
    """All steps as a Python loop of static ones: parts and states."""
    found = []
    for number, (q, k, v) in enumerate(inputs, first):
        part, state = vm.attend(
            method, q, k, v, grid=GRID, state=state, step=number, return_lse=True, **options
        )
        found.append((part, state))
    return found


def check_run(method, inputs, first=0, **options):
    """A run of static steps against the oracle, the choices included."""
    memory, seen = None, set()
    run = jit(lambda inputs, state: unrolled(method, inputs, state, first, **options))
    for number, ((part, state), (q, k, v)) in enumerate(
        zip(run(inputs, fresh(method)), inputs, strict=True), first
    ):
        out, lse, memory = oracle.step(method, GRID.tokens, q, k, v, number, memory)
        assert_close(part.out, out, q.dtype, "forward", f"step {number}")
        assert_close(part.lse, lse, q.dtype, "lse", f"step {number}")
        if memory is not None:
            assert kept_of(state) == [[c.kept for c in heads] for heads in memory.choices]
            seen |= {c.tier for heads in memory.choices for c in heads}
        assert bool(state.ready.all()) == (memory is not None)
    return seen


@methods
def test_run(method):
    tiers_seen = check_run(method, drifting(method, 5))
    if method.head_adaptive:
        assert tiers_seen == {-1, 0, 1}  # else the case would not test what it is there for


@pytest.mark.parametrize("implementation", ["reference", "pallas_tpu"])
def test_run_of_other_implementations(implementation, tpu_interpreted):
    method = METHODS["text after"]
    inputs = drifting(method, 4)
    try:
        check_run(method, inputs, implementation=implementation)
    except NotImplementedError as error:
        pytest.skip(str(error))


@methods
def test_without_a_state(method):
    """A search on the very arrays, and sparse attention at once; the same as oracle and steps."""
    q, k, v = arrays(method)
    out, lse = jit(lambda *x: method(*x, grid=GRID, return_lse=True))(q, k, v)
    wide = [np.asarray(x, np.float64) for x in (q, k, v)]
    x = oracle.logits(method, *wide[:2])
    found = [oracle.choose(method, GRID.tokens, *pair)
             for pair in zip(x, oracle.log_sum_exp(x), strict=True)]  # fmt: skip
    keep = oracle.where(method, GRID.tokens, found)
    want_out, want_lse = oracle.attend(x, wide[2], keep)
    assert_close(out, want_out, "float32", "forward")
    assert_close(lse, want_lse, "float32", "lse")
    assert not keep.all()


@pytest.mark.parametrize("name", ["video", "text before", "no cache"])
def test_traced_steps_equal_static_ones(name):
    method = METHODS[name]
    inputs = drifting(method, 5)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *inputs)

    def body(state, at):
        step, (q, k, v) = at
        part, state = vm.attend(method, q, k, v, grid=GRID, state=state, step=step, return_lse=True)
        return state, (part, state)

    _, scanned = jit(lambda x, s: jax.lax.scan(body, s, (jnp.arange(5), x)))(stacked, fresh(method))
    for number, (part, state) in enumerate(unrolled(method, inputs, fresh(method))):
        scanned_part, scanned_state = jax.tree.map(lambda x, n=number: x[n], scanned)
        assert_close(scanned_part.out, part.out, "float32", "forward")
        assert_close(scanned_part.lse, part.lse, "float32", "lse")
        chex.assert_trees_all_equal_shapes_and_dtypes(scanned_state, state)
        assert kept_of(scanned_state) == kept_of(state)
        np.testing.assert_array_equal(scanned_state.ready, state.ready)


def at(method, step, traced, state, q, k, v):
    """One step, static or traced."""
    if traced:
        run = jit(lambda n, s, *x: vm.attend(method, *x, grid=GRID, state=s, step=n))
        return run(jnp.int32(step), state, q, k, v)
    return jit(lambda s, *x: vm.attend(method, *x, grid=GRID, state=s, step=step))(state, q, k, v)


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("searches", [(), (3,), (1, 3)])
def test_the_first_step_that_needs_blocks_searches(searches, traced):
    """Whether it follows the warm-up, or a run that begins in the middle; the next one reuses."""
    method = dataclasses.replace(SMALL, search_steps=searches)
    q, k, v = arrays(method)
    dense = vm.dense_attention(q, k, v)
    for start in (1, 2, 3, 4):
        out, state = at(method, start, traced, fresh(method), q, k, v)
        assert_close(out, dense, "float32", "forward")
        assert state.ready.all()
        out, _ = at(method, 5, traced, state, q, k, v)
        assert_close(out, method(q, k, v, grid=GRID), "float32", "forward")


def test_warm_up_comes_first():
    """A search step in the warm-up is a warm-up step: dense, and nothing is remembered."""
    method = dataclasses.replace(SMALL, warmup_steps=4, search_steps=(1, 3))
    q, k, v = arrays(method)
    for step in (0, 1, 3):
        out, state = vm.attend(method, q, k, v, grid=GRID, state=fresh(method), step=step)
        assert_close(out, vm.dense_attention(q, k, v), "float32", "forward")
        chex.assert_trees_all_equal(state, fresh(method))
    assert method.searches == (4,)


def test_batch_entries_do_not_meet():
    """Guidance: two entries with different maps and tiers give what each gives alone."""
    inputs = drifting(SMALL, 4)
    both = jit(lambda x: unrolled(SMALL, x, fresh(SMALL)))(inputs)
    for entry in (0, 1):
        one = jax.tree.map(lambda x, z=entry: x[z : z + 1], inputs)
        alone = jit(lambda x: unrolled(SMALL, x, fresh(SMALL, batch=1)))(one)
        for (part, state), (part_alone, state_alone) in zip(both, alone, strict=True):
            mine = jax.tree.map(lambda x, z=entry: x[z : z + 1], (part, state))
            assert_close(mine[0].out, part_alone.out, "float32", "forward")
            assert kept_of(mine[1]) == kept_of(state_alone)
    assert kept_of(both[-1][1])[0] != kept_of(both[-1][1])[1]
    assert (both[-1][1].counts[0] != both[-1][1].counts[1]).any()


@pytest.mark.parametrize("name", ["video", "text after", "text before"])
def test_sparsity_0_is_dense(name):
    method = dataclasses.replace(METHODS[name], sparsity=0.0)
    q, k, v = arrays(method)
    dense = vm.dense_attention(q, k, v, return_lse=True)
    chex.assert_trees_all_equal(method(q, k, v, grid=GRID, return_lse=True), dense)
    for part, _ in unrolled(method, [(q, k, v)] * 4, fresh(method)):
        chex.assert_trees_all_equal(part, dense)


@pytest.mark.parametrize("grid,text", [((1, 1, 3), 4), ((1, 2, 2), 5), ((1, 1, 1), 0)])
@pytest.mark.parametrize("side", ["after", "before"])
def test_too_small_to_leave_anything_out(grid, text, side):
    """No block of video alone, or one of them: dense attention, whatever the sparsity."""
    grid = vm.VideoGrid(*grid)
    method = dataclasses.replace(SMALL, sparsity=0.9, text_tokens=text, text=side)
    q, k, v = arrays(method, grid=grid)
    state = fresh(method, grid=grid)
    for step in (0, 1, 2):
        out, state = vm.attend(method, q, k, v, grid=grid, state=state, step=step)
        assert_close(out, vm.dense_attention(q, k, v), "float32", "forward")


@pytest.mark.parametrize("name", ["text after", "text before", "text in whole blocks"])
def test_text(name):
    """Text rows are dense, and every video row keeps the blocks with text, straddling or not."""
    method = METHODS[name]
    q, k, v = arrays(method)
    state = fresh(method)
    for step in (1, 2):
        out, state = vm.attend(method, q, k, v, grid=GRID, state=state, step=step)
    number, text, _ = oracle.blocks_of(method, GRID.tokens)
    rows = np.isin(number, text)
    assert rows.sum() >= method.text_tokens
    dense = np.asarray(vm.dense_attention(q, k, v))
    assert_close(out[:, rows], dense[:, rows], "float32", "forward")
    assert np.abs(np.asarray(out) - dense)[:, ~rows].max() > 0.1
    assert all(
        set(text) <= kept for heads in kept_of(state) for head in heads for kept in head
    )  # fmt: skip


@pytest.mark.parametrize(
    "share,want",
    [
        ([0.1, 0.5, 0.8, 0.2], [0, 0, 0, 0]),  # none above 0.8: 0.8 itself is not
        ([0.9, 0.1, 0.2, 0.3], [-1, 1, 0, 0]),  # one
        ([0.81, 0.9, 0.7, 0.2], [-1, -1, 1, 1]),  # half
        ([0.9, 0.85, 0.95, 0.99], [1, 1, -1, -1]),  # all: half give to half
        ([0.9, 0.9, 0.9, 0.1, 0.1], [-1, -1, 0, 1, 1]),  # ties: the lower index is the better one
        ([0.9, 0.9, 0.9, 0.9], [-1, -1, 1, 1]),
        ([0.99], [0]),  # one head has nobody to give to
        ([0.1], [0]),
        ([0.95, 0.9, 0.85], [-1, 0, 1]),
    ],
)
def test_tiers(share, want):
    found = tiers(jnp.array([share, share[::-1]]), 0.8)
    assert found[0].tolist() == want == oracle.tiers_of(share, 0.8)
    assert found[1].tolist() == oracle.tiers_of(share[::-1], 0.8)


def test_budgets():
    """Whole blocks near the share that is asked for, and a mean that no tier can move."""
    for blocks in range(1, 60):
        for percent in range(100):
            sparsity = percent / 100
            budget = Budget.of(blocks, sparsity, head_adaptive=True)
            assert abs(budget.keep - (1 - sparsity) * blocks) <= max(0.5 + 1e-9, 1 - blocks / 100)
            assert 1 <= budget.keep - budget.spread and budget.most <= blocks
            method = dataclasses.replace(SMALL, sparsity=sparsity)
            want = oracle.budgets(method, blocks)
            assert want == {t: budget.keep + t * budget.spread for t in (-1, 0, 1)}
    # The paper's: 90%, 80% and 70% of 100 blocks left out.
    paper = Budget.of(100, 0.8, head_adaptive=True)
    assert (paper.keep, paper.spread) == (20, 10)
    # Below 1/3 the worst heads just keep all.
    assert Budget.of(100, 0.1, head_adaptive=True) == Budget(90, 10)


def test_equal_masses_go_to_the_lower_index():
    cut, budget = Cut(12, 0, False, 2), Budget(3, 1)
    mass = jnp.array([[1, 2, 2, 2, 1, 2], [1, 1, 1, 1, 1, 1], [0, 0, 0, 5, 0, 0.0]])
    blocks = choose(jnp.stack([mass, mass])[None], cut, budget, recall=0.9)
    assert blocks.counts.tolist() == [[[3] * 3, [3] * 3]]
    assert blocks.indices[0, 0, :, :3].tolist() == [[1, 2, 3], [0, 1, 2], [0, 1, 3]]


def test_equal_rows_everywhere():
    """Constant queries and keys: all masses are equal, and the first blocks are kept."""
    q, _, v = arrays(SMALL)
    q = jnp.ones_like(q)
    _, state = vm.attend(SMALL, q, q, v, grid=GRID, state=fresh(SMALL), step=1)
    first = [set(range(n)) for n in (3, 5, 7)]
    assert all(kept in first for heads in kept_of(state) for head in heads for kept in head)


def test_a_head_whose_mass_is_one_block():
    """Every query of one head looks at block 6 alone: one block is all that it needs."""
    q, k, v = (np.array(x) for x in arrays(SMALL))
    q[:, :, 1], k[:, :, 1] = 0, 0
    q[:, :, 1, 0], k[:, 24:28, 1, 0] = 30, 5
    method = dataclasses.replace(SMALL, sparsity=0.75)  # 2 of 9 blocks
    part, state = vm.attend(method, q, k, v, grid=GRID, state=fresh(method), step=1)
    assert (state.counts[:, 1] == 1).all() and (state.indices[:, 1, :, 0] == 6).all()
    out, _ = vm.attend(method, q, k, v, grid=GRID, state=state, step=2)
    assert_close(out[:, :, 1], vm.dense_attention(q, k, v)[:, :, 1], "float32", "forward")


def test_certificate():
    """The gap is the KL divergence of each sparse row from its dense one."""
    method = METHODS["text after"]
    q, k, v = arrays(method)
    _, state = vm.attend(method, q, k, v, grid=GRID, state=fresh(method), step=1)
    (_, lse), _ = vm.attend(method, q, k, v, grid=GRID, state=state, step=2, return_lse=True)
    gap = vm.attention_gap(q, k, lse)
    x = oracle.logits(method, *(np.asarray(y, np.float64) for y in (q, k)))
    dense = oracle.log_sum_exp(x)
    found = [oracle.choose(method, GRID.tokens, *pair) for pair in zip(x, dense, strict=True)]
    keep = oracle.where(method, GRID.tokens, found)
    sparse = oracle.log_sum_exp(x, keep)
    p = np.where(keep, np.exp(x - sparse[..., None]), 0)
    logs = np.where(keep, (x - sparse[..., None]) - (x - dense[..., None]), 0)
    assert_close(gap, (p * logs).sum(-1).swapaxes(1, 2), "float32", "kl")
    assert float(gap.max()) > 0.1


@pytest.mark.parametrize("name", ["video", "text before"])
def test_gradients(name):
    """Through the attention on the kept blocks, with a state and without; none through the choice."""
    method = METHODS[name]
    q, k, v = arrays(method)
    out_bar = np.random.default_rng(3).standard_normal(v.shape).astype("float32")
    x = oracle.logits(method, *(np.asarray(y, np.float64) for y in (q, k)))
    found = [oracle.choose(method, GRID.tokens, *pair)
             for pair in zip(x, oracle.log_sum_exp(x), strict=True)]  # fmt: skip
    keep = oracle.where(method, GRID.tokens, found)
    sparse = oracle.gradients(method, q, k, v, keep, out_bar)
    dense = oracle.gradients(method, q, k, v, np.ones_like(keep), out_bar)
    _, state = vm.attend(method, q, k, v, grid=GRID, state=fresh(method), step=1)

    def loss(q, k, v, state, step):
        out, _ = vm.attend(method, q, k, v, grid=GRID, state=state, step=step)
        return (out * out_bar).sum()

    cases = [
        (None, None, sparse),
        (fresh(method), 1, dense),
        (state, 2, sparse),
        (state, 3, sparse),
    ]
    for state, step, want in cases:
        run = jit(jax.grad(lambda q, k, v, s, n=step: loss(q, k, v, s, n), argnums=(0, 1, 2)))
        for got, expected in zip(run(q, k, v, state), want, strict=True):
            assert_close(got, expected, "float32", "gradient", f"step {step}")


def test_vmap_and_bfloat16():
    """A mapped axis around batches; in bfloat16 the state's log-sum-exp stays float32."""
    inputs = [arrays(SMALL, seed, dtype="bfloat16") for seed in (0, 1)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *inputs)
    states = jax.tree.map(lambda x: jnp.stack([x, x]), fresh(SMALL, dtype="bfloat16"))

    def two_steps(state, q, k, v):
        for step in (1, 2):
            out, state = vm.attend(SMALL, q, k, v, grid=GRID, state=state, step=step)
        return out, state

    out, state = jit(jax.vmap(two_steps))(states, *stacked)
    assert out.dtype == jnp.bfloat16 and state.lse.dtype == jnp.float32
    for n, one in enumerate(inputs):
        want, _ = two_steps(fresh(SMALL, dtype="bfloat16"), *one)
        assert_close(out[n], want, "bfloat16", "forward")


def test_a_log_sum_exp_that_is_far_off():
    """Masses that overflow, as after a cut between steps: still a choice, and attention on it."""
    q, k, v = arrays(SMALL)
    state = fresh(SMALL)._replace(
        lse=jnp.full(fresh(SMALL).lse.shape, -1e4), ready=jnp.ones(2, bool)
    )
    out, state = vm.attend(SMALL, q, k, v, grid=GRID, state=state, step=3)
    assert np.isfinite(out).all()
    assert all(len(kept) in (3, 5, 7) for heads in kept_of(state) for h in heads for kept in h)


def test_value_dim_and_one_head():
    q, k, v = arrays(SMALL, heads=1)
    state = fresh(SMALL, heads=1)
    for step in (1, 2):
        out, state = vm.attend(SMALL, q, k, v[..., :3], grid=GRID, state=state, step=step)
    assert out.shape == (2, GRID.tokens, 1, 3)
    assert (state.counts == Budget.of(9, 0.5, True).keep).all()


@methods
def test_flops(method):
    """The kept pairs of blocks of a real state, counted one by one."""
    _, state = vm.attend(
        method, *arrays(method), grid=GRID, state=fresh(method), step=1
    )  # fmt: skip
    number, text, video = oracle.blocks_of(method, GRID.tokens)
    seq, e = number.size, 3
    text_rows, block = int(np.isin(number, text).sum()), method.block_size
    both = 2 * (DIM + e)
    pairs = int(state.counts[0].sum())
    assert pairs == int(state.counts[1].sum())
    sparse = both * (block**2 * pairs + text_rows * seq * HEADS)
    dense, search = both * seq**2 * HEADS, 2 * seq**2 * DIM * HEADS
    again = 2 * (seq - text_rows) * seq * DIM * HEADS
    sizes = {"heads": HEADS, "head_dim": DIM, "value_dim": e}
    third = sparse + again if method.lse_cache else dense + search
    want = [dense, dense + search, sparse, third, sparse]
    assert [vm.flops.attention(method, GRID, step=n, **sizes) for n in range(5)] == want
    assert vm.flops.attention(method, GRID, **sizes) == sparse
    assert vm.flops.sampling(method, GRID, 5, **sizes) == sum(want)


def test_explain():
    said = str(vm.explain(vm.AdaSpa(), (21, 30, 52), implementation="xla"))
    assert "keep 102 of 512 video blocks" in said
    assert "keep 51, as many others 153" in said
    assert "steps before 10 are dense, step 10 is dense and searches; steps 30 search" in said
    assert "MiB a layer" in said
    method = dataclasses.replace(METHODS["text before"], head_adaptive=False)
    said = str(vm.explain(method, GRID, heads=2, head_dim=8, implementation="xla"))
    assert "2 blocks with text before the video" in said and "as many others" not in said
    assert "dense attention" in str(vm.explain(vm.AdaSpa(sparsity=0.0), GRID, head_dim=8))


def test_is_a_value():
    method = vm.AdaSpa(search_steps=[10, 30])
    assert method == vm.AdaSpa() and hash(method) == hash(vm.AdaSpa())
    assert vm.remembers(method)
    assert fresh(METHODS["no cache"]).lse is None
    assert vm.AdaSpa(search_steps=(30, 10, 20, 5)).searches == (10, 20, 30)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"sparsity": 1.0}, r"`sparsity` must lie in \[0, 1\), got 1.0"),
        ({"sparsity": -0.1}, "`sparsity` must lie"),
        ({"sparsity": "many"}, "`sparsity` must be a finite number"),
        ({"sparsity": float("nan")}, "`sparsity` must be a finite number"),
        ({"recall": 1.1}, r"`recall` must lie in \[0, 1\], got 1.1"),
        ({"block_size": 0}, "`block_size` must be a positive integer, got 0"),
        ({"search_steps": 10}, "`search_steps` must be a tuple of steps, got 10"),
        ({"search_steps": (1, -2)}, "`search_steps` must be an integer of at least 0, got -2"),
        ({"search_steps": (1.5,)}, "`search_steps` must be an integer"),
        ({"warmup_steps": -1}, "`warmup_steps` must be an integer of at least 0, got -1"),
        ({"text_tokens": -1}, "`text_tokens` must be an integer of at least 0, got -1"),
        ({"text": "left"}, '`text` must be "after" or "before", got \'left\''),
        ({"head_adaptive": 1}, "`head_adaptive` must be True or False, got 1"),
        ({"lse_cache": None}, "`lse_cache` must be True or False, got None"),
        ({"scale": "x"}, "`scale` must be a finite number"),
    ],
)
def test_options_that_are_wrong(options, message):
    with pytest.raises(ValueError, match=message):
        vm.AdaSpa(**options)


def test_arrays_and_states_that_do_not_fit():
    method = METHODS["text after"]
    q, k, v = arrays(method)

    def call(state, step=2, q=q, method=method):
        return method(q, k, v, grid=GRID, state=state, step=step)

    with pytest.raises(ValueError, match=r"text_tokens = 36 \+ 0 = 36, got 42"):
        call(None, method=SMALL)
    with pytest.raises(ValueError, match="`state` must be a vm.AdaSpaState, got tuple"):
        call((1, 2))
    with pytest.raises(ValueError, match=r"`state.lse` must be \(\(2, 5, 35\)"):
        call(fresh(method, batch=1))
    with pytest.raises(ValueError, match="`state.indices` must be"):
        call(fresh(dataclasses.replace(method, sparsity=0.8)))
    with pytest.raises(ValueError, match=r"`state.lse` must be .* got None"):
        call(fresh(dataclasses.replace(method, lse_cache=False)))
    for step in (-1, 1.5, True):
        with pytest.raises(ValueError, match="`step` must be an integer of at least 0"):
            call(fresh(method), step)
    with pytest.raises(ValueError, match="`step` must be an integer scalar"):
        call(fresh(method), jnp.zeros(2, jnp.int32))
    with pytest.raises(ValueError, match="expected `step`"):
        vm.attend(method, q, k, v, grid=GRID, state=fresh(method))
