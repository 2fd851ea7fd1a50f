"""AdaIN towards references, folded: what the methods that align statistics have in common."""

from __future__ import annotations

import torch
from torch import Tensor

from styleattn._maps import on_device
from styleattn.branch import Affine
from styleattn.statistics import TokenStats, adain_affine, token_stats

from ._base import Number, Rows, SelfCall, off
from ._joint import JointCall

_EPS = 1e-5


def adain(
    wanted: bool, x: Tensor, call: SelfCall | JointCall
) -> tuple[Affine | None, TokenStats | None]:
    """AdaIN of every row to its references, the identity on references; and the statistics of x."""
    if not wanted:
        return None, None
    own = token_stats(x, eps=_EPS, backend=call.backend)
    target = _aim(own, call.rows, call.strengths)
    affine = adain_affine(own, target)
    plain = on_device(call.rows.is_reference(), x.device)[:, None, None]
    scale = torch.where(plain, torch.ones_like(affine.scale), affine.scale)
    shift = torch.where(plain, torch.zeros_like(affine.shift), affine.shift)
    return Affine(scale, shift, own.mean), own


def centred(stats: TokenStats | None, rows: Tensor, key: Tensor) -> Affine | None:
    """The identity with the means of what it maps: half precision folds lose nothing by it."""
    if stats is None or key.dtype not in (torch.float16, torch.bfloat16):
        return None
    mean = stats.mean.index_select(0, on_device(rows.clamp(min=0), key.device))
    return Affine(torch.ones_like(mean), torch.zeros_like(mean), mean)


def _aim(own: TokenStats, rows: Rows, strengths: tuple[Number, ...]) -> TokenStats:
    """The statistics AdaIN aims at: the references' by weight, the rest to 1 the row's own."""
    total = sum(strengths)
    if isinstance(total, Tensor):
        whole: Number = total.clamp(min=1.0)
        rest: Number = (1.0 - total).clamp(min=0.0)
    else:
        whole, rest = max(1.0, total), max(0.0, 1.0 - total)
    mean, std = torch.zeros_like(own.mean), torch.zeros_like(own.std)
    if not off(rest):
        mean, std = own.mean * rest, own.std * rest
    for r, strength in enumerate(strengths):
        if not off(strength):
            index = on_device(rows.serving(r), mean.device).clamp(min=0)
            share = strength / whole
            mean = mean + own.mean.index_select(0, index) * share
            std = std + own.std.index_select(0, index) * share
    return TokenStats(mean, std)
