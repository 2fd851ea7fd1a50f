"""The panorama: windows, averaging, and what it must not depend on."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from styleattn.inversion import HostUnsupported, ddim_invert, ddim_sample
from styleattn.methods import StyleAligned
from styleattn.pipelines import panorama
from styleattn.pipelines.multidiffusion import view_corners

SETTINGS = {"height": 32, "width": 48, "num_inference_steps": 3, "stride": 4}


@pytest.fixture(scope="module")
def pipe(hosts):
    return hosts.sdxl()


def test_windows_cover_everything():
    assert view_corners(16, 32, (16, 16), 8) == [(0, 0), (0, 8), (0, 16)]
    assert view_corners(16, 30, (16, 16), 8) == [(0, 0), (0, 8), (0, 14)]  # the last at the edge
    assert view_corners(24, 16, (16, 16), 8) == [(0, 0), (8, 0)]
    for height, width, stride in ((17, 23, 5), (16, 16, 1), (40, 33, 16)):
        seen = np.zeros((height, width))
        for y, x in view_corners(height, width, (16, 16), stride):
            seen[y : y + 16, x : x + 16] += 1
        assert seen.min() >= 1


def test_one_window_is_an_aligned_pair(pipe):
    """A panorama of one window is the second image of an ordinary StyleAligned call."""
    import styleattn

    found = panorama(
        pipe, "hills", "a painting", **{**SETTINGS, "width": 32}, guidance_scale=3.0, seed=1
    )
    noise = torch.randn(1, 4, 16, 16, generator=(g := torch.Generator().manual_seed(1)))
    second = torch.randn(1, 4, 16, 16, generator=g)
    with styleattn.apply(pipe, StyleAligned()):
        pair = pipe(
            ["a painting", "hills"],
            latents=torch.cat([noise, second]),
            num_inference_steps=3,
            guidance_scale=3.0,
        ).images
    for ours, theirs in ((found.reference, pair[0]), (found.image, pair[1])):
        assert np.abs(np.asarray(ours, float) - np.asarray(theirs, float)).max() <= 1


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_batches_of_windows_change_rounding_only(pipe, guidance):
    found = [
        panorama(pipe, "x", "y", **SETTINGS, guidance_scale=guidance, view_batch_size=size)
        for size in (1, 2, 25)
    ]
    assert found[0].image.size == (48, 32)
    for other in found[1:]:
        for name in ("image", "reference"):
            ours, theirs = (np.asarray(getattr(f, name), float) for f in (found[0], other))
            assert np.abs(ours - theirs).max() <= 1


def test_the_reference_matters_and_the_pipeline_is_given_back(pipe):
    before, steps = dict(pipe.unet.attn_processors), []
    first = panorama(pipe, "x", "y", **SETTINGS, callback=lambda *done: steps.append(done))
    second = panorama(pipe, "x", "a very different reference", **SETTINGS)
    assert not np.array_equal(np.asarray(first.image), np.asarray(second.image))
    assert pipe.unet.attn_processors == before and steps == [(1, 3), (2, 3), (3, 3)]


def test_the_reference_is_the_ordinary_image_of_its_prompt(pipe):
    found = panorama(pipe, "x", "y", **SETTINGS, seed=7, guidance_scale=4.0)
    alone = ddim_sample(pipe, "y", seed=7, num_inference_steps=3, guidance_scale=4.0)
    from styleattn.inversion.host import decode_latents

    expected = decode_latents(pipe, alone.latents[-1:])[0]
    difference = np.asarray(found.reference, float) - np.asarray(expected, float)
    assert np.abs(difference).max() <= 1


def test_a_real_reference(pipe, picture):
    trajectory = ddim_invert(pipe, picture, "y", num_inference_steps=3)
    found = panorama(pipe, "x", "y", **SETTINGS, trajectory=trajectory)
    from styleattn.inversion.host import decode_latents

    expected = decode_latents(pipe, trajectory.latents[-1:])[0]
    assert np.array_equal(np.asarray(found.reference), np.asarray(expected))
    plain = panorama(pipe, "x", "y", **SETTINGS)
    assert not np.array_equal(np.asarray(found.image), np.asarray(plain.image))


def test_other_hosts_and_schedulers(hosts):
    from diffusers import EulerAncestralDiscreteScheduler

    pipe = hosts.sd(EulerAncestralDiscreteScheduler(**hosts.BETAS))
    found = [panorama(pipe, "x", "y", **SETTINGS) for _ in range(2)]
    assert np.array_equal(np.asarray(found[0].image), np.asarray(found[1].image))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"height": 16}, "at least 32 x 32"),
        ({"width": 33}, "multiples of 2"),
        ({"stride": 0}, "stride"),
        ({"stride": 17}, "stride"),
        ({"view_batch_size": 0}, "view_batch_size"),
    ],
)
def test_inputs_without_meaning(pipe, change, message):
    with pytest.raises(ValueError, match=message):
        panorama(pipe, "x", "y", **{**SETTINGS, **change})


def test_references_of_another_size(pipe, picture):
    trajectory = ddim_invert(pipe, picture, "y", num_inference_steps=2, height=24, width=24)
    with pytest.raises(ValueError, match="24 x 24"):
        panorama(pipe, "x", "y", **SETTINGS, trajectory=trajectory)
    with pytest.raises(HostUnsupported):
        panorama(object(), "x", "y", **SETTINGS)
