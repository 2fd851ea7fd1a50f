"""Encoder methods on one layer against the formulas of their papers."""

from __future__ import annotations

import encoder_oracles as papers
import pytest
import torch

from styleattn import attention
from styleattn.branch import Branch, Segment
from styleattn.methods import (
    CSGO,
    METHODS,
    CrossCall,
    DEADiff,
    EncoderMethod,
    ImagePrompt,
    Layer,
    PuLIDSDXL,
    RBModulation,
    Rows,
    StyleShot,
    StyleStudio,
)
from styleattn.methods.deadiff import CONTENT_LAYERS
from styleattn.references import Reference

B, H, N, S, D = 4, 2, 63, 7, 16
UNCOND_COND = torch.tensor([0, 0, 1, 1])


def draw(*shape, seed=0):
    """Normal numbers with strong means per channel."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    return x + torch.randn(1, *shape[1:2], 1, shape[-1], generator=generator)


QUERY, KEY, VALUE = draw(B, H, N, D), draw(B, H, S, D, seed=1), draw(B, H, S, D, seed=2)
TEXT = (KEY, VALUE)


def prompt(index, tokens=5, seed=3, weight=1.0, mask=None, rows=UNCOND_COND):
    key, value = draw(2, H, tokens, D, seed=seed), draw(2, H, tokens, D, seed=seed + 1)
    return ImagePrompt(key, value, rows, weight, mask, index)


def seen(prompt, zero_first=False):
    """[B, H, M, D]: the image's keys and values for every row."""
    pair = []
    for x in (prompt.key, prompt.value):
        x = torch.cat([torch.zeros_like(x[:1]), x[1:]]) if zero_first else x
        pair.append(x[prompt.rows.clamp(min=0)])
    return tuple(pair)


def _parts(method, *prompts):
    numbers = {n: getattr(method, n) for n in method.NUMBERS}
    rows = Rows(2, 2, (), (True, False))
    layer = Layer("up_blocks.1.attentions.2.transformer_blocks.0.attn2", 0, 1)
    call = CrossCall(layer, QUERY, KEY, VALUE, None, prompts, rows, 1.0, numbers)
    return method.cross_parts(call)


def run(method, *prompts):
    """One layer, as a host runs it."""
    parts = _parts(method, *prompts)
    text = Branch((Segment(KEY, VALUE), *parts.segments), weight=parts.text_weight)
    if parts.after is None:
        assert not parts.apart
        return attention(QUERY, (text, *parts.branches))
    assert not parts.branches
    apart = tuple(attention(QUERY, (branch,)) for branch in parts.apart)
    return parts.after(attention(QUERY, (text,)), apart)


def close(got, expected):
    return float((got - expected).abs().max() / expected.abs().max()) <= 1e-5


REFERENCE = Reference(embeds=torch.ones(8))
BOTH = (REFERENCE, REFERENCE)
PLAIN = papers.softmax_attention(QUERY, *TEXT)


@pytest.mark.parametrize("w", [1.0, 0.6, 0.0])
def test_deadiff(w):
    image = prompt(0, tokens=16)
    method = DEADiff(img_weight=w, references=REFERENCE)
    assert close(run(method, image), papers.deadiff(QUERY, TEXT, seen(image, True), w))


def test_deadiff_without_an_image_is_sixteen_null_keys_not_the_plain_model():
    """Unconditional rows, layers of the other subject and weight 0 are the same: diluted text."""
    zeros = torch.zeros(B, H, 16, D)
    diluted = papers.deadiff(QUERY, TEXT, (zeros, zeros), 1.0)
    image = prompt(0, tokens=16)
    method = DEADiff(references=REFERENCE)
    assert close(run(method), diluted)
    assert close(run(DEADiff(img_weight=0.0, references=REFERENCE), image), diluted)
    assert close(run(method, image)[:2], diluted[:2])  # unconditional, whatever the adapter says
    unseen = prompt(0, tokens=16, rows=torch.tensor([0, -1, 1, -1]))
    assert close(run(method, unseen)[[1, 3]], diluted[[1, 3]])
    assert float((diluted - PLAIN).abs().max()) > 0.1


def test_deadiff_weight_scales_keys_and_values():
    image = prompt(0, tokens=16, rows=torch.ones(B, dtype=torch.int64))
    got = run(DEADiff(img_weight=0.5, references=REFERENCE), image)
    key, value = seen(image)
    for wrong in ((key, 0.5 * value), (0.5 * key, value)):
        assert not close(got, papers.deadiff(QUERY, TEXT, wrong, 1.0))
    assert close(got, papers.deadiff(QUERY, TEXT, (0.5 * key, 0.5 * value), 1.0))


SD15 = [
    f"{part}.attentions.{a}.transformer_blocks.0.attn2"
    for part, count in (
        *((f"down_blocks.{b}", 2) for b in range(3)),
        ("mid_block", 1),
        *((f"up_blocks.{b}", 3) for b in (1, 2, 3)),
    )
    for a in range(count)
]


