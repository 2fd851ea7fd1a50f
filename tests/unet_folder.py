"""A folder with all that the methods of UNets may ask for, and the command line that reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import checkpoints
import image_prompts as images
import numpy as np
import random_pipelines as tiny
import torch
from PIL import Image

from styleattn import cli
from styleattn.adapters import save_identity

LEVELS = {
    "block_out_channels": (8, 8, 16, 16),
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
    "layers_per_block": 2,
    "attention_head_dim": 2,
    "transformer_layers_per_block": 1,
}
"""The blocks of SD 1.5, by their names."""


def layers_of(unet: Any) -> list[tuple[str, int, int]]:
    cross = unet.config.cross_attention_dim
    return [(n, unet.get_submodule(n).inner_dim, cross) for n in images.cross_layers(unet)]


def deadiff(unet: Any) -> dict[str, Any]:
    shapes = checkpoints.deadiff(64, images.HIDDEN, 16, 24)
    inner = {name: width for name, width, _ in layers_of(unet)}
    for theirs, path in checkpoints.LDM_BLOCKS.items():
        stem = f"model.diffusion_model.{theirs}.transformer_blocks.0.attn2.i_to_"
        width = inner[f"{path}.transformer_blocks.0.attn2"]
        shapes |= {f"{stem}{x}.weight": (width, 64) for x in "kv"}
    return {"state_dict": checkpoints.noise(shapes)}


def furnish(folder: Path) -> Path:
    """A model with an image encoder, a ControlNet, adapters, an identity, pictures and prompts."""
    pipe = tiny.sdxl(**LEVELS)
    pipe.register_modules(image_encoder=images.encoder(), feature_extractor=images.extractor())
    pipe.save_pretrained(folder / "model")
    csgo = checkpoints.csgo(layers_of(pipe.unet), images.HIDDEN, 64, (4, 8))
    torch.save(checkpoints.noise(csgo), folder / "csgo.bin")
    torch.save(images.checkpoint(pipe.unet), folder / "ip.bin")
    torch.save(deadiff(pipe.unet), folder / "deadiff.ckpt")
    shot = checkpoints.styleshot(layers_of(pipe.unet), 12)
    torch.save(checkpoints.noise(shot), folder / "shot.bin")
    torch.save(checkpoints.noise(checkpoints.style_aware((4, 4, 80), 12)), folder / "aware.bin")
    pulid = {**checkpoints.pulid_v1(6, 5, 4, 64), **checkpoints.pulid_pairs(layers_of(pipe.unet))}
    torch.save(checkpoints.noise(pulid), folder / "pulid.bin")
    g = torch.Generator().manual_seed(8)
    for name in ("face", "other"):
        face, *vision = torch.randn(1, 6, generator=g), *torch.randn(5, 1, 577, 5, generator=g)
        save_identity(folder / f"{name}.safetensors", face, vision)
    tiny.controlnet(**LEVELS).save_pretrained(folder / "tile")
    for i in (0, 1):
        images.picture(i).save(folder / f"{i}.png")
    (folder / "prompts.txt").write_text("a cat\n")
    return folder


def stylize(place: Path, out: Path, method: str, *more: Any) -> Any:
    """The only picture [h, w, 3] of a run."""
    argv = ["stylize", "--model", place / "model", "--method", method, "--out", out]
    assert cli.main([*map(str, [*argv, "--steps", 2, "--device", "cpu", *more])]) == 0
    (path,) = out.glob("0*.png")
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"), float)
