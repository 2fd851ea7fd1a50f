"""StyleShot's style-aware encoder: patches of three sizes to three embeddings of style."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from styleattn.errors import describe, invalid

from ._files import Tensors, fill, part, read_tensors, size

SIDE = 512
PATCHES = {128: 8, 64: 16, 32: 32}  # side of a patch: how many
_DEPTH = 32
_HEAD_DIM = 80
_SHUFFLE = 8
# Per size, the residual blocks: (input, output) as places in the widths, and whether they halve.
_BODIES = (
    ((0, 0, False), (0, 1, False), (1, 1, True), (1, 1, True), (1, 2, True), (2, 2, False)),
    ((0, 0, False), (0, 1, False), (1, 1, True), (1, 2, True), (2, 2, False)),
    ((0, 0, False), (0, 1, False), (1, 2, True), (2, 2, False)),
)


def style_patches(images: Tensor) -> list[Tensor]:
    """The patches of pictures: eight of 128 pixels, sixteen of 64 and thirty-two of 32.

    A square is cut into quarters; the upper left and the lower right ones of its quarters are
    patches, the other two are cut again. The authors shuffle the patches of each size at random;
    here they keep their order.

    Args:
        images: [R, 3, H, W] in [0, 1]; the shorter side is resized to 512, the centre cropped.

    Returns:
        Three tensors [R, P, 3, S, S] in [-1, 1], as `StyleAwareEncoder` takes them.

    Raises:
        Invalid: another shape.
    """
    if images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise invalid("style_patches", ["images must be [R, 3, H, W] in [0, 1]"], describe(images))
    short = min(images.shape[-2:])
    sizes = [round(n * SIDE / short) for n in images.shape[-2:]]
    x = F.interpolate(images, sizes, mode="bilinear", antialias=True)
    top, left = ((n - SIDE) // 2 for n in sizes)
    squares = [x[..., top : top + SIDE, left : left + SIDE] * 2 - 1]
    squares = [q for s in squares for q in _quarters(s)]
    found = []
    for _ in PATCHES:
        quarters = [_quarters(s) for s in squares]
        found.append(torch.stack([q for four in quarters for q in (four[0], four[3])], dim=1))
        squares = [q for four in quarters for q in four[1:3]]
    return found


def _quarters(x: Tensor) -> list[Tensor]:
    """Upper left, lower left, upper right, lower right."""
    return [q for column in x.chunk(2, dim=-1) for q in column.chunk(2, dim=-2)]


class _Residual(nn.Module):
    """`x + W_2 relu(W_1 x)` after a halving and a change of width, where they are asked for."""

    def __init__(self, into: int, out: int, halve: bool) -> None:
        super().__init__()
        self.halve = halve
        if into != out:
            self.in_conv = nn.Conv2d(into, out, 1)
        self.block1 = nn.Conv2d(out, out, 3, padding=1)
        self.block2 = nn.Conv2d(out, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(x, 2) if self.halve else x
        x = self.in_conv(x) if hasattr(self, "in_conv") else x
        result: Tensor = x + self.block2(F.relu(self.block1(x)))
        return result


class _PatchNet(nn.Module):
    """One vector of each patch: [P, 3, S, S] to [P, width]."""

    def __init__(self, widths: Sequence[int], body: Sequence[tuple[int, int, bool]]) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3 * _SHUFFLE**2, widths[0], 3, padding=1)
        self.body = nn.Sequential(*(_Residual(widths[a], widths[b], down) for a, b, down in body))
        self.adapter = nn.Linear(widths[2], widths[2])

    def forward(self, patches: Tensor) -> Tensor:
        x = self.body(self.conv_in(F.pixel_unshuffle(patches, _SHUFFLE)))
        result: Tensor = self.adapter(F.avg_pool2d(x, 2).flatten(1))
        return result


class _Block(nn.Module):
    """A block of CLIP's vision transformer, under the names of transformers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        names = ("q_proj", "k_proj", "v_proj", "out_proj")
        self.self_attn = nn.ModuleDict({name: nn.Linear(width, width) for name in names})
        self.layer_norm1 = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)}
        )
        self.layer_norm2 = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer_norm1(x)
        query, key, value = (
            self.self_attn[name](y).unflatten(-1, (-1, _HEAD_DIM)).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        out = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(-2)
        x = x + self.self_attn["out_proj"](out)
        result: Tensor = x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.layer_norm2(x))))
        return result


