"""From a normalised call to one launch: which kernel, which tile, which arguments.

No tensor is read here but row maps that live on the CPU.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from ..measured import find
from .configs import (
    BOUNDED,
    Tile,
    attention_tile,
    cuda_arch,
    decoupled_tile,
    hip_arch,
    is_bounded,
    next_power_of_2,
)
from .primitives import BranchArgs, Map, Number, Rows, SegmentArgs
from .reach import PARTS, Reach, reach_kernel

if TYPE_CHECKING:
    from torch import Tensor

    from ..branch import Affine, Branch, Segment

MAX_HEAD_DIM = 256
MAX_SEGMENTS = 64  # segments are unrolled
MAX_COLUMNS = 128  # keys of the one-tile kernel
_LOG2E = 1.4426950408889634
_GRID_LIMIT = 65535


@dataclass(frozen=True)
class Launch:
    """A kernel with everything that it needs to start, and what has to run before it."""

    kernel: Any
    grid: tuple[int, int, int]
    args: tuple[Any, ...]
    constants: dict[str, Any]
    options: dict[str, Any]
    before: tuple[Launch, ...] = ()

    def run(self, device: torch.device) -> None:
        """Start it on the current stream of the tensors' device."""
        for launch in self.before:
            launch.run(device)
        guard = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
        with guard:
            self.kernel[self.grid](*self.args, **self.constants, **self.options)


@triton.jit
def _probe_kernel(a, out):
    i = tl.arange(0, 16)
    x = tl.load(a + i[:, None] * 16 + i[None, :])
    tl.store(out + i[:, None] * 16 + i[None, :], tl.dot(x, x))


@functools.cache
def _interpreter_multiplies_bf16() -> bool:
    """Whether the interpreter multiplies bfloat16 (Triton 3.6 and 3.7 multiply the raw bits)."""
    out = torch.empty(16, 16)
    _probe_kernel[(1,)](torch.ones(16, 16, dtype=torch.bfloat16), out)
    return bool((out == 16).all())


def interpreted() -> bool:
    """Whether the kernels of this process run under the Triton interpreter."""
    return not isinstance(_probe_kernel, triton.JITFunction)


def arch_of(query: Tensor) -> str | None:
    """The name in the configuration table of the query's device, None where there is none."""
    if interpreted():
        return "interpreter"
    return _device_arch(query.device) if query.device.type == "cuda" else None


@functools.cache
def _device_arch(device: torch.device) -> str | None:
    if torch.version.hip is not None:
        return hip_arch(torch.cuda.get_device_properties(device).gcnArchName)
    return cuda_arch(*torch.cuda.get_device_capability(device))


def reasons(query: Tensor, branches: Sequence[Branch]) -> list[str]:
    """Every reason why the kernels cannot run a normalised call."""
    found = []
    kind = query.device.type
    if kind == "cpu" and not interpreted():
        found.append("CPU tensors need Triton's interpreter: TRITON_INTERPRET=1 before its import")
    elif kind not in ("cpu", "cuda"):
        found.append(f"device is {query.device}, the kernels run on NVIDIA and AMD GPUs")
    elif kind == "cuda" and arch_of(query) is None:
        name = torch.cuda.get_device_name(query.device)
        found.append(f"{name} is neither NVIDIA sm_80 or later nor AMD CDNA 2 or later")
    if query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        found.append(f"dtype is {query.dtype}, the kernels take float32, float16 and bfloat16")
    elif query.dtype == torch.bfloat16 and interpreted() and not _interpreter_multiplies_bf16():
        found.append("this Triton's interpreter multiplies bfloat16 wrongly")
    if query.shape[-1] > MAX_HEAD_DIM:
        found.append(f"head_dim is {query.shape[-1]} (at most {MAX_HEAD_DIM})")
    for name, n in (("batch", query.shape[0]), ("heads", query.shape[1])):
        if n > _GRID_LIMIT:
            found.append(f"{name} is {n} (at most {_GRID_LIMIT})")
    count = sum(len(branch.segments) for branch in branches)
    if count > MAX_SEGMENTS:
        found.append(f"{count} segments (at most {MAX_SEGMENTS})")
    return found


def _number(x: float | Tensor) -> Number:
    if not isinstance(x, torch.Tensor):
        return Number(x)
    return Number(0.0, x, x.stride(0), x.stride(1) if x.ndim == 2 else None)


def _map(affine: Affine | None) -> Map | None:
    if affine is None:
        return None
    center = None if affine.center is None else affine.center.contiguous()
    return Map(affine.scale.contiguous(), affine.shift.contiguous(), center)


