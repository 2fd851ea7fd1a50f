"""Inputs and error budgets shared by tests and benchmarks.

Keys have strong channel means, as those of real models do: random normal keys hide AdaIN and
    everything that folds. Budgets are
measured, never typed: the yardstick is the specification in fp64, the budget is what eager PyTorch
    loses in the same dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from styleattn import reference
from styleattn.branch import Affine, Branch, Segment, normalize

HALF = (torch.float16, torch.bfloat16)
HEAD_DIMS = (40, 64, 80, 128, 160)
LENGTHS = (1, 63, 257, 1000)
NEG_INF = float("-inf")


def features(
    generator: torch.Generator,
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    *,
    means: float = 2.0,
    strided: bool = False,
    device: str = "cpu",
) -> Tensor:
    """A [B, H, N, D] tensor with channel means of size `means` and uneven channel scales; over [B,
    N, H, D] memory if strided."""
    b, h, n, d = shape
    scale = 0.5 + torch.rand(b, h, 1, d, generator=generator)
    shift = means * torch.randn(b, h, 1, d, generator=generator)
    x = (torch.randn(b, h, n, d, generator=generator) * scale + shift).to(
        device=device, dtype=dtype
    )
    if not strided:
        return x
    wide = torch.zeros(b, n, h, d + 8, dtype=dtype, device=device)
    wide[..., :d] = x.transpose(1, 2)
    return wide[..., :d].transpose(1, 2)


@dataclass(frozen=True)
class SegmentSpec:
    """Which options a segment uses."""

    keys: int = 7
    key_rows: str = (
        "each"  # "each": R = B; "one": R = 1; "mapped": a row map; "holes": a row map with -1
    )
    affines: str = ""  # any of "k", "v", "c" (center)
    logit_scale: str = ""  # "": 1, "float", "row"
    logit_bias: str = (
        ""  # "": 0, "float", "row", "query", "inf" (some rows), "gone" (-inf everywhere)
    )
    key_bias: str = ""  # "", "shared": [S], "row": [R, S], "mask": [R, S] with -inf
    null_keys: int = 0
    blend: str = ""  # "", "float", "row"


@dataclass(frozen=True)
class BranchSpec:
    """Which options a branch uses."""

    segments: tuple[SegmentSpec, ...] = (SegmentSpec(),)
    weight: str = ""  # "": 1, "zero", "float", "row", "query"
    own_query: bool = False
    query_affine: bool = False
    content: str = ""  # "", "float", "row"


@dataclass(frozen=True)
class CallSpec:
    """A whole call: shapes and options. `build` turns it into tensors."""

    batch: int = 2
    heads: int = 2
    length: int = 5
    head_dim: int = 16
    branches: tuple[BranchSpec, ...] = (BranchSpec(),)
    dtype: torch.dtype = torch.float32
    strided: bool = False
    softmax_scale: float | None = None
    means: float = 1.0
    seed: int = 0

    def build(self) -> tuple[Tensor, tuple[Branch, ...], float | None]:
        """(query, branches, softmax_scale) with tensors drawn from the seed."""
        return _Builder(self).call()


class _Builder:
    def __init__(self, spec: CallSpec):
        self.spec = spec
        self.generator = torch.Generator().manual_seed(spec.seed)

    def rand(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator)

    def features(self, rows: int, length: int) -> Tensor:
        c = self.spec
        shape = (rows, c.heads, length, c.head_dim)
        return features(self.generator, shape, c.dtype, means=c.means, strided=c.strided)

    def affine(self, center: bool = False) -> Affine:
        shape = (self.spec.batch, self.spec.heads, self.spec.head_dim)
        scale, shift = 0.5 + self.rand(*shape), self.rand(*shape) - 0.5
        return Affine(scale, shift, 2 * self.rand(*shape) - 1 if center else None)

    def number(self, kind: str, low: float, high: float) -> Any:
        c = self.spec
        span = high - low
        if kind == "float":
            return low + span * float(self.rand(1))
        return low + span * (
            self.rand(c.batch, c.length) if kind == "query" else self.rand(c.batch)
        )

    def rows(self, kind: str) -> tuple[int, Tensor | None]:
        b = self.spec.batch
        if kind in ("each", "one"):
            return (b if kind == "each" else 1), None
        count = max(1, b - 1)
        low = -1 if kind == "holes" else 0
        return count, torch.randint(low, count, (b,), generator=self.generator)

    def segment(self, s: SegmentSpec) -> Segment:
        count, rows = self.rows(s.key_rows)
        out = Segment(
            self.features(count, s.keys),
            self.features(count, s.keys),
            rows=rows,
            null_keys=s.null_keys,
        )
        if "k" in s.affines:
            out = replace(out, key_affine=self.affine("c" in s.affines))
        if "v" in s.affines:
            out = replace(out, value_affine=self.affine())
        if s.logit_scale:
            out = replace(out, logit_scale=self.number(s.logit_scale, 0.5, 1.5))
        if s.logit_bias == "gone":
            out = replace(out, logit_bias=NEG_INF)
        elif s.logit_bias == "inf":
            bias = self.number("query", -1.0, 1.0)
            out = replace(out, logit_bias=bias.masked_fill(self.rand(*bias.shape) < 0.4, NEG_INF))
        elif s.logit_bias:
            out = replace(out, logit_bias=self.number(s.logit_bias, -2.0, 2.0))
        if s.key_bias:
            bias = (
                2 * self.rand(s.keys) - 1
                if s.key_bias == "shared"
                else 2 * self.rand(count, s.keys) - 1
            )
            if s.key_bias == "mask":
                bias = bias.masked_fill(self.rand(*bias.shape) < 0.4, NEG_INF)
            out = replace(out, key_bias=bias)
        if s.blend:
            own = self.spec.batch, s.keys
            out = replace(
                out,
                own_key=self.features(*own),
                own_value=self.features(*own),
                kv_blend=self.number(s.blend, 0.0, 1.0),
            )
        return out

    def branch(self, b: BranchSpec) -> Branch:
        c = self.spec
        out = Branch(tuple(self.segment(s) for s in b.segments))
        if b.weight:
            out = replace(
                out, weight=0.0 if b.weight == "zero" else self.number(b.weight, -0.5, 1.5)
            )
        if b.own_query:
            out = replace(out, query=self.features(c.batch, c.length))
        if b.query_affine:
            out = replace(out, query_affine=self.affine())
        if b.content:
            out = replace(
                out,
                content_query=self.features(c.batch, c.length),
                gamma=self.number(b.content, 0.0, 1.0),
            )
        return out

    def call(self) -> tuple[Tensor, tuple[Branch, ...], float | None]:
        query = self.features(self.spec.batch, self.spec.length)
        return query, tuple(self.branch(b) for b in self.spec.branches), self.spec.softmax_scale


def _changed(node: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A query, a branch or a tuple of them with every tensor changed."""
    if isinstance(node, Tensor):
        return change(node)
    if isinstance(node, tuple):
        return tuple(_changed(x, change) for x in node)
    if is_dataclass(node) and not isinstance(node, type):
        parts = {f.name: _changed(getattr(node, f.name), change) for f in fields(node)}
        return replace(node, **parts)
    return node


