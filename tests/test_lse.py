"""The log-sum-exp in half precision: within 1e-3 of fp64, though folded queries are rounded."""

import math

import pytest
import torch

import styleattn
from styleattn import _ops
from styleattn.branch import Affine, Branch, Segment
from styleattn.testing import features, largest_difference

RUNS = [
    (row.name, dtype)
    for row in styleattn.backends()
    if row.available and row.name != "reference"
    for dtype in (torch.float16, torch.bfloat16)
    if not (row.name == "triton" and dtype == torch.bfloat16)  # the interpreter cannot
]
runs = pytest.mark.parametrize("backend, dtype", RUNS)
ROWS = torch.tensor([0, 0, 2, -1])


def shared(q, k, v, more, backend):
    return styleattn.shared_attention(
        q, k, v, reference_rows=ROWS, score_shift=0.7, return_lse=True, backend=backend
    )


def injected(q, k, v, more, backend):
    own = {"own_key": more[1], "own_value": more[2], "kv_blend": 0.6}
    return styleattn.injected_attention(
        q, k, v, content_query=more[0], rows=[1, 0, -1, 3], return_lse=True, backend=backend, **own
    )


def one_style(q, k, v, more, backend):
    own = {"own_key": more[1], "own_value": more[2], "kv_blend": 0.6}
    mask = torch.linspace(-1, 1, k.shape[2])[None]
    return styleattn.injected_attention(
        q, k[:1], v[:1], key_bias=mask, return_lse=True, backend=backend, **own
    )


def scaled(q, k, v, more, backend):
    alpha, beta = torch.tensor([0.5, 1.0, 1.3, 2.0]), torch.tensor([0.1, float("-inf"), 0.0, 1.0])
    mask = torch.zeros(k.shape[2]).index_fill(0, torch.tensor([0]), float("-inf"))
    segments = (
        Segment(k, v, logit_scale=alpha, key_bias=mask, null_keys=3),
        Segment(more[1], more[2], logit_bias=beta),
    )
    return styleattn.attention(q, [Branch(segments)], return_lse=True, backend=backend)


@runs
@pytest.mark.parametrize("call", [shared, injected, one_style, scaled])
def test_within_a_thousandth(backend, dtype, call):
    g = torch.Generator().manual_seed(1)
    q, k, v, *more = (features(g, (4, 1, 17, 16), dtype, means=3.0) for _ in range(6))
    _, lse = call(q, k, v, more, backend)
    q, k, v, *more = (x.double() for x in (q, k, v, *more))
    _, want = call(q, k, v, more, "reference")
    assert torch.equal(lse == float("-inf"), want == float("-inf"))
    assert largest_difference(lse, want) <= 1e-3


@pytest.mark.parametrize("backend", [name for name, dtype in RUNS if dtype == torch.float16])
@pytest.mark.parametrize("size", [1e-6, 3e5])
def test_folds_far_from_one(backend, size):
    """Folded queries beyond what fp16 holds, and below it; one row holds a NaN besides."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (features(g, (2, 2, 17, 16), torch.float16, means=0.1) for _ in range(3))
    q, k = (30 * q, k) if size > 1 else (q, 100 * k)
    affine = Affine(torch.full((2, 2, 16), size), torch.zeros(2, 2, 16))
    alpha = 1e-6 if size > 1 else 1e4
    q[0, 1, 3] = math.nan
    branch = Branch((Segment(k, v, key_affine=affine, logit_scale=alpha),))
    _, lse = styleattn.attention(q, [branch], return_lse=True, backend=backend)
    wide = Branch((Segment(k.double(), v.double(), key_affine=affine, logit_scale=alpha),))
    _, want = styleattn.attention(q.double(), [wide], return_lse=True, backend="reference")
    assert torch.equal(lse.isnan(), want.isnan())
    seen = ~want.isnan()
    assert largest_difference(lse[seen], want[seen]) <= 1e-3 * max(
        1.0, float(want[seen].abs().max())
    )


def test_what_rounding_takes_is_more_than_a_thousandth(monkeypatch):
    monkeypatch.setattr(_ops.backends, "rounds_queries", lambda name, query: False)
    g = torch.Generator().manual_seed(1)
    q, k, v = (features(g, (4, 1, 17, 16), torch.bfloat16, means=3.0) for _ in range(3))
    _, lse = shared(q, k, v, (), "torch")
    _, want = shared(*(x.double() for x in (q, k, v)), (), "reference")
    assert largest_difference(lse, want) > 1e-3


def test_only_who_asks_pays(monkeypatch):
    g = torch.Generator().manual_seed(2)
    q, k, v = (features(g, (2, 1, 9, 16), torch.bfloat16) for _ in range(3))
    module, calls = _ops.backends.load("torch"), []
    forward = module.attention_forward
    monkeypatch.setattr(module, "attention_forward", lambda *a: calls.append(a) or forward(*a))
    call = {"reference_rows": [0, 0], "backend": "torch"}
    styleattn.shared_attention(q, k, v, **call)
    assert len(calls) == 1
    styleattn.shared_attention(q, k, v, return_lse=True, **call)
    assert len(calls) == 1 + 1 + 2
    plain = [Branch((Segment(k, v, logit_scale=0.5, logit_bias=1.0),))]
    styleattn.attention(q, plain, return_lse=True, backend="torch")
    assert len(calls) == 1 + 1 + 2 + 1
