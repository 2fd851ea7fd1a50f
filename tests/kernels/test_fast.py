"""INT8 products of queries and keys: the specification's grid, the stated bound."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import styleattn
from styleattn import reference
from styleattn.branch import Branch, Segment, normalize
from styleattn.kernels.attention import attention_forward, attention_kernel, launch_of
from styleattn.kernels.quantised import quantise_kernel
from styleattn.kernels.stats import stats_kernel
from styleattn.testing import (
    BranchSpec,
    CallSpec,
    SegmentSpec,
    eager,
    exact,
    features,
    relative_error,
)

HALF = (torch.float16, torch.bfloat16)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy under the interpreter


def both(query, branches, scale=None):
    """(out, lse) of the kernels and of the specification, on INT8."""
    normal, scale = normalize("test", query, branches, scale)
    return (
        attention_forward(query, normal, scale, fast=True),
        reference.attention_forward(query, normal, scale, fast=True),
    )


def bounds(query, branches, scale=None):
    """(eps [G, B, H, L] by which a branch's logits move at most, sum_j p_ij |V'_j| of each,
    [G, B, H, L, D]), in fp64, from the formulas of `styleattn.attention`. Affines, row maps and
    scales per row as in a normalised call; no bias per key, no blend."""
    query, length = query.double(), query.shape[2]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    moved, weighed = [], []
    for branch in branches:
        q = query
        if branch.query_affine is not None:
            q = q * branch.query_affine.scale[:, :, None] + branch.query_affine.shift[:, :, None]
        worst = torch.zeros(*query.shape[:2], length, dtype=torch.float64)
        for s in branch.segments:
            rows = torch.arange(len(query)) if s.rows is None else s.rows.clamp(min=0)
            key = s.key.double().expand(max(len(s.key), int(rows.max()) + 1), -1, -1, -1)[rows]
            folded = q if s.key_affine is None else q * s.key_affine.scale[:, :, None]
            key = key - key.mean(2, keepdim=True)
            peak = torch.cat(
                [p.abs().amax((2, 3), keepdim=True).expand(*p.shape[:3], 1)
                 for p in key.split(128, 2)], 2,
            )[..., 0]  # fmt: skip
            step = folded.abs().amax(-1)[..., None] * key.abs().sum(-1)[:, :, None]
            step = step + folded.abs().sum(-1)[..., None] * peak[:, :, None]
            both_round = folded.shape[-1] / 254 * folded.abs().amax(-1)[..., None]
            step = step + both_round * peak[:, :, None]
            alpha = torch.as_tensor(s.logit_scale).double().abs().reshape(-1, 1, 1)
            here = alpha * abs(scale) / 254 * step.amax(-1)
            gone = torch.zeros(len(query), 1, 1, dtype=torch.bool)
            gone |= False if s.rows is None else (s.rows < 0)[:, None, None]
            worst = torch.maximum(worst, torch.where(gone, 0.0, here))
        moved.append(worst)
        positive = tuple(
            replace(s, value=exact_values(s).abs(), value_affine=None) for s in branch.segments
        )
        weighed.append(exact(query, (replace(branch, segments=positive, weight=1.0),), scale)[0])
    return torch.stack(moved), torch.stack(weighed)


def test_the_bound_counts_what_both_roundings_take():
    """Every channel of query and key rounds up: more than the two roundings one by one."""
    query = torch.full((1, 1, 1, 64), 1.5, dtype=torch.float64)
    query[..., 0] = 127
    near, peak = torch.full((64,), 1.5), torch.zeros(64)
    near[0], peak[0] = -0.5, 127
    key = torch.stack([near, -near, peak, -peak])[None, None].double()
    moved = reference._fast_products(query, Segment(key, key)) - query @ key.transpose(-1, -2)
    (bound,), _ = bounds(query, (Branch((Segment(key, key),)),), scale=1.0)
    one_by_one = (127 * key.abs().sum(-1) + 127 * query.abs().sum(-1)) / 254
    assert moved[..., 0].abs() > one_by_one[..., 0]
    assert (moved.abs() <= one_by_one + 64 * 127 * 127 / 254**2).all()
    assert (moved.abs().amax(-1) <= bound).all()


def exact_values(s):
    """V' of a segment whose rows are its own, in fp64."""
    value = s.value.double()
    if s.value_affine is None:
        return value
    return value * s.value_affine.scale[:, :, None] + s.value_affine.shift[:, :, None]


