"""Custom ops of the fused norms: formulas, schemas, fakes, autograd in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from styleattn._watch import unseen
from styleattn.backends import resolve_stats, without_autocast


def _kernels() -> Any:
    """The fused norms' kernels, imported at first use."""
    return import_module("styleattn.kernels.norms")


def _pair(one: Tensor | None, two: Tensor | None) -> tuple[Tensor, Tensor] | None:
    return None if one is None or two is None else (one, two)


def normalise(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean_d x^2 + eps) * weight, in fp32 (fp64 stays)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return wide if weight is None else wide * weight.to(wide.dtype)


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Every pair of neighbouring channels turned by its angle; cos and sin [N, D]."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((-odd, even), -1).flatten(-2)
    return x * cos + turned * sin


def rotary_formula(
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    before: tuple[Tensor, Tensor] | None,
    after: tuple[Tensor, Tensor] | None,
    eps: float,
) -> Tensor:
    """The specification: after(R(before(RMSNorm(x)))), rounded once."""
    y = normalise(x, weight, eps)
    if before is not None:
        y = y * before[0][:, :, None] + before[1][:, :, None]
    if cos is not None and sin is not None:
        y = turn(y, cos, sin)
    if after is not None:
        y = y * after[0][:, :, None] + after[1][:, :, None]
    return y.to(x.dtype)


def rotary(*call: Any) -> Tensor:
    """`rotary_op`, around the dispatcher where nobody would see it."""
    x, weight, cos, sin, before, after, *_ = call
    given = [t for t in (x, weight, cos, sin, *before, *after) if t is not None]
    out: Tensor = _rotary(*call) if unseen(given) else rotary_op(*call)
    return out


def _rotary(
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    before: Sequence[Tensor],
    after: Sequence[Tensor],
    eps: float,
    backend: str,
) -> Tensor:
    maps = [_pair(*pair) if pair else None for pair in (before, after)]
    with without_autocast(x.device.type):
        if resolve_stats("rms_norm_rotary", x, backend or None) == "triton":
            out: Tensor = _kernels().rotary_forward(
                x, weight, eps, maps[0], _pair(cos, sin), maps[1]
            )
            return out
        y = rotary_formula(x, weight, cos, sin, maps[0], maps[1], eps)
        return y.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)


@torch.library.custom_op("styleattn::rms_norm_rotary", mutates_args=())
def rotary_op(
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    before: Sequence[Tensor],
    after: Sequence[Tensor],
    eps: float,
    backend: str,
) -> Tensor:
    """[B, H, N, D] over BLHD memory; `before` and `after` are [] or [scale, shift]."""
    return _rotary(x, weight, cos, sin, before, after, eps, backend)


@rotary_op.register_fake
def _rotary_fake(
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    before: Sequence[Tensor],
    after: Sequence[Tensor],
    eps: float,
    backend: str,
) -> Tensor:
    b, h, n, d = x.shape
    return x.new_empty(b, n, h, d).transpose(1, 2)


def _rotary_setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, cos, sin, before, after, eps, _ = inputs
    ctx.save_for_backward(x, weight, cos, sin, *before, *after)
    ctx.call = (len(before), eps)


