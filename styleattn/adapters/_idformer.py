"""PuLID's identity encoder: a face embedding and vision features to tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from styleattn.errors import describe, invalid

from ._files import Tensors, size
from ._perceiver import HEAD_DIM, PerceiverAttention, feed_forward

LEVELS = 5  # hidden states of the vision tower: before its blocks 4, 8, 12, 16 and 20
VISION_TOKENS = 577  # of the vision tower for one picture
_DEPTH = 10
_FACE_TOKENS = 5


def mapping(into: int, width: int, out: int) -> nn.Sequential:
    """Three Linears with LayerNorm and leaky ReLU (slope 0.01) between."""
    return nn.Sequential(
        nn.Linear(into, width),
        nn.LayerNorm(width),
        nn.LeakyReLU(),
        nn.Linear(width, width),
        nn.LayerNorm(width),
        nn.LeakyReLU(),
        nn.Linear(width, out),
    )


class IDFormer(nn.Module):
    """A face embedding and five levels of vision features to identity tokens [R, M, out].

    `f = map(face)` (5 tokens of each picture), `x = [latents; f]`; for each level s, two layers of
    `x = x + attention([f; map_s(v_s)], x)`, `x = x + feed_forward(x)`; the tokens are the rows of
    the latents in `x`, times `proj_out`.

    Args:
        face: width of the face embedding (ArcFace's 512 and EVA-CLIP's 768).
        vision: width of the vision features.
        dim: width of the latents.
        queries: M.
        heads: of 64 channels each.
        out: width of the tokens.

    Source: PuLID (arXiv 2404.16022), the FLUX release; pulid_flux_v0.9.0 and v0.9.1.
    """

    def __init__(
        self, face: int, vision: int, dim: int, queries: int, heads: int, out: int
    ) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.empty(1, queries, dim))
        self.proj_out = nn.Parameter(torch.empty(dim, out))
        self.layers = nn.ModuleList(
            nn.ModuleList([PerceiverAttention(dim, dim, heads), feed_forward(dim)])
            for _ in range(_DEPTH)
        )
        for level in range(LEVELS):
            self.add_module(f"mapping_{level}", mapping(vision, vision, dim))
        self.id_embedding_mapping = mapping(face, vision, dim * _FACE_TOKENS)

    @property
    def widths(self) -> tuple[int, int]:
        """Of the face embedding, and of the vision features."""
        face = self.get_parameter("id_embedding_mapping.0.weight").shape[1]
        return face, self.get_parameter("mapping_0.0.weight").shape[1]

    def forward(self, face: Tensor, vision: Sequence[Tensor]) -> Tensor:
        faces = self.id_embedding_mapping(face).reshape(face.shape[0], -1, self.latents.shape[-1])
        x = torch.cat((self.latents.expand(face.shape[0], -1, -1), faces), dim=1)
        for index, layer in enumerate(self.layers):
            level = index * LEVELS // _DEPTH
            if index % (_DEPTH // LEVELS) == 0:
                mapped = self.get_submodule(f"mapping_{level}")(vision[level])
                context = torch.cat((faces, mapped), dim=1)
            attend, mix = layer.children()
            x = x + attend(context, x)
            x = x + mix(x)
        return x[:, : self.latents.shape[1]] @ self.proj_out


def check_face(face: Tensor, vision: Sequence[Tensor], widths: tuple[int, int]) -> None:
    """Hold the inputs of an identity encoder against its widths.

    Raises:
        Invalid: other shapes; all reasons at once.
    """
    width, level = widths
    reasons = []
    if face.dim() not in (2, 3) or face.shape[-1] != width:
        reasons.append(f"face must be [R, {width}], or [R, F, {width}] of F pictures")
    if len(vision) != LEVELS or any(
        v.dim() != 3 or v.shape[0] != face.shape[0] or v.shape[-1] != level for v in vision
    ):
        reasons.append(f"vision must be {LEVELS} tensors [R, S, {level}], R as in face")
    if reasons:
        given = ", ".join(describe(v) for v in vision)
        raise invalid("tokens", reasons, f"face {describe(face)}, vision {given}")


def idformer_of(tensors: Tensors, out: int) -> IDFormer:
    """An IDFormer of the sizes that a file has, without weights; `out` is given."""
    inner = size(tensors, 1024, *((f"layers.{i}.0.to_q.weight", 0) for i in range(_DEPTH)))
    with torch.device("meta"):
        return IDFormer(
            face=size(tensors, 1280, ("id_embedding_mapping.0.weight", 1)),
            vision=size(tensors, 1024, *((f"mapping_{i}.0.weight", 1) for i in range(LEVELS))),
            dim=size(tensors, 1024, ("latents", 2), ("proj_out", 0), ("layers.0.1.0.weight", 0)),
            queries=size(tensors, 32, ("latents", 1)),
            heads=max(1, inner // HEAD_DIM),
            out=out,
        )