def shared(dtype, kind, length=150, dim=64):
    """StyleAligned's call on inputs of a kind."""
    g = torch.Generator().manual_seed(3)
    means = 8.0 if kind == "strong means" else 1.0
    q, k, v = (features(g, (2, 1, length, dim), torch.float32, means=means) for _ in range(3))
    if kind == "loud channels":
        k[..., 5] *= 12
        q[..., 9] *= 12
    elif kind == "loud tokens":
        k[:, :, ::50] *= 20
        q[:, :, 3] *= 20
    elif kind == "constant keys":
        k[:] = k[:, :, :1]
    q, k, v = (x.to(dtype) for x in (q, k, v))
    own = styleattn.token_stats(k, backend="reference")
    other = styleattn.TokenStats(*(x[:1].expand_as(x) for x in own))
    affine = styleattn.adain_affine(own, other)
    same = styleattn.Affine(
        torch.ones_like(own.mean), torch.zeros_like(own.mean), other.mean.clone()
    )
    rows = torch.tensor([-1, 0])
    segments = (
        Segment(k, v, key_affine=affine),
        Segment(k, v, rows=rows, key_affine=same, logit_scale=1.1, logit_bias=math.log(2)),
    )
    return q, (Branch(segments),)


KINDS = ("as usual", "strong means", "loud channels", "loud tokens", "constant keys")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", HALF, ids=["float16", "bfloat16"])
def test_within_the_stated_bound(kind, dtype):
    query, branches = shared(dtype, kind)
    (out, lse), (want, want_lse) = both(query, branches)
    true, true_lse = exact(query, branches)
    eps, weighed = bounds(query, branches)
    half = relative_error(eager(query, branches)[0], true) + torch.finfo(dtype).eps
    allowed = torch.expm1(2 * eps)[0, ..., None] * weighed[0] + 2 * half * weighed[0].max()
    for o, x in ((out, lse), (want, want_lse)):
        assert ((x.double() - true_lse).abs() <= eps + 1e-5 * (1 + true_lse.abs())).all()
        assert ((o.double() - true).abs() <= allowed).all()


@pytest.mark.parametrize("kind", KINDS[:2])
def test_errors_cancel(kind):
    """The logits' root mean square error is what rounding two factors uniformly makes it."""
    query, branches = shared(torch.bfloat16, kind)
    alone = Segment(branches[0].segments[0].key, branches[0].segments[0].value)
    normal, scale = normalize("test", query, (Branch((alone,)),), None)
    q, k = query.double(), alone.key.double()
    products = reference._fast_products(q, normal[0].segments[0])
    error = scale * (products - q @ k.transpose(-1, -2))
    away = k - k.mean(2, keepdim=True)
    peaks = [p.abs().amax((2, 3), keepdim=True).expand(*p.shape[:3], 1) for p in away.split(128, 2)]
    square = q.abs().amax(-1, keepdim=True) ** 2 * (away**2).sum(-1)[:, :, None]
    square = square + torch.cat(peaks, 2)[:, :, None, :, 0] ** 2 * (q**2).sum(-1, keepdim=True)
    predicted = scale / (127 * math.sqrt(12)) * square.mean().sqrt()
    assert 0.9 < error.square().mean().sqrt() / predicted < 1.1


@pytest.mark.parametrize("dim", [16, 40, 64, 80, 160])
def test_the_kernels_compute_what_the_specification_says(dim):
    """To a hundredth of what INT8 loses, and the rounding of what stays in half precision."""
    dtype = HALF[dim % 3 > 0]
    query, branches = shared(dtype, "strong means", length=70, dim=dim)
    (out, lse), (want, want_lse) = both(query, branches)
    true, true_lse = exact(query, branches)
    loss = relative_error(want, true)
    assert loss > 2e-4  # it is rounded
    assert relative_error(out, want) <= 0.01 * loss + 2 * torch.finfo(dtype).eps
    assert (lse - want_lse).abs().mean() <= 0.05 * (want_lse - true_lse).abs().mean() + 1e-5