def _rotary_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Back through after, the rotation (its transpose turns the other way), before, the norm."""
    x, weight, cos, sin, *maps = ctx.saved_tensors
    count, eps = ctx.call
    before, after = maps[:count], maps[count:]
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    unit = wide * rstd
    normal = unit if weight is None else unit * weight.to(unit.dtype)
    mapped = normal * before[0][:, :, None] + before[1][:, :, None] if before else normal
    g = grad.to(wide.dtype)
    of_after: list[Tensor] = []
    if after:
        rotated = mapped if cos is None else turn(mapped, cos, sin)
        of_after = [(g * rotated).sum(2).to(after[0].dtype), g.sum(2).to(after[1].dtype)]
        g = g * after[0][:, :, None]
    if cos is not None:
        g = turn(g, cos, -sin)
    of_before: list[Tensor] = []
    if before:
        of_before = [(g * normal).sum(2).to(before[0].dtype), g.sum(2).to(before[1].dtype)]
        g = g * before[0][:, :, None]
    of_weight = None
    if weight is not None:
        of_weight = (g * unit).sum((0, 1, 2)).to(weight.dtype)
        g = g * weight.to(g.dtype)
    of_x = (rstd * (g - unit * (g * unit).mean(-1, keepdim=True))).to(x.dtype)
    return of_x, of_weight, None, None, of_before, of_after, None, None


rotary_op.register_autograd(_rotary_backward, setup_context=_rotary_setup)


def _merged(
    x: Tensor, groups: int, references: Sequence[tuple[Tensor, Any]]
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [B, G] of every row together with its references."""
    var, mean = torch.var_mean(x.reshape(x.shape[0], groups, -1), dim=-1, correction=0)
    parts: list[tuple[Any, Tensor, Tensor]] = [(1.0, mean, var)]
    for rows, weight in references:
        rows = rows.to(x.device)
        parts.append((weight, mean.index_select(0, rows), var.index_select(0, rows)))
    total = sum(w for w, _, _ in parts)
    shared: Any = sum(w * m for w, m, _ in parts) / total
    spread: Any = sum(w * (v + (m - shared) ** 2) for w, m, v in parts) / total
    return shared, spread


def group_norm_formula(
    x: Tensor,
    groups: int,
    references: Sequence[tuple[Tensor, Any]],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    silu: bool,
    kept: Tensor | None,
    keep: Tensor | None,
) -> Tensor:
    """The specification, in fp32 (fp64 stays), rounded once."""
    wide = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    shared, spread = _merged(wide, groups, references)
    each = x.shape[1] // groups
    rstd = torch.rsqrt(spread + eps).repeat_interleave(each, dim=1)
    shift = -shared.repeat_interleave(each, dim=1) * rstd
    if weight is not None:
        gain = weight.to(wide.dtype)
        rstd, shift = rstd * gain, shift * gain
    if bias is not None:
        shift = shift + bias.to(wide.dtype)
    shape = (*rstd.shape, *(1 for _ in x.shape[2:]))
    new = torch.addcmul(shift.view(shape), wide, rstd.view(shape))
    if silu:
        new = torch.nn.functional.silu(new)
    if kept is None or keep is None:
        return new.to(x.dtype)
    old = torch.nn.functional.silu(kept) if silu else kept
    return torch.where(keep.view(-1, *(1 for _ in x.shape[1:])), old, new.to(kept.dtype))


def group_norm(*call: Any) -> Tensor:
    """`group_norm_op`, around the dispatcher where nobody would see it."""
    x, _, rows, weights, weight, bias, _, _, kept, keep, _ = call
    given = [t for t in (x, *rows, weights, weight, bias, kept, keep) if t is not None]
    out: Tensor = _group_norm(*call) if unseen(given) else group_norm_op(*call)
    return out


def _group_norm(
    x: Tensor,
    groups: int,
    rows: Sequence[Tensor],
    weights: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    silu: bool,
    kept: Tensor | None,
    keep: Tensor | None,
    backend: str,
) -> Tensor:
    dtype = x.dtype if kept is None else kept.dtype
    with without_autocast(x.device.type):
        if resolve_stats("shared_group_norm", _heads(x), backend or None) == "triton":
            out: Tensor = _kernels().group_norm_forward(
                x, groups, rows, weights, weight, bias, eps, silu, kept, keep, dtype
            )
            return out
        references = [] if weights is None else list(zip(rows, weights, strict=True))
        y = group_norm_formula(x, groups, references, weight, bias, eps, silu, kept, keep)
        return _like(x, dtype).copy_(y)


@torch.library.custom_op("styleattn::shared_group_norm", mutates_args=())
def group_norm_op(
    x: Tensor,
    groups: int,
    rows: Sequence[Tensor],
    weights: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    silu: bool,
    kept: Tensor | None,
    keep: Tensor | None,
    backend: str,
) -> Tensor:
    """Like x (kept's dtype where given); rows [B] per reference, weights [references] fp32."""
    return _group_norm(x, groups, rows, weights, weight, bias, eps, silu, kept, keep, backend)


def _heads(x: Tensor) -> Tensor:
    """A map as [B, 1, C, P]: how backends are asked whether they take its dtype and device."""
    return x.flatten(2)[:, None, :1, :1]


