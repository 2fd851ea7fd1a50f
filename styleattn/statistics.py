"""Around the operation: token statistics, AdaIN as an affine, exact merge of partial attentions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from styleattn import _ops, backends
from styleattn.branch import Affine, check_query
from styleattn.errors import describe, invalid


class TokenStats(NamedTuple):
    """Per-channel statistics over the tokens: mean and sqrt(unbiased variance + eps), each [B, H,
    D] fp32."""

    mean: Tensor
    std: Tensor


def token_stats(x: Tensor, *, eps: float = 1e-5, backend: str | None = None) -> TokenStats:
    """Mean and standard deviation over the tokens: mean_n x, sqrt(var_n x + eps) with the unbiased
    variance (divisor N - 1).

    Args:
        x: [B, H, N, D]. Computed in fp32 from centred values: fp16 never overflows, |mean| >> std
            keeps its digits. N = 1 has variance 0.
        eps: inside the root.

    Raises:
        Invalid: not a [B, H, N, D] floating point tensor, or eps not positive.
    """
    check_query("token_stats", x, "x")
    check_eps("token_stats", eps, x)
    backends.check_name("token_stats", backend)
    return TokenStats(*_ops.token_stats(x, float(eps), backend))


def eps_reasons(eps: object) -> list[str]:
    """Why an eps is not a positive finite number."""
    number = isinstance(eps, (int, float)) and not isinstance(eps, bool)
    positive = number and 0 < eps < float("inf")  # type: ignore[operator]
    return [] if positive else [f"eps must be a positive number, got {eps!r}"]


def check_eps(call: str, eps: object, x: Tensor) -> None:
    """Refuse an eps that is not a positive finite number."""
    reasons = eps_reasons(eps)
    if reasons:
        raise invalid(call, reasons, f"x {describe(x)}")


def adain_affine(own: TokenStats, reference: TokenStats) -> Affine:
    """AdaIN as an affine: y = (x - mean_own) / std_own * std_reference + mean_reference, all [B, H,
    D] fp32.

    Raises:
        Invalid: not two TokenStats of one shape.

    Source: Huang & Belongie 2017 (AdaIN), eq. 8; StyleAligned (arXiv 2312.02133), sec. 3.2.
    """
    reasons = [
        f"{name} must be a TokenStats, got a {type(stats).__name__}"
        for name, stats in (("own", own), ("reference", reference))
        if not isinstance(stats, TokenStats)
    ]
    if not reasons and not own.mean.shape == own.std.shape == reference.mean.shape:
        reasons = [f"own is {describe(own.mean)}, reference is {describe(reference.mean)}"]
    if reasons:
        raise invalid("adain_affine", reasons, "own, reference")
    scale = reference.std / own.std
    return Affine(scale, reference.mean - own.mean * scale, own.mean)


def adain_to_rows(
    x: Tensor, rows: Tensor, *, eps: float, backend: str | None
) -> tuple[Affine, Tensor]:
    """AdaIN of every row of x to the row `rows` names, with the identity, exactly, for a row that
    names itself or none (-1); and the means that rows aim at, [B, H, D].

    Args:
        x: [B, H, N, D]. rows: int [B] on its device.
    """
    found = _ops.adain(x, rows, eps, backend)
    if found is not None:
        return Affine(*found[:3]), found[3]
    own = token_stats(x, eps=eps, backend=backend)
    mean, std = (t.index_select(0, rows.clamp(min=0)) for t in own)
    affine = adain_affine(own, TokenStats(mean, std))
    names_itself = rows == torch.arange(len(rows), dtype=rows.dtype, device=rows.device)
    plain = (names_itself | (rows < 0))[:, None, None]
    scale = torch.where(plain, torch.ones_like(affine.scale), affine.scale)
    shift = torch.where(plain, torch.zeros_like(affine.shift), affine.shift)
    return Affine(scale, shift, own.mean), mean


def merge(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Exact merge of partial attentions over disjoint sets of keys (ring or context parallel,
    caches).

        lse = log sum_i exp(lse_i)        out = sum_i exp(lse_i - lse) out_i

    Args:
        outputs: each [..., L, D], alike. lses: each [..., L], natural logarithm; -inf where a part
            saw no key.

    Returns:
        (out in the outputs' dtype, lse in fp32). Differentiable. Where every part saw no key: 0 and
        -inf.

    Raises:
        Invalid: no parts, or shapes, dtypes or devices that do not belong together.
    """
    outputs, lses = list(outputs), list(lses)
    inputs = ", ".join(describe(t) for t in (*outputs, *lses))
    if not outputs or len(outputs) != len(lses):
        raise invalid(
            "merge",
            [f"needs as many outputs as lses, at least one; got {len(outputs)} and {len(lses)}"],
            inputs,
        )
    reasons = [
        f"part {i}: output {describe(o)} and lse {describe(lse)} do not belong to "
        f"output 0 {describe(outputs[0])}"
        for i, (o, lse) in enumerate(zip(outputs, lses, strict=True))
        if not isinstance(o, Tensor)
        or not isinstance(lse, Tensor)
        or o.shape != outputs[0].shape
        or lse.shape != o.shape[:-1]
        or o.dtype != outputs[0].dtype
        or not (o.is_floating_point() and lse.is_floating_point())
        or not (o.device == lse.device == outputs[0].device)
    ]
    if reasons:
        raise invalid("merge", reasons, inputs)
    dtype = torch.float64 if outputs[0].dtype == torch.float64 else torch.float32
    stacked = torch.stack([lse.to(dtype) for lse in lses])
    dead = (stacked == float("-inf")).all(0)
    stacked = torch.where(dead, 0.0, stacked)  # -inf less -inf has no gradient
    lse = torch.logsumexp(stacked, 0)
    shares = torch.where(dead, 0.0, torch.exp(stacked - lse))
    total = torch.zeros((), dtype=dtype, device=lse.device)
    for o, share in zip(outputs, shares, strict=True):
        share = share.unsqueeze(-1)
        total = total + share * o.to(dtype).masked_fill(share == 0, 0.0)
    return total.to(outputs[0].dtype), torch.where(dead, float("-inf"), lse)
