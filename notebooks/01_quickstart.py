# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Video attention by Monarch matrices, in five minutes
#
# Attention over the tokens of a video costs $N^2$. VMonarch replaces the attention matrix by the
# product of two small sets of softmaxes, one between the frames and one between the pixels of a
# frame, and says by how much each row is wrong. This notebook calls it, looks at it, measures its
# error, and samples videos with it. It runs on a TPU, a GPU or a CPU; on two CPU cores it takes
# two minutes.
#
# **On Colab:** the project has no published address yet. Bring a checkout (clone your own copy, or
# upload and unpack one) and write its folder, or a `git+https://...` address of your own, into
# `SOURCE` below. Where `vmonarch_jax` is already installed, the next cell installs nothing.

# %%
import importlib
import pathlib
import shutil
import subprocess
import sys

SOURCE = ""  # the folder of a checkout, or git+https://...; empty: look for one around here


def installed():
    """Whether the project is there, with its models."""
    try:
        return importlib.import_module("vmonarch_jax.models") is not None
    except ImportError:
        return False


if not installed():
    around = (pathlib.Path.cwd(), *pathlib.Path.cwd().parents)
    found = [p for p in around if (p / "vmonarch_jax").is_dir() and (p / "setup.py").is_file()]
    source = SOURCE or (found[0].as_uri() if found else "")
    if not source:
        raise RuntimeError("write the folder of a checkout, or a git+https address, into SOURCE")
    if "://" not in source:
        source = pathlib.Path(source).resolve().as_uri()
    wanted = [f"vmonarch-jax[video] @ {source}"]
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = int(subprocess.check_output(query, text=True).split(".")[0])
        wanted.append("jax[cuda13]" if driver >= 580 else "jax[cuda12]")
    elif any(pathlib.Path("/dev").glob("accel*")) or pathlib.Path("/dev/vfio/0").exists():
        wanted.append("jax[tpu]")
    subprocess.check_call([sys.executable, "-m", "pip", "install", "--quiet", *wanted])
    importlib.invalidate_caches()

# %%
import jax
import jax.numpy as jnp
from vmonarch_jax.models.rope import apply_rope, rope_angles

import vmonarch_jax as vm

grid = vm.VideoGrid(frames=8, height=8, width=8)  # tokens, not pixels
print(f"{jax.devices()[0].device_kind}, JAX {jax.__version__}: {grid.tokens} tokens")

# As a video model has them: some content in common, turned by where and when a token is (RoPE).
noise = jax.random.normal(jax.random.key(0), (3, 1, grid.tokens, 2, 64))
common = jax.random.normal(jax.random.key(1), (2, 1, 1, 2, 64)) * jnp.sqrt(0.7)
angles = rope_angles(grid, head_dim=64, theta=100.0)
q, k, v = (apply_rope(x, angles) for x in common[jnp.array([0, 0, 1])] + 0.5 * noise)

out, lse = vm.vmonarch_attention(q, k, v, grid=grid, return_lse=True)
exact = vm.dense_attention(q, k, v)
print(f"relative error of the output: {jnp.linalg.norm(out - exact) / jnp.linalg.norm(exact):.3f}")
print(vm.explain(vm.VMonarch(), vm.VideoGrid(21, 30, 52)))  # the same call on an 81-frame video

# %% [markdown]
# ## Its picture
#
# Attention is linear in the values, so with the identity matrix as values it returns its own
# matrix. Left, every query's dense attention to every key; in the middle its Monarch
# approximation, where the first frame's rows are exact and elsewhere the keys that stand out
# alone are smoothed away.

# %%
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import LogNorm

identity = jnp.broadcast_to(jnp.eye(grid.tokens)[None, :, None], (1, grid.tokens, 2, grid.tokens))
dense_map = np.asarray(vm.dense_attention(q, k, identity))[0, :, 0]
monarch_map = np.asarray(vm.vmonarch_attention(q, k, identity, grid=grid))[0, :, 0]

figure, axes = plt.subplots(1, 3, figsize=(11, 4), layout="constrained", sharey=True)
scale = {"norm": LogNorm(0.1 / grid.tokens, 30 / grid.tokens, clip=True), "cmap": "magma"}
box = (0, grid.frames, grid.frames, 0)
picture = axes[0].imshow(dense_map, extent=box, interpolation="nearest", **scale)
axes[1].imshow(monarch_map, extent=box, interpolation="nearest", **scale)
difference = monarch_map - dense_map
most = np.quantile(np.abs(difference), 0.99)
signed = {"cmap": "RdBu_r", "vmin": -most, "vmax": most}
delta = axes[2].imshow(difference, extent=box, interpolation="nearest", **signed)
for axis, title in zip(axes, ("dense", "VMonarch", "VMonarch - dense"), strict=True):
    axis.set(title=title, xlabel="key frame")
axes[0].set_ylabel("query frame")
figure.colorbar(picture, ax=axes[:2], label="attention", aspect=40)
figure.colorbar(delta, ax=axes[2], aspect=40)
plt.show()

# %% [markdown]
# ## Its certificate
#
# Each row's Kullback-Leibler divergence from the dense row is `lse_dense - lse`, exactly; by
# Pinsker's inequality no entry of the output is further from the dense one than
# `2 sqrt(KL / 2) max|v|`. So the error is known without computing dense attention's output, and
# for a few rows (`rows=`) at a fraction of the cost. The bound covers the worst values there could
# be, so the true error lies well below it and grows with it.

# %%
kl = vm.attention_gap(q, k, lse, grid=grid)
bound = np.asarray(2 * jnp.sqrt(kl / 2) * jnp.abs(v).max(axis=(1, 3))[:, None])
error = np.asarray(jnp.abs(out - exact).max(axis=-1))
print(f"KL: mean {kl.mean():.4f}, worst row {kl.max():.4f} nats")
shown = bound > 1e-3  # the exact rows of the first frame are left out
assert (error <= bound + 1e-5).all()

