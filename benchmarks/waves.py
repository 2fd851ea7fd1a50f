"""How full the multiprocessors are: the programs of a launch, in its order, on as many slots.

    python benchmarks/waves.py      the headline shapes: in batch order, and as launched

A program takes the time of its keys (by its row map), plus a thirtieth of a segment for what is not
the loop. Efficiency: the work over what all slots could do until the last program ends.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

import torch

from styleattn.branch import Branch, Segment, normalize
from styleattn.kernels.attention import launch_of

SLOTS = {"sm_90": 132}  # one program of 8 warps and 255 registers on each multiprocessor
OVERHEAD = 1 / 30
HEADLINES = {
    f"{tokens} tokens, {heads} heads, batch {batch}": (tokens, heads, batch)
    for tokens, heads in ((4096, 10), (1024, 20))
    for batch in (4, 8, 16)
}
"""StyleAligned on SDXL, two references under guidance."""


def makespan(programs: Sequence[float], slots: int) -> float:
    """When the last program ends, if each starts on the slot that is free first."""
    free = [0.0] * slots
    for time in programs:
        heapq.heappush(free, heapq.heappop(free) + time)
    return max(free)


def efficiency(tokens: int, heads: int, batch: int, arch: str = "sm_90") -> tuple[float, float]:
    """(in batch order, in the order of the launch) of shared attention at head dimension 64."""
    half = batch // 2
    rows = torch.tensor([-1 if b % half == 0 else b // half * half for b in range(batch)])
    x = torch.zeros(64, dtype=torch.bfloat16).expand(batch, heads, tokens, 64)  # no values needed
    call = (Branch((Segment(x, x), Segment(x, x, rows=rows))),)
    normal, scale = normalize("waves", x, call, None)
    launch = launch_of(x, normal, scale, x, x, arch)
    work = [1.0 + OVERHEAD + (r >= 0) for r in rows.tolist()]
    tiles = math.ceil(tokens / launch.constants["BLOCK_M"]) * heads
    order = launch.args[2]
    chosen = range(batch) if order is None else order[:batch].tolist()
    slots = SLOTS[arch]
    least = sum(w - OVERHEAD for w in work) * tiles / slots
    return (
        least / makespan([w for w in work for _ in range(tiles)], slots),
        least / makespan([work[b] for b in chosen for _ in range(tiles)], slots),
    )


if __name__ == "__main__":
    for name, shape in HEADLINES.items():
        plain, launched = efficiency(*shape)
        print(f"{name:36} in batch order {plain:.2f}, as launched {launched:.2f}")
