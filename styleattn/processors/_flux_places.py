"""Where image tokens are: shares of masks under them, and positions beside the image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from styleattn.methods._joint import Rotary


def share_of(mask: Tensor, places: Tensor) -> Tensor:
    """[N]: the mean of a mask [h, w] under every token; without leaving the device.

    The image is as many cells high and wide as the largest place says; a token sees the pixels that
    its cell touches, in whatever order the tokens come.

    Args:
        mask: [h, w] fp32 in [0, 1]. places: [N, 2] int, row and column.
    """
    size = places.amax(0) + 1
    extent = torch.tensor(mask.shape, device=places.device)
    low = places * extent // size
    high = -(-(places + 1) * extent // size)
    sums = F.pad(mask.double().cumsum(0).cumsum(1), (1, 0, 1, 0))
    top, left, bottom, right = low[:, 0], low[:, 1], high[:, 0], high[:, 1]
    inside = sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left]
    share = (inside / (high - low).prod(1)).clamp(0.0, 1.0)
    return torch.where(share < _NOTHING, 0.0, share).float()


_NOTHING = 1e-9
"""What differences of sums leave of an empty cell."""


class Moved:
    """Rotary positions of the image tokens beside their places, made once per denoiser call.

    Args:
        model: the transformer, whose own positions they are.
        ids: [N, 3] of the image tokens.
    """

    def __init__(self, model: Any, ids: Tensor):
        self._embed, self._ids = model.pos_embed, ids
        self._made: dict[tuple[float, float], Rotary] = {}

    def __call__(self, offset: tuple[float, float]) -> Rotary:
        """cos and sin [N, D] of the tokens moved down and right by heights and widths of the
        image."""
        if offset not in self._made:
            size = self._ids[:, 1:].amax(0) + 1
            step = size * torch.tensor(offset, dtype=size.dtype, device=size.device)
            here = torch.cat([self._ids[:, :1], self._ids[:, 1:] + step], 1)
            cos, sin = self._embed(here)
            self._made[offset] = (cos, sin)
        return self._made[offset]
