"""Every published layout at its real size, on the meta device: accepted, and of the right size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import checkpoints
import pytest
import torch
from torch import Tensor

from styleattn import adapters

SDXL, SD15 = checkpoints.unet_layers("sdxl"), checkpoints.unet_layers("sd15")
FLUX = [(f"transformer_blocks.{i}.attn", 3072, 4096) for i in range(19)]
FLUX += [(f"single_transformer_blocks.{i}.attn", 3072, 4096) for i in range(38)]
CONTROL = [layer for layer in SDXL if not layer[0].startswith("up_blocks")]

Read = Callable[[str, checkpoints.Shapes], None]


@pytest.fixture
def give(monkeypatch: pytest.MonkeyPatch) -> Read:
    """Let a module of adapters read tensors without storage."""

    def patch(module: str, shapes: checkpoints.Shapes) -> None:
        tensors = checkpoints.noise(shapes, device="meta")
        monkeypatch.setattr(f"styleattn.adapters.{module}.read_tensors", lambda _: tensors)

    return patch


def meta(*shape: int) -> Tensor:
    return torch.empty(*shape, device="meta")


def parameters(module: Any) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("queries", [16, 32])
def test_csgo(give: Read, queries: int) -> None:
    give("csgo", checkpoints.csgo(SDXL, 1664, 2048, (4, queries)))
    csgo = adapters.load_csgo("csgo.bin", SDXL, control_layers=CONTROL)
    assert csgo.control is not None
    assert (len(csgo.style.layers), len(csgo.control.layers), len(csgo.content.layers)) == (
        36,
        24,
        0,
    )
    assert csgo.style.encoder.tower == "CLIP ViT-bigG/14"
    assert csgo.style.tokens(meta(1, 257, 1664)).shape == (1, queries, 2048)
    assert abs(parameters(csgo.style.projector) - 167e6) < 1e6


def test_styleshot(give: Read) -> None:
    give("styleshot", checkpoints.styleshot(SD15, 1024))
    adapter = adapters.load_styleshot("ip.bin", SD15)
    assert adapter.tokens(meta(1, 3, 1024)).shape == (1, 6, 768)


def test_deadiff(give: Read) -> None:
    shapes = checkpoints.deadiff(768, 1024, 16, 3072)
    names = {new: old for old, new in checkpoints.LDM_BLOCKS.items()}
    for name, inner, context in SD15:
        block, _, rest = name.partition(".transformer_blocks")
        for x in "kv":
            place = f"model.diffusion_model.{names[block]}.transformer_blocks{rest}.i_to_{x}.weight"
            shapes[place] = (inner, context)
    give("deadiff", shapes)
    deadiff = adapters.load_deadiff("deadiff_v1.ckpt", SD15)
    assert deadiff.style.encoder.tower == "CLIP ViT-L/14"
    assert not deadiff.style.encoder.crop
    assert (len(deadiff.style.layers), len(deadiff.content.layers)) == (11, 5)
    adapter = deadiff.style.to("meta")  # the word as well
    assert adapter.tokens(meta(1, 257, 1024)).shape == (1, 16, 768)


@pytest.mark.parametrize("tokens", [4, 16])
def test_xlabs(give: Read, tokens: int) -> None:
    give("flux_ip_adapter", checkpoints.xlabs(19, 768, 3072, 4096, tokens))
    adapter = adapters.load_flux_ip_adapter("ip_adapter.safetensors", FLUX)
    assert (adapter.encoder.tower, adapter.encoder.blank) == ("CLIP ViT-L/14", "black")
    assert adapter.tokens(meta(1, 768)).shape == (1, tokens, 4096)
    assert len(adapter.layers) == 19


def test_instantx(give: Read) -> None:
    give("flux_ip_adapter", checkpoints.instantx(57, 1152, 3072, 4096, 128))
    adapter = adapters.load_flux_ip_adapter("ip-adapter.bin", FLUX)
    assert (adapter.encoder.output, adapter.encoder.image_size) == ("pooled", 384)
    assert adapter.tokens(meta(1, 1152)).shape == (1, 128, 4096)
    key, _ = adapter.key_value(FLUX[56][0], meta(1, 128, 4096))
    assert key.shape == (1, 128, 3072)


def test_redux(give: Read) -> None:
    shapes = {"redux_up.weight": (12288, 1152), "redux_up.bias": (12288,)}
    give("redux", {**shapes, "redux_down.weight": (4096, 12288), "redux_down.bias": (4096,)})
    redux = adapters.load_redux("flux1-redux-dev.safetensors")
    assert redux.tokens(meta(1, 729, 1152)).shape == (1, 729, 4096)


def test_pulid(give: Read) -> None:
    give("pulid", checkpoints.pulid(20, 1280, 1024, 1024, 32, 2048, 3072, 16))
    pulid = adapters.load_pulid("pulid_flux_v0.9.1.safetensors")
    tokens = pulid.tokens(meta(1, 1280), [meta(1, 577, 1024)] * 5)
    assert tokens.shape == (1, 32, 2048)
    assert pulid.attention(19).query(meta(1, 4096, 3072)).shape == (1, 16, 4096, 128)
    assert pulid.places()["single_transformer_blocks.36"] == 19


def test_csd(give: Read) -> None:
    """CLIP ViT-L/14's vision tower has 303M parameters without its projection."""
    give("csd", checkpoints.csd(1024, 14, 257, 768))
    csd = adapters.load_csd("checkpoint.pth")
    assert abs(parameters(csd.backbone) - 303e6) < 1e6
    assert csd.image_size == 224
    _, content, style = csd(meta(1, 3, 224, 224))
    assert content.shape == style.shape == (1, 768)


@pytest.mark.parametrize("version", ["v1", "v1.1"])
def test_pulid_sdxl(give: Read, version: str) -> None:
    shapes = checkpoints.pulid_v1(1280, 1024, 1024, 2048)
    if version == "v1.1":
        shapes = checkpoints.idformer(1280, 1024, 1024, 32, 2048, 16, "id_adapter.")
    give("pulid_sdxl", {**shapes, **checkpoints.pulid_pairs(SDXL)})
    adapter = adapters.load_pulid_sdxl("pulid.safetensors", SDXL)
    tokens = adapter.identity(meta(1, 1280), [meta(1, 577, 1024)] * 5)
    assert tokens.shape == (1, {"v1": 10, "v1.1": 32}[version], 2048)
    assert len(adapter.layers) == 70


def test_style_aware_encoder(give: Read) -> None:
    """CLIP ViT-H/14's transformer has 630M parameters."""
    give("style_aware", checkpoints.style_aware((320, 640, 1280), 1024))
    encoder = adapters.load_style_aware_encoder("style_aware_encoder.bin")
    assert abs(parameters(encoder.layers) - 630e6) < 1e6
    patches = [meta(1, 8, 3, 128, 128), meta(1, 16, 3, 64, 64), meta(1, 32, 3, 32, 32)]
    assert encoder(patches).shape == (1, 3, 1024)
