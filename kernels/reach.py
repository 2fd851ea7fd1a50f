"""How far keys reach: the largest norm of a key, per row and head, which bounds every logit.

    |q . k| <= |q| max_j |k_j|

With such a bound the softmax needs no running maximum: see `attention`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import next_power_of_2
from .launch import Launch
from .primitives import rows_of, token_offsets, token_pointer

PARTS = tl.constexpr(16)  # most partial maxima of a row and head


class Reach(NamedTuple):
    """Pointer to [R, H, parts] fp32: the largest squared norm of a run of keys; stride_b 0 where
    all rows share one. bias: pointer to [R] fp32, the highest bias of a key, where keys have any.
    """

    pointer: Any
    stride_b: Any
    parts: Any
    bias: Any = None
    bias_stride: Any = None


NO_REACH = Reach(None, None, None)


@triton.jit
def reach_kernel(
    x, out, H, N, parts, D: tl.constexpr, WIDTH: tl.constexpr, RUN_N: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out [R, H, parts]: the largest squared norm of each run of tokens. Grid: (parts, heads,
    rows)."""
    part = tl.program_id(0)
    h = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    d = tl.arange(0, WIDTH)
    n = tl.arange(0, BLOCK_N)
    most = tl.zeros([BLOCK_N], tl.float32)
    end = tl.minimum((part + 1) * RUN_N, N)
    for start in tl.range(part * RUN_N, end, BLOCK_N):
        seen = (n < end - start)[:, None] & (d < D)[None, :]
        at = token_pointer(x, b, h, start) + token_offsets(x, n)[:, None] + d[None, :]
        values = tl.load(at, mask=seen, other=0.0).to(tl.float32)
        most = tl.maximum(most, tl.sum(values * values, 1))
    tl.store(out + (b * H + h) * parts + part, tl.max(most, 0))


@triton.jit
def reach_of(reach, row, h):
    """The largest norm of a key of (row, h)."""
    part = tl.arange(0, PARTS)
    at = reach.pointer + row * reach.stride_b + h * reach.parts + part
    return tl.sqrt_rn(tl.max(tl.load(at, mask=part < reach.parts, other=0.0), 0))


@triton.jit
def highest_bias(reach, row):
    """The highest bias of a key of a row; 0 where keys have none."""
    if reach.bias is None:
        return 0.0
    else:
        return tl.load(reach.bias + row * reach.bias_stride)


def new_reach(
    rows: int, heads: int, length: int, device: torch.device, least: int = 64
) -> tuple[Tensor, int]:
    """(what will hold the reach [rows, H, parts] of keys, tokens of a part: at least `least`)."""
    run = max(least, next_power_of_2(-(-length // int(PARTS))))
    parts = -(-length // run)
    return torch.empty(rows, heads, parts, dtype=torch.float32, device=device), run


def reach_launch(key: Tensor) -> tuple[Tensor, Launch]:
    """(what will hold the reach [R, H, parts] of keys, the launch that fills it)."""
    count, heads, length, dim = key.shape
    out, run = new_reach(count, heads, length, key.device)
    constants = {"D": dim, "WIDTH": max(16, next_power_of_2(dim)), "RUN_N": run, "BLOCK_N": 64}
    grid = (out.shape[2], heads, count)
    args = (rows_of(key), out, heads, length, out.shape[2])
    return out, Launch(reach_kernel, grid, args, constants, {"num_warps": 4, "num_stages": 2})
