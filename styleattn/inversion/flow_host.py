"""What flow inversion needs from a FLUX pipeline: packed latents, prompt embeddings, schedule,
velocity function. Duck-typed: nothing here imports diffusers."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .flow import Velocity
from .host import HostUnsupported, Prompts, device_of, vae_scale

MAX_TOKENS = 512
_PARTS = ("transformer", "vae", "scheduler", "encode_prompt")


def is_flow(pipe: Any) -> bool:
    """Whether a pipeline has a transformer in place of a UNet."""
    return getattr(pipe, "unet", None) is None and getattr(pipe, "transformer", None) is not None


def check_flow_host(pipe: Any, call: str) -> None:
    """Refuse a pipeline that lacks what flow inversion needs.

    Raises:
        HostUnsupported: with every reason.
    """
    reasons = [f"it has no {part}" for part in _PARTS if getattr(pipe, part, None) is None]
    if not reasons:
        config = pipe.transformer.config
        if getattr(config, "guidance_embeds", None) is None:
            reasons.append(f"its {type(pipe.transformer).__name__} is no transformer of FLUX.1")
        name = type(pipe.scheduler).__name__
        if "FlowMatchEuler" not in name:
            reasons.append(f"its scheduler is a {name}, not FlowMatchEulerDiscreteScheduler")
        channels = 4 * pipe.vae.config.latent_channels
        if config.in_channels != channels:
            reasons.append(
                f"its transformer takes {config.in_channels} channels, packed latents have"
                f" {channels}: it wants a mask or a control picture besides (Fill, Depth, Canny),"
                " and what that is along an inversion is not defined; Redux, IP-Adapters, PuLID and"
                " the canvas of FillDiptych show such a model a picture"
            )
    if reasons:
        raise HostUnsupported(f"{call}: cannot use a {type(pipe).__name__}: " + "; ".join(reasons))


def flow_size(pipe: Any, height: int | None, width: int | None) -> tuple[int, int]:
    """The size in pixels of a run, the pipeline's own where it is not given.

    Raises:
        ValueError: no multiple of a token.
    """
    scale = vae_scale(pipe)
    own = int(getattr(pipe, "default_sample_size", 128)) * scale
    size = (own if height is None else height, own if width is None else width)
    if any(s <= 0 or s % (2 * scale) for s in size):
        raise ValueError(
            f"height and width must be positive multiples of {2 * scale}, got {size[0]} x {size[1]}"
        )
    return size


def flow_levels(pipe: Any, steps: int, height: int, width: int) -> list[float]:
    """The noise levels of a run, descending to 0: as the pipeline asks its scheduler for them,
    shifted by the number of image tokens where the scheduler does that. It is left as it is.

    Raises:
        ValueError: no steps, or levels that do not fall from at most 1 to 0.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"num_inference_steps must be a positive int, got {steps!r}")
    scheduler = copy.deepcopy(pipe.scheduler)
    config = scheduler.config
    tokens = (height // vae_scale(pipe) // 2) * (width // vae_scale(pipe) // 2)
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    first, last = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    mu = first + (last - first) * (tokens - low) / (high - low)
    given = None if config.get("use_flow_sigmas") else np.linspace(1.0, 1 / steps, steps)
    scheduler.set_timesteps(steps if given is None else None, sigmas=given, mu=mu)
    levels = [float(s) for s in scheduler.sigmas.double()]
    falls = all(a > b for a, b in itertools.pairwise(levels))
    if not falls or levels[0] > 1 or levels[-1] != 0:
        raise ValueError(f"the scheduler's noise levels do not fall from 1 to 0: {levels}")
    return levels


def flow_prompts(
    pipe: Any,
    prompts: Sequence[str],
    negative: str | None = None,
    max_sequence_length: int = MAX_TOKENS,
) -> Prompts:
    """Embed prompts one by one, so that no prompt's numbers depend on its neighbours.

    Args:
        negative: the negative prompt of true CFG; None is the empty prompt.
        max_sequence_length: tokens of T5.

    Returns:
        embeds [n, tokens, width] of T5, pooled [n, width] of CLIP.
    """
    if not prompts:
        raise ValueError("flow_prompts: no prompts")

    def told(prompt: str) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            embeds, pooled, _ = pipe.encode_prompt(
                prompt=prompt,
                prompt_2=None,
                device=device_of(pipe),
                max_sequence_length=max_sequence_length,
            )
        return embeds, pooled

    embeds, pooled = (torch.cat(x) for x in zip(*map(told, prompts), strict=True))
    against = [x.expand(len(prompts), *x.shape[1:]) for x in told(negative or "")]
    return Prompts(embeds, against[0], pooled, against[1])


def packed(latents: Tensor) -> Tensor:
    """[B, C, h, w] as tokens [B, h/2·w/2, 4C], each of 2 x 2 latents, channels outermost."""
    batch, channels, height, width = latents.shape
    cells = latents.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return cells.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, 4 * channels)


def unpacked(tokens: Tensor, height: int, width: int) -> Tensor:
    """The reverse of :func:`packed`: [B, C, height, width]."""
    batch, _, channels = tokens.shape
    cells = tokens.reshape(batch, height // 2, width // 2, channels // 4, 2, 2)
    return cells.permute(0, 3, 1, 4, 2, 5).reshape(batch, -1, height, width)


def image_ids(height: int, width: int, device: torch.device) -> Tensor:
    """[h/2·w/2, 3]: 0, row and column of every token of latents h x w."""
    rows, columns = torch.meshgrid(
        torch.arange(height // 2), torch.arange(width // 2), indexing="ij"
    )
    places = torch.stack((torch.zeros_like(rows), rows, columns), -1)
    return places.flatten(0, 1).to(device, torch.float32)


def velocity_function(pipe: Any, prompts: Prompts, guidance_scale: float) -> Velocity:
    """v(x, s) of the pipeline's transformer, told its guidance scale where it has an embedding.

    Returns:
        a function of x [n, C, h, w] fp32 and a noise level; n must be the number of prompts.

    Raises:
        ValueError: a guidance scale other than 1 for a transformer without the embedding.
    """
    model = pipe.transformer
    guided = bool(model.config.guidance_embeds)
    if not guided and guidance_scale != 1.0:
        raise ValueError(
            "this transformer has no guidance embedding: guidance_scale must be 1,"
            f" got {guidance_scale}"
        )
    pooled: Any = prompts.pooled
    embeds, pooled = prompts.embeds.to(model.dtype), pooled.to(model.dtype)
    text_ids = torch.zeros(embeds.shape[1], 3, device=embeds.device, dtype=embeds.dtype)

    def velocity(x: Tensor, level: float) -> Tensor:
        height, width = x.shape[2:]
        label = torch.full((x.shape[0],), level * 1000, device=x.device, dtype=torch.float32)
        scale = torch.full((x.shape[0],), guidance_scale, device=x.device, dtype=torch.float32)
        with torch.no_grad():
            output = model(
                hidden_states=packed(x).to(model.dtype),
                timestep=label.to(model.dtype) / 1000,
                guidance=scale if guided else None,
                pooled_projections=pooled,
                encoder_hidden_states=embeds,
                txt_ids=text_ids,
                img_ids=image_ids(height, width, x.device),
                return_dict=False,
            )[0]
        return unpacked(output.float(), height, width)

    return velocity
