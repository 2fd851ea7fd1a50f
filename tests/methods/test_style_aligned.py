"""StyleAligned on tensors: knobs, layer sets, several references, shared norms, and bad
settings."""

from __future__ import annotations

import math

import official_style_aligned as official
import pytest
import torch
from torch.nn import functional as F

from styleattn.methods import METHODS, Layer, Method, NormCall, Rows, SelfCall, StyleAligned
from styleattn.references import Reference

NUMBERS = {"shared_score_scale": 1.0, "shared_score_shift": 0.0}


def tensors(batch, tokens=33, heads=2, dim=16, seed=0):
    g = torch.Generator().manual_seed(seed)
    shape = (batch, heads, tokens, dim)
    mean = 3 * torch.randn(1, heads, 1, dim, generator=g)
    mean = mean + 0.5 * torch.randn(batch, heads, 1, dim, generator=g)
    return [torch.randn(shape, generator=g) + mean for _ in range(3)]


def call(qkv, rows, strengths=(1.0,), gate=1.0, masks=None, numbers=NUMBERS, **options):
    masks = masks or (None,) * len(strengths)
    return SelfCall(*qkv, rows, tuple(strengths), gate, numbers, tuple(masks), **options)


def plain(q, k, v, bias=None):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def close(a, b, limit=2e-6):
    return float((a - b).abs().max() / b.abs().max()) <= limit


ROWS = Rows(2, 3, (0,))
TWO = Rows(2, 4, (0, 1))


def test_registry():
    assert METHODS["style_aligned"] is StyleAligned
    assert isinstance(StyleAligned(), Method)


@pytest.mark.parametrize(
    "level", [0, 0.001, 0.01, 0.1, 0.25, 0.3, 0.5, 0.6, 0.75, 0.9, 0.99, 0.999, 1]
)
@pytest.mark.parametrize("total", [1, 16, 70])
def test_self_only_layers(level, total):
    method = StyleAligned(only_self_level=level)
    found = {i for i in range(total) if method.self_only(Layer("x", i, total))}
    assert found == official.self_only(level, total)


def test_self_only_is_quantised_as_published():
    counts = {
        level: sum(
            StyleAligned(only_self_level=level).self_only(Layer("", i, 70)) for i in range(70)
        )
        for level in (0.0, 0.25, 0.6, 0.75, 1.0)
    }
    assert counts == {0.0: 0, 0.25: 18, 0.6: 35, 0.75: 52, 1.0: 70}


def test_rows_name_references_and_their_own():
    assert TWO.serving(1) == [-1, -1, 1, 1, -1, -1, 5, 5]
    assert TWO.is_reference() == [True, True, False, False] * 2
    assert TWO.targets == 2


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"adain_values": True},
        {"adain_queries": False, "adain_keys": False},
        {"share_attention": False},
    ],
)
@pytest.mark.parametrize("strengths", [(1.0, 1.0), (0.3, 0.2), (2.5, 0.1)])
def test_reference_rows_are_plain_attention(knobs, strengths):
    qkv = tensors(8)
    out = StyleAligned(**knobs).self_attention(call(qkv, TWO, strengths))
    expected = plain(*qkv)
    assert close(out[[0, 1, 4, 5]], expected[[0, 1, 4, 5]])
    assert not close(out[[2, 3, 6, 7]], expected[[2, 3, 6, 7]], 1e-3)


def two_references(q, k, v, b, refs, weights, shift=0.0, scale=1.0):
    """Row b with several references, from the definition: AdaIN to the weighted mean of
    statistics."""
    total = sum(weights)
    shares = [w / max(1.0, total) for w in weights]
    rest = max(0.0, 1.0 - total)

    def adain(x):
        mean, std = x.mean(-2, keepdim=True), (x.var(-2, keepdim=True) + 1e-5).sqrt()
        aim_mean = rest * mean[b] + sum(s * mean[r] for s, r in zip(shares, refs, strict=True))
        aim_std = rest * std[b] + sum(s * std[r] for s, r in zip(shares, refs, strict=True))
        return (x[b] - mean[b]) / std[b] * aim_std + aim_mean

    own = adain(k)
    sigma = q.shape[-1] ** -0.5
    query = adain(q)
    logits = [sigma * query @ own.mT]
    logits += [
        scale * sigma * query @ k[r].mT + shift + math.log(w)
        for r, w in zip(refs, weights, strict=True)
    ]
    return torch.cat(logits, -1).softmax(-1) @ torch.cat([v[b], *(v[r] for r in refs)], -2)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, 0.3), (0.2, 0.1), (3.0, 0.5)])
def test_several_references_follow_the_definition(weights):
    qkv = [t.double() for t in tensors(8)]
    numbers = {"shared_score_scale": 0.8, "shared_score_shift": 0.4}
    out = StyleAligned().self_attention(
        call(qkv, TWO, weights, numbers=numbers, backend="reference")
    )
    for b, refs in ((2, (0, 1)), (3, (0, 1)), (6, (4, 5)), (7, (4, 5))):
        assert close(out[b], two_references(*qkv, b, refs, weights, 0.4, 0.8), 1e-12)