def test_deadiff_routes_five_layers_to_the_content():
    """In the order of execution 4 to 8 of 16."""
    content = DEADiff(subject="content", adapter=papers.Roles(content=object()))
    style = DEADiff(adapter=papers.Roles(style=object()))
    layers = [Layer(name, i, 16) for i, name in enumerate(SD15)]
    assert [x.index for x in layers if content.reaches(x, 0)] == [4, 5, 6, 7, 8]
    assert [x.index for x in layers if style.reaches(x, 0)] == [*range(4), *range(9, 16)]
    assert all(style.takes_cross(x) for x in layers)
    assert sum(name.startswith(CONTENT_LAYERS) for name in SD15) == 5


@pytest.mark.parametrize("scales", [(1.0, 1.0), (0.3, 1.5), (0.0, 0.0)])
def test_csgo(scales):
    method = CSGO(content_scale=scales[0], style_scale=scales[1], references=BOTH)
    mask = torch.rand(N, generator=torch.Generator().manual_seed(5))
    content, style = prompt(0, 4), prompt(1, 32, seed=7, weight=0.8, mask=mask)
    expected = papers.decoupled(
        QUERY,
        TEXT,
        (*seen(content), scales[0]),
        (*seen(style), 0.8 * scales[1] * mask[:, None]),
    )
    assert close(run(method, content, style), expected)


def test_csgo_released_wiring_gives_the_content_no_layer_of_the_unet():
    adapter = papers.Roles(content=object(), style=object(), control=object())
    paper = CSGO(adapter=adapter, references=BOTH)
    released = CSGO(adapter=adapter, references=BOTH, compat="released")
    layer = Layer("down_blocks.1.attentions.0.transformer_blocks.0.attn2", 0, 1)
    assert [paper.reaches(layer, i) for i in (0, 1)] == [True, True]
    assert [released.reaches(layer, i) for i in (0, 1)] == [False, True]
    assert [released.reaches(layer, i, "controlnet") for i in (0, 1)] == [False, True]


def test_csgo_style_alone_is_the_second_role():
    method = CSGO(references=REFERENCE, style_scale=0.7, content_scale=0.1)
    style = prompt(0, 16)
    assert close(run(method, style), papers.decoupled(QUERY, TEXT, (*seen(style), 0.7)))


@pytest.mark.parametrize("scale", [1.0, 0.4, 0.0])
def test_style_shot(scale):
    image = prompt(0, 6)
    method = StyleShot(scale=scale, references=REFERENCE, adapter=object())
    assert close(run(method, image), papers.decoupled(QUERY, TEXT, (*seen(image), scale)))


@pytest.mark.parametrize("scale", [1.0, 0.4, 0.0])
def test_style_studio(scale):
    image = prompt(0, 6)
    full = papers.cross_modal_adain(QUERY, TEXT, seen(image))
    got = run(StyleStudio(scale=scale, references=REFERENCE), image)
    assert close(got, PLAIN + scale * (full - PLAIN))


def test_style_studio_leaves_rows_that_see_no_image():
    image = prompt(0, 6, rows=torch.tensor([0, -1, 1, -1]))
    got = run(StyleStudio(references=REFERENCE), image)
    assert close(got[[1, 3]], PLAIN[[1, 3]])
    full = papers.cross_modal_adain(QUERY, TEXT, seen(image))
    assert close(got[[0, 2]], full[[0, 2]])


@pytest.mark.parametrize("ortho", ["", "v1", "v2"])
@pytest.mark.parametrize("zeros", [0, 8, 16])
def test_pulid(ortho, zeros):
    image = prompt(0, 9)
    method = PuLIDSDXL(id_scale=0.8, num_zero=zeros, ortho=ortho, references=REFERENCE)
    expected = papers.pulid(QUERY, TEXT, seen(image), zeros, ortho, 0.8)
    assert close(run(method, image), expected)


@pytest.mark.parametrize("ortho", ["", "v1", "v2"])
def test_pulid_at_zero_and_where_nothing_is_seen_is_the_plain_model(ortho):
    image = prompt(0, 9)
    assert close(run(PuLIDSDXL(id_scale=0.0, ortho=ortho, references=REFERENCE), image), PLAIN)
    unseen = prompt(0, 9, rows=torch.full((B,), -1))
    assert close(run(PuLIDSDXL(ortho=ortho, references=REFERENCE), unseen), PLAIN)


def test_pulid_is_orthogonal_to_the_text_over_the_tokens():
    got = run(PuLIDSDXL(ortho="v1", references=REFERENCE), prompt(0, 9)) - PLAIN
    assert float((got * PLAIN).sum(2).abs().max()) < 1e-3 * float((got * got).sum(2).max())


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.0])
def test_rb_modulation(scale):
    style = prompt(0, 4)
    full = papers.aggregated(QUERY, TEXT, seen(style))
    got = run(RBModulation(scale=scale, references=REFERENCE), style)
    assert close(got, PLAIN + scale * (full - PLAIN))


