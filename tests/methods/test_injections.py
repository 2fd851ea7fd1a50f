"""Attention-injection methods, layer by layer, against the formulas of their papers."""

from __future__ import annotations

from dataclasses import replace

import injection_oracles as papers
import pytest
import torch

from styleattn.methods import (
    METHODS,
    CrossImageAttention,
    MutualAttention,
    ReferenceOnly,
    Rows,
    SelfCall,
    StyleID,
    VisualStylePrompting,
    ZStar,
)
from styleattn.methods.cross_image_attention import structure_steps


def tensors(rows: int, tokens: int = 63, heads: int = 2, width: int = 16, seed: int = 0):
    """Query, key, value with strong channel means."""
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, heads, tokens, width)
    means = 3 * torch.randn(3, rows, heads, 1, width, generator=generator)
    return torch.randn(3, *shape, generator=generator) + means


def call(method, qkv, references, chunks=2, strengths=None, masks=None, key_bias=None):
    count = qkv.shape[1] // chunks
    rows = Rows(chunks, count, tuple(range(references)), (chunks > 1, *(False,) * (chunks - 1)))
    numbers = {name: getattr(method, name) for name in method.NUMBERS}
    strengths = strengths or (1.0,) * references
    masks = masks or (None,) * references
    return SelfCall(*qkv, rows, strengths, 1.0, numbers, masks, key_bias)


def written_out(rule, qkv, chunks=2):
    count = qkv.shape[1] // chunks
    rows = [(c, r) for c in range(chunks) for r in range(count)]
    return torch.stack([rule(*qkv, r, c * count, chunks > 1 and c == 0) for c, r in rows])


def relative(a, b):
    return float((a - b).abs().max() / b.abs().max())


CASES = {
    "style_id": (StyleID(), papers.style_id(), 2),
    "style_id-strong": (StyleID(gamma=0.3, temperature=2.0), papers.style_id(0.3, 2.0), 2),
    "style_id-no-content": (StyleID(gamma=0.0), papers.style_id(0.0), 2),
    "style_id-all-content": (StyleID(gamma=1.0, temperature=1.0), papers.style_id(1.0, 1.0), 2),
    "visual_style_prompting": (VisualStylePrompting(), papers.swap, 1),
    "mutual_attention": (MutualAttention(), papers.swap, 1),
    "z_star": (ZStar(), papers.z_star(), 1),
    "z_star-scaled": (ZStar(style_scale=0.7, content_scale=2.0), papers.z_star(0.7, 2.0), 1),
    "reference_only": (ReferenceOnly(), papers.reference_only(), 1),
    "reference_only-apart": (ReferenceOnly(style_fidelity=1.0), papers.reference_only(1.0), 1),
    "reference_only-shared": (ReferenceOnly(style_fidelity=0.0), papers.reference_only(0.0), 1),
}


@pytest.mark.parametrize("tokens", [1, 63, 257])
@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_per_layer(case, chunks, tokens):
    method, rule, references = CASES[case]
    qkv = tensors(chunks * (references + 1), tokens)
    out = method.self_attention(call(method, qkv, references, chunks))
    assert relative(out, written_out(rule, qkv, chunks)) <= 1e-5


@pytest.mark.parametrize("case", CASES)
def test_reference_rows_keep_their_own_attention(case):
    method, _, references = CASES[case]
    if getattr(method, "rearrange_style", False):
        method = replace(method, rearrange_style=False)
    qkv = tensors(2 * (references + 1))
    out = method.self_attention(call(method, qkv, references))
    mine = [c * (references + 1) + r for c in range(2) for r in range(references)]
    assert relative(out[mine], papers.plain(*qkv)[mine]) <= 1e-6