def _like(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Uninitialised, of x's strides where x is dense, else contiguous."""
    flat = x.flatten(2)
    dense = torch.empty_like(flat, dtype=dtype)
    if dense.stride() != flat.stride():
        dense = torch.empty(flat.shape, dtype=dtype, device=x.device)
    return dense.unflatten(2, x.shape[2:])


@group_norm_op.register_fake
def _group_norm_fake(
    x: Tensor,
    groups: int,
    rows: Sequence[Tensor],
    weights: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    silu: bool,
    kept: Tensor | None,
    keep: Tensor | None,
    backend: str,
) -> Tensor:
    return _like(x, x.dtype if kept is None else kept.dtype)


def _group_norm_setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, groups, rows, weights, weight, bias, eps, silu, kept, keep, _ = inputs
    ctx.save_for_backward(x, weights, weight, bias, kept, keep, *rows)
    ctx.call = (groups, eps, silu)


def _slope(y: Tensor) -> Tensor:
    """The derivative of y * sigmoid(y)."""
    s = torch.sigmoid(y)
    return s * (1 + y * (1 - s))


def _group_norm_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Through the affine and the merged moments back to the rows whose moments were merged.

    With shares S (rows sum to 1), M_i = sum_j S_ij m_j, V_i = sum_j S_ij (v_j + (m_j - M_i)^2):
    dV_i / dm_j = 2 S_ij (m_j - M_i), dV_i / dv_j = S_ij, and dV_i / dM_i = 0.
    """
    x, weights, weight, bias, kept, keep, *rows = ctx.saved_tensors
    groups, eps, silu = ctx.call
    batch, channels = x.shape[:2]
    wide = x.to(torch.promote_types(x.dtype, torch.float32)).reshape(batch, groups, -1)
    g = grad.to(wide.dtype)
    of_kept = None
    if kept is not None:
        mine = keep.view(-1, *(1 for _ in x.shape[1:]))
        old = g * _slope(kept.to(g.dtype)) if silu else g
        of_kept = torch.where(mine, old, 0.0).to(kept.dtype)
        g = torch.where(mine, 0.0, g)
    shares = torch.eye(batch, dtype=wide.dtype, device=x.device)
    for i, served in enumerate(rows):
        place = torch.nn.functional.one_hot(served.to(x.device, torch.int64), batch)
        shares = shares + weights[i] * place
    shares = shares / shares.sum(1, keepdim=True)
    var, mean = torch.var_mean(wide, dim=-1, correction=0)
    gap = mean[None] - (merged := (shares[:, :, None] * mean[None]).sum(1))[:, None]
    spread = (shares[:, :, None] * (var[None] + gap.square())).sum(1)
    rstd = torch.rsqrt(spread + eps)
    unit = (wide - merged[..., None]) * rstd[..., None]
    normal, per_channel = unit.reshape(batch, channels, -1), g.reshape(batch, channels, -1)
    gain = torch.ones_like(wide[0, 0, :1]) if weight is None else weight.to(wide.dtype)[:, None]
    if silu:
        y = normal * gain + (0.0 if bias is None else bias.to(wide.dtype)[:, None])
        per_channel = per_channel * _slope(y)
    of_weight = (per_channel * normal).sum((0, 2))
    of_bias = per_channel.sum((0, 2))
    inner = (per_channel * gain).reshape(batch, groups, -1) * rstd[..., None]
    of_mean = -inner.sum(-1)  # dM_i
    of_var = -0.5 * (inner * unit).sum(-1) * rstd  # dV_i
    to_mean = (shares[:, :, None] * (of_mean[:, None] + 2 * gap * of_var[:, None])).sum(0)
    to_var = (shares[:, :, None] * of_var[:, None]).sum(0)
    deviation = wide - mean[..., None]
    of_x = inner + (to_mean[..., None] + 2 * to_var[..., None] * deviation) / wide.shape[-1]
    return (
        of_x.reshape(x.shape).to(x.dtype),
        None,
        [None for _ in rows],
        None,
        None if weight is None else of_weight.to(weight.dtype),
        None if bias is None else of_bias.to(bias.dtype),
        None,
        None,
        of_kept,
        None,
        None,
    )


group_norm_op.register_autograd(_group_norm_backward, setup_context=_group_norm_setup)
