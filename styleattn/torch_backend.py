"""The `torch` backend: library flash attention per segment and an exact log-sum-exp merge.

K and V are read where they are: the key affine folds into the query, the value affine into the
segment's output, row maps become views. StyleAligned's whole batch is two library calls: every row
against its own keys, and the targets, stacked along the sequence, against their references (on the
CPU a large batch takes them a few heads at a time). A K/V blend has no such form and is
materialised.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from styleattn.branch import Affine, Branch, Segment

NEG_INF = float("-inf")
_SHORTEST = 8
_PEAK = 16384.0
_ROOM = 32.0
_PART = 1 << 22  # bytes of one fp32 tensor of the heads that a large call takes at a time
_aten = torch.ops.aten


def unsupported_reasons(query: Tensor, branches: tuple[Branch, ...]) -> list[str]:
    """Every reason why library attention cannot run the call."""
    reasons = []
    if query.dtype == torch.float64:
        reasons.append("query is float64 (needs float32, float16 or bfloat16)")
    if query.device.type not in ("cpu", "cuda"):
        reasons.append(f"query is on {query.device} (needs cpu or cuda)")
    if query.device.type == "cuda" and query.shape[-1] > 256:
        reasons.append(f"head_dim is {query.shape[-1]} (needs <= 256 on cuda)")
    return reasons


def _over(x: Tensor) -> Tensor:
    """[B] as [B, 1, 1], [B, L] as [B, 1, L]: against [B, H, L]."""
    return x[:, None, None] if x.ndim == 1 else x[:, None]


def _library_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """One library call on [B, H, L, D]: output, and natural-log LSE [B, H, L] in fp32. `bias` is [B
    or 1, 1, 1, S]."""
    if scale < 0.0:  # kernels that scale the largest product take it for the largest logit
        q, scale = -q, -scale
    if q.device.type == "cpu":
        short = _SHORTEST - k.shape[2]
        if short > 0:  # the library drops NaN of queries and keys where there are fewer keys
            if bias is None:
                bias = torch.zeros(1, 1, 1, k.shape[2])
            k, v = (torch.nn.functional.pad(x, (0, 0, 0, short)) for x in (k, v))
            bias = torch.nn.functional.pad(bias, (0, short), value=NEG_INF)
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, attn_mask=bias, scale=scale
        )
        if bool((lse == math.inf).any()):  # in half precision the library gives zeros there
            out = out.masked_fill((lse == math.inf).unsqueeze(-1), math.nan)
        return out, lse
    if bias is None and q.dtype != torch.float32 and q.shape[-1] % 8 == 0:
        out, lse, *_ = _aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)
        return out, lse[..., : q.shape[-2]]
    if bias is not None:
        padded = torch.nn.functional.pad(bias.to(q.dtype), (0, -bias.shape[-1] % 8))
        bias = padded[..., : k.shape[-2]].expand(q.shape[0], q.shape[1], q.shape[2], -1)
    out, lse, *_ = _aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, scale=scale)
    return out, lse[..., : q.shape[-2]]


def _effective_query(query: Tensor, branch: Branch) -> Tensor:
    """Q' = gamma * Q_content + (1 - gamma) * (a_q * Q + b_q): the tensor itself where there is
    nothing to do, else fp32."""
    q = query if branch.query is None else branch.query
    if branch.query_affine is not None:
        q = (
            q.float() * branch.query_affine.scale[:, :, None]
            + branch.query_affine.shift[:, :, None]
        )
    if branch.content_query is not None and (
        isinstance(branch.gamma, Tensor) or branch.gamma != 0.0
    ):
        gamma = (
            branch.gamma
            if not isinstance(branch.gamma, Tensor)
            else branch.gamma[:, None, None, None]
        )
        q = q.float() + gamma * (branch.content_query.float() - q.float())
    return q


def _fold(
    q: Tensor, s: Segment, keys: Segment, gone: Tensor | None, dtype: torch.dtype, scale: float
) -> tuple[Tensor, Tensor | None, float]:
    """Fold alpha and the key affine into the query.

    Returns the query of the segment in `dtype`, the logit term [B, H, L] that is constant over its
    keys, and the softmax scale.
    The term is computed from the rounded query, so that its rounding error multiplies centred keys
    only.
    """
    affine = s.key_affine
    alpha = s.logit_scale if isinstance(s.logit_scale, Tensor) else None
    if not isinstance(s.logit_scale, Tensor):
        scale *= s.logit_scale
    if affine is None and alpha is None and q.dtype == dtype:
        return q, None, scale
    scaled = q.float() if alpha is None else q.float() * alpha[:, None, None, None]
    exact = scaled if affine is None else scaled * affine.scale[:, :, None]
    if dtype == torch.float16:  # a power of two moves to the softmax scale, lest the query overflow
        room = _room(exact)
        exact, scaled, scale = exact / room, scaled / room, scale * room
    folded = (
        torch.empty(q.transpose(1, 2).shape, dtype=dtype, device=q.device)
        .transpose(1, 2)
        .copy_(exact)
    )
    term = None
    if affine is not None:
        term = torch.einsum("bhld,bhd->bhl", scaled, affine.shift)
    if dtype != torch.float32:
        rest = torch.einsum("bhld,bhd->bhl", exact - folded.float(), _center(s, keys, gone, len(q)))
        term = rest if term is None else term + rest
    return folded, None if term is None else term * scale, scale


def _room(x: Tensor) -> float:
    """A power of two that brings a query into the range of fp16. On a GPU it is a constant: reading
    the peak would wait for the device."""
    if x.device.type != "cpu":
        return _ROOM
    peak = float(x.abs().nan_to_num(0.0, 0.0).max())
    return 2.0 ** max(0, math.ceil(math.log2(peak / _PEAK))) if peak > _PEAK else 1.0


def _center(s: Segment, keys: Segment, gone: Tensor | None, batch: int) -> Tensor:
    """The channel means [B, H, D] of the keys that serve each row: as given, else measured, without
    the keys [R or 1, 1, S, 1] that are `gone` (and zeros)."""
    if s.key_affine is not None and s.key_affine.center is not None:
        return s.key_affine.center
    mean = keys.key.mean(2, dtype=torch.float32)
    if gone is not None:
        mean = mean / (~gone).float().mean(2).clamp(min=1e-9)
    if keys.rows is not None:
        mean = mean.index_select(0, keys.rows.to(mean.device).clamp(min=0))
    return mean.nan_to_num(0.0, 0.0, 0.0).expand(batch, -1, -1)


def _groups(rows: list[int]) -> Iterator[tuple[list[int], list[int]]]:
    """Split a row map into library calls: (key rows, query rows), every key row with equally many
    query rows, in its order.

    Key rows that are equally spaced and have equally many query rows share a call; others get a
    call each.
    """
    users: dict[int, list[int]] = {}
    for b, r in enumerate(rows):
        if r >= 0:
            users.setdefault(r, []).append(b)
    refs = sorted(users)
    even = len({len(u) for u in users.values()}) == 1
    spaced = len({b - a for a, b in pairwise(refs)}) <= 1
    if refs and even and spaced:
        yield refs, [b for r in refs for b in users[r]]
    else:
        for r in refs:
            yield [r], users[r]


def _rows_view(x: Tensor, rows: list[int]) -> Tensor:
    """x[rows] as a view for equally spaced rows."""
    if len(rows) == x.shape[0] and rows[0] == 0:
        return x
    step = rows[1] - rows[0] if len(rows) > 1 else 1
    return x[rows[0] : rows[-1] + 1 : step]


def _stack(x: Tensor, rows: list[int], groups: int) -> Tensor:
    """Rows of [B, H, L, D] stacked along the sequence: [groups, H, rows per group * L, D]."""
    heads, dim = x.shape[1], x.shape[3]
    picked = x if rows == list(range(x.shape[0])) else x[rows]
    return picked.transpose(1, 2).reshape(groups, -1, heads, dim).transpose(1, 2)


def _unstack(x: Tensor, rows: int) -> Tensor:
    """[groups, H, n * L, ...] back to [rows, H, L, ...]."""
    x = x.transpose(1, 2)
    return x.reshape(rows, -1, *x.shape[2:]).transpose(1, 2)


def _mapped(
    q: Tensor, k: Tensor, v: Tensor, s: Segment, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of every query row with the key row that serves it; rows without one get zeros and
    -inf."""
    batch, heads, length, dim = q.shape
    identity = list(range(batch))
    rows = (
        s.rows.tolist() if s.rows is not None else identity if k.shape[0] == batch else [0] * batch
    )
    if s.rows is not None and not all(-1 <= r < len(k) for r in rows):
        raise ValueError(f"torch: rows {rows} are not in -1..{len(k) - 1}")
    if rows == identity and k.shape[0] == batch:
        return _library_attention(q, k, v, bias, scale)
    out = torch.zeros(batch, length, heads, dim, dtype=q.dtype, device=q.device).transpose(1, 2)
    lse = torch.full((batch, heads, length), NEG_INF, dtype=torch.float32, device=q.device)
    for refs, users in _groups(rows):
        own_bias = bias if bias is None or bias.shape[0] == 1 else _rows_view(bias, refs)
        o, p = _library_attention(
            _stack(q, users, len(refs)), _rows_view(k, refs), _rows_view(v, refs), own_bias, scale
        )
        out[users] = _unstack(o, len(users))
        lse[users] = _unstack(p, len(users))
    return out, lse