def test_rb_modulation_with_content():
    content, style = prompt(0, 4), prompt(1, 6, seed=7)
    expected = papers.aggregated(QUERY, TEXT, seen(style), seen(content))
    assert close(run(RBModulation(references=BOTH), content, style), expected)


def test_rb_modulation_leaves_rows_that_see_no_image():
    style = prompt(0, 4, rows=torch.tensor([-1, 0, -1, 1]))
    got = run(RBModulation(references=REFERENCE), style)
    assert close(got[[0, 2]], PLAIN[[0, 2]])
    assert close(got[[1, 3]], papers.aggregated(QUERY, TEXT, seen(style))[[1, 3]])


ENCODERS = (CSGO, DEADiff, PuLIDSDXL, RBModulation, StyleShot, StyleStudio)


@pytest.mark.parametrize("kind", ENCODERS, ids=lambda k: k.name)
def test_settings_travel(kind):
    method = kind(steps=(0.0, 0.5))
    assert METHODS[kind.name] is kind and isinstance(method, EncoderMethod)
    assert kind.from_dict(method.to_dict()) == method
    assert {"paper", "route", "needs", "weights"} <= set(kind.facts.to_dict())


WRONG = {
    "img_weight must be a number": lambda: DEADiff(img_weight="1"),
    "subject must be style, content, or both": lambda: DEADiff(subject=("style", "style")),
    "queries must be a positive int": lambda: DEADiff(queries=0),
    "subject names style, there are 2 references": lambda: DEADiff(references=BOTH),
    "knows no masks": lambda: DEADiff(
        references=Reference(embeds=torch.ones(8), mask=torch.ones(4, 4))
    ),
    "compat must be one of": lambda: CSGO(compat="paper"),
    "references must be content and style, got 3": lambda: CSGO(references=(*BOTH, REFERENCE)),
    "content_scale must be finite": lambda: CSGO(content_scale=float("inf")),
    "num_zero must be an int >= 0": lambda: PuLIDSDXL(num_zero=-1),
    "ortho must be one of": lambda: PuLIDSDXL(ortho="v3"),
    "references must all be Reference": lambda: StyleShot(references=(1,)),
    "steps must satisfy": lambda: StyleStudio(steps=(0.5, 0.2)),
}


@pytest.mark.parametrize("message", WRONG)
def test_knobs_without_meaning_are_refused(message):
    with pytest.raises(ValueError, match=message):
        WRONG[message]()


def test_deadiff_refuses_another_number_of_tokens():
    with pytest.raises(ValueError, match="got 5 image tokens, queries says 16"):
        run(DEADiff(references=REFERENCE), prompt(0, 5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ortho", ["v1", "v2"])
def test_projections_of_half_precision_do_not_overflow(dtype, ortho):
    """Sums over the tokens leave what fp16 holds: 64 values of 300 squared are 5.8 million."""
    method = PuLIDSDXL(ortho=ortho, references=REFERENCE)
    h, o = (300 * draw(B, H, 64, D, seed=s) for s in (8, 9))
    parts = _parts(method, prompt(0, 9))
    apart = (o.to(dtype), *([torch.full_like(o, 0.25, dtype=dtype)] if ortho == "v2" else []))
    got = parts.after(h.to(dtype), apart)
    h, o = h.to(dtype).double(), o.to(dtype).double()
    along = (h * o).sum(2, keepdim=True) / (h * h).sum(2, keepdim=True) * h
    expected = h + 0.8 * (o - (0.75 if ortho == "v2" else 1.0) * along)
    assert got.dtype == dtype and got.isfinite().all()
    step = torch.finfo(dtype).eps * expected.abs().max()
    assert float((got.double() - expected).abs().max()) <= step


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_statistics_of_half_precision_do_not_overflow(dtype):
    t, s = ((300 * draw(B, H, 64, D, seed=x)).to(dtype) for x in (8, 9))
    got = _parts(StyleStudio(references=REFERENCE), prompt(0, 9)).after(t, (s,))
    t, s = t.double(), s.double()
    normal = (t - t.mean(2, keepdim=True)) / t.std(2, keepdim=True)
    expected = normal * s.std(2, keepdim=True) + s.mean(2, keepdim=True)
    step = torch.finfo(dtype).eps * expected.abs().max()
    assert got.dtype == dtype and float((got.double() - expected).abs().max()) <= step


def test_a_text_without_variance_takes_the_styles_mean():
    flat = torch.zeros_like(QUERY)
    style = draw(B, H, N, D, seed=4)
    got = _parts(StyleStudio(references=REFERENCE), prompt(0, 9)).after(flat, (style,))
    assert close(got, style.mean(2, keepdim=True).expand_as(style))
