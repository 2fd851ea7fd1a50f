"""StyleID from two pictures: content and style are inverted, and their rows run along."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

from styleattn.inversion import ddim, encode_prompts
from styleattn.inversion.host import (
    decode_latents,
    default_size,
    device_of,
    noise_function,
    schedule_of,
)
from styleattn.processors import apply
from styleattn.processors.features import FeatureCache, cache_features, facts_of
from styleattn.references import StyleBank

from .drawing import Drawing, adain


def draw(drawing: Drawing) -> list[Image.Image]:
    """Pictures with the content's structure and the style's texture.

        z_T = AdaIN(z_T of the content, z_T of the style)

    with as much of the style's statistics as `style_statistics` says,
    and from there an ordinary run of the pipeline, whose chosen layers see the content's queries
    and the style's keys and values. With `compat="paper-code"` the authors' schedule: see
    `_as_published`.

    Raises:
        ValueError: no content or style, or trajectories with labels that do not suit `compat`.

    Source: Chung et al., Style Injection in Diffusion, CVPR 2024, arXiv 2312.09008.
    """
    content, style = drawing.content, drawing.style
    if content is None or style is None:
        raise ValueError("style_id needs a content picture and a style picture")
    published = drawing.method.compat == "paper-code"
    if published != (content.labels == "style_id"):
        needed = "style_id" if published else "consistent or paper"
        raise ValueError(
            f"style_id with compat={drawing.method.compat!r} needs inversions with labels {needed},"
            f" got {content.labels!r}"
        )
    drawing = replace(drawing, bank=_kept(drawing))
    start = adain(content.latents[0], style[0], drawing.method.style_statistics)
    if published:
        return _as_published(drawing, start)
    return drawing.generate(latents=drawing.start(start))


def _kept(drawing: Drawing) -> StyleBank | FeatureCache | None:
    """The references' features, in a folder for all that they depend on; or the bank itself."""
    bank = drawing.bank
    if drawing.features is None or not isinstance(bank, StyleBank):
        return bank
    guided = drawing.sampling.guidance_scale != 1.0
    facts = facts_of(drawing.pipe, drawing.method, bank, guided)
    told = repr(([r.prompt for r in bank.references], drawing.sampling.negative_prompt, facts))
    name = hashlib.sha256(bank.latents.cpu().numpy().tobytes() + told.encode()).hexdigest()[:16]
    place = Path(drawing.features, name)
    place.parent.mkdir(parents=True, exist_ok=True)
    return cache_features(drawing.pipe, drawing.method, bank, place=place, guided=guided)


def _as_published(drawing: Drawing, start: torch.Tensor) -> list[Image.Image]:
    """DDIM without its noisiest step, from latents of the noise schedule's very end.

    The authors' sampler compares an index with `start_step` and skips the first timestep, while
    its latents have the level of the last training timestep: noisier than the label they are shown
    with.
    """
    pipe, sampling = drawing.pipe, drawing.sampling
    schedule = schedule_of(pipe)
    bank = drawing.bank
    if bank is None or len(bank.timesteps) < 2:
        raise ValueError("compat='paper-code' needs at least two steps")
    height, width = default_size(pipe)
    size = (sampling.height or height, sampling.width or width)
    prompts = encode_prompts(pipe, list(drawing.prompts), sampling.negative_prompt)
    epsilon = noise_function(pipe, prompts, sampling.guidance_scale, *size)
    timesteps = bank.timesteps.tolist()
    plan = ddim.sampling_plan(timesteps, schedule.alphas_cumprod, schedule.final_alpha)[1:]
    x = start.expand(len(drawing.prompts), *start.shape).to(device_of(pipe))
    chunks = 1 if sampling.guidance_scale == 1.0 else 2
    with (
        apply(pipe, drawing.method, bank=bank, backend=drawing.backend) as handle,
        handle.layout(chunks, timesteps=bank.timesteps),
    ):
        for done, latents in enumerate(ddim.run(x, plan, epsilon), 2):
            x = latents
            if drawing.callback is not None:
                drawing.callback(done, len(timesteps))
    return decode_latents(pipe, x)
