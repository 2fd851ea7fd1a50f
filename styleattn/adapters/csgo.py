"""CSGO: two projectors, for content and for style, and the layers that each of them reaches."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ._adapter import HostLayer, ImageAdapter, KeyValue, checkpoint_order, clip, indexed
from ._files import Tensors, fill, part, read_tensors
from ._perceiver import Resampler, resampler_of

_PAIR = re.compile(r"ip_adapter\.(\d+)\.to_[kv]_ip(?:_content)?\.weight")


@dataclass(frozen=True)
class CSGO:
    """The adapters of a CSGO checkpoint.

    Args:
        content, style: the two branches of the UNet; each layer has one K/V pair, and a second one
            where both branches meet.
        control: the style branch of the ControlNet, with the style's projector; None where its
            layers were not asked for.
        conv_in: another input convolution for the UNet ("weight", "bias"), where the file has one.
    """

    content: ImageAdapter
    style: ImageAdapter
    control: ImageAdapter | None
    conv_in: dict[str, Tensor]


def load_csgo(
    path: str | os.PathLike[str],
    layers: Sequence[HostLayer | tuple[str, int, int]],
    *,
    content_blocks: Sequence[str] = (),
    style_blocks: Sequence[str] = ("up_blocks",),
    control_layers: Sequence[HostLayer | tuple[str, int, int]] = (),
    control_blocks: Sequence[str] = ("down_blocks",),
    dtype: torch.dtype | None = None,
) -> CSGO:
    """The CSGO adapters of SDXL from their published file (csgo.bin, csgo_4_32.bin).

    Published files have the style at `up_blocks` only: by default the content reaches no layer of
    the UNet, and acts through the ControlNet. Ask for more with `content_blocks`; the file must
    then have those layers. What it has for layers that were not asked for is left alone.

    Args:
        path: the file.
        layers: every cross-attention layer of the UNet as (path of the module, width of its keys,
            width of the text), in any order.
        content_blocks, style_blocks: where the branches act in the UNet, as prefixes of paths.
        control_layers: every cross-attention layer of the ControlNet; none: without its adapters.
        control_blocks: where the style acts in the ControlNet.
        dtype: of the weights; None keeps the file's.

    Raises:
        FileNotFoundError: there is no such file.
        FileRefused: the file is damaged, asks for code, or does not fit; the message names what is
            missing, unexpected, or of another shape.
        ValueError: layers that are not a UNet's.

    Source: CSGO (arXiv 2408.16766).
    """
    tensors = read_tensors(path)
    host = checkpoint_order(layers)
    out = host[0].context
    content_at, style_at = _at(host, content_blocks), _at(host, style_blocks)
    both = {layer.name for layer in content_at} & {layer.name for layer in style_at}
    own, second = indexed(host, "ip_adapter."), indexed(host, "ip_adapter.", "_content")
    content = _adapter("csgo-content", _resampler(tensors, "content", out, 4), content_at)
    style = _adapter("csgo-style", _resampler(tensors, "style", out, 32), style_at)
    whole = nn.ModuleDict({"content": content, "style": style})
    content_places = {name: second[name] if name in both else own[name] for name in own}
    names = content.file_names("content_image_proj.", content_places, "content.")
    names |= style.file_names("style_image_proj.", own, "style.")
    control = None
    if control_layers:
        at = _at(checkpoint_order(control_layers), control_blocks)
        control = _adapter("csgo-control", style.projector, at)
        whole["control"] = control
        names |= control.file_names("style_image_proj.", _control_places(at), "control.")
    used = set(names.values())
    kept = {k: v for k, v in tensors.items() if k in used or not _optional(k, len(host))}
    what = (
        f"a CSGO checkpoint for {len(host)} layers, with content at {list(content_blocks)}, style "
        f"at {list(style_blocks)} and {len(control_layers)} layers of a ControlNet"
    )
    fill(whole, kept, source=os.fspath(path), what=what, names=names, dtype=dtype)
    conv = part(tensors, "conv_in_unet_sd.")
    return CSGO(content, style, control, {k: v.to(dtype or v.dtype) for k, v in conv.items()})


def _at(host: Sequence[HostLayer], blocks: Sequence[str]) -> list[HostLayer]:
    return [layer for layer in host if any(layer.name.startswith(f"{b}.") for b in blocks)]


def _resampler(tensors: Tensors, kind: str, out: int, queries: int) -> Resampler:
    own = part(tensors, f"{kind}_image_proj.")
    return resampler_of(own, out, embed=1664, dim=out, queries=queries, heads=12)


def _adapter(kind: str, projector: nn.Module, at: Sequence[HostLayer]) -> ImageAdapter:
    with torch.device("meta"):
        pairs = {layer.name: KeyValue(layer.inner, layer.context) for layer in at}
    width = projector.proj_in.in_features if isinstance(projector, Resampler) else 0
    return ImageAdapter(kind, clip(width, "hidden", "zeros"), projector, pairs)


def _control_places(at: Sequence[HostLayer]) -> dict[str, tuple[str, str]]:
    stem = "controlnet_adapter_modules.{}.processor.to_{}_ip."
    return {
        layer.name: (stem.format(layer.name, "k"), stem.format(layer.name, "v")) for layer in at
    }


def _optional(name: str, layers: int) -> bool:
    """Whether a file may have the tensor beyond what is asked of it."""
    if name.startswith(("conv_in_unet_sd.", "controlnet_adapter_modules.")):
        return True
    match = _PAIR.fullmatch(name)
    return match is not None and int(match[1]) % 2 == 1 and int(match[1]) < 2 * layers
