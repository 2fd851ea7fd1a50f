"""Norms next to attention, each in one read: RMSNorm, AdaIN and rotary positions of queries and
keys; GroupNorm whose statistics are shared with reference rows.

Both read and write every element once, compute in fp32 and round once. Shared GroupNorm is two
launches: partial moments of runs of positions, and a normalisation whose prologue merges those of a
row and of its references by Chan's rule, in a fixed order: same input, same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import NO_MAP, Map, Rows
from .configs import next_power_of_2
from .device import reasons
from .launch import Launch
from .primitives import load_map, token_offsets, token_pointer
from .stats import merge_moments

TOKENS = 16  # of one program of the rotary kernel
HEADS = 4  # of one program: they share the angles
RUN = 2048  # positions of one program of the moments
_WARPS = 4


class Angles(NamedTuple):
    """cos and sin [N, D] fp32 of every token, contiguous; the channels of a pair have one angle."""

    cos: Any
    sin: Any


@triton.jit
def _turned(y, angles, n, seen, D: tl.constexpr, WIDTH: tl.constexpr):
    """y [N, WIDTH] with every pair of neighbouring channels turned by its angle."""
    pair = tl.arange(0, WIDTH // 2)
    at = n[:, None] * D + 2 * pair[None, :]
    there = seen[:, None] & (2 * pair < D)[None, :]
    cos = tl.load(angles.cos + at, mask=there, other=0.0)
    sin = tl.load(angles.sin + at, mask=there, other=0.0)
    even, odd = tl.split(tl.reshape(y, (y.shape[0], WIDTH // 2, 2)))
    both = tl.join(even * cos - odd * sin, odd * cos + even * sin)
    return tl.reshape(both, (y.shape[0], WIDTH))


@triton.jit
def rotary_kernel(
    out, x, weight, eps, before, angles, after, H, N,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """out [B, H, N, D] in BLHD memory: after(R(before(RMSNorm(x)))). Grid: (token tiles, head
    tiles, batch rows). weight [D] and angles may be None, before and after maps of None.
    """
    b = tl.program_id(2).to(tl.int64)
    start = tl.program_id(0).to(tl.int64) * BLOCK_N
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, WIDTH)
    seen = start + n < N
    inside = seen[:, None] & (d < D)[None, :]
    for i in tl.range(0, BLOCK_H):
        h = (tl.program_id(1) * BLOCK_H + i).to(tl.int64)
        if h < H:
            at = token_pointer(x, b, h, start) + token_offsets(x, n)[:, None] + d[None, :]
            y = tl.load(at, mask=inside, other=0.0).to(tl.float32)
            y = y * tl.rsqrt(tl.sum(y * y, 1) / D + eps)[:, None]
            if weight is not None:
                y = y * tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
            row = (b * H + h) * D
            if before.scale is not None:
                y = y * load_map(before.scale, row, 0, WIDTH, D)[None, :]
                y += load_map(before.shift, row, 0, WIDTH, D)[None, :]
            if angles is not None:
                y = _turned(y, angles, start + n, seen, D, WIDTH)
            if after.scale is not None:
                y = y * load_map(after.scale, row, 0, WIDTH, D)[None, :]
                y += load_map(after.shift, row, 0, WIDTH, D)[None, :]
            to = out + ((b * N + start) * H + h) * D + n[:, None] * (H * D) + d[None, :]
            tl.store(to, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _run_of_group(
    x, strides, b, first_channel, begin, end,
    CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """(count, mean, squared deviations) of the positions begin..end of one group: scalars."""
    stride_b, stride_c, stride_p = strides
    base = x + b * stride_b + first_channel.to(tl.int64) * stride_c
    c = tl.arange(0, BLOCK_C)
    p = tl.arange(0, BLOCK_P)
    origin = tl.load(base).to(tl.float32)  # means relative to it lose no digits
    count, mean, square = 0.0, 0.0, 0.0
    for start in tl.range(begin, end, BLOCK_P):
        seen = (c < CHANNELS)[:, None] & (p < end - start)[None, :]
        at = base + c[:, None] * stride_c + (start + p).to(tl.int64)[None, :] * stride_p
        away = tl.where(seen, tl.load(at, mask=seen, other=0.0).to(tl.float32) - origin, 0.0)
        items = tl.minimum(end - start, BLOCK_P).to(tl.float32) * CHANNELS
        mean2 = tl.sum(tl.sum(away, 1), 0) / items
        away = tl.where(seen, away - mean2, 0.0)
        square2 = tl.sum(tl.sum(away * away, 1), 0)
        count, mean, square = merge_moments(count, mean, square, items, mean2, square2)
    return count, mean + origin, square


@triton.jit
def moments_kernel(
    x, strides, out, P, G, runs,
    CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, RUN_P: tl.constexpr,
):  # fmt: skip
    """Mean and squared deviations of a run of positions of a group: out [B, G, runs, 2]. Grid:
    (runs, groups, batch rows)."""
    run = tl.program_id(0)
    g = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    begin = run * RUN_P
    end = tl.minimum(begin + RUN_P, P)
    _, mean, square = _run_of_group(
        x, strides, b, g * CHANNELS, begin, end, CHANNELS, BLOCK_C, BLOCK_P
    )
    at = out + ((b * G + g) * runs + run) * 2
    tl.store(at, mean)
    tl.store(at + 1, square)


@triton.jit
def _row_moments(moments, row, g, inside, P, G, runs, CHANNELS: tl.constexpr, RUN_P: tl.constexpr):
    """(mean, biased variance) of the groups g [C] of a row, all runs merged."""
    count = tl.zeros(g.shape, tl.float32)
    mean, square = count, count
    at = moments + ((row * G + g) * runs) * 2
    for run in tl.range(0, runs):
        items = tl.minimum(P - run * RUN_P, RUN_P).to(tl.float32) * CHANNELS
        mean2 = tl.load(at + 2 * run, mask=inside, other=0.0)
        square2 = tl.load(at + 2 * run + 1, mask=inside, other=0.0)
        count, mean, square = merge_moments(count, mean, square, items, mean2, square2)
    return mean, square / count


@triton.jit
def group_norm_kernel(
    out, x, strides, kept, keep, moments, rows, weights, gain, bias, eps, B, C, P, G, runs,
    SOURCES: tl.constexpr, SILU: tl.constexpr, CHANNELS: tl.constexpr, RUN_P: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """out, of x's strides: x normalised by the moments of its row and of SOURCES rows [SOURCES, B]
    at their weights [SOURCES]; rows with keep [B] are those of `kept`. Grid: (runs of TILES tiles
    of positions, channel tiles, batch rows).
    """
    b = tl.program_id(2).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < C
    stride_b, stride_c, stride_p = strides
    base = b * stride_b + c.to(tl.int64) * stride_c
    first = tl.program_id(0).to(tl.int64) * (TILES * BLOCK_P)
    p = tl.arange(0, BLOCK_P)
    copied = False
    if keep is not None:
        copied = tl.load(keep + b) != 0
    scale = tl.full([BLOCK_C], 1.0, tl.float32)
    shift = tl.zeros([BLOCK_C], tl.float32)
    if not copied:
        g = c // CHANNELS
        total = 1.0
        mean, spread = _row_moments(moments, b, g, inside, P, G, runs, CHANNELS, RUN_P)
        for i in tl.static_range(SOURCES):
            row = tl.load(rows + i * B + b).to(tl.int64)
            mean2, spread2 = _row_moments(moments, row, g, inside, P, G, runs, CHANNELS, RUN_P)
            weight = tl.load(weights + i)
            total, mean, spread = merge_moments(
                total, mean, spread, weight, mean2, spread2 * weight
            )
        scale = tl.rsqrt(spread / total + eps)
        shift = -mean * scale
        if gain is not None:
            factor = tl.load(gain + c, mask=inside, other=0.0).to(tl.float32)
            scale *= factor
            shift *= factor
        if bias is not None:
            shift += tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)
    for i in tl.range(0, TILES):
        at = first + i * BLOCK_P + p
        seen = inside[:, None] & (at < P)[None, :]
        offsets = base[:, None] + at[None, :] * stride_p
        if copied:
            y = tl.load(kept + offsets, mask=seen, other=0.0).to(tl.float32)
        else:
            y = tl.load(x + offsets, mask=seen, other=0.0).to(tl.float32)
        y = y * scale[:, None] + shift[:, None]
        if SILU:
            y = y / (1.0 + tl.exp(-y))
        tl.store(out + offsets, y.to(out.dtype.element_ty), mask=seen)


def _map(pair: tuple[Tensor, Tensor] | None) -> Map:
    return NO_MAP if pair is None else Map(pair[0].contiguous(), pair[1].contiguous())


def rotary_launch(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    before: tuple[Tensor, Tensor] | None,
    angles: tuple[Tensor, Tensor] | None,
    after: tuple[Tensor, Tensor] | None,
    out: Tensor,
) -> Launch:
    """The launch that fills out [B, H, N, D] (BLHD memory) from x; maps are (scale, shift)."""
    batch, heads, length, dim = x.shape
    turns = None
    if angles is not None:
        turns = Angles(*(t.to(torch.float32).contiguous() for t in angles))
    strides = (x.stride(0), x.stride(1), x.stride(2))
    rows = Rows(x, *strides, aligned=1 if all(s % 8 == 0 for s in strides) else None)
    args = (out, rows, weight, eps, _map(before), turns, _map(after), heads, length)
    width = max(16, next_power_of_2(dim))
    constants = {"D": dim, "WIDTH": width, "BLOCK_N": TOKENS, "BLOCK_H": min(HEADS, heads)}
    grid = (-(-length // TOKENS), -(-heads // min(HEADS, heads)), batch)
    return Launch(rotary_kernel, grid, args, constants, {"num_warps": _WARPS, "num_stages": 2})


def rotary_forward(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    before: tuple[Tensor, Tensor] | None,
    angles: tuple[Tensor, Tensor] | None,
    after: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """after(R(before(x / sqrt(mean_d x^2 + eps) * weight))) in one read and one write.

    Args:
        x: [B, H, N, D] fp32, fp16 or bf16, the last dim contiguous; D even where there are angles.
        weight: [D] or None. before, after: (scale, shift), each [B, H, D] fp32.
        angles: (cos, sin), each [N, D].

    Returns:
        [B, H, N, D] in x's dtype, laid out [B, N, H, D]; computed in fp32.

    Raises:
        ValueError: where the kernels cannot run on x.
    """
    found = reasons(x, ())
    if found:
        raise ValueError(f"rms_norm_rotary: {'; '.join(found)}")
    batch, heads, length, dim = x.shape
    memory = torch.empty(batch, length, heads, dim, dtype=x.dtype, device=x.device)
    out = memory.transpose(1, 2)
    if x.numel():
        rotary_launch(x, weight, eps, before, angles, after, out).run(x.device)
    return out


def _tile(channels: int, stride_p: int) -> tuple[int, int]:
    """(channels, positions) of one tile: long along what is contiguous."""
    if stride_p == 1:
        return min(4, next_power_of_2(channels)), 512
    return min(64, next_power_of_2(channels)), 32


def group_norm_launches(
    x: Tensor,
    groups: int,
    rows: Tensor | None,
    weights: Tensor | None,
    gain: Tensor | None,
    bias: Tensor | None,
    eps: float,
    silu: bool,
    kept: Tensor | None,
    keep: Tensor | None,
    out: Tensor,
) -> list[Launch]:
    """The two launches that fill out; all of x, kept and out are [B, C, P] of the same strides."""
    batch, channels, positions = x.shape
    each = channels // groups
    runs = -(-positions // RUN)
    moments = torch.empty(batch, groups, runs, 2, dtype=torch.float32, device=x.device)
    strides = x.stride()
    block_c = next_power_of_2(each)
    options = {"num_warps": _WARPS, "num_stages": 2}
    shared = {"CHANNELS": each, "RUN_P": RUN}
    first = {**shared, "BLOCK_C": block_c, "BLOCK_P": max(16, 2048 // block_c)}
    launches = [
        Launch(
            moments_kernel,
            (runs, groups, batch),
            (x, strides, moments, positions, groups, runs),
            first,
            options,
        )
    ]
    block_c, block_p = _tile(channels, strides[2])
    tiles = min(4, -(-positions // block_p))
    second = {**shared, "BLOCK_C": block_c, "BLOCK_P": block_p, "TILES": tiles, "SILU": silu}
    second["SOURCES"] = 0 if rows is None else rows.shape[0]
    grid = (-(-positions // (tiles * block_p)), -(-channels // block_c), batch)
    args = (out, x, strides, kept, keep, moments, rows, weights, gain, bias, eps)
    args = (*args, batch, channels, positions, groups, runs)
    launches.append(Launch(group_norm_kernel, grid, args, second, options))
    return launches


def group_norm_forward(
    x: Tensor,
    groups: int,
    references: Sequence[Tensor],
    weights: Tensor | None,
    gain: Tensor | None,
    bias: Tensor | None,
    eps: float,
    silu: bool,
    kept: Tensor | None,
    keep: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """GroupNorm of x by the merged moments of every row and its references.

    Args:
        x: [B, C, ...] fp32, fp16 or bf16, dense in any order of its dimensions.
        references: per reference the row [B] that serves each row; weights: [references] fp32.
        gain, bias: [C] or None. silu: y * sigmoid(y) follows.
        kept, keep: rows with keep [B] are those of `kept` (like x), through SiLU where wanted.
        dtype: of the result.

    Raises:
        ValueError: where the kernels cannot run on x.
    """
    found = reasons(x.flatten(2)[:, None, :1, :1], ())
    if found:
        raise ValueError(f"shared_group_norm: {'; '.join(found)}")
    flat = x.flatten(2)
    out = torch.empty_like(flat, dtype=dtype)
    if out.stride() != flat.stride():  # x is not dense
        flat = flat.contiguous()
        out = torch.empty_like(flat, dtype=dtype)
    if kept is not None:
        kept = kept.flatten(2)
        if kept.stride() != flat.stride():
            kept = torch.empty_like(flat, dtype=kept.dtype).copy_(kept)
    rows = None
    if references:
        rows = torch.stack([r.to(x.device, torch.int32) for r in references]).contiguous()
    mask = None if keep is None else keep.to(x.device, torch.int8)
    if x.numel():
        args = (flat, groups, rows, weights, gain, bias, eps, silu, kept, mask, out)
        for launch in group_norm_launches(*args):
            launch.run(x.device)
    return out.unflatten(2, x.shape[2:])