def _blended(s: Segment, x: Tensor, own: Tensor) -> Tensor:
    """lam * x[rows] + (1 - lam) * own, materialised: the one case without a form that reads K and V
    in place."""
    picked = x if s.rows is None else x.index_select(0, s.rows.to(x.device).clamp(min=0))
    lam = s.kv_blend if not isinstance(s.kv_blend, Tensor) else s.kv_blend[:, None, None, None]
    return (own.float() + lam * (picked.float() - own.float())).to(x.dtype)


def _segment(q: Tensor, s: Segment, dtype: torch.dtype, scale: float) -> tuple[Tensor, Tensor]:
    """One segment: its normalised output and its LSE, with every option of the segment but the null
    keys."""
    key, value, rows = s.key, s.value, s.rows
    if key.shape[2] == 0 or (not isinstance(s.logit_bias, Tensor) and s.logit_bias == NEG_INF):
        return q.new_zeros(q.shape, dtype=dtype), q.new_full(
            q.shape[:-1], NEG_INF, dtype=torch.float32
        )
    bias = gone = live = None
    if s.key_bias is not None:
        bias = (s.key_bias if s.key_bias.ndim == 2 else s.key_bias[None])[:, None, None]
    if s.own_key is not None and s.own_value is not None:
        key, value = _blended(s, key, s.own_key), _blended(s, value, s.own_value)
        if bias is not None and bias.shape[0] > 1 and rows is not None:
            bias = bias.index_select(0, rows.to(bias.device).clamp(min=0))
        identity = torch.arange(q.shape[0])
        rows = None if rows is None else torch.where(rows.cpu() < 0, -1, identity)
    if bias is not None:  # a fully masked row has no softmax: let it see its keys, then drop it
        gone = (bias == NEG_INF).transpose(-1, -2)
        key, value = key.masked_fill(gone, 0.0), value.masked_fill(gone, 0.0)
        dead = (bias == NEG_INF).all(-1, keepdim=True)
        bias = torch.where(dead, 0.0, bias)
        live = ~dead[:, 0, :, 0]
    mapped = Segment(key, value, rows=rows)
    folded, term, scale = _fold(q, s, mapped, gone, dtype, scale)
    out, lse = _mapped(folded, key, value, mapped, bias, scale)
    if live is not None:
        if live.shape[0] > 1 and rows is not None:
            live = live[rows.to(live.device).clamp(min=0)]
        lse = torch.where(live[:, None], lse, NEG_INF)
    if term is not None:
        lse = lse + term
    if isinstance(s.logit_bias, Tensor):
        beta = _over(s.logit_bias)
        lse = torch.where(beta == NEG_INF, NEG_INF, lse + beta)
        out = torch.where(torch.isnan(lse).unsqueeze(-1), lse.unsqueeze(-1), out).to(out.dtype)
    else:
        lse = lse + s.logit_bias
    lse = torch.where(_dropped(s, lse), NEG_INF, lse) if s.rows is not None else lse
    if s.value_affine is not None:
        out = out.float() * s.value_affine.scale[:, :, None] + s.value_affine.shift[:, :, None]
    return out, lse


