"""Weights that change from module to module, over whole runs against the formula written out."""

from __future__ import annotations

import image_prompts as images
import pytest
from image_prompts import Shown, embeds, written

from styleattn.adapters import ip_adapter_from
from styleattn.methods import IPAdapter
from styleattn.processors import apply
from styleattn.references import Reference

MODULES = [
    *(f"down_blocks.{b}.attentions.{a}" for b in (1, 2) for a in (0, 1)),
    "mid_block.attentions.0",
    *(f"up_blocks.{b}.attentions.{a}" for b in (0, 1) for a in (0, 1, 2)),
]
"""SDXL's, as they are run: the files count the middle last."""
PARTS = [0] * 4 + [1] + [2] * 6


def far(t):
    """From the middle of the eleven."""
    return abs(t - 5.5) / 5.5


WEIGHTS = {
    "ease in": lambda t: 0.05 + 0.95 * (1 - t / 11),
    "ease out": lambda t: 0.05 + 0.95 * t / 11,
    "ease in-out": lambda t: 0.05 + 0.95 * (1 - far(t)),
    "reverse in-out": lambda t: 0.05 + 0.95 * far(t),
    "weak input": lambda t: (0.2, 1, 1)[PARTS[t]],
    "weak middle": lambda t: (1, 0.2, 1)[PARTS[t]],
    "weak output": lambda t: (1, 1, 0.2)[PARTS[t]],
    "strong middle": lambda t: (0.2, 1, 0.2)[PARTS[t]],
    "style transfer": lambda t: t == 6,
    "composition": lambda t: t == 3,
    "strong style transfer": lambda t: t != 3,
    "style and composition": lambda t: t in (3, 6),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_whole_unet(sdxl3, run, distance, name):
    state, e = images.checkpoint(sdxl3.unet), embeds(0)
    cross = sdxl3.unet.config.cross_attention_dim
    names = images.cross_layers(sdxl3.unet)
    layers = [(n, sdxl3.unet.get_submodule(n).inner_dim, cross) for n in names]
    adapter = ip_adapter_from(images.flat(state), layers)
    with apply(sdxl3, IPAdapter(0.8, adapter, layers=name, references=Reference(embeds=e))):
        ours = run(sdxl3, ["a cat"])
    weights = {module: float(WEIGHTS[name](t)) for t, module in enumerate(MODULES)}
    with written(sdxl3.unet, [Shown(state, [[0 * e], [e]], 0.8, layers=weights)]):
        assert distance(ours, run(sdxl3, ["a cat"])) <= 1e-5