class StyleAwareEncoder(nn.Module):
    """Patches of three sizes to three embeddings [R, 3, out].

    A small network makes a token of each patch; one learned token leads those of each size; all
    pass CLIP ViT-H/14's transformer, and the three leading tokens its projection. The weights are
    frozen.

    Args:
        widths: of the networks' stages; the last is the transformer's, in heads of 80 channels.
        out: width of the embeddings.

    Source: StyleShot (arXiv 2407.01414), section 3.1.
    """

    def __init__(self, widths: Sequence[int], out: int, depth: int = _DEPTH) -> None:
        super().__init__()
        width = widths[2]
        self.cnn = nn.ModuleList(_PatchNet(widths, body) for body in _BODIES)
        self.style_embeddings = nn.ParameterList(nn.Parameter(torch.empty(width)) for _ in PATCHES)
        self.position_embedding = nn.Embedding(sum(PATCHES.values()) + len(PATCHES), width)
        self.pre_layrnorm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(_Block(width) for _ in range(depth))
        self.post_layernorm = nn.LayerNorm(width)
        self.visual_projection = nn.Linear(width, out, bias=False)

    def forward(self, patches: Sequence[Tensor]) -> Tensor:
        """The embeddings [R, 3, out] that a StyleShot adapter takes.

        Args:
            patches: as `style_patches` makes them.

        Raises:
            Invalid: other shapes.
        """
        shapes = [(count, 3, side, side) for side, count in PATCHES.items()]
        if [tuple(p.shape[1:]) for p in patches] != shapes or len({len(p) for p in patches}) != 1:
            wanted = ", ".join(f"[R, {', '.join(map(str, shape))}]" for shape in shapes)
            given = ", ".join(describe(p) for p in patches)
            raise invalid("StyleAwareEncoder", [f"patches must be {wanted}"], given)
        dtype = self.position_embedding.weight.dtype
        tokens: list[Tensor] = []
        places: list[int] = []
        for net, first, own in zip(self.cnn, self.style_embeddings, patches, strict=True):
            places.append(sum(t.shape[1] for t in tokens))
            found = net(own.to(dtype).flatten(0, 1)).unflatten(0, own.shape[:2])
            tokens.append(torch.cat((first.expand(own.shape[0], 1, -1), found), dim=1))
        x = self.pre_layrnorm(torch.cat(tokens, dim=1) + self.position_embedding.weight)
        for layer in self.layers:
            x = layer(x)
        result: Tensor = self.visual_projection(self.post_layernorm(x[:, places]))
        return result


def load_style_aware_encoder(
    path: str | os.PathLike[str], *, dtype: torch.dtype | None = None
) -> StyleAwareEncoder:
    """StyleShot's encoder from its published file (style_aware_encoder.bin).

    Args:
        path: the file. The patch embedding of CLIP that it also has is not used.
        dtype: of the weights; None keeps the file's.

    Raises:
        FileNotFoundError: there is no such file.
        FileRefused: the file is damaged, asks for code, or does not fit; the message names what is
            missing, unexpected, or of another shape.

    Source: StyleShot (arXiv 2407.01414).
    """
    unused = "image_encoder.vision_model.embeddings."
    tensors = {k: v for k, v in read_tensors(path).items() if not k.startswith(unused)}
    with torch.device("meta"):
        encoder = StyleAwareEncoder(
            _widths(part(tensors, "cnn.")),
            size(tensors, 1024, ("image_encoder.visual_projection.weight", 0)),
        )
    names = {name: _file_name(name) for name in encoder.state_dict()}
    what = "a style-aware encoder of StyleShot"
    fill(encoder, tensors, source=os.fspath(path), what=what, names=names, dtype=dtype)
    return encoder


def _widths(tensors: Tensors) -> tuple[int, int, int]:
    nets = range(len(_BODIES))
    return (
        size(tensors, 320, *((f"{i}.conv_in.bias", 0) for i in nets)),
        size(tensors, 640, *((f"{i}.body.1.block1.bias", 0) for i in nets)),
        size(tensors, 1280, *((f"{i}.adapter.bias", 0) for i in nets)),
    )


def _file_name(name: str) -> str:
    clip = "image_encoder.vision_model."
    if name.startswith("layers."):
        return f"{clip}encoder.{name}"
    if name.startswith(("pre_layrnorm.", "post_layernorm.")):
        return clip + name
    return f"image_encoder.{name}" if name.startswith("visual_projection.") else name
