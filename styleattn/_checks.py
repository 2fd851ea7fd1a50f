"""What the public functions check of their own arguments, before a call is a call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from styleattn.branch import check_query
from styleattn.errors import describe, invalid

Number = float | Tensor
PRECISIONS = ("exact", "fast")


def check_precision(call: str, precision: object) -> None:
    """Refuse what is neither "exact" nor "fast"."""
    if precision not in PRECISIONS:
        raise ValueError(f"{call}: precision must be 'exact' or 'fast', got {precision!r}")


def row_map(call: str, name: str, rows: object, query: Tensor, available: int) -> Tensor:
    """A row map as an int tensor [B], with every entry in -1..available-1 where it can be read
    without a device sync."""
    rows = as_rows(rows)
    reasons = []
    if not isinstance(rows, Tensor) or rows.shape != query.shape[:1]:
        reasons.append(f"{name} must be int [{query.shape[0]}], got {describe(rows)}")
    elif rows.dtype not in (torch.int32, torch.int64):
        reasons.append(f"{name} must be int32 or int64, got {rows.dtype}")
    elif rows.device.type == "cpu" and not torch.compiler.is_compiling():
        values = rows.tolist()
        bad = [r for r in values if not -1 <= r < available]
        chained = (
            [r for r in values if 0 <= r < available and values[r] != r]
            if name == "reference_rows" and not bad
            else []
        )
        if bad:
            reasons.append(f"{name} has {bad}, rows are 0..{available - 1} (-1: none)")
        if chained:
            reasons.append(
                f"{name} has {sorted(set(chained))}, which are no references: "
                "a reference's reference is itself"
            )
    if reasons:
        raise invalid(call, reasons, f"query {describe(query)}")
    assert isinstance(rows, Tensor)
    return rows


def as_rows(rows: Any) -> Any:
    """A sequence of ints as a tensor; anything else as it is, to be refused with its name."""
    whole = isinstance(rows, (list, tuple)) and all(isinstance(r, int) for r in rows)
    return torch.tensor(rows, dtype=torch.int64) if whole else rows


def per_row(call: str, query: Tensor, **numbers: object) -> None:
    """Refuse tensors that are neither scalars nor [B]."""
    reasons = [
        f"{name} must be a scalar or [{query.shape[0]}], got {list(x.shape)}"
        for name, x in numbers.items()
        if isinstance(x, Tensor) and tuple(x.shape) not in ((), (query.shape[0],))
    ]
    if reasons:
        raise invalid(call, reasons, f"query {describe(query)}")


def check_like_query(call: str, query: Tensor, **others: object) -> None:
    for name, x in others.items():
        if not isinstance(x, Tensor) or x.shape != query.shape:
            reason = f"{name} must be like query {list(query.shape)}, got {describe(x)}"
            raise invalid(call, [reason], describe(query))
        check_query(call, x, name)


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


def number_reasons(name: str, x: object, query: Tensor) -> list[str]:
    """Why a weight has no meaning."""
    batch, _, length, _ = query.shape
    if isinstance(x, Tensor):
        if tuple(x.shape) in ((), (batch,), (batch, length)):
            return []
        return [f"{name} must be a scalar, [{batch}] or [{batch}, {length}], got {list(x.shape)}"]
    if isinstance(x, (int, float)) and not isinstance(x, bool):
        return []
    return [f"{name} must be a number or a tensor, got a {type(x).__name__}"]


def masked(weight: Number, mask: Tensor | None, batch: int, length: int) -> Number:
    """A weight times a spatial mask: [B, L]."""
    if mask is None:
        return weight
    if isinstance(weight, Tensor) and weight.ndim == 1:
        weight = weight[:, None]
    return (weight * mask).expand(batch, length)
