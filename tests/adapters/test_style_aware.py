"""StyleShot's encoder: the patches by their definition, the network by transformers' CLIP."""

from __future__ import annotations

from pathlib import Path

import checkpoints
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from styleattn.adapters import load_style_aware_encoder, style_patches
from styleattn.errors import Invalid
from styleattn.inversion import FileRefused

WIDTHS, OUT = (6, 10, 80), 12


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return checkpoints.noise(checkpoints.style_aware(WIDTHS, OUT))


def close(ours: Tensor, theirs: Tensor) -> None:
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def test_patches_are_cut_from_squares_in_squares() -> None:
    where = torch.arange(512 * 512.0).reshape(1, 1, 512, 512)  # every pixel names its place
    found = style_patches((where / 512**2).repeat(1, 3, 1, 1))
    assert [tuple(p.shape) for p in found] == [
        (1, 8, 3, 128, 128),
        (1, 16, 3, 64, 64),
        (1, 32, 3, 32, 32),
    ]
    corners = []
    for patches in found:
        at = ((patches[0, :, 0, 0, 0] + 1) / 2 * 512**2).round().long()
        corners.append([(int(i) // 512, int(i) % 512) for i in at])
    # the first quarter of the picture: its diagonal, then the diagonals of the other two
    assert corners[0][:2] == [(0, 0), (128, 128)]
    assert corners[1][:4] == [(128, 0), (192, 64), (0, 128), (64, 192)]
    assert corners[2][:4] == [(192, 0), (224, 32), (128, 64), (160, 96)]
    assert corners[0][2:4] == [(256, 0), (384, 128)]  # then the lower left quarter
    cells = {c for level in corners for c in level}
    assert len(cells) == 56
    assert style_patches(torch.rand(2, 3, 40, 70))[2].shape == (2, 32, 3, 32, 32)
    with pytest.raises(Invalid, match=r"\[R, 3, H, W\]"):
        style_patches(torch.rand(3, 40, 70))


def net(w: dict[str, Tensor], stem: str, x: Tensor, down: set[int], count: int) -> Tensor:
    x = F.pixel_unshuffle(x, 8)
    x = F.conv2d(x, w[f"{stem}conv_in.weight"], w[f"{stem}conv_in.bias"], padding=1)
    for i in range(count):
        x = F.avg_pool2d(x, 2) if i in down else x
        b = f"{stem}body.{i}."
        if f"{b}in_conv.weight" in w:
            x = F.conv2d(x, w[f"{b}in_conv.weight"], w[f"{b}in_conv.bias"])
        h = F.relu(F.conv2d(x, w[f"{b}block1.weight"], w[f"{b}block1.bias"], padding=1))
        x = x + F.conv2d(h, w[f"{b}block2.weight"], w[f"{b}block2.bias"])
    x = F.avg_pool2d(x, 2).flatten(1)
    return x @ w[f"{stem}adapter.weight"].T + w[f"{stem}adapter.bias"]


@torch.no_grad()
def test_embeddings_are_those_of_clip_over_patch_tokens(
    tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    from transformers import CLIPVisionConfig
    from transformers.models.clip.modeling_clip import CLIPEncoder

    torch.save(tensors, tmp_path / "encoder.bin")
    encoder = load_style_aware_encoder(tmp_path / "encoder.bin")
    patches = style_patches(torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)))
    tokens = []
    for i, (p, down, count) in enumerate(
        zip(patches, ({2, 3, 4}, {2, 3}, {2}), (6, 5, 4), strict=True)
    ):
        own = net(tensors, f"cnn.{i}.", p.flatten(0, 1), down, count).unflatten(0, p.shape[:2])
        tokens += [tensors[f"style_embeddings.{i}"].expand(2, 1, -1), own]
    x = torch.cat(tokens, 1) + tensors["position_embedding.weight"]
    clip = "image_encoder.vision_model."

    def norm(x: Tensor, name: str) -> Tensor:
        weight, bias = (tensors[f"{clip}{name}.{leaf}"] for leaf in ("weight", "bias"))
        return F.layer_norm(x, x.shape[-1:], weight, bias)

    config = CLIPVisionConfig(
        hidden_size=80, intermediate_size=320, num_hidden_layers=32, num_attention_heads=1,
        hidden_act="gelu", attn_implementation="eager",
    )  # fmt: skip
    model = CLIPEncoder(config).eval()
    stem = f"{clip}encoder."
    model.load_state_dict(
        {k.removeprefix(stem): v for k, v in tensors.items() if k.startswith(stem)}
    )
    y = model(inputs_embeds=norm(x, "pre_layrnorm")).last_hidden_state
    y = norm(y[:, [0, 9, 26]], "post_layernorm")
    close(encoder(patches), y @ tensors["image_encoder.visual_projection.weight"].T)
    with pytest.raises(Invalid, match=r"\[R, 8, 3, 128, 128\], \[R, 16, 3, 64, 64\]"):
        encoder(patches[::-1])


def test_bad_files_are_refused(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    bad = dict(tensors)
    bad["cnn.1.body.3.conv.weight"] = bad.pop("cnn.1.body.3.in_conv.weight")
    bad["style_embeddings.2"] = torch.ones(3)
    torch.save(bad, tmp_path / "bad.bin")
    with pytest.raises(FileRefused) as caught:
        load_style_aware_encoder(tmp_path / "bad.bin")
    assert str(caught.value).splitlines()[1:] == [
        "    missing 1: cnn.1.body.3.in_conv.weight",
        "    unexpected 1: cnn.1.body.3.conv.weight",
        "    wrong 1: style_embeddings.2 is [3], not [80]",
    ]
