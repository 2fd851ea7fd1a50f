"""From a normalised call to one launch: which kernel, which tile, which arguments.

No tensor is read here but row maps that live on the CPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..measured import find
from .configs import (
    BOUNDED,
    Tile,
    attention_tile,
    decoupled_tile,
    is_bounded,
    is_parked,
    is_quantised,
)
from .launch import Launch
from .primitives import (
    NO_MAP,
    NO_NUMBER,
    NO_ROWS,
    BranchArgs,
    Map,
    Number,
    Rows,
    SegmentArgs,
    rows_of,
)
from .quantised import NOT_QUANTISED, quantise_launch
from .reach import NO_REACH, Reach, reach_launch
from .stats import stats_launches

if TYPE_CHECKING:
    from torch import Tensor

    from ..branch import Affine, Branch, Segment

MAX_COLUMNS = 128  # keys of the one-tile kernel
_LOG2E = 1.4426950408889634


def _number(x: float | Tensor) -> Number:
    if not isinstance(x, torch.Tensor):
        return Number(x)
    return Number(0.0, x, x.stride(0), x.stride(1) if x.ndim == 2 else None)


def _map(affine: Affine | None) -> Map:
    if affine is None:
        return NO_MAP
    center = None if affine.center is None else affine.center.contiguous()
    return Map(affine.scale.contiguous(), affine.shift.contiguous(), center)


def _rows(x: Tensor | None) -> Rows:
    return NO_ROWS if x is None else rows_of(x)


@functools.lru_cache(maxsize=256)
def _on_device(table: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """Row maps known on the host, copied once per content; every line starts aligned."""
    width = -(-len(table[0]) // 4) * 4
    return torch.tensor([row + (0,) * (width - len(row)) for row in table], dtype=torch.int32).to(
        device
    )


class _Maps:
    """Collects the row maps that live on the host: they travel together, and order the work."""

    def __init__(self, batch: int, device: torch.device):
        self.work = [0] * batch
        self.known = True
        self.device = device
        self.table: list[tuple[int, ...]] = []

    def add(self, segment: Segment) -> int | None:
        """The line of the table that will hold the segment's rows; None: it needs none."""
        keys = segment.key.shape[2]
        if segment.rows is None:
            self.work = [w + keys for w in self.work]
            return None
        if segment.rows.device.type != "cpu":
            self.known = False
            return None
        rows = tuple(segment.rows.tolist())
        self.work = [w + keys * (r >= 0) for w, r in zip(self.work, rows, strict=True)]
        self.table.append(rows)
        return len(self.table) - 1

    def finish(self) -> tuple[Tensor | None, Tensor | None]:
        """(table on the device, order of batch rows by work or None)."""
        ordered = self.known and len(set(self.work)) > 1
        if ordered:
            self.table.append(tuple(sorted(range(len(self.work)), key=lambda b: -self.work[b])))
        table = _on_device(tuple(self.table), self.device) if self.table else None
        return table, table[-1] if table is not None and ordered else None


def _dropped(segment: Segment) -> bool:
    """Whether nothing of a segment but its null keys can contribute."""
    bias, rows = segment.logit_bias, segment.rows
    if segment.key.shape[2] == 0 or (not isinstance(bias, torch.Tensor) and bias == -float("inf")):
        return True
    return rows is not None and rows.device.type == "cpu" and bool((rows < 0).all())


def _segment(segment: Segment, line: int | None, table: Tensor | None, batch: int) -> SegmentArgs:
    rows = segment.rows
    if line is not None and table is not None:
        rows = table[line]
    elif rows is not None:
        rows = rows.contiguous()
    broadcast = segment.rows is None and segment.key.shape[0] == 1 and batch > 1
    blended = segment.own_key is not None and (
        isinstance(segment.kv_blend, torch.Tensor) or segment.kv_blend != 1.0
    )
    bias = None if segment.key_bias is None else segment.key_bias.contiguous()
    return SegmentArgs(
        key=rows_of(segment.key, broadcast=broadcast),
        value=rows_of(segment.value, broadcast=broadcast),
        length=segment.key.shape[2],
        rows=rows,
        key_map=_map(segment.key_affine),
        value_map=_map(segment.value_affine),
        logit_scale=_number(segment.logit_scale),
        logit_bias=_number(segment.logit_bias),
        key_bias=bias,
        key_bias_stride=0 if bias is None or bias.ndim == 1 or broadcast else bias.stride(0),
        own_key=_rows(segment.own_key if blended else None),
        own_value=_rows(segment.own_value if blended else None),
        blend=_number(segment.kv_blend) if blended else NO_NUMBER,
        single=None,
        signed=None,
        reach=NO_REACH,
        quantised=NOT_QUANTISED,
    )


