"""IP-Adapter's knobs and weight types, against the tables typed out."""

from __future__ import annotations

import checkpoints
import pytest
import torch

from styleattn.methods import IPAdapter
from styleattn.methods.weight_types import WEIGHT_TYPES, weight_type
from styleattn.processors._layers import layer_weights
from styleattn.references import Reference

XL = [
    *(f"down_blocks.{b}.attentions.{a}" for b in (1, 2) for a in (0, 1)),
    "mid_block.attentions.0",
    *(f"up_blocks.{b}.attentions.{a}" for b in (0, 1) for a in (0, 1, 2)),
]
V1 = [
    *(f"down_blocks.{b}.attentions.{a}" for b in (0, 1, 2) for a in (0, 1)),
    "mid_block.attentions.0",
    *(f"up_blocks.{b}.attentions.{a}" for b in (1, 2, 3) for a in (0, 1, 2)),
]
# weight at every module in the order of execution, to four digits
TABLES = {
    ("sdxl", "linear"): [1] * 11,
    ("sdxl", "ease in"): [
        1,
        0.9136,
        0.8273,
        0.7409,
        0.6545,
        0.5682,
        0.4818,
        0.3955,
        0.3091,
        0.2227,
        0.1364,
    ],
    ("sdxl", "ease out"): [
        0.05,
        0.1364,
        0.2227,
        0.3091,
        0.3955,
        0.4818,
        0.5682,
        0.6545,
        0.7409,
        0.8273,
        0.9136,
    ],
    ("sdxl", "ease in-out"): [
        0.05,
        0.2227,
        0.3955,
        0.5682,
        0.7409,
        0.9136,
        0.9136,
        0.7409,
        0.5682,
        0.3955,
        0.2227,
    ],
    ("sdxl", "reverse in-out"): [
        1,
        0.8273,
        0.6545,
        0.4818,
        0.3091,
        0.1364,
        0.1364,
        0.3091,
        0.4818,
        0.6545,
        0.8273,
    ],
    ("sdxl", "weak input"): [0.2] * 4 + [1] * 7,
    ("sdxl", "weak middle"): [1] * 4 + [0.2] + [1] * 6,
    ("sdxl", "weak output"): [1] * 5 + [0.2] * 6,
    ("sdxl", "strong middle"): [0.2] * 4 + [1] + [0.2] * 6,
    ("sdxl", "style transfer"): [0] * 6 + [1] + [0] * 4,
    ("sdxl", "composition"): [0] * 3 + [1] + [0] * 7,
    ("sdxl", "strong style transfer"): [1] * 3 + [0] + [1] * 7,
    ("sdxl", "style and composition"): [0] * 3 + [1, 0, 0, 1] + [0] * 4,
    ("sdxl", "style transfer precise"): [0] * 3 + [1, 0, 0, 1] + [0] * 4,
    ("sdxl", "composition precise"): [0.1] * 3 + [1, 0.1, 0.1, 1] + [0.1] * 4,
    ("sd15", "style transfer"): [1] * 4 + [0] * 5 + [1] * 7,
    ("sd15", "composition"): [0] * 4 + [0.25, 1] + [0] * 10,
    ("sd15", "strong style transfer"): [1] * 4 + [0, 0] + [1] * 10,
    ("sd15", "style and composition"): [1] * 4 + [0.25, 1] + [0] * 3 + [1] * 7,
    ("sd15", "composition precise"): [1] * 4 + [0.25, 1] + [0.1] * 3 + [1] * 7,
    ("sd15", "weak input"): [0.2] * 6 + [1] * 10,
}


@pytest.mark.parametrize(("family", "name"), TABLES)
def test_weight_types(family, name):
    """Every layer of the real models; as a choice of layers too."""
    layers = [layer for layer, _, _ in checkpoints.unet_layers(family)]
    found = weight_type(name, layers)
    modules = dict(zip(XL if family == "sdxl" else V1, TABLES[family, name], strict=True))
    expected = {layer: modules[layer.split(".transformer")[0]] for layer in layers}
    assert len(found) == (70 if family == "sdxl" else 16)
    assert found == pytest.approx(expected, abs=5e-5)
    assert layer_weights(name, layers) == found


def test_every_weight_type_is_tabulated():
    assert {name for _, name in TABLES} == set(WEIGHT_TYPES)


def test_style_and_composition_need_a_known_model():
    with pytest.raises(ValueError, match=r"'composition' is known for .* this model has 2"):
        weight_type("composition", ["mid_block.attentions.0.a", "up_blocks.0.attentions.0.a"])


def test_choices_with_weights():
    layers = [layer for layer, _, _ in checkpoints.unet_layers("sdxl")]
    found = layer_weights({"style": 0.5, "layout": 2, "mid_block.*": 0.25}, layers)
    for layer, weight in found.items():
        module = layer.split(".transformer")[0]
        expected = {XL[6]: 0.5, XL[3]: 2.0, XL[4]: 0.25}.get(module, 0.0)
        assert weight == expected, layer


@pytest.mark.parametrize(
    ("knobs", "reason"),
    [
        ({"scale": "1"}, "scale must be a number"),
        ({"scale": float("nan")}, "scale must be finite"),
        ({"steps": (0.9, 0.1)}, "start <= end"),
        ({"references": ("picture.png",)}, "references must all be Reference"),
        ({"negative_layers": "layout"}, "negative_layers needs an adapter"),
        ({"adapter": torch.nn.Linear}, "adapter must be an adapter or a file, got Linear"),
    ],
)
def test_knobs_without_meaning(knobs, reason):
    with pytest.raises(ValueError, match=f"IPAdapter: .*{reason}"):
        IPAdapter(**knobs)


def test_all_reasons_at_once():
    with pytest.raises(ValueError, match=r"scale .*; steps .*; references"):
        IPAdapter(scale=None, steps=(2,), references=(1,))


def test_settings_keep_files_and_leave_objects():
    """A path survives YAML, an object does not."""
    method = IPAdapter(
        0.6,
        "models/ip.safetensors",
        layers={"style": 1.0},
        references=Reference(weight=0.5, prompts=0),
        image_encoder="models/encoder",
    )
    again = IPAdapter.from_yaml(method.to_yaml())
    assert again.to_dict() == method.to_dict()
    assert (again.adapter, again.image_encoder) == ("models/ip.safetensors", "models/encoder")
    assert again.references[0].prompts == (0,)
    thing = IPAdapter(0.6, torch.nn.Identity(), image_encoder=torch.nn.Identity())
    assert (thing.to_dict()["adapter"], thing.to_dict()["image_encoder"]) == (None, None)
