"""Every backend that runs here against the specification: values, LSE, error budgets, layout,
gradients, torch.compile."""

import math

import pytest
import torch
import torch._dynamo.testing
from hypothesis import HealthCheck, given, settings
from oracles import official_style_aligned
from strategies import calls
from torch.utils._python_dispatch import TorchDispatchMode

import styleattn
from styleattn import Branch, Segment, _ops
from styleattn.branch import normalize
from styleattn.testing import (
    BranchSpec,
    CallSpec,
    SegmentSpec,
    assert_within_error_budget,
    features,
    relative_error,
)

NEG_INF = float("-inf")
BACKENDS = [
    row.name for row in styleattn.backends() if row.available and row.name in ("torch", "cpu")
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
GRID = [(1, 1), (1, 63), (63, 1), (63, 257), (257, 63), (130, 1000)]

backends = pytest.mark.parametrize("backend", BACKENDS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))

MIXTURES = {
    "plain": (BranchSpec(),),
    "folded": (
        BranchSpec(
            segments=(SegmentSpec(affines="kvc"), SegmentSpec(key_rows="holes")), query_affine=True
        ),
    ),
    "joint": (BranchSpec(segments=tuple(SegmentSpec(logit_bias=b) for b in ("", "query", "row"))),),
    "decoupled": (
        BranchSpec(),
        BranchSpec(weight="query"),
        BranchSpec(weight="row", own_query=True),
    ),
    "masked": (
        BranchSpec(
            segments=(SegmentSpec(key_bias="mask", null_keys=16), SegmentSpec(logit_bias="inf"))
        ),
    ),
    "blended": (
        BranchSpec(
            segments=(SegmentSpec(key_rows="one", blend="row", logit_scale="row"),), content="float"
        ),
    ),
}


@backends
@dtypes
@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("shape", GRID, ids=lambda s: f"L{s[0]}-S{s[1]}")
def test_grid(backend, dtype, mixture, shape):
    length, keys = shape
    branches = tuple(
        BranchSpec(
            **{
                **vars(b),
                "segments": tuple(SegmentSpec(**{**vars(s), "keys": keys}) for s in b.segments),
            }
        )
        for b in MIXTURES[mixture]
    )
    dim = {1: 40, 63: 80, 257: 64, 130: 160}[length]
    spec = CallSpec(
        batch=3, length=length, head_dim=dim, branches=branches, dtype=dtype, strided=length == 63
    )
    query, call, scale = spec.build()
    out, lse = styleattn.attention(
        query, call, softmax_scale=scale, return_lse=True, backend=backend
    )
    assert out.stride() == (length * 2 * dim, dim, 2 * dim, 1)
    assert lse.is_contiguous()
    assert_within_error_budget(out, lse, query, call, scale)


@backends
@settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(spec=calls)
def test_any_combination(backend, spec):
    query, call, scale = spec.build()
    out, lse = styleattn.attention(
        query, call, softmax_scale=scale, return_lse=True, backend=backend
    )
    assert_within_error_budget(out, lse, query, call, scale)


FOUND = {  # by the random combinations, as small as they get
    "merged with null keys": CallSpec(
        batch=1, heads=1, length=2, head_dim=8,
        branches=(
            BranchSpec(
                (SegmentSpec(5, affines="k", null_keys=1), SegmentSpec(5, blend="float")),
                query_affine=True,
            ),
        ),
    ),
    "a small share": CallSpec(
        batch=1, heads=1, length=1,
        branches=(
            BranchSpec(
                (SegmentSpec(1, affines="v", logit_bias="float", key_bias="shared", null_keys=1),)
            ),
        ),
        softmax_scale=1.0,
    ),
    "one key": CallSpec(
        batch=2, heads=3, head_dim=64,
        branches=(
            BranchSpec(
                (
                    SegmentSpec(
                        1, "one", logit_bias="float", key_bias="shared", null_keys=16
                    ),
                )
            ),
        ),
        seed=2,
    ),
}  # fmt: skip


@backends
@pytest.mark.parametrize("name", FOUND)
def test_found_at_random(backend, name):
    query, call, scale = FOUND[name].build()
    out, lse = styleattn.attention(
        query, call, softmax_scale=scale, return_lse=True, backend=backend
    )
    assert_within_error_budget(out, lse, query, call, scale)


@backends
def test_shares_of_a_merge_add_up(backend):
    """A log-sum-exp of 90 has no more than 5 digits behind the point: the shares must not need
    them."""
    g = torch.Generator().manual_seed(10)
    q, k = (features(g, (1, 1, 33, 16)) for _ in range(2))
    same = torch.ones(1, 1, 33, 16)
    segments = (Segment(k, same, logit_bias=90.0), Segment(k.flip(2), same, logit_bias=89.0))
    out = styleattn.attention(q, [Branch(segments)], backend=backend)
    assert float((out - 1).abs().max()) <= 4 * torch.finfo(torch.float32).eps