def cast(node: Any, dtype: torch.dtype) -> Any:
    """A query, a branch or a tuple of them with every floating point tensor in another dtype."""
    return _changed(node, lambda x: x.to(dtype) if x.is_floating_point() else x)


def exact(
    query: Tensor, branches: Sequence[Branch], softmax_scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """The specification in fp64 on the same (rounded) inputs: out and lse."""
    query, branches = cast(query, torch.float64), cast(tuple(branches), torch.float64)
    normal, scale = normalize("exact", query, branches, softmax_scale)
    return reference.attention_forward(query, normal, scale)


def eager(
    query: Tensor, branches: Sequence[Branch], softmax_scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """The formula in eager PyTorch, every intermediate in the query's dtype: what an implementation
    in plain torch loses. Out and lse."""
    normal, scale = normalize("eager", query, tuple(branches), softmax_scale)
    normal = cast(normal, query.dtype)
    total, lses = torch.zeros_like(query), []
    for branch in normal:
        out, lse = reference.branch_forward(query, branch, scale, query.dtype)
        total = total + reference.over(branch.weight, 4) * out
        lses.append(lse)
    return total, torch.stack(lses)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Root-mean-square error over root-mean-square value."""
    difference = (actual.double() - expected.double()).norm()
    return float(difference / expected.double().norm().clamp_min(1e-30))


def rounding(dtype: torch.dtype, expected: Tensor) -> float:
    """The relative error of rounding the exact result once."""
    return relative_error(expected.to(dtype), expected)


def assert_within_error_budget(
    actual: Tensor,
    lse: Tensor,
    query: Tensor,
    branches: Sequence[Branch],
    softmax_scale: float | None = None,
) -> None:
    """Hold a result against the specification in fp64.

    Output: at most twice (what the eager formula in the same dtype loses + one rounding, of the
    output or of the logits: exp turns the rounding of a logit x, |x| times half an fp32 ulp, into a
    relative error, and a few queries are no sample of it; a segment's LSE stands for its logits).
    What eager loses depends on the order in which it sums the channels, which means nothing; where
    its own order is not enough, the worst of eight counts.
    LSE: 1e-5 in fp32 and 1e-3 in half precision, relative where it is above 1.

    Raises:
        AssertionError: with both errors.
    """
    expected, expected_lse = exact(query, branches, softmax_scale)
    assert actual.shape == expected.shape and actual.dtype == query.dtype
    assert torch.isfinite(actual).all(), "not finite"
    naive, _ = eager(query, branches, softmax_scale)
    error = relative_error(actual, expected)
    logits = _largest_logit(query, branches, softmax_scale)
    floor = max(torch.finfo(query.dtype).eps, torch.finfo(torch.float32).eps / 2 * logits)
    floor = max(rounding(query.dtype, expected), floor)
    allowed = relative_error(naive, expected) + floor
    if error > 2 * allowed:
        allowed = _worst_order(query, branches, softmax_scale) + floor
    assert error <= 2 * allowed, f"error {error:.2e}, budget {2 * allowed:.2e} ({query.dtype})"
    assert lse.dtype == torch.float32 and lse.shape == expected_lse.shape
    assert torch.equal(lse == NEG_INF, expected_lse == NEG_INF), "rows without keys"
    error = largest_difference(lse, expected_lse)
    largest = float(_finite(expected_lse).abs().max())
    bound = (1e-3 if query.dtype in HALF else 1e-5) * max(1.0, largest)
    assert error <= bound, f"lse error {error:.2e}, budget {bound:.2e} ({query.dtype})"


def _worst_order(
    query: Tensor, branches: Sequence[Branch], softmax_scale: float | None, orders: int = 8
) -> float:
    """The largest relative error of the eager formula over some orders of the channels."""
    call, generator = (query, tuple(branches)), torch.Generator().manual_seed(0)
    worst = 0.0
    for _ in range(orders):
        order = torch.randperm(query.shape[-1], generator=generator).to(query.device)

        def moved(x: Tensor, order: Tensor = order) -> Tensor:
            return x[..., order] if x.ndim > 2 else x

        q, others = _changed(call, moved)
        out, _ = eager(q, others, softmax_scale)
        worst = max(worst, relative_error(out, exact(q, others, softmax_scale)[0]))
    return worst


def _largest_logit(query: Tensor, branches: Sequence[Branch], softmax_scale: float | None) -> float:
    """The largest log-sum-exp, in size, of a segment without its null keys."""
    alone = [
        replace(branch, segments=(replace(s, null_keys=0),))
        for branch in branches
        for s in branch.segments
        if s.key.shape[2]
    ]
    return float(_finite(exact(query, alone, softmax_scale)[1]).abs().max()) if alone else 0.0


def _finite(lse: Tensor) -> Tensor:
    return torch.where(lse == NEG_INF, 0.0, lse.double())


def largest_difference(lse: Tensor, expected: Tensor) -> float:
    """The largest difference of two LSEs, where they are not -inf."""
    return float((_finite(lse) - _finite(expected)).abs().max())
