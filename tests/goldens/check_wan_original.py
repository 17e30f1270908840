"""Holds the goldens that Diffusers made against the code of Wan's own repositories.

Run with torch and this project installed, on clones of Wan-Video/Wan2.1 and Wan-Video/Wan2.2:
`PYTHONPATH=tests python tests/goldens/check_wan_original.py WAN21 WAN22`. Weights get the original
keys by our tables, so this is also a check of these. No GPU is needed: the repositories' attention
kernel is the only part that is not theirs.
"""

import importlib
import pathlib
import sys
import types

import numpy as np
import torch
import wan_encoder_cases as encoder
import wan_transformer_cases as transformer
import wan_vae_cases as vae
from vmonarch_jax.models.wan.keys_clip import clip_entries
from vmonarch_jax.models.wan.keys_text import text_entries
from vmonarch_jax.models.wan.keys_transformer import transformer_entries
from vmonarch_jax.models.wan.keys_vae import vae_entries

GOLDENS = pathlib.Path(__file__).parent / "wan"
# What the encoders' files import for what is not looked at here: tokenizers, CLIP's text half.
UNUSED = {
    "torchvision": (), "torchvision.transforms": (),
    "wan.modules.tokenizers": ("HuggingfaceTokenizer",),
    "wan.modules.xlm_roberta": ("XLMRoberta",),
}  # fmt: skip


def module(clone, name):
    """A file of `wan/modules` without the package's own beginning, which loads everything."""
    for known in [known for known in sys.modules if known.split(".")[0] == "wan"]:
        del sys.modules[known]
    for package, folder in (("wan", "wan"), ("wan.modules", "wan/modules")):
        sys.modules[package] = types.ModuleType(package)
        sys.modules[package].__path__ = [str(pathlib.Path(clone) / folder)]
    for unused, names in UNUSED.items() if name in ("t5", "clip") else ():
        sys.modules[unused] = types.ModuleType(unused)
        for one in names:
            setattr(sys.modules[unused], one, torch.nn.Module)
    torch.cuda.current_device = lambda: 0  # a default argument asks for it
    return importlib.import_module(f"wan.modules.{name}")


def attend(q, k, v, q_lens=None, k_lens=None, **_):
    """Plain attention of each sample on its own keys, `[batch, tokens, heads, dim]`."""
    rows = []
    for n, row in enumerate(q):
        keys = slice(None if k_lens is None else int(k_lens[n]))
        arrays = (x.transpose(0, 1) for x in (row, k[n, keys], v[n, keys]))
        rows.append(torch.nn.functional.scaled_dot_product_attention(*arrays).transpose(0, 1))
    return torch.stack(rows)


def original_state(entries, weights):
    """Weights by Diffusers' keys as the original repository stores them, some of them in one."""
    state = {}
    for entry in entries:
        for ours, theirs in zip(entry.keys("diffusers"), entry.keys("original"), strict=True):
            value = entry.theirs(entry.ours(weights[ours]), "original")
            state.setdefault(theirs, []).append(torch.from_numpy(np.array(value)))
    return {key: torch.cat(pieces) if pieces[1:] else pieces[0] for key, pieces in state.items()}


def channels_first(x):
    """Of a batch of videos."""
    return torch.from_numpy(np.moveaxis(x, -1, 1).copy())


