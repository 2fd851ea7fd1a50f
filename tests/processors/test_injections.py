"""Attention-injection methods on whole tiny UNets over all steps, against the written-out
processors."""

from __future__ import annotations

from dataclasses import replace

import injection_oracles as papers
import pytest
import torch

from styleattn.inversion import ddim_invert, encode_prompts
from styleattn.inversion.host import time_ids
from styleattn.methods import (
    CrossImageAttention,
    MutualAttention,
    ReferenceOnly,
    StyleID,
    VisualStylePrompting,
    ZStar,
)
from styleattn.processors import apply
from styleattn.processors._layers import layer_weights
from styleattn.processors.bank import build_bank
from styleattn.references import Reference

LATE = ("up_blocks.1.",)
STYLE_ID = ("up_blocks.1.attentions.1.", "up_blocks.1.attentions.2.")

CASES = {
    "style_id": (StyleID(), papers.style_id(), STYLE_ID, 2),
    "style_id-strong": (StyleID(gamma=0.3, layers="all"), papers.style_id(0.3), ("",), 2),
    "visual_style_prompting": (VisualStylePrompting(), papers.swap, LATE, 1),
    "mutual_attention": (MutualAttention(layers="all"), papers.swap, ("",), 1),
    "z_star": (ZStar(layers="all"), papers.z_star(), ("",), 1),
    "cross_image_attention": (
        CrossImageAttention(references=(Reference(weight=0.0), Reference())),
        papers.cross_image(),
        LATE,
        2,
    ),
    "reference_only": (ReferenceOnly(), papers.reference_only(), ("",), 1),
}
# Z-STAR has one image beside the style; MasaCtrl leaves the first steps alone.
PROMPTS = {"z_star": ("a toy train", "a cat")}
PLAIN_STEPS = {"mutual_attention": 1, "z_star": 1}
STEPS = 3


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("case", CASES)
def test_whole_unet(sdxl3, run, distance, case, guidance):
    """The references are the first prompts of the call."""
    method, rule, layers, references = CASES[case]
    chunks = 2 if guidance > 1 else 1
    options = {"guidance_scale": guidance, "steps": STEPS}
    if case in PROMPTS:
        options["prompts"] = PROMPTS[case]
    plain = run(sdxl3, **options)
    expected = run(sdxl3, **options, **after(PLAIN_STEPS.get(case, 0), sdxl3, rule, layers, chunks))
    method = replace(method, steps=(PLAIN_STEPS.get(case, 0) / STEPS, 1.0))
    with apply(sdxl3, method):
        got = run(sdxl3, **options)
    assert distance(got, expected) <= 1e-5
    assert distance(got[references:], plain[references:]) > 3e-4  # the style is visible
    assert torch.equal(run(sdxl3, **options), plain)


def after(steps, pipe, rule, layers, chunks):
    """Arguments of a pipeline call whose steps from the given one on follow a rule."""
    scope = papers.styled(pipe.unet, dict.fromkeys(layers, rule), chunks)

    def step_end(pipe, step, t, tensors):
        if step + 1 == steps:
            scope.__enter__()
        if step + 1 == STEPS:
            scope.__exit__(None, None, None)
        return tensors

    if not steps:
        scope.__enter__()
    return {"callback_on_step_end": step_end}


@pytest.mark.parametrize("case", ["mutual_attention", "z_star"])
def test_the_first_four_of_fifty_steps_are_left_alone(case):
    assert CASES[case][0].steps == (4 / 50, 1.0)


def loop(pipe, trajectories, prompts, noise, steps, guidance=5.0):
    """A DDIM run written out: reference rows put in at their own noise level at every step."""
    told = encode_prompts(pipe, [*(t.prompt for t in trajectories), *prompts])
    chunks = [told.negative_embeds, told.embeds]
    pooled = [told.negative_pooled, told.pooled]
    rows = len(told.embeds)
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    ids = time_ids(pipe, side, side).expand(2 * rows, -1)
    added = {"text_embeds": torch.cat(pooled), "time_ids": ids} if pooled[0] is not None else None
    pipe.scheduler.set_timesteps(steps)
    x, count = noise, len(trajectories)
    for i, t in enumerate(pipe.scheduler.timesteps):
        shown = torch.cat([*(tr.latents[i : i + 1] for tr in trajectories), x])
        with torch.no_grad():
            out = pipe.unet(torch.cat([shown] * 2), t, torch.cat(chunks), added_cond_kwargs=added)
        uncond, cond = (part[count:] for part in out.sample.chunk(2))
        x = pipe.scheduler.step(uncond + guidance * (cond - uncond), t, x).prev_sample
    return x


