"""Tiny pipelines with the block names of SDXL, and helpers to run them."""

from __future__ import annotations

import os

os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")

import pytest
import random_pipelines as tiny
import torch

torch.set_num_threads(1)

THREE_LEVELS = {
    "block_out_channels": (16, 32, 64),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (2, 4, 4),
    "transformer_layers_per_block": (1, 1, 2),
    "layers_per_block": 2,
}


class Runner:
    """A pipeline call with fixed noise, latents out."""

    prompts = ("a toy train", "a cat", "a house on a hill")

    def __call__(self, pipe, prompts=prompts, *, steps=2, seed=0, noise=None, **arguments):
        prompts = list(prompts)
        count = len(prompts) * arguments.get("num_images_per_prompt", 1)
        if noise is None:
            noise = self.noise(pipe, count, seed)
        return pipe(
            prompts,
            latents=noise.clone(),
            num_inference_steps=steps,
            output_type="latent",
            **arguments,
        ).images

    @staticmethod
    def noise(pipe, count, seed=0):
        unet = getattr(pipe.unet, "_orig_mod", pipe.unet)
        size = unet.config.sample_size
        generator = torch.Generator().manual_seed(seed)
        shape = (count, 4, size, size)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(unet.dtype)


@pytest.fixture
def run():
    return Runner()


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def pipe(request):
    return getattr(tiny, request.param)()


@pytest.fixture(scope="module")
def sdxl():
    return tiny.sdxl()


@pytest.fixture(scope="module")
def sdxl3():
    """Three levels: the block names of the real SDXL UNet."""
    return tiny.sdxl(**THREE_LEVELS)


def relative(a, b):
    """Largest difference over the largest value."""
    return float((a - b).abs().max() / b.abs().max())


@pytest.fixture(autouse=True)
def no_style_left(request):
    """Whatever a test did, the shared pipelines have no style afterwards."""
    from styleattn.processors import remove

    names = [n for n in ("pipe", "sdxl", "sdxl3") if n in request.fixturenames]
    pipes = [request.getfixturevalue(name) for name in names]
    yield
    for pipe in pipes:
        remove(pipe)


@pytest.fixture
def distance():
    return relative