def test_no_row_reads_another_images_features():
    """Images of one batch do not meet: each alone gives the same."""
    qkv = tensors(5)
    method = StyleID()
    both = method.self_attention(call(method, qkv, 2, chunks=1))
    for row in (2, 3, 4):
        alone = method.self_attention(call(method, qkv[:, [0, 1, row]], 2, chunks=1))
        assert relative(both[row], alone[2]) <= 1e-6


def test_weights_and_masks_blend():
    """The style's weight and mask share the output between injected and own; the content's weight
    and mask multiply gamma."""
    qkv = tensors(3)
    method, plain = StyleID(), papers.plain(*qkv)[2]
    mask = torch.linspace(0.1, 0.9, 63)
    full = written_out(papers.style_id(), qkv, 1)[2]
    out = method.self_attention(call(method, qkv, 2, 1, strengths=(1.0, 0.4)))
    assert relative(out[2], 0.4 * full + 0.6 * plain) <= 1e-5
    out = method.self_attention(call(method, qkv, 2, 1, masks=(None, mask.log())))
    assert relative(out[2], mask[:, None] * full + (1 - mask[:, None]) * plain) <= 1e-5
    out = method.self_attention(call(method, qkv, 2, 1, strengths=(0.5, 1.0)))
    assert relative(out[2], written_out(papers.style_id(0.375), qkv, 1)[2]) <= 1e-5
    out = method.self_attention(call(method, qkv, 2, 1, masks=(mask.log(), None)))
    q = qkv[0].clone()
    q[2] = 0.75 * mask[:, None] * q[0] + (1 - 0.75 * mask[:, None]) * q[2]
    expected = papers.softmax_attention(q[2], qkv[1][1], qkv[2][1], 1.5)
    assert relative(out[2], expected) <= 1e-5


def test_numbers_may_be_tensors():
    """Under a compiler numbers and strengths are 0-dim tensors."""
    qkv = tensors(3)
    method = StyleID()
    numbers = {name: torch.tensor(float(getattr(method, name))) for name in method.NUMBERS}
    strengths = (torch.tensor(1.0), torch.tensor(0.4))
    rows = Rows(1, 3, (0, 1), (False,))
    made = SelfCall(*qkv, rows, strengths, 1.0, numbers, (None, None))
    expected = method.self_attention(call(method, qkv, 2, 1, strengths=(1.0, 0.4)))
    assert relative(method.self_attention(made), expected) <= 1e-6


def test_padded_keys_are_not_seen():
    qkv = tensors(3)
    bias = torch.zeros(3, 63)
    bias[:, 40:] = -torch.inf
    qkv[1:, :, :, 40:] = torch.nan
    method = StyleID()
    out = method.self_attention(call(method, qkv, 2, 1, key_bias=bias))
    blended = 0.75 * qkv[0][0] + 0.25 * qkv[0][2]
    expected = papers.softmax_attention(blended, qkv[1][1][:, :40], qkv[2][1][:, :40], 1.5)
    assert relative(out[2], expected) <= 1e-5


@pytest.mark.parametrize("tokens", [1, 63, 257])
@pytest.mark.parametrize("contrast", [1.0, 1.67, 0.5])
def test_contrast(contrast, tokens):
    """Appearance alone, structure alone, and half of each; the clip is at work."""
    method, qkv = CrossImageAttention(contrast=contrast), tensors(6, tokens)
    both = [written_out(papers.cross_image(contrast, s), qkv) for s in (False, True)]
    for share, expected in ((0.0, both[0]), (1.0, both[1]), (0.5, (both[0] + both[1]) / 2)):
        out = method.self_attention(call(method, qkv, 2, strengths=(share, 1.0)))
        assert relative(out, expected) <= 1e-5
    unclipped = written_out(papers.cross_image(1.0), qkv)
    straight = contrast * unclipped + (1 - contrast) * qkv[2][[0, 1, 1, 3, 4, 4]].mean(-2, True)
    if contrast > 1 and tokens > 1:
        assert relative(both[0][[2, 5]], straight[[2, 5]]) > 1e-3


