"""IP-Adapters for FLUX: XLabs' (double blocks) and InstantX's (all blocks)."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ._adapter import HostLayer, ImageAdapter, KeyValue, clip, siglip
from ._files import Tensors, fill, part, read_tensors, size
from .ip_adapter import ImageProjection

HEAD_DIM = 128
_NAME = re.compile(r"(single_)?transformer_blocks\.(\d+)\.attn")


class MlpProjection(nn.Module):
    """One embedding to many tokens: `LN(reshape(W_2 GELU(W_1 e)))`, [R, embed] to [R, M, out]."""

    def __init__(self, embed: int, inner: int, out: int, tokens: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.Linear(embed, inner), nn.GELU(), nn.Linear(inner, tokens * out)
        )
        self.norm = nn.LayerNorm(out)

    def forward(self, embeds: Tensor) -> Tensor:
        tokens: Tensor = self.norm(
            self.proj(embeds).unflatten(-1, (-1, *self.norm.normalized_shape))
        )
        return tokens


def flux_order(layers: Sequence[HostLayer | tuple[str, int, int]]) -> list[HostLayer]:
    """The attention layers of a FLUX transformer in the order of the indices of published files:
    double blocks, then single blocks.

    Raises:
        ValueError: names that are not a FLUX transformer's.
    """
    found = [HostLayer(name.removesuffix(".processor"), *sizes) for name, *sizes in layers]
    strange = [layer.name for layer in found if not _NAME.fullmatch(layer.name)]
    if strange or not found:
        raise ValueError(
            f"no layers of a FLUX transformer: {', '.join(strange[:4])} of {len(found)}; expected "
            "names like transformer_blocks.0.attn and single_transformer_blocks.0.attn"
        )
    return sorted(found, key=lambda layer: _position(layer.name))


def _position(name: str) -> tuple[bool, int]:
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"{name} is no layer of a FLUX transformer")
    return match[1] is not None, int(match[2])


def load_flux_ip_adapter(
    path: str | os.PathLike[str],
    layers: Sequence[HostLayer | tuple[str, int, int]],
    *,
    head_dim: int = HEAD_DIM,
    dtype: torch.dtype | None = None,
) -> ImageAdapter:
    """An IP-Adapter of FLUX.1 from its published file (.safetensors or .bin), of either make.

    The make is told by the names in the file:

    - "flux-xlabs" (also as diffusers renames it): double blocks; any number of tokens of CLIP
      ViT-L/14's embedding; K and V have biases. The query is the image's before RoPE, and the
      result is added after the block's MLP.
    - "flux-instantx": all blocks; tokens of SigLIP's pooled output; K and V come RMS-normed per
      head. The result is added before the output projection.

    Args:
        path: the file.
        layers: every attention layer of the transformer as (path of the module, width of its keys,
            width of the text before its embedder: 4096), in any order.
        head_dim: of the transformer.
        dtype: of the weights; None keeps the file's.

    Raises:
        FileNotFoundError: there is no such file.
        FileRefused: the file is damaged, asks for code, or does not fit; the message names what is
            missing, unexpected, or of another shape.
        ValueError: layers that are not a FLUX transformer's.

    Source: x-flux (XLabs-AI/flux-ip-adapter, -v2); InstantX/FLUX.1-dev-IP-Adapter.
    """
    tensors = read_tensors(path)
    host = flux_order(layers)
    xlabs = ("double_blocks.", "ip_adapter_proj_model.", "image_proj.proj.weight")
    if any(name.startswith(xlabs) for name in tensors):
        adapter, names = _xlabs(tensors, [x for x in host if not _position(x.name)[0]])
    else:
        adapter, names = _instantx(tensors, host, head_dim)
    what = (
        f"a {adapter.kind} IP-Adapter for {len(adapter.names)} layers of {host[0].inner} channels"
    )
    fill(adapter, tensors, source=os.fspath(path), what=what, names=names, dtype=dtype)
    return adapter


def _xlabs(tensors: Tensors, host: Sequence[HostLayer]) -> tuple[ImageAdapter, dict[str, str]]:
    out = host[0].context
    if any(name.startswith("image_proj.") for name in tensors):
        stem, projector_at = "ip_adapter.{}.to_{}_ip.", "image_proj."
    else:
        stem = "double_blocks.{}.processor.ip_adapter_double_stream_{}_proj."
        projector_at = "ip_adapter_proj_model."
    own = part(tensors, projector_at)
    embed = size(own, 768, ("proj.weight", 1))
    rows = size(own, 16 * out, ("proj.bias", 0), ("proj.weight", 0))
    with torch.device("meta"):
        projector = ImageProjection(embed, out, max(1, rows // out))
        pairs = {layer.name: KeyValue(layer.inner, out, bias=True) for layer in host}
    adapter = ImageAdapter("flux-xlabs", clip(embed, "embeds", "black"), projector, pairs)
    places = {x.name: (stem.format(i, "k"), stem.format(i, "v")) for i, x in enumerate(host)}
    return adapter, adapter.file_names(projector_at, places)


def _instantx(
    tensors: Tensors, host: Sequence[HostLayer], head_dim: int
) -> tuple[ImageAdapter, dict[str, str]]:
    out = host[0].context
    own = part(tensors, "image_proj.")
    embed = size(own, 1152, ("proj.0.weight", 1))
    inner = size(own, 2304, ("proj.0.weight", 0), ("proj.0.bias", 0), ("proj.2.weight", 1))
    rows = size(own, 128 * out, ("proj.2.bias", 0), ("proj.2.weight", 0))
    with torch.device("meta"):
        projector = MlpProjection(embed, inner, out, max(1, rows // out))
        pairs = {layer.name: KeyValue(layer.inner, out, rms_dim=head_dim) for layer in host}
    adapter = ImageAdapter("flux-instantx", siglip(embed, "pooled"), projector, pairs)
    stem = "ip_adapter.{}.to_{}_ip."
    places = {x.name: (stem.format(i, "k"), stem.format(i, "v")) for i, x in enumerate(host)}
    return adapter, adapter.file_names("image_proj.", places)
