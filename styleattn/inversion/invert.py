"""DDIM inversion of a picture, and DDIM sampling that records, through a pipeline's own UNet, VAE
and text encoders."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import ddim
from .host import (
    Picture,
    Schedule,
    check_host,
    default_size,
    device_of,
    encode_picture,
    encode_prompts,
    fingerprint,
    noise_function,
    schedule_of,
    timesteps_of,
    vae_scale,
)
from .trajectory import Trajectory
from .walk import Advance, Callback, Checkpoint, identity, report, walk


def ddim_invert(
    pipe: Any,
    picture: Picture | Tensor,
    prompt: str,
    *,
    num_inference_steps: int = 50,
    guidance_scale: float = 2.0,
    labels: str = "paper",
    height: int | None = None,
    width: int | None = None,
    round_trip: bool = False,
    callback: Callback | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 10,
) -> Trajectory:
    """Find the noise that DDIM would turn into a picture, and keep every latent on the way.

    For ascending timesteps: x ← √ᾱ_t·(x - √(1-ᾱ_prev)·ε)/√ᾱ_prev + √(1-ᾱ_t)·ε, with ε of the UNet
        under classifier-free guidance,
    at label t ("paper") or at the label of the latent's own level ("consistent"); "style_id" is the
    schedule of StyleID's code (:func:`_shown`). Where the first
    timestep is 0 and the scheduler has ``set_alpha_to_one=False`` the first step is the identity.

    Args:
        pipe: a Stable Diffusion 1, 2 or XL pipeline; its scheduler gives ᾱ, timesteps and
            prediction type and is not changed.
        picture: a PIL image or a path; or clean latents [C, h, w] or [1, C, h, w], scaled as the
            UNet takes them.
        prompt: what the picture shows.
        num_inference_steps: of the scheduler; use the same number for sampling.
        guidance_scale: 1 computes no unconditional row.
        labels: "paper", "consistent" or "style_id".
        height, width: pixels that the picture is fitted to; the pipeline's own size if None.
            Latents bring their own.
        round_trip: also sample back with DDIM from z_T and note ‖z_0' - z_0‖ / ‖z_0‖ (as many UNet
            calls again).
        callback: called with (steps done, all steps) after each step; returning False stops.
        checkpoint: a file that is written every ``checkpoint_every`` steps and when the run is
            interrupted, resumed from if it exists, and deleted at the end.

    Returns:
        the trajectory; computed in fp32 between UNet calls, which are in the UNet's dtype.

    Raises:
        HostUnsupported: a pipeline that this cannot run on.
        ValueError: unreadable picture, wrong latents, sizes, step count or labels; a checkpoint of
            another inversion.
        Stopped: the callback returned False.

    Source: StyleAligned (arXiv 2312.02133), transfer from a real picture; DDIM (arXiv 2010.02502),
        section 4.3.
    """
    check_host(pipe, "ddim_invert")
    clean, size = clean_latents(pipe, picture, height, width)
    schedule, timesteps = steps_of(pipe, num_inference_steps)
    plan = ddim.inversion_plan(
        timesteps[::-1], schedule.alphas_cumprod, schedule.final_alpha, labels
    )
    prompts = encode_prompts(pipe, [prompt])
    epsilon = noise_function(pipe, prompts, guidance_scale, *size)
    network = fingerprint(pipe.unet)
    name = identity(clean, prompt, guidance_scale, labels, timesteps, network)
    keeper = Checkpoint(checkpoint, name, checkpoint_every)
    total = len(plan) * (2 if round_trip else 1)
    done = walk(clean, len(plan), moving(pipe, plan, epsilon), keeper, callback, total)
    trajectory = as_trajectory(
        _shown(done, labels),
        timesteps,
        schedule,
        prompt,
        guidance_scale,
        size,
        labels,
        "ddim",
        network,
    )
    if round_trip:
        error = _round_trip(trajectory, schedule, epsilon, device_of(pipe), callback, total)
        trajectory = trajectory.with_round_trip_error(error)
    keeper.remove()
    return trajectory


def ddim_sample(
    pipe: Any,
    prompt: str,
    *,
    seed: int = 0,
    num_inference_steps: int = 50,
    guidance_scale: float = 5.0,
    height: int | None = None,
    width: int | None = None,
    callback: Callback | None = None,
) -> Trajectory:
    """Make a picture from a prompt with deterministic DDIM and keep every latent: a reference that
    needs no inversion.

    Args:
        pipe, prompt, num_inference_steps, guidance_scale, height, width, callback: as in
            :func:`ddim_invert`.
        seed: of the starting noise, drawn on the CPU.

    Raises:
        HostUnsupported, ValueError, Stopped: as :func:`ddim_invert`.
    """
    check_host(pipe, "ddim_sample")
    size = _size(pipe, height, width)
    schedule, timesteps = steps_of(pipe, num_inference_steps)
    plan = ddim.sampling_plan(timesteps, schedule.alphas_cumprod, schedule.final_alpha)
    epsilon = noise_function(pipe, encode_prompts(pipe, [prompt]), guidance_scale, *size)
    shape = (1, pipe.unet.config.in_channels, *(s // vae_scale(pipe) for s in size))
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    keeper = Checkpoint(None, "", 1)
    done = walk(noise, len(plan), moving(pipe, plan, epsilon), keeper, callback, len(plan))
    return as_trajectory(
        done,
        timesteps,
        schedule,
        prompt,
        guidance_scale,
        size,
        "consistent",
        "sample",
        fingerprint(pipe.unet),
    )


def round_trip_error(pipe: Any, trajectory: Trajectory) -> float:
    """Sample back from z_T with DDIM, the trajectory's own prompt and guidance: ‖z_0' - z_0‖ /
    ‖z_0‖.

    Raises:
        HostUnsupported: a pipeline that this cannot run on.
        ValueError: the trajectory was made with another network.
    """
    check_host(pipe, "round_trip_error")
    if trajectory.fingerprint and trajectory.fingerprint != fingerprint(pipe.unet):
        raise ValueError("round_trip_error: the trajectory was made with another network")
    prompts = encode_prompts(pipe, [trajectory.prompt])
    size = (trajectory.height, trajectory.width)
    epsilon = noise_function(pipe, prompts, trajectory.guidance_scale, *size)
    return _round_trip(trajectory, schedule_of(pipe), epsilon, device_of(pipe), None, 0)


def check_run(
    pipe: Any, num_inference_steps: int, height: int | None, width: int | None
) -> tuple[int, int]:
    """The size in pixels of a run that a pipeline can make.

    Raises:
        ValueError: more steps than the scheduler has levels, or a size that is no multiple of a
            latent.
    """
    levels = int(pipe.scheduler.config.num_train_timesteps)
    if not 1 <= num_inference_steps <= levels:
        raise ValueError(f"num_inference_steps must lie in 1..{levels}, got {num_inference_steps}")
    return _size(pipe, height, width)


def steps_of(pipe: Any, num_inference_steps: int) -> tuple[Schedule, list[int]]:
    check_run(pipe, num_inference_steps, None, None)
    return schedule_of(pipe), timesteps_of(pipe, num_inference_steps)


def _size(pipe: Any, height: int | None, width: int | None) -> tuple[int, int]:
    own = default_size(pipe)
    size = (own[0] if height is None else height, own[1] if width is None else width)
    scale = vae_scale(pipe)
    if any(s <= 0 or s % scale for s in size):
        raise ValueError(
            f"height and width must be positive multiples of {scale}, got {size[0]} x {size[1]}"
        )
    return size


def clean_latents(
    pipe: Any, picture: Picture | Tensor, height: int | None, width: int | None
) -> tuple[Tensor, tuple[int, int]]:
    """[1, C, h, w] fp32 and the size in pixels."""
    if not isinstance(picture, Tensor):
        size = _size(pipe, height, width)
        return encode_picture(pipe, picture, *size)[None], size
    latents = picture.detach().float()
    latents = latents[None] if latents.ndim == 3 else latents
    channels = pipe.unet.config.in_channels
    if latents.ndim != 4 or latents.shape[:2] != (1, channels):
        raise ValueError(f"latents must be [{channels}, h, w], got {list(picture.shape)}")
    if not bool(torch.isfinite(latents).all()):
        raise ValueError("latents are not finite")
    found = (latents.shape[2] * vae_scale(pipe), latents.shape[3] * vae_scale(pipe))
    if (height, width) not in ((None, None), found):
        raise ValueError(
            f"latents are of a {found[0]} x {found[1]} picture, not {height} x {width}"
        )
    return latents, found


def moving(pipe: Any, plan: Sequence[ddim.Move], epsilon: ddim.Epsilon) -> Advance:
    """The moves of a DDIM plan, one after the other, where the pipeline computes."""

    def advance(found: list[Tensor]) -> Tensor:
        here = found[-1].to(device_of(pipe))
        return next(ddim.run(here, plan[len(found) - 1 : len(found)], epsilon))

    return advance


def _shown(done: list[Tensor], labels: str) -> list[Tensor]:
    """Latents in the order of sampling, each where it is shown.

    With labels "style_id" the walk visits x of the first timestep (the data), ..., the last
    timestep, and the schedule's end. Sampling starts from the latter in place of the last
    timestep's, which is never shown.
    """
    if labels != "style_id":
        return done[::-1]
    return [done[-1], *done[:-2][::-1], done[0]]


def as_trajectory(
    latents: list[Tensor],
    timesteps: list[int],
    schedule: Schedule,
    prompt: str,
    guidance_scale: float,
    size: tuple[int, int],
    labels: str,
    method: str,
    network: str,
) -> Trajectory:
    stacked = torch.cat(latents)
    if not bool(torch.isfinite(stacked).all()):
        raise ValueError(
            "the latents became infinite or NaN on the way "
            "(a UNet in float16 that needs bfloat16 or float32?)"
        )
    alphas = ddim.levels(timesteps, schedule.alphas_cumprod, schedule.final_alpha)
    if labels == "style_id":
        alphas[0] = max(schedule.alphas_cumprod[-1], ddim.MIN_ALPHA)
    return Trajectory(
        latents=stacked,
        timesteps=torch.tensor(timesteps, dtype=torch.int64),
        alphas=torch.tensor(alphas, dtype=torch.float64),
        prompt=prompt,
        guidance_scale=float(guidance_scale),
        height=size[0],
        width=size[1],
        labels=labels,
        method=method,
        fingerprint=network,
    )


def _round_trip(
    trajectory: Trajectory,
    schedule: Schedule,
    epsilon: ddim.Epsilon,
    device: torch.device,
    callback: Callback | None,
    total: int,
) -> float:
    timesteps = trajectory.timesteps.tolist()
    plan = ddim.sampling_plan(timesteps, schedule.alphas_cumprod, schedule.final_alpha)
    plan = plan[1:] if trajectory.labels == "style_id" else plan
    found = trajectory.latents[:1].to(device)
    for done, latent in enumerate(ddim.run(found, plan, epsilon), len(plan) + 1):
        found = latent
        report(callback, done, total, None)
    return ddim.relative_error(found.cpu(), trajectory.latents[-1:])