def test_contrast_of_padded_and_half_precision():
    qkv = tensors(3)
    bias = torch.zeros(3, 63)
    bias[:, 40:] = -torch.inf
    method = CrossImageAttention()
    out = method.self_attention(call(method, qkv, 2, 1, (0.0, 1.0), key_bias=bias))
    p = (qkv[0][2] @ qkv[1][1].mT / 4 + bias[0]).softmax(-1)
    expected = ((p - 1 / 63) * 1.67 + 1 / 63).clip(0, 1) @ qkv[2][1]
    assert relative(out[2], expected) <= 1e-5
    half = method.self_attention(call(method, qkv.bfloat16(), 2, 1, (0.0, 1.0)))
    exact = written_out(papers.cross_image(), qkv.bfloat16().double(), 1)
    assert half.dtype == torch.bfloat16 and relative(half.double(), exact) <= 2**-8


def test_structure_is_used_at_every_fifth_step_of_the_first_two_fifths():
    steps = structure_steps(100)
    assert [i for i, used in enumerate(steps) if used] == [0, 5, 10, 15, 20, 25, 30, 35]
    with pytest.raises(ValueError, match="at least three steps"):
        structure_steps(2)


def test_weights_in_a_shared_softmax():
    """log w on the reference's logits: Z-STAR and reference-only; 0 takes it away."""
    qkv = tensors(2)
    joint_k = torch.cat([qkv[1][1], qkv[1][0]], -2)
    logits = qkv[0][1] @ joint_k.mT / 4
    logits[..., 63:] += torch.tensor(0.3).log()
    expected = logits.softmax(-1) @ torch.cat([qkv[2][1], qkv[2][0]], -2)
    for method in (ReferenceOnly(), ZStar(style_scale=1.0, rearrange_style=False)):
        out = method.self_attention(call(method, qkv, 1, 1, strengths=(0.3,)))
        assert relative(out[1], expected) <= 1e-5
        out = method.self_attention(call(method, qkv, 1, 1, strengths=(0.0,)))
        assert relative(out[1], papers.plain(*qkv)[1]) <= 1e-6


def test_style_fidelity_concerns_unconditional_rows_only():
    qkv = tensors(4)
    outs = [
        m.self_attention(call(m, qkv, 1)) for m in (ReferenceOnly(style_fidelity=f) for f in (0, 1))
    ]
    assert torch.equal(outs[0][2:], outs[1][2:])
    assert relative(outs[0][1], outs[1][1]) > 1e-3


def test_z_star_rearranges_the_style_for_one_image_only():
    method = ZStar()
    with pytest.raises(ValueError, match="looks at one image, this call has 2"):
        method.self_attention(call(method, tensors(3), 1, 1))
    alone = ZStar(rearrange_style=False)
    assert alone.self_attention(call(alone, tensors(3), 1, 1)).shape == (3, 2, 63, 16)


def test_missing_references_are_named():
    method = StyleID()
    with pytest.raises(ValueError, match=r"2 references \(content, style\), got 1"):
        method.self_attention(call(method, tensors(2), 1, 1))


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"gamma": 1.5, "temperature": float("nan")}, "gamma must lie in .*; temperature must be"),
        ({"compat": "port"}, "compat must be one of"),
        ({"references": ()}, r"2 Reference \(content, style\)"),
        ({"steps": (0.5, 0.1)}, "start <= end"),
        ({"gamma": True}, "gamma must be a finite number"),
    ],
)
def test_meaningless_knobs(knobs, message):
    with pytest.raises(ValueError, match=message):
        StyleID(**knobs)


@pytest.mark.parametrize("name", METHODS)
def test_settings_travel(name):
    cls = METHODS[name]
    method = cls()
    assert cls.from_dict(method.to_dict()).to_dict() == method.to_dict()
    assert cls.from_yaml(method.to_yaml()).to_dict() == method.to_dict()
