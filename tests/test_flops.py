"""Exact matmul counts, by hand and against the papers' tables."""

import pytest

import vmonarch_jax as vm

HEADS, DIM = 12, 128
SMALL_480P = vm.VideoGrid(21, 30, 52)


def attention(method, grid, **keywords):
    return vm.flops.attention(method, grid, **({"heads": HEADS, "head_dim": DIM} | keywords))


@pytest.mark.parametrize("grid", [SMALL_480P, vm.VideoGrid(21, 45, 80), vm.VideoGrid(5, 1, 7)])
def test_by_hand(grid):
    frames, pixels, tokens = grid.frames, grid.frame_tokens, grid.tokens
    dense = 4 * tokens**2 * DIM * HEADS
    assert attention(vm.Dense(), grid) == dense
    # Two R steps: scores and K twice, V once; two L steps: F twice, then qt once and Y once.
    one = (10 * frames * pixels**2 + 8 * pixels * frames**2) * DIM * HEADS
    exact_frame = 4 * pixels * tokens * DIM * HEADS
    assert attention(vm.VMonarch(recompute_frames=0), grid) == one
    assert attention(vm.VMonarch(), grid) == one + exact_frame
    assert attention(vm.VMonarch(recompute_frames=(0, 3, 4)), grid) == one + 3 * exact_frame
    # Each further step: scores, K; F, qt.
    step = (4 * frames * pixels**2 + 4 * pixels * frames**2) * DIM * HEADS
    for steps in (1, 3, 5):
        method = vm.VMonarch(steps=steps, recompute_frames=0)
        assert attention(method, grid) == one + (steps - 2) * step


def test_counts_are_integers_and_linear_in_heads():
    for method in (vm.Dense(), vm.VMonarch(), vm.TiledMonarch()):
        count = attention(method, SMALL_480P)
        assert type(count) is int
        assert attention(method, SMALL_480P, heads=1) * HEADS == count
        assert attention(method, SMALL_480P, head_dim=64) * 2 == count


def test_other_blocks():
    grid = vm.VideoGrid(4, 6, 8)
    # m blocks of b tokens stand where T frames of H*W stood.
    for block, m, b in [((2, 6, 8), 2, 96), ((1, 1, 8), 24, 8), ((4, 1, 1), 48, 4)]:
        want = (10 * m * b**2 + 8 * b * m**2) * DIM * HEADS
        assert attention(vm.VMonarch(block=block, recompute_frames=0), grid) == want


def test_tiled():
    # MonarchRT's default at 480p, one step: 6.9% of dense.
    share = attention(vm.TiledMonarch(), SMALL_480P) / attention(vm.Dense(), SMALL_480P)
    assert share == pytest.approx(0.069, abs=0.0005)
    # One tile, the whole grid, is the untiled method.
    one_tile = vm.TiledMonarch(tile=(21, 30, 52), block=(1, 30, 52), steps=2)
    assert attention(one_tile, SMALL_480P) == attention(vm.VMonarch(recompute_frames=0), SMALL_480P)


def test_video_lengths():
    # Linear against quadratic: the ratio to dense grows with the frames.
    ratios = [
        attention(vm.Dense(), vm.VideoGrid(t, 28, 52))
        / attention(vm.VMonarch(recompute_frames=0), vm.VideoGrid(t, 28, 52))
        for t in (16, 46, 81)
    ]
    assert ratios == pytest.approx([6.3, 17.9, 31.0], rel=0.02)


# --- whole models ---------------------------------------------------------------------------------

# VMonarch (arXiv 2601.22275), TFLOPs of a forward pass: 93x704x1280 and 61x448x832 videos.
# Recomputation of the first frame is not counted there.
PAPER = {
    "14B": (vm.flops.WAN_14B, vm.VideoGrid(24, 44, 80), 7903.8, 2670.5),
    "1.3B": (vm.flops.WAN_1_3B, vm.VideoGrid(16, 28, 52), 159.7, 75.4),
}


def teraflops(model):
    shape, grid, *_ = PAPER[model]
    methods = (vm.Dense(), vm.VMonarch(recompute_frames=0))
    return [vm.flops.transformer(shape, method, grid) / 1e12 for method in methods]


def test_paper_14b():
    *_, dense, monarch = PAPER["14B"]
    assert teraflops("14B") == [
        pytest.approx(dense, rel=0.001),
        pytest.approx(monarch, rel=0.001),
    ]


def test_paper_1_3b():
    # The paper's two figures for 1.3B leave 59.65 TFLOP outside attention, where the convention
    # that gives the 14B's to five digits leaves 60.60: 0.95 (0.58% of one, 1.3% of the other) too
    # much in both. We know of no convention that explains it.
    *_, dense, monarch = PAPER["1.3B"]
    assert teraflops("1.3B") == [
        pytest.approx(dense, rel=0.01),
        pytest.approx(monarch, rel=0.014),
    ]


@pytest.mark.parametrize("model", PAPER)
def test_paper_savings(model):
    *_, dense, monarch = PAPER[model]
    ours = teraflops(model)
    assert ours[0] - ours[1] == pytest.approx(dense - monarch, rel=0.002)


def test_transformer_by_hand():
    shape = vm.flops.TransformerShape(dim=8, heads=2, layers=3, ffn=20, text_tokens=5)
    n, d = 6, 8
    own = 4 * n * n * d
    linear = 4 * 2 * n * d * d  # q, k, v, output
    cross = 2 * 2 * n * d * d + 2 * 2 * 5 * d * d + 4 * n * 5 * d
    feed_forward = 2 * 2 * n * d * 20
    want = 3 * (own + linear + cross + feed_forward)
    assert vm.flops.transformer(shape, vm.Dense(), (1, 2, 3)) == want


def test_errors():
    with pytest.raises(ValueError, match="`heads` must be a positive integer, got 0"):
        attention(vm.Dense(), SMALL_480P, heads=0)
    with pytest.raises(ValueError, match="`dim` must be a multiple of `heads` = 3, got 8"):
        vm.flops.TransformerShape(dim=8, heads=3, layers=3, ffn=20)
    with pytest.raises(ValueError, match=r"`recompute_frames`.*21.*22"):
        attention(vm.VMonarch(recompute_frames=22), SMALL_480P)
    with pytest.raises(TypeError, match="method"):
        attention("vmonarch", SMALL_480P)