@backends
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("scale, shift", [(1.0, 0.0), (1.0, math.log(2)), (1.1, 0.7)])
@pytest.mark.parametrize("dim", [40, 64])
def test_never_above_the_official_half_formulation(backend, dtype, scale, shift, dim):
    g = torch.Generator().manual_seed(dim)
    q, k, v = (features(g, (4, 2, 257, dim), dtype, means=m) for m in (1.0, 3.0, 0.5))
    rows = torch.tensor([0, 0, 2, 2])
    out = styleattn.shared_attention(
        q, k, v, reference_rows=rows, score_scale=scale, score_shift=shift, backend=backend
    )
    want = official_style_aligned(
        *(x.double() for x in (q, k, v)), score_scale=scale, score_shift=shift
    )
    official = official_style_aligned(q, k, v, score_scale=scale, score_shift=shift)
    assert relative_error(out, want) <= relative_error(official, want)


@backends
@dtypes
@pytest.mark.parametrize(
    "options",
    [{}, {"score_shift": 0.7}, {"score_scale": 0.5}, {"adain_values": True, "score_shift": -1.0}],
)
def test_reference_row_is_plain_self_attention(backend, dtype, options):
    g = torch.Generator().manual_seed(0)
    q, k, v = (features(g, (6, 2, 65, 40), dtype) for _ in range(3))
    rows = torch.tensor([0, 0, 0, 3, 3, -1])
    out = styleattn.shared_attention(q, k, v, reference_rows=rows, backend=backend, **options)
    plain = styleattn.attention(q, [Branch((Segment(k, v),))], backend=backend)
    for row in (0, 3, 5):
        assert torch.equal(out[row], plain[row])
    assert not torch.allclose(out[1].float(), plain[1].float(), atol=1e-2)


@backends
def test_segments_are_a_partition(backend):
    g = torch.Generator().manual_seed(1)
    q, k, v = (features(g, (2, 3, 70, 48)) for _ in range(3))
    one = styleattn.attention(q, [Branch((Segment(k, v),))], backend=backend)
    cut = [Segment(k[:, :, a:b], v[:, :, a:b]) for a, b in ((0, 11), (11, 64), (64, 70))]
    for order in (cut, cut[::-1]):
        torch.testing.assert_close(
            styleattn.attention(q, [Branch(tuple(order))], backend=backend),
            one,
            rtol=1e-5,
            atol=1e-5,
        )
    halves = [Branch((Segment(k, v),), weight=w) for w in (0.25, 0.75)]
    torch.testing.assert_close(
        styleattn.attention(q, halves, backend=backend), one, rtol=1e-5, atol=1e-5
    )


@backends
@dtypes
@pytest.mark.parametrize("keys", [1, 4, 7, 8, 33])
def test_nan_stays_in_its_row(backend, dtype, keys):
    g = torch.Generator().manual_seed(2)
    q = features(g, (3, 2, 9, 40), dtype)
    k, v = (features(g, (3, 2, keys, 40), dtype) for _ in range(2))

    def run():
        call = [Branch((Segment(k, v),))]
        return styleattn.attention(q, call, return_lse=True, backend=backend)

    clean, _ = run()
    for poisoned in (q, k, v):
        before = poisoned[1, 1, 0].clone()
        poisoned[1, 1, 0] = float("nan")
        out, lse = run()
        poisoned[1, 1, 0] = before
        assert torch.isnan(out[1, 1, 0]).all()
        assert torch.isnan(lse[0, 1, 1, 0]) or poisoned is v
        for b, h in ((0, 0), (0, 1), (1, 0), (2, 0), (2, 1)):
            assert torch.equal(out[b, h], clean[b, h])


REMOVED = {
    "masked keys": {"key_bias": torch.tensor([0.0] * 5 + [NEG_INF] * 4)},
    "masked keys of rows": {"key_bias": torch.tensor([[0.0] * 5 + [NEG_INF] * 4] * 3)},
    "segment": {"logit_bias": NEG_INF},
    "segment of a row": {"logit_bias": torch.tensor([0.0, NEG_INF, 0.0])},
    "row": {"rows": torch.tensor([0, -1, 2])},
}


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("what", REMOVED)
def test_what_is_removed_may_hold_anything(backend, what):
    g = torch.Generator().manual_seed(7)
    q, k, v, k2, v2 = (features(g, (3, 2, 9, 16)).requires_grad_() for _ in range(5))

    def run(k2, v2):
        call = [Branch((Segment(k, v), Segment(k2, v2, **REMOVED[what])))]
        out = styleattn.attention(q, call, backend=backend)
        return out, torch.autograd.grad(out.square().sum(), (q, k, v))

    clean = run(k2, v2)
    with torch.no_grad():
        for x in (k2, v2):
            if "keys" in what:
                x[:, :, 5:] = float("nan")
            else:
                x[slice(None) if what == "segment" else 1] = float("nan")
    out, grads = run(k2, v2)
    torch.testing.assert_close(out, clean[0])
    torch.testing.assert_close(grads, clean[1])


