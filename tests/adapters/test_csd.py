"""CSD's model, against transformers' CLIP tower with the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from styleattn.adapters import load_csd
from styleattn.errors import Invalid
from styleattn.inversion import FileRefused

WIDTH, PATCH, OUT, SIDE = 128, 4, 24, 20
SHAPES = checkpoints.csd(WIDTH, PATCH, (SIDE // PATCH) ** 2 + 1, OUT)
NAMES = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return checkpoints.noise(SHAPES)


@pytest.fixture(scope="module")
def path(tensors: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the training code writes it: wrapped by DistributedDataParallel, with its optimiser."""
    path = tmp_path_factory.mktemp("csd") / "checkpoint.pth"
    model = {f"module.{k}": v for k, v in tensors.items()}
    state = {"optimizer_state_dict": {"state": {0: {"exp_avg": torch.ones(2)}}}, "iteration": 3}
    torch.save({"model_state_dict": model, **state}, path)
    return path


def tower(tensors: dict[str, Tensor]) -> Any:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=24,
        num_attention_heads=WIDTH // 64, image_size=SIDE, patch_size=PATCH, hidden_act="quick_gelu",
    )  # fmt: skip
    w = {k.removeprefix("backbone."): v for k, v in tensors.items() if k.startswith("backbone.")}
    state = {
        "embeddings.class_embedding": w["class_embedding"],
        "embeddings.position_embedding.weight": w["positional_embedding"],
        "embeddings.patch_embedding.weight": w["conv1.weight"],
    }
    for leaf in ("weight", "bias"):
        state[f"pre_layrnorm.{leaf}"] = w[f"ln_pre.{leaf}"]
        state[f"post_layernorm.{leaf}"] = w[f"ln_post.{leaf}"]
        for i in range(24):
            ours, theirs = f"transformer.resblocks.{i}.", f"encoder.layers.{i}."
            for old, new in NAMES.items():
                state[f"{theirs}{new}.{leaf}"] = w[f"{ours}{old}.{leaf}"]
            joint = w[f"{ours}attn.in_proj_{leaf}"].chunk(3)
            for name, x in zip(("q_proj", "k_proj", "v_proj"), joint, strict=True):
                state[f"{theirs}self_attn.{name}.{leaf}"] = x
    model = CLIPVisionModel(config).eval()
    inner = getattr(model, "vision_model", model)
    missing, unexpected = inner.load_state_dict(state, strict=False)
    assert (set(missing) - {"embeddings.position_ids"}, unexpected) == (set(), [])
    return model


def close(ours: Tensor, theirs: Tensor) -> None:
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


@torch.no_grad()
def test_features_are_those_of_clip(path: Path, tensors: dict[str, Tensor]) -> None:
    csd = load_csd(path)
    pixels = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    feature, content, style = csd(pixels)
    expected = tower(tensors)(pixels).pooler_output
    close(feature, expected)
    for found, name in ((content, "last_layer_content"), (style, "last_layer_style")):
        y = expected @ tensors[name]
        close(found, y / y.norm(dim=1, keepdim=True))


def test_gradients_reach_the_pixels_and_checkpointing_changes_nothing(path: Path) -> None:
    csd = load_csd(path)
    images = torch.rand(1, 3, 31, 45, requires_grad=True)
    found = []
    for checkpointing in (False, True):
        csd.backbone.checkpointing = checkpointing
        _, _, style = csd(csd.prepare(images))
        (gradient,) = torch.autograd.grad(style[0, 0], images)
        found.append(gradient)
    assert found[0].abs().max() > 0
    assert torch.equal(*found)


def test_pictures_of_any_shape_are_prepared_as_clip_does(path: Path) -> None:
    csd = load_csd(path)
    assert csd.image_size == SIDE
    images = torch.rand(2, 3, 40, 60) * 1.5 - 0.25
    found = csd.prepare(images)
    half = F.interpolate(images.clamp(0, 1), (20, 30), mode="bicubic", antialias=True)[..., 5:25]
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])
    close(found, (half - mean[:, None, None]) / std[:, None, None])
    assert csd.prepare(torch.rand(1, 3, 61, 20)).shape == (1, 3, SIDE, SIDE)
    with pytest.raises(Invalid, match=r"\[R, 3, H, W\]"):
        csd.prepare(images[0])
    with pytest.raises(Invalid, match=r"\[R, 3, 20, 20\], as prepare"):
        csd(images)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_bare_layouts_are_taken_too(
    prefix: str, tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    bare = {f"{prefix}{k}": v for k, v in tensors.items()}
    save_file(bare, tmp_path / "csd.safetensors")
    csd = load_csd(tmp_path / "csd.safetensors", dtype=torch.float16)
    assert torch.equal(csd.last_layer_style, tensors["last_layer_style"].half())
    assert not any(p.requires_grad for p in csd.parameters())


def test_bad_files_are_refused(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "csd.safetensors"
    last = "backbone.transformer.resblocks.23."
    bad = {k: v for k, v in tensors.items() if not k.startswith(last)}
    save_file({**bad, "backbone.proj": torch.ones(2, 2), "last_layer_style": torch.ones(3)}, path)
    with pytest.raises(FileRefused) as caught:
        load_csd(path)
    message = str(caught.value)
    assert f"missing 12: {last}attn.in_proj_weight" in message
    assert "unexpected 1: backbone.proj" in message
    assert f"wrong 1: last_layer_style is [3], not [{WIDTH}, {OUT}]" in message
    save_file({"something.weight": torch.ones(2)}, path)
    with pytest.raises(FileRefused, match=rf"not a CSD model:\n    missing {len(SHAPES)}:"):
        load_csd(path)
