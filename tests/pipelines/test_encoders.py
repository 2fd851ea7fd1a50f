"""`styleattn stylize` with CSGO, DEADiff, StyleStudio, RB-Modulation, StyleShot and PuLID: files
in, pictures out."""

from __future__ import annotations

from dataclasses import replace

import image_prompts as images
import numpy as np
import pytest
import torch
import unet_folder

from styleattn import cli
from styleattn.adapters import (
    load_style_aware_encoder,
    read_identity,
    style_patches,
)
from styleattn.methods import (
    CSGO,
    PuLIDSDXL,
    StyleShot,
    StyleStudio,
    StyleStudioTeacher,
)
from styleattn.pipelines import Sampling, csgo_pictures, generate, load_model
from styleattn.processors import apply
from styleattn.references import Reference


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model with the blocks of SD 1.5 and an image encoder, files of adapters, and pictures."""
    return unet_folder.furnish(tmp_path_factory.mktemp("place"))


def stylize(place, out, method, file, *more, pictures=(0,)):
    given = [x for i in pictures for x in ("--reference", place / f"{i}.png")]
    given += ["--adapter", place / file, "--prompts", place / "prompts.txt", *more]
    return unet_folder.stylize(place, out, method, *given).astype("uint8").tobytes()


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