def test_twice_the_same_reference_at_half_weight_is_one_reference():
    q, k, v = tensors(8)
    for x in (q, k, v):
        x[1], x[5] = x[0], x[4]
    two = StyleAligned().self_attention(call((q, k, v), TWO, (0.5, 0.5)))
    keep = [0, 2, 3, 4, 6, 7]
    one = StyleAligned().self_attention(call([x[keep] for x in (q, k, v)], ROWS))
    assert close(two[[2, 3, 6, 7]], one[[1, 2, 4, 5]])


def test_weight_is_continuous_at_both_ends():
    qkv = tensors(6)
    faint = StyleAligned().self_attention(call(qkv, ROWS, (1e-12,)))
    assert close(faint, plain(*qkv))
    nearly = StyleAligned().self_attention(call(qkv, ROWS, (1 - 1e-7,)))
    assert close(nearly, StyleAligned().self_attention(call(qkv, ROWS)), 5e-6)


@pytest.mark.parametrize("full", [False, True])
def test_tensor_strengths_are_the_same_numbers(full):
    qkv = tensors(8)
    method = StyleAligned(full_attention_share=full)
    as_tensors = (torch.tensor(0.6), torch.tensor(0.0))
    a = method.self_attention(call(qkv, TWO, (0.6, 0.0), gate=0.5))
    b = method.self_attention(call(qkv, TWO, as_tensors, gate=torch.tensor(0.5)))
    assert close(a, b)


def test_masks_say_where_the_reference_is_seen():
    qkv = tensors(6)
    half = torch.zeros(33)
    half[17:] = -math.inf
    method = StyleAligned(adain_queries=False, adain_keys=False)
    out = method.self_attention(call(qkv, ROWS, masks=(half,)))
    everywhere = method.self_attention(call(qkv, ROWS))
    assert close(out[:, :, :17], everywhere[:, :, :17])
    assert close(out[:, :, 17:], plain(*qkv)[:, :, 17:])
    assert close(method.self_attention(call(qkv, ROWS, masks=(torch.zeros(33),))), everywhere)


def test_key_bias_masks_own_and_reference_keys():
    q, k, v = tensors(6)
    bias = torch.zeros(6, 33)
    bias[:, 20:] = -math.inf
    method = StyleAligned(adain_queries=False, adain_keys=False)
    out = method.self_attention(call((q, k, v), ROWS, key_bias=bias))
    short = method.self_attention(
        call((q, k[:, :, :20], v[:, :, :20]), ROWS, key_bias=bias[:, :20])
    )
    assert close(out, short)


@pytest.mark.parametrize("rows", [Rows(1, 5, (0,)), Rows(2, 3, (0,)), Rows(3, 2, (0,))])
def test_full_sharing_sees_every_row_of_its_chunk(rows):
    qkv = tensors(rows.chunks * rows.count)
    out = StyleAligned(full_attention_share=True).self_attention(call(qkv, rows))
    for c in range(rows.chunks):
        part = slice(c * rows.count, (c + 1) * rows.count)
        k, v = (
            x[part].transpose(0, 1).flatten(1, 2)[None].expand(rows.count, -1, -1, -1)
            for x in qkv[1:]
        )
        assert close(out[part], plain(qkv[0][part], k, v))


def test_full_sharing_takes_weights_and_masks_of_references():
    qkv = tensors(4)
    rows = Rows(1, 4, (0, 1))
    method = StyleAligned(full_attention_share=True)
    closed = torch.full((33,), -math.inf)
    out = method.self_attention(call(qkv, rows, (1.0, 0.25), masks=(closed, None)))
    q, k, v = qkv
    keys = torch.cat([k[2], k[1], k[3]], -2)
    values = torch.cat([v[2], v[1], v[3]], -2)
    bias = torch.zeros(99)
    bias[33:66] = math.log(0.25)
    assert close(out[2], plain(q[2], keys, values, bias))
    nothing = method.self_attention(call(qkv, rows, (0.0, 0.0), gate=0.0))
    assert close(nothing, plain(*qkv))


class Norms:
    def norm(self, x, rows, strengths, affine=True):
        torch.manual_seed(1)
        norm = torch.nn.GroupNorm(4, x.shape[1], affine=affine)
        if affine:
            torch.nn.init.normal_(norm.weight)
            torch.nn.init.normal_(norm.bias)
        norm = norm.requires_grad_(False).to(x.dtype)
        out = norm(x)
        c = NormCall(x, out, 4, norm.weight, norm.bias, norm.eps, rows, strengths)
        return norm, out, StyleAligned().group_norm(c)


