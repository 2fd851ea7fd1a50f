"""InstantStyle-Plus from the command line: two pictures in, a picture out; against its formulas."""

from __future__ import annotations

import json

import checkpoints
import image_prompts as images
import pytest
import torch
from PIL import Image

from styleattn import cli
from styleattn.inversion import Trajectory
from styleattn.methods import InstantStylePlus
from styleattn.references import Reference

DEEP = {
    "block_out_channels": (8, 8, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (2, 2, 2),
    "transformer_layers_per_block": (1, 1, 1),
    "layers_per_block": 2,
}
"""SDXL's blocks, by their names."""


@pytest.fixture(scope="module")
def place(hosts, tmp_path_factory):
    """A model with an image encoder, a ControlNet, an adapter, CSD, and pictures."""
    folder = tmp_path_factory.mktemp("place")
    pipe = hosts.sdxl(**DEEP)
    pipe.register_modules(image_encoder=images.encoder(), feature_extractor=images.extractor())
    pipe.save_pretrained(folder / "model")
    hosts.controlnet(**DEEP).save_pretrained(folder / "tile")
    torch.save(images.checkpoint(pipe.unet), folder / "ip.bin")
    csd = checkpoints.noise(checkpoints.csd(64, 4, 26, 8))
    torch.save({"model_state_dict": {f"module.{k}": v for k, v in csd.items()}}, folder / "csd.pth")
    for i in (0, 1):
        images.picture(i, (32, 32)).save(folder / f"{i}.png")
    return folder


def stylize(place, out, *more):
    argv = ["stylize", "--model", str(place / "model"), "--method", "instant_style_plus"]
    argv += ["--content", str(place / "0.png"), "--reference", str(place / "1.png")]
    argv += ["--adapter", str(place / "ip.bin"), "--out", str(out), "--steps", "2"]
    return cli.main([*argv, "--device", "cpu", *more])


def made(out):
    (path,) = out.glob("0*.png")
    with Image.open(path) as picture:
        return picture.convert("RGB").tobytes()


def test_two_pictures_in_and_a_picture_out(place, tmp_path, hosts):
    """From the content's noise, under its caption, both images in their layers."""
    assert stylize(place, tmp_path, "--content-prompt", "a cat") == 0
    settings = json.loads((tmp_path / "manifest.json").read_text())["settings"]
    assert (
        settings["inversion"]["kind"] == "renoise" and settings["sampling"]["guidance_scale"] == 5
    )
    content = Trajectory.load(next(tmp_path.glob("content-*.safetensors")))
    pipe = hosts.sdxl(**DEEP)
    tower, pixels = images.encoder(), images.extractor()
    with torch.no_grad():
        seen = [
            tower(pixels(images=images.picture(i, (32, 32)), return_tensors="pt").pixel_values)
            for i in (0, 1)
        ]
    none, state = torch.zeros(images.WIDTH), images.checkpoint(pipe.unet)
    shown = [
        images.Shown(state, [[none], [seen[0].image_embeds[0]]], 0.2),
        images.Shown(
            state,
            [[none], [seen[1].image_embeds[0]]],
            1.2,
            layers={"up_blocks.0.attentions.1": 1.0},
        ),
    ]
    with images.written(pipe.unet, shown):
        (expected,) = pipe(
            "a cat", latents=content.latents[:1], num_inference_steps=2, guidance_scale=5.0
        ).images
    found = torch.frombuffer(bytearray(made(tmp_path)), dtype=torch.uint8).int()
    wanted = torch.frombuffer(bytearray(expected.convert("RGB").tobytes()), dtype=torch.uint8)
    assert (found - wanted.int()).abs().max() <= 1  # a rounding of the pixels


def test_a_tile_controlnet_and_csd(place, tmp_path):
    """Each changes the picture; a scale of 0 does not."""
    control = ("--controlnet", str(place / "tile"))
    csd = (f"csd={place / 'csd.pth'}", "style_guidance=300")
    assert stylize(place, tmp_path / "plain") == 0
    plain = made(tmp_path / "plain")
    assert stylize(place, tmp_path / "off", *control, "--control-scale", "0") == 0
    assert made(tmp_path / "off") == plain
    assert stylize(place, tmp_path / "tile", *control) == 0
    assert made(tmp_path / "tile") != plain
    nets = [
        json.loads((tmp_path / name / "manifest.json").read_text())["controlnet"]
        for name in ("plain", "off", "tile")
    ]
    assert nets[0] is None and nets[1] and nets[1] == nets[2]
    assert stylize(place, tmp_path / "csd", "--set", csd[0], "--set", csd[1]) == 0
    assert made(tmp_path / "csd") != plain


def test_what_is_refused_leaves_nothing(place, tmp_path, capsys):
    cases = {
        "need csd": ("--set", "style_guidance=1"),
        "a control scale needs a ControlNet": ("--control-scale", "0.5"),
        "--control-scale must be finite": ("--control-scale", "-1"),
        "no config.json": ("--controlnet", str(place)),
        "takes 1 reference pictures, got 2": ("--reference", str(place / "0.png")),
        "not a CSD": ("--set", f"csd={place / 'ip.bin'}", "--set", "style_guidance=1"),
    }
    for reason, more in cases.items():
        assert stylize(place, tmp_path / "out", *more) == 2
        assert reason in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_method():
    style = Reference(embeds=torch.ones(2))
    method = InstantStylePlus(references=(Reference(embeds=torch.ones(2)), style))
    assert [r.layers for r in method.references] == ["all", "style"]
    assert InstantStylePlus(references=Reference(layers="layout")).references[0].layers == "layout"
    assert not method.guided and InstantStylePlus(csd="x.pth", content_guidance=1.0).guided
    named = InstantStylePlus(csd="x.pth", style_guidance=2.0)
    assert InstantStylePlus.from_dict(named.to_dict()) == named
    with pytest.raises(ValueError, match="must be >= 0, got -1"):
        InstantStylePlus(style_guidance=-1.0, csd="x")
    with pytest.raises(ValueError, match="got 3 of them"):
        InstantStylePlus(references=(style,) * 3)
