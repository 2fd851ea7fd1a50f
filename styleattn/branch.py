"""The vocabulary of the one operation: affines, segments and branches, and what makes them
meaningful.

    out[b,h,i] = sum over branches g of  w_g(b,i) * softmax over all keys of the branch (logit) . V'
    logit      = alpha_s(b) * sigma * <Q'_g[b,h,i], K'_s[rows_s(b),h,j]> + beta_s(b,i) +
    keybias_s[j] Q' = gamma * Q_content + (1 - gamma) * (a_q * Q + b_q)
    K' = a_k * (lam * K + (1 - lam) * K_own) + b_k          V' likewise

This module validates meaning, once, for every backend. What a backend cannot run is the backend's
to say.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from styleattn.errors import describe, invalid

MAX_HEAD_DIM = 1024
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_MATH_DTYPES = {torch.float64: torch.float64}
_LARGEST = torch.finfo(torch.float32).max
_MOST_NULL_KEYS = 2**31 - 1


@dataclass(frozen=True, eq=False)
class Affine:
    """A per-channel map ``y = scale * x + shift``, folded into the attention instead of being
    materialised.

    Args:
        scale: [B, H, D] fp32, one row per *query* row (also for keys and values that rows share).
        shift: [B, H, D] fp32.
        center: optional [B, H, D] fp32, the channel means of the tensor the affine applies to. It
            changes no result in
            exact arithmetic; backends use it so that rounding errors of a folded half-precision
            query multiply centred keys only.
    """

    scale: Tensor
    shift: Tensor
    center: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Segment:
    """One run of keys and values. The segments of a branch share one softmax.

    What is removed contributes nothing, whatever it holds (NaN too): a segment by rows = -1 or by a
    bias of -inf for the row, a key by a key bias of -inf. A bias of -inf for some queries of a row
    removes what is finite. Numbers that change from call to call belong in tensors: to a compiler a
    Python number is a constant.

    Args:
        key, value: [R, H, S, D].
        rows: int [B], the row of key/value that serves query row b; -1 removes the segment for that
            row. None: row b
            itself, or row 0 where R == 1. May live on the CPU (planned without synchronisation) or
            on the device.
        key_affine, value_affine: folded maps of K and V, indexed by query row.
        logit_scale: alpha, scalar or [B]; multiplies the softmax scale.
        logit_bias: beta, scalar, [B] or [B, L]; -inf removes the segment (for that row, that
            query).
        key_bias: [S] or [R, S], additive; -inf masks padding.
        null_keys: number of further keys with logit 0 and value 0 (they see neither scale, bias nor
            affine).
        own_key, own_value: [B, H, S, D], the row's own K/V for a blend: K = lam * key[rows]
            + (1 - lam) * own_key.
        kv_blend: lam, scalar or [B]; needs own_key and own_value.
    """

    key: Tensor
    value: Tensor
    rows: Tensor | None = None
    key_affine: Affine | None = None
    value_affine: Affine | None = None
    logit_scale: float | Tensor = 1.0
    logit_bias: float | Tensor = 0.0
    key_bias: Tensor | None = None
    null_keys: int = 0
    own_key: Tensor | None = None
    own_value: Tensor | None = None
    kv_blend: float | Tensor = 1.0


@dataclass(frozen=True, eq=False)
class Branch:
    """Segments under one softmax, added to the output with one weight.

    Args:
        segments: at least one.
        weight: w, scalar, [B] or [B, L] (a spatial mask).
        query: another query [B, H, L, D] for this branch (FLUX IP-Adapter: before RoPE).
        query_affine: folded map of Q.
        content_query: Q_content [B, H, L, D] of the blend Q' = gamma * Q_content + (1 - gamma) *
            (a_q * Q + b_q).
        gamma: share of the content query, scalar or [B]; needs content_query.
    """

    segments: tuple[Segment, ...]
    weight: float | Tensor = 1.0
    query: Tensor | None = None
    query_affine: Affine | None = None
    content_query: Tensor | None = None
    gamma: float | Tensor = 0.0


def describe_call(query: object, branches: Sequence[Branch]) -> str:
    """One line with the shapes of a call, for error messages."""
    parts = [f"query {describe(query)}"]
    for g, branch in enumerate(branches if isinstance(branches, (tuple, list)) else ()):
        if not isinstance(branch, Branch) or not isinstance(branch.segments, (tuple, list)):
            continue
        keys = ", ".join(describe(s.key) for s in branch.segments if isinstance(s, Segment))
        parts.append(f"branch {g}: keys {keys or 'none'}")
    return "; ".join(parts)


class _Checker:
    """Collects every reason why a call is meaningless, while it brings the call to its normal
    form."""

    def __init__(self, query: Tensor):
        self.query = query
        self.reasons: list[str] = []
        self.batch, self.heads, self.length, self.dim = query.shape
        self.math = _MATH_DTYPES.get(query.dtype, torch.float32)

    def tensor(self, name: str, x: object, shape: tuple[int | None, ...]) -> bool:
        if not isinstance(x, Tensor):
            self.reasons.append(f"{name} must be a tensor, got a {type(x).__name__}")
            return False
        if x.ndim != len(shape) or any(
            n is not None and n != m for n, m in zip(shape, x.shape, strict=True)
        ):
            want = "[" + ", ".join("*" if n is None else str(n) for n in shape) + "]"
            self.reasons.append(f"{name} must be {want}, got {list(x.shape)}")
            return False
        return True

    def feature(self, name: str, x: object, shape: tuple[int | None, ...]) -> bool:
        """A query, key or value: shape, dtype, device, contiguous last dim."""
        if not self.tensor(name, x, shape):
            return False
        assert isinstance(x, Tensor)
        before = len(self.reasons)
        if x.dtype != self.query.dtype:
            self.reasons.append(f"{name} is {x.dtype}, query is {self.query.dtype}")
        if x.device != self.query.device:
            self.reasons.append(f"{name} is on {x.device}, query is on {self.query.device}")
        if x.stride(-1) != 1 and x.shape[-1] > 1:
            self.reasons.append(
                f"{name} needs a contiguous last dim, has strides {tuple(x.stride())}"
            )
        return len(self.reasons) == before

    def number(self, name: str, x: object, *, per_query: bool = False) -> float | Tensor:
        """A scalar stays a float; a 0-dim, [B] or (where allowed) [B, L] tensor becomes [B] or [B,
        L] in the math dtype."""
        if not isinstance(x, Tensor):
            return self.constant(name, x)
        fits = x.ndim == 0 or (x.ndim == 1 and x.shape[0] == self.batch)
        if per_query and x.ndim == 2:
            fits = x.shape[0] == self.batch and x.shape[1] == self.length
        if not fits:
            want = f"a scalar or [{self.batch}]"
            want += f" or [{self.batch}, {self.length}]" if per_query else ""
            self.reasons.append(f"{name} must be {want}, got {list(x.shape)}")
            return 0.0
        if x.dtype == torch.bool or x.is_complex():
            self.reasons.append(f"{name} must be a real number, got {x.dtype}")
            return 0.0
        x = x.to(device=self.query.device, dtype=self.math)
        return x.expand(self.batch) if x.ndim == 0 else x

    def constant(self, name: str, x: object) -> float:
        """A Python (or numpy) number as a float that the math dtype can hold."""
        if torch.compiler.is_compiling() and not isinstance(x, (bool, str, type(None))):
            return x  # type: ignore[return-value]  # maybe symbolic: nothing to look at yet
        if type(x) is float and -_LARGEST <= x <= _LARGEST:
            return x
        known = isinstance(x, (int, float, numbers.Real))
        if isinstance(x, bool) or not known:
            self.reasons.append(f"{name} must be a number or a tensor, got a {type(x).__name__}")
            return 0.0
        limit = math.inf if self.math == torch.float64 else _LARGEST
        if x != x:
            self.reasons.append(f"{name} is NaN")
        elif limit < abs(x) < math.inf:  # type: ignore[arg-type]
            self.reasons.append(f"{name} is beyond what float32 holds")
            return 0.0
        return float(x)  # type: ignore[arg-type]

    def affine(self, name: str, x: object) -> Affine | None:
        if x is None:
            return None
        if not isinstance(x, Affine):
            self.reasons.append(f"{name} must be an Affine, got a {type(x).__name__}")
            return None
        shape = (self.batch, self.heads, self.dim)
        parts = {"scale": x.scale, "shift": x.shift, "center": x.center}
        for part, t in parts.items():
            if t is None and part == "center":
                continue
            if not self.tensor(f"{name}.{part}", t, shape):
                continue
            assert isinstance(t, Tensor)
            if not t.is_floating_point():
                self.reasons.append(f"{name}.{part} must be floating point, got {t.dtype}")
            if t.device != self.query.device:
                self.reasons.append(
                    f"{name}.{part} is on {t.device}, query is on {self.query.device}"
                )
        if self.reasons:
            return x
        return Affine(*(None if t is None else t.to(self.math) for t in parts.values()))  # type: ignore[arg-type]

    def rows(self, name: str, rows: object, available: int) -> Tensor | None:
        if rows is None:
            if available != 1 and available != self.batch:
                self.reasons.append(
                    f"{name}.rows is needed: {available} key rows for {self.batch} query rows"
                )
            return None
        if not self.tensor(f"{name}.rows", rows, (self.batch,)):
            return None
        assert isinstance(rows, Tensor)
        if rows.dtype not in (torch.int32, torch.int64):
            self.reasons.append(f"{name}.rows must be int32 or int64, got {rows.dtype}")
            return None
        if rows.device.type == "cpu" and not torch.compiler.is_compiling():
            bad = [r for r in rows.tolist() if not -1 <= r < available]
            if bad:
                self.reasons.append(
                    f"{name}.rows has {bad}, the segment has rows 0..{available - 1} (-1: removed)"
                )
        return rows


def _segment(check: _Checker, name: str, s: object) -> Segment | None:
    if not isinstance(s, Segment):
        check.reasons.append(f"{name} must be a Segment, got a {type(s).__name__}")
        return None
    b, h, d = check.batch, check.heads, check.dim
    check.feature(f"{name}.key", s.key, (None, h, None, d))
    if not isinstance(s.key, Tensor) or s.key.ndim != 4:
        return None
    r, _, length, _ = s.key.shape
    check.feature(f"{name}.value", s.value, (r, h, length, d))
    nulls = s.null_keys
    if isinstance(nulls, bool) or not isinstance(nulls, int) or not 0 <= nulls <= _MOST_NULL_KEYS:
        check.reasons.append(f"{name}.null_keys must be a non-negative int, got {nulls!r}")
    if (r == 0 and b > 0) or (length == 0 and not s.null_keys):
        check.reasons.append(f"{name} is empty: key is {list(s.key.shape)}")
    rows = check.rows(name, s.rows, r)
    key_bias = s.key_bias
    if key_bias is not None:
        ok = isinstance(key_bias, Tensor) and key_bias.ndim in (1, 2)
        if not ok or key_bias.shape[-1] != length or (key_bias.ndim == 2 and len(key_bias) != r):
            check.reasons.append(
                f"{name}.key_bias must be [{length}] or [{r}, {length}], got {describe(key_bias)}"
            )
        elif key_bias.device != check.query.device:
            check.reasons.append(
                f"{name}.key_bias is on {key_bias.device}, query is on {check.query.device}"
            )
        elif not key_bias.is_floating_point():
            check.reasons.append(
                f"{name}.key_bias is additive and must be floating point, got {key_bias.dtype}"
            )
        else:
            key_bias = key_bias.to(check.math)
    own = (s.own_key is None, s.own_value is None)
    blend = check.number(f"{name}.kv_blend", s.kv_blend)
    if own == (False, False):
        check.feature(f"{name}.own_key", s.own_key, (b, h, length, d))
        check.feature(f"{name}.own_value", s.own_value, (b, h, length, d))
    elif own != (True, True):
        check.reasons.append(f"{name} needs own_key and own_value together")
    elif isinstance(blend, Tensor) or blend != 1.0:
        check.reasons.append(f"{name}.kv_blend needs own_key and own_value")
    return replace(
        s,
        rows=rows,
        key_affine=check.affine(f"{name}.key_affine", s.key_affine),
        value_affine=check.affine(f"{name}.value_affine", s.value_affine),
        logit_scale=check.number(f"{name}.logit_scale", s.logit_scale),
        logit_bias=check.number(f"{name}.logit_bias", s.logit_bias, per_query=True),
        key_bias=key_bias,
        kv_blend=blend,
    )


def _branch(check: _Checker, name: str, branch: object) -> Branch | None:
    if not isinstance(branch, Branch):
        check.reasons.append(f"{name} must be a Branch, got a {type(branch).__name__}")
        return None
    if not isinstance(branch.segments, (tuple, list)) or not branch.segments:
        check.reasons.append(f"{name}.segments must be a non-empty tuple of Segment")
        return None
    shape = (check.batch, check.heads, check.length, check.dim)
    if branch.query is not None:
        check.feature(f"{name}.query", branch.query, shape)
    gamma = check.number(f"{name}.gamma", branch.gamma)
    if branch.content_query is not None:
        check.feature(f"{name}.content_query", branch.content_query, shape)
    elif isinstance(gamma, Tensor) or gamma != 0.0:
        check.reasons.append(f"{name}.gamma needs content_query")
    segments = tuple(
        _segment(check, f"{name}.segments[{i}]", s) for i, s in enumerate(branch.segments)
    )
    return replace(
        branch,
        segments=segments,  # type: ignore[arg-type]
        weight=check.number(f"{name}.weight", branch.weight, per_query=True),
        query_affine=check.affine(f"{name}.query_affine", branch.query_affine),
        gamma=gamma,
    )


def query_reasons(query: object, name: str) -> list[str]:
    """Why a query (or what `name` says) is none: [B, H, L, D], floating point, contiguous last dim,
    nothing empty."""
    if not isinstance(query, Tensor):
        return [f"{name} must be a tensor, got a {type(query).__name__}"]
    if query.ndim != 4:
        return [f"{name} must be [batch, heads, length, head_dim], got {list(query.shape)}"]
    reasons = []
    if query.dtype not in _DTYPES:
        reasons.append(f"{name} must be float32, float16, bfloat16 (or float64), got {query.dtype}")
    if 0 in query.shape[1:]:
        reasons.append(f"{name} is empty: {list(query.shape)}")
    if query.shape[-1] > MAX_HEAD_DIM:
        reasons.append(f"head_dim is {query.shape[-1]} (at most {MAX_HEAD_DIM})")
    if query.stride(-1) != 1 and query.shape[-1] > 1:
        reasons.append(f"{name} needs a contiguous last dim, has strides {tuple(query.stride())}")
    return reasons


def check_query(call: str, query: object, name: str = "query") -> Tensor:
    """A query (or what `name` says) of a call, or Invalid."""
    reasons = query_reasons(query, name)
    if reasons:
        raise invalid(call, reasons, f"{name} {describe(query)}")
    assert isinstance(query, Tensor)
    return query


def normalize(
    call: str, query: Tensor, branches: Sequence[Branch], softmax_scale: float | None
) -> tuple[tuple[Branch, ...], float]:
    """Check the meaning of a call and bring it to the form every backend takes.

    After it: numbers are Python floats or tensors ([B], or [B, L] for bias and weight) in fp32
        (fp64
    for an fp64 query) on the query's device; affines and key biases are in that dtype too; rows are
    None or int [B]; the scale is a float. Under a compiler the entries of rows are not checked here
    but where they are used.

    Raises:
        Invalid: with every reason at once.
    """
    check_query(call, query)
    check = _Checker(query)
    if isinstance(branches, Branch):
        branches = (branches,)
    if not isinstance(branches, (tuple, list)) or not branches:
        raise invalid(
            call, ["branches must be a non-empty sequence of Branch"], describe_call(query, ())
        )
    normal = tuple(_branch(check, f"branches[{g}]", branch) for g, branch in enumerate(branches))
    scale = query.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    known = isinstance(scale, (int, float)) and not isinstance(scale, bool)
    if softmax_scale is not None and (not known or not -_LARGEST <= scale <= _LARGEST):
        check.reasons.append(f"softmax_scale must be a finite number, got {softmax_scale!r}")
    if check.reasons:
        raise invalid(call, check.reasons, describe_call(query, branches))
    return normal, float(scale)  # type: ignore[return-value]
