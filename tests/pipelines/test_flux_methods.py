"""Every method that names FLUX.1 as a host runs from the command line, a picture in and pictures
out, and under a LoRA."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flux_folder import furnish, loaded, opened, other, stylize

from styleattn.methods import METHODS
from styleattn.pipelines.recipes import FLUX_RECIPES

torch.set_num_threads(1)
ON_FLUX = [name for name, method in METHODS.items() if "FLUX" in method.facts.hosts]
PICTURE = ["--reference", "{place}/a.png"]
SHOWN = [*PICTURE, "--adapter", "{place}/xlabs.safetensors", "--image-encoder", "{place}/clip"]
CONTENT = ["--content", "{place}/b.png", *PICTURE]
GIVEN = {
    "style_aligned": PICTURE,
    "aligned_gen": PICTURE,
    "visual_style_prompting": PICTURE,
    "reference_only": PICTURE,
    "style_id": CONTENT,
    "in_context": [*PICTURE, "--set", "strength=4"],
    "omini_control": [*PICTURE, "--set", "strength=4"],
    "easy_control": [*PICTURE, "--set", "strength=4"],
    "redux": [
        *PICTURE,
        "--adapter",
        "{place}/redux.safetensors",
        "--image-encoder",
        "{place}/siglip",
    ],
    "uso": [
        *PICTURE,
        "--adapter",
        "{place}/uso.safetensors",
        "--image-encoder",
        "{place}/siglip-deep",
    ],
    "ip_adapter": [*SHOWN, "--set", "scale=3"],
    "instant_style": [*SHOWN, "--set", 'blocks={"transformer_blocks.0": 3.0}'],
    "pulid_flux": [
        "--adapter",
        "{place}/pulid.safetensors",
        "--set",
        "identity={place}/ann.safetensors",
        "--set",
        "id_weight=3",
    ],
    "fill_diptych": [
        *CONTENT,
        "--model",
        "{place}/fill",
        "--set",
        "b_to_a=4",
    ],  # the last one counts
}
"""What each is given: pictures of the furnished folder, and the files it needs."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return furnish(tmp_path_factory.mktemp("flux"))


@pytest.fixture(scope="module")
def plain(place):
    """What the models draw without a method, from the same noise."""
    generators = [torch.Generator().manual_seed(s) for s in (0, 1)]
    size = {"height": 16, "width": 16, "num_inference_steps": 2}
    prompts = (place / "prompts.txt").read_text().splitlines()
    return opened(loaded(place)(prompts, generator=generators, **size).images)


def test_every_method_is_here():
    assert set(GIVEN) == set(ON_FLUX) == set(FLUX_RECIPES)


@pytest.mark.parametrize("name", ON_FLUX)
def test_from_the_command_line_and_with_a_lora(place, plain, tmp_path, name):
    more = [word.replace("{place}", str(place)) for word in GIVEN[name]]
    found = stylize(place, tmp_path / "a", name, *more)
    assert found.shape == plain.shape and np.isfinite(found).all()
    assert other(found, plain)
    lora = ["--lora", f"{place}/lora.safetensors:0.7"]
    tuned = stylize(place, tmp_path / "b", name, *more, *lora)
    assert other(tuned, found)
    again = stylize(place, tmp_path / "c", name, *more, "--lora", f"{place}/lora.safetensors:0")
    assert np.abs(again - found).max() <= 1
