"""The fused attention kernel: any branches and segments in one launch, K and V read once.

One program owns one tile of queries of one (batch row, head). Per branch it runs flash attention
over each segment in turn. What distinguishes segments is paid for at their boundaries only: the
folded query tile, the logit scale and the bias (the running maximum is shifted into the segment's
frame and back), and the value affine (on the accumulator).

The loop over keys is that of plain attention, rotated by hand. One turn issues the products of the
next step, then takes the exponentials of this one (they depend on neither), loads V and adds, and
only then looks at the new products. The ragged last step is peeled and is the only one that masks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from .decoupled import decoupled_kernel
from .device import arch_of, reasons
from .launch import Launch
from .planning import plan
from .primitives import (
    LOG2E,
    UNREACHABLE,
    add_tiles,
    dot_high,
    dot_low,
    dot_pv,
    dot_qk,
    empty_state,
    finish,
    fold_query,
    load_sums,
    load_tile,
    map_values,
    merge_states,
    number_at,
    number_rows,
    scale_rows,
    settled,
    store_tile,
    within_range,
    zero_tile,
)
from .quantised import fold_quantised, products_quantised, scales_at
from .reach import logits_within

# How far exponents may be above and the largest of a row below a maximum that stays, in log2 units:
# 2^80 times a million keys times values of 2^27 is within fp32 (larger may overflow), and beside
# 2^-100 what fp32 calls zero is nothing.
ABOVE = tl.constexpr(80.0)
BELOW = tl.constexpr(100.0)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from ..branch import Branch


@triton.jit
def _logits(s, scale, segment, row, start, n, keep):
    """[M, N] in log2 units of the raw products with the keys start + n, -inf where these are not
    kept (None: all are)."""
    s = s * scale[:, None]
    if segment.key_bias is not None:
        bias = _load_bias(segment, row, start, n, keep)
        if segment.clean is None:
            bias = within_range(bias) * LOG2E
        s += bias[None, :]
    if keep is not None:
        s = tl.where(keep[None, :], s, -float("inf"))
    return s


@triton.jit
def _measure(s, top, scale, segment, row, start, n, keep):
    """First half of a softmax step: the new running maximum, safe for rows that have no key so far.

    s [M, N] raw products; scale [M] >= 0; keep as for `_logits`.
    -> (exponents [M, N] <= 0, decay [M] of what was accumulated before, new maximum [M]).
    """
    if segment.key_bias is None and keep is None:
        new = tl.maximum(top, tl.max(s, 1) * scale)
        return s * scale[:, None] - new[:, None], tl.math.exp2(top - new), new
    else:
        s = _logits(s, scale, segment, row, start, n, keep)
        new = tl.maximum(top, tl.max(s, 1))
        safe = tl.where(new == -float("inf"), 0.0, new)
        return s - safe[:, None], tl.math.exp2(top - safe), new


@triton.jit
def _load_bias(segment, row, start, n, keep):
    """[N]: the biases of the keys start + n, -inf where not kept; in log2 units where clean."""
    at = segment.key_bias + row * segment.key_bias_stride + start + n
    if keep is None:
        return tl.load(at)
    else:
        return tl.load(at, mask=keep, other=-float("inf"))


@triton.jit
def _load(x, segment, row, h, start, n, valid, D: tl.constexpr, PART: tl.constexpr):
    """The chunks of the keys or values start + n (see `load_tile`); zeros where a bias removes
    them, since what is removed may hold anything."""
    if segment.key_bias is None or segment.clean is not None:
        return load_tile(x, row, h, start, n, valid, D, PART)
    else:
        seen = _load_bias(segment, row, start, n, valid) > -float("inf")
        return load_tile(x, row, h, start, n, seen, D, PART)


@triton.jit
def _accumulate(acc, total, step, segment, row, h, start, n, valid, D: tl.constexpr):
    """Second half of a softmax step: exponentials, then their values. V is loaded after them in
    source order: a wait for it in front would end their overlap with the next products."""
    exponents, decay = step
    p = tl.math.exp2(exponents)
    total = total * decay + tl.sum(p, 1)
    acc = scale_rows(acc, decay)
    v = _load(segment.value, segment, row, h, start, n, valid, D, 0)
    return _with_values(p, v, acc, segment), total


@triton.jit
def _with_values(p, v, acc, segment):
    """acc + p v."""
    if segment.settled is None:
        return dot_pv(p, v, acc)
    else:
        return settled(dot_pv(p, v, acc))


@triton.jit
def _early(q, segment, row, h, start, n, valid, D: tl.constexpr):
    """[M, N]: the products of the first of two chunks, a turn ahead of those of the second; n,
    which stands for nothing, where a turn issues both.

    On sm_90 the compiler waits for the first before it issues the second. It runs nothing next to
    products any more where those of the values are under way across such a wait: with two chunks
    they are `settled` in their turn.
    """
    if segment.early is None:
        return n
    else:
        return dot_low(q, _load(segment.key, segment, row, h, start, n, valid, D, 1))


@triton.jit
def _products(early, q, segment, row, h, start, n, valid, D: tl.constexpr):
    """[M, N]: raw products with the keys from `start` on; early: what `_early` gave for them."""
    if segment.quantised.blocks is not None:
        return products_quantised(q, segment, row, h, start, n, valid, D)
    elif segment.early is None:
        return dot_qk(q, _load(segment.key, segment, row, h, start, n, valid, D, 0))
    else:
        high = _load(segment.key, segment, row, h, start, n, valid, D, 2)
        return dot_high(early, q, high)


@triton.jit
def _scale(scale, segment, row, h, start):
    """[M]: what multiplies the raw products of a step that is in its place."""
    if segment.quantised.blocks is None:
        return scale
    else:
        return scale * scales_at(segment, row, h, start)


@triton.jit
def _level(s, segment, row, h, start, n):
    """[M, N]: raw products of a step that was moved back, to be multiplied by the bare scale."""
    if segment.quantised.blocks is None:
        return s
    else:
        return s * scales_at(segment, row, h, start + n)[None, :]


@triton.jit
def _attend(state, q, scale, segment, row, h, D: tl.constexpr, BLOCK_N: tl.constexpr):
    """Flash attention over one segment. state: (accumulator, sum [M], running maximum [M])."""
    acc, total, top = state
    n = tl.arange(0, BLOCK_N)
    if segment.single is not None:
        valid = n < segment.length
        early = _early(q, segment, row, h, 0, n, valid, D)
        s = _products(early, q, segment, row, h, 0, n, valid, D)
        level = _scale(scale, segment, row, h, 0)
        exponents, decay, top = _measure(s, top, level, segment, row, 0, n, valid)
        step = (exponents, decay)
        acc, total = _accumulate(acc, total, step, segment, row, h, 0, n, valid, D)
    else:
        # the last step is moved back to end with the segment: every load is full, and it skips
        # the columns that were seen before
        full = (segment.length - 1) // BLOCK_N
        last = segment.length - BLOCK_N
        early = _early(q, segment, row, h, 0, n, None, D)
        s = _products(early, q, segment, row, h, 0, n, None, D)
        level = _scale(scale, segment, row, h, 0)
        exponents, decay, top = _measure(s, top, level, segment, row, 0, n, None)
        early = _early(q, segment, row, h, tl.minimum(BLOCK_N, last), n, None, D)
        for i in tl.range(1, full):
            at = i * BLOCK_N
            s = _products(early, q, segment, row, h, at, n, None, D)
            step = (exponents, decay)
            acc, total = _accumulate(acc, total, step, segment, row, h, at - BLOCK_N, n, None, D)
            level = _scale(scale, segment, row, h, at)
            exponents, decay, top = _measure(s, top, level, segment, row, at, n, None)
            early = _early(q, segment, row, h, tl.minimum(at + BLOCK_N, last), n, None, D)
        s = _products(early, q, segment, row, h, last, n, None, D)
        step = (exponents, decay)
        before = (full - 1) * BLOCK_N
        acc, total = _accumulate(acc, total, step, segment, row, h, before, n, None, D)
        s = _level(s, segment, row, h, last, n)
        keep = n + last >= full * BLOCK_N
        exponents, decay, top = _measure(s, top, scale, segment, row, last, n, keep)
        step = (exponents, decay)
        acc, total = _accumulate(acc, total, step, segment, row, h, last, n, None, D)
    return acc, total, top


@triton.jit
def _add(acc, total, exponents, segment, row, h, start, n, D: tl.constexpr):
    """A step below a maximum that stays: nothing decays."""
    p = tl.math.exp2(exponents)
    total += tl.sum(p, 1)
    v = _load(segment.value, segment, row, h, start, n, None, D, 0)
    return _with_values(p, v, acc, segment), total


@triton.jit
def _attend_below(state, q, scale, segment, row, h, D: tl.constexpr, BLOCK_N: tl.constexpr):
    """`_attend` below a maximum that stays as it is: no row maxima, no rescaling."""
    acc, total, top = state
    n = tl.arange(0, BLOCK_N)
    full = (segment.length - 1) // BLOCK_N
    last = segment.length - BLOCK_N
    early = _early(q, segment, row, h, 0, n, None, D)
    s = _products(early, q, segment, row, h, 0, n, None, D)
    level = _scale(scale, segment, row, h, 0)
    exponents = _logits(s, level, segment, row, 0, n, None) - top[:, None]
    early = _early(q, segment, row, h, tl.minimum(BLOCK_N, last), n, None, D)
    for i in tl.range(1, full):
        at = i * BLOCK_N
        s = _products(early, q, segment, row, h, at, n, None, D)
        acc, total = _add(acc, total, exponents, segment, row, h, at - BLOCK_N, n, D)
        level = _scale(scale, segment, row, h, at)
        exponents = _logits(s, level, segment, row, at, n, None) - top[:, None]
        early = _early(q, segment, row, h, tl.minimum(at + BLOCK_N, last), n, None, D)
    s = _products(early, q, segment, row, h, last, n, None, D)
    acc, total = _add(acc, total, exponents, segment, row, h, (full - 1) * BLOCK_N, n, D)
    keep = n + last >= full * BLOCK_N
    s = _level(s, segment, row, h, last, n)
    exponents = _logits(s, scale, segment, row, last, n, keep) - top[:, None]
    acc, total = _add(acc, total, exponents, segment, row, h, last, n, D)
    return acc, total, top


@triton.constexpr_function
def step_width(block_n, head_dim, biased, masked, running):
    """Keys of a step: next to a running maximum, a bias for each needs registers, and so does
    leaving out those that it removes."""
    if biased and head_dim + (masked and running) > 128:
        return min(block_n, 32)
    return min(block_n, 64) if masked or (biased and running) else block_n


@triton.jit
def _attend_bounded(
    state, q, scale, segment, row, h, FRESH: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr
):
    """`_attend`, without a running maximum where the logits of all rows of the tile are bounded
    such that no exponential leaves the range of fp32 (and of bf16, which has the same), and no sum
    of them falls out of it: then ABOVE under the bound is a maximum that may stay."""
    BIASED: tl.constexpr = segment.key_bias is not None and segment.single is None
    MASKED: tl.constexpr = BIASED and segment.clean is None
    STEP: tl.constexpr = step_width(BLOCK_N, D, BIASED, MASKED, segment.reach.pointer is None)
    if segment.reach.pointer is None:
        return _attend(state, q, scale, segment, row, h, D, STEP)
    else:
        middle, span = logits_within(q, scale, segment, row, h, D)
        room = ABOVE + BELOW
        if segment.reach.anchored is None:  # the largest logit may be as far below the middle
            room = room / 2
        fits = (span <= room) & (tl.abs(middle) < float("inf"))
        if tl.min(tl.where(fits, 1, 0), 0) == 1:  # a NaN does not fit
            acc, total, top = state
            fixed = middle + span - ABOVE
            if not FRESH:
                fixed = tl.maximum(top, fixed)
                decay = tl.math.exp2(top - fixed)
                acc, total = scale_rows(acc, decay), total * decay
            state = _attend_below((acc, total, fixed), q, scale, segment, row, h, D, STEP)
        elif segment.quantised.blocks is None:  # two loops at full size do not fit the registers
            state = _attend(state, q, scale, segment, row, h, D, min(STEP, BLOCK_N // 2))
        else:
            state = _attend(state, q, scale, segment, row, h, D, STEP)
        return state


@triton.jit
def _segment(
    state, branch, segment, row, place, scale2, FRESH: tl.constexpr,
    D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One segment with its boundaries: fold the query, shift the maximum to its frame and back.
    FRESH: nothing was accumulated before."""
    b, h, _, start, m, valid = place
    factor = scale2 * number_at(segment.logit_scale, b)
    if segment.quantised.blocks is None:
        q, scale, shift = fold_query(branch, segment, place, factor, D)
    else:
        q, scale, shift = fold_quantised(branch, segment, place, row, factor, D)
    acc, total, before = state
    if segment.logit_bias.stride_l is None:
        shift += within_range(number_at(segment.logit_bias, b)) * LOG2E
        moved = before - shift
        state = (acc, total, moved)
        acc, total, top = _attend_bounded(state, q, scale, segment, row, h, FRESH, D, BLOCK_N)
        # a maximum that stays comes back as it was, however far away the segment's frame is
        top = top + shift if FRESH else tl.where(top == moved, before, top + shift)
    else:
        # a bias per query may be -inf: such a row runs with scale 0 below an unreachable maximum,
        # and adds exactly nothing
        bias = number_rows(segment.logit_bias, b, start + m, valid)
        dead = bias == -float("inf")
        shift += tl.where(dead, 0.0, within_range(bias)) * LOG2E
        moved = tl.where(dead, UNREACHABLE, before - shift)
        scale = tl.where(dead, 0.0, scale)
        acc, total, top = _attend((acc, total, moved), q, scale, segment, row, h, D, BLOCK_N)
        top = tl.where(dead | (top == moved), before, top + shift)
    return acc, total, top


