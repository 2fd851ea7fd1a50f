"""Methods on FLUX against joint attention written out densely: layer by layer, whole transformers,
whole runs."""

from __future__ import annotations

import math

import flux_oracles as oracle
import pytest
import random_flux
import torch
from random_flux import relative, run

from styleattn.methods import StyleAligned
from styleattn.processors import apply
from styleattn.references import Reference

torch.set_num_threads(1)
TEXT = 16


@pytest.fixture(scope="module")
def pipe():
    return random_flux.flux()


KNOBS = [
    ({}, {}),
    ({"adain_queries": False}, {"queries": False}),
    ({"adain_keys": False}, {"keys": False}),
    ({"adain_values": True}, {"values": True}),
    ({"share_attention": False}, {"share": False}),
    ({"shared_score_scale": 0.5}, {"scale": 0.5}),
    ({"shared_score_shift": math.log(2)}, {"shift": math.log(2)}),
    (
        {"shared_score_scale": 1.3, "shared_score_shift": -0.4, "adain_values": True},
        {"scale": 1.3, "shift": -0.4, "values": True},
    ),
    ({"only_self_level": 0.5}, {"layers": (1, 3)}),
    ({"layers": "single_transformer_blocks"}, {"layers": (2, 3)}),
    ({"layers": ["transformer_blocks.1", "single_transformer_blocks.0.*"]}, {"layers": (1, 2)}),
    ({"full_attention_share": True}, {"full": True}),
]
IDS = ["-".join(k) or "default" for k, _ in KNOBS]


@pytest.mark.parametrize(("knobs", "dense"), KNOBS, ids=IDS)
def test_style_aligned_over_a_whole_run(pipe, knobs, dense):
    plain = run(pipe)
    with oracle.densely(pipe.transformer, oracle.style_aligned(**dense), TEXT):
        expected = run(pipe)
    with apply(pipe, StyleAligned(**knobs)):
        got = run(pipe)
    assert relative(got, expected) <= 1e-5
    assert relative(got[1:], plain[1:]) > 1e-3  # the style is visible
    if not knobs.get("full_attention_share"):
        assert relative(got[0], plain[0]) <= 1e-5  # the reference is as it was


@pytest.mark.parametrize("backend", ["torch", "reference", "cpu"])
def test_backends_agree(pipe, backend):
    knobs = {"shared_score_shift": math.log(2), "shared_score_scale": 0.8, "adain_values": True}
    dense = {"shift": math.log(2), "scale": 0.8, "values": True}
    with oracle.densely(pipe.transformer, oracle.style_aligned(**dense), TEXT):
        expected = run(pipe)
    with apply(pipe, StyleAligned(**knobs), backend=backend):
        assert relative(run(pipe), expected) <= 1e-5


def test_true_guidance_is_two_calls_of_which_each_has_its_reference(pipe):
    guided = {"negative_prompt": ["ugly", "grey", "flat"], "true_cfg_scale": 2.0}
    with oracle.densely(pipe.transformer, oracle.style_aligned(), TEXT):
        expected = run(pipe, **guided)
    with apply(pipe, StyleAligned()):
        got = run(pipe, **guided)
    assert relative(got, expected) <= 1e-5
    assert relative(got, run(pipe, **guided)) > 1e-3


@pytest.mark.parametrize("grid", [(1, 2), (3, 3), (7, 9)])
@pytest.mark.parametrize("text", [1, 7])
@pytest.mark.parametrize("kind", ["double", "single"])
def test_layer(kind, grid, text):
    """One block's attention, odd lengths, strong channel means."""
    transformer = random_flux.transformer(
        num_layers=int(kind == "double"), num_single_layers=int(kind == "single")
    )
    inputs = random_flux.inputs(batch=3, text=text, grid=grid)
    inputs["hidden_states"] = inputs["hidden_states"] + 4 * torch.randn(3, 1, 4)
    knobs = {"shared_score_shift": 0.3, "shared_score_scale": 0.8}
    with torch.no_grad():
        with oracle.densely(transformer, oracle.style_aligned(shift=0.3, scale=0.8), text):
            expected = transformer(**inputs, return_dict=False)[0]
        with apply(transformer, StyleAligned(**knobs)):
            assert relative(transformer(**inputs, return_dict=False)[0], expected) <= 1e-5


def test_weight_and_mask_of_a_reference(pipe):
    """The weight is a bias of log w; the mask acts where the generated image's tokens are."""
    mask = torch.zeros(16, 8)
    mask[:, 4:] = 0.5
    mask[0, 0] = 1.0
    per_token = torch.nn.functional.interpolate(mask[None, None], (8, 8), mode="area").flatten()
    dense = oracle.style_aligned(queries=False, keys=False, weight=0.3, mask=per_token)
    with oracle.densely(pipe.transformer, dense, TEXT):
        expected = run(pipe)
    reference = Reference(weight=0.3, mask=mask)
    method = StyleAligned(adain_queries=False, adain_keys=False, references=(reference,))
    with apply(pipe, method):
        assert relative(run(pipe), expected) <= 1e-5


@pytest.mark.parametrize("reference", [Reference(weight=0.0), Reference(steps=(0.0, 0.0))])
def test_a_reference_without_weight_leaves_the_very_model(pipe, reference):
    expected = run(pipe)
    with apply(pipe, StyleAligned(references=(reference,))):
        assert torch.equal(run(pipe), expected)


def test_a_mask_of_zeros_shares_nothing(pipe):
    reference = Reference(mask=torch.zeros(4, 4))
    method = StyleAligned(adain_queries=False, adain_keys=False, references=(reference,))
    expected = run(pipe)
    with apply(pipe, method):
        assert relative(run(pipe), expected) <= 1e-5


def test_two_references_of_which_one_has_no_weight(pipe):
    """Weights (1, 0) of references in rows 0 and 1 are the first alone, for every row but them."""
    both = StyleAligned(references=(Reference(), Reference(weight=0.0)))
    with apply(pipe, both):
        got = run(pipe)
    with apply(pipe, StyleAligned()):
        expected = run(pipe)
    assert relative(got[[0, 2]], expected[[0, 2]]) <= 1e-5


def test_steps(pipe):
    """The style of the first two steps of four is the style while the noise is high."""
    calls = []

    def edit(*args):
        calls.append(1)
        first = len(calls) <= 2 * 4
        return oracle.style_aligned(layers=None if first else ())(*args)

    with oracle.densely(pipe.transformer, edit, TEXT):
        expected = run(pipe, steps=4)
    with apply(pipe, StyleAligned(steps=(0.0, 0.5))):
        assert relative(run(pipe, steps=4), expected) <= 1e-5


def test_a_curve_of_weights(pipe):
    weights = [1.0, 0.25, 0.0, 0.5]
    calls = []

    def edit(*args):
        weight = weights[len(calls) // 4]
        calls.append(1)
        layers = None if weight else ()
        return oracle.style_aligned(queries=False, keys=False, weight=weight, layers=layers)(*args)

    with oracle.densely(pipe.transformer, edit, TEXT):
        expected = run(pipe, steps=4)
    method = StyleAligned(adain_queries=False, adain_keys=False, steps=weights)
    with apply(pipe, method):
        assert relative(run(pipe, steps=4), expected) <= 1e-5
