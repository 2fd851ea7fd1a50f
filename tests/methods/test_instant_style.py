"""InstantStyle's knobs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from styleattn.methods import METHODS, InstantStyle
from styleattn.references import Reference


@pytest.mark.parametrize(
    ("knobs", "reason"),
    [
        ({"style": "1"}, "style must be a number"),
        ({"layout": -0.5}, "style and layout must be >= 0"),
        ({"negative_content_scale": float("inf")}, "negative_content_scale must be finite"),
        ({"negative_content": "a bunny"}, "negative_content needs an adapter"),
        ({"negative_content": " ", "adapter": "a.bin"}, "empty prompt"),
        ({"negative_content": torch.zeros(2, 3), "adapter": "a.bin"}, r"must be \[width\]"),
    ],
)
def test_knobs_without_meaning(knobs, reason):
    with pytest.raises(ValueError, match=f"InstantStyle: .*{reason}"):
        InstantStyle(**knobs)


def test_settings():
    """Prompts and files survive YAML; pictures and tensors do not."""
    method = InstantStyle(
        0.8,
        0.2,
        "models/ip.safetensors",
        negative_content="a bunny",
        references=Reference(weight=0.5),
        text_encoder=Path("models/text"),
    )
    again = InstantStyle.from_yaml(method.to_yaml())
    assert again.to_dict() == method.to_dict()
    assert (again.negative_content, again.text_encoder) == ("a bunny", "models/text")
    assert METHODS["instant_style"] is InstantStyle
    tensor = InstantStyle(adapter="a.bin", negative_content=torch.zeros(3))
    assert tensor.to_dict()["negative_content"] is None
    assert tensor.layers == {"style": 1.0, "layout": 0.0}


def test_blocks_stand_in_place_of_the_presets():
    for blocks in ([0.5, 1.0], {"transformer_blocks.3": 2.0}, "all"):
        method = InstantStyle(blocks=blocks)
        assert method.layers == blocks
        assert InstantStyle.from_yaml(method.to_yaml()).layers == blocks
    with pytest.raises(ValueError, match="give one or the other"):
        InstantStyle(layout=0.5, blocks="all")
