"""DEADiff: two Q-Formers that see style and content apart, each with layers of its own."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ._adapter import HostLayer, ImageAdapter, KeyValue, checkpoint_order, clip
from ._files import Tensors, check, fill, part, read_tensors, size
from ._ldm import diffusers_name
from ._qformer import QFormer

CONTENT_BLOCKS = (
    "down_blocks.2.",
    "mid_block.",
    "up_blocks.1.attentions.0.",
    "up_blocks.1.attentions.1.",
)
# [CLS] word [SEP] in BERT's uncased vocabulary
WORDS = {"style": (101, 2806, 102), "content": (101, 4180, 102)}
_DEPTH = 12


@dataclass(frozen=True)
class DEADiff:
    """The parts of a DEADiff checkpoint.

    Args:
        style, content: their projectors, each with K and V at its own layers.
        unet: every other weight of the UNet, under diffusers' names; it differs from SD1.5's.
    """

    style: ImageAdapter
    content: ImageAdapter
    unet: dict[str, Tensor]


class Projector(nn.Module):
    """A Q-Former and `y = x + W_2 (a sigmoid(1.702 a))`, `a = W_1 LN(x)`: [R, S, 1024] to
    [R, 16, 768]."""

    def __init__(self, qformer: QFormer, dim: int, inner: int) -> None:
        super().__init__()
        self.qformer = qformer
        self.dense1 = nn.Linear(dim, inner)
        self.dense2 = nn.Linear(inner, dim)
        self.LayerNorm = nn.LayerNorm(dim, eps=1e-12)

    def forward(self, image: Tensor) -> Tensor:
        x: Tensor = self.qformer(image)
        inner = self.dense1(self.LayerNorm(x))
        return x + self.dense2(inner * torch.sigmoid(1.702 * inner))


def load_deadiff(
    path: str | os.PathLike[str],
    layers: Sequence[HostLayer | tuple[str, int, int]],
    *,
    unet: Mapping[str, Sequence[int]] | None = None,
    dtype: torch.dtype | None = None,
) -> DEADiff:
    """The adapters and the UNet of DEADiff from its published file (deadiff_v1.ckpt).

    Content acts at `down_blocks.2`, the middle and the first two modules of `up_blocks.1`, style at
    the other eleven. The file's copies of the VAE, the text encoder and the CLIP tower were not
    trained and are left alone.

    Args:
        path: the file.
        layers: every cross-attention layer of the host as (path of the module, width of its keys,
            width of the text), in any order.
        unet: names and shapes of the host's `state_dict`; with them, the UNet is checked too.
        dtype: of the weights; None keeps the file's.

    Raises:
        FileNotFoundError: there is no such file.
        FileRefused: the file is damaged, asks for code, or does not fit; the message names what is
            missing, unexpected, or of another shape, the UNet's weights as diffusers does.
        ValueError: layers that are not a UNet's.

    Source: DEADiff (arXiv 2403.06951).
    """
    tensors = _named(read_tensors(path))
    host = checkpoint_order(layers)
    adapters: dict[str, ImageAdapter] = {}
    names: dict[str, str] = {}
    for kind in ("style", "content"):
        at = [x for x in host if x.name.startswith(CONTENT_BLOCKS) == (kind == "content")]
        adapters[kind] = _adapter(kind, tensors, at)
        names |= _file_names(kind, adapters[kind])
    whole = nn.ModuleDict(adapters)
    expected = {names[k]: v.shape for k, v in whole.state_dict().items()}
    own = {k: v for k, v in tensors.items() if k in expected}
    others = {k: v for k, v in tensors.items() if k not in expected}
    shapes = {f"unet.{k}": tuple(shape) for k, shape in (unet or {}).items()}
    if unet is None:
        shapes = {k: tuple(v.shape) for k, v in others.items() if _is_unet(k)}
    what = f"a DEADiff checkpoint for {len(host)} layers"
    check(tensors, {**expected, **shapes}, os.fspath(path), what)
    fill(whole, own, source=os.fspath(path), what=what, names=names, dtype=dtype)
    rest = {k: v.to(dtype or v.dtype) for k, v in part(others, "unet.").items()}
    return DEADiff(adapters["style"], adapters["content"], rest)


def _named(tensors: Tensors) -> dict[str, Tensor]:
    """What is of use in a file, the UNet's part under diffusers' names after ``unet.``."""
    found = part(tensors, "state_dict.") or dict(tensors)
    ldm = part(found, "model.diffusion_model.")
    kept = {f"unet.{diffusers_name(k)}": v for k, v in ldm.items()}
    for kind in ("style", "content"):
        blip = part(found, f"{kind}_blip.")
        useful = ("query_tokens", "ln_vision.", "Qformer.bert.")
        kept |= {f"{kind}_blip.{k}": v for k, v in blip.items() if k.startswith(useful)}
        kept.pop(f"{kind}_blip.Qformer.bert.embeddings.position_ids", None)
        kept |= {k: v for k, v in found.items() if k.startswith(f"{kind}_proj_layer.")}
    return kept


def _is_unet(name: str) -> bool:
    """Whether a tensor without a known shape may be a UNet's weight, and no adapter's."""
    return name.startswith("unet.") and ".attn2.i_to_" not in name


def _adapter(kind: str, tensors: Tensors, at: Sequence[HostLayer]) -> ImageAdapter:
    blip, project = part(tensors, f"{kind}_blip."), part(tensors, f"{kind}_proj_layer.")
    dim = size(blip, 768, ("query_tokens", 2), ("Qformer.bert.embeddings.LayerNorm.weight", 0))
    context = size(blip, 1024, ("ln_vision.weight", 0), ("ln_vision.bias", 0))
    feed = "Qformer.bert.encoder.layer.{}.intermediate.dense.weight"
    inner = size(blip, 3072, *((feed.format(i), 0) for i in range(_DEPTH)))
    queries = size(blip, 16, ("query_tokens", 1))
    with torch.device("meta"):
        qformer = QFormer(dim, context, queries, inner, _DEPTH, WORDS[kind])
        projector = Projector(qformer, dim, size(project, 3072, ("dense1.weight", 0)))
        pairs = {layer.name: KeyValue(layer.inner, layer.context) for layer in at}
    encoder = clip(context, "hidden", "null", crop=False)
    return ImageAdapter(f"deadiff-{kind}", encoder, projector, pairs)


def _file_names(kind: str, adapter: ImageAdapter) -> dict[str, str]:
    places = {x: (f"unet.{x}.i_to_k.", f"unet.{x}.i_to_v.") for x in adapter.names}
    names = adapter.file_names(f"{kind}_proj_layer.", places, f"{kind}.")
    stem = f"{kind}.projector.qformer."
    inner = {
        "embeddings.": "Qformer.bert.embeddings.",
        "layers.": "Qformer.bert.encoder.layer.",
    }
    for name in names:
        if name.startswith(stem):
            leaf = name.removeprefix(stem)
            for old, new in inner.items():
                leaf = new + leaf.removeprefix(old) if leaf.startswith(old) else leaf
            names[name] = f"{kind}_blip.{leaf}"
    return names
