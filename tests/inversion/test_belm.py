"""The exact inversion: what goes in comes out; and noise of every level."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from styleattn.inversion import (
    Stopped,
    belm,
    belm_invert,
    belm_sample,
    ddim,
    ddim_invert,
    noised,
)
from styleattn.inversion.host import encode_picture


def test_a_leap_solves_what_it_can_solve_exactly():
    """Its order: dy/ds linear in s is solved without error, in both directions; s = noise / signal.

    y = y0 + a * s + b * s^2 / 2  has  eps = a + b * s.
    """
    s = torch.tensor([0.3, 0.9, 2.5]).double()
    levels = (1 / (1 + s**2)).tolist()
    start, a, b = torch.randn(3, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    x = [(start + a * t + b * t**2 / 2) * level**0.5 for t, level in zip(s, levels, strict=True)]
    eps = a + b * s[1]
    assert ddim.relative_error(belm.leap(x[0], x[1], eps, levels), x[2]) < 1e-6
    assert ddim.relative_error(belm.leap(x[2], x[1], eps, levels[::-1]), x[0]) < 1e-6


@pytest.mark.parametrize("offset", [0, 1])
def test_round_trip(hosts, picture, offset):
    """With offset 0 the first step is the identity, which a leap cannot start from."""
    pipe = hosts.sdxl(scheduler=hosts.ddim(steps_offset=offset))
    options = {"num_inference_steps": 5, "guidance_scale": 2.0, "round_trip": True}
    found = belm_invert(pipe, picture, "a cat", **options)
    assert found.method == "belm" and found.round_trip_error < 1e-4
    assert found.round_trip_error < ddim_invert(pipe, picture, "a cat", **options).round_trip_error
    assert float((belm_sample(pipe, found) - found.latents[-1:]).abs().max()) < 1e-3


def test_it_goes_on_where_it_stopped(hosts, picture, tmp_path):
    pipe, file = hosts.sd(), tmp_path / "checkpoint"
    whole = belm_invert(pipe, picture, "", num_inference_steps=5)
    with pytest.raises(Stopped, match="after 3 of 5"):
        belm_invert(
            pipe,
            picture,
            "",
            num_inference_steps=5,
            checkpoint=file,
            callback=lambda done, total: done < 3,
        )
    again = belm_invert(pipe, picture, "", num_inference_steps=5, checkpoint=file)
    assert torch.equal(whole.latents, again.latents) and not file.exists()


def test_refusals(hosts, picture):
    pipe = hosts.sd()
    with pytest.raises(ValueError, match="at least two steps"):
        belm_invert(pipe, picture, "", num_inference_steps=1)
    other = ddim_invert(pipe, picture, "", num_inference_steps=2)
    with pytest.raises(ValueError, match="needs a trajectory of belm_invert, got ddim"):
        belm_sample(pipe, other)
    found = belm_invert(pipe, picture, "", num_inference_steps=2)
    with torch.no_grad():
        pipe.unet.conv_in.bias += 1
    with pytest.raises(ValueError, match="another network"):
        belm_sample(pipe, found)


def test_noise_of_every_level(hosts, picture):
    pipe = hosts.sd()
    found = noised(pipe, picture, "a cat", seed=3, num_inference_steps=4)
    clean = encode_picture(pipe, picture, 32, 32)
    assert torch.equal(found.latents[-1], clean) and found.method == "noised"
    noise = []
    for x, t in zip(found.latents, found.timesteps.tolist(), strict=False):
        alpha = float(pipe.scheduler.alphas_cumprod[t])
        noise.append((x - math.sqrt(alpha) * clean) / math.sqrt(1 - alpha))
    for a, b in itertools.pairwise(noise):
        assert abs(float(a.std()) - 1) < 0.15 and abs(float((a * b).mean())) < 0.15
    again = noised(pipe, picture, "a cat", seed=3, num_inference_steps=4)
    assert torch.equal(found.latents, again.latents)
    other = noised(pipe, picture, "a cat", seed=4, num_inference_steps=4)
    assert not torch.equal(found.latents[0], other.latents[0])
