"""From a normalised call to one launch: which kernel, which tile, which arguments.

No tensor is read here but row maps that live on the CPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Container, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..measured import find
from .arguments import (
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
from .blend import blend_launch
from .configs import (
    BOUNDED,
    Tile,
    attention_tile,
    decoupled_tile,
    high_width,
    is_bounded,
    is_parked,
    is_quantised,
)
from .launch import Launch
from .quantised import NOT_QUANTISED, quantise_launch
from .reach import NO_REACH, Reach, reach_launch
from .stats import stats_launches

if TYPE_CHECKING:
    from torch import Tensor

    from ..branch import Affine, Branch, Segment

    # the reach of keys and their biases, by `_reached`
    _Reached = dict[tuple[Any, Any], tuple[Tensor, Tensor | None]]

MAX_COLUMNS = 128  # keys of the one-tile kernel
_SHORT = 512  # keys of a segment, or queries, whose loop may be slow
_STEP = 128  # most keys of a step
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

    def keep(self, segment: Segment) -> int | None:
        """The line that will hold every batch row for itself where the segment is blended with it,
        and -1 where it is removed; None: it needs none."""
        if segment.rows is None or segment.rows.device.type != "cpu" or not _is_blended(segment):
            return None
        rows = tuple(b if r >= 0 else -1 for b, r in enumerate(segment.rows.tolist()))
        if min(rows) >= 0:
            return None
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


def _segment(segment: Segment, rows: Tensor | None, batch: int) -> SegmentArgs:
    """The arguments of a segment whose keys are read as they are; rows: its map on the device."""
    broadcast = rows is None and segment.key.shape[0] == 1 and batch > 1
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
        single=None,
        signed=None,
        reach=NO_REACH,
        quantised=NOT_QUANTISED,
        clean=None,
        settled=None,
        early=None,
    )


def _is_blended(segment: Segment) -> bool:
    return segment.own_key is not None and (
        isinstance(segment.kv_blend, torch.Tensor) or segment.kv_blend != 1.0
    )


def _is_masked(segment: Segment, length: int) -> bool:
    """Whether keys that a bias may remove are read so often that a launch before cleans them."""
    return segment.key_bias is not None and segment.key.shape[2] > _STEP and length > _SHORT


def _rewritten(
    segment: Segment, args: SegmentArgs, kept: Tensor | None
) -> tuple[SegmentArgs, Any, Tensor, Launch]:
    """(the arguments of a segment whose keys and values a launch before blends, so that every batch
    row has its own, or cleans of what a bias removes; the biases of these keys; their reach; that
    launch).

    Args:
        kept: every batch row for itself, -1 where the segment is removed; None where it never is.
    """
    own: Any = (segment.own_key, segment.own_value) if _is_blended(segment) else None
    rows = None if own is None else args.rows
    like = args.key.pointer if own is None else own[0]
    bias, stride = args.key_bias, args.key_bias_stride
    if rows is not None and stride:
        bias = bias.index_select(0, rows[: len(like)].clamp(min=0))
    key, value, scaled, reach, launch = blend_launch(
        (args.key, args.value), own, like, rows, _number(segment.kv_blend), (bias, stride)
    )
    shared = len(like) == 1 and args.key.stride_b == 0  # not one row that is expanded: masks differ
    args = args._replace(
        key=rows_of(key, broadcast=shared),
        value=rows_of(value, broadcast=shared),
        rows=args.rows if own is None else kept,
        key_bias=scaled,
        key_bias_stride=0 if scaled is None or shared else scaled.stride(0),
        clean=None if bias is None else 1,
    )
    return args, bias, reach, launch


class _Arguments:
    """What `_branches` finds: the arguments of all branches, the order of batch rows, the launches
    that write keys, and of those keys the reach and what biases they have."""

    def __init__(self) -> None:
        self.branches: tuple[BranchArgs, ...] = ()
        self.order: Tensor | None = None
        self.before: tuple[Launch, ...] = ()
        self.reach: _Reached = {}

    def segment(
        self, segment: Segment, lines: tuple[int | None, int | None], table: Any, query: Tensor
    ) -> SegmentArgs:
        """The arguments of a segment; lines: those of its maps in the table."""
        batch, length = query.shape[0], query.shape[2]
        rows, kept = (None if line is None else table[line] for line in lines)
        if rows is None and segment.rows is not None:
            rows = segment.rows.contiguous()
            each = torch.arange(batch, dtype=rows.dtype, device=rows.device)
            kept = torch.where(rows < 0, rows, each) if _is_blended(segment) else None
        args = _segment(segment, rows, batch)
        if _is_blended(segment) or _is_masked(segment, length):
            args, bias, reach, launch = _rewritten(segment, args, kept)
            self.before += (launch,)
            self.reach[_reached(args)] = reach, bias
        return args


def _branches(query: Tensor, branches: Sequence[Branch], lse: Tensor) -> _Arguments:
    """The arguments of all branches."""
    found = _Arguments()
    maps = _Maps(query.shape[0], query.device)
    chosen = []
    for branch in branches:
        segments = [s for s in branch.segments if not _dropped(s)]
        segments.sort(
            key=lambda s: s.value_affine is None
        )  # a value affine costs nothing on the first segment
        chosen.append([(s, (maps.add(s), maps.keep(s))) for s in segments])
    table, found.order = maps.finish()
    arguments = []
    for index, (branch, segments_lines) in enumerate(zip(branches, chosen, strict=True)):
        content = branch.content_query
        if not isinstance(branch.gamma, torch.Tensor) and branch.gamma == 0.0:
            content = None
        nulls = sum(s.null_keys for s in branch.segments)
        silent = not isinstance(branch.weight, torch.Tensor) and branch.weight == 0.0
        segment_args = tuple(found.segment(s, lines, table, query) for s, lines in segments_lines)
        arguments.append(
            BranchArgs(
                query=rows_of(query if branch.query is None else branch.query),
                content=_rows(content),
                gamma=NO_NUMBER if content is None else _number(branch.gamma),
                query_map=_map(branch.query_affine),
                segments=segment_args,
                count=(1,) * len(segment_args),
                null_keys=float(nulls) if nulls else None,
                weight=NO_NUMBER if silent else _number(branch.weight),
                park=NO_ROWS,
                lse=lse[index],
                gets=None,
                puts=None,
            )
        )
    # the first loop runs without a second accumulator
    arguments.sort(key=lambda a: -max((s.length for s in a.segments), default=0))
    found.branches = tuple(arguments)
    return found


def _is_decoupled(branches: Sequence[Branch], arguments: Sequence[BranchArgs]) -> bool:
    """Whether one tile covers a call: several short segments, one query, nothing that folds."""
    segments = [s for a in arguments for s in a.segments]
    return (
        len(segments) > 1
        and sum(s.length for s in segments) <= MAX_COLUMNS
        and all(b.query is None for b in branches)
        and all(a.query_map.scale is None and a.content.pointer is None for a in arguments)
        and all(s.key_map.scale is None and s.value_map.scale is None for s in segments)
        and all(s.logit_bias.stride_l is None for s in segments)
    )


def _with_capabilities(branch: BranchArgs, scale: float, block_n: int) -> BranchArgs:
    """Mark segments that fit one step, and those whose logit scale may be negative."""

    def mark(s: SegmentArgs) -> SegmentArgs:
        signed = s.logit_scale.pointer is not None or scale * s.logit_scale.value < 0
        return s._replace(single=1 if s.length <= block_n else None, signed=1 if signed else None)

    return branch._replace(segments=tuple(mark(s) for s in branch.segments))


def _with_turns(branch: BranchArgs, dim: int, first: bool) -> BranchArgs:
    """A branch on sm_90: which products a turn issues and waits for (see `attention._early`).
    first: no branch is before it."""

    def mark(s: SegmentArgs) -> SegmentArgs:
        running = s.reach.pointer is None
        if high_width(dim) == 0:  # the compiler gives up on the loop of a second branch alone
            return s._replace(settled=1) if dim == 128 and running and not first else s
        early = s.quantised.blocks is None and not (running and dim < 128)
        return s._replace(settled=1, early=1 if early else None)

    return branch._replace(segments=tuple(mark(s) for s in branch.segments))


def _with_park(branch: BranchArgs, out: Tensor) -> BranchArgs:
    """A branch that folds anything into a query of the output's dtype puts it there for a while."""
    folds = branch.query_map.scale is not None or branch.content.pointer is not None
    folds |= any(s.key_map.scale is not None for s in branch.segments)
    folds &= out.dtype != torch.float32
    return branch._replace(park=rows_of(out)) if folds else branch


