"""Several styles at once, and with what else changes a pipeline: every combination is the formulas
written out, one after another."""

from __future__ import annotations

import contextlib

import image_prompts as images
import injection_oracles as injections
import official_style_aligned as official
import pytest
import random_pipelines as tiny
import torch
from image_prompts import Shown, embeds, given, written

from styleattn.adapters import ip_adapter_from
from styleattn.methods import InstantStyle, IPAdapter, StyleAligned, StyleID
from styleattn.processors import apply
from styleattn.references import Reference

STYLE, LAYOUT = "up_blocks.0.attentions.1", "down_blocks.2.attentions.1"
PROMPTS = ["a toy train", "a cat", "a house"]


def own(pipe, state):
    cross = pipe.unet.config.cross_attention_dim
    names = images.cross_layers(pipe.unet)
    layers = [(n, pipe.unet.get_submodule(n).inner_dim, cross) for n in names]
    return ip_adapter_from(images.flat(state), layers)


def rows(e, count=3, seen=None):
    """The embeddings of a guided call; `seen` are the prompts that see the image."""
    seen = range(count) if seen is None else seen
    return [[x] if i in seen else [] for x in (torch.zeros_like(e), e) for i in range(count)]


def halves(size=32):
    left = torch.zeros(size, size)
    left[:, : size // 2] = 1
    return left, 1 - left


def test_style_aligned_and_instant_style(sdxl3, run, distance):
    """The image acts on all rows but the reference, in the blocks of style and layout."""
    state = images.checkpoint(sdxl3.unet)
    reference = Reference(embeds=embeds(0), prompts=(1, 2))
    instant = InstantStyle(0.9, 0.3, own(sdxl3, state), references=reference)
    plain = run(sdxl3, PROMPTS)
    with apply(sdxl3, StyleAligned(shared_score_shift=0.5), instant):
        ours = run(sdxl3, PROMPTS)
    shown = Shown(state, rows(embeds(0), seen=(1, 2)), layers={STYLE: 0.9, LAYOUT: 0.3})
    args = official.Args(shared_score_shift=0.5)
    with official.styled(sdxl3.unet, args):
        aligned = run(sdxl3, PROMPTS)
        with written(sdxl3.unet, [shown]):
            expected = run(sdxl3, PROMPTS)
    assert distance(ours, expected) <= 1e-5
    assert distance(aligned, expected) > 1e-3
    assert torch.equal(run(sdxl3, PROMPTS), plain)


def lora(unet, where, rank=2):
    """A LoRA of the attention of some blocks, as published: (file, changes of the weights)."""
    g, file, changes = torch.Generator().manual_seed(7), {}, {}
    for name, module in unet.named_modules():
        inside = name.startswith(where) and (".attn1." in name or ".attn2." in name)
        if inside and name.endswith((".to_q", ".to_k", ".to_v", ".to_out.0")):
            out, into = module.weight.shape
            down = torch.randn(rank, into, generator=g) / into**0.5
            up = torch.randn(out, rank, generator=g) / rank**0.5
            file[f"unet.{name}.lora_A.weight"], file[f"unet.{name}.lora_B.weight"] = down, up
            changes[name] = up @ down
    return file, changes


@contextlib.contextmanager
def merged(unet, changes):
    """Within: the LoRA added to the weights by hand."""
    for sign in (1, -1):
        for name, change in changes.items():
            weight = unet.get_submodule(name).weight
            weight.data = weight.data + sign * change
        if sign == 1:
            kept = {n: unet.get_submodule(n).weight.data - c for n, c in changes.items()}
            yield
    for name, weight in kept.items():
        unet.get_submodule(name).weight.data = weight


@contextlib.contextmanager
def uncontrolled(pipe, count=3):
    """Within: the ControlNet says nothing about the first row of each half."""

    def quiet(module, args, output):
        def without(x):
            x = x.clone()
            x[[0, count]] = 0
            return x

        return tuple(without(x) for x in output[0]), without(output[1])

    hook = pipe.controlnet.register_forward_hook(quiet)
    try:
        yield
    finally:
        hook.remove()


@pytest.mark.parametrize("control_reference", [False, True])
def test_style_aligned_controlnet_and_lora(run, distance, control_reference):
    """With InstantStyle too; the LoRA is peft's in one run and part of the weights in the other."""
    pipe = tiny.sdxl_controlnet()
    control = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    state = images.checkpoint(pipe.unet)
    file, changes = lora(pipe.unet, "")
    call = {"image": control, "controlnet_conditioning_scale": 0.6}
    shown = Shown(state, rows(embeds(0)), layers={STYLE: 0.8})
    with contextlib.ExitStack() as stack:
        stack.enter_context(merged(pipe.unet, changes))
        stack.enter_context(official.styled(pipe.unet, official.Args()))
        stack.enter_context(written(pipe.unet, [shown]))
        if not control_reference:
            stack.enter_context(uncontrolled(pipe))
        expected = run(pipe, PROMPTS, **call)
    aligned = StyleAligned(control_reference=control_reference)
    instant = InstantStyle(0.8, adapter=own(pipe, state), references=Reference(embeds=embeds(0)))
    without = run(pipe, PROMPTS, **call)
    pipe.load_lora_weights(file)
    plain = run(pipe, PROMPTS, **call)
    assert distance(plain, without) > 1e-3
    with apply(pipe, aligned, instant):
        assert distance(run(pipe, PROMPTS, **call), expected) <= 1e-5
    assert torch.equal(run(pipe, PROMPTS, **call), plain)


def test_two_image_prompts_with_masks_and_style_id(sdxl3, run, distance):
    """Content and style rows in self-attention, an image for each half of the third row in
    cross-attention."""
    states = [images.checkpoint(sdxl3.unet, s) for s in (0, 1)]
    masks = halves()
    plain = run(sdxl3, PROMPTS)
    prompts = [
        IPAdapter(
            scale,
            own(sdxl3, state),
            references=Reference(embeds=embeds(i), mask=masks[i], prompts=(2,)),
        )
        for i, (state, scale) in enumerate(zip(states, (0.9, 0.5), strict=True))
    ]
    with apply(sdxl3, StyleID(layers="all"), *prompts):
        ours = run(sdxl3, PROMPTS)
    shown = [
        Shown(state, rows(embeds(i), seen=(2,)), scale, masks[i])
        for i, (state, scale) in enumerate(zip(states, (0.9, 0.5), strict=True))
    ]
    with injections.styled(sdxl3.unet, {"": injections.style_id()}), written(sdxl3.unet, shown):
        expected = run(sdxl3, PROMPTS)
    assert distance(ours, expected) <= 1e-5
    assert distance(expected[2:], plain[2:]) > 1e-3
    assert torch.equal(run(sdxl3, PROMPTS), plain)


@pytest.mark.parametrize("order", ["before", "after"])
def test_b_lora(run, distance, order):
    """A LoRA of the style's block alone, loaded before or after, with every kind of method."""
    pipe = tiny.sdxl()
    state, (file, changes) = images.checkpoint(pipe.unet), lora(pipe.unet, STYLE)
    shown = Shown(state, rows(embeds(0)), 0.7)
    with (
        merged(pipe.unet, changes),
        official.styled(pipe.unet, official.Args()),
        written(pipe.unet, [shown]),
    ):
        expected = run(pipe, PROMPTS)
    methods = (
        StyleAligned(),
        IPAdapter(0.7, own(pipe, state), references=Reference(embeds=embeds(0))),
    )
    if order == "before":
        pipe.load_lora_weights(file, adapter_name="b")
    with apply(pipe, *methods):
        if order == "after":
            pipe.load_lora_weights(file, adapter_name="b")
        assert distance(run(pipe, PROMPTS), expected) <= 1e-5
        pipe.disable_lora()
        assert distance(run(pipe, PROMPTS), expected) > 1e-3


def test_textual_inversion(run, distance):
    """A new word of two vectors in both text encoders."""
    pipe = tiny.sdxl()
    g = torch.Generator().manual_seed(0)
    for encoder, tokenizer in (
        (pipe.text_encoder, pipe.tokenizer),
        (pipe.text_encoder_2, pipe.tokenizer_2),
    ):
        word = torch.randn(2, 32, generator=g)
        pipe.load_textual_inversion(
            word, token="<style>", text_encoder=encoder, tokenizer=tokenizer
        )
    prompts, state = ["a train, <style>", "a cat, <style>"], images.checkpoint(pipe.unet)
    method = IPAdapter(0.7, own(pipe, state), references=Reference(embeds=embeds(0)))
    with apply(pipe, StyleAligned(), method):
        ours = run(pipe, prompts)
        other = run(pipe, ["a train, style", "a cat, style"])
    shown = Shown(state, rows(embeds(0), 2), 0.7)
    with official.styled(pipe.unet, official.Args()), written(pipe.unet, [shown]):
        assert distance(ours, run(pipe, prompts)) <= 1e-5
    assert distance(other, ours) > 1e-4


@pytest.mark.parametrize("kind", ["own", "loaded"])
@pytest.mark.parametrize("how", ["sequential", "leaf_level"])
def test_offload(run, distance, kind, how):
    """Parameters that are elsewhere until their module runs."""
    pipe = tiny.sdxl()
    state, extra = images.checkpoint(pipe.unet), {}
    method = IPAdapter(0.7, own(pipe, state), references=Reference(embeds=embeds(0)))
    if kind == "loaded":
        pipe.unet._load_ip_adapter_weights([state])
        pipe.set_ip_adapter_scale(0.7)
        method, extra = IPAdapter(), {"ip_adapter_image_embeds": given([embeds(0)])}
    with apply(pipe, method):
        expected = run(pipe, ["a cat"], **extra)
    if how == "sequential":
        from accelerate import cpu_offload

        cpu_offload(pipe.unet, execution_device=torch.device("cpu"), offload_buffers=False)
    else:
        here = torch.device("cpu")
        pipe.unet.enable_group_offload(onload_device=here, offload_device=here, offload_type=how)
    with apply(pipe, method):
        assert distance(run(pipe, ["a cat"], **extra), expected) <= 1e-5


@pytest.mark.parametrize("kind", ["own", "loaded"])
def test_half_precision(run, distance, kind):
    """No further from single precision than twice diffusers' own distance."""
    pipe = tiny.sdxl()
    state = images.checkpoint(pipe.unet)
    method = IPAdapter(0.7, own(pipe, state), references=Reference(embeds=embeds(0)))
    call = {"ip_adapter_image_embeds": given([embeds(0)])}

    def theirs(**extra):
        pipe.unet._load_ip_adapter_weights([state])
        pipe.set_ip_adapter_scale(0.7)
        return run(pipe, ["a cat"], **extra).float()

    expected = theirs(**call)
    pipe.unload_ip_adapter()
    pipe.to(torch.bfloat16)
    call = {"ip_adapter_image_embeds": [e.bfloat16() for e in call["ip_adapter_image_embeds"]]}
    official = theirs(**call)
    if kind == "own":
        pipe.unload_ip_adapter()
    with apply(pipe, method if kind == "own" else IPAdapter()):
        ours = run(pipe, ["a cat"], **(call if kind == "loaded" else {}))
    assert ours.dtype == torch.bfloat16
    assert distance(ours.float(), expected) <= 2 * distance(official, expected)