@backends
@pytest.mark.parametrize("std", [100.0, 300.0])
def test_fp16_folds_do_not_overflow(backend, std):
    g = torch.Generator().manual_seed(8)
    q, k, v = (features(g, (2, 1, 33, 16), torch.float16) for _ in range(3))
    k[1, :, :, 3] = 1.0
    k[0] = (k[0].float() * std).half()
    out = styleattn.shared_attention(q, k, v, reference_rows=[0, 0], backend=backend)
    want = styleattn.shared_attention(
        *(x.double() for x in (q, k, v)), reference_rows=[0, 0], backend="reference"
    )
    assert torch.isfinite(out).all()
    assert relative_error(out, want) <= torch.finfo(torch.float16).eps


@backends
def test_autocast_changes_nothing(backend):
    g = torch.Generator().manual_seed(9)
    q, k, v = (features(g, (2, 2, 33, 16), means=3.0).requires_grad_() for _ in range(3))

    def run():
        out, lse = styleattn.shared_attention(
            q, k, v, reference_rows=[0, 0], score_shift=0.7, return_lse=True, backend=backend
        )
        return out, lse, torch.autograd.grad(out.square().sum() + lse.sum(), (q, k, v))

    plain = run()
    with torch.autocast("cpu", torch.bfloat16):
        inside = run()
    torch.testing.assert_close(inside, plain, rtol=0, atol=0)


@backends
def test_same_inputs_same_bits(backend):
    g = torch.Generator().manual_seed(3)
    q, k, v = (features(g, (4, 2, 130, 64), torch.bfloat16) for _ in range(3))
    call = {"reference_rows": torch.tensor([0, 0, 2, 2]), "score_shift": 0.5, "backend": backend}
    first = styleattn.shared_attention(q, k, v, **call)
    assert all(torch.equal(first, styleattn.shared_attention(q, k, v, **call)) for _ in range(3))


@backends
@dtypes
def test_statistics(backend, dtype):
    g = torch.Generator().manual_seed(4)
    for shape in ((2, 3, 1, 8), (1, 2, 63, 40), (2, 2, 1000, 64)):
        x = features(g, shape, dtype, means=300.0, strided=shape[2] == 63)
        mean, std = styleattn.token_stats(x, backend=backend)
        want = styleattn.token_stats(x.double(), backend="reference")
        torch.testing.assert_close(mean, want.mean.float(), rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(std, want.std.float(), rtol=1e-4, atol=1e-4)
    huge = torch.full((1, 1, 4096, 8), 6e4, dtype=torch.float16)
    huge[:, :, ::2] = -6e4
    assert torch.isfinite(styleattn.token_stats(huge, backend=backend).std).all()


@backends
def test_empty_batch(backend):
    q, one = torch.zeros(0, 2, 5, 16), torch.zeros(1, 2, 5, 16)
    out, lse = styleattn.attention(
        q, [Branch((Segment(one, one),))], return_lse=True, backend=backend
    )
    assert out.shape == q.shape and lse.shape == (1, 0, 2, 5)


ALL_OPTIONS = CallSpec(
    batch=3,
    length=5,
    head_dim=8,
    branches=(
        BranchSpec(
            segments=(
                SegmentSpec(5, "holes", "kvc", "row", "query", "row", 2, "row"),
                SegmentSpec(4, "one", "", "float", "row", "shared", 0, ""),
            ),
            weight="query", own_query=True, query_affine=True, content="row",
        ),
        BranchSpec(segments=(SegmentSpec(3, "mapped", "kv"),), weight="row"),
    ),
)  # fmt: skip


def leaves(call):
    tensors, layout, numbers = _ops.pack(call)
    found = [t.detach().clone().requires_grad_() if t.is_floating_point() else t for t in tensors]
    return found, _ops.unpack(found, layout, numbers)


def test_gradients_are_exact_for_every_option():
    spec = CallSpec(**{**vars(ALL_OPTIONS), "dtype": torch.float64})
    query, call, scale = spec.build()
    normal, scale = normalize("test", query, call, scale)
    found, call = leaves(normal)
    query = query.requires_grad_()
    inputs = [query, *(t for t in found if t.is_floating_point())]
    assert len(inputs) > 25

    def run(*_):
        return styleattn.attention(
            query, call, softmax_scale=scale, return_lse=True, backend="reference"
        )

    assert torch.autograd.gradcheck(run, inputs, eps=1e-6, atol=1e-6)


@backends
def test_gradients_of_every_backend_agree(backend):
    query, call, scale = ALL_OPTIONS.build()
    results = []
    for name in (backend, "reference"):
        normal, scale = normalize("test", query, call, scale)
        found, copy = leaves(normal)
        leaf = query.clone().requires_grad_()
        out, lse = styleattn.attention(
            leaf, copy, softmax_scale=scale, return_lse=True, backend=name
        )
        (out.square().sum() + lse.sin().sum()).backward()
        results.append(
            [leaf.grad, *(t.grad for t in found if t.is_floating_point() and t.grad is not None)]
        )
    assert len(results[0]) == len(results[1]) > 25
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-4)


