"""The kernels as machine code: the same budgets on a GPU, CUDA graphs, torch.compile."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace

import pytest
import torch

import styleattn
from styleattn.branch import Branch, Segment
from styleattn.norms import rms_norm_rotary, shared_group_norm
from styleattn.statistics import adain_to_rows
from styleattn.testing import (
    BranchSpec,
    CallSpec,
    SegmentSpec,
    assert_within_error_budget,
    features,
    relative_error,
)

pytestmark = pytest.mark.gpu
HALF = (torch.float16, torch.bfloat16)
EVERYTHING = (
    SegmentSpec(130, affines="kvc"),
    SegmentSpec(70, key_rows="holes", affines="kc", logit_scale="row", logit_bias="float"),
    SegmentSpec(33, logit_bias="query", key_bias="mask", null_keys=3),
)
LONG = (
    SegmentSpec(640, affines="kc"),
    SegmentSpec(700, key_rows="holes", logit_bias="float"),
    SegmentSpec(600, key_bias="mask"),
)


def moved(x, device="cuda"):
    """Tensors inside calls, on a device; row maps stay on the host."""
    if isinstance(x, torch.Tensor):
        return x.to(device) if x.is_floating_point() else x
    if isinstance(x, tuple):
        return tuple(moved(item, device) for item in x)
    if is_dataclass(x):
        return replace(x, **{f.name: moved(getattr(x, f.name), device) for f in fields(x)})
    return x


def shared(length=300, dim=64, dtype=torch.bfloat16, batch=4, heads=3):
    g = torch.Generator().manual_seed(0)
    qkv = [features(g, (batch, heads, length, dim), dtype, device="cuda") for _ in range(3)]
    return qkv, {"reference_rows": torch.tensor([0, 0, 2, 2]), "score_shift": 0.7}


@pytest.mark.parametrize("dim", [40, 64, 80, 128, 160, 256])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_every_width(dim, dtype):
    spec = CallSpec(3, 2, 130, dim, (BranchSpec(EVERYTHING, query_affine=True),), dtype)
    query, branches, scale = spec.build()
    on_gpu = moved(query), moved(branches)
    out, lse = styleattn.attention(*on_gpu, softmax_scale=scale, return_lse=True, backend="triton")
    assert_within_error_budget(out.cpu(), lse.cpu(), query, branches, scale)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 1000, 4096])
@pytest.mark.parametrize("dtype", HALF)
def test_lengths(length, dtype):
    query, branches, scale = CallSpec(
        2, 2, length, 64, (BranchSpec(EVERYTHING[:2]),), dtype
    ).build()
    out, lse = styleattn.attention(
        moved(query), moved(branches), softmax_scale=scale, return_lse=True, backend="triton"
    )
    assert_within_error_budget(out.cpu(), lse.cpu(), query, branches, scale)


@pytest.mark.parametrize("spread", [1.0, 300.0])
@pytest.mark.parametrize("dim", [40, 64, 80, 128, 160])
@pytest.mark.parametrize("dtype", HALF)
def test_long_keys(dim, dtype, spread):
    """With a running maximum and without; masked keys; a second branch with a loop of its own."""
    specs = (BranchSpec(LONG), BranchSpec((SegmentSpec(530),), weight="query"))
    query, branches, scale = CallSpec(2, 2, 600, dim, specs, dtype).build()
    query = query * spread
    out, lse = styleattn.attention(
        moved(query), moved(branches), softmax_scale=scale, return_lse=True, backend="triton"
    )
    assert_within_error_budget(out.cpu(), lse.cpu(), query, branches, scale)


@pytest.mark.parametrize("dtype", HALF)
def test_decoupled(dtype):
    branches = tuple(BranchSpec((SegmentSpec(n),), weight=w) for n, w in ((77, ""), (16, "query")))
    query, call, scale = CallSpec(2, 2, 300, 64, branches, dtype).build()
    out, lse = styleattn.attention(
        moved(query), moved(call), softmax_scale=scale, return_lse=True, backend="triton"
    )
    assert_within_error_budget(out.cpu(), lse.cpu(), query, call, scale)


@pytest.mark.parametrize("dim", [40, 64, 80, 128, 160])
@pytest.mark.parametrize("dtype", HALF)
def test_fast(dim, dtype):
    """INT8 products, or exact ones where these pay: what INT8 may lose, and what it must be."""
    qkv, knobs = shared(dim=dim, dtype=dtype)
    options = {"return_lse": True, "precision": "fast", **knobs}
    out, lse = styleattn.shared_attention(*qkv, **options, backend="triton")
    want, want_lse = styleattn.shared_attention(*qkv, **options, backend="reference")
    true, _ = styleattn.shared_attention(
        *(x.double() for x in qkv), return_lse=True, **knobs, backend="reference"
    )
    loss = relative_error(want, true)
    assert relative_error(out, true) <= 1.1 * loss + 2 * torch.finfo(dtype).eps
    if not torch.version.hip and torch.cuda.get_device_capability() == (9, 0) and dim in (64, 128):
        assert relative_error(out, want) <= 0.1 * loss + 2 * torch.finfo(dtype).eps
        assert (lse - want_lse).abs().max() < 2e-2


def test_adain_maps():
    x = features(torch.Generator().manual_seed(0), (4, 3, 1000, 64), torch.bfloat16, device="cuda")
    rows = torch.tensor([0, 0, -1, 2], device="cuda")
    got, aim = adain_to_rows(x, rows, eps=1e-5, backend="triton")
    want, mean = adain_to_rows(x, rows, eps=1e-5, backend="reference")
    for a, b in ((got.scale, want.scale), (got.shift, want.shift), (aim, mean)):
        assert relative_error(a, b) < 1e-5
    assert (got.scale[[0, 2]] == 1).all() and (got.shift[[0, 2]] == 0).all()


def test_statistics():
    x = features(torch.Generator().manual_seed(0), (2, 3, 1000, 64), torch.bfloat16, device="cuda")
    got = styleattn.token_stats(x, backend="triton")
    want = styleattn.token_stats(x.double().cpu())
    for a, b in zip(got, want, strict=True):
        assert relative_error(a.cpu(), b) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_norms(dtype):
    x = features(torch.Generator().manual_seed(0), (2, 5, 100, 128), dtype, device="cuda")
    turns = torch.rand(100, 64, device="cuda").repeat_interleave(2, 1)
    call = {"eps": 1e-6, "rotary": (turns.cos(), turns.sin())}
    got = rms_norm_rotary(x, backend="triton", **call)
    want = rms_norm_rotary(x.double(), backend="reference", **call)
    rounding = max(2e-6, 1.01 * relative_error(want.to(dtype), want))
    assert relative_error(got, want) <= rounding
    for last in (False, True):
        image = x.reshape(2, 64, 25, 40).contiguous(
            memory_format=torch.channels_last if last else torch.contiguous_format
        )
        rows = [(torch.tensor([0, 0]), 1.0)]
        got = shared_group_norm(image, 32, rows, silu=True, backend="triton")
        want = shared_group_norm(image.double(), 32, rows, silu=True, backend="reference")
        rounding = max(2e-6, 1.01 * relative_error(want.to(dtype), want))
        assert got.stride() == image.stride() and relative_error(got, want) <= rounding


def test_same_inputs_same_bits():
    qkv, knobs = shared()
    one, two = (styleattn.shared_attention(*qkv, **knobs, backend="triton") for _ in range(2))
    assert torch.equal(one, two)


def test_a_graph_replays_on_new_inputs():
    """The operation in a CUDA graph: nothing is copied from the host once it is warm."""
    qkv, _ = shared()
    rows = torch.tensor([-1, 0, -1, 2])
    branch = Branch((Segment(*qkv[1:]), Segment(*qkv[1:], rows=rows, logit_bias=0.7)))

    def call():
        return styleattn.attention(qkv[0], (branch,), backend="triton")

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    for x in qkv:
        x.mul_(0.5)
    graph.replay()
    assert torch.equal(out, call())


def test_shared_attention_in_a_graph():
    qkv, knobs = shared()

    def call():
        return styleattn.shared_attention(*qkv, **knobs, backend="triton")

    want = call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    graph.replay()
    assert torch.equal(out, want)


def test_compiled():
    qkv, knobs = shared()
    compiled = torch.compile(
        lambda *t: styleattn.shared_attention(*t, **knobs, backend="triton"), fullgraph=True
    )
    want = styleattn.shared_attention(*qkv, **knobs, backend="triton")
    assert relative_error(compiled(*qkv), want.double()) < 1e-2


def test_gradients():
    qkv, knobs = shared(dtype=torch.float32, length=70)
    seed = torch.randn_like(qkv[0])

    def grads(backend):
        leaves = [t.clone().requires_grad_() for t in qkv]
        out = styleattn.shared_attention(*leaves, **knobs, backend=backend)
        return torch.autograd.grad((out * seed).sum(), leaves)

    for got, want in zip(grads("triton"), grads("reference"), strict=True):
        assert relative_error(got, want.double()) < 1e-4


@pytest.mark.parametrize("spread", [0.1, 1.0, 200.0])
def test_logits_within_the_bound_and_beyond(spread):
    segments = (SegmentSpec(600), SegmentSpec(700, affines="kc", logit_bias="float"))
    spec = CallSpec(2, 2, 300, 128, (BranchSpec(segments),), torch.bfloat16)
    query, branches, scale = spec.build()
    query = query * spread
    out, lse = styleattn.attention(
        moved(query), moved(branches), softmax_scale=scale, return_lse=True, backend="triton"
    )
    assert_within_error_budget(out.cpu(), lse.cpu(), query, branches, scale)
