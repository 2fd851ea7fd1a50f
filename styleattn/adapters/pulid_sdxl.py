"""PuLID for SDXL: a face's tokens, and their keys and values at every cross-attention."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ._adapter import Encoder, HostLayer, ImageAdapter, KeyValue, checkpoint_order
from ._files import Tensors, fill, part, read_tensors, size
from ._idformer import LEVELS, VISION_TOKENS, IDFormer, check_face, idformer_of, mapping

_FACE_TOKENS = 5


class IDEncoder(nn.Module):
    """The identity encoder of version 1: [R, face] and five levels to tokens [R, 10, out].

    Five tokens are `body(face)`; one is made of each level, of its first token and of the mean of
    its others: `map_s(v_s[0]) + mean_j map_patch_s(v_s[j])`.

    Args:
        face, vision: widths of the face embedding and of the vision features.
        inner: width of the hidden layers of `body`.
        out: width of the tokens.
    """

    def __init__(self, face: int, vision: int, inner: int, out: int) -> None:
        super().__init__()
        self.out = out
        self.body = mapping(face, inner, out * _FACE_TOKENS)
        for level in range(LEVELS):
            self.add_module(f"mapping_{level}", mapping(vision, vision, out))
            self.add_module(f"mapping_patch_{level}", mapping(vision, vision, out))

    @property
    def widths(self) -> tuple[int, int]:
        """Of the face embedding, and of the vision features."""
        face = self.get_parameter("body.0.weight").shape[1]
        return face, self.get_parameter("mapping_0.0.weight").shape[1]

    def forward(self, face: Tensor, vision: Sequence[Tensor]) -> Tensor:
        tokens = [self.body(face).reshape(face.shape[0], -1, self.out)]
        for level, features in enumerate(vision):
            first = self.get_submodule(f"mapping_{level}")(features[:, :1])
            others = self.get_submodule(f"mapping_patch_{level}")(features[:, 1:])
            tokens.append(first + others.mean(dim=1, keepdim=True))
        return torch.cat(tokens, dim=1)


class _AsTheyAre(nn.Module):
    """Keeps the identity encoder; what it made are the tokens."""

    def __init__(self, id_adapter: IDFormer | IDEncoder) -> None:
        super().__init__()
        self.id_adapter = id_adapter

    def forward(self, embeds: Tensor) -> Tensor:
        return embeds


class PuLIDSDXLAdapter(ImageAdapter):
    """PuLID's adapter for SDXL: the embeddings of a reference are what `identity` makes.

    Args:
        id_adapter: the identity encoder.
        out: width of the tokens.
        pairs: the projections by module path of the layer.
    """

    def __init__(
        self, id_adapter: IDFormer | IDEncoder, out: int, pairs: Mapping[str, KeyValue]
    ) -> None:
        encoder = Encoder("PuLID's identity encoder", out, "last", image_size=336)
        super().__init__("pulid-sdxl", encoder, _AsTheyAre(id_adapter), pairs)

    @property
    def id_adapter(self) -> IDFormer | IDEncoder:
        """The identity encoder."""
        found = self.projector.id_adapter
        if not isinstance(found, (IDFormer, IDEncoder)):
            raise TypeError(f"id_adapter is a {type(found).__name__}")
        return found

    def identity(self, face: Tensor, vision: Sequence[Tensor]) -> Tensor:
        """Identity tokens [R, M, out], the `embeds` of a reference.

        Args:
            face: [R, 1280], ArcFace's embedding (512, as it comes) and EVA02-CLIP-L-336's (768,
                divided by its norm), side by side; [R, F, 1280] for F pictures (version 1.1).
            vision: five hidden states [R, 577, 1024] of that tower, before its blocks 4, 8, 12, 16
                and 20.

        Raises:
            Invalid: other shapes.
        """
        check_face(face, vision, self.id_adapter.widths)
        dtype = next(self.id_adapter.parameters()).dtype
        tokens: Tensor = self.id_adapter(face.to(dtype), [v.to(dtype) for v in vision])
        return tokens

    def negative(self, embeds: Tensor) -> Tensor:
        """The tokens of no identity, made of zeros (they are not zero); made once.

        Raises:
            Invalid: embeddings of another shape.
        """
        self._check("negative", embeds)
        if self.blank is None or self.blank.shape[0] != embeds.shape[1]:
            width, level = self.id_adapter.widths
            zero = next(self.id_adapter.parameters()).new_zeros
            with torch.no_grad():
                self.blank = self.identity(
                    zero(1, width), [zero(1, VISION_TOKENS, level)] * LEVELS
                )[0]
        return self.blank.to(embeds).expand_as(embeds)


def load_pulid_sdxl(
    path: str | os.PathLike[str],
    layers: Sequence[HostLayer | tuple[str, int, int]],
    *,
    dtype: torch.dtype | None = None,
) -> PuLIDSDXLAdapter:
    """PuLID for SDXL from its published file (pulid_v1.bin, pulid_v1.1.safetensors).

    Args:
        path: the file; its version is told by the names in it.
        layers: every cross-attention layer of the host as (path of the module, width of its keys,
            width of the text), in any order.
        dtype: of the weights; None keeps the file's.

    Raises:
        FileNotFoundError: there is no such file.
        FileRefused: the file is damaged, asks for code, or does not fit; the message names what is
            missing, unexpected, or of another shape.
        ValueError: layers that are not a UNet's.

    Source: PuLID (arXiv 2404.16022); the SDXL releases, versions 1 and 1.1.
    """
    tensors = read_tensors(path)
    host = checkpoint_order(layers)
    out = host[0].context
    own = part(tensors, "id_adapter.")
    first = any(name.startswith(("body.", "mapping_patch_")) for name in own)
    id_adapter = _id_encoder(own, out) if first else idformer_of(own, out)
    with torch.device("meta"):
        pairs = {layer.name: KeyValue(layer.inner, out) for layer in host}
    adapter = PuLIDSDXLAdapter(id_adapter, out, pairs)
    stem = "id_adapter_attn_layers.{}.id_to_{}."
    places = {
        x.name: (stem.format(2 * i + 1, "k"), stem.format(2 * i + 1, "v"))
        for i, x in enumerate(host)
    }
    names = adapter.file_names("", places)
    what = f"a PuLID {'v1' if first else 'v1.1'} checkpoint for {len(host)} layers of SDXL"
    fill(adapter, tensors, source=os.fspath(path), what=what, names=names, dtype=dtype)
    return adapter


def _id_encoder(tensors: Tensors, out: int) -> IDEncoder:
    levels = [
        f"{name}_{i}.0.weight" for name in ("mapping", "mapping_patch") for i in range(LEVELS)
    ]
    with torch.device("meta"):
        return IDEncoder(
            face=size(tensors, 1280, ("body.0.weight", 1)),
            vision=size(tensors, 1024, *((name, 1) for name in levels)),
            inner=size(
                tensors, 1024, ("body.0.weight", 0), ("body.0.bias", 0), ("body.6.weight", 1)
            ),
            out=out,
        )
