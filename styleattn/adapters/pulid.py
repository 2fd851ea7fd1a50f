"""PuLID for FLUX: a face as 32 tokens, read by the image tokens between blocks."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ._files import fill, part, read_tensors, size
from ._idformer import LEVELS, VISION_TOKENS, IDFormer, check_face, idformer_of
from ._perceiver import PerceiverAttention

_CA_HEAD_DIM = 128
DOUBLE_EVERY, SINGLE_EVERY = 2, 4


class IdentityAttention(PerceiverAttention):
    """Image tokens [B, N, dim] that read identity tokens [R, M, context], in parts: what a host
    needs to run the attention itself."""

    def __init__(self, dim: int, context: int, heads: int, head_dim: int) -> None:
        super().__init__(dim, context, heads, head_dim, own_keys=False)

    def query(self, image: Tensor) -> Tensor:
        """[B, heads, N, D] of image tokens."""
        return self.split(self.to_q(self.norm2(image)))

    def key_value(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """[R, heads, M, D] each, of identity tokens."""
        key, value = self.to_kv(self.norm1(tokens)).chunk(2, dim=-1)
        return self.split(key), self.split(value)

    def out(self, attended: Tensor) -> Tensor:
        """What is added to the image tokens, of the attention's result [B, heads, N, D]."""
        result: Tensor = self.to_out(attended.transpose(1, 2).flatten(-2))
        return result


class PuLID(nn.Module):
    """The identity encoder and the cross-attentions of PuLID-FLUX. The weights are frozen.

    `image = image + id_weight * out(softmax(q k^T / sqrt(D)) v)` on image tokens, after the blocks
    of `places`.

    Args:
        pulid_encoder: makes the identity tokens.
        pulid_ca: the cross-attentions, in the order of the blocks.
    """

    kind = "pulid-flux"

    def __init__(self, pulid_encoder: IDFormer, pulid_ca: Sequence[IdentityAttention]) -> None:
        super().__init__()
        self.pulid_encoder = pulid_encoder
        self.pulid_ca = nn.ModuleList(pulid_ca)
        self._nobody: Tensor | None = None

    def tokens(self, face: Tensor, vision: Sequence[Tensor]) -> Tensor:
        """Identity tokens [R, M, out].

        Args:
            face: [R, 1280], ArcFace's embedding (512, as it comes) and EVA02-CLIP-L-336's (768,
                divided by its norm), side by side; [R, F, 1280] for F pictures of one face.
            vision: five hidden states [R, 577, 1024] of that tower, before its blocks 4, 8, 12, 16
                and 20; those of several pictures one after the other, [R, F * 577, 1024].

        Raises:
            Invalid: other shapes.
        """
        check_face(face, vision, self.pulid_encoder.widths)
        dtype = self.pulid_encoder.latents.dtype
        tokens: Tensor = self.pulid_encoder(face.to(dtype), [v.to(dtype) for v in vision])
        return tokens

    def negative(self, face: Tensor, vision: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The inputs of `tokens` that stand for no identity: zeros, whose tokens are not zero."""
        return torch.zeros_like(face), [torch.zeros_like(v) for v in vision]

    @torch.no_grad()
    def nobody(self) -> Tensor:
        """[1, M, out]: the tokens of no identity, made once."""
        if self._nobody is None:
            zero = self.pulid_encoder.latents.new_zeros
            face, level = self.pulid_encoder.widths
            self._nobody = self.tokens(zero(1, face), [zero(1, VISION_TOKENS, level)] * LEVELS)
        return self._nobody

    def places(self, double: int = 19, single: int = 38) -> dict[str, int]:
        """Which cross-attention follows which block, by the block's module path.

        Args:
            double, single: numbers of blocks of the transformer.

        Raises:
            ValueError: the transformer has other numbers than the cross-attentions were made for.
        """
        names = [f"transformer_blocks.{i}" for i in range(0, double, DOUBLE_EVERY)]
        names += [f"single_transformer_blocks.{i}" for i in range(0, single, SINGLE_EVERY)]
        if len(names) != len(self.pulid_ca):
            raise ValueError(
                f"{double} double and {single} single blocks want {len(names)} cross-attentions; "
                f"there are {len(self.pulid_ca)}"
            )
        return {name: index for index, name in enumerate(names)}

    def attention(self, index: int) -> IdentityAttention:
        """One of the cross-attentions."""
        found = self.pulid_ca[index]
        if not isinstance(found, IdentityAttention):
            raise TypeError(f"pulid_ca.{index} is a {type(found).__name__}")
        return found


def load_pulid(
    path: str | os.PathLike[str],
    *,
    double: int = 19,
    single: int = 38,
    dtype: torch.dtype | None = None,
) -> PuLID:
    """PuLID-FLUX from its published file (pulid_flux_v0.9.0 or v0.9.1, .safetensors).

    Args:
        path: the file.
        double, single: numbers of blocks of the transformer.
        dtype: of the weights; None keeps the file's.

    Raises:
        FileNotFoundError: there is no such file.
        FileRefused: the file is damaged, asks for code, or does not fit; the message names what is
            missing, unexpected, or of another shape.

    Source: PuLID (arXiv 2404.16022), the FLUX release.
    """
    tensors = read_tensors(path)
    count = -(-double // DOUBLE_EVERY) + -(-single // SINGLE_EVERY)
    wide = [f"pulid_ca.{i}" for i in range(count)]
    places = [("pulid_encoder.proj_out", 1), *((f"{name}.norm1.weight", 0) for name in wide)]
    out = size(tensors, 2048, *places)
    encoder = idformer_of(part(tensors, "pulid_encoder."), out)
    inner = size(tensors, 2048, *((f"{name}.to_q.weight", 0) for name in wide))
    dim = size(tensors, 3072, *((f"{name}.norm2.weight", 0) for name in wide))
    heads = max(1, inner // _CA_HEAD_DIM)
    with torch.device("meta"):
        attentions = [IdentityAttention(dim, out, heads, _CA_HEAD_DIM) for _ in range(count)]
    pulid = PuLID(encoder, attentions)
    what = f"a PuLID-FLUX checkpoint for {double} double and {single} single blocks"
    fill(pulid, tensors, source=os.fspath(path), what=what, dtype=dtype)
    return pulid