def _branches(
    query: Tensor, branches: Sequence[Branch]
) -> tuple[tuple[BranchArgs, ...], Tensor | None]:
    """The arguments of all branches, and the order of batch rows."""
    maps = _Maps(query.shape[0], query.device)
    chosen = []
    for branch in branches:
        segments = [s for s in branch.segments if not _dropped(s)]
        segments.sort(
            key=lambda s: s.value_affine is None
        )  # a value affine costs nothing on the first segment
        chosen.append([(s, maps.add(s)) for s in segments])
    table, order = maps.finish()
    arguments = []
    for branch, lines in zip(branches, chosen, strict=True):
        content = branch.content_query
        if not isinstance(branch.gamma, torch.Tensor) and branch.gamma == 0.0:
            content = None
        nulls = sum(s.null_keys for s in branch.segments)
        silent = not isinstance(branch.weight, torch.Tensor) and branch.weight == 0.0
        arguments.append(
            BranchArgs(
                query=rows_of(query if branch.query is None else branch.query),
                content=_rows(content),
                gamma=NO_NUMBER if content is None else _number(branch.gamma),
                query_map=_map(branch.query_affine),
                segments=tuple(_segment(s, line, table, query.shape[0]) for s, line in lines),
                count=(1,) * len(lines),
                null_keys=float(nulls) if nulls else None,
                weight=NO_NUMBER if silent else _number(branch.weight),
                park=NO_ROWS,
            )
        )
    return tuple(arguments), order


def _is_decoupled(branches: Sequence[Branch], arguments: Sequence[BranchArgs]) -> bool:
    """Whether one tile covers a call: several short segments, one query, nothing that folds."""
    segments = [s for a in arguments for s in a.segments]
    return (
        len(segments) > 1
        and sum(s.length for s in segments) <= MAX_COLUMNS
        and all(b.query is None for b in branches)
        and all(a.query_map.scale is None and a.content.pointer is None for a in arguments)
        and all(s.key_map.scale is None and s.value_map.scale is None for s in segments)
        and all(s.own_key.pointer is None for s in segments)
        and all(s.logit_bias.stride_l is None for s in segments)
    )


def _with_capabilities(branch: BranchArgs, scale: float, block_n: int) -> BranchArgs:
    """Mark segments that fit one step, and those whose logit scale may be negative."""

    def mark(s: SegmentArgs) -> SegmentArgs:
        signed = s.logit_scale.pointer is not None or scale * s.logit_scale.value < 0
        return s._replace(single=1 if s.length <= block_n else None, signed=1 if signed else None)

    return branch._replace(segments=tuple(mark(s) for s in branch.segments))


def _with_park(branch: BranchArgs, out: Tensor) -> BranchArgs:
    """A branch that folds anything into a query of the output's dtype puts it there for a while
    (keys blended on load need the shared memory themselves)."""
    folds = branch.query_map.scale is not None or branch.content.pointer is not None
    folds |= any(s.key_map.scale is not None for s in branch.segments)
    folds &= all(s.own_key.pointer is None for s in branch.segments) and out.dtype != torch.float32
    return branch._replace(park=rows_of(out)) if folds else branch


def _identity(key: Tensor) -> Any:
    return key.data_ptr(), key.shape, key.stride()


