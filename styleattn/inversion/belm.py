"""An exact inversion: a two-step sampler that can be run backwards.

With y = x / sqrt(alpha) and s = sqrt((1 - alpha) / alpha) the sampling of a diffusion model is the
differential equation dy/ds = eps. A leapfrog over three levels s0 < s1 < s2, with steps
h1 = s1 - s0 and h2 = s2 - s1,

    y0 = r * y2 + (1 - r) * y1 - h1 * (1 + h1 / h2) * eps(x1),    r = (h1 / h2)^2

asks the network in the middle only, so that y2 can be computed from y0 and y1 as well as y0 from
y2 and y1: what goes in comes out, up to rounding.

Source: Wang et al., BELM: Bidirectional Explicit Linear Multi-step Samplers for Exact Inversion in
    Diffusion Models, NeurIPS 2024, arXiv 2410.07273 (O-BELM).
"""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor

from . import ddim
from .host import (
    Picture,
    check_host,
    device_of,
    encode_prompts,
    fingerprint,
    noise_function,
    schedule_of,
)
from .invert import as_trajectory, clean_latents, steps_of
from .trajectory import Trajectory
from .walk import Callback, Checkpoint, identity, walk


def belm_invert(
    pipe: Any,
    picture: Picture | Tensor,
    prompt: str,
    *,
    num_inference_steps: int = 50,
    guidance_scale: float = 1.0,
    height: int | None = None,
    width: int | None = None,
    round_trip: bool = False,
    callback: Callback | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 10,
) -> Trajectory:
    """Invert a picture exactly: :func:`belm_sample` gives its latents back, up to rounding.

    The first step is DDIM's; one evaluation of the network a step. The state is the pair of the two
    noisiest latents. On the way they are kept in fp64: where a step is longer than the one before
    it, a leap multiplies what was rounded. The trajectory has them in fp32.

    Args:
        pipe, picture, prompt, num_inference_steps, guidance_scale, height, width, round_trip,
        callback, checkpoint, checkpoint_every: as in :func:`styleattn.inversion.ddim_invert`.

    Raises:
        HostUnsupported, ValueError, Stopped: as :func:`styleattn.inversion.ddim_invert`; and fewer
            than two steps.

    Source: Wang et al., BELM, arXiv 2410.07273.
    """
    check_host(pipe, "belm_invert")
    clean, size = clean_latents(pipe, picture, height, width)
    schedule, timesteps = steps_of(pipe, num_inference_steps)
    if len(timesteps) < 2:
        raise ValueError("belm_invert needs at least two steps")
    levels = ddim.levels(timesteps, schedule.alphas_cumprod, schedule.final_alpha)[::-1]
    labels = [0, *timesteps[::-1]]
    epsilon = noise_function(pipe, encode_prompts(pipe, [prompt]), guidance_scale, *size)
    network = fingerprint(pipe.unet)
    name = identity(clean, "belm", prompt, guidance_scale, timesteps, network)
    keeper = Checkpoint(checkpoint, name, checkpoint_every)

    def advance(found: list[Tensor]) -> Tensor:
        i = len(found)
        eps = epsilon(found[-1].float().to(device_of(pipe)), labels[i - 1]).cpu().double()
        if i == 1 or levels[i - 1] == levels[i - 2]:
            return ddim.move(found[-1], eps, levels[i - 1], levels[i])
        return leap(found[-2], found[-1], eps, levels[i - 2 : i + 1])

    found = walk(clean.double(), len(timesteps), advance, keeper, callback, len(timesteps))
    trajectory = as_trajectory(
        [x.float() for x in reversed(found)],
        timesteps,
        schedule,
        prompt,
        guidance_scale,
        size,
        "consistent",
        "belm",
        network,
    )
    if round_trip:
        back = belm_sample(pipe, trajectory)
        error = ddim.relative_error(back, trajectory.latents[-1:])
        trajectory = trajectory.with_round_trip_error(error)
    keeper.remove()
    return trajectory


def belm_sample(pipe: Any, trajectory: Trajectory) -> Tensor:
    """The clean latents [1, C, h, w] from the two noisiest of a trajectory.

    Raises:
        HostUnsupported: a pipeline that this cannot run on.
        ValueError: a trajectory of another inversion or network.
    """
    check_host(pipe, "belm_sample")
    if trajectory.method != "belm":
        raise ValueError(f"belm_sample needs a trajectory of belm_invert, got {trajectory.method}")
    if trajectory.fingerprint != fingerprint(pipe.unet):
        raise ValueError("belm_sample: the trajectory was made with another network")
    schedule, timesteps = schedule_of(pipe), trajectory.timesteps.tolist()
    levels = ddim.levels(timesteps, schedule.alphas_cumprod, schedule.final_alpha)
    prompts = encode_prompts(pipe, [trajectory.prompt])
    size = (trajectory.height, trajectory.width)
    epsilon = noise_function(pipe, prompts, trajectory.guidance_scale, *size)
    noisier, here = trajectory.latents[:1].double(), trajectory.latents[1:2].double()
    for i in range(1, len(timesteps)):
        eps = epsilon(here.float().to(device_of(pipe)), timesteps[i]).cpu().double()
        noisier, here = here, leap(noisier, here, eps, levels[i - 1 : i + 2])
    return here.float()


def leap(first: Tensor, middle: Tensor, epsilon: Tensor, levels: list[float]) -> Tensor:
    """The latent beyond two others: the leapfrog of this module, in either direction.

    Args:
        first, middle: latents of the first two levels; epsilon: the noise of the middle one.
        levels: alpha of three neighbouring levels, ascending or descending; the first two differ.

    Returns:
        fp64, as it is computed.
    """
    s = [((1 - a) / a) ** 0.5 for a in levels]
    back, on = s[1] - s[0], s[2] - s[1]
    y0, y1 = first.double() / levels[0] ** 0.5, middle.double() / levels[1] ** 0.5
    share = (on / back) ** 2
    y2 = share * y0 + (1 - share) * y1 + on * (1 + on / back) * epsilon
    return levels[2] ** 0.5 * y2
