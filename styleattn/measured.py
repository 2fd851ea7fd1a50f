"""What was measured: which backend runs a call, and how the fused kernel is cut for it.

The table is only read here: no call ever benchmarks. `styleattn bench --tune` measures, and prints
the diff to this file. A call without a row runs on the usual backend with the static tiles of
`kernels/configs.py`.
"""

from __future__ import annotations

import math
from typing import NamedTuple


class Key(NamedTuple):
    """Calls that count as alike; numbers of tokens and rows are rounded to a power of two.

    Args:
        arch: as in `kernels/configs.py`, say "sm_90"; on a CPU the instruction set, say "avx2".
        dtype: "float16", "bfloat16" or "float32".
        queries: their number; keys: that of the longest segment.
        rows: batch times heads.
    """

    arch: str
    dtype: str
    head_dim: int
    queries: int
    keys: int
    rows: int


class Choice(NamedTuple):
    """What was fastest: a backend, and for "triton" the tile (BLOCK_M, BLOCK_N, warps, stages)."""

    backend: str
    tile: tuple[int, int, int, int] | None = None


# The rows of `styleattn bench --tune`.
TABLE: dict[Key, Choice] = {}


def key_of(arch: str, dtype: object, head_dim: int, queries: int, keys: int, rows: int) -> Key:
    """The key of a call; dtype as PyTorch names it."""
    name = str(dtype).removeprefix("torch.")
    return Key(
        arch, name, head_dim, *(1 << round(math.log2(max(n, 1))) for n in (queries, keys, rows))
    )


def find(
    arch: str, dtype: object, head_dim: int, queries: int, keys: int, rows: int
) -> Choice | None:
    """What the table says about a call; None where it says nothing."""
    return TABLE.get(key_of(arch, dtype, head_dim, queries, keys, rows)) if TABLE else None
