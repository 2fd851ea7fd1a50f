"""Every method that names a UNet as a host runs from the command line, a picture in and a picture
out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from unet_folder import furnish, stylize

from styleattn import cli
from styleattn.methods import METHODS
from styleattn.pipelines.recipes import PARTS, RECIPES

torch.set_num_threads(1)
ON_UNETS = {name for name, method in METHODS.items() if "SD" in method.facts.hosts}
PROMPTS = ["--prompts", "{place}/prompts.txt"]
PICTURE = [*PROMPTS, "--reference", "{place}/{i}.png"]
RESTYLED = ["--content", "{place}/0.png", "--reference", "{place}/{i}.png"]
SHOWN = [*PICTURE, "--adapter", "{place}/ip.bin"]
CSGO = [*PICTURE, "--adapter", "{place}/csgo.bin"]
GIVEN = {
    "style_aligned": PICTURE,
    "visual_style_prompting": PICTURE,
    "reference_only": [*PICTURE, "--reference-weight", 40],
    "mutual_attention": [*PROMPTS, "--content", "{place}/{i}.png"],
    "style_id": RESTYLED,
    "z_star": [*RESTYLED, "--set", "steps=[0, 1]", "--set", "style_scale=4"],
    "cross_image_attention": [*RESTYLED, "--steps", 3],
    "ip_adapter": SHOWN,
    "instant_style": [*SHOWN, "--set", "style=6"],
    "instant_style_plus": [*RESTYLED, "--adapter", "{place}/ip.bin"],
    "rb_modulation": SHOWN,
    "csgo": CSGO,
    "style_studio": CSGO,
    "deadiff": [*PICTURE, "--adapter", "{place}/deadiff.ckpt"],
    "style_shot": [
        *PICTURE,
        *("--adapter", "{place}/shot.bin", "--image-encoder", "{place}/aware.bin"),
    ],
    "pulid_sdxl": [
        *PROMPTS,
        *("--adapter", "{place}/pulid.bin", "--set", "identity={place}/{face}.safetensors"),
    ],
}
"""What each is given: pictures of the furnished folder, and the files it needs."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return furnish(tmp_path_factory.mktemp("unet"))


def test_every_method_is_here():
    """Or is a part of one that is."""
    assert set(GIVEN) == set(RECIPES) == ON_UNETS - set(PARTS)
    assert set(PARTS.values()) <= set(RECIPES)


@pytest.mark.parametrize("method", GIVEN)
def test_another_picture_in_is_another_picture_out(place, tmp_path, method):
    found = []
    for i, face in enumerate(("face", "other")):
        names = {"place": place, "i": i, "face": face}
        given = [str(word).format(**names) for word in GIVEN[method]]
        found.append(stylize(place, tmp_path / str(i), method, *given))
    assert found[0].shape == (32, 32, 3) and np.ptp(found[0]) > 0
    assert (found[0] != found[1]).any()  # runs are deterministic: the picture is seen


REFUSED = {
    "csgo": ([*PICTURE], "--adapter is missing: csgo needs a style picture, a content picture"),
    "ip_adapter": (
        [*PICTURE, "--adapter", "{place}/csgo.bin"],
        "is not a base IP-Adapter for 16 layers",
    ),
    "redux": (PICTURE, "no recipe for 'redux' on UNets: it runs on FLUX; there it has style_al"),
    "cross_image_attention": ([*RESTYLED, "--steps", "2"], "at least three steps, got 2"),
    "z_star": ([*RESTYLED, "--features", "kept"], "z_star takes no --features on UNets"),
}


@pytest.mark.parametrize("method", REFUSED)
def test_what_cannot_be_done_is_said_before_anything_is_computed(place, tmp_path, capsys, method):
    given, why = REFUSED[method]
    given = [word.format(place=place, i=0) for word in given]
    argv = ["stylize", "--model", str(place / "model"), "--method", method, *given]
    assert cli.main([*argv, "--device", "cpu", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert why in said and "reference ━" not in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", PARTS)
def test_a_part_names_its_method(tmp_path, capsys, part):
    argv = ["stylize", "--model", "tiny-sdxl", "--method", part, "--out", str(tmp_path / "out")]
    assert cli.main(argv) == 2
    assert f"{part} is a part of {PARTS[part]}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