def test_references_of_a_bank_are_rows_of_every_step(sdxl3, run, distance):
    """The three-row batch: content and style at their own noise levels, nothing cached."""
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    options = {"num_inference_steps": 3, "guidance_scale": 1.0, "labels": "consistent"}
    paths = [ddim_invert(sdxl3, x, p, **options) for x, p in zip(latents, ("a", "b"), strict=True)]
    method = StyleID()
    bank = build_bank(sdxl3, [Reference(latents=t) for t in paths], method, num_inference_steps=3)
    assert bank.offset == 0
    noise = run.noise(sdxl3, 2)
    with papers.styled(sdxl3.unet, dict.fromkeys(STYLE_ID, papers.style_id())):
        expected = loop(sdxl3, paths, ["a cat", "a dog"], noise, 3)
    with apply(sdxl3, method, bank=bank):
        got = run(sdxl3, ["a cat", "a dog"], steps=3, guidance_scale=5.0, noise=noise)
    assert distance(got, expected) <= 1e-5


def test_a_bank_with_too_few_references_is_refused(sdxl3):
    bank = build_bank(sdxl3, Reference(prompt="a"), StyleID(), num_inference_steps=2)
    with pytest.raises(ValueError, match=r"2 references \(content, style\), this one has 1"):
        apply(sdxl3, StyleID(), bank=bank)


SD15 = [
    f"{part}.attentions.{a}.transformer_blocks.0.attn1"
    for part, count in (
        *((f"down_blocks.{b}", 2) for b in range(3)),
        *((f"up_blocks.{b}", 3) for b in (1, 2, 3)),
        ("mid_block", 1),
    )
    for a in range(count)
]
SDXL = [
    f"{part}.attentions.{a}.transformer_blocks.{t}.attn1"
    for part, count, depth in (
        ("down_blocks.1", 2, 2),
        ("down_blocks.2", 2, 10),
        ("up_blocks.0", 3, 10),
        ("up_blocks.1", 3, 2),
        ("mid_block", 1, 10),
    )
    for a in range(count)
    for t in range(depth)
]


def chosen(layers, names):
    return [name for name, weight in layer_weights(layers, names).items() if weight]


def test_layers_of_the_papers():
    """StyleID: the six layers of the paper on SD 1.x (not the five of its diffusers port), and
    AttenST's four on SDXL; "late" is Visual Style Prompting's six there."""
    assert len(SD15) == 16 and len(SDXL) == 70
    six = [name for name in SD15 if name.startswith(("up_blocks.2", "up_blocks.3"))]
    assert len(six) == 6
    assert chosen("style_id", SD15) == chosen("late", SD15) == six
    assert chosen("style_id", SDXL) == [n for n in SDXL if n.startswith(STYLE_ID)]
    assert chosen("late", SDXL) == [n for n in SDXL if n.startswith("up_blocks.1.")]
    assert len(chosen("style_id", SDXL)) == 4 and len(chosen("late", SDXL)) == 6


def test_references_follow_the_timestep_not_the_call(distance):
    """A scheduler that asks the model twice per step (Heun): every call sees the references at its
    own noise level; a cache that counted calls would run ahead."""
    import random_pipelines as tiny
    from diffusers import HeunDiscreteScheduler

    pipe = tiny.sdxl(scheduler=HeunDiscreteScheduler(**tiny.BETAS))
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    method = StyleID()
    references = [Reference(latents=x) for x in latents]
    bank = build_bank(pipe, references, method, num_inference_steps=3, labels="consistent")
    seen = []

    def note(module, args, kwargs):
        seen.append((float(kwargs["timestep"]), kwargs["sample"][:2].clone()))

    with apply(pipe, method, bank=bank):
        hook = pipe.unet.register_forward_pre_hook(note, with_kwargs=True)
        pipe("a cat", num_inference_steps=3, output_type="latent")
        hook.remove()
    calls = [t for t, _ in seen]
    assert len(calls) > len(set(calls)) == 3  # some levels are asked for twice
    for t, rows in seen:
        level = (bank.timesteps - t).abs().argmin()
        assert distance(rows, bank.latents[:, level]) <= 1e-6


def test_the_three_row_batch_needs_no_cache(sdxl3, run):
    """Nothing of the references' features outlives a call: the style holds no tensor of a layer."""
    method = StyleID()
    with apply(sdxl3, method) as handle:
        run(sdxl3)
        kept = vars(handle._controller)
        tensors = [v for v in kept.values() if isinstance(v, torch.Tensor)]
        assert not tensors and kept["now"] is None and not kept["_masks"]


def test_unconditional_rows_are_told_by_the_caller(sdxl3, run, distance):
    """Which chunk is unconditional comes from the pipeline, never from an assumed order: without
    guidance there is none, and style fidelity changes nothing."""
    outs = []
    for fidelity in (0.0, 1.0):
        with apply(sdxl3, ReferenceOnly(style_fidelity=fidelity)):
            outs.append([run(sdxl3, guidance_scale=g) for g in (1.0, 5.0)])
    assert torch.equal(outs[0][0], outs[1][0])
    assert distance(outs[0][1], outs[1][1]) > 1e-4
