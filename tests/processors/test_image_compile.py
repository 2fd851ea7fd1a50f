"""torch.compile of a UNet with image prompts: one graph over steps, scales and runs."""

from __future__ import annotations

import dataclasses

import image_prompts as images
import pytest
import random_pipelines as tiny
import torch
from image_prompts import embeds, given
from torch._dynamo.backends.common import aot_autograd

from styleattn.adapters import ip_adapter_from
from styleattn.methods import IPAdapter, StyleAligned
from styleattn.processors import apply
from styleattn.references import Reference

pytestmark = pytest.mark.slow
PROMPTS = ["a toy train", "a cat"]


@pytest.fixture(scope="module")
def pipe():
    return tiny.sdxl(
        block_out_channels=(16,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        attention_head_dim=(2,),
        transformer_layers_per_block=(1,),
    )


@pytest.fixture
def compiled(pipe):
    """The pipeline's UNet under an aot_eager that counts graphs as large as a UNet."""
    graphs = []

    def count(graph, inputs):
        graphs.extend([1] * (len(graph.graph.nodes) > 60))
        return graph.forward

    torch._dynamo.reset()
    plain = pipe.unet

    def compile_():
        pipe.unet = torch.compile(plain, fullgraph=True, backend=aot_autograd(fw_compiler=count))
        return graphs

    yield compile_
    pipe.unet = plain
    torch._dynamo.reset()


def own(pipe, state):
    cross = pipe.unet.config.cross_attention_dim
    names = images.cross_layers(pipe.unet)
    layers = [(n, pipe.unet.get_submodule(n).inner_dim, cross) for n in names]
    return ip_adapter_from(images.flat(state), layers)


def test_own_images(pipe, compiled, run, distance):
    """Steps, a mask, another scale, next to StyleAligned."""
    mask = torch.zeros(32, 32)
    mask[:, :16] = 1
    references = (
        Reference(embeds=embeds(0), steps=(1.0, 0.5, 0.2, 0.0)),
        Reference(embeds=embeds(1), mask=mask, prompts=(1,)),
    )
    method = IPAdapter(0.7, own(pipe, images.checkpoint(pipe.unet)), references=references)
    quiet = dataclasses.replace(method, scale=0.2)
    with apply(pipe, StyleAligned(), method) as handle:
        expected = run(pipe, PROMPTS, steps=4)
        graphs = compiled()
        got = run(pipe, PROMPTS, steps=4)
        handle.update(quiet)
        second = run(pipe, PROMPTS, steps=4)
    pipe.unet = pipe.unet._orig_mod
    with apply(pipe, StyleAligned(), quiet):
        assert distance(second, run(pipe, PROMPTS, steps=4)) <= 1e-5
    assert len(graphs) == 1
    assert distance(got, expected) <= 1e-5
    assert distance(second, got) > 1e-3


def test_loaded_images(pipe, compiled, run, distance):
    """With a schedule of ours on diffusers' scales."""
    pipe.unet._load_ip_adapter_weights([images.checkpoint(pipe.unet)])
    pipe.set_ip_adapter_scale(0.7)
    call = {"ip_adapter_image_embeds": given([embeds(0)])}
    with apply(pipe, IPAdapter(steps=(0.0, 0.5))):
        expected = run(pipe, PROMPTS, steps=4, **call)
        graphs = compiled()
        got = run(pipe, PROMPTS, steps=4, **call)
    assert len(graphs) == 1
    assert distance(got, expected) <= 1e-5
    pipe.unet = pipe.unet._orig_mod
    pipe.unload_ip_adapter()
