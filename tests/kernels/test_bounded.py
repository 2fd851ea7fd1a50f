"""The softmax without a running maximum, biases far away, and keys that are blended before."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import triton.language as tl
from kernel_checks import adain_call, check, one, run

from styleattn.branch import Affine, Branch, Segment, normalize
from styleattn.kernels import attention, planning
from styleattn.kernels.attention import launch_of
from styleattn.testing import BranchSpec, CallSpec, SegmentSpec, relative_error

LOG2E = 1 / math.log(2)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy under the interpreter


def loud(spread):
    """A bfloat16 call whose logits reach as far as `spread` says."""
    spec = CallSpec(
        2, 1, 70, 40, (one(affines="kc", logit_bias="float"),), torch.bfloat16, means=0.5
    )
    query, branches, scale = spec.build()
    return query * spread, branches, scale


@pytest.fixture
def both_ways(monkeypatch):
    """A call as it is and with a running maximum: out, lse of each, checked."""

    def run_both(*call):
        found = check(*call)
        with monkeypatch.context() as m:
            m.setattr(attention, "BELOW", tl.constexpr(-1e3))
            return *found, *check(*call)

    return run_both


@pytest.mark.parametrize("spread", [0.1, 1.0, 6.0, 200.0])
def test_no_running_maximum_where_logits_are_bounded(spread, both_ways):
    """Whichever way a tile goes, it is right; small logits go below a maximum that stays."""
    out, lse, running, running_lse = both_ways(*loud(spread))
    assert torch.equal(out, running) == (spread > 20)
    assert relative_error(lse, running_lse.double()) < 1e-4


@pytest.mark.parametrize("dim", [40, 64])
@pytest.mark.parametrize("blend", [None, 0.5])
def test_a_mean_that_keys_share_is_not_what_bounds_them(blend, dim, both_ways):
    """It moves all logits of a query alike, here by hundreds."""
    g = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 1, 70, dim, generator=g) for _ in range(3))
    key = (key + 200 * torch.randn(1, 1, 1, dim, generator=g)).bfloat16()
    query, value = query.bfloat16(), value.bfloat16()
    assert float((query.float() @ key.float().mT).abs().max()) * dim**-0.5 > 300
    own = {} if blend is None else {"own_key": key.flip(0), "own_value": value, "kv_blend": blend}
    out, lse, running, running_lse = both_ways(query, (Branch((Segment(key, value, **own),)),))
    assert not torch.equal(out, running)
    assert relative_error(lse, running_lse.double()) < 1e-4


@pytest.mark.parametrize("far", [-400.0, -90.0, 90.0, 400.0])
def test_a_maximum_that_stays_follows_segments_upwards(far, both_ways):
    """One segment far above or below those around it, further than exponentials reach."""
    spec = BranchSpec((SegmentSpec(70), SegmentSpec(90), SegmentSpec(80)))
    query, branches, scale = CallSpec(2, 1, 9, 40, (spec,), torch.bfloat16).build()
    first, second, third = branches[0].segments
    call = query, (Branch((first, replace(second, logit_bias=far), third)),), scale
    out, lse, running, running_lse = both_ways(*call)
    assert not torch.equal(out, running)
    assert relative_error(lse, running_lse.double()) < 1e-4


BIASES = {
    "small": lambda b: b,
    "a mask of large numbers": lambda b: torch.where(b > 0, b, -1e30),
    "a mask": lambda b: torch.where(b > 0, b, -math.inf),
    "high": lambda b: b + 3e4,
    "nothing left in a row": lambda b: b.index_fill(0, torch.tensor([len(b) - 1]), -math.inf),
}


@pytest.mark.parametrize("rows", ["", "holes"])
@pytest.mark.parametrize("kind", BIASES)
def test_no_running_maximum_with_a_bias_for_each_key(kind, rows, both_ways):
    """The highest bias of a row takes the place of its maximum."""
    spec = CallSpec(2, 1, 70, 40, (one(key_bias="row", key_rows=rows),), torch.bfloat16, means=0.5)
    query, branches, scale = spec.build()
    first, second = branches[0].segments
    biased = replace(second, key_bias=BIASES[kind](second.key_bias))
    for segments in ((first, biased), (biased,)):
        out, lse, running, running_lse = both_ways(query, (Branch(segments),), scale)
        if segments == (biased,) and kind == "small":
            assert not torch.equal(out, running)
        finite = running_lse.isfinite()
        assert torch.equal(finite, lse.isfinite())
        assert relative_error(lse[finite], running_lse[finite].double()) < 1e-4


def test_blended_keys_are_written_once():
    """The launch before writes what eager PyTorch blends, its reach, and leaves removed rows."""
    spec = BranchSpec(
        (SegmentSpec(33), SegmentSpec(170, blend="row", key_rows="holes", key_bias="row"))
    )
    query, branches, scale = CallSpec(3, 2, 5, 40, (spec,), torch.bfloat16, seed=2).build()
    normal, sigma = normalize("test", query, branches, scale)
    launch = launch_of(query, normal, sigma, query, query, "interpreter")
    segment = normal[0].segments[1]
    (found,) = (s for s in launch.args[1][0].segments if s.length == segment.key.shape[2])
    for before in launch.before:
        before.run(query.device)
    for rows, theirs, own in (
        (found.key, segment.key, segment.own_key),
        (found.value, segment.value, segment.own_value),
    ):
        for b, r in enumerate(segment.rows.tolist()):
            lam = float(segment.kv_blend[b])
            want = lam * theirs[r].float() + (1 - lam) * own[b].float()
            assert r < 0 or torch.equal(rows.pointer[b], want.to(query.dtype))
    kept = [b if r >= 0 else -1 for b, r in enumerate(segment.rows.tolist())]
    assert -1 in kept and found.rows[:3].tolist() == kept
    for b, r in enumerate(segment.rows.tolist()):
        assert r < 0 or torch.equal(found.key_bias[b], segment.key_bias[r] * LOG2E)
    reach, keys = found.reach.pointer, found.key.pointer.float()
    alive = torch.tensor(kept) >= 0
    assert found.reach.anchored is None  # keys with a bias each have no anchor
    seen = keys.masked_fill((found.key_bias == -math.inf)[:, None, :, None], 0.0)
    assert torch.allclose(
        reach.amax(-1).sqrt()[alive], seen.norm(dim=-1).amax(-1)[alive], rtol=1e-5
    )


def test_blended_rows_on_the_device(monkeypatch):
    """Row maps that the host does not read."""
    spec = one(blend="float", key_rows="holes", key_bias="row")
    query, branches, scale = CallSpec(3, 2, 5, 40, (spec,), seed=2).build()
    assert -1 in branches[0].segments[1].rows
    want, _ = check(query, branches, scale)
    for name in ("add", "keep"):
        monkeypatch.setattr(planning._Maps, name, lambda self, segment: None)
    out, _ = run(query, branches, scale)
    assert torch.equal(out, want)


def test_longest_branch_first():
    """The order of branches is that of the work; what comes back is in the order of the call."""
    short, long = BranchSpec((SegmentSpec(9),)), BranchSpec((SegmentSpec(150),))
    query, branches, scale = CallSpec(2, 1, 5, 40, (short, long), torch.float32).build()
    normal, sigma = normalize("test", query, branches, scale)
    launch = launch_of(query, normal, sigma, query, query, "interpreter")
    assert [b.segments[0].length for b in launch.args[1]] == [150, 9]
    check(query, branches, scale)


@pytest.mark.parametrize("far", [104.0, 30.0, -104.0])
def test_merged_sums_need_no_true_maxima(far):
    """Below a maximum that stays, what is called a maximum is not one: two value folds, the content
    far above the one and far below the other."""
    head = torch.zeros(1, 1, 16)
    head[..., 0] = 1
    query = head.expand(1, 1, 9, 16).bfloat16()
    key = (8 * 54 * head).expand(1, 1, 70, 16).bfloat16()
    same = Affine(torch.ones(1, 1, 16), torch.zeros(1, 1, 16))
    one = Segment(key, torch.ones_like(key), value_affine=same)
    other = Segment(-key, -torch.ones_like(key), value_affine=same, logit_bias=far)
    check(query, (Branch((one, other)),), 1 / 8)


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("far", [-65504.0, -1e9, -1e30, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("each", ["call", "row", "query"])
def test_segments_far_below_the_others(each, far, dtype):
    """A finite bias, however low, leaves the segments before and after as they are."""
    spec = BranchSpec((SegmentSpec(70), SegmentSpec(70), SegmentSpec(40)))
    query, branches, scale = CallSpec(2, 1, 5, 16, (spec,), dtype).build()
    first, second, third = branches[0].segments
    shape = {"row": (2,), "query": (2, 5)}.get(each)
    low = replace(second, logit_bias=far if shape is None else torch.full(shape, far))
    check(query * 3, (Branch((first, low, third)),), scale)
    alone, _ = run(query, (Branch((low,)),), scale)  # fp64 itself loses the logits beside it
    plain, _ = run(query, (Branch((second,)),), scale)
    assert relative_error(alone, plain.double()) <= torch.finfo(dtype).eps


@pytest.mark.parametrize("keys", [(20, 30), (70, 90)])
def test_a_bias_that_is_nan_is_seen(keys):
    """In one tile and in several: of its row, and of no other."""
    spec = BranchSpec(tuple(SegmentSpec(n) for n in keys))
    query, branches, scale = CallSpec(2, 1, 9, 16, (spec,), torch.float32).build()
    first, second = branches[0].segments
    clean, _ = run(query, branches, scale)
    bias = torch.tensor([0.0, math.nan])
    out, lse = run(query, (Branch((first, replace(second, logit_bias=bias))),), scale)
    assert torch.equal(out[0], clean[0])
    assert out[1].isnan().all() and lse[:, 1].isnan().all()


def test_dead_queries_next_to_high_biases_of_keys():
    spec = BranchSpec((SegmentSpec(33), SegmentSpec(70, logit_bias="inf")))
    query, branches, scale = CallSpec(2, 1, 9, 16, (spec,), torch.float32).build()
    first, second = branches[0].segments
    high = replace(second, key_bias=torch.full((70,), 1e5))
    check(query, (Branch((first, high)),), scale)


def test_bounded_rows_next_to_dead_and_nan_ones():
    query, branches, scale = loud(1.0)
    first, second = branches[0].segments
    clean, _ = run(query, branches, scale)
    second.key[1, :, 3] = math.nan
    holes = (Branch((first, replace(second, rows=torch.tensor([0, 1])))),)
    out, _ = run(query, holes, scale)
    assert torch.equal(out[0], clean[0]) and out[1].isnan().all()
    query[0, 0, 5] = math.inf
    out, _ = run(query, branches, scale)
    assert torch.equal(out[0, :, 64:], clean[0, :, 64:])  # another tile


def test_reach_is_found_once_for_shared_keys():
    query, branches = adain_call(torch.bfloat16)
    normal, sigma = normalize("test", query, branches, None)
    launch = launch_of(query, normal, sigma, query, query, "interpreter")
    (before,) = launch.before
    before.run(query.device)
    reach = launch.args[1][0].segments[1].reach.pointer
    key = branches[0].segments[0].key.float()
    away = (key - key[:, :, :1]).norm(dim=-1)
    assert torch.allclose(reach.amax(-1).sqrt(), away.amax(-1), rtol=1e-6)
    halves = normalize("test", query.half(), adain_call(torch.float16)[1], None)
    assert not launch_of(query.half(), *halves, query, query, "interpreter").before


@pytest.mark.parametrize("dim", [40, 128, 160])
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float16", "bfloat16"])
def test_sums_of_branches_in_memory(dtype, dim):
    """Several branches of wide heads, one of which adds nothing to the output: what the others sum
    up to is in memory while the next is computed."""
    lengths = ((70,), (9, 33), (90,), (50,))
    specs = tuple(BranchSpec(tuple(map(SegmentSpec, n)), weight="query") for n in lengths)
    query, branches, scale = CallSpec(2, 1, 9, dim, specs, dtype).build()
    silent = replace(branches[2], weight=0.0)
    for chosen in (branches, (*branches[:2], silent, branches[3]), (silent, branches[0])):
        check(query, chosen, scale)
    normal, sigma = normalize("test", query, (*branches[:2], silent, branches[3]), scale)
    lse = torch.empty(4, *query.shape[:3])
    launch = launch_of(query, normal, sigma, query, lse, "interpreter")
    held = [(b.gets is not None, b.puts is not None) for b in launch.args[1]]
    wide = [(False, False), (False, True), (True, True), (True, False)]
    assert held == (wide if dim >= 128 else [(False, False)] * 4)


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("rows", ["", "holes"])
@pytest.mark.parametrize("bias", ["row", "mask"])
def test_keys_that_many_queries_read_are_cleaned_once(bias, rows, dtype):
    """What a bias removes is written as zeros by a launch before, and may hold anything."""
    spec = one(key_bias=bias, key_rows=rows)
    spec = BranchSpec((spec.segments[0], replace(spec.segments[1], keys=150)))
    query, branches, scale = CallSpec(2, 1, 600, 40, (spec,), dtype).build()
    first, second = branches[0].segments
    normal, sigma = normalize("test", query, branches, scale)
    lse = torch.empty(1, *query.shape[:3])
    launch = launch_of(query, normal, sigma, query, lse, "interpreter")
    assert [s.clean for s in launch.args[1][0].segments] == [None, 1]
    few = launch_of(query[:, :, :500], normal, sigma, query, lse, "interpreter")
    assert [s.clean for s in few.args[1][0].segments] == [None, None]
    out, _ = check(query, branches, scale)
    removed = second.key_bias == -math.inf
    removed = removed[:, None, :, None] if removed.ndim == 2 else removed[:, None]
    poison = replace(
        second,
        key=second.key.masked_fill(removed, math.nan),
        value=second.value.masked_fill(removed, math.inf),
    )
    found, _ = run(query, (Branch((first, poison)),), scale)
    assert removed.any() == (bias == "mask") and torch.equal(found, out)


@pytest.mark.parametrize("length", [9, 600])
@pytest.mark.parametrize("keys", [20, 70, 150])
def test_the_lowest_biases_remove_nothing(keys, length):
    """Next to them logits are nothing in fp32: what is left is the mean of the values."""
    spec = BranchSpec((SegmentSpec(keys),))
    query, branches, scale = CallSpec(2, 1, length, 40, (spec,), torch.float32).build()
    (segment,) = branches[0].segments
    low = replace(segment, key_bias=torch.full((keys,), torch.finfo(torch.float32).min))
    out, _ = run(query, (Branch((low,)),), scale)
    mean = segment.value.double().mean(2, keepdim=True).expand(out.shape)
    assert relative_error(out, mean) < 1e-6


@pytest.mark.parametrize("length", [9, 600])
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float16", "bfloat16"])
def test_one_row_of_keys_with_a_mask_for_each(dtype, length):
    """Expanded keys are one row in memory, and what each mask leaves of them is not."""
    spec = BranchSpec((SegmentSpec(150, key_bias="mask"),))
    query, branches, scale = CallSpec(2, 1, length, 40, (spec,), dtype).build()
    (segment,) = branches[0].segments
    bias = torch.full((2, 150), -math.inf)
    bias[0, :40], bias[1, 40:] = 0.0, 0.0
    key, value = segment.key[:1].clone(), segment.value[:1]
    key[:, :, 40:] *= 40  # out of the bound, where row 0 does not look
    one_row = replace(
        segment, key=key.expand(2, -1, -1, -1), value=value.expand(2, -1, -1, -1), key_bias=bias
    )
    check(query, (Branch((one_row,)),), scale)


def test_one_mask_for_keys_that_every_row_blends():
    spec = BranchSpec((SegmentSpec(150, key_bias="mask", blend="float"),))
    query, branches, scale = CallSpec(3, 1, 9, 40, (spec,), torch.bfloat16).build()
    (segment,) = branches[0].segments
    bias = torch.zeros(1, 150)
    bias[:, ::2] = -math.inf
    shared = replace(segment, key=segment.key[:1], value=segment.value[:1], rows=None)
    for each in (bias, bias[0]):
        check(query, (Branch((replace(shared, key_bias=each + 3e4),)),), scale)
