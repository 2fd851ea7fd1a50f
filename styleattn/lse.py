"""The log-sum-exp of half-precision calls whose query was folded, to fp32.

A folded query Q* = alpha (a_k * Q') is rounded to the dtype of the keys before it meets them: what
rounding took from it, delta = Q* - Q~, is missing from every logit. The outputs forgive that (they
are rounded themselves), a log-sum-exp that others go on with does not. To first order

    lse(Q*) = lse(Q~) + sigma <delta, E[K]>,    E[K] = softmax(sigma Q~ K^T) K

and E[K] is one more attention of the same backend, with K in the place of V. Keys that are blended
are rounded too: sigma <Q~, E[dK]> of what they lost is added in the same way. What is left is of
second order, far below 1e-3. Only calls that ask for the log-sum-exp pay for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from styleattn.branch import Branch, Segment

NEG_INF = float("-inf")
HALF = (torch.float16, torch.bfloat16)
_PEAK = 16384.0  # the folded fp16 queries of a row are divided, lest they are larger
_LIFT = 1024.0  # lost parts of keys are multiplied by it, lest they underflow in fp16

Forward = Callable[[Tensor, tuple[Branch, ...], float], tuple[Tensor, Tensor]]
"""`attention_forward` of a backend."""


def refined(
    forward: Forward,
    query: Tensor,
    branches: tuple[Branch, ...],
    softmax_scale: float,
    lse: Tensor,
) -> Tensor:
    """lse [G, B, H, L] of a normalised call with the branches whose query was rounded done again.

    Args:
        forward: the backend's `attention_forward`.
        lse: what it gave for the call, in fp32.
    """
    if query.dtype not in HALF:
        return lse
    rounded = [g for g, branch in enumerate(branches) if _is_rounded(branch)]
    if not rounded:
        return lse
    lse = lse.clone()
    for g in rounded:
        lse[g] = _branch(forward, query, branches[g], softmax_scale)
    return lse


def _is_rounded(branch: Branch) -> bool:
    """Whether a backend may round the query or the keys of a branch."""
    blended = isinstance(branch.gamma, Tensor) or branch.gamma != 0.0
    return (
        branch.query_affine is not None
        or (branch.content_query is not None and blended)
        or any(
            s.key_affine is not None or s.own_key is not None or isinstance(s.logit_scale, Tensor)
            for s in branch.segments
        )
    )


def _branch(forward: Forward, query: Tensor, branch: Branch, scale: float) -> Tensor:
    """[B, H, L]: the log-sum-exp over all segments and null keys of a branch."""
    q = (query if branch.query is None else branch.query).float()
    if branch.query_affine is not None:
        q = q * branch.query_affine.scale[:, :, None] + branch.query_affine.shift[:, :, None]
    if branch.content_query is not None:
        gamma = branch.gamma
        gamma = gamma[:, None, None, None] if isinstance(gamma, Tensor) else gamma
        q = gamma * branch.content_query.float() + (1 - gamma) * q
    nulls = sum(s.null_keys for s in branch.segments)
    total = q.new_full(q.shape[:-1], math.log(nulls) if nulls else NEG_INF)
    for s in branch.segments:
        removed = not isinstance(s.logit_bias, Tensor) and s.logit_bias == NEG_INF
        if not removed and s.key.shape[2]:
            total = torch.logaddexp(total, _segment(forward, q, s, query.dtype, scale))
    return total


def _segment(forward: Forward, q: Tensor, s: Segment, dtype: torch.dtype, scale: float) -> Tensor:
    """[B, H, L]: the log-sum-exp of one segment for the fp32 query Q'."""
    if isinstance(s.logit_scale, Tensor):
        q = q * s.logit_scale[:, None, None, None]
    else:
        scale = scale * s.logit_scale
    shift: Tensor | float = 0.0
    if s.key_affine is not None:
        shift = scale * torch.einsum("bhld,bhd->bhl", q, s.key_affine.shift)
        q = q * s.key_affine.scale[:, :, None]
    room = _room(q) if dtype == torch.float16 else None
    near = torch.empty(q.transpose(1, 2).shape, dtype=dtype, device=q.device).transpose(1, 2)
    near.copy_(q if room is None else q / room[:, None, None, None])
    back = near.float() if room is None else near.float() * room[:, None, None, None]
    plain = Segment(s.key, s.key, rows=s.rows, key_bias=s.key_bias)
    lost = None
    if s.own_key is not None:
        plain, lost = _blended(s, s.own_key)
    if room is not None:
        plain = replace(plain, logit_scale=room)
    mean, lse = forward(near, (Branch((plain,)),), scale)
    more = torch.einsum("bhld,bhld->bhl", q - back, mean.float())
    if lost is not None:
        mean, _ = forward(near, (Branch((replace(plain, value=lost),)),), scale)
        more = more + torch.einsum("bhld,bhld->bhl", back, mean.float()) / _LIFT
    more = scale * more
    lse = lse[0] + torch.where(torch.isfinite(more), more, 0.0) + shift
    bias = s.logit_bias
    if isinstance(bias, Tensor):
        bias = bias[:, None, None] if bias.ndim == 1 else bias[:, None]
        lse = torch.where(bias == NEG_INF, NEG_INF, lse + bias)
    else:
        lse = lse + bias
    if s.rows is not None:
        lse = torch.where((s.rows.to(lse.device) < 0)[:, None, None], NEG_INF, lse)
    return lse


def _room(q: Tensor) -> Tensor:
    """[B]: the powers of two that bring the queries of a row into the range of fp16; 1 where they
    are. Found without waiting for the device."""
    peak = q.abs().nan_to_num(0.0, 0.0).amax((1, 2, 3))
    return torch.exp2(torch.ceil(torch.log2(torch.clamp(peak / _PEAK, min=1.0))))


def _blended(s: Segment, own: Tensor) -> tuple[Segment, Tensor]:
    """The blended keys as a segment, a row for each row; and what rounding took from them, times
    `_LIFT`."""
    rows = None if s.rows is None else s.rows.to(s.key.device)
    picked = s.key if rows is None else s.key.index_select(0, rows.clamp(min=0))
    share = s.kv_blend
    share = share[:, None, None, None] if isinstance(share, Tensor) else share
    exact = share * picked.float() + (1 - share) * own.float()
    key = exact.to(s.key.dtype)
    bias = s.key_bias
    if bias is not None and bias.ndim == 2:
        bias = bias[0] if len(bias) == 1 else bias
        if rows is not None and bias.ndim == 2:
            bias = bias.index_select(0, rows.clamp(min=0))
    if rows is not None:
        rows = torch.where(rows < 0, -1, torch.arange(len(rows), device=rows.device))
    lost = ((exact - key.float()) * _LIFT).to(key.dtype)
    return Segment(key, key, rows=rows, key_bias=bias), lost
