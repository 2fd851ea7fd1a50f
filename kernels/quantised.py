"""INT8 products of queries and keys: `precision="fast"`.

    logit = factor * (Q* . c) + factor * step_i * scale_j * (q8_i . k8_j) + the rest
    k8 = round((K - c) / scale),  scale = max |K - c| / 127 over a block of keys, c the keys' mean
    q8 = round(Q* / step),        step = max |Q*| / 127 over a row

Q* is the query with everything that folds into it. What rounding takes multiplies centred keys
only. Queries are quantised where they are folded, keys once per call, by a kernel that also finds
how far they reach (see `reach`). Values and their weights stay as they are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import NO_ROWS, Rows, rows_of
from .configs import high_width, low_width, next_power_of_2
from .launch import Launch
from .primitives import fold_chunk, load_chunk, token_offsets, token_pointer
from .reach import new_reach

BLOCK = tl.constexpr(128)  # keys that share a scale; a step of the loop never holds more
_LEVELS = tl.constexpr(127.0)
_ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: the low bits of x + this are round(x)


class Quantised(NamedTuple):
    """Keys as INT8: Rows of [R, H, S, width]; [R, H, blocks] scales and [R, H, D] means, fp32, with
    their strides along R (0 where all rows share one)."""

    key: Rows
    scales: Any
    scales_stride: Any
    blocks: Any
    center: Any
    center_stride: Any

    def shared(self) -> Quantised:
        """The first row for all rows of the batch."""
        return self._replace(key=self.key._replace(stride_b=0), scales_stride=0, center_stride=0)


NOT_QUANTISED = Quantised(NO_ROWS, None, None, None, None, None)


@triton.constexpr_function
def low_bytes(head_dim):
    """The width of the first chunk of INT8 channels: one instruction multiplies 32."""
    return max(32, low_width(head_dim))


@triton.constexpr_function
def high_bytes(head_dim):
    """The width of the second chunk, 0 where there is none."""
    high = high_width(head_dim)
    return max(32, high) if high else 0


@triton.jit
def _levels(x, peak):
    """x / peak * 127, rounded to nearest even, as INT8; 0 where peak is."""
    inverse = tl.where(peak > 0.0, _LEVELS / peak, 0.0)
    return (x * inverse + _ROUND).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def quantise_kernel(
    x, center, out, scales, reach, H, N, blocks, parts, D: tl.constexpr, WIDTH: tl.constexpr,
    STORED: tl.constexpr, RUN_N: tl.constexpr,
):  # fmt: skip
    """out [R, H, N, STORED] INT8, scales [R, H, blocks], reach [R, H, parts]: the largest squared
    norm of the keys of a run, as they were rounded. Grid: (parts, heads, rows)."""
    part = tl.program_id(0)
    h = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    row = b * H + h
    d = tl.arange(0, WIDTH)
    n = tl.arange(0, BLOCK)
    mean = tl.load(center + row * D + d, mask=d < D, other=0.0)
    most = tl.zeros([BLOCK], tl.float32)
    end = tl.minimum((part + 1) * RUN_N, N)
    for start in tl.range(part * RUN_N, end, BLOCK):
        held = n < end - start
        seen = held[:, None] & (d < D)[None, :]
        at = token_pointer(x, b, h, start) + token_offsets(x, n)[:, None] + d[None, :]
        values = tl.load(at, mask=seen, other=0.0).to(tl.float32)
        away = tl.where(seen, values - mean[None, :], 0.0)
        peak = tl.max(tl.max(tl.abs(away), 1), 0)
        k8 = _levels(away, peak)
        # a NaN or an infinity is none of 255 levels: it goes into the scale
        scale = peak / _LEVELS + tl.sum(tl.sum(away * 0.0, 1), 0)
        norms = k8.to(tl.float32) * scale
        most = tl.maximum(most, tl.sum(norms * norms, 1))
        tl.store(scales + row * blocks + start // BLOCK, scale)
        to = out + (row * N + start) * STORED + n[:, None] * STORED + d[None, :]
        tl.store(to, k8, mask=held[:, None] & (d < STORED)[None, :])
    tl.store(reach + row * parts + part, tl.max(most, 0))


@triton.jit
def fold_quantised(branch, segment, place, row, factor, D: tl.constexpr):
    """`fold_query` for INT8 keys: (q8 chunks, scale [M] >= 0 to be multiplied by that of a block of
    keys, term [M])."""
    center = segment.quantised.center + row * segment.quantised.center_stride + place[1] * D
    low, term = fold_chunk(branch, segment, place, 0, low_bytes(D), D)
    d = tl.arange(0, low_bytes(D))
    term += tl.sum(low * tl.load(center + d, mask=d < D, other=0.0)[None, :], 1)
    peak = tl.max(tl.abs(low), 1)
    lost = tl.sum(low * 0.0, 1)  # NaN where the row has one
    sign = 1.0
    if segment.signed is not None:
        sign = tl.where(factor < 0, -1.0, 1.0)
    if high_bytes(D) == 0:
        q = (_levels(low * sign, peak[:, None]),)
    else:
        high, more = fold_chunk(branch, segment, place, low_bytes(D), high_bytes(D), D)
        d = low_bytes(D) + tl.arange(0, high_bytes(D))
        term += more
        term += tl.sum(high * tl.load(center + d, mask=d < D, other=0.0)[None, :], 1)
        peak = tl.maximum(peak, tl.max(tl.abs(high), 1))
        lost += tl.sum(high * 0.0, 1)
        q = (_levels(low * sign, peak[:, None]), _levels(high * sign, peak[:, None]))
    return q, tl.abs(factor) * (peak / _LEVELS + lost), term * factor


@triton.jit
def products_quantised(q, segment, row, h, start, n, valid, D: tl.constexpr):
    """[M, N] fp32, whole numbers: q8 . k8 with the keys from `start` on."""
    keys = segment.quantised.key
    at = token_pointer(keys, row, h, start)
    offsets = token_offsets(keys, n)
    STORED: tl.constexpr = low_bytes(D) + high_bytes(D)
    low = load_chunk(at, offsets, valid, 0, low_bytes(D), STORED)
    s = tl.dot(q[0], tl.trans(low))
    if high_bytes(D) > 0:
        high = load_chunk(at, offsets, valid, low_bytes(D), high_bytes(D), STORED)
        s = tl.dot(q[1], tl.trans(high), s, out_dtype=tl.int32)
    return s.to(tl.float32)


@triton.jit
def scales_at(segment, row, h, at):
    """The scales of the keys `at` (a number or [N])."""
    quantised = segment.quantised
    block = quantised.scales + row * quantised.scales_stride + h * quantised.blocks
    return tl.load(block + at // BLOCK)


def quantised_width(head_dim: int) -> int:
    """Channels of an INT8 key, zeros included."""
    return int(low_bytes(head_dim)) + int(high_bytes(head_dim))


def quantise_launch(key: Tensor, center: Tensor) -> tuple[Quantised, Tensor, Launch]:
    """(INT8 keys, their reach [R, H, parts], the launch that fills both).

    Args:
        key: [R, H, S, D]; center: [R, H, D] fp32, contiguous.
    """
    count, heads, length, dim = key.shape
    width = quantised_width(dim)
    blocks = -(-length // int(BLOCK))
    reach, run = new_reach(count, heads, length, key.device, least=int(BLOCK))
    k8 = torch.empty(count, heads, length, width, dtype=torch.int8, device=key.device)
    scales = torch.empty(count, heads, blocks, dtype=torch.float32, device=key.device)
    rows = Rows(k8, k8.stride(0), k8.stride(1), k8.stride(2), aligned=None)
    quantised = Quantised(rows, scales, scales.stride(0), blocks, center, center.stride(0))
    args = (rows_of(key), center, k8, scales, reach, heads, length, blocks, reach.shape[2])
    constants = {"D": dim, "WIDTH": next_power_of_2(width), "STORED": width, "RUN_N": run}
    options = {"num_warps": 4, "num_stages": 2}
    launch = Launch(quantise_kernel, (reach.shape[2], heads, count), args, constants, options)
    return quantised, reach, launch
