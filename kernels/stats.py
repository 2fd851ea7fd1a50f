"""Token statistics: mean and standard deviation per channel, in one read of the tensor.

A program sees a run of tokens as tiles; each tile's sum of squared deviations is taken around its
own mean (two passes over registers), and means are kept relative to token 0, so nothing overflows
in half precision and |mean| >> std costs no digits. Tiles and runs are merged by Chan's rule in a
fixed order: same input, same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import Rows
from .configs import next_power_of_2
from .device import reasons
from .launch import Launch
from .primitives import token_offsets, token_pointer

BLOCK = 64  # tokens per tile
RUN = 512  # tokens per program
_WARPS = 4


@triton.jit
def merge_moments(n, mean, square, n2, mean2, square2):
    """Chan's rule: (count, mean, squared deviations) of two sets; counts are not both 0."""
    both = n + n2
    delta = mean2 - mean
    share = n2 / both
    return both, mean + delta * share, square + square2 + delta * delta * (n * share)


@triton.jit
def _first_token(x, b, h, stride_d, D: tl.constexpr, WIDTH: tl.constexpr):
    """[WIDTH] fp32: token 0, around which all means are kept; absolute ones would lose digits."""
    d = tl.arange(0, WIDTH)
    at = token_pointer(x, b, h, 0) + d * stride_d
    return tl.load(at, mask=d < D, other=0.0).to(tl.float32)


