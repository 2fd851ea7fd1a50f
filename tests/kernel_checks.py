"""Calls of the fused kernels, and what every one of them has to keep."""

from __future__ import annotations

import math

import torch

from styleattn.branch import Affine, Branch, Segment, normalize
from styleattn.kernels.attention import attention_forward, unsupported_reasons
from styleattn.lse import refined
from styleattn.testing import (
    BranchSpec,
    SegmentSpec,
    assert_within_error_budget,
    eager,
    exact,
    features,
    relative_error,
    rounding,
)


def run(query, branches, scale=None):
    """out, lse of the kernels."""
    normal, scale = normalize("test", query, branches, scale)
    assert unsupported_reasons(query, normal) == []
    out, lse = attention_forward(query, normal, scale)
    return out, refined(attention_forward, query, normal, scale, lse)


def within_budget(query, branches, scale=None):
    """The layout that all backends promise, and the error budget that they all share."""
    out, lse = run(query, branches, scale)
    batch, heads, length, dim = query.shape
    assert out.shape == query.shape and out.dtype == query.dtype
    assert out.stride() == (length * heads * dim, dim, heads * dim, 1)
    assert lse.shape == (len(branches), batch, heads, length) and lse.is_contiguous()
    assert_within_error_budget(out, lse, query, branches, scale)
    return out, lse


def check(query, branches, scale=None):
    """The kernels lose no more than eager PyTorch in the same dtype, and their LSE is right."""
    out, lse = within_budget(query, branches, scale)
    expected, _ = exact(query, branches, scale)
    floor = max(torch.finfo(query.dtype).eps, rounding(query.dtype, expected))
    loss = relative_error(eager(query, branches, scale)[0], expected)
    assert relative_error(out, expected) <= loss + floor
    return out, lse


def one(**options):
    """A branch with one plain segment and one with the options, longer than one step."""
    return BranchSpec((SegmentSpec(keys=33), SegmentSpec(keys=70, **options)))


def adain_call(dtype, means=6.0):
    """StyleAligned of one target: own keys renormalised to the reference's statistics."""
    g = torch.Generator().manual_seed(0)
    query, key, value = (features(g, (2, 1, 33, 64), dtype, means=means) for _ in range(3))
    mean, std = key.float().mean(2), key.float().std(2)
    scale = std[:1] / std
    own = Affine(scale, mean[:1] - scale * mean, mean)
    reference = Affine(
        torch.ones_like(mean), torch.zeros_like(mean), mean[:1].expand_as(mean).clone()
    )
    rows = torch.tensor([-1, 0])
    segments = (
        Segment(key, value, key_affine=own),
        Segment(key, value, rows=rows, key_affine=reference, logit_bias=math.log(2)),
    )
    return query, (Branch(segments),)
