"""Whole runs of FLUX next to other parts of diffusers: ControlNets, caches, modular pipelines."""

from __future__ import annotations

import pytest
import random_flux
import torch
from PIL import Image
from random_flux import PROMPTS, run

from styleattn.methods import AlignedGen, Redux, StyleAligned
from styleattn.processors import apply
from styleattn.references import Reference

torch.set_num_threads(1)
STYLE = StyleAligned(shared_score_shift=0.3)
TOKENS = torch.randn(9, 32, generator=torch.Generator().manual_seed(5))
REDUX = Redux(references=(Reference(embeds=TOKENS, weight=0.6),))
GUIDED = {"negative_prompt": ["ugly"] * 3, "true_cfg_scale": 2.0}


@pytest.fixture
def pipe():
    return random_flux.flux()


def relative(a, b):
    return float((a - b).abs().max() / b.abs().max())


def controlnet():
    """One whose zero convolutions speak."""
    from diffusers import FluxControlNetModel

    torch.manual_seed(3)
    config = {
        "in_channels": 4,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 32,
        "axes_dims_rope": (4, 4, 8),
        "guidance_embeds": True,
    }
    model = FluxControlNetModel(**config).eval()
    for name, parameter in model.named_parameters():
        if name.startswith("controlnet_"):
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def test_a_controlnet_pipeline():
    """It acts on the pictures and not on the reference, whose row is the plain model's; its own
    processors are nobody's business."""
    from diffusers import FluxControlNetPipeline

    pipe = FluxControlNetPipeline(**random_flux.parts(), controlnet=controlnet())
    pipe.set_progress_bar_config(disable=True)
    own = dict(pipe.controlnet.attn_processors)
    picture = Image.effect_noise((16, 16), 60).convert("RGB")

    def go(scale=1.0):
        more = {"control_image": [picture] * 3, "controlnet_conditioning_scale": scale}
        more["generator"] = torch.Generator().manual_seed(0)  # the control picture is sampled
        return run(pipe, steps=2, **more)

    plain, bare = go(), go(0.0)
    assert relative(plain, bare) > 1e-3
    with apply(pipe, STYLE):
        styled = go()
        assert all(p is own[n] for n, p in pipe.controlnet.attn_processors.items())
    assert relative(styled[0], bare[0]) <= 1e-5
    assert relative(styled[1:], plain[1:]) > 1e-3
    with apply(pipe, StyleAligned(shared_score_shift=0.3, control_reference=True)):
        assert relative(go()[0], plain[0]) <= 1e-5


@pytest.mark.parametrize("method", [STYLE, REDUX, AlignedGen()], ids=lambda m: m.name)
def test_a_cache_keeps_the_two_calls_of_true_guidance_apart(pipe, method):
    """Redux makes the conditional call longer than the other: what is kept of one does not fit the
    other. At a threshold of 0 nothing is left out."""
    from diffusers import FirstBlockCacheConfig

    with apply(pipe, method):
        expected = run(pipe, **GUIDED)
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
        assert relative(run(pipe, **GUIDED), expected) <= 1e-5
        pipe.transformer.disable_cache()
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))
        cached = run(pipe, **GUIDED)
        pipe.transformer.disable_cache()
    assert torch.isfinite(cached).all() and relative(cached, expected) > 1e-4


def test_a_modular_pipeline(pipe):
    """The same pictures as the pipeline in one piece makes."""
    from diffusers.modular_pipelines import FluxAutoBlocks

    modular = FluxAutoBlocks().init_pipeline()
    modular.update_components(**{n: c for n, c in pipe.components.items() if c is not None})
    modular.set_progress_bar_config(disable=True)
    noise = torch.randn(3, 64, 4, generator=torch.Generator().manual_seed(0))

    def go():
        return modular(
            prompt=list(PROMPTS),
            latents=noise,
            height=16,
            width=16,
            max_sequence_length=16,
            num_inference_steps=2,
            guidance_scale=3.5,
            output_type="pt",
            output="images",
        )

    plain = go()
    for method in (StyleAligned(steps=(0.0, 0.5)), REDUX):
        with apply(modular, method):
            styled = go()
        assert relative(styled[1:], plain[1:]) > 1e-3
        with apply(pipe, method):
            expected = pipe(
                list(PROMPTS),
                latents=noise,
                height=16,
                width=16,
                max_sequence_length=16,
                num_inference_steps=2,
                output_type="pt",
            ).images
        assert relative(styled, expected) <= 1e-5
