"""The specification against the definition (nested loops) and against the papers' formulas."""

import math

import pytest
import torch
from hypothesis import given
from oracles import (
    definition,
    official_ip_adapter,
    official_lse,
    official_style_aligned,
    official_style_id,
)
from strategies import calls

import styleattn
from styleattn.testing import cast, exact, features


@given(spec=calls)
def test_reference_is_the_definition(spec):
    query, branches, scale = spec.build()
    out, lse = exact(query, branches, scale)
    want, want_lse = definition(query, branches, scale)
    torch.testing.assert_close(out, want, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(lse, want_lse, rtol=1e-9, atol=1e-9)


def qkv(batch, dtype=torch.float64, n=37, d=16, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [features(g, (batch, 2, n, d), torch.float32).to(dtype) for _ in range(3)]


def halves(batch):
    return torch.tensor([0] * (batch // 2) + [batch // 2] * (batch // 2))


@pytest.mark.parametrize(
    "adain",
    [
        (True, True, False),
        (True, True, True),
        (False, False, False),
        (True, False, False),
        (False, True, True),
    ],
)
@pytest.mark.parametrize("scale, shift", [(1.0, 0.0), (1.0, math.log(2)), (1.1, 0.7), (0.5, 0.0)])
def test_shared_attention_is_style_aligned(adain, scale, shift):
    q, k, v = qkv(6)
    out, lse = styleattn.shared_attention(
        q, k, v, reference_rows=halves(6), adain_queries=adain[0], adain_keys=adain[1],
        adain_values=adain[2], score_scale=scale, score_shift=shift,
        return_lse=True, backend="reference",
    )  # fmt: skip
    want = official_style_aligned(q, k, v, adain=adain, score_scale=scale, score_shift=shift)
    torch.testing.assert_close(out, want, rtol=1e-9, atol=1e-9)
    want_lse = official_lse(q, k, adain=adain[:2], score_scale=scale, score_shift=shift)
    torch.testing.assert_close(lse[0], want_lse, rtol=1e-9, atol=1e-9)


def test_injected_attention_is_style_id():
    q, k, v = qkv(3)
    content = qkv(3, seed=1)[0]
    for source in (content, content[:1]):
        out = styleattn.injected_attention(
            q, k[:1], v[:1], content_query=source, backend="reference"
        )
        want = official_style_id(q, k[:1], v[:1], source, 0.75, 1.5)
        torch.testing.assert_close(out, want, rtol=1e-9, atol=1e-9)


def test_injected_attention_blends_on_load():
    q, k, v = qkv(3)
    own_k, own_v, _ = qkv(3, seed=2)
    lam = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    out = styleattn.injected_attention(
        q,
        k[:1],
        v[:1],
        temperature=1.2,
        own_key=own_k,
        own_value=own_v,
        kv_blend=lam,
        backend="reference",
    )
    m = lam[:, None, None, None]
    want = official_style_id(
        q, m * k[:1] + (1 - m) * own_k, m * v[:1] + (1 - m) * own_v, q, 0.0, 1.2
    )
    torch.testing.assert_close(out, want, rtol=1e-9, atol=1e-9)


def test_decoupled_attention_is_ip_adapter():
    q, k, v = qkv(2)
    prompts = [tuple(qkv(2, n=m, seed=m)[1:]) for m in (4, 16)]
    mask = torch.rand(2, 37, dtype=torch.float64)
    weights = [0.7, torch.tensor([0.2, 1.3], dtype=torch.float64)]
    out = styleattn.decoupled_attention(
        q, k, v, prompts, weights=weights, masks=[mask, None], backend="reference"
    )
    want = official_ip_adapter(
        q, k, v, prompts, [0.7, weights[1][:, None, None, None]], [mask[:, None], None]
    )
    torch.testing.assert_close(out, want, rtol=1e-9, atol=1e-9)


def test_merge_is_exact():
    q, k, v = qkv(2)
    whole, whole_lse = styleattn.attention(q, [branch(k, v)], return_lse=True, backend="reference")
    cuts = [slice(0, 5), slice(5, 6), slice(6, 37)]
    parts = [
        styleattn.attention(
            q, [branch(k[:, :, c], v[:, :, c])], return_lse=True, backend="reference"
        )
        for c in cuts
    ]
    out, lse = styleattn.merge([o for o, _ in parts], [part[0] for _, part in parts])
    torch.testing.assert_close(out, whole, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(lse, whole_lse[0], rtol=1e-9, atol=1e-9)
    dead = torch.full_like(lse, -math.inf)
    out, again = styleattn.merge([whole, torch.full_like(whole, math.nan)], [lse, dead])
    assert torch.equal(again, lse)
    torch.testing.assert_close(out, whole, rtol=1e-12, atol=1e-12)


def test_merge_has_gradients_where_parts_saw_no_key():
    lses = [torch.tensor([[-math.inf, 1.0, -math.inf]]), torch.tensor([[-math.inf, 2.0, 0.5]])]
    outputs = [torch.rand(1, 3, 4, dtype=torch.float64) for _ in range(2)]
    outputs[0][0, ::2] = math.nan  # what saw no key may hold anything
    leaves = [x.double().requires_grad_() for x in (*outputs, *lses)]
    out, lse = styleattn.merge(leaves[:2], leaves[2:])
    seen = (lse > -math.inf).squeeze(0)
    assert seen.tolist() == [False, True, True] and not out[0, 0].any()
    grads = torch.autograd.grad((out.square().sum() + lse[:, seen].sum()), leaves)
    assert all(x.isfinite().all() and not x[0, 0].any() for x in grads)
    alone = [x.detach()[:, 1:2].requires_grad_() for x in leaves]
    out, lse = styleattn.merge(alone[:2], alone[2:])
    want = torch.autograd.grad(out.square().sum() + lse.sum(), alone)
    assert all(torch.allclose(x[:, 1:2], y) for x, y in zip(grads, want, strict=True))


def branch(k, v, **options):
    return styleattn.Branch((styleattn.Segment(k, v, **options),))


def test_statistics_and_adain():
    x, y = (features(torch.Generator().manual_seed(s), (2, 3, 41, 8)) for s in (0, 1))
    a, b = (
        styleattn.token_stats(x, backend="reference"),
        styleattn.token_stats(y, backend="reference"),
    )
    torch.testing.assert_close(a.mean, x.mean(-2))
    torch.testing.assert_close(a.std, (x.var(-2) + 1e-5).sqrt())
    affine = styleattn.adain_affine(a, b)
    mapped = affine.scale[:, :, None] * x + affine.shift[:, :, None]
    want = (x - x.mean(-2, keepdim=True)) / a.std[:, :, None] * b.std[:, :, None] + y.mean(
        -2, keepdim=True
    )
    torch.testing.assert_close(mapped, want, rtol=1e-5, atol=1e-5)
    assert torch.equal(affine.center, a.mean)
    one = styleattn.token_stats(x[:, :, :1], backend="reference")
    assert torch.equal(one.mean, x[:, :, 0]) and torch.allclose(one.std, torch.tensor(1e-5).sqrt())


def test_float64_is_kept():
    q, k, v = qkv(2)
    out, lse = styleattn.attention(q, [branch(k, v)], return_lse=True, backend="reference")
    assert out.dtype == lse.dtype == torch.float64
    half = cast((q, k, v), torch.bfloat16)
    assert (
        styleattn.attention(half[0], [branch(*half[1:])], backend="reference").dtype
        == torch.bfloat16
    )
