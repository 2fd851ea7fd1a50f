"""USO: the style of a picture as tokens of FLUX's own width."""

from __future__ import annotations

import os
from dataclasses import replace

import torch
from torch import Tensor, nn

from styleattn.errors import describe, invalid

from ._adapter import siglip
from ._files import fill, part, read_tensors, size

LEVELS = {"high": -2, "mid": -11, "low": -20}
"""Which of SigLIP's hidden states each level takes, in the order of the tokens."""
_PREFIX = "feature_embedder."


class USO(nn.Module):
    """Three levels of SigLIP to tokens behind FLUX's text embedder, per level

        W_p LN( SiLU(W_t x + b_t) ) + b_p,    W_t over the tokens of x, W_p over its channels

    Args:
        embed, grid: width and number of SigLIP's tokens.
        tokens: per level.
        out: width of the transformer.

    Source: Wu et al., USO, arXiv 2508.18966; uso_flux_v1.0/projector.safetensors.
    """

    kind = "uso"

    def __init__(
        self, embed: int = 1152, grid: int = 729, tokens: int = 64, out: int = 3072
    ) -> None:
        super().__init__()
        self.encoder = replace(siglip(embed, "last"), output="levels", layer=tuple(LEVELS.values()))
        self.grid = grid
        for level in LEVELS:
            mixed = nn.Sequential(nn.Linear(grid, tokens), nn.SiLU())
            self.add_module(f"{level}_embedding_linear", mixed)
            self.add_module(f"{level}_layer_norm", nn.LayerNorm(embed))
            self.add_module(f"{level}_projection", nn.Linear(embed, out))

    def tokens(self, embeds: Tensor) -> Tensor:
        """Tokens [R, 3 M, out] of three hidden states [R, 3, S, embed]: -2, -11 and -20.

        Raises:
            Invalid: another shape.
        """
        wanted = (len(LEVELS), self.grid, self.encoder.width)
        if embeds.dim() != 4 or tuple(embeds.shape[1:]) != wanted:
            reason = (
                f"USO takes hidden states -2, -11 and -20 of {self.encoder.tower}, [R, 3, S, width]"
                f" with {self.grid} tokens of width {self.encoder.width}"
            )
            raise invalid("tokens", [reason], f"embeds {describe(embeds)}")
        found = []
        for level, x in zip(LEVELS, embeds.to(next(self.parameters())).unbind(1), strict=True):
            mixed = self.get_submodule(f"{level}_embedding_linear")(x.transpose(1, 2))
            normed = self.get_submodule(f"{level}_layer_norm")(mixed.transpose(1, 2))
            found.append(self.get_submodule(f"{level}_projection")(normed))
        return torch.cat(found, 1)


def load_uso(path: str | os.PathLike[str], *, dtype: torch.dtype | None = None) -> USO:
    """USO's projector of style pictures from its published file (projector.safetensors).

    Args:
        path: the file.
        dtype: of the weights; None keeps the file's.

    Raises:
        FileNotFoundError: there is no such file.
        FileRefused: the file is damaged, asks for code, or does not fit; the message names what is
            missing, unexpected, or of another shape.
    """
    tensors = read_tensors(path)
    tensors = part(tensors, _PREFIX) or tensors
    mixed = [f"{level}_embedding_linear.0.weight" for level in LEVELS]
    read = [f"{level}_projection.weight" for level in LEVELS]
    with torch.device("meta"):
        projector = USO(
            size(tensors, 1152, *((name, 1) for name in read)),
            size(tensors, 729, *((name, 1) for name in mixed)),
            size(tensors, 64, *((name, 0) for name in mixed)),
            size(tensors, 3072, *((name, 0) for name in read)),
        )
    fill(projector, tensors, source=os.fspath(path), what="a USO projector", dtype=dtype)
    return projector