@triton.jit
def _run_moments(
    x, first, b, h, begin, end, stride_d,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(count, mean - first, squared deviations) [WIDTH] of the tokens begin..end of (b, h)."""
    d = tl.arange(0, WIDTH)
    n = tl.arange(0, BLOCK_N)
    count = tl.zeros([WIDTH], tl.float32)
    mean = tl.zeros([WIDTH], tl.float32)
    square = tl.zeros([WIDTH], tl.float32)
    for start in tl.range(begin, end, BLOCK_N):
        seen = (n < end - start)[:, None] & (d < D)[None, :]
        at = token_pointer(x, b, h, start) + token_offsets(x, n)[:, None] + d[None, :] * stride_d
        values = tl.load(at, mask=seen, other=0.0).to(tl.float32)
        away = tl.where(seen, values - first[None, :], 0.0)
        tokens = tl.minimum(end - start, BLOCK_N).to(tl.float32)
        mean2 = tl.sum(away, 0) / tokens
        away = tl.where(seen, away - mean2[None, :], 0.0)
        square2 = tl.sum(away * away, 0)
        count, mean, square = merge_moments(count, mean, square, tokens, mean2, square2)
    return count, mean, square


@triton.jit
def _deviation(count, square, eps):
    """sqrt(unbiased variance + eps); one token has variance 0."""
    return tl.sqrt_rn(square / tl.maximum(count - 1.0, 1.0) + eps)


@triton.jit
def stats_kernel(
    x, stride_d, mean_out, second_out, H, N, runs, eps, FINAL: tl.constexpr,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, RUN_N: tl.constexpr,
):  # fmt: skip
    """Moments of one run of tokens. Grid: (runs, heads, batch rows). x [B, H, N, D].

    FINAL (one run): mean and deviation, [B, H, D]. Else mean - token 0 and squared deviations,
    [B, H, runs, D].
    """
    run = tl.program_id(0)
    h = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    begin = run * RUN_N
    end = tl.minimum(begin + RUN_N, N)
    first = _first_token(x, b, h, stride_d, D, WIDTH)
    count, mean, square = _run_moments(x, first, b, h, begin, end, stride_d, D, WIDTH, BLOCK_N)
    d = tl.arange(0, WIDTH)
    at = ((b * H + h) * runs + run) * D + d
    if FINAL:
        mean += first
        square = _deviation(count, square, eps)
    tl.store(mean_out + at, mean, mask=d < D)
    tl.store(second_out + at, square, mask=d < D)


@triton.jit
def _merged_moments(
    means, squares, row, N, runs, D: tl.constexpr, WIDTH: tl.constexpr, RUN_N: tl.constexpr
):
    """(count, mean - token 0, squared deviations) [WIDTH] of all runs of one (batch row, head)."""
    d = tl.arange(0, WIDTH)
    count = tl.zeros([WIDTH], tl.float32)
    mean = tl.zeros([WIDTH], tl.float32)
    square = tl.zeros([WIDTH], tl.float32)
    for run in tl.range(0, runs):
        at = (row * runs + run) * D + d
        tokens = tl.minimum(N - run * RUN_N, RUN_N).to(tl.float32)
        mean2 = tl.load(means + at, mask=d < D, other=0.0)
        square2 = tl.load(squares + at, mask=d < D, other=0.0)
        count, mean, square = merge_moments(count, mean, square, tokens, mean2, square2)
    return count, mean, square


@triton.jit
def merge_kernel(
    x, stride_d, means, squares, mean_out, std_out, H, N, runs, eps,
    D: tl.constexpr, WIDTH: tl.constexpr, RUN_N: tl.constexpr,
):  # fmt: skip
    """Merge the runs of one (batch row, head). Grid: (1, heads, batch rows)."""
    h = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    row = b * H + h
    d = tl.arange(0, WIDTH)
    count, mean, square = _merged_moments(means, squares, row, N, runs, D, WIDTH, RUN_N)
    first = _first_token(x, b, h, stride_d, D, WIDTH)
    tl.store(mean_out + row * D + d, first + mean, mask=d < D)
    tl.store(std_out + row * D + d, _deviation(count, square, eps), mask=d < D)


@triton.jit
def adain_kernel(
    x, stride_d, means, squares, rows, scale, shift, center, aim, H, N, runs, eps,
    D: tl.constexpr, WIDTH: tl.constexpr, RUN_N: tl.constexpr,
):  # fmt: skip
    """From the moments of runs to the map that AdaIN is, [B, H, D] each: scale, shift, the row's
    own means, and those it aims at. A row that is its own reference, or has none (-1), keeps what
    it has. Grid: (1, heads, batch rows)."""
    h = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    r = tl.load(rows + b).to(tl.int64)
    plain = (r < 0) | (r == b)
    r = tl.maximum(r, 0)
    d = tl.arange(0, WIDTH)
    at = (b * H + h) * D + d
    count, mean, square = _merged_moments(means, squares, b * H + h, N, runs, D, WIDTH, RUN_N)
    mean += _first_token(x, b, h, stride_d, D, WIDTH)
    std = _deviation(count, square, eps)
    count, mean2, square = _merged_moments(means, squares, r * H + h, N, runs, D, WIDTH, RUN_N)
    mean2 += _first_token(x, r, h, stride_d, D, WIDTH)
    slope = tl.where(plain, 1.0, _deviation(count, square, eps) / std)
    tl.store(scale + at, slope, mask=d < D)
    tl.store(shift + at, tl.where(plain, 0.0, mean2 - mean * slope), mask=d < D)
    tl.store(center + at, mean, mask=d < D)
    tl.store(aim + at, mean2, mask=d < D)


def stats_launches(x: Tensor, eps: float, mean: Tensor, std: Tensor) -> list[Launch]:
    """The launches that fill mean and std [B, H, D] fp32: two where there are several runs."""
    batch, heads, length, dim = x.shape
    runs = -(-length // RUN)
    width = max(16, next_power_of_2(dim))
    constants = {"D": dim, "WIDTH": width, "RUN_N": RUN}
    options = {"num_warps": _WARPS, "num_stages": 2}
    rows = Rows(x, x.stride(0), x.stride(1), x.stride(2), aligned=None)
    parts = (mean, std)
    if runs > 1:
        scratch = torch.empty(2, batch, heads, runs, dim, dtype=torch.float32, device=x.device)
        parts = (scratch[0], scratch[1])
    shape = (heads, length, runs, eps)
    first = {**constants, "FINAL": runs == 1, "BLOCK_N": BLOCK}
    launches = [
        Launch(
            stats_kernel, (runs, heads, batch), (rows, x.stride(3), *parts, *shape), first, options
        )
    ]
    if runs > 1:
        args = (rows, x.stride(3), *parts, mean, std, *shape)
        launches.append(Launch(merge_kernel, (1, heads, batch), args, constants, options))
    return launches


def adain_launches(x: Tensor, rows: Tensor, eps: float, maps: Tensor) -> list[Launch]:
    """The two launches that fill maps [4, B, H, D] fp32: see `adain_kernel`."""
    batch, heads, length, dim = x.shape
    runs = -(-length // RUN)
    scratch = torch.empty(2, batch, heads, runs, dim, dtype=torch.float32, device=x.device)
    constants = {"D": dim, "WIDTH": max(16, next_power_of_2(dim)), "RUN_N": RUN}
    options = {"num_warps": _WARPS, "num_stages": 2}
    source = (Rows(x, x.stride(0), x.stride(1), x.stride(2), aligned=None), x.stride(3))
    parts, shape = (scratch[0], scratch[1]), (heads, length, runs, eps)
    partial = {**constants, "FINAL": False, "BLOCK_N": BLOCK}
    args = (*source, *parts, rows, *maps.unbind(), *shape)
    grid = (heads, batch)
    return [
        Launch(stats_kernel, (runs, *grid), (*source, *parts, *shape), partial, options),
        Launch(adain_kernel, (1, *grid), args, constants, options),
    ]


def adain_forward(x: Tensor, rows: Tensor, eps: float) -> tuple[Tensor, ...]:
    """AdaIN of every row of x to its reference row: scale, shift, the row's own means, and those it
    aims at, [B, H, D] fp32 each.

    Args:
        x: [B, H, N, D], as `token_stats_forward`.
        rows: int [B] on the device of x; -1, or the row itself: scale 1 and shift 0, exactly.

    Raises:
        ValueError: where the kernels cannot run on x.
    """
    found = reasons(x, ())
    if found:
        raise ValueError(f"adain: {'; '.join(found)}")
    batch, heads, _, dim = x.shape
    maps = torch.empty(4, batch, heads, dim, dtype=torch.float32, device=x.device)
    if x.numel():
        for launch in adain_launches(x, rows, eps, maps):
            launch.run(x.device)
    return maps.unbind()


def token_stats_forward(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and sqrt(unbiased variance + eps) over the tokens.

    Args:
        x: [B, H, N, D] fp32, fp16 or bf16, any strides; N >= 1.
        eps: inside the root.

    Returns:
        mean and std, [B, H, D] fp32. One token: variance 0. NaN in a channel stays in that channel.

    Raises:
        ValueError: where the kernels cannot run on x.
    """
    found = reasons(x, ())
    if found:
        raise ValueError(f"token_stats: {'; '.join(found)}")
    batch, heads, _, dim = x.shape
    mean = torch.empty(batch, heads, dim, dtype=torch.float32, device=x.device)
    std = torch.empty_like(mean)
    if x.numel():
        for launch in stats_launches(x, eps, mean, std):
            launch.run(x.device)
    return mean, std