@triton.jit
def _mapped_segment(
    state, branch, segment, row, place, scale2, FIRST: tl.constexpr,
    D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A segment and its value affine, which touches what this segment accumulated: either it is the
    FIRST of its branch (free), or it accumulates on its own and is merged."""
    if segment.value_map.scale is None:
        state = _segment(state, branch, segment, row, place, scale2, FIRST, D, BLOCK_N)
    else:
        at = place[2] * D
        if FIRST:
            acc, total, top = _segment(state, branch, segment, row, place, scale2, True, D, BLOCK_N)
            state = (map_values(acc, total, segment.value_map, at, D), total, top)
        else:
            fresh = empty_state(state[1].shape[0], D)
            acc, total, top = _segment(fresh, branch, segment, row, place, scale2, True, D, BLOCK_N)
            acc = map_values(acc, total, segment.value_map, at, D)
            state = merge_states(state, (acc, total, top))
    return state


@triton.jit
def _branch(branch, place, scale2, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(accumulator, sum, maximum) of all segments of a branch under one softmax."""
    state = empty_state(BLOCK_M, D)
    b = place[0]
    for i in tl.static_range(len(branch.count)):
        segment = branch.segments[i]
        if segment.rows is None and segment.logit_bias.pointer is None and i == 0:
            # row b, or row 0 where the host has set the batch stride to 0
            state = _mapped_segment(state, branch, segment, b, place, scale2, i == 0, D, BLOCK_N)
        else:
            row = b
            if segment.rows is not None:
                row = tl.load(segment.rows + b).to(tl.int64)
            alive = row >= 0
            if segment.logit_bias.stride_l is None:
                alive = alive & (number_at(segment.logit_bias, b) != -float("inf"))
            if alive:
                state = _mapped_segment(
                    state, branch, segment, row, place, scale2, i == 0, D, BLOCK_N
                )
    return state


@triton.jit
def attention_kernel(
    out, branches, order, H, L, scale2,
    GROUPS: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out [B, H, L, D] in BLHD memory. Grid: (query tiles, heads, batch rows).

    scale2: softmax scale * log2(e). order: [B] batch rows, the most work first, or None.
    """
    b = tl.program_id(2)
    if order is not None:
        b = tl.load(order + b)
    b = b.to(tl.int64)
    h = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0).to(tl.int64) * BLOCK_M
    m = tl.arange(0, BLOCK_M)
    valid = start + m < L
    place = (b, h, b * H + h, start, m, valid)
    result = zero_tile(BLOCK_M, D)
    for g in tl.static_range(GROUPS):
        branch = branches[g]
        acc, total, top = _branch(branch, place, scale2, D, BLOCK_M, BLOCK_N)
        logsum, factor = finish(total, top, branch.null_keys)
        at = place[2] * L + start
        tl.store(branch.lse + at + m, logsum, mask=valid)
        if branch.weight.value is not None:
            weight = number_rows(branch.weight, b, start + m, valid)
            acc = scale_rows(acc, factor * weight)
            if branch.gets is not None:
                acc = add_tiles(acc, load_sums(branch.gets + at * D, place, D))
            if branch.puts is not None:
                store_tile(branch.puts + at * D, D, m, valid, acc, D)
            else:
                result = add_tiles(result, acc)
    at = ((b * L + start) * H + h) * D
    store_tile(out + at, H * D, m, valid, result, D)


def unsupported_reasons(query: Tensor, branches: tuple[Branch, ...]) -> list[str]:
    """Every reason why these kernels cannot run a (normalised) call; empty when they can.

    Reads shapes, dtypes and devices only: no synchronisation.
    """
    return reasons(query, branches)


def launch_of(
    query: Tensor,
    branches: Sequence[Branch],
    softmax_scale: float,
    out: Tensor,
    lse: Tensor,
    arch: str,
    fast: bool = False,
) -> Launch:
    """The launch of a normalised call on an architecture of the table; nothing is started."""
    kernels = {"attention": attention_kernel, "decoupled": decoupled_kernel}
    return plan(kernels.__getitem__, query, branches, softmax_scale, out, lse, arch, fast)


def attention_forward(
    query: Tensor, branches: tuple[Branch, ...], softmax_scale: float, fast: bool = False
) -> tuple[Tensor, Tensor]:
    """The whole operation in one launch.

        out = sum_g w_g * softmax over all keys of branch g (logit) . V'

    Args:
        query: [B, H, L, D] fp32, fp16 or bf16; D <= 256.
        branches: normalised.
        softmax_scale: sigma.
        fast: multiply queries and keys as INT8 (see `quantised`).

    Returns:
        out [B, H, L, D] in the query's dtype, laid out [B, L, H, D]; lse [branches, B, H, L] fp32,
        natural logarithm.
        The softmax, the folds and both accumulators are fp32; fp32 inputs are multiplied exactly.

    Raises:
        ValueError: where `unsupported_reasons` has any.
    """
    arch = arch_of(query)
    if arch is None:
        raise ValueError(f"attention: {'; '.join(reasons(query, branches))}")
    batch, heads, length, dim = query.shape
    out = torch.empty(batch, length, heads, dim, dtype=query.dtype, device=query.device).transpose(
        1, 2
    )
    lse = torch.empty(len(branches), batch, heads, length, dtype=torch.float32, device=query.device)
    if batch:
        launch_of(query, branches, softmax_scale, out, lse, arch, fast).run(query.device)
    return out, lse
