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
# # Wan2.1 under VMonarch: a video, how far it is from dense attention, and tuning
#
# The 1.3B text-to-video model on one TPU v5e of Colab (*Runtime*, *Change runtime type*, *v5e-1
# TPU*), or on any machine with JAX: download the weights, say what a run takes, make a video under
# VMonarch with dense first steps, make it again under dense attention, compare the two layer by
# layer, and tune the model to VMonarch with a LoRA.
#
# **What to expect.** This notebook was written where neither a TPU nor the weights could be had. It
# was run with a small random model only; that the 1.3B model fits a v5e is what the TPU compiler
# says. Where the weights are missing it goes on with such a random model, **and then every video is
# noise**. The first video compiles for minutes, above all the autoencoder; a second one of the same
# size compiles nothing.
#
# **Installing.** The project has no published address yet. Bring a checkout (clone your own copy,
# or upload and unpack one) and write its folder, or a `git+https://...` address of your own, into
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
    wanted = [f"vmonarch-jax[video] @ {source}", "huggingface_hub"]
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = int(subprocess.check_output(query, text=True).split(".")[0])
        wanted.append("jax[cuda13]" if driver >= 580 else "jax[cuda12]")
    elif any(pathlib.Path("/dev").glob("accel*")) or pathlib.Path("/dev/vfio/0").exists():
        wanted.append("jax[tpu]")
    subprocess.check_call([sys.executable, "-m", "pip", "install", "--quiet", *wanted])
    importlib.invalidate_caches()

# %% [markdown]
# ## The weights
#
# The original repository has the text encoder in bfloat16: about 18 GB in all, by the counts of
# parameters. A download that was interrupted goes on. Without `DOWNLOAD`, and without the folder,
# a small random model takes their place.

# %%
import os
import warnings

import jax
from vmonarch_jax.models.wan.weights.random_folder import random_folder

import vmonarch_jax as vm

MODEL, WEIGHTS = "Wan-AI/Wan2.1-T2V-1.3B", pathlib.Path("wan-1.3B")
DOWNLOAD = os.environ.get("VMONARCH_NOTEBOOK") != "small"  # the tests run it small

