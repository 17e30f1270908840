"""AdaSpa's choice: tiers, budgets, ties; its counts and explanation; its errors."""

import dataclasses

import adaspa_oracle as oracle
import jax.numpy as jnp
import numpy as np
import pytest
from adaspa_cases import (
    DIM,
    GRID,
    HEADS,
    METHODS,
    SMALL,
    all_kept,
    arrays,
    attend,
    fresh,
)

import vmonarch_jax as vm
from vmonarch_jax.adaspa_search import Budget, Cut, choose, tiers


@pytest.mark.parametrize(
    ("share", "want"),
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
    """Whole blocks nearest to the share that is asked for, and a mean that no tier can move."""
    for blocks in (1, 2, 3, 5, 9, 16, 25, 60, 512):
        for percent in range(100):
            method = dataclasses.replace(SMALL, sparsity=percent / 100)
            budget = Budget.of(blocks, method.sparsity, head_adaptive=True)
            want = {tier: budget.keep + tier * budget.spread for tier in (-1, 0, 1)}
            assert oracle.budgets(method, blocks) == want
            assert budget.keep - budget.spread >= 1
            assert budget.most <= blocks
    # The paper's: 90%, 80% and 70% of 100 blocks left out.
    assert Budget.of(100, 0.8, head_adaptive=True) == Budget(20, 10)
    assert Budget.of(100, 0.8, head_adaptive=False) == Budget(20, 0)
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
    _, state = attend(SMALL, 1, fresh(SMALL), q, q, v)
    first = [set(range(n)) for n in (3, 5, 7)]
    assert all(kept in first for kept in all_kept(state))


@pytest.mark.parametrize("block", [1, 4, 5, 100])
@pytest.mark.parametrize("text", [0, 1, 6, 8])
@pytest.mark.parametrize("side", ["after", "before"])
def test_cut(block, text, side):
    """Blocks of video alone, blocks with text, and their tokens, against counting them."""
    method = vm.AdaSpa(block_size=block, text_tokens=text, text=side)
    cut = Cut(GRID.tokens, text, side == "before", block)
    number, with_text, video = oracle.blocks_of(method, GRID.tokens)
    assert list(cut.video) == video
    assert list(cut.text) == with_text
    tokens = np.arange(cut.seq)
    assert tokens[cut.rows].tolist() == tokens[np.isin(number, video)].tolist()
    assert tokens[cut.text_rows].tolist() == tokens[np.isin(number, with_text)].tolist()
    joined = cut.join(tokens[None, cut.rows], tokens[None, cut.text_rows])
    assert joined[0].tolist() == tokens.tolist()


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
def test_flops(method):
    """The kept pairs of blocks of a real state, counted one by one."""
    _, state = attend(method, 1, fresh(method), *arrays(method))
    number, text, _ = oracle.blocks_of(method, GRID.tokens)
    seq, e = number.size, 3
    text_rows, both = int(np.isin(number, text).sum()), 2 * (DIM + e)
    pairs = int(state.counts[0].sum())
    assert pairs == int(state.counts[1].sum())  # whatever the tiers of an entry
    sparse = both * (method.block_size**2 * pairs + text_rows * seq * HEADS)
    dense, search = both * seq**2 * HEADS, 2 * seq**2 * DIM * HEADS
    again = 2 * (seq - text_rows) * seq * DIM * HEADS
    third = sparse + again if method.lse_cache else dense + search
    want = [dense, dense + search, sparse, third, sparse]
    sizes = {"heads": HEADS, "head_dim": DIM, "value_dim": e}
    assert [vm.flops.attention(method, GRID, step=n, **sizes) for n in range(5)] == want
    assert vm.flops.attention(method, GRID, **sizes) == sparse
    assert vm.flops.sampling(method, GRID, 5, **sizes) == sum(want)


def test_flops_of_nothing_left_out():
    method, sizes = vm.AdaSpa(sparsity=0.0), {"heads": 2, "head_dim": 8}
    dense = vm.flops.attention(vm.Dense(), GRID, **sizes)
    assert {vm.flops.attention(method, GRID, step=n, **sizes) for n in (0, 10, 11, 30)} == {dense}


def test_explain():
    said = str(vm.explain(vm.AdaSpa(), (21, 30, 52), implementation="xla"))
    assert "keep 102 of 512 video blocks" in said
    assert "keep 51, as many others 153" in said
    assert "steps before 10 are dense, step 10 is dense and searches; it searches again" in said
    assert "MiB a layer" in said
    method = dataclasses.replace(METHODS["text before"], head_adaptive=False)
    said = str(vm.explain(method, GRID, heads=2, head_dim=8, implementation="xla"))
    assert "2 blocks with text before the video" in said
    assert "as many others" not in said
    assert "every block is kept" in str(vm.explain(vm.AdaSpa(sparsity=0.0), GRID, head_dim=8))


def test_is_a_value():
    method = vm.AdaSpa(search_steps=[10, 30])
    assert method == vm.AdaSpa()
    assert hash(method) == hash(vm.AdaSpa())
    assert vm.remembers(method)
    assert fresh(METHODS["no cache"]).lse is None
    assert vm.AdaSpa(search_steps=(30, 10, 20, 5)).searches == (10, 20, 30)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, r"`sparsity` must lie in \[0, 1\), got 1.0"),
        ({"sparsity": -0.1}, r"`sparsity` must lie in \[0, 1\), got -0.1"),
        ({"sparsity": "many"}, "`sparsity` must be a finite number"),
        ({"sparsity": float("nan")}, "`sparsity` must be a finite number"),
        ({"recall": 1.1}, r"`recall` must lie in \[0, 1\], got 1.1"),
        ({"block_size": 0}, "`block_size` must be a positive integer, got 0"),
        ({"search_steps": 10}, "`search_steps` must be a tuple of steps, got 10"),
        ({"search_steps": (1, -2)}, "`search_steps` must be an integer of at least 0, got -2"),
        ({"search_steps": (1.5,)}, "`search_steps` must be an integer of at least 0, got 1.5"),
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

    def call(state, step=2, method=method):
        return method(q, k, v, grid=GRID, state=state, step=step)

    with pytest.raises(ValueError, match=r"text_tokens = 36 \+ 0 = 36, got 42"):
        call(None, method=SMALL)
    with pytest.raises(ValueError, match=r"`state` must be a vm\.AdaSpaState, got tuple"):
        call((1, 2))
    with pytest.raises(
        ValueError, match=r"`state.lse` must be float32 \(2, 5, 35\).* got .*\(1, 5, 35\)"
    ):
        call(fresh(method, batch=1))
    with pytest.raises(ValueError, match=r"`state\.indices` must be"):
        call(fresh(dataclasses.replace(method, sparsity=0.8)))
    with pytest.raises(ValueError, match=r"`state\.lse` must be .* got None"):
        call(fresh(dataclasses.replace(method, lse_cache=False)))
    for step in (-1, 1.5, True):
        with pytest.raises(ValueError, match="`step` must be an integer of at least 0"):
            call(fresh(method), step)
    with pytest.raises(ValueError, match="`step` must be an integer scalar"):
        call(fresh(method), jnp.zeros(2, jnp.int32))
    with pytest.raises(ValueError, match="expected `step`"):
        vm.attend(method, q, k, v, grid=GRID, state=fresh(method))