def _with_sums(branches: tuple[BranchArgs, ...], like: Tensor) -> tuple[BranchArgs, ...]:
    """Branches whose sum is in memory, not in registers, while the next of them is computed."""
    heard = [i for i, b in enumerate(branches) if b.weight.value is not None]
    if len(heard) < 2:
        return branches
    sums = torch.empty(like.shape, dtype=torch.float32, device=like.device)
    return tuple(
        b._replace(
            gets=sums if i in heard[1:] else None,
            puts=sums if i in heard[:-1] else None,
        )
        for i, b in enumerate(branches)
    )


def _identity(key: Tensor) -> Any:
    return key.data_ptr(), key.shape, key.stride()


def _reached(s: SegmentArgs) -> tuple[Any, Any]:
    """What the reach of keys depends on: themselves, and a bias that may remove some."""
    return _identity(s.key.pointer), None if s.key_bias is None else _identity(s.key_bias)


def _with_quantised(
    branches: tuple[BranchArgs, ...], exact: Container[Any]
) -> tuple[tuple[BranchArgs, ...], _Reached, tuple[Launch, ...]]:
    """The branches with INT8 keys, but for `exact` tensors, the reach of these by tensor, and the
    launches that make both.

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
    reach: _Reached = {}

    def mark(s: SegmentArgs) -> SegmentArgs:
        if _identity(s.key.pointer) in exact or s.key_bias is not None:
            return s  # what a mask hides must not reach the scale of its neighbours
        key = s.key.pointer
        known = _identity(key)
        if known not in made:
            if known not in centers:
                shape = (*key.shape[:2], key.shape[3])
                mean = torch.empty(shape, dtype=torch.float32, device=key.device)
                launches.extend(stats_launches(key, 1.0, mean, torch.empty_like(mean)))
                centers[known] = mean
            made[known], found, launch = quantise_launch(key, centers[known])
            reach[known, None] = found, None
            launches.append(launch)
        found = made[known]
        return s._replace(quantised=found.shared() if s.key.stride_b == 0 else found)

    marked = tuple(b._replace(segments=tuple(mark(s) for s in b.segments)) for b in branches)
    return marked, reach, tuple(launches)


def _with_reach(
    branches: tuple[BranchArgs, ...], least: int, made: _Reached
) -> tuple[tuple[BranchArgs, ...], tuple[Launch, ...]]:
    """The branches with the reach of all long segments, and the launches that find what is not
    `made` yet: one for each tensor of keys."""
    launches: list[Launch] = []

    def mark(s: SegmentArgs) -> SegmentArgs:
        if s.logit_bias.stride_l is not None or s.single is not None or s.length < least:
            return s
        known = _reached(s)
        if known not in made:
            found, launch = reach_launch(s.key.pointer, s.key_bias, s.key_bias_stride)
            made[known] = found, s.key_bias
            launches.append(launch)
        out, bias = made[known]
        stride = 0 if len(out) == 1 else out.stride(0)
        highest = None if bias is None else bias.amax(-1)
        step = 0 if highest is None or highest.numel() == 1 else 1
        anchored = 1 if bias is None and s.quantised.blocks is None else None
        return s._replace(reach=Reach(out, stride, out.shape[2], highest, step, anchored))

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
    found = _branches(query, branches, lse)
    arguments, reach = found.branches, found.reach
    segments = [s for a in arguments for s in a.segments]
    keys = [s.length for s in segments]
    scale2 = softmax_scale * _LOG2E
    constants: dict[str, Any] = {"GROUPS": len(branches), "D": dim}
    before = found.before
    if not fast and _is_decoupled(branches, arguments):
        name = "decoupled"
        tile = decoupled_tile(arch, dim, query.element_size(), sum(keys))
        constants |= {"BLOCK_M": tile.block_m, "COLUMNS": tile.block_n}
        args: tuple[Any, ...] = (out, arguments, heads, length, scale2)
    else:
        name = "attention"
        heavy = len(branches) > 1 or any(s.key_bias is not None for s in segments)
        heavy |= any(s.value_map.scale is not None for a in arguments for s in a.segments[1:])
        longest = max(keys, default=1)
        crowded = any(s.length > _SHORT for a in arguments[1:] for s in a.segments)
        bounded = query.dtype == torch.bfloat16 and is_bounded(arch, dim)
        room = {"heavy": heavy, "crowded": crowded, "running": not bounded}
        tile = attention_tile(arch, dim, query.element_size(), length, longest, **room)
        known = find(arch, query.dtype, dim, length, longest, batch * heads)
        if known is not None and known.tile is not None and not heavy:
            tile = Tile(*known.tile)
        constants |= {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
        arguments = tuple(_with_capabilities(a, scale2, tile.block_n) for a in arguments)
        if fast:
            arguments, quantised, more = _with_quantised(arguments, {key for key, _ in reach})
            reach, before = {**reach, **quantised}, (*before, *more)
        if bounded:
            arguments, more = _with_reach(arguments, BOUNDED[arch], reach)
            before = (*before, *more)
        if arch in ("sm_90", "interpreter") and query.element_size() == 2:
            arguments = tuple(_with_turns(a, dim, i == 0) for i, a in enumerate(arguments))
        if is_parked(arch, dim):
            arguments = tuple(_with_park(a, out) for a in arguments)
        if dim >= 128:
            arguments = _with_sums(arguments, query)
        args = (out, arguments, found.order, heads, length, scale2)
    grid = (-(-length // tile.block_m), heads, batch)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return Launch(kernels(name), grid, args, constants, options, before)
