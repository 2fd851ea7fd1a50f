"""Decoupled cross-attention in one tile: all keys of all branches are columns of one product.

No online softmax, one product with the keys, one with the values, one store: every branch owns a
range of the (at most 128) columns, takes its own maximum and sum there, and its weight is
multiplied into the probabilities.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .configs import high_width, low_width
from .primitives import (
    LOG2E,
    dot_pv,
    dot_qk,
    finish,
    load_tile,
    number_at,
    number_rows,
    store_tile,
    within_range,
    zero_tile,
)


@triton.jit
def _columns(segment, b, n, begin, scale2):
    """Columns [N] of one segment, which start at `begin`: row, key index, inside, scale, bias.

    The bias is -inf where a key is removed; scale and bias are in log2 units.
    """
    row = b
    if segment.rows is not None:
        row = tl.load(segment.rows + b).to(tl.int64)
    local = n - begin
    inside = (local >= 0) & (local < segment.length)
    bias = tl.zeros_like(n).to(tl.float32) + within_range(number_at(segment.logit_bias, b)) * LOG2E
    alive = row >= 0
    bias = tl.where(alive, bias, -float("inf"))
    row = tl.maximum(row, 0)
    if segment.key_bias is not None:
        at = segment.key_bias + row * segment.key_bias_stride + local
        each = tl.load(at, mask=inside & alive, other=0.0)
        if segment.clean is None:
            each = within_range(each) * LOG2E
        bias += each
    scale = tl.zeros_like(bias) + scale2 * number_at(segment.logit_scale, b)
    return row, local, inside, scale, bias


@triton.jit
def _put(tile, inside, x, row, h, local, readable, D: tl.constexpr):
    """The tile with the columns of one segment filled in; other rows of x are not touched."""
    new = load_tile(x, row, h, 0, local, readable, D)
    low = tl.where(inside[:, None], new[0], tile[0])
    if len(tile) == 1:
        return (low,)
    else:
        return (low, tl.where(inside[:, None], new[1], tile[1]))


@triton.jit
def _blank(x, COLUMNS: tl.constexpr, D: tl.constexpr):
    """Zeros in the dtype of x, as chunks."""
    dtype: tl.constexpr = x.pointer.dtype.element_ty
    low = tl.zeros([COLUMNS, low_width(D)], dtype)
    if high_width(D) == 0:
        return (low,)
    else:
        return (low, tl.zeros([COLUMNS, high_width(D)], dtype))


@triton.jit
def decoupled_kernel(
    out, branches, H, L, scale2,
    GROUPS: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out [B, H, L, D] in BLHD memory. Grid: (query tiles, heads, batch rows)."""
    b = tl.program_id(2).to(tl.int64)
    h = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0).to(tl.int64) * BLOCK_M
    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, COLUMNS)
    valid = start + m < L
    query = branches[0].query
    q = load_tile(query, b, h, start, m, valid, D)
    keys = _blank(query, COLUMNS, D)
    scale = tl.zeros([COLUMNS], tl.float32)
    bias = scale - float("inf")
    begin = 0
    for g in tl.static_range(GROUPS):
        for i in tl.static_range(len(branches[g].count)):
            segment = branches[g].segments[i]
            row, local, inside, factor, added = _columns(segment, b, n, begin, scale2)
            readable = inside & (added != -float("inf"))
            keys = _put(keys, inside, segment.key, row, h, local, readable, D)
            scale = tl.where(inside, factor, scale)
            bias = tl.where(inside, added, bias)
            begin += segment.length
    s = dot_qk(q, keys) * scale[None, :]
    s = tl.where((bias != -float("inf"))[None, :], s + bias[None, :], -float("inf"))

    # each column's maximum is that of its branch
    shift = tl.zeros_like(s)
    begin = 0
    for g in tl.static_range(GROUPS):
        end = begin
        for i in tl.static_range(len(branches[g].count)):
            end += branches[g].segments[i].length
        mine = ((n >= begin) & (n < end))[None, :]
        top = tl.max(tl.where(mine, s, -float("inf")), 1)
        shift = tl.where(mine, tl.where(top == -float("inf"), 0.0, top)[:, None], shift)
        begin = end
    p = tl.math.exp2(s - shift)

    norm = tl.zeros_like(s)
    heard = n < 0
    values = _blank(query, COLUMNS, D)
    begin = 0
    for g in tl.static_range(GROUPS):
        branch = branches[g]
        end = begin
        for i in tl.static_range(len(branch.count)):
            segment = branch.segments[i]
            if branch.weight.value is not None:
                row, local, inside, factor, added = _columns(segment, b, n, end, scale2)
                readable = inside & (added != -float("inf"))
                values = _put(values, inside, segment.value, row, h, local, readable, D)
                heard = heard | inside
            end += segment.length
        mine = ((n >= begin) & (n < end))[None, :]
        top = tl.max(tl.where(mine, s, -float("inf")), 1)
        total = tl.sum(tl.where(mine, p, 0.0), 1)
        logsum, factor = finish(total, top, branch.null_keys)
        at = (b * H + h) * L + start
        tl.store(branch.lse + at + m, logsum, mask=valid)
        if branch.weight.value is not None:
            weight = number_rows(branch.weight, b, start + m, valid)
            norm = tl.where(mine, (factor * weight)[:, None], norm)
        begin = end
    p = tl.where(heard[None, :], p * norm, 0.0)
    acc = dot_pv(p, values, zero_tile(BLOCK_M, D))
    store_tile(out + ((b * L + start) * H + h) * D, H * D, m, valid, acc, D)
