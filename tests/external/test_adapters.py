"""Adapters against their authors' own modules, with weights of those modules.

Nothing is downloaded: each test wants a checkout of the official repository, named by an
environment variable, and is skipped without it.

    OFFICIAL_IP_ADAPTER=... OFFICIAL_CSGO=... OFFICIAL_PULID=... OFFICIAL_STYLESHOT=... \\
        python -m pytest tests/external
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import checkpoints
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from styleattn import adapters
from styleattn.adapters import style_aware

LAYERS = [("up_blocks.1.attentions.0.transformer_blocks.0.attn2", 16, 48)]


def official(variable: str, *parts: str) -> Any:
    """A module of a checkout, by its file."""
    root = os.environ.get(variable)
    if not root:
        pytest.skip(f"{variable} names no checkout")
    path = Path(root, *parts)
    spec = importlib.util.spec_from_file_location(f"official_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def named(prefix: str, module: torch.nn.Module) -> dict[str, Tensor]:
    return {f"{prefix}{k}": v.detach().clone() for k, v in module.state_dict().items()}


def close(ours: Tensor, theirs: Tensor) -> None:
    error = float((ours - theirs).norm() / theirs.norm())
    print(f"relative error {error:.1e}")
    assert error <= 1e-5


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.mark.parametrize("variable", ["OFFICIAL_IP_ADAPTER", "OFFICIAL_CSGO"])
def test_resampler(variable: str) -> None:
    theirs = official(variable, "ip_adapter", "resampler.py").Resampler(
        dim=128, depth=4, dim_head=64, heads=2, num_queries=6, embedding_dim=40, output_dim=48,
        ff_mult=4,
    )  # fmt: skip
    pairs = checkpoints.noise(checkpoints.pairs(LAYERS))
    ours = adapters.ip_adapter_from({**named("image_proj.", theirs), **pairs}, LAYERS)
    embeds = torch.randn(2, 9, 40)
    close(ours.tokens(embeds), theirs(embeds))


def faces(pictures: int) -> tuple[Tensor, list[Tensor]]:
    vision = [torch.randn(2, 7 * pictures, 1024) for _ in range(5)]
    return torch.randn(2, pictures, 1280), vision


@pytest.mark.parametrize("pictures", [1, 3])
def test_pulid(tmp_path: Path, pictures: int) -> None:
    module = official("OFFICIAL_PULID", "pulid", "encoders_transformer.py")
    former = module.IDFormer(dim=64, heads=2, num_queries=6, output_dim=48)
    attentions = [
        module.PerceiverAttentionCA(dim=32, dim_head=128, heads=2, kv_dim=48) for _ in range(20)
    ]
    tensors = named("pulid_encoder.", former)
    for i, attention in enumerate(attentions):
        tensors |= named(f"pulid_ca.{i}.", attention)
    save_file(tensors, tmp_path / "pulid.safetensors")
    pulid = adapters.load_pulid(tmp_path / "pulid.safetensors")
    face, vision = faces(pictures)
    tokens = former(face, vision)
    close(pulid.tokens(face, vision), tokens)
    image = torch.randn(2, 11, 32)
    for ours, theirs in zip(pulid.pulid_ca, attentions, strict=True):
        close(ours(tokens, image), theirs(tokens, image))


def test_pulid_version_1(tmp_path: Path) -> None:
    theirs = official("OFFICIAL_PULID", "pulid", "encoders.py").IDEncoder()
    layers = [(LAYERS[0][0], 16, 2048)]
    pairs = checkpoints.noise(checkpoints.pulid_pairs(layers))
    torch.save({**named("id_adapter.", theirs), **pairs}, tmp_path / "pulid_v1.bin")
    ours = adapters.load_pulid_sdxl(tmp_path / "pulid_v1.bin", layers)
    face, vision = faces(1)
    close(ours.identity(face[:, 0], vision), theirs(face[:, 0], vision))


def clip_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Under the names of the transformers 4 that wrote the published file."""
    old = "image_encoder.vision_model."
    if any(name.startswith(old) for name in tensors):
        return dict(tensors)
    kept = "image_encoder.visual_projection"
    return {
        k.replace("image_encoder.", old) if not k.startswith(kept) else k: v
        for k, v in tensors.items()
    }


def test_style_aware_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    clip = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=1280, intermediate_size=5120, num_hidden_layers=2, num_attention_heads=16,
            hidden_act="gelu", projection_dim=1024,
        )
    )  # fmt: skip
    module = official("OFFICIAL_STYLESHOT", "ip_adapter", "style_encoder.py")
    theirs = module.Style_Aware_Encoder(clip).eval()
    tensors = clip_names(theirs.state_dict())
    monkeypatch.setattr(style_aware, "read_tensors", lambda _: tensors)
    monkeypatch.setattr(style_aware.StyleAwareEncoder.__init__, "__defaults__", (2,))
    ours = adapters.load_style_aware_encoder("style_aware_encoder.bin")
    patches = adapters.style_patches(torch.rand(1, 3, 512, 512))
    close(ours(patches), theirs([p[0] for p in patches], 1))


def test_style_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", ModuleType("cv2"))  # imported there, of no use here
    module = official("OFFICIAL_STYLESHOT", "ip_adapter", "tools.py")
    pixels = np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)

    def tensor(image: Any) -> Tensor:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255

    theirs = module.pre_processing(Image.fromarray(pixels), lambda x: tensor(x) * 2 - 1)
    ours = adapters.style_patches(tensor(pixels)[None])
    for a, b in zip(ours, theirs, strict=True):
        close(a[0], b)
