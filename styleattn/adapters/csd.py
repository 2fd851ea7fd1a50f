"""CSD: how alike two pictures are in style and in content, with gradients to the pixels."""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from styleattn.errors import describe, invalid

from ._adapter import CLIP_MEAN, CLIP_STD
from ._files import Tensors, fill, part, read_tensors, size

_DEPTH = 24
_HEAD_DIM = 64
_PREFIXES = ("model_state_dict.module.", "model_state_dict.", "module.", "")


class _SelfAttention(nn.Module):
    """Self-attention with one matrix for q, k and v, as CLIP's original code names it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        joint = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        query, key, value = (
            y.unflatten(-1, (-1, _HEAD_DIM)).transpose(1, 2) for y in joint.chunk(3, dim=-1)
        )
        out = F.scaled_dot_product_attention(query, key, value)
        result: Tensor = self.out_proj(out.transpose(1, 2).flatten(-2))
        return result


class _Block(nn.Module):
    """`x + attention(LN x)`, then `x + W_2 (a sigmoid(1.702 a))` with `a = W_1 LN x`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn = _SelfAttention(width)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict(
            {"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)}
        )
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        inner = self.mlp["c_fc"](self.ln_2(x))
        result: Tensor = x + self.mlp["c_proj"](inner * torch.sigmoid(1.702 * inner))
        return result


class VisionTower(nn.Module):
    """CLIP's vision transformer without its projection: pixels [R, 3, S, S] to [R, width].

    Args:
        width: in heads of 64 channels.
        patch: pixels of a patch's side.
        positions: patches of a picture, and one.
        depth: blocks.

    Source: CLIP (arXiv 2103.00020).
    """

    def __init__(self, width: int, patch: int, positions: int, depth: int = _DEPTH) -> None:
        super().__init__()
        self.checkpointing = False
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty(positions, width))
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.ln_pre = nn.LayerNorm(width)
        blocks = nn.ModuleList(_Block(width) for _ in range(depth))
        self.transformer = nn.ModuleDict({"resblocks": blocks})
        self.ln_post = nn.LayerNorm(width)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.conv1(pixels).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(pixels.shape[0], 1, -1)
        x = self.ln_pre(torch.cat((first, patches), dim=1) + self.positional_embedding)
        for block in self.transformer["resblocks"].children():
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        result: Tensor = self.ln_post(x[:, 0])
        return result


class CSD(nn.Module):
    """A vision tower and two matrices: embeddings of content and of style. The weights are frozen.

    `style = normalise(f(x) W_s)`, `content = normalise(f(x) W_c)`, f the tower; two pictures are as
    alike as the products of their embeddings say.

    Args:
        backbone: the tower.
        width, out: of the tower and of the embeddings.

    Source: CSD (arXiv 2404.01292).
    """

    def __init__(self, backbone: VisionTower, width: int, out: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.last_layer_style = nn.Parameter(torch.empty(width, out))
        self.last_layer_content = nn.Parameter(torch.empty(width, out))

    @property
    def image_size(self) -> int:
        """Pixels of the side of the pictures that the tower sees."""
        patches = self.backbone.positional_embedding.shape[0] - 1
        return round(patches**0.5) * self.backbone.conv1.stride[0]

    def prepare(self, images: Tensor) -> Tensor:
        """Pixels for `forward`, of pictures [R, 3, H, W] in [0, 1]; differentiable.

        Clamped, the shorter side resized (bicubic, antialiased), the centre cropped, normalised as
        CLIP's.

        Raises:
            Invalid: another shape.
        """
        if images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise invalid("prepare", ["images must be [R, 3, H, W] in [0, 1]"], describe(images))
        side = self.image_size
        height, width = images.shape[-2:]
        short = min(height, width)
        sizes = (round(height * side / short), round(width * side / short))
        x = F.interpolate(images.clamp(0, 1), sizes, mode="bicubic", antialias=True)
        top, left = (sizes[0] - side) // 2, (sizes[1] - side) // 2
        x = x[..., top : top + side, left : left + side]
        mean, std = (torch.tensor(v).to(x)[:, None, None] for v in (CLIP_MEAN, CLIP_STD))
        return (x - mean) / std

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The tower's feature [R, width], and the embeddings of content and of style [R, out], both
        of norm 1.

        Args:
            pixels: [R, 3, image_size, image_size], as `prepare` makes them.

        Raises:
            Invalid: another shape.
        """
        side = self.image_size
        if pixels.dim() != 4 or tuple(pixels.shape[1:]) != (3, side, side):
            reason = f"pixels must be [R, 3, {side}, {side}], as prepare() makes them"
            raise invalid("CSD", [reason], describe(pixels))
        feature = self.backbone(pixels.to(self.last_layer_style.dtype))
        content = F.normalize(feature @ self.last_layer_content, dim=-1)
        style = F.normalize(feature @ self.last_layer_style, dim=-1)
        return feature, content, style


def load_csd(path: str | os.PathLike[str], *, dtype: torch.dtype | None = None) -> CSD:
    """CSD's model (ViT-L/14) from its published file (checkpoint.pth, or the hub's safetensors).

    Args:
        path: the file.
        dtype: of the weights; None keeps the file's.

    Raises:
        FileNotFoundError: there is no such file.
        FileRefused: the file is damaged, asks for code, or does not fit; the message names what is
            missing, unexpected, or of another shape.

    Source: CSD (arXiv 2404.01292).
    """
    tensors = _named(read_tensors(path))
    places = (("backbone.class_embedding", 0), ("backbone.ln_pre.weight", 0))
    width = size(tensors, 1024, *places, ("backbone.ln_post.weight", 0))
    heads = (("last_layer_style", 1), ("last_layer_content", 1))
    with torch.device("meta"):
        tower = VisionTower(
            width,
            patch=size(tensors, 14, ("backbone.conv1.weight", 2)),
            positions=size(tensors, 257, ("backbone.positional_embedding", 0)),
        )
        csd = CSD(tower, width, size(tensors, 768, *heads))
    fill(csd, tensors, source=os.fspath(path), what="a CSD model", dtype=dtype)
    return csd


def _named(tensors: Tensors) -> dict[str, Tensor]:
    """The model's own part of a file, whatever the file wraps it in."""
    for prefix in _PREFIXES:
        own = part(tensors, prefix)
        if any(name.startswith(("backbone.", "last_layer_")) for name in own):
            return own
    return dict(tensors)