class TestGroupNorm(Norms):
    def x(self, batch, dtype=torch.float32):
        g = torch.Generator().manual_seed(0)
        x = torch.randn(batch, 16, 5, 7, generator=g, dtype=torch.float64)
        return (x + 5 * torch.randn(batch, 16, 1, 1, generator=g, dtype=torch.float64)).to(dtype)

    @pytest.mark.parametrize("affine", [True, False])
    @pytest.mark.parametrize("rows", [ROWS, TWO, Rows(1, 5, (0,))])
    def test_closed_form_is_concatenation(self, rows, affine):
        x = self.x(rows.chunks * rows.count, torch.float64)
        norm, out, shared = self.norm(x, rows, (1.0,) * len(rows.references), affine)
        for b, mine in enumerate(rows.is_reference()):
            if mine:
                assert torch.equal(shared[b], out[b])
                continue
            others = [rows.serving(r)[b] for r in range(len(rows.references))]
            joined = torch.cat([x[b], *(x[r] for r in others)], dim=-2)
            assert close(shared[b], norm(joined[None])[0, :, :5], 1e-12)

    def test_weights(self):
        x = self.x(6)
        _, out, shared = self.norm(x, ROWS, (1e-9,))
        assert close(shared, out)
        norm, _, shared = self.norm(x, ROWS, (2.0,))
        joined = torch.cat([x[1], x[0], x[0]], dim=-2)
        assert close(shared[1], norm(joined[None])[0, :, :5])

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_is_rounded_once(self, dtype):
        x = self.x(6, dtype)
        exact = self.norm(x.double(), ROWS, (1.0,), affine=False)[2]
        shared = self.norm(x, ROWS, (1.0,), affine=False)[2]
        assert shared.dtype == dtype
        assert (
            float((shared.double() - exact).abs().max() / exact.abs().max())
            <= torch.finfo(dtype).eps
        )

    def test_three_dimensional_maps(self):
        x = self.x(6).flatten(2)
        norm, _, shared = self.norm(x, ROWS, (1.0,))
        assert close(shared[2], norm(torch.cat([x[2], x[0]], -1)[None])[0, :, :35])


FULL = StyleAligned(
    adain_values=True,
    shared_score_shift=math.log(2),
    layers={"up": {"block_0": [0, 1.0, 0]}},
    steps=(0.1, 0.9),
    references=(
        Reference(prompt="a", weight=0.5, layers=["up_blocks.*"], steps=(1.0, 0.5, 0.0)),
        Reference(),
    ),
)


def same(a, b):
    return type(a) is type(b) and a.to_dict() == b.to_dict()


@pytest.mark.parametrize("method", [StyleAligned(), FULL], ids=["default", "full"])
def test_settings_round_trip(method):
    assert same(StyleAligned.from_dict(method.to_dict()), method)
    assert same(StyleAligned.from_yaml(method.to_yaml()), method)


def test_settings_are_plain_and_short():
    assert StyleAligned.from_yaml("shared_score_shift: 0.5").changed() == {
        "shared_score_shift": 0.5
    }
    assert StyleAligned.from_yaml("").changed() == {}
    assert FULL.to_dict()["method"] == "style_aligned"


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"shared_score_shit": 1}, "no knob shared_score_shit"),
        ({"a": 1, "b": 2}, "no knob a, b"),
        ({"method": "style_id"}, "settings of 'style_aligned', these are of 'style_id'"),
        ({"only_self_level": 1.5}, "only_self_level must be in [0, 1]"),
        ({"only_self_level": "half"}, "only_self_level must be a number"),
        ({"adain_keys": 1}, "adain_keys must be True or False"),
        ({"shared_score_scale": float("inf")}, "shared_score_scale must be finite"),
        ({"shared_score_shift": float("nan")}, "shared_score_shift must be a number"),
        ({"shared_score_shift": True}, "shared_score_shift must be a number"),
        ({"steps": (0.5, 0.2)}, "0 <= start <= end <= 1"),
        ({"steps": (0.5,)}, "at least three weights"),
        ({"steps": "all"}, "at least three weights"),
        ({"steps": (1.0, -0.5, 0.0)}, "negative weight"),
        ({"references": ()}, "non-empty tuple"),
        ({"references": [{"wait": 1}]}, "no setting wait"),
        ({"references": (3,)}, "no setting 3"),
    ],
)
def test_bad_settings(settings, says):
    with pytest.raises(ValueError) as error:
        StyleAligned.from_dict(settings)
    assert says in str(error.value)


def test_all_reasons_at_once():
    with pytest.raises(ValueError, match=r"adain_keys.*only_self_level.*steps"):
        StyleAligned(adain_keys=None, only_self_level=2, steps=())


@pytest.mark.parametrize("text", ["[1, 2]", "key: [", "just a word"])
def test_bad_yaml(text):
    with pytest.raises(ValueError, match=r"StyleAligned\.from_"):
        StyleAligned.from_yaml(text)
