"""Norms next to attention: RMSNorm with AdaIN and rotary positions, GroupNorm with references.

On a GPU each is fused; elsewhere, in fp64 and for every other backend they are the formulas written
out in PyTorch. Gradients are exact either way.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from styleattn import _norm_ops
from styleattn.backends import check_name
from styleattn.branch import Affine, check_query
from styleattn.errors import describe, invalid
from styleattn.statistics import check_eps


def fused(x: Tensor, backend: str | None) -> bool:
    """Whether kernels are meant to compute a norm of x: asked for, or the first choice on its
    device. They still take fp32, fp16 and bf16 only; what they cannot run stays a formula."""
    return backend == "triton" or (backend is None and x.device.type == "cuda")


def _map_reasons(name: str, affine: Affine | None, x: Tensor) -> list[str]:
    shape = (x.shape[0], x.shape[1], x.shape[3])
    if affine is None or affine.scale.shape == affine.shift.shape == shape:
        return []
    found = f"{describe(affine.scale)} and {describe(affine.shift)}"
    return [f"{name} must be an Affine of {list(shape)}, got {found}"]


def _number(weight: float | Tensor, like: Tensor) -> Tensor:
    """A weight as a 0-dim tensor; a number is filled in, which a CUDA graph can capture."""
    if isinstance(weight, Tensor):
        return weight.detach().to(like.device, torch.float32)
    return torch.full((), weight, dtype=torch.float32, device=like.device)


def rms_norm_rotary(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float,
    rotary: tuple[Tensor, Tensor] | None = None,
    before: Affine | None = None,
    after: Affine | None = None,
    backend: str | None = None,
) -> Tensor:
    """Norm of queries or keys over the channels, AdaIN and rotary positions, in one pass.

        y = A_after( R( A_before( x / sqrt(mean_d x^2 + eps) * weight ) ) )

    An affine per channel does not commute with the rotation: AdaIN by statistics from before it is
    `before`, AdaIN by those from behind it is `after`.

    Args:
        x: [B, H, N, D], as projected.
        weight: [D]; None for ones.
        rotary: cos and sin [N, D], the two channels of a pair side by side and alike.
        before, after: maps [B, H, D].
        backend: "triton" for the kernel, None for it where x is on a GPU, else the formula.

    Returns:
        [B, H, N, D] in x's dtype; computed in fp32 (fp64 stays), rounded once.

    Raises:
        Invalid: shapes that do not belong together; all reasons at once.
        Unsupported: backend "triton" cannot run here.

    Source: Zhang & Sennrich 2019 (RMSNorm), eq. 4; Su et al. (RoFormer), arXiv 2104.09864, eq. 34.
    """
    check_query("rms_norm_rotary", x, "x")
    check_eps("rms_norm_rotary", eps, x)
    check_name("rms_norm_rotary", backend)
    tokens, dim = x.shape[2:]
    reasons = _map_reasons("before", before, x) + _map_reasons("after", after, x)
    if weight is not None and weight.shape != (dim,):
        reasons.append(f"weight must be [{dim}], got {describe(weight)}")
    for t in rotary or ():
        if t.shape != (tokens, dim) or dim % 2:
            reasons.append(f"rotary must be [{tokens}, {dim}] of pairs, got {describe(t)}")
    if reasons:
        raise invalid("rms_norm_rotary", reasons, f"x {describe(x)}")
    cos, sin = rotary or (None, None)
    maps = [None if a is None else (a.scale, a.shift) for a in (before, after)]
    if fused(x, backend):
        first, last = ([] if pair is None else list(pair) for pair in maps)
        return _norm_ops.rotary(x, weight, cos, sin, first, last, eps, backend or "")
    return _norm_ops.rotary_formula(x, weight, cos, sin, maps[0], maps[1], eps)


def shared_group_norm(
    x: Tensor,
    groups: int,
    references: Sequence[tuple[Tensor, float | Tensor]],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    silu: bool = False,
    kept: Tensor | None = None,
    keep: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """GroupNorm with statistics over a row and its references together, without concatenating them.

        mean = Σ w_i m_i / Σ w_i,  var = Σ w_i (v_i + (m_i - mean)²) / Σ w_i,  own w = 1

    which is what normalising the concatenated maps gives (biased variances).

    Args:
        x: [B, C, ...].
        references: pairs of rows int [B], the row that serves each row, and a weight. Gradients
            reach the weights through the formula only, not through the kernel.
        weight, bias: [C] or None.
        silu: whether y * sigmoid(y) follows.
        kept, keep: the result of rows with keep [B] is that of `kept`, like x, as it is (through
            SiLU where wanted); its dtype is that of the result.
        backend: "triton" for the kernels, None for them where x is on a GPU, else the formula.

    Returns:
        Like x; computed in fp32 (fp64 stays), rounded once.

    Raises:
        Invalid: shapes that do not belong together; all reasons at once.
        Unsupported: backend "triton" cannot run here.

    Source: Hertz et al., Style Aligned Image Generation, arXiv 2312.02133 (shared normalisation);
        Chan et al. 1979 (merging moments).
    """
    check_name("shared_group_norm", backend)
    check_eps("shared_group_norm", eps, x)
    reasons = []
    if x.ndim < 3 or groups < 1 or x.shape[1] % groups:
        reasons.append(f"x must be [B, C, ...] with C a multiple of {groups} groups")
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and t.shape != x.shape[1:2]:
            reasons.append(f"{name} must be [{x.shape[1]}], got {describe(t)}")
    for i, (rows, _) in enumerate(references):
        if rows.shape != x.shape[:1]:
            reasons.append(f"references[{i}] must serve {x.shape[0]} rows, got {describe(rows)}")
    if (kept is None) != (keep is None):
        reasons.append("kept and keep belong together")
    elif kept is not None and (kept.shape != x.shape or keep is None or len(keep) != len(x)):
        reasons.append(f"kept must be like x, keep [B]; got {describe(kept)}, {describe(keep)}")
    if reasons:
        raise invalid("shared_group_norm", reasons, f"x {describe(x)}")
    if not fused(x, backend):
        return _norm_ops.group_norm_formula(
            x, groups, references, weight, bias, eps, silu, kept, keep
        )
    weights = None
    if references:
        weights = torch.stack([_number(w, x) for _, w in references])
    served = [rows for rows, _ in references]
    return _norm_ops.group_norm(
        x, groups, served, weights, weight, bias, eps, silu, kept, keep, backend or ""
    )
