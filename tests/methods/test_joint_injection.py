"""Injection among the image tokens of one joint attention layer, next to methods behind it."""

from __future__ import annotations

import pytest
import torch

from styleattn.methods import FillDiptych, ReferenceOnly, StyleID, VisualStylePrompting
from styleattn.methods._base import Layer, Rows
from styleattn.methods._joint import Features, JointCall, Tokens, attend, plain_parts

TEXT, IMAGE, FIRST = 3, 6, 4


def tokens(batch):
    g = torch.Generator().manual_seed(0)
    found = {}
    for name, length in (("text", TEXT), ("image", IMAGE)):
        q, k, v = torch.randn(3, batch, 2, length, 8, generator=g, dtype=torch.float64)
        found[name] = Tokens(name, Features(q), Features(k), v)
    return found


def call_of(method, runs, references, strengths, unconditional=False, **more):
    rows = Rows(1, len(runs["image"].value), tuple(range(references)), (unconditional,))
    numbers = {n: float(getattr(method, n)) for n in method.NUMBERS}
    masks = (None,) * references
    return JointCall(Layer("x", 0, 1), runs, rows, strengths, 1.0, numbers, masks, **more)


def dense(q, keys, values, bias=0.0):
    logits = q @ torch.cat(keys, 1).transpose(-1, -2) * q.shape[-1] ** -0.5 + bias
    return logits.softmax(-1) @ torch.cat(values, 1)


def of(runs, row):
    return {n: (t.query[row], t.key[row], t.value[row]) for n, t in runs.items()}


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_biases_of_panels_reach_both_shares(share):
    """The panels' bias on the image's own keys, in the row's own share; the text sees it too."""
    runs = tokens(2)
    swap, panels = VisualStylePrompting(), FillDiptych(b_to_a=0.5, a_to_b=2.0)
    parts = swap.joint_attention(call_of(swap, runs, 1, (share,)), plain_parts(runs))
    second = call_of(panels, runs, 0, (), panels=FIRST)
    out = attend(panels.joint_attention(second, parts), "reference")
    reference, image = of(runs, 0), of(runs, 1)
    bias = torch.zeros(IMAGE, TEXT + IMAGE, dtype=torch.float64)
    bias[FIRST:, TEXT : TEXT + FIRST] = torch.tensor(0.5).double().log()
    bias[:FIRST, TEXT + FIRST :] = torch.tensor(2.0).double().log()
    tq, tk, tv = image["text"]
    q, k, v = image["image"]
    _, rk, rv = reference["image"]
    own = dense(q, (tk, k), (tv, v), bias)
    theirs = dense(q, (tk, rk), (tv, rv))
    assert torch.allclose(out[1, :, TEXT:], share * theirs + (1 - share) * own, atol=1e-6)
    assert torch.allclose(out[1, :, :TEXT], dense(tq, (tk, k), (tv, v)), atol=1e-6)
    _, sk, sv = reference["text"]
    rq = reference["image"][0]
    assert torch.allclose(out[0, :, TEXT:], dense(rq, (sk, rk), (sv, rv), bias), atol=1e-6)


def test_style_id_layer():
    """The published formula with the text's keys next to the style's; the text is left alone."""
    runs, method = tokens(3), StyleID(gamma=0.6, temperature=1.4)
    out = attend(
        method.joint_attention(call_of(method, runs, 2, (1.0, 1.0)), plain_parts(runs)), "reference"
    )
    content, style, image = (of(runs, i) for i in range(3))
    _, tk, tv = image["text"]
    query = 0.6 * content["image"][0] + 0.4 * image["image"][0]
    expected = dense(query, (tk, 1.4 * style["image"][1]), (tv, style["image"][2]))
    assert torch.allclose(out[2, :, TEXT:], expected, atol=1e-6)
    plain = attend(plain_parts(runs), "reference")
    assert torch.allclose(out[:, :, :TEXT], plain[:, :, :TEXT], atol=1e-12)
    assert torch.allclose(out[:2], plain[:2], atol=1e-12)


@pytest.mark.parametrize("unconditional", [False, True])
def test_reference_only_layer(unconditional):
    runs, method = tokens(2), ReferenceOnly(style_fidelity=0.8)
    call = call_of(method, runs, 1, (0.5,), unconditional)
    out = attend(method.joint_attention(call, plain_parts(runs)), "reference")
    (q, k, v), (_, tk, tv) = (of(runs, 1)[n] for n in ("image", "text"))
    _, rk, rv = of(runs, 0)["image"]
    bias = torch.cat([torch.zeros(TEXT + IMAGE), torch.full((IMAGE,), 0.5).log()]).double()
    shared = dense(q, (tk, k, rk), (tv, v, rv), bias)
    alone = dense(q, (tk, k), (tv, v))
    part = 0.8 if unconditional else 0.0
    assert torch.allclose(out[1, :, TEXT:], part * alone + (1 - part) * shared, atol=1e-6)


@pytest.mark.parametrize(("method", "count"), [(VisualStylePrompting(), 2), (StyleID(), 1)])
def test_as_many_references_as_roles(method, count):
    runs = tokens(3)
    with pytest.raises(ValueError, match="references"):
        method.joint_attention(call_of(method, runs, count, (1.0,) * count), plain_parts(runs))
