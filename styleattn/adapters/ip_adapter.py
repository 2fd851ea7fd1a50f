"""IP-Adapter for UNets: the base, plus and full-face projectors, and their files."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from styleattn.inversion.files import FileRefused

from ._adapter import Encoder, HostLayer, ImageAdapter, KeyValue, checkpoint_order, clip, indexed
from ._files import Tensors, fill, part, read_tensors, size
from ._perceiver import resampler_of

_XL_CONTEXT = 2048


class ImageProjection(nn.Module):
    """One embedding to a few tokens: `LN(reshape(W e + b))`, [R, embed] to [R, M, out]."""

    def __init__(self, embed: int, out: int, tokens: int) -> None:
        super().__init__()
        self.proj = nn.Linear(embed, tokens * out)
        self.norm = nn.LayerNorm(out)

    def forward(self, embeds: Tensor) -> Tensor:
        tokens: Tensor = self.norm(
            self.proj(embeds).unflatten(-1, (-1, *self.norm.normalized_shape))
        )
        return tokens


class FullProjection(nn.Module):
    """Every encoder token on its own: `LN(W_2 GELU(W_1 e))`, [R, S, embed] to [R, S, out]."""

    def __init__(self, embed: int, out: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.Linear(embed, embed), nn.GELU(), nn.Linear(embed, out), nn.LayerNorm(out)
        )

    def forward(self, embeds: Tensor) -> Tensor:
        tokens: Tensor = self.proj(embeds)
        return tokens


def load_ip_adapter(
    path: str | os.PathLike[str],
    layers: Sequence[HostLayer | tuple[str, int, int]],
    *,
    dtype: torch.dtype | None = None,
) -> ImageAdapter:
    """An IP-Adapter of SD1.5, SD2 or SDXL from its published file (.safetensors or .bin).

    The kind is told by the names in the file: "base" (also the light and the ViT-G variants; 4
    tokens of one embedding), "plus" (also plus-face; a Resampler), "full-face" (257 tokens).

    Args:
        path: the file.
        layers: every cross-attention layer of the host as (path of the module, width of its keys,
            width of the text), in any order.
        dtype: of the weights; None keeps the file's.

    Raises:
        FileNotFoundError: there is no such file.
        FileRefused: the file is damaged, asks for code, or is no IP-Adapter for this host; the
            message names what is missing, unexpected, or of another shape.
        ValueError: layers that are not a UNet's.

    Source: IP-Adapter (arXiv 2308.06721); layout of the files in h94/IP-Adapter.
    """
    return ip_adapter_from(read_tensors(path), layers, dtype=dtype, source=os.fspath(path))


def ip_adapter_from(
    tensors: Tensors,
    layers: Sequence[HostLayer | tuple[str, int, int]],
    *,
    dtype: torch.dtype | None = None,
    source: str = "the IP-Adapter",
) -> ImageAdapter:
    """As `load_ip_adapter`, of tensors that are read already, under flat names."""
    host = checkpoint_order(layers)
    widths = {layer.context for layer in host}
    if len(widths) > 1:
        raise ValueError(f"the layers read texts of several widths: {sorted(widths)}")
    out = widths.pop()
    kind, encoder, projector = _projector(part(tensors, "image_proj."), out, source)
    with torch.device("meta"):
        pairs = {layer.name: KeyValue(layer.inner, out) for layer in host}
    adapter = ImageAdapter(kind, encoder, projector, pairs)
    what = f"a {kind} IP-Adapter for {len(host)} layers that read {out} channels"
    names = adapter.file_names("image_proj.", indexed(host, "ip_adapter."))
    fill(adapter, tensors, source=source, what=what, names=names, dtype=dtype)
    return adapter


def _projector(tensors: Tensors, out: int, source: str) -> tuple[str, Encoder, nn.Module]:
    """The kind, the encoder, and the projector without weights, of a file's `image_proj` part."""
    if any(name.startswith("perceiver_resampler.") for name in tensors) or (
        "proj.2.weight" in tensors and "norm.weight" in tensors
    ):
        raise FileRefused(f"{source} is a FaceID adapter: it needs face embeddings and a LoRA")
    xl = out == _XL_CONTEXT
    if any(name == "latents" or name.startswith("layers.") for name in tensors):
        dim = 1280 if xl else 768
        plus = resampler_of(tensors, out, embed=1280, dim=dim, queries=16, heads=dim // 64)
        return "plus", clip(plus.proj_in.in_features, "hidden", "grey"), plus
    if any(name.startswith(("proj.0.", "proj.3.")) for name in tensors):
        embed = size(tensors, 1280, ("proj.0.weight", 1), ("proj.0.bias", 0), ("proj.2.weight", 1))
        with torch.device("meta"):
            return "full-face", clip(embed, "hidden", "grey"), FullProjection(embed, out)
    embed = size(tensors, 1280 if xl else 1024, ("proj.weight", 1))
    with torch.device("meta"):
        return "base", clip(embed, "embeds", "zeros"), ImageProjection(embed, out, 4)
