"""FLUX.1 Redux: a picture as words of the text encoder."""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from styleattn.errors import describe, invalid

from ._adapter import siglip
from ._files import fill, read_tensors, size


class Redux(nn.Module):
    """SigLIP tokens to T5-like tokens: `W_down SiLU(W_up e + b_up) + b_down`.

    Source: FLUX.1 Redux [dev]; flux1-redux-dev.safetensors.
    """

    kind = "redux"

    def __init__(self, embed: int = 1152, inner: int = 12288, out: int = 4096) -> None:
        super().__init__()
        self.encoder = siglip(embed, "last")
        self.redux_up = nn.Linear(embed, inner)
        self.redux_down = nn.Linear(inner, out)

    def tokens(self, embeds: Tensor) -> Tensor:
        """Tokens [R, S, out] of SigLIP's last hidden states [R, S, embed] (after the last norm),
        to stand behind the text's own.

        Raises:
            Invalid: another shape.
        """
        if embeds.dim() != 3 or embeds.shape[-1] != self.encoder.width:
            reason = (
                f"Redux takes the last hidden state of {self.encoder.tower}, [R, S, width] with "
                f"width {self.encoder.width}"
            )
            raise invalid("tokens", [reason], f"embeds {describe(embeds)}")
        tokens: Tensor = self.redux_down(
            F.silu(self.redux_up(embeds.to(self.redux_up.weight.dtype)))
        )
        return tokens


def load_redux(path: str | os.PathLike[str], *, dtype: torch.dtype | None = None) -> Redux:
    """Redux from its published file (flux1-redux-dev.safetensors), or from diffusers' copy of it.

    Args:
        path: the file.
        dtype: of the weights; None keeps the file's.

    Raises:
        FileNotFoundError: there is no such file.
        FileRefused: the file is damaged, asks for code, or does not fit; the message names what is
            missing, unexpected, or of another shape.
    """
    tensors = read_tensors(path)
    with torch.device("meta"):
        redux = Redux(
            size(tensors, 1152, ("redux_up.weight", 1)),
            size(
                tensors,
                12288,
                ("redux_up.weight", 0),
                ("redux_up.bias", 0),
                ("redux_down.weight", 1),
            ),
            size(tensors, 4096, ("redux_down.weight", 0), ("redux_down.bias", 0)),
        )
    fill(redux, tensors, source=os.fspath(path), what="a Redux projector", dtype=dtype)
    return redux
