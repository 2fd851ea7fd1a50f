"""The fused kernels against the specification in fp64, on poisoned memory."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import strategies
import torch
from hypothesis import example, given, settings
from kernel_checks import adain_call, check, one, run, within_budget
from oracles import official_style_aligned

import styleattn
from styleattn.branch import Affine, Branch, Segment, normalize
from styleattn.kernels import device
from styleattn.kernels.attention import (
    attention_forward,
    attention_kernel,
    launch_of,
    unsupported_reasons,
)
from styleattn.kernels.decoupled import decoupled_kernel
from styleattn.testing import (
    BranchSpec,
    CallSpec,
    SegmentSpec,
    eager,
    exact,
    features,
    relative_error,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
EXAMPLES = 12 if settings().max_examples == 50 else settings().max_examples  # all with `make fuzz`
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy under the interpreter


SPECS = {
    "two segments": one(),
    "one row of keys": one(key_rows="one"),
    "row map": one(key_rows="mapped"),
    "removed rows": one(key_rows="holes"),
    "key fold": one(affines="k"),
    "key fold with center": one(affines="kc"),
    "value fold on the second": one(affines="v"),
    "value folds on both": BranchSpec(
        (SegmentSpec(33, affines="kv"), SegmentSpec(40, affines="v"))
    ),
    "scale": one(logit_scale="float"),
    "scale per row": one(logit_scale="row"),
    "bias": one(logit_bias="float"),
    "bias per row": one(logit_bias="row"),
    "bias per query": one(logit_bias="query"),
    "bias of -inf for some queries": one(logit_bias="inf"),
    "bias of -inf": one(logit_bias="gone"),
    "key bias": one(key_bias="shared"),
    "key bias per row": one(key_bias="row"),
    "key mask": one(key_bias="mask"),
    "null keys": one(null_keys=5, affines="v"),
    "blend": one(blend="float"),
    "blend per row": one(blend="row", affines="kvc"),
    "weight of zero": replace(one(), weight="zero"),
    "weight per row": replace(one(), weight="row"),
    "weight per query": replace(one(), weight="query"),
    "own query": replace(one(), own_query=True),
    "query fold": replace(one(affines="kc"), query_affine=True),
    "content query": replace(one(), content="float"),
    "content query per row": replace(one(affines="k"), content="row", query_affine=True),
    "nothing left": BranchSpec((SegmentSpec(5, logit_bias="gone"),)),
    "only null keys": BranchSpec((SegmentSpec(5, logit_bias="gone", null_keys=3),)),
}


@pytest.mark.parametrize("name", SPECS)
def test_every_feature(name):
    dtype = DTYPES[list(SPECS).index(name) % 3]
    spec = CallSpec(2, 1, 5, 16, (SPECS[name],), dtype, strided=True, seed=3)
    check(*spec.build())


@pytest.mark.parametrize(
    ("length", "keys", "head_dim"),
    [
        (1, 1, 8), (63, 65, 16), (65, 63, 40), (130, 130, 64), (1, 130, 80), (65, 1, 96),
        (63, 96, 100), (65, 130, 128), (63, 63, 160), (1, 65, 256),
    ],
)  # fmt: skip
def test_odd_shapes(length, keys, head_dim):
    dtype = DTYPES[length % 3]
    branch = BranchSpec((SegmentSpec(keys, affines="kvc", key_rows="one"),), query_affine=True)
    check(*CallSpec(1, 1, length, head_dim, (branch,), dtype, strided=True).build())


def test_several_branches_with_own_everything():
    branches = (
        BranchSpec((SegmentSpec(70, affines="kvc"),), weight="query", query_affine=True),
        BranchSpec((SegmentSpec(33, null_keys=2),), weight="zero", own_query=True),
        BranchSpec((SegmentSpec(5), SegmentSpec(40, key_rows="holes")), weight="row"),
    )
    for dtype in DTYPES:
        check(*CallSpec(2, 2, 9, 40, branches, dtype, strided=True).build())


def test_four_branches_of_four_segments():
    segments = (
        SegmentSpec(3),
        SegmentSpec(40, affines="kv"),
        SegmentSpec(7, key_rows="holes", affines="kvc"),
        SegmentSpec(2, logit_bias="inf"),
    )
    branches = tuple(
        BranchSpec(segments, weight=w, query_affine=w == "row")
        for w in ("", "row", "query", "zero")
    )
    check(*CallSpec(2, 1, 5, 16, branches).build())


@pytest.mark.parametrize("scale", [-0.7, 0.0, 3.0])
def test_any_softmax_scale(scale):
    spec = CallSpec(2, 1, 5, 16, (one(affines="kc", logit_bias="inf"),), softmax_scale=scale)
    for dtype in DTYPES[::2]:
        check(*replace(spec, dtype=dtype).build())


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=["float16", "bfloat16"])
def test_never_above_the_official_half_formulation(dtype):
    g = torch.Generator().manual_seed(7)
    q, k, v = (features(g, (4, 1, 65, 40), dtype, means=m) for m in (1.0, 3.0, 0.5))
    rows, knobs = torch.tensor([0, 0, 2, 2]), {"score_scale": 1.1, "score_shift": 0.7}
    out = styleattn.shared_attention(q, k, v, reference_rows=rows, backend="triton", **knobs)
    want = official_style_aligned(*(x.double() for x in (q, k, v)), **knobs)
    official = official_style_aligned(q, k, v, **knobs)
    assert relative_error(out, want) <= relative_error(official, want)


# One query, one key: eager's error in its own order of the channels is luck.
LUCKY = SegmentSpec(
    1, "mapped", "kv", logit_scale="float", logit_bias="float", null_keys=16, blend="float"
)


@settings(max_examples=EXAMPLES)
@example(CallSpec(1, 1, 1, 40, (BranchSpec((LUCKY,)),), seed=3))
@given(strategies.calls)
def test_random_combinations(spec):
    spec = replace(spec, batch=min(spec.batch, 2), heads=1, branches=spec.branches[:2])
    within_budget(*spec.build())


DECOUPLED = {
    "plain": (SegmentSpec(7), SegmentSpec(4)),
    "rows": (SegmentSpec(7, key_rows="one"), SegmentSpec(4, key_rows="holes")),
    "numbers": (SegmentSpec(7, logit_scale="row"), SegmentSpec(4, logit_bias="row")),
    "keys": (SegmentSpec(77, key_bias="mask"), SegmentSpec(16, null_keys=3, key_bias="row")),
    "gone": (SegmentSpec(7), SegmentSpec(4, logit_bias="gone", null_keys=1), SegmentSpec(9)),
}  # fmt: skip


@pytest.mark.parametrize("name", DECOUPLED)
def test_decoupled_in_one_tile(name):
    weights = ("", "query", "zero")
    branches = tuple(
        BranchSpec((s,), weight=w) for s, w in zip(DECOUPLED[name], weights, strict=False)
    )
    dtype = DTYPES[len(name) % 3]
    query, call, scale = CallSpec(2, 1, 9, 40, branches, dtype, strided=True).build()
    normal, sigma = normalize("test", query, call, scale)
    out, lse = torch.empty_like(query), torch.empty(len(call), *query.shape[:3])
    launch = launch_of(query, normal, sigma, out, lse, "interpreter")
    assert launch.kernel is decoupled_kernel
    check(query, call, scale)


def test_long_keys_are_not_one_tile():
    query, call, _ = CallSpec(branches=(BranchSpec((SegmentSpec(77), SegmentSpec(64))),)).build()
    normal, sigma = normalize("test", query, call, None)
    launch = launch_of(query, normal, sigma, query, query, "interpreter")
    assert launch.kernel is attention_kernel


def test_centered_folds_are_more_accurate_than_eager():
    query, branches = adain_call(torch.bfloat16)
    expected, _ = exact(query, branches)
    out, _ = check(query, branches)
    plain = tuple(
        replace(s, key_affine=replace(s.key_affine, center=None)) for s in branches[0].segments
    )
    loose, _ = run(query, (Branch(plain),))
    error = relative_error(out, expected)
    assert error < 0.6 * relative_error(eager(query, branches)[0], expected)
    assert error < 0.6 * relative_error(loose, expected)


def test_reference_row_is_plain_attention_to_the_bit():
    query, branches = adain_call(torch.float16)
    both, lse = run(query, branches)
    alone, lse_alone = run(query, (Branch(branches[0].segments[:1]),))
    assert torch.equal(both[0], alone[0]) and torch.equal(lse[:, 0], lse_alone[:, 0])
    assert not torch.equal(both[1], alone[1])


def test_folded_half_query_does_not_overflow():
    query, branches = CallSpec(1, 1, 5, 40, (one(),), torch.float16, means=0.1).build()[:2]
    huge = Affine(torch.full((1, 1, 40), 1e5), torch.zeros(1, 1, 40))
    segments = tuple(replace(s, key_affine=huge, logit_scale=1e-5) for s in branches[0].segments)
    out, _ = run(query, (Branch(segments),))
    expected, _ = exact(query, (Branch(segments),))
    assert relative_error(out, expected) < 2e-3


def test_nan_stays_in_its_row():
    query, branches, _ = CallSpec(3, 1, 5, 16, (one(),)).build()
    clean, _ = run(query, branches)
    branches[0].segments[1].key[1] = math.nan
    out, lse = run(query, branches)
    assert out[1].isnan().all() and lse[:, 1].isnan().all()
    assert torch.equal(out[::2], clean[::2])


def test_removed_keys_are_not_read():
    query, branches, _ = CallSpec(2, 1, 5, 16, (one(),)).build()
    first, second = branches[0].segments
    alone, _ = run(query, (Branch((first,)),))
    poison = replace(second, key=second.key * math.nan, value=second.value * math.nan)
    gone = torch.full((2,), -math.inf)
    for removed in (
        replace(poison, rows=torch.tensor([-1, -1])),
        replace(poison, logit_bias=-math.inf),
        replace(poison, logit_bias=gone),
    ):
        assert relative_error(run(query, (Branch((first, removed)),))[0], alone) < 1e-6


@pytest.mark.parametrize("keys", [20, 70, 300])
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float16", "bfloat16"])
def test_masked_keys_may_hold_anything(keys, dtype):
    """Short segments in one tile, with and without a step of their own, and long ones."""
    query, branches, _ = CallSpec(2, 1, 5, 16, (BranchSpec((SegmentSpec(keys),)),), dtype).build()
    (segment,) = branches[0].segments
    mask = torch.zeros(2, keys)
    mask[0, keys // 2 :], mask[1, ::3] = -math.inf, -math.inf
    gone = (mask == -math.inf)[:, None, :, None]
    masked = replace(segment, key_bias=mask)
    poison = replace(
        masked,
        key=segment.key.masked_fill(gone, math.nan),
        value=segment.value.masked_fill(gone, math.inf),
    )
    for others in ((), (Branch((segment,)),)):
        want, want_lse = run(query, (Branch((masked,)), *others))
        out, lse = run(query, (Branch((poison,)), *others))
        torch.testing.assert_close(out, want, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(lse, want_lse)


def test_a_weight_of_zero_silences_even_nan():
    query, branches, _ = CallSpec(1, 1, 5, 16, (BranchSpec(), BranchSpec())).build()
    branches[1].segments[0].value.fill_(math.nan)
    out, _ = run(query, (branches[0], replace(branches[1], weight=0.0)))
    assert torch.isfinite(out).all()


def test_same_inputs_same_bits():
    call = CallSpec(2, 2, 9, 40, (one(key_rows="holes", affines="kvc"),), torch.bfloat16).build()
    first, second = run(*call), run(*call)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_empty_batch():
    query, branches, _ = CallSpec(1, 2, 5, 16).build()
    segment = branches[0].segments[0]
    out, lse = run(query[:0], (Branch((segment,)),))
    assert out.shape == (0, 2, 5, 16) and lse.shape == (1, 0, 2, 5)


def test_rows_with_most_work_come_first():
    query, branches = adain_call(torch.float32)
    normal, sigma = normalize("test", query, branches, None)
    launch = launch_of(query, normal, sigma, query, query, "interpreter")
    order = launch.args[2]
    assert order.tolist()[:2] == [1, 0]


def test_every_reason_at_once(monkeypatch):
    query = torch.empty(70000, 1, 1, 300, dtype=torch.float64)
    segment = Segment(query[:1], query[:1])
    branches = (Branch((segment,) * 65),)
    monkeypatch.setattr(device, "interpreted", lambda: False)
    found = "\n".join(unsupported_reasons(query, branches))
    for part in ("CPU tensors", "float64", "head_dim is 300", "batch is 70000", "65 segments"):
        assert part in found
    with pytest.raises(ValueError, match="CPU tensors"):
        attention_forward(query, branches, 1.0)
