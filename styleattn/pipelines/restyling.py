"""Pictures that start from the content's own noise and are led on the way: Z-STAR, Cross-Image
Attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from styleattn.inversion import Trajectory
from styleattn.methods import CrossImageAttention
from styleattn.methods.cross_image_attention import structure_steps
from styleattn.processors.bank import input_scale
from styleattn.references import Reference

from .drawing import Drawing, adain
from .sources import Job

PULL = 0.01
"""Z-STAR: how much of the content's latents replaces those of the picture before every step."""
COARSE, FINE = (0.1, 0.7), (0.1, 0.9)
"""Cross-Image Attention: when its two levels of layers are at work."""
MATCHED = 0.2
"""Cross-Image Attention: from where on the latents get the appearance's statistics."""

StepEnd = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]


def towards_content(drawing: Drawing) -> list[Image.Image]:
    """Z-STAR: from the content's noise, each step's latents pulled a little to the content's.

        x_t <- 0.99 * x_t + 0.01 * x_t of the content

    Raises:
        ValueError: no content.

    Source: Deng et al., Z*, arXiv 2311.16491, and its official pipeline. Without the null-text
        optimisation that the latter uses for guidance.
    """
    content = _content(drawing)

    def pull(latents: Tensor, step: int) -> Tensor:
        return (1 - PULL) * latents + PULL * content.latents[step].to(latents)

    return drawing.generate(
        latents=drawing.start(content.latents[0]), callback_on_step_end=between(pull)
    )


def appearance(drawing: Drawing) -> list[Image.Image]:
    """Cross-Image Attention: the content's structure with the style's appearance.

    The decoder's two levels of layers work in steps 10-70 % and 10-90 %; the structure's own keys
    are used at every fifth step of the first 40 %; from 20 % on the latents get the appearance's
    mean and deviation, without masks. Layers or steps of the method's own replace the two levels,
    references of its own the schedule. Inversion and run are DDIM's, without the paper's guidance.

    Raises:
        ValueError: no content or style, or fewer than three steps.

    Source: Alaluf et al., Cross-Image Attention, arXiv 2311.03335.
    """
    content, style = _content(drawing), drawing.style
    if style is None:
        raise ValueError(f"{drawing.method.name} needs a style picture")
    steps = drawing.sampling.num_inference_steps

    def match(latents: Tensor, step: int) -> Tensor:
        if step < MATCHED * steps:
            return latents
        like = style[step].to(latents)
        return torch.stack([adain(x.float(), like.float()).to(latents) for x in latents])

    return drawing.generate(
        *levels(drawing.pipe, drawing.method, steps),
        latents=drawing.start(content.latents[0]),
        callback_on_step_end=between(match),
    )


def check(job: Job) -> None:
    """Refuse a run that is too short for the schedule.

    Raises:
        ValueError: fewer than three steps.
    """
    if job.method.references is None:
        structure_steps(job.sampling.num_inference_steps)


def levels(pipe: Any, method: CrossImageAttention, steps: int) -> tuple[CrossImageAttention, ...]:
    """The method for each of the decoder's two finest blocks with attention."""
    references = method.references or (Reference(steps=structure_steps(steps)), Reference())
    method = replace(method, references=references)
    if method.layers != "late" or method.steps != (0.0, 1.0):
        return (method,)
    names = [name for name in pipe.unet.attn_processors if name.startswith("up_blocks.")]
    blocks = sorted({name.split(".attentions.")[0] for name in names})[-2:]
    chosen = zip(blocks, (COARSE, FINE)[-len(blocks) :], strict=True)
    return tuple(replace(method, layers=f"{block}.*", steps=when) for block, when in chosen)


def between(change: Callable[[Tensor, int], Tensor]) -> StepEnd:
    """A `callback_on_step_end` that changes the latents before every step but the first.

    Args:
        change: of latents at the scale that the UNet sees, and the number of the step that follows.
    """

    def step_end(pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        timesteps = pipe.scheduler.timesteps
        if step + 1 >= len(timesteps):
            return tensors
        scale = input_scale(pipe.scheduler, timesteps[step + 1])
        changed = change(tensors["latents"] * scale, step + 1) / scale
        return {**tensors, "latents": changed}

    return step_end


def _content(drawing: Drawing) -> Trajectory:
    if drawing.content is None:
        raise ValueError(f"{drawing.method.name} needs a content picture")
    return drawing.content