FEATURES = {
    "one row of keys": SegmentSpec(70, key_rows="one"),
    "row map with holes": SegmentSpec(140, key_rows="holes", affines="k"),
    "scale per row": SegmentSpec(33, logit_scale="row", affines="kv"),
    "bias per query": SegmentSpec(70, logit_bias="inf"),
    "null keys": SegmentSpec(5, null_keys=3),
}


@pytest.mark.parametrize("name", FEATURES)
def test_every_feature(name):
    """Affines, maps, scales and biases mean what they mean to the specification."""
    dtype = HALF[len(name) % 2]
    branch = BranchSpec((SegmentSpec(33), FEATURES[name]), weight="query", query_affine=True)
    query, branches, scale = CallSpec(2, 1, 9, 40, (branch,), dtype, strided=True, seed=1).build()
    (out, lse), (want, want_lse) = both(query, branches, -0.2 if "scale" in name else scale)
    assert torch.equal(lse == -math.inf, want_lse == -math.inf)
    assert relative_error(out, want) <= 4 * torch.finfo(dtype).eps
    finite = want_lse > -math.inf
    assert (lse - want_lse)[finite].abs().max() < 2e-3


def test_masked_and_blended_keys_stay_exact():
    """What a mask hides is in no scale, whatever it holds."""
    branch = BranchSpec((SegmentSpec(33), SegmentSpec(40, key_bias="mask")))
    query, branches, _ = CallSpec(2, 1, 9, 40, (branch,), torch.bfloat16, seed=1).build()
    masked = branches[0].segments[1]
    hidden = (masked.key_bias == -math.inf)[:, None, :, None]
    poison = replace(masked, key=masked.key.masked_fill(hidden, math.nan))
    (out, _), (want, _) = both(query, branches)
    (same, _), (same_want, _) = both(query, (Branch((branches[0].segments[0], poison)),))
    assert torch.equal(out, same) and torch.equal(want, same_want)


def test_nan_and_infinity_stay_in_their_row():
    query, branches, _ = CallSpec(
        3, 1, 5, 16, (BranchSpec((SegmentSpec(70),)),), torch.float16
    ).build()
    (clean, _), _ = both(query, branches)
    branches[0].segments[0].key[1, 0, 3, 2] = math.nan
    query[2, 0, 1, 0] = math.inf
    (out, lse), _ = both(query, branches)
    assert out[1].isnan().all() and lse[:, 1].isnan().all() and out[2, 0, 1].isnan().all()
    assert torch.equal(out[0], clean[0]) and torch.equal(out[2, 0, 2:], clean[2, 0, 2:])


def test_keys_are_quantised_once_and_with_the_means_at_hand():
    query, branches = shared(torch.bfloat16, "as usual")
    normal, scale = normalize("test", query, branches, None)
    launch = launch_of(query, normal, scale, query, query, "interpreter", fast=True)
    assert launch.kernel is attention_kernel
    assert [x.kernel for x in launch.before] == [quantise_kernel]
    bare = tuple(replace(s, key_affine=None) for s in branches[0].segments)
    normal, scale = normalize("test", query, (Branch(bare),), None)
    launch = launch_of(query, normal, scale, query, query, "interpreter", fast=True)
    assert [x.kernel for x in launch.before] == [stats_kernel, quantise_kernel]
    where_it_pays = launch_of(query, normal, scale, query, query, "sm_100", fast=True)
    assert not where_it_pays.before


def test_every_public_function_takes_it():
    g = torch.Generator().manual_seed(0)
    q, k, v = (features(g, (2, 1, 70, 16), torch.bfloat16) for _ in range(3))
    calls = {
        "attention": lambda **o: styleattn.attention(q, (Branch((Segment(k, v),)),), **o),
        "shared": lambda **o: styleattn.shared_attention(q, k, v, reference_rows=[0, 0], **o),
        "injected": lambda **o: styleattn.injected_attention(q, k, v, content_query=k, **o),
    }
    for name, call in calls.items():
        exactly = call(backend="triton")
        fast, lse = call(backend="triton", precision="fast", return_lse=True)
        want, _ = call(backend="reference", precision="fast", return_lse=True)
        assert relative_error(fast, want) < 0.5 * relative_error(fast, exactly), name
        assert torch.equal(exactly, call(backend="triton", precision="exact"))
        assert lse.shape == (1, 2, 1, 70)