def test_gradients_flow_through_statistics_and_affines():
    g = torch.Generator().manual_seed(5)
    q, k, v = (features(g, (4, 1, 6, 8), means=0.5).double().requires_grad_() for _ in range(3))

    def run(q, k, v):
        return styleattn.shared_attention(
            q,
            k,
            v,
            reference_rows=[0, 0, 2, 2],
            adain_values=True,
            score_shift=0.3,
            backend="reference",
        )

    assert torch.autograd.gradcheck(run, (q, k, v), eps=1e-6, atol=1e-5)


@backends
def test_opcheck(backend):
    query, call, scale = ALL_OPTIONS.build()
    normal, scale = normalize("test", query, call, scale)
    tensors, layout, numbers = _ops.pack(normal)
    tensors = [t.requires_grad_() if t.is_floating_point() else t for t in tensors]
    torch.library.opcheck(
        _ops.attention_op,
        (query.requires_grad_(), tensors, layout, numbers, scale, backend, "test", True, False),
    )
    torch.library.opcheck(_ops.token_stats_op, (query.detach(), 1e-5, backend))


class Ops(TorchDispatchMode):
    """Counts our ops while it is on."""

    seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen += func.namespace == "styleattn"
        return func(*args, **(kwargs or {}))


def test_a_call_that_nobody_watches_skips_the_op_and_gives_the_same_bits():
    query, call, scale = ALL_OPTIONS.build()

    def run(q=query):
        return styleattn.attention(q, call, softmax_scale=scale, return_lse=True)

    direct, stats = run(), styleattn.token_stats(query)
    with Ops() as ops:
        watched, seen = run(), styleattn.token_stats(query)
    assert ops.seen == 2
    for mine, other in zip((*direct, *stats), (*watched, *seen), strict=True):
        assert torch.equal(mine, other) and mine.stride() == other.stride()
    with torch.profiler.profile() as profile:
        run()
    assert "styleattn::attention" in {event.key for event in profile.key_averages()}
    assert run(query.clone().requires_grad_())[0].requires_grad
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(_ops, "attention_op", None)
        assert torch.equal(run(query.clone().requires_grad_())[0], direct[0])


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_compiles_to_one_graph_over_steps(backend, dtype):
    g = torch.Generator().manual_seed(6)
    q, k, v = (features(g, (4, 2, 33, 16), dtype, strided=True) for _ in range(3))
    rows = torch.tensor([0, 0, 2, 2])

    def layer(q, k, v, shift):
        out = styleattn.shared_attention(
            q, k, v, reference_rows=rows, score_shift=shift, backend=backend
        )
        return out.transpose(1, 2).reshape(4, 33, 32)

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for step in (0.1, 0.2, 0.3):
        shift = torch.tensor(step)
        torch.testing.assert_close(compiled(q, k, v, shift), layer(q, k, v, shift), rtol=0, atol=0)
    assert counter.frame_count == 1


@backends
def test_compiles_with_other_numbers_and_shapes(backend):
    def layer(q, k, v, shift):
        call = {"reference_rows": [0, 0], "score_shift": shift, "score_scale": 1 + shift}
        return styleattn.shared_attention(q, k, v, backend=backend, **call)

    g = torch.Generator().manual_seed(6)
    torch._dynamo.reset()
    for dynamic in (None, True):
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        for n, shift in ((9, 0.1), (9, 0.2), (16, 0.2), (33, 0.3)):
            q, k, v = (features(g, (2, 2, n, 16)) for _ in range(3))
            want = layer(q, k, v, shift)
            torch.testing.assert_close(compiled(q, k, v, shift), want, rtol=1e-5, atol=1e-5)


@backends
def test_nothing_is_written_to_the_inputs(backend):
    query, call, scale = ALL_OPTIONS.build()
    tensors, _, _ = _ops.pack(normalize("test", query, call, scale)[0])
    before = [t.clone() for t in (query, *tensors)]
    styleattn.attention(query, call, softmax_scale=scale, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip((query, *tensors), before, strict=True))