def _with_quantised(
    branches: tuple[BranchArgs, ...],
) -> tuple[tuple[BranchArgs, ...], dict[Any, Tensor], tuple[Launch, ...]]:
    """The branches with INT8 keys, the reach of these by tensor, and the launches that make both.

    The means of keys are the centers of a segment that sees them as its own rows, where there is
    one, else they are computed.
    """
    centers: dict[Any, Tensor] = {}
    for s in (s for branch in branches for s in branch.segments):
        own = s.rows is None and s.key.stride_b != 0
        if own and s.key_map.center is not None:
            centers.setdefault(_identity(s.key.pointer), s.key_map.center)
    launches: list[Launch] = []
    made: dict[Any, Any] = {}
    reach: dict[Any, Tensor] = {}

    def mark(s: SegmentArgs) -> SegmentArgs:
        if s.own_key.pointer is not None or s.key_bias is not None:
            return s  # what a mask hides must not reach the scale of its neighbours
        key = s.key.pointer
        known = _identity(key)
        if known not in made:
            if known not in centers:
                shape = (*key.shape[:2], key.shape[3])
                mean = torch.empty(shape, dtype=torch.float32, device=key.device)
                launches.extend(stats_launches(key, 1.0, mean, torch.empty_like(mean)))
                centers[known] = mean
            made[known], reach[known], launch = quantise_launch(key, centers[known])
            launches.append(launch)
        found = made[known]
        return s._replace(quantised=found.shared() if s.key.stride_b == 0 else found)

    marked = tuple(b._replace(segments=tuple(mark(s) for s in b.segments)) for b in branches)
    return marked, reach, tuple(launches)


def _with_reach(
    branches: tuple[BranchArgs, ...], least: int, made: dict[Any, Tensor]
) -> tuple[tuple[BranchArgs, ...], tuple[Launch, ...]]:
    """The branches with the reach of all keys that are long, whole and without biases, and the
    launches that find what is not `made` yet: one for each tensor."""
    launches: list[Launch] = []

    def mark(s: SegmentArgs) -> SegmentArgs:
        plain = s.key_bias is None and s.own_key.pointer is None and s.logit_bias.stride_l is None
        if not plain or s.single is not None or s.length < least:
            return s
        known = _identity(s.key.pointer)
        if known not in made:
            made[known], launch = reach_launch(s.key.pointer)
            launches.append(launch)
        out = made[known]
        stride = 0 if s.key.stride_b == 0 else out.stride(0)
        return s._replace(reach=Reach(out, stride, out.shape[2]))

    marked = tuple(b._replace(segments=tuple(mark(s) for s in b.segments)) for b in branches)
    return marked, tuple(launches)


def plan(
    kernels: Callable[[str], Any],
    query: Tensor,
    branches: Sequence[Branch],
    softmax_scale: float,
    out: Tensor,
    lse: Tensor,
    arch: str,
    fast: bool = False,
) -> Launch:
    """The launch of a call.

    Args:
        kernels: gives the kernel called "attention" or "decoupled".
        out, lse: what the launch fills.
        arch: a name in the configuration table.
        fast: multiply queries and keys as INT8 where that saves time.
    """
    batch, heads, length, dim = query.shape
    fast = fast and is_quantised(arch, dim)
    arguments, order = _branches(query, branches)
    segments = [s for a in arguments for s in a.segments]
    keys = [s.length for s in segments]
    scale2 = softmax_scale * _LOG2E
    constants: dict[str, Any] = {"GROUPS": len(branches), "D": dim}
    before: tuple[Launch, ...] = ()
    if not fast and _is_decoupled(branches, arguments):
        name = "decoupled"
        tile = decoupled_tile(arch, dim, query.element_size(), sum(keys))
        constants |= {"BLOCK_M": tile.block_m, "COLUMNS": tile.block_n}
        args: tuple[Any, ...] = (out, lse, arguments, heads, length, scale2)
    else:
        name = "attention"
        heavy = len(branches) > 1 or any(
            s.own_key.pointer is not None or s.key_bias is not None for s in segments
        )
        heavy |= any(s.value_map.scale is not None for a in arguments for s in a.segments[1:])
        longest = max(keys, default=1)
        tile = attention_tile(arch, dim, query.element_size(), length, longest, heavy=heavy)
        known = find(arch, query.dtype, dim, length, longest, batch * heads)
        if known is not None and known.tile is not None and not heavy:
            tile = Tile(*known.tile)
        constants |= {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
        arguments = tuple(_with_capabilities(a, scale2, tile.block_n) for a in arguments)
        reach: dict[Any, Tensor] = {}
        if fast:
            arguments, reach, before = _with_quantised(arguments)
        if query.dtype == torch.bfloat16 and is_bounded(arch, dim):
            arguments, more = _with_reach(arguments, BOUNDED[arch], reach)
            before = (*before, *more)
        if is_parked(arch, dim):
            arguments = tuple(_with_park(a, out) for a in arguments)
        args = (out, lse, arguments, order, heads, length, scale2)
    grid = (-(-length // tile.block_m), heads, batch)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return Launch(kernels(name), grid, args, constants, options, before)
