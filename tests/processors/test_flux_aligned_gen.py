"""AlignedGen on FLUX against joint attention written out densely, over whole runs."""

from __future__ import annotations

import flux_oracles as oracle
import pytest
import random_flux
import torch
from random_flux import relative, run

from styleattn.methods import AlignedGen, StyleAligned
from styleattn.processors import apply
from styleattn.references import Reference

torch.set_num_threads(1)
TEXT, GRID = 16, (8, 8)


@pytest.fixture(scope="module")
def pipe():
    return random_flux.flux()


KNOBS = [
    ({}, {}),
    ({"adain_queries": False}, {"queries": False}),
    ({"adain_keys": False}, {"keys": False}),
    ({"shared_score_scale": 0.7}, {"scale": 0.7}),
    ({"offset": (0.0, 0.0)}, {"offset": (0, 0)}),
    ({"offset": (-1.0, 0.5)}, {"offset": (-1, 0.5)}),
    ({"layers": "all"}, {"layers": (0, 1, 2, 3)}),
]
IDS = ["-".join(k) or "default" for k, _ in KNOBS]


@pytest.mark.parametrize(("knobs", "dense"), KNOBS, ids=IDS)
def test_over_a_whole_run(pipe, knobs, dense):
    plain = run(pipe)
    with oracle.densely(pipe.transformer, oracle.aligned_gen(GRID, **dense), TEXT):
        expected = run(pipe)
    with apply(pipe, AlignedGen(**knobs)):
        got = run(pipe)
    assert relative(got, expected) <= 1e-5
    assert relative(got[1:], plain[1:]) > 1e-3  # the style is visible
    assert relative(got[0], plain[0]) <= 1e-5  # the reference is as it was


def test_the_scale_falls_with_the_noise_level(pipe):
    """(t / 1000)^2, t being the scheduler's: 4 layer calls a step."""
    levels = []

    def scale(call):
        return float(levels[call // 4] / 1000) ** 2

    run(pipe)
    levels += pipe.scheduler.timesteps.tolist()
    with oracle.densely(pipe.transformer, oracle.aligned_gen(GRID, scale=scale), TEXT):
        expected = run(pipe)
    with apply(pipe, AlignedGen(shared_score_scale=1.0, time_power=2.0)):
        assert relative(run(pipe), expected) <= 1e-5


def test_true_guidance(pipe):
    guided = {"negative_prompt": ["ugly", "grey", "flat"], "true_cfg_scale": 2.0}
    with oracle.densely(pipe.transformer, oracle.aligned_gen(GRID), TEXT):
        expected = run(pipe, **guided)
    with apply(pipe, AlignedGen()):
        assert relative(run(pipe, **guided), expected) <= 1e-5


def test_positions_moved_by_nothing_make_the_duplicate_of_the_reference_harmless(pipe):
    """Where the reference's keys are not moved and not scaled, it may see itself twice: masking
    its duplicate changes nothing. Moved, it must be masked, and is."""
    method = AlignedGen(offset=(0.0, 0.0), shared_score_scale=1.0, layers="all")
    plain = run(pipe)
    for shifted in (method, AlignedGen(layers="all")):
        with apply(pipe, shifted):
            assert relative(run(pipe)[0], plain[0]) <= 1e-5


def test_unlike_style_aligned_it_leaves_the_double_blocks(pipe):
    with apply(pipe, AlignedGen()) as handle:
        styled = [r.layer for r in handle.explain().rows if r.method == "aligned_gen"]
    assert styled == [f"single_transformer_blocks.{i}.attn" for i in (0, 1)]


def test_with_style_aligned_on_other_layers(pipe):
    double, single = "transformer_blocks", "single_transformer_blocks"
    calls = oracle.style_aligned(layers=(0, 1))
    other = oracle.aligned_gen(GRID)

    def edit(layer, *args):
        return (calls if layer < 2 else other)(layer, *args)

    with oracle.densely(pipe.transformer, edit, TEXT):
        expected = run(pipe)
    with apply(pipe, StyleAligned(layers=double), AlignedGen(layers=single)):
        assert relative(run(pipe), expected) <= 1e-5
    with pytest.raises(ValueError, match="exclude each other"):
        apply(pipe, StyleAligned(), AlignedGen())
    assert not any("Style" in type(p).__name__ for p in pipe.transformer.attn_processors.values())


@pytest.mark.parametrize(
    "bad",
    [
        {"offset": 1.0},
        {"adain_keys": 1},
        {"time_power": float("nan")},
        {"shared_score_scale": "1"},
        {"references": ()},
        {"steps": (0.5, 0.2)},
    ],
    ids=lambda b: next(iter(b)),
)
def test_bad_knobs(bad):
    with pytest.raises(ValueError, match="AlignedGen: "):
        AlignedGen(**bad)


def test_settings_travel():
    method = AlignedGen(offset=(0.0, 2.0), references=(Reference(weight=0.5),), time_power=2.0)
    again = AlignedGen.from_yaml(method.to_yaml())
    assert again.to_dict() == method.to_dict() and again.offset == (0.0, 2.0)


def test_it_is_refused_on_a_unet():
    import random_pipelines

    with pytest.raises(TypeError, match="aligned_gen does not work on a UNet2DConditionModel"):
        apply(random_pipelines.unet(**random_pipelines.XL), AlignedGen())
