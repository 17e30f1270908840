"""What Diffusers' pipelines make of the cases; needs torch."""

import json
import pathlib

import numpy as np
import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from PIL import Image
from transformers import (
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionModel,
    UMT5EncoderModel,
)
from wan_pipeline_cases import Case


def reference(folder: pathlib.Path, case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Latents and video of a case, channels last, by Diffusers on the same folder of weights."""
    pipe, request = _pipeline(folder, case), case.request
    width, height = request.size
    arguments = {
        "prompt": list(request.prompt),
        "negative_prompt": [request.negative_prompt] * len(request.prompt),
        "height": height,
        "width": width,
        "num_frames": request.frames,
        "num_inference_steps": request.steps,
        "guidance_scale": request.guidance,
        "guidance_scale_2": request.guidance_low,
        "latents": torch.from_numpy(case.noise()).permute(0, 4, 1, 2, 3),
        "return_dict": False,
    }
    if case.image:
        arguments["image"] = Image.fromarray(case.pixels())
    if case.last:
        arguments["last_image"] = Image.fromarray(case.last_pixels())
    with torch.no_grad():
        latents = pipe(**arguments, output_type="latent")[0]
        mean, std = (
            torch.tensor(values).view(1, -1, 1, 1, 1)
            for values in (pipe.vae.config.latents_mean, pipe.vae.config.latents_std)
        )
        video = pipe.vae.decode(latents * std + mean, return_dict=False)[0]
    return tuple(x.permute(0, 2, 3, 4, 1).contiguous().numpy() for x in (latents, video))


def _pipeline(folder, case):
    index = json.loads((folder / "model_index.json").read_text())
    parts = {
        "tokenizer": AutoTokenizer.from_pretrained(folder / "tokenizer"),
        "text_encoder": UMT5EncoderModel.from_pretrained(folder / "text_encoder"),
        "vae": AutoencoderKLWan.from_pretrained(folder / "vae"),
        "transformer": WanTransformer3DModel.from_pretrained(folder / "transformer"),
        "transformer_2": None,
        "scheduler": _scheduler(case.request),
        "boundary_ratio": index["boundary_ratio"],
        "expand_timesteps": index["expand_timesteps"],
    }
    if (folder / "transformer_2").is_dir():
        parts["transformer_2"] = WanTransformer3DModel.from_pretrained(folder / "transformer_2")
    if (folder / "image_encoder").is_dir():
        parts["image_encoder"] = CLIPVisionModel.from_pretrained(folder / "image_encoder")
        size = parts["image_encoder"].config.image_size
        parts["image_processor"] = CLIPImageProcessor(
            size={"shortest_edge": size}, crop_size={"height": size, "width": size}
        )
    pipe = (WanImageToVideoPipeline if case.image else WanPipeline)(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _scheduler(request):
    if request.sampler == "euler":
        return FlowMatchEulerDiscreteScheduler(shift=request.shift)
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=request.shift
    )
