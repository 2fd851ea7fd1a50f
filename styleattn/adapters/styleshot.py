"""StyleShot: three embeddings of patches of three sizes, two tokens of each."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ._adapter import Encoder, HostLayer, ImageAdapter, KeyValue, checkpoint_order, indexed
from ._files import fill, part, read_tensors, size
from .ip_adapter import ImageProjection

_SCALES, _TOKENS = 3, 2


class PatchProjection(nn.ModuleList):
    """`[LN(W_s e_s)]_s` for three scales: [R, 3, embed] to tokens [R, 6, out]."""

    def __init__(self, embed: int, out: int) -> None:
        super().__init__(ImageProjection(embed, out, _TOKENS) for _ in range(_SCALES))

    def forward(self, embeds: Tensor) -> Tensor:
        scales = zip(self, embeds.unbind(1), strict=True)
        return torch.cat([project(embed) for project, embed in scales], dim=1)


def load_styleshot(
    path: str | os.PathLike[str],
    layers: Sequence[HostLayer | tuple[str, int, int]],
    *,
    dtype: torch.dtype | None = None,
) -> ImageAdapter:
    """The StyleShot adapter of SD1.5 from its published file (ip.bin).

    Its inputs are the three outputs [R, 3, 1024] of the style-aware encoder, which is a model and a
    file of its own. The copies of the UNet and of the content ControlNet that the file may have are
    left alone.

    Args:
        path: the file.
        layers: every cross-attention layer of the host as (path of the module, width of its keys,
            width of the text), in any order.
        dtype: of the weights; None keeps the file's.

    Raises:
        FileNotFoundError: there is no such file.
        FileRefused: the file is damaged, asks for code, or does not fit; the message names what is
            missing, unexpected, or of another shape.
        ValueError: layers that are not a UNet's.

    Source: StyleShot (arXiv 2407.01414).
    """
    tensors = {
        k: v for k, v in read_tensors(path).items() if not k.startswith(("unet.", "controlnet."))
    }
    host = checkpoint_order(layers)
    out = host[0].context
    stem = "style_image_proj_modules."
    projections = part(tensors, stem)
    embed = size(projections, 1024, *((f"{i}.proj.weight", 1) for i in range(_SCALES)))
    with torch.device("meta"):
        pairs = {layer.name: KeyValue(layer.inner, out) for layer in host}
        projector = PatchProjection(embed, out)
    encoder = Encoder("StyleShot's style-aware encoder", embed, "last")
    adapter = ImageAdapter("styleshot", encoder, projector, pairs)
    names = adapter.file_names(stem, indexed(host, "adapter_modules."))
    what = f"a StyleShot adapter for {len(host)} layers that read {out} channels"
    fill(adapter, tensors, source=os.fspath(path), what=what, names=names, dtype=dtype)
    return adapter
