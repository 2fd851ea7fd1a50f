"""What the public functions check of their own arguments, before a call is a call."""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor

from styleattn.branch import query_reasons
from styleattn.errors import describe

Number = float | Tensor
PRECISIONS = ("exact", "fast")


def check_precision(call: str, precision: object) -> None:
    """Refuse what is neither "exact" nor "fast"."""
    if precision not in PRECISIONS:
        raise ValueError(f"{call}: precision must be 'exact' or 'fast', got {precision!r}")


def reference_reasons(rows: object, query: Tensor) -> list[str]:
    """Why a map of reference rows (see `as_rows`) has no meaning: int [B], with every entry in
    -1..B-1 where it can be read without a device sync, and references their own references."""
    batch = query.shape[0]
    if not isinstance(rows, Tensor) or rows.shape != query.shape[:1]:
        return [f"reference_rows must be int [{batch}], got {describe(rows)}"]
    if rows.dtype not in (torch.int32, torch.int64):
        return [f"reference_rows must be int32 or int64, got {rows.dtype}"]
    if rows.device.type != "cpu" or torch.compiler.is_compiling():
        return []
    values = rows.tolist()
    bad = [r for r in values if not -1 <= r < batch]
    if bad:
        return [f"reference_rows has {bad}, rows are 0..{batch - 1} (-1: none)"]
    chained = {r for r in values if r >= 0 and values[r] != r}
    if chained:
        return [
            f"reference_rows has {sorted(chained)}, which are no references: "
            "a reference's reference is itself"
        ]
    return []


def as_rows(rows: Any) -> Any:
    """A sequence of ints as a tensor; anything else as it is, to be refused with its name."""
    whole = isinstance(rows, (list, tuple)) and all(type(r) is int for r in rows)
    return torch.tensor(rows, dtype=torch.int64) if whole else rows


def like_reasons(query: Tensor, **others: object) -> list[str]:
    """Why tensors are no keys and values of a self-attention."""
    reasons = []
    for name, x in others.items():
        if not isinstance(x, Tensor) or x.shape != query.shape:
            reasons.append(f"{name} must be like query {list(query.shape)}, got {describe(x)}")
            continue
        reasons += query_reasons(x, name)
        if x.dtype != query.dtype or x.device != query.device:
            reasons.append(f"{name} is {describe(x)}, query is {describe(query)}")
    return reasons


def mask_reasons(n: int, mask: object, query: Tensor) -> list[str]:
    """Why a spatial mask has no meaning."""
    if mask is None:
        return []
    batch, _, length, _ = query.shape
    shapes = ((length,), (1, length), (batch, length))
    if not isinstance(mask, Tensor) or tuple(mask.shape) not in shapes:
        want = f"[{length}], [1, {length}] or [{batch}, {length}]"
        return [f"masks[{n}] must be {want}, got {describe(mask)}"]
    if mask.device != query.device:
        return [f"masks[{n}] is on {mask.device}, query is on {query.device}"]
    return []


def number_reasons(name: str, x: object, query: Tensor, *, per_query: bool = False) -> list[str]:
    """Why a number is none: neither a scalar nor [B], nor [B, L] where that is allowed."""
    batch, _, length, _ = query.shape
    if isinstance(x, Tensor):
        shapes = ((), (batch,), (batch, length)) if per_query else ((), (batch,))
        if tuple(x.shape) in shapes:
            return []
        want = (
            f"a scalar, [{batch}] or [{batch}, {length}]" if per_query else f"a scalar or [{batch}]"
        )
        return [f"{name} must be {want}, got {list(x.shape)}"]
    if isinstance(x, bool) or not isinstance(x, (int, float, numbers.Real)):
        return [f"{name} must be a number or a tensor, got a {type(x).__name__}"]
    return []


def masked(weight: Number, mask: Tensor | None, batch: int, length: int) -> Number:
    """A weight times a spatial mask: [B, L]."""
    if mask is None:
        return weight
    if isinstance(weight, Tensor) and weight.ndim == 1:
        weight = weight[:, None]
    return (weight * mask).expand(batch, length)
