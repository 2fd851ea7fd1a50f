"""Decoupled cross-attention in one tile: all keys of all branches are columns of one product.

No online softmax, one product with the keys, one with the values, one store: every branch owns a
range of the (at most 128) columns, takes its own maximum and sum there, and its weight is
multiplied into the probabilities.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import (
    LOG2E,
    dot_pv,
    dot_qk,
    finish,
    gather_tile,
    load_tile,
    number_at,
    number_rows,
    store_tile,
    token_offsets,
    token_pointer,
    zero_tile,
)


@triton.jit
def _segment_columns(segment, b, h, n, begin, scale2):
    """Columns [N] of one segment: key and value pointers, inside, readable, scale, bias."""
    row = b
    if segment.rows is not None:
        row = tl.load(segment.rows + b).to(tl.int64)
    alive = row >= 0
    row = tl.maximum(row, 0)
    local = n - begin
    inside = (local >= 0) & (local < segment.length)
    bias = tl.zeros_like(n).to(tl.float32) + number_at(segment.logit_bias, b) * LOG2E
    if segment.key_bias is not None:
        at = segment.key_bias + row * segment.key_bias_stride + local
        bias += tl.load(at, mask=inside, other=0.0) * LOG2E
    scale = tl.zeros_like(bias) + scale2 * number_at(segment.logit_scale, b)
    key = token_pointer(segment.key, row, h, 0) + token_offsets(segment.key, local)
    value = token_pointer(segment.value, row, h, 0) + token_offsets(segment.value, local)
    return key, value, inside, inside & alive & (bias > -float("inf")), scale, bias


@triton.jit
def decoupled_kernel(
    out, lse, branches, H, L, scale2,
    D: tl.constexpr, BLOCK_M: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out [B, H, L, D] in BLHD memory; lse [G, B, H, L]. Grid: (query tiles, heads, batch rows)."""
    b = tl.program_id(2).to(tl.int64)
    h = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0).to(tl.int64) * BLOCK_M
    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, COLUMNS)
    valid = start + m < L
    begin = 0
    seen = n < 0
    heard = n < 0
    scale = tl.zeros([COLUMNS], tl.float32)
    bias = tl.zeros([COLUMNS], tl.float32)
    for g in tl.static_range(len(branches)):
        for i in tl.static_range(len(branches[g].segments)):
            segment = branches[g].segments[i]
            key, value, inside, readable, factor, added = _segment_columns(
                segment, b, h, n, begin, scale2
            )
            if g + i == 0:
                keys = key
                values = value
            else:
                keys = tl.where(inside, key, keys)
                values = tl.where(inside, value, values)
            seen = seen | readable
            if branches[g].weight is not None:
                heard = heard | readable
            scale = tl.where(inside, factor, scale)
            bias = tl.where(inside, added, bias)
            begin += segment.length
    query = branches[0].query
    q = load_tile(query, b, h, start, m, valid, D)
    s = dot_qk(q, gather_tile(keys, seen, D))
    s = tl.where(seen[None, :], s * scale[None, :] + bias[None, :], -float("inf"))

    # each column's maximum is that of its branch
    shift = tl.zeros_like(s)
    begin = 0
    for g in tl.static_range(len(branches)):
        end = begin
        for i in tl.static_range(len(branches[g].segments)):
            end += branches[g].segments[i].length
        mine = ((n >= begin) & (n < end))[None, :]
        top = tl.max(tl.where(mine, s, -float("inf")), 1)
        shift = tl.where(mine, tl.where(top == -float("inf"), 0.0, top)[:, None], shift)
        begin = end
    p = tl.math.exp2(s - shift)

    norm = tl.zeros_like(s)
    begin = 0
    for g in tl.static_range(len(branches)):
        branch = branches[g]
        end = begin
        for i in tl.static_range(len(branch.segments)):
            end += branch.segments[i].length
        mine = ((n >= begin) & (n < end))[None, :]
        top = tl.max(tl.where(mine, s, -float("inf")), 1)
        total = tl.sum(tl.where(mine, p, 0.0), 1)
        logsum, factor = finish(total, top, branch.null_keys)
        at = ((g * tl.num_programs(2).to(tl.int64) + b) * H + h) * L + start
        tl.store(lse + at + m, logsum, mask=valid)
        if branch.weight is not None:
            weight = number_rows(branch.weight, b, start + m, valid)
            norm = tl.where(mine, (factor * weight)[:, None], norm)
        begin = end
    p = tl.where(heard[None, :], p * norm, 0.0)
    v = gather_tile(values, heard, D)
    acc = dot_pv(p, v, zero_tile(BLOCK_M, D))
    store_tile(out + ((b * L + start) * H + h) * D, H * D, m, valid, acc, D)
