"""How far keys reach, per row and head, which bounds every logit:

    |q . k - q . k_0| <= |q| max_j |k_j - k_0|

With such a bound the softmax needs no running maximum: see `attention`. The anchor k_0 is the first
key, so that the largest logit is no less than q . k_0, and a mean that all keys share, however
large, does not count. Keys with a bias each, and INT8 keys, whose means are gone already, have
none: k_0 = 0.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import rows_of
from .configs import next_power_of_2
from .launch import Launch
from .primitives import LOG2E, along, load_tile, squares, token_offsets, token_pointer

PARTS = tl.constexpr(16)  # most partial maxima of a row and head


class Reach(NamedTuple):
    """Pointer to [R, H, parts] fp32: the largest squared distance from the anchor in a run of keys;
    stride_b 0 where all rows share one. bias: pointer to [R] fp32, the highest bias of a key, where
    keys have any. anchored: 1 where the anchor is the first key, not zero.
    """

    pointer: Any
    stride_b: Any
    parts: Any
    bias: Any
    bias_stride: Any
    anchored: Any


NO_REACH = Reach(None, None, None, None, None, None)


@triton.jit
def reach_kernel(
    x, bias, bias_stride, out, H, N, parts, D: tl.constexpr, WIDTH: tl.constexpr,
    RUN_N: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out [R, H, parts]: the largest squared distance from the first token in each run of them; or,
    where tokens have a bias each, from zero, of those that it does not remove. Grid: (parts, heads,
    rows)."""
    part = tl.program_id(0)
    h = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    d = tl.arange(0, WIDTH)
    n = tl.arange(0, BLOCK_N)
    most = tl.zeros([BLOCK_N], tl.float32)
    anchor = tl.zeros([WIDTH], tl.float32)
    if bias is None:
        anchor = tl.load(token_pointer(x, b, h, 0) + d, mask=d < D, other=0.0).to(tl.float32)
    end = tl.minimum((part + 1) * RUN_N, N)
    for start in tl.range(part * RUN_N, end, BLOCK_N):
        held = n < end - start
        if bias is not None:
            each = tl.load(bias + b * bias_stride + start + n, mask=held, other=-float("inf"))
            held = each != -float("inf")
        seen = held[:, None] & (d < D)[None, :]
        at = token_pointer(x, b, h, start) + token_offsets(x, n)[:, None] + d[None, :]
        values = tl.load(at, mask=seen, other=0.0).to(tl.float32)
        most = tl.maximum(most, distances(values, anchor, seen))
    tl.store(out + (b * H + h) * parts + part, tl.max(most, 0))


@triton.jit
def distances(x, anchor, seen):
    """[N]: squared distances of x [N, D] from the anchor [D], over what is seen."""
    away = tl.where(seen, x - anchor[None, :], 0.0)
    return tl.sum(away * away, 1)


@triton.jit
def reach_of(reach, row, h):
    """The largest distance of a key of (row, h) from its anchor."""
    part = tl.arange(0, PARTS)
    at = reach.pointer + row * reach.stride_b + h * reach.parts + part
    return tl.sqrt_rn(tl.max(tl.load(at, mask=part < reach.parts, other=0.0), 0))


@triton.jit
def logits_within(q, scale, segment, row, h, D: tl.constexpr):
    """(middle [M], span [M]) in log2 units: every logit of a tile of queries is within `span` of
    the middle. Where keys have an anchor, the largest logit is no less than the middle."""
    span = scale * tl.sqrt_rn(squares(q)) * reach_of(segment.reach, row, h)
    middle = tl.zeros_like(scale)
    if segment.reach.anchored is not None:
        first = tl.zeros([1], tl.int32)
        middle += scale * along(q, load_tile(segment.key, row, h, 0, first, None, D))
    if segment.reach.bias is not None:
        middle += tl.load(segment.reach.bias + row * segment.reach.bias_stride) * LOG2E
    return middle, span


def new_reach(
    rows: int, heads: int, length: int, device: torch.device, least: int = 64
) -> tuple[Tensor, int]:
    """(what will hold the reach [rows, H, parts] of keys, tokens of a part: at least `least`)."""
    run = max(least, next_power_of_2(-(-length // int(PARTS))))
    parts = -(-length // run)
    return torch.empty(rows, heads, parts, dtype=torch.float32, device=device), run


def reach_launch(key: Tensor, bias: Tensor | None, bias_stride: int) -> tuple[Tensor, Launch]:
    """(what will hold the reach [R, H, parts] of keys, the launch that fills it).

    Args:
        bias: of each key, [S] or (with its stride) [R, S]; keys that it removes do not count.
    """
    count, heads, length, dim = key.shape
    out, run = new_reach(count, heads, length, key.device)
    constants = {"D": dim, "WIDTH": max(16, next_power_of_2(dim)), "RUN_N": run, "BLOCK_N": 64}
    grid = (out.shape[2], heads, count)
    args = (rows_of(key), bias, bias_stride, out, heads, length, out.shape[2])
    return out, Launch(reach_kernel, grid, args, constants, {"num_warps": 4, "num_stages": 2})