figure, axis = plt.subplots(figsize=(4.6, 3.8), layout="constrained")
axis.plot(bound[shown], error[shown], ".", markersize=4, alpha=0.5)
axis.plot([0, bound.max()], [0, bound.max()], "k--", linewidth=0.8, label="error = bound")
axis.set(xlabel="certified bound of the row", ylabel="true error of the row")
axis.legend()
plt.show()

# %% [markdown]
# ## Exact where it matters
#
# Every attention here can return a part, `(out, lse)`, over some of the keys, and parts merge
# exactly. So any set of keys can be kept exact, here those of two frames, while Monarch attention
# does the rest; the certificate holds for the merged part as well.

# %%
frame = np.arange(grid.tokens) // grid.frame_tokens
kept = np.isin(frame, (0, 4))
exact_part = vm.dense_attention(q, k[:, kept], v[:, kept], return_lse=True)
others = jnp.asarray(~kept)[None]
rest = vm.vmonarch_attention(q, k, v, grid=grid, key_mask=others, return_lse=True)
merged = vm.merge_attention([exact_part, rest])


def report(name, part):
    """Prints a part's mean KL and its output error."""
    gap = vm.attention_gap(q, k, part[1], grid=grid).mean()
    relative = jnp.linalg.norm(part[0] - exact) / jnp.linalg.norm(exact)
    print(f"{name:34} KL {gap:.4f}   output error {relative:.3f}")


report("VMonarch", (out, lse))
report("VMonarch, two key frames exact", merged)
for steps in (1, 2, 3):
    part = vm.vmonarch_attention(q, k, v, grid=grid, steps=steps, return_lse=True)
    report(f"VMonarch, {steps} step{'s' * (steps > 1)}", part)

# %% [markdown]
# ## `jit` and gradients
#
# It is a JAX function like any other, with memory linear in the tokens also backwards.


# %%
def energy(method):
    """A scalar to differentiate, and its gradient in all three arguments."""

    def value(q, k, v):
        return jnp.sum(jnp.square(method(q, k, v, grid=grid)))

    return jax.jit(jax.value_and_grad(value, argnums=(0, 1, 2)))


_, dense_gradients = energy(vm.Dense())(q, k, v)
_, gradients = energy(vm.VMonarch())(q, k, v)
for name, ours, dense in zip("qkv", gradients, dense_gradients, strict=True):
    cosine = jnp.vdot(ours, dense) / jnp.linalg.norm(ours) / jnp.linalg.norm(dense)
    print(f"gradient of {name}: cosine to the dense one {cosine:.3f}")

# %% [markdown]
# ## In a video diffusion transformer
#
# The repository ships a tiny video DiT (16 frames of 32 x 32 pixels, 1,024 tokens), trained under
# dense attention, and a copy tuned to VMonarch. The method is an argument. From the same noise:
# dense attention, VMonarch in its place without any training, and the tuned model.

# %%
import os

import vmonarch_jax.models as models

small = os.environ.get("VMONARCH_NOTEBOOK") == "small"  # the tests run it so
solver_steps = 2 if small else 20
prompts = [("pan_left", "coffee"), ("zoom_in", "chelsea"), ("rotate_cw", "rocket")]
prompts = prompts[:1] if small else prompts

tiny = pathlib.Path(models.__path__[0]) / "tiny"
label = jnp.array([models.MOTIONS.index(motion) for motion, _ in prompts])
caption = jnp.eye(len(models.PHOTOS))[jnp.array([models.PHOTOS.index(p) for _, p in prompts])]
runs = {
    "dense": ("dense", vm.Dense()),
    "VMonarch": ("dense", vm.VMonarch()),
    "VMonarch, tuned": ("vmonarch", vm.VMonarch()),
}
videos = {}
for name, (weights, method) in runs.items():
    # Layers run in a scan: one of them is compiled instead of all.
    model = models.load_model(tiny / weights, attention=method, scan_layers=True)
    videos[name] = np.asarray(
        models.sample(model, jax.random.key(7), label, caption, steps=solver_steps, guidance=2.0)
    )
    apart = np.square(videos[name] - videos["dense"]).mean()
    note = "" if name == "dense" else f", {10 * np.log10(4 / apart):.1f} dB PSNR to dense"
    print(f"{name}: {len(prompts)} videos of {solver_steps} steps{note}")

# %%
from IPython.display import Image, display
from vmonarch_jax.models.pictures import save_gif

gif = pathlib.Path("out") / "quickstart.gif"
rows = np.concatenate(list(videos.values()), axis=2)  # one method above the other
save_gif(gif, rows, scale=4)
print("from top to bottom:", ", ".join(videos))
display(Image(data=gif.read_bytes(), format="gif"))

# %%
shown = np.linspace(0, 15, 6).round().astype(int)
figure, axes = plt.subplots(len(videos), 6, figsize=(9, 1.6 * len(videos)), layout="constrained")
for line, (name, video) in zip(axes, videos.items(), strict=True):
    for axis, n in zip(line, shown, strict=True):
        axis.imshow(np.clip((video[-1, n] + 1) / 2, 0, 1), interpolation="nearest")
        axis.set(xticks=[], yticks=[])
    line[0].set_ylabel(name)
for axis, n in zip(axes[0], shown, strict=True):
    axis.set_title(f"frame {n + 1}")
plt.show()

# %% [markdown]
# Next: `vmonarch demo` measures all of this, on your own video as well (`--input clip.mp4`);
# `python -m benchmarks.fidelity` compares blocks, tiles and steps.
