"""Keys and values that are blended with a row's own, or of which a bias removes some, written once
for all tiles of queries:

    K = lam K[rows] + (1 - lam) K_own, 0 where removed (whatever K holds there)

Where they are read, every tile of queries would do it again, in the loop that has no registers left
for it. The reach of the new keys (see `reach`) comes with it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import NO_ROWS, Number, Rows, rows_of
from .configs import next_power_of_2
from .launch import Launch
from .primitives import LOG2E, number_at, token_offsets, token_pointer, within_range
from .reach import distances, new_reach


@triton.jit
def _blend(x, own, out, row, b, h, start, n, seen, d, lam):
    """The tokens start + n of (b, h): [N, WIDTH] in the dtype of `out`, 0 where not seen."""
    theirs = token_pointer(x, row, h, start) + token_offsets(x, n)[:, None] + d[None, :]
    tokens = tl.load(theirs, mask=seen, other=0.0)
    if own.pointer is None:
        return tokens
    else:
        mine = token_pointer(own, b, h, start) + token_offsets(own, n)[:, None] + d[None, :]
        mixed = lam * tokens.to(tl.float32)
        mixed += (1.0 - lam) * tl.load(mine, mask=seen, other=0.0).to(tl.float32)
        return mixed.to(out.pointer.dtype.element_ty)


@triton.jit
def _put(out, tokens, b, h, start, n, seen, d):
    """Write the tokens start + n of (b, h)."""
    to = token_pointer(out, b, h, start) + token_offsets(out, n)[:, None] + d[None, :]
    tl.store(to, tokens, mask=seen)


@triton.jit
def blend_kernel(
    key, own_key, out_key, value, own_value, out_value, rows, blend, bias, bias_stride, out_bias,
    out_stride, reach, H, N, parts,
    D: tl.constexpr, WIDTH: tl.constexpr, RUN_N: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out_key, out_value [B, H, N, D]; reach [B, H, parts]: that of each run of new keys (see
    `reach`); where keys have a bias, out_bias [B, N]: the same in log2 units. Rows -1 are left as
    they are. Grid: (parts, heads, batch rows)."""
    part = tl.program_id(0)
    h = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    row = b
    if rows is not None:
        row = tl.load(rows + b).to(tl.int64)
    if row >= 0:
        lam = number_at(blend, b)
        d = tl.arange(0, WIDTH)
        n = tl.arange(0, BLOCK_N)
        most = tl.zeros([BLOCK_N], tl.float32)
        anchor = tl.zeros([WIDTH], tl.float32)
        if bias is None:
            zero = tl.zeros([1], tl.int32)
            first = _blend(key, own_key, out_key, row, b, h, 0, zero, d[None, :] < D, d, lam)
            anchor = tl.sum(first.to(tl.float32), 0)
        end = tl.minimum((part + 1) * RUN_N, N)
        for start in tl.range(part * RUN_N, end, BLOCK_N):
            held = n < end - start
            within = held[:, None] & (d < D)[None, :]
            seen = within
            if bias is not None:
                each = tl.load(bias + b * bias_stride + start + n, mask=held, other=0.0)
                seen = seen & (each != -float("inf"))[:, None]
                if h == 0:
                    tl.store(
                        out_bias + b * out_stride + start + n, within_range(each) * LOG2E, mask=held
                    )
            k = _blend(key, own_key, out_key, row, b, h, start, n, seen, d, lam)
            _put(out_key, k, b, h, start, n, within, d)
            most = tl.maximum(most, distances(k.to(tl.float32), anchor, seen))
            v = _blend(value, own_value, out_value, row, b, h, start, n, seen, d, lam)
            _put(out_value, v, b, h, start, n, within, d)
        tl.store(reach + (b * H + h) * parts + part, tl.max(most, 0))


def blend_launch(
    pair: tuple[Rows, Rows],
    own: tuple[Tensor, Tensor] | None,
    like: Tensor,
    rows: Any,
    blend: Number,
    bias: tuple[Tensor | None, int],
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Launch]:
    """(keys and values [B, H, N, D] to be, their biases [B, N] in log2 units to be where they have
    any, the reach of the keys to be, what fills them all).

    Args:
        pair: keys and values.
        own: those of the batch rows, or None: nothing is blended.
        like: a tensor of the shape and dtype of the new keys.
        rows: the row of `pair` for each batch row on the device, or None.
        blend: lam.
        bias: of every key of the new rows, or None, and its stride.
    """
    batch, heads, length, dim = like.shape
    key, value = (torch.empty(like.shape, dtype=like.dtype, device=like.device) for _ in range(2))
    reach, run = new_reach(batch, heads, length, key.device)
    scaled, stride = None, 0
    if bias[0] is not None:
        stride = -(-length // 16) * 16  # every row starts aligned
        scaled = reach.new_empty(batch, stride)[:, :length]
    own_key, own_value = (NO_ROWS, NO_ROWS) if own is None else map(rows_of, own)
    args = (
        pair[0], own_key, rows_of(key), pair[1], own_value, rows_of(value),
        rows, blend, *bias, scaled, stride, reach, heads, length, reach.shape[2],
    )  # fmt: skip
    constants = {"D": dim, "WIDTH": max(16, next_power_of_2(dim)), "RUN_N": run, "BLOCK_N": 64}
    grid = (reach.shape[2], heads, batch)
    options = {"num_warps": 4, "num_stages": 2}
    return key, value, scaled, reach, Launch(blend_kernel, grid, args, constants, options)