def _dropped(s: Segment, lse: Tensor) -> Tensor:
    """[B, 1, 1]: rows that the row map removes."""
    assert isinstance(s.rows, Tensor)
    return (s.rows.to(lse.device) < 0)[:, None, None]


def merge_two(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Exact merge of two partial attentions: out = lerp(out, other, sigmoid(other_lse - lse)).

    The shares come from the difference, not from the sum: its rounding would scale both of them.
    """
    both = torch.logaddexp(lse, other_lse)
    further = torch.where(both == NEG_INF, NEG_INF, other_lse - lse)
    share = torch.sigmoid(further).unsqueeze(-1)
    kept = torch.where(both == NEG_INF, 0.0, torch.sigmoid(lse - other_lse)).unsqueeze(-1)
    total = torch.where(kept == 0.0, 0.0, out.float()).mul_(kept)
    return total.add_(torch.where(share == 0.0, 0.0, other.float()).mul_(share)), both


def _branch(query: Tensor, branch: Branch, scale: float) -> tuple[Tensor, Tensor]:
    """One softmax: segments one after the other, merged by their LSE."""
    q = _effective_query(query, branch)
    out, lse = _segment(q, branch.segments[0], query.dtype, scale)
    for s in branch.segments[1:]:
        out, lse = merge_two(out, lse, *_segment(q, s, query.dtype, scale))
    nulls = sum(s.null_keys for s in branch.segments)
    if nulls:
        share = torch.sigmoid(lse - math.log(nulls)).unsqueeze(-1)
        out = torch.where(share == 0.0, 0.0, out.float() * share)
        lse = torch.logaddexp(lse, torch.full_like(lse, math.log(nulls)))
    elif _may_be_dead(branch):
        out = torch.where(lse.unsqueeze(-1) == NEG_INF, 0.0, out)
    return out, lse


def _may_be_dead(branch: Branch) -> bool:
    """Whether some query may have lost every key of the branch."""
    return all(
        s.key_bias is not None
        or s.rows is not None
        or isinstance(s.logit_bias, Tensor)
        or s.logit_bias == NEG_INF
        for s in branch.segments
    )


def _some_heads(node: Any, heads: slice) -> Any:
    """A branch, segment, affine or [B, H, ...] tensor with some of its heads, as views."""
    if isinstance(node, tuple):
        return tuple(_some_heads(x, heads) for x in node)
    if isinstance(node, Affine):
        center = None if node.center is None else node.center[:, heads]
        return Affine(node.scale[:, heads], node.shift[:, heads], center)
    if isinstance(node, (Branch, Segment)):
        kept = {name: _some_heads(getattr(node, name), heads) for name in _WITH_HEADS[type(node)]}
        return replace(node, **kept)
    return None if node is None else node[:, heads]


_WITH_HEADS: dict[type, tuple[str, ...]] = {
    Branch: ("segments", "query", "query_affine", "content_query"),
    Segment: ("key", "value", "key_affine", "value_affine", "own_key", "own_value"),
}


def attention_forward(
    query: Tensor, branches: tuple[Branch, ...], softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """The operation of `branch.py`: out [B, H, L, D], lse [G, B, H, L] in fp32.

    On the CPU a large call goes through a few heads at a time: what it needs besides its tensors is
    then a small part of them. A GPU gets the whole batch in one call.
    """
    batch, heads, length, dim = query.shape
    longest = max(length, *(s.key.shape[2] for branch in branches for s in branch.segments))
    head = 4 * batch * longest * dim
    step = max(1, _PART // head) if heads * head > 4 * _PART else heads
    if query.device.type != "cpu" or step >= heads:
        return _some(query, branches, softmax_scale)
    out = torch.empty(batch, length, heads, dim, dtype=query.dtype).transpose(1, 2)
    lse = torch.empty(len(branches), batch, heads, length)
    for start in range(0, heads, step):
        part = slice(start, start + step)
        out[:, part], lse[:, :, part] = _some(
            query[:, part], _some_heads(branches, part), softmax_scale
        )
    return out, lse


def _some(
    query: Tensor, branches: tuple[Branch, ...], softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """`attention_forward` in one go."""
    batch, heads, length, dim = query.shape
    total: Tensor | None = None
    lses = []
    for branch in branches:
        out, lse = _branch(query, branch, softmax_scale)
        lses.append(lse)
        if isinstance(branch.weight, Tensor):
            out = out.float() * _over(branch.weight).unsqueeze(-1)
        elif branch.weight == 0.0:
            continue
        elif branch.weight != 1.0:
            out = out.float() * branch.weight
        total = out if total is None else total.float() + out.float()
    strides = (length * heads * dim, dim, heads * dim, 1)
    if total is None or total.dtype != query.dtype or total.stride() != strides:
        result = torch.zeros(
            batch, length, heads, dim, dtype=query.dtype, device=query.device
        ).transpose(1, 2)
        total = result if total is None else result.copy_(total)
    return total, torch.stack(lses)


def token_stats_forward(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and sqrt(unbiased variance + eps) over the tokens of [B, H, N, D], in fp32."""
    x = x.float()
    if x.shape[-2] == 1:
        return x[..., 0, :].clone(), torch.full_like(x[..., 0, :], eps).sqrt()
    var, mean = torch.var_mean(x, dim=-2)
    return mean, (var + eps).sqrt()