print(f"{len(jax.devices())} x {jax.devices()[0].device_kind}, JAX {jax.__version__}")
if DOWNLOAD:
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.pth", "google/*"]
    snapshot_download(MODEL, local_dir=WEIGHTS, allow_patterns=wanted)
real = WEIGHTS.is_dir()
if not real:
    shutil.rmtree("small-wan", ignore_errors=True)
    WEIGHTS = random_folder("small-wan", "t2v")
    warnings.warn("no weights here: a small random model, whose videos are noise", stacklevel=1)

# %% [markdown]
# ## What to make, and what it takes
#
# `Request.of` fills in what the model's authors sample with. The schedule keeps the first denoising
# steps dense, because they decide what is where and cheap attention hurts most there. Nothing is
# loaded yet: the plan reads names, sizes and headers of the files. It is the report of
# `vmonarch generate --dry-run`.

# %%
from vmonarch_jax.models import AttentionSchedule
from vmonarch_jax.models.wan.config import with_dtype
from vmonarch_jax.models.wan.generate.plan import make_plan
from vmonarch_jax.models.wan.pipeline import WanPipeline
from vmonarch_jax.models.wan.request import Request
from vmonarch_jax.models.wan.weights.detect import detect

found = detect(WEIGHTS)
config = with_dtype(found.config, "bfloat16")
prompt = "a red fox runs in snow"
sizes = {} if real else {"size": (48, 32), "frames": 9, "steps": 4}  # none: 81 frames of 832 x 480
request = Request.of(config, prompt=prompt, seed=1, **sizes)
schedule = AttentionSchedule(vm.VMonarch(), warmup_steps=10 if real else 1)
whole = make_plan(found, config, request, schedule, True, image=False, compare=vm.Dense())
print(whole)

# %% [markdown]
# ## A video under VMonarch
#
# The pipeline holds one large part at a time: the text encoder is freed before the transformer is
# loaded, and the transformer before the autoencoder. `on_step` sees each denoising step; here it
# also asks for the certificate in the middle of the sparse steps: the Kullback-Leibler divergence
# of 256 rows of each head from dense attention, exactly, in every layer.

# %%
import time

from tqdm import tqdm
from vmonarch_jax.models.wan.generate.compare import certified_step, certify

pipeline = WanPipeline.open(found)
conditions = pipeline.conditions(request)
noise = pipeline.noise(request)
layers = config.transformer.layers
at, certificate = certified_step(schedule, request, config), []


def denoise(attention, on_step=None):
    """The latents under some attention, and the seconds of its last, compiled step."""
    times = [time.perf_counter()]
    with tqdm(total=request.steps, leave=False) as bar:

        def each(step, progress):
            jax.block_until_ready(progress.x)
            times.append(time.perf_counter())
            bar.update()
            if on_step is not None:
                on_step(step, progress)

        latents = pipeline.denoise(request, conditions, noise, attention=attention, on_step=each)
    return latents, times[-1] - times[-2]


def look(step, progress):
    """Finds the certificate of one step, before it is made."""
    if step == at:
        certificate.extend(certify(pipeline, request, conditions, at, progress, schedule, True))


latents, seconds = denoise(schedule, look)
print(f"VMonarch: {seconds:.2f} s a step")

# %% [markdown]
# ## The same video under dense attention
#
# Same prompt, same noise. Training-free VMonarch on a model that was trained with dense attention
# gives another, somewhat worse video; the paper has 12.6 dB of PSNR between the two for the 1.3B
# model. More dense steps bring it nearer, tuning (below) makes up for the quality.

# %%
import numpy as np
from vmonarch_jax.models.demo.measure import likeness

dense_latents, dense_seconds = denoise(vm.Dense())
videos = {  # decoded at the end, because the autoencoder takes the transformer's place
    "VMonarch": np.asarray(pipeline.decode(latents))[0],
    "dense": np.asarray(pipeline.decode(dense_latents))[0],
}
psnr, ssim = likeness(videos["VMonarch"][None], videos["dense"][None])
print(f"dense: {dense_seconds:.2f} s a step")
print(f"VMonarch to dense: PSNR {psnr:.1f} dB, SSIM {ssim:.3f}")

# %%
import matplotlib.pyplot as plt
from IPython.display import Video, display
from vmonarch_jax.models.pictures import to_uint8
from vmonarch_jax.models.wan.generate.output import save_mp4


def show(name, shown):
    """Writes videos side by side to an MP4 file, plays it, and shows some frames of each."""
    path = pathlib.Path("out") / name
    settings = {"prompt": prompt, "seed": request.seed, "shown": list(shown)}
    save_mp4(path, np.concatenate(list(shown.values()), axis=2), config.fps, settings)
    display(Video(str(path), embed=True, html_attributes="controls loop autoplay muted"))
    frames = np.linspace(0, request.frames - 1, 4).round().astype(int)
    _, axes = plt.subplots(
        len(shown), 4, figsize=(10, 1.7 * len(shown)), squeeze=False, layout="constrained"
    )
    for line, (title, video) in zip(axes, shown.items(), strict=True):
        for axis, frame in zip(line, frames, strict=True):
            axis.imshow(to_uint8(video[frame]))
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(title)
    for axis, frame in zip(axes[0], frames, strict=True):
        axis.set_title(f"frame {frame + 1}")
    plt.show()


print("from left to right:", ", ".join(videos))
show("comparison.mp4", videos)

# %% [markdown]
# ## The certificate of each layer
#
# Where the divergence is small, attention is as good as dense; layers that stand out are the ones
# to keep dense: `AttentionSchedule(vm.VMonarch(), layers={0: vm.Dense()})`.

# %%
mean = [row["mean_kl"] for row in certificate]
largest = [row["max_kl"] for row in certificate]
assert len(mean) == layers
print(f"KL to dense on step {at + 1}: mean {np.mean(mean):.3f} nats, worst row {max(largest):.3f}")

figure, axis = plt.subplots(figsize=(7, 3.2), layout="constrained")
axis.semilogy(largest, "v", label="worst row")
axis.semilogy(mean, "o-", label="mean of the rows")
axis.set(xlabel="layer", ylabel="KL to dense attention (nats)", xticks=range(0, layers, 2))
axis.legend()
plt.show()

# %% [markdown]
# ## Tuning to VMonarch
#
# A LoRA on the self-attention, tuned under VMonarch by flow matching. The paper tunes for 800 to
# 1,500 steps on real videos; a few steps on three clips show the way and improve nothing. Your own
# clips: a folder with a caption beside each video (`fox.mp4`, `fox.txt`). Without one, slow pans
# over photographs take their place. Latents and texts are encoded once and kept; a tuning that was
# interrupted goes on where it was when the cell is run again.

# %%
import skimage.data
from PIL import Image
from vmonarch_jax.models.flow import FlowConfig
from vmonarch_jax.models.wan.conditions import fit_image
from vmonarch_jax.models.wan.finetune.cache import ClipCache, ClipSettings
from vmonarch_jax.models.wan.finetune.data import find_clips

CLIPS = pathlib.Path("clips")
(width, height), length = ((416, 240), 33) if real else ((48, 32), 5)
photographs = {"chelsea": "a cat in the sun", "coffee": "a cup of coffee", "rocket": "a rocket"}
if not CLIPS.is_dir():
    for name, caption in photographs.items():
        photograph = Image.fromarray(getattr(skimage.data, name)())
        picture = fit_image(photograph, (width + 2 * length, height))
        pan = np.stack([picture[:, 2 * n : 2 * n + width] for n in range(length)])
        save_mp4(CLIPS / f"{name}.mp4", pan / 127.5 - 1, config.fps, {"prompt": caption})
        (CLIPS / f"{name}.txt").write_text(caption)

pipeline.free()
clips = find_clips(CLIPS)
settings = ClipSettings(length, (width, height), config.fps)
cache = ClipCache(found, clips, settings, pathlib.Path("runs/cache"))
print(f"{len(clips)} clips of {length} frames of {width}x{height}:", [c.caption for c in clips])

# %%
from vmonarch_jax.models.step import TrainConfig
from vmonarch_jax.models.wan.finetune.adapters import LoRA
from vmonarch_jax.models.wan.finetune.prepare import Tuning
from vmonarch_jax.models.wan.finetune.tune import tune

run = pathlib.Path("runs/vmonarch")
training = TrainConfig(
    steps=100 if real else 2, batch_size=1, learning_rate=1e-4, warmup_steps=1,
    flow=FlowConfig(shift=config.shift),
)  # fmt: skip
tuning = Tuning(vm.VMonarch(), lora=LoRA(rank=16))
adapter = tune(run, cache, training, tuning)
print(f"{adapter}: {adapter.stat().st_size / 1e6:.1f} MB")
display(Image.open(run / "loss.png"))

# %% [markdown]
# ## With the LoRA
#
# The file is in the format of PEFT, which Diffusers reads, too. `conditions` and `noise` are those
# from above, so any difference is the LoRA's.

# %%
from vmonarch_jax.models.wan.pipeline import LoRAFile

pipeline = WanPipeline.open(found, lora=[LoRAFile(adapter)])
tuned_latents, _ = denoise(schedule)
videos["VMonarch, LoRA"] = np.asarray(pipeline.decode(tuned_latents))[0]
psnr, _ = likeness(videos["VMonarch, LoRA"][None], videos["VMonarch"][None])
print(f"the LoRA changed the video: PSNR {psnr:.1f} dB to the one without")
show("lora.mp4", videos)

# %% [markdown]
# The same from a shell, where runs can be interrupted and gone on with:
#
#     vmonarch generate --weights wan-1.3B --prompt "a red fox runs in snow" --seed 1 \
#         --dense-steps 10 --compare dense --out fox.mp4
#     vmonarch finetune --weights wan-1.3B --data clips --attention vmonarch --out runs/vmonarch
#     vmonarch generate --weights wan-1.3B --lora runs/vmonarch/lora.safetensors \
#         --prompt "a red fox runs in snow" --seed 1 --dense-steps 10 --out tuned.mp4
#
# `docs/wan.md` has the other models, meshes of several chips, memory and limits.
