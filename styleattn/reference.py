"""The specification: the operation of `branch.py` written out in eager PyTorch, logits
materialised, fp64-capable.

Slow and memory-hungry on purpose. Every other backend is tested against it; none imports it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from styleattn.branch import Affine, Branch, Segment

NEG_INF = float("-inf")
BLOCK = 128  # keys that share a scale where they are INT8


def unsupported_reasons(query: Tensor, branches: tuple[Branch, ...]) -> list[str]:
    """The specification runs every meaningful call."""
    return []


def over(x: float | Tensor, dims: int) -> float | Tensor:
    """A float as it is; [B] as [B, 1, ...]; [B, L] as [B, 1, L, 1, ...], with `dims` dimensions."""
    if not isinstance(x, Tensor):
        return x
    x = x[:, None] if x.ndim == 1 else x[:, None, :]
    return x.reshape(*x.shape, *[1] * (dims - x.ndim))


def _affine(x: Tensor, affine: Affine | None) -> Tensor:
    """y = scale * x + shift over [B, H, N, D]."""
    return x if affine is None else affine.scale[:, :, None] * x + affine.shift[:, :, None]


def _effective_query(query: Tensor, branch: Branch, dtype: torch.dtype) -> Tensor:
    """Q' = gamma * Q_content + (1 - gamma) * (a_q * Q + b_q)."""
    q = _affine((query if branch.query is None else branch.query).to(dtype), branch.query_affine)
    if branch.content_query is None:
        return q
    gamma = over(branch.gamma, 4)
    return gamma * branch.content_query.to(dtype) + (1 - gamma) * q


def _gather(x: Tensor, rows: Tensor | None, batch: int) -> Tensor:
    """The key or value row of every query row; zeros where the segment is removed."""
    if rows is None:
        return x.expand(batch, *x.shape[1:])
    rows = rows.to(x.device)
    picked = x.index_select(0, torch.where(rows == -1, 0, rows))
    return torch.where(
        (rows >= 0).reshape(-1, 1, 1, 1), picked, torch.zeros((), dtype=x.dtype, device=x.device)
    )