def transformer_output(clones, case):
    """What the original transformer makes of a case."""
    config, inputs = case.config, transformer.inputs_of(case)
    model = module(clones[case.times != "batch"], "model")
    model.flash_attention = attend
    kind = "t2v"
    if config.image_dim:
        kind = "flf2v" if config.image_positions else "i2v"
        made = model.MLPProj
        model.MLPProj = lambda _, dim, **options: made(config.image_dim, dim, **options)
    net = model.WanModel(
        model_type=kind, patch_size=config.patch, text_len=config.text_length,
        in_dim=config.in_channels, dim=config.dim, ffn_dim=config.ffn_dim,
        freq_dim=config.freq_dim, text_dim=config.text_dim, out_dim=config.out_channels,
        num_heads=config.heads, num_layers=config.layers,
    )  # fmt: skip
    options = {}
    if config.image_positions:  # their size is written out in the original
        shape = 1, config.image_positions, config.image_dim
        net.img_emb.emb_pos = torch.nn.Parameter(torch.zeros(shape))
        options["clip_fea"] = inputs["image"].reshape(-1, case.image // 2, config.image_dim)
    elif config.image_dim:
        options["clip_fea"] = inputs["image"]
    options = {name: torch.from_numpy(value) for name, value in options.items()}
    weights = transformer.stored_weights(config)
    net.load_state_dict(original_state(transformer_entries(config), weights), strict=True)
    latents = channels_first(inputs["latents"])
    if config.image_dim:  # these insist on a second list of channels
        latents, options["y"] = latents[:, :3], list(latents[:, 3:])
    texts = [text[:n] for text, n in zip(torch.from_numpy(inputs["text"]), case.texts, strict=True)]
    out = net.eval()(
        list(latents), t=torch.from_numpy(inputs["time"]), context=texts,
        seq_len=case.grid.tokens, **options,
    )  # fmt: skip
    return np.moveaxis(torch.stack(out).numpy(), 1, -1)


def vae_outputs(clones, case):
    """Latents and video that the original autoencoder makes of a case."""
    config, (video, latents) = case.config, vae.inputs_of(case)
    name, more = ("vae2_2", {"dec_dim": config.decoder_dim}) if config.residual else ("vae", {})
    net = module(clones[config.residual], name).WanVAE_(
        dim=config.dim, z_dim=config.latent_channels, dim_mult=list(config.multipliers),
        num_res_blocks=config.blocks, temperal_downsample=list(config.halve_time), **more,
    )  # fmt: skip
    state = original_state(vae_entries(config), vae.stored_weights(config))
    net.load_state_dict(state, strict=True)
    scale = [torch.tensor(config.mean), 1 / torch.tensor(config.std)]
    net.eval()
    made = net.encode(channels_first(video), scale)
    video = net.decode(channels_first(latents), scale).clamp(-1, 1)  # as the class around it does
    return [np.moveaxis(x.numpy(), 1, -1) for x in (made, video)]


def text_states(clones, config, tokens, mask):
    """What the original text encoder makes of some tokens, where these are no padding."""
    net = module(clones[0], "t5").T5Encoder(
        config.vocabulary, config.dim, config.heads * config.head_dim, config.ffn_dim,
        config.heads, config.layers, config.buckets, shared_pos=False,
    )  # fmt: skip
    entries = text_entries(config)
    net.load_state_dict(original_state(entries, encoder.stored_weights(entries)), strict=True)
    for block in net.blocks:
        block.pos_embedding.max_dist = config.max_distance
    return net.eval()(torch.from_numpy(tokens), torch.from_numpy(mask)).numpy()


def image_states(clones, config):
    """What the original image encoder makes of the inputs of a case."""
    clip = module(clones[0], "clip")
    clip.flash_attention = attend
    net = clip.VisionTransformer(
        config.size, config.patch, config.dim, (config.ffn_dim + 0.5) / config.dim, 8,
        config.heads, config.layers, activation=config.activation, norm_eps=config.eps,
    )  # fmt: skip
    entries = clip_entries(config)
    state = original_state(entries, encoder.stored_weights(entries))
    state = {key.removeprefix("visual."): value for key, value in state.items()}
    missing, unexpected = net.load_state_dict(state, strict=False)
    unused = "head", "post_norm.", f"transformer.{config.layers - 1}."
    if unexpected or not all(key.startswith(unused) for key in missing):
        raise ValueError(f"expected the original's keys, got {unexpected}, without {missing}")
    return net.eval()(channels_first(encoder.image_inputs(config)), use_31_block=True).numpy()


@torch.no_grad()
def main():
    """Prints the relative error of each case; raises if one is above 1e-5."""
    clones = [pathlib.Path(clone) for clone in sys.argv[1:]]
    errors, stored = {}, np.load(GOLDENS / "transformer.npz")
    for name, case in transformer.CASES.items():
        got = transformer_output(clones, case)
        errors[f"transformer, {name}"] = transformer.relative_error(got, stored[name])
    stored = np.load(GOLDENS / "vae.npz")
    for name, case in vae.CASES.items():
        if case.config.residual or case.config.dim == case.config.decoder_dim:  # else it has none
            for what, got in zip(("latents", "video"), vae_outputs(clones, case), strict=True):
                errors[f"autoencoder, {name}, {what}"] = vae.relative_error(
                    got, stored[f"{name}.{what}"]
                )
    stored = np.load(GOLDENS / "text.npz")
    for name, config in encoder.TEXTS.items():
        tokens, mask = encoder.text_inputs(name)
        got, real = text_states(clones, config, tokens, mask), mask.astype(bool)
        errors[f"text encoder, {name}"] = encoder.relative_error(got[real], stored[name][real])
    stored = np.load(GOLDENS / "clip.npz")
    for name, config in encoder.IMAGES.items():
        got = image_states(clones, config)
        errors[f"image encoder, {name}"] = encoder.relative_error(got, stored[name])
    for name, error in errors.items():
        print(f"{name}: relative error {error:.1e}")
    if max(errors.values()) > 1e-5:
        raise ValueError("expected errors of at most 1e-5 from the original code")


if __name__ == "__main__":
    main()
