"""`styleattn stylize` with CSGO, DEADiff, StyleStudio, RB-Modulation, StyleShot and PuLID: files
in, pictures out."""

from __future__ import annotations

from dataclasses import replace

import checkpoints
import image_prompts as images
import numpy as np
import pytest
import random_pipelines as tiny
import torch
from PIL import Image

from styleattn import cli
from styleattn.adapters import (
    load_style_aware_encoder,
    read_identity,
    save_identity,
    style_patches,
)
from styleattn.methods import (
    CSGO,
    METHODS,
    PuLIDSDXL,
    StyleShot,
    StyleStudio,
    StyleStudioTeacher,
)
from styleattn.pipelines import RECIPES, Sampling, csgo_pictures, generate, load_model
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
    shot = checkpoints.styleshot(layers_of(pipe.unet), 12)
    torch.save(checkpoints.noise(shot), folder / "shot.bin")
    torch.save(checkpoints.noise(checkpoints.style_aware((4, 4, 80), 12)), folder / "aware.bin")
    pulid = {**checkpoints.pulid_v1(6, 5, 4, 64), **checkpoints.pulid_pairs(layers_of(pipe.unet))}
    torch.save(checkpoints.noise(pulid), folder / "pulid.bin")
    g = torch.Generator().manual_seed(8)
    face, *vision = torch.randn(1, 6, generator=g), *torch.randn(5, 1, 577, 5, generator=g)
    save_identity(folder / "face.safetensors", face, vision)
    tiny.controlnet(**LEVELS).save_pretrained(folder / "tile")
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


def test_style_studio_next_to_its_teacher(place, tmp_path):
    """The first of two rows has no style; the picture is the second."""
    found = stylize(place, tmp_path / "a", "style_studio", "csgo.bin", "--seed", "3")
    pipe = load_model(str(place / "model"), device="cpu")
    shown = (Reference(image=place / "0.png", prompts=(1,)),)
    methods = StyleStudio(adapter=place / "csgo.bin", references=shown), StyleStudioTeacher()
    sampling = Sampling(num_inference_steps=2, guidance_scale=7.0)
    with apply(pipe, *methods):
        _, picture = generate(pipe, ["a cat"] * 2, [3, 3], sampling)
    assert picture.convert("RGB").tobytes() == found
    with apply(pipe, methods[0]):
        _, alone = generate(pipe, ["a cat"] * 2, [3, 3], sampling)
    assert alone.convert("RGB").tobytes() != found


def test_every_method_of_unets_has_a_recipe():
    """StyleStudio's teacher is part of StyleStudio's."""
    unets = {name for name, method in METHODS.items() if "SD" in method.facts.hosts}
    assert unets - set(RECIPES) == {"style_studio_teacher"} and set(RECIPES) <= unets


def test_csgo_with_a_controlnet(place, tmp_path):
    """The content reaches the picture through it, as in Python."""
    more = ("--controlnet", str(place / "tile"), "--control-scale", "0.5")
    found = stylize(place, tmp_path / "a", "csgo", "csgo.bin", *more, pictures=(1, 0))
    pipe = load_model(str(place / "model"), device="cpu", controlnet=str(place / "tile"))
    assert type(pipe).__name__ == "StableDiffusionXLControlNetPipeline"
    (picture,) = csgo_pictures(
        pipe,
        CSGO(adapter=place / "csgo.bin"),
        place / "0.png",
        ["a cat"],
        [0],
        Sampling(num_inference_steps=2, guidance_scale=10.0),
        content=place / "1.png",
        controlnet_conditioning_scale=0.5,
    )
    assert picture.convert("RGB").tobytes() == found


def drawn(place, method):
    pipe = load_model(str(place / "model"), device="cpu")
    with apply(pipe, method):
        sampling = Sampling(num_inference_steps=2, guidance_scale=7.0)
        (picture,) = generate(pipe, ["a cat"], [0], sampling)
    return picture.convert("RGB").tobytes()


def test_styleshot_from_a_picture(place, tmp_path):
    """Its encoder is a file of its own; what it sees is what the adapter is shown."""
    encoder = ("--image-encoder", str(place / "aware.bin"), "--guidance", "7")
    found = stylize(place, tmp_path / "a", "style_shot", "shot.bin", *encoder)
    pixels = torch.from_numpy(np.array(images.picture(0))).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        seen = load_style_aware_encoder(place / "aware.bin")(style_patches(pixels))[0]
    given = StyleShot(adapter=place / "shot.bin", references=Reference(embeds=seen))
    assert drawn(place, given) == found
    assert drawn(place, replace(given, scale=0.1)) != found


def test_pulid_from_an_identity(place, tmp_path, capsys):
    """A face comes as a file, or through an analyser; without either it is refused."""
    named = ("--set", f"identity={place / 'face.safetensors'}")
    found = stylize(place, tmp_path / "a", "pulid_sdxl", "pulid.bin", *named, pictures=())
    face, vision = read_identity(place / "face.safetensors")
    shown = []

    def faces(picture):
        shown.append(picture.shape)
        return face, vision

    method = PuLIDSDXL(adapter=place / "pulid.bin", references=Reference(image=place / "0.png"))
    assert drawn(place, replace(method, faces=faces)) == found and shown == [(36, 48, 3)]
    with pytest.raises(ValueError, match="needs `faces`"):
        drawn(place, method)
    with pytest.raises(ValueError, match="identity must be a file"):
        PuLIDSDXL(identity=3)
    argv = ["stylize", "--model", str(place / "model"), "--method", "pulid_sdxl", "--device", "cpu"]
    argv += ["--adapter", str(place / "pulid.bin"), "--prompts", str(place / "prompts.txt")]
    assert cli.main([*argv, "--out", str(tmp_path / "b")]) == 2
    assert "references to show it" in capsys.readouterr().err and not (tmp_path / "b").exists()