def _keys_and_values(s: Segment, batch: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """K' and V' [B, H, S, D]: gathered, blended, mapped."""
    k, v = (_gather(x, s.rows, batch).to(dtype) for x in (s.key, s.value))
    if s.own_key is not None and s.own_value is not None:
        lam = over(s.kv_blend, 4)
        k = lam * k + (1 - lam) * s.own_key.to(dtype)
        v = lam * v + (1 - lam) * s.own_value.to(dtype)
    k, v = _affine(k, s.key_affine), _affine(v, s.value_affine)
    removed = _removed(s, batch, k.device)
    return k.masked_fill(removed, 0.0), v.masked_fill(removed, 0.0)


def _removed(s: Segment, batch: int, device: torch.device) -> Tensor:
    """[B, 1, S or 1, 1]: the keys that a row does not see at all, by its rows, bias or key bias."""
    gone = torch.zeros(batch, 1, 1, 1, dtype=torch.bool, device=device)
    beta = torch.as_tensor(s.logit_bias, device=device)
    if beta.ndim < 2:
        gone = gone | (beta == NEG_INF).reshape(-1, 1, 1, 1)
    if s.rows is not None:
        gone = gone | (s.rows.to(device) < 0).reshape(-1, 1, 1, 1)
    if s.key_bias is not None and s.key_bias.ndim == 1:
        gone = gone | (s.key_bias == NEG_INF).reshape(1, 1, -1, 1)
    elif s.key_bias is not None:
        gone = gone | (_gather(s.key_bias[:, None, :, None], s.rows, batch) == NEG_INF)
    return gone


def _rounded(x: Tensor, peak: Tensor) -> Tensor:
    """x in 127 steps of its peak, rounded to nearest even, and back."""
    step = peak / 127
    return torch.where(peak == 0, 0.0, torch.round(x / step) * step)


def _fast_products(q: Tensor, s: Segment) -> Tensor:
    """<Q', K'>, where queries and centred keys meet as INT8: a query has one scale, BLOCK keys have
    one. The keys' mean and the affine's shift meet the query as it is.

        <Q', a K + b> = <Q', b> + <q, c> + <q, K - c>,   q = a Q'
    """
    k = _gather(s.key, s.rows, q.shape[0]).to(q.dtype)
    affine = s.key_affine
    center = None if affine is None else affine.center
    center = (k.mean(-2) if center is None else center)[:, :, None]
    folded = q if affine is None else affine.scale[:, :, None] * q
    k = k - center
    parts = [_rounded(part, part.abs().amax((-2, -1), keepdim=True)) for part in k.split(BLOCK, 2)]
    near = _rounded(folded, folded.abs().amax(-1, keepdim=True))
    products = folded @ center.transpose(-1, -2) + near @ torch.cat(parts, 2).transpose(-1, -2)
    if affine is not None:
        products = products + q @ affine.shift[..., None]
    return products


def _logits(products: Tensor, s: Segment, softmax_scale: float) -> Tensor:
    """alpha * sigma * <Q', K'> + beta + keybias, [B, H, L, S]; -inf where the segment or the key is
    removed."""
    logits = over(s.logit_scale, 4) * (softmax_scale * products)
    beta = over(s.logit_bias, 4)
    if not isinstance(beta, Tensor):
        beta = torch.full((1, 1, 1, 1), beta, dtype=products.dtype, device=products.device)
    if s.key_bias is not None:
        per_key = s.key_bias[:, None, None] if s.key_bias.ndim == 2 else s.key_bias
        beta = beta + (_gather(per_key, s.rows, len(products)) if s.key_bias.ndim == 2 else per_key)
    if s.rows is not None:
        removed = s.rows.to(products.device) < 0
        beta = beta.masked_fill(removed.reshape(-1, 1, 1, 1), NEG_INF)
    return torch.where(beta == NEG_INF, NEG_INF, logits + beta)


def branch_forward(
    query: Tensor, branch: Branch, softmax_scale: float, dtype: torch.dtype, fast: bool = False
) -> tuple[Tensor, Tensor]:
    """One softmax: its output [B, H, L, D] and log-sum-exp [B, H, L]. Fast: keys that are neither
    blended nor biased meet the query as INT8."""
    q = _effective_query(query, branch, dtype)
    batch, heads, length, dim = q.shape
    logits, values = [], []
    for s in branch.segments:
        k, v = _keys_and_values(s, batch, dtype)
        plain = s.key_bias is None and s.own_key is None and s.key.shape[2] > 0
        products = _fast_products(q, s) if fast and plain else q @ k.transpose(-1, -2)
        logits.append(_logits(products, s, softmax_scale))
        values.append(v)
        if s.null_keys:
            logits.append(q.new_zeros(batch, heads, length, s.null_keys))
            values.append(v.new_zeros(batch, heads, s.null_keys, dim))
    x = torch.cat(logits, -1)
    lse = torch.logsumexp(x, -1)
    p = torch.exp(x - torch.where(lse == NEG_INF, 0.0, lse).unsqueeze(-1))
    return p @ torch.cat(values, -2), lse


def attention_forward(
    query: Tensor, branches: tuple[Branch, ...], softmax_scale: float, fast: bool = False
) -> tuple[Tensor, Tensor]:
    """The whole operation: out [B, H, L, D] in the query's dtype, lse [G, B, H, L] in fp32 (fp64
    for fp64). fast: INT8 products of queries and keys."""
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    batch, heads, length, dim = query.shape
    total = torch.zeros(batch, length, heads, dim, dtype=dtype, device=query.device).transpose(1, 2)
    lses = []
    for branch in branches:
        out, lse = branch_forward(query, branch, softmax_scale, dtype, fast)
        lses.append(lse)
        if isinstance(branch.weight, Tensor) or branch.weight != 0.0:
            total += over(branch.weight, 4) * out
    return total.to(query.dtype), torch.stack(lses)


def token_stats_forward(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and sqrt(unbiased variance + eps) over the tokens of [B, H, N, D], in fp32 (fp64 for
    fp64)."""
    x = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    mean = x.mean(-2)
    square = (x - mean[:, :, None]).square().sum(-2)
    return mean, (square / max(x.shape[-2] - 1, 1) + eps).sqrt()
