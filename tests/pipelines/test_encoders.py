"""`styleattn stylize` with CSGO, DEADiff, StyleStudio and RB-Modulation: files in, pictures out."""

from __future__ import annotations

import checkpoints
import image_prompts as images
import pytest
import random_pipelines as tiny
import torch
from PIL import Image

from styleattn import cli
from styleattn.methods import CSGO
from styleattn.pipelines import Sampling, generate, load_model
from styleattn.processors import apply
from styleattn.references import Reference

LEVELS = {
    "block_out_channels": (8, 8, 16, 16),
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
    "layers_per_block": 2,
    "attention_head_dim": 2,
    "transformer_layers_per_block": 1,
}


def layers_of(unet):
    cross = unet.config.cross_attention_dim
    return [(n, unet.get_submodule(n).inner_dim, cross) for n in images.cross_layers(unet)]


def deadiff(unet):
    shapes = checkpoints.deadiff(64, images.HIDDEN, 16, 24)
    inner = {name: width for name, width, _ in layers_of(unet)}
    for theirs, path in checkpoints.LDM_BLOCKS.items():
        stem = f"model.diffusion_model.{theirs}.transformer_blocks.0.attn2.i_to_"
        width = inner[f"{path}.transformer_blocks.0.attn2"]
        shapes |= {f"{stem}{x}.weight": (width, 64) for x in "kv"}
    return {"state_dict": checkpoints.noise(shapes)}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model with the blocks of SD 1.5 and an image encoder, files of adapters, and pictures."""
    folder = tmp_path_factory.mktemp("place")
    pipe = tiny.sdxl(**LEVELS)
    pipe.register_modules(image_encoder=images.encoder(), feature_extractor=images.extractor())
    pipe.save_pretrained(folder / "model")
    csgo = checkpoints.csgo(layers_of(pipe.unet), images.HIDDEN, 64, (4, 8))
    torch.save(checkpoints.noise(csgo), folder / "csgo.bin")
    torch.save(images.checkpoint(pipe.unet), folder / "ip.bin")
    torch.save(deadiff(pipe.unet), folder / "deadiff.ckpt")
    for i in (0, 1):
        images.picture(i).save(folder / f"{i}.png")
    (folder / "prompts.txt").write_text("a cat\n")
    return folder


def stylize(place, out, method, file, *more, pictures=(0,)):
    argv = ["stylize", "--model", str(place / "model"), "--method", method]
    argv += [x for i in pictures for x in ("--reference", str(place / f"{i}.png"))]
    argv += ["--adapter", str(place / file), "--prompts", str(place / "prompts.txt")]
    argv += ["--out", str(out), "--steps", "2", "--device", "cpu", *more]
    assert cli.main(argv) == 0
    (path,) = out.glob("0*.png")
    with Image.open(path) as picture:
        return picture.convert("RGB").tobytes()


CASES = {
    "csgo": ("csgo.bin", "style_scale=0.1"),
    "style_studio": ("csgo.bin", "scale=0.1"),
    "rb_modulation": ("ip.bin", "scale=0.1"),
    "deadiff": ("deadiff.ckpt", "img_weight=0.1"),
}
"""The file, and another strength."""


@pytest.mark.slow
@pytest.mark.parametrize("method", CASES)
def test_a_picture_in_and_a_picture_out(place, tmp_path, method):
    """Another strength makes another one."""
    file, knob = CASES[method]
    found = stylize(place, tmp_path / "a", method, file)
    assert found != stylize(place, tmp_path / "b", method, file, "--set", knob)


def test_it_is_what_python_gives(place, tmp_path):
    found = stylize(place, tmp_path / "a", "csgo", "csgo.bin", pictures=(1, 0))
    pipe = load_model(str(place / "model"), device="cpu")
    references = tuple(Reference(image=place / f"{i}.png") for i in (1, 0))
    method = CSGO(adapter=place / "csgo.bin", references=references)
    sampling = Sampling(num_inference_steps=2, guidance_scale=10.0)
    with apply(pipe, method):
        (picture,) = generate(pipe, ["a cat"], [0], sampling)
    assert picture.convert("RGB").tobytes() == found