def _rows(x: Tensor, *, broadcast: bool = False) -> Rows:
    strides = (0 if broadcast else x.stride(0), x.stride(1), x.stride(2))
    return Rows(x, *strides, aligned=1 if all(s % 8 == 0 for s in strides) else None)


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
        key=_rows(segment.key, broadcast=broadcast),
        value=_rows(segment.value, broadcast=broadcast),
        length=segment.key.shape[2],
        rows=rows,
        key_map=_map(segment.key_affine),
        value_map=_map(segment.value_affine),
        logit_scale=_number(segment.logit_scale),
        logit_bias=_number(segment.logit_bias),
        key_bias=bias,
        key_bias_stride=0 if bias is None or bias.ndim == 1 or broadcast else bias.stride(0),
        own_key=_rows(segment.own_key) if blended and segment.own_key is not None else None,
        own_value=_rows(segment.own_value) if blended and segment.own_value is not None else None,
        blend=_number(segment.kv_blend) if blended else None,
        single=None,
        signed=None,
        reach=None,
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
                query=_rows(query if branch.query is None else branch.query),
                content=None if content is None else _rows(content),
                gamma=None if content is None else _number(branch.gamma),
                query_map=_map(branch.query_affine),
                segments=tuple(_segment(s, line, table, query.shape[0]) for s, line in lines),
                null_keys=float(nulls) if nulls else None,
                weight=None if silent else _number(branch.weight),
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
        and all(a.query_map is None and a.content is None for a in arguments)
        and all(s.key_map is None and s.value_map is None and s.own_key is None for s in segments)
        and all(s.logit_bias.stride_l is None for s in segments)
    )


def _with_capabilities(branch: BranchArgs, scale: float, block_n: int) -> BranchArgs:
    """Mark segments that fit one step, and those whose logit scale may be negative."""

    def mark(s: SegmentArgs) -> SegmentArgs:
        signed = s.logit_scale.pointer is not None or scale * s.logit_scale.value < 0
        return s._replace(single=1 if s.length <= block_n else None, signed=1 if signed else None)

    return branch._replace(segments=tuple(mark(s) for s in branch.segments))


def _with_reach(
    branches: tuple[BranchArgs, ...], heads: int, least: int
) -> tuple[tuple[BranchArgs, ...], tuple[Launch, ...]]:
    """The branches with the reach of all keys that are long, whole and without biases, and the
    launches that find it: one for each tensor."""
    made: dict[Any, tuple[Tensor, Launch]] = {}

    def mark(s: SegmentArgs) -> SegmentArgs:
        plain = s.key_bias is None and s.own_key is None and s.logit_bias.stride_l is None
        if not plain or s.single is not None or s.length < least:
            return s
        key = s.key.pointer
        known = (key.data_ptr(), key.shape, key.stride())
        if known not in made:
            made[known] = _reach(key, s.key, heads)
        out = made[known][0]
        return s._replace(
            reach=Reach(out, 0 if s.key.stride_b == 0 else out.stride(0), out.shape[2])
        )

    marked = tuple(
        branch._replace(segments=tuple(mark(s) for s in branch.segments)) for branch in branches
    )
    return marked, tuple(launch for _, launch in made.values())


def _reach(key: Tensor, rows: Rows, heads: int) -> tuple[Tensor, Launch]:
    """(what will hold the reach [R, H, parts] of keys, the launch that fills it)."""
    count, _, length, dim = key.shape
    run = max(64, next_power_of_2(-(-length // int(PARTS))))
    out = torch.empty(count, heads, -(-length // run), dtype=torch.float32, device=key.device)
    constants = {"D": dim, "WIDTH": max(16, next_power_of_2(dim)), "RUN_N": run, "BLOCK_N": 64}
    grid = (out.shape[2], heads, count)
    args = (rows._replace(stride_b=key.stride(0)), out, heads, length, out.shape[2])
    return out, Launch(reach_kernel, grid, args, constants, {"num_warps": 4, "num_stages": 2})


def plan(
    kernels: Callable[[str], Any],
    query: Tensor,
    branches: Sequence[Branch],
    softmax_scale: float,
    out: Tensor,
    lse: Tensor,
    arch: str,
) -> Launch:
    """The launch of a call.

    Args:
        kernels: gives the kernel called "attention" or "decoupled".
        out, lse: what the launch fills.
        arch: a name in the configuration table.
    """
    batch, heads, length, dim = query.shape
    arguments, order = _branches(query, branches)
    segments = [s for a in arguments for s in a.segments]
    keys = [s.length for s in segments]
    scale2 = softmax_scale * _LOG2E
    constants: dict[str, Any] = {"D": dim}
    before: tuple[Launch, ...] = ()
    if _is_decoupled(branches, arguments):
        name = "decoupled"
        tile = decoupled_tile(arch, dim, query.element_size(), sum(keys))
        constants |= {"BLOCK_M": tile.block_m, "COLUMNS": tile.block_n}
        args: tuple[Any, ...] = (out, lse, arguments, heads, length, scale2)
    else:
        name = "attention"
        heavy = len(branches) > 1 or any(s.own_key or s.key_bias is not None for s in segments)
        heavy |= any(s.value_map is not None for a in arguments for s in a.segments[1:])
        longest = max(keys, default=1)
        tile = attention_tile(arch, dim, query.element_size(), length, longest, heavy=heavy)
        known = find(arch, query.dtype, dim, length, longest, batch * heads)
        if known is not None and known.tile is not None and not heavy:
            tile = Tile(*known.tile)
        constants |= {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
        arguments = tuple(_with_capabilities(a, scale2, tile.block_n) for a in arguments)
        folded = len(segments) > 1 or any(a.query_map or a.content for a in arguments)
        folded |= any(s.key_map is not None for s in segments)
        if query.dtype == torch.bfloat16 and is_bounded(arch, dim, folded=folded):
            arguments, before = _with_reach(arguments, heads, BOUNDED[arch])
        args = (out, lse, arguments, order, heads, length, scale2)
    grid = (-(-length // tile.block_m), heads, batch)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return Launch(kernels(name), grid, args, constants, options, before)
