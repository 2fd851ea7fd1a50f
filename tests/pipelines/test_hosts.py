"""What recipes know of a pipeline's family."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import random_flux
import random_pipelines as tiny
import torch

from styleattn.inversion import HostUnsupported
from styleattn.pipelines import Sampling
from styleattn.pipelines.hosts import (
    call_arguments,
    check_sampling,
    denoiser,
    host_of,
    max_tokens,
    size_of,
)

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def flux():
    return random_flux.flux()


@pytest.fixture(scope="module")
def sdxl():
    return tiny.sdxl()


def test_families(flux, sdxl):
    assert (host_of(flux), host_of(sdxl)) == ("flux", "unet")
    assert denoiser(flux) is flux.transformer and denoiser(sdxl) is sdxl.unet
    compiled = SimpleNamespace(transformer=SimpleNamespace(_orig_mod=flux.transformer))
    assert host_of(compiled) == "flux"
    with pytest.raises(HostUnsupported, match="a call: cannot use a SimpleNamespace: it has no"):
        host_of(SimpleNamespace(transformer=object()), "a call")


def test_sizes_and_tokens(flux):
    assert size_of(flux, None, 16) == (128, 16)
    schnell = random_flux.flux(guidance_embeds=False)
    assert (max_tokens(flux), max_tokens(schnell)) == (512, 256)


def test_every_prompt_is_embedded_alone(flux):
    """And the negative prompt is there for every picture, where it acts."""
    two = call_arguments(flux, ["a cat", "a house"], Sampling(true_guidance=2.0))
    one = call_arguments(flux, ["a house"], Sampling(negative_prompt="x"))
    assert torch.equal(two["prompt_embeds"][1:], one["prompt_embeds"])
    assert two["true_cfg_scale"] == 2.0 and two["negative_prompt_embeds"].shape[0] == 2
    assert not any(name.startswith("negative") for name in one)


def test_every_reason_at_once(flux):
    sampling = Sampling(num_inference_steps=2000, height=15, negative_prompt="ugly")
    with pytest.raises(ValueError) as error:
        check_sampling(flux, sampling)
    for reason in ("1..1000, got 2000", "multiples of 2, got 15 x 128", "true guidance above 1"):
        assert reason in str(error.value)
    with pytest.raises(HostUnsupported, match="draws with a FluxFillPipeline"):
        check_sampling(flux, Sampling(), "FluxFillPipeline")


def test_pipelines_without_true_guidance(sdxl):
    guided, says = Sampling(true_guidance=2.0), "no true guidance next to its own"
    with pytest.raises(ValueError, match=says):
        check_sampling(sdxl, guided)
    with pytest.raises(ValueError, match=says):
        call_arguments(sdxl, ["a cat"], guided)
    with pytest.raises(ValueError, match=says):
        check_sampling(random_flux.fill(), guided, "FluxFillPipeline")
